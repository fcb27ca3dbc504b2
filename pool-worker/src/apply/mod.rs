//! The apply task: takes a sink over, reads the log from where the sink stands, and applies it.
//!
//! The sink's own checkpoint is the truth; etcd only hears of it every few seconds. Whatever goes wrong, the answer is to
//! open the sink again and read where it stands.

mod assemble;
mod error;
mod feed;
mod session;

use crate::backoff::Backoff;
use crate::flows::{ApplyDemand, Demand};
use crate::task::{Ending, TaskContext, TaskEnd};
use wallaby_connector_api::Directive;
use wallaby_coordination::Mark;
use wallaby_model::condition::ConditionType;

pub(crate) use error::ApplyError;

/// What outlives one opening of the sink.
#[derive(Default)]
pub(crate) struct Applied {
    /// Where the sink is known to stand.
    pub(crate) mark: Option<Mark>,
    pub(crate) rows: u64,
    pub(crate) transactions: u64,
    pub(crate) bytes: u64,
}

/// Runs an apply task to its end.
pub async fn run(context: &TaskContext) -> TaskEnd {
    match &context.demand {
        Demand::Apply(demand) => apply(context, demand).await,
        Demand::Capture(_) | Demand::Remove(_) | Demand::Verify(_) | Demand::Nothing => TaskEnd::Released(None),
    }
}

async fn apply(context: &TaskContext, demand: &ApplyDemand) -> TaskEnd {
    let mut applied = Applied::default();
    let mut backoff = Backoff::default();
    loop {
        let error = match session::run(context, demand, &mut applied, &mut backoff).await {
            Ok(()) => return TaskEnd::Released(applied.mark),
            Err(error) => error,
        };
        let said = error.to_string();
        let stands = match error.directive() {
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
            return TaskEnd::Released(applied.mark);
        }
    }
}
