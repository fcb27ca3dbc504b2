//! Requests that are done while their answers are lost: repeated, they must neither fail nor count twice.

use std::time::Duration;

use wallaby_coordination::{Acquired, Coordination, Key, Mark, Options};
use wallaby_model::TaskId;
use wallaby_testkit::{EtcdScope, eventually};

use crate::proxy::{Proxy, Traffic};
use crate::setup::*;

/// Two ways to the same etcd: one through a proxy, one past it.
async fn two_ways(hint: &str) -> (EtcdScope<'static>, Proxy, Coordination, Coordination) {
    let (scope, direct) = shared(hint).await;
    let proxy = Proxy::before(&scope.endpoints()[0]).await;
    let quick = Options { request_timeout: Duration::from_millis(300), ..options(scope.prefix()) };
    let through = Coordination::connect(&[proxy.endpoint()], quick).await.unwrap();
    (scope, proxy, through, direct)
}

/// Lets answers through again once `is_done` says that the request was done.
async fn swallow_until(proxy: &Proxy, what: &str, is_done: impl AsyncFn() -> bool) {
    eventually(PATIENCE, what, async || if is_done().await { Ok(()) } else { Err("not yet") }).await;
    proxy.set(Traffic::Flows);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_task_whose_answer_was_lost_is_ours() {
    let (_scope, proxy, through, direct) = two_ways("lost").await;
    let (flow, task) = shop(&direct).await;
    // A long TTL: this is not about keepalives.
    let session = worker(&through, "w1", lease(60, true)).await;
    let has_lock = async || direct.get(&Key::TaskLock(task.clone())).await.unwrap().is_some();

    proxy.set(Traffic::AnswersSwallowed);
    let (taken, ()) =
        tokio::join!(session.acquire(&task, flow.revision), swallow_until(&proxy, "the lock is there", has_lock));
    let Acquired::Lock(lock) = taken.unwrap() else { panic!("our own lock counts as somebody else's") };
    let stored = direct.get(&Key::TaskLock(task.clone())).await.unwrap().unwrap();
    assert_eq!(stored.create_revision, lock.create_revision());

    let has_epoch = async || direct.checkpoint(&task).await.unwrap().is_some();
    proxy.set(Traffic::AnswersSwallowed);
    let (epoch, ()) = tokio::join!(lock.fix_epoch(None), swallow_until(&proxy, "the epoch is there", has_epoch));
    let epoch = epoch.unwrap();
    lock.put_checkpoint(Mark { position: at(1), stream: None, seq_hint: None }).await.unwrap();

    let is_released = async || direct.get(&Key::TaskLock(task.clone())).await.unwrap().is_none();
    proxy.set(Traffic::AnswersSwallowed);
    let last = Mark { position: at(2), stream: None, seq_hint: None };
    let (released, ()) = tokio::join!(lock.release(Some(last)), swallow_until(&proxy, "the lock is gone", is_released));
    released.unwrap();
    let checkpoint = direct.checkpoint(&task).await.unwrap().unwrap();
    assert_eq!((checkpoint.epoch, checkpoint.position), (epoch, Some(at(2))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_flow_whose_answer_was_lost_is_changed_once() {
    let (_scope, proxy, through, direct) = two_ways("lost").await;
    let name = flow_id("shop");
    let generation = async || direct.flow(&name).await.map_or(0, |flow| flow.record.generation);

    proxy.set(Traffic::AnswersSwallowed);
    let creating = through.create_flow(document("shop", &["a"]));
    let (created, ()) =
        tokio::join!(creating, swallow_until(&proxy, "the flow is there", async || generation().await == 1));
    let created = created.unwrap();
    assert_eq!(created, direct.flow(&name).await.unwrap());

    proxy.set(Traffic::AnswersSwallowed);
    let starts = [(sink_id("b"), None)].into();
    let updating = through.update_flow(&created, document("shop", &["a", "b"]), &starts);
    // The read of the purge point before it is a request of its own: let the pair through one by one.
    let (updated, ()) = tokio::join!(updating, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        proxy.set(Traffic::Flows);
    });
    assert_eq!(updated.unwrap(), direct.flow(&name).await.unwrap());
    assert_eq!(generation().await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mute_connection_is_replaced_before_the_lease_ends() {
    let (_scope, proxy, through, direct) = two_ways("mute").await;
    let (flow, task) = shop(&direct).await;
    let session = worker(&through, "w1", lease(9, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    // All connections that are open now stay open and mute for ever; new ones work.
    proxy.set(Traffic::AnswersSwallowed);
    let before = session.validity().deadline().unwrap();
    // Until a keepalive's answer was swallowed; they go every 3 s.
    tokio::time::sleep(Duration::from_millis(3200)).await;
    proxy.set(Traffic::Flows);
    eventually(PATIENCE, "keepalives take another connection", async || {
        let deadline = session.validity().deadline().unwrap();
        if deadline > before { Ok(()) } else { Err(session.fence_reason()) }
    })
    .await;
    assert!(lock.is_valid_now());
    lock.fix_epoch(None).await.unwrap();
    let _unused = TaskId::capture(&flow.flow);
}
