//! Tables that are rewritten while a run reads them, from end to end (hazard 1).

use std::collections::BTreeSet;
use std::sync::Arc;

use wallaby_model::run::RunState;
use wallaby_model::{ChunkId, RunId};

use crate::runs::ask;
use crate::scene::*;
use crate::{ALL, fill, fill_dense};

/// Two of six chunks are read, the table is rewritten, and the others are offered at once: whatever they read under the old snapshot is
/// void, and the table starts again; also at the sink, whose table may be of the old shape.
async fn rewritten(name: &str, rewrite: &str) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    // Rows move when the table is rewritten: half of each page is free, and the index has another order.
    let holes = "CREATE INDEX t_back ON t (id DESC); DELETE FROM t WHERE id % 2 = 0";
    scene.source.batch_execute(holes).await.unwrap();
    scene.offer_chunks(2);
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.chunks_read(1, 2).await;
    let plan = scene.plan(1).await.unwrap();
    assert!(plan.relations[0].chunks() >= 5, "{} chunks", plan.relations[0].chunks());
    scene.source.batch_execute("UPDATE t SET n = n - 1 WHERE id % 501 = 0").await.unwrap();
    scene.source.batch_execute(rewrite).await.unwrap();
    scene.offer_chunks(u32::MAX);
    scene
        .until("the table starts again", async || match scene.plan(1).await?.relations[0].restart {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        })
        .await;
    let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.unwrap();
    let before: BTreeSet<ChunkId> = read.into_keys().filter(|chunk| chunk.restart == 0).collect();
    let chunk = |number| ChunkId { table: 0, restart: 0, number };
    assert_eq!(before, BTreeSet::from([chunk(0), chunk(1)]), "a chunk was read of the rewritten table");
    let after = "INSERT INTO t (id, pad) VALUES (30000, 'new'); DELETE FROM t WHERE id % 701 = 0";
    scene.source.batch_execute(after).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    scene.equal("SELECT attname || ' ' || atttypid::regtype FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0 ORDER BY 1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_vacuum_full_moves_rows_past_what_was_read() {
    rewritten("vacuum", "VACUUM FULL t").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_cluster_turns_the_rows_round() {
    rewritten("cluster", "CLUSTER t USING t_back").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_another_type_reads_as_empty_under_the_snapshot() {
    rewritten("retyped", "ALTER TABLE t ALTER n TYPE bigint").await;
}

/// A column comes while a table is read: some chunks do not have it, the log has it later than the first chunk that does, and rows that
/// are older than the column have its default, which no change says.
async fn widened(name: &str, is_live: bool) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    scene.offer_chunks(if is_live { u32::MAX } else { 2 });
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    let run = if is_live {
        scene.run_is(1, RunState::Done).await;
        scene.offer_chunks(2);
        ask(&scene, &[]).await;
        2
    } else {
        1
    };
    scene.chunks_read(run, 2).await;
    let chunks = scene.plan(run).await.unwrap().relations[0].chunks();
    assert!(chunks >= 5, "{chunks} chunks");
    scene.source.batch_execute("UPDATE t SET n = n - 1 WHERE id % 501 = 0").await.unwrap();
    let add = "ALTER TABLE t ADD late int DEFAULT 7, ADD bare text, ADD note text DEFAULT 'it''s'";
    scene.source.batch_execute(add).await.unwrap();
    let after = "UPDATE t SET n = n - 1, late = 8 WHERE id % 503 = 0; INSERT INTO t (id, pad) VALUES (30000, 'new')";
    scene.source.batch_execute(after).await.unwrap();
    scene.offer_chunks(u32::MAX);
    scene.run_is(run, RunState::Done).await;
    scene.equal("SELECT (id, n, pad, late, bare, note)::text FROM t ORDER BY id").await;
    let extra = "SELECT count(*)::text FROM t WHERE late = 7 AND note = 'it''s' AND bare IS NULL";
    scene.equal(extra).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_is_added_in_the_middle_of_a_first_load() {
    widened("widened", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_is_added_in_the_middle_of_a_repair() {
    widened("widened_live", true).await;
}

/// What was read before a table started again makes room in a side store that has none for all of it: nobody wants it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_table_that_is_rewritten_again_and_again_is_loaded_in_the_end() {
    let scene = Arc::new(Scene::new("again").await);
    fill_dense(&scene, 60_000).await;
    scene.offer_chunks(2);
    scene.offer_loads(false);
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    for restart in 0..4 {
        scene
            .until("two chunks are read", async || {
                let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await;
                let read = read.map_err(|error| error.to_string())?;
                match read.keys().filter(|chunk| chunk.restart == restart).count() {
                    2 => Ok(()),
                    read => Err(format!("{read} of start {restart}")),
                }
            })
            .await;
        scene.source.batch_execute("VACUUM FULL t").await.unwrap();
        scene
            .until("the table starts again", async || match scene.plan(1).await?.relations[0].restart {
                now if now > restart => Ok(()),
                _ => Err("not yet".to_owned()),
            })
            .await;
    }
    scene.offer_chunks(u32::MAX);
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}
