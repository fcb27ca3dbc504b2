//! The snapshot runs as this worker sees them: fed by the one watch on the flows, read in place. A run may have tens of thousands of
//! chunks, so nothing is copied for a reader.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeOwned;
use tokio::sync::watch;
use wallaby_coordination::{Change, Detached, Entry, Key, WatchEvent};
use wallaby_model::run::{ChunkDone, RunPlan, RunSpec, RunWish, SinkRun, TableStage};
use wallaby_model::{ChunkId, FlowId, RunId, SinkId, TableName};

/// One run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunView {
    /// What is asked of it; `None` while only a part of it was seen.
    pub spec: Option<RunSpec>,
    /// Its plan; none before its owner wrote one.
    pub plan: Option<RunPlan>,
    /// The chunks that are read.
    pub chunks: BTreeMap<ChunkId, ChunkDone>,
    /// Chunks of which the side store lost a part.
    pub lost: BTreeSet<ChunkId>,
    /// The chunks that sinks are known to have: hints.
    pub loaded: HashMap<SinkId, BTreeSet<ChunkId>>,
    /// How far each sink is.
    pub sinks: BTreeMap<SinkId, SinkRun>,
}

impl RunView {
    /// Whether something may still come of it.
    pub fn is_open(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.wish != RunWish::Cancel)
            && !self.plan.as_ref().is_some_and(|plan| plan.state.is_over())
    }

    /// Whether every chunk of its plan is read.
    pub fn is_read(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.chunks().all(|chunk| self.chunks.contains_key(&chunk)))
    }

    /// How many of the chunks that are read a sink is not known to have.
    pub fn lacks(&self, sink: &SinkId) -> usize {
        self.lacking(sink).count()
    }

    /// Whether a sink lacks chunks of tables that it has prepared: load tasks bring it those.
    pub fn awaits_loads(&self, sink: &SinkId) -> bool {
        let (Some(plan), Some(state)) = (&self.plan, self.sinks.get(sink)) else { return false };
        let prepared = |table: &TableName| state.tables.get(&table.to_string()) == Some(&TableStage::Copying);
        let relation = |chunk: ChunkId| plan.relations.get(chunk.table as usize);
        self.lacking(sink).filter_map(relation).any(|relation| prepared(&relation.table))
    }

    fn lacking(&self, sink: &SinkId) -> impl Iterator<Item = ChunkId> {
        let (plan, loaded) = (self.plan.as_ref(), self.loaded.get(sink));
        let is_lacking = move |chunk: &ChunkId| {
            !loaded.is_some_and(|loaded| loaded.contains(chunk)) && plan.is_some_and(|plan| plan.has(*chunk))
        };
        self.chunks.keys().copied().filter(is_lacking)
    }
}

/// The runs of one flow, and its sinks that are cut off from the log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlowRuns {
    /// By number.
    pub runs: BTreeMap<RunId, RunView>,
    /// The sinks that are cut off.
    pub detached: BTreeMap<SinkId, Detached>,
}

impl FlowRuns {
    /// Whether a sink is out of a run because it was cut off from the log.
    pub fn is_out_of(&self, run: RunId, sink: &SinkId) -> bool {
        self.detached.get(sink).is_some_and(|detached| detached.is_out_of(run))
    }

    /// How many runs have chunks to read, also when they are paused: those among which the controller shares the side store.
    pub fn reading(&self) -> usize {
        let reads = |run: RunId, view: &RunView| view.is_open() && !view.is_read() && !self.waits(run, view);
        self.runs.iter().filter(|(run, view)| reads(**run, view)).count()
    }

    /// Whether a run has not begun, and each sink that it is for has to be done with another one before.
    fn waits(&self, run: RunId, view: &RunView) -> bool {
        let Some(spec) = &view.spec else { return false };
        if view.plan.as_ref().is_some_and(|plan| !plan.generations.is_empty()) {
            return false;
        }
        let is_before = |sink: &SinkId| {
            let mut earlier = self.runs.range(..run).filter(|(other, known)| self.awaits(**other, known, sink));
            earlier.any(|(_, known)| known.spec.as_ref().is_some_and(|earlier| spec.waits_for(earlier)))
        };
        let mut sinks = spec.sinks.iter().filter(|sink| self.awaits(run, view, sink)).peekable();
        sinks.peek().is_some() && sinks.all(is_before)
    }

    /// Whether an open run still waits for a sink.
    pub fn awaits(&self, run: RunId, view: &RunView, sink: &SinkId) -> bool {
        view.is_open()
            && view.spec.as_ref().is_some_and(|spec| spec.loads_into(sink))
            && !view.sinks.get(sink).is_some_and(|state| state.is_done)
            && !self.is_out_of(run, sink)
    }
}

struct Inner {
    flows: Mutex<HashMap<FlowId, FlowRuns>>,
    version: watch::Sender<u64>,
}

/// All runs of all flows. Cheap to clone.
#[derive(Clone)]
pub struct RunBoard(Arc<Inner>);

impl Default for RunBoard {
    fn default() -> Self {
        RunBoard(Arc::new(Inner { flows: Mutex::default(), version: watch::channel(0).0 }))
    }
}

impl RunBoard {
    /// Looks at a flow's runs. `look` must be short: the watch waits for it.
    pub fn of<T>(&self, flow: &FlowId, look: impl FnOnce(&FlowRuns) -> T) -> T {
        let flows = self.0.flows.lock().unwrap_or_else(PoisonError::into_inner);
        match flows.get(flow) {
            Some(runs) => look(runs),
            None => look(&FlowRuns::default()),
        }
    }

    /// Looks at one run; `None` when it is not there.
    pub fn run<T>(&self, flow: &FlowId, run: RunId, look: impl FnOnce(&RunView) -> T) -> Option<T> {
        self.of(flow, |runs| runs.runs.get(&run).map(look))
    }

    /// Changes whenever a run did.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Takes an event of the watch on all flows.
    pub fn take(&self, event: &WatchEvent) {
        let mut flows = self.0.flows.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = match event {
            WatchEvent::Snapshot { entries, .. } => {
                flows.clear();
                for entry in entries {
                    put(&mut flows, entry);
                }
                true
            }
            WatchEvent::Changes(changes) => changes.iter().fold(false, |changed, change| {
                let is_ours = match change {
                    Change::Put(entry) => put(&mut flows, entry),
                    Change::Deleted { key, .. } => delete(&mut flows, key),
                };
                changed | is_ours
            }),
        };
        drop(flows);
        if changed {
            self.0.version.send_modify(|version| *version += 1);
        }
    }
}

/// Reads a value; one that cannot be read is logged and what was known stays.
fn read<T: DeserializeOwned>(entry: &Entry) -> Option<T> {
    entry.decode().inspect_err(|error| tracing::error!(%error, "a record of a run cannot be read")).ok()
}

fn view<'a>(flows: &'a mut HashMap<FlowId, FlowRuns>, flow: &FlowId, run: RunId) -> &'a mut RunView {
    flows.entry(flow.clone()).or_default().runs.entry(run).or_default()
}

fn put(flows: &mut HashMap<FlowId, FlowRuns>, entry: &Entry) -> bool {
    match &entry.key {
        Key::RunSpec(flow, run) => {
            let Some(spec) = read(entry) else { return false };
            view(flows, flow, *run).spec = Some(spec);
        }
        Key::RunPlan(flow, run) => {
            let Some(plan) = read(entry) else { return false };
            view(flows, flow, *run).plan = Some(plan);
        }
        Key::RunChunk(flow, run, chunk) => {
            let Some(done) = read(entry) else { return false };
            view(flows, flow, *run).chunks.insert(*chunk, done);
        }
        Key::RunLost(flow, run, chunk) => {
            view(flows, flow, *run).lost.insert(*chunk);
        }
        Key::RunLoaded(flow, run, sink, chunk) => {
            view(flows, flow, *run).loaded.entry(sink.clone()).or_default().insert(*chunk);
        }
        Key::RunSink(flow, run, sink) => {
            let Some(state) = read(entry) else { return false };
            view(flows, flow, *run).sinks.insert(sink.clone(), state);
        }
        Key::SinkDetached(flow, sink) => {
            let Some(detached) = read(entry) else { return false };
            flows.entry(flow.clone()).or_default().detached.insert(sink.clone(), detached);
        }
        _ => return false,
    }
    true
}

fn delete(flows: &mut HashMap<FlowId, FlowRuns>, key: &Key) -> bool {
    match key {
        Key::FlowSpec(flow) => {
            flows.remove(flow);
            return true;
        }
        Key::RunSpec(flow, run) => {
            // The run is forgotten; the rest of its keys goes with it.
            return flows.get_mut(flow).is_some_and(|runs| runs.runs.remove(run).is_some());
        }
        _ => {}
    }
    let Some((flow, change)) = deletion(key) else { return false };
    let Some(runs) = flows.get_mut(flow) else { return false };
    change(runs);
    true
}

type Deletion<'a> = Box<dyn FnOnce(&mut FlowRuns) + 'a>;

/// What the deletion of one key of a run that goes on takes away.
fn deletion(key: &Key) -> Option<(&FlowId, Deletion<'_>)> {
    let in_run = |run: RunId, change: fn(&mut RunView, &Key)| -> Deletion<'_> {
        Box::new(move |runs: &mut FlowRuns| {
            if let Some(view) = runs.runs.get_mut(&run) {
                change(view, key);
            }
        })
    };
    Some(match key {
        Key::RunPlan(flow, run) => (flow, in_run(*run, |view, _| view.plan = None)),
        Key::RunChunk(flow, run, _) | Key::RunLost(flow, run, _) | Key::RunLoaded(flow, run, ..) => {
            (flow, in_run(*run, forget_chunk))
        }
        Key::RunSink(flow, run, _) => (flow, in_run(*run, forget_chunk)),
        Key::SinkDetached(flow, sink) => (
            flow,
            Box::new(move |runs: &mut FlowRuns| {
                runs.detached.remove(sink);
            }),
        ),
        _ => return None,
    })
}

fn forget_chunk(view: &mut RunView, key: &Key) {
    match key {
        Key::RunChunk(_, _, chunk) => drop(view.chunks.remove(chunk)),
        Key::RunLost(_, _, chunk) => drop(view.lost.remove(chunk)),
        Key::RunLoaded(_, _, sink, chunk) => {
            if let Some(loaded) = view.loaded.get_mut(sink) {
                loaded.remove(chunk);
            }
        }
        Key::RunSink(_, _, sink) => drop(view.sinks.remove(sink)),
        _ => {}
    }
}
