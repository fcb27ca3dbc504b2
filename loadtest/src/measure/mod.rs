//! The measurements behind limits.md: ceilings, pipeline, latencies, and what they cost.
//!
//! Every part of the path runs in a process of its own ([`parts`]); [`bench`] starts them against real servers, in turn, so that a
//! noisy minute hits all kinds alike; [`sink`] measures a whole WALlaby up to the Postgres sink, [`snapshot`] its
//! first load; [`figures`] holds the results and their ratios; [`report`] writes them up.

pub mod bench;
pub mod figures;
pub mod parts;
pub mod proc;
pub mod report;
pub mod sink;
pub mod snapshot;
