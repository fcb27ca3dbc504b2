//! `WorkerService`. Workers come and go by themselves: what is shown is the live view.

use tonic::{Request, Response, Status};
use wallaby_model::{WorkerId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::worker_service_server::WorkerService;

use super::answer;
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Workers.
pub struct WorkerApi {
    backend: Backend,
}

impl WorkerApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> WorkerApi {
        WorkerApi { backend }
    }

    async fn list(&self) -> Result<Vec<v1::Worker>, ApiError> {
        let etcd = self.backend.etcd()?;
        let workers = etcd.coordination.workers().await?;
        Ok(etcd
            .view
            .with(|view| workers.iter().map(|entry| present::worker(view, &entry.worker, &entry.info)).collect()))
    }

    async fn get(&self, worker: &WorkerId) -> Result<v1::Worker, ApiError> {
        let name = api::worker_name(worker);
        let found = self.list().await?.into_iter().find(|worker| worker.name == name);
        found.ok_or_else(|| {
            let message = format!("there is no worker {worker}: `wallaby workers` lists those that are alive");
            ApiError::new(Reason::WorkerNotFound, message)
        })
    }

    async fn drain(&self, name: &str) -> Result<v1::Worker, ApiError> {
        let worker = worker_named(name)?;
        self.backend.etcd()?.coordination.request_drain(&worker).await?;
        tracing::info!(%worker, "worker asked to drain");
        let mut shown = self.get(&worker).await?;
        shown.draining = true;
        Ok(shown)
    }
}

fn worker_named(name: &str) -> Result<WorkerId, ApiError> {
    api::parse_worker_name(name).ok_or_else(|| {
        ApiError::new(
            Reason::NameInvalid,
            format!("`{name}` is not the name of a worker: write it as workers/{{worker}}"),
        )
    })
}

#[tonic::async_trait]
impl WorkerService for WorkerApi {
    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        answer(self.list().await.map(|workers| v1::ListWorkersResponse { workers }))
    }

    async fn get_worker(
        &self,
        request: Request<v1::GetWorkerRequest>,
    ) -> Result<Response<v1::GetWorkerResponse>, Status> {
        let worker = async { self.get(&worker_named(&request.into_inner().name)?).await };
        answer(worker.await.map(|worker| v1::GetWorkerResponse { worker: Some(worker) }))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let worker = self.drain(&request.into_inner().name).await;
        answer(worker.map(|worker| v1::DrainWorkerResponse { worker: Some(worker) }))
    }
}
