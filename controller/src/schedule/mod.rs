//! From desired flows to offers.
//!
//! `core` decides, without I/O and with time as an argument; `queue` is the JetStream queue; `run` connects them to etcd.

mod core;
mod queue;
mod run;

pub use self::core::{Plan, Scheduler, Situation};
pub use queue::{OfferQueue, QueueError};
#[cfg(test)]
pub(crate) use run::goners;
pub use run::{SchedulerParts, run};
