//! The log of a flow: one JetStream stream, one writer at a time, any number of readers.
//!
//! Everything that protocol.md says of the log is here, behind one type, [`Log`], so that another placement (many small
//! flows in one stream) would not be a redesign:
//!
//! | module | holds |
//! |---|---|
//! | [`connection`] | the connections to NATS, and the refusal of servers that are too old |
//! | [`log`] | [`Log`]: the stream is made, checked, asked (by its leader only), deleted |
//! | [`record`] | a record as the headers of a message |
//! | [`rule`] | the reader rule: what a reader accepts, trims, drops, and when it stops. Pure |
//! | [`tail`] | the end of the log: the reader rule over its tail |
//! | [`chain`] | the append chain: predicted sequences, the window, what a resync leaves to send. Pure |
//! | [`writer`] | takeover, appends, resync: the owner's side |
//! | [`durability`], [`sync`] | when an acknowledged record may be confirmed to Postgres; what the servers say of their fsync |
//! | [`reader`] | a reader that heals itself, in front of it an optional cache |
//! | `pulls` | what the readers of one worker pull together |
//! | [`side`] | the side store: what is too big or too early for the log |
//! | [`retention`] | the purge, and what a tail that came back shorter means |
//! | [`metrics`] | the names of what is counted |

pub mod chain;
pub mod connection;
pub mod durability;
mod error;
mod leader;
pub mod log;
pub mod metrics;
mod pull;
mod pulls;
pub mod reader;
pub mod record;
pub mod retention;
pub mod rule;
pub mod segment_cache;
pub mod side;
pub mod sync;
pub mod tail;
mod takeover;
pub mod waiting;
pub mod writer;
mod writer_task;

pub use connection::{Connections, NatsTarget};
pub use error::{Result, StagingError};
pub use log::{Log, LogConfig, LogInfo, RESERVE_BYTES};
pub use pulls::SharedPulls;
pub use reader::{Accepted, LogReader, ReaderOptions, Start};
pub use record::{Incarnation, Staged};
pub use retention::{Purged, TailClaims, TailVerdict, judge_tail, log_begins};
pub use rule::ReaderState;
pub use segment_cache::{SegmentCache, SegmentKey};
#[cfg(feature = "object-store")]
pub use side::ObjectSide;
pub use side::{
    JetStreamSide, PutBudget, Puts, Quotas, Shelf, ShelfUsage, SideGroup, SideKey, SideStore, Sweep, open_side, sweep,
    sweep_transactions,
};
pub use sync::{SyncPolicy, SyncReport, SyncSource, sync_policy, sync_policy_with};
pub use tail::Tail;
pub use takeover::Takeover;
pub use waiting::{Wait, Waiting};
pub use writer::{Acked, DataAppend, LogWriter, Trace, WriterOptions};
