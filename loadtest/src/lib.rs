//! Loads, measurements and the demo.
//!
//! | module | holds |
//! |---|---|
//! | [`shop`] | a sample schema with everything that makes change streams hard, and a seeded load on it |
//! | [`typ`] | the typical row that figures are given for: quick backlogs and an open-loop load |
//! | [`compare()`] | source and target, row by row |
//! | [`measure`] | ceilings, pipeline and latencies, each part of the path in a process of its own |
//! | [`system`] | a whole WALlaby on this machine, for the demo and the measurements of a sink |
//! | [`demo`] | the story that `make demo` tells |

pub mod compare;
mod connection;
pub mod demo;
mod error;
pub mod first_load;
pub mod measure;
pub mod shop;
pub mod system;
pub mod typ;

pub use compare::{Comparison, Difference, DifferenceKind, TableComparison, compare};
pub use error::Error;
