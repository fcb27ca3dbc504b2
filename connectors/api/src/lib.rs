//! The contracts that a source and a sink are held to.
//!
//! A sink gets [`Batch`]es: contiguous runs of the log that end where a source transaction ends. What it says of a batch
//! is [`Applied`]: only `Durable` moves a checkpoint.

mod batch;
mod catalog;
pub mod conformance;
mod error;
mod faults;
mod large;
mod load;
mod page;
mod sink;
pub mod verify;

pub use batch::{Batch, BatchPart, TableFilter};
pub use catalog::{DatabaseIdentity, KeyValues, SourceColumn, SourceColumns, SourceLookup, SourceRow, SourceRows};
pub use error::{Directive, SinkError};
pub use faults::{CommitFault, Faults, HangPoint};
pub use large::{Portion, Portions};
pub use load::{
    ChunkLoad, ChunkLoader, ChunkParts, ForeignKey, Loaded, TableExtra, TableExtras, TableIndex, TableLoads, TableMark,
};
pub use page::guarantees_page;
pub use sink::{Applied, Capabilities, Guarantee, Opened, Sink, SinkFactory, SinkTask};
