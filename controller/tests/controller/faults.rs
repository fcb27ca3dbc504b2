//! Servers that go away and come back. The controller never ends by itself.

use std::time::Duration;

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use wallaby_model::offer::{OFFER_CONSUMER, offer_stream};
use wallaby_testkit::{EtcdCluster, EtcdOptions, NatsCluster, NatsOptions, eventually};

use crate::setup::{PATIENCE, Place, Running, document, reason};

async fn health(running: &Running) -> ServingStatus {
    let request = HealthCheckRequest { service: String::new() };
    let answer = HealthClient::new(running.channel.clone()).check(request).await.unwrap();
    answer.into_inner().status()
}

async fn until_healthy(running: &Running, wanted: ServingStatus) {
    eventually(PATIENCE, "the health is as it should be", async || match health(running).await {
        status if status == wanted => Ok(()),
        status => Err(status),
    })
    .await;
}

#[tokio::test]
async fn etcd_goes_away_and_comes_back() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    let running = Running::ready(&place).await;
    running.create(&document("shop")).await.unwrap();
    until_healthy(&running, ServingStatus::Serving).await;

    etcd.member(0).unwrap().kill9().await.unwrap();
    let refused = running.get("shop").await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "ETCD_UNREACHABLE"));
    assert!(refused.message().contains(&place.etcd[0]), "{}", refused.message());
    until_healthy(&running, ServingStatus::NotServing).await;

    etcd.start_member(0).await.unwrap();
    eventually(PATIENCE, "flows are back", async || running.get("shop").await).await;
    until_healthy(&running, ServingStatus::Serving).await;
    // The watch behind the view goes on as well: what is new is offered.
    running.create(&document("later")).await.unwrap();
    until_offered(&nats, &place, "later.capture").await;
}

#[tokio::test]
async fn nats_goes_away_with_its_queue_and_comes_back() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    let running = Running::ready(&place).await;
    until_healthy(&running, ServingStatus::Serving).await;
    nats.kill9_all().await.unwrap();
    running.create(&document("shop")).await.unwrap();
    until_healthy(&running, ServingStatus::NotServing).await;
    nats.start_again().await.unwrap();
    until_offered(&nats, &place, "shop.capture").await;

    // Somebody removes the queue: it is made again.
    let context = jetstream(&nats).await;
    context.delete_stream(offer_stream(&place.pool)).await.unwrap();
    let _worker = place.worker("w1").await;
    until_offered(&nats, &place, "shop.capture").await;
}

#[tokio::test]
async fn a_controller_starts_before_its_servers() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    etcd.member(0).unwrap().stop().await.unwrap();
    nats.kill9_all().await.unwrap();
    let running = Running::start(&place).await;
    let refused = running.get("shop").await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "ETCD_UNREACHABLE"));
    assert!(refused.message().contains(&place.etcd[0]), "{}", refused.message());
    assert_eq!(health(&running).await, ServingStatus::NotServing);
    etcd.start_member(0).await.unwrap();
    nats.start_again().await.unwrap();
    running.until_ready().await;
    running.create(&document("shop")).await.unwrap();
    until_offered(&nats, &place, "shop.capture").await;
    until_healthy(&running, ServingStatus::Serving).await;
}

async fn jetstream(nats: &NatsCluster) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(async_nats::connect(nats.client_url()).await.unwrap())
}

/// Waits until an offer of a task lies in the queue, with its consumer beside it.
async fn until_offered(nats: &NatsCluster, place: &Place, task: &str) {
    let context = jetstream(nats).await;
    let subject = format!("wallaby.offer.{}.{task}", place.pool);
    eventually(Duration::from_secs(30), "the task is offered", async || {
        let stream = context.get_stream(offer_stream(&place.pool)).await.map_err(|error| error.to_string())?;
        stream.consumer_info(OFFER_CONSUMER).await.map_err(|error| error.to_string())?;
        stream.get_last_raw_message_by_subject(&subject).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
