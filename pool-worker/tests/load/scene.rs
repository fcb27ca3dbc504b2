//! What the tests of the first load work with: real servers, workers in this process, and offers made by a loop in the place of the
//! controller.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use clap::Parser;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::offer::{OFFER_CONSUMER, Offer, offer_stream, offer_subject, offer_subjects};
use wallaby_model::run::{RunState, RunWish, TableStage};
use wallaby_model::{ChunkId, FlowId, PoolId, RunId, SinkId, TaskId, TaskKind, WorkerId};
use wallaby_pool_worker::failpoint::Failpoints;
use wallaby_pool_worker::options::Options;
use wallaby_pool_worker::worker::{self, Start};
use wallaby_testkit::*;

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
    _etcd: EtcdScope<'static>,
}

/// A worker of this process; it ends when dropped.
pub struct Running {
    _shutdown: CancellationToken,
    _task: AbortOnDropHandle<worker::Outcome>,
}

impl Scene {
    pub async fn new(name: &str) -> Scene {
        log_to_test_output();
        let (source, target) = tokio::join!(Database::create("source"), Database::create("target"));
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
            _etcd: etcd,
        };
        scene.make_queue().await;
        scene
    }

    /// The flow's file.
    pub fn document(&self, tables: &str, snapshot: &str, more: &str) -> wallaby_model::flow::FlowDocument {
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
        let mut wanted = vec![TaskId::capture(&self.flow)];
        for sink in &flow.record.document.spec.sinks {
            wanted.push(TaskId::apply(&self.flow, &sink.name));
        }
        wanted.extend(self.run_tasks().await.map_err(|error| error.to_string())?);
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

    async fn run_tasks(&self) -> wallaby_coordination::Result<Vec<TaskId>> {
        let mut wanted = Vec::new();
        let task = |kind| TaskId { flow: self.flow.clone(), kind };
        for run in self.coordination.runs(&self.flow).await?.into_iter().filter(|run| !run.is_over()) {
            wanted.push(task(TaskKind::Run(run.run)));
            let Some(plan) = run.plan else { continue };
            let chunks = self.coordination.run_chunks(&self.flow, run.run).await?;
            let may_read = plan.snapshot().is_some() && run.spec.wish == RunWish::Go;
            let open = plan.chunks().filter(|chunk| !chunks.contains_key(chunk));
            wanted.extend(open.filter(|_| may_read).take(4).map(|chunk| task(TaskKind::Chunk(run.run, chunk))));
            for (sink, state) in self.coordination.sink_runs(&self.flow, run.run).await? {
                let loaded = self.coordination.run_loaded(&self.flow, run.run, &sink).await?;
                let is_copying = |chunk: &wallaby_model::ChunkId| {
                    let table = plan.relations[chunk.table as usize].table.to_string();
                    state.tables.get(&table) == Some(&TableStage::Copying)
                };
                let loads = plan.chunks().filter(|chunk| chunks.contains_key(chunk) && !loaded.contains_key(chunk));
                let loads = loads.filter(is_copying).take(4);
                wanted.extend(loads.map(|chunk| task(TaskKind::Load(sink.clone(), run.run, chunk))));
            }
        }
        Ok(wanted)
    }

    pub fn worker(&self, name: &str) -> Running {
        let monitoring = self.nats.cluster().monitoring_urls().join(",");
        self.start(name, &["--nats-monitoring", &monitoring])
    }

    /// A worker that does not know when the servers sync: for minutes, Postgres is told of nothing that it stages.
    pub fn wary_worker(&self, name: &str) -> Running {
        self.start(name, &[])
    }

    fn start(&self, name: &str, more: &[&str]) -> Running {
        let nats = self.nats.url();
        let mut arguments = vec!["wallaby-worker", "--nats", &nats];
        arguments.extend(more);
        arguments.extend(["--lease-ttl", "2s", "--pool", self.pool.as_str()]);
        let start = Start {
            options: Options::try_parse_from(arguments).unwrap(),
            name: WorkerId::new(name).unwrap(),
            coordination: self.coordination.clone(),
            failpoints: Failpoints::default(),
            address: String::new(),
        };
        let shutdown = CancellationToken::new();
        let asked = shutdown.clone();
        let task = tokio::spawn(async move { worker::run(start, asked).await.unwrap() });
        Running { _shutdown: shutdown, _task: AbortOnDropHandle::new(task) }
    }

    /// Waits until a query gives the same on both sides.
    pub async fn equal(&self, sql: &str) {
        self.until(&format!("source and target are equal: {sql}"), async || {
            let source = rows(&self.source, sql).await?;
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
        let mut said = String::new();
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

pub async fn rows(client: &tokio_postgres::Client, sql: &str) -> Result<Vec<String>, String> {
    let rows = client.query(sql, &[]).await.map_err(|error| error.to_string())?;
    Ok(rows.iter().map(|row| row.get::<_, String>(0)).collect())
}
