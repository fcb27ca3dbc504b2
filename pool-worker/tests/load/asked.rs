//! Runs that a person asks for: of some tables, and slow ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::RunId;
use wallaby_model::run::{RunSpec, RunState};

use crate::runs::{ask, ask_for, spec};
use crate::scene::*;
use crate::{ALL, fill};

/// A flow that captures `public.t` with these rows, and `more`, and of which nothing was loaded yet.
async fn not_loaded(name: &str, rows: u32, more: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, rows).await;
    scene.source.batch_execute(more).await.unwrap();
    scene.coordination.create_flow(scene.document("public.*", "never", "")).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker("w1");
    (scene, offers, worker)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_reads_no_more_rows_a_second_than_it_may() {
    let (scene, _offers, _worker) = not_loaded("throttled", 4000, "").await;
    scene.offer_loads(false);
    ask_for(&scene, RunSpec { rows_per_second: Some(1000), readers: 1, ..spec(&scene, &[]) }).await;
    scene.run_is(1, RunState::Loading).await;
    let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.unwrap();
    assert_eq!(read.values().map(|done| done.rows).sum::<u64>(), 4000);
    let took_ms: u64 = read.values().map(|done| done.took_ms).sum();
    assert!(took_ms >= 3000, "4000 rows in {took_ms} ms: {read:?}");
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

/// With one row a second each, four readers would read four.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fewer_chunks_are_read_at_a_time_than_there_may_be_readers_when_all_would_read_too_much() {
    let tables = "CREATE TABLE u AS TABLE t; ALTER TABLE u ADD PRIMARY KEY (id);
        CREATE TABLE v AS TABLE t; ALTER TABLE v ADD PRIMARY KEY (id)";
    let (scene, _offers, _worker) = not_loaded("slow", 4, tables).await;
    scene.offer_loads(false);
    let begun = Instant::now();
    ask_for(&scene, RunSpec { rows_per_second: Some(1), readers: 4, ..spec(&scene, &[]) }).await;
    scene.run_is(1, RunState::Loading).await;
    let took = begun.elapsed();
    let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.unwrap();
    assert_eq!(read.values().map(|done| done.rows).collect::<Vec<_>>(), [4, 4, 4]);
    // Each chunk may have its last row a second early.
    assert!(took >= Duration::from_secs(9), "12 rows in {took:?}: {read:?}");
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene
        .equal("SELECT t::text FROM t UNION ALL SELECT u::text FROM u UNION ALL SELECT v::text FROM v ORDER BY 1")
        .await;
}

/// The others go on as they are: nobody empties them, and nobody reads them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_over_some_tables_touches_no_other() {
    let scene = Arc::new(Scene::new("some").await);
    fill(&scene, 100).await;
    let tables = "CREATE TABLE u AS TABLE t; ALTER TABLE u ADD PRIMARY KEY (id);
        CREATE TABLE v AS TABLE t; ALTER TABLE v ADD PRIMARY KEY (id)";
    scene.source.batch_execute(tables).await.unwrap();
    scene.coordination.create_flow(scene.document("public.*", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    // What only the sink has: it goes where a table is loaded anew, and stays where it is not.
    let only_here = ["t", "u", "v"].map(|table| format!("INSERT INTO {table} VALUES (9999, 0, 'only here')"));
    scene.target.batch_execute(&only_here.join(";")).await.unwrap();
    let (ours, left) = (rows(&scene.target, "SELECT v::text FROM v ORDER BY id").await.unwrap(), "v WHERE id = 9999");
    let relation = async || rows(&scene.target, "SELECT 'v'::regclass::oid::text").await.unwrap();
    let before = relation().await;
    ask(&scene, &["public.t", "public.u"]).await;
    scene.run_is(2, RunState::Done).await;
    let planned: Vec<String> =
        scene.plan(2).await.unwrap().relations.iter().map(|relation| relation.table.to_string()).collect();
    assert_eq!(planned, ["public.t", "public.u"]);
    for table in ["t", "u"] {
        scene.equal(&format!("SELECT {table}::text FROM {table} ORDER BY id")).await;
    }
    assert_eq!(rows(&scene.target, "SELECT v::text FROM v ORDER BY id").await.unwrap(), ours, "it was touched");
    assert_eq!(relation().await, before, "it was made again");
    let stream = ["t", "u", "v"].map(|table| format!("UPDATE {table} SET n = 7 WHERE id % 3 = 0"));
    scene.source.batch_execute(&stream.join(";")).await.unwrap();
    scene.target.batch_execute(&format!("DELETE FROM {left}")).await.unwrap();
    for table in ["t", "u", "v"] {
        scene.equal(&format!("SELECT {table}::text FROM {table} ORDER BY id")).await;
    }
}
