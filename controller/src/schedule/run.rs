//! The loop around the core: looks at the view, publishes offers, and writes down what only the controller knows.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Election, FlowEntry, FlowStatus, wall_clock_now};
use wallaby_model::condition::Timestamp;
use wallaby_model::offer::Offer;
use wallaby_model::run::{RunReason, RunSpec, RunWish};
use wallaby_model::{FlowId, PoolId, RunId, SinkId, TaskId, TaskKind};

use super::core::{Scheduler, Situation};
use super::queue::OfferQueue;
use crate::backend::{Backend, Etcd};
use crate::metrics;
use crate::present;
use crate::runs::reattached_at;
use crate::view::View;

/// Offers on their way at a time.
const OFFERS_AT_ONCE: usize = 16;

/// How often status is written down and the queue is looked at, however quiet it is.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often the queue is checked while nothing fails.
const ENSURE_EVERY: Duration = Duration::from_secs(60);

/// A task that nobody takes for so long makes the leader ask whether the queue delivers.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);

/// More finished runs than this are forgotten, the oldest first.
const FINISHED_RUNS_KEPT: usize = 10;

/// A task that found an owner sooner is not worth a write.
const WORTH_SAYING: Duration = Duration::from_secs(2);

/// What the loop works with.
pub struct SchedulerParts {
    /// The servers.
    pub backend: Backend,
    /// etcd, reached.
    pub etcd: Etcd,
    /// Who schedules.
    pub election: Election,
    /// Whom tasks are offered to.
    pub pool: PoolId,
}

/// Schedules until the controller ends.
pub async fn run(parts: SchedulerParts, shutdown: CancellationToken) {
    let mut version = parts.etcd.view.version();
    let mut leadership = parts.election.changes();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    let started = Instant::now();
    let mut state = State { parts, scheduler: Scheduler::default(), queue: None, ensured_at: None, was_failing: false };
    // Each one at a time, beside this loop: their requests may take seconds each, and no offer waits for them.
    let mut housekeeping: Option<AbortOnDropHandle<()>> = None;
    let mut delivery: Option<AbortOnDropHandle<bool>> = None;
    loop {
        let wake_at = state.step(started).await;
        let wake = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(started + at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = version.changed() => if changed.is_err() { break },
            // An election that ended only means that this replica does not lead.
            Ok(()) = leadership.changed() => {}
            () = wake => {}
            _ = looks.tick() => {
                state.look_at_queue().await;
                if let Some(looked) = delivery.take_if(|looks| looks.is_finished()) {
                    let is_renewed = looked.await.unwrap_or_default();
                    if is_renewed {
                        state.scheduler.forget_offers();
                    }
                }
                if delivery.is_none() {
                    let queue = state.queue_in_doubt(started);
                    delivery = queue.map(|queue| AbortOnDropHandle::new(tokio::spawn(queue.renew_if_stuck())));
                }
                if housekeeping.as_ref().is_none_or(AbortOnDropHandle::is_finished) {
                    let house = state.house(started);
                    housekeeping = house.map(|house| AbortOnDropHandle::new(tokio::spawn(house.look_after())));
                }
            }
        }
    }
    drop(housekeeping);
    state.parts.election.resign().await;
}

struct State {
    parts: SchedulerParts,
    scheduler: Scheduler,
    queue: Option<OfferQueue>,
    ensured_at: Option<Instant>,
    was_failing: bool,
}

impl State {
    /// Offers what is due; when to do so again at the latest.
    async fn step(&mut self, started: Instant) -> Option<Duration> {
        if !self.parts.etcd.view.is_filled() {
            return None;
        }
        let is_leader = self.parts.election.is_leader();
        let situation = self.parts.etcd.view.with(|view| situation(view, is_leader));
        let unowned = situation.wanted.keys().filter(|task| !situation.owned.contains(*task)).count();
        let (flows, workers) = self.parts.etcd.view.with(|view| (view.flows().count(), view.workers().count()));
        metrics::seen(flows, workers, unowned, is_leader);
        let plan = self.scheduler.plan(&situation, started.elapsed());
        if !plan.offers.is_empty() {
            self.publish(plan.offers).await;
        }
        plan.wake_at
    }

    async fn publish(&mut self, offers: Vec<(TaskId, i64)>) {
        if !self.ensure_queue().await {
            return;
        }
        let Some(queue) = &self.queue else { return };
        let sends = offers.into_iter().map(|(task, spec_revision)| async move {
            let outcome = queue.offer(&Offer { task: task.clone(), spec_revision }).await;
            (task, outcome)
        });
        let outcomes: Vec<_> = futures::stream::iter(sends).buffer_unordered(OFFERS_AT_ONCE).collect().await;
        let mut first_error = None;
        for (task, outcome) in outcomes {
            match outcome {
                Ok(()) => {
                    metrics::offered();
                    tracing::debug!(%task, "offered");
                }
                Err(error) => {
                    metrics::offer_failed();
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            Some(error) => self.failing(&error.to_string()),
            None => {
                self.was_failing = false;
                self.parts.etcd.view.say_queue(None);
            }
        }
    }

    /// Makes the queue where it is not there. Whether it can be used.
    async fn ensure_queue(&mut self) -> bool {
        if self.ensured_at.is_some_and(|at| at.elapsed() < ENSURE_EVERY) {
            return true;
        }
        let Some(connections) = self.parts.backend.nats() else { return false };
        let fresh = || OfferQueue::new(connections.publish.clone(), self.parts.pool.clone());
        let queue = self.queue.get_or_insert_with(fresh);
        match queue.ensure().await {
            Ok(()) => {
                self.ensured_at = Some(Instant::now());
                self.parts.etcd.view.say_queue(None);
                true
            }
            Err(error) => {
                metrics::offer_failed();
                self.failing(&error.to_string());
                false
            }
        }
    }

    /// Whatever failed is tried again with the next offer; the queue may be gone, so it is looked at first.
    fn failing(&mut self, error: &str) {
        self.ensured_at = None;
        self.parts.etcd.view.say_queue(Some(error.to_owned()));
        if !self.was_failing {
            tracing::warn!(%error, "tasks cannot be offered; trying again");
        }
        self.was_failing = true;
    }

    /// The queue for workers that wait for it.
    async fn look_at_queue(&mut self) {
        if !self.parts.etcd.view.is_filled() {
            return;
        }
        if self.queue.is_none() || self.ensured_at.is_none() {
            let is_new = self.ensure_queue().await;
            if is_new {
                self.was_failing = false;
                self.scheduler.forget_offers();
            }
        }
    }

    /// The queue, if a task finds no owner for longer than an offer takes: it may not deliver.
    fn queue_in_doubt(&self, started: Instant) -> Option<OfferQueue> {
        let oldest = self.scheduler.unowned_since().map(|(_, since)| since).min()?;
        let waits = started.elapsed().saturating_sub(oldest) >= TAKEN_WITHIN;
        self.queue.clone().filter(|_| waits && self.parts.election.is_leader())
    }

    /// What the leader has to look after now.
    fn house(&self, started: Instant) -> Option<House> {
        if !self.parts.etcd.view.is_filled() || !self.parts.election.is_leader() {
            return None;
        }
        let elapsed = started.elapsed();
        let unowned_for =
            self.scheduler.unowned_since().map(|(task, since)| (task.clone(), elapsed.saturating_sub(since))).collect();
        Some(House { backend: self.parts.backend.clone(), etcd: self.parts.etcd.clone(), unowned_for })
    }
}

/// What is not urgent: what we know of each flow, runs that are over, sinks that were cut off, flows that can go.
struct House {
    backend: Backend,
    etcd: Etcd,
    unowned_for: BTreeMap<TaskId, Duration>,
}

impl House {
    async fn look_after(self) {
        let now = wall_clock_now();
        let (statuses, goners) =
            self.etcd.view.with(|view| (changed_statuses(view, &self.unowned_for, now), goners(view)));
        for (flow, status) in statuses {
            if let Err(error) = self.etcd.coordination.put_flow_status(&flow.flow, &status).await {
                tracing::debug!(flow = %flow.flow, %error, "the flow's status was not written; it is tried again");
                return;
            }
        }
        self.look_after_runs().await;
        for entry in goners {
            match self.etcd.coordination.remove_flow(&entry).await {
                Ok(()) => tracing::info!(flow = %entry.flow, "removed: it never captured anything"),
                Err(error) => tracing::debug!(flow = %entry.flow, %error, "not removed; it is tried again"),
            }
        }
    }

    /// A sink that was cut off again while it was loaded anew needs nothing of that run any more. `with` is the run that brings it back,
    /// which this, or another controller, made: what is seen here of the flow may be older, and newer, than that.
    async fn cancel_older_loads(&self, entry: &FlowEntry, sink: &SinkId, with: RunId) {
        for run in self.etcd.view.with(|view| older_loads(view, entry, sink, with)) {
            if let Err(error) = self.etcd.coordination.set_run_wish(&entry.flow, run, RunWish::Cancel).await {
                tracing::debug!(flow = %entry.flow, %run, %error, "the older run was not cancelled");
            }
        }
    }

    async fn look_after_runs(&self) {
        let coordination = &self.etcd.coordination;
        let Chores { leftovers, cut_off } = self.etcd.view.with(|view| chores(view, wall_clock_now()));
        for (flow, run) in leftovers {
            if let Err(error) = coordination.clear_run(&flow, run).await {
                tracing::debug!(%flow, %run, %error, "the run was not cleared; it is tried again");
            }
        }
        for (entry, sink) in cut_off {
            let flow = &entry.flow;
            let start = match self.backend.log_end(flow).await {
                Ok(start) => start,
                Err(error) => {
                    tracing::debug!(%flow, %sink, ?error, "the log's end cannot be read; it is tried again");
                    continue;
                }
            };
            match coordination.reattach_sink(&entry, &sink, start).await {
                Ok(run) => {
                    tracing::info!(%flow, %sink, %run, "the sink was detached and loads everything anew");
                    self.cancel_older_loads(&entry, &sink, run).await;
                }
                Err(error) => tracing::debug!(%flow, %sink, %error, "not reattached; it is tried again"),
            }
        }
    }
}

/// What there is to do about runs.
#[derive(Default)]
struct Chores {
    /// Runs that are over and whose chunks' keys still stand there.
    leftovers: Vec<(FlowId, RunId)>,
    /// Sinks that were cut off and have no run yet.
    cut_off: Vec<(FlowEntry, SinkId)>,
}

/// The open runs before `with` that load a sink anew.
fn older_loads(view: &View, entry: &FlowEntry, sink: &SinkId, with: RunId) -> Vec<RunId> {
    let is_of_sink = |spec: &RunSpec| spec.reason == RunReason::SinkAnew && spec.sinks == [sink.clone()];
    let open = view.runs(&entry.flow).filter(|(run, known)| *run < with && known.is_open());
    open.filter(|(_, known)| known.spec().is_some_and(is_of_sink)).map(|(run, _)| run).collect()
}

/// How far another machine's clock may be ahead of ours.
const AHEAD_MAX_MS: u64 = 60_000;

fn chores(view: &View, now: Timestamp) -> Chores {
    let Chores { mut leftovers, mut cut_off } = Chores::default();
    for entry in view.flows().filter(|entry| entry.record.deleting_since.is_none()) {
        let over = || view.runs(&entry.flow).filter(|(_, run)| run.is_over());
        let too_many = over().count() > FINISHED_RUNS_KEPT;
        let of_flow =
            over().filter(|(_, run)| too_many || run.has_leftovers()).map(|(run, _)| (entry.flow.clone(), run));
        leftovers.extend(of_flow);
        if entry.record.document.spec.paused {
            continue;
        }
        for sink in entry.record.document.spec.sinks.iter().filter(|sink| !sink.paused) {
            // Another machine's clock said when. One that was far ahead of ours must not make the sink rest until its time comes.
            let rests = |since: Timestamp| {
                since.0 <= now.0.saturating_add(AHEAD_MAX_MS)
                    && now < reattached_at(view.runs(&entry.flow).map(|(_, run)| run), &sink.name, since)
            };
            let detached = view.detached(&entry.flow, &sink.name);
            if detached.is_some_and(|detached| detached.run.is_none() && !rests(detached.at)) {
                cut_off.push((entry.clone(), sink.name.clone()));
            }
        }
    }
    Chores { leftovers, cut_off }
}

fn situation(view: &View, is_leader: bool) -> Situation {
    let mut situation = Situation { is_leader, ..Situation::default() };
    situation.has_workers = view.workers().any(|(worker, _)| !view.is_draining(worker));
    for entry in view.flows() {
        for task in view.wanted_tasks(entry) {
            if view.is_owned(&task) {
                situation.owned.insert(task.clone());
            }
            situation.wanted.insert(task, entry.revision.0);
        }
    }
    situation
}

/// The flows whose status says something else than what is, with what it should say.
fn changed_statuses(
    view: &View,
    unowned_for: &BTreeMap<TaskId, Duration>,
    now: Timestamp,
) -> Vec<(FlowEntry, FlowStatus)> {
    let mut changed = Vec::new();
    for entry in view.flows() {
        let known = view.flow_status(&entry.flow).cloned().unwrap_or_default();
        let mut offered_since = BTreeMap::new();
        let told_of = |task: &TaskId| matches!(task.kind, TaskKind::Capture | TaskKind::Apply(_) | TaskKind::Run(_));
        for task in view.wanted_tasks(entry).into_iter().filter(told_of) {
            let Some(unowned_for) = unowned_for.get(&task).filter(|span| **span >= WORTH_SAYING) else { continue };
            let ms = u64::try_from(unowned_for.as_millis()).unwrap_or(u64::MAX);
            let since = known.offered_since.get(&task).copied().unwrap_or(Timestamp(now.0.saturating_sub(ms)));
            offered_since.insert(task, since);
        }
        let status = FlowStatus {
            generation: entry.record.generation,
            conditions: vec![present::accepted(view, entry)],
            offered_since,
            at: known.at,
        };
        if status != known {
            changed.push((entry.clone(), FlowStatus { at: now, ..status }));
        }
    }
    changed
}

/// Flows that are to go and never made anything that a worker would have to drop.
pub(crate) fn goners(view: &View) -> Vec<FlowEntry> {
    let never_captured = |entry: &&FlowEntry| {
        let capture = view.task(&TaskId::capture(&entry.flow));
        // A run's owner may have made the publication, and a shelf of the side store: before it has a plan, too.
        let is_begun = |run| {
            let task = view.task(&TaskId { flow: entry.flow.clone(), kind: TaskKind::Run(run) });
            task.lock.is_some() || task.has_checkpoint
        };
        let has_planned = || view.runs(&entry.flow).any(|(run, seen)| seen.plan().is_some() || is_begun(run));
        entry.record.deleting_since.is_some() && capture.lock.is_none() && !capture.has_checkpoint && !has_planned()
    };
    view.flows().filter(never_captured).cloned().collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_coordination::{Detached, Entry, FlowRecord, Key, Revision, WatchEvent};
    use wallaby_model::flow::{change::sink_anew, page::EXAMPLE, parse};

    use super::*;

    /// A flow's entries, as the store has them, with the name of its first sink.
    fn flow_entries() -> (FlowId, SinkId, Vec<Entry>) {
        let flow = FlowId::new("shop").unwrap();
        let record = FlowRecord {
            document: parse(EXAMPLE, "-").unwrap(),
            generation: 1,
            resumes: 0,
            created_at: Timestamp(1),
            deleting_since: None,
            sinks_since: BTreeMap::new(),
        };
        let sink = record.document.spec.sinks[0].name.clone();
        let spec = entry(Key::FlowSpec(flow.clone()), &record);
        (flow, sink, vec![spec])
    }

    fn entry(key: Key, value: &impl serde::Serialize) -> Entry {
        let (create_revision, mod_revision) = (Revision(7), Revision(7));
        Entry { key, value: serde_json::to_vec(value).unwrap(), create_revision, mod_revision, lease: 0 }
    }

    fn view_of(entries: Vec<Entry>) -> View {
        let mut view = View::default();
        view.take(WatchEvent::Snapshot { entries, revision: Revision(7) });
        view
    }

    /// Whether a sink that was cut off then is loaded anew now.
    fn is_loaded_anew(at: u64, now: u64) -> bool {
        let (flow, sink, mut entries) = flow_entries();
        let detached = Detached { at: Timestamp(at), position: None, reason: "it slept".to_owned(), run: None };
        entries.push(entry(Key::SinkDetached(flow, sink), &detached));
        !chores(&view_of(entries), Timestamp(now)).cut_off.is_empty()
    }

    /// What is seen may be newer than the reason to look: the run that brings the sink back is in it.
    #[test]
    fn the_run_that_brings_a_sink_back_is_not_taken_for_an_older_one() {
        let (flow, sink, mut entries) = flow_entries();
        for run in [3, 5, 7] {
            let spec = sink_anew(&sink, Timestamp(1));
            entries.push(entry(Key::RunSpec(flow.clone(), RunId(run)), &spec));
        }
        let view = view_of(entries);
        let flow = view.flows().next().unwrap().clone();
        assert_eq!(older_loads(&view, &flow, &sink, RunId(7)), [RunId(3), RunId(5)]);
        assert_eq!(older_loads(&view, &flow, &sink, RunId(3)), []);
    }

    #[test]
    fn a_sink_that_was_cut_off_rests_for_a_while_whatever_another_clock_said() {
        let at = 1_000_000;
        assert!(!is_loaded_anew(at, at) && !is_loaded_anew(at, at + 9_999));
        assert!(is_loaded_anew(at, at + 10_000));
        assert!(!is_loaded_anew(at + 5_000, at) && is_loaded_anew(at + 5_000, at + 15_000), "a clock that is ahead");
        let years = 10 * 365 * 86_400_000;
        assert!(is_loaded_anew(at + years, at), "it would rest for years");
    }
}
