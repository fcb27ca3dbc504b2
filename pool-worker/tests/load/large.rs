//! Large transactions whose capture dies at each step on their way through the side store, and one that does not fit there.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::ConditionType;
use wallaby_model::flow::FlowDocument;
use wallaby_model::run::RunState;
use wallaby_model::{Attempt, TaskId};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::Shelf;
use wallaby_testkit::{Held, Wire};

use crate::scene::*;

/// Without the column that the sink adds to a table without a key.
pub const LEDGER: &str = "SELECT n || ' ' || pad FROM ledger ORDER BY n, pad";

/// Rows of about 300 bytes that do not shrink when they are packed.
pub fn rows(from: u32, to: u32) -> String {
    format!(
        "INSERT INTO ledger SELECT i, (SELECT string_agg(md5(i::text || '/' || j), '') FROM generate_series(1, 9) j)
         FROM generate_series({from}, {to}) i"
    )
}

/// About 4 MB, a quarter of it rolled back.
pub fn large() -> String {
    format!(
        "{}; SAVEPOINT a; {}; ROLLBACK TO a; {}; DELETE FROM ledger WHERE n % 1000 = 0",
        rows(1, 6000),
        rows(6001, 9000),
        rows(9001, 12_000)
    )
}

/// A flow with a table that has no key: what comes twice stands there twice. Loaded, and offered from now on.
pub async fn ledger(name: &str, work_mem: &str) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    ledger_with(name, work_mem, |_| {}).await
}

/// The same with another flow file.
async fn ledger_with(
    name: &str,
    work_mem: &str,
    change: impl FnOnce(&mut FlowDocument),
) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    ledger_in(Scene::new(name).await, work_mem, change).await
}

/// The same in a scene that is there.
pub async fn ledger_in(
    scene: Scene,
    work_mem: &str,
    change: impl FnOnce(&mut FlowDocument),
) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    let scene = Arc::new(scene);
    let table = "CREATE TABLE ledger (n int NOT NULL, pad text NOT NULL); ALTER TABLE ledger REPLICA IDENTITY FULL";
    scene.source.batch_execute(table).await.unwrap();
    decode_with(&scene, work_mem).await;
    let mut document = scene.document("public.ledger", "initial", "largeTransactionBytes: 1Mi");
    change(&mut document);
    scene.coordination.create_flow(document).await.unwrap();
    let offers = scene.offering();
    (scene, offers)
}

/// From the next replication connection on, a transaction is streamed once it is larger than this.
pub async fn decode_with(scene: &Scene, work_mem: &str) {
    let sql = format!("ALTER DATABASE {} SET logical_decoding_work_mem = '{work_mem}'", scene.source.name());
    scene.source.batch_execute(&sql).await.unwrap();
}

/// The one attempt that has parts in the side store.
pub async fn only_attempt(scene: &Scene) -> Attempt {
    scene
        .until("one attempt has parts", async || {
            let attempts = scene.attempts().await?;
            match attempts.first() {
                Some(attempt) if attempts.len() == 1 => Ok(*attempt),
                _ => Err(format!("{attempts:?}")),
            }
        })
        .await
}

async fn is_swept(scene: &Scene, dead: Attempt) {
    scene
        .until("the parts of the dead attempt are swept", async || {
            let attempts = scene.attempts().await?;
            if attempts.contains(&dead) { Err(format!("{attempts:?}")) } else { Ok(()) }
        })
        .await;
}

/// What stands behind the splice is what the dead owner put, and nobody put it again.
async fn is_not_sent_again(scene: &Scene, put: Attempt) {
    let attempts = scene.attempts().await.unwrap();
    assert!(attempts.is_subset(&BTreeSet::from([put])), "{attempts:?} beside {put}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_h12_killed_after_a_streamed_part_the_transaction_comes_again_at_its_commit() {
    let (scene, _offers) = ledger("part", "64kB").await;
    let failpoints = Failpoints::parse("stop-after-part").unwrap();
    let first = scene.worker_with("w1", failpoints.clone());
    scene.run_is(1, RunState::Done).await;
    let writer = scene.source.connect().await;
    writer.batch_execute(&format!("BEGIN; {}", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopAfterPart).await;
    let dead = only_attempt(&scene).await;
    drop(first);
    // The next one does not stream it.
    decode_with(&scene, "1GB").await;
    let _second = scene.worker("w2");
    writer.batch_execute("COMMIT").await.unwrap();
    scene.equal(LEDGER).await;
    is_swept(&scene, dead).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_h12_killed_after_the_manifest_the_transaction_comes_again_streamed() {
    let (scene, _offers) = ledger("manifest", "1GB").await;
    let failpoints = Failpoints::parse("stop-after-manifest").unwrap();
    let first = scene.worker_with("w1", failpoints.clone());
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopAfterManifest).await;
    let dead = only_attempt(&scene).await;
    assert_eq!(crate::scene::rows(&scene.target, LEDGER).await.unwrap(), Vec::<String>::new(), "it is not visible");
    drop(first);
    decode_with(&scene, "64kB").await;
    let second = scene.worker("w2");
    scene.equal(LEDGER).await;
    // The older manifest held its parts until there was a younger one; the next sweep is the next owner's.
    second.end().await;
    let _third = scene.worker("w3");
    is_swept(&scene, dead).await;
    scene.equal(LEDGER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h12_killed_before_the_splices_acknowledgement_is_seen_it_is_in_the_log_and_stays() {
    let (scene, _offers) = ledger("unseen", "64kB").await;
    let wire = Wire::to(&scene.nats.url()).await;
    let failpoints = Failpoints::parse("stop-after-manifest").unwrap();
    let first = scene.worker_at("w1", failpoints.clone(), &wire.url());
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopAfterManifest).await;
    let put = only_attempt(&scene).await;
    let before = scene.log_end().await.unwrap();
    wire.hold(Held::Answers);
    failpoints.let_go(Failpoint::StopAfterManifest);
    let spliced = scene
        .until("the splice is in the log", async || {
            let end = scene.log_end().await?;
            if end > before { Ok(end) } else { Err(format!("{end}")) }
        })
        .await;
    assert!(scene.confirmed().await < spliced.commit, "nobody saw it acknowledged");
    drop(first);
    let _second = scene.worker("w2");
    scene.equal(LEDGER).await;
    is_not_sent_again(&scene, put).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h12_killed_before_postgres_is_told_of_a_splice_it_is_not_taken_again() {
    let (scene, _offers) = ledger("untold", "1GB").await;
    let first = scene.wary_worker("w1");
    scene.run_is(1, RunState::Done).await;
    let before = scene.log_end().await.unwrap();
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    let put = only_attempt(&scene).await;
    scene.equal(LEDGER).await;
    let staged = scene
        .until("the splice is acknowledged", async || {
            let staged = scene.status_of(&TaskId::capture(&scene.flow)).await?.progress.staged;
            staged.filter(|staged| *staged > before).ok_or_else(|| format!("{staged:?}"))
        })
        .await;
    drop(first);
    assert!(scene.confirmed().await <= before.commit && before.commit < staged.commit, "Postgres was told already");
    let _second = scene.worker("w2");
    scene.source.batch_execute(&rows(20_000, 20_010)).await.unwrap();
    scene.equal(LEDGER).await;
    is_not_sent_again(&scene, put).await;
    scene.told(staged.commit).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_transaction_that_does_not_fit_into_the_side_store_holds_nothing_up() {
    let (scene, _offers) = ledger_with("full", "64kB", |document| {
        document.spec.log.side_store =
            serde_json::from_str(r#"{ "jetstream": { "transactionsMax": "1Mi" } }"#).unwrap();
    })
    .await;
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let writer = scene.source.connect().await;
    writer.batch_execute(&format!("BEGIN; {}", large())).await.unwrap();
    capturing_says(&scene, "SideStoreFull").await;
    // It is still open, and the others pass it.
    scene.source.batch_execute(&rows(20_000, 20_010)).await.unwrap();
    let end = scene.wal_end().await;
    scene.equal(LEDGER).await;
    scene.told(end).await;
    writer.batch_execute("COMMIT").await.unwrap();
    scene.equal(LEDGER).await;
    capturing_says(&scene, "Streaming").await;
    scene
        .until("what it left in the side store is swept", async || {
            let attempts = scene.attempts().await?;
            if attempts.is_empty() { Ok(()) } else { Err(format!("{attempts:?}")) }
        })
        .await;
    // One that fits goes there again.
    let before = scene.shelf(Shelf::Transactions).await.last_sequence;
    scene.source.batch_execute(&rows(30_000, 32_300)).await.unwrap();
    scene.equal(LEDGER).await;
    assert!(scene.shelf(Shelf::Transactions).await.last_sequence > before, "it did not go through the side store");
}

/// Waits for the reason of the capture's condition.
async fn capturing_says(scene: &Scene, reason: &str) {
    scene
        .until(&format!("the capture says {reason}"), async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.iter().find(|condition| condition.kind == ConditionType::Capturing);
            match said {
                Some(said) if said.reason == reason => Ok(()),
                said => Err(format!("{said:?}")),
            }
        })
        .await;
}
