//! The flows as this worker sees them: one watch on etcd for all tasks, and what a flow asks of one task.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Change, Coordination, Entry, FlowRecord, Key, Revision, WatchEvent};
use wallaby_model::flow::{FlowDocument, LogSpec, PostgresSourceSpec, SecretRef, SinkSpec};
use wallaby_model::{FlowId, TaskId, TaskKind};

/// A flow's record and the revision that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    /// What is wanted.
    pub record: FlowRecord,
    /// The revision of the spec key.
    pub revision: Revision,
}

impl Flow {
    /// Reads a spec entry; one that cannot be read is logged and left out.
    fn read(entry: &Entry) -> Option<Flow> {
        match entry.decode::<FlowRecord>() {
            Ok(record) => Some(Flow { record, revision: entry.mod_revision }),
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

/// The part of a flow that one apply task acts on.
#[derive(Clone, Debug, PartialEq)]
pub struct ApplyDemand {
    /// The sink.
    pub sink: SinkSpec,
    /// The source, for rows that are read again by key.
    pub source: PostgresSourceSpec,
    /// The publication's name: it says which columns are sent.
    pub publication: String,
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

/// What `flow` asks of `task`.
pub fn demand(flow: Option<&Flow>, task: &TaskId) -> Demand {
    let Some(flow) = flow else { return Demand::Nothing };
    let document: &FlowDocument = &flow.record.document;
    let source = document.spec.source.postgres.clone();
    let capture = || CaptureDemand {
        source: source.clone(),
        log: document.spec.log.clone(),
        slot: document.slot_name(),
        publication: document.publication_name(),
    };
    let is_deleting = flow.record.deleting_since.is_some();
    match &task.kind {
        TaskKind::Capture if is_deleting => Demand::Remove(Box::new(capture())),
        _ if is_deleting || document.spec.paused => Demand::Nothing,
        TaskKind::Capture => Demand::Capture(Box::new(capture())),
        TaskKind::Apply(name) => match document.spec.sinks.iter().find(|sink| sink.name == *name) {
            Some(sink) if !sink.paused => {
                let publication = document.publication_name();
                Demand::Apply(Box::new(ApplyDemand { sink: sink.clone(), source, publication }))
            }
            _ => Demand::Nothing,
        },
        TaskKind::Verify(_) => Demand::Verify(Box::new(VerifyDemand {
            dsn: source.dsn.clone(),
            publication: document.publication_name(),
            sinks: document.spec.sinks.clone(),
        })),
        TaskKind::Run(_) | TaskKind::Chunk(..) | TaskKind::Load(..) => Demand::Nothing,
    }
}

/// All flows, by id.
pub type Flows = Arc<HashMap<FlowId, Arc<Flow>>>;

/// The running watch; ends when dropped.
pub struct FlowWatch {
    flows: watch::Receiver<Flows>,
    _task: AbortOnDropHandle<()>,
}

impl FlowWatch {
    /// Starts watching.
    pub fn start(coordination: &Coordination) -> FlowWatch {
        let (sender, flows) = watch::channel(Flows::default());
        let mut events = coordination.watch(coordination.keys().flows());
        let task = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                let mut known: HashMap<FlowId, Arc<Flow>> = sender.borrow().as_ref().clone();
                if take(&mut known, event) {
                    sender.send_replace(Arc::new(known));
                }
            }
        });
        FlowWatch { flows, _task: AbortOnDropHandle::new(task) }
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
