//! The checkpoint at the sink: one row per task, moved in the transaction of each batch.
//!
//! `epoch` says who may write, `position` where the sink stands. A batch moves the row `WHERE epoch = mine AND position =
//! expected`, first thing in its transaction: an owner that was replaced changes nothing, a batch that was applied before
//! is refused, and one that waits on this row holds no other lock. The lock on the row is what a successor meets when a
//! predecessor is frozen inside a transaction; it ends that session.
//!
//! The row is locked in three strengths. Taking over locks it FOR UPDATE: it waits for everybody, and everybody waits for it. What
//! moves the position, or changes a mark, locks it FOR NO KEY UPDATE (as the UPDATE of a batch does by itself): one at a time. A replay
//! needs nothing but that the epoch stays, and locks it FOR KEY SHARE: it and the main stream never wait for each other here, however
//! long the transaction of either takes.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use wallaby_connector_api::{DatabaseIdentity, Opened, SinkError, SinkTask};
use wallaby_model::schema::quote_identifier;
use wallaby_model::{Epoch, Position, TaskId};

use crate::error::{Doing, PostgresError};
use crate::marks;

/// How long the epoch's commit waits for a predecessor's lock before its sessions are ended again.
const LOCK_TIMEOUT: &str = "2s";
/// How often that is tried before the task backs off.
const TAKEOVER_TRIES: u32 = 5;
/// How often making the table is tried against another task that makes it at the same time.
const CREATE_TRIES: u32 = 5;

const CREATE: &str = "\
    CREATE SCHEMA IF NOT EXISTS wallaby;
    CREATE TABLE IF NOT EXISTS wallaby.checkpoints (
        task text COLLATE \"C\" PRIMARY KEY,
        epoch bigint NOT NULL,
        position text COLLATE \"C\",
        log_epoch bigint,
        updated_at timestamptz NOT NULL DEFAULT now()
    ) WITH (fillfactor = 50);
    COMMENT ON TABLE wallaby.checkpoints IS 'Where each WALlaby apply task stands; moved in the transaction of each batch';
    CREATE TABLE IF NOT EXISTS wallaby.tables (
        task text COLLATE \"C\",
        source_schema text COLLATE \"C\",
        source_table text COLLATE \"C\",
        run bigint NOT NULL,
        restart bigint NOT NULL,
        stage text COLLATE \"C\" NOT NULL,
        position text COLLATE \"C\",
        made_here boolean NOT NULL,
        owed text[] NOT NULL DEFAULT '{}',
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (task, source_schema, source_table)
    ) WITH (fillfactor = 50);
    COMMENT ON TABLE wallaby.tables IS 'What becomes of each table in the first load of a WALlaby apply task';
    CREATE TABLE IF NOT EXISTS wallaby.chunks (
        task text COLLATE \"C\",
        run bigint,
        chunk text COLLATE \"C\",
        source_schema text COLLATE \"C\" NOT NULL,
        source_table text COLLATE \"C\" NOT NULL,
        rows bigint NOT NULL DEFAULT 0,
        loaded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (task, run, chunk)
    );
    COMMENT ON TABLE wallaby.chunks IS 'The chunks that a WALlaby apply task has loaded; written in the transaction of each';
    CREATE TABLE IF NOT EXISTS wallaby.columns (
        task text COLLATE \"C\",
        source_schema text COLLATE \"C\",
        source_table text COLLATE \"C\",
        name text COLLATE \"C\",
        early text COLLATE \"C\",
        known boolean NOT NULL DEFAULT false,
        constant boolean NOT NULL DEFAULT false,
        PRIMARY KEY (task, source_schema, source_table, name)
    );
    COMMENT ON TABLE wallaby.columns IS
        'Columns that a WALlaby apply task has here before its log, up to a place in the WAL (early); that have a default here and are the \
source''s (known); whose default is what older rows have in them (constant)'";

/// The guarded move. Parameters: task, epoch, expected position, new position, log epoch.
pub(crate) const ADVANCE: &str = "\
    UPDATE wallaby.checkpoints SET position = $4, log_epoch = $5, updated_at = now() \
    WHERE task = $1 AND epoch = $2 AND position = $3";

/// Epoch and position stay for the rest of the transaction. Parameters: task, epoch.
pub(crate) const LOCK: &str = "SELECT FROM wallaby.checkpoints WHERE task = $1 AND epoch = $2 FOR NO KEY UPDATE";

/// The same, only where it stands at a position. Parameters: task, epoch, position.
pub(crate) const LOCK_AT: &str =
    "SELECT FROM wallaby.checkpoints WHERE task = $1 AND epoch = $2 AND position = $3 FOR NO KEY UPDATE";

/// The epoch stays for the rest of the transaction, the position may move. Parameters: task, epoch.
pub(crate) const LOCK_EPOCH: &str = "SELECT FROM wallaby.checkpoints WHERE task = $1 AND epoch = $2 FOR KEY SHARE";

/// A number in the form of Postgres' bigint. Epochs are etcd revisions, which are signed there too.
pub(crate) fn as_bigint(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).unwrap_or(i64::MAX)
}

fn as_epoch(number: i64) -> Epoch {
    Epoch(u64::try_from(number).unwrap_or(0))
}

/// Whether a table of ours is there.
pub(crate) async fn exists(client: &Client, table: &str) -> Result<bool, PostgresError> {
    let row = client.query_one("SELECT to_regclass($1) IS NOT NULL", &[&table]).await;
    Ok(row.doing(|| format!("looking for {table}"))?.get(0))
}

/// Makes the tables when they are missing. Looks first: IF NOT EXISTS asks for the right to create even when there is
/// nothing to create.
async fn create(client: &Client) -> Result<(), PostgresError> {
    for attempt in 1.. {
        // The last one that is made: an older installation may have the first ones alone.
        if exists(client, "wallaby.columns").await? {
            return Ok(());
        }
        match client.batch_execute(CREATE).await {
            Ok(()) => return Ok(()),
            // Two tasks that make it at once: IF NOT EXISTS does not protect against that.
            Err(error)
                if attempt < CREATE_TRIES
                    && [
                        Some(&SqlState::UNIQUE_VIOLATION),
                        Some(&SqlState::DUPLICATE_TABLE),
                        Some(&SqlState::DUPLICATE_SCHEMA),
                    ]
                    .contains(&error.code()) => {}
            Err(source) => {
                return Err(PostgresError::Sql {
                    doing: "making wallaby.checkpoints and its neighbours".to_owned(),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Refuses the source's own database: its tables would be emptied for a first load, and what is written here captured again, without end.
/// A task that has a position here was let in before.
pub(crate) async fn is_not_the_source(client: &Client, task: &SinkTask) -> Result<(), PostgresError> {
    if exists(client, "wallaby.checkpoints").await? {
        let query = "SELECT FROM wallaby.checkpoints WHERE task = $1 AND position IS NOT NULL";
        let row =
            client.query_opt(query, &[&task.task.to_string()]).await.doing(|| "reading the checkpoint".to_owned())?;
        if row.is_some() {
            return Ok(());
        }
    }
    let row =
        client.query_one(DatabaseIdentity::SQL, &[]).await.doing(|| "asking which database this is".to_owned())?;
    let here = DatabaseIdentity { started_at_micros: row.get(0), oid: row.get(1) };
    // Whatever is wrong with the source is mended there, and not by resuming the sink.
    let unknown = |error| SinkError::Transient(format!("a sink must be another database than its source: {error}"));
    if task.lookup.database().await.map_err(unknown)? != Some(here) {
        return Ok(());
    }
    Err(PostgresError::Sink(SinkError::Configuration {
        reason: format!(
            "the sink's database {} is the source's own: its tables would be emptied for a first load, and what is written to \
             them captured again",
            quote_identifier(row.get(2))
        ),
        remedy: "Give the sink another database in its `postgres.dsn`, or schemas of their own in its `postgres.schema`, and apply the flow again"
            .to_owned(),
    }))
}

/// The highest epoch of the task; `None` without a checkpoint.
pub(crate) async fn last_epoch(client: &Client, task: &TaskId) -> Result<Option<Epoch>, PostgresError> {
    if !exists(client, "wallaby.checkpoints").await? {
        return Ok(None);
    }
    let query = "SELECT epoch FROM wallaby.checkpoints WHERE task = $1";
    let row = client.query_opt(query, &[&task.to_string()]).await.doing(|| "reading the checkpoint".to_owned())?;
    Ok(row.map(|row| as_epoch(row.get(0))))
}

/// Takes the task over at the sink, as protocol.md says in "Opening a sink that has transactions".
pub(crate) async fn take_over(
    client: &Client,
    sink: &SinkTask,
    epoch: Epoch,
    end_sessions: bool,
) -> Result<Opened, PostgresError> {
    let task = &sink.task;
    create(client).await?;
    // One that works beside another session of its own owner has nothing to take over: it does not wait for the transaction of that
    // one, which may be a large one.
    let is_beside = !end_sessions && epoch >= sink.since && last_epoch(client, task).await? == Some(epoch);
    let mut ended = Ended::default();
    if !is_beside {
        move_epoch(client, sink, epoch, end_sessions.then_some(&mut ended)).await?;
    }
    // A predecessor may have connected between the first look and the commit of the epoch.
    if end_sessions {
        end_older_sessions(client, task, epoch, &mut ended).await?;
    }
    let sessions_ended = u32::try_from(ended.len()).unwrap_or(u32::MAX);
    let found = read(client, task).await?;
    match found {
        Some((found, position, log_epoch)) if found == epoch => Ok(Opened { position, log_epoch, sessions_ended }),
        _ => Err(fenced(task, epoch, found.map(|(found, ..)| found)).into()),
    }
}

/// Sessions of older owners that were ended: pid and when the backend started. One that takes its time to end is met again.
type Ended = HashSet<(i32, SystemTime)>;

/// Makes the task this epoch's, and ends sessions of older owners for it unless `ended` is none.
async fn move_epoch(
    client: &Client,
    sink: &SinkTask,
    epoch: Epoch,
    mut ended: Option<&mut Ended>,
) -> Result<(), PostgresError> {
    let mut tries = 0;
    loop {
        tries += 1;
        if let Some(ended) = ended.as_deref_mut() {
            end_older_sessions(client, &sink.task, epoch, ended).await?;
        }
        match commit_epoch(client, &sink.task, sink.since, epoch).await {
            Err(error) if error.sqlstate() == Some(&SqlState::LOCK_NOT_AVAILABLE) && tries < TAKEOVER_TRIES => {}
            outcome => return outcome,
        }
    }
}

async fn commit_epoch(client: &Client, task: &TaskId, since: Epoch, epoch: Epoch) -> Result<(), PostgresError> {
    let doing = || format!("taking over {task} at the sink");
    client.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")).await.doing(doing)?;
    let (name, mine) = (task.to_string(), as_bigint(epoch));
    let moved = async {
        // A row to lock comes first: without one, a predecessor could make it, and begin to replay, before the epoch is moved.
        let make = "INSERT INTO wallaby.checkpoints (task, epoch) VALUES ($1, $2) ON CONFLICT (task) DO NOTHING";
        client.execute(make, &[&name, &mine]).await?;
        // The lock that a replay's is in the way of: moving the epoch alone would not wait for it. What is read here stands until the
        // commit.
        let found = "SELECT epoch FROM wallaby.checkpoints WHERE task = $1 FOR UPDATE";
        let found = client.query_opt(found, &[&name]).await?.map(|row| as_epoch(row.get(0)));
        let take = "UPDATE wallaby.checkpoints SET epoch = $2, updated_at = now() WHERE task = $1 AND epoch <= $2";
        let moved = client.execute(take, &[&name, &mine]).await?;
        Ok::<_, tokio_postgres::Error>((moved, found.is_some_and(|found| found < since)))
    };
    match moved.await {
        Ok((1, true)) => {
            tracing::info!(%task, "what an earlier flow of this name left at the sink is forgotten; its tables stay");
            marks::start_anew(client, task).await?;
            client.batch_execute("COMMIT").await.doing(doing)
        }
        Ok((1, false)) => client.batch_execute("COMMIT").await.doing(doing),
        Ok(_) => {
            client.batch_execute("ROLLBACK").await.doing(doing)?;
            let found = last_epoch(client, task).await?;
            Err(fenced(task, epoch, found).into())
        }
        Err(source) => {
            if !source.is_closed() {
                client.batch_execute("ROLLBACK").await.doing(doing)?;
            }
            Err(PostgresError::Sql { doing: doing(), source })
        }
    }
}

/// Ends sessions of this task whose epoch is not above ours, ourselves apart: of older owners, and of a connection of
/// our own that was cut and whose backend does not know it yet. Only in this database: a task of the same name in
/// another one is another installation's. Those of older owners are put into `ended`.
async fn end_older_sessions(
    client: &Client,
    task: &TaskId,
    epoch: Epoch,
    ended: &mut Ended,
) -> Result<(), PostgresError> {
    let doing = || "ending sessions of older owners at the sink".to_owned();
    let prefix = task.session_prefix();
    let query = "SELECT pid, backend_start, application_name FROM pg_stat_activity \
        WHERE starts_with(application_name, $1) AND datname = current_database() AND pid <> pg_backend_pid()";
    let sessions = client.query(query, &[&prefix]).await.doing(doing)?;
    for session in sessions {
        let name: &str = session.get(2);
        let Some(theirs) = name.strip_prefix(&prefix).and_then(|text| text.parse::<u64>().ok()) else { continue };
        if theirs > epoch.0 {
            continue;
        }
        // The pid may be another's by now: the start of the backend and its name say that it is not.
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
            WHERE pid = $1 AND backend_start = $2 AND application_name = $3";
        let pid: i32 = session.get(0);
        let start: SystemTime = session.get(1);
        let gone = client.query_opt(end, &[&pid, &start, &name]).await.doing(doing)?;
        let was_ended = gone.is_some_and(|row| row.get(0));
        if was_ended && theirs < epoch.0 && ended.insert((pid, start)) {
            tracing::warn!(%task, pid, epoch = theirs, "ended the session of an older owner at the sink");
        }
    }
    Ok(())
}

type Checkpoint = (Epoch, Option<Position>, Option<Epoch>);

async fn read(client: &Client, task: &TaskId) -> Result<Option<Checkpoint>, PostgresError> {
    let query = "SELECT epoch, position, log_epoch FROM wallaby.checkpoints WHERE task = $1";
    let row = client.query_opt(query, &[&task.to_string()]).await.doing(|| "reading the checkpoint".to_owned())?;
    let Some(row) = row else { return Ok(None) };
    let position = match row.get::<_, Option<&str>>(1) {
        None => None,
        Some(text) => Some(text.parse::<Position>().map_err(|error| SinkError::Configuration {
            reason: format!("wallaby.checkpoints at the sink was changed by hand: {error}"),
            remedy: format!("Restore the row of {task}, or delete it and load the sink afresh"),
        })?),
    };
    Ok(Some((as_epoch(row.get(0)), position, row.get::<_, Option<i64>>(2).map(as_epoch))))
}

/// Where a task stands.
pub(crate) async fn position(client: &Client, task: &TaskId) -> Result<Option<Position>, PostgresError> {
    Ok(read(client, task).await?.and_then(|(_, position, _)| position))
}

/// Sets the position of a task that has none.
pub(crate) async fn start_at(
    client: &Client,
    task: &TaskId,
    epoch: Epoch,
    position: Position,
    log_epoch: Epoch,
) -> Result<(), PostgresError> {
    let statement = "UPDATE wallaby.checkpoints SET position = coalesce(position, $3), \
        log_epoch = CASE WHEN position IS NULL THEN $4 ELSE log_epoch END, updated_at = now() \
        WHERE task = $1 AND epoch = $2";
    let parameters = (task.to_string(), as_bigint(epoch), position.to_string(), as_bigint(log_epoch));
    let (task_text, mine, position, log_epoch) = &parameters;
    let moved = client.execute(statement, &[task_text, mine, position, log_epoch]).await;
    if moved.doing(|| "setting the first position at the sink".to_owned())? == 1 {
        return Ok(());
    }
    let found = last_epoch(client, task).await?;
    Err(fenced(task, epoch, found).into())
}

/// Why the guarded move found no row: another owner, or another position.
pub(crate) async fn why_refused(
    client: &Client,
    task: &TaskId,
    epoch: Epoch,
    expected: Position,
) -> Result<SinkError, PostgresError> {
    Ok(match read(client, task).await? {
        Some((found, position, _)) if found == epoch => match position {
            Some(found) => SinkError::Position { expected, found },
            None => SinkError::Transient(format!("{task} has no position at the sink yet")),
        },
        found => fenced(task, epoch, found.map(|(found, ..)| found)),
    })
}

/// Why the row of our epoch was not found.
pub(crate) async fn refused_epoch(client: &Client, task: &TaskId, epoch: Epoch) -> Result<SinkError, PostgresError> {
    Ok(fenced(task, epoch, last_epoch(client, task).await?))
}

fn fenced(task: &TaskId, mine: Epoch, found: Option<Epoch>) -> SinkError {
    match found {
        Some(found) => SinkError::Fenced(format!("{task} belongs to {found:?} at the sink, this is {mine:?}")),
        None => SinkError::Fenced(format!("the checkpoint of {task} at the sink is gone, this is {mine:?}")),
    }
}

/// A batch may wait for its source lookups, but a frozen owner should not hold its locks for ever even when no
/// successor comes.
pub(crate) const IDLE_IN_TRANSACTION_MAX: Duration = Duration::from_secs(120);
