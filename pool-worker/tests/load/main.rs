//! The first load from end to end in one process: export, chunks, loads, the stream behind them; tables that come later; and what
//! happens when somebody dies in the middle.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod scene;

use std::sync::Arc;
use std::time::Duration;

use scene::*;
use tokio_util::task::AbortOnDropHandle;
use wallaby_model::RunId;
use wallaby_model::run::RunState;
use wallaby_testkit::*;

const ALL: &str = "SELECT t::text FROM t ORDER BY id";

/// Rows of several chunks need a heap of more than 64 MiB: wide rows, stored as they are.
const WIDE: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, pad text);
    ALTER TABLE t ALTER pad SET STORAGE PLAIN;";

/// Changes rows of `t` all the time: inserts, updates, deletes, until dropped. Each round is a few transactions.
fn write_on(scene: &Arc<Scene>) -> AbortOnDropHandle<()> {
    let scene = Arc::clone(scene);
    AbortOnDropHandle::new(tokio::spawn(async move {
        for round in 0.. {
            let (at, id) = (round % 97, 1_000_000 + round);
            let changes = format!(
                "INSERT INTO t (id, pad) VALUES ({id}, 'new'), ({id} + 500000, 'short-lived');
                 UPDATE t SET n = n + 1 WHERE id % 97 = {at};
                 DELETE FROM t WHERE id = {id} + 500000;
                 DELETE FROM t WHERE id = {round} * 3"
            );
            for change in changes.split(';') {
                scene.source.batch_execute(change).await.unwrap();
            }
        }
    }))
}

async fn fill(scene: &Scene, rows: u32) {
    scene.source.batch_execute(WIDE).await.unwrap();
    let insert = format!("INSERT INTO t SELECT i, 0, repeat('x', 100) FROM generate_series(1, {rows}) i");
    scene.source.batch_execute(&insert).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_load_under_writes_ends_equal_and_the_stream_goes_on() {
    let scene = Arc::new(Scene::new("first").await);
    fill(&scene, 5000).await;
    scene.source.batch_execute("CREATE TABLE none (id int PRIMARY KEY); CREATE INDEX t_n ON t (n)").await.unwrap();
    let writing = write_on(&scene);
    scene.coordination.create_flow(scene.document("public.*", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    drop(writing);
    scene.equal(ALL).await;
    scene.source.batch_execute("INSERT INTO none VALUES (7)").await.unwrap();
    scene.equal("SELECT none::text FROM none").await;
    let index = "SELECT indexname::text FROM pg_indexes WHERE tablename = 't' ORDER BY 1";
    scene.equal(index).await;
}
