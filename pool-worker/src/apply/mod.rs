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
use std::time::Duration;

use crate::backoff::Backoff;
use crate::flows::{ApplyDemand, Demand};
use crate::task::{Ending, TaskContext, TaskEnd};
use wallaby_connector_api::Directive;
use wallaby_coordination::Mark;
use wallaby_model::condition::ConditionType;
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

async fn apply(context: &Arc<TaskContext>, demand: &ApplyDemand) -> TaskEnd {
    let mut applied = Applied { lag: lag::Lag::start(context), mark: None, rows: 0, transactions: 0, bytes: 0 };
    let mut backoff = Backoff::default();
    loop {
        let error = match session::run(context, demand, &mut applied, &mut backoff).await {
            Ok(()) => return TaskEnd::Released(applied.mark),
            Err(error) => error,
        };
        applied.lag.is_lost();
        let said = error.to_string();
        let stands = match directive_of(context, demand, &error).await {
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
                let ending = context.ending_or_resume().await;
                context.pulse.beat();
                (ending != Ending::ResumeAsked).then_some(ending)
            }
        };
        if stands.is_some() {
            // Without a mark: the checkpoint goes on saying since when the sink was given nothing.
            return TaskEnd::Released(None);
        }
    }
}
