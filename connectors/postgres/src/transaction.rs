//! One transaction at the sink: the guarded move of a checkpoint, tables brought into shape, rows, commit.
//!
//! What is moved is the main position, or the marks of tables that catch up ([`Moves`]). A batch that the data refuse as a
//! whole is applied again in small steps.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join;
use wallaby_connector_api::{Batch, BatchPart, SinkError, SinkTask};
use wallaby_model::run::TableStage;
use wallaby_model::schema::quote_literal;
use wallaby_model::{Epoch, Position, TableName, TableSchema, TaskId};

use crate::assemble::{TableRuns, positions, slice, tables};
use crate::catalog::{Fitting, Leniency, Of, fit_superseded};
use crate::checkpoint::{self, ADVANCE, LOCK_EPOCH, as_bigint};
use crate::config::PostgresSinkConfig;
use crate::error::{Doing, PostgresError};
use crate::marks;
use crate::metrics::{ROWS, VIOLATIONS};
use crate::schema::Target;
use crate::session::{Session, not_open};
use crate::sink::PostgresSink;
use crate::write::{Targets, Writer};

/// How long it is waited until a DEFERRABLE constraint gets the index that refused a row, and how often it is looked.
const DEFERRABLE_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What an open sink knows.
pub(crate) struct Open {
    pub session: Session,
    pub epoch: Epoch,
    pub position: Option<Position>,
    /// Shapes whose tables were found, or brought, to fit.
    pub targets: HashMap<Arc<TableSchema>, Arc<Target>>,
    /// Which source table each table here belongs to; read from the marks when it is first asked.
    pub owners: Option<HashMap<TableName, TableName>>,
}

/// What a transaction moves.
#[derive(Clone, Copy)]
pub(crate) enum Moves<'a> {
    /// The position of the main stream.
    Main,
    /// The marks of tables that catch up.
    Marks(&'a [TableName]),
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
    /// Applies a batch. When a table does not fit, what came before that is applied alone.
    pub(crate) async fn apply_fitting(&mut self, batch: &Batch, moves: Moves<'_>) -> Result<(), PostgresError> {
        let outcome = self.apply_batch(batch, Some(batch.log_epoch), moves).await;
        if let Err(PostgresError::Shape { first, .. }) = &outcome {
            // What came before the change of shape is good. It is applied now: once a person has changed the table,
            // its rows might not fit any more. The log's epoch there is not known; a reader then takes it from the log.
            let end = Position::before(first.commit);
            let parts = slice(&batch.parts, batch.from, end);
            let before = Batch { from: batch.from, to: end, log_epoch: batch.log_epoch, parts };
            if before.rows() > 0 {
                self.apply_batch(&before, None, moves).await?;
            }
        }
        outcome
    }

    /// Applies as a whole, then in small steps if the data ask for it.
    async fn apply_batch(
        &mut self,
        batch: &Batch,
        log_epoch: Option<Epoch>,
        moves: Moves<'_>,
    ) -> Result<(), PostgresError> {
        let by_table = tables(&batch.parts);
        match self.transaction(batch, &by_table, log_epoch, Steps::Whole, moves).await {
            Err(error) if error.is_of_the_data() && !batch.parts.is_empty() => {
                tracing::info!(sink = self.name, %error, "a batch does not go through as a whole: small steps");
                self.count(VIOLATIONS, 1);
                self.transaction(batch, &by_table, log_epoch, Steps::Small, moves).await
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
        moves: Moves<'_>,
    ) -> Result<(), PostgresError> {
        let open = self.open.as_mut().ok_or_else(not_open)?;
        let mark = open.session.mark();
        let outcome = match open.begin(&self.task, batch, log_epoch, moves).await {
            Ok(()) => {
                let mut run = Transaction { open, config: &self.config, task: &self.task, name: &self.name };
                run.body(batch, by_table, steps).await
            }
            Err(error) => Err(error),
        };
        let Some(open) = self.open.as_mut() else { return outcome.map(|_| ()) };
        match outcome {
            Ok(rows) => {
                if let Moves::Main = moves {
                    open.position = Some(batch.to);
                }
                open.session.transaction_ended().await?;
                metrics::counter!(ROWS, "sink" => self.name.clone()).increment(rows as u64);
                Ok(())
            }
            Err(error) => {
                open.taken_back(&error, mark).await?;
                Err(error)
            }
        }
    }
}

impl Open {
    /// Opens the transaction and moves the checkpoint or the marks in it, guarded.
    async fn begin(
        &mut self,
        task: &SinkTask,
        batch: &Batch,
        log_epoch: Option<Epoch>,
        moves: Moves<'_>,
    ) -> Result<(), PostgresError> {
        if let Moves::Marks(tables) = moves {
            self.begin_guarded(task, LOCK_EPOCH).await?;
            return marks::advance(&self.session.client, &task.task, tables, batch.from, batch.to).await;
        }
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

    /// Opens a transaction that goes on only while this epoch is the task's: the lock on the checkpoint row is held to its end. `lock` is
    /// [`checkpoint::LOCK`] or [`LOCK_EPOCH`].
    pub(crate) async fn begin_guarded(&mut self, task: &SinkTask, lock: &str) -> Result<(), PostgresError> {
        let lock = self.session.prepared(lock).await?;
        let (name, epoch) = (task.task.to_string(), as_bigint(self.epoch));
        let client = &self.session.client;
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&name, &epoch];
        let (begun, found) = join(client.batch_execute("BEGIN"), client.query_opt(&lock, &parameters)).await;
        begun.doing(|| "beginning a transaction at the sink".to_owned())?;
        if found.doing(|| "locking the checkpoint at the sink".to_owned())?.is_some() {
            return Ok(());
        }
        client.batch_execute("ROLLBACK").await.doing(|| "rolling back at the sink".to_owned())?;
        Err(checkpoint::refused_epoch(client, &task.task, self.epoch).await?.into())
    }

    /// Two tables of the source cannot share one here: neither with one whose rows came since the sink was opened, nor with one that
    /// this task has loaded. One that is gone from the source has left its table to others.
    pub(crate) async fn claim(
        &mut self,
        config: &PostgresSinkConfig,
        task: &TaskId,
        source: &TableName,
    ) -> Result<(), PostgresError> {
        let here = config.target_table(source);
        let owners = match &mut self.owners {
            Some(owners) => owners,
            unknown => {
                let marked = marks::read_all(&self.session.client, task).await?.into_iter();
                let marked = marked.filter(|mark| mark.stage != TableStage::Gone);
                unknown.insert(marked.map(|mark| (config.target_table(&mark.table), mark.table)).collect())
            }
        };
        let owner = owners.entry(here.clone()).or_insert_with(|| source.clone());
        if owner == source {
            return Ok(());
        }
        Err(PostgresError::Sink(SinkError::Configuration {
            reason: format!("{owner} and {source} of the source both go to {here} at the sink"),
            remedy: format!(
                "Put {{{{ .schema }}}} into the sink's schema, or leave one of the tables out. If {owner} is gone from the source, or \
                 {source} now, run at the sink: DELETE FROM wallaby.tables WHERE task = {} AND source_schema = {} AND \
                 source_table = {}; then wallaby resume",
                quote_literal(&task.to_string()),
                quote_literal(&owner.schema),
                quote_literal(&owner.name)
            ),
        }))
    }

    /// After a failed transaction, `mark` being what the session had before it.
    pub(crate) async fn taken_back(&mut self, error: &PostgresError, mark: usize) -> Result<(), PostgresError> {
        // Tables may have been made or widened in what is now taken back.
        self.targets.clear();
        if error.sqlstate().is_some() || matches!(error, PostgresError::Shape { .. } | PostgresError::Sink(_)) {
            // When even that fails, the first error says more.
            if self.session.command("ROLLBACK").await.is_ok() {
                self.session.rolled_back_to(mark);
                self.session.transaction_ended().await?;
                if let Some(index) = error.not_yet_deferrable() {
                    self.wait_for_constraint(&index).await?;
                }
            }
        }
        Ok(())
    }

    /// Waits for whoever adds a constraint, which gives its index another name. That is done beside this sink while it is open: it
    /// would be cut short again and again by a sink that fails at once.
    async fn wait_for_constraint(&self, index: &str) -> Result<(), PostgresError> {
        let deadline = Instant::now() + DEFERRABLE_WITHIN;
        while checkpoint::exists(&self.session.client, index).await? && Instant::now() < deadline {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

/// The inside of one open transaction.
pub(crate) struct Transaction<'a> {
    pub open: &'a mut Open,
    pub config: &'a PostgresSinkConfig,
    pub task: &'a SinkTask,
    pub name: &'a str,
}

impl Transaction<'_> {
    /// Everything between the guarded move and the end; returns the rows written.
    async fn body(&mut self, batch: &Batch, by_table: &[TableRuns], steps: Steps) -> Result<usize, PostgresError> {
        let targets = self.targets(by_table, &Leniency::default()).await?;
        let rows = match steps {
            Steps::Whole => self.writer(&targets, false).write(by_table).await?,
            Steps::Small => {
                self.open.session.command("SET CONSTRAINTS ALL DEFERRED").await?;
                let rows = self.small_steps(&batch.parts, batch.from, &targets).await?;
                self.open.session.command("SET CONSTRAINTS ALL IMMEDIATE").await?;
                rows
            }
        };
        self.commit().await?;
        Ok(rows)
    }

    /// Commits, unless a fault comes first.
    pub(crate) async fn commit(&mut self) -> Result<(), PostgresError> {
        self.open.session.suffer(self.config.faults.before_commit.as_ref()).await;
        self.open.session.client.batch_execute("COMMIT").await.doing(|| "committing at the sink".to_owned())
    }

    pub(crate) fn writer<'b>(&'b mut self, targets: &'b Targets, careful: bool) -> Writer<'b> {
        let session = &mut self.open.session;
        Writer { session, targets, lookup: &self.task.lookup, sink: self.name, careful }
    }

    /// Finds, makes or widens the tables. The last shape of a table in the batch is the one that the table must fit;
    /// earlier ones are written to it as far as it still has their columns.
    pub(crate) async fn targets(
        &mut self,
        by_table: &[TableRuns],
        leniency: &Leniency,
    ) -> Result<Targets, PostgresError> {
        let mut targets = Targets::new();
        for table in by_table {
            let here = self.config.target_table(&table.table);
            self.open.claim(self.config, &self.task.task, &table.table).await?;
            let Some(((last, first), earlier)) = table.shapes.split_last() else { continue };
            let target = match self.open.targets.get(last) {
                Some(target) if earlier.is_empty() => Arc::clone(target),
                _ => {
                    let (task, lookup) = (&self.task.task, self.task.lookup.as_ref());
                    let fitting = Fitting { session: &self.open.session, task, lookup, sink: self.name };
                    Arc::new(fitting.fit(last, &here, *first, Of::Log(leniency)).await?)
                }
            };
            for (shape, first) in earlier {
                if shape != last && !targets.contains_key(shape) {
                    let superseded = fit_superseded(&self.open.session.client, shape, &here, *first).await?;
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

    /// Applies the parts past `from` in order. A step that the data refuse is halved, down to a single change. Deferrable
    /// constraints are to be deferred by the caller, and looked at when all is done.
    pub(crate) async fn small_steps(
        &mut self,
        parts: &[BatchPart],
        from: Position,
        targets: &Targets,
    ) -> Result<usize, PostgresError> {
        let positions = positions(parts);
        let mut steps: Vec<(usize, usize)> = vec![(0, positions.len())];
        let mut rows = 0;
        while let Some((start, end)) = steps.pop() {
            let after = start.checked_sub(1).map_or(from, |before| positions[before]);
            let up_to = positions[end - 1];
            let parts = slice(parts, after, up_to);
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
