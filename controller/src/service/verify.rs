//! `VerifyService`: asks for a comparison. A worker does it.

use tonic::{Request, Response, Status};
use wallaby_coordination::{FlowEntry, wall_clock_now};
use wallaby_model::verify::{OperationSpec, SHOW_DEFAULT, SHOW_MAX, TIMEOUT_DEFAULT_SECONDS, VerifySpec};
use wallaby_model::{SinkId, TaskId};
use wallaby_proto::v1;
use wallaby_proto::v1::verify_service_server::VerifyService;

use super::store::Store;
use super::{answer, flow_named};
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};
use crate::view::View;

/// A comparison holds a snapshot of the source: a day is the most.
const TIMEOUT_MAX_SECONDS: u64 = 86_400;

/// Comparisons.
pub struct VerifyApi {
    store: Store,
}

impl VerifyApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> VerifyApi {
        VerifyApi { store: Store { backend } }
    }

    async fn verify(&self, request: v1::VerifyRequest) -> Result<v1::Operation, ApiError> {
        let flow = flow_named(&request.parent)?;
        let entry = self.store.read(&flow).await?;
        let verify = spec_of(&entry, request.spec.unwrap_or_default())?;
        let etcd = self.store.backend.etcd()?;
        etcd.view.with(|view| refuse_stopped(view, &entry, &verify.sink))?;
        let spec = OperationSpec { verify, cancelled: false, created_at: wall_clock_now() };
        let made = etcd.coordination.create_operation(&entry, spec).await?;
        tracing::info!(%flow, operation = made.number, "comparison asked for");
        Ok(etcd.view.with(|view| present::operation(view, &flow, &made)))
    }
}

/// A sink that stands still for a person never comes to where the source is, and one whose capture does may not: who asks would learn it
/// when the time is over.
fn refuse_stopped(view: &View, entry: &FlowEntry, sink: &SinkId) -> Result<(), ApiError> {
    let flow = &entry.flow;
    let both = [
        (TaskId::apply(flow, sink), format!("sink {flow}/{sink}"), format!("{flow}/{sink}")),
        (TaskId::capture(flow), format!("the capture of flow {flow}"), flow.to_string()),
    ];
    for (task, what, name) in both {
        if let Some(error) = present::stopped(view, entry, &task) {
            let message = format!(
                "{what} is stopped, so the sink does not come to where the source is: {error}; mend it, then `wallaby resume {name}`"
            );
            return Err(ApiError::new(Reason::TaskStopped, message));
        }
    }
    Ok(())
}

/// The comparison that is asked for, when the flow can have it.
fn spec_of(entry: &FlowEntry, wanted: v1::VerifySpec) -> Result<VerifySpec, ApiError> {
    let bad = |message: String| ApiError::new(Reason::ArgumentInvalid, message);
    let (flow, spec) = (&entry.flow, &entry.record.document.spec);
    let sink = match (spec.sinks.as_slice(), wanted.sink.as_str()) {
        ([only], "") => only,
        ([], _) => return Err(bad(format!("flow {flow} has no sink to compare with"))),
        (sinks, "") => {
            let names: Vec<&str> = sinks.iter().map(|sink| sink.name.as_str()).collect();
            return Err(bad(format!("flow {flow} has several sinks: name one of {}", names.join(", "))));
        }
        (sinks, name) => sinks.iter().find(|sink| sink.name.as_str() == name).ok_or_else(|| {
            let message = format!("flow {flow} has no sink {name}: `wallaby get sinks {flow}` lists those it has");
            ApiError::new(Reason::SinkNotFound, message)
        })?,
    };
    if entry.record.deleting_since.is_some() {
        return Err(ApiError::new(Reason::FlowDeleting, format!("flow {flow} is being deleted")));
    }
    if spec.paused || sink.paused {
        let what = if spec.paused { format!("flow {flow}") } else { format!("sink {flow}/{}", sink.name) };
        let message = format!("{what} is paused, so the sink does not come to where the source is: resume it first");
        return Err(ApiError::new(Reason::FlowPaused, message));
    }
    if wanted.show > SHOW_MAX {
        return Err(bad(format!("{} rows to show: at most {SHOW_MAX} of each table", wanted.show)));
    }
    let seconds = match &wanted.timeout {
        None => u64::from(TIMEOUT_DEFAULT_SECONDS),
        Some(time) => u64::try_from(time.seconds).unwrap_or(0) + u64::from(time.nanos > 0),
    };
    if !(1..=TIMEOUT_MAX_SECONDS).contains(&seconds) {
        return Err(bad("the time must be between one second and a day".to_owned()));
    }
    Ok(VerifySpec {
        sink: sink.name.clone(),
        tables: wanted.tables,
        show: if wanted.show == 0 { SHOW_DEFAULT } else { wanted.show },
        timeout_seconds: u32::try_from(seconds).unwrap_or(TIMEOUT_DEFAULT_SECONDS),
    })
}

#[tonic::async_trait]
impl VerifyService for VerifyApi {
    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<v1::VerifyResponse>, Status> {
        let operation = VerifyApi::verify(self, request.into_inner()).await;
        answer(operation.map(|operation| v1::VerifyResponse { operation: Some(operation) }))
    }
}
