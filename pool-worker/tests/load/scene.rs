//! What the tests of the first load work with: real servers, workers in this process, and offers made by a loop in the place of the
//! controller.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream;
use clap::Parser;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::condition::{ConditionType, TaskPhase, TaskStatus};
use wallaby_model::flow::{FlowDocument, SnapshotMode};
use wallaby_model::offer::{OFFER_CONSUMER, Offer, offer_stream, offer_subject, offer_subjects};
use wallaby_model::run::{RunPlan, RunState, RunWish, TableStage};
use wallaby_model::{
    Attempt, ChunkId, FlowId, Lsn, Manifest, PoolId, Position, RunId, SinkId, TaskId, TaskKind, WorkerId,
};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_pool_worker::options::Options;
use wallaby_pool_worker::worker::{self, Start};
use wallaby_staging::{Connections, Log, NatsTarget, Shelf, SideGroup, SideKey, open_side};
use wallaby_testkit::*;
use wallaby_wire::splice::decode_manifest;

/// How long a load of a few rows may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// One flow with its servers.
pub struct Scene {
    pub source: Database<'static>,
    pub target: Database<'static>,
    pub nats: NatsScope<'static>,
    pub coordination: Coordination,
    pub flow: FlowId,
    pub sink: SinkId,
    pool: PoolId,
    gate: Gate,
    etcd: EtcdScope<'static>,
}

/// What of a run is offered: the rest of it waits.
#[derive(Debug)]
struct Gate {
    /// Chunks of a relation with a lower number than this.
    chunks: AtomicU32,
    /// Whether loads are.
    loads: AtomicBool,
}

/// A worker of this process; dropped, it is cut off where it stands.
pub struct Running {
    shutdown: CancellationToken,
    task: AbortOnDropHandle<worker::Outcome>,
}

impl Running {
    /// Asks it to end, and waits until it has handed everything over.
    pub async fn end(self) {
        self.shutdown.cancel();
        let outcome = tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
        assert_eq!(outcome, worker::Outcome::Drained);
    }
}

impl Scene {
    pub async fn new(name: &str) -> Scene {
        let (source, target) = tokio::join!(Database::create("source"), Database::create("target"));
        Scene::with(name, source, target).await
    }

    /// With databases in clusters of the test's own.
    pub async fn with(name: &str, source: Database<'static>, target: Database<'static>) -> Scene {
        log_to_test_output();
        let nats = NatsScope::one_node(name).await;
        let etcd = EtcdScope::create(name).await;
        let options = wallaby_coordination::Options {
            prefix: etcd.prefix().trim_end_matches('/').to_owned(),
            ..wallaby_coordination::Options::default()
        };
        let coordination = Coordination::connect(&etcd.endpoints(), options).await.unwrap();
        let id = nats.prefix().replace('_', "-");
        let scene = Scene {
            source,
            target,
            coordination,
            flow: FlowId::new(id.clone()).unwrap(),
            sink: SinkId::new("target").unwrap(),
            pool: PoolId::new(id).unwrap(),
            nats,
            gate: Gate { chunks: AtomicU32::new(u32::MAX), loads: AtomicBool::new(true) },
            etcd,
        };
        scene.make_queue().await;
        scene
    }

    /// From now on only this many chunks of each relation are offered.
    pub fn offer_chunks(&self, chunks: u32) {
        self.gate.chunks.store(chunks, Ordering::Relaxed);
    }

    /// Whether loads are offered from now on.
    pub fn offer_loads(&self, loads: bool) {
        self.gate.loads.store(loads, Ordering::Relaxed);
    }

    /// The flow's file.
    pub fn document(&self, tables: &str, snapshot: &str, more: &str) -> FlowDocument {
        let (flow, source, target) = (&self.flow, self.source.dsn(), self.target.dsn());
        let text = format!(
            r#"
apiVersion: wallaby/v1
kind: Flow
metadata: {{ name: {flow} }}
spec:
  source:
    postgres:
      dsn: {{ value: "{source}" }}
      publication: {{ create: true, tables: [{tables}] }}
      snapshot: {snapshot}
      {more}
  log: {{ replicas: 1, maxBytes: 128Mi, replayWindow: 0s }}
  sinks:
    - name: target
      postgres: {{ dsn: {{ value: "{target}" }} }}
"#
        );
        wallaby_model::flow::parse(&text, "test").unwrap()
    }

    /// The flow's file for `public.t`, which is read in chunks of half a MiB.
    pub fn in_chunks(&self, snapshot: &str) -> FlowDocument {
        let mut document = self.document("public.t", snapshot, "");
        document.spec.log.side_store = serde_json::from_str(r#"{ "jetstream": { "chunksMax": "2Mi" } }"#).unwrap();
        document
    }

    async fn make_queue(&self) {
        let context = self.nats.jetstream();
        let stream = context
            .get_or_create_stream(jetstream::stream::Config {
                name: offer_stream(&self.pool),
                subjects: vec![offer_subjects(&self.pool)],
                retention: jetstream::stream::RetentionPolicy::WorkQueue,
                max_messages_per_subject: 1,
                ..Default::default()
            })
            .await
            .unwrap();
        let config =
            jetstream::consumer::pull::Config { durable_name: Some(OFFER_CONSUMER.to_owned()), ..Default::default() };
        stream.get_or_create_consumer(OFFER_CONSUMER, config).await.unwrap();
    }

    /// Offers what the controller would offer, until dropped.
    pub fn offering(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        let scene = Arc::clone(self);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(200));
            loop {
                ticks.tick().await;
                if let Err(error) = scene.offer().await {
                    tracing::debug!(error, "no offers this time");
                }
            }
        }))
    }

    async fn offer(&self) -> Result<(), String> {
        let flow = self.coordination.flow(&self.flow).await.map_err(|error| error.to_string())?;
        let spec = &flow.record.document.spec;
        let is_captured = spec.source.postgres.snapshot != SnapshotMode::Only;
        let mut wanted = Vec::new();
        if is_captured {
            wanted.push(TaskId::capture(&self.flow));
        }
        // Without a capture, sinks are needed as long as something is loaded into them.
        if is_captured || self.has_open_run().await? {
            wanted.extend(spec.sinks.iter().map(|sink| TaskId::apply(&self.flow, &sink.name)));
        }
        wanted.extend(self.run_tasks().await.map_err(|error| error.to_string())?);
        let operations = self.coordination.operations(&self.flow).await.map_err(|error| error.to_string())?;
        let open = operations.iter().filter(|operation| !operation.is_over());
        wanted.extend(open.map(|operation| self.comparison(operation.number)));
        let locks = self.coordination.locks(&self.flow).await.map_err(|error| error.to_string())?;
        let owned: BTreeSet<TaskId> = locks.into_iter().map(|lock| lock.task).collect();
        let context = self.nats.jetstream();
        for task in wanted.into_iter().filter(|task| !owned.contains(task)) {
            let subject = offer_subject(&self.pool, &task);
            let offer = Offer { task, spec_revision: flow.revision.0 };
            let sent = context.publish(subject, offer.to_bytes().into()).await.map_err(|error| error.to_string())?;
            sent.await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The task that does a comparison.
    pub fn comparison(&self, number: u32) -> TaskId {
        TaskId { flow: self.flow.clone(), kind: TaskKind::Verify(number) }
    }

    async fn has_open_run(&self) -> Result<bool, String> {
        let runs = self.coordination.runs(&self.flow).await.map_err(|error| error.to_string())?;
        Ok(runs.iter().any(|run| !run.is_over()))
    }

    async fn run_tasks(&self) -> wallaby_coordination::Result<Vec<TaskId>> {
        let mut wanted = Vec::new();
        let task = |kind| TaskId { flow: self.flow.clone(), kind };
        for run in self.coordination.runs(&self.flow).await?.into_iter().filter(|run| !run.is_over()) {
            wanted.push(task(TaskKind::Run(run.run)));
            let Some(plan) = run.plan else { continue };
            let chunks = self.coordination.run_chunks(&self.flow, run.run).await?;
            let may_read = plan.snapshot().is_some() && run.spec.wish == RunWish::Go;
            let gate = self.gate.chunks.load(Ordering::Relaxed);
            let open = plan.chunks().filter(|chunk| !chunks.contains_key(chunk) && chunk.number < gate);
            wanted.extend(open.filter(|_| may_read).take(4).map(|chunk| task(TaskKind::Chunk(run.run, chunk))));
            for (sink, state) in self.coordination.sink_runs(&self.flow, run.run).await? {
                let loaded = self.coordination.run_loaded(&self.flow, run.run, &sink).await?;
                let is_copying = |chunk: &wallaby_model::ChunkId| {
                    let table = plan.relations[chunk.table as usize].table.to_string();
                    state.tables.get(&table) == Some(&TableStage::Copying)
                };
                let loads = plan.chunks().filter(|chunk| chunks.contains_key(chunk) && !loaded.contains_key(chunk));
                let may_load = self.gate.loads.load(Ordering::Relaxed) && run.spec.wish != RunWish::Cancel;
                let loads = loads.filter(is_copying).take(if may_load { 4 } else { 0 });
                wanted.extend(loads.map(|chunk| task(TaskKind::Load(sink.clone(), run.run, chunk))));
            }
        }
        Ok(wanted)
    }

    pub fn worker(&self, name: &str) -> Running {
        self.worker_with(name, Failpoints::default())
    }

    /// A worker with failpoints.
    pub fn worker_with(&self, name: &str, failpoints: Failpoints) -> Running {
        self.worker_at(name, failpoints, &self.nats.url())
    }

    /// A worker that reaches NATS in a way of its own.
    pub fn worker_at(&self, name: &str, failpoints: Failpoints, nats: &str) -> Running {
        let monitoring = self.nats.cluster().monitoring_urls().join(",");
        self.start(name, failpoints, &["--nats", nats, "--nats-monitoring", &monitoring])
    }

    /// The same; it gives up what it cannot do without NATS after three seconds.
    pub fn impatient_worker_at(&self, name: &str, failpoints: Failpoints, nats: &str) -> Running {
        let monitoring = self.nats.cluster().monitoring_urls().join(",");
        self.start(name, failpoints, &["--nats", nats, "--nats-monitoring", &monitoring, "--log-patience", "3s"])
    }

    /// A worker that asks for the servers' sync interval in a way of its own.
    pub fn worker_asking(&self, name: &str, monitoring: &str) -> Running {
        self.start(name, Failpoints::default(), &["--nats", &self.nats.url(), "--nats-monitoring", monitoring])
    }

    /// A worker with room for this many tasks.
    pub fn worker_of(&self, name: &str, capacity: u32) -> Running {
        let monitoring = self.nats.cluster().monitoring_urls().join(",");
        let more = ["--nats", &self.nats.url(), "--nats-monitoring", &monitoring, "--capacity", &capacity.to_string()];
        self.start(name, Failpoints::default(), &more)
    }

    /// A worker with failpoints that has room for one task.
    pub fn worker_of_one(&self, name: &str, failpoints: Failpoints) -> Running {
        self.start(name, failpoints, &["--nats", &self.nats.url(), "--capacity", "1"])
    }

    /// Takes a task's lock from its owner.
    pub async fn delete_lock(&self, task: &TaskId) {
        let key = self.coordination.keys().text(&Key::TaskLock(task.clone()));
        let deleted = self.etcd.client().delete(key, None).await.unwrap().deleted();
        assert_eq!(deleted, 1, "{task} had no owner");
    }

    /// A worker whose sinks read little ahead: their batches are small.
    pub fn worker_narrow(&self, name: &str) -> Running {
        self.start(name, Failpoints::default(), &["--nats", &self.nats.url(), "--sink-buffer-bytes", "256Ki"])
    }

    /// A worker that waits for no sink longer than a few seconds.
    pub fn impatient_worker(&self, name: &str) -> Running {
        self.start(name, Failpoints::default(), &["--nats", &self.nats.url(), "--sink-patience", "5s"])
    }

    /// A worker that does not know when the servers sync: for minutes, Postgres is told of nothing that it stages.
    pub fn wary_worker(&self, name: &str) -> Running {
        self.start(name, Failpoints::default(), &["--nats", &self.nats.url()])
    }

    fn start(&self, name: &str, failpoints: Failpoints, more: &[&str]) -> Running {
        let mut arguments = vec!["wallaby-worker", "--lease-ttl", "2s", "--pool", self.pool.as_str()];
        arguments.extend(more);
        let start = Start {
            options: Options::try_parse_from(arguments).unwrap(),
            name: WorkerId::new(name).unwrap(),
            coordination: self.coordination.clone(),
            failpoints,
            address: String::new(),
        };
        let shutdown = CancellationToken::new();
        let asked = shutdown.clone();
        let task = tokio::spawn(async move { worker::run(start, asked).await.unwrap() });
        Running { shutdown, task: AbortOnDropHandle::new(task) }
    }

    /// The log's and the side store's servers.
    pub async fn connections(&self) -> Result<Connections, String> {
        let target = NatsTarget { servers: vec![self.nats.url()], name: "test".to_owned(), ..NatsTarget::default() };
        Connections::open(&target).await.map_err(|error| error.to_string())
    }

    /// Where the log ends.
    pub async fn log_end(&self) -> Result<Position, String> {
        let log = Log::new(self.flow.clone(), self.connections().await?);
        let tail = log.tail().await.map_err(|error| error.to_string())?;
        tail.end.ok_or_else(|| "the log carries no position".to_owned())
    }

    /// What stands on a shelf of the side store.
    pub async fn on_shelf(&self, shelf: Shelf) -> Result<Vec<SideGroup>, String> {
        let flow = self.coordination.flow(&self.flow).await.map_err(|error| error.to_string())?;
        let side = open_side(&self.flow, &flow.record.document.spec.log, &self.connections().await?);
        side.map_err(|error| error.to_string())?.list(shelf).await.map_err(|error| error.to_string())
    }

    /// The attempts at large transactions that have parts in the side store.
    pub async fn attempts(&self) -> Result<BTreeSet<Attempt>, String> {
        let attempt = |group| if let SideGroup::Attempt(attempt) = group { Some(attempt) } else { None };
        Ok(self.on_shelf(Shelf::Transactions).await?.into_iter().filter_map(attempt).collect())
    }

    /// The manifests of the large transactions that are kept, in the order of their commits.
    pub async fn manifests(&self) -> Vec<Manifest> {
        let flow = self.coordination.flow(&self.flow).await.unwrap();
        let connections = self.connections().await.unwrap();
        let side = open_side(&self.flow, &flow.record.document.spec.log, &connections).unwrap();
        let mut manifests = Vec::new();
        for group in side.list(Shelf::Transactions).await.unwrap() {
            let SideGroup::Manifest(commit) = group else { continue };
            let body = side.get(SideKey::Manifest { commit }).await.unwrap().expect("it is listed");
            manifests.push(decode_manifest(commit, &body).unwrap());
        }
        manifests.sort_by_key(|manifest| manifest.transaction.commit);
        manifests
    }

    /// Takes away a part of a large transaction, as a power cut does: the last one, or the first one.
    pub async fn lose_part(&self, attempt: Attempt, is_last: bool) {
        let stream = self.stream_of(Shelf::Transactions).await;
        let state = self.shelf(Shelf::Transactions).await;
        let mut sequences: Vec<u64> = (state.first_sequence..=state.last_sequence).collect();
        if is_last {
            sequences.reverse();
        }
        let of_attempt = format!(".part.{attempt}.");
        for sequence in sequences {
            let Ok(message) = stream.get_raw_message(sequence).await else { continue };
            if message.subject.contains(&of_attempt) {
                stream.delete_message(sequence).await.unwrap();
                return;
            }
        }
        panic!("{attempt} has no part");
    }

    /// How often the log was taken over, as far as it was not purged.
    pub async fn fences(&self) -> usize {
        let stream = self.nats.jetstream().get_stream(self.flow.log_stream()).await.unwrap();
        let state = stream.get_info().await.unwrap().state;
        let mut fences = 0;
        for sequence in state.first_sequence..=state.last_sequence {
            let message = stream.get_raw_message(sequence).await;
            fences += usize::from(message.is_ok_and(|message| message.subject.ends_with(".fence")));
        }
        fences
    }

    /// Waits until everything up to here is acknowledged by the log.
    pub async fn staged(&self, end: Lsn) {
        self.until("it is staged", async || {
            match self.status_of(&TaskId::capture(&self.flow)).await?.progress.staged {
                Some(staged) if staged.commit >= end => Ok(()),
                staged => Err(format!("{staged:?} of {end}")),
            }
        })
        .await;
    }

    /// Waits until everything up to here is acknowledged by the log, or that is full (`true`).
    pub async fn staged_or_full(&self, end: Lsn) -> bool {
        self.until("it is staged, or the log is full", async || {
            let status = self.status_of(&TaskId::capture(&self.flow)).await?;
            match status.phase {
                TaskPhase::Backpressured => Ok(true),
                _ if status.progress.staged.is_some_and(|staged| staged.commit >= end) => Ok(false),
                phase => Err(format!("{phase:?}, {:?} of {end}", status.progress.staged)),
            }
        })
        .await
    }

    /// Waits until Postgres is told of everything up to here.
    pub async fn told(&self, end: Lsn) {
        self.until("Postgres is told", async || {
            let confirmed = self.confirmed().await;
            if confirmed >= end { Ok(()) } else { Err(format!("{confirmed} of {end}")) }
        })
        .await;
    }

    /// The stream that a shelf stands in.
    pub async fn stream_of(&self, shelf: Shelf) -> jetstream::stream::Stream {
        let prefix = if shelf == Shelf::Transactions { "SIDE" } else { "CHUNKS" };
        self.nats.jetstream().get_stream(format!("{prefix}_{}", self.flow)).await.unwrap()
    }

    /// The state of the stream that a shelf stands in.
    pub async fn shelf(&self, shelf: Shelf) -> jetstream::stream::State {
        self.stream_of(shelf).await.get_info().await.unwrap().state
    }

    /// What a task says of itself.
    pub async fn status_of(&self, task: &TaskId) -> Result<TaskStatus, String> {
        let entry = self.coordination.get(&Key::TaskStatus(task.clone())).await.map_err(|error| error.to_string())?;
        entry.ok_or("it says nothing")?.decode().map_err(|error| error.to_string())
    }

    /// Waits until the capture gives this reason for the slot's health.
    pub async fn slot_is(&self, reason: &str) {
        let capture = TaskId::capture(&self.flow);
        self.until(&format!("the slot's health is {reason}"), async || {
            let status = self.status_of(&capture).await?;
            let said = status.conditions.iter().find(|said| said.kind == ConditionType::SlotHealthy);
            match said.map(|said| said.reason.as_str()) {
                Some(said) if said == reason => Ok(()),
                said => Err(format!("{said:?}")),
            }
        })
        .await;
    }

    /// The end of the source's WAL.
    pub async fn wal_end(&self) -> Lsn {
        wal_end(&self.source).await
    }

    /// What Postgres was told.
    pub async fn confirmed(&self) -> Lsn {
        confirmed(&self.source).await
    }

    /// Waits until a query gives the same on both sides.
    pub async fn equal(&self, sql: &str) {
        self.equal_to(&self.source, sql).await;
    }

    /// The same, with the source asked over another connection.
    pub async fn equal_to(&self, source: &tokio_postgres::Client, sql: &str) {
        self.until(&format!("source and target are equal: {sql}"), async || {
            let source = rows(source, sql).await?;
            let target = rows(&self.target, sql).await?;
            if source == target {
                return Ok(());
            }
            let differ = source.iter().zip(&target).find(|(a, b)| a != b);
            Err(format!(
                "{} rows at the source, {} at the target, first difference {differ:?}",
                source.len(),
                target.len()
            ))
        })
        .await;
    }

    /// Waits until a run is in a state.
    pub async fn run_is(&self, run: u32, wanted: RunState) {
        self.until(&format!("run {run} is {wanted:?}"), async || {
            let entry = self.coordination.run(&self.flow, RunId(run)).await.map_err(|error| error.to_string())?;
            match entry.plan {
                Some(plan) if plan.state == wanted => Ok(()),
                plan => Err(format!("{:?}", plan.map(|plan| (plan.state, plan.message)))),
            }
        })
        .await;
    }

    /// The plan of a run.
    pub async fn plan(&self, run: u32) -> Result<RunPlan, String> {
        let entry = self.coordination.run(&self.flow, RunId(run)).await.map_err(|error| error.to_string())?;
        entry.plan.ok_or_else(|| "there is no plan".to_owned())
    }

    /// Waits until so many chunks of a run are read.
    pub async fn chunks_read(&self, run: u32, wanted: usize) {
        self.until(&format!("{wanted} chunks are read"), async || {
            let read = self.coordination.run_chunks(&self.flow, RunId(run)).await.map_err(|error| error.to_string())?;
            if read.len() == wanted { Ok(()) } else { Err(format!("{} are", read.len())) }
        })
        .await;
    }

    /// Waits until a worker stands still at a failpoint.
    pub async fn stands_at(&self, failpoints: &Failpoints, failpoint: Failpoint) {
        let reached = tokio::time::timeout(PATIENCE, failpoints.reached(failpoint)).await;
        assert!(reached.is_ok(), "{failpoint:?} was not reached; {}", self.statuses().await);
    }

    /// Waits for an answer; a failure says what the tasks said of themselves.
    pub async fn until<T>(&self, what: &str, mut question: impl AsyncFnMut() -> Result<T, String>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = match tokio::time::timeout(PATIENCE, question()).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(state)) => state,
                Err(_) => "no answer".to_owned(),
            };
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}; {state}; {}", self.statuses().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the tasks say of themselves, for a failure's message.
    pub async fn statuses(&self) -> String {
        let tasks = [
            TaskId::capture(&self.flow),
            TaskId::apply(&self.flow, &self.sink),
            TaskId { flow: self.flow.clone(), kind: TaskKind::Run(RunId(1)) },
            TaskId { flow: self.flow.clone(), kind: TaskKind::Run(RunId(2)) },
            TaskId {
                flow: self.flow.clone(),
                kind: TaskKind::Chunk(RunId(1), ChunkId { table: 0, restart: 0, number: 0 }),
            },
        ];
        let mut said = format!("{:?}", self.coordination.holds(&self.flow).await);
        for task in tasks {
            let Ok(Some(entry)) = self.coordination.get(&Key::TaskStatus(task.clone())).await else { continue };
            said += &format!("\n  {task}: {}", String::from_utf8_lossy(&entry.value));
        }
        for run in self.coordination.runs(&self.flow).await.unwrap_or_default() {
            let chunks = self.coordination.run_chunks(&self.flow, run.run).await.map(|chunks| chunks.len());
            let sinks = self.coordination.sink_runs(&self.flow, run.run).await;
            let plan = run.plan.as_ref().map(|plan| (plan.state, &plan.message, plan.chunks().count()));
            said += &format!("\n  {:?}: {plan:?}, chunks read {chunks:?}, sinks {sinks:?}", run.run);
        }
        said
    }
}

/// The end of a server's WAL.
pub async fn wal_end(client: &tokio_postgres::Client) -> Lsn {
    lsn(client, "SELECT pg_current_wal_lsn()::text").await
}

/// What the slot of a database was told.
pub async fn confirmed(client: &tokio_postgres::Client) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE database = current_database()";
    lsn(client, sql).await
}

/// A cluster of the test's own, for as long as the process lives or until it is stopped.
pub async fn cluster(options: PostgresOptions) -> &'static Postgres {
    Box::leak(Box::new(Postgres::start(options).await.unwrap()))
}

async fn lsn(client: &tokio_postgres::Client, sql: &str) -> Lsn {
    client.query_one(sql, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()
}

pub async fn rows(client: &tokio_postgres::Client, sql: &str) -> Result<Vec<String>, String> {
    let rows = client.query(sql, &[]).await.map_err(|error| error.to_string())?;
    Ok(rows.iter().map(|row| row.get::<_, String>(0)).collect())
}
