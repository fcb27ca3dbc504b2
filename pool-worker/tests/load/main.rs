//! The first load from end to end in one process: export, chunks, loads, the stream behind them; tables that come later; and what
//! happens when somebody dies in the middle.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod asked;
mod changes;
mod comings;
mod failures;
mod halves;
mod kills;
mod large;
mod lost;
mod mended;
mod objects;
mod replaced;
mod replays;
mod rewrites;
mod runs;
mod scene;
mod timelines;
mod waits;

use std::sync::Arc;
use std::time::Duration;

use scene::*;
use tokio_util::task::AbortOnDropHandle;
use wallaby_model::Codec;
use wallaby_model::flow::Span;
use wallaby_model::run::RunState;

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

/// Rows that do not compress, about 100 bytes each.
async fn fill_dense(scene: &Scene, rows: u32) {
    scene.source.batch_execute(WIDE).await.unwrap();
    let pad = "md5(i::text) || md5((-i)::text) || md5('x' || i)";
    let insert = format!("INSERT INTO t SELECT i, 0, {pad} FROM generate_series(1, {rows}) i");
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

/// Adds `public.u` to the flow that has `public.t`.
async fn add_table(scene: &Scene) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let document = scene.document("public.t, public.u", "initial", "");
    scene.coordination.update_flow(&seen, document, &Default::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_a_table_that_is_added_under_writes_has_no_ghost_and_no_resurrected_row() {
    let scene = Arc::new(Scene::new("added").await);
    fill(&scene, 500).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let writing = write_on(&scene);
    scene.source.batch_execute("CREATE TABLE u (id int PRIMARY KEY, n int, pad text)").await.unwrap();
    scene.source.batch_execute("INSERT INTO u SELECT i, 0, 'old' FROM generate_series(1, 5000) i").await.unwrap();
    let other = Arc::clone(&scene);
    // Rows come, change and go before the publication has the table, between that and C, while it is copied, and around P.
    let churning = AbortOnDropHandle::new(tokio::spawn(async move {
        for id in 10_000.. {
            let changes = format!(
                "INSERT INTO u VALUES ({id}, 0, 'new'); DELETE FROM u WHERE id = {id} - 3; DELETE FROM u WHERE id = {id} - 10000;
                 UPDATE u SET n = n + 1 WHERE id % 101 = {id} % 101"
            );
            for change in changes.split(';') {
                other.source.batch_execute(change).await.unwrap();
            }
        }
    }));
    add_table(&scene).await;
    scene.run_is(2, RunState::Done).await;
    drop((writing, churning));
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
    scene.equal(ALL).await;
}

/// Rows that are kept out of line, more than the quota in one page of heap: said, and mended by a larger quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_never_fits_says_so() {
    let scene = Arc::new(Scene::new("fits").await);
    let sql =
        "CREATE TABLE t (id int PRIMARY KEY, n int, pad text); ALTER TABLE t ALTER COLUMN pad SET STORAGE EXTERNAL;
        INSERT INTO t SELECT i, 0, (SELECT string_agg(md5(i::text || j::text), '') FROM generate_series(1, 8000) j)
        FROM generate_series(1, 40) i";
    scene.source.batch_execute(sql).await.unwrap();
    let document = |max: &str| {
        let mut document = scene.document("public.t", "initial", "");
        let side = format!("{{ \"jetstream\": {{ \"chunksMax\": \"{max}\" }} }}");
        document.spec.log.side_store = serde_json::from_str(&side).unwrap();
        document
    };
    scene.coordination.create_flow(document("1Mi")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene
        .until("the chunk says that it is too large", async || {
            let said = scene.statuses().await;
            if said.contains("a chunk of public.t is larger than") && said.contains("chunksMax") {
                Ok(())
            } else {
                Err(said)
            }
        })
        .await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.update_flow(&seen, document("64Mi"), &Default::default()).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

/// Nobody touches the flow: the publication takes the tables in by its pattern, and the first row of each makes a run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_come_by_a_pattern_are_loaded_and_followed() {
    let scene = Arc::new(Scene::new("found").await);
    fill(&scene, 100).await;
    scene.coordination.create_flow(scene.document("public.*", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene
        .source
        .batch_execute(
            "CREATE TABLE u (id int PRIMARY KEY, n int); INSERT INTO u SELECT i, 0 FROM generate_series(1, 3000) i; \
             ALTER TABLE t RENAME TO \"t.2\"",
        )
        .await
        .unwrap();
    let sql = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'u'";
    scene
        .until("the publication has the table", async || {
            match scene.source.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) {
                0 => Err("it has not".to_owned()),
                _ => Ok(()),
            }
        })
        .await;
    let changes = "INSERT INTO u VALUES (5000, 1); DELETE FROM u WHERE id < 10; UPDATE \"t.2\" SET n = 9 WHERE id = 1";
    scene.source.batch_execute(changes).await.unwrap();
    scene.run_is(2, RunState::Done).await;
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
    scene.equal("SELECT t::text FROM \"t.2\" t ORDER BY id").await;
    scene.source.batch_execute("INSERT INTO u VALUES (5001, 1); DELETE FROM \"t.2\" WHERE id = 2").await.unwrap();
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
    scene.equal("SELECT t::text FROM \"t.2\" t ORDER BY id").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_larger_than_the_bound_comes_as_a_splice_and_is_applied_as_one() {
    let scene = Arc::new(Scene::new("large").await);
    fill(&scene, 100).await;
    let document = scene.document("public.t", "initial", "largeTransactionBytes: 1Mi");
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    let large = "INSERT INTO t SELECT i, 0, repeat('y', 500) FROM generate_series(1000, 21000) i";
    let rest = "UPDATE t SET n = 5 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0";
    scene.source.batch_execute(&format!("BEGIN; {large}; {rest}; COMMIT")).await.unwrap();
    scene.equal(ALL).await;
    let side = scene.nats.jetstream().get_stream(format!("SIDE_{}", scene.flow)).await.unwrap();
    assert!(side.get_info().await.unwrap().state.last_sequence > 0, "it went through the side store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_that_packs_nothing_says_so_in_each_record_and_ends_equal() {
    for (codec, spelt) in [(Codec::None, "none"), (Codec::Lz4, "lz4")] {
        let scene = Arc::new(Scene::new("codec").await);
        fill(&scene, 100).await;
        let mut document = scene.document("public.t", "initial", "");
        (document.spec.log.codec, document.spec.log.replay_window) = (codec, Span(Duration::from_secs(3600)));
        scene.coordination.create_flow(document).await.unwrap();
        let _offers = scene.offering();
        let _worker = scene.worker("w1");
        scene.run_is(1, RunState::Done).await;
        scene.source.batch_execute("UPDATE t SET pad = repeat('packed or not ', 100)").await.unwrap();
        scene.equal(ALL).await;
        let log = scene.nats.jetstream().get_stream(scene.flow.log_stream()).await.unwrap();
        let state = log.get_info().await.unwrap().state;
        let mut rows = 0;
        for sequence in state.first_sequence..=state.last_sequence {
            let Ok(record) = log.get_raw_message(sequence).await else { continue };
            if record.headers.get("Wallaby-Kind").is_none_or(|kind| kind.as_str() != "data") {
                continue;
            }
            assert_eq!(record.headers.get("Wallaby-Codec").map(|said| said.as_str()), Some(spelt));
            let text = String::from_utf8_lossy(&record.payload);
            rows += text.matches(&"packed or not ".repeat(100)).count();
        }
        // All of them can be read off the wire, or none.
        assert_eq!(rows, if codec == Codec::None { 100 } else { 0 });
    }
}

/// What a power cut leaves behind: the splice stands in the log, what it needs does not, and Postgres was not told of it yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_splice_whose_part_is_lost_is_sent_again_by_the_source() {
    let scene = Arc::new(Scene::new("lost").await);
    fill(&scene, 100).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "largeTransactionBytes: 1Mi")).await.unwrap();
    let _offers = scene.offering();
    let worker = scene.wary_worker("w1");
    scene.run_is(1, RunState::Done).await;
    // The sink must not have the transaction before it is broken.
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let large = "INSERT INTO t SELECT i, 0, repeat(md5(i::text), 20) FROM generate_series(1000, 21000) i";
    scene.source.batch_execute(large).await.unwrap();
    let end: String = scene.source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let end: wallaby_model::Lsn = end.parse().unwrap();
    let capture = wallaby_coordination::Key::TaskStatus(wallaby_model::TaskId::capture(&scene.flow));
    scene
        .until("the splice is staged", async || {
            let status =
                scene.coordination.get(&capture).await.map_err(|error| error.to_string())?.ok_or("no status")?;
            let status: wallaby_model::condition::TaskStatus = status.decode().map_err(|error| error.to_string())?;
            match status.progress.staged {
                Some(staged) if staged.commit >= end => Ok(()),
                other => Err(format!("{other:?} of {end}")),
            }
        })
        .await;
    drop(worker);
    let confirmed = "SELECT confirmed_flush_lsn < $1::text::pg_lsn FROM pg_replication_slots WHERE slot_name = $2";
    let slot = scene.document("public.t", "initial", "").slot_name();
    let is_open: bool = scene.source.query_one(confirmed, &[&end.to_string(), &slot]).await.unwrap().get(0);
    assert!(is_open, "Postgres was told already: it cannot send the transaction again");
    let side = scene.nats.jetstream().get_stream(format!("SIDE_{}", scene.flow)).await.unwrap();
    let (mut sequence, mut lost) = (side.get_info().await.unwrap().state.last_sequence, None);
    while lost.is_none() {
        let message = side.get_raw_message(sequence).await.unwrap();
        if message.subject.contains(".part.") {
            lost = Some(message.subject.to_string());
            side.delete_message(sequence).await.unwrap();
        }
        sequence -= 1;
    }
    println!("lost: {lost:?}");
    let _next = scene.wary_worker("w2");
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_worker_that_ends_in_the_middle_of_a_load_is_followed_by_another() {
    let scene = Arc::new(Scene::new("killed").await);
    fill(&scene, 20_000).await;
    let writing = write_on(&scene);
    scene.coordination.create_flow(scene.document("public.*", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let first = scene.worker("w1");
    scene
        .until("the run has a plan", async || {
            let run = scene.coordination.run(&scene.flow, wallaby_model::RunId(1)).await;
            run.map_err(|error| error.to_string())?.plan.map(|_| ()).ok_or_else(|| "no plan".to_owned())
        })
        .await;
    // Cut off where it stands: its lease runs out.
    drop(first);
    let _second = scene.worker("w2");
    scene.run_is(1, RunState::Done).await;
    drop(writing);
    scene.equal(ALL).await;
}
