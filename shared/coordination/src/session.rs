//! A worker's presence: one lease, the `workers/<W>` key under it, and the tasks taken under it.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use wallaby_model::{TaskId, WorkerId};

use crate::checkpoint::Checkpoint;
use crate::client::encode;
use crate::keys::Key;
use crate::lease::{FenceReason, Lease, Validity};
use crate::lock::{Taken, TaskLock};
use crate::lock_watch::{self, Registry};
use crate::records::{LockRecord, WorkerInfo};
use crate::watch::{Change, WatchEvent, decode};
use crate::{Coordination, Error, Result, Revision};

/// Settings of a worker's lease.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// How long after the last keepalive etcd frees the worker's tasks; whole seconds, at least 2.
    pub ttl: Duration,
    /// Whether the worker stops by itself before its lease can have run out. **False is a failpoint for tests only**: it
    /// makes the zombie that log, sinks and guarded writes must refuse. Then nothing in this process notices a lost lease:
    /// neither the deadline, nor etcd's word that the lease is gone, nor a deleted lock.
    pub self_fencing: bool,
    /// A second runtime that the worker's tasks run on, beside that of the caller: a worker whose tasks have no turn on one of the two for
    /// 30 s gives its lease up.
    pub second_runtime: Option<Handle>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions { ttl: Duration::from_secs(10), self_fencing: true, second_runtime: None }
    }
}

/// A worker that is alive. Clones are the same session. Dropping all of them lets the lease run out;
/// [`WorkerSession::revoke`] ends it at once.
#[derive(Clone)]
pub struct WorkerSession {
    pub(crate) inner: Arc<SessionInner>,
}

pub(crate) struct SessionInner {
    pub(crate) coordination: Coordination,
    pub(crate) worker: WorkerId,
    address: String,
    pub(crate) lease: Lease,
    pub(crate) self_fencing: bool,
    pub(crate) registry: Arc<Registry>,
    drain: CancellationToken,
    _watches: Vec<AbortOnDropHandle<()>>,
}

/// What came of an attempt at a task.
#[derive(Debug)]
pub enum Acquired {
    /// It is ours.
    Lock(TaskLock),
    /// Somebody owns it (perhaps this worker): ack the offer and drop it.
    Held(LockRecord),
    /// The flow's specification is not the one that was read (0: it is gone): read it again, or drop the offer.
    SpecChanged(Revision),
}

impl WorkerSession {
    /// Asks for a lease, announces the worker, and keeps both alive.
    ///
    /// # Errors
    /// `Settings` for a TTL below 2 s; when etcd cannot be reached.
    pub async fn start(
        coordination: &Coordination,
        worker: WorkerId,
        info: WorkerInfo,
        options: SessionOptions,
    ) -> Result<WorkerSession> {
        if options.ttl < Duration::from_secs(2) {
            return Err(Error::Settings(format!("a lease of {:?} is too short: use 2 s or more", options.ttl)));
        }
        let (holder, self_fencing) = (format!("worker {worker}"), options.self_fencing);
        let target = coordination.target();
        let requests = coordination.requests().clone();
        let lease = Lease::grant(target, requests, holder, options).await?;
        let registry = Arc::new(Registry::default());
        let drain = CancellationToken::new();
        let mut watches = vec![spawn(watch_drain(coordination.clone(), worker.clone(), drain.clone()))];
        if self_fencing {
            watches.push(spawn(lock_watch::run(coordination.clone(), registry.clone())));
        }
        let inner = SessionInner {
            coordination: coordination.clone(),
            worker,
            address: info.address.clone(),
            lease,
            self_fencing,
            registry,
            drain,
            _watches: watches,
        };
        let session = WorkerSession { inner: Arc::new(inner) };
        if let Err(error) = session.announce(&info).await {
            // The lease holds nothing yet; the next try has one of its own.
            if let Err(error) = session.revoke().await {
                tracing::debug!(%error, "a lease that is of no use was not given up");
            }
            return Err(error);
        }
        Ok(session)
    }

    /// Who this is.
    pub fn worker(&self) -> &WorkerId {
        &self.inner.worker
    }

    /// The TTL as etcd granted it.
    pub fn ttl(&self) -> Duration {
        self.inner.lease.ttl()
    }

    /// A handle to ask whether writes may still be started; cheap to clone and to ask.
    pub fn validity(&self) -> &Validity {
        self.inner.lease.validity()
    }

    /// Whether a write may be started now. Ask before every publish, feedback and commit.
    pub fn is_valid_now(&self) -> bool {
        self.validity().is_valid_now()
    }

    /// Cancelled once nothing may be done under this session any more: fenced by the deadline, lease gone, or revoked.
    pub fn fence(&self) -> &CancellationToken {
        self.validity().fence()
    }

    /// Why, once fenced.
    pub fn fence_reason(&self) -> Option<FenceReason> {
        self.validity().fence_reason()
    }

    /// Cancelled when somebody asked this worker to hand its tasks over and end ([`Coordination::request_drain`]).
    pub fn drain_requested(&self) -> &CancellationToken {
        &self.inner.drain
    }

    /// The tasks whose locks this session holds.
    pub fn tasks(&self) -> Vec<TaskId> {
        self.inner.registry.tasks()
    }

    /// Announces the worker for the first time: two live workers never share a name.
    async fn announce(&self, info: &WorkerInfo) -> Result<()> {
        let coordination = &self.inner.coordination;
        let key = coordination.keys().text(&Key::Worker(self.inner.worker.clone()));
        let value = encode(&key, info)?;
        let lease = self.inner.lease.id();
        let put = vec![TxnOp::put(key.clone(), value, Some(PutOptions::new().with_lease(lease)))];
        let free = vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)];
        let txn = Txn::new().when(free).and_then(put).or_else(vec![TxnOp::get(key, None)]);
        let outcome = coordination.transact("announcing the worker", txn).await;
        let outcome = outcome.map_err(|error| self.inner.name_holder(error))?;
        // A repeated attempt may find what an earlier one of this very call wrote.
        let is_ours = outcome.read(0).is_some_and(|found| found.lease == lease);
        if outcome.succeeded || is_ours { Ok(()) } else { Err(Error::NameTaken(self.inner.worker.clone())) }
    }

    /// Announces the worker anew (its load, that it drains).
    ///
    /// # Errors
    /// `LeaseLost` when the lease is gone; when etcd cannot be reached.
    pub async fn update_info(&self, info: &WorkerInfo) -> Result<()> {
        self.inner.check_valid()?;
        let coordination = &self.inner.coordination;
        let key = coordination.keys().text(&Key::Worker(self.inner.worker.clone()));
        let value = encode(&key, info)?;
        let options = PutOptions::new().with_lease(self.inner.lease.id());
        let request = |client: etcd_client::Client| {
            let (key, value, options) = (key.clone(), value.clone(), options.clone());
            async move { client.kv_client().put(key, value, Some(options)).await }
        };
        let put = coordination.requests().call("announcing the worker", request).await;
        put.map(|_| ()).map_err(|error| self.inner.name_holder(error))
    }

    /// Tries to take a task whose flow's specification was read at `spec_revision`. If the lock is free and the
    /// specification unchanged the task is ours, in one transaction.
    ///
    /// A caller that gives up waiting leaves no lock behind.
    ///
    /// # Errors
    /// `LeaseLost` when this session has ended; when etcd cannot be reached.
    pub async fn acquire(&self, task: &TaskId, spec_revision: Revision) -> Result<Acquired> {
        let (sender, receiver) = oneshot::channel();
        let (inner, task) = (self.inner.clone(), task.clone());
        // A task of its own: a dropped future would leave a lock that nobody knows of. A lock that nobody takes from the
        // channel is released when it is dropped.
        tokio::spawn(async move {
            let outcome = inner.acquire(&task, spec_revision).await;
            let _unwanted = sender.send(outcome);
        });
        let ended =
            || Error::LeaseLost { holder: self.inner.holder(), cause: "the runtime is shutting down".to_owned() };
        receiver.await.map_err(|_| ended())?
    }

    /// Gives the lease up: all keys under it, locks included, disappear at once. Release the tasks first, so that their
    /// checkpoints are written.
    ///
    /// # Errors
    /// When etcd cannot be reached; the lease then runs out by itself.
    pub async fn revoke(&self) -> Result<()> {
        self.inner.lease.revoke().await
    }
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

impl SessionInner {
    pub(crate) fn holder(&self) -> String {
        format!("worker {}", self.worker)
    }

    /// etcd's answer does not say whose lease is gone.
    pub(crate) fn name_holder(&self, error: Error) -> Error {
        match error {
            Error::LeaseLost { cause, .. } => Error::LeaseLost { holder: self.holder(), cause },
            other => other,
        }
    }

    fn check_valid(&self) -> Result<()> {
        if self.lease.validity().is_valid_now() {
            return Ok(());
        }
        let cause = match self.lease.validity().fence_reason() {
            Some(FenceReason::Revoked) => "it was given up",
            Some(FenceReason::LeaseGone) => "etcd says that it is gone",
            Some(FenceReason::Stalled) => "this process gave its tasks no turn",
            _ => "no keepalive was answered in time",
        };
        Err(Error::LeaseLost { holder: self.holder(), cause: cause.to_owned() })
    }

    async fn acquire(self: &Arc<Self>, task: &TaskId, spec_revision: Revision) -> Result<Acquired> {
        self.check_valid()?;
        let keys = self.coordination.keys();
        let lock_key = keys.text(&Key::TaskLock(task.clone()));
        let spec_key = keys.text(&Key::FlowSpec(task.flow.clone()));
        let checkpoint_key = keys.text(&Key::TaskCheckpoint(task.clone()));
        let attempt = Uuid::new_v4();
        let record = LockRecord { worker: self.worker.clone(), address: self.address.clone(), attempt };
        let value = encode(&lock_key, &record)?;
        let lease = PutOptions::new().with_lease(self.lease.id());
        let txn = Txn::new()
            .when(vec![
                Compare::create_revision(lock_key.clone(), CompareOp::Equal, 0),
                Compare::mod_revision(spec_key.clone(), CompareOp::Equal, spec_revision.0),
            ])
            .and_then(vec![TxnOp::put(lock_key.clone(), value, Some(lease)), TxnOp::get(checkpoint_key.clone(), None)])
            .or_else(vec![
                TxnOp::get(lock_key.clone(), None),
                TxnOp::get(checkpoint_key.clone(), None),
                TxnOp::get(spec_key, None),
            ]);
        let outcome = loop {
            match self.coordination.transact("taking a task", txn.clone()).await {
                // Whether it was done is not known; giving up now could leave a lock that nobody serves. The session's
                // end bounds this: then the lease frees the lock.
                Err(error) if error.is_transient() => self.check_valid()?,
                other => break other.map_err(|error| self.name_holder(error))?,
            }
        };
        let found = outcome.read(0);
        let (create_revision, checkpoint) = if outcome.succeeded {
            (outcome.revision, outcome.read(1))
        } else {
            let Some(found) = found else {
                let spec = outcome.read(2).map_or(Revision::ABSENT, |spec| spec.mod_revision);
                return Ok(Acquired::SpecChanged(spec));
            };
            let holder: LockRecord = decode(&lock_key, &found.value)?;
            if holder.attempt != attempt {
                return Ok(Acquired::Held(holder));
            }
            // An earlier attempt of this very call was done, its answer lost.
            (found.create_revision, outcome.read(1))
        };
        let (checkpoint_revision, stored) = match checkpoint {
            Some(entry) => (entry.mod_revision, Some(decode::<Checkpoint>(&checkpoint_key, &entry.value))),
            None => (Revision::ABSENT, None),
        };
        let lock = TaskLock::new(self.clone(), task.clone(), Taken { create_revision, checkpoint_revision });
        match stored.transpose() {
            Ok(checkpoint) => lock.with_checkpoint(checkpoint).verified().await.map(Acquired::Lock),
            // Dropping the lock releases it.
            Err(error) => Err(error),
        }
    }
}

/// Cancels `drain` once the worker's drain key exists.
async fn watch_drain(coordination: Coordination, worker: WorkerId, drain: CancellationToken) {
    let key = Key::WorkerDrain(worker);
    let mut watch = coordination.watch(coordination.keys().text(&key));
    while let Some(event) = watch.next().await {
        // The prefix also takes workers whose ids begin with ours.
        let is_asked = match event {
            WatchEvent::Snapshot { entries, .. } => entries.iter().any(|entry| entry.key == key),
            WatchEvent::Changes(changes) => {
                changes.iter().any(|change| matches!(change, Change::Put(entry) if entry.key == key))
            }
        };
        if is_asked {
            drain.cancel();
            return;
        }
    }
}
