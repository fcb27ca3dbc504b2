//! The owner of a snapshot run: publication, hold on the log, exported snapshot, plan.
//!
//! The order is the safety: the publication names the tables, then the log is held from its end, then the snapshot is exported: so
//! every change from C on is in the log and stays there until the sinks have taken the tables over. What is next is decided by
//! `core.rs` from the plan, the chunks that are read, and the session; a successor finds the same in etcd and exports anew what it
//! needs.

mod core;
mod crowded;
mod export;
mod slot;
pub mod sweep;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wallaby_coordination::{Error as EtcdError, Hold};
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::run::{ChunkDone, RunPlan, RunState, RunWish};
use wallaby_model::{ChunkId, Position, Reader, RunId, SinkId, TaskId, TaskKind};
use wallaby_staging::{Shelf, SideGroup, SideStore};

use self::core::{Situation, Step};
use self::crowded::{Crowd, Crowding};
pub use self::export::age_max;
use self::export::{CHUNKS_PER_SNAPSHOT, Export};
use crate::backoff::Backoff;
use crate::capture::{CaptureError, Directive};
use crate::detach::detach;
use crate::failpoint::Failpoint;
use crate::flows::{Demand, SourceDemand};
use crate::metrics;
use crate::runs::FlowRuns;
use crate::status::now;
use crate::task::{Ending, TaskContext, TaskEnd};

/// How often it is looked whether a relation was rewritten, and whether the session lives.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Changes are looked at no more often than this: thousands of chunks come in.
const PACE: Duration = Duration::from_millis(100);
/// How often it is looked which attempts of dead readers fill the side store: that lists every part of it.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// Chunks that are removed from the side store between two looks.
const REMOVED_AT_ONCE: usize = 64;
/// How long the watch may take to show what was just read.
const WATCH_PATIENCE: Duration = Duration::from_secs(5);

/// How one session of the owner ended by itself.
enum End {
    /// The run is over, and everything that was kept for it is gone.
    Over,
    /// The task was asked to end.
    Asked,
}

/// Runs the task to its end.
pub async fn run(context: &Arc<TaskContext>) -> TaskEnd {
    let (Demand::Run(demand), TaskKind::Run(run)) = (&context.demand, &context.task.kind) else {
        return TaskEnd::Released(None);
    };
    let mut backoff = Backoff::default();
    loop {
        let error = match session(context, demand, *run, &mut backoff).await {
            Ok(End::Over) => return TaskEnd::Completed,
            Ok(End::Asked) => return TaskEnd::Released(None),
            Err(error) => error,
        };
        let said = error.to_string();
        context.status.condition(ConditionType::SnapshotComplete, false, error.reason(), &said);
        let ending = match error.directive() {
            Directive::GiveUp => return TaskEnd::GivenUp(said),
            Directive::Retry | Directive::Again => {
                let delay = backoff.next_delay();
                tracing::warn!(task = %context.task, error = %said, retry_in_ms = delay.as_millis() as u64, "the run failed");
                context.status.backoff(&said, delay);
                context.pause("the next try", delay).await
            }
            Directive::Stop => {
                tracing::error!(task = %context.task, error = %said, "the run stopped and waits for a person");
                context.status.stopped(&said);
                let ending = match is_cancelled(context, *run) {
                    // What is in the way of ending it may go away by itself.
                    true => context.pause("the next try to cancel", backoff.next_delay()).await,
                    false => {
                        context.pulse.wait("a person (wallaby resume, or wallaby snapshot cancel)");
                        tokio::select! {
                            ending = context.ending_or_resume() => (ending != Ending::ResumeAsked).then_some(ending),
                            () = cancelled(context, *run) => None,
                        }
                    }
                };
                context.pulse.beat();
                ending
            }
        };
        if ending.is_some() {
            return TaskEnd::Released(None);
        }
    }
}

fn is_cancelled(context: &TaskContext, run: RunId) -> bool {
    let wish = context.runs.run(&context.task.flow, run, |view| view.spec.as_ref().map(|spec| spec.wish));
    wish.flatten() == Some(RunWish::Cancel)
}

/// Returns once the run is cancelled.
async fn cancelled(context: &TaskContext, run: RunId) {
    let mut changes = context.runs.changes();
    while !is_cancelled(context, run) {
        if changes.changed().await.is_err() {
            // Nobody watches any more: the task is about to be ended.
            std::future::pending::<()>().await;
        }
    }
}

/// What the owner holds.
struct Owner<'a> {
    context: &'a Arc<TaskContext>,
    demand: &'a SourceDemand,
    run: RunId,
    plan: RunPlan,
    side: Arc<dyn SideStore>,
    export: Option<Export>,
    is_outdated: bool,
    waits_for_slot: bool,
    /// Chunks whose parts are removed: every sink has them, or nobody wants them.
    removed: BTreeSet<ChunkId>,
    /// When the parts of dead readers were looked for last.
    swept_at: Option<Instant>,
    /// Who keeps the side store full.
    crowding: Crowding,
}

async fn session(
    context: &Arc<TaskContext>,
    demand: &SourceDemand,
    run: RunId,
    backoff: &mut Backoff,
) -> Result<End, CaptureError> {
    context.pulse.wait("etcd");
    let epoch = context.lock.fix_epoch(None).await?;
    context.status.epoch(epoch);
    metrics::epoch(&context.task, epoch);
    let entry = match context.shared.coordination.run(&context.task.flow, run).await {
        Ok(entry) => entry,
        Err(EtcdError::RunNotFound { .. }) => return Ok(End::Over),
        Err(error) => return Err(error.into()),
    };
    seen_by_watch(context, run, entry.plan.as_ref()).await;
    context.pulse.wait("the side store");
    let side = open_side(context).await?;
    if !demand.is_captured {
        // There is no capture whose owner would do it.
        let swept = sweep::sweep_chunks(&context.shared.coordination, &context.task.flow, side.as_ref()).await?;
        if !swept.is_empty() {
            tracing::info!(flow = %context.task.flow, groups = swept.len(), "swept the side store");
        }
    }
    let plan = entry.plan.unwrap_or_default();
    let mut owner = Owner {
        context,
        demand,
        run,
        plan,
        side,
        export: None,
        is_outdated: false,
        waits_for_slot: false,
        removed: BTreeSet::new(),
        swept_at: None,
        crowding: Crowding::default(),
    };
    owner.waits_for_slot = owner.demand.is_captured && slot::holds_too_much(context, run, false).await;
    let end = owner.serve(backoff).await;
    if !matches!(end, Ok(End::Over)) && owner.plan.snapshot().is_some() {
        // Nobody should try to read under a snapshot that goes with this session.
        owner.export = None;
        if let Err(error) = owner.without_snapshot("its owner ended").await {
            tracing::debug!(task = %context.task, %error, "the plan still names a snapshot that is gone");
        }
    }
    end
}

/// The side store, as large as the flow says now.
async fn open_side(context: &TaskContext) -> Result<Arc<dyn SideStore>, CaptureError> {
    let log = context.log_spec().ok_or(CaptureError::Invalid)?;
    Ok(context.shared.side(&context.task.flow, &log).await?)
}

/// Waits a moment until the watch has what was just read, so that nothing is done twice.
async fn seen_by_watch(context: &TaskContext, run: RunId, plan: Option<&RunPlan>) {
    let mut changes = context.runs.changes();
    let is_seen =
        || context.runs.run(&context.task.flow, run, |view| view.spec.is_some() && view.plan.as_ref() == plan);
    let seen = async { while is_seen() != Some(true) && changes.changed().await.is_ok() {} };
    let _late_is_harmless = tokio::time::timeout(WATCH_PATIENCE, seen).await;
}

impl Owner<'_> {
    async fn serve(&mut self, backoff: &mut Backoff) -> Result<End, CaptureError> {
        let context = self.context;
        let ending = context.ending();
        tokio::pin!(ending);
        let mut changes = context.runs.changes();
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if !context.is_valid_now() {
                return Err(CaptureError::Invalid);
            }
            changes.borrow_and_update();
            match self.next() {
                Step::Export(why) => {
                    let asked = tokio::select! {
                        exported = self.export_anew(why) => { exported?; None }
                        ending = &mut ending => Some(ending),
                    };
                    if asked.is_some() {
                        return Ok(End::Asked);
                    }
                    backoff.reset();
                    continue;
                }
                Step::GiveUp(why) => {
                    self.export = None;
                    self.without_snapshot(why).await?;
                    continue;
                }
                Step::BeginLoading => {
                    self.export = None;
                    self.plan.state = RunState::Loading;
                    self.without_snapshot("every chunk is read; the sinks load on").await?;
                    tracing::info!(task = %context.task, chunks = self.plan.chunks().count(), "every chunk is read");
                    continue;
                }
                Step::End(state) => {
                    self.end(state).await?;
                    return Ok(End::Over);
                }
                Step::Wait(what) => self.say_waiting(what),
            }
            let paced = async {
                tokio::time::sleep(PACE).await;
                changes.changed().await.is_ok()
            };
            tokio::select! {
                _ = &mut ending => return Ok(End::Asked),
                _ = looks.tick() => self.look().await?,
                lives = paced => if !lives { return Ok(End::Asked) },
                why = ended(self.export.as_ref()) => {
                    tracing::warn!(task = %context.task, why, "the session that holds the snapshot ended");
                    self.export = None;
                    self.without_snapshot("the session that held the snapshot ended").await?;
                }
            }
            context.pulse.beat();
        }
    }

    /// What is next, by what is known now.
    fn next(&self) -> Step {
        let context = self.context;
        let sinks = self.sinks();
        context.runs.of(&context.task.flow, |runs: &FlowRuns| {
            let Some((view, spec)) = runs.runs.get(&self.run).and_then(|view| Some((view, view.spec.as_ref()?))) else {
                return Step::Wait("the run's specification");
            };
            let is_done = |sink: &SinkId| view.sinks.get(sink).is_some_and(|state| state.is_done);
            core::next(Situation {
                wish: spec.wish,
                plan: &self.plan,
                done: &view.chunks,
                lost: &view.lost,
                session: self
                    .export
                    .as_ref()
                    .map(|export| core::Session { age: export.age(), is_outdated: self.is_outdated }),
                age_max: age_max(context),
                waits_for_slot: self.waits_for_slot,
                sinks_open: sinks.iter().filter(|sink| !is_done(sink)).count(),
                is_unwanted: sinks.is_empty(),
            })
        })
    }

    fn say_waiting(&self, what: &'static str) {
        let context = self.context;
        context.pulse.wait(what);
        context.status.waiting(Some(what));
        context.status.phase(TaskPhase::Streaming);
        context.status.condition(ConditionType::SnapshotComplete, false, "Running", what);
    }

    /// Exports a snapshot and writes the plan for it. Safe to cut off: nothing counts before the plan is written.
    async fn export_anew(&mut self, why: &'static str) -> Result<(), CaptureError> {
        let context = self.context;
        let Some(spec) = context.runs.run(&context.task.flow, self.run, |view| view.spec.clone()).flatten() else {
            return Ok(());
        };
        self.export = None;
        if self.plan.snapshot().is_some() {
            self.without_snapshot(why).await?;
        }
        tracing::info!(task = %context.task, why, "exporting a snapshot");
        // It may have been given more room.
        self.side = open_side(context).await?;
        self.side.ensure(Shelf::Chunks).await?;
        let (export, generation, fresh) = Export::make(context, self.demand, self.run, &spec, &self.plan).await?;
        context.stop_at(Failpoint::StopBeforePlan).await;
        let replanned = context.runs.run(&context.task.flow, self.run, |view| {
            let known = core::Known { done: &view.chunks, lost: &view.lost, may_mix: self.demand.is_captured };
            core::replan(self.plan.clone(), fresh, generation.clone(), known)
        });
        let Some(plan) = replanned else { return Ok(()) };
        self.plan = plan;
        self.write("chunks are read").await?;
        self.export = Some(export);
        self.is_outdated = false;
        tracing::info!(
            task = %context.task, generation = generation.number, consistent_point = %generation.consistent_point,
            relations = self.plan.relations.len(), chunks = self.plan.chunks().count(), "a snapshot was exported"
        );
        Ok(())
    }

    /// Looks whether what is still to be read was rewritten or dropped, and at the figures.
    async fn look(&mut self) -> Result<(), CaptureError> {
        let context = self.context;
        let chunks = context.runs.run(&context.task.flow, self.run, |view| view.chunks.clone()).unwrap_or_default();
        let age = self.export.as_ref().map_or(Duration::ZERO, |export| export.age());
        metrics::run(&context.task.flow, self.run, self.plan.chunks().count(), chunks.len(), age);
        let rows = chunks.values().map(|done| done.rows).sum();
        let bytes = chunks.values().map(|done| done.bytes).sum();
        context.status.progress(|progress| (progress.rows, progress.bytes) = (rows, bytes));
        match self.side.usage(Shelf::Chunks).await {
            Ok(usage) => {
                metrics::side_store(&context.task.flow, "chunks", usage.bytes);
                // Runs that have chunks to read share it, so one of several never fills it.
                let reading = context.runs.of(&context.task.flow, FlowRuns::reading).max(1) as u64;
                if usage.bytes > usage.bytes_max / (2 * reading) {
                    self.make_room(&chunks).await;
                    self.sweep_attempts().await;
                    self.cut_off_keepers().await;
                } else {
                    self.crowding.is_over();
                }
            }
            // Nor can a sink get its chunks.
            Err(_) => self.crowding.is_over(),
        }
        if self.demand.is_captured {
            move_hold(context, &self.plan, self.run).await?;
            self.waits_for_slot = slot::holds_too_much(context, self.run, self.waits_for_slot).await;
        }
        if let Some(export) = &self.export {
            let open: Vec<_> = core::unfinished(&self.plan, &chunks).map(|(_, relation)| relation).collect();
            self.is_outdated = export.is_outdated(&open).await?;
        }
        Ok(())
    }

    /// Removes parts of chunks that every sink of the run has: a run may be larger than the side store. A sink that turns out not
    /// to have one after all reports it as lost.
    async fn make_room(&mut self, chunks: &BTreeMap<ChunkId, ChunkDone>) {
        let context = self.context;
        let sinks = self.sinks();
        let taken: Vec<ChunkId> = context.runs.of(&context.task.flow, |runs| {
            let Some(view) = runs.runs.get(&self.run) else { return Vec::new() };
            let has = |sink: &SinkId, chunk: &ChunkId| {
                view.loaded.get(sink).is_some_and(|loaded| loaded.contains(chunk))
                    || view.sinks.get(sink).is_some_and(|state| state.is_done)
            };
            // Also those of a table that was started again: nobody wants them.
            let is_taken = |chunk: &&ChunkId| !self.plan.has(**chunk) || sinks.iter().all(|sink| has(sink, chunk));
            chunks
                .keys()
                .filter(|chunk| !self.removed.contains(chunk))
                .filter(is_taken)
                .take(REMOVED_AT_ONCE)
                .copied()
                .collect()
        });
        if sinks.is_empty() {
            return;
        }
        for chunk in taken {
            let Some(done) = chunks.get(&chunk) else { continue };
            if let Err(error) = self.side.delete(SideGroup::ChunkAttempt(self.run, chunk, done.attempt)).await {
                tracing::debug!(task = %context.task, %chunk, %error, "parts that every sink has were not removed yet");
                return;
            }
            self.removed.insert(chunk);
        }
    }

    /// Removes what readers left that died.
    async fn sweep_attempts(&mut self) {
        if self.swept_at.is_some_and(|at| at.elapsed() < SWEEP_EVERY) {
            return;
        }
        self.swept_at = Some(Instant::now());
        let context = self.context;
        let (flow, side) = (&context.task.flow, self.side.as_ref());
        match sweep::sweep_attempts(&context.shared.coordination, flow, self.run, &self.plan, side).await {
            Ok(swept) if swept.is_empty() => {}
            Ok(swept) => {
                tracing::info!(task = %context.task, attempts = swept.len(), "removed the parts of readers that are gone")
            }
            Err(error) => {
                tracing::debug!(task = %context.task, %error, "parts of readers that are gone were not removed yet")
            }
        }
    }

    /// Cuts off the sinks that keep the side store full while others of this run wait for the rest of it.
    async fn cut_off_keepers(&mut self) {
        let context = self.context;
        let (flow, sinks) = (&context.task.flow, self.sinks());
        let specs = context.flows.borrow().get(flow).map(|known| known.record.document.spec.sinks.clone());
        let Some((mut crowd, is_slow)) = context.runs.of(flow, |runs| {
            let view = runs.runs.get(&self.run)?;
            let is_read = self.plan.chunks().all(|chunk| view.chunks.contains_key(&chunk));
            let has_all = sinks.iter().any(|sink| view.lacks(sink) == 0);
            let is_waited_for = self.export.is_some() && !is_read && has_all;
            let is_slow = view.spec.as_ref().is_some_and(|spec| spec.rows_per_second.is_some());
            let crowd = Crowd { read: view.chunks.len(), is_waited_for, keepers: crowded::keepers(runs, &specs?) };
            Some((crowd, is_slow))
        }) else {
            return;
        };
        if crowd.is_waited_for && !crowd.keepers.is_empty() {
            match context.shared.coordination.locks(flow).await {
                Ok(locks) => {
                    crowd.keepers.retain(|keeper| keeper.is_to_blame(locks.iter().map(|lock| &lock.task.kind)))
                }
                Err(_) => return self.crowding.is_over(),
            }
        }
        let mut patience = context.shared.options.sink_patience.0;
        if is_slow {
            // One chunk may take as long without a want of room.
            patience += age_max(context) / CHUNKS_PER_SNAPSHOT;
        }
        let ripe = self.crowding.ripe(&crowd, Instant::now(), patience);
        if ripe.is_empty() {
            return;
        }
        let reason =
            |_: &Hold| "it took no rows of its load, and the side store has no room for those of the others".to_owned();
        let cut_off = async {
            let holds = context.shared.coordination.holds(flow).await?;
            for sink in &ripe {
                detach(&context.lock, sink, &holds, reason).await?;
            }
            Ok::<_, EtcdError>(())
        };
        // No reason to give the snapshot up: the next look tries again, or finds that the lock is lost.
        if let Err(error) = cut_off.await {
            tracing::debug!(task = %context.task, %error, "a sink that keeps the side store full was not cut off");
        }
    }

    /// The sinks that the run loads into. One that was cut off from the log is out of the runs before the one that brings it back.
    fn sinks(&self) -> Vec<SinkId> {
        let context = self.context;
        let sinks: Vec<SinkId> = match context.flows.borrow().get(&context.task.flow) {
            Some(flow) => flow.record.document.spec.sinks.iter().map(|sink| sink.name.clone()).collect(),
            None => Vec::new(),
        };
        context.runs.of(&context.task.flow, |runs: &FlowRuns| {
            let spec = runs.runs.get(&self.run).and_then(|view| view.spec.as_ref());
            let is_in =
                |sink: &SinkId| spec.is_some_and(|spec| spec.loads_into(sink)) && !runs.is_out_of(self.run, sink);
            sinks.into_iter().filter(is_in).collect()
        })
    }

    async fn without_snapshot(&mut self, message: &str) -> Result<(), CaptureError> {
        for generation in &mut self.plan.generations {
            generation.snapshot = None;
        }
        self.write(message).await
    }

    async fn write(&mut self, message: &str) -> Result<(), CaptureError> {
        self.stamp(message);
        Ok(self.context.lock.put_plan(self.run, &self.plan).await?)
    }

    fn stamp(&mut self, message: &str) {
        self.plan.message = message.to_owned();
        self.plan.epoch = self.context.lock.epoch().unwrap_or_default();
        self.plan.at = now();
    }

    /// Ends the run: first what is kept for it goes, then it is said, then the rest of its keys goes.
    async fn end(&mut self, state: RunState) -> Result<(), CaptureError> {
        let context = self.context;
        self.export = None;
        context.pulse.wait("the side store");
        self.side.delete(SideGroup::Run(self.run)).await?;
        for generation in &mut self.plan.generations {
            generation.snapshot = None;
        }
        self.plan.state = state;
        let wish = context.runs.run(&context.task.flow, self.run, |view| view.spec.as_ref().map(|spec| spec.wish));
        self.stamp(match (state, wish.flatten()) {
            (RunState::Done, _) => "every sink took every table over",
            (_, Some(RunWish::Cancel)) => "cancelled",
            _ => "no sink wants it any more",
        });
        context.stop_at(Failpoint::StopBeforeRunFinished).await;
        context.pulse.wait("etcd");
        context.lock.finish_run(self.run, &self.plan).await?;
        context.stop_at(Failpoint::StopAfterRunFinished).await;
        context.shared.coordination.clear_run(&context.task.flow, self.run).await?;
        tracing::info!(task = %context.task, ?state, "the run is over");
        Ok(())
    }
}

/// From where on a run needs the log, as far as the log goes: nothing before its first snapshot. A capture that is far behind the
/// source comes to that only later, and a log that was held from where it ended before would be full until then. `None` when there is
/// nothing yet to go by.
///
/// # Errors
/// When etcd cannot be reached.
async fn needed_from(context: &TaskContext, plan: &RunPlan) -> Result<Option<Position>, EtcdError> {
    let Some(first) = plan.generations.first() else { return Ok(None) };
    let capture = TaskId::capture(&context.task.flow);
    let staged = context.shared.coordination.checkpoint(&capture).await?.and_then(|checkpoint| checkpoint.position);
    // No further than the log: a new reader begins at its end, and must not be behind what may be purged.
    Ok(staged.map(|staged| staged.min(Position::before(first.consistent_point))))
}

/// Moves the hold of a run, or of a sink that has no position before it, to where the run needs the log from. What keeps it from that
/// and may pass is no reason to give the snapshot up: it is tried again at the next look.
///
/// # Errors
/// When the ownership is lost, or what etcd has cannot be read.
pub async fn move_hold(context: &TaskContext, plan: &RunPlan, reader: impl Into<Reader>) -> Result<(), EtcdError> {
    let moved = match needed_from(context, plan).await {
        Ok(Some(position)) => context.lock.advance_hold(reader, position).await,
        other => other.map(drop),
    };
    match moved {
        // A sink that was cut off once more: its next run is waited for. A run that is over.
        Err(EtcdError::HoldGone { .. }) => Ok(()),
        Err(error) if error.is_transient() => Ok(()),
        other => other,
    }
}

/// Returns when the exporting session has ended; never when there is none.
async fn ended(export: Option<&Export>) -> String {
    match export {
        Some(export) => export.ended().await,
        None => std::future::pending().await,
    }
}
