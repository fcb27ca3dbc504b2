//! Loads chunks of a first load: any number of loaders, of any workers, at a time.
//!
//! A loader is not fenced by an epoch. Its transaction takes a shared lock on the table's mark and goes on only while the table is
//! being copied in the chunk's run and restart; then it writes the note of the chunk, which a second load of the same chunk waits
//! for; then the rows. So a load that commits has been the first, and of use.
//!
//! Nobody waits for long for a loader that is of no use any more: one that freezes between two statements loses its transaction after
//! [`IDLE_MAX`]; one that vanished in the middle of a COPY is noticed by the server's keepalives; and whoever is given the same chunk
//! ends the session of the one before it after [`NOTE_WAITS`], be it frozen or only slow: its worker has lost the load's lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::{Either, select};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use wallaby_connector_api::{ChunkLoad, ChunkLoader, ChunkParts, Loaded, SinkError, SinkTask};
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, Op, Position, SegmentBody, TableChanges, TableName, TableSchema, TaskId, TaskKind};

use crate::catalog::{Fitting, Of};
use crate::checkpoint;
use crate::collapse::Chunk;
use crate::config::PostgresSinkConfig;
use crate::error::{Doing, PostgresError};
use crate::marks::{self, Locking};
use crate::metrics::{CHUNK_SECONDS, CHUNKS, LOADED_ROWS};
use crate::schema::Target;
use crate::session::{Session, connect_as};
use crate::write::{Targets, Writer};

/// A session that does nothing inside of a transaction for longer than this is ended by the server. A loader that waits for parts
/// says every few seconds that it lives.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// How long the note of a chunk waits for an older load of the chunk before that is ended.
const NOTE_WAITS: &str = "5s";
/// How often that is tried before the load backs off.
const NOTE_TRIES: u32 = 3;
/// How much is copied at once: parts are gathered up to about this much memory.
const GROUP_BYTES: usize = 4 << 20;
/// A group with more, which has huge rows, is written before the next one is fetched.
const OVERLAP_BYTES_MAX: usize = 2 * GROUP_BYTES;

/// A loader; connects when it is first needed.
pub(crate) struct PostgresLoader {
    config: PostgresSinkConfig,
    /// The apply task whose marks and notes these are.
    task: TaskId,
    lookup: SinkTask,
    name: String,
    session: Option<Session>,
}

/// Parts that are written together; empty after the last.
type Group = Vec<Arc<SegmentBody>>;

impl PostgresLoader {
    /// A loader for the sink of an apply task, or of one of its load tasks.
    pub(crate) fn new(config: PostgresSinkConfig, task: SinkTask) -> PostgresLoader {
        let apply = match &task.task.kind {
            TaskKind::Load(sink, ..) => TaskId::apply(&task.task.flow, sink),
            _ => task.task.clone(),
        };
        PostgresLoader { config, name: apply.to_string(), task: apply, lookup: task, session: None }
    }

    /// Not a session of the apply task: its owners end each other's, and loads go on beside them.
    fn session_name(&self) -> String {
        self.task.session_prefix().replacen("wallaby/", "wallaby-load/", 1)
    }

    /// The session's name while it loads a chunk: one of its own for each within the 63 bytes that a name has.
    fn chunk_name(&self, load: &ChunkLoad) -> String {
        let ChunkId { table, restart, number } = load.chunk;
        format!("{}{:08x}{table:08x}{restart:08x}{number:08x}", self.session_name(), load.run.0)
    }

    async fn run(&mut self, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, PostgresError> {
        let mut session = match self.session.take() {
            Some(session) if !session.client.is_closed() => session,
            _ => connect_as(&self.config, &self.session_name(), IDLE_MAX).await?,
        };
        // Before the sink was opened for the first time nothing is being copied.
        if !checkpoint::exists(&session.client, "wallaby.columns").await? {
            self.session = Some(session);
            return Ok(Loaded::Stale);
        }
        // Only inside of its transaction does the session go by the chunk's name: that ends it to no other one's harm.
        session.command(&format!("BEGIN; SET LOCAL application_name = '{}'", self.chunk_name(chunk))).await?;
        let loaded = match self.admit(&session, chunk).await? {
            Some(refused) => {
                session.command("ROLLBACK").await?;
                refused
            }
            None => {
                let rows = match self.copy(&mut session, chunk, parts).await {
                    Ok(rows) => rows,
                    Err(error) => {
                        // The locks go now and not when the server notices that we are gone; the first error says more.
                        let _ = session.command("ROLLBACK").await;
                        return Err(error);
                    }
                };
                marks::note_rows(&session.client, &self.task, chunk.run, chunk.chunk, rows).await?;
                session.suffer(self.config.faults.before_commit.as_ref()).await;
                session.command("COMMIT").await?;
                Loaded::Now { rows }
            }
        };
        session.transaction_ended().await?;
        self.session = Some(session);
        Ok(loaded)
    }

    /// Whether the chunk is still to be loaded, and notes it; else what became of it.
    async fn admit(&self, session: &Session, chunk: &ChunkLoad) -> Result<Option<Loaded>, PostgresError> {
        let client = &session.client;
        // First without the lock: the mark of a table that catches up is held for as long as a replay's transaction takes, and a load that
        // comes late has nothing to wait for.
        for locking in [Locking::None, Locking::Share] {
            let mark = marks::read(client, &self.task, &chunk.table, locking).await?;
            let Some(mark) = mark.filter(|mark| mark.run == chunk.run && mark.restart == chunk.restart) else {
                return Ok(Some(Loaded::Stale));
            };
            if mark.stage != Some(TableStage::Copying) {
                let is_noted = marks::is_noted(client, &self.task, chunk.run, chunk.chunk).await?;
                return Ok(Some(if is_noted { Loaded::Before } else { Loaded::Stale }));
            }
        }
        let is_first = self.note(client, chunk).await?;
        Ok((!is_first).then_some(Loaded::Before))
    }

    /// Notes the chunk; false when it is noted already. Ends older loads of it that are under way for too long.
    async fn note(&self, client: &Client, chunk: &ChunkLoad) -> Result<bool, PostgresError> {
        let run =
            async |sql: &str| client.batch_execute(sql).await.doing(|| format!("noting a chunk of {}", chunk.table));
        run(&format!("SET LOCAL lock_timeout = '{NOTE_WAITS}'; SAVEPOINT wallaby_note")).await?;
        let mut tries = 1;
        let is_first = loop {
            match marks::note(client, &self.task, chunk.run, chunk.chunk, &chunk.table).await {
                Err(error) if error.sqlstate() == Some(&SqlState::LOCK_NOT_AVAILABLE) && tries < NOTE_TRIES => {
                    run("ROLLBACK TO wallaby_note").await?;
                    self.end_older_loads(client, chunk).await?;
                    tries += 1;
                }
                noted => break noted?,
            }
        };
        run("RELEASE wallaby_note; SET LOCAL lock_timeout = 0").await?;
        Ok(is_first)
    }

    /// Ends sessions that load this chunk since before our transaction began.
    async fn end_older_loads(&self, client: &Client, chunk: &ChunkLoad) -> Result<(), PostgresError> {
        let doing = || format!("ending older loads of a chunk of {}", chunk.table);
        // What a transaction has seen of the sessions stays as it was otherwise.
        client.batch_execute("SELECT pg_stat_clear_snapshot()").await.doing(doing)?;
        // Not as a condition: those have no order.
        let end = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 \
            AND datname = current_database() AND pid <> pg_backend_pid() AND xact_start < now()";
        for ended in client.query(end, &[&self.chunk_name(chunk)]).await.doing(doing)? {
            let (pid, table, chunk): (i32, _, _) = (ended.get(0), &chunk.table, chunk.chunk);
            tracing::warn!(task = %self.task, %table, %chunk, pid, "ended the session of an older load of a chunk at the sink");
        }
        Ok(())
    }

    /// Writes the rows; while one group of parts is written, the next one is fetched, unless it has huge rows.
    async fn copy(
        &self,
        session: &mut Session,
        chunk: &ChunkLoad,
        parts: &mut dyn ChunkParts,
    ) -> Result<u64, PostgresError> {
        let mut targets = Targets::new();
        let mut rows = 0;
        let mut group = session.wait_for(gather(parts)).await??;
        if group.is_empty() {
            let reason = format!("chunk {} of {} has no parts", chunk.chunk, chunk.table);
            return Err(SinkError::Interrupted(reason).into());
        }
        while !group.is_empty() {
            if bytes_of(&group) > OVERLAP_BYTES_MAX {
                rows += self.write(session, &mut targets, chunk, &group).await?;
                drop(std::mem::take(&mut group));
                group = session.wait_for(gather(parts)).await??;
                continue;
            }
            let (written, next) = {
                let next = std::pin::pin!(gather(parts));
                let both = {
                    let write = std::pin::pin!(self.write(session, &mut targets, chunk, &group));
                    match select(write, next).await {
                        Either::Left((written, next)) => (written, Either::Left(next)),
                        Either::Right((next, write)) => (write.await, Either::Right(next)),
                    }
                };
                let written = both.0?;
                let next = match both.1 {
                    Either::Left(next) => session.wait_for(next).await?,
                    Either::Right(next) => next,
                };
                (written, next?)
            };
            rows += written;
            group = next;
        }
        Ok(rows)
    }

    async fn write(
        &self,
        session: &mut Session,
        targets: &mut Targets,
        chunk: &ChunkLoad,
        group: &Group,
    ) -> Result<u64, PostgresError> {
        let mut by_shape: Vec<(Arc<TableSchema>, Vec<Chunk>)> = Vec::new();
        for body in group {
            for changes in &body.tables {
                check(changes, &chunk.table)?;
                let piece = Chunk { body: Arc::clone(body), changes: changes.clone() };
                match by_shape.last_mut() {
                    Some((shape, pieces)) if *shape == changes.schema => pieces.push(piece),
                    _ => by_shape.push((Arc::clone(&changes.schema), vec![piece])),
                }
            }
        }
        let mut rows = 0;
        for (shape, pieces) in by_shape {
            let target = self.target(session, targets, &shape).await?;
            let lookup = &self.lookup.lookup;
            let mut writer = Writer { session, targets, lookup, sink: &self.name, careful: false };
            rows += writer.load(&target, &pieces, chunk.is_one_generation).await? as u64;
        }
        session.empty_stages().await?;
        Ok(rows)
    }

    async fn target(
        &self,
        session: &Session,
        targets: &mut Targets,
        shape: &Arc<TableSchema>,
    ) -> Result<Arc<Target>, PostgresError> {
        if let Some(target) = targets.get(shape) {
            return Ok(Arc::clone(target));
        }
        let here = self.config.target_table(&shape.table);
        let lookup = self.lookup.lookup.as_ref();
        let fitting = Fitting { session, task: &self.task, lookup, sink: &self.name };
        let target = Arc::new(fitting.fit(shape, &here, Position::ZERO, Of::Chunk).await?);
        targets.insert(Arc::clone(shape), Arc::clone(&target));
        Ok(target)
    }
}

fn bytes_of(group: &Group) -> usize {
    group.iter().flat_map(|part| &part.tables).map(TableChanges::bytes).sum()
}

/// Parts up to about [`GROUP_BYTES`].
async fn gather(parts: &mut dyn ChunkParts) -> Result<Group, SinkError> {
    let mut group = Group::new();
    let mut bytes = 0;
    while bytes < GROUP_BYTES {
        let Some(part) = parts.next().await? else { break };
        bytes += part.tables.iter().map(TableChanges::bytes).sum::<usize>();
        group.push(part);
    }
    Ok(group)
}

/// A chunk has new rows of its table, and nothing else.
fn check(changes: &wallaby_model::TableChanges, table: &TableName) -> Result<(), SinkError> {
    let is_insert = |&op: &u8| op == Op::Insert as u8;
    if changes.schema.table == *table && changes.op().values().iter().all(is_insert) {
        return Ok(());
    }
    Err(SinkError::Data {
        reason: format!("a chunk of {table} has rows of {} or changes that are no inserts", changes.schema.table),
        remedy: "This is a fault of the chunk's content: report it, and load the table anew".to_owned(),
    })
}

#[async_trait]
impl ChunkLoader for PostgresLoader {
    async fn load(&mut self, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, SinkError> {
        let started = Instant::now();
        let loaded = match self.run(chunk, parts).await {
            Ok(loaded) => loaded,
            Err(error) => return Err(error.into_sink(self.config.role())),
        };
        if let Loaded::Now { rows } = loaded {
            metrics::counter!(CHUNKS, "sink" => self.name.clone()).increment(1);
            metrics::counter!(LOADED_ROWS, "sink" => self.name.clone()).increment(rows);
            metrics::histogram!(CHUNK_SECONDS, "sink" => self.name.clone()).record(started.elapsed().as_secs_f64());
        }
        Ok(loaded)
    }

    async fn close(&mut self) {
        self.session = None;
    }
}
