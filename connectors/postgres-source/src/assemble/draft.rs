//! What the assembler gives out.

use wallaby_model::{Lsn, Position, SegmentBody, Transaction};

/// A segment that is ready to be staged.
#[derive(Clone, Debug)]
pub struct SegmentDraft {
    /// Where a reader stands after it.
    pub to: Position,
    /// The end of the last whole transaction at or before `to`.
    pub complete_to: Position,
    /// The rows.
    pub body: SegmentBody,
    /// About how large the content is before it is packed.
    pub content_bytes: usize,
    /// The number of rows, before-images included.
    pub rows: usize,
}

/// A part of a transaction, for the side store. Parts of one transaction come in order, those of several may alternate.
#[derive(Clone, Debug)]
pub struct PartDraft {
    /// The top-level transaction.
    pub xid: u32,
    /// Counts the transaction's parts from 0.
    pub number: u32,
    /// The rows. Their transactions have a commit LSN of zero and the xid of the sub-transaction: see [`wallaby_wire::splice`].
    pub body: SegmentBody,
    /// About how large the content is before it is packed.
    pub content_bytes: usize,
    /// The number of rows, before-images and those that may yet be rolled back included.
    pub rows: usize,
    /// LSN and index of its last row: that row's position but for the commit LSN.
    pub last: (Lsn, u32),
}

/// All parts of a transaction were given out, and it has committed: the log gets a splice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpliceDraft {
    /// The transaction. Its xid is that of its parts.
    pub transaction: Transaction,
    /// The end of the transaction, `(end_lsn, 0)`.
    pub to: Position,
    /// How many parts it has; at least one.
    pub parts: u32,
    /// Sub-transactions that were rolled back, as inclusive ranges, ascending.
    pub aborted: Vec<(u32, u32)>,
}

/// What capture has for the log and for the side store.
#[derive(Clone, Debug)]
pub enum CaptureEvent {
    /// Rows for the log.
    Segment(SegmentDraft),
    /// Nothing happened up to here.
    Heartbeat {
        /// `(L, 0)`.
        to: Position,
    },
    /// Rows for the side store.
    Part(PartDraft),
    /// The end of a transaction whose rows went to the side store.
    Splice(SpliceDraft),
    /// A transaction that gave out parts was rolled back, or is in the log already: its parts are of no use.
    Abandoned {
        /// The top-level transaction.
        xid: u32,
    },
}
