//! What can end one try at capturing, and what is done about it.

use wallaby_model::condition::ConditionType;
use wallaby_model::{Position, TableName};
use wallaby_postgres_source::{ConfigError, SourceError};
use wallaby_staging::StagingError;
use wallaby_wire::SegmentError;

use crate::secret::SecretError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The connection string could not be had.
    #[error("spec.source.postgres.dsn: {0}")]
    Secret(#[from] SecretError),
    /// The connection string is wrong.
    #[error("spec.source.postgres.dsn: {0}")]
    Dsn(#[from] ConfigError),
    /// The source refused or is away.
    #[error("{}", with_remedy(.0))]
    Source(#[from] SourceError),
    /// The log refused or is away.
    #[error("{0}")]
    Staging(#[from] StagingError),
    /// etcd refused or is away.
    #[error("{0}")]
    Coordination(#[from] wallaby_coordination::Error),
    /// A segment could not be packed.
    #[error("{0}")]
    Segment(#[from] SegmentError),
    /// A splice could not be made.
    #[error("{0}")]
    Splice(#[from] wallaby_wire::splice::SpliceError),
    /// The parts that were counted are not the parts that came: a mistake of ours.
    #[error("transaction {xid} ended, but not all of its parts came: it is read again")]
    PartsMissing {
        /// The transaction.
        xid: u32,
    },
    /// The side store has no room for a transaction.
    #[error(
        "transaction {xid} does not fit into the side store ({error}): it goes into the log once it commits, however large it is"
    )]
    SideFull {
        /// The transaction whose part did not fit.
        xid: u32,
        /// What the side store says.
        error: StagingError,
    },
    /// The side store has no room for a transaction that must go there: a splice of it stands in the log.
    #[error(
        "transaction {xid} does not fit into the side store ({error}) and can go nowhere else: a splice of it stands in the log, and parts \
         of it were lost. Raise transactionsMax below spec.log.sideStore; it is tried again"
    )]
    WholeFull {
        /// The transaction.
        xid: u32,
        /// What the side store says.
        error: StagingError,
    },
    /// A chunk alone is more than the side store may hold of chunks.
    #[error(
        "a chunk of {table} is larger than all that the side store may hold of chunks ({max} bytes): raise chunksMax below spec.log.sideStore"
    )]
    ChunkTooLarge {
        /// The relation.
        table: TableName,
        /// The quota.
        max: u64,
    },
    /// The transaction that did not fit into the side store has passed.
    #[error("the transaction that did not fit into the side store has passed: transactions are streamed again")]
    StreamAgain,
    /// The side store lost what stands behind a splice that Postgres was not told of yet.
    #[error(
        "the side store lost parts of the transaction that commits at {commit}: Postgres sends it again, the log goes back before it"
    )]
    PartLost {
        /// Its commit LSN.
        commit: wallaby_model::Lsn,
    },
    /// Something was staged, and the log is empty or ends before what Postgres was told.
    #[error(
        "the log of this flow was lost: {staged:?} was staged and {confirmed:?} confirmed to Postgres, but the log ends at {found:?}. \
         Changes between are gone from the source's WAL. Delete the flow and create it again, and load the tables anew"
    )]
    LogLost {
        /// Where the log ends.
        found: Option<Position>,
        /// What was staged, by the checkpoint.
        staged: Position,
        /// What Postgres was told.
        confirmed: Position,
    },
    /// The servers of the log are silent for too long: another worker may reach them.
    #[error("the NATS servers have not answered for {0} s: the task is given up so that another worker can try")]
    LogUnreachable(u64),
    /// The lease may have run out.
    #[error("this worker's lease may have run out: nothing more is written")]
    Invalid,
}

fn with_remedy(error: &SourceError) -> String {
    match error.remedy() {
        Some(remedy) => format!("{error}. {remedy}"),
        None => error.to_string(),
    }
}

/// From here on a row is too large for PostgreSQL's own messages.
const ROW_LIMIT_OF_POSTGRES: u64 = 1 << 30;

/// What is done after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Try again after a back-off, in this task.
    Retry,
    /// Connect to the source again at once: nothing is wrong.
    Again,
    /// Wait for a person or a changed specification.
    Stop,
    /// End the task without another write.
    GiveUp,
}

impl CaptureError {
    /// The policy: every kind in one place.
    pub fn directive(&self) -> Directive {
        match self {
            // A secret or a server's setting may be mended without us being told.
            CaptureError::Secret(_) => Directive::Retry,
            CaptureError::SideFull { .. } | CaptureError::StreamAgain => Directive::Again,
            CaptureError::WholeFull { .. } | CaptureError::ChunkTooLarge { .. } => Directive::Retry,
            CaptureError::PartLost { .. } | CaptureError::PartsMissing { .. } => Directive::Retry,
            CaptureError::Splice(_) => Directive::Stop,
            // Too large for a message while the side store is full: it may have room the next time.
            CaptureError::Source(SourceError::RowTooLarge { limit, .. }) if *limit < ROW_LIMIT_OF_POSTGRES => {
                Directive::Retry
            }
            CaptureError::Dsn(_) | CaptureError::Segment(_) | CaptureError::LogLost { .. } => Directive::Stop,
            CaptureError::Source(error) if error.is_fenced() => Directive::GiveUp,
            CaptureError::Source(error) if error.is_transient() || is_mended_elsewhere(error) => Directive::Retry,
            CaptureError::Source(_) => Directive::Stop,
            CaptureError::Staging(error) if error.is_fenced() => Directive::GiveUp,
            // The next owner takes the log over anew and judges its tail.
            CaptureError::Staging(StagingError::TailLost { .. } | StagingError::Closed { .. }) => Directive::GiveUp,
            CaptureError::Staging(StagingError::NotContinuing { .. }) => Directive::GiveUp,
            CaptureError::Staging(StagingError::Record { .. } | StagingError::Missing { .. }) => Directive::Stop,
            CaptureError::Staging(_) => Directive::Retry,
            CaptureError::Coordination(error) if error.is_ownership_lost() => Directive::GiveUp,
            // The plan of a run over too many tables.
            CaptureError::Coordination(wallaby_coordination::Error::TooLarge { .. }) => Directive::Stop,
            CaptureError::Coordination(_) => Directive::Retry,
            CaptureError::LogUnreachable(_) | CaptureError::Invalid => Directive::GiveUp,
        }
    }

    /// The condition that it is about.
    pub fn condition(&self) -> ConditionType {
        match self {
            CaptureError::Secret(_) | CaptureError::Dsn(_) => ConditionType::SourceReady,
            CaptureError::Source(error) => match error {
                SourceError::RowTooLarge { .. } => ConditionType::Capturing,
                SourceError::SlotLost { .. } | SourceError::SlotMoved { .. } => ConditionType::SlotHealthy,
                _ => ConditionType::SourceReady,
            },
            _ => ConditionType::Capturing,
        }
    }

    /// One word for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            CaptureError::Secret(_) => "SecretMissing",
            CaptureError::Dsn(_) => "DsnInvalid",
            CaptureError::Source(error) => error.reason(),
            CaptureError::Staging(error) => CaptureError::staging_reason(error),
            CaptureError::Coordination(wallaby_coordination::Error::TooLarge { .. }) => "PlanTooLarge",
            CaptureError::Coordination(_) => "EtcdUnavailable",
            CaptureError::Segment(_) => "SegmentRefused",
            CaptureError::LogLost { .. } => "LogLost",
            CaptureError::Splice(_) | CaptureError::PartsMissing { .. } => "SpliceRefused",
            CaptureError::SideFull { .. } | CaptureError::WholeFull { .. } => "SideStoreFull",
            CaptureError::ChunkTooLarge { .. } => "ChunkTooLarge",
            CaptureError::StreamAgain => "Streaming",
            CaptureError::PartLost { .. } => "SideStoreLost",
            CaptureError::LogUnreachable(_) => "LogUnreachable",
            CaptureError::Invalid => "LeaseInvalid",
        }
    }

    /// One word for an error of the log.
    pub fn staging_reason(error: &StagingError) -> &'static str {
        match error {
            StagingError::Connect { .. } | StagingError::Unavailable { .. } => "LogUnreachable",
            StagingError::ServerTooOld { .. } => "NatsServerTooOld",
            StagingError::NoJetStream { .. } => "NoJetStream",
            StagingError::NoRoom { .. } | StagingError::TooSmall { .. } => "LogSize",
            StagingError::NoServers { .. } => "LogReplicas",
            StagingError::NotALog { .. } | StagingError::Record { .. } => "NotALog",
            StagingError::Missing { .. } | StagingError::TailLost { .. } => "LogLost",
            StagingError::Fenced { .. } | StagingError::EpochTaken { .. } => "Fenced",
            StagingError::NotContinuing { .. } | StagingError::Closed { .. } => "LogInterrupted",
            StagingError::SideFull { .. } | StagingError::SideNoRoom { .. } => "SideStoreFull",
            StagingError::SideMissing { .. } | StagingError::SideTailLost { .. } => "SideStoreLost",
            StagingError::NotASide { .. } | StagingError::SidePlace { .. } => "SideStoreInvalid",
            StagingError::NotAManifest { .. } => "ManifestRefused",
            StagingError::TooLarge { .. } => "RowTooLarge",
            StagingError::Gap { .. } => "LogGap",
            StagingError::PastHold { .. } => "PastHold",
        }
    }
}

/// What a person mends at the source without telling us: worth another try by itself. Nothing was changed there, or staged, before it was
/// found out.
fn is_mended_elsewhere(error: &SourceError) -> bool {
    match error {
        SourceError::WalLevel { .. }
        | SourceError::SlotInUse { .. }
        | SourceError::TableMissing { .. }
        | SourceError::TableWithoutKey { .. }
        | SourceError::PartitionIdentity { .. } => true,
        // Also the server's own refusals.
        error => matches!(error.reason(), "AuthenticationFailed" | "PrivilegeMissing"),
    }
}
