//! Tells a task that its lock was deleted behind its back: one watch per session, for all its locks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use wallaby_model::TaskId;

use crate::keys::Key;
use crate::watch::{Change, Mode, WatchEvent};
use crate::{Coordination, Revision, metrics};

/// The locks of one session.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    locks: Mutex<HashMap<TaskId, Registered>>,
}

#[derive(Clone, Debug)]
struct Registered {
    create_revision: Revision,
    lost: CancellationToken,
}

impl Registry {
    fn locks(&self) -> MutexGuard<'_, HashMap<TaskId, Registered>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, task: &TaskId, create_revision: Revision, lost: CancellationToken) {
        self.locks().insert(task.clone(), Registered { create_revision, lost });
    }

    pub(crate) fn remove(&self, task: &TaskId, create_revision: Revision) {
        let mut locks = self.locks();
        if locks.get(task).is_some_and(|registered| registered.create_revision == create_revision) {
            locks.remove(task);
        }
    }

    pub(crate) fn tasks(&self) -> Vec<TaskId> {
        self.locks().keys().cloned().collect()
    }

    /// The lock of `task` was deleted at `revision`.
    fn deleted(&self, task: &TaskId, revision: Revision) {
        let mut locks = self.locks();
        let Some(registered) = locks.get(task) else { return };
        if registered.create_revision < revision {
            metrics::lock_lost();
            tracing::warn!(%task, "the task's lock was deleted: dropping the task");
            registered.lost.cancel();
            locks.remove(task);
        }
    }

    /// The lock of `task` is now `found`, read at some revision after it was registered.
    fn found(&self, task: &TaskId, expected: Revision, found: Option<Revision>) {
        if found == Some(expected) {
            return;
        }
        let is_ours = self.locks().get(task).is_some_and(|registered| registered.create_revision == expected);
        if is_ours {
            self.deleted(task, Revision(i64::MAX));
        }
    }

    fn expected(&self) -> Vec<(TaskId, Revision)> {
        self.locks().iter().map(|(task, registered)| (task.clone(), registered.create_revision)).collect()
    }
}

/// Runs until the session ends.
pub(crate) async fn run(coordination: Coordination, registry: Arc<Registry>) {
    let mut watch = coordination.watch_as(coordination.keys().tasks(), Mode::Deletions);
    while let Some(event) = watch.next().await {
        match event {
            WatchEvent::Snapshot { .. } => verify(&coordination, &registry).await,
            WatchEvent::Changes(changes) => {
                for change in changes {
                    if let Change::Deleted { key: Key::TaskLock(task), revision } = change {
                        registry.deleted(&task, revision);
                    }
                }
            }
        }
    }
}

/// Deletions may have been missed: looks at each lock.
async fn verify(coordination: &Coordination, registry: &Registry) {
    for (task, expected) in registry.expected() {
        match coordination.get(&Key::TaskLock(task.clone())).await {
            Ok(entry) => registry.found(&task, expected, entry.map(|entry| entry.create_revision)),
            Err(error) => {
                // The next write of the task finds out.
                tracing::debug!(%task, %error, "could not look at the task's lock");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn task() -> TaskId {
        "shop.capture".parse().unwrap()
    }

    #[test]
    fn only_a_deletion_after_the_lock_was_made_counts() {
        let registry = Registry::default();
        let lost = CancellationToken::new();
        registry.add(&task(), Revision(10), lost.clone());
        registry.deleted(&task(), Revision(9));
        assert!(!lost.is_cancelled());
        registry.deleted(&task(), Revision(12));
        assert!(lost.is_cancelled());
        assert!(registry.tasks().is_empty());
    }

    #[test]
    fn a_look_at_the_lock_finds_another_owner_and_none() {
        for found in [None, Some(Revision(11))] {
            let registry = Registry::default();
            let lost = CancellationToken::new();
            registry.add(&task(), Revision(10), lost.clone());
            registry.found(&task(), Revision(10), Some(Revision(10)));
            assert!(!lost.is_cancelled());
            registry.found(&task(), Revision(10), found);
            assert!(lost.is_cancelled());
        }
    }

    #[test]
    fn an_old_release_does_not_forget_a_new_lock() {
        let registry = Registry::default();
        registry.add(&task(), Revision(12), CancellationToken::new());
        registry.remove(&task(), Revision(10));
        assert_eq!(registry.tasks(), vec![task()]);
    }
}
