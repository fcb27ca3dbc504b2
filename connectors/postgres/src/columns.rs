//! What this sink knows of single columns: `wallaby.columns`.
//!
//! A column may be here before the log is where the source got it: chunks of a first load are read in the table's shape of that moment,
//! while the log of the same table is replayed from an earlier one, and the main stream may have added it before the table is emptied for
//! another load. Such a column is *early*: rows without it are no reason to stop, until the log has had it once, or is past the moment at
//! which the source was seen to have it. And a column that has a default here may have it from a person, whose column it then is, or be
//! one that the stream has: of the second kind is one that the source drops or renames (*known*). A default that is only what older rows
//! have in it (*constant*) makes room for the source's own.
//!
//! Written only in transactions that hold the task's checkpoint row or the table's mark, so it says what the table has.

use std::collections::HashSet;

use tokio_postgres::Client;
use wallaby_model::{Lsn, Position, TableName, TaskId};

use crate::error::{Doing, PostgresError};

/// What is known of the columns of a table.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Those that rows of the log before a place in the WAL need not have.
    early: Vec<(String, Lsn)>,
    /// Those that fill themselves here and are the source's all the same.
    pub known: HashSet<String>,
    /// Those whose default is what older rows have in them.
    pub constant: HashSet<String>,
}

impl Known {
    /// Those that a row at this position need not have.
    pub(crate) fn early(self, at: Position) -> impl Iterator<Item = String> {
        self.early.into_iter().filter(move |(_, until)| at.commit <= *until).map(|(name, _)| name)
    }
}

/// What is known of a table's columns.
pub(crate) async fn read(client: &Client, task: &TaskId, table: &TableName) -> Result<Known, PostgresError> {
    let query = "SELECT name, early, known, constant FROM wallaby.columns \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3";
    let rows = client.query(query, &[&task.to_string(), &table.schema, &table.name]).await;
    let mut known = Known::default();
    for row in rows.doing(|| format!("reading what is known of the columns of {table}"))? {
        let name: String = row.get(0);
        if let Some(until) = row.get::<_, Option<&str>>(1).and_then(|until| until.parse().ok()) {
            known.early.push((name.clone(), until));
        }
        if row.get(2) {
            known.known.insert(name.clone());
        }
        if row.get(3) {
            known.constant.insert(name);
        }
    }
    Ok(known)
}

/// These columns are here before the log, which need not have them up to here.
pub(crate) async fn put_early(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
    until: Lsn,
) -> Result<(), PostgresError> {
    let statement = "INSERT INTO wallaby.columns (task, source_schema, source_table, name, early) \
        SELECT $1, $2, $3, name, $5 FROM unnest($4::text[]) name \
        ON CONFLICT (task, source_schema, source_table, name) DO UPDATE SET early = $5";
    let (task, until) = (task.to_string(), until.to_string());
    let put = client.execute(statement, &[&task, &table.schema, &table.name, &names, &until]).await;
    put.doing(|| format!("noting new columns of {table}"))?;
    Ok(())
}

/// These columns fill themselves, and are the source's.
pub(crate) async fn put_known(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "INSERT INTO wallaby.columns AS c (task, source_schema, source_table, name, known) \
        SELECT $1, $2, $3, name, true FROM unnest($4::text[]) name \
        ON CONFLICT (task, source_schema, source_table, name) DO UPDATE SET known = true WHERE NOT c.known";
    let put = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    put.doing(|| format!("noting columns of {table}"))?;
    Ok(())
}

/// Whether the default of these columns is what older rows have in them, and nothing else.
pub(crate) async fn put_constant(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
    is_constant: bool,
) -> Result<(), PostgresError> {
    let statement = "INSERT INTO wallaby.columns (task, source_schema, source_table, name, known, constant) \
        SELECT $1, $2, $3, name, true, $5 FROM unnest($4::text[]) name \
        ON CONFLICT (task, source_schema, source_table, name) DO UPDATE SET known = true, constant = $5";
    let put = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names, &is_constant]).await;
    put.doing(|| format!("noting defaults of {table}"))?;
    Ok(())
}

/// What is known of columns that are not among these is of no use any more, but for those that are awaited: they are gone, and one of the same
/// name that comes later is another one.
pub(crate) async fn forget_others(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "DELETE FROM wallaby.columns \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3 AND early IS NULL AND name <> ALL($4)";
    let forgotten = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    forgotten.doing(|| format!("forgetting columns of {table}"))?;
    Ok(())
}

/// The log has these columns now: where it has them no more, the source dropped them.
pub(crate) async fn met(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    names: &[&str],
) -> Result<(), PostgresError> {
    let statement = "UPDATE wallaby.columns SET early = NULL \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3 AND early IS NOT NULL AND name = ANY($4)";
    let met = client.execute(statement, &[&task.to_string(), &table.schema, &table.name, &names]).await;
    met.doing(|| format!("noting columns of {table} that came"))?;
    Ok(())
}
