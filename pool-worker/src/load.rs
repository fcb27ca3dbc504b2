//! One chunk of a run: from the side store into a sink, in one transaction of the sink together with a note of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;
use wallaby_connector_api::{ChunkLoad, ChunkParts, Directive, Loaded, SinkError, SinkFactory};
use wallaby_coordination::Error as EtcdError;
use wallaby_model::condition::TaskPhase;
use wallaby_model::run::{ChunkDone, ChunkLoaded, RunPlan};
use wallaby_model::{ChunkId, Epoch, Lsn, RunId, SegmentBody, SinkId, TableName, TaskKind};
use wallaby_staging::{SideKey, SideStore, StagingError};
use wallaby_wire::splice::part_checksum;

use crate::apply::ApplyError;
use crate::apply::load::report_lost;
use crate::apply::session::factory;
use crate::backoff::Backoff;
use crate::flows::{ApplyDemand, Demand};
use crate::runs::RunView;
use crate::task::{Ending, TaskContext, TaskEnd};
use crate::{metrics, spans};

/// Parts that are fetched ahead of the sink.
const AHEAD: u32 = 2;
/// Parts that are larger in the mean have huge rows: they are fetched one by one, and one chunk of them is loaded at a time.
const HUGE_PART_BYTES: u64 = 4 << 20;
/// One part is waited for this long.
const PART_PATIENCE: Duration = Duration::from_secs(60);
/// How long a chunk waits for the sink to prepare its table, or for the watch to show it, before it is given back.
const PLAN_PATIENCE: Duration = Duration::from_secs(10);

/// What there is to do.
struct Work {
    load: ChunkLoad,
    done: ChunkDone,
}

/// Runs the task to its end.
pub async fn run(context: &Arc<TaskContext>) -> TaskEnd {
    let (Demand::Load(demand), TaskKind::Load(sink, run, chunk)) = (&context.demand, &context.task.kind) else {
        return TaskEnd::Released(None);
    };
    let mut backoff = Backoff::default();
    loop {
        let outcome = tokio::select! {
            outcome = load(context, demand, sink, *run, *chunk) => outcome,
            _ = context.ending() => return TaskEnd::Released(None),
        };
        let error = match outcome {
            Ok(end) => return end,
            Err(error) => error,
        };
        let said = error.to_string();
        let ending = match error.directive() {
            Directive::GiveUp => return TaskEnd::GivenUp(said),
            Directive::Retry(least) => {
                let delay = backoff.next_delay().max(least);
                tracing::warn!(task = %context.task, error = %said, "loading a chunk failed");
                context.status.backoff(&said, delay);
                context.pause("the next try", delay).await
            }
            Directive::Stop => {
                tracing::error!(task = %context.task, error = %said, "loading a chunk stopped and waits for a person");
                context.status.stopped(&said);
                context.pulse.wait("a person (wallaby resume)");
                let ending = context.ending_or_resume().await;
                context.pulse.beat();
                (ending != Ending::ResumeAsked).then_some(ending)
            }
        };
        if ending.is_some() {
            return TaskEnd::Released(None);
        }
    }
}

async fn load(
    context: &Arc<TaskContext>,
    demand: &ApplyDemand,
    sink: &SinkId,
    run: RunId,
    chunk: ChunkId,
) -> Result<TaskEnd, ApplyError> {
    let found = context.runs.run(&context.task.flow, run, |view| work_of(view, run, chunk, sink));
    let work = match found.flatten() {
        Some(Some(work)) => work,
        Some(None) => return Ok(TaskEnd::Completed),
        None => return Ok(wait_for_news(context).await),
    };
    context.status.phase(TaskPhase::Streaming);
    context.pulse.wait("the side store");
    let log = context.log_spec().ok_or(ApplyError::Invalid)?;
    let side = context.shared.side(&context.task.flow, &log).await?;
    let (factory, task) = factory(context, demand)?;
    let Some(mut loader) = factory.make_loader(task) else { return Ok(TaskEnd::Released(None)) };
    let _turn = match has_huge_parts(&work.done) {
        true => {
            context.pulse.wait("its turn to write huge rows");
            context.shared.huge_rows.wait(&context.task).await
        }
        false => None,
    };
    let begun = Instant::now();
    let mut parts = StoredParts::new(context, side, run, chunk, &work.done);
    context.pulse.wait("the sink's answer");
    let span = spans::load_chunk(&context.task.flow, sink, run, chunk, &work.load.table);
    let outcome = loader.load(&work.load, &mut parts).instrument(span.clone()).await;
    match &outcome {
        Ok(Loaded::Now { rows }) => _ = span.record("rows", *rows as i64),
        // Nothing was loaded: it was there, or is of no use any more.
        Ok(Loaded::Before | Loaded::Stale) => {}
        Err(error) => wallaby_telemetry::failed(&span, error),
    }
    drop(span);
    let error = parts.error.take();
    loader.close().await;
    let rows = match (outcome, error) {
        (Ok(Loaded::Now { rows }), _) => {
            metrics::chunk_loaded(&context.task.flow, sink, rows, begun.elapsed());
            rows
        }
        (Ok(Loaded::Before), _) => work.done.rows,
        (Ok(Loaded::Stale), _) => return Ok(wait_for_news(context).await),
        (Err(_), Some(ApplyError::ChunkPart { .. })) => {
            report_lost(context, run, chunk).await?;
            return Ok(wait_for_news(context).await);
        }
        (Err(SinkError::Interrupted(_)), Some(error)) => return Err(error),
        (Err(error), _) => return Err(error.into()),
    };
    context.pulse.wait("etcd");
    let loaded = ChunkLoaded { rows, worker: context.shared.session.worker().clone() };
    match context.lock.put_loaded(run, sink, chunk, &loaded).await {
        Ok(()) | Err(EtcdError::RunNotFound { .. }) => Ok(TaskEnd::Completed),
        Err(error) => Err(error.into()),
    }
}

fn has_huge_parts(done: &ChunkDone) -> bool {
    done.bytes / u64::from(done.parts.max(1)) > HUGE_PART_BYTES
}

/// The sink's table, or the plan, is not where this chunk expects it: waits for a change of the run, then gives the task back.
async fn wait_for_news(context: &TaskContext) -> TaskEnd {
    let mut changes = context.runs.changes();
    changes.borrow_and_update();
    context.pulse.wait("the sink to prepare the table");
    tokio::select! {
        _ = context.ending() => {}
        _ = tokio::time::timeout(PLAN_PATIENCE, changes.changed()) => {}
    }
    TaskEnd::Released(None)
}

/// What there is to do; `Some(None)` when the chunk is no longer of the plan, `None` when it is not read yet as far as is known.
#[allow(clippy::option_option, reason = "unknown and obsolete are two things")]
fn work_of(view: &RunView, run: RunId, chunk: ChunkId, sink: &SinkId) -> Option<Option<Work>> {
    let plan = view.plan.as_ref()?;
    let relation = plan.relations.get(chunk.table as usize)?;
    let is_loaded = view.loaded.get(sink).is_some_and(|loaded| loaded.contains(&chunk));
    if plan.state.is_over() || relation.restart != chunk.restart || is_loaded {
        return Some(None);
    }
    let done = view.chunks.get(&chunk)?.clone();
    let is_one_generation = is_one_generation(plan, view, &relation.table, chunk.restart);
    let table = relation.table.clone();
    let load = ChunkLoad { run, chunk, table, restart: chunk.restart, is_one_generation };
    Some(Some(Work { load, done }))
}

/// Whether no two chunks of the table can have been read, or be read later, under different snapshots.
fn is_one_generation(plan: &RunPlan, view: &RunView, table: &TableName, restart: u32) -> bool {
    let is_of = |chunk: &ChunkId| {
        chunk.restart == restart && plan.relations.get(chunk.table as usize).is_some_and(|of| of.table == *table)
    };
    let mut points: Vec<Lsn> =
        view.chunks.iter().filter(|(chunk, _)| is_of(chunk)).map(|(_, done)| done.consistent_point).collect();
    let is_whole = plan.chunks().filter(is_of).all(|chunk| view.chunks.contains_key(&chunk));
    if !is_whole {
        points.extend(plan.generations.last().map(|generation| generation.consistent_point));
    }
    points.windows(2).all(|pair| pair[0] == pair[1])
}

type Fetch = AbortOnDropHandle<Result<Option<Bytes>, StagingError>>;

/// The parts of a chunk in the side store, fetched a little ahead.
struct StoredParts<'a> {
    context: &'a TaskContext,
    side: Arc<dyn SideStore>,
    run: RunId,
    chunk: ChunkId,
    attempt: Epoch,
    parts: u32,
    fetched_ahead: u32,
    checksum: u64,
    ahead: VecDeque<Fetch>,
    asked: u32,
    given: u32,
    checksums: Vec<u8>,
    error: Option<ApplyError>,
}

impl<'a> StoredParts<'a> {
    fn new(
        context: &'a TaskContext,
        side: Arc<dyn SideStore>,
        run: RunId,
        chunk: ChunkId,
        done: &ChunkDone,
    ) -> StoredParts<'a> {
        StoredParts {
            context,
            side,
            run,
            chunk,
            attempt: done.attempt,
            parts: done.parts,
            fetched_ahead: if has_huge_parts(done) { 0 } else { AHEAD },
            checksum: done.checksum,
            ahead: VecDeque::new(),
            asked: 0,
            given: 0,
            checksums: Vec::new(),
            error: None,
        }
    }

    async fn fetch(&mut self) -> Result<Option<Arc<SegmentBody>>, ApplyError> {
        let lost = |number| ApplyError::ChunkPart { run: self.run, chunk: self.chunk, number };
        if self.given == self.parts {
            let is_whole = part_checksum(&self.checksums) == self.checksum;
            return if is_whole { Ok(None) } else { Err(lost(0)) };
        }
        while self.asked < self.parts && self.asked <= self.given.saturating_add(self.fetched_ahead) {
            let (run, chunk, attempt, number) = (self.run, self.chunk, self.attempt, self.asked);
            let side = Arc::clone(&self.side);
            let get = async move { side.get(SideKey::ChunkPart { run, chunk, attempt, number }).await };
            self.ahead.push_back(AbortOnDropHandle::new(tokio::spawn(get)));
            self.asked += 1;
        }
        let Some(next) = self.ahead.pop_front() else { return Err(lost(self.given)) };
        self.context.pulse.wait("a chunk's part in the side store");
        let answer = tokio::time::timeout(PART_PATIENCE, next).await;
        let bytes = match answer {
            Ok(Ok(outcome)) => outcome?,
            Ok(Err(_)) | Err(_) => {
                return Err(SinkError::Transient("the side store did not answer with a part".to_owned()).into());
            }
        };
        let bytes = bytes.ok_or_else(|| lost(self.given))?;
        let body = wallaby_wire::decode(&bytes).map_err(|_| lost(self.given))?;
        self.checksums.extend_from_slice(&part_checksum(&bytes).to_le_bytes());
        drop(bytes);
        self.given += 1;
        self.context.pulse.wait("the sink's answer");
        Ok(Some(Arc::new(body)))
    }
}

#[async_trait]
impl ChunkParts for StoredParts<'_> {
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError> {
        match self.fetch().await {
            Ok(part) => Ok(part),
            Err(error) => {
                let said = error.to_string();
                self.error = Some(error);
                Err(SinkError::Interrupted(said))
            }
        }
    }
}
