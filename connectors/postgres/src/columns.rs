//! What this sink knows of single columns: `wallaby.columns`.
//!
//! A column may be here before the log is where the source got it: chunks of a first load are read in the table's shape of that moment,
//! while the log of the same table is replayed from an earlier one, and the main stream may have added it before the table is emptied for
//! another load. Such a column is *early*: rows without it are no reason to stop, until the log has had it once. And a column that has a
//! default here may have it from a person, whose column it then is, or from us: of the second kind is one that the source drops or
//! renames.
//!
//! Written only in transactions that hold the task's checkpoint row or the table's mark, so it says what the table has.

use std::collections::HashSet;

use tokio_postgres::Client;
use wallaby_model::{TableName, TaskId};

use crate::error::{Doing, PostgresError};

/// What is known of the columns of a table.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Those that the log does not have yet.
    pub early: HashSet<String>,
    /// Those that this sink gave a default.
    pub filled: HashSet<String>,
}

/// What is known of a table's columns.
pub(crate) async fn read(client: &Client, task: &TaskId, table: &TableName) -> Result<Known, PostgresError> {
    let query = "SELECT name, early, filled FROM wallaby.columns \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3";
    let rows = client.query(query, &[&task.to_string(), &table.schema, &table.name]).await;
    let mut known = Known::default();
    for row in rows.doing(|| format!("reading what is known of the columns of {table}"))? {
        let name: String = row.get(0);
        if row.get(1) {
            known.early.insert(name.clone());
        }
        if row.get(2) {
            known.filled.insert(name);
        }
    }
    Ok(known)
}

/// These columns are here before the log has them.
pub(crate) async fn put_early(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "INSERT INTO wallaby.columns (task, source_schema, source_table, name, early) \
        SELECT $1, $2, $3, name, true FROM unnest($4::text[]) name \
        ON CONFLICT (task, source_schema, source_table, name) DO UPDATE SET early = true";
    let put = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    put.doing(|| format!("noting new columns of {table}"))?;
    Ok(())
}

/// These columns have a default that this sink gave them.
pub(crate) async fn put_filled(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "INSERT INTO wallaby.columns (task, source_schema, source_table, name, filled) \
        SELECT $1, $2, $3, name, true FROM unnest($4::text[]) name \
        ON CONFLICT (task, source_schema, source_table, name) DO UPDATE SET filled = true";
    let put = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    put.doing(|| format!("noting defaults of {table}"))?;
    Ok(())
}

/// The log has these columns now: where it has them no more, the source dropped them.
pub(crate) async fn met(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "UPDATE wallaby.columns SET early = false \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3 AND early AND name = ANY($4)";
    let met = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    met.doing(|| format!("noting columns of {table} that came"))?;
    Ok(())
}
