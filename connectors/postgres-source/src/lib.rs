//! Reads the WAL of one PostgreSQL database through its own replication client.
//!
//! From the server to a segment: transport and TLS, [`replication`] (bytes to frames), [`pgoutput`]
//! (frames to messages), `assemble` (messages to Arrow segments), [`Capture`] (the loop that the capture task runs).
//! [`SnapshotExport`] and [`read_chunk`] are the source side of the first load.
//! Beside it: publication and slot ([`ensure_publication`], [`ensure_slot`]), checks before streaming, `wallaby doctor`'s [`preflight()`], rows by key
//! ([`Lookup`]), and what the slot holds back ([`source_status`]).

mod assemble;
mod capture;
mod catalog;
pub mod config;
mod control;
mod error;
mod lookup;
mod metrics;
pub mod pgoutput;
mod preflight;
mod prepare;
mod published;
pub mod replication;
mod sent;
mod sessions;
mod setup;
mod slot;
mod snapshot;
mod socket;
mod status;
mod tables;
mod text;
mod tls;
mod transport;
mod verify;

pub use assemble::{CaptureEvent, PartDraft, SegmentDraft, SpliceDraft};
pub use capture::{Capture, CaptureOptions, PartOptions};
pub use config::{ConfigError, ConnectConfig};
pub use control::{Control, ControlEnd, connect_control};
pub use error::{ServerError, SourceError};
pub use lookup::Lookup;
pub use metrics::describe_metrics;
pub use preflight::{Finding, Status, preflight};
pub use prepare::{Prepared, SourceIdentity};
pub use published::{Partition, PublishedTables, publish_tables, published_tables, tables_digest, unpublish_tables};
pub use replication::{Feedback, Frame, FrameReader, GulpPolicy, ReplicationClient, StartOptions, Streaming};
pub use sent::{SentName, SentNames};
pub use sessions::{SessionOwner, evict};
pub use setup::{PublicationWanted, SlotWanted, drop_publication, drop_slot, ensure_publication, ensure_slot};
pub use slot::SlotState;
pub use snapshot::{ChunkRead, ChunkRequest, PartSink, SnapshotExport, read_chunk};
pub use status::{SourceStatus, ended_before, source_status};
pub use tables::Published;
pub use verify::SourceVerify;
