//! The contract: opening, applying, and what happens when a batch does not go through as a whole.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures::future::join;
use wallaby_connector_api::{
    Applied, Batch, BatchPart, Capabilities, CommitFault, Guarantee, Opened, Sink, SinkError, SinkFactory, SinkTask,
};
use wallaby_model::{Epoch, Position, TableName, TableSchema};

use crate::assemble::{TableRuns, positions, slice, tables};
use crate::catalog::{fit, fit_superseded};
use crate::checkpoint::{self, ADVANCE, as_bigint};
use crate::config::PostgresSinkConfig;
use crate::error::{Doing, PostgresError};
use crate::metrics::{BATCH_SECONDS, BATCHES, LOG_ROWS, ROWS, SESSIONS_ENDED, VIOLATIONS, WRITES_REFUSED};
use crate::schema::Target;
use crate::session::{Session, connect, not_open};
use crate::write::{Targets, Writer};

/// What this sink declares.
pub fn capabilities() -> Capabilities {
    Capabilities {
        name: "postgres",
        guarantee: Guarantee::ExactlyOnce,
        transactional: true,
        notes: &[
            "Each batch is one transaction that also moves the row of its task in `wallaby.checkpoints`, guarded by the \
             owner's epoch and the expected position: what was applied is not applied again, and an owner that was \
             replaced changes nothing. Do not change that table by hand.",
            "Opening the sink ends sessions of older owners by their `application_name`, so a frozen predecessor cannot \
             hold its locks. For that every worker has to connect as the same role (or as a member of \
             `pg_signal_backend`).",
            "A batch ends where a source transaction ends, so readers never see a part of one. They may see several \
             source transactions appear at once. `TRUNCATE` is not MVCC-safe in Postgres: a reader with an older \
             snapshot sees the table empty.",
            "Rows are kept by the primary key, or by the columns of the replica identity index where the WAL carries \
             only those. Changes of one key in one batch are merged column by column before they are written.",
            "An unchanged TOAST value is left as it is. When such a change meets no row, the row is read again from the \
             source by its key (`wallaby_sink_rows_read_again_total`); it may then be ahead of its neighbours until the \
             log catches up.",
            "Missing tables are made with columns, types, NOT NULL and primary key. New columns are added as nullable; \
             rows that exist keep NULL in them even when the source's column has a default. Anything else stops this \
             sink alone and names the statement to run here before `wallaby resume`. A column of your own may stay if \
             it has a default. Types that do not exist here are kept as text \
             (`wallaby_sink_columns_as_text_total`).",
            "A table without a key is appended to, with the position of the change in `_wallaby_position`. Its updates \
             and deletes need REPLICA IDENTITY FULL at the source and take away one row that is equal in all columns, \
             the oldest first; each batch that has some reads the whole table once.",
            "A batch that violates a constraint of this database as a whole is rolled back and applied in order, in \
             steps down to a single change, in one transaction with deferrable constraints deferred. If that fails too, \
             the sink stops and names constraint, keys and remedy.",
            "Foreign keys and triggers of this database are yours: they run for our writes as for any other. Foreign \
             keys are best made DEFERRABLE.",
            "`synchronous_commit` stays as the server or role has it, except that `off` becomes `on`: only a commit that \
             survives a crash may move a checkpoint.",
        ],
        batch_rows_max: 65_536,
        batch_bytes_max: 16 << 20,
    }
}

/// Makes sinks of one configuration.
#[derive(Clone, Debug)]
pub struct PostgresSinkFactory {
    config: PostgresSinkConfig,
}

impl PostgresSinkFactory {
    /// A factory; connects to nothing.
    pub fn new(config: PostgresSinkConfig) -> PostgresSinkFactory {
        PostgresSinkFactory { config }
    }
}

impl SinkFactory for PostgresSinkFactory {
    fn make(&self, task: SinkTask) -> Box<dyn Sink> {
        Box::new(PostgresSink::new(self.config.clone(), task))
    }
}

/// One sink, owned by one apply task.
pub struct PostgresSink {
    config: PostgresSinkConfig,
    task: SinkTask,
    /// The task's id, the label of metrics.
    name: String,
    open: Option<Open>,
}

/// What an open sink knows.
struct Open {
    session: Session,
    epoch: Epoch,
    position: Option<Position>,
    /// Shapes whose tables were found, or brought, to fit.
    targets: HashMap<Arc<TableSchema>, Arc<Target>>,
    /// Which source table each table here belongs to.
    owners: HashMap<TableName, TableName>,
}

/// How a batch is applied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Steps {
    /// Collapsed as a whole.
    Whole,
    /// In order, halved wherever a step violates a constraint, down to single changes.
    Small,
}

impl PostgresSink {
    /// A new, unopened sink.
    pub fn new(config: PostgresSinkConfig, task: SinkTask) -> PostgresSink {
        let name = task.task.to_string();
        PostgresSink { config, task, name, open: None }
    }

    fn count(&self, metric: &'static str, by: u64) {
        metrics::counter!(metric, "sink" => self.name.clone()).increment(by);
    }

    /// Turns an error into the contract's and drops the session, whose transaction is open or in doubt.
    fn failed(&mut self, error: PostgresError) -> SinkError {
        self.open = None;
        error.into_sink(self.config.role())
    }

    /// The same for an error of a write, which is counted when it was refused.
    fn write_failed(&mut self, error: PostgresError) -> SinkError {
        let error = self.failed(error);
        if matches!(error, SinkError::Fenced(_)) {
            self.count(WRITES_REFUSED, 1);
        }
        error
    }

    /// Applies as a whole, then in small steps if the data ask for it.
    async fn apply_batch(&mut self, batch: &Batch, log_epoch: Option<Epoch>) -> Result<(), PostgresError> {
        let by_table = tables(&batch.parts);
        match self.transaction(batch, &by_table, log_epoch, Steps::Whole).await {
            Err(error) if error.is_of_the_data() && !batch.parts.is_empty() => {
                tracing::info!(sink = self.name, %error, "a batch does not go through as a whole: small steps");
                self.count(VIOLATIONS, 1);
                self.transaction(batch, &by_table, log_epoch, Steps::Small).await
            }
            outcome => outcome,
        }
    }

    async fn transaction(
        &mut self,
        batch: &Batch,
        by_table: &[TableRuns],
        log_epoch: Option<Epoch>,
        steps: Steps,
    ) -> Result<(), PostgresError> {
        let open = self.open.as_mut().ok_or_else(not_open)?;
        let mark = open.session.mark();
        let outcome = match open.begin(&self.task, batch, log_epoch).await {
            Ok(()) => {
                let mut run = Transaction { open, config: &self.config, task: &self.task, name: &self.name };
                run.body(batch, by_table, steps).await
            }
            Err(error) => Err(error),
        };
        let Some(open) = self.open.as_mut() else { return outcome.map(|_| ()) };
        match outcome {
            Ok(rows) => {
                open.position = Some(batch.to);
                open.session.transaction_ended().await?;
                metrics::counter!(ROWS, "sink" => self.name.clone()).increment(rows as u64);
                Ok(())
            }
            Err(error) => {
                // Tables may have been made or widened in what is now taken back.
                open.targets.clear();
                if error.sqlstate().is_some() || matches!(error, PostgresError::Shape { .. }) {
                    // When even that fails, the first error says more.
                    if open.session.command("ROLLBACK").await.is_ok() {
                        open.session.rolled_back_to(mark);
                        open.session.transaction_ended().await?;
                    }
                }
                Err(error)
            }
        }
    }
}

impl Open {
    /// Opens the transaction and moves the checkpoint in it, guarded.
    async fn begin(&mut self, task: &SinkTask, batch: &Batch, log_epoch: Option<Epoch>) -> Result<(), PostgresError> {
        let advance = self.session.prepared(ADVANCE).await?;
        let (name, epoch) = (task.task.to_string(), as_bigint(self.epoch));
        let (from, to, log_epoch) = (batch.from.to_string(), batch.to.to_string(), log_epoch.map(as_bigint));
        let client = &self.session.client;
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] = [&name, &epoch, &from, &to, &log_epoch];
        let (begun, moved) = join(client.batch_execute("BEGIN"), client.execute(&advance, &parameters)).await;
        begun.doing(|| "beginning a transaction at the sink".to_owned())?;
        let moved = moved.doing(|| "moving the checkpoint at the sink".to_owned())?;
        if moved == 1 {
            return Ok(());
        }
        client.batch_execute("ROLLBACK").await.doing(|| "rolling back at the sink".to_owned())?;
        Err(checkpoint::why_refused(client, &task.task, self.epoch, batch.from).await?.into())
    }
}

/// The inside of one open transaction.
struct Transaction<'a> {
    open: &'a mut Open,
    config: &'a PostgresSinkConfig,
    task: &'a SinkTask,
    name: &'a str,
}

impl Transaction<'_> {
    /// Everything between the guarded move and the end; returns the rows written.
    async fn body(&mut self, batch: &Batch, by_table: &[TableRuns], steps: Steps) -> Result<usize, PostgresError> {
        let targets = self.targets(by_table).await?;
        let rows = match steps {
            Steps::Whole => self.writer(&targets, false).write(by_table).await?,
            Steps::Small => self.small_steps(batch, &targets).await?,
        };
        match &self.config.faults.before_commit {
            None => {}
            Some(CommitFault::Die) => self.open.session.cut().await,
            Some(CommitFault::Hang(point)) => point.hang().await,
        }
        self.open.session.client.batch_execute("COMMIT").await.doing(|| "committing at the sink".to_owned())?;
        Ok(rows)
    }

    fn writer<'b>(&'b mut self, targets: &'b Targets, careful: bool) -> Writer<'b> {
        let session = &mut self.open.session;
        Writer { session, targets, lookup: &self.task.lookup, sink: self.name, careful }
    }

    /// Finds, makes or widens the tables. The last shape of a table in the batch is the one that the table must fit;
    /// earlier ones are written to it as far as it still has their columns.
    async fn targets(&mut self, by_table: &[TableRuns]) -> Result<Targets, PostgresError> {
        let mut targets = Targets::new();
        for table in by_table {
            let here = self.config.target_table(&table.table);
            self.claim(&here, &table.table)?;
            let Some(((last, first), earlier)) = table.shapes.split_last() else { continue };
            let client = &self.open.session.client;
            let target = match self.open.targets.get(last) {
                Some(target) if earlier.is_empty() => Arc::clone(target),
                _ => Arc::new(fit(client, last, &here, *first, self.name).await?),
            };
            for (shape, first) in earlier {
                if shape != last && !targets.contains_key(shape) {
                    let superseded = fit_superseded(client, shape, &here, *first).await?;
                    targets.insert(Arc::clone(shape), Arc::new(superseded));
                }
            }
            // Any other shape that was known to fit is to be looked at again, should it come back.
            if !self.open.targets.contains_key(last) {
                self.open.targets.retain(|shape, _| shape.table != last.table);
            }
            self.open.targets.insert(Arc::clone(last), Arc::clone(&target));
            targets.insert(Arc::clone(last), target);
        }
        Ok(targets)
    }

    /// Two tables of the source cannot share one here.
    fn claim(&mut self, here: &TableName, source: &TableName) -> Result<(), PostgresError> {
        let owner = self.open.owners.entry(here.clone()).or_insert_with(|| source.clone());
        if owner == source {
            return Ok(());
        }
        Err(PostgresError::Sink(SinkError::Configuration {
            reason: format!("{owner} and {source} of the source both go to {here} at the sink"),
            remedy: "Put {{ .schema }} into the sink's schema, or leave one of the tables out".to_owned(),
        }))
    }

    /// Applies the batch in order. A step that the data refuse is halved, down to a single change; deferrable
    /// constraints are looked at when all is done.
    async fn small_steps(&mut self, batch: &Batch, targets: &Targets) -> Result<usize, PostgresError> {
        self.open.session.command("SET CONSTRAINTS ALL DEFERRED").await?;
        let positions = positions(&batch.parts);
        let mut steps: Vec<(usize, usize)> = vec![(0, positions.len())];
        let mut rows = 0;
        while let Some((start, end)) = steps.pop() {
            let after = start.checked_sub(1).map_or(batch.from, |before| positions[before]);
            let up_to = positions[end - 1];
            let parts = slice(&batch.parts, after, up_to);
            let mark = self.open.session.mark();
            self.open.session.command("SAVEPOINT wallaby_step").await?;
            match self.writer(targets, true).write(&tables(&parts)).await {
                Ok(written) => {
                    rows += written;
                    self.open.session.command("RELEASE wallaby_step").await?;
                }
                Err(error) if error.is_of_the_data() => {
                    if end - start == 1 {
                        return Err(at_change(error, &parts, up_to));
                    }
                    self.open.session.command("ROLLBACK TO wallaby_step; RELEASE wallaby_step").await?;
                    self.open.session.rolled_back_to(mark);
                    let middle = start + (end - start) / 2;
                    steps.push((middle, end));
                    steps.push((start, middle));
                }
                Err(error) => return Err(error),
            }
        }
        self.open.session.command("SET CONSTRAINTS ALL IMMEDIATE").await?;
        Ok(rows)
    }
}

/// Adds which change it was.
fn at_change(error: PostgresError, parts: &[BatchPart], position: Position) -> PostgresError {
    let PostgresError::Sql { doing, source } = error else { return error };
    let changes = parts.iter().flat_map(BatchPart::tables);
    let key = changes.last().map(|changes| crate::assemble::key_text(&changes)).unwrap_or_default();
    PostgresError::Sql { doing: format!("{doing}, the change at {position}{key}"), source }
}

#[async_trait]
impl Sink for PostgresSink {
    fn capabilities(&self) -> Capabilities {
        capabilities()
    }

    async fn last_epoch(&mut self) -> Result<Option<Epoch>, SinkError> {
        // Under epoch 0 nobody is ended by it, and anybody may end it.
        let session = match connect(&self.config, &self.task.task, Epoch(0)).await {
            Ok(session) => session,
            Err(error) => return Err(error.into_sink(self.config.role())),
        };
        let epoch = checkpoint::last_epoch(&session.client, &self.task.task).await;
        epoch.map_err(|error| error.into_sink(self.config.role()))
    }

    async fn open(&mut self, epoch: Epoch) -> Result<Opened, SinkError> {
        self.open = None;
        let session = match connect(&self.config, &self.task.task, epoch).await {
            Ok(session) => session,
            Err(error) => return Err(self.failed(error)),
        };
        let end_sessions = !self.config.faults.keep_older_sessions;
        let opened = match checkpoint::take_over(&session.client, &self.task.task, epoch, end_sessions).await {
            Ok(opened) => opened,
            Err(error) => return Err(self.write_failed(error)),
        };
        self.count(SESSIONS_ENDED, u64::from(opened.sessions_ended));
        let position = opened.position;
        self.open = Some(Open { session, epoch, position, targets: HashMap::new(), owners: HashMap::new() });
        Ok(opened)
    }

    async fn start_at(&mut self, position: Position, log_epoch: Epoch) -> Result<(), SinkError> {
        let open = self.open.as_mut().ok_or_else(not_open)?;
        let (client, epoch) = (&open.session.client, open.epoch);
        match checkpoint::start_at(client, &self.task.task, epoch, position, log_epoch).await {
            Ok(()) => {
                open.position = open.position.or(Some(position));
                Ok(())
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        let started = Instant::now();
        let mut outcome = self.apply_batch(batch, Some(batch.log_epoch)).await;
        if let Err(PostgresError::Shape { first, .. }) = &outcome {
            // What came before the change of shape is good. It is applied now: once a person has changed the table,
            // its rows might not fit any more. The log's epoch there is not known; a reader then takes it from the log.
            let end = Position::before(first.commit);
            let parts = slice(&batch.parts, batch.from, end);
            let before = Batch { from: batch.from, to: end, log_epoch: batch.log_epoch, parts };
            if before.rows() > 0
                && let Err(error) = self.apply_batch(&before, None).await
            {
                outcome = Err(error);
            }
        }
        if let Err(error) = outcome {
            return Err(self.write_failed(error));
        }
        self.count(BATCHES, 1);
        self.count(LOG_ROWS, batch.rows() as u64);
        metrics::histogram!(BATCH_SECONDS, "sink" => self.name.clone()).record(started.elapsed().as_secs_f64());
        Ok(Applied::Durable(batch.to))
    }

    async fn barrier(&mut self) -> Result<Position, SinkError> {
        let open = self.open.as_ref().ok_or_else(not_open)?;
        open.position.ok_or_else(|| SinkError::Transient(format!("{} has no position at the sink yet", self.name)))
    }

    async fn close(&mut self) {
        self.open = None;
    }
}
