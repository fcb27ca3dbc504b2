//! Snapshot runs as the view has them, folded change by change: what is left to read and to load is known without looking at
//! every chunk again, however many thousands there are.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use wallaby_model::condition::Timestamp;
use wallaby_model::run::{
    ChunkDone, ChunkLoaded, PlannedRelation, RunPlan, RunReason, RunSpec, RunState, RunWish, SinkRun, TableStage,
};
use wallaby_model::{ChunkId, SinkId};

/// Chunks whose reading gives the rate.
const RATE_CHUNKS: usize = 64;

/// Chunks that are loaded into one sink at a time.
pub const LOADS_AT_ONCE: usize = 4;

/// What was counted of some chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How many chunks.
    pub chunks: u64,
    /// Their rows.
    pub rows: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
}

/// One run as etcd has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunView {
    spec: Option<RunSpec>,
    plan: Option<RunPlan>,
    done: BTreeMap<ChunkId, Counts>,
    loaded: BTreeMap<SinkId, BTreeMap<ChunkId, u64>>,
    sinks: BTreeMap<SinkId, SinkRun>,
    /// Of the plan, and not read.
    pending: BTreeSet<ChunkId>,
    /// Read, of the plan, and not known to be at the sink.
    unloaded: BTreeMap<SinkId, BTreeSet<ChunkId>>,
    /// By index of the plan's relations; chunks of an earlier start of the relation do not count.
    by_relation: Vec<Counts>,
    /// The bytes of the largest chunk that was read.
    largest: u64,
    /// Rows and milliseconds of the chunks that were read last.
    recent: VecDeque<(u64, u64)>,
}

/// How long a sink that was cut off rests before a run loads it anew: it may still be what it was cut off for, and each load reads
/// the whole source. Doubled with each load of it in a row that came to nothing.
const REST: Duration = Duration::from_secs(10);
const REST_DOUBLED_MAX: u32 = 6;

/// When a sink that was cut off at `since` is to be loaded anew. `runs`: the flow's, in order.
pub fn reattached_at<'a>(runs: impl Iterator<Item = &'a RunView>, sink: &SinkId, since: Timestamp) -> Timestamp {
    let mut in_vain = 0;
    let is_of_sink = |spec: &RunSpec| spec.reason == RunReason::SinkAnew && spec.sinks == std::slice::from_ref(sink);
    for run in runs.filter(|run| run.spec().is_some_and(is_of_sink)) {
        // Also one that ended by itself, because its sink was cut off again.
        let is_cancelled = run.spec().is_some_and(|spec| spec.wish == RunWish::Cancel)
            || run.plan().is_some_and(|plan| plan.state == RunState::Cancelled);
        in_vain = if is_cancelled { in_vain + 1 } else { 0 };
    }
    let rest = REST * 2_u32.pow(in_vain.min(REST_DOUBLED_MAX));
    Timestamp(since.0 + rest.as_millis() as u64)
}

impl RunView {
    /// What is asked; `None` while only other keys of the run are known.
    pub fn spec(&self) -> Option<&RunSpec> {
        self.spec.as_ref()
    }

    /// Its plan; `None` before its owner wrote one.
    pub fn plan(&self) -> Option<&RunPlan> {
        self.plan.as_ref()
    }

    /// Whether it is asked for and not over.
    pub fn is_open(&self) -> bool {
        self.spec.is_some() && !self.is_over()
    }

    /// Whether something more comes of it.
    pub fn is_wanted(&self) -> bool {
        self.is_open() && self.spec().is_some_and(|spec| spec.wish != RunWish::Cancel)
    }

    /// Whether nothing more comes of it.
    pub fn is_over(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.state.is_over())
    }

    /// Whether keys of chunks stand there that nobody needs any more.
    pub fn has_leftovers(&self) -> bool {
        self.is_over() && !(self.done.is_empty() && self.loaded.values().all(BTreeMap::is_empty))
    }

    /// How far the sinks are that have begun.
    pub fn sinks(&self) -> &BTreeMap<SinkId, SinkRun> {
        &self.sinks
    }

    /// Chunks of the plan that are not read, in order.
    pub fn pending(&self) -> impl Iterator<Item = ChunkId> + '_ {
        self.pending.iter().copied()
    }

    /// Whether every chunk of it is read.
    pub fn is_read(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| !matches!(plan.state, RunState::Planning | RunState::Reading))
    }

    /// Whether chunks may be read now: there is a snapshot to read under, and nobody wants it otherwise.
    pub fn may_read(&self) -> bool {
        let wish = self.spec.as_ref().map(|spec| spec.wish);
        let Some(plan) = &self.plan else { return false };
        wish == Some(RunWish::Go) && plan.state == RunState::Reading && plan.snapshot().is_some()
    }

    /// The chunks that a sink should load next, at most [`LOADS_AT_ONCE`]: read, of tables that it has prepared, and not known
    /// to be there.
    pub fn loads(&self, sink: &SinkId) -> Vec<ChunkId> {
        let cancelled = self.spec.as_ref().is_none_or(|spec| spec.wish == RunWish::Cancel);
        let (Some(plan), Some(state), Some(unloaded)) = (&self.plan, self.sinks.get(sink), self.unloaded.get(sink))
        else {
            return Vec::new();
        };
        if cancelled || plan.state.is_over() || state.is_done {
            return Vec::new();
        }
        let mut loads = Vec::new();
        for (table, relation) in (0_u32..).zip(&plan.relations) {
            if state.tables.get(&relation.table.to_string()) != Some(&TableStage::Copying) {
                continue;
            }
            let first = ChunkId { table, restart: relation.restart, number: 0 };
            let last = ChunkId { number: u32::MAX, ..first };
            loads.extend(unloaded.range(first..=last).copied().take(LOADS_AT_ONCE - loads.len()));
            if loads.len() == LOADS_AT_ONCE {
                break;
            }
        }
        loads
    }

    /// The chunks of the plan that are read. Of a run that is over: what was kept.
    pub fn read(&self) -> Counts {
        if let Some(totals) = self.plan.as_ref().and_then(|plan| plan.totals) {
            return Counts { chunks: totals.chunks, rows: totals.rows, bytes: totals.bytes };
        }
        self.by_relation.iter().fold(Counts::default(), |sum, counts| Counts {
            chunks: sum.chunks + counts.chunks,
            rows: sum.rows + counts.rows,
            bytes: sum.bytes + counts.bytes,
        })
    }

    /// How many chunks may be read, or be on their way, while the run may keep no more than `share` bytes in the side store for `sinks`,
    /// those that it waits for. One always goes: a share may be smaller than a chunk.
    pub fn fitting<'a>(&self, share: u64, sinks: impl Iterator<Item = &'a SinkId>) -> usize {
        let mut kept = BTreeSet::new();
        for sink in sinks {
            match self.unloaded.get(sink) {
                Some(unloaded) => kept.extend(unloaded.iter().copied()),
                // It has not begun.
                None => kept.extend(self.done.keys().copied().filter(|chunk| self.is_of_plan(*chunk))),
            }
        }
        let kept: u64 = kept.iter().filter_map(|chunk| self.done.get(chunk)).map(|counts| counts.bytes).sum();
        let more = share.saturating_sub(kept).checked_div(self.largest).unwrap_or(1);
        usize::try_from(more).unwrap_or(usize::MAX).max(usize::from(kept == 0))
    }

    /// The chunks of one relation of the plan that are read.
    pub fn read_of(&self, index: usize) -> Counts {
        self.by_relation.get(index).copied().unwrap_or_default()
    }

    /// The chunks that a sink is known to have, and their rows.
    pub fn loaded(&self, sink: &SinkId) -> (u64, u64) {
        let Some(loaded) = self.loaded.get(sink) else { return (0, 0) };
        (loaded.len() as u64, loaded.values().sum())
    }

    /// Rows a second of one reader, from the chunks that were read last.
    pub fn rate_of_a_reader(&self) -> Option<f64> {
        let (rows, ms) = self.recent.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (ms > 0).then(|| rows as f64 * 1000.0 / ms as f64)
    }

    pub(crate) fn put_spec(&mut self, spec: RunSpec) {
        self.spec = Some(spec);
    }

    pub(crate) fn put_plan(&mut self, plan: RunPlan) {
        let is_same = self.plan.as_ref().is_some_and(|known| is_same_cut(&known.relations, &plan.relations));
        self.plan = Some(plan);
        if !is_same {
            self.count_anew();
        }
    }

    pub(crate) fn put_done(&mut self, chunk: ChunkId, done: &ChunkDone) {
        let counts = Counts { chunks: 1, rows: done.rows, bytes: done.bytes };
        if self.done.insert(chunk, counts).is_some() {
            return;
        }
        self.largest = self.largest.max(done.bytes);
        self.recent.push_back((done.rows, done.took_ms));
        if self.recent.len() > RATE_CHUNKS {
            self.recent.pop_front();
        }
        if self.is_of_plan(chunk) {
            self.count(chunk, counts);
        }
    }

    pub(crate) fn put_loaded(&mut self, sink: &SinkId, chunk: ChunkId, loaded: &ChunkLoaded) {
        self.loaded.entry(sink.clone()).or_default().insert(chunk, loaded.rows);
        if let Some(unloaded) = self.unloaded.get_mut(sink) {
            unloaded.remove(&chunk);
        }
    }

    pub(crate) fn put_sink(&mut self, sink: &SinkId, state: SinkRun) {
        self.sinks.insert(sink.clone(), state);
        if !self.unloaded.contains_key(sink) {
            let unloaded = self.unloaded_at(sink);
            self.unloaded.insert(sink.clone(), unloaded);
        }
    }

    pub(crate) fn delete_spec(&mut self) {
        self.spec = None;
    }

    pub(crate) fn delete_plan(&mut self) {
        self.plan = None;
        self.count_anew();
    }

    /// Chunks are only deleted once a run is over: nothing is counted then.
    pub(crate) fn delete_done(&mut self, chunk: ChunkId) {
        self.done.remove(&chunk);
        if !self.is_over() {
            self.count_anew();
        }
    }

    pub(crate) fn delete_loaded(&mut self, sink: &SinkId, chunk: ChunkId) {
        if let Some(loaded) = self.loaded.get_mut(sink) {
            loaded.remove(&chunk);
        }
        // Of a sink that has not begun nothing is counted: that begins with its state.
        if self.done.contains_key(&chunk)
            && self.is_of_plan(chunk)
            && let Some(unloaded) = self.unloaded.get_mut(sink)
        {
            unloaded.insert(chunk);
        }
    }

    pub(crate) fn delete_sink(&mut self, sink: &SinkId) {
        self.sinks.remove(sink);
        self.unloaded.remove(sink);
    }

    /// Whether etcd has nothing about it any more.
    pub(crate) fn is_empty(&self) -> bool {
        let no_loaded = self.loaded.values().all(BTreeMap::is_empty);
        self.spec.is_none() && self.plan.is_none() && self.done.is_empty() && self.sinks.is_empty() && no_loaded
    }

    fn is_of_plan(&self, chunk: ChunkId) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.has(chunk))
    }

    fn count(&mut self, chunk: ChunkId, counts: Counts) {
        self.pending.remove(&chunk);
        if let Some(sum) = self.by_relation.get_mut(chunk.table as usize) {
            sum.chunks += 1;
            sum.rows += counts.rows;
            sum.bytes += counts.bytes;
        }
        for (sink, unloaded) in &mut self.unloaded {
            if !self.loaded.get(sink).is_some_and(|loaded| loaded.contains_key(&chunk)) {
                unloaded.insert(chunk);
            }
        }
    }

    fn unloaded_at(&self, sink: &SinkId) -> BTreeSet<ChunkId> {
        let loaded = self.loaded.get(sink);
        let is_missing = |chunk: &ChunkId| !loaded.is_some_and(|loaded| loaded.contains_key(chunk));
        self.done.keys().filter(|chunk| self.is_of_plan(**chunk)).filter(|chunk| is_missing(chunk)).copied().collect()
    }

    /// After the plan was cut in another way, which is seldom.
    fn count_anew(&mut self) {
        let plan = self.plan.as_ref();
        self.pending = plan.map(|plan| plan.chunks().collect()).unwrap_or_default();
        self.by_relation = vec![Counts::default(); plan.map_or(0, |plan| plan.relations.len())];
        self.unloaded.values_mut().for_each(BTreeSet::clear);
        let of_plan: Vec<(ChunkId, Counts)> =
            self.done.iter().filter(|(chunk, _)| self.is_of_plan(**chunk)).map(|(chunk, c)| (*chunk, *c)).collect();
        for (chunk, counts) in of_plan {
            self.count(chunk, counts);
        }
    }
}

/// Whether two plans have the same chunks.
fn is_same_cut(a: &[PlannedRelation], b: &[PlannedRelation]) -> bool {
    let cut = |relation: &PlannedRelation| (relation.chunks(), relation.restart, relation.state);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| cut(a) == cut(b))
}

#[cfg(test)]
#[path = "runs_tests.rs"]
pub(crate) mod tests;
