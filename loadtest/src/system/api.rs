//! A client of WALlaby's API, as far as the demo and the measurements need one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tonic::transport::{Channel, Endpoint};
use wallaby_model::flow::FlowDocument;
use wallaby_model::{FlowId, Lsn, Position, SinkId};
use wallaby_proto::v1;
use wallaby_proto::v1::flow_service_client::FlowServiceClient;
use wallaby_proto::v1::sink_service_client::SinkServiceClient;
use wallaby_proto::v1::snapshot_service_client::SnapshotServiceClient;

/// How long one call may take.
const CALL_PATIENCE: Duration = Duration::from_secs(5);

/// One flow at one controller.
#[derive(Debug, Clone)]
pub struct FlowApi {
    flows: FlowServiceClient<Channel>,
    sinks: SinkServiceClient<Channel>,
    snapshots: SnapshotServiceClient<Channel>,
    flow: FlowId,
}

impl FlowApi {
    /// A client that connects when it is first used.
    ///
    /// # Errors
    /// When the address is none.
    pub fn new(endpoint: &str, flow: FlowId) -> anyhow::Result<FlowApi> {
        let endpoint =
            Endpoint::from_shared(endpoint.to_owned())?.connect_timeout(CALL_PATIENCE).timeout(CALL_PATIENCE);
        let channel = endpoint.connect_lazy();
        let (flows, sinks) = (FlowServiceClient::new(channel.clone()), SinkServiceClient::new(channel.clone()));
        Ok(FlowApi { flows, sinks, snapshots: SnapshotServiceClient::new(channel), flow })
    }

    /// Makes the flow that a document describes.
    ///
    /// # Errors
    /// When the controller refuses: it says what and where.
    pub async fn create(&self, document: &FlowDocument) -> anyhow::Result<()> {
        let request = v1::CreateFlowRequest { flow: Some(wallaby_model::api::flow_to_message(document)) };
        let made = self.flows.clone().create_flow(request).await;
        made.map(drop).map_err(|status| refused(&status)).context("applying the flow")
    }

    /// Changes the flow to what a document says.
    ///
    /// # Errors
    /// When the controller refuses: it says what and where.
    pub async fn update(&self, document: &FlowDocument) -> anyhow::Result<()> {
        let request = v1::UpdateFlowRequest { flow: Some(wallaby_model::api::flow_to_message(document)) };
        let made = self.flows.clone().update_flow(request).await;
        made.map(drop).map_err(|status| refused(&status)).context("changing the flow")
    }

    /// Lets one sink go on, or stops it.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn set_sink_running(&self, sink: &SinkId, is_running: bool) -> anyhow::Result<()> {
        let name = wallaby_model::api::sink_name(&self.flow, sink);
        let mut sinks = self.sinks.clone();
        let answer = match is_running {
            true => sinks.resume_sink(v1::ResumeSinkRequest { name }).await.map(drop),
            false => sinks.pause_sink(v1::PauseSinkRequest { name }).await.map(drop),
        };
        answer.map_err(|status| refused(&status)).with_context(|| format!("pausing or resuming the sink {sink}"))
    }

    /// Asks for a run of every table into every sink, read by at most so many at a time.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn start_snapshot(&self, readers: u32) -> anyhow::Result<()> {
        let parent = wallaby_model::api::flow_name(&self.flow);
        let spec = v1::SnapshotSpec { readers, ..v1::SnapshotSpec::default() };
        let request = v1::StartSnapshotRequest { parent, spec: Some(spec) };
        let made = self.snapshots.clone().start_snapshot(request).await;
        made.map(drop).map_err(|status| refused(&status)).context("asking for a run")
    }

    /// Sends the flow on its way out.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn delete(&self) -> anyhow::Result<()> {
        let name = wallaby_model::api::flow_name(&self.flow);
        let request = v1::DeleteFlowRequest { name, ..v1::DeleteFlowRequest::default() };
        let answer = self.flows.clone().delete_flow(request).await;
        answer.map(drop).map_err(|status| refused(&status)).context("deleting the flow")
    }

    /// Whether a deleted flow is gone.
    ///
    /// # Errors
    /// While it is not, and when the controller does not answer.
    pub async fn is_gone(&self) -> anyhow::Result<()> {
        let name = wallaby_model::api::flow_name(&self.flow);
        match self.flows.clone().get_flow(v1::GetFlowRequest { name }).await {
            Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
            Err(status) => Err(refused(&status)),
            Ok(answer) => {
                let flow = answer.into_inner().flow.unwrap_or_default();
                anyhow::bail!("the flow is still there: {}", complaints(&flow))
            }
        }
    }

    /// The flow as it is.
    ///
    /// # Errors
    /// When the controller does not answer or does not know it.
    pub async fn get(&self) -> anyhow::Result<v1::Flow> {
        let name = wallaby_model::api::flow_name(&self.flow);
        let answer = self.flows.clone().get_flow(v1::GetFlowRequest { name }).await;
        let answer = answer.map_err(|status| refused(&status))?.into_inner();
        answer.flow.context("the controller answered without a flow")
    }

    /// Whether the controller answers at all.
    ///
    /// # Errors
    /// When it does not.
    pub async fn is_up(&self) -> anyhow::Result<()> {
        let request = v1::ListFlowsRequest { page_size: 1, page_token: String::new() };
        self.flows.clone().list_flows(request).await.map(drop).map_err(|status| refused(&status))
    }
}

/// Reads a flow file.
///
/// # Errors
/// When it cannot be read, or is wrong: names the line.
pub fn read_flow(file: &Path) -> anyhow::Result<FlowDocument> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(wallaby_model::flow::parse(&text, &file.display().to_string())?)
}

fn refused(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

/// The capture task of a flow.
pub fn capture(flow: &v1::Flow) -> Option<&v1::Task> {
    let tasks = flow.status.as_ref().map(|status| status.tasks.as_slice()).unwrap_or_default();
    tasks.iter().find(|task| task.task.ends_with(".capture"))
}

/// How far the log is; zero before it has a position.
pub fn staged(flow: &v1::Flow) -> Position {
    let capture = flow.status.as_ref().and_then(|status| status.capture.as_ref());
    capture.and_then(|capture| capture.staged_position.parse().ok()).unwrap_or_default()
}

/// How far the slowest sink is; zero while one has no position.
pub fn applied(flow: &v1::Flow) -> Lsn {
    sinks(flow).iter().map(position).min().unwrap_or_default().commit
}

/// How far one sink is; zero while it has no position.
pub fn applied_by(flow: &v1::Flow, name: &SinkId) -> Lsn {
    let is_it = |sink: &&v1::Sink| sink.name.ends_with(&format!("/sinks/{name}"));
    sinks(flow).iter().find(is_it).map(position).unwrap_or_default().commit
}

/// Whether a condition of the flow holds.
pub fn is_true(flow: &v1::Flow, kind: &str) -> bool {
    let conditions = flow.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    conditions.iter().any(|c| c.r#type == kind && c.status == i32::from(v1::ConditionStatus::True))
}

fn sinks(flow: &v1::Flow) -> &[v1::Sink] {
    flow.status.as_ref().map(|status| status.sinks.as_slice()).unwrap_or_default()
}

fn position(sink: &v1::Sink) -> Position {
    sink.progress.as_ref().and_then(|progress| progress.position.parse().ok()).unwrap_or_default()
}

/// What is not true of the flow, for messages.
pub fn complaints(flow: &v1::Flow) -> String {
    let Some(status) = &flow.status else { return "no status yet".to_owned() };
    let conditions = status.conditions.iter().chain(status.sinks.iter().flat_map(|sink| &sink.conditions));
    let bad = conditions.filter(|condition| condition.status != i32::from(v1::ConditionStatus::True));
    let mut said: Vec<String> = bad.map(|c| format!("{}: {} ({})", c.r#type, c.message, c.reason)).collect();
    let errors = status.tasks.iter().filter(|task| !task.last_error.is_empty());
    said.extend(errors.map(|task| format!("{}: {}", task.task, task.last_error)));
    if said.is_empty() { "nothing is said to be wrong".to_owned() } else { said.join("; ") }
}
