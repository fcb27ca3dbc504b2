//! What a sink may ask of the source while it applies: a row by its key, when a partial change met no row.

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_model::{Lsn, SegmentBody, TableChanges, TableName, TableSchema};

use crate::{SinkError, TableExtras};

/// The values of a key, in the order of `TableSchema::key`, as Postgres' text form. `None` is NULL.
pub type KeyValues = Vec<Option<String>>;

/// A row as the source has it now: one body with one `Op::Insert` row, in the source's current shape; `None` when the
/// row is gone.
pub type SourceRow = Option<SegmentBody>;

/// What the source has for the first of some keys.
#[derive(Clone, Debug, Default)]
pub struct SourceRows {
    /// How many of the keys were looked for: at least one, if there was one.
    pub keys: usize,
    /// The rows of these that are there, in the keys' order, each as in [`SourceRow`].
    pub rows: Vec<SegmentBody>,
}

/// A column that a table has in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceColumn {
    /// Its name.
    pub name: String,
    /// What rows have in it that are older than the column (`ADD COLUMN … DEFAULT`), as Postgres' text form: no change of the stream says
    /// so. `None` when that is NULL, and when the table was rewritten since, which gave each row a value of its own.
    pub filled: Option<String>,
}

/// Which database of which running server: two sessions that see the same are in one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseIdentity {
    /// When the server was started, in microseconds since 1970. A physical copy of it, which has its system identifier, was started by
    /// itself.
    pub started_at_micros: i64,
    /// The database's oid.
    pub oid: u32,
}

impl DatabaseIdentity {
    /// What both ends ask Postgres, so that they compare the same: `started_at_micros` as int8, `oid`, and the database's name.
    pub const SQL: &str = "\
        SELECT (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::int8, d.oid, d.datname::text \
        FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()";
}

/// The columns that a table had in the stream at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceColumns {
    /// Where the source's WAL stood then: whatever was committed before may be of another shape, what comes later says so itself.
    pub at: Lsn,
    /// The columns; none when the table was gone.
    pub columns: Vec<SourceColumn>,
}

/// Reads single rows of the source over a connection that is opened on demand.
#[async_trait]
pub trait SourceLookup: Send + Sync {
    /// Reads the row of `table` whose key columns (`TableSchema::key`) have these values.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses; transient ones may be tried again.
    async fn row_by_key(&self, table: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError>;

    /// Reads the rows of `table` with these keys, in their order, until there are `bytes_max` bytes of rows or more: the rest is for
    /// another call.
    ///
    /// # Errors
    /// As [`SourceLookup::row_by_key`].
    async fn rows_by_keys(
        &self,
        table: &Arc<TableSchema>,
        keys: &[KeyValues],
        bytes_max: usize,
    ) -> Result<SourceRows, SinkError> {
        let (mut found, mut bytes) = (SourceRows::default(), 0);
        for key in keys {
            found.keys += 1;
            if let Some(row) = self.row_by_key(table, key).await? {
                bytes += row.tables.iter().map(TableChanges::bytes).sum::<usize>();
                found.rows.push(row);
            }
            if bytes >= bytes_max {
                break;
            }
        }
        Ok(found)
    }

    /// The database that the rows come from; `None` when nobody can say.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses.
    async fn database(&self) -> Result<Option<DatabaseIdentity>, SinkError> {
        Ok(None)
    }

    /// The columns that a table has in the stream now.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses.
    async fn columns(&self, table: &TableName) -> Result<SourceColumns, SinkError> {
        let _ = table;
        Ok(SourceColumns::default())
    }

    /// What a table has at the source beyond columns and primary key, for a sink that made it. Empty when the table is gone.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses.
    async fn extras(&self, table: &TableName) -> Result<TableExtras, SinkError> {
        let _ = table;
        Ok(TableExtras::default())
    }
}
