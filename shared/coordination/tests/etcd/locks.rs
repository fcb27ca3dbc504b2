//! Taking, guarding, losing and releasing tasks.

use std::collections::BTreeMap;
use std::time::Instant;

use wallaby_coordination::{Acquired, Change, Checkpoint, Error, Key, Mark, Revision, WatchEvent};
use wallaby_model::condition::{TaskPhase, TaskStatus};
use wallaby_model::{Epoch, TaskId};
use wallaby_testkit::eventually;

use crate::setup::*;

fn mark(lsn: u64) -> Mark {
    Mark { position: at(lsn), stream: Some("LOG_shop".to_owned()), seq_hint: Some(7) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_workers_one_wins_each_task() {
    let (_scope, coordination) = shared("race").await;
    let mut tasks = Vec::new();
    for number in 0..30 {
        let flow = coordination.create_flow(document(&format!("f{number}"), &[])).await.unwrap();
        tasks.push((TaskId::capture(&flow.flow), flow.revision));
    }
    let mut races = tokio::task::JoinSet::new();
    for name in ["w1", "w2", "w3", "w4"] {
        let session = worker(&coordination, name, lease(10, true)).await;
        for (task, revision) in tasks.clone() {
            let session = session.clone();
            races.spawn(async move { (task.clone(), session.acquire(&task, revision).await.unwrap()) });
        }
    }
    let mut winners = BTreeMap::new();
    let mut held = 0;
    for (task, outcome) in races.join_all().await {
        match outcome {
            Acquired::Lock(lock) => assert!(winners.insert(task, lock).is_none(), "two owners"),
            Acquired::Held(holder) => {
                held += 1;
                assert!(holder.worker.as_str().starts_with('w'));
            }
            Acquired::SpecChanged(revision) => panic!("the specification did not change: {revision}"),
        }
    }
    assert_eq!((winners.len(), held), (30, 90));
}

#[tokio::test]
async fn an_offer_of_an_older_specification_is_not_taken() {
    let (_scope, coordination) = shared("stale").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let paused = {
        let mut document = flow.record.document.clone();
        document.spec.paused = true;
        coordination.update_flow(&flow, document, &BTreeMap::new()).await.unwrap()
    };
    let outcome = session.acquire(&task, flow.revision).await.unwrap();
    assert!(matches!(outcome, Acquired::SpecChanged(now) if now == paused.revision), "{outcome:?}");
    coordination.remove_flow(&paused).await.unwrap();
    let outcome = session.acquire(&task, paused.revision).await.unwrap();
    assert!(matches!(outcome, Acquired::SpecChanged(Revision::ABSENT)), "{outcome:?}");
}

#[tokio::test]
async fn a_dead_workers_lock_is_free_after_its_lease() {
    let (scope, coordination) = shared("dead").await;
    let (flow, task) = shop(&coordination).await;
    let doomed =
        DoomedWorker::holding(scope.endpoints(), options(scope.prefix()), task.clone(), flow.revision, 2).await;
    let session = worker(&coordination, "w2", lease(2, true)).await;
    assert!(matches!(session.acquire(&task, flow.revision).await.unwrap(), Acquired::Held(_)));
    doomed.kill();
    let killed = Instant::now();
    let _lock =
        eventually(PATIENCE, "the lock is free", async || match session.acquire(&task, flow.revision).await.unwrap() {
            Acquired::Lock(lock) => Ok(lock),
            other => Err(other),
        })
        .await;
    println!("free {:?} after the kill, TTL 2 s", killed.elapsed());
}

#[tokio::test]
async fn every_write_of_a_zombie_is_refused() {
    let (scope, coordination) = shared("zombie").await;
    let (flow, task) = shop(&coordination).await;
    // Without self-fencing, or it would not even try.
    let zombie = worker(&coordination, "zombie", lease(10, false)).await;
    let old = take(&zombie, &task, flow.revision).await;
    let old_epoch = old.fix_epoch(None).await.unwrap();
    old.put_checkpoint(mark(10)).await.unwrap();
    let lease_id = coordination.get(&Key::Worker(zombie.worker().clone())).await.unwrap().unwrap().lease;
    scope.client().lease_revoke(lease_id).await.unwrap();

    let successor = worker(&coordination, "successor", lease(10, true)).await;
    let new = take(&successor, &task, flow.revision).await;
    let new_epoch = new.fix_epoch(Some(old_epoch)).await.unwrap();
    assert!(new_epoch > old_epoch);
    assert_eq!(new.found_checkpoint().unwrap().position, Some(at(10)));
    new.put_checkpoint(mark(20)).await.unwrap();
    new.put_status(&TaskStatus { phase: TaskPhase::Streaming, ..TaskStatus::default() }).await.unwrap();

    let refused = |outcome: Result<(), Error>| assert!(matches!(outcome, Err(Error::LockLost { .. })), "{outcome:?}");
    refused(old.put_status(&TaskStatus::default()).await);
    refused(old.put_checkpoint(mark(11)).await);
    new.advance_hold(&sink_id("a"), at(30)).await.unwrap();
    refused(old.advance_hold(&sink_id("a"), at(40)).await);
    refused(old.advance_purge_point(at(11)).await.map(|_| ()));
    refused(old.release(Some(mark(11))).await);
    assert!(zombie.is_valid_now(), "the failpoint is on");
    assert!(matches!(zombie.acquire(&task, flow.revision).await, Ok(Acquired::Held(_))));

    let stored = coordination.checkpoint(&task).await.unwrap().unwrap();
    assert_eq!((stored.epoch, stored.position), (new_epoch, Some(at(20))));
    let status = coordination.get(&Key::TaskStatus(task.clone())).await.unwrap().unwrap();
    assert_eq!(status.decode::<TaskStatus>().unwrap().phase, TaskPhase::Streaming);
    assert!(new.is_valid_now());
}

#[tokio::test]
async fn a_deleted_lock_stops_its_owner() {
    let (_scope, coordination) = shared("deleted").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    assert!(lock.is_valid_now());
    coordination.remove_flow(&flow).await.unwrap();
    tokio::time::timeout(PATIENCE, lock.lost().cancelled()).await.unwrap();
    assert!(!lock.is_valid_now() && session.is_valid_now());
    assert!(session.tasks().is_empty());
    assert!(matches!(lock.put_status(&TaskStatus::default()).await, Err(Error::LockLost { .. })));
    assert_eq!(coordination.get(&Key::TaskStatus(task)).await.unwrap(), None, "a removed flow leaves nothing behind");
}

#[tokio::test]
async fn a_release_hands_over_lock_and_checkpoint_in_one() {
    let (_scope, coordination) = shared("release").await;
    let (flow, task) = shop(&coordination).await;
    let (first, second) =
        (worker(&coordination, "w1", lease(10, true)).await, worker(&coordination, "w2", lease(10, true)).await);
    let lock = take(&first, &task, flow.revision).await;
    assert_eq!(lock.found_checkpoint(), None);
    assert!(matches!(lock.put_checkpoint(mark(1)).await, Err(Error::Refused { .. })), "no epoch, no checkpoint");
    let epoch = lock.fix_epoch(None).await.unwrap();
    assert_eq!(lock.fix_epoch(Some(Epoch(epoch.0 + 100))).await.unwrap(), epoch, "fixed once");
    let fixed = coordination.checkpoint(&task).await.unwrap().unwrap();
    assert_eq!((fixed.epoch, fixed.position), (epoch, None));

    let mut watch = coordination.watch(coordination.keys().task(&task));
    assert!(matches!(watch.next().await, Some(WatchEvent::Snapshot { .. })));
    lock.release(Some(mark(33))).await.unwrap();
    let Some(WatchEvent::Changes(changes)) = watch.next().await else { panic!("no changes") };
    let is_delete = |change: &Change| matches!(change, Change::Deleted { key: Key::TaskLock(_), .. });
    let is_checkpoint =
        |change: &Change| matches!(change, Change::Put(entry) if entry.key == Key::TaskCheckpoint(task.clone()));
    assert!(changes.iter().any(is_delete) && changes.iter().any(is_checkpoint), "{changes:?}");
    assert!(matches!(lock.release(None).await, Err(Error::LockLost { .. })), "released once");

    let next = take(&second, &task, flow.revision).await;
    let found = next.found_checkpoint().unwrap();
    assert_eq!((found.epoch, found.position), (epoch, Some(at(33))));
    let next_epoch = next.fix_epoch(None).await.unwrap();
    assert!(next_epoch > epoch);
    let fixed = coordination.checkpoint(&task).await.unwrap().unwrap();
    assert_eq!(fixed, Checkpoint { epoch: next_epoch, ..found.clone() }, "as old as its position");
}

#[tokio::test]
async fn h24_a_hung_tasks_lock_is_dropped_while_its_worker_lives() {
    let (_scope, coordination) = shared("hung").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    lock.fix_epoch(None).await.unwrap();
    lock.put_checkpoint(mark(5)).await.unwrap();
    // The watchdog's clone; the hung loop keeps its own.
    let watchdog = lock.clone();
    watchdog.release(None).await.unwrap();
    assert!(lock.lost().is_cancelled() && session.is_valid_now());
    let other = worker(&coordination, "w2", lease(10, true)).await;
    let taken = take(&other, &task, flow.revision).await;
    assert_eq!(taken.found_checkpoint().unwrap().position, Some(at(5)));
    assert!(matches!(lock.put_checkpoint(mark(6)).await, Err(Error::LockLost { .. })));
}

#[tokio::test]
async fn a_dropped_lock_and_a_dropped_attempt_leave_nothing_behind() {
    let (_scope, coordination) = shared("dropped").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let is_free = async || match coordination.get(&Key::TaskLock(task.clone())).await.unwrap() {
        None => Ok(()),
        Some(entry) => Err(entry),
    };
    let lock = take(&session, &task, flow.revision).await;
    let panicking = tokio::spawn(async move {
        let _held = lock;
        panic!("a task that panics");
    });
    assert!(panicking.await.is_err());
    eventually(PATIENCE, "the lock of the panicked task is deleted", is_free).await;

    for polls in 0..20 {
        let mut attempt = Box::pin(session.acquire(&task, flow.revision));
        for _ in 0..polls {
            if futures::poll!(attempt.as_mut()).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(attempt);
    }
    // The attempts go on in the background; in the end nobody holds the lock, and it can be taken.
    let _lock =
        eventually(PATIENCE, "the task can be taken", async || match session.acquire(&task, flow.revision).await {
            Ok(Acquired::Lock(lock)) => Ok(lock),
            other => Err(format!("{other:?}")),
        })
        .await;
}
