//! Codecs: how change batches become the bytes of a segment and come back.

pub mod segment;
pub mod splice;

pub use segment::{SegmentEncoder, SegmentError, decode, encode};
