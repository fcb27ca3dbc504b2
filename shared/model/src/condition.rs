//! What a flow and its tasks say of themselves: conditions, phases, progress.
//!
//! These are written to etcd by their owners and merged by the API. Nothing here carries a row value or a secret.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, WorkerId};
use crate::position::{Lsn, Position};

/// A moment on the wall clock, in milliseconds since 1970 UTC. For people only: no decision rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not; `message` says what it waits for and what a person can do.
    False,
    /// Nobody can say at the moment.
    Unknown,
}

/// What a condition is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// The specification can be acted upon.
    Accepted,
    /// The source can be reached and fits: rights, publication, slot.
    SourceReady,
    /// Changes are being staged.
    Capturing,
    /// Existing rows are loaded.
    SnapshotComplete,
    /// The slot exists, is ours, and holds back less WAL than allowed.
    SlotHealthy,
    /// The log has room: segments that no reader needs any more stay for the whole replay window.
    LogHealthy,
    /// A sink or stream takes changes.
    Delivering,
    /// A sink or stream is within its lag.
    CaughtUp,
}

/// One statement about a flow, a sink or a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// One word in CamelCase, for programs.
    pub reason: String,
    /// A sentence for people: what is, what it waits for, what to do.
    #[serde(default)]
    pub message: String,
    /// Since when `status` is what it is.
    pub since: Timestamp,
}

impl Condition {
    /// A statement made at `now`.
    pub fn new(
        kind: ConditionType,
        status: ConditionStatus,
        reason: impl Into<String>,
        message: impl Into<String>,
        now: Timestamp,
    ) -> Condition {
        Condition { kind, status, reason: reason.into(), message: message.into(), since: now }
    }
}

/// Puts `new` into `conditions`, one per type; `since` stays while the status does not change. Says whether anything
/// but `since` changed.
pub fn set_condition(conditions: &mut Vec<Condition>, mut new: Condition) -> bool {
    let Some(old) = conditions.iter_mut().find(|condition| condition.kind == new.kind) else {
        conditions.push(new);
        conditions.sort_by_key(|condition| condition.kind);
        return true;
    };
    if old.status == new.status {
        new.since = old.since;
    }
    let changed = *old != new;
    *old = new;
    changed
}

/// Where a task stands (protocol.md, "States of a capture task"; an apply task passes the same ones, with `Opening`
/// in the place of fencing, resuming and waiting for the slot).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub enum TaskPhase {
    /// Nobody owns it and nobody was asked.
    #[default]
    Unassigned,
    /// An offer is out.
    Offered,
    /// A worker holds the lock.
    Locked,
    /// Capture: the fence is being written.
    Fencing,
    /// Capture: the position is read, the resume record written.
    Resuming,
    /// Capture: the slot is still held by an older epoch's walsender.
    SlotWait,
    /// Apply: the sink is being taken over.
    Opening,
    /// Changes flow, or there are none.
    Streaming,
    /// What comes next does not take more at the moment.
    Backpressured,
    /// The batch is finished, then the lock released.
    Draining,
    /// After an error, until `retry_at`.
    Backoff,
    /// Going on would lose or corrupt data: waits for a person (`wallaby resume`) or a changed specification.
    Stopped,
    /// The flow or the sink is paused by its specification.
    Paused,
    /// The worker could no longer be sure of its lease.
    SelfFenced,
}

/// What a task waits for, so that a wait is told from a hang.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// A few words: "the sink's answer", "space in the log", "the walsender of epoch 7".
    pub what: String,
    /// Since when.
    pub since: Timestamp,
}

/// How far a task has come. Absent figures are not known (yet) or do not apply to its kind.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Durable in the log up to here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged: Option<Position>,
    /// Durable in the sink up to here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied: Option<Position>,
    /// Told to Postgres as flushed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confirmed_lsn: Option<Lsn>,
    /// The source's end of WAL as last heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_lsn: Option<Lsn>,
    /// WAL bytes that the slot keeps the source from removing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained_wal_bytes: Option<u64>,
    /// WAL bytes between the source's (capture) or the log's (apply) end and this task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// Milliseconds between the commit of the last change handled and the moment it was handled; 0 when caught up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u64>,
    /// Rows since this owner took the task.
    pub rows: u64,
    /// Transactions since this owner took the task.
    pub transactions: u64,
    /// Encoded bytes since this owner took the task.
    pub bytes: u64,
}

/// What the owner of a task says of it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TaskStatus {
    /// Where it stands.
    pub phase: TaskPhase,
    /// Since when it stands there.
    pub phase_since: Timestamp,
    /// Who wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerId>,
    /// The epoch of this ownership, once fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// The generation of the specification that it acts upon.
    #[serde(default)]
    pub generation: u64,
    /// Statements about the flow (capture) or the sink (apply).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The last error, as a sentence with its remedy. Stays until the task works again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When a task in `Backoff` goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<Waiting>,
    /// How far it has come.
    #[serde(default)]
    pub progress: Progress,
    /// When this was written.
    pub at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capturing(status: ConditionStatus, reason: &str, at: u64) -> Condition {
        Condition::new(ConditionType::Capturing, status, reason, "", Timestamp(at))
    }

    #[test]
    fn since_moves_with_the_status_only() {
        let mut conditions = Vec::new();
        assert!(set_condition(&mut conditions, capturing(ConditionStatus::False, "SlotWait", 1)));
        assert!(set_condition(&mut conditions, capturing(ConditionStatus::False, "LogFull", 2)));
        assert_eq!(conditions[0].since, Timestamp(1));
        assert!(!set_condition(&mut conditions, capturing(ConditionStatus::False, "LogFull", 3)));
        assert!(set_condition(&mut conditions, capturing(ConditionStatus::True, "Streaming", 4)));
        assert_eq!(conditions[0].since, Timestamp(4));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn a_status_survives_json_and_takes_absent_figures() {
        let status: Result<TaskStatus, _> = serde_json::from_str(r#"{"phase":"Streaming","phase_since":1,"at":2}"#);
        assert_eq!(
            status.ok(),
            Some(TaskStatus {
                phase: TaskPhase::Streaming,
                phase_since: Timestamp(1),
                at: Timestamp(2),
                ..TaskStatus::default()
            })
        );
    }
}
