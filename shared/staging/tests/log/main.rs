//! The log against real servers: one binary, so that they share them. Fencing is tested on three nodes; one hides it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod counters;
mod gate;
mod support;

mod faults;
mod making;
mod purging;
mod reading;
mod sharing;
mod takeover;
mod traces;
