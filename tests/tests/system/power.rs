//! The power of every log server is cut at once while rows flow.

use std::time::{Duration, Instant};

use wallaby_testkit::{NatsOptions, SyncInterval, requires_root, skipped};
use wallaby_tests::disk::Disk;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{alone, rounds};

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
