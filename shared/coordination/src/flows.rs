//! The flow store: desired state with revisions, written by the controller, read by everybody.

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::{Compare, CompareOp, DeleteOptions, PutOptions, Txn, TxnOp};
use wallaby_model::flow::FlowDocument;
use wallaby_model::flow::change::{planned_runs, sink_anew};
use wallaby_model::{FlowId, Position, Reader, RunId, SinkId, TaskId, WorkerId};

use crate::checkpoint::Checkpoint;
use crate::client::{REQUEST_BYTES_MAX, TXN_OPERATIONS_MAX, encode};
use crate::clock::wall_clock_now;
use crate::keys::Key;
use crate::records::{Detached, FlowRecord, FlowStatus, Hold, LockRecord, PurgePoint, WorkerInfo};
use crate::watch::{Entry, decode};
use crate::{Coordination, Error, Result, Revision};

/// How often adding a sink is tried again because the purge point moved meanwhile.
const PURGE_RACES_MAX: u32 = 16;

/// A flow as it stands in etcd.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowEntry {
    /// The flow.
    pub flow: FlowId,
    /// What is wanted of it.
    pub record: FlowRecord,
    /// The revision of this value: what updates and [`crate::WorkerSession::acquire`] compare.
    pub revision: Revision,
    /// The revision that made the flow: what was written before is not of it, but of an earlier one of the same name.
    pub created: Revision,
}

/// All flows, and the keys that could not be read.
#[derive(Debug, Default)]
pub struct FlowList {
    /// In order of their names.
    pub flows: Vec<FlowEntry>,
    /// One per record of another version or written by hand.
    pub malformed: Vec<Error>,
}

/// A worker that is alive.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerEntry {
    /// Its id.
    pub worker: WorkerId,
    /// What it says of itself.
    pub info: WorkerInfo,
}

/// A held lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockEntry {
    /// The task.
    pub task: TaskId,
    /// Who holds it.
    pub holder: LockRecord,
    /// The lock's create revision.
    pub create_revision: Revision,
}

impl FlowEntry {
    /// Reads an entry of [`Key::FlowSpec`], from a list or a watch.
    ///
    /// # Errors
    /// `Malformed`.
    pub fn from_entry(flow: FlowId, entry: &Entry) -> Result<FlowEntry> {
        Ok(FlowEntry { flow, record: entry.decode()?, revision: entry.mod_revision, created: entry.create_revision })
    }
}

impl Coordination {
    /// Makes a flow, with a hold for each of its sinks in the same transaction: they start at the flow's first resume. With
    /// `snapshot: initial` or `only` the first run is made as well.
    ///
    /// # Errors
    /// `FlowExists`; `TooLarge`; `TooManyOperations`; when etcd cannot be reached.
    pub async fn create_flow(&self, document: FlowDocument) -> Result<FlowEntry> {
        let flow = document.metadata.name.clone();
        let sinks: Vec<SinkId> = document.spec.sinks.iter().map(|sink| sink.name.clone()).collect();
        let created_at = wall_clock_now();
        let sinks_since = BTreeMap::new();
        let record = FlowRecord { document, generation: 1, resumes: 0, created_at, deleting_since: None, sinks_since };
        let key = self.keys().text(&Key::FlowSpec(flow.clone()));
        let value = encode(&key, &record)?;
        let mut then = vec![TxnOp::put(key.clone(), value.clone(), None)];
        for sink in &sinks {
            then.push(self.hold_put(&flow, sink, Hold { position: None })?);
        }
        let runs = planned_runs(None, &record.document.spec, created_at);
        let mut bytes = value.len();
        if !runs.is_empty() {
            // Nothing of the flow exists, so there is no index to compare.
            let new = self.new_runs(&flow, None, &runs).await?;
            bytes += new.bytes;
            then.extend(new.puts);
        }
        check_size(&flow, &key, bytes, then.len())?;
        let txn = Txn::new()
            .when(vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then(then)
            .or_else(vec![TxnOp::get(key, None)]);
        let outcome = self.transact("creating a flow", txn).await?;
        let found = outcome.read(0);
        let revision = match found {
            None => outcome.revision,
            // An earlier attempt of this call was done, its answer lost.
            Some(found) if outcome.is_repeated && found.value == value => found.mod_revision,
            Some(_) => return Err(Error::FlowExists(flow)),
        };
        Ok(FlowEntry { flow, record, revision, created: revision })
    }

    /// Reads a flow.
    ///
    /// # Errors
    /// `FlowNotFound`; `Malformed`; when etcd cannot be reached.
    pub async fn flow(&self, flow: &FlowId) -> Result<FlowEntry> {
        let entry = self.get(&Key::FlowSpec(flow.clone())).await?;
        let entry = entry.ok_or_else(|| Error::FlowNotFound(flow.clone()))?;
        FlowEntry::from_entry(flow.clone(), &entry)
    }

    /// All flows at one revision.
    ///
    /// # Errors
    /// When etcd cannot be reached. Records that cannot be read are listed apart.
    pub async fn flows(&self) -> Result<FlowList> {
        let mut list = FlowList::default();
        for entry in self.list(&self.keys().flows()).await? {
            let Key::FlowSpec(flow) = &entry.key else { continue };
            match FlowEntry::from_entry(flow.clone(), &entry) {
                Ok(flow) => list.flows.push(flow),
                Err(error) => list.malformed.push(error),
            }
        }
        Ok(list)
    }

    /// Changes a flow that was read as `seen`. Sinks that are new need the position they start at in `starts` (the log's end
    /// now; `None` when nothing was ever staged): their holds are written, and those of sinks that go are deleted with
    /// their tasks' keys, in the same transaction, and so are the runs made that load new sinks and new tables. Sinks that go are
    /// taken out of the runs that are not over; one that was for no other is cancelled. The generation grows when the
    /// specification changed.
    ///
    /// # Errors
    /// `FlowChanged` when somebody else was first; `FlowNotFound`; `FlowDeleting`; `HoldMissing` for a new sink without a
    /// start; `HoldBelowPurge` when the log was purged past a start: read the log's end again; `TooManyRuns`; `TooLarge`;
    /// `TooManyOperations`; when etcd cannot be reached.
    pub async fn update_flow(
        &self,
        seen: &FlowEntry,
        document: FlowDocument,
        starts: &BTreeMap<SinkId, Option<Position>>,
    ) -> Result<FlowEntry> {
        let mut record = seen.record.clone();
        if record.document.spec != document.spec {
            record.generation += 1;
        }
        record.document = document;
        let (before, after) = (sinks_of(&seen.record), sinks_of(&record));
        record.sinks_since.retain(|sink, _| after.contains(sink));
        record.sinks_since.extend(after.difference(&before).map(|sink| (sink.clone(), seen.revision.0)));
        self.replace_flow(seen, record, starts).await
    }

    /// Lets tasks that stopped for a person try again.
    ///
    /// # Errors
    /// As [`Coordination::update_flow`].
    pub async fn resume_flow(&self, seen: &FlowEntry) -> Result<FlowEntry> {
        let mut record = seen.record.clone();
        record.resumes += 1;
        self.replace_flow(seen, record, &BTreeMap::new()).await
    }

    /// Marks a flow as to be deleted: its tasks then remove what they made. [`Coordination::remove_flow`] ends it.
    ///
    /// # Errors
    /// As [`Coordination::update_flow`].
    pub async fn mark_flow_deleting(&self, seen: &FlowEntry) -> Result<FlowEntry> {
        if seen.record.deleting_since.is_some() {
            return Ok(seen.clone());
        }
        let mut record = seen.record.clone();
        record.deleting_since = Some(wall_clock_now());
        self.replace_flow(seen, record, &BTreeMap::new()).await
    }

    /// Deletes everything about a flow that was read as `seen`: specification, status, holds, purge point, and its tasks'
    /// locks, status and checkpoints. An owner that still runs is told by its lock's deletion.
    ///
    /// # Errors
    /// `FlowChanged`; when etcd cannot be reached. A flow that is gone already is no error.
    pub async fn remove_flow(&self, seen: &FlowEntry) -> Result<()> {
        let flow = &seen.flow;
        let key = self.keys().text(&Key::FlowSpec(flow.clone()));
        let all = || Some(DeleteOptions::new().with_prefix());
        let txn = Txn::new()
            .when(vec![Compare::mod_revision(key.clone(), CompareOp::Equal, seen.revision.0)])
            .and_then(vec![
                TxnOp::delete(self.keys().flow(flow), all()),
                TxnOp::delete(self.keys().tasks_of(flow), all()),
            ])
            .or_else(vec![TxnOp::get(key, None)]);
        let outcome = self.transact("removing a flow", txn).await?;
        match outcome.read(0) {
            Some(found) => {
                Err(Error::FlowChanged { flow: flow.clone(), expected: seen.revision, found: found.mod_revision })
            }
            None => Ok(()),
        }
    }

    /// Writes what only the controller knows. Not guarded: replicas say the same.
    ///
    /// # Errors
    /// `FlowNotFound`: nothing is written for a flow that is gone; when etcd cannot be reached.
    pub async fn put_flow_status(&self, flow: &FlowId, status: &FlowStatus) -> Result<()> {
        let spec = self.keys().text(&Key::FlowSpec(flow.clone()));
        let key = self.keys().text(&Key::FlowStatus(flow.clone()));
        let value = encode(&key, status)?;
        let txn = Txn::new()
            .when(vec![Compare::create_revision(spec, CompareOp::Greater, 0)])
            .and_then(vec![TxnOp::put(key, value, None)]);
        let outcome = self.transact("writing the flow's status", txn).await?;
        if outcome.succeeded { Ok(()) } else { Err(Error::FlowNotFound(flow.clone())) }
    }

    /// The workers that are alive.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn workers(&self) -> Result<Vec<WorkerEntry>> {
        let mut workers = Vec::new();
        for entry in self.list(&self.keys().workers()).await? {
            if let Key::Worker(worker) = &entry.key {
                workers.push(WorkerEntry { worker: worker.clone(), info: entry.decode()? });
            }
        }
        Ok(workers)
    }

    /// Who owns which task of a flow.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn locks(&self, flow: &FlowId) -> Result<Vec<LockEntry>> {
        let mut locks = Vec::new();
        for entry in self.list(&self.keys().tasks_of(flow)).await? {
            if let Key::TaskLock(task) = &entry.key {
                let create_revision = entry.create_revision;
                locks.push(LockEntry { task: task.clone(), holder: entry.decode()?, create_revision });
            }
        }
        Ok(locks)
    }

    /// A task's checkpoint.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn checkpoint(&self, task: &TaskId) -> Result<Option<Checkpoint>> {
        self.get(&Key::TaskCheckpoint(task.clone())).await?.map(|entry| entry.decode()).transpose()
    }

    /// Asks a worker to hand its tasks over and end. The request lives under the worker's lease and goes with it.
    ///
    /// # Errors
    /// `WorkerNotFound`; when etcd cannot be reached.
    pub async fn request_drain(&self, worker: &WorkerId) -> Result<()> {
        let unknown = || Error::WorkerNotFound(worker.clone());
        let entry = self.get(&Key::Worker(worker.clone())).await?.ok_or_else(unknown)?;
        let alive = self.keys().text(&Key::Worker(worker.clone()));
        let key = self.keys().text(&Key::WorkerDrain(worker.clone()));
        let under_its_lease = PutOptions::new().with_lease(entry.lease);
        let txn = Txn::new()
            .when(vec![Compare::lease(alive, CompareOp::Equal, entry.lease)])
            .and_then(vec![TxnOp::put(key, "{}", Some(under_its_lease))]);
        match self.transact("asking a worker to drain", txn).await {
            Ok(outcome) if outcome.succeeded => Ok(()),
            Ok(_) | Err(Error::LeaseLost { .. }) => Err(unknown()),
            Err(error) => Err(error),
        }
    }

    /// Brings a detached sink back: gives it a hold at `start` (the log's end now) and makes the run that loads it anew, in
    /// one transaction. The run that was made before, when it was, is what it returns.
    ///
    /// # Errors
    /// `NotDetached`; `HoldBelowPurge`: read the log's end again; `FlowChanged`; `FlowDeleting`; `TooManyRuns`; when etcd
    /// cannot be reached.
    pub async fn reattach_sink(&self, seen: &FlowEntry, sink: &SinkId, start: Option<Position>) -> Result<RunId> {
        const DOING: &str = "reattaching a sink";
        let flow = &seen.flow;
        if seen.record.deleting_since.is_some() {
            return Err(Error::FlowDeleting(flow.clone()));
        }
        let keys = self.keys();
        let (flow_key, purge_key) = (Key::FlowSpec(flow.clone()), Key::FlowPurge(flow.clone()));
        let detached_key = Key::SinkDetached(flow.clone(), sink.clone());
        let spec = sink_anew(sink, wall_clock_now());
        for _ in 0..PURGE_RACES_MAX {
            let not_detached = || Error::NotDetached { flow: flow.clone(), sink: sink.clone() };
            let entry = self.get(&detached_key).await?.ok_or_else(not_detached)?;
            let mut detached: Detached = entry.decode()?;
            if let Some(run) = detached.run {
                return Ok(run);
            }
            let purge = self.get(&purge_key).await?;
            let purge_revision = purge.as_ref().map_or(0, |entry| entry.mod_revision.0);
            let purged = purge.map(|entry| entry.decode::<PurgePoint>()).transpose()?.map(|point| point.position);
            check_hold(flow, &sink.into(), Hold { position: start }, purged)?;
            let index = self.run_index(flow).await?;
            let new = self.new_runs(flow, index.as_ref(), std::slice::from_ref(&spec)).await?;
            detached.run = new.runs.first().copied();
            let mut when = vec![
                Compare::mod_revision(keys.text(&flow_key), CompareOp::Equal, seen.revision.0),
                Compare::mod_revision(keys.text(&detached_key), CompareOp::Equal, entry.mod_revision.0),
                Compare::mod_revision(keys.text(&purge_key), CompareOp::Equal, purge_revision),
            ];
            when.extend(new.compares);
            let value = encode(&keys.text(&detached_key), &detached)?;
            let mut then = vec![
                TxnOp::put(keys.text(&detached_key), value, None),
                self.hold_put(flow, sink, Hold { position: start })?,
            ];
            then.extend(new.puts);
            let reads = vec![TxnOp::get(keys.text(&flow_key), None)];
            let outcome = self.transact(DOING, Txn::new().when(when).and_then(then).or_else(reads)).await?;
            if let (true, Some(run)) = (outcome.succeeded, detached.run) {
                return Ok(run);
            }
            let found = outcome.read(0).ok_or_else(|| Error::FlowNotFound(flow.clone()))?.mod_revision;
            if found != seen.revision {
                return Err(Error::FlowChanged { flow: flow.clone(), expected: seen.revision, found });
            }
        }
        let cause = "the purge point moved, or runs were made, at each of many attempts".to_owned();
        Err(Error::Refused { doing: DOING, cause })
    }

    async fn replace_flow(
        &self,
        seen: &FlowEntry,
        record: FlowRecord,
        starts: &BTreeMap<SinkId, Option<Position>>,
    ) -> Result<FlowEntry> {
        if seen.record.deleting_since.is_some() {
            return Err(Error::FlowDeleting(seen.flow.clone()));
        }
        for _ in 0..PURGE_RACES_MAX {
            if let Some(revision) = self.try_replace_flow(seen, &record, starts).await? {
                return Ok(FlowEntry { flow: seen.flow.clone(), record, revision, created: seen.created });
            }
        }
        let cause = "the purge point moved, or runs were made, at each of many attempts".to_owned();
        Err(Error::Refused { doing: "changing a flow", cause })
    }

    /// `None` when the purge point moved, or a run was made or changed, between reading and writing.
    async fn try_replace_flow(
        &self,
        seen: &FlowEntry,
        record: &FlowRecord,
        starts: &BTreeMap<SinkId, Option<Position>>,
    ) -> Result<Option<Revision>> {
        let flow = &seen.flow;
        let key = self.keys().text(&Key::FlowSpec(flow.clone()));
        let purge_key = self.keys().text(&Key::FlowPurge(flow.clone()));
        let value = encode(&key, record)?;
        let (before, after) = (sinks_of(&seen.record), sinks_of(record));
        let mut when = vec![Compare::mod_revision(key.clone(), CompareOp::Equal, seen.revision.0)];
        let mut then = vec![TxnOp::put(key.clone(), value.clone(), None)];
        let mut bytes = value.len();
        let added: Vec<&SinkId> = after.difference(&before).collect();
        if !added.is_empty() {
            // A purge that is under way either sees these holds or moves the purge point before this transaction.
            let purge = self.get(&Key::FlowPurge(flow.clone())).await?;
            let unmoved = purge.as_ref().map_or(0, |entry| entry.mod_revision.0);
            when.push(Compare::mod_revision(purge_key.clone(), CompareOp::Equal, unmoved));
            let purged = purge.map(|entry| entry.decode::<PurgePoint>()).transpose()?.map(|point| point.position);
            for sink in added {
                let missing = || Error::HoldMissing { flow: flow.clone(), reader: sink.clone() };
                let hold = Hold { position: *starts.get(sink).ok_or_else(missing)? };
                check_hold(flow, &sink.into(), hold, purged)?;
                then.push(self.hold_put(flow, sink, hold)?);
            }
        }
        let removed: Vec<&SinkId> = before.difference(&after).collect();
        if !removed.is_empty() {
            let without = self.runs_without(flow, &removed).await?;
            when.extend(without.compares);
            then.extend(without.puts);
            bytes += without.bytes;
        }
        for sink in removed {
            let task = TaskId::apply(flow, sink);
            let all = || Some(DeleteOptions::new().with_prefix());
            then.push(TxnOp::delete(self.keys().text(&Key::FlowHold(flow.clone(), sink.into())), None));
            then.push(TxnOp::delete(self.keys().text(&Key::SinkDetached(flow.clone(), sink.clone())), None));
            then.push(TxnOp::delete(self.keys().task(&task), all()));
            then.push(TxnOp::delete(self.keys().load_tasks_of(flow, sink), all()));
        }
        let runs = planned_runs(Some(&seen.record.document.spec), &record.document.spec, wall_clock_now());
        if !runs.is_empty() {
            let index = self.run_index(flow).await?;
            let new = self.new_runs(flow, index.as_ref(), &runs).await?;
            when.extend(new.compares);
            then.extend(new.puts);
            bytes += new.bytes;
        }
        check_size(flow, &key, bytes, then.len())?;
        let reads = vec![TxnOp::get(key, None), TxnOp::get(purge_key, None)];
        let outcome = self.transact("changing a flow", Txn::new().when(when).and_then(then).or_else(reads)).await?;
        if outcome.succeeded {
            return Ok(Some(outcome.revision));
        }
        match outcome.read(0) {
            None => Err(Error::FlowNotFound(flow.clone())),
            Some(found) if found.mod_revision == seen.revision => Ok(None),
            Some(found) if outcome.is_repeated && found.value == value => Ok(Some(found.mod_revision)),
            Some(found) => {
                Err(Error::FlowChanged { flow: flow.clone(), expected: seen.revision, found: found.mod_revision })
            }
        }
    }

    fn hold_put(&self, flow: &FlowId, sink: &SinkId, hold: Hold) -> Result<TxnOp> {
        let key = self.keys().text(&Key::FlowHold(flow.clone(), sink.into()));
        let value = encode(&key, &hold)?;
        Ok(TxnOp::put(key, value, None))
    }
}

fn sinks_of(record: &FlowRecord) -> BTreeSet<SinkId> {
    record.document.spec.sinks.iter().map(|sink| sink.name.clone()).collect()
}

/// A reader may start only where nothing that it needs can be gone.
pub(crate) fn check_hold(flow: &FlowId, reader: &Reader, hold: Hold, purged: Option<Position>) -> Result<()> {
    let Some(purged) = purged else { return Ok(()) };
    let wanted = hold.position.unwrap_or(Position::ZERO);
    if wanted >= purged {
        return Ok(());
    }
    Err(Error::HoldBelowPurge { flow: flow.clone(), reader: reader.clone(), wanted, purged })
}

/// `value_bytes`: of the specification, and of those of runs, which repeat its tables.
fn check_size(flow: &FlowId, key: &str, value_bytes: usize, operations: usize) -> Result<()> {
    if operations > TXN_OPERATIONS_MAX {
        return Err(Error::TooManyOperations { flow: flow.clone(), operations, limit: TXN_OPERATIONS_MAX });
    }
    // Holds and deletions take little more than their keys.
    let bytes = value_bytes + operations * 256;
    if bytes > REQUEST_BYTES_MAX {
        return Err(Error::TooLarge { key: key.to_owned(), bytes, limit: REQUEST_BYTES_MAX });
    }
    Ok(())
}

/// The lock's holder, from a list or a watch.
impl LockEntry {
    /// Reads an entry of [`Key::TaskLock`].
    ///
    /// # Errors
    /// `Malformed`.
    pub fn from_entry(task: TaskId, entry: &Entry) -> Result<LockEntry> {
        let holder = decode(&format!("{:?}", entry.key), &entry.value)?;
        Ok(LockEntry { task, holder, create_revision: entry.create_revision })
    }
}
