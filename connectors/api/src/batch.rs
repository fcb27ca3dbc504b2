//! What a sink is asked to apply.

use std::sync::Arc;

use wallaby_model::{Epoch, Position, SegmentBody, TableChanges, Transaction};

/// One segment's share of a batch: its rows with `after < position <= up_to`.
#[derive(Clone, Debug)]
pub struct BatchPart {
    /// The whole segment, shared with other readers.
    pub body: Arc<SegmentBody>,
    /// Rows at or before this are not part of the batch.
    pub after: Position,
    /// Rows past this are not part of the batch.
    pub up_to: Position,
}

impl BatchPart {
    /// The part's rows by table and shape, without copying.
    pub fn tables(&self) -> impl Iterator<Item = TableChanges> + '_ {
        let slices = self.body.tables.iter().map(|table| table.slice(&self.body.transactions, self.after, self.up_to));
        slices.filter(|table| table.rows.num_rows() > 0)
    }

    /// The transactions that `_txn` counts.
    pub fn transactions(&self) -> &[Transaction] {
        &self.body.transactions
    }
}

/// A contiguous run of the log, `(from, to]`, that ends at the end of a source transaction: `to` is of the form `(L, 0)`.
/// A batch without parts moves the position only.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where the sink stands before it. A sink that stands elsewhere refuses the batch.
    pub from: Position,
    /// Where the sink stands after it.
    pub to: Position,
    /// The log's epoch at `to`; kept in the sink's checkpoint beside the sink's own.
    pub log_epoch: Epoch,
    /// The segments, in position order.
    pub parts: Vec<BatchPart>,
}

impl Batch {
    /// The number of rows, before-images included.
    pub fn rows(&self) -> usize {
        self.parts.iter().flat_map(BatchPart::tables).map(|table| table.rows.num_rows()).sum()
    }
}
