//! etcd restored from a backup: revisions fall, epochs and watches must not be fooled.

use std::path::Path;
use std::process::Command;

use wallaby_coordination::WatchEvent;
use wallaby_model::Epoch;
use wallaby_testkit::{EtcdCluster, EtcdOptions, Folder, eventually};

use crate::setup::*;

fn copy(from: &Path, to: &Path) {
    let _absent = std::fs::remove_dir_all(to);
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// Hazard 19, the half in etcd: after a restore lock revisions are lower than epochs that the log has seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h19_an_epoch_rises_although_etcd_was_restored_from_a_backup() {
    wallaby_testkit::log_to_test_output();
    let folder = Folder::temporary("restore").unwrap();
    let (data, backup) = (folder.path().join("data"), folder.path().join("backup"));
    let etcd =
        EtcdCluster::start(EtcdOptions { data_folders: vec![data.clone()], ..EtcdOptions::default() }).await.unwrap();
    let coordination = connect_to(&etcd).await;
    let (flow, task) = shop(&coordination).await;
    let member = etcd.member(0).unwrap();
    member.stop().await.unwrap();
    copy(&data, &backup);
    etcd.start_member(0).await.unwrap();

    // Life goes on after the backup.
    let mut watch = coordination.watch(coordination.keys().flows());
    assert!(matches!(watch.next().await, Some(WatchEvent::Snapshot { .. })));
    let mut session = worker(&coordination, "w1", lease(10, true)).await;
    let mut last = Epoch(0);
    for _ in 0..20 {
        let lock = take(&session, &task, flow.revision).await;
        last = lock.fix_epoch(Some(last)).await.unwrap();
        assert!(i64::try_from(last.0).unwrap() == lock.create_revision().0, "so far the create revision is enough");
        lock.release(None).await.unwrap();
    }
    coordination.create_flow(document("lost", &[])).await.unwrap();
    eventually(PATIENCE, "the watch saw the flow", async || match watch.next().await {
        Some(WatchEvent::Changes(_)) => Ok(()),
        other => Err(other),
    })
    .await;

    member.stop().await.unwrap();
    copy(&backup, &data);
    etcd.start_member(0).await.unwrap();

    // The watch notices that history went back: the flow made after the backup is not there any more.
    let entries = eventually(PATIENCE, "a new snapshot", async || match watch.next().await {
        Some(WatchEvent::Snapshot { entries, .. }) => Ok(entries),
        other => Err(other),
    })
    .await;
    assert!(!entries.iter().any(|entry| format!("{:?}", entry.key).contains("lost")), "{entries:?}");
    assert_eq!(entries.len(), 2, "the specification and the hold of the flow that was in the backup");
    // The session's lease is gone, too.
    tokio::time::timeout(PATIENCE, session.fence().cancelled()).await.unwrap();

    session = worker(&coordination, "w2", lease(10, true)).await;
    let flow = coordination.flow(&flow.flow).await.unwrap();
    let lock = take(&session, &task, flow.revision).await;
    assert!(lock.create_revision().0 < i64::try_from(last.0).unwrap(), "the fault landed: revisions fell");
    assert_eq!(lock.found_checkpoint(), None, "the checkpoint is as old as the backup");
    // The log still has the fence of the last owner.
    let epoch = lock.fix_epoch(Some(last)).await.unwrap();
    assert!(epoch > last, "{epoch} is not above {last}");
    assert_eq!(coordination.checkpoint(&task).await.unwrap().unwrap().epoch, epoch);
}
