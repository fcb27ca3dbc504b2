//! Whole-system tests: everything as processes, faults while rows flow, and a comparison of every row at the end.
//!
//! | module | holds |
//! |---|---|
//! | [`programs`] | finds our programs and builds them when they are missing or stale |
//! | [`program`] | one of our processes, its metrics and the faults it can be given |
//! | [`system`] | servers, controllers, workers and one flow; who owns what |
//! | [`traffic`] | rows in flight: the shop's load, a ledger that tells losses and doubles, a look for half transactions |
//! | [`flow`] | the flow's file |
//! | [`greeter`] | a NATS server that claims to be of another version |
//! | [`disk`] | a disk of its own that can lose its power |
//! | [`cgroup`] | a bound on the memory of one program |
//!
//! One system is a dozen processes, so tests take [`alone`] first. Each runs in a small form; with `WALLABY_PROVE=1` (`make prove`)
//! the same tests repeat their faults, see [`rounds`].
//!
//! Panics are this crate's errors, as the test kit's: a test without its system has nothing to return to.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

pub mod cgroup;
pub mod disk;
pub mod flow;
pub mod greeter;
pub mod program;
pub mod programs;
pub mod system;
pub mod traffic;

use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

static ALONE: Mutex<()> = Mutex::const_new(());

/// How long anything may take that should take seconds: the machine may be busy with a build.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until no other test of this binary has a system.
pub async fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().await
}

/// Whether the tests run at full size.
pub fn is_full_size() -> bool {
    std::env::var("WALLABY_PROVE").is_ok_and(|value| !value.is_empty() && value != "0")
}

/// How often each fault is repeated: once, or at full size `full` times. Prints which.
pub fn rounds(full: usize) -> usize {
    let (form, rounds) = if is_full_size() { ("full", full) } else { ("small", 1) };
    println!("{form} form: each fault {rounds} times (WALLABY_PROVE=1 is the full form)");
    rounds
}
