//! The source side of a snapshot run: a snapshot is exported, the run planned, and chunks are read under it.
//!
//! | part | who uses it |
//! |---|---|
//! | [`SnapshotExport`] | the run task: the consistent point C, the snapshot's name, a session that holds it; the plan of the run inside of it |
//! | [`read_chunk`] | a chunk task: one range of pages of one relation, as parts in the stream's own form |
//!
//! What is read under a snapshot is identical, value by value, to what the stream says of the same row.

mod chunk;
mod export;
mod plan;
mod sql;
mod throttle;

pub use chunk::{ChunkRead, ChunkRequest, PartSink, read_chunk};
pub use export::{ExportOptions, SnapshotExport};
pub use plan::plan;
