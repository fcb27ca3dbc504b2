//! The flows as this worker sees them: one watch on etcd for all tasks, and what a flow asks of one task.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Change, Coordination, Entry, FlowRecord, Key, Revision, WatchEvent};
use wallaby_model::flow::{FlowDocument, LogSpec, PostgresSourceSpec, SecretRef, SinkSpec, SnapshotMode};
use wallaby_model::{Epoch, FlowId, SinkId, TaskId, TaskKind};

use crate::runs::RunBoard;

/// A flow's record and the revision that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    /// What is wanted.
    pub record: FlowRecord,
    /// The revision of the spec key.
    pub revision: Revision,
    /// The revision that made the flow.
    pub created: Revision,
}

impl Flow {
    /// Reads a spec entry; one that cannot be read is logged and left out.
    fn read(entry: &Entry) -> Option<Flow> {
        match entry.decode::<FlowRecord>() {
            Ok(record) => Some(Flow { record, revision: entry.mod_revision, created: entry.create_revision }),
            Err(error) => {
                tracing::error!(%error, "a flow's record cannot be read; its tasks stay where they are");
                None
            }
        }
    }
}

/// What a flow asks of one task. A task runs on while this stays equal, whatever else changes in the flow.
#[derive(Clone, Debug, PartialEq)]
pub enum Demand {
    /// Capture with these settings.
    Capture(Box<CaptureDemand>),
    /// Apply with these settings.
    Apply(Box<ApplyDemand>),
    /// The flow is being deleted: remove the slot, the publication and the log.
    Remove(Box<CaptureDemand>),
    /// Own a snapshot run.
    Run(Box<SourceDemand>),
    /// Read a chunk.
    Chunk(Box<SourceDemand>),
    /// Load a chunk into a sink.
    Load(Box<ApplyDemand>),
    /// Compare the source with a sink.
    Verify(Box<VerifyDemand>),
    /// Nothing: paused, gone, or the sink is not part of the flow any more.
    Nothing,
}

/// The part of a flow that its capture task acts on.
#[derive(Clone, Debug, PartialEq)]
pub struct CaptureDemand {
    /// The source.
    pub source: PostgresSourceSpec,
    /// The log.
    pub log: LogSpec,
    /// The slot's name.
    pub slot: String,
    /// The publication's name.
    pub publication: String,
}

/// The part of a flow that the tasks of a snapshot run act on. Not which tables are published, and nothing of the log: tables that are
/// added, or room that is made, must not cost a run its snapshot. Where parts are kept never changes, and how many may be is looked up
/// when the side store is opened ([`crate::task::TaskContext::log_spec`]).
#[derive(Clone, Debug, PartialEq)]
pub struct SourceDemand {
    /// How to connect to the source.
    pub dsn: SecretRef,
    /// The publication's name.
    pub publication: String,
    /// Whether changes are captured. Without them (`snapshot: only`) nothing makes rows of two snapshots converge.
    pub is_captured: bool,
}

/// The part of a flow that one apply task acts on. Not which tables are published: the sinks go on when tables are added.
#[derive(Clone, Debug, PartialEq)]
pub struct ApplyDemand {
    /// The sink.
    pub sink: SinkSpec,
    /// The source.
    pub source: SourceDemand,
    /// Whether tables are loaded before their changes flow.
    pub snapshot: SnapshotMode,
    /// Epochs below this one are of an earlier flow, or an earlier sink, of this name.
    pub since: Epoch,
}

/// The part of a flow that a comparison acts on. Which sink it is says the operation.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyDemand {
    /// How to connect to the source.
    pub dsn: SecretRef,
    /// The publication's name: it says which tables, columns and rows are sent.
    pub publication: String,
    /// The sinks.
    pub sinks: Vec<SinkSpec>,
}

/// What `flow` asks of `task`: the one place that says what a change of a specification does to a running task. It goes on while
/// this is equal, and ends, to be taken anew, when it is not.
pub fn demand(flow: Option<&Flow>, task: &TaskId) -> Demand {
    let Some(flow) = flow else { return Demand::Nothing };
    let document: &FlowDocument = &flow.record.document;
    let source = &document.spec.source.postgres;
    let capture = || CaptureDemand {
        source: source.clone(),
        log: document.spec.log.clone(),
        slot: document.slot_name(),
        publication: document.publication_name(),
    };
    let of_source = || SourceDemand {
        dsn: source.dsn.clone(),
        publication: document.publication_name(),
        is_captured: source.snapshot != SnapshotMode::Only,
    };
    let of_sink = |name: &SinkId| {
        let sink = document.spec.sinks.iter().find(|sink| sink.name == *name && !sink.paused)?;
        Some(Box::new(ApplyDemand {
            sink: sink.clone(),
            source: of_source(),
            snapshot: source.snapshot,
            since: flow.record.sink_since(flow.created, name),
        }))
    };
    let is_deleting = flow.record.deleting_since.is_some();
    match &task.kind {
        TaskKind::Capture if is_deleting => Demand::Remove(Box::new(capture())),
        _ if is_deleting || document.spec.paused => Demand::Nothing,
        TaskKind::Capture => Demand::Capture(Box::new(capture())),
        TaskKind::Apply(name) => of_sink(name).map_or(Demand::Nothing, Demand::Apply),
        TaskKind::Load(name, ..) => of_sink(name).map_or(Demand::Nothing, Demand::Load),
        TaskKind::Run(_) => Demand::Run(Box::new(of_source())),
        TaskKind::Chunk(..) => Demand::Chunk(Box::new(of_source())),
        TaskKind::Verify(_) => Demand::Verify(Box::new(VerifyDemand {
            dsn: document.spec.source.postgres.dsn.clone(),
            publication: document.publication_name(),
            sinks: document.spec.sinks_by_name().into_iter().cloned().collect(),
        })),
    }
}

/// All flows, by id.
pub type Flows = Arc<HashMap<FlowId, Arc<Flow>>>;

/// The running watch; ends when dropped.
pub struct FlowWatch {
    flows: watch::Receiver<Flows>,
    runs: RunBoard,
    _task: AbortOnDropHandle<()>,
}

impl FlowWatch {
    /// Starts watching.
    pub fn start(coordination: &Coordination) -> FlowWatch {
        let (sender, flows) = watch::channel(Flows::default());
        let mut events = coordination.watch(coordination.keys().flows());
        let runs = RunBoard::default();
        let board = runs.clone();
        let task = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                board.take(&event);
                let mut known: HashMap<FlowId, Arc<Flow>> = sender.borrow().as_ref().clone();
                if take(&mut known, event) {
                    sender.send_replace(Arc::new(known));
                }
            }
        });
        FlowWatch { flows, runs, _task: AbortOnDropHandle::new(task) }
    }

    /// The snapshot runs of all flows.
    pub fn runs(&self) -> RunBoard {
        self.runs.clone()
    }

    /// The flows, now and on every change.
    pub fn subscribe(&self) -> watch::Receiver<Flows> {
        self.flows.clone()
    }
}

/// Takes an event; says whether a flow changed.
fn take(known: &mut HashMap<FlowId, Arc<Flow>>, event: WatchEvent) -> bool {
    match event {
        WatchEvent::Snapshot { entries, .. } => {
            let mut found = HashMap::new();
            for entry in &entries {
                let Key::FlowSpec(id) = &entry.key else { continue };
                if let Some(flow) = Flow::read(entry) {
                    found.insert(id.clone(), Arc::new(flow));
                } else if let Some(old) = known.get(id) {
                    found.insert(id.clone(), Arc::clone(old));
                }
            }
            *known = found;
            true
        }
        WatchEvent::Changes(changes) => {
            let mut changed = false;
            for change in changes {
                match change {
                    Change::Put(entry) => {
                        let Key::FlowSpec(id) = &entry.key else { continue };
                        if let Some(flow) = Flow::read(&entry) {
                            known.insert(id.clone(), Arc::new(flow));
                            changed = true;
                        }
                    }
                    Change::Deleted { key: Key::FlowSpec(id), .. } => changed |= known.remove(&id).is_some(),
                    Change::Deleted { .. } => {}
                }
            }
            changed
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::RunId;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::flow::change::{ComparisonUnderWay, Effect, RunUnderWay, UnderWay, flow_change};
    use wallaby_model::flow::{ByteSize, Span, page::EXAMPLE, parse};

    fn flow(document: FlowDocument) -> Flow {
        let record = FlowRecord {
            document,
            generation: 1,
            resumes: 0,
            created_at: Timestamp(0),
            deleting_since: None,
            sinks_since: std::collections::BTreeMap::new(),
        };
        Flow { record, revision: Revision(2), created: Revision(1) }
    }

    /// What `wallaby diff` says of a change is what becomes of the tasks.
    #[test]
    fn the_tasks_that_begin_again_are_those_that_a_diff_names() {
        type Edit = (&'static str, fn(&mut FlowDocument));
        let edits: [Edit; 13] = [
            ("labels", |flow| drop(flow.metadata.labels.insert("a".into(), "b".into()))),
            ("maxBytes", |flow| flow.spec.log.max_bytes = ByteSize(9 << 30)),
            ("replayWindow", |flow| flow.spec.log.replay_window = Span(std::time::Duration::from_secs(7))),
            ("chunksMax", |flow| {
                let side = r#"{ "jetstream": { "chunksMax": "3Gi", "transactionsMax": "2Gi" } }"#;
                flow.spec.log.side_store = serde_json::from_str(side).unwrap();
            }),
            ("safety", |flow| flow.spec.source.postgres.safety.retained_wal_max = ByteSize(1 << 30)),
            ("largeTransactionBytes", |flow| flow.spec.source.postgres.large_transaction_bytes = ByteSize(9 << 20)),
            ("tables", |flow| flow.spec.source.postgres.publication.tables.push("shop.orders".into())),
            ("dsn", |flow| flow.spec.source.postgres.dsn = SecretRef::Env("OTHER".into())),
            ("paused", |flow| flow.spec.paused = true),
            ("sinks in another order", |flow| flow.spec.sinks.reverse()),
            ("another sink removed", |flow| drop(flow.spec.sinks.pop())),
            ("sink paused", |flow| flow.spec.sinks[0].paused = true),
            ("onOverrun", |flow| flow.spec.sinks[0].on_overrun = wallaby_model::flow::OnOverrun::Backpressure),
        ];
        for (name, edit) in edits {
            let mut before = parse(EXAMPLE, "-").unwrap();
            let mut second = before.spec.sinks[0].clone();
            second.name = wallaby_model::SinkId::new("a-second").unwrap();
            before.spec.sinks.push(second);
            let mut after = before.clone();
            edit(&mut after);
            let sinks = before.spec.sinks.iter().map(|sink| sink.name.clone()).collect();
            let run = RunUnderWay { run: RunId(1), sinks, is_paused: false, holds_snapshot: true };
            let comparison = ComparisonUnderWay { number: 1, sink: before.spec.sinks[0].name.clone() };
            let under_way = UnderWay { runs: vec![run], comparisons: vec![comparison] };
            let change = flow_change(Some(&before), &after, &under_way);
            assert!(change.refused.is_empty(), "{name}: {change:?}");
            let sink = before.spec.sinks[0].name.clone();
            let says = |subject: String| {
                change.effects.iter().any(|effect| {
                    effect.subject == subject && matches!(effect.effect, Effect::Restarts | Effect::Paused)
                })
            };
            let id = before.metadata.name.clone();
            let (before, after) = (flow(before), flow(after));
            let differs = |task: TaskId| demand(Some(&before), &task) != demand(Some(&after), &task);
            assert_eq!(differs(TaskId::capture(&id)), says("capture".to_owned()), "the capture, by {name}");
            assert_eq!(differs(TaskId::apply(&id, &sink)), says(format!("sink {sink}")), "the sink, by {name}");
            let task = |kind| TaskId { flow: id.clone(), kind };
            assert_eq!(differs(task(TaskKind::Run(RunId(1)))), says("run 1".to_owned()), "the run, by {name}");
            assert_eq!(
                differs(task(TaskKind::Verify(1))),
                says("comparison 1".to_owned()),
                "the comparison, by {name}"
            );
        }
    }
}
