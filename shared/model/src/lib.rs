//! The words of WALlaby as types: ids, LSNs, positions, epochs, table schemas, change batches, log records and the
//! flow specification. Nothing here does I/O, and nothing here knows a server.

#[cfg(feature = "api")]
pub mod api;
pub mod change;
pub mod condition;
pub mod flow;
pub mod ids;
pub mod offer;
pub mod position;
pub mod reasons;
pub mod record;
pub mod run;
pub mod schema;
pub mod splice;
pub mod trace;
pub mod verify;

pub use change::{Op, SegmentBody, TableChanges, Transaction};
pub use ids::{ChunkId, Epoch, FlowId, IdError, Nonce, PoolId, Reader, RunId, SinkId, TaskId, TaskKind, WorkerId};
pub use offer::Offer;
pub use position::{Lsn, Position, PositionError};
pub use record::{Codec, Record, RecordKind, ResumeInfo};
pub use schema::{Column, ColumnType, ReplicaIdentity, SchemaId, TableName, TableSchema};
pub use splice::{Attempt, Manifest, ManifestPart, Splice};
pub use trace::{TraceParent, TraceParentError};
