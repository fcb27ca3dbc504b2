//! Leases: one per process, kept alive under supervision, with a deadline of its own past which the process stops.

mod core;
mod keeper;

pub use self::core::FenceReason;
pub(crate) use keeper::Lease;
pub use keeper::Validity;
