//! Tasks that fail again and again: they are not taken again at once, for ever.

use std::sync::Arc;

use wallaby_coordination::wall_clock_now;
use wallaby_model::TaskId;
use wallaby_model::condition::TaskPhase;
use wallaby_pool_worker::failpoint::Failpoints;

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
