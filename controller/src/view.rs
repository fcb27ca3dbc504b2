//! What the controller knows of etcd: a fold of one watch over all keys.
//!
//! The fold is pure; a task feeds it and counts versions, so that the scheduler and the watchers of the API wake up.
//! While etcd is away the view stands still, and the watch goes on behind it when etcd is back.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{
    Change, Coordination, Detached, Entry, FlowEntry, FlowStatus, Key, LockEntry, Revision, WatchEvent, WorkerInfo,
};
use wallaby_model::condition::TaskStatus;
use wallaby_model::verify::OperationResult;
use wallaby_model::{FlowId, RunId, SinkId, TaskId, WorkerId};

use crate::runs::RunView;

/// How long an answer waits for the watch to show what was just written.
const REACH_PATIENCE: Duration = Duration::from_secs(2);

/// One task as etcd has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskView {
    /// Its owner; none when nobody holds the lock.
    pub lock: Option<LockEntry>,
    /// What its last owner said.
    pub status: Option<TaskStatus>,
    /// When that was written.
    pub said_at: Revision,
    /// Whether it ever had an owner that came so far as to fix an epoch.
    pub has_checkpoint: bool,
}

/// Everything of ours in etcd.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    flows: BTreeMap<FlowId, FlowEntry>,
    statuses: BTreeMap<FlowId, FlowStatus>,
    tasks: BTreeMap<TaskId, TaskView>,
    workers: BTreeMap<WorkerId, WorkerInfo>,
    draining: BTreeSet<WorkerId>,
    runs: BTreeMap<FlowId, BTreeMap<RunId, RunView>>,
    detached: BTreeMap<FlowId, BTreeMap<SinkId, Detached>>,
    operations: BTreeMap<FlowId, BTreeMap<u32, OperationView>>,
    /// Why tasks cannot be offered to workers now. Not from etcd: this controller's own experience.
    queue_error: Option<String>,
    /// What was written up to here is in it.
    revision: Revision,
}

/// An operation as the scheduler needs to know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OperationView {
    is_asked: bool,
    is_over: bool,
}

impl View {
    /// All flows, by name.
    pub fn flows(&self) -> impl Iterator<Item = &FlowEntry> {
        self.flows.values()
    }

    /// One flow.
    pub fn flow(&self, flow: &FlowId) -> Option<&FlowEntry> {
        self.flows.get(flow)
    }

    /// What the scheduling replica said of a flow.
    pub fn flow_status(&self, flow: &FlowId) -> Option<&FlowStatus> {
        self.statuses.get(flow)
    }

    /// One task; an empty view of one that etcd has nothing about.
    pub fn task(&self, task: &TaskId) -> TaskView {
        self.tasks.get(task).cloned().unwrap_or_default()
    }

    /// Whether somebody holds the lock of a task.
    pub fn is_owned(&self, task: &TaskId) -> bool {
        self.tasks.get(task).is_some_and(|task| task.lock.is_some())
    }

    /// The workers that are alive, by name.
    pub fn workers(&self) -> impl Iterator<Item = (&WorkerId, &WorkerInfo)> {
        self.workers.iter()
    }

    /// Whether a worker hands its tasks over, or was asked to.
    pub fn is_draining(&self, worker: &WorkerId) -> bool {
        self.draining.contains(worker) || self.workers.get(worker).is_some_and(|info| info.draining)
    }

    /// The tasks that a worker owns.
    pub fn tasks_of(&self, worker: &WorkerId) -> Vec<TaskId> {
        let owned = |task: &TaskView| task.lock.as_ref().is_some_and(|lock| lock.holder.worker == *worker);
        self.tasks.iter().filter(|(_, task)| owned(task)).map(|(id, _)| id.clone()).collect()
    }

    /// The runs of a flow that are kept, by number.
    pub fn runs(&self, flow: &FlowId) -> impl DoubleEndedIterator<Item = (RunId, &RunView)> {
        self.runs.get(flow).into_iter().flatten().map(|(run, view)| (*run, view))
    }

    /// One run of a flow.
    pub fn run(&self, flow: &FlowId, run: RunId) -> Option<&RunView> {
        self.runs.get(flow)?.get(&run)
    }

    /// Whether, since when and why a sink is cut off from the log.
    pub fn detached(&self, flow: &FlowId, sink: &SinkId) -> Option<&Detached> {
        self.detached.get(flow)?.get(sink)
    }

    /// The operations of a flow that are not over, by number.
    pub fn open_operations(&self, flow: &FlowId) -> impl Iterator<Item = u32> {
        let known = self.operations.get(flow).into_iter().flatten();
        known.filter(|(_, operation)| operation.is_asked && !operation.is_over).map(|(number, _)| *number)
    }

    /// The tasks whose ids lie in a range.
    pub fn tasks_between(&self, range: RangeInclusive<TaskId>) -> impl Iterator<Item = (&TaskId, &TaskView)> {
        self.tasks.range(range)
    }

    /// Why tasks cannot be offered to workers now.
    pub fn queue_error(&self) -> Option<&str> {
        self.queue_error.as_deref()
    }

    /// See [`View::queue_error`]; `None`: they can.
    pub fn set_queue_error(&mut self, error: Option<String>) {
        self.queue_error = error;
    }

    /// Takes an event of the watch in.
    pub fn take(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Snapshot { entries, revision } => {
                *self = View { queue_error: self.queue_error.take(), revision, ..View::default() };
                entries.iter().for_each(|entry| self.put(entry));
            }
            WatchEvent::Changes(changes) => {
                for change in changes {
                    let revision = match change {
                        Change::Put(entry) => {
                            self.put(&entry);
                            entry.mod_revision
                        }
                        Change::Deleted { key, revision } => {
                            self.delete(&key);
                            revision
                        }
                    };
                    // All changes of one revision come in one event.
                    self.revision = self.revision.max(revision);
                }
            }
        }
    }

    fn put(&mut self, entry: &Entry) {
        if let Err(error) = self.try_put(entry) {
            tracing::warn!(%error, "a record cannot be read and is left out");
        }
    }

    fn try_put(&mut self, entry: &Entry) -> wallaby_coordination::Result<()> {
        match &entry.key {
            Key::FlowSpec(flow) => {
                self.flows.insert(flow.clone(), FlowEntry::from_entry(flow.clone(), entry)?);
            }
            Key::FlowStatus(flow) => {
                self.statuses.insert(flow.clone(), entry.decode()?);
            }
            Key::TaskLock(task) => {
                let lock = LockEntry::from_entry(task.clone(), entry)?;
                self.tasks.entry(task.clone()).or_default().lock = Some(lock);
            }
            Key::TaskStatus(task) => {
                let status = entry.decode()?;
                let task = self.tasks.entry(task.clone()).or_default();
                (task.status, task.said_at) = (Some(status), entry.mod_revision);
            }
            Key::TaskCheckpoint(task) => self.tasks.entry(task.clone()).or_default().has_checkpoint = true,
            Key::Worker(worker) => {
                self.workers.insert(worker.clone(), entry.decode()?);
            }
            Key::WorkerDrain(worker) => {
                self.draining.insert(worker.clone());
            }
            Key::SinkDetached(flow, sink) => {
                self.detached.entry(flow.clone()).or_default().insert(sink.clone(), entry.decode()?);
            }
            Key::RunSpec(flow, run) => self.run_mut(flow, *run).put_spec(entry.decode()?),
            Key::RunPlan(flow, run) => self.run_mut(flow, *run).put_plan(entry.decode()?),
            Key::RunChunk(flow, run, chunk) => self.run_mut(flow, *run).put_done(*chunk, &entry.decode()?),
            Key::RunLoaded(flow, run, sink, chunk) => {
                self.run_mut(flow, *run).put_loaded(sink, *chunk, &entry.decode()?);
            }
            Key::RunSink(flow, run, sink) => self.run_mut(flow, *run).put_sink(sink, entry.decode()?),
            Key::OperationSpec(flow, number) => self.operation_mut(flow, *number).is_asked = true,
            Key::OperationResult(flow, number) => {
                let result: OperationResult = entry.decode()?;
                self.operation_mut(flow, *number).is_over = result.state.is_over();
            }
            Key::FlowHold(..)
            | Key::FlowPurge(_)
            | Key::FlowTables(_)
            | Key::RunIndex(_)
            | Key::RunLost(..)
            | Key::ControllerLeader => {}
        }
        Ok(())
    }

    fn operation_mut(&mut self, flow: &FlowId, number: u32) -> &mut OperationView {
        self.operations.entry(flow.clone()).or_default().entry(number).or_default()
    }

    fn forget_operation(&mut self, flow: &FlowId, number: u32) {
        let Some(known) = self.operations.get_mut(flow) else { return };
        known.remove(&number);
        if known.is_empty() {
            self.operations.remove(flow);
        }
    }

    fn run_mut(&mut self, flow: &FlowId, run: RunId) -> &mut RunView {
        self.runs.entry(flow.clone()).or_default().entry(run).or_default()
    }

    fn edit_run(&mut self, flow: &FlowId, run: RunId, edit: impl FnOnce(&mut RunView)) {
        let Some(runs) = self.runs.get_mut(flow) else { return };
        let Some(view) = runs.get_mut(&run) else { return };
        edit(view);
        if view.is_empty() {
            runs.remove(&run);
        }
        if runs.is_empty() {
            self.runs.remove(flow);
        }
    }

    fn delete(&mut self, key: &Key) {
        match key {
            Key::FlowSpec(flow) => drop(self.flows.remove(flow)),
            Key::FlowStatus(flow) => drop(self.statuses.remove(flow)),
            Key::TaskLock(task) => self.edit_task(task, |view| view.lock = None),
            Key::TaskStatus(task) => {
                self.edit_task(task, |view| (view.status, view.said_at) = (None, Revision::default()))
            }
            Key::TaskCheckpoint(task) => self.edit_task(task, |view| view.has_checkpoint = false),
            Key::Worker(worker) => drop(self.workers.remove(worker)),
            Key::WorkerDrain(worker) => drop(self.draining.remove(worker)),
            Key::SinkDetached(flow, sink) => {
                if let Some(sinks) = self.detached.get_mut(flow) {
                    sinks.remove(sink);
                }
            }
            Key::RunSpec(flow, run) => self.edit_run(flow, *run, RunView::delete_spec),
            Key::RunPlan(flow, run) => self.edit_run(flow, *run, RunView::delete_plan),
            Key::RunChunk(flow, run, chunk) => self.edit_run(flow, *run, |view| view.delete_done(*chunk)),
            Key::RunLoaded(flow, run, sink, chunk) => {
                self.edit_run(flow, *run, |view| view.delete_loaded(sink, *chunk));
            }
            Key::RunSink(flow, run, sink) => self.edit_run(flow, *run, |view| view.delete_sink(sink)),
            Key::OperationSpec(flow, number) => self.forget_operation(flow, *number),
            Key::OperationResult(flow, number) => {
                let known = self.operations.get_mut(flow).and_then(|known| known.get_mut(number));
                if let Some(operation) = known {
                    operation.is_over = false;
                }
            }
            Key::FlowHold(..)
            | Key::FlowPurge(_)
            | Key::FlowTables(_)
            | Key::RunIndex(_)
            | Key::RunLost(..)
            | Key::ControllerLeader => {}
        }
    }

    fn edit_task(&mut self, task: &TaskId, edit: impl FnOnce(&mut TaskView)) {
        let Some(view) = self.tasks.get_mut(task) else { return };
        edit(view);
        if *view == TaskView::default() {
            self.tasks.remove(task);
        }
    }
}

/// The running view. Cheap to clone; the watch ends with the last clone.
#[derive(Clone)]
pub struct LiveView {
    view: Arc<RwLock<View>>,
    version: watch::Receiver<u64>,
    _feed: Arc<AbortOnDropHandle<()>>,
}

impl LiveView {
    /// Starts watching.
    pub fn start(coordination: &Coordination) -> LiveView {
        let view = Arc::new(RwLock::new(View::default()));
        let (sender, version) = watch::channel(0_u64);
        let mut events = coordination.watch(coordination.keys().everything());
        let fed = Arc::clone(&view);
        let feed = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                // A fold that panicked left whole entries behind: the next snapshot mends what is missing.
                fed.write().unwrap_or_else(PoisonError::into_inner).take(event);
                sender.send_modify(|version| *version += 1);
            }
        });
        LiveView { view, version, _feed: Arc::new(AbortOnDropHandle::new(feed)) }
    }

    /// Looks at the view; nothing else may wait in `look`.
    pub fn with<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says why tasks cannot be offered to workers now, or that they can.
    pub fn say_queue(&self, error: Option<String>) {
        self.view.write().unwrap_or_else(PoisonError::into_inner).set_queue_error(error);
    }

    /// Waits until what was written at `revision` is in the view, so that whoever wrote sees it in the next answer. Not for long: an
    /// answer from an older view is better than none.
    pub async fn reaches(&self, revision: Revision) {
        let mut version = self.version();
        let reached = version.wait_for(|_| self.with(|view| view.revision >= revision));
        if tokio::time::timeout(REACH_PATIENCE, reached).await.is_err() {
            tracing::debug!(%revision, "answering before the watch showed what was written");
        }
    }

    /// Counts the changes; 0 before the first snapshot.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.version.clone()
    }

    /// Whether the state of all flows was read once.
    pub fn is_filled(&self) -> bool {
        *self.version.borrow() > 0
    }
}
