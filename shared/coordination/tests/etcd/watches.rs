//! Watches: every change, through compactions, restarts and cuts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use wallaby_coordination::{Change, Coordination, Key, Revision, Watch, WatchEvent};
use wallaby_testkit::{EtcdScope, eventually};

use crate::proxy::{Proxy, Traffic};
use crate::setup::*;

/// What a consumer of a watch knows, and how it came to know it.
#[derive(Default, Clone, Debug)]
struct Seen {
    state: BTreeMap<Key, u64>,
    snapshots: usize,
    /// Numbers that were skipped between two changes of a key without a snapshot in between.
    gaps: Vec<String>,
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

/// Follows a watch whose keys count up by one with each put.
async fn follow(mut watch: Watch, seen: Arc<Mutex<Seen>>) {
    while let Some(event) = watch.next().await {
        let mut seen = seen.lock().unwrap();
        match event {
            WatchEvent::Snapshot { entries, .. } => {
                seen.snapshots += 1;
                seen.state = entries.iter().map(|entry| (entry.key.clone(), number(&entry.value))).collect();
            }
            WatchEvent::Changes(changes) => {
                for change in changes {
                    match change {
                        Change::Put(entry) => {
                            let (now, before) = (number(&entry.value), seen.state.get(&entry.key).copied());
                            if before.is_some_and(|before| now != before + 1) {
                                seen.gaps.push(format!("{:?}: {before:?} then {now}", entry.key));
                            }
                            seen.state.insert(entry.key, now);
                        }
                        Change::Deleted { key, .. } => {
                            seen.state.remove(&key);
                        }
                    }
                }
            }
        }
    }
}

fn key_of(index: u64) -> Key {
    Key::FlowStatus(flow_id(&format!("f{index}")))
}

async fn stored(coordination: &Coordination) -> BTreeMap<Key, u64> {
    let entries = coordination.list(&coordination.keys().flows()).await.unwrap();
    entries.into_iter().map(|entry| (entry.key.clone(), number(&entry.value))).collect()
}

/// Waits until what was seen is what is stored.
async fn caught_up(coordination: &Coordination, seen: &Arc<Mutex<Seen>>) -> Seen {
    let expected = stored(coordination).await;
    eventually(PATIENCE, "the watch caught up", async || {
        let seen = seen.lock().unwrap().clone();
        if seen.state == expected { Ok(seen) } else { Err(seen) }
    })
    .await
}

/// Compacts what is behind a revision. Another test of this etcd may have done so, and more.
async fn compact(scope: &EtcdScope<'_>, revision: Revision) {
    let said = scope.client().compact(revision.0, None).await.map(drop).map_err(|error| error.to_string());
    assert!(said.is_ok() || said.as_ref().is_err_and(|error| error.contains("has been compacted")), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_change_is_lost_while_etcd_is_killed_and_paused() {
    let etcd = own_etcd(1).await;
    let coordination = connect_to(&etcd).await;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let following = tokio::spawn(follow(coordination.watch(coordination.keys().flows()), seen.clone()));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (stop, endpoints, keys) = (stop.clone(), etcd.endpoints(), coordination.keys().clone());
        async move {
            let mut round = 0_u64;
            let mut client = etcd_client::Client::connect(endpoints, None).await.unwrap();
            while !stop.load(Ordering::Relaxed) {
                for index in 0..5 {
                    // Repeated until done: a number is never left out, and writing it twice is no gap of the watch's.
                    let key = keys.text(&key_of(index));
                    loop {
                        let compare = etcd_client::Compare::value(
                            key.clone(),
                            etcd_client::CompareOp::NotEqual,
                            round.to_string(),
                        );
                        let absent =
                            etcd_client::Compare::create_revision(key.clone(), etcd_client::CompareOp::Equal, 0);
                        let when = if round == 0 { absent } else { compare };
                        let put = etcd_client::TxnOp::put(key.clone(), round.to_string(), None);
                        let txn = etcd_client::Txn::new().when(vec![when]).and_then(vec![put]);
                        match tokio::time::timeout(Duration::from_millis(500), client.txn(txn)).await {
                            Ok(Ok(_)) => break,
                            _ => tokio::time::sleep(Duration::from_millis(20)).await,
                        }
                    }
                }
                round += 1;
            }
            round
        }
    });
    for fault in 0..4 {
        let before = seen.lock().unwrap().state.get(&key_of(0)).copied();
        eventually(PATIENCE, "changes arrive", async || {
            let now = seen.lock().unwrap().state.get(&key_of(0)).copied();
            if now > before { Ok(()) } else { Err(now) }
        })
        .await;
        let member = etcd.member(0).unwrap();
        if fault % 2 == 0 {
            member.kill9().await.unwrap();
            etcd.start_member(0).await.unwrap();
        } else {
            member.pause().await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
            member.resume().unwrap();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = writer.await.unwrap();
    let seen = caught_up(&coordination, &seen).await;
    println!("{rounds} rounds, {} snapshots", seen.snapshots);
    assert!(seen.gaps.is_empty(), "{:?}", seen.gaps);
    assert_eq!(seen.snapshots, 1, "nothing was compacted, so it must go on where it was");
    following.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_behind_a_compaction_gives_a_new_snapshot() {
    let (scope, direct) = shared("compact").await;
    let proxy = Proxy::before(&scope.endpoints()[0]).await;
    let through = Coordination::connect(&[proxy.endpoint()], options(scope.prefix())).await.unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let following = tokio::spawn(follow(through.watch(through.keys().flows()), seen.clone()));
    put(&scope, &direct, 0, 1).await;
    put(&scope, &direct, 1, 1).await;
    let before = caught_up(&direct, &seen).await;
    assert!(before.snapshots == 1);

    proxy.set(Traffic::Cut);
    // Missed: a change, a deletion and a new key, all compacted away.
    for value in 2..10 {
        put(&scope, &direct, 0, value).await;
    }
    scope.client().delete(direct.keys().text(&key_of(1)), None).await.unwrap();
    put(&scope, &direct, 2, 1).await;
    let revision = direct.get(&key_of(2)).await.unwrap().unwrap().mod_revision;
    compact(&scope, revision).await;
    assert_eq!(seen.lock().unwrap().state.len(), 2, "the fault landed: nothing of it was seen");
    proxy.set(Traffic::Flows);

    let after = caught_up(&direct, &seen).await;
    assert_eq!(after.snapshots, 2);
    put(&scope, &direct, 2, 2).await;
    let last = caught_up(&direct, &seen).await;
    assert_eq!((last.snapshots, last.gaps.len()), (2, 0), "{:?}", last.gaps);
    following.abort();
}

async fn put(scope: &EtcdScope<'_>, coordination: &Coordination, index: u64, value: u64) {
    scope.client().put(coordination.keys().text(&key_of(index)), value.to_string(), None).await.unwrap();
}

/// The session's watch of its locks, too, must look again after a compaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_deleted_behind_a_compaction_is_noticed() {
    let (scope, direct) = shared("locks").await;
    let proxy = Proxy::before(&scope.endpoints()[0]).await;
    let through = Coordination::connect(&[proxy.endpoint()], options(scope.prefix())).await.unwrap();
    let (flow, task) = shop(&direct).await;
    let session = worker(&through, "w1", lease(30, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    proxy.set(Traffic::Cut);
    scope.client().delete(direct.keys().text(&Key::TaskLock(task.clone())), None).await.unwrap();
    direct.resume_flow(&flow).await.unwrap();
    let now = direct.flow(&flow.flow).await.unwrap().revision;
    compact(&scope, now).await;
    assert!(!lock.lost().is_cancelled());
    proxy.set(Traffic::Flows);
    tokio::time::timeout(PATIENCE, lock.lost().cancelled()).await.unwrap();
    assert!(session.is_valid_now());
}
