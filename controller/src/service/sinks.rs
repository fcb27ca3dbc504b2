//! `SinkService`.

use tonic::{Request, Response, Status};
use wallaby_coordination::FlowEntry;
use wallaby_model::flow::FlowDocument;
use wallaby_model::{FlowId, SinkId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::sink_service_server::SinkService;

use super::store::Store;
use super::{ALL_FLOWS, answer, flow_named};
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Sinks. They are made and removed with their flow's file.
pub struct SinkApi {
    store: Store,
}

impl SinkApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> SinkApi {
        SinkApi { store: Store { backend } }
    }

    async fn get(&self, name: &str) -> Result<v1::Sink, ApiError> {
        let (flow, sink) = sink_named(name)?;
        let entry = self.store.read(&flow).await?;
        self.show(&entry, &sink)
    }

    fn show(&self, entry: &FlowEntry, sink: &SinkId) -> Result<v1::Sink, ApiError> {
        let spec = entry.record.document.spec.sinks.iter().find(|spec| spec.name == *sink);
        let spec = spec.ok_or_else(|| not_found(&entry.flow, sink))?;
        Ok(self.store.backend.etcd()?.view.with(|view| present::sink(view, entry, spec)))
    }

    async fn list(&self, parent: &str) -> Result<v1::ListSinksResponse, ApiError> {
        let one = match parent {
            ALL_FLOWS => None,
            name => Some(self.store.read(&flow_named(name)?).await?),
        };
        let sinks = self.store.backend.etcd()?.view.with(|view| {
            // All flows from the view: in etcd the specifications stand among the keys of all chunks.
            let entries = match &one {
                Some(entry) => vec![entry],
                None => view.flows().collect(),
            };
            let of = |entry: &FlowEntry| -> Vec<v1::Sink> {
                entry.record.document.spec.sinks.iter().map(|spec| present::sink(view, entry, spec)).collect()
            };
            let mut sinks: Vec<v1::Sink> = entries.into_iter().flat_map(of).collect();
            sinks.sort_by(|a, b| a.name.cmp(&b.name));
            sinks
        });
        Ok(v1::ListSinksResponse { sinks })
    }

    async fn set_paused(&self, name: &str, paused: bool) -> Result<v1::Sink, ApiError> {
        let (flow, sink) = sink_named(name)?;
        let set = |document: &mut FlowDocument| {
            let spec = document.spec.sinks.iter_mut().find(|spec| spec.name == sink);
            let spec = spec.ok_or_else(|| not_found(&flow, &sink))?;
            Ok(std::mem::replace(&mut spec.paused, paused) != paused)
        };
        let mut entry = self.store.edit(&flow, set).await?;
        if !paused {
            entry = self.store.bump(&flow).await?;
        }
        tracing::info!(%flow, %sink, paused, "sink paused or resumed");
        self.show(&entry, &sink)
    }
}

fn sink_named(name: &str) -> Result<(FlowId, SinkId), ApiError> {
    api::parse_sink_name(name).ok_or_else(|| {
        let message = format!("`{name}` is not the name of a sink: write it as flows/{{flow}}/sinks/{{sink}}");
        ApiError::new(Reason::NameInvalid, message)
    })
}

fn not_found(flow: &FlowId, sink: &SinkId) -> ApiError {
    ApiError::new(
        Reason::SinkNotFound,
        format!("flow {flow} has no sink {sink}: `wallaby get sinks {flow}` lists those it has"),
    )
}

#[tonic::async_trait]
impl SinkService for SinkApi {
    async fn get_sink(&self, request: Request<v1::GetSinkRequest>) -> Result<Response<v1::GetSinkResponse>, Status> {
        let sink = self.get(&request.into_inner().name).await;
        answer(sink.map(|sink| v1::GetSinkResponse { sink: Some(sink) }))
    }

    async fn list_sinks(
        &self,
        request: Request<v1::ListSinksRequest>,
    ) -> Result<Response<v1::ListSinksResponse>, Status> {
        answer(self.list(&request.into_inner().parent).await)
    }

    async fn pause_sink(
        &self,
        request: Request<v1::PauseSinkRequest>,
    ) -> Result<Response<v1::PauseSinkResponse>, Status> {
        let sink = self.set_paused(&request.into_inner().name, true).await;
        answer(sink.map(|sink| v1::PauseSinkResponse { sink: Some(sink) }))
    }

    async fn resume_sink(
        &self,
        request: Request<v1::ResumeSinkRequest>,
    ) -> Result<Response<v1::ResumeSinkResponse>, Status> {
        let sink = self.set_paused(&request.into_inner().name, false).await;
        answer(sink.map(|sink| v1::ResumeSinkResponse { sink: Some(sink) }))
    }
}
