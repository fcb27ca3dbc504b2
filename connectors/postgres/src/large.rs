//! A transaction that does not fit into memory: given out in portions, applied in one transaction of the sink.
//!
//! Where it ends is known only at its end. So the lock on the checkpoint row is taken first, with epoch and position checked, and
//! the row is moved last, before the commit. That lock is in nobody's way who works beside: a replay's only keeps the epoch, the main
//! stream's lets replays pass. While one portion is written the next one is fetched: at most two are in memory, and of
//! those with huge rows one.
//! A portion that violates a constraint as a whole is rolled back to a savepoint and applied in small steps; deferrable constraints
//! are deferred from then on and looked at before the commit.

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::{Either, select};
use wallaby_connector_api::{BatchPart, Portion, Portions, SinkError, SinkTask, TableFilter};
use wallaby_model::{Epoch, Position, TableChanges, TableName};

use crate::assemble::tables;
use crate::catalog::Leniency;
use crate::checkpoint::{self, ADVANCE, LOCK_AT, LOCK_EPOCH, as_bigint};
use crate::error::{Doing, PostgresError};
use crate::marks;
use crate::metrics::{ROWS, VIOLATIONS};
use crate::session::not_open;
use crate::sink::PostgresSink;
use crate::transaction::{Moves, Open, Transaction};

/// A portion with more than this is written before the next one is fetched.
const OVERLAP_BYTES_MAX: usize = 8 << 20;

/// A large transaction that was committed.
pub(crate) struct Done {
    /// Where the sink, or the marks, stand.
    pub to: Position,
    /// Rows of the log, before-images included.
    pub log_rows: usize,
}

impl PostgresSink {
    /// Applies a transaction in portions.
    pub(crate) async fn large(
        &mut self,
        from: Position,
        portions: &mut dyn Portions,
        moves: Moves<'_>,
    ) -> Result<Done, PostgresError> {
        // Taken out: should the caller stop waiting for us, the session is dropped with the open transaction in it.
        let mut open = self.open.take().ok_or_else(not_open)?;
        let mark = open.session.mark();
        let outcome = match open.begin_large(&self.task, from, moves).await {
            Ok(()) => {
                let inside = Transaction { open: &mut open, config: &self.config, task: &self.task, name: &self.name };
                let filter = match moves {
                    Moves::Main => None,
                    Moves::Marks(tables) => Some(only(tables)),
                };
                let mut large =
                    Large { inside, filter, leniency: Leniency::default(), deferred: false, rows: 0, log_rows: 0 };
                large.run(from, portions, moves).await
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok((done, rows)) => {
                if let Moves::Main = moves {
                    open.position = Some(done.to);
                }
                open.session.transaction_ended().await?;
                // Tables may have columns that they had only until here.
                open.targets.clear();
                self.open = Some(open);
                metrics::counter!(ROWS, "sink" => self.name.clone()).increment(rows as u64);
                Ok(done)
            }
            Err(error) => {
                open.taken_back(&error, mark).await?;
                Err(error)
            }
        }
    }
}

fn bytes_of(parts: &[BatchPart]) -> usize {
    parts.iter().flat_map(|part| &part.body.tables).map(TableChanges::bytes).sum()
}

/// A filter that takes rows of these tables only.
pub(crate) fn only(tables: &[TableName]) -> Arc<TableFilter> {
    let taken: HashMap<_, _> = tables.iter().map(|table| (table.clone(), Position::ZERO)).collect();
    Arc::new(TableFilter { taken, others: false, ..TableFilter::default() })
}

/// A part cut down to what a filter takes too.
pub(crate) fn narrowed(part: &BatchPart, filter: &Arc<TableFilter>) -> BatchPart {
    let tables = match &part.tables {
        None => Arc::clone(filter),
        Some(own) => {
            let after = |table: &TableName| Some((table.clone(), own.after(table)?.max(filter.after(table)?)));
            let taken = filter.taken.keys().filter_map(after).collect();
            Arc::new(TableFilter { taken, others: false, ..TableFilter::default() })
        }
    };
    BatchPart { tables: Some(tables), ..part.clone() }
}

impl Open {
    /// Opens the transaction and locks what is moved at its end.
    async fn begin_large(&mut self, task: &SinkTask, from: Position, moves: Moves<'_>) -> Result<(), PostgresError> {
        if let Moves::Marks(tables) = moves {
            self.begin_guarded(task, LOCK_EPOCH).await?;
            // Moved nowhere yet: checks where they stand, and locks them.
            return marks::advance(&self.session.client, &task.task, tables, from, from).await;
        }
        let lock = self.session.prepared(LOCK_AT).await?;
        let client = &self.session.client;
        client.batch_execute("BEGIN").await.doing(|| "beginning a transaction at the sink".to_owned())?;
        let (name, epoch, position) = (task.task.to_string(), as_bigint(self.epoch), from.to_string());
        let found = client.query_opt(&lock, &[&name, &epoch, &position]).await;
        if found.doing(|| "locking the checkpoint at the sink".to_owned())?.is_some() {
            return Ok(());
        }
        client.batch_execute("ROLLBACK").await.doing(|| "rolling back at the sink".to_owned())?;
        Err(checkpoint::why_refused(client, &task.task, self.epoch, from).await?.into())
    }

    /// Moves the checkpoint, or the marks, at the end.
    async fn move_to(
        &mut self,
        task: &SinkTask,
        from: Position,
        to: Position,
        log_epoch: Epoch,
        moves: Moves<'_>,
    ) -> Result<(), PostgresError> {
        if let Moves::Marks(tables) = moves {
            return marks::advance(&self.session.client, &task.task, tables, from, to).await;
        }
        let advance = self.session.prepared(ADVANCE).await?;
        let (name, epoch, log_epoch) = (task.task.to_string(), as_bigint(self.epoch), Some(as_bigint(log_epoch)));
        let (before, after) = (from.to_string(), to.to_string());
        let client = &self.session.client;
        let moved = client.execute(&advance, &[&name, &epoch, &before, &after, &log_epoch]).await;
        if moved.doing(|| "moving the checkpoint at the sink".to_owned())? == 1 {
            return Ok(());
        }
        // The row was locked: only a person, or a trigger, can have changed it.
        Err(checkpoint::why_refused(client, &task.task, self.epoch, from).await?.into())
    }
}

/// The inside of a large transaction.
struct Large<'a> {
    inside: Transaction<'a>,
    /// Which rows are taken of every portion.
    filter: Option<Arc<TableFilter>>,
    /// Columns of the shapes so far: one that the transaction drops stays at the sink until it is over.
    leniency: Leniency,
    /// Deferrable constraints are deferred.
    deferred: bool,
    rows: usize,
    log_rows: usize,
}

impl Large<'_> {
    async fn run(
        &mut self,
        from: Position,
        portions: &mut dyn Portions,
        moves: Moves<'_>,
    ) -> Result<(Done, usize), PostgresError> {
        let mut portion = self.inside.open.session.wait_for(portions.next()).await??;
        let (to, log_epoch) = loop {
            match portion {
                Portion::Rows(parts) => portion = self.write_and_fetch(parts, from, portions).await?,
                Portion::End { to, log_epoch } => break (to, log_epoch),
            }
        };
        if to <= from || !to.is_between_transactions() {
            let reason = format!("a large transaction from {from} on claims to end at {to}");
            return Err(SinkError::Interrupted(reason).into());
        }
        if self.deferred {
            self.inside.open.session.command("SET CONSTRAINTS ALL IMMEDIATE").await?;
        }
        self.inside.open.move_to(self.inside.task, from, to, log_epoch, moves).await?;
        self.inside.commit().await?;
        Ok((Done { to, log_rows: self.log_rows }, self.rows))
    }

    /// Writes a portion while the next one is fetched; one of huge rows before.
    async fn write_and_fetch(
        &mut self,
        parts: Vec<BatchPart>,
        from: Position,
        portions: &mut dyn Portions,
    ) -> Result<Portion, PostgresError> {
        if bytes_of(&parts) > OVERLAP_BYTES_MAX {
            self.write(parts, from).await?;
            return Ok(self.inside.open.session.wait_for(portions.next()).await??);
        }
        let next = portions.next();
        let outcome = {
            let write = std::pin::pin!(self.write(parts, from));
            match select(write, next).await {
                Either::Left((written, next)) => (written, Err(next)),
                Either::Right((next, write)) => (write.await, Ok(next)),
            }
        };
        outcome.0?;
        match outcome.1 {
            Ok(next) => Ok(next?),
            Err(next) => Ok(self.inside.open.session.wait_for(next).await??),
        }
    }

    async fn write(&mut self, mut parts: Vec<BatchPart>, from: Position) -> Result<(), PostgresError> {
        if let Some(filter) = &self.filter {
            parts = parts.iter().map(|part| narrowed(part, filter)).collect();
        }
        let by_table = tables(&parts);
        if by_table.is_empty() {
            return Ok(());
        }
        // Before they are used: a portion may have a shape and the one after it.
        for (shape, _) in by_table.iter().flat_map(|table| &table.shapes) {
            self.leniency.remember(shape);
        }
        let targets = self.inside.targets(&by_table, &self.leniency).await?;
        let mark = self.inside.open.session.mark();
        self.inside.open.session.command("SAVEPOINT wallaby_portion").await?;
        let written = match self.inside.writer(&targets, self.deferred).write(&by_table).await {
            Err(error) if error.is_of_the_data() => {
                tracing::info!(sink = self.inside.name, %error, "a portion does not go through as a whole: small steps");
                metrics::counter!(VIOLATIONS, "sink" => self.inside.name.to_owned()).increment(1);
                let back = "ROLLBACK TO wallaby_portion; SET CONSTRAINTS ALL DEFERRED";
                self.inside.open.session.command(back).await?;
                self.inside.open.session.rolled_back_to(mark);
                self.deferred = true;
                self.inside.small_steps(&parts, from, &targets).await?
            }
            written => written?,
        };
        self.inside.open.session.command("RELEASE wallaby_portion").await?;
        self.inside.open.session.empty_stages().await?;
        self.rows += written;
        self.log_rows += parts.iter().flat_map(BatchPart::tables).map(|table| table.rows.num_rows()).sum::<usize>();
        Ok(())
    }
}
