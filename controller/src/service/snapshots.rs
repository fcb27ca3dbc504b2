//! `SnapshotService`.

use tonic::{Request, Response, Status};
use wallaby_coordination::{FlowEntry, RunEntry, wall_clock_now};
use wallaby_model::flow::change::READERS;
use wallaby_model::flow::check::table_problem;
use wallaby_model::run::{RunReason, RunSpec, RunWish, covers};
use wallaby_model::{FlowId, RunId, SinkId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::snapshot_service_server::SnapshotService;

use super::store::Store;
use super::{ALL_FLOWS, answer, flow_named};
use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Chunks that are read at a time, at most: each one is a connection and a COPY at the source.
const READERS_MAX: u32 = 64;

/// Tries at a run that others keep coming between.
const ATTEMPTS_MAX: usize = 8;

/// Snapshot runs.
pub struct SnapshotApi {
    store: Store,
}

impl SnapshotApi {
    /// The service on these servers.
    pub fn new(backend: Backend) -> SnapshotApi {
        SnapshotApi { store: Store { backend } }
    }

    async fn start(&self, request: v1::StartSnapshotRequest) -> Result<v1::Snapshot, ApiError> {
        let flow = flow_named(&request.parent)?;
        let wanted = request.spec.unwrap_or_default();
        let mut last = None;
        for _ in 0..ATTEMPTS_MAX {
            let seen = self.store.read(&flow).await?;
            let spec = spec_of(&seen, &wanted)?;
            match self.store.backend.etcd()?.coordination.create_run(&seen, spec).await {
                Ok(entry) => {
                    tracing::info!(%flow, run = %entry.run, "snapshot run asked for");
                    self.store.backend.etcd()?.view.reaches(entry.spec_revision).await;
                    return self.show(&seen, &entry);
                }
                // A pause or a label that came between is no reason to refuse.
                Err(error @ wallaby_coordination::Error::FlowChanged { .. }) => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        Err(last.map_or_else(|| ApiError::new(Reason::FlowChanged, "try again"), ApiError::from))
    }

    async fn wish(&self, name: &str, wish: RunWish) -> Result<v1::Snapshot, ApiError> {
        let (flow, run) = snapshot_named(name)?;
        let entry = self.store.read(&flow).await?;
        let changed = self.store.backend.etcd()?.coordination.set_run_wish(&flow, run, wish).await?;
        tracing::info!(%flow, %run, ?wish, "snapshot run is wanted otherwise");
        self.store.backend.etcd()?.view.reaches(changed.spec_revision).await;
        self.show(&entry, &changed)
    }

    async fn get(&self, name: &str) -> Result<v1::Snapshot, ApiError> {
        let (flow, run) = snapshot_named(name)?;
        let entry = self.store.read(&flow).await?;
        let found = self.store.backend.etcd()?.coordination.run(&flow, run).await?;
        self.show(&entry, &found)
    }

    async fn list(&self, parent: &str) -> Result<Vec<v1::Snapshot>, ApiError> {
        let coordination = &self.store.backend.etcd()?.coordination;
        if parent == ALL_FLOWS {
            // All flows from the view: one request to etcd for each would be many.
            return Ok(self.store.backend.etcd()?.view.with(|view| {
                let of = |entry: &FlowEntry| {
                    let runs = view.runs(&entry.flow);
                    runs.filter_map(|(run, known)| {
                        Some(present::snapshot(view, entry, run, known.spec()?, known.plan()))
                    })
                    .collect::<Vec<_>>()
                };
                view.flows().flat_map(of).collect()
            }));
        }
        let entry = self.store.read(&flow_named(parent)?).await?;
        coordination.runs(&entry.flow).await?.iter().map(|run| self.show(&entry, run)).collect()
    }

    fn show(&self, entry: &FlowEntry, run: &RunEntry) -> Result<v1::Snapshot, ApiError> {
        let view = &self.store.backend.etcd()?.view;
        Ok(view.with(|view| present::snapshot(view, entry, run.run, &run.spec, run.plan.as_ref())))
    }
}

fn snapshot_named(name: &str) -> Result<(FlowId, RunId), ApiError> {
    api::parse_snapshot_name(name).ok_or_else(|| {
        let message =
            format!("`{name}` is not the name of a snapshot run: write it as flows/{{flow}}/snapshots/{{run}}");
        ApiError::new(Reason::NameInvalid, message)
    })
}

/// The run that is asked for, when the flow can have it.
fn spec_of(entry: &FlowEntry, wanted: &v1::SnapshotSpec) -> Result<RunSpec, ApiError> {
    let bad = |message: String| Err(ApiError::new(Reason::ArgumentInvalid, message));
    let document = &entry.record.document;
    let publication = &document.spec.source.postgres.publication;
    for table in wanted.tables.iter().chain(&wanted.exclude) {
        if let Some(problem) = table_problem(table) {
            return bad(problem);
        }
    }
    for table in wanted.tables.iter().filter(|_| publication.create) {
        let is_captured = publication.tables.iter().any(|pattern| covers(pattern, table) || covers(table, pattern));
        if !is_captured || publication.exclude.iter().any(|out| covers(out, table)) {
            let flow = &entry.flow;
            return bad(format!(
                "flow {flow} does not capture `{table}`: add it to `spec.source.postgres.publication.tables` and apply the file, which also loads it"
            ));
        }
    }
    let mut sinks: Vec<SinkId> = Vec::new();
    for name in &wanted.sinks {
        let known = document.spec.sinks.iter().find(|sink| sink.name.as_str() == name);
        let Some(sink) = known.map(|sink| sink.name.clone()) else {
            let message = format!(
                "flow {} has no sink {name}: `wallaby get sinks {}` lists those it has",
                entry.flow, entry.flow
            );
            return Err(ApiError::new(Reason::SinkNotFound, message));
        };
        if !sinks.contains(&sink) {
            sinks.push(sink);
        }
    }
    if wanted.readers > READERS_MAX {
        return bad(format!(
            "{} readers: at most {READERS_MAX}, each is a connection and a COPY at the source",
            wanted.readers
        ));
    }
    let readers = if wanted.readers == 0 { READERS } else { wanted.readers };
    Ok(RunSpec {
        reason: RunReason::Asked,
        tables: wanted.tables.clone(),
        exclude: wanted.exclude.clone(),
        sinks,
        wish: RunWish::Go,
        rows_per_second: (wanted.rows_per_second > 0).then_some(wanted.rows_per_second),
        readers,
        created_at: wall_clock_now(),
    })
}

#[tonic::async_trait]
impl SnapshotService for SnapshotApi {
    async fn start_snapshot(
        &self,
        request: Request<v1::StartSnapshotRequest>,
    ) -> Result<Response<v1::StartSnapshotResponse>, Status> {
        let snapshot = self.start(request.into_inner()).await;
        answer(snapshot.map(|snapshot| v1::StartSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn pause_snapshot(
        &self,
        request: Request<v1::PauseSnapshotRequest>,
    ) -> Result<Response<v1::PauseSnapshotResponse>, Status> {
        let snapshot = self.wish(&request.into_inner().name, RunWish::Pause).await;
        answer(snapshot.map(|snapshot| v1::PauseSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn resume_snapshot(
        &self,
        request: Request<v1::ResumeSnapshotRequest>,
    ) -> Result<Response<v1::ResumeSnapshotResponse>, Status> {
        let snapshot = self.wish(&request.into_inner().name, RunWish::Go).await;
        answer(snapshot.map(|snapshot| v1::ResumeSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn cancel_snapshot(
        &self,
        request: Request<v1::CancelSnapshotRequest>,
    ) -> Result<Response<v1::CancelSnapshotResponse>, Status> {
        let snapshot = self.wish(&request.into_inner().name, RunWish::Cancel).await;
        answer(snapshot.map(|snapshot| v1::CancelSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::GetSnapshotResponse>, Status> {
        let snapshot = self.get(&request.into_inner().name).await;
        answer(snapshot.map(|snapshot| v1::GetSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        let snapshots = self.list(&request.into_inner().parent).await;
        answer(snapshots.map(|snapshots| v1::ListSnapshotsResponse { snapshots }))
    }
}
