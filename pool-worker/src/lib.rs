//! The worker: takes offers, owns tasks, captures and applies.
//!
//! | module | holds |
//! |---|---|
//! | [`worker`] | one life of a worker: lease, offers, tasks, drain |
//! | `task` | one owned task, its watchdog, its end |
//! | `capture` | the source's side: fence, resume, stream, stage, confirm, purge |
//! | `apply` | a sink's side: open, read, cut into batches, apply |
//! | `verify` | compares the source with a sink, once |
//! | `flows` | what the flows ask of each task |
//!
//! What decides is pure and tested by itself: `apply/assemble.rs`, `pulse.rs`, `backoff.rs`, `flows.rs::demand`.

mod apply;
mod backoff;
mod cache;
mod capture;
pub mod failpoint;
mod flows;
mod metrics;
mod offers;
pub mod options;
mod pulse;
mod secret;
mod shared;
mod status;
mod task;
mod verify;
pub mod worker;

/// Describes every metric of the worker and of what it is made of.
pub fn describe_metrics() {
    metrics::describe();
    wallaby_postgres_source::describe_metrics();
    wallaby_postgres::describe_metrics();
    wallaby_staging::metrics::describe();
    wallaby_coordination::metrics::describe();
}
