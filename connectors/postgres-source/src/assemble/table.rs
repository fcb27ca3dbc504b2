//! The growing batch of one table in one shape.

pub(super) mod binary;

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_schema::SchemaRef;
use wallaby_model::change::{FIRST_COLUMN, arrow_schema};
use wallaby_model::{Lsn, Op, TableChanges, TableSchema};

use super::buffer::RowChange;
use super::column::{Column, Varying};
use crate::error::SourceError;
use crate::pgoutput::{Cell, DecodeError, Tuple};

/// What a segment spends on a table before its first row: IPC framing, padding and field names, per column and fixed.
const OVERHEAD_PER_COLUMN_BYTES: usize = 250;
const OVERHEAD_BYTES: usize = 1024;
/// Transaction, change LSN, index, operation, offset of `_absent`.
const META_ROW_BYTES: usize = 4 + 8 + 4 + 1 + 4;

/// Where a row stands and what happened to it.
#[derive(Clone, Copy)]
pub(super) struct RowHead {
    pub(super) txn: u32,
    pub(super) change: Lsn,
    pub(super) index: u32,
    pub(super) op: Op,
}

/// Rows of one table in one shape.
pub(super) struct TableBuilder {
    schema: Arc<TableSchema>,
    arrow: SchemaRef,
    txn: Vec<u32>,
    change: Vec<u64>,
    index: Vec<u32>,
    op: Vec<u8>,
    absent: Varying,
    columns: Vec<Column>,
    row_bytes: usize,
    overhead_bytes: usize,
    bitmap: Vec<u8>,
    /// Rows of the last segment: what the next one will have.
    rows_expected: usize,
}

impl TableBuilder {
    pub(super) fn new(schema: Arc<TableSchema>) -> TableBuilder {
        let shape_bytes = serde_json::to_vec(schema.as_ref()).map_or(0, |shape| shape.len());
        let fixed: usize = schema.columns.iter().map(|column| Column::fixed_bytes(column.kind)).sum();
        TableBuilder {
            arrow: arrow_schema(&schema),
            txn: Vec::new(),
            change: Vec::new(),
            index: Vec::new(),
            op: Vec::new(),
            absent: Varying::new(),
            columns: schema.columns.iter().map(|column| Column::new(column.kind)).collect(),
            row_bytes: META_ROW_BYTES + fixed + schema.columns.len().div_ceil(8),
            overhead_bytes: OVERHEAD_BYTES
                + shape_bytes
                + (schema.columns.len() + FIRST_COLUMN) * OVERHEAD_PER_COLUMN_BYTES,
            bitmap: vec![0; schema.columns.len().div_ceil(8)],
            schema,
            rows_expected: 0,
        }
    }

    pub(super) fn schema(&self) -> &Arc<TableSchema> {
        &self.schema
    }

    pub(super) fn rows(&self) -> usize {
        self.op.len()
    }

    /// What this table adds to a segment before its first row.
    pub(super) fn overhead_bytes(&self) -> usize {
        self.overhead_bytes
    }

    /// What a row takes apart from its text.
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// What a row will take, exactly.
    pub(super) fn bytes_of(&self, tuple: &Tuple<'_>) -> Result<usize, DecodeError> {
        let mut cells = tuple.cells();
        let mut bytes = self.row_bytes;
        for column in self.schema.columns.iter().take(tuple.columns()) {
            if let Cell::Text(text) = cells.read()? {
                bytes += Column::varying_bytes(column.kind, text.len());
            }
        }
        Ok(bytes)
    }

    /// What a change will take, exactly. A value that is filled in from the old row counts a second time; no more than
    /// `limit` is counted for those.
    pub(super) fn exact_bytes(&self, change: &RowChange<'_, '_>, limit: usize) -> Result<usize, DecodeError> {
        let old = match change.old {
            Some((_, old)) => self.bytes_of(old)?,
            None => 0,
        };
        let filled = if change.old.is_some_and(|(op, _)| op == Op::OldRow) { old } else { 0 };
        Ok(old + filled.min(limit) + self.bytes_of(change.row)?)
    }

    /// Refuses a row above the limit.
    pub(super) fn check_row(&self, xid: u32, bytes: usize, limit: usize) -> Result<(), SourceError> {
        let with_overhead = bytes + self.overhead_bytes;
        if with_overhead <= limit {
            return Ok(());
        }
        let (bytes, limit) = (with_overhead as u64, limit as u64);
        Err(SourceError::RowTooLarge { xid, table: self.schema.table.clone(), bytes, limit })
    }

    fn push_head(&mut self, head: RowHead) {
        if self.op.is_empty() && self.rows_expected > 0 {
            self.reserve();
        }
        self.txn.push(head.txn);
        self.change.push(head.change.0);
        self.index.push(head.index);
        self.op.push(head.op as u8);
    }

    #[cold]
    fn reserve(&mut self) {
        let rows = self.rows_expected;
        self.txn.reserve(rows);
        self.change.reserve(rows);
        self.index.reserve(rows);
        self.op.reserve(rows);
        self.absent.reserve(rows);
        for column in &mut self.columns {
            column.reserve(rows);
        }
    }

    /// Appends a row without values: a truncate.
    pub(super) fn push_empty(&mut self, head: RowHead) {
        self.push_head(head);
        self.absent.push_null();
        for column in &mut self.columns {
            column.push_null();
        }
    }

    /// Appends a row. Values that `tuple` does not carry are taken from `old`, when that is the whole old row.
    pub(super) fn push(
        &mut self,
        head: RowHead,
        tuple: &Tuple<'_>,
        old: Option<&Tuple<'_>>,
    ) -> Result<(), SourceError> {
        if tuple.columns() != self.columns.len() || old.is_some_and(|old| old.columns() != self.columns.len()) {
            let reason = "a row has another number of columns than its table";
            return Err(DecodeError::Order { kind: 'R', reason }.into());
        }
        self.push_head(head);
        let mut cells = tuple.cells();
        let mut old_cells = old.map(Tuple::cells);
        let mut any_absent = false;
        for index in 0..self.columns.len() {
            let old_cell = match &mut old_cells {
                Some(cells) => Some(cells.read()?),
                None => None,
            };
            let cell = match (cells.read()?, old_cell) {
                (Cell::Unchanged, Some(old_cell)) => old_cell,
                (cell, _) => cell,
            };
            match cell {
                Cell::Text(text) => {
                    if let Err(bad) = self.columns[index].push_text(text) {
                        return Err(self.bad_value(index, bad.0));
                    }
                }
                Cell::Null => self.columns[index].push_null(),
                Cell::Unchanged => {
                    self.columns[index].push_null();
                    self.bitmap[index / 8] |= 1 << (index % 8);
                    any_absent = true;
                }
                Cell::Binary(_) => {
                    return Err(DecodeError::Order { kind: 'b', reason: "binary values were not asked for" }.into());
                }
            }
        }
        cells.finish()?;
        if any_absent {
            self.absent.push(&self.bitmap);
            self.bitmap.fill(0);
        } else {
            self.absent.push_null();
        }
        Ok(())
    }

    fn bad_value(&self, index: usize, offset: usize) -> SourceError {
        let column = &self.schema.columns[index];
        SourceError::Value {
            table: self.schema.table.clone(),
            column: column.name.clone(),
            kind: kind_name(column.kind),
            offset,
        }
    }

    /// Gives the rows away and is empty again.
    pub(super) fn finish(&mut self) -> Result<TableChanges, SourceError> {
        let failed = |schema: &TableSchema, error: arrow_schema::ArrowError| SourceError::Columns {
            table: schema.table.clone(),
            reason: without_values(&error),
        };
        self.rows_expected = self.rows();
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(self.columns.len() + FIRST_COLUMN);
        arrays.push(Arc::new(UInt32Array::from(std::mem::take(&mut self.txn))));
        arrays.push(Arc::new(UInt64Array::from(std::mem::take(&mut self.change))));
        arrays.push(Arc::new(UInt32Array::from(std::mem::take(&mut self.index))));
        arrays.push(Arc::new(UInt8Array::from(std::mem::take(&mut self.op))));
        arrays.push(Arc::new(self.absent.finish_binary().map_err(|error| failed(&self.schema, error))?));
        for (column, shape) in self.columns.iter_mut().zip(&self.schema.columns) {
            let array = column.finish().map_err(|_| SourceError::Value {
                table: self.schema.table.clone(),
                column: shape.name.clone(),
                kind: "UTF-8 text",
                offset: 0,
            });
            arrays.push(array?);
        }
        let rows =
            RecordBatch::try_new(Arc::clone(&self.arrow), arrays).map_err(|error| failed(&self.schema, error))?;
        Ok(TableChanges { schema: Arc::clone(&self.schema), rows })
    }
}

/// Arrow's messages may quote values; only the kind of error is kept.
fn without_values(error: &arrow_schema::ArrowError) -> String {
    match error {
        arrow_schema::ArrowError::InvalidArgumentError(_) => "lengths or types do not agree".into(),
        _ => "arrow refused them".into(),
    }
}

fn kind_name(kind: wallaby_model::ColumnType) -> &'static str {
    use wallaby_model::ColumnType as T;
    match kind {
        T::Bool => "boolean",
        T::Int2 | T::Int4 | T::Int8 | T::Oid => "integer in range",
        T::Float4 | T::Float8 => "floating-point number",
        T::Bytea => "bytea in hex form",
        T::Uuid => "uuid",
        T::Date => "date in ISO form",
        T::Time => "time",
        T::Timestamp | T::Timestamptz => "timestamp in ISO form",
        T::Interval => "interval in iso_8601 form",
        T::Numeric | T::Text | T::Json | T::Jsonb | T::Enum | T::Array | T::Other => "text",
    }
}
