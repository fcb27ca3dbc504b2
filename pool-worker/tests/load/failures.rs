//! Tasks that fail again and again: they are not taken again at once, for ever. And one that ends when what it did counts already.

use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::wall_clock_now;
use wallaby_model::condition::TaskPhase;
use wallaby_model::run::RunState;
use wallaby_model::{ChunkId, Epoch, RunId, TaskId, TaskKind};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::{Shelf, SideGroup, SideKey, StagingError, open_side};

use crate::scene::*;
use crate::{ALL, fill};

/// A rest that no task announces before its second failure in a row.
const SECOND_MS: u64 = 1000;

/// Waits until a task announces a longer rest than after one failure, and then for its next failure: that must not come before.
async fn rests(scene: &Scene, task: &TaskId, why: &str) {
    let resting = async || {
        let status = scene.status_of(task).await?;
        let said = status.last_error.as_deref().unwrap_or_default();
        match status.retry_at {
            Some(until) if status.phase == TaskPhase::Backoff && said.contains(why) => Ok((status.at, until)),
            _ => Err(format!("{status:?}")),
        }
    };
    let longer = async || match resting().await? {
        (at, until) if until.0.saturating_sub(at.0) >= SECOND_MS => Ok(until),
        (at, until) => Err(format!("a rest of {} ms", until.0.saturating_sub(at.0))),
    };
    let until = scene.until("the task rests longer each time", longer).await;
    let again = async || match resting().await? {
        (at, next) if next > until => Ok(at),
        _ => Err("it still rests".to_owned()),
    };
    let failed_at = scene.until("the task fails again", again).await;
    assert!(failed_at >= until, "it was to rest until {until:?} and failed again at {failed_at:?}");
}

async fn start(name: &str) -> (Arc<Scene>, TaskId) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 10).await;
    scene.coordination.create_flow(scene.document("public.*", "initial", "")).await.unwrap();
    let task = TaskId::apply(&scene.flow, &scene.sink);
    (scene, task)
}

/// Every worker has the same code: the lock stays where it is, and a person reads why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_whose_code_panics_rests_longer_each_time_and_keeps_its_lock() {
    let (scene, task) = start("panics").await;
    let _offers = scene.offering();
    let first = scene.worker_with("w1", Failpoints::parse("panic-apply").unwrap());
    rests(&scene, &task, "panicked").await;
    scene
        .until("the task rests under its lock", async || {
            let status = scene.status_of(&task).await?;
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            let is_held = locks.iter().any(|lock| lock.task == task);
            let rests = status.phase == TaskPhase::Backoff && status.retry_at > Some(wall_clock_now());
            if is_held && rests { Ok(()) } else { Err(format!("{is_held}, {status:?}")) }
        })
        .await;
    let held = scene.coordination.locks(&scene.flow).await.unwrap().into_iter().find(|lock| lock.task == task);
    let _second = scene.worker("w2");
    // A drain ends the rest.
    first.end().await;
    scene.equal(ALL).await;
    let now = scene.coordination.locks(&scene.flow).await.unwrap().into_iter().find(|lock| lock.task == task);
    assert!(now.unwrap().create_revision > held.unwrap().create_revision);
}

/// Another worker may be able to: the lock goes at once, and only who gave it up leaves it alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_was_given_up_is_left_to_other_workers() {
    let (scene, task) = start("given-up").await;
    let _offers = scene.offering();
    let _first = scene.worker_with("w1", Failpoints::parse("give-up-apply").unwrap());
    rests(&scene, &task, "a test wants it").await;
    let _second = scene.worker("w2");
    scene.equal(ALL).await;
    let owner = scene.coordination.locks(&scene.flow).await.unwrap().into_iter().find(|lock| lock.task == task);
    assert_eq!(owner.unwrap().holder.worker.as_str(), "w2");
}

/// A load whose one chunk is read by a worker with a failpoint; nobody loads it yet.
async fn reading(name: &str, failpoint: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running, Failpoints) {
    let (scene, _) = start(name).await;
    scene.offer_loads(false);
    let offers = scene.offering();
    let failpoints = Failpoints::parse(failpoint).unwrap();
    let worker = scene.worker_with("w1", failpoints.clone());
    (scene, offers, worker, failpoints)
}

/// Waits until the chunk is marked and nobody has the tasks of this kind any more.
async fn nobody_has(scene: &Scene, is_meant: impl Fn(&TaskKind) -> bool) {
    scene
        .until("the chunk is marked, and the task has ended", async || {
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.map_err(|error| error.to_string())?;
            let owned = locks.iter().any(|lock| is_meant(&lock.task.kind));
            if !owned && read.len() == 1 { Ok(()) } else { Err(format!("{locks:?}, {read:?}")) }
        })
        .await;
}

/// What the mark names is there, and is loaded.
async fn is_kept_and_loaded(scene: &Scene) {
    let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.unwrap();
    let marked: Vec<_> =
        read.iter().map(|(chunk, done)| SideGroup::ChunkAttempt(RunId(1), *chunk, done.attempt)).collect();
    assert_eq!(scene.on_shelf(Shelf::Chunks).await.unwrap(), marked, "the parts that the mark names");
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    assert_eq!(scene.plan(1).await.unwrap().relations[0].restart, 0, "the table was read again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_chunk_that_is_marked_keeps_its_parts_when_its_reader_is_to_end() {
    let (scene, _offers, worker, failpoints) = reading("marked", "stop-after-chunk-marked").await;
    scene.stands_at(&failpoints, Failpoint::StopAfterChunkMarked).await;
    let ending = AbortOnDropHandle::new(tokio::spawn(worker.end()));
    // Who has others of its tasks was asked to end this one too.
    nobody_has(&scene, |kind| matches!(kind, TaskKind::Capture)).await;
    failpoints.let_go(Failpoint::StopAfterChunkMarked);
    ending.await.unwrap();
    let _next = scene.worker("w2");
    is_kept_and_loaded(&scene).await;
}

/// etcd did what it was asked for, and the answer was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_chunk_that_may_be_marked_keeps_its_parts() {
    let (scene, _offers, _worker, _) = reading("unheard", "lose-chunk-mark").await;
    nobody_has(&scene, |kind| matches!(kind, TaskKind::Chunk(..))).await;
    is_kept_and_loaded(&scene).await;
}

/// Its lock was somebody else's meanwhile, and it did not see that: what it put is not the chunk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_reader_that_comes_second_removes_its_parts_and_no_others() {
    let (scene, _) = start("second").await;
    scene.offer_chunks(0);
    scene.offer_loads(false);
    let _offers = scene.offering();
    // Capture, apply and run: both readers are others.
    let _owner = scene.worker_of("w1", 3);
    scene
        .until("the run has a snapshot, and its owner no room", async || {
            let (plan, locks) = (scene.plan(1).await?, scene.coordination.locks(&scene.flow).await);
            let locks = locks.map_err(|error| error.to_string())?;
            if plan.snapshot().is_some() && locks.len() == 3 { Ok(()) } else { Err(format!("{locks:?}")) }
        })
        .await;
    let failpoints = Failpoints::parse("no-self-fencing,stop-before-chunk-part").unwrap();
    let _late = scene.worker_of_one("w2", failpoints.clone());
    scene.offer_chunks(1);
    scene.stands_at(&failpoints, Failpoint::StopBeforeChunkPart).await;
    let chunk = ChunkId { table: 0, restart: 0, number: 0 };
    scene.delete_lock(&TaskId { flow: scene.flow.clone(), kind: TaskKind::Chunk(RunId(1), chunk) }).await;
    let _reader = scene.worker_of_one("w3", Failpoints::default());
    scene.chunks_read(1, 1).await;
    let read = scene.coordination.run_chunk(&scene.flow, RunId(1), chunk).await.unwrap().unwrap();
    assert_eq!(read.worker.as_str(), "w3");
    let put = scene.shelf(Shelf::Chunks).await.last_sequence;
    failpoints.let_go(Failpoint::StopBeforeChunkPart);
    scene
        .until("the late reader has put its part", async || match scene.shelf(Shelf::Chunks).await.last_sequence {
            now if now > put => Ok(()),
            now => Err(format!("{now}")),
        })
        .await;
    let marked = SideGroup::ChunkAttempt(RunId(1), chunk, read.attempt);
    scene
        .until("the parts of the late reader are removed", async || match scene.on_shelf(Shelf::Chunks).await? {
            left if left == [marked] => Ok(()),
            left => Err(format!("{left:?}")),
        })
        .await;
    let _loader = scene.worker("w4");
    is_kept_and_loaded(&scene).await;
}

/// Readers were killed so often that what they left fills the side store: the parts of one chunk that another worker is to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_what_readers_left_that_died_does_not_keep_a_run_from_its_end() {
    let scene = Arc::new(Scene::new("left").await);
    fill(&scene, 20_000).await;
    let document = scene.in_chunks("initial");
    let side = open_side(&scene.flow, &document.spec.log, &scene.connections().await.unwrap()).unwrap();
    side.ensure(Shelf::Chunks).await.unwrap();
    let chunk = ChunkId { table: 0, restart: 0, number: 3 };
    let mut number = 0;
    let full = loop {
        let key = SideKey::ChunkPart { run: RunId(1), chunk, attempt: Epoch(1), number };
        match side.put(key, vec![7; 32 << 10].into()).await {
            Ok(()) => number += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, StagingError::SideFull { .. }), "{full}");
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

/// A connection string that was copied: nothing of the database is touched, and a person reads what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_its_own_source_is_refused_before_it_touches_anything() {
    let scene = Arc::new(Scene::new("itself").await);
    fill(&scene, 10).await;
    let looked_at = "SELECT pg_relation_filenode('t') || ' ' || count(*) || ' ' || coalesce(to_regnamespace('wallaby')::text, 'none') FROM t";
    let before = rows(&scene.source, looked_at).await.unwrap();
    let mut document = scene.document("public.*", "initial", "");
    document.spec.sinks[0].postgres.dsn = document.spec.source.postgres.dsn.clone();
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    let apply = TaskId::apply(&scene.flow, &scene.sink);
    let said = scene
        .until("the sink is refused", async || {
            let status = scene.status_of(&apply).await?;
            let said = status.conditions.iter().find(|said| said.reason == "SinkConfiguration");
            said.map(|said| said.message.clone()).ok_or_else(|| format!("{status:?}"))
        })
        .await;
    assert!(said.contains("is the source's own") && said.contains("another database"), "{said}");
    assert_eq!(rows(&scene.source, looked_at).await.unwrap(), before, "filenode, rows, the sink's schema");
    // With a database of its own it goes on.
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let document = scene.document("public.*", "initial", "");
    scene.coordination.update_flow(&seen, document, &std::collections::BTreeMap::new()).await.unwrap();
    scene.equal(ALL).await;
}
