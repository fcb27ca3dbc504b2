//! Builds shapes, changes and batches as capture and the log would.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::builder::BinaryBuilder;
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, FixedSizeBinaryArray, Float32Array, Float64Array, Int16Array,
    Int32Array, Int64Array, RecordBatch, StringArray, StructArray, Time64MicrosecondArray, UInt8Array, UInt32Array,
    UInt64Array,
};
use wallaby_model::change::arrow_schema;
use wallaby_model::schema::interval_fields;
use wallaby_model::{
    Column, ColumnType, Epoch, Lsn, Op, Position, ReplicaIdentity, SegmentBody, TableChanges, TableName, TableSchema,
    Transaction,
};

use crate::{Batch, BatchPart};

/// Builds a table's shape.
pub struct Shape(TableSchema);

impl Shape {
    /// A table without columns in schema `public`.
    pub fn new(name: &str) -> Shape {
        Shape(TableSchema {
            oid: 20_000,
            table: TableName::new("public", name),
            identity: ReplicaIdentity::Default,
            columns: Vec::new(),
            primary_key: Vec::new(),
        })
    }

    /// Adds a column of the primary key.
    #[must_use]
    pub fn key(mut self, name: &str, kind: ColumnType) -> Shape {
        self.0.primary_key.push(u16::try_from(self.0.columns.len()).unwrap_or(u16::MAX));
        self = self.column(name, kind);
        if let Some(column) = self.0.columns.last_mut() {
            (column.identity, column.not_null) = (true, true);
        }
        self
    }

    /// Adds a column of the type that `kind` is named after; arrays are of integers.
    #[must_use]
    pub fn column(self, name: &str, kind: ColumnType) -> Shape {
        let (sql_type, type_oid) = match kind {
            ColumnType::Bool => ("boolean", 16),
            ColumnType::Int2 => ("smallint", 21),
            ColumnType::Int4 => ("integer", 23),
            ColumnType::Int8 => ("bigint", 20),
            ColumnType::Oid => ("oid", 26),
            ColumnType::Float4 => ("real", 700),
            ColumnType::Float8 => ("double precision", 701),
            ColumnType::Numeric => ("numeric", 1700),
            ColumnType::Text | ColumnType::Enum | ColumnType::Other => ("text", 25),
            ColumnType::Bytea => ("bytea", 17),
            ColumnType::Uuid => ("uuid", 2950),
            ColumnType::Json => ("json", 114),
            ColumnType::Jsonb => ("jsonb", 3802),
            ColumnType::Date => ("date", 1082),
            ColumnType::Time => ("time without time zone", 1083),
            ColumnType::Timestamp => ("timestamp without time zone", 1114),
            ColumnType::Timestamptz => ("timestamp with time zone", 1184),
            ColumnType::Interval => ("interval", 1186),
            ColumnType::Array => ("integer[]", 1007),
        };
        self.typed(name, kind, sql_type, type_oid)
    }

    /// Adds a column of a type by name.
    #[must_use]
    pub fn typed(mut self, name: &str, kind: ColumnType, sql_type: &str, type_oid: u32) -> Shape {
        self.0.columns.push(Column {
            name: name.to_owned(),
            kind,
            sql_type: sql_type.to_owned(),
            type_oid,
            type_modifier: -1,
            identity: self.0.identity == ReplicaIdentity::Full,
            not_null: false,
        });
        self
    }

    /// Makes REPLICA IDENTITY FULL: the WAL carries whole old rows.
    #[must_use]
    pub fn full(mut self) -> Shape {
        self.0.identity = ReplicaIdentity::Full;
        for column in &mut self.0.columns {
            column.identity = true;
        }
        self
    }

    /// The shape.
    pub fn build(self) -> Arc<TableSchema> {
        Arc::new(self.0)
    }
}

/// A value of a change.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// NULL, and what key rows do not carry.
    Null,
    /// A TOAST value that the WAL did not carry.
    Unchanged,
    /// Boolean.
    Bool(bool),
    /// Integers, and the raw number of dates, times and timestamps.
    Int(i64),
    /// Floating point.
    Float(f64),
    /// Everything that travels as text.
    Text(String),
    /// `bytea` and `uuid`.
    Bytes(Vec<u8>),
    /// Months, days, microseconds.
    Interval(i32, i32, i64),
}

impl From<i64> for Value {
    fn from(value: i64) -> Value {
        Value::Int(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::Text(value.to_owned())
    }
}

/// One change of one row.
#[derive(Clone, Debug)]
pub struct Change {
    /// The table's shape.
    pub table: Arc<TableSchema>,
    rows: Vec<(Op, Vec<Value>)>,
}

impl Change {
    /// A new row.
    pub fn insert(table: &Arc<TableSchema>, row: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::Insert, row.into())] }
    }

    /// A row after its update; the key did not change.
    pub fn update(table: &Arc<TableSchema>, row: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::Update, row.into())] }
    }

    /// An update that changed the key; in `old` only the identity columns count.
    pub fn update_key(table: &Arc<TableSchema>, old: impl Into<Vec<Value>>, row: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::OldKey, old.into()), (Op::Update, row.into())] }
    }

    /// An update with the whole old row.
    pub fn update_full(table: &Arc<TableSchema>, old: impl Into<Vec<Value>>, row: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::OldRow, old.into()), (Op::Update, row.into())] }
    }

    /// A deleted row by its key; only the identity columns count.
    pub fn delete(table: &Arc<TableSchema>, key: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::DeleteKey, key.into())] }
    }

    /// A deleted row, whole.
    pub fn delete_full(table: &Arc<TableSchema>, row: impl Into<Vec<Value>>) -> Change {
        Change { table: Arc::clone(table), rows: vec![(Op::DeleteRow, row.into())] }
    }

    /// The table is emptied.
    pub fn truncate(table: &Arc<TableSchema>) -> Change {
        let nothing = vec![Value::Null; table.columns.len()];
        Change { table: Arc::clone(table), rows: vec![(Op::Truncate, nothing)] }
    }
}

struct Placed {
    commit: Lsn,
    change: Lsn,
    parts: Change,
}

/// A log to be filled with transactions and cut into batches.
pub struct Log {
    /// The log's epoch that batches carry.
    pub epoch: Epoch,
    taken: Position,
    lsn: u64,
    pending: Vec<Placed>,
}

impl Default for Log {
    fn default() -> Self {
        Log::new()
    }
}

impl Log {
    /// An empty log.
    pub fn new() -> Log {
        Log { epoch: Epoch(1), taken: Position::before(Lsn(1000)), lsn: 1000, pending: Vec::new() }
    }

    /// Where the next batch begins.
    pub fn start(&self) -> Position {
        self.taken
    }

    /// Adds a committed transaction.
    pub fn transaction(&mut self, changes: impl IntoIterator<Item = Change>) {
        let first = self.lsn;
        let changes: Vec<Change> = changes.into_iter().collect();
        let commit = Lsn(first + 8 * (changes.len() as u64 + 1));
        for (index, parts) in changes.into_iter().enumerate() {
            self.pending.push(Placed { commit, change: Lsn(first + 8 * index as u64), parts });
        }
        self.lsn = commit.0 + 8;
    }

    /// Everything since the last batch, in one segment.
    pub fn batch(&mut self) -> Batch {
        self.batch_in_segments(usize::MAX)
    }

    /// Everything since the last batch, in segments of at most so many changes; a transaction may span several.
    pub fn batch_in_segments(&mut self, changes_max: usize) -> Batch {
        let from = self.taken;
        let to = Position::before(Lsn(self.lsn));
        let pending = std::mem::take(&mut self.pending);
        let mut parts = Vec::new();
        let mut after = from;
        for changes in pending.chunks(changes_max.max(1)) {
            let last = &changes[changes.len() - 1];
            let up_to = Position::of(last.commit, last.change, 1);
            parts.push(BatchPart { body: Arc::new(body(changes)), after, up_to, tables: None });
            after = up_to;
        }
        if let Some(last) = parts.last_mut() {
            last.up_to = to;
        }
        self.taken = to;
        // Even an empty batch moves on, as a heartbeat does.
        self.lsn += 8;
        Batch { from, to, log_epoch: self.epoch, parts }
    }
}

/// A part of a chunk: new rows of one table as a snapshot shows them that has what was committed before `at`.
pub fn chunk_part(table: &Arc<TableSchema>, at: Lsn, rows: impl IntoIterator<Item = Vec<Value>>) -> Arc<SegmentBody> {
    let placed = rows.into_iter().zip(1..).map(|(row, n)| Placed {
        commit: at,
        change: Lsn(n),
        parts: Change::insert(table, row),
    });
    let mut body = body(&placed.collect::<Vec<_>>());
    if body.tables.is_empty() {
        body.tables.push(TableChanges { schema: Arc::clone(table), rows: record_batch(table, &[]) });
    }
    Arc::new(body)
}

/// Transaction index, change LSN, operation, values.
type PlacedRow<'a> = (u32, Lsn, Op, &'a [Value]);

fn body(changes: &[Placed]) -> SegmentBody {
    let mut transactions: Vec<Transaction> = Vec::new();
    let mut order: Vec<Arc<TableSchema>> = Vec::new();
    let mut rows: HashMap<Arc<TableSchema>, Vec<PlacedRow<'_>>> = HashMap::new();
    for placed in changes {
        if transactions.last().is_none_or(|last| last.commit != placed.commit) {
            let xid = u32::try_from(placed.commit.0).unwrap_or(u32::MAX);
            transactions.push(Transaction { commit: placed.commit, xid, committed_at_micros: 0 });
        }
        let txn = u32::try_from(transactions.len() - 1).unwrap_or(u32::MAX);
        let of_table = rows.entry(Arc::clone(&placed.parts.table)).or_insert_with(|| {
            order.push(Arc::clone(&placed.parts.table));
            Vec::new()
        });
        of_table.extend(placed.parts.rows.iter().map(|(op, row)| (txn, placed.change, *op, row.as_slice())));
    }
    let tables = order.into_iter().map(|schema| {
        let rows = &rows[&schema];
        TableChanges { rows: record_batch(&schema, rows), schema }
    });
    SegmentBody { transactions, tables: tables.collect() }
}

#[expect(clippy::expect_used, reason = "a batch that does not fit its own shape is a fault of the test")]
fn record_batch(schema: &TableSchema, rows: &[PlacedRow<'_>]) -> RecordBatch {
    let mut absent = BinaryBuilder::new();
    for (_, _, _, values) in rows {
        let mut bits = vec![0_u8; schema.columns.len().div_ceil(8)];
        for (column, value) in values.iter().enumerate() {
            if *value == Value::Unchanged {
                bits[column / 8] |= 1 << (column % 8);
            }
        }
        absent.append_option(bits.iter().any(|&byte| byte != 0).then_some(bits));
    }
    let mut arrays: Vec<ArrayRef> = vec![
        Arc::new(rows.iter().map(|row| row.0).collect::<UInt32Array>()),
        Arc::new(rows.iter().map(|row| row.1.0).collect::<UInt64Array>()),
        Arc::new(rows.iter().map(|_| 1).collect::<UInt32Array>()),
        Arc::new(rows.iter().map(|row| row.2 as u8).collect::<UInt8Array>()),
        Arc::new(absent.finish()),
    ];
    for (index, column) in schema.columns.iter().enumerate() {
        arrays.push(array(column.kind, rows.iter().map(|row| &row.3[index])));
    }
    RecordBatch::try_new(arrow_schema(schema), arrays).expect("values fit the shape")
}

fn array<'a>(kind: ColumnType, values: impl Iterator<Item = &'a Value>) -> ArrayRef {
    let int = |value: &Value| if let Value::Int(number) = value { Some(*number) } else { None };
    let text = |value: &'a Value| if let Value::Text(text) = value { Some(text.as_str()) } else { None };
    let bytes = |value: &'a Value| if let Value::Bytes(bytes) = value { Some(bytes.as_slice()) } else { None };
    let float = |value: &Value| if let Value::Float(number) = value { Some(*number) } else { None };
    match kind {
        ColumnType::Bool => {
            let bool = |value: &Value| if let Value::Bool(bool) = value { Some(*bool) } else { None };
            Arc::new(values.map(bool).collect::<BooleanArray>())
        }
        ColumnType::Int2 => Arc::new(values.map(|v| int(v).map(|n| n as i16)).collect::<Int16Array>()),
        ColumnType::Int4 => Arc::new(values.map(|v| int(v).map(|n| n as i32)).collect::<Int32Array>()),
        ColumnType::Int8 | ColumnType::Timestamp | ColumnType::Timestamptz => {
            Arc::new(values.map(int).collect::<Int64Array>())
        }
        ColumnType::Oid => Arc::new(values.map(|v| int(v).map(|n| n as u32)).collect::<UInt32Array>()),
        ColumnType::Float4 => Arc::new(values.map(|v| float(v).map(|n| n as f32)).collect::<Float32Array>()),
        ColumnType::Float8 => Arc::new(values.map(float).collect::<Float64Array>()),
        ColumnType::Bytea => Arc::new(values.map(bytes).collect::<BinaryArray>()),
        ColumnType::Uuid => {
            let mut builder = arrow_array::builder::FixedSizeBinaryBuilder::new(16);
            for value in values {
                match bytes(value) {
                    // A wrong length shows as a NULL, which no test expects.
                    Some(value) if builder.append_value(value).is_ok() => {}
                    _ => builder.append_null(),
                }
            }
            let array: FixedSizeBinaryArray = builder.finish();
            Arc::new(array)
        }
        ColumnType::Date => Arc::new(values.map(|v| int(v).map(|n| n as i32)).collect::<Date32Array>()),
        ColumnType::Time => Arc::new(values.map(int).collect::<Time64MicrosecondArray>()),
        ColumnType::Interval => {
            let parts: Vec<Option<(i32, i32, i64)>> = values
                .map(|value| if let Value::Interval(m, d, us) = value { Some((*m, *d, *us)) } else { None })
                .collect();
            let of = |part: &Option<(i32, i32, i64)>| part.unwrap_or_default();
            let months = parts.iter().map(|part| of(part).0).collect::<Int32Array>();
            let days = parts.iter().map(|part| of(part).1).collect::<Int32Array>();
            let micros = parts.iter().map(|part| of(part).2).collect::<Int64Array>();
            let nulls = parts.iter().map(Option::is_some).collect::<Vec<bool>>();
            let children: Vec<ArrayRef> = vec![Arc::new(months), Arc::new(days), Arc::new(micros)];
            Arc::new(StructArray::new(interval_fields(), children, Some(nulls.into())))
        }
        ColumnType::Numeric
        | ColumnType::Text
        | ColumnType::Json
        | ColumnType::Jsonb
        | ColumnType::Enum
        | ColumnType::Array
        | ColumnType::Other => Arc::new(values.map(text).collect::<StringArray>()),
    }
}
