//! The marks of tables, and the notes of loaded chunks, at the sink: `wallaby.tables` and `wallaby.chunks`.
//!
//! A mark says what the first load makes of a table. It is changed only under a lock on the task's checkpoint row, which its
//! owner alone gets; a replay, which works beside its owner's main stream, holds the marks of its tables for as long as each of its
//! transactions takes. Chunks are loaded by anybody, under a shared lock on the mark. So a load commits before its table is emptied
//! or handed over, or not at all. Locks are always taken in this order: checkpoint row, marks (by name), the table itself.

use tokio_postgres::{Client, Row};
use wallaby_connector_api::{SinkError, TableMark};
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, Position, RunId, TableName, TaskId};

use crate::error::{Doing, PostgresError};

/// The stage of a table that the sink made in an earlier load that was forgotten as a whole.
const ABSENT: &str = "absent";

/// A stage as it is kept.
pub(crate) fn stage_text(stage: TableStage) -> &'static str {
    match stage {
        TableStage::Copying => "copying",
        TableStage::CatchingUp => "catching up",
        TableStage::Ready => "ready",
        TableStage::Gone => "gone",
    }
}

fn stage_of(text: &str) -> Option<TableStage> {
    [TableStage::Copying, TableStage::CatchingUp, TableStage::Ready, TableStage::Gone]
        .into_iter()
        .find(|&stage| stage_text(stage) == text)
}

/// A mark and what the contract does not show of it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// The mark; its stage is none when the table is only known to be of our making.
    pub stage: Option<TableStage>,
    pub run: RunId,
    pub restart: u32,
    pub position: Option<Position>,
    /// The table was made by this sink.
    pub made_here: bool,
}

const COLUMNS: &str = "source_schema, source_table, run, restart, stage, position, made_here";

fn kept(row: &Row) -> Result<(TableName, Kept), PostgresError> {
    let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
    let by_hand = |what: String| SinkError::Configuration {
        reason: format!("the row of {table} in wallaby.tables at the sink was changed by hand: {what}"),
        remedy: "Restore it, or delete it and load the table anew".to_owned(),
    };
    let number = |n: i64| u32::try_from(n).map_err(|_| by_hand(format!("{n} is out of range")));
    let text: String = row.get(4);
    let stage = match stage_of(&text) {
        None if text == ABSENT => None,
        None => return Err(by_hand(format!("{text:?} is not a stage")).into()),
        stage => stage,
    };
    let position = match row.get::<_, Option<&str>>(5) {
        None => None,
        Some(text) => Some(text.parse::<Position>().map_err(|error| by_hand(error.to_string()))?),
    };
    let (run, restart) = (RunId(number(row.get(2))?), number(row.get(3))?);
    let kept = Kept { stage, run, restart, position, made_here: row.get(6) };
    Ok((table, kept))
}

/// The marks of a task.
pub(crate) async fn read_all(client: &Client, task: &TaskId) -> Result<Vec<TableMark>, PostgresError> {
    let query = format!("SELECT {COLUMNS} FROM wallaby.tables WHERE task = $1 ORDER BY source_schema, source_table");
    let rows = client.query(&query, &[&task.to_string()]).await.doing(|| "reading the marks of tables".to_owned())?;
    let mut marks = Vec::with_capacity(rows.len());
    for row in &rows {
        let (table, Kept { stage, run, restart, position, .. }) = kept(row)?;
        if let Some(stage) = stage {
            marks.push(TableMark { table, run, restart, stage, position });
        }
    }
    Ok(marks)
}

/// How a mark is locked for the rest of the transaction.
#[derive(Clone, Copy)]
pub(crate) enum Locking {
    /// Not at all.
    None,
    /// By a load: others may load as well.
    Share,
    /// To change it.
    Update,
}

/// The mark of one table.
pub(crate) async fn read(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    locking: Locking,
) -> Result<Option<Kept>, PostgresError> {
    let lock = match locking {
        Locking::None => "",
        Locking::Share => " FOR SHARE",
        Locking::Update => " FOR UPDATE",
    };
    let query = format!(
        "SELECT {COLUMNS} FROM wallaby.tables WHERE task = $1 AND source_schema = $2 AND source_table = $3{lock}"
    );
    let row = client.query_opt(&query, &[&task.to_string(), &table.schema, &table.name]).await;
    let row = row.doing(|| format!("reading the mark of {table}"))?;
    Ok(row.as_ref().map(kept).transpose()?.map(|(_, kept)| kept))
}

/// Marks a table as copying in a run and restart. `owed` are statements that `finish` is to run.
pub(crate) async fn put_copying(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    (run, restart): (RunId, u32),
    made_here: bool,
    owed: &[String],
) -> Result<(), PostgresError> {
    let doing = || format!("marking {table} as copying");
    let statement = "INSERT INTO wallaby.tables (task, source_schema, source_table, run, restart, stage, made_here, \
        owed) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (task, source_schema, source_table) DO UPDATE SET run = $4, \
        restart = $5, stage = $6, position = NULL, made_here = $7, owed = wallaby.tables.owed || $8, updated_at = now()";
    let stage = stage_text(TableStage::Copying);
    let (task, run, restart) = (task.to_string(), i64::from(run.0), i64::from(restart));
    client
        .execute(statement, &[&task, &table.schema, &table.name, &run, &restart, &stage, &made_here, &owed])
        .await
        .doing(doing)?;
    // What was loaded of it is gone.
    let forget = "DELETE FROM wallaby.chunks WHERE task = $1 AND source_schema = $2 AND source_table = $3";
    client.execute(forget, &[&task, &table.schema, &table.name]).await.doing(doing)?;
    Ok(())
}

/// Sets stage and position of a table's mark.
pub(crate) async fn put_stage(
    client: &Client,
    task: &TaskId,
    table: &TableName,
    stage: TableStage,
    position: Position,
) -> Result<(), PostgresError> {
    let statement = "UPDATE wallaby.tables SET stage = $4, position = $5, updated_at = now() \
        WHERE task = $1 AND source_schema = $2 AND source_table = $3";
    let (task, stage, position) = (task.to_string(), stage_text(stage), position.to_string());
    let put = client.execute(statement, &[&task, &table.schema, &table.name, &stage, &position]).await;
    put.doing(|| format!("marking {table} as {stage}"))?;
    Ok(())
}

/// Moves the marks of tables that catch up, all of which must stand at `from`.
pub(crate) async fn advance(
    client: &Client,
    task: &TaskId,
    tables: &[TableName],
    from: Position,
    to: Position,
) -> Result<(), PostgresError> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let statement = "UPDATE wallaby.tables SET position = $5, updated_at = now() WHERE task = $1 AND stage = $6 \
        AND position = $4 AND (source_schema, source_table) IN (SELECT * FROM unnest($2::text[], $3::text[]))";
    let stage = stage_text(TableStage::CatchingUp);
    let (before, after) = (from.to_string(), to.to_string());
    let moved = client.execute(statement, &[&task.to_string(), &schemas, &names, &before, &after, &stage]).await;
    if moved.doing(|| "moving the marks of tables".to_owned())? == tables.len() as u64 {
        return Ok(());
    }
    // Some may have been moved by this very statement.
    client.batch_execute("ROLLBACK").await.doing(|| "rolling back at the sink".to_owned())?;
    for table in tables {
        standing(read(client, task, table, Locking::None).await?, table, from)?;
    }
    Err(SinkError::Transient("tables that are to catch up were named twice".to_owned()).into())
}

/// Whether a table catches up and stands at `from`.
fn standing(kept: Option<Kept>, table: &TableName, from: Position) -> Result<(), SinkError> {
    let stands = kept.and_then(|kept| match kept.stage {
        Some(TableStage::CatchingUp) => kept.position,
        _ => None,
    });
    match stands {
        Some(position) if position == from => Ok(()),
        Some(found) => Err(SinkError::Position { expected: from, found }),
        None => Err(SinkError::Transient(format!("{table} does not catch up at the sink (any more)"))),
    }
}

/// The chunks of a run by their notes.
pub(crate) async fn loaded(client: &Client, task: &TaskId, run: RunId) -> Result<Vec<ChunkId>, PostgresError> {
    let query = "SELECT chunk FROM wallaby.chunks WHERE task = $1 AND run = $2";
    let rows = client.query(query, &[&task.to_string(), &i64::from(run.0)]).await;
    let rows = rows.doing(|| "reading which chunks are loaded".to_owned())?;
    let chunk = |row: &Row| {
        row.get::<_, &str>(0).parse::<ChunkId>().map_err(|error| {
            SinkError::Configuration {
                reason: format!("wallaby.chunks at the sink was changed by hand: {error}"),
                remedy: "Delete the row and load the table anew".to_owned(),
            }
            .into()
        })
    };
    rows.iter().map(chunk).collect()
}

/// Notes a chunk; false when it is noted already. Waits for another load of it that is under way.
pub(crate) async fn note(
    client: &Client,
    task: &TaskId,
    run: RunId,
    chunk: ChunkId,
    table: &TableName,
) -> Result<bool, PostgresError> {
    let statement = "INSERT INTO wallaby.chunks (task, run, chunk, source_schema, source_table) VALUES ($1, $2, $3, $4, $5) \
        ON CONFLICT (task, run, chunk) DO NOTHING";
    let (task, run, chunk) = (task.to_string(), i64::from(run.0), chunk.to_string());
    let noted = client.execute(statement, &[&task, &run, &chunk, &table.schema, &table.name]).await;
    Ok(noted.doing(|| format!("noting a chunk of {table}"))? == 1)
}

/// Whether a chunk is noted.
pub(crate) async fn is_noted(
    client: &Client,
    task: &TaskId,
    run: RunId,
    chunk: ChunkId,
) -> Result<bool, PostgresError> {
    let query = "SELECT FROM wallaby.chunks WHERE task = $1 AND run = $2 AND chunk = $3";
    let found = client.query_opt(query, &[&task.to_string(), &i64::from(run.0), &chunk.to_string()]).await;
    Ok(found.doing(|| "looking for the note of a chunk".to_owned())?.is_some())
}

/// Completes a note by the number of rows, which is known at the end.
pub(crate) async fn note_rows(
    client: &Client,
    task: &TaskId,
    run: RunId,
    chunk: ChunkId,
    rows: u64,
) -> Result<(), PostgresError> {
    let statement = "UPDATE wallaby.chunks SET rows = $4 WHERE task = $1 AND run = $2 AND chunk = $3";
    let (task, run, chunk) = (task.to_string(), i64::from(run.0), chunk.to_string());
    let noted = client.execute(statement, &[&task, &run, &chunk, &i64::try_from(rows).unwrap_or(i64::MAX)]).await;
    noted.doing(|| "completing the note of a chunk".to_owned())?;
    Ok(())
}

/// Forgets the notes of a run.
pub(crate) async fn forget(client: &Client, task: &TaskId, run: RunId) -> Result<(), PostgresError> {
    let statement = "DELETE FROM wallaby.chunks WHERE task = $1 AND run = $2";
    let gone = client.execute(statement, &[&task.to_string(), &i64::from(run.0)]).await;
    gone.doing(|| format!("forgetting the chunks of {run:?}"))?;
    Ok(())
}

/// Forgets position, marks and notes of a task; not which tables it made.
pub(crate) async fn start_anew(client: &Client, task: &TaskId) -> Result<(), PostgresError> {
    let task = task.to_string();
    let doing = || "forgetting what was loaded".to_owned();
    for statement in [
        "UPDATE wallaby.checkpoints SET position = NULL, log_epoch = NULL, updated_at = now() WHERE task = $1",
        "UPDATE wallaby.tables SET stage = 'absent', position = NULL, run = 0, restart = 0, updated_at = now() \
         WHERE task = $1",
        "DELETE FROM wallaby.chunks WHERE task = $1",
        "UPDATE wallaby.columns SET early = NULL WHERE task = $1 AND early IS NOT NULL",
    ] {
        client.execute(statement, &[&task]).await.doing(doing)?;
    }
    Ok(())
}
