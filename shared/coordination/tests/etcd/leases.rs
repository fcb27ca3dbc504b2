//! The worker's lease under faults of etcd.

use std::time::{Duration, Instant};

use wallaby_coordination::{BootTime, Coordination, Error, FenceReason, Key, SessionOptions};
use wallaby_model::WorkerId;
use wallaby_testkit::eventually;

use crate::setup::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_etcd_makes_the_worker_fence_itself_at_its_deadline() {
    let etcd = own_etcd(1).await;
    let coordination = connect_to(&etcd).await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(3, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    etcd.member(0).unwrap().pause().await.unwrap();
    let frozen_at = BootTime::now();

    // What any task does before a write, as often as it can. Nothing was answered after the freeze.
    let limit = frozen_at.plus(Duration::from_secs(2));
    let validity = session.validity().clone();
    let sampler = tokio::task::spawn_blocking(move || {
        let mut samples = 0_u64;
        loop {
            samples += 1;
            let before = BootTime::now();
            if !validity.is_valid_now() {
                return (before, samples);
            }
            assert!(before < limit, "valid although the last keepalive was sent over 2/3 of a TTL ago");
        }
    });
    tokio::time::timeout(PATIENCE, lock.lost().cancelled()).await.unwrap();
    let fired_at = BootTime::now();
    let (invalid_at, samples) = sampler.await.unwrap();
    assert_eq!(session.fence_reason(), Some(FenceReason::Deadline));
    println!(
        "invalid {:?} after the freeze ({samples} looks), tasks told {:?} after it, deadline at most 2 s",
        frozen_at.until(invalid_at),
        frozen_at.until(fired_at)
    );
    // The tasks are told while the lease still lives at the server: it ends 3 s after the freeze at the earliest.
    assert!(fired_at < frozen_at.plus(Duration::from_secs(3)));

    etcd.member(0).unwrap().resume().unwrap();
    eventually(PATIENCE, "the lease runs out", async || {
        coordination.get(&Key::TaskLock(task.clone())).await.unwrap().map_or(Ok(()), Err)
    })
    .await;
    assert!(!session.is_valid_now(), "what is fenced stays fenced");
    assert!(matches!(session.acquire(&task, flow.revision).await, Err(Error::LeaseLost { .. })));
    assert!(matches!(session.update_info(&info()).await, Err(Error::LeaseLost { .. })));
    let again = worker(&coordination, "w1", lease(3, true)).await;
    take(&again, &task, flow.revision).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_pause_of_etcd_is_survived() {
    let etcd = own_etcd(1).await;
    let coordination = connect_to(&etcd).await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(6, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    for _ in 0..3 {
        etcd.member(0).unwrap().pause().await.unwrap();
        // The fault itself lasts this long: not a wait for something.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        etcd.member(0).unwrap().resume().unwrap();
        let before = session.validity().deadline().unwrap();
        eventually(PATIENCE, "keepalives are answered again", async || {
            let deadline = session.validity().deadline().unwrap();
            if deadline > before { Ok(()) } else { Err(session.fence_reason()) }
        })
        .await;
    }
    assert!(lock.is_valid_now());
    lock.fix_epoch(None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_etcd_is_survived() {
    let etcd = own_etcd(1).await;
    let coordination = connect_to(&etcd).await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(9, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    for _ in 0..2 {
        etcd.member(0).unwrap().kill9().await.unwrap();
        etcd.start_member(0).await.unwrap();
        let before = session.validity().deadline().unwrap();
        eventually(PATIENCE, "keepalives are answered again", async || {
            let deadline = session.validity().deadline().unwrap();
            if deadline > before { Ok(()) } else { Err(session.fence_reason()) }
        })
        .await;
    }
    assert!(lock.is_valid_now());
    lock.fix_epoch(None).await.unwrap();
    assert_eq!(coordination.locks(&flow.flow).await.unwrap()[0].create_revision, lock.create_revision());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_member_of_three_is_left_aside() {
    let etcd = own_etcd(3).await;
    let coordination = connect_to(&etcd).await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(15, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    lock.fix_epoch(None).await.unwrap();
    for frozen in 0..3 {
        etcd.member(frozen).unwrap().pause().await.unwrap();
        let before = session.validity().deadline().unwrap();
        eventually(PATIENCE, "keepalives go to another member", async || {
            let deadline = session.validity().deadline().unwrap();
            if deadline > before { Ok(()) } else { Err(session.fence_reason()) }
        })
        .await;
        lock.put_status(&Default::default()).await.unwrap();
        etcd.member(frozen).unwrap().resume().unwrap();
        eventually(PATIENCE, "the member is back", async || {
            let one = Coordination::connect(&[etcd.member(frozen).unwrap().endpoint()], options("/wallaby")).await;
            one.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
    }
    assert!(lock.is_valid_now());
}

/// Every thread of the process computes for longer than the lease lasts.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_busy_process_keeps_its_lease() {
    let (_scope, coordination) = shared("busy").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(2, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    let began = BootTime::now();
    tokio::spawn(async move {
        while BootTime::now() < began.plus(Duration::from_secs(5)) {
            std::hint::spin_loop();
        }
    })
    .await
    .unwrap();
    assert_eq!(session.fence_reason(), None);
    lock.fix_epoch(None).await.unwrap();
}

/// The tasks of its second runtime would be held by a worker that does nothing for them. Takes the 30 s after which it counts as stalled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_whose_second_runtime_stands_still_gives_its_lease_up() {
    let (_scope, coordination) = shared("stalled").await;
    let second = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let options = SessionOptions { second_runtime: Some(second.handle().clone()), ..lease(2, true) };
    let session = worker(&coordination, "w1", options).await;
    let (let_go, stands) = std::sync::mpsc::channel::<()>();
    second.spawn(async move { stands.recv() });
    let fenced = tokio::time::timeout(Duration::from_secs(120), session.fence().cancelled()).await;
    drop(let_go);
    second.shutdown_background();
    assert!(fenced.is_ok(), "it keeps the tasks for ever");
    assert_eq!(session.fence_reason(), Some(FenceReason::Stalled));
}

#[tokio::test]
async fn a_lease_that_etcd_ended_is_noticed_at_the_next_keepalive() {
    let (scope, coordination) = shared("gone").await;
    let session = worker(&coordination, "w1", lease(3, true)).await;
    let lease_id = coordination.get(&Key::Worker(session.worker().clone())).await.unwrap().unwrap().lease;
    scope.client().lease_revoke(lease_id).await.unwrap();
    let began = Instant::now();
    tokio::time::timeout(PATIENCE, session.fence().cancelled()).await.unwrap();
    assert_eq!(session.fence_reason(), Some(FenceReason::LeaseGone), "after {:?}", began.elapsed());
    assert!(!session.is_valid_now());
}

#[tokio::test]
async fn revoking_takes_everything_along_at_once() {
    let (_scope, coordination) = shared("revoke").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(30, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    coordination.request_drain(session.worker()).await.unwrap();
    assert_eq!(coordination.workers().await.unwrap().len(), 1);
    session.revoke().await.unwrap();
    assert!(lock.lost().is_cancelled() && !session.is_valid_now());
    assert_eq!(session.fence_reason(), Some(FenceReason::Revoked));
    assert!(coordination.workers().await.unwrap().is_empty());
    assert!(coordination.locks(&flow.flow).await.unwrap().is_empty());
    assert_eq!(coordination.get(&Key::WorkerDrain(session.worker().clone())).await.unwrap(), None);
    session.revoke().await.unwrap();
}

#[tokio::test]
async fn a_worker_is_asked_to_drain_and_says_so() {
    let (_scope, coordination) = shared("drain").await;
    let (asked, other) =
        (worker(&coordination, "w1", lease(10, true)).await, worker(&coordination, "w10", lease(10, true)).await);
    coordination.request_drain(other.worker()).await.unwrap();
    tokio::time::timeout(PATIENCE, other.drain_requested().cancelled()).await.unwrap();
    assert!(!asked.drain_requested().is_cancelled());
    coordination.request_drain(asked.worker()).await.unwrap();
    tokio::time::timeout(PATIENCE, asked.drain_requested().cancelled()).await.unwrap();
    asked.update_info(&wallaby_coordination::WorkerInfo { draining: true, load: 3, ..info() }).await.unwrap();
    let workers = coordination.workers().await.unwrap();
    assert!(workers[0].info.draining && workers[0].info.load == 3, "{workers:?}");
    let unknown = coordination.request_drain(&WorkerId::new("nobody").unwrap()).await;
    assert!(matches!(unknown, Err(Error::WorkerNotFound(_))));
}

#[tokio::test]
async fn an_etcd_that_is_down_is_named() {
    let lease = wallaby_testkit::PortLease::free().unwrap();
    let endpoint = format!("http://127.0.0.1:{}", lease.port());
    let quick = wallaby_coordination::Options { connect_timeout: Duration::from_secs(1), ..options("/wallaby") };
    let began = Instant::now();
    let error = Coordination::connect(std::slice::from_ref(&endpoint), quick).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::Unreachable { .. }) && error.is_transient());
    assert!(error.to_string().contains(&endpoint) && error.to_string().contains("Check that etcd runs"));
    assert!(began.elapsed() < Duration::from_secs(10));
    let none = Coordination::connect::<&str>(&[], options("/wallaby")).await;
    assert!(matches!(none, Err(Error::Settings(_))));
    let bad = Coordination::connect(&["http://not a host"], options("/wallaby")).await;
    assert!(matches!(bad, Err(Error::Settings(_))), "{bad:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_live_workers_never_share_a_name() {
    let (_scope, coordination) = shared("names").await;
    let first = worker(&coordination, "w1", lease(3, true)).await;
    let (name, options) = (WorkerId::new("w1").unwrap(), lease(3, true));
    let second = wallaby_coordination::WorkerSession::start(&coordination, name.clone(), info(), options).await;
    let Err(error) = second else { panic!("two live workers share a name") };
    assert!(error.is_transient() && error.to_string().contains("--name"), "{error}");
    first.revoke().await.unwrap();
    worker(&coordination, "w1", lease(3, true)).await;
}
