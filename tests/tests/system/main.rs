//! The whole system under faults, as processes.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod altered;
mod bad_input;
mod bound;
mod demo;
mod detach;
mod documented;
mod first_load;
mod kills;
mod measured;
mod memory;
mod mended;
mod pauses;
mod power;
mod pressure;
mod quiet;
mod recreated;
mod roles;
mod s3;
mod sharing;
mod sub_transactions;
mod tables;
mod traces;
mod verify;
mod wedged;
