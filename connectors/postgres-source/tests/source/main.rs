//! The source against a real PostgreSQL.
#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is the test's failure")]

mod capture;
mod faults;
mod kit;
mod types;
