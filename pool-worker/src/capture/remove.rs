//! The end of a flow: its slot, its publication, its side store and its log go, then its keys.

use wallaby_model::condition::TaskPhase;
use wallaby_postgres_source::{ConnectConfig, SessionOwner, connect_control, drop_publication, drop_slot};
use wallaby_staging::{Log, open_side};

use super::{CaptureError, Directive, enter};
use crate::backoff::Backoff;
use crate::failpoint::Failpoint;
use crate::flows::CaptureDemand;
use crate::secret;
use crate::task::{TaskContext, TaskEnd};

/// Removes what the flow made; tries again until it is done or the worker drains.
pub async fn run(context: &TaskContext, demand: &CaptureDemand) -> TaskEnd {
    let mut backoff = Backoff::default();
    loop {
        let error = match remove(context, demand).await {
            Ok(()) => return TaskEnd::Released(None),
            Err(error) => error,
        };
        let said = format!("removing the flow: {error}");
        if error.directive() == Directive::GiveUp {
            return TaskEnd::GivenUp(said);
        }
        let delay = backoff.next_delay();
        tracing::warn!(task = %context.task, error = %said, "the flow could not be removed yet");
        context.status.backoff(&said, delay);
        if context.pause("the next try at removing the flow", delay).await.is_some() {
            return TaskEnd::Released(None);
        }
    }
}

async fn remove(context: &TaskContext, demand: &CaptureDemand) -> Result<(), CaptureError> {
    step(context, "the source").await?;
    let epoch = context.lock.fix_epoch(None).await?;
    // The flow that is removed is the one that was asked to go: another one that was made under its name meanwhile is not it.
    let entry = match context.shared.coordination.flow(&context.task.flow).await {
        Ok(entry) if entry.record.deleting_since.is_some() => entry,
        Ok(_) | Err(wallaby_coordination::Error::FlowNotFound(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    context.stop_at(Failpoint::StopBeforeRemoval).await;
    let config = ConnectConfig::parse(&secret::resolve(&demand.source.dsn)?)?
        .with_application_name(&context.task.session_name(epoch));
    let control = connect_control(&config).await?;
    if demand.source.slot.create {
        step(context, "the source to drop the slot").await?;
        let owner = SessionOwner { prefix: context.task.session_prefix(), epoch };
        drop_slot(&control, &demand.slot, &owner).await?;
    }
    context.stop_at(Failpoint::StopAfterSlotDropped).await;
    if demand.source.publication.create {
        step(context, "the source to drop the publication").await?;
        drop_publication(&control, &demand.publication).await?;
    }
    context.stop_at(Failpoint::StopAfterPublicationDropped).await;
    step(context, "the NATS servers to remove the side store").await?;
    let connections = context.shared.nats().await?.clone();
    open_side(&context.task.flow, &demand.log, &connections)?.remove().await?;
    context.stop_at(Failpoint::StopAfterSideRemoved).await;
    step(context, "the NATS servers to delete the log").await?;
    Log::new(context.task.flow.clone(), connections).delete().await?;
    context.stop_at(Failpoint::StopAfterLogDeleted).await;
    step(context, "etcd").await?;
    context.shared.coordination.remove_flow(&entry).await?;
    tracing::info!(flow = %context.task.flow, "the flow was removed: slot, publication, log, side store and keys");
    Ok(())
}

/// Says what is waited for now, in a write that etcd refuses to whoever owns the removal no more: what is destroyed next may belong to a
/// flow that was made again under the name.
async fn step(context: &TaskContext, waits_for: &str) -> Result<(), CaptureError> {
    enter(context, TaskPhase::Draining, waits_for);
    context.lock.put_status(&context.status.snapshot()).await?;
    if context.is_valid_now() { Ok(()) } else { Err(CaptureError::Invalid) }
}
