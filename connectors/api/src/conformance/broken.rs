//! A sink that breaks one promise, to show that the case about it can fail.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::{BinaryArray, BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use async_trait::async_trait;
use wallaby_model::change::{ABSENT, FIRST_COLUMN, arrow_schema};
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, Epoch, Position, RunId, SegmentBody, TableChanges, TableName, TableSchema};

use super::{Case, SinkUnderTest, TextRow};
use crate::{
    Applied, Batch, BatchPart, Capabilities, ChunkLoad, ChunkLoader, ChunkParts, CommitFault, Faults, Loaded, Opened,
    Portion, Portions, Sink, SinkError, SourceLookup, TableLoads, TableMark,
};

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
    /// Leaves out every other portion of a large transaction.
    ForgetsPortions,
    /// Commits a large transaction portion by portion.
    CommitsPortions,
    /// Keeps all portions of a large transaction until its end.
    GathersPortions,
    /// Does not know a chunk again.
    ForgetsNotes,
    /// Takes a chunk of any restart.
    IgnoresRestarts,
    /// Loads a chunk without its note when it dies.
    CommitsWhenKilled,
    /// Takes rows of all tables.
    IgnoresFilters,
    /// Moves marks without applying what is replayed.
    SkipsReplay,
    /// Says that a mark was moved when it was refused.
    SwallowsRefusals,
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
    /// Chunks that were loaded under numbers of our own.
    chunks: u32,
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

    fn make_loader(&self, mut faults: Faults) -> Option<Box<dyn ChunkLoader>> {
        let dies = self.how == Break::CommitsWhenKilled && faults.before_commit.take().is_some();
        let inner = self.inner.make_loader(faults)?;
        Some(Box::new(BrokenLoader { inner, how: self.how, dies, memory: Arc::clone(&self.memory) }))
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
            let tables = if self.how == Break::IgnoresFilters { None } else { part.tables.clone() };
            BatchPart { body: Arc::new(body), tables, ..part.clone() }
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

    async fn apply_large(&mut self, from: Position, portions: &mut dyn Portions) -> Result<Applied, SinkError> {
        let mut kept = Vec::new();
        match self.how {
            Break::ForgetsPortions => {
                let mut every_other = EveryOther { inner: portions, given: 0 };
                return self.inner.apply_large(from, &mut every_other).await;
            }
            Break::CommitsPortions | Break::GathersPortions => {}
            _ => return self.inner.apply_large(from, portions).await,
        }
        loop {
            match portions.next().await? {
                Portion::Rows(parts) if self.how == Break::GathersPortions => kept.extend(parts),
                Portion::Rows(parts) => {
                    self.inner.apply(&Batch { from, to: from, log_epoch: Epoch(0), parts }).await?;
                }
                Portion::End { to, log_epoch } => {
                    return self.inner.apply(&Batch { from, to, log_epoch, parts: kept }).await;
                }
            }
        }
    }

    fn loads(&mut self) -> Option<&mut dyn TableLoads> {
        self.inner.loads()?;
        Some(self)
    }

    async fn barrier(&mut self) -> Result<Position, SinkError> {
        self.inner.barrier().await
    }

    async fn close(&mut self) {
        self.inner.close().await;
    }
}

/// Portions without every second one.
struct EveryOther<'a> {
    inner: &'a mut dyn Portions,
    given: usize,
}

#[async_trait]
impl Portions for EveryOther<'_> {
    async fn next(&mut self) -> Result<Portion, SinkError> {
        self.given += 1;
        match self.inner.next().await? {
            Portion::Rows(_) if self.given.is_multiple_of(2) => Ok(Portion::Rows(Vec::new())),
            portion => Ok(portion),
        }
    }
}

impl BrokenSink {
    /// What the inner sink has: looked at before.
    fn inner_loads(&mut self) -> Result<&mut dyn TableLoads, SinkError> {
        self.inner.loads().ok_or_else(|| SinkError::Transient("the sink has no loads()".to_owned()))
    }

    fn swallowed<T: Default>(&self, outcome: Result<T, SinkError>) -> Result<T, SinkError> {
        if self.how == Break::SwallowsRefusals { Ok(outcome.unwrap_or_default()) } else { outcome }
    }
}

#[async_trait]
impl TableLoads for BrokenSink {
    async fn marks(&mut self) -> Result<Vec<TableMark>, SinkError> {
        self.inner_loads()?.marks().await
    }

    async fn prepare(&mut self, run: RunId, restart: u32, shape: &Arc<TableSchema>) -> Result<(), SinkError> {
        self.inner_loads()?.prepare(run, restart, shape).await
    }

    async fn loaded(&mut self, run: RunId) -> Result<Vec<ChunkId>, SinkError> {
        self.inner_loads()?.loaded(run).await
    }

    async fn mark(&mut self, tables: &[TableName], stage: TableStage, position: Position) -> Result<(), SinkError> {
        let marked = self.inner_loads()?.mark(tables, stage, position).await;
        self.swallowed(marked)
    }

    async fn replay(&mut self, tables: &[TableName], batch: &Batch) -> Result<(), SinkError> {
        let mut batch = batch.clone();
        if self.how == Break::SkipsReplay {
            batch.parts.clear();
        }
        self.inner_loads()?.replay(tables, &batch).await
    }

    async fn replay_large(
        &mut self,
        tables: &[TableName],
        from: Position,
        portions: &mut dyn Portions,
    ) -> Result<(), SinkError> {
        self.inner_loads()?.replay_large(tables, from, portions).await
    }

    async fn finish(&mut self, table: &TableName) -> Result<Vec<String>, SinkError> {
        self.inner_loads()?.finish(table).await
    }

    async fn forget(&mut self, run: RunId) -> Result<(), SinkError> {
        self.inner_loads()?.forget(run).await
    }

    async fn start_anew(&mut self) -> Result<(), SinkError> {
        self.inner_loads()?.start_anew().await
    }
}

struct BrokenLoader {
    inner: Box<dyn ChunkLoader>,
    how: Break,
    dies: bool,
    memory: Arc<Mutex<Memory>>,
}

#[async_trait]
impl ChunkLoader for BrokenLoader {
    async fn load(&mut self, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, SinkError> {
        let mut chunk = chunk.clone();
        if self.how == Break::ForgetsNotes || self.dies {
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            memory.chunks += 1;
            chunk.chunk.number = 1_000_000 + memory.chunks;
        }
        let mut loaded = self.inner.load(&chunk, parts).await?;
        if self.how == Break::IgnoresRestarts && loaded == Loaded::Stale {
            chunk.restart += 1;
            loaded = self.inner.load(&chunk, parts).await?;
        }
        if self.dies { Err(SinkError::Transient("killed".to_owned())) } else { Ok(loaded) }
    }

    async fn close(&mut self) {
        self.inner.close().await;
    }
}
