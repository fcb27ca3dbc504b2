//! The source against a real PostgreSQL.
#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is the test's failure")]

mod capture;
mod connect;
mod extras;
mod faults;
mod fixtures;
mod kit;
mod messages;
mod older;
mod ready;
mod streamed;
mod timelines;
mod types;
