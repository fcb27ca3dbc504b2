//! The power of every log server is cut at once while rows flow, or while a large transaction is on its way through the side store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wallaby_loadtest::compare;
use wallaby_model::Lsn;
use wallaby_model::condition::TaskStatus;
use wallaby_staging::{Shelf, SideStore};
use wallaby_testkit::{NatsOptions, PostgresOptions, SyncInterval, eventually, requires_root, skipped};
use wallaby_tests::disk::Disk;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone, rounds};

use crate::bound::MIB;

/// The folder that has the shelf of large transactions.
const SIDE: &str = "SIDE_shop";

/// Every acknowledged record was on disk: none is missed afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_under_servers_that_sync_every_write_loses_nothing() {
    requires_root!("mounts loop devices");
    power_cut(SyncInterval::Always).await;
}

/// Acknowledged records are gone, and nothing of them was confirmed to Postgres: they are published again and readers trim.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_power_cut_that_takes_an_acknowledged_tail_is_made_good_from_the_source() {
    requires_root!("mounts loop devices");
    power_cut(SyncInterval::Every(Duration::from_secs(120))).await;
}

async fn power_cut(sync_interval: SyncInterval) {
    let _alone = alone().await;
    let disks: Vec<Disk> = match (0..3).map(|_| Disk::make(512)).collect() {
        Ok(disks) => disks,
        Err(why) => {
            skipped!("needs ext4 on loop devices: {why}");
            return;
        }
    };
    let store_folders = disks.iter().map(|disk| disk.path().join("store")).collect();
    let nats = NatsOptions { nodes: 3, sync_interval, store_folders, ..NatsOptions::default() };
    let (mut system, traffic) = System::start_with_traffic(Plan { nats, ..Plan::default() }, 200).await;
    for _ in 0..rounds(3) {
        system.row_passes().await;
        for disk in &disks {
            disk.sync().unwrap();
        }
        // What comes now is acknowledged, applied and, unless every write is synced, on no disk.
        system.row_passes().await;
        let at = Instant::now();
        for disk in &disks {
            disk.cut_power().unwrap();
        }
        system.nats.kill9_all().await.unwrap();
        for disk in &disks {
            disk.power_on().unwrap();
        }
        system.nats.start_again().await.unwrap();
        system.recovers(&format!("power cut under NATS, {sync_interval:?}"), at, &traffic).await;
        if sync_interval != SyncInterval::Always {
            tail_was_lost(&system).await;
        }
    }
    system.all_is_equal(traffic).await;
}

/// The cut took something that was acknowledged, or nothing is shown.
async fn tail_was_lost(system: &System) {
    let mut lost = 0.0;
    for worker in &system.workers {
        lost += worker.metric("wallaby_log_tail_lost_total", &[]).await.unwrap();
    }
    println!("acknowledged tails that were lost and published again: {lost}");
    assert!(lost >= 1.0, "the power cut took nothing that was acknowledged");
}

/// Rows of 1 KB of a large transaction, which hardly pack.
pub fn large(from: u32, to: u32) -> String {
    format!(
        "INSERT INTO ledger SELECT -1000000 - i, -1000000, 1, \
         (SELECT string_agg(md5(i::text || '/' || j), '') FROM generate_series(1, 32) j) FROM generate_series({from}, {to}) i"
    )
}

/// A system with one log server on a disk of its own, whose side store has a large transaction that is on that disk.
async fn with_side_store() -> Option<(Disk, System, Arc<dyn SideStore>)> {
    let disk = match Disk::make(512) {
        Ok(disk) => disk,
        Err(why) => {
            skipped!("needs ext4 on loop devices: {why}");
            return None;
        }
    };
    let store_folders = vec![disk.path().join("store")];
    let sync_interval = SyncInterval::Every(Duration::from_secs(120));
    let flow = FlowFile { replicas: 1, large_transaction_bytes: "1Mi".to_owned(), ..FlowFile::default() };
    let plan = Plan {
        nats: NatsOptions { sync_interval, store_folders, ..NatsOptions::default() },
        postgres: PostgresOptions::default().setting("logical_decoding_work_mem", "64kB"),
        flow,
        ..Plan::default()
    };
    let mut system = System::start(plan).await;
    system.apply_flow().await;
    system.source().await.batch_execute(&large(1, 3000)).await.unwrap();
    system.row_passes().await;
    disk.sync().unwrap();
    let side = system.side_store().await;
    Some((disk, system, side))
}

/// Waits until the side store holds more than so many bytes.
async fn holds(side: &dyn SideStore, bytes: u64) {
    eventually(PATIENCE, "parts are acknowledged", async || match side.usage(Shelf::Transactions).await {
        Ok(usage) if usage.bytes > bytes => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

/// Cuts the power and gives it back, with everything on the disk but what was put into the side store since it was synced whole.
async fn lose_parts(disk: &Disk, system: &System) {
    disk.sync_all_but(SIDE).unwrap();
    let before = disk.bytes_below(SIDE).unwrap();
    disk.cut_power().unwrap();
    system.nats.kill9_all().await.unwrap();
    disk.power_on().unwrap();
    let after = disk.bytes_below(SIDE).unwrap();
    println!("the side store had {} KiB, and has {} KiB after the power cut", before >> 10, after >> 10);
    assert!(0 < after && after + MIB < before, "the power cut took no part");
}

/// The log is whole, the source goes on sending, and more is put behind the hole than is looked at before Postgres is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_power_cut_that_takes_parts_of_a_transaction_in_progress_is_made_good_from_the_source() {
    requires_root!("mounts loop devices");
    let _alone = alone().await;
    let Some((disk, mut system, side)) = with_side_store().await else { return };
    let known = side.usage(Shelf::Transactions).await.unwrap().bytes;
    let writer = system.source().await;
    writer.batch_execute(&format!("BEGIN; {}", large(10_001, 18_000))).await.unwrap();
    holds(side.as_ref(), known + 3 * MIB).await;
    let at = Instant::now();
    lose_parts(&disk, &system).await;
    system.nats.start_again().await.unwrap();
    writer.batch_execute(&format!("{}; COMMIT", large(18_001, 40_000))).await.unwrap();
    system.row_passes().await;
    println!("rows pass again after {:.1} s", at.elapsed().as_secs_f64());
    is_whole(&system).await;
}

/// The whole machine lost its power: the next owner finds a splice in the log whose parts are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_power_cut_that_leaves_a_splice_and_takes_its_parts_is_made_good_by_the_next_owner() {
    requires_root!("mounts loop devices");
    let _alone = alone().await;
    let Some((disk, mut system, side)) = with_side_store().await else { return };
    let known = side.usage(Shelf::Transactions).await.unwrap().bytes;
    // The sink must not have the transaction before.
    let blocked = system.target().await;
    blocked.batch_execute("BEGIN; LOCK TABLE ledger IN SHARE MODE").await.unwrap();
    let source = system.source().await;
    source.batch_execute(&large(10_001, 18_000)).await.unwrap();
    let end = source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap();
    let end: Lsn = end.get::<_, String>(0).parse().unwrap();
    let is_staged = |status: &TaskStatus| status.progress.staged.is_some_and(|staged| staged.commit >= end);
    system.until_status(&system.capture(), "the splice is staged", is_staged).await;
    holds(side.as_ref(), known + 3 * MIB).await;
    for worker in system.workers.drain(..) {
        worker.kill9().await;
    }
    lose_parts(&disk, &system).await;
    system.nats.start_again().await.unwrap();
    system.start_worker("");
    blocked.batch_execute("ROLLBACK").await.unwrap();
    system.row_passes().await;
    is_whole(&system).await;
}

/// Every row is at the sink, and none is there twice.
async fn is_whole(system: &System) {
    let comparison = compare(&system.source_dsn(), &system.target_dsn(), &["public.ledger"]).await.unwrap();
    assert!(comparison.is_equal(), "{comparison}");
    let sql = "SELECT count(*), count(DISTINCT _wallaby_position) FROM ledger";
    let row = system.target().await.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1), "changes stand doubled in the ledger");
}
