//! Half a transaction stands in the log or in the side store, and something ends there: the worker, the flow's run, or the connection to
//! the source. The table has no key: what comes twice stands there twice.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::Timestamp;
use wallaby_model::flow::{ByteSize, Span};
use wallaby_model::run::RunState;
use wallaby_model::verify::{OperationResult, OperationSpec, OperationState, Verdict, VerifyPhase, VerifySpec};
use wallaby_model::{Attempt, Manifest, Position};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::Shelf;

use crate::large::{LEDGER, decode_with, large, ledger_in, only_attempt, rows};
use crate::scene::*;

/// How many rows the target was seen with.
type Seen = Arc<Mutex<BTreeSet<i64>>>;

/// Counts the target's rows all the time, until dropped.
async fn looking(scene: &Scene) -> (AbortOnDropHandle<()>, Seen) {
    let (target, seen) = (scene.target.connect().await, Seen::default());
    let noted = Arc::clone(&seen);
    let looking = AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let rows: i64 = target.query_one("SELECT count(*) FROM ledger", &[]).await.unwrap().get(0);
            noted.lock().unwrap().insert(rows);
        }
    }));
    (looking, seen)
}

/// A transaction of several segments, of which the log has some, and the worker that stands still there.
struct Half {
    scene: Arc<Scene>,
    failpoints: Failpoints,
    worker: Running,
    seen: Seen,
    /// Where the log ends.
    end: Position,
    _going_on: (AbortOnDropHandle<()>, AbortOnDropHandle<()>),
}

async fn half_in_log(name: &str) -> Half {
    let (scene, offers) = ledger_in(Scene::new(name).await, "1GB", |document| {
        document.spec.source.postgres.large_transaction_bytes = ByteSize(64 << 20);
        document.spec.log.replay_window = Span(Duration::from_secs(3600));
    })
    .await;
    let failpoints = Failpoints::parse("stop-inside-transaction").unwrap();
    let worker = scene.worker_with("w1", failpoints.clone());
    scene.run_is(1, RunState::Done).await;
    let (looking, seen) = looking(&scene).await;
    scene.source.batch_execute(&format!("BEGIN; {}; COMMIT", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopInsideTransaction).await;
    let end = scene.log_end().await.unwrap();
    assert!(!end.is_between_transactions(), "the log ends at {end:?}: not inside of a transaction");
    Half { scene, failpoints, worker, seen, end, _going_on: (offers, looking) }
}

impl Half {
    /// All of it is at the target, and never was a part of it.
    async fn comes_whole(&self) {
        self.scene.equal(LEDGER).await;
        let all: i64 = self.scene.source.query_one("SELECT count(*) FROM ledger", &[]).await.unwrap().get(0);
        self.scene
            .until("all rows were seen", async || {
                let seen = self.seen.lock().unwrap().clone();
                if seen.contains(&all) { Ok(()) } else { Err(format!("{seen:?}")) }
            })
            .await;
        assert_eq!(*self.seen.lock().unwrap(), BTreeSet::from([0, all]), "half a transaction was seen at the sink");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_killed_with_half_a_transaction_in_the_log_the_next_owner_appends_the_rest() {
    let half = half_in_log("half-killed").await;
    let scene = Arc::clone(&half.scene);
    drop(half.worker);
    let half = Half { worker: scene.worker("w2"), ..half };
    half.comes_whole().await;
    assert_eq!(scene.fences().await, 2, "nobody took the log over, or somebody more than once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_paused_with_half_a_transaction_in_the_log_nothing_of_it_is_shown_until_it_is_resumed() {
    let half = half_in_log("half-paused").await;
    pause(&half.scene, true).await;
    // The sink's task ends, so this worker knows of the pause: its capture goes no further.
    owners_are(&half.scene, "the capture alone has an owner", 1).await;
    half.failpoints.let_go(Failpoint::StopInsideTransaction);
    owners_are(&half.scene, "nobody owns a task", 0).await;
    assert_eq!(half.scene.log_end().await.unwrap(), half.end, "the paused capture went on");
    let seen = half.seen.lock().unwrap().clone();
    assert_eq!(seen, BTreeSet::from([0]), "half a transaction was seen at the sink");
    pause(&half.scene, false).await;
    half.comes_whole().await;
    assert_eq!(half.scene.fences().await, 2, "nobody took the log over, or somebody more than once");
}

/// The comparison is what asks a sink how far it is: it waits for the whole of what the source shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_compared_with_half_a_transaction_in_the_log_the_sink_is_read_once_it_has_the_whole() {
    let half = half_in_log("half-compared").await;
    let scene = Arc::clone(&half.scene);
    let flow = scene.coordination.flow(&scene.flow).await.unwrap();
    let sink = flow.record.document.spec.sinks[0].name.clone();
    let verify = VerifySpec { sink, tables: Vec::new(), show: 10, timeout_seconds: 600 };
    let asked = OperationSpec { verify, cancelled: false, created_at: Timestamp(1) };
    let number = scene.coordination.create_operation(&flow, asked).await.unwrap().number;
    let result = async || {
        let operations = scene.coordination.operations(&scene.flow).await.map_err(|error| error.to_string())?;
        operations.into_iter().find(|made| made.number == number).map(|made| made.result).ok_or("it is gone".to_owned())
    };
    scene
        .until("the comparison waits for the sink", async || match result().await? {
            result if result.progress.phase == VerifyPhase::WaitingForSink => Ok(()),
            result => Err(format!("{result:?}")),
        })
        .await;
    let seen = half.seen.lock().unwrap().clone();
    assert_eq!(seen, BTreeSet::from([0]), "half a transaction was seen at the sink");
    half.failpoints.let_go(Failpoint::StopInsideTransaction);
    let report = scene
        .until("the comparison is done", async || match result().await? {
            OperationResult { state: OperationState::Done, report: Some(report), .. } => Ok(report),
            result => Err(format!("{result:?}")),
        })
        .await;
    assert_eq!(report.verdict(), Verdict::Equal, "{report:?}");
    assert!(half.end < report.position && report.position <= report.sink_position, "{:?}: {report:?}", half.end);
    let all: i64 = scene.source.query_one("SELECT count(*) FROM ledger", &[]).await.unwrap().get(0);
    assert_eq!(report.tables.iter().map(|table| table.rows_source).sum::<u64>(), all as u64, "{report:?}");
    half.comes_whole().await;
}

async fn pause(scene: &Scene, paused: bool) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut document = seen.record.document.clone();
    document.spec.paused = paused;
    scene.coordination.update_flow(&seen, document, &Default::default()).await.unwrap();
}

async fn owners_are(scene: &Scene, what: &str, wanted: usize) {
    scene
        .until(what, async || {
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            let tasks: Vec<String> = locks.iter().map(|lock| lock.task.to_string()).collect();
            if tasks.len() == wanted { Ok(()) } else { Err(format!("{tasks:?}")) }
        })
        .await;
}

/// Keeps what the sink has in the log and the side store.
async fn kept(scene: Scene) -> (Arc<Scene>, AbortOnDropHandle<()>) {
    ledger_in(scene, "64kB", |document| {
        document.spec.log.replay_window = Span(Duration::from_secs(3600));
    })
    .await
}

/// The walsender ends inside of a transaction that is half in the side store, and the same owner reads the source again, where decoding
/// has `work_mem` then.
async fn cut_while_streamed(name: &str, work_mem: &str) {
    let (scene, _offers) = kept(Scene::new(name).await).await;
    let failpoints = Failpoints::parse("stop-after-part").unwrap();
    let _worker = scene.worker_with("w1", failpoints.clone());
    scene.run_is(1, RunState::Done).await;
    let writer = scene.source.connect().await;
    writer.batch_execute(&format!("BEGIN; {}", large())).await.unwrap();
    scene.stands_at(&failpoints, Failpoint::StopAfterPart).await;
    let dead = only_attempt(&scene).await;
    decode_with(&scene, work_mem).await;
    let killed = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
                  WHERE database = current_database() AND active_pid IS NOT NULL";
    let killed: bool = scene.source.query_one(killed, &[]).await.unwrap().get(0);
    assert!(killed, "the walsender was not there");
    failpoints.let_go(Failpoint::StopAfterPart);
    // What the dead connection sent is of no use to anybody, and goes although its owner lives.
    scene
        .until("the parts of the dead connection are swept", async || {
            let attempts = scene.attempts().await?;
            if attempts.contains(&dead) { Err(format!("{attempts:?}")) } else { Ok(()) }
        })
        .await;
    writer.batch_execute("COMMIT").await.unwrap();
    // Others of this connection go the same way.
    scene.source.batch_execute(&rows(20_000, 26_000)).await.unwrap();
    scene.equal(LEDGER).await;
    let manifests = scene.manifests().await;
    let named: BTreeSet<Attempt> = manifests.iter().map(|manifest| manifest.attempt).collect();
    let first = manifests[0].attempt;
    assert_eq!((manifests.len(), first.xid, first.epoch), (2, dead.xid, dead.epoch), "{named:?} after {dead}");
    assert!(named.iter().all(|attempt| attempt.connection > dead.connection), "{named:?} after {dead}");
    assert_eq!(scene.attempts().await.unwrap(), named, "other parts stayed");
    assert_eq!(scene.fences().await, 1, "another owner took the log over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h12_cut_off_in_a_streamed_transaction_the_same_owner_streams_it_again() {
    cut_while_streamed("cut-streamed", "64kB").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_h12_cut_off_in_a_streamed_transaction_the_same_owner_takes_it_whole() {
    cut_while_streamed("cut-whole", "1GB").await;
}

/// Sub-transactions that survive and are rolled back by turns.
fn by_turns(from: u32, to: u32) -> String {
    format!(
        "DO $$ BEGIN FOR i IN {from}..{to} LOOP
            BEGIN
                {};
                IF i % 2 = 0 THEN RAISE EXCEPTION 'rolled back'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL;
            END;
        END LOOP; END $$",
        "INSERT INTO ledger SELECT i, (SELECT string_agg(md5(i::text || '/' || j), '') FROM generate_series(1, 9) j)"
    )
}

/// What the side store and the log get grows with the bytes of the rows, not with the sub-transactions.
async fn come_by_turns(name: &str, streaming: &str, sub_transactions: u32) -> Manifest {
    let scene = Scene::new(name).await;
    let setting = "debug_logical_replication_streaming";
    let sql = format!("ALTER DATABASE {} SET {setting} = '{streaming}'", scene.source.name());
    scene.source.batch_execute(&sql).await.unwrap();
    let (scene, _offers) = kept(scene).await;
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute(&by_turns(1, sub_transactions)).await.unwrap();
    scene.equal(LEDGER).await;
    let [manifest] = <[_; 1]>::try_from(scene.manifests().await).unwrap();
    let state = scene.shelf(Shelf::Transactions).await;
    let (parts, ranges) = (manifest.parts.len(), manifest.aborted.len());
    println!(
        "{sub_transactions} sub-transactions, {streaming}: {parts} parts, {ranges} rolled-back ranges, {} messages, {} KiB",
        state.messages,
        state.bytes >> 10
    );
    // Rows of 300 bytes, with what describes each of them; a part has a MiB.
    let parts_most = u64::from(sub_transactions) * 500 / (1 << 20) + 2;
    assert!(parts as u64 <= parts_most, "{parts} parts, not {parts_most}");
    assert!(state.messages <= parts_most + 2, "{} messages for {parts} parts", state.messages);
    manifest
}

/// As the server sends them: a range is rolled back only where it was sent before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h17_very_many_sub_transactions_by_turns_take_no_more_room_than_their_rows() {
    let manifest = come_by_turns("turns", "buffered", 20_000).await;
    assert!(manifest.aborted.len() < 1000, "{} ranges", manifest.aborted.len());
}

/// Each change is sent at once: the worst that a server can do. Every other sub-transaction is a range of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h17_sub_transactions_by_turns_that_are_sent_at_once_are_one_range_for_each_rollback() {
    let manifest = come_by_turns("turns-at-once", "immediate", 4000).await;
    assert_eq!(manifest.aborted.len(), 2000);
    assert!(manifest.aborted.iter().all(|(first, last)| first == last));
}
