//! Reads the WAL of one PostgreSQL database through its own replication client.
//!
//! From the server to a segment: [`transport`](crate::config) and TLS, [`replication`] (bytes to frames), [`pgoutput`]
//! (frames to messages), `assemble` (messages to Arrow segments), [`Capture`] (the loop that the capture task runs).
//! Beside it: publication and slot ([`setup`]), checks before streaming, `wallaby doctor`'s [`preflight`], rows by key
//! ([`Lookup`]), and what the slot holds back ([`source_status`]).

pub mod config;
mod control;
mod error;
mod metrics;
pub mod pgoutput;
pub mod replication;
mod tls;
mod transport;

pub use config::{ConfigError, ConnectConfig};
pub use control::{Control, ControlEnd, connect_control};
pub use error::{ServerError, SourceError};
pub use metrics::describe_metrics;
pub use replication::{Feedback, Frame, FrameReader, ReplicationClient, StartOptions};
