//! A capture that waits for its log: for room, for the servers, and for what they say of their disks.

use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::{ConditionStatus, ConditionType, TaskPhase};
use wallaby_model::flow::{ByteSize, OnOverrun};
use wallaby_model::run::RunState;
use wallaby_model::{TaskId, WorkerId};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_testkit::{Held, Wire};

use crate::large::{LEDGER, ledger_in, rows};
use crate::lost::blockable;
use crate::scene::*;
use crate::{ALL, fill};

/// A flow with a log that is soon full, and a sink that is then waited for.
async fn small_ledger(name: &str) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    ledger_in(blockable(name).await, "1GB", |document| {
        document.spec.log.max_bytes = ByteSize(32 << 20);
        document.spec.sinks[0].on_overrun = OnOverrun::Backpressure;
    })
    .await
}

/// Blocks the sink, and stages until the log is full.
async fn fill_log(scene: &Scene, blocked: &tokio_postgres::Client) {
    blocked.batch_execute("BEGIN; LOCK TABLE ledger").await.unwrap();
    for from in (100_000..).step_by(2000) {
        scene.source.batch_execute(&rows(from, from + 1999)).await.unwrap();
        let end = scene.wal_end().await;
        if scene.staged_or_full(end).await {
            break;
        }
    }
}

/// The capture is asked to end, because its flow changed, while the log takes nothing: only its successor makes the room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_that_is_enlarged_goes_on_although_its_sink_is_blocked() {
    let (scene, _offers) = small_ledger("enlarged").await;
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let blocked = scene.target.connect().await;
    fill_log(&scene, &blocked).await;
    scene.source.batch_execute(&rows(1, 2000)).await.unwrap();
    let end = scene.wal_end().await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut document = seen.record.document.clone();
    document.spec.log.max_bytes = ByteSize(64 << 20);
    scene.coordination.update_flow(&seen, document, &Default::default()).await.unwrap();
    scene.staged(end).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(LEDGER).await;
}

/// A server that said nothing of its disks at the takeover says it later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_told_by_what_the_servers_say_of_their_syncs_now() {
    let scene = Arc::new(Scene::new("syncs").await);
    fill(&scene, 10).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let wire = Wire::to(&scene.nats.cluster().monitoring_urls()[0]).await;
    wire.hold(Held::Answers);
    let _offers = scene.offering();
    let _worker = scene.worker_asking("w1", &wire.url().replace("nats://", "http://"));
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("UPDATE t SET n = 1").await.unwrap();
    let end = scene.wal_end().await;
    scene.staged(end).await;
    let confirmed = scene.confirmed().await;
    assert!(confirmed < end, "{confirmed}: Postgres was told before anything was known of the server's disk");
    scene.slot_is("SyncUnknown").await;
    wire.hold(Held::Nothing);
    scene.told(end).await;
    scene.slot_is("WithinBound").await;
}

/// Waits until a worker has the capture.
async fn captured_by(scene: &Scene, worker: &str) {
    let (capture, worker) = (TaskId::capture(&scene.flow), WorkerId::new(worker).unwrap());
    scene
        .until(&format!("{worker} has the capture"), async || {
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            match locks.into_iter().find(|lock| lock.task == capture) {
                Some(lock) if lock.holder.worker == worker => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
}

/// Before there is a stream a capture looks through its log, and appends where it begins: both are tried without end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_is_cut_off_while_it_takes_its_log_over_is_given_up() {
    for is_new in [true, false] {
        let scene = Arc::new(Scene::new("takes").await);
        fill(&scene, 10).await;
        scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
        let _offers = scene.offering();
        if !is_new {
            let before = scene.worker("w0");
            scene.run_is(1, RunState::Done).await;
            before.end().await;
        }
        let (wire, failpoints) =
            (Wire::to(&scene.nats.url()).await, Failpoints::parse("stop-after-slot-made").unwrap());
        let first = scene.impatient_worker_at("w1", failpoints.clone(), &wire.url());
        scene.stands_at(&failpoints, Failpoint::StopAfterSlotMade).await;
        captured_by(&scene, "w1").await;
        wire.hold(Held::Requests);
        failpoints.let_go(Failpoint::StopAfterSlotMade);
        let _second = scene.worker("w2");
        captured_by(&scene, "w2").await;
        drop(first);
        scene.source.batch_execute("UPDATE t SET n = 1").await.unwrap();
        scene.equal(ALL).await;
    }
}

/// Its stream ended, and it cannot begin another one: each try fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_is_cut_off_between_two_streams_is_given_up() {
    let scene = Arc::new(Scene::new("between").await);
    fill(&scene, 10).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let wire = Wire::to(&scene.nats.url()).await;
    let first = scene.impatient_worker_at("w1", Failpoints::default(), &wire.url());
    scene.run_is(1, RunState::Done).await;
    wire.hold(Held::Requests);
    let killed =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database()";
    scene.source.batch_execute(killed).await.unwrap();
    let _second = scene.worker("w2");
    captured_by(&scene, "w2").await;
    drop(first);
    scene.source.batch_execute("UPDATE t SET n = 1").await.unwrap();
    scene.equal(ALL).await;
}

/// The log is full and all that was sent is acknowledged: no answer is overdue, and nobody else makes room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_is_cut_off_from_a_full_log_is_given_up() {
    let (scene, _offers) = small_ledger("full").await;
    let wire = Wire::to(&scene.nats.url()).await;
    let first = scene.impatient_worker_at("w1", Failpoints::default(), &wire.url());
    scene.run_is(1, RunState::Done).await;
    let blocked = scene.target.connect().await;
    fill_log(&scene, &blocked).await;
    let capture = TaskId::capture(&scene.flow);
    scene
        .until("it waits for room, with nothing on its way", async || {
            let (end, status) = (scene.log_end().await?, scene.status_of(&capture).await?);
            let is_full = status.conditions.iter().any(|said| said.message.contains("room in the log"));
            let staged = status.progress.staged;
            if is_full && staged == Some(end) { Ok(()) } else { Err(format!("{is_full}, {staged:?} of {end}")) }
        })
        .await;
    wire.hold(Held::Requests);
    let _second = scene.worker("w2");
    captured_by(&scene, "w2").await;
    drop(first);
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(LEDGER).await;
}

/// A person reads it, and may be able to do something about it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_waits_for_its_log_says_what_to_do() {
    let (scene, _offers) = small_ledger("remedy").await;
    let wire = Wire::to(&scene.nats.url()).await;
    let _worker = scene.worker_at("w1", Failpoints::default(), &wire.url());
    scene.run_is(1, RunState::Done).await;
    let says = async |remedy: &[&str]| {
        scene
            .until(&format!("the capture says {remedy:?}"), async || {
                let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
                let said = status.conditions.into_iter().find(|said| said.kind == ConditionType::Capturing);
                match said {
                    Some(said)
                        if said.reason == "LogWaits" && remedy.iter().all(|word| said.message.contains(word)) =>
                    {
                        Ok(said.status)
                    }
                    said => Err(format!("{said:?}")),
                }
            })
            .await
    };
    let blocked = scene.target.connect().await;
    fill_log(&scene, &blocked).await;
    let full = says(&["waits for room in the log", "see which sink is behind (wallaby status)", "raise log.maxBytes"]);
    assert_eq!(full.await, ConditionStatus::False);
    wire.hold(Held::Requests);
    let away = says(&["waits for the NATS servers", "check the NATS servers, --nats and the network"]);
    assert_eq!(away.await, ConditionStatus::False);
    wire.hold(Held::Nothing);
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(LEDGER).await;
}

/// The same wait ends at once when the capture is not wanted any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_is_cut_off_while_it_takes_its_log_over_ends_when_its_flow_is_paused() {
    let scene = Arc::new(Scene::new("paused").await);
    fill(&scene, 10).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let (wire, failpoints) = (Wire::to(&scene.nats.url()).await, Failpoints::parse("stop-after-slot-made").unwrap());
    let _worker = scene.worker_at("w1", failpoints.clone(), &wire.url());
    scene.stands_at(&failpoints, Failpoint::StopAfterSlotMade).await;
    wire.hold(Held::Requests);
    failpoints.let_go(Failpoint::StopAfterSlotMade);
    let capture = TaskId::capture(&scene.flow);
    scene
        .until("it takes its log over", async || match scene.status_of(&capture).await?.phase {
            TaskPhase::Resuming => Ok(()),
            phase => Err(format!("{phase:?}")),
        })
        .await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut document = seen.record.document.clone();
    document.spec.paused = true;
    scene.coordination.update_flow(&seen, document, &Default::default()).await.unwrap();
    scene
        .until("nobody has the capture", async || {
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            let lock = locks.into_iter().find(|lock| lock.task == capture);
            lock.map_or(Ok(()), |lock| Err(format!("{lock:?}")))
        })
        .await;
}
