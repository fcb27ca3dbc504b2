//! `OperationService`.

use tonic::{Request, Response, Status};
use wallaby_model::FlowId;
use wallaby_proto::v1;
use wallaby_proto::v1::operation_service_server::OperationService;

use super::{answer, flow_named};
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Operations.
pub struct OperationApi {
    backend: Backend,
}

impl OperationApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> OperationApi {
        OperationApi { backend }
    }

    async fn get(&self, name: &str) -> Result<v1::Operation, ApiError> {
        let (flow, number) = operation_named(name)?;
        let etcd = self.backend.etcd()?;
        let found = etcd.coordination.operation(&flow, number).await?.ok_or_else(|| not_found(name))?;
        Ok(etcd.view.with(|view| present::operation(view, &flow, &found)))
    }

    async fn list(&self, parent: &str) -> Result<Vec<v1::Operation>, ApiError> {
        let flow = flow_named(parent)?;
        let etcd = self.backend.etcd()?;
        let found = etcd.coordination.operations(&flow).await?;
        Ok(etcd.view.with(|view| found.iter().map(|entry| present::operation(view, &flow, entry)).collect()))
    }

    async fn cancel(&self, name: &str) -> Result<v1::Operation, ApiError> {
        let (flow, number) = operation_named(name)?;
        let etcd = self.backend.etcd()?;
        let found = etcd.coordination.cancel_operation(&flow, number).await?.ok_or_else(|| not_found(name))?;
        Ok(etcd.view.with(|view| present::operation(view, &flow, &found)))
    }
}

fn not_found(name: &str) -> ApiError {
    ApiError::new(Reason::OperationNotFound, format!("there is no operation {name}, or it is not kept any more"))
}

fn operation_named(name: &str) -> Result<(FlowId, u32), ApiError> {
    let parsed = || {
        let (flow, number) = name.strip_prefix("flows/")?.split_once("/operations/")?;
        Some((FlowId::new(flow).ok()?, number.parse().ok()?))
    };
    parsed().ok_or_else(|| {
        let message =
            format!("`{name}` is not the name of an operation: write it as flows/{{flow}}/operations/{{number}}");
        ApiError::new(Reason::NameInvalid, message)
    })
}

#[tonic::async_trait]
impl OperationService for OperationApi {
    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::GetOperationResponse>, Status> {
        let operation = self.get(&request.into_inner().name).await;
        answer(operation.map(|operation| v1::GetOperationResponse { operation: Some(operation) }))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let operations = self.list(&request.into_inner().parent).await;
        answer(operations.map(|operations| v1::ListOperationsResponse { operations }))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::CancelOperationResponse>, Status> {
        let operation = self.cancel(&request.into_inner().name).await;
        answer(operation.map(|operation| v1::CancelOperationResponse { operation: Some(operation) }))
    }
}
