//! The kit itself: scopes that do not meet, servers that outlive runtimes, failures that say what was seen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use async_nats::jetstream::stream;
use futures::FutureExt;
use rand::Rng;
use rand::rngs::StdRng;
use wallaby_testkit::{
    Database, EtcdScope, NatsScope, Seeded, eventually, log_to_test_output, postgres, seed, server_logs, unique,
};

async fn databases(name: &str) -> i64 {
    let admin = postgres().connect("postgres").await.unwrap();
    admin.query_one("SELECT count(*) FROM pg_database WHERE datname = $1", &[&name]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_database_goes_with_its_slots_and_connections() {
    let database = Database::create("Orders & more").await;
    let other = Database::create("orders").await;
    assert_ne!(database.name(), other.name());
    let name = database.name().to_owned();
    database.batch_execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR ALL TABLES").await.unwrap();
    database.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&name]).await.unwrap();
    let second = database.connect().await;
    assert_eq!(databases(&name).await, 1);
    drop(database);
    assert_eq!(databases(&name).await, 0);
    assert!(second.simple_query("SELECT 1").await.is_err());
    let slots = other.query("SELECT 1 FROM pg_replication_slots WHERE slot_name = $1", &[&name]).await.unwrap();
    assert!(slots.is_empty());
}

/// Run twice, in two runtimes, whichever comes first.
async fn use_all_shared_servers() {
    let database = Database::create("shared").await;
    assert_eq!(database.query_one("SHOW wal_level", &[]).await.unwrap().get::<_, &str>(0), "logical");
    let etcd = EtcdScope::create("shared").await;
    let key = format!("{}key", etcd.prefix());
    etcd.client().put(key.as_str(), "1", None).await.unwrap();
    let nats = NatsScope::one_node("shared").await;
    let name = format!("{}_LOG", nats.prefix()).to_uppercase();
    let subjects = vec![format!("{}.>", nats.prefix())];
    nats.jetstream()
        .create_stream(stream::Config { name: name.clone(), subjects, ..Default::default() })
        .await
        .unwrap();
    drop(nats);
    let nats = NatsScope::one_node("shared").await;
    assert!(nats.jetstream().get_stream(&name).await.is_err(), "a scope leaves no stream behind");
    let logs = server_logs(3);
    assert!(logs.contains("postgres") && logs.contains("nats") && logs.contains("etcd"), "{logs}");
}

#[tokio::test]
async fn shared_servers_outlive_a_runtime_once() {
    use_all_shared_servers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_servers_outlive_a_runtime_twice() {
    log_to_test_output();
    use_all_shared_servers().await;
}

#[tokio::test]
async fn three_nodes_take_a_stream_with_three_replicas_at_once() {
    let nats = NatsScope::three_nodes("three").await;
    let config = stream::Config { name: format!("{}_LOG", nats.prefix()), num_replicas: 3, ..Default::default() };
    nats.jetstream().create_stream(config.clone()).await.unwrap();
    let leader = nats.cluster().leader_of_stream(&config.name).await.unwrap();
    assert!(leader < 3);
    assert_eq!(nats.url().split(',').count(), 3);
}

#[tokio::test]
async fn waiting_ends_with_the_answer_or_the_last_state() {
    let mut asked = 0;
    let question = async || {
        asked += 1;
        if asked < 3 { Err("not yet") } else { Ok(asked) }
    };
    assert_eq!(eventually(Duration::from_secs(10), "three questions", question).await, 3);

    let never = eventually(Duration::from_millis(50), "the moon", async || Err::<(), _>("it is cheese"));
    let panic = AssertUnwindSafe(never).catch_unwind().await.unwrap_err();
    let message = panic.downcast_ref::<String>().unwrap();
    let expected = ["kit.rs", "the moon", "it is cheese"];
    assert!(expected.iter().all(|part| message.contains(part)), "{message}");

    let hanging = eventually(Duration::from_millis(50), "an answer", std::future::pending::<Result<(), ()>>);
    assert!(AssertUnwindSafe(hanging).catch_unwind().await.is_err());
}

#[test]
fn randomness_repeats() {
    let draw = || StdRng::seeded().random::<[u64; 4]>();
    assert_eq!(draw(), draw());
    assert_eq!(seed(), seed());
}

#[test]
fn names_are_fit_for_every_use() {
    let name = unique("Größe/of a Thing that is much too long for a name of anything");
    assert!(
        name.len() <= 50 && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'),
        "{name}"
    );
}
