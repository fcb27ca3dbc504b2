//! Changes in columns: what a segment holds.
//!
//! A [`SegmentBody`] is a contiguous run of positions. Its rows stand in one Arrow batch per table and shape; every row
//! says its transaction, its ordinal and its operation, so that the order across tables can be restored exactly.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, BinaryArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};

use crate::position::{Lsn, Position};
use crate::schema::TableSchema;

/// What happened to a row, as a byte in the `_op` column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// A new row; all columns present.
    Insert = 1,
    /// A row after its update. If the WAL carried its old key or old row, an [`Op::OldKey`] or [`Op::OldRow`] row with
    /// the same position stands directly before it in the same batch.
    Update = 2,
    /// A deleted row whose key is known: only the identity columns are present.
    DeleteKey = 3,
    /// A deleted row, whole (REPLICA IDENTITY FULL).
    DeleteRow = 4,
    /// The old key of the update that follows: only the identity columns are present. Sent when the key changed.
    OldKey = 5,
    /// The whole old row of the update that follows (REPLICA IDENTITY FULL).
    OldRow = 6,
    /// The table was truncated; all columns are null and mean nothing.
    Truncate = 7,
}

impl Op {
    /// Reads the byte of the `_op` column.
    pub fn from_byte(byte: u8) -> Option<Op> {
        Some(match byte {
            1 => Op::Insert,
            2 => Op::Update,
            3 => Op::DeleteKey,
            4 => Op::DeleteRow,
            5 => Op::OldKey,
            6 => Op::OldRow,
            7 => Op::Truncate,
            _ => return None,
        })
    }

    /// Whether this row is the before-image of the row after it, and no change of its own.
    pub fn is_before_image(self) -> bool {
        matches!(self, Op::OldKey | Op::OldRow)
    }
}

/// One source transaction that has rows in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    /// Commit LSN (pgoutput Begin's `final_lsn`).
    pub commit: Lsn,
    /// The source's transaction id.
    pub xid: u32,
    /// Commit time, µs since 1970-01-01 UTC.
    pub committed_at_micros: i64,
}

/// Index of the `_txn` column: UInt32, the row's index in [`SegmentBody::transactions`].
pub const TXN: usize = 0;
/// Index of the `_change` column: UInt64, the row's change LSN.
pub const CHANGE: usize = 1;
/// Index of the `_index` column: UInt32, the number among the changes of that LSN.
pub const INDEX: usize = 2;
/// Index of the `_op` column: UInt8, an [`Op`].
pub const OP: usize = 3;
/// Index of the `_absent` column: nullable Binary. A bitmap (bit i % 8 of byte i / 8, least significant first, is
/// column i) of the columns whose value the WAL did not carry: unchanged TOAST. Null when every value is there. The
/// value array holds null at an absent column. [`Op::DeleteKey`] and [`Op::OldKey`] do not use it: there everything
/// outside of the identity is absent.
pub const ABSENT: usize = 4;
/// Where the table's own columns begin.
pub const FIRST_COLUMN: usize = 5;

/// The Arrow schema of the change batches of one table shape: the five columns above, then the table's columns, all of
/// them nullable.
pub fn arrow_schema(table: &TableSchema) -> SchemaRef {
    let mut fields = vec![
        Field::new("_txn", DataType::UInt32, false),
        Field::new("_change", DataType::UInt64, false),
        Field::new("_index", DataType::UInt32, false),
        Field::new("_op", DataType::UInt8, false),
        Field::new("_absent", DataType::Binary, true),
    ];
    for column in &table.columns {
        fields.push(Field::new(&column.name, column.kind.arrow(), true));
    }
    Arc::new(Schema::new(fields))
}

/// Rows of one table in one shape, in position order.
#[derive(Clone, Debug)]
pub struct TableChanges {
    /// The table's shape at these rows.
    pub schema: Arc<TableSchema>,
    /// The rows, of [`arrow_schema`].
    pub rows: RecordBatch,
}

impl TableChanges {
    /// Whether the batch has the columns and types that its shape asks for. Codecs check it on everything they read.
    pub fn is_well_formed(&self, transactions: usize) -> bool {
        let wanted = arrow_schema(&self.schema);
        let got = self.rows.schema();
        if wanted.fields().len() != got.fields().len() {
            return false;
        }
        let types_fit = wanted.fields().iter().zip(got.fields()).all(|(w, g)| w.data_type() == g.data_type());
        if !types_fit {
            return false;
        }
        let known_transaction = self.txn().values().iter().all(|&txn| (txn as usize) < transactions);
        known_transaction && self.op().values().iter().all(|&op| Op::from_byte(op).is_some())
    }

    /// The bytes of these rows alone. Columns that were read from a segment share its buffer: what they hold in memory, taken one
    /// by one, is that buffer once per column.
    pub fn bytes(&self) -> usize {
        let of_column = |column: &ArrayRef| {
            let data = column.to_data();
            data.get_slice_memory_size().unwrap_or_else(|_| data.get_array_memory_size())
        };
        self.rows.columns().iter().map(of_column).sum()
    }

    /// The `_txn` column.
    pub fn txn(&self) -> &UInt32Array {
        self.rows.column(TXN).as_primitive::<UInt32Type>()
    }

    /// The `_change` column.
    pub fn change(&self) -> &UInt64Array {
        self.rows.column(CHANGE).as_primitive::<UInt64Type>()
    }

    /// The `_index` column.
    pub fn index(&self) -> &UInt32Array {
        self.rows.column(INDEX).as_primitive::<UInt32Type>()
    }

    /// The `_op` column.
    pub fn op(&self) -> &UInt8Array {
        self.rows.column(OP).as_primitive::<UInt8Type>()
    }

    /// The `_absent` column.
    pub fn absent(&self) -> &BinaryArray {
        self.rows.column(ABSENT).as_binary::<i32>()
    }

    /// Whether `column` (index into the table's columns) of `row` was not carried because its TOAST value is unchanged.
    pub fn is_unchanged(&self, row: usize, column: usize) -> bool {
        let absent = self.absent();
        if absent.is_null(row) {
            return false;
        }
        absent.value(row).get(column / 8).is_some_and(|byte| byte & (1 << (column % 8)) != 0)
    }

    /// The operation of a row.
    pub fn op_at(&self, row: usize) -> Option<Op> {
        Op::from_byte(self.op().value(row))
    }

    /// The position of a row.
    pub fn position(&self, row: usize, transactions: &[Transaction]) -> Position {
        let commit = transactions[self.txn().value(row) as usize].commit;
        Position::of(commit, Lsn(self.change().value(row)), self.index().value(row))
    }

    /// The rows with `after < position <= up_to`, without copying: positions ascend within a batch.
    pub fn slice(&self, transactions: &[Transaction], after: Position, up_to: Position) -> TableChanges {
        let first = self.first_row_past(transactions, after);
        let end = self.first_row_past(transactions, up_to).max(first);
        TableChanges { schema: Arc::clone(&self.schema), rows: self.rows.slice(first, end - first) }
    }

    /// The index of the first row whose position is past `bound`.
    fn first_row_past(&self, transactions: &[Transaction], bound: Position) -> usize {
        let (mut low, mut high) = (0, self.rows.num_rows());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.position(middle, transactions) <= bound {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// What a data segment holds: transactions in commit order, and their rows by table.
#[derive(Clone, Debug, Default)]
pub struct SegmentBody {
    /// The transactions that have rows here, in commit order.
    pub transactions: Vec<Transaction>,
    /// Rows by table and shape. A table whose shape changed inside the segment appears once per shape.
    pub tables: Vec<TableChanges>,
}

impl SegmentBody {
    /// The number of rows, before-images included.
    pub fn rows(&self) -> usize {
        self.tables.iter().map(|table| table.rows.num_rows()).sum()
    }

    /// The part with `after < position <= up_to`. The transaction list stays whole, so that row indexes stay valid.
    pub fn slice(&self, after: Position, up_to: Position) -> SegmentBody {
        let slices = self.tables.iter().map(|table| table.slice(&self.transactions, after, up_to));
        SegmentBody {
            transactions: self.transactions.clone(),
            tables: slices.filter(|table| table.rows.num_rows() > 0).collect(),
        }
    }
}
