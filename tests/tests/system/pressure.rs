//! Something does not take more: the log is full, the sink is blocked, a transaction is too large, Postgres shuts down.

use std::time::{Duration, Instant};

use wallaby_model::condition::{Condition, ConditionStatus, ConditionType, TaskPhase};
use wallaby_testkit::Shutdown;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::traffic::Traffic;
use wallaby_tests::{alone, is_full_size, rounds};

/// Each row is about 1 KB that hardly compresses.
const FILL: &str = "\
    INSERT INTO bulk SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 32) WHERE i > 0) \
    FROM generate_series($1::bigint, $2::bigint) i";

fn small_log() -> FlowFile {
    FlowFile { max_bytes: "32Mi".to_owned(), large_transaction_bytes: "4Mi".to_owned(), ..FlowFile::default() }
}

/// What one round puts into the table begins here.
fn base(round: usize) -> i64 {
    i64::try_from(round).unwrap() * 10_000_000
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocked_sink_fills_the_log_and_both_go_on() {
    let _alone = alone().await;
    let plan = Plan { flow: small_log(), ..Plan::default() };
    let mut system = System::start(plan).await;
    let source = system.source().await;
    source.batch_execute("CREATE TABLE bulk (id bigint PRIMARY KEY, filler text)").await.unwrap();
    system.apply_flow().await;
    let traffic = Traffic::start(system.source_dsn(), system.target_dsn(), 7, 200).await;
    source.execute(FILL, &[&1_i64, &10_i64]).await.unwrap();
    drop(source);
    system.row_passes().await;
    for round in 0..rounds(3) {
        full_log(&mut system, &traffic, base(round)).await;
        too_large(&mut system, base(round)).await;
        fast_shutdown(&mut system, base(round)).await;
    }
    system.all_is_equal(traffic).await;
    let tables = ["public.bulk"];
    let comparison = wallaby_loadtest::compare(&system.source_dsn(), &system.target_dsn(), &tables).await.unwrap();
    assert!(comparison.is_equal(), "{comparison}");
}

/// The sink is blocked, because somebody holds its table, for as long as it takes to fill the log, and then for a while.
async fn full_log(system: &mut System, traffic: &Traffic, base: i64) {
    const WAITS: &str = "wallaby_log_full_wait_seconds_count";
    let source = system.source().await;
    let owner = system.owner(&system.capture()).await;
    let waited = system.worker(&owner).metric(WAITS, &[]).await.unwrap();
    let mut blocker = system.target().await;
    let lock = blocker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE bulk IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let at = Instant::now();
    for n in 1..=20_i64 {
        source.execute(FILL, &[&(base + n * 2000), &(base + n * 2000 + 1799)]).await.unwrap();
    }
    let full = system
        .until_status(&system.capture(), "capture waits for room in the log", |status| {
            status.phase == TaskPhase::Backpressured && status.waiting_for.is_some()
        })
        .await;
    println!("the log is full after {:.1} s: {:?}", at.elapsed().as_secs_f64(), full.waiting_for);
    // The wish for a replay window went first, and it is said.
    let is_said = |condition: &&Condition| {
        condition.kind == ConditionType::LogHealthy && condition.reason == "ReplayWindowShortened"
    };
    let status = system
        .until_status(&system.capture(), "the log's shorter replay window is said", |status| {
            status.conditions.iter().any(|condition| is_said(&condition))
        })
        .await;
    let shortened = status.conditions.iter().find(is_said).unwrap();
    assert_eq!(shortened.status, ConditionStatus::False);
    assert!(shortened.message.contains("not for the 3600 s"), "{}", shortened.message);
    let blocked_for = Duration::from_secs(if is_full_size() { 60 } else { 10 });
    tokio::time::sleep(blocked_for.saturating_sub(at.elapsed())).await;
    lock.rollback().await.unwrap();
    let at = Instant::now();
    system.recovers("the sink was blocked and the log full", at, traffic).await;
    let waits = system.worker(&owner).metric(WAITS, &[]).await.unwrap();
    assert!(waits > waited, "the capture did not wait for room in the log");
    assert_eq!(system.owner(&system.capture()).await, owner, "a full log is no reason to move the task");
}

/// A transaction above the bound goes through the side store and arrives whole.
async fn too_large(system: &mut System, base: i64) {
    let source = system.source().await;
    source.execute(FILL, &[&(base + 1_000_000), &(base + 1_006_000)]).await.unwrap();
    let at = Instant::now();
    system.row_passes().await;
    println!("a row behind a large transaction passes after {:.1} s", at.elapsed().as_secs_f64());
    let sql = "SELECT count(*) FROM bulk WHERE id BETWEEN $1 AND $1 + 6000";
    let seen = system.target().await.query_one(sql, &[&(base + 1_000_000)]).await.unwrap();
    assert_eq!(seen.get::<_, i64>(0), 6001);
}

/// The log's servers stand still, so the flush lags; Postgres is shut down fast and must not wait for us (hazard 15).
async fn fast_shutdown(system: &mut System, base: i64) {
    for node in system.nats.nodes() {
        node.pause().await.unwrap();
    }
    let source = system.source().await;
    source.execute(FILL, &[&(base + 2_000_000), &(base + 2_001_000)]).await.unwrap();
    let sql = "SELECT pg_current_wal_lsn() > confirmed_flush_lsn FROM pg_replication_slots WHERE active";
    let lags: bool = source.query_one(sql, &[]).await.unwrap().get(0);
    assert!(lags, "the flush does not lag: nothing is shown");
    drop(source);
    let at = Instant::now();
    system.postgres.stop(Shutdown::Fast).await.unwrap();
    let took = at.elapsed();
    println!("h15: fast shutdown with a lagging flush took {:.1} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(10), "the shutdown of Postgres waited for us: {took:?}");
    for node in system.nats.nodes() {
        node.resume().unwrap();
    }
    system.postgres.start_again().await.unwrap();
    let at = Instant::now();
    system.row_passes().await;
    println!("Postgres is back: rows pass after {:.1} s", at.elapsed().as_secs_f64());
}
