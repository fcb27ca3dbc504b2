//! The controller against real servers: its API, its offers, and what it does when a server goes away.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod api;
mod deleting;
mod faults;
mod offers;
mod setup;
