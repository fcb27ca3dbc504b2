//! The verify task: compares the source with a sink, once, and writes down what it found.
//!
//! Nothing is kept between two owners: a worker that dies is replaced, and the comparison begins anew. Progress and result are
//! one key, written under the task's lock.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use wallaby_connector_api::verify::{VerifyError, VerifyRequest, verify};
use wallaby_coordination::Key;
use wallaby_model::condition::TaskPhase;
use wallaby_model::verify::{OperationResult, OperationSpec, OperationState, VerifyProgress, VerifyReport};
use wallaby_model::{Epoch, TaskId, TaskKind};
use wallaby_postgres::{PostgresSinkConfig, PostgresVerify};
use wallaby_postgres_source::{ConnectConfig, SourceError, SourceVerify};

use crate::backoff::Backoff;
use crate::capture::publication_of;
use crate::flows::{Demand, VerifyDemand};
use crate::task::{TaskContext, TaskEnd};
use crate::{secret, status};

/// How often progress is written, and whether somebody cancelled is asked.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How often a side that waits for the other is asked something: well below the time that servers and proxies take a session for dead.
const AWAKE_EVERY: Duration = Duration::from_secs(30);

/// Runs a comparison to its end, or until the worker drains or the flow asks for something else.
pub async fn run(context: &TaskContext) -> TaskEnd {
    let (TaskKind::Verify(number), Demand::Verify(demand)) = (&context.task.kind, &context.demand) else {
        return TaskEnd::Released(None);
    };
    tokio::select! {
        biased;
        _ = context.ending() => TaskEnd::Released(None),
        end = operate(context, *number, demand) => end,
    }
}

async fn operate(context: &TaskContext, number: u32, demand: &VerifyDemand) -> TaskEnd {
    let (flow, coordination) = (&context.task.flow, &context.shared.coordination);
    let found = match coordination.operation(flow, number).await {
        Ok(Some(found)) if !found.is_over() => found,
        Ok(_) => return TaskEnd::Released(None),
        Err(error) => return TaskEnd::GivenUp(format!("the operation cannot be read: {error}")),
    };
    context.status.phase(TaskPhase::Streaming);
    context.pulse.wait("the answers of both sides");
    let result = if found.spec.cancelled { cancelled() } else { attempt(context, number, demand, &found.spec).await };
    tracing::info!(task = %context.task, state = ?result.state, message = result.message, "comparison ended");
    settle(context, number, result).await
}

/// Writes the result down, however long etcd is away: without it the comparison would begin anew.
async fn settle(context: &TaskContext, number: u32, mut result: OperationResult) -> TaskEnd {
    context.pulse.wait("etcd");
    let key = Key::OperationResult(context.task.flow.clone(), number);
    loop {
        match context.lock.guarded_put("writing an operation's result", &key, &result).await {
            Ok(()) => return TaskEnd::Released(None),
            Err(wallaby_coordination::Error::TooLarge { .. }) if shrink(&mut result) => {}
            Err(error) if error.is_transient() => sleep(TELL_EVERY).await,
            Err(error) => return TaskEnd::GivenUp(format!("the result was not written: {error}")),
        }
    }
}

/// Leaves out which rows differ, so that at least how many is kept. False when there is nothing to leave out.
fn shrink(result: &mut OperationResult) -> bool {
    let tables = result.report.iter_mut().flat_map(|report| &mut report.tables);
    let mut is_smaller = false;
    for table in tables.filter(|table| !table.differences.is_empty()) {
        table.differences.clear();
        is_smaller = true;
    }
    is_smaller
}

fn cancelled() -> OperationResult {
    let message = "it was cancelled".to_owned();
    OperationResult { state: OperationState::Cancelled, message, at: status::now(), ..OperationResult::default() }
}

/// Compares, again after what may pass by itself, until there is a result, the time is over, or somebody cancels.
async fn attempt(context: &TaskContext, number: u32, demand: &VerifyDemand, spec: &OperationSpec) -> OperationResult {
    let deadline = Instant::now() + Duration::from_secs(u64::from(spec.verify.timeout_seconds));
    let (progress, seen) = watch::channel(VerifyProgress::default());
    let (said, told) = watch::channel(String::new());
    let compared = async {
        let mut backoff = Backoff::default();
        loop {
            progress.send_replace(VerifyProgress::default());
            match compare(context, demand, spec, deadline, &progress).await {
                Err(VerifyError::Transient(error)) => {
                    let delay = backoff.next_delay();
                    tracing::warn!(task = %context.task, %error, "the comparison begins anew");
                    said.send_replace(error.clone());
                    if timeout_at(deadline, sleep(delay)).await.is_err() {
                        return Err(VerifyError::TimedOut(format!("the time is over; the last error: {error}")));
                    }
                }
                outcome => return outcome,
            }
        }
    };
    let outcome = tokio::select! {
        outcome = compared => outcome,
        () = until_cancelled(context, number) => return cancelled(),
        () = tell(context, number, seen, told) => return cancelled(),
    };
    let (state, message, report) = match outcome {
        Ok(report) => (OperationState::Done, String::new(), Some(report)),
        Err(VerifyError::TimedOut(message)) => (OperationState::TimedOut, message, None),
        Err(error) => (OperationState::Failed, error.to_string(), None),
    };
    OperationResult { state, message, progress: progress.borrow().clone(), report, at: status::now() }
}

/// Resolves when somebody asked that the operation ends.
async fn until_cancelled(context: &TaskContext, number: u32) {
    loop {
        sleep(TELL_EVERY).await;
        match context.shared.coordination.operation(&context.task.flow, number).await {
            Ok(Some(found)) if !found.spec.cancelled => {}
            Ok(_) => return,
            Err(error) => tracing::debug!(%error, "the operation was not read, trying again"),
        }
    }
}

/// Writes progress down when it changed. Does not end.
async fn tell(
    context: &TaskContext,
    number: u32,
    mut progress: watch::Receiver<VerifyProgress>,
    said: watch::Receiver<String>,
) {
    let key = Key::OperationResult(context.task.flow.clone(), number);
    loop {
        let running = OperationResult {
            state: OperationState::Running,
            message: said.borrow().clone(),
            progress: progress.borrow_and_update().clone(),
            report: None,
            at: status::now(),
        };
        if let Err(error) = context.lock.guarded_put("writing an operation's progress", &key, &running).await {
            tracing::debug!(task = %context.task, %error, "progress was not written");
        }
        sleep(TELL_EVERY).await;
        if progress.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn compare(
    context: &TaskContext,
    demand: &VerifyDemand,
    spec: &OperationSpec,
    deadline: Instant,
    progress: &watch::Sender<VerifyProgress>,
) -> Result<VerifyReport, VerifyError> {
    let refused = |error: &dyn std::error::Error| VerifyError::Refused(error.to_string());
    let name = &spec.verify.sink;
    let sink = demand.sinks.iter().find(|sink| sink.name == *name);
    let sink = sink.ok_or_else(|| VerifyError::Refused(format!("the flow has no sink {name} any more")))?;
    let epoch = Epoch(u64::try_from(context.lock.create_revision().0).unwrap_or(0));
    let source = secret::resolve(&demand.dsn).map_err(|error| refused(&error))?;
    let source = ConnectConfig::parse(&source).map_err(|error| refused(&error))?;
    let source = source.with_application_name(&context.task.session_name(epoch));
    let connected = SourceVerify::connect(&source, &demand.publication).await;
    let failed = |error: SourceError| match error.is_transient() {
        true => VerifyError::Transient(error.to_string()),
        false => refused(&error),
    };
    let mut source = connected.map_err(failed)?;
    if spec.verify.tables.is_empty()
        && let Some(wanted) = publication_of(context)
    {
        let absent = source.unpublished(&wanted).await.map_err(failed)?;
        if !absent.is_empty() {
            // Everything that is published may well be equal; that is not what was asked.
            let absent = absent.join(", ");
            let message = format!(
                "the flow names {absent}, which is not published: its changes are not captured, and there is nothing to compare the sink with. The condition SourceReady of the flow says why; `--tables` compares others"
            );
            return Err(VerifyError::Refused(message));
        }
    }
    let dsn = secret::resolve(&sink.postgres.dsn).map_err(|error| refused(&error))?;
    let config = PostgresSinkConfig::new(&dsn, &sink.postgres)?;
    let apply = TaskId::apply(&context.task.flow, name);
    let mut sink = PostgresVerify::connect(config, &context.task, epoch, apply).await?;
    let (tables, show) = (spec.verify.tables.clone(), spec.verify.show as usize);
    let request = VerifyRequest { tables, show, deadline, awake_every: AWAKE_EVERY };
    verify(&mut source, &mut sink, &request, progress).await
}
