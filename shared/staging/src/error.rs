//! What can go wrong with a log, in words that a person can act on.

use wallaby_model::{Epoch, FlowId, Lsn, Position};

use crate::record::RecordError;

/// What every fallible function of this crate returns.
pub type Result<T, E = StagingError> = std::result::Result<T, E>;

/// What can go wrong with a log.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StagingError {
    /// No NATS server answers, or it turns us away.
    #[error(
        "cannot connect to NATS at {servers}: {reason}; check that the servers run and the addresses and credentials are right"
    )]
    Connect {
        /// The addresses, without credentials.
        servers: String,
        /// What the client said.
        reason: String,
    },
    /// A shelf of the side store has no room for another object.
    #[error("the side store of flow {flow} has no room for {bytes} bytes more: {used} of {max} bytes are taken")]
    SideFull {
        /// The flow.
        flow: FlowId,
        /// What was to be kept.
        bytes: u64,
        /// What is taken.
        used: u64,
        /// The quota.
        max: u64,
    },
    /// The servers cannot reserve a shelf of the side store. Like a full one: what cannot stand there goes another way.
    #[error(
        "the NATS servers cannot reserve {max_bytes} bytes on {replicas} server(s) for {stream} ({reason}); lower {key}, or raise max_file_store of the servers or the account's limit"
    )]
    SideNoRoom {
        /// The stream.
        stream: String,
        /// The quota.
        max_bytes: u64,
        /// The copies that were asked for.
        replicas: usize,
        /// The key of the flow file that sets the quota.
        key: &'static str,
        /// What the server said.
        reason: String,
    },
    /// A shelf that was not made, or is gone.
    #[error(
        "{shelf} of the side store does not exist: it is made when it is first needed; if it was there, what stood in it is lost"
    )]
    SideMissing {
        /// The stream or folder.
        shelf: String,
    },
    /// Acknowledged objects are gone from a shelf. Final for who put there: whatever it put is not known to be there.
    #[error("the NATS servers lost the tail of {shelf}, which they had acknowledged: what was put there is put again")]
    SideTailLost {
        /// The stream.
        shelf: String,
    },
    /// A stream of a shelf's name is there, and it is none of ours.
    #[error(
        "stream {stream} exists, but it cannot serve as a side store: {what}; delete the stream, or give the flow another name"
    )]
    NotASide {
        /// The stream.
        stream: String,
        /// Which setting does not fit.
        what: String,
    },
    /// The side store's place cannot be used as the flow file says it: a mistake of whoever wrote it.
    #[error("the side store of flow {flow} cannot be opened at {place}: {reason}")]
    SidePlace {
        /// The flow.
        flow: FlowId,
        /// The URL, without credentials.
        place: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A manifest's body that cannot be read: a mistake of the caller.
    #[error("the manifest of the transaction at {commit} names no attempt: {reason}")]
    NotAManifest {
        /// The transaction.
        commit: Lsn,
        /// Why.
        reason: String,
    },
    /// A server with the bug in the sequence check that fencing rests on.
    #[error(
        "nats-server {version} at {server} is too old: appends are fenced by a check that is only right from 2.14.5 on; upgrade every server of the cluster"
    )]
    ServerTooOld {
        /// Its name or address.
        server: String,
        /// The version it says it is.
        version: String,
    },
    /// JetStream is off.
    #[error(
        "JetStream is not enabled for this account on {servers}: start nats-server with a `jetstream` block, and give the account a JetStream limit"
    )]
    NoJetStream {
        /// The addresses, without credentials.
        servers: String,
    },
    /// The servers cannot reserve the log.
    #[error(
        "the NATS servers cannot reserve {max_bytes} bytes on {replicas} server(s) for the log of flow {flow} ({reason}); lower log.maxBytes, or raise max_file_store of the servers or the account's limit"
    )]
    NoRoom {
        /// The flow.
        flow: FlowId,
        /// `log.maxBytes`.
        max_bytes: u64,
        /// The copies that were asked for.
        replicas: usize,
        /// What the server said.
        reason: String,
    },
    /// Fewer servers than copies.
    #[error(
        "flow {flow} asks for {replicas} copies of its log, but the NATS cluster offers fewer servers with JetStream ({reason}); set log.replicas lower or add servers"
    )]
    NoServers {
        /// The flow.
        flow: FlowId,
        /// The copies that were asked for.
        replicas: usize,
        /// What the server said.
        reason: String,
    },
    /// `maxBytes` leaves no room for data beside the reserve.
    #[error(
        "log.maxBytes of flow {flow} is {max_bytes}, but {least} is the least: data stops {reserve} bytes below it"
    )]
    TooSmall {
        /// The flow.
        flow: FlowId,
        /// `log.maxBytes`.
        max_bytes: u64,
        /// The smallest size that works.
        least: u64,
        /// What is kept for fences, resumes and heartbeats.
        reserve: u64,
    },
    /// A stream of the log's name is there, and it is not a log.
    #[error(
        "stream {stream} exists, but it cannot serve as a log: {what}; delete the stream, or give the flow another name"
    )]
    NotALog {
        /// The stream.
        stream: String,
        /// Which setting does not fit.
        what: String,
    },
    /// The stream is gone.
    #[error(
        "the log {stream} does not exist: if something was ever staged in it, it was lost; delete the flow and apply it again, then run a snapshot"
    )]
    Missing {
        /// The stream.
        stream: String,
    },
    /// A younger owner took over. Final for this owner.
    #[error("epoch {mine} of flow {flow} was fenced by epoch {by}: another worker owns the capture now")]
    Fenced {
        /// The flow.
        flow: FlowId,
        /// Ours.
        mine: Epoch,
        /// The younger one.
        by: Epoch,
    },
    /// Another owner of the same epoch fenced first. Final for this owner: it must release its lock and acquire a new epoch.
    #[error(
        "epoch {epoch} of flow {flow} belongs to another owner that fenced first; release the lock and take a new epoch"
    )]
    EpochTaken {
        /// The flow.
        flow: FlowId,
        /// The epoch of both.
        epoch: Epoch,
    },
    /// Acknowledged records are gone. Final for this owner; the next takeover judges it.
    #[error(
        "the log of flow {flow} ends at {log_end:?}, but {acked:?} was acknowledged: the NATS servers lost its tail"
    )]
    TailLost {
        /// The flow.
        flow: FlowId,
        /// Where the log ends now.
        log_end: Option<Position>,
        /// What was acknowledged.
        acked: Position,
    },
    /// A resume or an append that does not continue the log: a mistake of the caller.
    #[error("flow {flow}: a record from {from:?} does not continue the log, which ends at {end:?}")]
    NotContinuing {
        /// The flow.
        flow: FlowId,
        /// Where the record begins.
        from: Position,
        /// Where the log ends.
        end: Option<Position>,
    },
    /// A body above what the servers take.
    #[error(
        "a segment of {bytes} bytes does not fit the server's max_payload: bodies must stay below {max}; raise max_payload of nats-server or split the segment"
    )]
    TooLarge {
        /// The body.
        bytes: usize,
        /// The most that fits.
        max: usize,
    },
    /// The log misses positions that the reader needs. Final: skipping them would lose changes.
    #[error(
        "the log of flow {flow} has a gap at sequence {sequence}: the reader stands at {end:?}, the next record begins at {from:?}; a snapshot run must repair what lies between"
    )]
    Gap {
        /// The flow.
        flow: FlowId,
        /// Where it was seen.
        sequence: u64,
        /// Where the reader stands.
        end: Position,
        /// Where the log goes on.
        from: Position,
    },
    /// The reader's position was purged. Final for this reader.
    #[error(
        "the log of flow {flow} begins at {begins:?} and no longer holds {position:?}: this reader fell behind its hold and needs a snapshot run"
    )]
    PastHold {
        /// The flow.
        flow: FlowId,
        /// Where the reader stands; `None` when it wants the log's beginning.
        position: Option<Position>,
        /// Where the log begins now.
        begins: Option<Position>,
    },
    /// A message in the log that is no record of ours. Final: what it hides is not known.
    #[error("message {sequence} of {stream} is not a record of this log: {reason}")]
    Record {
        /// The stream.
        stream: String,
        /// The message.
        sequence: u64,
        /// Why.
        reason: RecordError,
    },
    /// The servers did not answer in time or have no leader. Worth another try.
    #[error("{what}: {reason}")]
    Unavailable {
        /// What was asked.
        what: String,
        /// What came of it.
        reason: String,
    },
    /// The writer was dropped or closed.
    #[error("the writer of flow {flow} is closed")]
    Closed {
        /// The flow.
        flow: FlowId,
    },
}

impl StagingError {
    /// Whether another try of the same call can succeed without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, StagingError::Unavailable { .. } | StagingError::Connect { .. })
    }

    /// Whether a shelf of the side store has no room for this flow: the transaction goes as segments into the log, chunks wait.
    pub fn is_side_full(&self) -> bool {
        matches!(self, StagingError::SideFull { .. } | StagingError::SideNoRoom { .. })
    }

    /// Whether this owner lost the log to another one: it gives up its lock, and nobody needs to be told.
    pub fn is_fenced(&self) -> bool {
        matches!(self, StagingError::Fenced { .. } | StagingError::EpochTaken { .. })
    }

    pub(crate) fn unavailable(what: impl Into<String>, reason: impl std::fmt::Display) -> StagingError {
        StagingError::Unavailable { what: what.into(), reason: reason.to_string() }
    }
}
