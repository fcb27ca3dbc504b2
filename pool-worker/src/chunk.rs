//! One chunk of a run: read under the run's snapshot into the side store, then marked as done in one guarded write.
//!
//! One ownership is one attempt: its parts carry the lock's epoch, so two readers of one chunk never mix them (hazard 23). Whatever
//! goes wrong before the mark is on its way, the parts of this attempt go and the task is given back; the next owner has another epoch. Whether a
//! relation was rewritten is for the run's owner to see: it makes the plan over, and this chunk is then no longer of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;
use wallaby_coordination::{ChunkOutcome, LockEntry};
use wallaby_model::condition::TaskPhase;
use wallaby_model::run::{ChunkDone, Generation, PlannedRelation, RelationState, RunPlan, RunSpec, RunWish};
use wallaby_model::{ChunkId, Codec, Epoch, RunId, SegmentBody, TableChanges, TaskKind};
use wallaby_postgres_source::{ChunkRequest, ConnectConfig, PartSink, SourceError, read_chunk};
use wallaby_staging::{Puts, Shelf, SideGroup, SideKey, SideStore, StagingError};
use wallaby_wire::splice::part_checksum;

use crate::capture::{CaptureError, Directive};
use crate::failpoint::Failpoint;
use crate::flows::{Demand, SourceDemand};
use crate::places::Place;
use crate::run::age_max;
use crate::runs::RunView;
use crate::task::{TaskContext, TaskEnd};
use crate::{metrics, secret, spans};

/// How long a chunk waits for the run's owner to export another snapshot before it is given back.
const PLAN_PATIENCE: Duration = Duration::from_secs(15);
/// How long a chunk is read on under a snapshot that its run has given up, at most: the next snapshot serves it as well, and vacuum waits.
const OUTLIVES_MAX: Duration = Duration::from_secs(60);
/// How long a chunk that met a full side store waits before it is given back. The snapshot is not held meanwhile.
const FULL_AGAIN: Duration = Duration::from_secs(5);
/// Before a failed chunk is given back.
const AGAIN: Duration = Duration::from_secs(1);

/// What there is to do.
struct Work {
    relation: PlannedRelation,
    generation: Generation,
    spec: RunSpec,
}

/// Why there is nothing to do now.
enum Idle {
    /// The chunk is read, or no longer of the plan.
    Over,
    /// There is no snapshot to read under.
    NoSnapshot,
}

/// How a run is read that is to read slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// So many chunks at a time.
    readers: usize,
    /// So many rows of each, a second.
    pub rows_per_second: u64,
}

impl Throttled {
    /// What all readers take together is no more than what was asked for. `None`: they take what they can.
    pub fn of(spec: &RunSpec) -> Option<Throttled> {
        let all = spec.rows_per_second?.max(1);
        let readers = spec.readers_at_once();
        Some(Throttled { readers: usize::try_from(readers).unwrap_or(usize::MAX), rows_per_second: all / readers })
    }
}

/// Runs the task to its end.
pub async fn run(context: &Arc<TaskContext>) -> TaskEnd {
    let (Demand::Chunk(demand), TaskKind::Chunk(run, chunk)) = (&context.demand, &context.task.kind) else {
        return TaskEnd::Released(None);
    };
    let work = loop {
        match find(context, *run, *chunk).await {
            Ok(work) if is_next(context, *run, &work.spec).await => break work,
            Ok(_) => {
                if context.pause("its turn to read", AGAIN).await.is_some() {
                    return TaskEnd::Released(None);
                }
            }
            Err(Idle::Over) => return TaskEnd::Completed,
            Err(Idle::NoSnapshot) => return TaskEnd::Released(None),
        }
    };
    let span = spans::read_chunk(&context.task.flow, *run, *chunk, &work.relation.relation);
    let reading = read(context, demand, *run, *chunk, &work).instrument(span.clone());
    let read = tokio::select! {
        read = reading => read.map(Some),
        _ = context.ending() => Ok(None),
        why = outlived(context, *run, &work.generation) => {
            tracing::info!(task = %context.task, why, "the chunk is given back");
            Ok(None)
        }
    };
    let error = match read {
        // Not cut off: what is on its way to etcd may be done.
        Ok(Some(done)) => match mark(context, *run, *chunk, &done).instrument(span.clone()).await {
            Ok(ChunkOutcome::Ours) => {
                metrics::chunk_read(&context.task.flow, done.rows, done.bytes, Duration::from_millis(done.took_ms));
                spans::packed(&span, done.rows, done.bytes);
                tracing::debug!(task = %context.task, rows = done.rows, bytes = done.bytes, parts = done.parts, "chunk read");
                return TaskEnd::Completed;
            }
            Ok(ChunkOutcome::Theirs(_)) => {
                discard(context, *run, *chunk).await;
                return TaskEnd::Completed;
            }
            // These parts may be the chunk. If they are not, they go with the run.
            Err(error) => error,
        },
        Ok(None) => {
            drop(span);
            discard(context, *run, *chunk).await;
            return TaskEnd::Released(None);
        }
        Err(error) => {
            discard(context, *run, *chunk).await;
            error
        }
    };
    wallaby_telemetry::failed(&span, &error);
    // What comes now is waiting.
    drop(span);
    failed(context, *run, &work, &error).await
}

/// Whether the chunk may be read now: not while so many readers came before this one that they take all that may be read. Whoever
/// owns a chunk came before those that do not see its lock yet, so the readers agree. The controller offers no more than may be read,
/// by what it sees; this holds whatever it saw.
async fn is_next(context: &TaskContext, run: RunId, spec: &RunSpec) -> bool {
    let Some(throttled) = Throttled::of(spec) else { return true };
    if throttled.readers >= spec.readers as usize {
        return true;
    }
    context.pulse.wait("etcd");
    let Ok(locks) = context.shared.coordination.locks(&context.task.flow).await else { return false };
    let reads = |lock: &&LockEntry| matches!(&lock.task.kind, TaskKind::Chunk(of, _) if *of == run);
    let before = locks.iter().filter(reads).filter(|lock| lock.create_revision < context.lock.create_revision());
    before.count() < throttled.readers
}

/// Looks the chunk up in the plan; waits a little for a snapshot.
async fn find(context: &TaskContext, run: RunId, chunk: ChunkId) -> Result<Work, Idle> {
    let mut changes = context.runs.changes();
    let deadline = Instant::now() + PLAN_PATIENCE;
    loop {
        changes.borrow_and_update();
        let found = context.runs.run(&context.task.flow, run, |view| work_of(view, chunk));
        match found {
            Some(Ok(work)) => return Ok(work),
            Some(Err(Idle::Over)) => return Err(Idle::Over),
            // The watch may not have the run yet.
            Some(Err(Idle::NoSnapshot)) | None => {}
        }
        context.pulse.wait("a snapshot to read under");
        let left = deadline.saturating_duration_since(Instant::now());
        tokio::select! {
            _ = context.ending() => return Err(Idle::NoSnapshot),
            changed = tokio::time::timeout(left, changes.changed()) => match changed {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(Idle::NoSnapshot),
            },
        }
    }
}

/// Returns when a chunk is no longer to be read under its snapshot, and why: nobody wants it now, or the run has given the snapshot up,
/// because it was held for as long as it may be.
async fn outlived(context: &TaskContext, run: RunId, generation: &Generation) -> &'static str {
    let mut changes = context.runs.changes();
    let mut given_up = None;
    loop {
        changes.borrow_and_update();
        let state = context.runs.run(&context.task.flow, run, |view| {
            let is_wanted = view.is_open() && view.spec.as_ref().is_some_and(|spec| spec.wish == RunWish::Go);
            let snapshot = view.plan.as_ref().and_then(RunPlan::snapshot);
            is_wanted.then_some(snapshot.is_some_and(|snapshot| snapshot.number == generation.number))
        });
        given_up = match state.flatten() {
            None => return "the run is paused or over",
            Some(true) => None,
            Some(false) => given_up.or_else(|| Some(Instant::now())),
        };
        let outlives = async {
            match given_up {
                Some(at) => tokio::time::sleep_until((at + OUTLIVES_MAX.min(age_max(context))).into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return "nobody watches any more" },
            () = outlives => return "its snapshot was given up a while ago",
        }
    }
}

fn work_of(view: &RunView, chunk: ChunkId) -> Result<Work, Idle> {
    let (Some(spec), Some(plan)) = (&view.spec, &view.plan) else { return Err(Idle::NoSnapshot) };
    let relation = plan.relations.get(chunk.table as usize).ok_or(Idle::Over)?;
    let is_over = view.chunks.contains_key(&chunk)
        || plan.state.is_over()
        || spec.wish == RunWish::Cancel
        || relation.restart != chunk.restart
        || relation.state == RelationState::Gone
        || chunk.number >= relation.chunks();
    if is_over {
        return Err(Idle::Over);
    }
    match plan.snapshot() {
        Some(generation) if spec.wish == RunWish::Go => {
            Ok(Work { relation: relation.clone(), generation: generation.clone(), spec: spec.clone() })
        }
        _ => Err(Idle::NoSnapshot),
    }
}

/// Reads the chunk into the side store; what is to be said of it.
async fn read(
    context: &Arc<TaskContext>,
    demand: &SourceDemand,
    run: RunId,
    chunk: ChunkId,
    work: &Work,
) -> Result<ChunkDone, CaptureError> {
    context.pulse.wait("etcd");
    let epoch = context.lock.fix_epoch(None).await?;
    context.status.epoch(epoch);
    context.status.phase(TaskPhase::Streaming);
    let config =
        ConnectConfig::parse(&secret::resolve(&demand.dsn)?)?.with_application_name(&context.task.session_name(epoch));
    context.pulse.wait("the side store");
    let log = context.log_spec().ok_or(CaptureError::Invalid)?;
    let side = context.shared.side(&context.task.flow, &log).await?;
    side.ensure(Shelf::Chunks).await?;
    let begun = Instant::now();
    let mut parts = Parts::new(context, log.codec, Arc::clone(&side), run, chunk, epoch);
    context.pulse.wait("the source");
    let request = ChunkRequest {
        snapshot: work.generation.snapshot.clone().unwrap_or_default(),
        consistent_point: work.generation.consistent_point,
        exported_at: work.generation.exported_at,
        publication: demand.publication.clone(),
        relation: work.relation.clone(),
        number: chunk.number,
        part_bytes: side.part_bytes_target(),
        rows_per_second: Throttled::of(&work.spec).map(|throttled| throttled.rows_per_second),
    };
    let outcome = match read_chunk(&config, &request, &mut parts).await {
        Ok(_) => parts.puts.settled().await.map_err(CaptureError::from),
        Err(error) => Err(error),
    };
    match outcome {
        Err(CaptureError::Staging(StagingError::SideFull { max, .. })) if parts.bytes > max => {
            return Err(CaptureError::ChunkTooLarge { table: work.relation.relation.clone(), max });
        }
        outcome => outcome?,
    }
    let done = ChunkDone {
        attempt: epoch,
        consistent_point: work.generation.consistent_point,
        parts: parts.number,
        rows: parts.rows,
        bytes: parts.bytes,
        checksum: part_checksum(&parts.checksums),
        worker: context.shared.session.worker().clone(),
        took_ms: begun.elapsed().as_millis() as u64,
    };
    if !context.is_valid_now() {
        return Err(CaptureError::Invalid);
    }
    Ok(done)
}

/// Marks the chunk as read. It is tried until etcd says what came of it, also when the task is to end: a mark that nobody heard of may be
/// done, and what it names must stay. Where etcd stays away, the lease ends this.
async fn mark(
    context: &TaskContext,
    run: RunId,
    chunk: ChunkId,
    done: &ChunkDone,
) -> Result<ChunkOutcome, CaptureError> {
    let error = loop {
        context.pulse.wait("etcd");
        match put_mark(context, run, chunk, done).await {
            Ok(outcome) => return Ok(outcome),
            Err(error) if error.is_transient() && context.is_valid_now() => tokio::time::sleep(AGAIN).await,
            Err(error) => break error,
        }
    };
    // An earlier try may have been done.
    match context.shared.coordination.run_chunk(&context.task.flow, run, chunk).await {
        Ok(Some(stands)) if stands == *done => Ok(ChunkOutcome::Ours),
        Ok(Some(stands)) => Ok(ChunkOutcome::Theirs(stands)),
        Ok(None) | Err(_) => Err(error.into()),
    }
}

async fn put_mark(
    context: &TaskContext,
    run: RunId,
    chunk: ChunkId,
    done: &ChunkDone,
) -> Result<ChunkOutcome, wallaby_coordination::Error> {
    let outcome = context.lock.put_chunk_done(run, chunk, done).await;
    context.stop_at(Failpoint::StopAfterChunkMarked).await;
    if context.shared.failpoints.fires_once(Failpoint::LoseChunkMark) {
        let (endpoints, cause) = (String::new(), "a test wants it".to_owned());
        return Err(wallaby_coordination::Error::Unreachable { endpoints, doing: "marking a chunk as done", cause });
    }
    outcome
}

/// The parts on their way into the side store.
struct Parts<'a> {
    context: &'a TaskContext,
    codec: Codec,
    puts: Puts,
    run: RunId,
    chunk: ChunkId,
    attempt: Epoch,
    number: u32,
    rows: u64,
    bytes: u64,
    checksums: Vec<u8>,
}

impl<'a> Parts<'a> {
    fn new(
        context: &'a TaskContext,
        codec: Codec,
        side: Arc<dyn SideStore>,
        run: RunId,
        chunk: ChunkId,
        attempt: Epoch,
    ) -> Parts<'a> {
        let puts = Puts::new(side, context.shared.chunk_puts.clone());
        Parts { context, codec, puts, run, chunk, attempt, number: 0, rows: 0, bytes: 0, checksums: Vec::new() }
    }
}

impl PartSink for Parts<'_> {
    type Error = CaptureError;

    async fn huge_row(&mut self, bytes: usize) -> Option<Place> {
        if bytes <= self.context.shared.chunk_puts.bytes() {
            return None;
        }
        self.context.pulse.wait("its turn to pack a huge row");
        let turn = self.context.shared.huge_rows.wait(&self.context.task).await;
        self.context.pulse.wait("the source");
        turn
    }

    async fn part(&mut self, body: SegmentBody) -> Result<(), CaptureError> {
        let rows = body.rows() as u64;
        if body.tables.iter().map(TableChanges::bytes).sum::<usize>() > self.context.shared.chunk_puts.bytes() {
            // It goes alone, and is in memory twice and more while it is packed: not beside others on their way.
            self.context.pulse.wait("room in the side store");
            self.puts.settled().await?;
        }
        let packed = wallaby_wire::encode(&body, self.codec)?;
        drop(body);
        let key = SideKey::ChunkPart { run: self.run, chunk: self.chunk, attempt: self.attempt, number: self.number };
        self.checksums.extend_from_slice(&part_checksum(&packed).to_le_bytes());
        self.rows += rows;
        self.bytes += packed.len() as u64;
        self.number += 1;
        self.context.stop_at(Failpoint::StopBeforeChunkPart).await;
        self.context.pulse.wait("room in the side store");
        self.puts.put(key, packed).await?;
        self.context.pulse.wait("the source");
        Ok(())
    }
}

/// Removes the parts of this attempt. What arrives late goes with the run.
async fn discard(context: &TaskContext, run: RunId, chunk: ChunkId) {
    let (Some(epoch), Some(log)) = (context.lock.epoch(), context.log_spec()) else { return };
    let removed = async {
        let side = context.shared.side(&context.task.flow, &log).await?;
        side.delete(SideGroup::ChunkAttempt(run, chunk, epoch)).await
    };
    if let Err(error) = removed.await {
        tracing::debug!(task = %context.task, %error, "the parts of an attempt stay until the run is over");
    }
}

/// Waits before the task is given back, by what went wrong.
async fn failed(context: &TaskContext, run: RunId, work: &Work, error: &CaptureError) -> TaskEnd {
    let said = error.to_string();
    context.status.backoff(&said, AGAIN);
    if error.directive() == Directive::GiveUp {
        return TaskEnd::GivenUp(said);
    }
    match error {
        CaptureError::Source(
            SourceError::Rewritten { .. } | SourceError::RelationGone { .. } | SourceError::SnapshotGone { .. },
        ) => {
            // The run's owner sees it too, and makes the plan over.
            tracing::debug!(task = %context.task, error = %said, "the chunk waits for another plan");
            other_plan(context, run, &work.generation).await;
        }
        CaptureError::Staging(StagingError::SideFull { .. }) => {
            tracing::info!(task = %context.task, "the side store is full: the chunk waits until sinks have taken others");
            context.status.waiting(Some("room in the side store"));
            context.pause("room in the side store", FULL_AGAIN).await;
        }
        _ => {
            tracing::warn!(task = %context.task, error = %said, "reading a chunk failed");
            context.pause("the next try", AGAIN).await;
        }
    }
    TaskEnd::Released(None)
}

/// Waits until the run's plan has another export than the one that failed, or for a while.
async fn other_plan(context: &TaskContext, run: RunId, failed: &Generation) {
    let mut changes = context.runs.changes();
    context.pulse.wait("the run's owner to export another snapshot");
    let changed = async {
        loop {
            changes.borrow_and_update();
            let is_same = context.runs.run(&context.task.flow, run, |view| {
                let last = view.plan.as_ref().and_then(|plan| plan.generations.last());
                last.is_some_and(|last| last.number == failed.number && last.snapshot.is_some())
            });
            if is_same != Some(true) || changes.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = context.ending() => {}
        _ = tokio::time::timeout(PLAN_PATIENCE, changed) => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::run::RunReason;

    #[test]
    fn all_readers_together_take_no_more_than_was_asked_for() {
        let of = |rows_per_second, readers| {
            Throttled::of(&RunSpec {
                reason: RunReason::Asked,
                tables: Vec::new(),
                exclude: Vec::new(),
                sinks: Vec::new(),
                wish: RunWish::Go,
                rows_per_second,
                readers,
                created_at: Timestamp(0),
            })
        };
        assert_eq!(of(None, 4), None);
        for rows in 1..50 {
            for readers in 1..20 {
                let throttled = of(Some(rows), readers).unwrap();
                let all = throttled.readers as u64 * throttled.rows_per_second;
                assert!((1..=rows).contains(&all), "{readers} readers of {rows} rows a second: {throttled:?}");
                assert!(throttled.readers as u32 <= readers && rows - all < u64::from(readers), "{throttled:?}");
            }
        }
        assert_eq!(of(Some(1000), 4), Some(Throttled { readers: 4, rows_per_second: 250 }));
        assert_eq!(of(Some(3), 4), Some(Throttled { readers: 3, rows_per_second: 1 }));
    }
}
