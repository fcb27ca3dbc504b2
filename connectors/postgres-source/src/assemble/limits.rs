//! The bounds of segments, parts, rows and transactions.

use std::time::Duration;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A segment with this much content is done.
    pub(crate) segment_target_bytes: usize,
    /// No segment grows beyond this, unless a single row does.
    pub(crate) segment_bytes_max: usize,
    /// The largest content of a segment with a single row.
    pub(crate) row_bytes_max: usize,
    /// A larger transaction goes to the side store.
    pub(crate) large_transaction_bytes: u64,
    /// `None`: there is no side store to go to; everything becomes segments.
    pub(crate) parts: Option<PartLimits>,
    /// Heartbeats that nobody waits for are not made more often.
    pub(crate) heartbeat_every: Duration,
}

/// The bounds of parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartLimits {
    /// A part with this much content is done; none with several rows has more than twice as much.
    pub(crate) target_bytes: usize,
    /// What the open parts of all transactions have together.
    pub(crate) open_bytes_max: usize,
    /// The largest content of a part with a single row.
    pub(crate) row_bytes_max: usize,
    /// Only what is to be kept whole becomes parts.
    pub(crate) only_whole: bool,
}

impl Limits {
    /// Whether a transaction becomes parts because it is large.
    pub(super) fn makes_parts(&self) -> bool {
        self.parts.is_some_and(|parts| !parts.only_whole)
    }

    pub(super) fn part_target_bytes(&self) -> usize {
        self.parts.map_or(usize::MAX / 2, |parts| parts.target_bytes)
    }

    pub(super) fn open_parts_bytes_max(&self) -> usize {
        self.parts.map_or(usize::MAX, |parts| parts.open_bytes_max)
    }

    pub(super) fn part_row_bytes_max(&self) -> usize {
        self.parts.map_or(self.row_bytes_max, |parts| parts.row_bytes_max)
    }

    /// The largest row that can be taken at all.
    pub(super) fn largest_row_bytes(&self) -> usize {
        self.part_row_bytes_max().max(self.row_bytes_max)
    }

    /// No segment with several rows grows beyond this: what one row may have, the log takes. Up to this much of a streamed transaction
    /// becomes a segment after all.
    pub(super) fn small_bytes_max(&self) -> usize {
        self.segment_bytes_max.min(self.row_bytes_max)
    }
}
