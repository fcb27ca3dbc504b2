//! The suite on JetStream, and what is said of its streams.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use wallaby_model::flow::{ByteSize, JetStreamSideSpec, LogSpec, Replicas, SideStoreSpec};
use wallaby_staging::{Quotas, Shelf, SideStore, StagingError, open_side};
use wallaby_testkit::NatsScope;

use crate::suite::{self, Place};
use crate::support::{QUOTAS, attempt, body, chunk_part, connections, flow, jetstream, made, part};
use crate::sweeping;

struct OnNats {
    url: String,
    replicas: u8,
}

impl Place for OnNats {
    async fn side(&self, quotas: Quotas) -> Arc<dyn SideStore> {
        made(jetstream(&self.url, self.replicas, &flow("side"), quotas).await).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_suite_on_one_node() {
    let scope = NatsScope::one_node("side").await;
    suite::all(&OnNats { url: scope.url(), replicas: 1 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_suite_on_three_nodes() {
    let scope = NatsScope::three_nodes("side").await;
    suite::all(&OnNats { url: scope.url(), replicas: 3 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeping_on_one_node() {
    let scope = NatsScope::one_node("sweep").await;
    sweeping::all(&OnNats { url: scope.url(), replicas: 1 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeping_on_three_nodes() {
    let scope = NatsScope::three_nodes("sweep").await;
    sweeping::all(&OnNats { url: scope.url(), replicas: 3 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_file_opens_its_side_store() {
    let scope = NatsScope::one_node("side").await;
    let flow = flow("open");
    let spec = JetStreamSideSpec { transactions_max: Some(ByteSize(32 << 20)), chunks_max: None };
    let mut log = LogSpec {
        replicas: Replicas::Auto,
        max_bytes: ByteSize(64 << 20),
        side_store: SideStoreSpec::Jetstream(spec),
        ..LogSpec::default()
    };
    let connections = connections(&scope.url()).await;
    let side = open_side(&flow, &log, &connections).unwrap();
    // Nothing is made or reserved before it is needed.
    assert_eq!(side.usage(Shelf::Transactions).await.unwrap().bytes, 0);
    assert!(scope.jetstream().get_stream(format!("SIDE_{flow}")).await.is_err());
    side.ensure(Shelf::Transactions).await.unwrap();
    assert_eq!(side.usage(Shelf::Transactions).await.unwrap().bytes_max, 32 << 20);
    side.ensure(Shelf::Chunks).await.unwrap();
    assert_eq!(side.usage(Shelf::Chunks).await.unwrap().bytes_max, 64 << 20, "as much as the log");
    for number in 0..3 {
        side.put(part(attempt(5, 1), number), body(number, 900_000)).await.unwrap();
    }
    // A smaller quota, below what is there: nothing goes, nothing more comes.
    log.side_store =
        SideStoreSpec::Jetstream(JetStreamSideSpec { transactions_max: Some(ByteSize(1 << 20)), chunks_max: None });
    let smaller = open_side(&flow, &log, &connections).unwrap();
    smaller.ensure(Shelf::Transactions).await.unwrap();
    for number in 0..3 {
        assert!(smaller.get(part(attempt(5, 1), number)).await.unwrap() == Some(body(number, 900_000)), "{number}");
    }
    assert!(smaller.put(part(attempt(5, 1), 3), body(3, 1000)).await.unwrap_err().is_side_full());
    // And a larger one again.
    side.ensure(Shelf::Transactions).await.unwrap();
    side.put(part(attempt(5, 1), 3), body(3, 1000)).await.unwrap();
    side.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_servers_cannot_give_is_said() {
    let scope = NatsScope::one_node("side").await;
    let huge = Quotas { transactions: 1 << 50, chunks: 1 << 50 };
    let side = jetstream(&scope.url(), 1, &flow("huge"), huge).await;
    let error = side.ensure(Shelf::Chunks).await.unwrap_err();
    assert!(error.is_side_full() && error.to_string().contains("lower log.sideStore.jetstream.chunksMax"), "{error}");
    // A stream of that name that forgets is no side store.
    let taken = jetstream(&scope.url(), 1, &flow("taken"), QUOTAS).await;
    let config = Config {
        name: taken.stream(Shelf::Transactions),
        subjects: vec!["taken.>".to_owned()],
        max_age: Duration::from_secs(60),
        ..Config::default()
    };
    scope.jetstream().create_stream(config).await.unwrap();
    let error = taken.ensure(Shelf::Transactions).await.unwrap_err();
    assert!(matches!(error, StagingError::NotASide { .. }), "{error}");
    taken.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holders_of_a_shelf_are_known_by_name() {
    let scope = NatsScope::three_nodes("side").await;
    let side = made(jetstream(&scope.url(), 3, &flow("holders"), QUOTAS).await).await;
    side.put(chunk_part(1, 1, 1, 0), body(1, 10)).await.unwrap();
    for shelf in Shelf::ALL {
        let mut holders = side.holders(shelf).await.unwrap();
        holders.sort();
        holders.dedup();
        assert_eq!(holders.len(), 3, "{holders:?}");
    }
    side.remove().await.unwrap();
}
