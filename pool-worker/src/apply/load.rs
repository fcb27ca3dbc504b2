//! The apply task's part of a run: prepares tables, sees that every chunk is loaded, and says how far the sink is.
//!
//! What is next is decided by `tables.rs` from the sink's own marks and notes; here it is done, one step at a time, between
//! two batches of the main stream.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use wallaby_connector_api::{Sink, SinkError, TableFilter, TableLoads, TableMark};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::run::{ChunkDone, SinkRun, TableStage};
use wallaby_model::{ChunkId, Position, RunId, SinkId, TableName, TableSchema};
use wallaby_staging::{SideKey, SideStore};

use super::ApplyError;
use super::tables::{self, AtSink, Next, Replay};
use crate::runs::RunView;
use crate::task::TaskContext;

/// Tables that are marked in one transaction of the sink.
const MARKED_AT_ONCE: usize = 500;

/// The state of the sink's tables, as this owner left it.
pub struct Loads {
    sink: SinkId,
    snapshot: SnapshotMode,
    side: Arc<dyn SideStore>,
    marks: Vec<TableMark>,
    loaded: HashMap<RunId, BTreeSet<ChunkId>>,
    /// Runs that this owner has ended here.
    done: BTreeSet<RunId>,
    /// What the main reader takes.
    pub filter: Option<Arc<TableFilter>>,
    /// The board's version that was acted upon.
    seen: Option<u64>,
}

/// What a step came to.
#[derive(Debug, PartialEq)]
pub enum Stepped {
    /// Nothing is to be done now.
    Idle,
    /// Something was done: there may be more.
    Moved,
    /// The main stream begins.
    Begin {
        /// Where.
        from: Position,
    },
    /// The log is to be replayed for some tables.
    Replay(Replay),
    /// The sink is done with a run: its tables can be finished.
    Done {
        /// The run.
        run: RunId,
        /// What stands of it in etcd now.
        state: SinkRun,
    },
}

fn loads(sink: &mut dyn Sink) -> Result<&mut dyn TableLoads, ApplyError> {
    let cannot = || SinkError::Configuration {
        reason: "this sink cannot be loaded".to_owned(),
        remedy: "Set spec.source.postgres.snapshot: never".to_owned(),
    };
    Ok(sink.loads().ok_or_else(cannot)?)
}

impl Loads {
    /// Reads the marks of a sink that was just opened.
    ///
    /// # Errors
    /// As the sink says.
    pub async fn open(
        sink: &mut dyn Sink,
        name: &SinkId,
        snapshot: SnapshotMode,
        side: Arc<dyn SideStore>,
    ) -> Result<Loads, ApplyError> {
        let mut loads = Loads {
            sink: name.clone(),
            snapshot,
            side,
            marks: Vec::new(),
            loaded: HashMap::new(),
            done: BTreeSet::new(),
            filter: None,
            seen: None,
        };
        if snapshot != SnapshotMode::Never || sink.loads().is_some() {
            loads.refresh(sink).await?;
        }
        Ok(loads)
    }

    /// Reads the marks again: somebody moved them.
    ///
    /// # Errors
    /// As the sink says.
    pub async fn refresh(&mut self, sink: &mut dyn Sink) -> Result<(), ApplyError> {
        self.marks = loads(sink)?.marks().await?;
        self.filter = tables::main_filter(&self.marks, self.snapshot).map(Arc::new);
        self.seen = None;
        Ok(())
    }

    /// Whether a run, or a later one, has brought the sink to life.
    pub fn was_begun_by(&self, run: RunId) -> bool {
        self.marks.iter().any(|mark| mark.run >= run && mark.stage == TableStage::Ready)
    }

    /// The sink's name.
    pub fn sink(&self) -> &SinkId {
        &self.sink
    }

    /// Where the side store is.
    pub fn side(&self) -> Arc<dyn SideStore> {
        Arc::clone(&self.side)
    }

    /// Does the next thing that is to be done in any run. `at`: where the main stream stands, once it has begun.
    ///
    /// # Errors
    /// As the sink, the side store and etcd say.
    pub async fn step(
        &mut self,
        context: &TaskContext,
        sink: &mut dyn Sink,
        at: Option<Position>,
    ) -> Result<Stepped, ApplyError> {
        let version = *context.runs.changes().borrow();
        if self.seen == Some(version) {
            return Ok(Stepped::Idle);
        }
        let (next, said) = context.runs.of(&context.task.flow, |runs| {
            let (marks, loaded, done) = (&self.marks, &self.loaded, &self.done);
            let here = AtSink { sink: &self.sink, is_live: at.is_some(), marks, loaded, done };
            tables::next(here, runs)
        });
        for (run, state) in said {
            self.say(context, run, &state).await?;
        }
        let Some(next) = next else {
            self.seen = Some(version);
            return Ok(Stepped::Idle);
        };
        if !context.is_valid_now() {
            return Err(ApplyError::Invalid);
        }
        self.act(context, sink, at, next).await
    }

    async fn say(&self, context: &TaskContext, run: RunId, state: &SinkRun) -> Result<(), ApplyError> {
        match context.lock.put_sink_run(run, &self.sink, state).await {
            // It was forgotten meanwhile.
            Err(wallaby_coordination::Error::RunNotFound { .. }) => Ok(()),
            other => Ok(other?),
        }
    }

    async fn act(
        &mut self,
        context: &TaskContext,
        sink: &mut dyn Sink,
        at: Option<Position>,
        next: Next,
    ) -> Result<Stepped, ApplyError> {
        match next {
            Next::Prepare { run, restart, chunk, done } => {
                let Some(shape) = self.shape(context, run, chunk, &done).await? else { return Ok(Stepped::Moved) };
                tracing::info!(task = %context.task, %run, restart, table = %shape.table, "preparing a table for its load");
                context.pulse.wait("the sink to prepare a table");
                loads(sink)?.prepare(run, restart, &shape).await?;
                self.loaded.remove(&run);
                self.refresh(sink).await?;
                Ok(Stepped::Moved)
            }
            Next::Gone { table } => {
                loads(sink)?.mark(&[table], TableStage::Gone, at.unwrap_or(Position::ZERO)).await?;
                self.refresh(sink).await?;
                Ok(Stepped::Moved)
            }
            Next::AskLoaded(run) => {
                let before = self.loaded.get(&run).map(BTreeSet::len);
                let said = self.said_loaded(context, run);
                let loaded: BTreeSet<ChunkId> = loads(sink)?.loaded(run).await?.into_iter().collect();
                let is_news = before != Some(loaded.len());
                self.take_back(context, run, said.difference(&loaded).copied().collect()).await?;
                self.loaded.insert(run, loaded);
                Ok(if is_news { Stepped::Moved } else { Stepped::Idle })
            }
            Next::BeginStream { run, left, ready, from, state } => {
                // Each table from its own point on; the stream from the lowest.
                for (position, tables) in ready {
                    self.mark(context, sink, &tables, TableStage::Ready, position).await?;
                }
                // Without a stream nothing is missed.
                if !left.is_empty() && self.snapshot != SnapshotMode::Only {
                    let tables = named(&left);
                    tracing::warn!(task = %context.task, %run, tables, "tables of a cancelled run lack what came before the stream: left out");
                    self.mark(context, sink, &left, TableStage::Gone, from).await?;
                }
                self.refresh(sink).await?;
                if self.snapshot == SnapshotMode::Only {
                    return self.done(context, sink, run, state).await;
                }
                tracing::info!(task = %context.task, %run, %from, "every table is loaded: the stream begins");
                Ok(Stepped::Begin { from })
            }
            Next::CatchUp { run, tables, from } => {
                tracing::info!(task = %context.task, %run, tables = tables.len(), %from, "tables are loaded and catch up");
                loads(sink)?.mark(&tables, TableStage::CatchingUp, from).await?;
                self.refresh(sink).await?;
                Ok(Stepped::Moved)
            }
            Next::Replay(replay) => Ok(Stepped::Replay(replay)),
            Next::Done { run, state } => self.done(context, sink, run, state).await,
        }
    }

    /// Marks tables, however many: some hundred in a transaction.
    async fn mark(
        &self,
        context: &TaskContext,
        sink: &mut dyn Sink,
        tables: &[TableName],
        stage: TableStage,
        position: Position,
    ) -> Result<(), ApplyError> {
        for tables in tables.chunks(MARKED_AT_ONCE) {
            context.pulse.wait("the sink to mark its tables");
            loads(sink)?.mark(tables, stage, position).await?;
        }
        Ok(())
    }

    /// The chunks of the tables that are being copied which etcd says the sink has.
    fn said_loaded(&self, context: &TaskContext, run: RunId) -> BTreeSet<ChunkId> {
        let is_copied = |mark: &&TableMark| mark.run == run && mark.stage == TableStage::Copying;
        let copied: HashSet<&TableName> = self.marks.iter().filter(is_copied).map(|mark| &mark.table).collect();
        let said = context.runs.run(&context.task.flow, run, |view| {
            let relations = view.plan.as_ref().map(|plan| plan.relations.as_slice()).unwrap_or_default();
            let is_of_copied = |chunk: &&ChunkId| {
                relations.get(chunk.table as usize).is_some_and(|relation| copied.contains(&relation.table))
            };
            view.loaded.get(&self.sink).into_iter().flatten().filter(is_of_copied).copied().collect()
        });
        said.unwrap_or_default()
    }

    /// Takes back that the sink has chunks: it has not, the notes are of an earlier life of it. It went from the flow and came back
    /// somewhere else, or somebody set its database back.
    async fn take_back(&self, context: &TaskContext, run: RunId, lacking: Vec<ChunkId>) -> Result<(), ApplyError> {
        if lacking.is_empty() {
            return Ok(());
        }
        tracing::warn!(task = %context.task, %run, chunks = lacking.len(), "the sink lacks chunks that it is said to have: they are loaded");
        Ok(context.lock.take_back_loaded(run, &self.sink, &lacking).await?)
    }

    async fn done(
        &mut self,
        context: &TaskContext,
        sink: &mut dyn Sink,
        run: RunId,
        state: SinkRun,
    ) -> Result<Stepped, ApplyError> {
        // One that loads a few tables brings the sink to life, but not back: the others are as old as when it was cut off.
        let is_of_all = |view: &RunView| view.spec.as_ref().is_some_and(|spec| spec.tables.is_empty());
        if context.runs.run(&context.task.flow, run, is_of_all).unwrap_or(false) {
            context.lock.clear_detached(&self.sink, run).await?;
        }
        loads(sink)?.forget(run).await?;
        self.loaded.remove(&run);
        let state = SinkRun { is_done: true, ..state };
        self.say(context, run, &state).await?;
        tracing::info!(task = %context.task, %run, "the sink took every table over");
        // The watch has not brought it back yet: until then the same step would come again.
        self.done.insert(run);
        Ok(Stepped::Done { run, state })
    }

    /// The table's shape, from the chunk's first part; `None` when that is lost: the table is read again.
    async fn shape(
        &self,
        context: &TaskContext,
        run: RunId,
        chunk: ChunkId,
        done: &ChunkDone,
    ) -> Result<Option<Arc<TableSchema>>, ApplyError> {
        context.pulse.wait("a chunk's first part in the side store");
        let key = SideKey::ChunkPart { run, chunk, attempt: done.attempt, number: 0 };
        let body = self.side.get(key).await?;
        let decoded = body.and_then(|body| wallaby_wire::decode(&body).ok());
        match decoded.and_then(|body| body.tables.first().map(|table| Arc::clone(&table.schema))) {
            Some(shape) => Ok(Some(shape)),
            None => {
                report_lost(context, run, chunk).await?;
                Err(ApplyError::ChunkPart { run, chunk, number: 0 })
            }
        }
    }
}

/// Says that a chunk's part is gone: the run's owner has its table read again.
///
/// # Errors
/// When etcd cannot be reached.
pub async fn report_lost(context: &TaskContext, run: RunId, chunk: ChunkId) -> Result<(), wallaby_coordination::Error> {
    tracing::error!(task = %context.task, %run, %chunk, "the side store lost a part of a chunk: its table is read again");
    let key = wallaby_coordination::Key::RunLost(context.task.flow.clone(), run, chunk);
    context.lock.guarded_put("reporting a lost chunk", &key, &true).await
}

/// A table's name in the source for people.
pub fn named(tables: &[TableName]) -> String {
    tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
