//! What a sink may ask of the source while it applies: a row by its key, when a partial change met no row.

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_model::{SegmentBody, TableName, TableSchema};

use crate::{SinkError, TableExtras};

/// The values of a key, in the order of `TableSchema::key`, as Postgres' text form. `None` is NULL.
pub type KeyValues = Vec<Option<String>>;

/// A row as the source has it now: one body with one `Op::Insert` row, in the source's current shape; `None` when the
/// row is gone.
pub type SourceRow = Option<SegmentBody>;

/// Reads single rows of the source over a connection that is opened on demand.
#[async_trait]
pub trait SourceLookup: Send + Sync {
    /// Reads the row of `table` whose key columns (`TableSchema::key`) have these values.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses; transient ones may be tried again.
    async fn row_by_key(&self, table: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError>;

    /// What a table has at the source beyond columns and primary key, for a sink that made it. Empty when the table is gone.
    ///
    /// # Errors
    /// When the source cannot be reached or refuses.
    async fn extras(&self, table: &TableName) -> Result<TableExtras, SinkError> {
        let _ = table;
        Ok(TableExtras::default())
    }
}
