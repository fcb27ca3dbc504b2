//! `FlowService`.

use tonic::{Request, Response, Status};
use wallaby_coordination::FlowEntry;
use wallaby_model::flow::change::{UnderWay, flow_change};
use wallaby_model::flow::{FlowDocument, Problem};
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::flow_service_server::FlowService;

use super::store::{Store, check_etag};
use super::watch::{FlowChanges, watch};
use super::{answer, flow_named};
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Flows in a page when nothing is said, and at most.
const PAGE_SIZE: usize = 500;
const PAGE_SIZE_MAX: usize = 1000;

/// Flows: one source each, with its log and its sinks.
pub struct FlowApi {
    store: Store,
}

impl FlowApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> FlowApi {
        FlowApi { store: Store { backend } }
    }

    async fn create(&self, request: v1::CreateFlowRequest) -> Result<v1::CreateFlowResponse, ApiError> {
        let document = valid_document(request.flow.as_ref())?;
        let entry = self.store.create(document).await?;
        tracing::info!(flow = %entry.flow, "flow created");
        Ok(v1::CreateFlowResponse { flow: Some(self.store.show(&entry)?) })
    }

    async fn get(&self, request: v1::GetFlowRequest) -> Result<v1::GetFlowResponse, ApiError> {
        let entry = self.store.read(&flow_named(&request.name)?).await?;
        Ok(v1::GetFlowResponse { flow: Some(self.store.show(&entry)?) })
    }

    async fn list(&self, request: v1::ListFlowsRequest) -> Result<v1::ListFlowsResponse, ApiError> {
        let size = match usize::try_from(request.page_size) {
            Ok(0) => PAGE_SIZE,
            Ok(size) => size.min(PAGE_SIZE_MAX),
            Err(_) => return Err(ApiError::new(Reason::ArgumentInvalid, "page_size must not be negative")),
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(FlowId::new(token).map_err(|_| {
                ApiError::new(
                    Reason::ArgumentInvalid,
                    "page_token is not one that an earlier answer gave: leave it empty",
                )
            })?),
        };
        // From the view: in etcd the specifications stand among the keys of all chunks.
        let (flows, last) = self.store.backend.etcd()?.view.with(|view| {
            let mut entries = view.flows().filter(|entry| after.as_ref().is_none_or(|after| entry.flow > *after));
            let page: Vec<&FlowEntry> = entries.by_ref().take(size).collect();
            let last = page.last().map(|entry| entry.flow.to_string()).filter(|_| entries.next().is_some());
            (page.into_iter().map(|entry| present::flow(view, entry)).collect(), last)
        });
        Ok(v1::ListFlowsResponse { flows, next_page_token: last.unwrap_or_default() })
    }

    async fn update(&self, request: v1::UpdateFlowRequest) -> Result<v1::UpdateFlowResponse, ApiError> {
        let document = valid_document(request.flow.as_ref())?;
        let etag = request.flow.map(|flow| flow.etag).unwrap_or_default();
        let flow = document.metadata.name.clone();
        let seen = self.store.read(&flow).await?;
        check_etag(&seen, &etag)?;
        not_deleting(&seen)?;
        if seen.record.document == document {
            return Ok(v1::UpdateFlowResponse { flow: Some(self.store.show(&seen)?), changed: false });
        }
        let refused = seen.record.document.refused_changes(&document);
        if !refused.is_empty() {
            return Err(ApiError::of_problems(Reason::FieldImmutable, refused));
        }
        let entry = match etag.is_empty() {
            // Whoever names no version wants this document whatever stood there before.
            true => {
                let set = |current: &mut FlowDocument| {
                    let refused = current.refused_changes(&document);
                    if !refused.is_empty() {
                        return Err(ApiError::of_problems(Reason::FieldImmutable, refused));
                    }
                    *current = document.clone();
                    Ok(true)
                };
                self.store.edit(&flow, set).await?
            }
            false => self.store.replace(&seen, document).await?,
        };
        tracing::info!(%flow, generation = entry.record.generation, "flow updated");
        Ok(v1::UpdateFlowResponse { flow: Some(self.store.show(&entry)?), changed: true })
    }

    async fn diff(&self, request: v1::DiffFlowRequest) -> Result<v1::DiffFlowResponse, ApiError> {
        let document = valid_document(request.flow.as_ref())?;
        let seen = match self.store.read(&document.metadata.name).await {
            Ok(seen) => Some(seen),
            Err(error) if error.reason() == Reason::FlowNotFound => None,
            Err(error) => return Err(error),
        };
        seen.as_ref().map_or(Ok(()), not_deleting)?;
        let under_way = match &seen {
            Some(_) => self.store.under_way(&document.metadata.name).await?,
            None => UnderWay::default(),
        };
        let change = flow_change(seen.as_ref().map(|seen| &seen.record.document), &document, &under_way);
        let changes = change.changes.into_iter().map(|change| v1::FieldChange {
            path: change.path,
            before: change.before.unwrap_or_default(),
            after: change.after.unwrap_or_default(),
        });
        let effects = change.effects.into_iter().map(|effect| v1::ChangeEffect {
            subject: effect.subject,
            effect: effect.effect.word().to_owned(),
            message: effect.message,
        });
        let refused = change.refused.into_iter().map(|p| v1::FieldProblem { path: p.path, message: p.message });
        Ok(v1::DiffFlowResponse {
            exists: seen.is_some(),
            changes: changes.collect(),
            effects: effects.collect(),
            refused: refused.collect(),
        })
    }

    async fn delete(&self, request: v1::DeleteFlowRequest) -> Result<v1::DeleteFlowResponse, ApiError> {
        let flow = flow_named(&request.name)?;
        let entry = self.store.mark_deleting(&flow, &request.etag).await?;
        let shown = self.store.show(&entry)?;
        tracing::info!(%flow, force = request.force, "flow is to be deleted");
        if request.force {
            self.store.backend.drop_staged(&flow, &entry.record.document.spec.log).await?;
            self.store.backend.etcd()?.coordination.remove_flow(&entry).await?;
        }
        Ok(v1::DeleteFlowResponse { flow: Some(shown) })
    }

    async fn set_paused(&self, name: &str, paused: bool) -> Result<v1::Flow, ApiError> {
        let flow = flow_named(name)?;
        let set = |document: &mut FlowDocument| Ok(std::mem::replace(&mut document.spec.paused, paused) != paused);
        let mut entry = self.store.edit(&flow, set).await?;
        if !paused {
            entry = self.store.bump(&flow).await?;
        }
        tracing::info!(%flow, paused, "flow paused or resumed");
        self.store.show(&entry)
    }
}

/// Also where nothing would be changed: whoever makes a flow again under its name is not told that it is there.
fn not_deleting(seen: &FlowEntry) -> Result<(), ApiError> {
    match seen.record.deleting_since {
        Some(_) => Err(wallaby_coordination::Error::FlowDeleting(seen.flow.clone()).into()),
        None => Ok(()),
    }
}

fn valid_document(flow: Option<&v1::Flow>) -> Result<FlowDocument, ApiError> {
    let document = document_of(flow)?;
    let problems = document.problems();
    if problems.is_empty() { Ok(document) } else { Err(ApiError::of_problems(Reason::FlowInvalid, problems)) }
}

fn document_of(flow: Option<&v1::Flow>) -> Result<FlowDocument, ApiError> {
    let missing = || vec![Problem { path: "flow".to_owned(), message: "is missing".to_owned() }];
    let flow = flow.ok_or_else(|| ApiError::of_problems(Reason::FlowInvalid, missing()))?;
    api::flow_from_message(flow).map_err(|problems| ApiError::of_problems(Reason::FlowInvalid, problems))
}

#[tonic::async_trait]
impl FlowService for FlowApi {
    async fn create_flow(
        &self,
        request: Request<v1::CreateFlowRequest>,
    ) -> Result<Response<v1::CreateFlowResponse>, Status> {
        answer(self.create(request.into_inner()).await)
    }

    async fn get_flow(&self, request: Request<v1::GetFlowRequest>) -> Result<Response<v1::GetFlowResponse>, Status> {
        answer(self.get(request.into_inner()).await)
    }

    async fn list_flows(
        &self,
        request: Request<v1::ListFlowsRequest>,
    ) -> Result<Response<v1::ListFlowsResponse>, Status> {
        answer(self.list(request.into_inner()).await)
    }

    async fn update_flow(
        &self,
        request: Request<v1::UpdateFlowRequest>,
    ) -> Result<Response<v1::UpdateFlowResponse>, Status> {
        answer(self.update(request.into_inner()).await)
    }

    async fn delete_flow(
        &self,
        request: Request<v1::DeleteFlowRequest>,
    ) -> Result<Response<v1::DeleteFlowResponse>, Status> {
        answer(self.delete(request.into_inner()).await)
    }

    async fn pause_flow(
        &self,
        request: Request<v1::PauseFlowRequest>,
    ) -> Result<Response<v1::PauseFlowResponse>, Status> {
        let flow = self.set_paused(&request.into_inner().name, true).await;
        answer(flow.map(|flow| v1::PauseFlowResponse { flow: Some(flow) }))
    }

    async fn resume_flow(
        &self,
        request: Request<v1::ResumeFlowRequest>,
    ) -> Result<Response<v1::ResumeFlowResponse>, Status> {
        let flow = self.set_paused(&request.into_inner().name, false).await;
        answer(flow.map(|flow| v1::ResumeFlowResponse { flow: Some(flow) }))
    }

    type WatchFlowStream = FlowChanges;

    async fn watch_flow(&self, request: Request<v1::WatchFlowRequest>) -> Result<Response<FlowChanges>, Status> {
        answer(watch(&self.store.backend, request.into_inner()))
    }

    async fn validate_flow(
        &self,
        request: Request<v1::ValidateFlowRequest>,
    ) -> Result<Response<v1::ValidateFlowResponse>, Status> {
        let flow = request.into_inner().flow.unwrap_or_default();
        let problems = match api::flow_from_message(&flow) {
            Ok(document) => document.problems(),
            Err(problems) => problems,
        };
        let problems = problems.into_iter().map(|p| v1::FieldProblem { path: p.path, message: p.message }).collect();
        answer(Ok(v1::ValidateFlowResponse { problems }))
    }

    async fn diff_flow(&self, request: Request<v1::DiffFlowRequest>) -> Result<Response<v1::DiffFlowResponse>, Status> {
        answer(self.diff(request.into_inner()).await)
    }
}
