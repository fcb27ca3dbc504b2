//! Which tasks a flow should have: its capture and its sinks, and what its snapshot runs need now.

use wallaby_coordination::FlowEntry;
use wallaby_model::condition::TaskPhase;
use wallaby_model::flow::{OnExceeded, SnapshotMode};
use wallaby_model::run::RunWish;
use wallaby_model::{ChunkId, FlowId, RunId, SinkId, TaskId, TaskKind};

use crate::runs::RunView;
use crate::view::{TaskView, View};

const FIRST_CHUNK: ChunkId = ChunkId { table: 0, restart: 0, number: 0 };
const LAST_CHUNK: ChunkId = ChunkId { table: u32::MAX, restart: u32::MAX, number: u32::MAX };

impl View {
    /// All tasks that a flow should have now.
    pub fn wanted_tasks(&self, entry: &FlowEntry) -> Vec<TaskId> {
        let mut tasks = self.standing_tasks(entry);
        if entry.record.deleting_since.is_none() && !entry.record.document.spec.paused {
            for (run, view) in self.runs(&entry.flow) {
                self.add_tasks_of_run(entry, run, view, &mut tasks);
            }
            let verify = |number| TaskId { flow: entry.flow.clone(), kind: TaskKind::Verify(number) };
            tasks.extend(self.open_operations(&entry.flow).map(verify));
        }
        tasks
    }

    /// The tasks that a flow has as long as it runs, the capture first: none of a paused one, only the capture of one that is
    /// being deleted (its owner removes what the flow made), and that only once the runs' owners are gone: their slots go with
    /// their sessions.
    pub fn standing_tasks(&self, entry: &FlowEntry) -> Vec<TaskId> {
        let spec = &entry.record.document.spec;
        let capture = TaskId::capture(&entry.flow);
        if entry.record.deleting_since.is_some() {
            let run_goes_on = self.runs(&entry.flow).any(|(run, _)| self.is_owned(&run_task(entry, run)));
            return if run_goes_on { Vec::new() } else { vec![capture] };
        }
        if spec.paused {
            return Vec::new();
        }
        let loads_only = spec.source.postgres.snapshot == SnapshotMode::Only;
        // With `only`, sinks are needed as long as something is loaded into them.
        let is_needed = |sink: &SinkId| {
            let of_sink = |view: &RunView| view.spec().is_some_and(|spec| spec.loads_into(sink));
            !loads_only || self.runs(&entry.flow).any(|(_, view)| view.is_open() && of_sink(view))
        };
        // A sink that is cut off has nothing to do until its run is made.
        let is_cut_off =
            |sink: &SinkId| self.detached(&entry.flow, sink).is_some_and(|detached| detached.run.is_none());
        let sinks = spec.sinks.iter().filter(|sink| !sink.paused).map(|sink| &sink.name);
        let sinks = sinks.filter(|sink| is_needed(sink) && !is_cut_off(sink));
        let capture = (!loads_only).then_some(capture);
        capture.into_iter().chain(sinks.map(|sink| TaskId::apply(&entry.flow, sink))).collect()
    }

    /// The run that this one waits for before it begins: as long as every sink of it waits, nobody would take what it reads. Once it has
    /// begun it goes on for the sinks that do not wait, and the others come after them.
    pub fn waits_for_run(&self, entry: &FlowEntry, run: RunId) -> Option<RunId> {
        let view = self.run(&entry.flow, run)?;
        if view.plan().is_some_and(|plan| !plan.generations.is_empty()) {
            return None;
        }
        let mut first = None;
        for sink in entry.record.document.spec.sinks.iter().map(|sink| &sink.name) {
            if self.awaits(entry, run, view, sink) {
                let earlier = self.sink_waits_for(entry, run, sink)?;
                first = first.or(Some(earlier));
            }
        }
        first
    }

    /// The run that a sink is to be done with before it begins with this one: one made before it that is not over, and loads the same
    /// tables into it, or first brings it to life.
    pub fn sink_waits_for(&self, entry: &FlowEntry, run: RunId, sink: &SinkId) -> Option<RunId> {
        let spec = self.run(&entry.flow, run)?.spec()?;
        let mut earlier = self.runs(&entry.flow).take_while(|(other, _)| *other < run);
        let is_before = |(other, view): &(RunId, &RunView)| {
            self.awaits(entry, *other, view, sink) && view.spec().is_some_and(|earlier| spec.waits_for(earlier))
        };
        earlier.find(is_before).map(|(other, _)| other)
    }

    /// Whether a run that is not over still waits for a sink: one that was cut off is loaded by the run that brings it back and by those
    /// after it, by no other.
    pub fn awaits(&self, entry: &FlowEntry, run: RunId, view: &RunView, sink: &SinkId) -> bool {
        let is_done = view.sinks().get(sink).is_some_and(|state| state.is_done);
        let is_out = self.detached(&entry.flow, sink).is_some_and(|detached| detached.is_out_of(run));
        view.is_open() && view.spec().is_some_and(|spec| spec.loads_into(sink)) && !is_done && !is_out
    }

    /// Whether reading pauses because the slot holds back too much WAL.
    pub fn pauses_for_the_slot(&self, entry: &FlowEntry) -> bool {
        let safety = &entry.record.document.spec.source.postgres.safety;
        let capture = self.task(&TaskId::capture(&entry.flow)).status;
        // What waits for room in the log may wait for the run itself, which holds the log from its beginning on: its owner knows.
        let waits_for_log = capture.as_ref().is_some_and(|status| status.phase == TaskPhase::Backpressured);
        let retained = capture.and_then(|status| status.progress.retained_wal_bytes);
        safety.on_exceeded == OnExceeded::PauseSnapshot
            && !waits_for_log
            && retained.is_some_and(|retained| retained > safety.retained_wal_max.0)
    }

    /// How many chunks of a run fit into its share of the side store: all of it, unless other runs have chunks to read too, also when they
    /// are paused or between two exports. Otherwise what one run keeps for a sink that comes to it later would leave no room to the
    /// run which that sink has to be done with before.
    fn chunks_fitting(&self, entry: &FlowEntry, run: RunId, view: &RunView) -> usize {
        let reads = |(other, view): &(RunId, &RunView)| {
            view.is_open() && !view.is_read() && self.waits_for_run(entry, *other).is_none()
        };
        let reading = self.runs(&entry.flow).filter(reads).count() as u64;
        if reading < 2 {
            return usize::MAX;
        }
        let share = entry.record.document.spec.log.side_chunks_max().0 / reading;
        let sinks = entry.record.document.spec.sinks.iter().map(|sink| &sink.name);
        view.fitting(share, sinks.filter(|sink| self.awaits(entry, run, view, sink)))
    }

    /// Chunks of a run that a worker reads now.
    pub fn chunks_reading(&self, entry: &FlowEntry, run: RunId) -> usize {
        self.chunk_tasks(&entry.flow, run).filter(|task| task.lock.is_some()).count()
    }

    /// What is known of the tasks that read a run's chunks.
    pub fn chunk_tasks(&self, flow: &FlowId, run: RunId) -> impl Iterator<Item = &TaskView> {
        let of = |chunk| TaskId { flow: flow.clone(), kind: TaskKind::Chunk(run, chunk) };
        self.tasks_between(of(FIRST_CHUNK)..=of(LAST_CHUNK)).map(|(_, task)| task)
    }

    fn add_tasks_of_run(&self, entry: &FlowEntry, run: RunId, view: &RunView, tasks: &mut Vec<TaskId>) {
        let Some(spec) = view.spec().filter(|_| view.is_open()) else { return };
        // One that was cancelled while it waits is ended by its owner, as any other.
        if spec.wish != RunWish::Cancel && self.waits_for_run(entry, run).is_some() {
            return;
        }
        // A paused run keeps its owner, without a session at the source: loads go on, and somebody must see it end.
        tasks.push(run_task(entry, run));
        let of = |kind| TaskId { flow: entry.flow.clone(), kind };
        if view.may_read() && !self.pauses_for_the_slot(entry) {
            // More readers than rows a second would wait for each other, and keep places of their workers.
            let readers = usize::try_from(spec.readers_at_once()).unwrap_or(usize::MAX);
            let chunk_tasks = view.pending().map(|chunk| of(TaskKind::Chunk(run, chunk)));
            let reading = self.chunks_reading(entry, run);
            let free = readers.min(self.chunks_fitting(entry, run, view)).saturating_sub(reading);
            tasks.extend(chunk_tasks.filter(|task| !self.is_owned(task)).take(free));
        }
        let sinks = entry.record.document.spec.sinks.iter().filter(|sink| !sink.paused);
        for sink in sinks.map(|sink| &sink.name).filter(|sink| self.awaits(entry, run, view, sink)) {
            tasks.extend(view.loads(sink).into_iter().map(|chunk| of(TaskKind::Load(sink.clone(), run, chunk))));
        }
    }
}

fn run_task(entry: &FlowEntry, run: RunId) -> TaskId {
    TaskId { flow: entry.flow.clone(), kind: TaskKind::Run(run) }
}
