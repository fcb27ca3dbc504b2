//! What stands in etcd: JSON documents, one type per key.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use wallaby_model::condition::{Condition, Timestamp};
use wallaby_model::flow::FlowDocument;
use wallaby_model::{Epoch, Position, RunId, SinkId, TaskId, WorkerId};

use crate::Revision;

/// `workers/<W>`: a worker that is alive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// How many tasks it takes.
    pub capacity: u32,
    /// How many it has.
    pub load: u32,
    /// Its version, as `wallaby --version` says.
    pub version: String,
    /// Where it runs, for spreading; free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// What it can do: connector names.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Where its metrics and health are served, `host:port`.
    pub address: String,
    /// It takes no offers and hands its tasks over.
    #[serde(default)]
    pub draining: bool,
    /// When it started.
    pub started_at: Timestamp,
}

/// `tasks/<T>/lock`: who owns a task. The key's create revision guards all writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The owner.
    pub worker: WorkerId,
    /// The owner's address.
    pub address: String,
    /// One per attempt at the lock: tells our own put, whose answer was lost, from somebody else's.
    pub attempt: Uuid,
}

/// `flows/<F>/spec`: what is wanted of a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowRecord {
    /// As the user wrote it.
    pub document: FlowDocument,
    /// Counts changes of `document.spec`, from 1.
    pub generation: u64,
    /// Counts `resume` commands: a task that stopped for a person tries again when it grows.
    #[serde(default)]
    pub resumes: u64,
    /// When the flow was made.
    pub created_at: Timestamp,
    /// Set once the flow is to go: tasks remove what they made (slot, publication), then the controller removes the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleting_since: Option<Timestamp>,
    /// For each sink that was added to the living flow: a revision at which it was not there. What a sink of that name kept in
    /// an earlier life has an older epoch.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sinks_since: BTreeMap<SinkId, i64>,
}

impl FlowRecord {
    /// Epochs of a sink's tasks below this one are of an earlier flow, or an earlier sink, of the same name. `created` is the
    /// revision that made the flow.
    pub fn sink_since(&self, created: Revision, sink: &SinkId) -> Epoch {
        let added = self.sinks_since.get(sink).copied().unwrap_or(0);
        Epoch(u64::try_from(created.0.max(added)).unwrap_or(0))
    }
}

/// `flows/<F>/status`: what only the controller knows.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowStatus {
    /// The generation that these statements are about.
    pub generation: u64,
    /// `Accepted`, and others that need no owner of a task.
    pub conditions: Vec<Condition>,
    /// Tasks without an owner, and since when they are offered.
    pub offered_since: BTreeMap<TaskId, Timestamp>,
    /// When this was written.
    pub at: Timestamp,
}

/// `flows/<F>/holds/<R>`: what a reader still needs of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Everything after this position. `None`: everything from the flow's first resume on (a sink made with the flow).
    pub position: Option<Position>,
}

/// `flows/<F>/purge`: the log may be gone up to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgePoint {
    /// Nothing after this position was purged.
    pub position: Position,
}

/// `flows/<F>/sinks/<S>/detached`: the sink needed more of the log than it may hold, and reads nothing until it has loaded
/// everything anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// When.
    pub at: Timestamp,
    /// Its hold then: what came after it is in the log no longer, or will go. `None`: it had applied nothing.
    pub position: Option<Position>,
    /// Why, as a sentence.
    pub reason: String,
    /// The run that loads the sink anew, once it was made. The key goes when that run's tables are taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
}

impl Detached {
    /// Whether the sink is out of a run: of every one while it waits for the run that brings it back, and then of those before that
    /// one. Those after it are loaded once it is back.
    pub fn is_out_of(&self, run: RunId) -> bool {
        self.run.is_none_or(|with| run < with)
    }
}

/// `flows/<F>/runs/index`: numbers are given once, and each new run compares this key.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RunIndex {
    /// The last number given; 0 for none.
    pub last: u32,
    /// The runs whose specification and plan are kept, in order.
    pub kept: Vec<RunId>,
}
