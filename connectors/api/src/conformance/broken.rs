//! A sink that breaks one promise, to show that the case about it can fail.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::{BinaryArray, BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use async_trait::async_trait;
use wallaby_model::change::{ABSENT, FIRST_COLUMN, arrow_schema};
use wallaby_model::{Epoch, Position, SegmentBody, TableChanges, TableName, TableSchema};

use super::{Case, SinkUnderTest, TextRow};
use crate::{Applied, Batch, BatchPart, Capabilities, CommitFault, Faults, Opened, Sink, SinkError, SourceLookup};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Applies a batch wherever the sink stands.
    AcceptsReplays,
    /// Opens with the same epoch whoever comes.
    IgnoresEpochs,
    /// Ends nobody's session.
    KeepsOlderSessions,
    /// Commits rows before the checkpoint.
    ForgetsCheckpoints,
    /// Takes a value that was not carried for NULL.
    UnchangedIsNull,
    /// Keeps only the last row of each key.
    LastRowWins,
    /// Writes the columns that it saw first.
    DropsNewColumns,
    /// Does nothing for a batch without rows.
    ForgetsEmptyBatches,
    /// Loses what is past the first hundred rows of a segment.
    LosesRowsOfLargeBatches,
}

/// A target whose sinks break one promise.
pub struct Broken<'a> {
    inner: &'a dyn SinkUnderTest,
    how: Break,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Default)]
struct Memory {
    /// Where a sink without its checkpoint believes to stand, and where it stands.
    forgotten: Option<(Position, Position)>,
    /// The first shape of each table.
    shapes: HashMap<TableName, Arc<TableSchema>>,
}

impl<'a> Broken<'a> {
    /// Breaks on `inner` what `case` is about.
    pub fn for_case(case: &Case, inner: &'a dyn SinkUnderTest) -> Broken<'a> {
        Broken { inner, how: case.breaks, memory: Arc::default() }
    }
}

#[async_trait]
impl SinkUnderTest for Broken<'_> {
    fn make(&self, mut faults: Faults, lookup: Arc<dyn SourceLookup>) -> Box<dyn Sink> {
        let mut dies = false;
        match self.how {
            Break::KeepsOlderSessions => faults.keep_older_sessions = true,
            Break::ForgetsCheckpoints => {
                dies =
                    matches!(faults.before_commit.take_if(|f| matches!(f, CommitFault::Die)), Some(CommitFault::Die));
            }
            _ => {}
        }
        let inner = self.inner.make(faults, lookup);
        Box::new(BrokenSink { inner, how: self.how, dies, memory: Arc::clone(&self.memory) })
    }

    async fn rows(&self, table: &TableName) -> Vec<TextRow> {
        self.inner.rows(table).await
    }

    async fn constrain(&self, table: &TableName, columns: &[&str]) -> bool {
        self.inner.constrain(table, columns).await
    }
}

struct BrokenSink {
    inner: Box<dyn Sink>,
    how: Break,
    dies: bool,
    memory: Arc<Mutex<Memory>>,
}

impl BrokenSink {
    fn with_memory<T>(&self, use_it: impl FnOnce(&mut Memory) -> T) -> T {
        use_it(&mut self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn changed(&self, batch: &Batch) -> Batch {
        let parts = batch.parts.iter().map(|part| {
            let tables = part.body.tables.iter().map(|table| self.changed_table(table)).collect();
            let body = SegmentBody { transactions: part.body.transactions.clone(), tables };
            BatchPart { body: Arc::new(body), ..part.clone() }
        });
        Batch { parts: parts.collect(), ..batch.clone() }
    }

    fn changed_table(&self, table: &TableChanges) -> TableChanges {
        let same = || table.clone();
        let with_rows = |rows: RecordBatch| TableChanges { schema: Arc::clone(&table.schema), rows };
        match self.how {
            Break::UnchangedIsNull => {
                let mut columns = table.rows.columns().to_vec();
                columns[ABSENT] = Arc::new(BinaryArray::new_null(table.rows.num_rows()));
                RecordBatch::try_new(table.rows.schema(), columns).map_or_else(|_| same(), with_rows)
            }
            Break::LastRowWins => {
                let key = &table.rows.column(FIRST_COLUMN);
                let is_last = |row: usize| {
                    let later = row + 1..table.rows.num_rows();
                    !later.into_iter().any(|other| key.slice(row, 1).to_data() == key.slice(other, 1).to_data())
                };
                let keep: BooleanArray = (0..table.rows.num_rows()).map(|row| Some(is_last(row))).collect();
                filter_record_batch(&table.rows, &keep).map_or_else(|_| same(), with_rows)
            }
            Break::LosesRowsOfLargeBatches => with_rows(table.rows.slice(0, table.rows.num_rows().min(100))),
            Break::DropsNewColumns => {
                let name = table.schema.table.clone();
                let first = self.with_memory(|memory| {
                    Arc::clone(memory.shapes.entry(name).or_insert_with(|| Arc::clone(&table.schema)))
                });
                let columns = table.rows.columns()[..FIRST_COLUMN + first.columns.len()].to_vec();
                let rows = RecordBatch::try_new(arrow_schema(&first), columns);
                rows.map_or_else(|_| same(), |rows| TableChanges { schema: first, rows })
            }
            _ => same(),
        }
    }
}

#[async_trait]
impl Sink for BrokenSink {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn last_epoch(&mut self) -> Result<Option<Epoch>, SinkError> {
        self.inner.last_epoch().await
    }

    async fn open(&mut self, epoch: Epoch) -> Result<Opened, SinkError> {
        let epoch = if self.how == Break::IgnoresEpochs { Epoch(1) } else { epoch };
        let mut opened = self.inner.open(epoch).await?;
        if let Some((believed, _)) = self.with_memory(|memory| memory.forgotten) {
            opened.position = Some(believed);
        }
        Ok(opened)
    }

    async fn start_at(&mut self, position: Position, log_epoch: Epoch) -> Result<(), SinkError> {
        self.inner.start_at(position, log_epoch).await
    }

    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        if self.how == Break::ForgetsEmptyBatches && batch.parts.is_empty() {
            return Ok(Applied::Durable(batch.to));
        }
        let mut changed = self.changed(batch);
        if self.how == Break::AcceptsReplays {
            let stands = self.inner.barrier().await?;
            if stands > changed.to {
                (changed.from, changed.to) = (stands, stands);
            }
        }
        if let Some((_, stands)) = self.with_memory(|memory| memory.forgotten) {
            (changed.from, changed.to) = (stands, stands);
        }
        self.inner.apply(&changed).await?;
        if self.dies {
            self.with_memory(|memory| memory.forgotten = Some((batch.from, batch.to)));
            return Err(SinkError::Transient("killed".to_owned()));
        }
        Ok(Applied::Durable(batch.to))
    }

    async fn barrier(&mut self) -> Result<Position, SinkError> {
        self.inner.barrier().await
    }

    async fn close(&mut self) {
        self.inner.close().await;
    }
}
