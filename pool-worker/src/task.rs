//! One owned task: what it is given, how it ends, and the watchdog beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Mark, Revision, TaskLock};
use wallaby_model::flow::LogSpec;
use wallaby_model::{TaskId, TaskKind};

use crate::failpoint::Failpoint;
use crate::flows::{Demand, Flows, demand};
use crate::pulse::{Pulse, SILENCE_MAX};
use crate::runs::RunBoard;
use crate::shared::Shared;
use crate::status::{StatusBoard, WRITE_EVERY};
use crate::{apply, background, capture, chunk, load, metrics, run, verify};

/// What a task is given.
pub struct TaskContext {
    /// What all tasks of the worker share.
    pub shared: Arc<Shared>,
    /// The task.
    pub task: TaskId,
    /// Its lock.
    pub lock: TaskLock,
    /// What it is asked to do.
    pub demand: Demand,
    /// The flows, to see when that changes.
    pub flows: watch::Receiver<Flows>,
    /// The snapshot runs of all flows.
    pub runs: RunBoard,
    /// Cancelled when the worker drains.
    pub drain: CancellationToken,
    /// Its pulse.
    pub pulse: Pulse,
    /// What it says of itself.
    pub status: StatusBoard,
}

/// How a task ended by itself.
#[derive(Debug)]
pub enum TaskEnd {
    /// It finished what it had at hand; its last durable mark, if it has one.
    Released(Option<Mark>),
    /// It is done for good: nobody takes it again, and its keys go.
    Completed,
    /// A younger owner exists, or another worker should try: nothing more is written but the release.
    GivenUp(String),
    /// Its code panicked: whoever takes it next may well meet the same.
    Panicked(String),
}

/// Why a task should stop what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The worker drains.
    Drain,
    /// The flow asks for something else now.
    DemandChanged,
    /// A person asked a stopped task to try again.
    ResumeAsked,
}

impl TaskContext {
    /// Resolves when the worker drains or the flow asks for something else. Cancel-safe.
    pub async fn ending(&self) -> Ending {
        let mut flows = self.flows.clone();
        loop {
            if self.drain.is_cancelled() {
                return Ending::Drain;
            }
            let wanted = demand(flows.borrow_and_update().get(&self.task.flow).map(Arc::as_ref), &self.task);
            if wanted != self.demand {
                return Ending::DemandChanged;
            }
            tokio::select! {
                () = self.drain.cancelled() => return Ending::Drain,
                changed = flows.changed() => if changed.is_err() { return Ending::Drain },
            }
        }
    }

    /// The log of the flow as it is wanted now; `None` when the flow is gone.
    pub fn log_spec(&self) -> Option<LogSpec> {
        self.flows.borrow().get(&self.task.flow).map(|flow| flow.record.document.spec.log.clone())
    }

    fn resumes(flows: &Flows, task: &TaskId) -> u64 {
        flows.get(&task.flow).map_or(0, |flow| flow.record.resumes)
    }

    /// Waits for a person: resolves when `resume` is asked for, or as [`Self::ending`].
    pub async fn ending_or_resume(&self) -> Ending {
        let mut flows = self.flows.clone();
        let before = Self::resumes(&flows.borrow_and_update(), &self.task);
        let resumed = async {
            while flows.changed().await.is_ok() {
                if Self::resumes(&flows.borrow_and_update(), &self.task) > before {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ending = self.ending() => ending,
            () = resumed => Ending::ResumeAsked,
        }
    }

    /// Waits out a delay; says why it should rather stop. Names the wait for the watchdog.
    pub async fn pause(&self, what: &str, delay: Duration) -> Option<Ending> {
        self.pulse.wait(what);
        let ending = tokio::select! {
            () = tokio::time::sleep(delay) => None,
            ending = self.ending_or_resume() => Some(ending),
        };
        self.pulse.beat();
        match ending {
            Some(Ending::ResumeAsked) => None,
            other => other,
        }
    }

    /// A failpoint: stands still here until a test lets go, or ends the worker.
    pub async fn stop_at(&self, failpoint: Failpoint) {
        if self.shared.failpoints.is_on(failpoint) {
            self.pulse.wait("a test");
            self.shared.failpoints.stop(failpoint).await;
        }
    }

    /// Whether a write may be started now.
    pub fn is_valid_now(&self) -> bool {
        self.lock.is_valid_now()
    }
}

/// Runs a task to its end, with its status writer and its watchdog, and gives the lock back.
pub async fn own(context: TaskContext) {
    let context = Arc::new(context);
    let task = context.task.clone();
    let _status = AbortOnDropHandle::new(tokio::spawn(write_status(Arc::clone(&context))));
    let mut run = AbortOnDropHandle::new(background::spawn(&task.kind, run(Arc::clone(&context))));
    let end = tokio::select! {
        end = &mut run => match end {
            Ok(end) => end,
            Err(error) => {
                metrics::task_failed(&task);
                TaskEnd::Panicked(format!("the task's code failed: {error}"))
            }
        },
        () = context.lock.lost().cancelled() => {
            run.abort();
            return lock_lost(&task);
        }
        silence = watch_pulse(&context.pulse) => {
            run.abort();
            metrics::task_wedged(&task);
            TaskEnd::GivenUp(format!("the task's loop was silent for {} s and was aborted", silence.as_secs()))
        }
    };
    let (mark, outcome) = match end {
        TaskEnd::Completed => return complete(&context).await,
        TaskEnd::Released(mark) => {
            if is_short(&task) {
                tracing::debug!(%task, "task released");
            } else {
                tracing::info!(%task, "task released");
            }
            context.shared.failures.forget(&task);
            (mark, "released")
        }
        TaskEnd::GivenUp(reason) => {
            // Another worker may take it at once; this one rests before it does.
            let delay = say_failed(&context, &reason);
            tracing::warn!(%task, reason, rest_ms = delay.as_millis() as u64, "task given up");
            (None, "given_up")
        }
        TaskEnd::Panicked(reason) => {
            // Every worker has the same code: nobody takes the task meanwhile.
            let delay = say_failed(&context, &reason);
            tracing::error!(%task, reason, retry_in_ms = delay.as_millis() as u64, "the task's code failed");
            tokio::select! {
                _ = context.pause("the next try", delay) => {}
                () = context.lock.lost().cancelled() => return lock_lost(&task),
            }
            (None, "failed")
        }
    };
    metrics::task_ended(&task, outcome);
    if !is_short(&task)
        && let Err(error) = context.lock.put_status(&context.status.snapshot()).await
    {
        tracing::debug!(%task, %error, "the task's last status was not written");
    }
    if let Err(error) = context.lock.release(mark).await {
        if error.is_ownership_lost() {
            // That is why it ended; nothing was wrong with it.
            context.shared.failures.forget(&task);
        }
        tracing::warn!(%task, %error, "the task's lock was not released: it ends with the lease");
    }
}

fn lock_lost(task: &TaskId) {
    tracing::warn!(%task, "the task's lock is no longer ours: dropped without another write");
    metrics::task_ended(task, "lock_lost");
}

/// Counts a failure, and says when the task is tried again.
fn say_failed(context: &TaskContext, reason: &str) -> Duration {
    let revision = context.flows.borrow().get(&context.task.flow).map_or(Revision(0), |flow| flow.revision);
    let delay = context.shared.failures.failed(&context.task, revision, Instant::now());
    context.status.backoff(reason, delay);
    delay
}

/// Ends a task that is done for good.
async fn complete(context: &TaskContext) {
    context.shared.failures.forget(&context.task);
    metrics::task_ended(&context.task, "completed");
    if let Err(error) = context.lock.complete().await {
        tracing::warn!(task = %context.task, %error, "the keys of a task that is done were not removed: it is offered once more");
    }
}

/// Whether there may be tens of thousands of its kind: nothing is said of each.
pub fn is_short(task: &TaskId) -> bool {
    matches!(task.kind, TaskKind::Chunk(..) | TaskKind::Load(..))
}

async fn run(context: Arc<TaskContext>) -> TaskEnd {
    if matches!(context.task.kind, TaskKind::Apply(_)) {
        assert!(!context.shared.failpoints.is_on(Failpoint::PanicApply), "a test wants it");
        if context.shared.failpoints.is_on(Failpoint::GiveUpApply) {
            return TaskEnd::GivenUp("a test wants it".to_owned());
        }
    }
    match &context.task.kind {
        TaskKind::Capture => capture::run(&context).await,
        TaskKind::Apply(_) => apply::run(&context).await,
        TaskKind::Run(_) => run::run(&context).await,
        TaskKind::Chunk(..) => chunk::run(&context).await,
        TaskKind::Load(..) => load::run(&context).await,
        TaskKind::Verify(_) => verify::run(&context).await,
    }
}

async fn write_status(context: Arc<TaskContext>) {
    let mut flows = context.flows.clone();
    if is_short(&context.task) {
        // Most are over before anybody could read it.
        tokio::time::sleep(WRITE_EVERY).await;
    }
    loop {
        // A new generation that asks the same of this task is acted upon by going on.
        if let Some(flow) = flows.borrow_and_update().get(&context.task.flow)
            && demand(Some(flow), &context.task) == context.demand
        {
            context.status.generation(flow.record.generation);
        }
        if let Err(error) = context.lock.put_status(&context.status.snapshot()).await {
            if error.is_ownership_lost() {
                return;
            }
            tracing::debug!(task = %context.task, %error, "status not written, trying again");
        }
        tokio::time::sleep(WRITE_EVERY).await;
        tokio::select! {
            () = context.status.changed() => {}
            changed = flows.changed() => if changed.is_err() { return },
        }
    }
}

/// Resolves when the task's loop has been silent for too long.
async fn watch_pulse(pulse: &Pulse) -> Duration {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        if let Some(silence) = pulse.wedged_for(Instant::now(), SILENCE_MAX) {
            return silence;
        }
    }
}
