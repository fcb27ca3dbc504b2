//! The worker: holds a lease, takes offers while it has room, runs the tasks, and hands them over when it drains.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wallaby_coordination::{Acquired, Coordination, FenceReason, SessionOptions, WorkerInfo, WorkerSession};
use wallaby_model::{TaskId, WorkerId};

use crate::background;
use crate::failpoint::{Failpoint, Failpoints};
use crate::flows::{Demand, Flow, FlowWatch, Flows, demand};
use crate::memory::{self, Sizes};
use crate::metrics;
use crate::offers::{Offers, Pulled};
use crate::options::Options;
use crate::pulse::Pulse;
use crate::runs::RunBoard;
use crate::shared::Shared;
use crate::status::{StatusBoard, now};
use crate::task::{self, TaskContext};

/// How long a drain may take before the tasks are cut off.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);
/// How often a changed load is announced.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(2);

/// How a worker's life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to end and handed everything over.
    Drained,
    /// Its lease may have run out: it stopped by itself. A new life begins with a new lease.
    Fenced,
}

/// What a worker is started with.
pub struct Start {
    /// The settings.
    pub options: Options,
    /// Who it is.
    pub name: WorkerId,
    /// etcd.
    pub coordination: Coordination,
    /// Protections that a test switched off.
    pub failpoints: Failpoints,
    /// Where its metrics are served, as others reach it.
    pub address: String,
}

/// Runs one life of a worker: from its lease to its end.
///
/// # Errors
/// When no lease can be had.
pub async fn run(start: Start, shutdown: CancellationToken) -> Result<Outcome, wallaby_coordination::Error> {
    let Start { options, name, coordination, failpoints, address } = start;
    let info = WorkerInfo {
        capacity: options.capacity,
        load: 0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        zone: None,
        capabilities: vec!["postgres".to_owned()],
        address,
        draining: false,
        started_at: now(),
    };
    let session_options = SessionOptions {
        ttl: options.lease_ttl.0,
        self_fencing: !failpoints.is_on(Failpoint::NoSelfFencing),
        second_runtime: background::runtime(),
    };
    let session = WorkerSession::start(&coordination, name, info.clone(), session_options).await?;
    tracing::info!(worker = %session.worker(), ttl_ms = session.ttl().as_millis() as u64, "worker started");
    let watch = FlowWatch::start(&coordination);
    let limit = options.memory_limit.map(|limit| limit.0).or_else(memory::limit);
    let sizes = Sizes::new(&options, limit);
    metrics::memory(limit);
    match limit {
        Some(limit_bytes) => tracing::info!(limit_bytes, ?sizes, "memory"),
        None => tracing::info!(?sizes, "memory, without a limit"),
    }
    let shared = Arc::new(Shared::new(options, sizes, coordination, session, failpoints));
    let mut worker = Worker {
        shared,
        flows: watch.subscribe(),
        runs: watch.runs(),
        tasks: JoinSet::new(),
        drain: CancellationToken::new(),
        info,
    };
    let outcome = worker.serve(&shutdown).await;
    if outcome == Outcome::Drained
        && let Err(error) = worker.shared.session.revoke().await
    {
        tracing::debug!(%error, "the lease was not given up; it runs out by itself");
    }
    Ok(outcome)
}

struct Worker {
    shared: Arc<Shared>,
    flows: watch::Receiver<Flows>,
    runs: RunBoard,
    tasks: JoinSet<TaskId>,
    drain: CancellationToken,
    info: WorkerInfo,
}

impl Worker {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Outcome {
        let session = self.shared.session.clone();
        let mut announce = tokio::time::interval(ANNOUNCE_EVERY);
        announce.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (sender, mut pulled) = tokio::sync::mpsc::channel(1);
        let room = Arc::new(tokio::sync::Semaphore::new(self.info.capacity as usize));
        let _pulling = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(pull(
            Arc::clone(&self.shared),
            Arc::clone(&room),
            sender,
        )));
        loop {
            tokio::select! {
                biased;
                () = session.fence().cancelled() => return self.fenced().await,
                () = shutdown.cancelled() => break,
                () = session.drain_requested().cancelled() => {
                    tracing::info!("this worker was asked to drain");
                    break;
                }
                Some(ended) = self.tasks.join_next() => {
                    if let Ok(task) = ended {
                        tracing::debug!(%task, "task ended");
                    }
                    metrics::tasks(self.tasks.len());
                }
                Some((offer, permit)) = pulled.recv() => self.consider(offer, permit).await,
                _ = announce.tick() => self.announce(false).await,
            }
        }
        drop(_pulling);
        self.hand_over().await
    }

    async fn announce(&mut self, draining: bool) {
        metrics::cache(self.shared.cache.usage_bytes());
        let load = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX);
        if load == self.info.load && draining == self.info.draining {
            return;
        }
        let info = WorkerInfo { load, draining, ..self.info.clone() };
        match self.shared.session.update_info(&info).await {
            Ok(()) => self.info = info,
            Err(error) => tracing::debug!(%error, "the worker's load was not announced"),
        }
    }

    /// Looks at one offer: takes the task, or settles and drops the offer.
    async fn consider(&mut self, pulled: Pulled, permit: tokio::sync::OwnedSemaphorePermit) {
        let Some(offer) = pulled.offer.clone() else {
            metrics::offer("unreadable");
            return pulled.settle().await;
        };
        if self.shared.failures.rests(&offer, Instant::now()) {
            // It failed here; another worker may have more luck with it. Else it comes again.
            metrics::offer("resting");
            return pulled.give_back().await;
        }
        let Ok(place) = self.shared.places.now(&offer.task) else {
            // Another worker may have the memory; else it comes again.
            metrics::offer("no_memory");
            return pulled.give_back().await;
        };
        match self.take(&offer.task).await {
            Ok(Some(context)) => {
                metrics::offer("taken");
                metrics::task_taken(&offer.task);
                if task::is_short(&offer.task) {
                    tracing::debug!(task = %offer.task, "task taken");
                } else {
                    tracing::info!(task = %offer.task, "task taken");
                }
                let task = offer.task.clone();
                self.tasks.spawn(async move {
                    task::own(context).await;
                    drop((permit, place));
                    task
                });
                metrics::tasks(self.tasks.len());
                pulled.settle().await;
            }
            Ok(None) => pulled.settle().await,
            Err(error) => {
                metrics::offer("failed");
                tracing::warn!(task = %offer.task, %error, "a task could not be taken");
                pulled.give_back().await;
            }
        }
    }

    async fn take(&self, task: &TaskId) -> Result<Option<TaskContext>, wallaby_coordination::Error> {
        let entry = match self.shared.coordination.flow(&task.flow).await {
            Ok(entry) => entry,
            Err(wallaby_coordination::Error::FlowNotFound(_)) => {
                metrics::offer("unwanted");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let flow = Flow { record: entry.record, revision: entry.revision, created: entry.created };
        let wanted = demand(Some(&flow), task);
        if wanted == Demand::Nothing {
            metrics::offer("unwanted");
            return Ok(None);
        }
        let lock = match self.shared.session.acquire(task, flow.revision).await? {
            Acquired::Lock(lock) => lock,
            Acquired::Held(holder) => {
                metrics::offer("held");
                tracing::debug!(%task, holder = %holder.worker, "the task has an owner");
                return Ok(None);
            }
            Acquired::SpecChanged(_) => {
                // The controller offers it again under the new specification.
                metrics::offer("unwanted");
                return Ok(None);
            }
        };
        self.caught_up_with(task, &flow).await;
        Ok(Some(TaskContext {
            shared: Arc::clone(&self.shared),
            task: task.clone(),
            lock,
            demand: wanted,
            flows: self.flows.clone(),
            runs: self.runs.clone(),
            drain: self.drain.clone(),
            pulse: Pulse::default(),
            status: StatusBoard::new(self.shared.session.worker().clone(), flow.record.generation),
        }))
    }

    /// Waits a moment until the watch has what was just read, so that the task does not see an older demand and end.
    async fn caught_up_with(&self, task: &TaskId, flow: &Flow) {
        let mut flows = self.flows.clone();
        let seen = flows.wait_for(|flows| flows.get(&task.flow).is_some_and(|seen| seen.revision >= flow.revision));
        let _late_is_harmless = tokio::time::timeout(Duration::from_secs(5), seen).await;
    }

    /// The lease may have run out: nothing more is written, tasks are cut off where they stand.
    async fn fenced(&mut self) -> Outcome {
        let reason = self.shared.session.fence_reason().unwrap_or(FenceReason::Deadline);
        tracing::error!(
            ?reason,
            tasks = self.tasks.len(),
            "the lease is no longer certain: every task is dropped at once"
        );
        self.tasks.shutdown().await;
        metrics::tasks(0);
        Outcome::Fenced
    }

    async fn hand_over(&mut self) -> Outcome {
        tracing::info!(tasks = self.tasks.len(), "draining: handing the tasks over");
        self.announce(true).await;
        self.drain.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_PATIENCE, all).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "some tasks did not end in time and are cut off");
            self.tasks.shutdown().await;
        }
        metrics::tasks(0);
        Outcome::Drained
    }
}

/// Pulls offers while there is room; one waits at most.
async fn pull(
    shared: Arc<Shared>,
    room: Arc<tokio::sync::Semaphore>,
    sender: tokio::sync::mpsc::Sender<(Pulled, tokio::sync::OwnedSemaphorePermit)>,
) {
    let mut offers: Option<Offers> = None;
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let queue = match &mut offers {
            Some(queue) => queue,
            None => match shared.nats().await {
                Ok(connections) => offers.insert(Offers::new(connections.pull.clone(), shared.options.pool.clone())),
                Err(error) => {
                    tracing::warn!(%error, "waiting for the NATS servers");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            },
        };
        match queue.next().await {
            Ok(Some(pulled)) => {
                if sender.send((pulled, permit)).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(%error, "no offers at the moment");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}
