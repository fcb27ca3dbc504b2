//! Flows, sinks and workers as the API shows them: what the owners of tasks say, merged with what only we know.
//!
//! Pure: a view in, messages out. An owner's word counts while it holds the lock; without an owner we say why there is none
//! and what a person can do.

use wallaby_coordination::{FlowEntry, WorkerInfo};
use wallaby_model::condition::{Condition, ConditionStatus, ConditionType, Progress, TaskPhase, TaskStatus, Timestamp};
use wallaby_model::flow::{OnOverrun, SinkSpec, SnapshotMode};
use wallaby_model::{Position, SinkId, TaskId, TaskKind, WorkerId, api};
use wallaby_proto::v1;

use crate::runs::reattached_at;
use crate::view::{TaskView, View};

mod operation;
mod snapshot;

pub use operation::operation;
pub use snapshot::snapshot;

/// A sink whose last change was on its way longer than this is not caught up, where its owner does not say.
const CAUGHT_UP_WITHIN_MS: u64 = 10_000;

/// A flow as the API shows it.
pub fn flow(view: &View, entry: &FlowEntry) -> v1::Flow {
    let shown = entry.record.document.clone().without_secrets();
    v1::Flow {
        generation: i64::try_from(entry.record.generation).unwrap_or(i64::MAX),
        etag: etag(entry),
        create_time: Some(timestamp(entry.record.created_at)),
        status: Some(flow_status(view, entry)),
        ..api::flow_to_message(&shown)
    }
}

/// Names one version of a flow.
pub fn etag(entry: &FlowEntry) -> String {
    entry.revision.to_string()
}

fn flow_status(view: &View, entry: &FlowEntry) -> v1::FlowStatus {
    let capture_id = TaskId::capture(&entry.flow);
    let capture = Told::of(view, entry, &capture_id);
    let sinks: Vec<v1::Sink> = entry.record.document.spec.sinks.iter().map(|spec| sink(view, entry, spec)).collect();
    let mut conditions = vec![accepted(view, entry)];
    conditions.extend(
        [ConditionType::SourceReady, ConditionType::Capturing, ConditionType::SlotHealthy, ConditionType::LogHealthy]
            .map(|kind| capture.condition(kind)),
    );
    conditions.insert(3, snapshot::complete(view, entry, None));
    let mut tasks = vec![capture.task()];
    tasks.extend(sinks.iter().filter_map(|sink| sink.task.clone()));
    let progress = capture.progress().map(|(progress, at)| capture_progress(progress, at));
    v1::FlowStatus {
        phase: phase(view, entry, &conditions, &sinks).into(),
        observed_generation: observed_generation(view, entry),
        conditions: conditions.iter().map(condition_message).collect(),
        tasks,
        sinks,
        capture: progress,
        snapshots: snapshot::open(view, entry),
    }
}

/// One sink of a flow as the API shows it.
pub fn sink(view: &View, entry: &FlowEntry, spec: &SinkSpec) -> v1::Sink {
    let id = TaskId::apply(&entry.flow, &spec.name);
    let told = Told::of(view, entry, &id);
    let mut shown = spec.clone();
    shown.postgres.dsn.hide();
    v1::Sink {
        name: api::sink_name(&entry.flow, &spec.name),
        spec: Some(api::sink_to_message(&shown)),
        conditions: vec![
            condition_message(&delivering(view, entry, spec, &told)),
            condition_message(&told.condition(ConditionType::CaughtUp)),
            condition_message(&snapshot::complete(view, entry, Some(&spec.name))),
        ],
        task: Some(told.task()),
        progress: told.progress().map(|(progress, at)| sink_progress(progress, staged_by_capture(view, entry), at)),
    }
}

/// Whether a sink takes changes; one that was cut off from the log does not, whatever its task says.
fn delivering(view: &View, entry: &FlowEntry, spec: &SinkSpec, told: &Told) -> Condition {
    let Some(detached) = view.detached(&entry.flow, &spec.name).filter(|_| !told.is_paused) else {
        return told.condition(ConditionType::Delivering);
    };
    let then = match detached.run {
        Some(run) => match view.run(&entry.flow, run) {
            Some(known) if known.is_wanted() => format!("run {run} loads it anew"),
            _ => format!(
                "run {run}, which was to load it anew, was cancelled: `wallaby snapshot start {}` loads it",
                entry.flow
            ),
        },
        None => {
            let at = reattached_at(view.runs(&entry.flow).map(|(_, run)| run), &spec.name, detached.at);
            let seconds = at.0.saturating_sub(detached.at.0) / 1000;
            format!("a run that loads it anew is made {seconds} s after that")
        }
    };
    let message = format!("{}: it was cut off from the log, and {then}", detached.reason);
    Condition::new(ConditionType::Delivering, ConditionStatus::False, "Detached", message, detached.at)
}

/// What a task that stands still for a person stopped with. `None` also when the flow was changed or resumed after it said so: it may go
/// on by now.
pub fn stopped(view: &View, entry: &FlowEntry, id: &TaskId) -> Option<String> {
    let told = Told::of(view, entry, id);
    let status = told.status.as_ref().filter(|status| status.phase == TaskPhase::Stopped)?;
    (told.task.said_at >= entry.revision).then(|| status.last_error.clone().unwrap_or_default())
}

/// A worker as the API shows it.
pub fn worker(view: &View, worker: &WorkerId, info: &WorkerInfo) -> v1::Worker {
    v1::Worker {
        name: api::worker_name(worker),
        address: info.address.clone(),
        version: info.version.clone(),
        capacity: info.capacity,
        tasks: view.tasks_of(worker).iter().map(TaskId::to_string).collect(),
        zone: info.zone.clone().unwrap_or_default(),
        draining: view.is_draining(worker),
        start_time: Some(timestamp(info.started_at)),
    }
}

/// Whether the specification can be acted upon by this version.
pub fn accepted(view: &View, entry: &FlowEntry) -> Condition {
    let now = entry.record.created_at;
    let problems = entry.record.document.problems();
    let mut condition = match problems.first() {
        None => Condition::new(ConditionType::Accepted, ConditionStatus::True, "Valid", "", now),
        Some(problem) => {
            let message = format!("{}: {}; mend it and apply the flow again", problem.path, problem.message);
            Condition::new(ConditionType::Accepted, ConditionStatus::False, "Invalid", message, now)
        }
    };
    let known = view.flow_status(&entry.flow).map(|status| status.conditions.as_slice()).unwrap_or_default();
    if let Some(before) = known.iter().find(|c| c.kind == condition.kind && c.status == condition.status) {
        condition.since = before.since;
    }
    condition
}

fn observed_generation(view: &View, entry: &FlowEntry) -> i64 {
    let generation = |task: &TaskId| view.task(task).status.map_or(0, |status| status.generation);
    let oldest = view.standing_tasks(entry).iter().map(generation).min().unwrap_or(entry.record.generation);
    i64::try_from(oldest).unwrap_or(i64::MAX)
}

fn phase(view: &View, entry: &FlowEntry, conditions: &[Condition], sinks: &[v1::Sink]) -> v1::Phase {
    let spec = &entry.record.document.spec;
    if entry.record.deleting_since.is_some() {
        return v1::Phase::Deleting;
    }
    let holds = |kind| conditions.iter().any(|c| c.kind == kind && c.status == ConditionStatus::True);
    if !holds(ConditionType::Accepted) {
        return v1::Phase::Blocked;
    }
    if spec.paused {
        return v1::Phase::Paused;
    }
    let running = spec.sinks.iter().zip(sinks).filter(|(spec, _)| !spec.paused).map(|(_, sink)| sink);
    let running: Vec<&v1::Sink> = running.collect();
    let capture = view.task(&TaskId::capture(&entry.flow));
    let is_stopped = |task: &TaskView| {
        task.lock.is_some() && task.status.as_ref().is_some_and(|status| status.phase == TaskPhase::Stopped)
    };
    if is_stopped(&capture) || running.iter().any(|sink| sink.task.as_ref().is_some_and(|task| task.stopped)) {
        return v1::Phase::Blocked;
    }
    let started =
        capture.status.as_ref().is_some_and(|status| status.progress.staged.is_some() || status.last_error.is_some());
    let loads_only = spec.source.postgres.snapshot == SnapshotMode::Only;
    let is_loading = view.runs(&entry.flow).any(|(_, run)| run.is_open());
    if !holds(ConditionType::Capturing) && !loads_only {
        return match (started || capture.has_checkpoint, is_loading && capture.lock.is_some()) {
            (true, _) => v1::Phase::Degraded,
            (false, true) => v1::Phase::Snapshotting,
            (false, false) => v1::Phase::Pending,
        };
    }
    let delivering = |sink: &v1::Sink| {
        let found = sink.conditions.iter().find(|condition| condition.r#type == "Delivering");
        found.is_some_and(|condition| condition.status == i32::from(v1::ConditionStatus::True))
    };
    // While rows are loaded a sink need not deliver, as long as it works.
    let has_error = |sink: &v1::Sink| sink.task.as_ref().is_some_and(|task| !task.last_error.is_empty());
    let works = |sink: &v1::Sink| delivering(sink) || loads_only || (is_loading && !has_error(sink));
    let is_false = |condition: &Condition| condition.status == ConditionStatus::False;
    let of_capture = |condition: &&Condition| !loads_only || condition.kind == ConditionType::SnapshotComplete;
    // A shorter replay window takes nothing from any reader.
    let counts = |condition: &&Condition| {
        condition.kind != ConditionType::LogHealthy
            && !(is_loading && condition.kind == ConditionType::SnapshotComplete)
    };
    let has_false = conditions.iter().filter(of_capture).filter(counts).any(is_false);
    match (has_false || !running.into_iter().all(works), is_loading) {
        (true, _) => v1::Phase::Degraded,
        (false, true) => v1::Phase::Snapshotting,
        (false, false) => v1::Phase::Running,
    }
}

/// What is told of one task, and by whom.
struct Told<'a> {
    view: &'a View,
    entry: &'a FlowEntry,
    id: &'a TaskId,
    task: TaskView,
    /// Only while its writer holds the lock.
    status: Option<TaskStatus>,
    is_paused: bool,
}

impl<'a> Told<'a> {
    fn of(view: &'a View, entry: &'a FlowEntry, id: &'a TaskId) -> Told<'a> {
        let task = view.task(id);
        let owner = task.lock.as_ref().map(|lock| lock.holder.worker.clone());
        let status = task.status.clone().filter(|status| owner.is_some() && status.worker == owner);
        let spec = &entry.record.document.spec;
        let is_paused = spec.paused
            || match &id.kind {
                TaskKind::Capture
                | TaskKind::Run(_)
                | TaskKind::Chunk(..)
                | TaskKind::Load(..)
                | TaskKind::Verify(_) => false,
                TaskKind::Apply(name) => spec.sinks.iter().any(|sink| sink.name == *name && sink.paused),
            };
        Told { view, entry, id, task, status, is_paused }
    }

    /// The last figures, also those of an owner that is gone: how far it came is still true.
    fn progress(&self) -> Option<(&Progress, Timestamp)> {
        self.task.status.as_ref().map(|status| (&status.progress, status.at))
    }

    fn condition(&self, kind: ConditionType) -> Condition {
        if let Some(absent) = self.without_owner(kind) {
            return absent;
        }
        let Some(status) = &self.status else {
            let since = self.entry.record.created_at;
            return Condition::new(
                kind,
                ConditionStatus::Unknown,
                "TakingOver",
                "a worker has just taken the task",
                since,
            );
        };
        let said = status.conditions.iter().find(|condition| condition.kind == kind);
        said.cloned().unwrap_or_else(|| derived(kind, status))
    }

    /// What stands in the place of an owner's word; none when there is an owner that should run.
    fn without_owner(&self, kind: ConditionType) -> Option<Condition> {
        let flow = &self.entry.flow;
        let is_main = matches!(kind, ConditionType::Capturing | ConditionType::Delivering);
        let since = self.since();
        let say = |reason: &str, message: String| {
            let status = if is_main { ConditionStatus::False } else { ConditionStatus::Unknown };
            Some(Condition::new(kind, status, reason, if is_main { message } else { String::new() }, since))
        };
        if self.entry.record.deleting_since.is_some() {
            return say("Deleting", "the flow is being deleted: its slot, publication and log are removed".to_owned());
        }
        if self.is_paused {
            let what = match &self.id.kind {
                TaskKind::Capture => format!("{flow}` lets it go on. Its slot holds WAL back meanwhile"),
                TaskKind::Apply(sink) if !self.entry.record.document.spec.paused => {
                    format!("{flow}/{sink}` lets it go on. {}", self.paused_sinks_log(sink))
                }
                _ => format!("{flow}` lets it go on"),
            };
            return say("Paused", format!("paused by request; `wallaby resume {what}"));
        }
        if self.task.lock.is_some() {
            return None;
        }
        let (reason, message) = no_owner(self.view);
        say(reason, message)
    }

    /// What the log does for a paused sink.
    fn paused_sinks_log(&self, sink: &SinkId) -> &'static str {
        if self.view.detached(&self.entry.flow, sink).is_some() {
            return "It was cut off, because there was no room for what it needs, and is loaded anew then";
        }
        let waits = |spec: &SinkSpec| spec.name == *sink && spec.on_overrun == OnOverrun::Backpressure;
        match self.entry.record.document.spec.sinks.iter().any(waits) {
            true => "The log keeps what it needs meanwhile, and once it is full the flow waits for it",
            false => "The log keeps what it needs meanwhile; once there is no room it is cut off, and loaded anew then",
        }
    }

    fn since(&self) -> Timestamp {
        if let Some(deleting) = self.entry.record.deleting_since {
            return deleting;
        }
        let offered = self.view.flow_status(&self.entry.flow).and_then(|s| s.offered_since.get(self.id).copied());
        let said = self.task.status.as_ref().map(|status| status.at);
        offered.or(said).unwrap_or(self.entry.record.created_at)
    }

    fn task(&self) -> v1::Task {
        let lock = self.task.lock.as_ref();
        let status = self.status.as_ref();
        let fallback_epoch = lock.map_or(0, |lock| u64::try_from(lock.create_revision.0).unwrap_or(0));
        let state = match (lock, status) {
            (Some(_), Some(status)) => state_word(status.phase),
            (Some(_), None) => state_word(TaskPhase::Locked),
            (None, _) if self.is_paused => state_word(TaskPhase::Paused),
            (None, _) => state_word(TaskPhase::Offered),
        };
        // An error outlives its owner until the next one has something to say.
        let last_error = self.task.status.as_ref().and_then(|status| status.last_error.clone());
        v1::Task {
            task: self.id.to_string(),
            state: state.to_owned(),
            worker: lock.map(|lock| lock.holder.worker.to_string()).unwrap_or_default(),
            epoch: status.and_then(|status| status.epoch).map_or(fallback_epoch, |epoch| epoch.0),
            waits_for: status.and_then(|s| s.waiting_for.as_ref()).map(|w| w.what.clone()).unwrap_or_default(),
            since: Some(timestamp(status.map_or_else(|| self.since(), |status| status.phase_since))),
            last_error: last_error.unwrap_or_default(),
            retry_time: status.and_then(|status| status.retry_at).map(timestamp),
            stopped: status.is_some_and(|status| status.phase == TaskPhase::Stopped),
        }
    }
}

fn no_owner(view: &View) -> (&'static str, String) {
    if let Some(error) = view.queue_error() {
        let message = format!("tasks cannot be offered to the workers: {error}; it is tried again until NATS answers");
        return ("NatsUnavailable", message);
    }
    let ready: Vec<(&WorkerId, &WorkerInfo)> = view.workers().filter(|(id, _)| !view.is_draining(id)).collect();
    let room = |(id, info): &(&WorkerId, &WorkerInfo)| view.tasks_of(id).len() < info.capacity as usize;
    if ready.is_empty() {
        let message =
            "no worker is alive: start one with `wallaby-worker`, with the same etcd, NATS and pool as the controller";
        ("NoWorker", message.to_owned())
    } else if !ready.iter().any(room) {
        let message = format!("all {} workers are full: start another one, or give them more --capacity", ready.len());
        ("NoCapacity", message)
    } else {
        ("Offered", "offered to the workers, none has taken it yet".to_owned())
    }
}

/// A condition that the owner did not state, from the state it is in.
fn derived(kind: ConditionType, status: &TaskStatus) -> Condition {
    let error = || status.last_error.clone().unwrap_or_default();
    let (holds, reason, message) = match kind {
        ConditionType::CaughtUp => match status.progress.lag_ms {
            Some(lag) if lag <= CAUGHT_UP_WITHIN_MS => (ConditionStatus::True, "WithinLag", String::new()),
            Some(lag) => (ConditionStatus::False, "Behind", format!("{} s behind the source", lag / 1000)),
            None => (ConditionStatus::Unknown, "NoFigures", String::new()),
        },
        ConditionType::Capturing | ConditionType::Delivering => match status.phase {
            TaskPhase::Streaming => (ConditionStatus::True, "Streaming", String::new()),
            TaskPhase::Backpressured => {
                let what = status.waiting_for.as_ref().map_or("what comes next", |waiting| waiting.what.as_str());
                (ConditionStatus::False, "Backpressured", format!("waits for {what}"))
            }
            TaskPhase::Backoff => (ConditionStatus::False, "Retrying", error()),
            TaskPhase::Stopped => {
                (ConditionStatus::False, "Stopped", format!("{}; mend it, then `wallaby resume`", error()))
            }
            _ => (ConditionStatus::Unknown, "Starting", error()),
        },
        _ => (ConditionStatus::Unknown, "NotSaid", String::new()),
    };
    Condition::new(kind, holds, reason, message, status.phase_since)
}

fn capture_progress(progress: &Progress, at: Timestamp) -> v1::CaptureProgress {
    v1::CaptureProgress {
        source_lsn: progress.source_lsn.map(|lsn| lsn.to_string()).unwrap_or_default(),
        confirmed_lsn: progress.confirmed_lsn.map(|lsn| lsn.to_string()).unwrap_or_default(),
        staged_position: progress.staged.map(|position| position.to_string()).unwrap_or_default(),
        retained_wal_bytes: progress.retained_wal_bytes.unwrap_or(0),
        lag_bytes: progress.lag_bytes.unwrap_or(0),
        lag: progress.lag_ms.map(milliseconds),
        rows_total: progress.rows,
        report_time: Some(timestamp(at)),
    }
}

/// The log's end as the capture says it: a sink's task knows only what it has read so far.
fn staged_by_capture(view: &View, entry: &FlowEntry) -> Option<Position> {
    let capture = TaskId::capture(&entry.flow);
    Told::of(view, entry, &capture).progress().and_then(|(progress, _)| progress.staged)
}

fn sink_progress(progress: &Progress, log_end: Option<Position>, at: Timestamp) -> v1::SinkProgress {
    let behind_the_log = match (log_end, progress.applied) {
        (Some(end), Some(applied)) => end.commit.0.saturating_sub(applied.commit.0),
        _ => 0,
    };
    v1::SinkProgress {
        position: progress.applied.map(|position| position.to_string()).unwrap_or_default(),
        lag_bytes: progress.lag_bytes.unwrap_or(0).max(behind_the_log),
        lag: progress.lag_ms.map(milliseconds),
        rows_total: progress.rows,
        report_time: Some(timestamp(at)),
    }
}

fn milliseconds(ms: u64) -> prost_types::Duration {
    api::duration_to_message(std::time::Duration::from_millis(ms))
}

fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let nanos = i32::try_from(at.0 % 1000 * 1_000_000).unwrap_or(0);
    prost_types::Timestamp { seconds: i64::try_from(at.0 / 1000).unwrap_or(i64::MAX), nanos }
}

fn condition_message(condition: &Condition) -> v1::Condition {
    let status = match condition.status {
        ConditionStatus::True => v1::ConditionStatus::True,
        ConditionStatus::False => v1::ConditionStatus::False,
        ConditionStatus::Unknown => v1::ConditionStatus::Unknown,
    };
    v1::Condition {
        r#type: format!("{:?}", condition.kind),
        status: status.into(),
        reason: condition.reason.clone(),
        message: condition.message.clone(),
        since: Some(timestamp(condition.since)),
    }
}

/// The states of protocol.md.
fn state_word(phase: TaskPhase) -> &'static str {
    match phase {
        TaskPhase::Unassigned => "UNASSIGNED",
        TaskPhase::Offered => "OFFERED",
        TaskPhase::Locked => "LOCKED",
        TaskPhase::Fencing => "FENCING",
        TaskPhase::Resuming => "RESUMING",
        TaskPhase::SlotWait => "SLOT_WAIT",
        TaskPhase::Opening => "OPENING",
        TaskPhase::Streaming => "STREAMING",
        TaskPhase::Backpressured => "BACKPRESSURED",
        TaskPhase::Draining => "DRAINING",
        TaskPhase::Backoff => "BACKOFF",
        TaskPhase::Stopped => "STOPPED",
        TaskPhase::Paused => "PAUSED",
        TaskPhase::SelfFenced => "SELF_FENCED",
    }
}

#[cfg(test)]
#[path = "present_tests.rs"]
mod tests;
