//! The thread from end to end in one process: Postgres → log → Postgres, under locks, with offers made by hand.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::time::Duration;

use async_nats::jetstream;
use clap::Parser;
use tokio_util::sync::CancellationToken;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::offer::{OFFER_CONSUMER, Offer, offer_stream, offer_subject, offer_subjects};
use wallaby_model::{FlowId, PoolId, SinkId, TaskId, WorkerId};
use wallaby_pool_worker::failpoint::Failpoints;
use wallaby_pool_worker::options::Options;
use wallaby_pool_worker::worker::{self, Start};
use wallaby_testkit::*;

/// What one test works with.
struct Thread {
    source: Database<'static>,
    target: Database<'static>,
    nats: NatsScope<'static>,
    coordination: Coordination,
    etcd: EtcdScope<'static>,
    flow: FlowId,
    pool: PoolId,
}

impl Thread {
    async fn new(name: &str) -> Thread {
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
        Thread {
            source,
            target,
            coordination,
            flow: FlowId::new(id.clone()).unwrap(),
            pool: PoolId::new(id).unwrap(),
            nats,
            etcd,
        }
    }

    async fn create_flow(&self) {
        self.create_flow_as(&self.source.dsn(), &self.target.dsn()).await;
    }

    async fn create_flow_as(&self, source: &str, target: &str) {
        let text = format!(
            r#"
apiVersion: wallaby/v1
kind: Flow
metadata: {{ name: {flow} }}
spec:
  source:
    postgres:
      dsn: {{ value: "{source}" }}
      publication: {{ create: true, tables: [public.*] }}
      snapshot: never
  log: {{ replicas: 1, maxBytes: 256Mi }}
  sinks:
    - name: target
      postgres: {{ dsn: {{ value: "{target}" }} }}
      onOverrun: backpressure
"#,
            flow = self.flow,
        );
        let document = wallaby_model::flow::parse(&text, "test").unwrap();
        self.coordination.create_flow(document).await.unwrap();
    }

    async fn offer_all(&self) {
        let context = self.nats.jetstream();
        let stream = context
            .get_or_create_stream(jetstream::stream::Config {
                name: offer_stream(&self.pool),
                subjects: vec![offer_subjects(&self.pool)],
                retention: jetstream::stream::RetentionPolicy::WorkQueue,
                ..Default::default()
            })
            .await
            .unwrap();
        stream
            .get_or_create_consumer(
                OFFER_CONSUMER,
                jetstream::consumer::pull::Config {
                    durable_name: Some(OFFER_CONSUMER.to_owned()),
                    ..Default::default()
                },
            )
            .await
            .unwrap();
        let spec = self.coordination.flow(&self.flow).await.unwrap();
        for task in [TaskId::capture(&self.flow), TaskId::apply(&self.flow, &SinkId::new("target").unwrap())] {
            let subject = offer_subject(&self.pool, &task);
            let offer = Offer { task, spec_revision: spec.revision.0 };
            context.publish(subject, offer.to_bytes().into()).await.unwrap().await.unwrap();
        }
    }

    fn start_worker(&self, name: &str, shutdown: &CancellationToken) -> tokio::task::JoinHandle<worker::Outcome> {
        let nats = self.nats.url();
        let monitoring = self.nats.cluster().monitoring_urls().join(",");
        let arguments = [
            "wallaby-worker",
            "--nats",
            &nats,
            "--nats-monitoring",
            &monitoring,
            "--lease-ttl",
            "2s",
            "--pool",
            self.pool.as_str(),
        ];
        let start = Start {
            options: Options::try_parse_from(arguments).unwrap(),
            name: WorkerId::new(name).unwrap(),
            coordination: self.coordination.clone(),
            failpoints: Failpoints::default(),
            address: String::new(),
        };
        let shutdown = shutdown.clone();
        tokio::spawn(async move { worker::run(start, shutdown).await.unwrap() })
    }
}

async fn rows(client: &tokio_postgres::Client, sql: &str) -> Result<Vec<String>, String> {
    let rows = client.query(sql, &[]).await.map_err(|error| error.to_string())?;
    Ok(rows.iter().map(|row| row.get::<_, String>(0)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_flow_and_a_second_owner_goes_on_where_the_first_ended() {
    let thread = Thread::new("thread").await;
    thread.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY, name text, at timestamptz)").await.unwrap();
    thread.create_flow().await;
    let first = CancellationToken::new();
    let worker = thread.start_worker("w1", &first);
    thread.offer_all().await;
    slot_is_read(&thread).await;
    thread
        .source
        .batch_execute("INSERT INTO t SELECT i, 'row ' || i, '2026-01-01' FROM generate_series(1, 1000) i")
        .await
        .unwrap();
    thread
        .source
        .batch_execute("UPDATE t SET name = 'changed' WHERE id % 10 = 0; DELETE FROM t WHERE id % 7 = 0")
        .await
        .unwrap();
    let all = "SELECT t::text FROM t ORDER BY id";
    equal(&thread, all).await;
    // The drain hands over; another worker goes on.
    first.cancel();
    assert_eq!(worker.await.unwrap(), worker::Outcome::Drained);
    thread
        .source
        .batch_execute("UPDATE t SET id = id + 10000 WHERE id < 100; INSERT INTO t VALUES (5, 'new', NULL)")
        .await
        .unwrap();
    let second = CancellationToken::new();
    let worker = thread.start_worker("w2", &second);
    thread.offer_all().await;
    equal(&thread, all).await;
    second.cancel();
    assert_eq!(worker.await.unwrap(), worker::Outcome::Drained);
    drop(thread.etcd);
}

/// A walsender reads the slot. (A slot is also active while it is being made, and what commits then comes before it.)
async fn slot_is_read(thread: &Thread) {
    let slot = thread.flow.slot_name();
    eventually(Duration::from_secs(30), "the slot is read", async || {
        let found = thread
            .source
            .query(
                "SELECT 1 FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid WHERE slot_name = $1",
                &[&slot],
            )
            .await;
        match found {
            Ok(rows) if !rows.is_empty() => Ok(()),
            other => Err(format!("{:?}", other.map(|rows| rows.len()))),
        }
    })
    .await;
}

/// The SQL block of the operations page that is marked for `place`.
fn documented_sql(place: &str) -> String {
    let page = include_str!("../../docs/operations.md");
    let (_, after) = page.split_once(&format!("<!-- run: {place} -->\n```sql\n")).unwrap();
    after.split_once("```").unwrap().0.to_owned()
}

/// The same server and database for another role.
fn dsn_as(dsn: &str, role: &str, password: &str) -> String {
    let (_, address) = dsn.rsplit_once('@').unwrap();
    format!("postgres://{role}:{password}@{address}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roles_of_the_operations_page_are_enough() {
    let thread = Thread::new("roles").await;
    // Roles belong to the whole server, which other tests share: names of our own.
    let owner = unique("app_owner");
    let (role, sink_role) = (unique("role_r"), unique("role_s"));
    let source_sql = documented_sql("source").replace("app_owner", &owner).replace("wallaby", &role);
    let sink_sql = documented_sql("sink").replace("wallaby_sink", &sink_role);
    let table = "CREATE TABLE t (id int PRIMARY KEY, name text, at timestamptz)";
    let as_owner = format!(
        "CREATE ROLE {owner} NOLOGIN; GRANT CREATE ON SCHEMA public TO {owner}; SET ROLE {owner}; {table}; RESET ROLE"
    );
    thread.source.batch_execute(&as_owner).await.unwrap();
    thread.source.batch_execute(&source_sql).await.unwrap();
    thread.target.batch_execute(&sink_sql).await.unwrap();
    let source = dsn_as(&thread.source.dsn(), &role, "choose-one");
    thread.create_flow_as(&source, &dsn_as(&thread.target.dsn(), &sink_role, "choose-one")).await;
    let shutdown = CancellationToken::new();
    let worker = thread.start_worker("w1", &shutdown);
    thread.offer_all().await;
    slot_is_read(&thread).await;
    let insert = "INSERT INTO t SELECT i, 'row ' || i, '2026-01-01' FROM generate_series(1, 100) i";
    thread.source.batch_execute(insert).await.unwrap();
    equal(&thread, "SELECT t::text FROM t ORDER BY id").await;
    shutdown.cancel();
    assert_eq!(worker.await.unwrap(), worker::Outcome::Drained);
    thread.target.batch_execute(&format!("DROP OWNED BY {sink_role} CASCADE; DROP ROLE {sink_role}")).await.unwrap();
}

/// What the tasks say of themselves, for a failure's message.
async fn statuses(thread: &Thread) -> String {
    let sink = SinkId::new("target").unwrap();
    let mut said = String::new();
    for task in [TaskId::capture(&thread.flow), TaskId::apply(&thread.flow, &sink)] {
        let entry = thread.coordination.get(&Key::TaskStatus(task)).await.unwrap();
        said += &entry.map_or("no status".to_owned(), |entry| String::from_utf8_lossy(&entry.value).into_owned());
        said += "; ";
    }
    said
}

async fn equal(thread: &Thread, sql: &str) {
    eventually(Duration::from_secs(30), "source and target are equal", async || {
        let source = rows(&thread.source, sql).await?;
        let target = rows(&thread.target, sql).await.unwrap_or_default();
        if source == target {
            return Ok(());
        }
        let counts = format!("{} rows at the source, {} at the target", source.len(), target.len());
        Err(format!("{counts}; {}", statuses(thread).await))
    })
    .await;
}
