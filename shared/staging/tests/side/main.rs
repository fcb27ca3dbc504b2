//! The side store: one suite, run on every place that it can stand in, and the faults of each place.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[path = "../log/counters.rs"]
mod counters;
mod faults;
mod gateway;
mod jetstream;
mod objects;
mod suite;
mod support;
mod sweeping;
