//! The side store loses parts that it acknowledged, behind splices that Postgres was not told of yet (hazard 9): Postgres sends those
//! transactions again, and splices stand in the log twice. The table has no key: what a sink takes twice stands there twice. Where they
//! were streamed in progress they come whole the second time, so that their first rows would go into the log, behind the old splice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::TaskPhase;
use wallaby_model::flow::{ByteSize, OnOverrun, Span};
use wallaby_model::run::RunState;
use wallaby_model::{Attempt, TaskId};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::{Shelf, SideGroup};
use wallaby_testkit::{Database, PostgresOptions};

use crate::large::{LEDGER, decode_with, large, ledger, ledger_in, only_attempt, rows};
use crate::scene::*;

/// A scene whose sink stands in a cluster of its own: a transaction that is blocked there holds up the making of slots.
pub async fn blockable(name: &str) -> Scene {
    let target = cluster(PostgresOptions::default()).await;
    let (source, target) = tokio::join!(Database::create("source"), Database::create_on(target, "target"));
    Scene::with(name, source, target).await
}

/// Another large transaction.
fn second() -> String {
    rows(40_001, 46_000)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_postgres_is_not_told_of_a_splice_that_lost_a_part_and_sends_the_transaction_again() {
    let (scene, _offers) = ledger("gate", "64kB").await;
    let failpoints = Failpoints::parse("stop-after-manifest").unwrap();
    let _worker = scene.worker_with("w1", failpoints.clone());
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopAfterManifest).await;
    let put = only_attempt(&scene).await;
    scene.lose_part(put, true).await;
    decode_with(&scene, "1GB").await;
    failpoints.let_go(Failpoint::StopAfterManifest);
    let end = scene.wal_end().await;
    scene.equal(LEDGER).await;
    scene.told(end).await;
}

/// Where the sink stands when the parts of the first of two large transactions turn out to be lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sink {
    Before,
    Between,
    Past,
}

/// Two large transactions in the log, of which Postgres was told of none; the first one then loses a part. Returns their attempts.
async fn two_splices(scene: &Scene, sink: Sink, blocked: &tokio_postgres::Client) -> BTreeSet<Attempt> {
    let first = scene.wary_worker("w1");
    scene.run_is(1, RunState::Done).await;
    let before = scene.wal_end().await;
    let block = async || blocked.batch_execute("BEGIN; LOCK TABLE ledger").await.unwrap();
    if sink == Sink::Before {
        block().await;
    }
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    if sink != Sink::Before {
        scene.equal(LEDGER).await;
    }
    if sink == Sink::Between {
        block().await;
    }
    scene.source.batch_execute(&rows(20_000, 20_010)).await.unwrap();
    scene.source.batch_execute(&second()).await.unwrap();
    if sink == Sink::Past {
        scene.equal(LEDGER).await;
    }
    scene.staged(scene.wal_end().await).await;
    let attempts = scene.attempts().await.unwrap();
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    drop(first);
    assert!(scene.confirmed().await <= before, "Postgres was told already: it cannot send them again");
    scene.lose_part(*attempts.first().unwrap(), false).await;
    decode_with(scene, "1GB").await;
    attempts
}

/// Nothing goes from the log for now.
async fn kept(name: &str) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    ledger_in(blockable(name).await, "64kB", |document| {
        document.spec.log.replay_window = Span(Duration::from_secs(3600));
    })
    .await
}

/// Both transactions were kept once more, by a later owner.
async fn are_sent_again(scene: &Scene, attempts: &BTreeSet<Attempt>) {
    scene
        .until("both were sent again", async || {
            let now = scene.attempts().await?;
            let is_again = |old: &Attempt| now.iter().any(|new| new.xid == old.xid && new.epoch > old.epoch);
            if attempts.iter().all(is_again) { Ok(()) } else { Err(format!("{now:?} after {attempts:?}")) }
        })
        .await;
}

async fn is_taken_once(name: &str, sink: Sink) {
    let (scene, _offers) = kept(name).await;
    let blocked = scene.target.connect().await;
    let attempts = two_splices(&scene, sink, &blocked).await;
    let _second = scene.worker("w2");
    are_sent_again(&scene, &attempts).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.source.batch_execute(&rows(20_011, 20_020)).await.unwrap();
    let end = scene.wal_end().await;
    scene.equal(LEDGER).await;
    scene.told(end).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_splices_that_come_twice_are_taken_once_by_a_sink_before_them() {
    is_taken_once("before", Sink::Before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_splices_that_come_twice_are_taken_once_by_a_sink_between_them() {
    is_taken_once("between", Sink::Between).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_splices_that_come_twice_are_not_taken_by_a_sink_past_them() {
    is_taken_once("past", Sink::Past).await;
}

/// The owner that goes back dies with the first one kept again and its splice not appended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_h12_killed_while_lost_parts_are_sent_again_the_next_owner_sends_them() {
    let (scene, _offers) = kept("again").await;
    let blocked = scene.target.connect().await;
    let attempts = two_splices(&scene, Sink::Before, &blocked).await;
    let failpoints = Failpoints::parse("stop-after-manifest").unwrap();
    let next = scene.worker_with("w2", failpoints.clone());
    scene.stands_at(&failpoints, Failpoint::StopAfterManifest).await;
    drop(next);
    let _third = scene.worker("w3");
    are_sent_again(&scene, &attempts).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    let end = scene.wal_end().await;
    scene.equal(LEDGER).await;
    scene.told(end).await;
    assert_eq!(scene.fences().await, 3, "the third owner took the log over more than once");
}

/// There is room for the transaction once. The first put lost a part: it makes room for the second one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_parts_that_come_again_have_room_where_they_fit_once() {
    let (scene, _offers) = ledger_in(blockable("room").await, "64kB", |document| {
        document.spec.log.replay_window = Span(Duration::from_secs(3600));
        document.spec.log.side_store =
            serde_json::from_str(r#"{ "jetstream": { "transactionsMax": "5Mi" } }"#).unwrap();
    })
    .await;
    let first = scene.wary_worker("w1");
    scene.run_is(1, RunState::Done).await;
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE ledger").await.unwrap();
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    let end = scene.wal_end().await;
    scene.staged(end).await;
    let put = only_attempt(&scene).await;
    let state = scene.shelf(Shelf::Transactions).await;
    assert!(2 * state.bytes > 5 << 20, "{} bytes fit twice", state.bytes);
    drop(first);
    scene.lose_part(put, true).await;
    decode_with(&scene, "1GB").await;
    let _second = scene.worker("w2");
    are_sent_again(&scene, &BTreeSet::from([put])).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.source.batch_execute(&rows(20_011, 20_020)).await.unwrap();
    let end = scene.wal_end().await;
    scene.equal(LEDGER).await;
    scene.told(end).await;
}

/// The source's connection ends while a splice waits for room in a full log; what it needs is lost meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_splice_that_waits_for_a_full_log_is_looked_after_when_the_source_is_read_again() {
    let (scene, _offers) = ledger_in(blockable("waits").await, "1GB", |document| {
        document.spec.log.max_bytes = ByteSize(32 << 20);
        document.spec.sinks[0].on_overrun = OnOverrun::Backpressure;
    })
    .await;
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE ledger").await.unwrap();
    let capture = TaskId::capture(&scene.flow);
    // One after the other, so that no more than the last one waits.
    for from in (100_000..).step_by(2000) {
        scene.source.batch_execute(&rows(from, from + 1999)).await.unwrap();
        let end = scene.wal_end().await;
        if scene.staged_or_full(end).await {
            break;
        }
    }
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    scene
        .until("the splice is all that is missing", async || {
            let groups = scene.on_shelf(Shelf::Transactions).await?;
            let is_kept = groups.iter().any(|group| matches!(group, SideGroup::Manifest(_)));
            if is_kept { Ok(()) } else { Err(format!("{groups:?}")) }
        })
        .await;
    let put = only_attempt(&scene).await;
    let end = scene.wal_end().await;
    let killed =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database()";
    scene.source.batch_execute(killed).await.unwrap();
    scene
        .until("the source is read again once the log has room", async || {
            match scene.status_of(&capture).await?.phase {
                TaskPhase::Resuming => Ok(()),
                phase => Err(format!("{phase:?}")),
            }
        })
        .await;
    scene.lose_part(put, true).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(LEDGER).await;
    scene.told(end).await;
}
