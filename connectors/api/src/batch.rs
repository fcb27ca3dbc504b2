//! What a sink is asked to apply.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use wallaby_model::{Epoch, Position, SegmentBody, TableChanges, TableName, Transaction};

/// One segment's share of a batch: its rows with `after < position <= up_to`.
#[derive(Clone, Debug)]
pub struct BatchPart {
    /// The whole segment, shared with other readers.
    pub body: Arc<SegmentBody>,
    /// Rows at or before this are not part of the batch.
    pub after: Position,
    /// Rows past this are not part of the batch.
    pub up_to: Position,
    /// Which tables' rows are part of it; `None`: all of them.
    pub tables: Option<Arc<TableFilter>>,
}

impl BatchPart {
    /// The part's rows by table and shape, without copying.
    pub fn tables(&self) -> impl Iterator<Item = TableChanges> + '_ {
        let slices = self.body.tables.iter().filter_map(|table| {
            let after = match &self.tables {
                None => self.after,
                Some(filter) => filter.after(&table.schema.table)?.max(self.after),
            };
            Some(table.slice(&self.body.transactions, after, self.up_to))
        });
        slices.filter(|table| table.rows.num_rows() > 0)
    }

    /// The transactions that `_txn` counts.
    pub fn transactions(&self) -> &[Transaction] {
        &self.body.transactions
    }
}

/// Which tables a reader takes rows of, and from where on (architecture.md, "Snapshot": a sink's checkpoint has a state per table).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableFilter {
    /// Tables whose rows past a position are taken.
    pub taken: HashMap<TableName, Position>,
    /// Whether rows of tables that are not in `taken` are taken, all of them.
    pub others: bool,
    /// Tables that are left out although `others` are taken.
    pub left_out: HashSet<TableName>,
}

impl TableFilter {
    /// The position past which rows of a table are taken; `None`: none of them.
    pub fn after(&self, table: &TableName) -> Option<Position> {
        match self.taken.get(table) {
            Some(after) => Some(*after),
            None if self.others && !self.left_out.contains(table) => Some(Position::ZERO),
            None => None,
        }
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
