//! The owner of a run: before it has a plan, and at its end.

use wallaby_coordination::Hold;
use wallaby_model::run::{RunState, RunWish};
use wallaby_model::{Reader, RunId};
use wallaby_pool_worker::failpoint::Failpoint;
use wallaby_staging::Shelf;

use super::{LEDGER, add, at, ledger};
use crate::runs::ask;
use crate::scene::*;

const RUN: RunId = RunId(1);

/// The run's hold on the log.
async fn hold(scene: &Scene) -> Option<Hold> {
    scene.coordination.holds(&scene.flow).await.unwrap().get(&Reader::Run(RUN)).copied()
}

/// The table has no key: rows of the dead owner's snapshot, or of the log before the next one, would stand there twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_between_its_hold_and_its_plan_a_run_goes_on_with_the_hold_and_another_snapshot() {
    let scene = ledger("plan").await;
    let _offers = scene.offering();
    add(&scene, 0..10).await;
    scene.coordination.create_flow(scene.document("public.ledger", "initial", "")).await.unwrap();
    let failpoints = at(Failpoint::StopBeforePlan);
    let first = scene.worker_with("w1", failpoints.clone());
    scene.stands_at(&failpoints, Failpoint::StopBeforePlan).await;
    let held = hold(&scene).await;
    assert!(held.is_some_and(|held| held.position.is_some()), "{held:?}");
    assert!(scene.plan(1).await.is_err(), "it has a plan");
    add(&scene, 10..20).await;
    scene.source.batch_execute("DELETE FROM ledger WHERE n < 5").await.unwrap();
    drop(first);
    add(&scene, 20..30).await;

    let failpoints = at(Failpoint::StopBeforePlan);
    let _second = scene.worker_with("w2", failpoints.clone());
    scene.stands_at(&failpoints, Failpoint::StopBeforePlan).await;
    assert_eq!(hold(&scene).await, held, "the next owner keeps what was held");
    add(&scene, 30..40).await;
    failpoints.let_go(Failpoint::StopBeforePlan);
    scene.run_is(1, RunState::Done).await;
    assert_eq!(hold(&scene).await, None, "the run still holds the log");
    add(&scene, 40..50).await;
    scene.equal(LEDGER).await;
}

/// One that every sink has, and one that nobody wants any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_the_end_of_a_run_what_was_kept_for_it_goes_and_is_said_once() {
    for state in [RunState::Done, RunState::Cancelled] {
        for point in [Failpoint::StopBeforeRunFinished, Failpoint::StopAfterRunFinished] {
            println!("{state:?}, killed at {point:?}");
            ends(state, point).await;
        }
    }
}

async fn ends(state: RunState, point: Failpoint) {
    let scene = ledger("end").await;
    let _offers = scene.offering();
    add(&scene, 0..10).await;
    scene.offer_loads(state == RunState::Done);
    scene.coordination.create_flow(scene.document("public.ledger", "initial", "")).await.unwrap();
    let failpoints = at(point);
    let first = scene.worker_with("w1", failpoints.clone());
    if state == RunState::Cancelled {
        scene.chunks_read(1, 1).await;
        scene.coordination.set_run_wish(&scene.flow, RUN, RunWish::Cancel).await.unwrap();
    }
    scene.stands_at(&failpoints, point).await;
    // Its chunks go first: once it is said to be over, nobody looks for them.
    assert_eq!(scene.on_shelf(Shelf::Chunks).await.unwrap(), []);
    let is_finished = point == Failpoint::StopAfterRunFinished;
    assert_eq!(scene.plan(1).await.unwrap().state.is_over(), is_finished);
    assert_eq!(hold(&scene).await.is_none(), is_finished, "the hold goes when it is said, and not before");
    let chunks = async || scene.coordination.run_chunks(&scene.flow, RUN).await.unwrap().len();
    assert_eq!(chunks().await, 1, "its keys go last");
    drop(first);
    add(&scene, 10..20).await;

    let _second = scene.worker("w2");
    scene.run_is(1, state).await;
    if is_finished {
        // Nobody owns it any more: the controller that leads finds what was left.
        assert!(scene.coordination.clear_run(&scene.flow, RUN).await.unwrap());
    }
    let totals = async || scene.plan(1).await.map(|plan| plan.totals);
    scene
        .until("the run's keys are gone", async || match (chunks().await, totals().await?) {
            (0, Some(totals)) => {
                assert_eq!((totals.chunks, totals.rows), (1, 10));
                Ok(())
            }
            other => Err(format!("{other:?}")),
        })
        .await;
    assert_eq!(hold(&scene).await, None, "the run still holds the log");
    assert_eq!(scene.on_shelf(Shelf::Chunks).await.unwrap(), []);
    scene.offer_loads(true);
    if state == RunState::Cancelled {
        ask(&scene, &[]).await;
        scene.run_is(2, RunState::Done).await;
    }
    scene.equal(LEDGER).await;
    add(&scene, 20..30).await;
    scene.equal(LEDGER).await;
}
