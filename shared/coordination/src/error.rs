//! What can go wrong between us and etcd.

use std::time::Duration;

use wallaby_model::{FlowId, Position, Reader, RunId, SinkId, TaskId, WorkerId};

use crate::Revision;

/// An error of the coordination layer. Messages carry keys and numbers, never values.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No endpoint took the request.
    #[error(
        "cannot reach etcd at {endpoints} ({doing}: {cause}). Check that etcd runs there and has a quorum (`etcdctl --endpoints {endpoints} endpoint status`), that address and port are right, and that nothing between here and there blocks them"
    )]
    Unreachable {
        /// The configured endpoints, separated by commas.
        endpoints: String,
        /// What was asked.
        doing: &'static str,
        /// What the last attempt met.
        cause: String,
    },
    /// The endpoints, the key prefix or the credentials cannot be used.
    #[error("the etcd settings cannot be used: {0}")]
    Settings(String),
    /// etcd answered with an error that another try would not mend.
    #[error("etcd refused {doing}: {cause}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// etcd's message.
        cause: String,
    },
    /// The lock of a task is not ours (any more): the write was not done, and none will be.
    #[error(
        "the lock of task {task} is no longer ours: {doing} was refused. Another worker owns the task, or it was removed; drop it"
    )]
    LockLost {
        /// The task.
        task: TaskId,
        /// The refused write.
        doing: &'static str,
    },
    /// The lease of this process ended; its locks went with it.
    #[error("the lease of {holder} has ended ({cause}): its locks are free for others; start a new session")]
    LeaseLost {
        /// The worker, or the controller replica.
        holder: String,
        /// Why.
        cause: String,
    },
    /// A value would not fit into an etcd request.
    #[error(
        "{key} would take {bytes} bytes, etcd takes at most {limit} in one request: make it smaller (fewer tables by name or in one snapshot run, fewer sinks)"
    )]
    TooLarge {
        /// The largest key of the request.
        key: String,
        /// Bytes of the whole request.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// One transaction would need more operations than etcd allows.
    #[error(
        "changing flow {flow} would take {operations} operations in one etcd transaction, at most {limit} are possible: add or remove fewer sinks at a time"
    )]
    TooManyOperations {
        /// The flow.
        flow: FlowId,
        /// How many it would take.
        operations: usize,
        /// How many are possible.
        limit: usize,
    },
    /// What stands in etcd cannot be read: written by another version, or by hand.
    #[error(
        "the value of {key} cannot be read ({cause}): it was written by another version of WALlaby or by hand; look at it with `etcdctl get {key}`"
    )]
    Malformed {
        /// The key.
        key: String,
        /// Where it fails; never the value.
        cause: String,
    },
    /// A flow of this name exists.
    #[error("flow {0} exists already: update it, or choose another name")]
    FlowExists(FlowId),
    /// No flow of this name.
    #[error("there is no flow {0}")]
    FlowNotFound(FlowId),
    /// Somebody else changed the flow since it was read.
    #[error(
        "flow {flow} was changed by somebody else (revision {found} instead of {expected}): read it again and repeat the change"
    )]
    FlowChanged {
        /// The flow.
        flow: FlowId,
        /// The revision that the change was based on.
        expected: Revision,
        /// The revision now.
        found: Revision,
    },
    /// A flow is being deleted and takes no change.
    #[error("flow {0} is being deleted and takes no other change")]
    FlowDeleting(FlowId),
    /// A reader's hold would lie below what was already purged.
    #[error(
        "reader {reader} of flow {flow} cannot start at {wanted}: the log was purged up to {purged}; start it at the log's end"
    )]
    HoldBelowPurge {
        /// The flow.
        flow: FlowId,
        /// The reader.
        reader: Reader,
        /// Where it was to start.
        wanted: Position,
        /// Up to where the log may be gone.
        purged: Position,
    },
    /// A new sink came without the position that it starts at.
    #[error("sink {reader} is new in flow {flow}: say from which position of the log it reads")]
    HoldMissing {
        /// The flow.
        flow: FlowId,
        /// The sink.
        reader: SinkId,
    },
    /// A reader has no hold: its sink was removed or cut off from the log, or its run is over.
    #[error(
        "reader {reader} of flow {flow} has no hold any more: its sink was removed or detached, or its run is over; stop reading"
    )]
    HoldGone {
        /// The flow.
        flow: FlowId,
        /// The reader.
        reader: Reader,
    },
    /// No run of this number.
    #[error("flow {flow} has no snapshot run {run}: `wallaby snapshot list {flow}` lists those it has")]
    RunNotFound {
        /// The flow.
        flow: FlowId,
        /// The run.
        run: RunId,
    },
    /// A run that is not over works on the same tables at the same sinks.
    #[error(
        "run {run} of flow {flow} is not over and loads the same tables ({tables}): wait for it, or cancel it with `wallaby snapshot cancel {flow} {run}`"
    )]
    RunOverlaps {
        /// The flow.
        flow: FlowId,
        /// The run that is not over.
        run: RunId,
        /// What both load.
        tables: String,
    },
    /// The run is over, or was cancelled, and takes no other wish.
    #[error("run {run} of flow {flow} is over or cancelled: start another one")]
    RunOver {
        /// The flow.
        flow: FlowId,
        /// The run.
        run: RunId,
    },
    /// Too many runs of the flow are not over.
    #[error("flow {flow} has {open} snapshot runs that are not over: wait for some, or cancel them")]
    TooManyRuns {
        /// The flow.
        flow: FlowId,
        /// How many.
        open: usize,
    },
    /// Too many operations of the flow are not over.
    #[error("flow {flow} has {open} operations that are not over: wait for some, or cancel them")]
    TooManyOpen {
        /// The flow.
        flow: FlowId,
        /// How many.
        open: usize,
    },
    /// The sink is not detached.
    #[error("sink {sink} of flow {flow} is not detached")]
    NotDetached {
        /// The flow.
        flow: FlowId,
        /// The sink.
        sink: SinkId,
    },
    /// A worker of this id has a lease.
    #[error(
        "a worker named {0} is alive: give this one another --name (WALLABY_WORKER_NAME), or end the other. One that was killed is gone when its lease ends"
    )]
    NameTaken(WorkerId),
    /// No worker of this id has a lease.
    #[error("there is no worker {0}: `wallaby workers` lists those that are alive")]
    WorkerNotFound(WorkerId),
}

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Error::Unreachable { .. } | Error::NameTaken(_))
    }

    /// Whether the caller no longer owns what it acted for: it stops without another write.
    pub fn is_ownership_lost(&self) -> bool {
        matches!(self, Error::LockLost { .. } | Error::LeaseLost { .. })
    }
}

/// What one attempt at etcd came to, before it is retried or given a name.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request may or may not have been done.
    Unknown(String),
    /// The request was not done and another try would not help.
    Refused(etcd_client::Error),
}

impl Failure {
    /// Sorts an error of the client. Whatever is not surely an answer of etcd's own counts as unknown.
    pub(crate) fn of(error: etcd_client::Error) -> Failure {
        use tonic_code::{is_definite, text};
        match &error {
            etcd_client::Error::GRpcStatus(status) if is_definite(status.code() as i32) => Failure::Refused(error),
            etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => Failure::Refused(error),
            _ => Failure::Unknown(text(&error)),
        }
    }

    pub(crate) fn timed_out(after: Duration) -> Failure {
        Failure::Unknown(format!("no answer within {after:?}"))
    }
}

pub(crate) mod tonic_code {
    //! gRPC codes by number: tonic is etcd-client's dependency, not ours.

    pub(crate) const INVALID_ARGUMENT: i32 = 3;
    pub(crate) const NOT_FOUND: i32 = 5;
    const PERMISSION_DENIED: i32 = 7;
    const FAILED_PRECONDITION: i32 = 9;
    pub(crate) const OUT_OF_RANGE: i32 = 11;
    const UNIMPLEMENTED: i32 = 12;
    const UNAUTHENTICATED: i32 = 16;

    /// Codes that etcd gives to a request that it looked at and did not do.
    pub(crate) fn is_definite(code: i32) -> bool {
        let definite = [
            INVALID_ARGUMENT,
            NOT_FOUND,
            PERMISSION_DENIED,
            FAILED_PRECONDITION,
            OUT_OF_RANGE,
            UNIMPLEMENTED,
            UNAUTHENTICATED,
        ];
        definite.contains(&code)
    }

    pub(crate) fn of(error: &etcd_client::Error) -> Option<i32> {
        match error {
            etcd_client::Error::GRpcStatus(status) => Some(status.code() as i32),
            _ => None,
        }
    }

    /// The message without tonic's metadata, which fills a screen.
    pub(crate) fn text(error: &etcd_client::Error) -> String {
        use std::error::Error as _;
        match error {
            etcd_client::Error::GRpcStatus(status) => {
                let mut text = status.message().to_owned();
                let mut source = status.source();
                while let Some(cause) = source {
                    let cause_text = cause.to_string();
                    // Each layer repeats the one below.
                    if !text.contains(&cause_text) {
                        text = format!("{text}: {cause_text}");
                    }
                    source = cause.source();
                }
                if text.is_empty() { format!("{:?}", status.code()) } else { text }
            }
            other => other.to_string(),
        }
    }
}
