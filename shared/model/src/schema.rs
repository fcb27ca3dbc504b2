//! Shapes of tables as the source has them, and the Arrow types that carry their values.

use std::fmt;

use arrow_schema::{DataType, Field, Fields, TimeUnit};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A table's schema and name, as the source spells them (unquoted).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableName {
    /// The Postgres schema.
    pub schema: String,
    /// The table.
    pub name: String,
}

impl TableName {
    /// A table name from its two parts.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> TableName {
        TableName { schema: schema.into(), name: name.into() }
    }

    /// The name as SQL: both parts quoted.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl fmt::Debug for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `"name"` with inner quotes doubled: safe in any SQL position that takes an identifier.
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `'text'` with quotes doubled, and an `E` before it when it holds a backslash.
pub fn quote_literal(text: &str) -> String {
    if text.contains('\\') {
        format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

/// How a column's values travel. What is not exact in an Arrow type of its own travels as Postgres' text form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnType {
    /// Arrow Boolean.
    Bool,
    /// Arrow Int16.
    Int2,
    /// Arrow Int32.
    Int4,
    /// Arrow Int64.
    Int8,
    /// Arrow UInt32: oid, and nothing else.
    Oid,
    /// Arrow Float32.
    Float4,
    /// Arrow Float64.
    Float8,
    /// Arrow Utf8, exactly as Postgres prints it: keeps each value's scale, `NaN`, `Infinity`, `-Infinity`.
    Numeric,
    /// Arrow Utf8: text, varchar, bpchar, name, "char", citext.
    Text,
    /// Arrow Binary.
    Bytea,
    /// Arrow FixedSizeBinary(16), big endian.
    Uuid,
    /// Arrow Utf8.
    Json,
    /// Arrow Utf8.
    Jsonb,
    /// Arrow Date32: days since 1970-01-01; `i32::MAX` and `i32::MIN` are `infinity` and `-infinity`.
    Date,
    /// Arrow Time64(µs): 0 to 86,400,000,000 (`24:00:00`).
    Time,
    /// Arrow Int64: µs since **2000-01-01** 00:00, as Postgres keeps them, because the Unix epoch cannot hold its last
    /// 29 years; `i64::MAX` and `i64::MIN` are `infinity` and `-infinity`.
    Timestamp,
    /// As [`ColumnType::Timestamp`], in UTC.
    Timestamptz,
    /// Arrow Struct(months: Int32, days: Int32, micros: Int64). `infinity` (PG 17) is the maximum of all three,
    /// `-infinity` the minimum.
    Interval,
    /// Arrow Utf8: the label.
    Enum,
    /// Arrow Utf8: the array literal as Postgres prints it, of an element type that is exact in text. Keeps
    /// dimensions, lower bounds, NULL elements.
    Array,
    /// Arrow Utf8: Postgres' text form of a type that has no rule of its own. Counted in the metrics.
    Other,
}

impl ColumnType {
    /// The Arrow type that carries it in a change batch.
    pub fn arrow(self) -> DataType {
        match self {
            ColumnType::Bool => DataType::Boolean,
            ColumnType::Int2 => DataType::Int16,
            ColumnType::Int4 => DataType::Int32,
            ColumnType::Int8 | ColumnType::Timestamp | ColumnType::Timestamptz => DataType::Int64,
            ColumnType::Oid => DataType::UInt32,
            ColumnType::Float4 => DataType::Float32,
            ColumnType::Float8 => DataType::Float64,
            ColumnType::Bytea => DataType::Binary,
            ColumnType::Uuid => DataType::FixedSizeBinary(16),
            ColumnType::Date => DataType::Date32,
            ColumnType::Time => DataType::Time64(TimeUnit::Microsecond),
            ColumnType::Interval => DataType::Struct(interval_fields()),
            ColumnType::Numeric
            | ColumnType::Text
            | ColumnType::Json
            | ColumnType::Jsonb
            | ColumnType::Enum
            | ColumnType::Array
            | ColumnType::Other => DataType::Utf8,
        }
    }
}

/// The fields of an interval: months, days, micros.
pub fn interval_fields() -> Fields {
    Fields::from(vec![
        Field::new("months", DataType::Int32, false),
        Field::new("days", DataType::Int32, false),
        Field::new("micros", DataType::Int64, false),
    ])
}

/// A column of a source table, in the table's order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Column {
    /// Its name as the source spells it.
    pub name: String,
    /// How its values travel.
    pub kind: ColumnType,
    /// Its type as SQL, by `format_type`: `numeric(10,2)`, `shop.mood`, `integer[]`.
    pub sql_type: String,
    /// The type's oid at the source (a domain's base type).
    pub type_oid: u32,
    /// The type modifier, −1 for none.
    pub type_modifier: i32,
    /// Part of the replica identity that the WAL carries for old rows.
    pub identity: bool,
    /// Declared NOT NULL at the source.
    pub not_null: bool,
}

/// What the WAL carries of an old row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaIdentity {
    /// The primary key, when there is one.
    Default,
    /// Nothing.
    Nothing,
    /// The whole old row.
    Full,
    /// The columns of a unique index.
    Index,
}

/// Names one shape of one table: 16 hex digits of a SHA-256 over everything in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SchemaId(pub u64);

impl fmt::Display for SchemaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SchemaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The shape of one source table at one point of its history.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TableSchema {
    /// The table's oid at the source.
    pub oid: u32,
    /// Its name.
    pub table: TableName,
    /// Its replica identity.
    pub identity: ReplicaIdentity,
    /// The columns that the publication sends, in order.
    pub columns: Vec<Column>,
    /// Indexes into `columns` of the primary key in key order; empty when there is none, or when a column of it is
    /// not published. With [`ReplicaIdentity::Default`] it is the key that the table had when the WAL was written, and
    /// its columns are those that are marked as the identity; else it is the one that the table has today.
    pub primary_key: Vec<u16>,
}

impl TableSchema {
    /// The id of this shape; equal shapes have equal ids in every process.
    pub fn id(&self) -> SchemaId {
        let mut hash = Sha256::new();
        // serde_json writes struct fields in declaration order, so this is canonical.
        hash.update(serde_json::to_vec(self).unwrap_or_default());
        let digest = hash.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        SchemaId(u64::from_be_bytes(first))
    }

    /// The columns by which a sink finds a row: the primary key, else the columns of the identity index, else none.
    /// (With REPLICA IDENTITY FULL and no primary key there is no key: the whole old row is known, but rows may repeat.)
    pub fn key(&self) -> Vec<u16> {
        if !self.primary_key.is_empty() {
            return self.primary_key.clone();
        }
        if self.identity == ReplicaIdentity::Index {
            let marked = self.columns.iter().enumerate().filter(|(_, column)| column.identity);
            return marked.map(|(index, _)| u16::try_from(index).unwrap_or(u16::MAX)).collect();
        }
        Vec::new()
    }
}
