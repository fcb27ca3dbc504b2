//! The end of a flow: its slot, its publication, its side store and its log go, then its keys.

use wallaby_model::condition::TaskPhase;
use wallaby_postgres_source::{ConnectConfig, SessionOwner, connect_control, drop_publication, drop_slot};
use wallaby_staging::{Log, open_side};

use super::{CaptureError, Directive, enter};
use crate::backoff::Backoff;
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
    enter(context, TaskPhase::Draining, "the source");
    let epoch = context.lock.fix_epoch(None).await?;
    let config = ConnectConfig::parse(&secret::resolve(&demand.source.dsn)?)?
        .with_application_name(&context.task.session_name(epoch));
    let control = connect_control(&config).await?;
    if demand.source.slot.create {
        let owner = SessionOwner { prefix: context.task.session_prefix(), epoch };
        drop_slot(&control, &demand.slot, &owner).await?;
    }
    if demand.source.publication.create {
        drop_publication(&control, &demand.publication).await?;
    }
    enter(context, TaskPhase::Draining, "the NATS servers");
    let connections = context.shared.nats().await?.clone();
    open_side(&context.task.flow, &demand.log, &connections)?.remove().await?;
    Log::new(context.task.flow.clone(), connections).delete().await?;
    enter(context, TaskPhase::Draining, "etcd");
    let entry = match context.shared.coordination.flow(&context.task.flow).await {
        Ok(entry) => entry,
        Err(wallaby_coordination::Error::FlowNotFound(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    context.shared.coordination.remove_flow(&entry).await?;
    tracing::info!(flow = %context.task.flow, "the flow was removed: slot, publication, log, side store and keys");
    Ok(())
}
