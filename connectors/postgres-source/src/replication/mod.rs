//! The replication client: from the startup message to a stream of frames.
//!
//! No published client speaks CopyBoth the way it is needed here: reading in gulps into one reused buffer, and status
//! updates that go out from a task of their own, whatever the reader waits for.

mod client;
mod feedback;
mod frame;
mod gulp;
mod pause;
mod reader;
mod startup;

pub use client::{ReplicationClient, StartOptions, Streaming, SystemIdentity, TimelineSwitch};
pub use feedback::Feedback;
pub use frame::Frame;
pub use gulp::GulpPolicy;
pub use reader::FrameReader;

pub(crate) use feedback::CloseReason;
