//! What the API refuses, and why: one canonical code, one reason for programs, one sentence for people.
//!
//! `docs/errors.md` is printed from here; a test compares it.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use wallaby_coordination::Error as CoordinationError;
use wallaby_model::flow::Problem;
use wallaby_staging::StagingError;

/// The domain of every reason.
pub const DOMAIN: &str = "wallaby";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $text:literal, $code:ident, $remedy:literal;)+) => {
        /// Why a request was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// All of them, in the order of the docs.
            pub const ALL: &[Reason] = &[$(Reason::$variant),+];

            /// The text that programs compare.
            pub fn text(self) -> &'static str {
                match self { $(Reason::$variant => $text),+ }
            }

            /// The canonical code it comes with.
            pub fn code(self) -> Code {
                match self { $(Reason::$variant => Code::$code),+ }
            }

            /// When it comes.
            pub fn meaning(self) -> &'static str {
                match self { $(Reason::$variant => concat!($($doc),+)),+ }
            }

            /// What to do.
            pub fn remedy(self) -> &'static str {
                match self { $(Reason::$variant => $remedy),+ }
            }
        }
    };
}

reasons! {
    /// The name of a resource is not of its form.
    NameInvalid = "NAME_INVALID", InvalidArgument, "write it as `flows/{flow}`, `flows/{flow}/sinks/{sink}`, `flows/{flow}/snapshots/{run}`, `flows/{flow}/operations/{number}` or `workers/{worker}`";
    /// The flow breaks a rule; the metadata maps each path to what is wrong there.
    FlowInvalid = "FLOW_INVALID", InvalidArgument, "mend what the message names; `wallaby apply --dry-run` checks without changing";
    /// A field of the request is outside its range.
    ArgumentInvalid = "ARGUMENT_INVALID", InvalidArgument, "mend what the message names";
    /// The update changes what cannot change.
    FieldImmutable = "FIELD_IMMUTABLE", FailedPrecondition, "delete the flow and create it again, or give a sink a new name";
    /// A flow of this name exists.
    FlowExists = "FLOW_EXISTS", AlreadyExists, "update it, or choose another name";
    /// There is no flow of this name.
    FlowNotFound = "FLOW_NOT_FOUND", NotFound, "`wallaby get flows` lists those that exist";
    /// There is no sink of this name in the flow.
    SinkNotFound = "SINK_NOT_FOUND", NotFound, "`wallaby get sinks` lists those that exist";
    /// There is no snapshot run of this number in the flow.
    SnapshotNotFound = "SNAPSHOT_NOT_FOUND", NotFound, "`wallaby snapshot list` lists those that are kept";
    /// A run that is not over loads the same tables into the same sinks.
    SnapshotOverlaps = "SNAPSHOT_OVERLAPS", FailedPrecondition, "wait for that run, or cancel it";
    /// The run is over, or was cancelled.
    SnapshotOver = "SNAPSHOT_OVER", FailedPrecondition, "start another one";
    /// Too many runs of the flow are not over.
    TooManySnapshots = "TOO_MANY_SNAPSHOTS", FailedPrecondition, "wait for some, or cancel them";
    /// There is no operation of this number in the flow, or it is not kept any more.
    OperationNotFound = "OPERATION_NOT_FOUND", NotFound, "the last ten of a flow are kept";
    /// Too many operations of the flow are not over.
    TooManyOperations = "TOO_MANY_OPERATIONS", FailedPrecondition, "wait for some, or cancel them: `wallaby verify shop --cancel 3`";
    /// The flow or the sink is paused, and what was asked needs it to go on.
    FlowPaused = "FLOW_PAUSED", FailedPrecondition, "`wallaby resume` it first";
    /// The sink or the capture stands still until a person has mended something, and what was asked needs it to go on.
    TaskStopped = "TASK_STOPPED", FailedPrecondition, "mend what the message names, then `wallaby resume` it";
    /// There is no live worker of this name.
    WorkerNotFound = "WORKER_NOT_FOUND", NotFound, "`wallaby workers` lists those that are alive";
    /// Somebody else changed the flow since it was read.
    FlowChanged = "FLOW_CHANGED", Aborted, "read it again and repeat the change";
    /// The flow is being deleted and takes no other change.
    FlowDeleting = "FLOW_DELETING", FailedPrecondition, "wait until it is gone, then create it again";
    /// The flow, or the change of it, is too large for one transaction of etcd.
    FlowTooLarge = "FLOW_TOO_LARGE", InvalidArgument, "name tables by schema, or add and remove fewer sinks at a time";
    /// The log moved on while a new sink was being added.
    LogMoved = "LOG_MOVED", Aborted, "try again";
    /// etcd does not answer the controller. Flows go on while it answers the workers; if it answers nobody, they stop before their leases end and go on by themselves later.
    EtcdUnreachable = "ETCD_UNREACHABLE", Unavailable, "check etcd; the controller recovers by itself";
    /// NATS does not answer.
    NatsUnreachable = "NATS_UNREACHABLE", Unavailable, "check the NATS servers; the controller recovers by itself";
    /// The controller has not yet read the state of all flows.
    Starting = "STARTING", Unavailable, "try again in a moment";
    /// A record in etcd cannot be read.
    RecordUnreadable = "RECORD_UNREADABLE", DataLoss, "it was written by another version or by hand: look at the key that the message names";
    /// etcd or NATS refused what we asked.
    Refused = "REFUSED", Internal, "the message says what was refused; the controller's log says more";
}

/// A refusal.
#[derive(Debug)]
pub struct ApiError {
    reason: Reason,
    message: String,
    metadata: HashMap<String, String>,
}

impl ApiError {
    /// A refusal with a sentence that says what is and what to do.
    pub fn new(reason: Reason, message: impl Into<String>) -> ApiError {
        ApiError { reason, message: message.into(), metadata: HashMap::new() }
    }

    /// Adds a fact for programs.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> ApiError {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// A flow that breaks rules: each named in the message and in the metadata.
    pub fn of_problems(reason: Reason, problems: Vec<Problem>) -> ApiError {
        let sentences: Vec<String> = problems.iter().map(|p| format!("{}: {}", p.path, p.message)).collect();
        let metadata = problems.into_iter().map(|problem| (problem.path, problem.message)).collect();
        ApiError { reason, message: sentences.join("; "), metadata }
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Status {
        let details = ErrorDetails::with_error_info(error.reason.text(), DOMAIN, error.metadata);
        Status::with_error_details(error.reason.code(), error.message, details)
    }
}

impl From<CoordinationError> for ApiError {
    fn from(error: CoordinationError) -> ApiError {
        let reason = match &error {
            CoordinationError::Unreachable { .. } => Reason::EtcdUnreachable,
            CoordinationError::FlowExists(_) => Reason::FlowExists,
            CoordinationError::FlowNotFound(_) => Reason::FlowNotFound,
            CoordinationError::FlowChanged { .. } => Reason::FlowChanged,
            CoordinationError::FlowDeleting(_) => Reason::FlowDeleting,
            CoordinationError::TooLarge { .. } | CoordinationError::TooManyOperations { .. } => Reason::FlowTooLarge,
            CoordinationError::HoldBelowPurge { .. } => Reason::LogMoved,
            CoordinationError::RunNotFound { .. } => Reason::SnapshotNotFound,
            CoordinationError::RunOverlaps { .. } => Reason::SnapshotOverlaps,
            CoordinationError::RunOver { .. } => Reason::SnapshotOver,
            CoordinationError::TooManyRuns { .. } => Reason::TooManySnapshots,
            CoordinationError::TooManyOpen { .. } => Reason::TooManyOperations,
            CoordinationError::WorkerNotFound(_) => Reason::WorkerNotFound,
            CoordinationError::Malformed { .. } => Reason::RecordUnreadable,
            _ => Reason::Refused,
        };
        ApiError::new(reason, error.to_string())
    }
}

impl From<StagingError> for ApiError {
    fn from(error: StagingError) -> ApiError {
        ApiError::new(Reason::NatsUnreachable, format!("the log cannot be read: {error}"))
    }
}

/// `docs/errors.md`.
pub fn errors_page() -> String {
    let mut page = String::from(
        "\
# Errors of the API

<!-- Generated from controller/src/reason.rs. Change it there, then run
     `WALLABY_REGENERATE=1 cargo test -p wallaby-controller errors_page`. -->

Each error has a canonical gRPC code, a sentence that says what is and what to do, and one `google.rpc.ErrorInfo` with the
domain `wallaby` and one of these reasons. Reasons do not change; sentences may. The `wallaby` command prints the reason in
brackets and turns the code into its exit code: INVALID_ARGUMENT 2, UNAVAILABLE 4, PERMISSION_DENIED and UNAUTHENTICATED 5,
DEADLINE_EXCEEDED 6, all others 1.

| reason | code | when | what to do |
|---|---|---|---|
",
    );
    for reason in Reason::ALL {
        let code = code_name(reason.code());
        page.push_str(&format!("| `{}` | {code} |{} | {} |\n", reason.text(), reason.meaning(), reason.remedy()));
    }
    page
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::NotFound => "NOT_FOUND",
        Code::Aborted => "ABORTED",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        _ => "INTERNAL",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn errors_page_is_the_generated_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md");
        if std::env::var_os("WALLABY_REGENERATE").is_some() {
            std::fs::write(path, errors_page()).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        let how = "docs/errors.md is stale: run `WALLABY_REGENERATE=1 cargo test -p wallaby-controller errors_page`";
        assert!(committed == errors_page(), "{how}");
    }

    #[test]
    fn a_refusal_carries_exactly_one_error_info() {
        let problem = Problem { path: "spec.sinks".into(), message: "a flow needs at least one sink".into() };
        let status = Status::from(ApiError::of_problems(Reason::FlowInvalid, vec![problem]));
        assert_eq!(status.code(), Code::InvalidArgument);
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("FLOW_INVALID", "wallaby"));
        assert_eq!(info.metadata["spec.sinks"], "a flow needs at least one sink");
        assert_eq!(status.get_error_details_vec().len(), 1);
    }

    #[test]
    fn reasons_are_unique() {
        let mut texts: Vec<&str> = Reason::ALL.iter().map(|reason| reason.text()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), Reason::ALL.len());
    }
}
