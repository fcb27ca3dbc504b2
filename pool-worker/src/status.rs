//! What a task says of itself: kept in memory by the task, written to etcd by a loop of its own.
//!
//! The task never waits for etcd here: it sets what it knows, and at most once a second the latest state goes out in one
//! guarded write.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use wallaby_model::condition::{
    Condition, ConditionStatus, ConditionType, Progress, TaskPhase, TaskStatus, Timestamp, Waiting, set_condition,
};
use wallaby_model::{Epoch, WorkerId};

/// How often a changed status is written at most.
pub const WRITE_EVERY: Duration = Duration::from_secs(1);

/// Milliseconds since 1970, by the wall clock: for people only.
pub fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

struct Inner {
    status: Mutex<TaskStatus>,
    changed: Notify,
}

/// A task's statement about itself; cheap to clone.
#[derive(Clone)]
pub struct StatusBoard(Arc<Inner>);

impl StatusBoard {
    /// The statement of a task that was just locked.
    pub fn new(worker: WorkerId, generation: u64) -> StatusBoard {
        let now = now();
        let status = TaskStatus {
            phase: TaskPhase::Locked,
            phase_since: now,
            worker: Some(worker),
            generation,
            at: now,
            ..TaskStatus::default()
        };
        StatusBoard(Arc::new(Inner { status: Mutex::new(status), changed: Notify::new() }))
    }

    fn edit(&self, edit: impl FnOnce(&mut TaskStatus)) {
        let mut status = self.lock();
        edit(&mut status);
        status.at = now();
        drop(status);
        self.0.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, TaskStatus> {
        // Every edit leaves a whole status behind, also one that panicked.
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statement as it is now.
    pub fn snapshot(&self) -> TaskStatus {
        self.lock().clone()
    }

    /// Returns when something changed since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Sets the epoch of this ownership.
    pub fn epoch(&self, epoch: Epoch) {
        self.edit(|status| status.epoch = Some(epoch));
    }

    /// Says which generation of the flow the task acts upon.
    pub fn generation(&self, generation: u64) {
        if self.lock().generation != generation {
            self.edit(|status| status.generation = generation);
        }
    }

    /// Says where the task stands.
    pub fn phase(&self, phase: TaskPhase) {
        self.edit(|status| {
            if status.phase != phase {
                status.phase = phase;
                status.phase_since = now();
            }
            if phase != TaskPhase::Backoff {
                status.retry_at = None;
            }
            if phase == TaskPhase::Streaming {
                status.last_error = None;
            }
        });
    }

    /// Says what the task waits for; `None` when it runs.
    pub fn waiting(&self, what: Option<&str>) {
        if self.lock().waiting_for.as_ref().map(|waiting| waiting.what.as_str()) == what {
            return;
        }
        self.edit(|status| {
            status.waiting_for = what.map(|what| Waiting { what: what.to_owned(), since: now() });
        });
    }

    /// Says that a try failed and when the next one comes.
    pub fn backoff(&self, error: &str, delay: Duration) {
        let now = now();
        self.edit(|status| {
            if status.phase != TaskPhase::Backoff {
                status.phase_since = now;
            }
            status.phase = TaskPhase::Backoff;
            status.last_error = Some(error.to_owned());
            status.retry_at = Some(Timestamp(now.0.saturating_add(delay.as_millis() as u64)));
        });
    }

    /// Says that going on would lose or corrupt data, and what a person can do.
    pub fn stopped(&self, error: &str) {
        self.edit(|status| {
            status.phase = TaskPhase::Stopped;
            status.phase_since = now();
            status.last_error = Some(error.to_owned());
            status.retry_at = None;
        });
    }

    /// Makes a statement about the flow or the sink.
    pub fn condition(&self, kind: ConditionType, holds: bool, reason: &str, message: &str) {
        let status = if holds { ConditionStatus::True } else { ConditionStatus::False };
        let condition = Condition::new(kind, status, reason, message, now());
        let mut changed = false;
        {
            let mut status = self.lock();
            changed |= set_condition(&mut status.conditions, condition);
        }
        if changed {
            self.edit(|_| {});
        }
    }

    /// Edits the figures.
    pub fn progress(&self, edit: impl FnOnce(&mut Progress)) {
        self.edit(|status| edit(&mut status.progress));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[tokio::test]
    async fn an_error_stays_until_the_task_works_again() {
        let board = StatusBoard::new(WorkerId::new("w1").unwrap(), 3);
        board.backoff("the sink is away", Duration::from_secs(5));
        let status = board.snapshot();
        assert_eq!(status.phase, TaskPhase::Backoff);
        assert!(status.retry_at.unwrap() > status.phase_since);
        board.phase(TaskPhase::Opening);
        assert_eq!(board.snapshot().last_error.as_deref(), Some("the sink is away"));
        board.phase(TaskPhase::Streaming);
        assert_eq!(board.snapshot().last_error, None);
        board.changed().await;
    }
}
