//! The apply task: takes a sink over, reads the log from where the sink stands, and applies it.
//!
//! The sink's own checkpoint is the truth; etcd only hears of it every few seconds. Whatever goes wrong, the answer is to
//! open the sink again and read where it stands.

mod assemble;
mod error;
mod feed;
mod finish;
mod first;
mod lag;
pub(crate) mod load;
mod portions;
mod replay;
pub(crate) mod session;
mod stream;
pub(crate) mod tables;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::flows::{ApplyDemand, Demand};
use crate::runs::RunView;
use crate::task::{Ending, TaskContext, TaskEnd};
use wallaby_connector_api::{Directive, SinkError};
use wallaby_coordination::Mark;
use wallaby_model::RunId;
use wallaby_model::condition::ConditionType;
use wallaby_model::run::RunReason;
use wallaby_staging::StagingError;

pub(crate) use error::ApplyError;

/// What outlives one opening of the sink.
pub(crate) struct Applied {
    /// How far it is behind.
    pub(crate) lag: lag::Lag,
    /// Where the sink is known to stand.
    pub(crate) mark: Option<Mark>,
    pub(crate) rows: u64,
    pub(crate) transactions: u64,
    pub(crate) bytes: u64,
}

/// Runs an apply task to its end.
pub async fn run(context: &Arc<TaskContext>) -> TaskEnd {
    match &context.demand {
        Demand::Apply(demand) => apply(context, demand).await,
        _ => TaskEnd::Released(None),
    }
}

/// What is done after an error. A place that was purged is no reason to wait for a person where the sink was cut off from the log: it
/// was blocked so long that a run is to load it anew already, and its hold is the new one.
async fn directive_of(context: &TaskContext, demand: &ApplyDemand, error: &ApplyError) -> Directive {
    if matches!(error, ApplyError::Staging(StagingError::PastHold { .. })) {
        match context.shared.coordination.detached(&context.task.flow, &demand.sink.name).await {
            Ok(None) => {}
            // Not known: it is asked again the next time.
            Ok(Some(_)) | Err(_) => return Directive::Retry(Duration::from_secs(1)),
        }
    }
    error.directive()
}

/// The last run that will make a table anew at the sink because another one has its name at the source: until it has, the sink cannot take
/// rows of the other one.
fn replacing(context: &TaskContext, demand: &ApplyDemand) -> Option<RunId> {
    context.runs.of(&context.task.flow, |runs| {
        let is_such = |view: &RunView| {
            let is_reason = view
                .spec
                .as_ref()
                .is_some_and(|spec| matches!(spec.reason, RunReason::TablesReplaced | RunReason::TablesAdded));
            is_reason && view.sinks.get(&demand.sink.name).is_none_or(|state| state.tables.is_empty())
        };
        let sink = &demand.sink.name;
        let such = runs.runs.iter().rev().find(|(run, view)| runs.awaits(**run, view, sink) && is_such(view));
        such.map(|(run, _)| *run)
    })
}

/// Returns once there is another such run, or the known one has been there for a while longer.
async fn replaced_anew(context: &TaskContext, demand: &ApplyDemand, known: Option<RunId>) {
    let mut changes = context.runs.changes();
    let begun = Instant::now();
    loop {
        changes.borrow_and_update();
        let run = replacing(context, demand);
        if run > known || (run.is_some() && begun.elapsed() >= REPLACING_PAUSE) {
            return;
        }
        if changes.changed().await.is_err() {
            // Nobody watches any more: the task is about to be ended.
            std::future::pending::<()>().await;
        }
    }
}

/// How often a sink that a table does not fit is tried again while a run is to make that table anew, before it is said to be stopped.
const REPLACING_TRIES: u32 = 12;
/// A sink that is stopped is tried again this much later at the next change of a run, while that one is open.
const REPLACING_PAUSE: Duration = Duration::from_secs(60);

async fn apply(context: &Arc<TaskContext>, demand: &ApplyDemand) -> TaskEnd {
    let mut applied = Applied { lag: lag::Lag::start(context), mark: None, rows: 0, transactions: 0, bytes: 0 };
    let mut backoff = Backoff::default();
    let (mut waited_for, mut tries) = (None, 0);
    loop {
        let error = match session::run(context, demand, &mut applied, &mut backoff).await {
            Ok(()) => return TaskEnd::Released(applied.mark),
            Err(error) => error,
        };
        applied.lag.is_lost();
        let said = error.to_string();
        let mut directive = directive_of(context, demand, &error).await;
        let is_misfit = matches!(error, ApplyError::Sink(SinkError::Configuration { .. }));
        if is_misfit && let Some(run) = replacing(context, demand) {
            tries = if waited_for == Some(run) { tries + 1 } else { 0 };
            waited_for = Some(run);
            if tries < REPLACING_TRIES {
                directive = Directive::Retry(Duration::from_secs(1));
            }
        }
        let stands = match directive {
            Directive::GiveUp => return TaskEnd::GivenUp(said),
            Directive::Retry(least) => {
                // A sink that only stands elsewhere is read again at once.
                let delay = if least.is_zero() { least } else { backoff.next_delay().max(least) };
                tracing::warn!(task = %context.task, error = %said, retry_in_ms = delay.as_millis() as u64, "apply failed");
                context.status.condition(ConditionType::Delivering, false, error.reason(), &said);
                context.status.backoff(&said, delay);
                context.pause("the next try", delay).await
            }
            Directive::Stop => {
                tracing::error!(task = %context.task, error = %said, "the sink stopped and waits for a person");
                context.status.condition(ConditionType::Delivering, false, error.reason(), &said);
                context.status.stopped(&said);
                context.pulse.wait("a person (wallaby resume)");
                let stands = tokio::select! {
                    ending = context.ending_or_resume() => (ending != Ending::ResumeAsked).then_some(ending),
                    () = replaced_anew(context, demand, waited_for), if is_misfit => None,
                };
                context.pulse.beat();
                stands
            }
        };
        if stands.is_some() {
            // Without a mark: the checkpoint goes on saying since when the sink was given nothing.
            return TaskEnd::Released(None);
        }
    }
}
