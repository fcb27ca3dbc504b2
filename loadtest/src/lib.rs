//! Loads, measurements and the demo.
//!
//! | module | holds |
//! |---|---|
//! | [`shop`] | a sample schema with everything that makes change streams hard, and a seeded load on it |
//! | [`typ`] | the typical row that figures are given for: quick backlogs and an open-loop load |
//! | [`compare()`] | source and target, row by row |

pub mod compare;
mod connection;
mod error;
pub mod shop;
pub mod typ;

pub use compare::{Comparison, Difference, DifferenceKind, TableComparison, compare};
pub use error::Error;
