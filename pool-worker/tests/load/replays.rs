//! A sink's catching-up part of a run, and the end of the run, or of its worker, in the middle of it.

use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::{TaskPhase, TaskStatus};
use wallaby_model::run::{RunState, RunWish, TableStage};
use wallaby_model::{Reader, RunId, TaskId};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};

use crate::runs::ask;
use crate::scene::*;
use crate::{ALL, fill, write_on};

/// The stage of `public.t` in the second run.
async fn stage(scene: &Scene) -> Result<Option<TableStage>, String> {
    let sinks = scene.coordination.sink_runs(&scene.flow, RunId(2)).await.map_err(|error| error.to_string())?;
    Ok(sinks.get(&scene.sink).and_then(|state| state.tables.get("public.t").copied()))
}

/// Sessions of the sink that stand in the trigger.
async fn sleeping(scene: &Scene) -> Result<Vec<String>, String> {
    let sql = "SELECT pid::text FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
    rows(&scene.target, sql).await
}

/// The lock of the sink's task: it has another one with each owner, and with each time that it was given up.
async fn lock(scene: &Scene) -> Option<i64> {
    let apply = TaskId::apply(&scene.flow, &scene.sink);
    let locks = scene.coordination.locks(&scene.flow).await.unwrap();
    locks.into_iter().find(|lock| lock.task == apply).map(|lock| lock.create_revision.0)
}

/// A second run over a table of a live sink, in the middle of its replay, which has many batches before it of which each takes seconds; and
/// the session that replays.
async fn slow_replay(name: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running, String) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 2000).await;
    scene.source.batch_execute("CREATE TABLE u (id int PRIMARY KEY)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t, public.u", "initial", "")).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker_narrow("w1");
    scene.run_is(1, RunState::Done).await;
    let owned = lock(&scene).await;
    scene.offer_loads(false);
    ask(&scene, &["public.t"]).await;
    scene.run_is(2, RunState::Loading).await;
    scene
        .until("the table is begun at the sink", async || match stage(&scene).await? {
            Some(TableStage::Copying) => Ok(()),
            stage => Err(format!("{stage:?}")),
        })
        .await;
    // The replay has them all before it, in batches of which each takes seconds.
    for from in (100_000..180_000).step_by(2000) {
        let sql = format!(
            "INSERT INTO t SELECT i, 0, md5(i::text) || md5((-i)::text) FROM generate_series({from}, {from} + 1999) i"
        );
        scene.source.batch_execute(&sql).await.unwrap();
    }
    let slow =
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); RETURN NULL; END';
        CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION slow()";
    scene.target.batch_execute(slow).await.unwrap();
    scene.offer_loads(true);
    let replaying = scene
        .until("the table catches up", async || match (stage(&scene).await?, sleeping(&scene).await?) {
            (Some(TableStage::CatchingUp), sleeping) if !sleeping.is_empty() => Ok(sleeping.join(", ")),
            other => Err(format!("{other:?}")),
        })
        .await;
    assert_eq!(lock(&scene).await, owned, "the sink's task was begun again");
    (scene, offers, worker, replaying)
}

/// It would go on for minutes. The main stream of the sink does not stop for it, the other tables arrive, and another run loads the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_cancelled_in_the_middle_of_its_replay_stops_no_sink() {
    let (scene, _offers, _worker, replaying) = slow_replay("replay").await;
    let owned = lock(&scene).await;
    let apply = TaskId::apply(&scene.flow, &scene.sink);
    let before = scene.status_of(&apply).await.unwrap();
    assert_eq!(before.phase, TaskPhase::Streaming, "{before:?}");
    // The sink is opened again without its replay, by the same owner.
    scene.coordination.set_run_wish(&scene.flow, RunId(2), RunWish::Cancel).await.unwrap();
    scene.run_is(2, RunState::Cancelled).await;
    scene
        .until("the session that replays is gone", async || {
            let sql = format!("SELECT pid::text FROM pg_stat_activity WHERE pid IN ({replaying})");
            let left = rows(&scene.target, &sql).await?;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    scene.source.batch_execute("INSERT INTO u SELECT generate_series(1, 100)").await.unwrap();
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
    scene
        .until("the sink streams on", async || match scene.status_of(&apply).await? {
            TaskStatus { phase: TaskPhase::Streaming, .. } => Ok(()),
            status => Err(format!("{status:?}")),
        })
        .await;
    assert_eq!(lock(&scene).await, owned, "the sink's task was begun again");
    let holds = scene.coordination.holds(&scene.flow).await.unwrap();
    assert!(!holds.contains_key(&Reader::Run(RunId(2))), "the run still holds the log: {holds:?}");
    let (source, there) = (rows(&scene.source, ALL).await.unwrap(), rows(&scene.target, ALL).await.unwrap());
    assert!(there.len() < source.len(), "it had caught up: nothing was shown");

    scene.target.batch_execute("DROP TRIGGER slow ON t").await.unwrap();
    ask(&scene, &["public.t"]).await;
    scene.run_is(3, RunState::Done).await;
    scene.source.batch_execute("DELETE FROM t WHERE id % 5 = 0").await.unwrap();
    scene.equal(ALL).await;
}

/// What the sink has of the table's mark.
async fn marked(scene: &Scene) -> String {
    let sql = "SELECT stage FROM wallaby.tables WHERE source_schema = 'public' AND source_table = 't'";
    rows(&scene.target, sql).await.unwrap().join(", ")
}

/// Rows go that the replay has brought, that it is about to bring, and that the main stream brings once the table is its own.
async fn goes_on(scene: &Scene) {
    scene
        .source
        .batch_execute("DELETE FROM t WHERE id % 5 = 0; UPDATE t SET n = n + 1 WHERE id % 7 = 0")
        .await
        .unwrap();
    scene.run_is(2, RunState::Done).await;
    scene.source.batch_execute("DELETE FROM t WHERE id % 3 = 0; INSERT INTO u VALUES (5000)").await.unwrap();
    scene.equal(ALL).await;
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_killed_in_the_middle_of_a_replay_the_next_owner_replays_the_rest() {
    let (scene, _offers, worker, replaying) = slow_replay("killed").await;
    drop(worker);
    assert_eq!(marked(&scene).await, "catching up");
    scene.source.batch_execute("DELETE FROM t WHERE id % 11 = 0").await.unwrap();
    let _next = scene.worker("w2");
    scene
        .until("the dead owner's session is ended", async || {
            let sql = format!("SELECT pid::text FROM pg_stat_activity WHERE pid IN ({replaying})");
            let left = rows(&scene.target, &sql).await?;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    scene.target.batch_execute("DROP TRIGGER slow ON t").await.unwrap();
    goes_on(&scene).await;
}

/// Up to where the tables are handed over their rows are the replay's, behind it the main stream's, whoever does either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_killed_around_the_hand_over_no_row_is_missed_and_none_comes_back() {
    for (point, mark) in [(Failpoint::StopBeforeHandOver, "catching up"), (Failpoint::StopAfterHandOver, "ready")] {
        println!("killed at {point:?}");
        let scene = Arc::new(Scene::new("over").await);
        fill(&scene, 2000).await;
        scene.source.batch_execute("CREATE TABLE u (id int PRIMARY KEY)").await.unwrap();
        scene.coordination.create_flow(scene.document("public.t, public.u", "initial", "")).await.unwrap();
        let _offers = scene.offering();
        let failpoints = Failpoints::parse(point.name()).unwrap();
        let worker = scene.worker_with("w1", failpoints.clone());
        scene.run_is(1, RunState::Done).await;
        let writing = write_on(&scene);
        ask(&scene, &["public.t"]).await;
        scene.stands_at(&failpoints, point).await;
        assert_eq!(marked(&scene).await, mark);
        assert_ne!(stage(&scene).await.unwrap(), Some(TableStage::Ready), "etcd knows of it");
        drop(worker);
        let _next = scene.worker("w2");
        scene.run_is(2, RunState::Done).await;
        drop(writing);
        goes_on(&scene).await;
    }
}
