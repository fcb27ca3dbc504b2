//! Offers: when they come, and that nothing blocks them.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use futures::StreamExt;
use wallaby_coordination::{Acquired, Key};
use wallaby_model::TaskId;
use wallaby_model::offer::{OFFER_CONSUMER, Offer, offer_stream, offer_subject};
use wallaby_proto::v1;
use wallaby_testkit::{Wire, eventually};

use crate::setup::{PATIENCE, Place, Running, Scopes, document, task};

/// The consumer that the controller makes for workers.
pub async fn queue(scopes: &Scopes) -> PullConsumer {
    let name = offer_stream(&scopes.place.pool);
    eventually(PATIENCE, "the queue is there", async || {
        let stream = scopes.nats.jetstream().get_stream(&name).await.map_err(|error| error.to_string())?;
        stream.get_consumer(OFFER_CONSUMER).await.map_err(|error| error.to_string())
    })
    .await
}

/// The next offer of one task, acknowledged; others on the way are acknowledged too. None when none came in time.
pub async fn offered(queue: &PullConsumer, wanted: &TaskId, patience: Duration) -> Option<Offer> {
    let deadline = tokio::time::Instant::now() + patience;
    while tokio::time::Instant::now() < deadline {
        let mut batch = queue.fetch().max_messages(1).expires(Duration::from_millis(500)).messages().await.unwrap();
        while let Some(Ok(message)) = batch.next().await {
            message.ack().await.unwrap();
            let offer = Offer::from_bytes(&message.payload).unwrap();
            if offer.task == *wanted {
                return Some(offer);
            }
        }
    }
    None
}

#[tokio::test]
async fn a_task_is_offered_until_it_has_an_owner_and_at_once_when_it_loses_it() {
    let scopes = Scopes::create("offers").await;
    let running = Running::ready(&scopes.place).await;
    let worker = scopes.place.worker("w1").await;
    running.create(&document("shop")).await.unwrap();
    let capture = task("shop.capture");
    let queue = queue(&scopes).await;
    let offer = offered(&queue, &capture, PATIENCE).await.unwrap();
    let entry = scopes.place.coordination().await.flow(&capture.flow).await.unwrap();
    assert_eq!(offer.spec_revision, entry.revision.0);
    // That offer led to no lock: there is another.
    assert!(offered(&queue, &capture, PATIENCE).await.is_some());

    let Acquired::Lock(lock) = worker.acquire(&capture, entry.revision).await.unwrap() else { panic!("not acquired") };
    // One that was on its way when the lock came may still lie there.
    offered(&queue, &capture, Duration::from_secs(1)).await;
    assert!(offered(&queue, &capture, Duration::from_secs(4)).await.is_none(), "an owned task was offered");

    let released = std::time::Instant::now();
    lock.release(None).await.unwrap();
    assert!(offered(&queue, &capture, PATIENCE).await.is_some());
    assert!(released.elapsed() < Duration::from_secs(2), "offered only after {:?}", released.elapsed());
}

#[tokio::test]
async fn a_paused_flow_is_not_offered() {
    let scopes = Scopes::create("quiet").await;
    let running = Running::ready(&scopes.place).await;
    let _worker = scopes.place.worker("w1").await;
    let mut paused = document("quiet");
    paused.spec.paused = true;
    running.create(&paused).await.unwrap();
    let queue = queue(&scopes).await;
    let capture = task("quiet.capture");
    assert!(offered(&queue, &capture, Duration::from_secs(3)).await.is_none());
    running.flows.clone().resume_flow(v1::ResumeFlowRequest { name: "flows/quiet".into() }).await.unwrap();
    assert!(offered(&queue, &capture, PATIENCE).await.is_some());
}

/// An offer was delivered as often as its consumer allows and was never acknowledged: it stays in the stream, is delivered to
/// nobody, and its subject takes no other message. The task is offered again all the same, in time.
#[tokio::test]
async fn h18_an_offer_past_its_deliveries_blocks_nothing() {
    let scopes = Scopes::create("h18").await;
    let running = Running::ready(&scopes.place).await;
    let _worker = scopes.place.worker("w1").await;
    let queue_name = offer_stream(&scopes.place.pool);
    queue(&scopes).await;
    // As a version would have made it that did not know: one delivery only.
    let stream = scopes.nats.jetstream().get_stream(&queue_name).await.unwrap();
    let once = pull::Config {
        durable_name: Some(OFFER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_millis(200),
        max_deliver: 1,
        ..pull::Config::default()
    };
    let queue = stream.create_consumer(once).await.unwrap();
    running.create(&document("stuck")).await.unwrap();

    // A worker pulls the offers and dies with them.
    let mut lost = Vec::new();
    while lost.len() < 2 {
        let mut batch = queue.fetch().max_messages(2).expires(Duration::from_secs(1)).messages().await.unwrap();
        while let Some(Ok(message)) = batch.next().await {
            lost.push(Offer::from_bytes(&message.payload).unwrap().task);
        }
    }
    let started = std::time::Instant::now();
    let capture = task("stuck.capture");
    assert!(lost.contains(&capture));
    let offer = offered(&queue, &capture, Duration::from_secs(8)).await;
    assert!(offer.is_some(), "the old offer blocks its subject");
    assert!(started.elapsed() < Duration::from_secs(6), "only its age freed the subject: {:?}", started.elapsed());
}

/// The queue's consumer lives and delivers nothing, as one on a server whose copy of the queue stands still: here the server is told to
/// pause it.
#[tokio::test]
async fn a_queue_that_delivers_nothing_gets_another_consumer() {
    let scopes = Scopes::create("silent").await;
    let running = Running::ready(&scopes.place).await;
    let _worker = scopes.place.worker("w1").await;
    queue(&scopes).await;
    let stream = scopes.nats.jetstream().get_stream(&offer_stream(&scopes.place.pool)).await.unwrap();
    let until = stream.cached_info().created + Duration::from_secs(3600);
    assert!(stream.pause_consumer(OFFER_CONSUMER, until).await.unwrap().paused);
    let paused = stream.consumer_info(OFFER_CONSUMER).await.unwrap().created;
    running.create(&document("silent")).await.unwrap();
    let capture = task("silent.capture");
    eventually(PATIENCE, "the offer is delivered", async || {
        // As a worker: without a word from the consumer, or told that it is gone, it finds the queue again.
        let queue: PullConsumer = stream.get_consumer(OFFER_CONSUMER).await.map_err(|error| error.to_string())?;
        let batch = queue.fetch().max_messages(1).expires(Duration::from_secs(2)).messages().await;
        match batch.map_err(|error| error.to_string())?.next().await {
            Some(Ok(message)) if Offer::from_bytes(&message.payload).unwrap().task == capture => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // Now and then the controller puts the consumer's settings right, and ends the pause by that: not that is shown.
    assert!(stream.consumer_info(OFFER_CONSUMER).await.unwrap().created > paused);
}

#[tokio::test]
async fn of_two_replicas_both_serve_and_when_one_dies_the_other_offers() {
    let scopes = Scopes::create("replicas").await;
    let first = Running::ready(&scopes.place).await;
    let second = Running::ready(&scopes.place).await;
    let _worker = scopes.place.worker("w1").await;
    first.create(&document("both")).await.unwrap();
    assert_eq!(second.get("both").await.unwrap().name, "flows/both");
    let queue = queue(&scopes).await;
    let capture = task("both.capture");
    assert!(offered(&queue, &capture, PATIENCE).await.is_some());
    // Killed, not stopped: its leadership runs out by itself.
    drop(first);
    for _ in 0..3 {
        assert!(offered(&queue, &capture, PATIENCE).await.is_some());
    }
    second.get("both").await.unwrap();
}

#[tokio::test]
async fn what_only_the_controller_knows_is_written_down() {
    let scopes = Scopes::create("said").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("lonely")).await.unwrap();
    let flow = eventually(PATIENCE, "it says since when nobody takes it", async || {
        let coordination = scopes.place.coordination().await;
        let key = wallaby_coordination::Key::FlowStatus("lonely".parse().unwrap());
        let entry = coordination.get(&key).await.unwrap().ok_or("no status")?;
        let status: wallaby_coordination::FlowStatus = entry.decode().map_err(|_| "unreadable")?;
        if status.offered_since.is_empty() { Err("nothing offered") } else { Ok(status) }
    })
    .await;
    assert_eq!(flow.conditions.len(), 1);
    let shown = running.get("lonely").await.unwrap().status.unwrap();
    let capturing = shown.conditions.iter().find(|condition| condition.r#type == "Capturing").unwrap();
    assert_eq!(capturing.reason, "NoWorker");
}

/// Each write of the housekeeping takes its time at this etcd: for a minute there is always one more.
#[tokio::test]
async fn no_offer_waits_for_what_is_not_urgent() {
    let scopes = Scopes::create("busy").await;
    let etcd = Wire::slow(&scopes.place.etcd[0], Duration::from_millis(400)).await;
    let place = Place {
        etcd: vec![etcd.url().replace("nats://", "http://")],
        leader_ttl: Duration::from_secs(10),
        ..scopes.place.clone()
    };
    let _running = Running::ready(&place).await;
    let coordination = scopes.place.coordination().await;
    for number in 0..150 {
        coordination.create_flow(document(&format!("f{number:03}"))).await.unwrap();
    }
    let written = async || {
        let entries = coordination.list(&coordination.keys().flows()).await.unwrap();
        entries.iter().filter(|entry| matches!(entry.key, Key::FlowStatus(_))).count()
    };
    eventually(PATIENCE, "what is known of the flows is being written", async || match written().await {
        0 => Err("nothing"),
        _ => Ok(()),
    })
    .await;
    coordination.create_flow(document("late")).await.unwrap();
    // Looked at, and not pulled: it lies behind hundreds of others.
    let subject = offer_subject(&place.pool, &task("late.capture"));
    eventually(PATIENCE, "the task is offered", async || {
        let stream = scopes.nats.jetstream().get_stream(offer_stream(&place.pool)).await;
        let stream = stream.map_err(|error| error.to_string())?;
        stream.get_last_raw_message_by_subject(&subject).await.map_err(|error| error.to_string())
    })
    .await;
    let written = written().await;
    assert!(written < 151, "{written} are written: it was not busy");
}
