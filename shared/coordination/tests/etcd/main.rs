//! The coordination layer against real etcd servers: shared where nothing breaks, own where faults are injected.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod credentials;
mod elections;
mod flows;
mod holds;
mod leases;
mod locks;
mod lost_answers;
mod paced;
mod proxy;
mod restores;
mod runs;
mod setup;
mod watches;
