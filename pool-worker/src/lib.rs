//! The worker: takes offers, owns tasks, captures and applies.
//!
//! | module | holds |
//! |---|---|
//! | [`worker`] | one life of a worker: lease, offers, tasks, drain |
//! | `task` | one owned task, its watchdog, its end |
//! | `capture` | the source's side: fence, resume, stream, stage, confirm, purge |
//! | `apply` | a sink's side: open, load, read, cut into batches, apply |
//! | `run` | the owner of a snapshot run: publication, hold, snapshot, plan |
//! | `chunk` | one chunk of a run, from the source into the side store |
//! | `load` | one chunk of a run, from the side store into a sink |
//! | `detach` | sinks that need more of the log than it can hold |
//! | `verify` | compares the source with a sink, once |
//! | `background` | where the work runs that the stream goes before |
//! | `failures` | how long a task rests that failed here |
//! | `flows` | what the flows ask of each task |
//! | `memory` | the limit of this process, and how much of it goes where |
//! | `places` | how many chunks are read or loaded at a time |
//! | `runs` | the snapshot runs as the worker sees them |
//! | `spans` | what goes to a trace collector |
//!
//! What decides is pure and tested by itself: `apply/assemble.rs`, `apply/tables.rs`, `run/core.rs`, `detach.rs`, `pulse.rs`, `backoff.rs`, `flows.rs::demand`.

mod apply;
mod background;
mod backoff;
mod cache;
mod capture;
mod chunk;
mod detach;
pub mod failpoint;
mod failures;
mod flows;
mod load;
mod memory;
mod metrics;
mod offers;
pub mod options;
mod places;
mod pulse;
mod run;
mod runs;
mod secret;
mod shared;
mod spans;
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
