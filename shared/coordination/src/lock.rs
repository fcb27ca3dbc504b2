//! An owned task: its epoch, and writes that etcd does only while the lock is ours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use serde::Serialize;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use wallaby_model::condition::TaskStatus;
use wallaby_model::{Epoch, TaskId};

use crate::checkpoint::{Checkpoint, Mark, SourceSeen, epoch_above};
use crate::client::{Outcome, encode};
use crate::clock::wall_clock_now;
use crate::keys::Key;
use crate::paced::PacedWriter;
use crate::session::SessionInner;
use crate::{Coordination, Error, Result, Revision, metrics};

/// How often a write is begun anew because an older one of ours, given up as lost, was done in between.
const SETTLE_ATTEMPTS_MAX: u32 = 8;

/// The lock of a task. Clones are the same lock; when the last one is dropped without [`TaskLock::release`] the lock is
/// given up in the background, so a task that panics is free for others at once.
#[derive(Clone)]
pub struct TaskLock {
    pub(crate) inner: Arc<LockInner>,
}

/// What the acquiring transaction said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) create_revision: Revision,
    pub(crate) checkpoint_revision: Revision,
}

pub(crate) struct LockInner {
    pub(crate) session: Arc<SessionInner>,
    pub(crate) task: TaskId,
    create_revision: Revision,
    lost: CancellationToken,
    found_checkpoint: OnceLock<Option<Checkpoint>>,
    /// Set by the owner once it has verified the server; until then the found checkpoint's goes on.
    source: std::sync::Mutex<Option<SourceSeen>>,
    epoch: OnceLock<Epoch>,
    /// The checkpoint's revision as we left it. Each write compares it, so a write that was given up as lost and is done
    /// late cannot land on a newer one. The mutex also keeps checkpoint writes in order.
    checkpoint: Mutex<Revision>,
    is_released: AtomicBool,
}

impl TaskLock {
    pub(crate) fn new(session: Arc<SessionInner>, task: TaskId, taken: Taken) -> TaskLock {
        let lost = session.lease.validity().fence().child_token();
        session.registry.add(&task, taken.create_revision, lost.clone());
        metrics::lock_taken();
        let inner = LockInner {
            session,
            task,
            create_revision: taken.create_revision,
            lost,
            found_checkpoint: OnceLock::new(),
            source: std::sync::Mutex::new(None),
            epoch: OnceLock::new(),
            checkpoint: Mutex::new(taken.checkpoint_revision),
            is_released: AtomicBool::new(false),
        };
        TaskLock { inner: Arc::new(inner) }
    }

    pub(crate) fn with_checkpoint(self, checkpoint: Option<Checkpoint>) -> TaskLock {
        let _first = self.inner.found_checkpoint.set(checkpoint);
        self
    }

    /// Looks at the lock once more: a deletion before it was registered with the session's watch went unseen.
    pub(crate) async fn verified(self) -> Result<TaskLock> {
        let entry = self.coordination().get(&Key::TaskLock(self.inner.task.clone())).await?;
        if entry.is_some_and(|entry| entry.create_revision == self.inner.create_revision) {
            Ok(self)
        } else {
            Err(self.refused("taking a task"))
        }
    }

    /// The task.
    pub fn task(&self) -> &TaskId {
        &self.inner.task
    }

    /// The lock's create revision: what every write compares.
    pub fn create_revision(&self) -> Revision {
        self.inner.create_revision
    }

    /// The checkpoint as it was when the task was taken. `None`: no owner ever wrote one.
    pub fn found_checkpoint(&self) -> Option<&Checkpoint> {
        self.inner.found_checkpoint.get().and_then(Option::as_ref)
    }

    /// Cancelled when the lock is no longer ours, or the session is fenced. Drop the task then, without another write.
    pub fn lost(&self) -> &CancellationToken {
        &self.inner.lost
    }

    /// Capture: the server that was read last and found to be the right one, by this owner or by one before it.
    pub fn source(&self) -> Option<SourceSeen> {
        let set = self.inner.source.lock().unwrap_or_else(PoisonError::into_inner).clone();
        set.or_else(|| self.found_checkpoint().and_then(|found| found.source.clone()))
    }

    /// Capture: names the server that is read, verified by now. Every later checkpoint carries it.
    pub fn set_source(&self, source: SourceSeen) {
        *self.inner.source.lock().unwrap_or_else(PoisonError::into_inner) = Some(source);
    }

    /// Whether a write may be started now: the session is valid and the lock was not seen to be lost.
    pub fn is_valid_now(&self) -> bool {
        !self.inner.lost.is_cancelled() && self.inner.session.lease.validity().is_valid_now()
    }

    /// The epoch, once fixed.
    pub fn epoch(&self) -> Option<Epoch> {
        self.inner.epoch.get().copied()
    }

    /// Fixes the epoch of this ownership, right after the lock was taken: above the create revision, above `last_elsewhere`
    /// (the last epoch in the log or in the sink), and above the last checkpoint's. It is written into the checkpoint first;
    /// use it only if this succeeds. Once fixed it stays, whatever is passed later.
    ///
    /// # Errors
    /// `LockLost` when somebody else owns the task; when etcd cannot be reached.
    pub async fn fix_epoch(&self, last_elsewhere: Option<Epoch>) -> Result<Epoch> {
        let mut revision = self.inner.checkpoint.lock().await;
        if let Some(epoch) = self.epoch() {
            return Ok(epoch);
        }
        let found = self.found_checkpoint();
        let epoch = epoch_above(self.inner.create_revision.0, last_elsewhere, found.map(|found| found.epoch));
        let checkpoint = match found {
            // Its age is the position's: nothing came to pass since.
            Some(found) => Checkpoint { epoch, ..found.clone() },
            None => {
                Checkpoint { epoch, position: None, stream: None, seq_hint: None, source: None, at: wall_clock_now() }
            }
        };
        self.write_checkpoint(&mut revision, "fixing the epoch", &checkpoint, false).await?;
        Ok(*self.inner.epoch.get_or_init(|| epoch))
    }

    /// Writes the checkpoint. Not for every batch: see [`TaskLock::checkpoint_writer`].
    ///
    /// # Errors
    /// `LockLost`; `Refused` before [`TaskLock::fix_epoch`]; when etcd cannot be reached.
    pub async fn put_checkpoint(&self, mark: Mark) -> Result<()> {
        let checkpoint = self.checkpoint_of(mark)?;
        let mut revision = self.inner.checkpoint.lock().await;
        self.write_checkpoint(&mut revision, "writing the checkpoint", &checkpoint, false).await
    }

    fn checkpoint_of(&self, mark: Mark) -> Result<Checkpoint> {
        let unfixed =
            || Error::Refused { doing: "writing the checkpoint", cause: "the epoch is not fixed yet".to_owned() };
        Ok(Checkpoint::of(self.epoch().ok_or_else(unfixed)?, mark, self.source(), wall_clock_now()))
    }

    /// Writes what the task says of itself.
    ///
    /// # Errors
    /// `LockLost`; when etcd cannot be reached.
    pub async fn put_status(&self, status: &TaskStatus) -> Result<()> {
        self.guarded_put("writing the status", &Key::TaskStatus(self.inner.task.clone()), status).await
    }

    /// Writes any key of the task, as JSON, only while the lock is ours. `doing` names the write in errors and metrics.
    ///
    /// # Errors
    /// `LockLost`; `TooLarge`; when etcd cannot be reached (then it may have been done).
    pub async fn guarded_put<T: Serialize>(&self, doing: &'static str, key: &Key, value: &T) -> Result<()> {
        let text = self.coordination().keys().text(key);
        let value = encode(&text, value)?;
        self.guarded(doing, Vec::new(), vec![TxnOp::put(text, value, None)], Vec::new()).await.map(|_| ())
    }

    /// Ends the ownership: deletes the lock and writes the last checkpoint in one transaction. Without a mark the checkpoint
    /// stays as it is (a task that hung, or met a younger owner elsewhere).
    ///
    /// # Errors
    /// `LockLost` when it was not ours any more; when etcd cannot be reached (the lock then ends with the lease, or the
    /// background release when this value is dropped).
    pub async fn release(&self, last: Option<Mark>) -> Result<()> {
        let checkpoint = last.map(|mark| self.checkpoint_of(mark)).transpose()?;
        let mut revision = self.inner.checkpoint.lock().await;
        // From here on the disappearance of the lock is our own doing.
        self.inner.session.registry.remove(&self.inner.task, self.inner.create_revision);
        let outcome = match checkpoint {
            Some(checkpoint) => self.write_checkpoint(&mut revision, "releasing the task", &checkpoint, true).await,
            None => self.inner.delete_lock(Vec::new()).await,
        };
        self.ended(&outcome);
        outcome
    }

    /// Ends the ownership: deletes the lock, and does `more` in the same transaction.
    pub(crate) async fn release_with(&self, more: Vec<TxnOp>) -> Result<()> {
        let _no_checkpoint_now = self.inner.checkpoint.lock().await;
        self.inner.session.registry.remove(&self.inner.task, self.inner.create_revision);
        let outcome = self.inner.delete_lock(more).await;
        self.ended(&outcome);
        outcome
    }

    fn ended(&self, outcome: &Result<()>) {
        if !matches!(outcome, Err(error) if error.is_transient()) {
            self.inner.is_released.store(true, Ordering::Release);
        }
        self.inner.lost.cancel();
    }

    /// A writer of checkpoints for the data path: at most one write per `interval` (10 s or more), at once on a change of
    /// state and at `flush`.
    pub fn checkpoint_writer(&self, interval: Duration) -> PacedWriter<Mark> {
        let lock = self.clone();
        PacedWriter::start(interval, move |mark| {
            let lock = lock.clone();
            Box::pin(async move { lock.put_checkpoint(mark).await })
        })
    }

    /// A writer of the task's status: at most one write per `interval`, at once on a change of state.
    pub fn status_writer(&self, interval: Duration) -> PacedWriter<TaskStatus> {
        let lock = self.clone();
        PacedWriter::start(interval, move |status| {
            let lock = lock.clone();
            Box::pin(async move { lock.put_status(&status).await })
        })
    }

    pub(crate) fn coordination(&self) -> &Coordination {
        &self.inner.session.coordination
    }

    fn refused(&self, doing: &'static str) -> Error {
        metrics::write_refused(doing);
        // Without self-fencing the zombie goes on, so that log and sinks are seen to refuse it.
        if self.inner.session.self_fencing {
            self.inner.lost.cancel();
        }
        Error::LockLost { task: self.inner.task.clone(), doing }
    }

    /// `Txn{ lock.create_revision == mine && compares → then | else: get lock, or_else }`. A lock that is not ours is an
    /// error; a compare that failed for another reason is an outcome that did not succeed.
    pub(crate) async fn guarded(
        &self,
        doing: &'static str,
        compares: Vec<Compare>,
        then: Vec<TxnOp>,
        or_else: Vec<TxnOp>,
    ) -> Result<Outcome> {
        let lock_key = self.inner.lock_key();
        let mut when = vec![self.inner.guard()];
        when.extend(compares);
        let mut reads = vec![TxnOp::get(lock_key, None)];
        reads.extend(or_else);
        let outcome = self.coordination().transact(doing, Txn::new().when(when).and_then(then).or_else(reads)).await?;
        let is_ours = || outcome.read(0).is_some_and(|lock| lock.create_revision == self.inner.create_revision);
        if outcome.succeeded || is_ours() { Ok(outcome) } else { Err(self.refused(doing)) }
    }

    /// Writes the checkpoint on top of the one at `revision`, and deletes the lock with it when the task is released.
    async fn write_checkpoint(
        &self,
        revision: &mut Revision,
        doing: &'static str,
        checkpoint: &Checkpoint,
        is_release: bool,
    ) -> Result<()> {
        let key = self.coordination().keys().text(&Key::TaskCheckpoint(self.inner.task.clone()));
        let value = encode(&key, checkpoint)?;
        for _ in 0..SETTLE_ATTEMPTS_MAX {
            let mut then = vec![TxnOp::put(key.clone(), value.clone(), None)];
            if is_release {
                then.push(TxnOp::delete(self.inner.lock_key(), None));
            }
            let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, revision.0);
            let when = vec![self.inner.guard(), unchanged];
            let reads = vec![TxnOp::get(self.inner.lock_key(), None), TxnOp::get(key.clone(), None)];
            let outcome =
                self.coordination().transact(doing, Txn::new().when(when).and_then(then).or_else(reads)).await?;
            if outcome.succeeded {
                *revision = outcome.revision;
                return Ok(());
            }
            let stored = outcome.read(1);
            let is_done = outcome.is_repeated && stored.is_some_and(|stored| stored.value == value);
            let is_ours = outcome.read(0).is_some_and(|lock| lock.create_revision == self.inner.create_revision);
            if is_done && (is_ours != is_release) {
                // An earlier attempt of this call was done, its answer lost.
                *revision = stored.map_or(*revision, |stored| stored.mod_revision);
                return Ok(());
            }
            if !is_ours {
                return Err(self.refused(doing));
            }
            // A write of ours that was given up as lost was done since: go on from it.
            *revision = stored.map_or(Revision::ABSENT, |stored| stored.mod_revision);
        }
        Err(Error::Refused { doing, cause: "the checkpoint is being changed by somebody else".to_owned() })
    }
}

impl LockInner {
    fn lock_key(&self) -> String {
        self.session.coordination.keys().text(&Key::TaskLock(self.task.clone()))
    }

    pub(crate) fn guard(&self) -> Compare {
        Compare::create_revision(self.lock_key(), CompareOp::Equal, self.create_revision.0)
    }

    async fn delete_lock(&self, more: Vec<TxnOp>) -> Result<()> {
        let mut then = vec![TxnOp::delete(self.lock_key(), None)];
        then.extend(more);
        let txn = Txn::new().when(vec![self.guard()]).and_then(then);
        let outcome = self.session.coordination.transact("releasing the task", txn).await?;
        if outcome.succeeded || outcome.is_repeated {
            return Ok(());
        }
        metrics::write_refused("releasing the task");
        Err(Error::LockLost { task: self.task.clone(), doing: "releasing the task" })
    }
}

impl Drop for LockInner {
    fn drop(&mut self) {
        metrics::lock_dropped();
        self.session.registry.remove(&self.task, self.create_revision);
        if self.is_released.load(Ordering::Acquire) || self.session.lease.validity().fence().is_cancelled() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (session, task, guard, key) = (self.session.clone(), self.task.clone(), self.guard(), self.lock_key());
        runtime.spawn(async move {
            tracing::debug!(%task, "the task's lock was dropped without a release: deleting it");
            let txn = Txn::new().when(vec![guard]).and_then(vec![TxnOp::delete(key, None)]);
            // Until the lease ends the lock keeps others out; after it there is nothing to delete.
            while session.lease.validity().is_valid_now() {
                match session.coordination.transact("releasing the task", txn.clone()).await {
                    Err(error) if error.is_transient() => {}
                    _ => return,
                }
            }
        });
    }
}

impl std::fmt::Debug for TaskLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskLock")
            .field("task", &self.inner.task)
            .field("create_revision", &self.inner.create_revision)
            .field("epoch", &self.epoch())
            .finish_non_exhaustive()
    }
}
