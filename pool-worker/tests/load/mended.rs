//! What a person mends: at the source nobody has to tell the flow, elsewhere `wallaby resume` does.

use std::sync::Arc;

use async_nats::jetstream;
use wallaby_model::TaskId;
use wallaby_model::condition::{ConditionStatus, ConditionType, TaskPhase};
use wallaby_model::run::RunState;

use crate::scene::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_a_key_is_named_and_captured_once_it_has_one() {
    let scene = Arc::new(Scene::new("keyless").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int NOT NULL, pad text)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let first = scene.worker("w1");
    is_refused(&scene, "TableWithoutKey", "public.t").await;
    // A new flow, that has nothing yet.
    scene.source.batch_execute("ALTER TABLE t ADD PRIMARY KEY (id); INSERT INTO t VALUES (1, 'loaded')").await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("UPDATE t SET pad = 'changed'; INSERT INTO t VALUES (2, 'streamed')").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;

    // One that runs, and whose table loses its key.
    first.end().await;
    scene.source.batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey").await.unwrap();
    let _second = scene.worker("w2");
    is_refused(&scene, "TableWithoutKey", "public.t").await;
    scene.source.batch_execute("ALTER TABLE t ADD PRIMARY KEY (id)").await.unwrap();
    scene.source.batch_execute("UPDATE t SET pad = 'changed again'; INSERT INTO t VALUES (3, 'new')").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
}

/// A sink would not find the rows that its updates and deletes mean.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_with_less_than_its_root_is_named_and_captured_once_it_has_enough() {
    let scene = Arc::new(Scene::new("narrow").await);
    let _offers = scene.offering();
    let root =
        "CREATE TABLE t (id int NOT NULL, pad text) PARTITION BY RANGE (id); ALTER TABLE t REPLICA IDENTITY FULL;
        CREATE TABLE low PARTITION OF t (PRIMARY KEY (id)) FOR VALUES FROM (0) TO (10)";
    scene.source.batch_execute(root).await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let first = scene.worker("w1");
    is_refused(&scene, "PartitionIdentity", "public.low").await;
    // A new flow: its capture waits, and the owner of its first load.
    let mend = "ALTER TABLE low REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'loaded')";
    scene.source.batch_execute(mend).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    // Without the column that the sink adds to a table without a key.
    let all = "SELECT id || ' ' || pad FROM t ORDER BY id";
    scene.source.batch_execute("UPDATE t SET pad = 'changed'; INSERT INTO t VALUES (2, 'streamed')").await.unwrap();
    scene.equal(all).await;

    // One that runs, and to whose table a partition is attached.
    first.end().await;
    let attach = "CREATE TABLE high (id int PRIMARY KEY, pad text);
        ALTER TABLE t ATTACH PARTITION high FOR VALUES FROM (10) TO (20)";
    scene.source.batch_execute(attach).await.unwrap();
    let _second = scene.worker("w2");
    is_refused(&scene, "PartitionIdentity", "public.high").await;
    let mend = "ALTER TABLE high REPLICA IDENTITY FULL; INSERT INTO t VALUES (11, 'new')";
    scene.source.batch_execute(mend).await.unwrap();
    scene.source.batch_execute("UPDATE t SET pad = 'changed again'; DELETE FROM t WHERE id = 2").await.unwrap();
    scene.equal(all).await;
}

async fn is_refused(scene: &Scene, reason: &str, table: &str) {
    scene
        .until("the capture names the table", async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.iter().find(|said| said.reason == reason);
            match said {
                Some(said) if said.message.contains(table) && said.message.contains("REPLICA IDENTITY") => Ok(()),
                _ => Err(format!("{:?}", status.conditions)),
            }
        })
        .await;
}

/// The writer ended over it; a later try is not told so by the one that ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_goes_on_once_its_log_is_put_back() {
    let scene = Arc::new(Scene::new("put-back").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
    let jetstream = scene.nats.jetstream();
    let log = jetstream.get_stream(scene.flow.log_stream()).await.unwrap();
    let (config, state) = (log.cached_info().config.clone(), log.get_info().await.unwrap().state);
    let mut copy = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        copy.push(log.get_raw_message(sequence).await.unwrap());
    }
    jetstream.delete_stream(scene.flow.log_stream()).await.unwrap();
    let capture = TaskId::capture(&scene.flow);
    scene
        .until("the capture waits for a person", async || match scene.status_of(&capture).await?.phase {
            TaskPhase::Stopped => Ok(()),
            phase => Err(format!("{phase:?}")),
        })
        .await;
    let first_sequence = Some(state.first_sequence);
    jetstream.create_stream(jetstream::stream::Config { first_sequence, ..config }).await.unwrap();
    for message in copy {
        let mut headers = async_nats::HeaderMap::new();
        for (name, values) in message.headers.iter().filter(|(name, _)| !name.to_string().starts_with("Nats-")) {
            values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
        }
        let landed = jetstream.publish_with_headers(message.subject, headers, message.payload).await.unwrap();
        assert_eq!(landed.await.unwrap().sequence, message.sequence);
    }
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.resume_flow(&seen).await.unwrap();
    scene.source.batch_execute("INSERT INTO t VALUES (3)").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
}

/// Nobody puts it back, and Postgres was told of what stood in it: what is gone is not passed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_log_that_is_gone_stops_the_capture_and_nothing_is_staged_in_its_place() {
    let scene = Arc::new(Scene::new("gone").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let first = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
    first.end().await;
    let confirmed = scene.confirmed().await;
    scene.nats.jetstream().delete_stream(scene.flow.log_stream()).await.unwrap();
    scene.source.batch_execute("INSERT INTO t VALUES (3)").await.unwrap();
    let _second = scene.worker("w2");
    let capture = TaskId::capture(&scene.flow);
    let said = scene
        .until("the capture waits for a person", async || {
            let status = scene.status_of(&capture).await?;
            let said = status.conditions.iter().find(|said| said.reason == "LogLost").cloned();
            match said {
                Some(said) if status.phase == TaskPhase::Stopped => Ok(said),
                said => Err(format!("{:?}, {said:?}", status.phase)),
            }
        })
        .await;
    assert_eq!((said.kind, said.status), (ConditionType::Capturing, ConditionStatus::False));
    assert!(said.message.contains("Delete the flow and create it again"), "{said:?}");
    assert_eq!(scene.confirmed().await, confirmed, "Postgres was told of something");
    let log = scene.nats.jetstream().get_stream(scene.flow.log_stream()).await.unwrap();
    let messages = log.get_info().await.unwrap().state.messages;
    assert_eq!(messages, scene.fences().await as u64, "something was staged");
    assert_eq!(rows(&scene.target, "SELECT t::text FROM t ORDER BY id").await.unwrap(), ["(1)", "(2)"]);
}

/// The lag is what people look at then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_does_not_answer_falls_behind_for_all_to_see() {
    let scene = Arc::new(Scene::new("behind").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let apply = TaskId::apply(&scene.flow, &scene.sink);
    let caught_up = async |wanted: ConditionStatus| {
        scene
            .until("the sink says how far it is", async || {
                let status = scene.status_of(&apply).await?;
                let said = status.conditions.iter().find(|said| said.kind == ConditionType::CaughtUp);
                match said {
                    Some(said) if said.status == wanted => Ok(status.progress.lag_ms.unwrap_or_default()),
                    _ => Err(format!("{said:?}, {:?}", status.progress)),
                }
            })
            .await
    };
    caught_up(ConditionStatus::True).await;
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    scene.source.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    assert!(caught_up(ConditionStatus::False).await > 3000);
    blocked.batch_execute("ROLLBACK").await.unwrap();
    caught_up(ConditionStatus::True).await;
    scene.equal("SELECT t::text FROM t").await;
}

/// Nor does a restart of the workers hide it: nobody of the new ones ever reached the sink.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_cannot_be_opened_is_behind_also_for_the_next_worker() {
    let scene = Arc::new(Scene::new("shut").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let first = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    scene.equal("SELECT t::text FROM t").await;
    let apply = TaskId::apply(&scene.flow, &scene.sink);
    // Who is connected stays: the sink's own sessions are ended.
    let open = async |is_open: bool| {
        let sql = format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {is_open}", scene.target.name());
        scene.source.batch_execute(&sql).await.unwrap();
    };
    open(false).await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND starts_with(application_name, $1)";
    scene.target.query_one(end, &[&apply.session_prefix()]).await.unwrap();
    scene.source.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    scene.staged(scene.wal_end().await).await;
    // What the next one says first: an alert must not clear itself meanwhile.
    let says = async |worker: &str, wanted: Option<ConditionStatus>| {
        scene
            .until(&format!("{worker} says how far the sink is"), async || {
                let status = scene.status_of(&apply).await?;
                let said = status.conditions.iter().find(|said| said.kind == ConditionType::CaughtUp);
                let is_wanted = status.progress.lag_ms.is_some()
                    && said.is_some_and(|said| wanted.is_none_or(|wanted| said.status == wanted));
                match said {
                    Some(said) if is_wanted && status.worker.as_ref().is_some_and(|by| by.as_str() == worker) => {
                        Ok((said.status, status.progress))
                    }
                    _ => Err(format!("{status:?}")),
                }
            })
            .await
    };
    says("w1", Some(ConditionStatus::False)).await;
    first.end().await;
    let _second = scene.worker("w2");
    let (caught_up, progress) = says("w2", None).await;
    assert_eq!(caught_up, ConditionStatus::False, "{progress:?}");
    assert!(progress.lag_ms > Some(10_000) && progress.lag_bytes > Some(0), "{progress:?}");
    open(true).await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.resume_flow(&seen).await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
}
