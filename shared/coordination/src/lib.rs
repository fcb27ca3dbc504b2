//! etcd: worker leases, task locks and epochs, guarded writes, the flow store, snapshot runs, checkpoints and holds.
//!
//! What etcd gives is *liveness*: who should own a task. Safety comes from the epoch, which is checked where a write lands
//! (log, sink), and here from the lock's create revision, which every write of a task compares.
//!
//! | module | holds |
//! |---|---|
//! | [`Coordination`] | the connection; flow store ([`FlowEntry`]), watches, lists |
//! | [`WorkerSession`] | a worker's lease: deadline, self-fencing, taking tasks |
//! | [`TaskLock`] | an owned task: epoch, guarded writes, release |
//! | [`PacedWriter`] | checkpoints and status off the per-batch path |
//! | [`Election`] | which controller replica schedules (efficiency only) |
//!
//! `lease/core.rs`, `watch/cursor.rs` and `paced.rs` hold the rules without I/O; the rest is shell.

mod arguments;
mod checkpoint;
mod client;
mod clock;
mod election;
mod error;
mod flows;
mod holds;
mod keys;
mod lease;
mod link;
mod lock;
mod lock_watch;
pub mod metrics;
mod operations;
mod options;
mod paced;
mod packed;
mod records;
mod runs;
mod session;
mod tables;
mod watch;

pub use arguments::EtcdArguments;
pub use checkpoint::{Checkpoint, Mark, SourceSeen};
pub use client::Coordination;
pub use clock::{BootTime, wall_clock_now};
pub use election::{Candidate, Election, Leadership};
pub use error::{Error, Result};
pub use flows::{FlowEntry, FlowList, LockEntry, WorkerEntry};
pub use holds::{DetachOutcome, PurgeOutcome};
pub use keys::{Key, KeySpace};
pub use lease::{FenceReason, Validity};
pub use lock::TaskLock;
pub use operations::OperationEntry;
pub use options::{Options, Tls};
pub use paced::PacedWriter;
pub use records::{Detached, FlowRecord, FlowStatus, Hold, LockRecord, PurgePoint, RunIndex, WorkerInfo};
pub use runs::{ChunkOutcome, RunEntry};
pub use session::{Acquired, SessionOptions, WorkerSession};
pub use tables::KnownTable;
pub use watch::{Change, Entry, Watch, WatchEvent};

use std::fmt;

/// A revision of etcd's store: of a key's creation or last change. Only compared for equality or order within one history.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub i64);

impl Revision {
    /// What etcd says of a key that does not exist.
    pub const ABSENT: Revision = Revision(0);
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {}", self.0)
    }
}
