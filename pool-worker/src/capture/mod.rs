//! The capture task: takes the log over, reads the WAL from where the log ends, stages it, and tells Postgres what is
//! durable.
//!
//! The order of things is the safety: fence first (whoever owned the log before is shut out of it), then read where the
//! log ends, then stream from there. What fails is tried again inside the task while the lock and the log stay ours; only
//! a fence of a younger owner, or a long silence of the log's servers, gives the task up.

mod accounted;
mod error;
mod feedback;
mod figures;
mod publication;
mod remove;
mod retention;
mod session;
mod side;
mod splices;
mod stage;
mod sync;

use std::time::{Duration, Instant};

use wallaby_coordination::Mark;
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::{Lsn, Nonce};
use wallaby_staging::LogWriter;

use crate::backoff::Backoff;
use crate::flows::{CaptureDemand, Demand};
use crate::task::{Ending, TaskContext, TaskEnd};

pub(crate) use error::{CaptureError, Directive};
pub(crate) use publication::wanted_now as publication_of;

/// How long the log may take for the last acknowledgements of a capture that ends.
const SETTLE_PATIENCE: Duration = Duration::from_secs(5);

/// What outlives one connection to the source: the log is ours from the fence to the end of the lock.
#[derive(Default)]
pub(crate) struct Owned {
    /// The log's writer, once the fence landed and the first resume was written.
    pub(crate) writer: Option<LogWriter>,
    /// What our fences carry: one for the whole ownership, or a second try would meet the first one's fence as a stranger's.
    pub(crate) nonce: Option<Nonce>,
    /// Whether something may have been appended under our fences.
    pub(crate) has_appended: bool,
    /// Counts the connections to the source: transactions that one streamed are other attempts than those of the next.
    pub(crate) connection: u32,
    /// The attempts that are being put into the side store.
    pub(crate) living: side::Living,
    /// The splices that Postgres was not told of yet.
    pub(crate) unconfirmed: splices::Unconfirmed,
    /// Set while transactions are not streamed, because one did not fit into the side store.
    pub(crate) fallback: Option<Fallback>,
    /// Rows handed to the log.
    pub(crate) rows: u64,
    /// Transactions that have rows in what was handed to the log.
    pub(crate) transactions: u64,
    /// Packed bytes handed to the log.
    pub(crate) bytes: u64,
    /// When the last transaction handed to the log committed (µs since 1970), and when it was handed over.
    pub(crate) staged_last: Option<(i64, Instant)>,
}

/// Why transactions are not streamed, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Fallback {
    /// The transaction that did not fit.
    pub(crate) xid: u32,
    /// What is said of it.
    pub(crate) said: String,
    /// It has ended: once the log has everything up to here, it has passed.
    pub(crate) until: Option<Lsn>,
}

/// Runs a capture task to its end.
pub async fn run(context: &TaskContext) -> TaskEnd {
    match &context.demand {
        Demand::Capture(demand) => capture(context, demand).await,
        Demand::Remove(demand) => remove::run(context, demand).await,
        _ => TaskEnd::Released(None),
    }
}

async fn capture(context: &TaskContext, demand: &CaptureDemand) -> TaskEnd {
    let mut owned = Owned::default();
    let mut backoff = Backoff::default();
    let mut cut_off = CutOff::default();
    loop {
        let streamed = owned.connection;
        let outcome = session::run(context, demand, &mut owned, &mut backoff).await;
        let error = match outcome {
            Ok(mark) => return TaskEnd::Released(mark.or(close(context, &mut owned).await)),
            Err(error) => cut_off.judge(context, error, owned.connection > streamed).await,
        };
        let said = error.to_string();
        let ending = match error.directive() {
            Directive::GiveUp => return TaskEnd::GivenUp(said),
            Directive::Again => {
                tracing::warn!(task = %context.task, reason = %said, "capture connects again");
                None
            }
            Directive::Retry => {
                let delay = backoff.next_delay();
                tracing::warn!(task = %context.task, error = %said, retry_in_ms = delay.as_millis() as u64, "capture failed");
                state(context, &error);
                context.status.backoff(&said, delay);
                context.pause("the next try", delay).await
            }
            Directive::Stop => {
                tracing::error!(task = %context.task, error = %said, "capture stopped and waits for a person");
                state(context, &error);
                context.status.stopped(&said);
                context.pulse.wait("a person (wallaby resume)");
                let ending = context.ending_or_resume().await;
                context.pulse.beat();
                (ending != Ending::ResumeAsked).then_some(ending)
            }
        };
        if ending.is_some() {
            return TaskEnd::Released(close(context, &mut owned).await);
        }
    }
}

/// How long the log's servers have been silent, over several tries that came to no stream from the source. A stream looks by itself.
#[derive(Debug, Default)]
struct CutOff {
    since: Option<Instant>,
}

impl CutOff {
    /// The error of a try; or, when it is one too many, that the task is to be given up.
    async fn judge(&mut self, context: &TaskContext, error: CaptureError, has_streamed: bool) -> CaptureError {
        if has_streamed {
            self.since = None;
        }
        let is_silent = match &error {
            // The side store may stand elsewhere.
            CaptureError::Staging(error) => error.is_transient() && !session::log_answers(context).await,
            _ => false,
        };
        if !is_silent {
            self.since = None;
            return error;
        }
        let silent_for = self.since.get_or_insert_with(Instant::now).elapsed();
        if silent_for > context.shared.options.log_patience.0 {
            CaptureError::LogUnreachable(silent_for.as_secs())
        } else {
            error
        }
    }
}

/// Says in conditions what went wrong.
fn state(context: &TaskContext, error: &CaptureError) {
    let (kind, reason, message) = (error.condition(), error.reason(), error.to_string());
    context.status.condition(kind, false, reason, &message);
    if kind != ConditionType::Capturing {
        context.status.condition(ConditionType::Capturing, false, reason, &message);
    }
}

/// Settles what was handed to the log, and ends its writer; the mark of what the log acknowledged. What it does not take in time (it
/// may be full, and only a changed flow would make room) Postgres sends the next owner again.
async fn close(context: &TaskContext, owned: &mut Owned) -> Option<Mark> {
    let writer = owned.writer.take()?;
    context.pulse.wait("the last acknowledgements");
    match tokio::time::timeout(SETTLE_PATIENCE, writer.settled()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(%error, "the log's writer was not settled");
            return None;
        }
        Err(_) => {
            let in_flight = *writer.in_flight().borrow();
            tracing::info!(task = %context.task, in_flight, "the log does not take the last records: they are given up, and are read again");
        }
    }
    let acked = *writer.acked().borrow();
    Some(Mark { position: acked.position, stream: None, seq_hint: Some(acked.sequence) })
}

/// Where a capture task stands while it is being set up.
pub(crate) fn enter(context: &TaskContext, phase: TaskPhase, waits_for: &str) {
    context.status.phase(phase);
    context.pulse.wait(waits_for);
}
