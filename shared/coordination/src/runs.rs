//! Snapshot runs: what is asked, what is planned, what is done. The types are `wallaby_model::run`'s; who writes which key is
//! said there. Numbers are never given twice in the life of a flow: sinks tell loads apart by them.

use std::collections::BTreeMap;

use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};
use wallaby_model::run::{ChunkDone, ChunkLoaded, RunPlan, RunSpec, RunTotals, RunWish, SinkRun};
use wallaby_model::{ChunkId, FlowId, Reader, RunId, SinkId};

use crate::client::encode;
use crate::flows::FlowEntry;
use crate::keys::Key;
use crate::lock::TaskLock;
use crate::packed::encode_packed;
use crate::records::RunIndex;
use crate::watch::{Entry, decode};
use crate::{Coordination, Error, Result, Revision};

/// How often a write is tried again because others came between.
const RACES_MAX: u32 = 32;

/// Runs of a flow that are not over, at most.
const OPEN_MAX: usize = 32;

/// Finished runs whose specification and plan are kept.
const FINISHED_KEPT: usize = 10;

/// Keys that one transaction deletes: below etcd's 128 operations.
const DELETES_AT_ONCE: usize = 100;

/// A run as it stands in etcd.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEntry {
    /// Its number.
    pub run: RunId,
    /// What is asked of it.
    pub spec: RunSpec,
    /// The revision of the specification.
    pub spec_revision: Revision,
    /// Its plan; none before its owner wrote one.
    pub plan: Option<RunPlan>,
}

impl RunEntry {
    /// Whether nothing more comes of it.
    pub fn is_over(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.state.is_over())
    }
}

/// What came of marking a chunk as done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkOutcome {
    /// This attempt's parts are the chunk.
    Ours,
    /// Another attempt was first, and its parts are the chunk: remove those of this one.
    Theirs(ChunkDone),
}

/// New runs inside a transaction of the flow store.
pub(crate) struct NewRuns {
    pub(crate) runs: Vec<RunId>,
    pub(crate) compares: Vec<Compare>,
    pub(crate) puts: Vec<TxnOp>,
    /// Of the values that are put.
    pub(crate) bytes: usize,
}

/// What makes open runs forget sinks that go, inside a transaction of the flow store.
pub(crate) struct RunsWithout {
    pub(crate) compares: Vec<Compare>,
    pub(crate) puts: Vec<TxnOp>,
    /// Of the values that are put.
    pub(crate) bytes: usize,
}

impl Coordination {
    /// Makes a run of a flow that was read as `seen`: one for all sinks is for those that it has now.
    ///
    /// # Errors
    /// `RunOverlaps`; `TooManyRuns`; `FlowChanged`; `FlowNotFound`; `FlowDeleting`; when etcd cannot be reached.
    pub async fn create_run(&self, seen: &FlowEntry, spec: RunSpec) -> Result<RunEntry> {
        let flow = &seen.flow;
        if seen.record.deleting_since.is_some() {
            return Err(Error::FlowDeleting(flow.clone()));
        }
        let spec = spec.of_sinks(seen.record.document.spec.sinks.iter().map(|sink| &sink.name));
        let flow_key = self.keys().text(&Key::FlowSpec(flow.clone()));
        for _ in 0..RACES_MAX {
            let index = self.run_index(flow).await?;
            let kept = self.runs_of(flow, index.as_ref()).await?;
            self.check_overlap(flow, &kept, &spec).await?;
            let new = self.new_runs(flow, index.as_ref(), std::slice::from_ref(&spec)).await?;
            let mut when = vec![Compare::mod_revision(flow_key.clone(), CompareOp::Equal, seen.revision.0)];
            when.extend(new.compares);
            let run = new.runs.first().copied().unwrap_or(RunId(1));
            let spec_key = self.keys().text(&Key::RunSpec(flow.clone(), run));
            let reads = vec![TxnOp::get(flow_key.clone(), None), TxnOp::get(spec_key, None)];
            let txn = Txn::new().when(when).and_then(new.puts).or_else(reads);
            let outcome = self.transact("making a run", txn).await?;
            if outcome.succeeded {
                return Ok(RunEntry { run, spec, spec_revision: outcome.revision, plan: None });
            }
            if let Some(made) = outcome.read(1)
                && outcome.is_repeated
                && made.value == encode("", &spec)?
            {
                // An earlier attempt of this call was done, its answer lost.
                return Ok(RunEntry { run, spec, spec_revision: made.mod_revision, plan: None });
            }
            let found = outcome.read(0).ok_or_else(|| Error::FlowNotFound(flow.clone()))?.mod_revision;
            if found != seen.revision {
                return Err(Error::FlowChanged { flow: flow.clone(), expected: seen.revision, found });
            }
        }
        let cause = "other runs were made at each of many attempts".to_owned();
        Err(Error::Refused { doing: "making a run", cause })
    }

    /// Refuses a run whose tables are about to be loaded into each of its sinks anyway. One that a single sink would have to wait with
    /// is made: there it comes after the other run.
    async fn check_overlap(&self, flow: &FlowId, kept: &[RunEntry], spec: &RunSpec) -> Result<()> {
        let mut open = Vec::new();
        for other in kept.iter().filter(|other| !other.is_over() && other.spec.wish != RunWish::Cancel) {
            if let Some(tables) = other.spec.overlap(spec) {
                open.push((other, tables, self.sink_runs(flow, other.run).await?));
            }
        }
        let Some((first, tables, _)) = open.first() else { return Ok(()) };
        for sink in &spec.sinks {
            let detached = self.detached(flow, sink).await?;
            if detached.as_ref().is_some_and(|detached| detached.run.is_none()) {
                // It is out of this one as well: the run that brings it back comes later.
                continue;
            }
            let is_loaded_by = |other: &RunEntry, done: &BTreeMap<SinkId, SinkRun>| {
                let is_out = detached.as_ref().is_some_and(|detached| detached.is_out_of(other.run));
                other.spec.loads_into(sink) && !is_out && !done.get(sink).is_some_and(|state| state.is_done)
            };
            if !open.iter().any(|(other, _, done)| is_loaded_by(other, done)) {
                return Ok(());
            }
        }
        Err(Error::RunOverlaps { flow: flow.clone(), run: first.run, tables: tables.clone() })
    }

    /// The index of a flow's runs; `None` before the first one.
    pub(crate) async fn run_index(&self, flow: &FlowId) -> Result<Option<Entry>> {
        self.get(&Key::RunIndex(flow.clone())).await
    }

    /// What makes `specs` the next runs of a flow whose index was read as `seen`.
    pub(crate) async fn new_runs(&self, flow: &FlowId, seen: Option<&Entry>, specs: &[RunSpec]) -> Result<NewRuns> {
        let mut index: RunIndex = seen.map(Entry::decode).transpose()?.unwrap_or_default();
        // Those that are over do not count, and there are more than open ones: they are only read when it may matter.
        if index.kept.len() + specs.len() > OPEN_MAX {
            let open = self.runs_of(flow, seen).await?.iter().filter(|run| !run.is_over()).count();
            if open + specs.len() > OPEN_MAX {
                return Err(Error::TooManyRuns { flow: flow.clone(), open });
            }
        }
        let key = self.keys().text(&Key::RunIndex(flow.clone()));
        let unchanged = seen.map_or(0, |entry| entry.mod_revision.0);
        let compares = vec![Compare::mod_revision(key.clone(), CompareOp::Equal, unchanged)];
        let (mut runs, mut puts, mut bytes) = (Vec::new(), Vec::new(), 0);
        for spec in specs {
            index.last += 1;
            let run = RunId(index.last);
            let spec_key = self.keys().text(&Key::RunSpec(flow.clone(), run));
            let value = encode(&spec_key, spec)?;
            bytes += value.len();
            puts.push(TxnOp::put(spec_key, value, None));
            index.kept.push(run);
            runs.push(run);
        }
        let value = encode(&key, &index)?;
        bytes += value.len();
        puts.push(TxnOp::put(key, value, None));
        Ok(NewRuns { runs, compares, puts, bytes })
    }

    /// What takes sinks that go out of the open runs of a flow: one that is added again under such a name is another sink, and none
    /// of theirs. A run that was for no other is cancelled. No run is made meanwhile that would still name them.
    pub(crate) async fn runs_without(&self, flow: &FlowId, gone: &[&SinkId]) -> Result<RunsWithout> {
        let index = self.run_index(flow).await?;
        let index_key = self.keys().text(&Key::RunIndex(flow.clone()));
        let unchanged = index.as_ref().map_or(0, |entry| entry.mod_revision.0);
        let mut compares = vec![Compare::mod_revision(index_key, CompareOp::Equal, unchanged)];
        let (mut puts, mut bytes) = (Vec::new(), 0);
        for run in self.runs_of(flow, index.as_ref()).await?.into_iter().filter(|run| !run.is_over()) {
            let mut spec = run.spec;
            if !spec.sinks.iter().any(|sink| gone.contains(&sink)) {
                continue;
            }
            if spec.sinks.iter().all(|sink| gone.contains(&sink)) {
                // No sink at all would mean every sink.
                spec.wish = RunWish::Cancel;
            } else {
                spec.sinks.retain(|sink| !gone.contains(&sink));
            }
            let key = self.keys().text(&Key::RunSpec(flow.clone(), run.run));
            let value = encode(&key, &spec)?;
            bytes += value.len();
            compares.push(Compare::mod_revision(key.clone(), CompareOp::Equal, run.spec_revision.0));
            puts.push(TxnOp::put(key, value, None));
        }
        Ok(RunsWithout { compares, puts, bytes })
    }

    /// The runs of a flow that are kept, with their plans, by number: all that are not over, and the last that are.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn runs(&self, flow: &FlowId) -> Result<Vec<RunEntry>> {
        let index = self.run_index(flow).await?;
        self.runs_of(flow, index.as_ref()).await
    }

    async fn runs_of(&self, flow: &FlowId, index: Option<&Entry>) -> Result<Vec<RunEntry>> {
        let Some(index) = index else { return Ok(Vec::new()) };
        let mut runs = Vec::new();
        for run in index.decode::<RunIndex>()?.kept {
            // One that was pruned since the index was read is left out.
            match self.run(flow, run).await {
                Ok(entry) => runs.push(entry),
                Err(Error::RunNotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(runs)
    }

    /// One run with its plan, both as of one revision.
    ///
    /// # Errors
    /// `RunNotFound`; `Malformed`; when etcd cannot be reached.
    pub async fn run(&self, flow: &FlowId, run: RunId) -> Result<RunEntry> {
        let spec_key = self.keys().text(&Key::RunSpec(flow.clone(), run));
        let plan_key = self.keys().text(&Key::RunPlan(flow.clone(), run));
        let reads = vec![TxnOp::get(spec_key, None), TxnOp::get(plan_key, None)];
        let outcome = self.transact("reading a run", Txn::new().and_then(reads)).await?;
        let spec = outcome.read(0).ok_or_else(|| Error::RunNotFound { flow: flow.clone(), run })?;
        let plan = outcome.read(1).map(Entry::decode).transpose()?;
        Ok(RunEntry { run, spec: spec.decode()?, spec_revision: spec.mod_revision, plan })
    }

    /// The chunks of a run that are read.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn run_chunks(&self, flow: &FlowId, run: RunId) -> Result<BTreeMap<ChunkId, ChunkDone>> {
        let mut chunks = BTreeMap::new();
        for entry in self.list(&self.keys().chunks(flow, run)).await? {
            if let Key::RunChunk(_, _, chunk) = &entry.key {
                chunks.insert(*chunk, entry.decode()?);
            }
        }
        Ok(chunks)
    }

    /// One chunk of a run; `None` while it is not read.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn run_chunk(&self, flow: &FlowId, run: RunId, chunk: ChunkId) -> Result<Option<ChunkDone>> {
        self.get(&Key::RunChunk(flow.clone(), run, chunk)).await?.map(|entry| entry.decode()).transpose()
    }

    /// The chunks of a run that one sink is known to have. A hint: the truth is in the sink.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn run_loaded(&self, flow: &FlowId, run: RunId, sink: &SinkId) -> Result<BTreeMap<ChunkId, ChunkLoaded>> {
        let mut loaded = BTreeMap::new();
        for entry in self.list(&self.keys().loaded_by(flow, run, sink)).await? {
            if let Key::RunLoaded(_, _, _, chunk) = &entry.key {
                loaded.insert(*chunk, entry.decode()?);
            }
        }
        Ok(loaded)
    }

    /// How far each sink is in a run; those that have not begun are missing.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn sink_runs(&self, flow: &FlowId, run: RunId) -> Result<BTreeMap<SinkId, SinkRun>> {
        let mut sinks = BTreeMap::new();
        for entry in self.list(&self.keys().run_sinks(flow, run)).await? {
            if let Key::RunSink(_, _, sink) = &entry.key {
                sinks.insert(sink.clone(), entry.decode()?);
            }
        }
        Ok(sinks)
    }

    /// How far one sink is in a run; `None` when it has not begun.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn sink_run(&self, flow: &FlowId, run: RunId, sink: &SinkId) -> Result<Option<SinkRun>> {
        self.get(&Key::RunSink(flow.clone(), run, sink.clone())).await?.map(|entry| entry.decode()).transpose()
    }

    /// Changes what is wanted of a run. A run that is over, or was cancelled, stays so.
    ///
    /// # Errors
    /// `RunNotFound`; `RunOver`; when etcd cannot be reached.
    pub async fn set_run_wish(&self, flow: &FlowId, run: RunId, wish: RunWish) -> Result<RunEntry> {
        const DOING: &str = "changing what is wanted of a run";
        let key = self.keys().text(&Key::RunSpec(flow.clone(), run));
        for _ in 0..RACES_MAX {
            let mut entry = self.run(flow, run).await?;
            if entry.spec.wish == wish {
                return Ok(entry);
            }
            if entry.is_over() || entry.spec.wish == RunWish::Cancel {
                return Err(Error::RunOver { flow: flow.clone(), run });
            }
            entry.spec.wish = wish;
            let value = encode(&key, &entry.spec)?;
            let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, entry.spec_revision.0);
            let txn = Txn::new().when(vec![unchanged]).and_then(vec![TxnOp::put(key.clone(), value, None)]);
            let outcome = self.transact(DOING, txn).await?;
            if outcome.succeeded {
                return Ok(RunEntry { spec_revision: outcome.revision, ..entry });
            }
        }
        Err(Error::Refused { doing: DOING, cause: "it changed at each of many attempts".to_owned() })
    }

    /// Removes what is known of the chunks of a run that is over, with the keys of its chunk and load tasks, and forgets the
    /// oldest of the runs that are over. Whoever notices does it; twice is no harm. False when the run is not over.
    ///
    /// # Errors
    /// `RunNotFound` when it has no plan; `Malformed`; when etcd cannot be reached.
    pub async fn clear_run(&self, flow: &FlowId, run: RunId) -> Result<bool> {
        if !self.keep_totals(flow, run).await? {
            return Ok(false);
        }
        let keys = self.keys();
        for prefix in [keys.chunks(flow, run), keys.loaded(flow, run), keys.chunk_tasks(flow, run)] {
            self.delete_all(&prefix).await?;
        }
        for sink in self.sink_runs(flow, run).await?.keys() {
            self.delete_all(&keys.load_tasks(flow, run, sink)).await?;
        }
        self.forget_old_runs(flow, run).await?;
        Ok(true)
    }

    /// Writes what was read into the plan, once, before the chunks' keys go. False when the run is not over.
    async fn keep_totals(&self, flow: &FlowId, run: RunId) -> Result<bool> {
        let key = Key::RunPlan(flow.clone(), run);
        let unknown = || Error::RunNotFound { flow: flow.clone(), run };
        let entry = self.get(&key).await?.ok_or_else(unknown)?;
        let mut plan: RunPlan = entry.decode()?;
        if !plan.state.is_over() || plan.totals.is_some() {
            return Ok(plan.state.is_over());
        }
        let totals = self.run_chunks(flow, run).await?.values().fold(RunTotals::default(), |sum, done| RunTotals {
            chunks: sum.chunks + 1,
            rows: sum.rows + done.rows,
            bytes: sum.bytes + done.bytes,
        });
        plan.totals = Some(totals);
        let text = self.keys().text(&key);
        let value = encode_packed(&text, &plan)?;
        // Somebody else who clears it writes the same; a plan that is over is written by nobody else.
        let unchanged = Compare::mod_revision(text.clone(), CompareOp::Equal, entry.mod_revision.0);
        let txn = Txn::new().when(vec![unchanged]).and_then(vec![TxnOp::put(text, value, None)]);
        self.transact("keeping the totals of a run", txn).await.map(|_| true)
    }

    async fn delete_all(&self, prefix: &str) -> Result<()> {
        let entries = self.list(prefix).await?;
        for page in entries.chunks(DELETES_AT_ONCE) {
            let deletes: Vec<TxnOp> =
                page.iter().map(|entry| TxnOp::delete(self.keys().text(&entry.key), None)).collect();
            self.transact("clearing a run", Txn::new().and_then(deletes)).await?;
        }
        Ok(())
    }

    /// Forgets the oldest of the runs that are over, and `cleared` when the index has forgotten it: whoever did that ended before its
    /// keys went.
    async fn forget_old_runs(&self, flow: &FlowId, cleared: RunId) -> Result<()> {
        let Some(seen) = self.run_index(flow).await? else { return Ok(()) };
        let mut index: RunIndex = seen.decode()?;
        let standing = self.runs_of(flow, Some(&seen)).await?;
        let over: Vec<RunId> = standing.iter().filter(|run| run.is_over()).map(|run| run.run).collect();
        let mut goners = over[..over.len().saturating_sub(FINISHED_KEPT)].to_vec();
        if !index.kept.contains(&cleared) {
            goners.push(cleared);
        }
        // Numbers of which nothing stands go, too.
        let stays = |run: &RunId| standing.iter().any(|known| known.run == *run) && !goners.contains(run);
        let kept = index.kept.len();
        index.kept.retain(stays);
        if index.kept.len() < kept {
            let key = self.keys().text(&Key::RunIndex(flow.clone()));
            let value = encode(&key, &index)?;
            let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, seen.mod_revision.0);
            let txn = Txn::new().when(vec![unchanged]).and_then(vec![TxnOp::put(key, value, None)]);
            // A run that was made meanwhile comes first; the next one that is cleared takes these out of the index.
            if !self.transact("forgetting old runs", txn).await?.succeeded {
                return Ok(());
            }
        }
        // All keys of a run at once: a specification without its plan would be a run that is not over.
        let all = || Some(DeleteOptions::new().with_prefix());
        for run in goners {
            let delete = TxnOp::delete(self.keys().run(flow, run), all());
            self.transact("forgetting an old run", Txn::new().and_then(vec![delete])).await?;
        }
        Ok(())
    }
}

impl TaskLock {
    /// Run task: writes the plan.
    ///
    /// # Errors
    /// `RunNotFound` when the run was removed; `LockLost`; `TooLarge`; when etcd cannot be reached.
    pub async fn put_plan(&self, run: RunId, plan: &RunPlan) -> Result<()> {
        let key = Key::RunPlan(self.inner.task.flow.clone(), run);
        self.put_of_run("writing the plan", run, &key, plan, Vec::new()).await
    }

    /// Run task: writes the last plan of a run that is over, and deletes the run's hold on the log in the same transaction.
    /// Remove its chunks from the side store before, and call [`Coordination::clear_run`] after it (the controller does, too).
    ///
    /// # Errors
    /// `Refused` when the plan does not say that the run is over; as [`TaskLock::put_plan`].
    pub async fn finish_run(&self, run: RunId, plan: &RunPlan) -> Result<()> {
        const DOING: &str = "finishing a run";
        if !plan.state.is_over() {
            return Err(Error::Refused { doing: DOING, cause: format!("its state is {:?}", plan.state) });
        }
        let flow = &self.inner.task.flow;
        let hold = self.coordination().keys().text(&Key::FlowHold(flow.clone(), Reader::Run(run)));
        let key = Key::RunPlan(flow.clone(), run);
        self.put_of_run(DOING, run, &key, plan, vec![TxnOp::delete(hold, None)]).await
    }

    /// Chunk task: marks a chunk as done, once. Of two attempts the first one is the chunk; a repeated call of the attempt
    /// that won says so again.
    ///
    /// # Errors
    /// `RunNotFound` when the run was removed; `LockLost`; when etcd cannot be reached (then it may have been done).
    pub async fn put_chunk_done(&self, run: RunId, chunk: ChunkId, done: &ChunkDone) -> Result<ChunkOutcome> {
        const DOING: &str = "marking a chunk as done";
        let flow = &self.inner.task.flow;
        let keys = self.coordination().keys();
        let key = keys.text(&Key::RunChunk(flow.clone(), run, chunk));
        let spec = keys.text(&Key::RunSpec(flow.clone(), run));
        let value = encode(&key, done)?;
        let compares = vec![
            Compare::create_revision(key.clone(), CompareOp::Equal, 0),
            Compare::create_revision(spec, CompareOp::Greater, 0),
        ];
        let (put, read) = (TxnOp::put(key.clone(), value, None), TxnOp::get(key.clone(), None));
        let outcome = self.guarded(DOING, compares, vec![put], vec![read]).await?;
        if outcome.succeeded {
            return Ok(ChunkOutcome::Ours);
        }
        let stands = outcome.read(1).ok_or_else(|| Error::RunNotFound { flow: flow.clone(), run })?;
        let stands: ChunkDone = decode(&key, &stands.value)?;
        Ok(if stands == *done { ChunkOutcome::Ours } else { ChunkOutcome::Theirs(stands) })
    }

    /// Load task: says that a sink has a chunk. A hint for the scheduler and for people.
    ///
    /// # Errors
    /// `RunNotFound` when the run was removed; `LockLost`; when etcd cannot be reached.
    pub async fn put_loaded(&self, run: RunId, sink: &SinkId, chunk: ChunkId, loaded: &ChunkLoaded) -> Result<()> {
        let key = Key::RunLoaded(self.inner.task.flow.clone(), run, sink.clone(), chunk);
        self.put_of_run("marking a chunk as loaded", run, &key, loaded, Vec::new()).await
    }

    /// Apply task: takes back that its sink has these chunks: it does not, and they are to be loaded.
    ///
    /// # Errors
    /// `LockLost`; when etcd cannot be reached (then some may be taken back).
    pub async fn take_back_loaded(&self, run: RunId, sink: &SinkId, chunks: &[ChunkId]) -> Result<()> {
        let keys = self.coordination().keys();
        let key = |chunk: &ChunkId| keys.text(&Key::RunLoaded(self.inner.task.flow.clone(), run, sink.clone(), *chunk));
        for page in chunks.chunks(DELETES_AT_ONCE) {
            let deletes = page.iter().map(|chunk| TxnOp::delete(key(chunk), None)).collect();
            self.guarded("taking back that chunks are loaded", Vec::new(), deletes, Vec::new()).await?;
        }
        Ok(())
    }

    /// Apply task: writes how far its sink is in a run.
    ///
    /// # Errors
    /// `RunNotFound` when the run was removed; `LockLost`; when etcd cannot be reached.
    pub async fn put_sink_run(&self, run: RunId, sink: &SinkId, state: &SinkRun) -> Result<()> {
        let key = Key::RunSink(self.inner.task.flow.clone(), run, sink.clone());
        self.put_of_run("writing how far a sink is in a run", run, &key, state, Vec::new()).await
    }

    /// Ends a task that is done for good (a chunk, a load): deletes its lock, status and checkpoint in one transaction.
    ///
    /// # Errors
    /// `LockLost` when it was not ours any more; when etcd cannot be reached.
    pub async fn complete(&self) -> Result<()> {
        let keys = self.coordination().keys();
        let of = |key: Key| TxnOp::delete(keys.text(&key), None);
        let task = &self.inner.task;
        let deletes = vec![of(Key::TaskStatus(task.clone())), of(Key::TaskCheckpoint(task.clone()))];
        self.release_with(deletes).await
    }

    /// A guarded write about a run, only while the run exists.
    async fn put_of_run<T: serde::Serialize>(
        &self,
        doing: &'static str,
        run: RunId,
        key: &Key,
        value: &T,
        more: Vec<TxnOp>,
    ) -> Result<()> {
        let flow = &self.inner.task.flow;
        let keys = self.coordination().keys();
        let text = keys.text(key);
        let exists = Compare::create_revision(keys.text(&Key::RunSpec(flow.clone(), run)), CompareOp::Greater, 0);
        let mut then = vec![TxnOp::put(text.clone(), encode_packed(&text, value)?, None)];
        then.extend(more);
        let outcome = self.guarded(doing, vec![exists], then, Vec::new()).await?;
        if outcome.succeeded { Ok(()) } else { Err(Error::RunNotFound { flow: flow.clone(), run }) }
    }
}
