//! Rows that wait to be given out: the batches of some tables, and the transactions that they belong to.
//!
//! There is one for the log, and one for each transaction that is streamed while it is in progress.

use std::sync::Arc;

use wallaby_model::{Op, Position, SegmentBody, TableChanges, TableSchema, Transaction};

use super::table::{RowHead, TableBuilder};
use super::table_set::TableSet;
use crate::error::SourceError;
use crate::pgoutput::{Cell, DecodeError, Tuple};

/// Bytes of a transaction's entry in a segment.
const TRANSACTION_BYTES: usize = 20;

/// See the module.
#[derive(Default)]
pub(super) struct Buffer {
    tables: TableSet,
    /// Tables with rows.
    touched: Vec<u32>,
    /// Rows of shapes that were replaced since the last [`Buffer::take`].
    finished: Vec<TableChanges>,
    transactions: Vec<Transaction>,
    rows: usize,
    content_bytes: usize,
}

/// What a buffer held.
pub(super) struct Taken {
    pub(super) body: SegmentBody,
    pub(super) rows: usize,
    pub(super) content_bytes: usize,
}

impl Buffer {
    #[inline]
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    #[inline]
    pub(super) fn content_bytes(&self) -> usize {
        self.content_bytes
    }

    #[inline]
    pub(super) fn table(&self, oid: u32) -> Option<&TableBuilder> {
        self.tables.get(oid)
    }

    /// Sets the shape of a table from here on. An equal one changes nothing.
    pub(super) fn set_shape(&mut self, schema: Arc<TableSchema>) -> Result<(), SourceError> {
        let oid = schema.oid;
        if let Some(known) = self.tables.get_mut(oid) {
            if **known.schema() == *schema {
                return Ok(());
            }
            if known.rows() > 0 {
                self.finished.push(known.finish()?);
                self.touched.retain(|touched| *touched != oid);
            }
        }
        self.tables.insert(oid, TableBuilder::new(schema));
        Ok(())
    }

    /// What it would hold with `bytes` more in this table.
    #[inline]
    pub(super) fn added(&self, oid: u32, bytes: usize) -> usize {
        let overhead = match self.tables.get(oid) {
            Some(table) if table.rows() == 0 => table.overhead_bytes(),
            _ => 0,
        };
        self.content_bytes + overhead + bytes
    }

    /// Adds a transaction; its index.
    pub(super) fn add_transaction(&mut self, transaction: Transaction) -> u32 {
        self.transactions.push(transaction);
        self.content_bytes += TRANSACTION_BYTES;
        self.transactions.len() as u32 - 1
    }

    /// Appends a change of a row. The table was described.
    #[inline]
    pub(super) fn append(
        &mut self,
        oid: u32,
        txn: u32,
        position: Position,
        change: &RowChange<'_, '_>,
        bytes: usize,
    ) -> Result<(), SourceError> {
        let with_overhead = self.added(oid, bytes);
        let Some(table) = self.tables.get_mut(oid) else { return Ok(()) };
        if table.rows() == 0 {
            self.touched.push(oid);
        }
        let head = |op| RowHead { txn, change: position.change, index: position.index, op };
        let mut whole_old = None;
        if let Some((mut op, old)) = change.old {
            if op == Op::OldRow && lacks_values(old, change.row)? {
                op = Op::OldKey;
            }
            table.push(head(op), old, None)?;
            whole_old = (op == Op::OldRow).then_some(old);
        }
        table.push(head(change.op), change.row, whole_old)?;
        self.rows += change.rows();
        self.content_bytes = with_overhead;
        Ok(())
    }

    /// Appends that a table was emptied. The table was described.
    pub(super) fn append_truncate(&mut self, oid: u32, txn: u32, position: Position) {
        let row_bytes = self.tables.get(oid).map_or(0, TableBuilder::row_bytes);
        let with_overhead = self.added(oid, row_bytes);
        let Some(table) = self.tables.get_mut(oid) else { return };
        if table.rows() == 0 {
            self.touched.push(oid);
        }
        table.push_empty(RowHead { txn, change: position.change, index: position.index, op: Op::Truncate });
        self.rows += 1;
        self.content_bytes = with_overhead;
    }

    /// Gives everything away and is empty again; `None` when it is.
    pub(super) fn take(&mut self) -> Result<Option<Taken>, SourceError> {
        if self.rows == 0 {
            return Ok(None);
        }
        let mut tables = std::mem::take(&mut self.finished);
        for oid in self.touched.drain(..) {
            if let Some(table) = self.tables.get_mut(oid) {
                tables.push(table.finish()?);
            }
        }
        let body = SegmentBody { transactions: std::mem::take(&mut self.transactions), tables };
        let (rows, content_bytes) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.content_bytes));
        Ok(Some(Taken { body, rows, content_bytes }))
    }
}

/// Whether an old row that is sent as a whole one is none. A partitioned table with REPLICA IDENTITY FULL says so of its
/// partitions too, whose WAL has no more than their own identity. A TOAST value that did not change is never NULL: where the
/// old row has NULL in its place, only the old key is known.
fn lacks_values(old: &Tuple<'_>, new: &Tuple<'_>) -> Result<bool, DecodeError> {
    let (mut old_cells, mut new_cells) = (old.cells(), new.cells());
    for _ in 0..old.columns().min(new.columns()) {
        if let (Cell::Null, Cell::Unchanged) = (old_cells.read()?, new_cells.read()?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A change of one row: the row, and what the WAL carries of the old one.
pub(super) struct RowChange<'m, 'a> {
    pub(super) op: Op,
    pub(super) row: &'m Tuple<'a>,
    pub(super) old: Option<(Op, &'m Tuple<'a>)>,
}

impl RowChange<'_, '_> {
    pub(super) fn rows(&self) -> usize {
        1 + usize::from(self.old.is_some())
    }
}
