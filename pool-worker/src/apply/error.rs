//! What can end one opening of a sink, and what is done about it.

use std::time::Duration;

use wallaby_connector_api::{Directive, SinkError};
use wallaby_model::{ChunkId, Lsn, RunId};
use wallaby_postgres_source::ConfigError;
use wallaby_staging::StagingError;
use wallaby_wire::SegmentError;
use wallaby_wire::splice::SpliceError;

use crate::capture::CaptureError;
use crate::secret::SecretError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A connection string could not be had.
    #[error("{key}: {source}")]
    Secret {
        /// Where it stands in the flow's file.
        key: String,
        /// Why.
        source: SecretError,
    },
    /// The source's connection string is wrong.
    #[error("spec.source.postgres.dsn: {0}")]
    SourceDsn(#[from] ConfigError),
    /// The sink.
    #[error("{0}")]
    Sink(#[from] SinkError),
    /// The log.
    #[error("{0}")]
    Staging(#[from] StagingError),
    /// etcd.
    #[error("{0}")]
    Coordination(#[from] wallaby_coordination::Error),
    /// A segment cannot be read: skipping it would lose changes.
    #[error("segment {sequence} of the log cannot be read: {source}")]
    Segment {
        /// Its sequence in the stream.
        sequence: u64,
        /// Why.
        source: SegmentError,
    },
    /// A splice's body cannot be read.
    #[error("the splice at {sequence} of the log cannot be read: {source}")]
    Splice {
        /// Its sequence in the stream.
        sequence: u64,
        /// Why.
        source: serde_json::Error,
    },
    /// The side store lost something of a large transaction.
    #[error(
        "{what} of the transaction that commits at {commit} is not in the side store: it is tried again, because the capture task reads the transaction again from the source when it starts"
    )]
    SpliceLost {
        /// Which transaction.
        commit: Lsn,
        /// What is missing.
        what: String,
    },
    /// A part, or the manifest, of a large transaction is damaged or of a newer WALlaby.
    #[error("{0}")]
    Parts(SpliceError),
    /// A chunk's part is missing or damaged.
    #[error("part {number} of {chunk} of {run:?} is missing in the side store, or damaged: its table is read again")]
    ChunkPart {
        /// The run.
        run: RunId,
        /// The chunk.
        chunk: ChunkId,
        /// The part.
        number: u32,
    },
    /// A replay was ended because its run is over. What it sent last may still be done: only a new opening waits for that, and then knows
    /// which tables are the main stream's.
    #[error("{0} is over, and tables that caught up in it may just have been handed over: the sink is opened again")]
    ReplayGivenUp(RunId),
    /// The lease may have run out.
    #[error("this worker's lease may have run out: nothing more is written")]
    Invalid,
    /// The sink did not answer in time.
    #[error("the sink has not answered for {0} s; its sessions are opened again")]
    Silent(u64),
}

impl ApplyError {
    /// The policy: every kind in one place.
    pub fn directive(&self) -> Directive {
        let again = Directive::Retry(Duration::from_secs(1));
        match self {
            ApplyError::Sink(error) => error.directive(),
            ApplyError::ReplayGivenUp(_) => Directive::Retry(Duration::ZERO),
            ApplyError::Staging(error) if error.is_fenced() => Directive::GiveUp,
            // A gap, a foreign message, a purged position: going on would lose changes.
            ApplyError::Staging(
                StagingError::Gap { .. } | StagingError::PastHold { .. } | StagingError::Record { .. },
            ) => Directive::Stop,
            ApplyError::Segment { .. } | ApplyError::Splice { .. } | ApplyError::SourceDsn(_) => Directive::Stop,
            ApplyError::Coordination(error) if error.is_ownership_lost() => Directive::GiveUp,
            ApplyError::Coordination(wallaby_coordination::Error::HoldGone { .. }) | ApplyError::Invalid => {
                Directive::GiveUp
            }
            ApplyError::Staging(_)
            | ApplyError::Coordination(_)
            | ApplyError::Secret { .. }
            | ApplyError::SpliceLost { .. }
            | ApplyError::Parts(_)
            | ApplyError::ChunkPart { .. }
            | ApplyError::Silent(_) => again,
        }
    }

    /// One word for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            ApplyError::Secret { .. } => "SecretMissing",
            ApplyError::SourceDsn(_) => "DsnInvalid",
            ApplyError::Sink(SinkError::Transient(_)) => "SinkUnavailable",
            ApplyError::Sink(SinkError::Interrupted(_)) => "LogInterrupted",
            ApplyError::Sink(SinkError::Configuration { .. }) => "SinkConfiguration",
            ApplyError::Sink(SinkError::Data { .. }) => "SinkData",
            ApplyError::Sink(SinkError::Fenced(_)) => "Fenced",
            ApplyError::Sink(SinkError::Position { .. }) => "SinkMoved",
            ApplyError::Staging(error) => CaptureError::staging_reason(error),
            ApplyError::Coordination(_) => "EtcdUnavailable",
            ApplyError::Segment { .. } | ApplyError::Splice { .. } => "SegmentUnreadable",
            ApplyError::SpliceLost { .. } | ApplyError::Parts(_) => "LargeTransactionUnreadable",
            ApplyError::ChunkPart { .. } => "ChunkLost",
            ApplyError::Invalid => "LeaseInvalid",
            ApplyError::Silent(_) => "SinkSilent",
            ApplyError::ReplayGivenUp(_) => "ReplayGivenUp",
        }
    }
}
