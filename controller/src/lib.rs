//! The control plane: the API, the scheduler, and what is said about flows.
//!
//! A controller keeps nothing of its own: everything is in etcd, any number of replicas may run, and flows that run go on
//! without any. No failure ends it: what needs a server that is away answers UNAVAILABLE, and goes on when it is back.
//!
//! | module | holds |
//! |---|---|
//! | [`server`] | the process: listening, TLS, health, shutdown |
//! | [`service`] | the gRPC services |
//! | [`schedule`] | desired flows and held locks in, offers out |
//! | [`view`] | what etcd says, as a fold of one watch |
//! | [`present`] | the view as messages: conditions, phases, progress |
//! | [`reason`] | refusals |
//! | `request_spans` | a span for each request, for a trace collector |
//! | [`backend`] | etcd and NATS, reached when they can be reached |

pub mod backend;
pub mod metrics;
pub mod options;
pub mod present;
pub mod reason;
mod request_spans;
mod runs;
pub mod schedule;
pub mod server;
pub mod service;
pub mod view;
mod wanted;

pub use options::Options;
pub use server::{Controller, StartError};
