//! A flow on its way out.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use wallaby_coordination::Key;
use wallaby_model::flow::FlowDocument;
use wallaby_model::run::RunState;
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};

use super::{LEDGER, add, at, ledger, log};
use crate::scene::*;

/// What a flow has, in the order in which it goes.
const ALL: [&str; 6] = ["slot", "publication", "chunks", "side store", "log", "keys"];

/// Where its removal stands still, and how much of [`ALL`] is gone there.
const STEPS: [(Failpoint, usize); 5] = [
    (Failpoint::StopBeforeRemoval, 0),
    (Failpoint::StopAfterSlotDropped, 1),
    (Failpoint::StopAfterPublicationDropped, 2),
    (Failpoint::StopAfterSideRemoved, 4),
    (Failpoint::StopAfterLogDeleted, 5),
];

fn document(scene: &Scene) -> FlowDocument {
    scene.document("public.ledger", "initial", "largeTransactionBytes: 1Mi")
}

/// Makes the flow, has it load what is there, and pass some rows.
async fn lives(scene: &Scene) {
    scene.coordination.create_flow(document(scene)).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    add(scene, 0..5).await;
    scene.equal(LEDGER).await;
}

/// Has it pass a transaction that goes through the side store.
async fn passes_a_large_one(scene: &Scene) {
    let large = "INSERT INTO ledger SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 30))
        FROM generate_series(1000, 2500) i";
    scene.source.batch_execute(&format!("BEGIN; {large}; COMMIT")).await.unwrap();
    scene.equal(LEDGER).await;
}

/// Asks for the flow's end.
async fn delete(scene: &Scene) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.mark_flow_deleting(&seen).await.unwrap();
}

/// What the flow has anywhere.
async fn found(scene: &Scene) -> Result<BTreeSet<&'static str>, String> {
    let mut found = BTreeSet::new();
    let slots = "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()";
    if !rows(&scene.source, slots).await?.is_empty() {
        found.insert("slot");
    }
    if !rows(&scene.source, "SELECT pubname::text FROM pg_publication").await?.is_empty() {
        found.insert("publication");
    }
    let streams: Vec<String> =
        scene.nats.jetstream().stream_names().try_collect().await.map_err(|error| error.to_string())?;
    for (what, prefix) in [("chunks", "CHUNKS"), ("side store", "SIDE"), ("log", "LOG")] {
        if streams.contains(&format!("{prefix}_{}", scene.flow)) {
            found.insert(what);
        }
    }
    let keys = scene.coordination.list(&scene.coordination.keys().everything()).await;
    let is_of_a_worker = |key: &Key| matches!(key, Key::Worker(_) | Key::WorkerDrain(_));
    if keys.map_err(|error| error.to_string())?.iter().any(|entry| !is_of_a_worker(&entry.key)) {
        found.insert("keys");
    }
    Ok(found)
}

async fn is_gone(scene: &Scene) {
    scene
        .until("nothing of the flow is left", async || {
            let found = found(scene).await?;
            if found.is_empty() { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_between_two_steps_of_a_removal_the_next_owner_finishes_it_and_the_flow_can_be_made_again() {
    let scene = ledger("removal").await;
    let _offers = scene.offering();
    for (round, (point, gone)) in STEPS.into_iter().enumerate() {
        println!("killed at {point:?}");
        let failpoints = at(point);
        let first = scene.worker_with(&format!("first-{round}"), failpoints.clone());
        lives(&scene).await;
        passes_a_large_one(&scene).await;
        assert_eq!(found(&scene).await.unwrap(), BTreeSet::from(ALL));
        delete(&scene).await;
        scene.stands_at(&failpoints, point).await;
        assert_eq!(found(&scene).await.unwrap(), ALL[gone..].iter().copied().collect(), "{point:?}");
        drop(first);
        let next = scene.worker(&format!("next-{round}"));
        is_gone(&scene).await;
        next.end().await;
    }
    let _last = scene.worker("last");
    lives(&scene).await;
}

/// Forgets the flow as `wallaby delete --force` does, while the removal of it stands still somewhere.
async fn forget(scene: &Scene) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    log(scene).await.delete().await.unwrap();
    scene.coordination.remove_flow(&seen).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_removal_that_goes_on_late_takes_nothing_from_the_flow_that_was_made_again() {
    let scene = ledger("late").await;
    let _offers = scene.offering();
    for (round, (point, _)) in STEPS.into_iter().enumerate() {
        println!("stands at {point:?}");
        let failpoints = Failpoints::parse(&format!("no-self-fencing,{}", point.name())).unwrap();
        let late = scene.worker_with(&format!("late-{round}"), failpoints.clone());
        lives(&scene).await;
        delete(&scene).await;
        scene.stands_at(&failpoints, point).await;
        forget(&scene).await;
        let other = scene.worker(&format!("other-{round}"));
        lives(&scene).await;
        failpoints.let_go(point);
        // It does not end before what it does has ended.
        late.end().await;
        let left = found(&scene).await.unwrap();
        let gone: Vec<&str> = ALL.into_iter().filter(|what| !left.contains(what)).collect();
        // No large transaction passed it.
        assert!(gone.iter().all(|what| *what == "side store"), "{gone:?} after {point:?}");
        add(&scene, 5..10).await;
        scene.equal(LEDGER).await;
        delete(&scene).await;
        is_gone(&scene).await;
        other.end().await;
    }
}
