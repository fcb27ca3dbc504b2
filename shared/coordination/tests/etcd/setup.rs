//! What the tests share: connections, documents, a worker that dies like a process.

use std::time::Duration;

use serde_json::json;
use wallaby_coordination::{
    Acquired, Coordination, FlowEntry, Options, Revision, SessionOptions, TaskLock, WorkerInfo, WorkerSession,
    wall_clock_now,
};
use wallaby_model::flow::FlowDocument;
use wallaby_model::{FlowId, Lsn, Position, Reader, SinkId, TaskId, WorkerId};
use wallaby_testkit::{EtcdCluster, EtcdOptions, EtcdScope};

pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn options(prefix: &str) -> Options {
    Options { prefix: prefix.trim_end_matches('/').to_owned(), ..Options::default() }
}

/// A connection to the shared etcd, under a prefix of its own.
pub async fn shared(hint: &str) -> (EtcdScope<'static>, Coordination) {
    wallaby_testkit::log_to_test_output();
    let scope = EtcdScope::create(hint).await;
    let coordination = Coordination::connect(&scope.endpoints(), options(scope.prefix())).await.unwrap();
    (scope, coordination)
}

/// An etcd of the test's own.
pub async fn own_etcd(members: usize) -> EtcdCluster {
    wallaby_testkit::log_to_test_output();
    EtcdCluster::start(EtcdOptions { members, unsafe_no_fsync: true, ..EtcdOptions::default() }).await.unwrap()
}

pub async fn connect_to(etcd: &EtcdCluster) -> Coordination {
    Coordination::connect(&etcd.endpoints(), options("/wallaby")).await.unwrap()
}

pub fn flow_id(name: &str) -> FlowId {
    FlowId::new(name).unwrap()
}

pub fn sink_id(name: &str) -> SinkId {
    SinkId::new(name).unwrap()
}

/// The reader of a sink.
pub fn reader(sink: &str) -> Reader {
    Reader::Sink(sink_id(sink))
}

pub fn at(lsn: u64) -> Position {
    Position::before(Lsn(lsn))
}

pub fn document(name: &str, sinks: &[&str]) -> FlowDocument {
    let sinks: Vec<_> =
        sinks.iter().map(|sink| json!({"name": sink, "postgres": {"dsn": {"env": "TARGET"}}})).collect();
    serde_json::from_value(json!({
        "apiVersion": "wallaby/v1", "kind": "Flow", "metadata": {"name": name},
        "spec": {
            "source": {"postgres": {
                "dsn": {"env": "SOURCE"}, "publication": {"tables": ["public.*"]}, "snapshot": "never"
            }},
            "sinks": sinks
        }
    }))
    .unwrap()
}

pub fn info() -> WorkerInfo {
    WorkerInfo {
        capacity: 10,
        load: 0,
        version: "0".to_owned(),
        zone: None,
        capabilities: vec!["postgres".to_owned()],
        address: "127.0.0.1:7118".to_owned(),
        draining: false,
        started_at: wall_clock_now(),
    }
}

pub fn lease(ttl_seconds: u64, self_fencing: bool) -> SessionOptions {
    SessionOptions { ttl: Duration::from_secs(ttl_seconds), self_fencing, ..SessionOptions::default() }
}

pub async fn worker(coordination: &Coordination, name: &str, options: SessionOptions) -> WorkerSession {
    WorkerSession::start(coordination, WorkerId::new(name).unwrap(), info(), options).await.unwrap()
}

/// A flow with a sink `a`, and its capture task.
pub async fn shop(coordination: &Coordination) -> (FlowEntry, TaskId) {
    let flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let task = TaskId::capture(&flow.flow);
    (flow, task)
}

pub async fn take(session: &WorkerSession, task: &TaskId, revision: Revision) -> TaskLock {
    match session.acquire(task, revision).await.unwrap() {
        Acquired::Lock(lock) => lock,
        other => panic!("{task} was not free: {other:?}"),
    }
}

/// A worker in a runtime of its own, which can end as a killed process does: without a goodbye.
pub struct DoomedWorker {
    runtime: Option<tokio::runtime::Runtime>,
}

impl DoomedWorker {
    /// Takes `task` and holds it.
    pub async fn holding(
        endpoints: Vec<String>,
        options: Options,
        task: TaskId,
        revision: Revision,
        ttl_seconds: u64,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime
            .spawn(async move {
                let coordination = Coordination::connect(&endpoints, options).await.unwrap();
                let session = worker(&coordination, "doomed", lease(ttl_seconds, true)).await;
                let lock = take(&session, &task, revision).await;
                // Kept by the runtime until it ends.
                tokio::spawn(async move {
                    let _held = (session, lock);
                    std::future::pending::<()>().await;
                });
            })
            .await
            .unwrap();
        DoomedWorker { runtime: Some(runtime) }
    }

    pub fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for DoomedWorker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
