//! A living flow whose file changes: tables that leave it and come back, a first load that was not wanted before; and publications that send
//! only a part of their tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use wallaby_model::flow::change::{Effect, UnderWay, flow_change};
use wallaby_model::flow::{FlowDocument, SnapshotMode};
use wallaby_model::run::{RunReason, RunState};
use wallaby_model::{Reader, RunId, TaskId};
use wallaby_staging::Shelf;

use crate::scene::*;
use crate::{ALL, fill, write_on};

const U: &str = "SELECT u::text FROM u ORDER BY id";

/// Changes the flow's file.
async fn change(scene: &Scene, change: impl FnOnce(&mut FlowDocument)) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut document = seen.record.document.clone();
    change(&mut document);
    scene.coordination.update_flow(&seen, document, &BTreeMap::new()).await.unwrap();
}

async fn exclude(scene: &Scene, tables: &[&str]) {
    let tables = tables.iter().map(|table| (*table).to_owned()).collect();
    change(scene, |document| document.spec.source.postgres.publication.exclude = tables).await;
}

async fn published(scene: &Scene, wanted: &[&str]) {
    let sql = "SELECT tablename::text FROM pg_publication_tables ORDER BY 1";
    scene
        .until(&format!("{wanted:?} are published"), async || {
            let there = rows(&scene.source, sql).await?;
            if there == wanted { Ok(()) } else { Err(format!("{there:?}")) }
        })
        .await;
}

/// Waits until a row of `t` that comes now is at the sink: by then everything before it is, or never comes.
async fn a_row_passes(scene: &Scene, id: i32) {
    scene.source.execute("INSERT INTO t (id, pad) VALUES ($1, 'passes')", &[&id]).await.unwrap();
    scene.equal(ALL).await;
}

async fn nothing_is_left_of(scene: &Scene, run: RunId) {
    scene
        .until(&format!("nothing is left of {run:?}"), async || {
            let chunks = scene.on_shelf(Shelf::Chunks).await?;
            let holds = scene.coordination.holds(&scene.flow).await.map_err(|error| error.to_string())?;
            let noted = scene.coordination.run_chunks(&scene.flow, run).await.map_err(|error| error.to_string())?;
            let is_held = holds.contains_key(&Reader::Run(run));
            if chunks.is_empty() && noted.is_empty() && !is_held {
                return Ok(());
            }
            Err(format!("in the side store {chunks:?}, held {is_held}, noted {noted:?}"))
        })
        .await;
}

/// A flow of `t` and `u`, both in chunks, of which `u` is excluded once what is offered of the run is read. Changes of `u` come no longer,
/// the run ends, and what was kept of it goes. Taken in again, it is loaded as it is then.
async fn excluded(name: &str, chunks: u32) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    scene.source.batch_execute("CREATE TABLE u (LIKE t INCLUDING ALL); INSERT INTO u SELECT * FROM t").await.unwrap();
    scene.offer_chunks(chunks);
    scene.offer_loads(false);
    let mut document = scene.in_chunks("initial");
    document.spec.source.postgres.publication.tables = vec!["public.*".to_owned()];
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene
        .until("what is offered is read", async || {
            let plan = scene.plan(1).await?;
            let wanted = plan.chunks().filter(|chunk| chunk.number < chunks).count();
            let read = scene.coordination.run_chunks(&scene.flow, RunId(1)).await.map_err(|error| error.to_string())?;
            if wanted > 0 && read.len() == wanted { Ok(()) } else { Err(format!("{} of {wanted}", read.len())) }
        })
        .await;
    assert!(!scene.on_shelf(Shelf::Chunks).await.unwrap().is_empty(), "chunks are in the side store");
    exclude(&scene, &["public.u"]).await;
    published(&scene, &["t"]).await;
    let unseen = "INSERT INTO u (id, pad) VALUES (30000, 'unseen'); UPDATE u SET pad = 'unseen' WHERE id % 3 = 0;
        DELETE FROM u WHERE id % 7 = 0; UPDATE t SET n = n + 1 WHERE id % 3 = 0";
    scene.source.batch_execute(unseen).await.unwrap();
    scene.offer_chunks(u32::MAX);
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    a_row_passes(&scene, 30_001).await;
    nothing_is_left_of(&scene, RunId(1)).await;

    // Also now that nothing is loaded.
    scene.source.batch_execute("INSERT INTO u (id, pad) VALUES (30001, 'unseen')").await.unwrap();
    a_row_passes(&scene, 30_002).await;
    let there = "SELECT count(*)::text FROM pg_class WHERE relname = 'u' AND relkind = 'r'";
    if rows(&scene.target, there).await.unwrap() == ["1"] {
        let came = "SELECT u::text FROM u WHERE pad = 'unseen'";
        assert_eq!(rows(&scene.target, came).await.unwrap(), Vec::<String>::new(), "a table that is out still arrives");
    }

    exclude(&scene, &[]).await;
    scene.run_is(2, RunState::Done).await;
    let run = scene.coordination.run(&scene.flow, RunId(2)).await.unwrap();
    assert_eq!((run.spec.reason, run.spec.tables), (RunReason::TablesAdded, vec!["public.u".to_owned()]));
    scene.equal(U).await;
    scene.source.batch_execute("DELETE FROM u WHERE id % 5 = 0").await.unwrap();
    a_row_passes(&scene, 30_003).await;
    scene.equal(U).await;
    nothing_is_left_of(&scene, RunId(2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_excluded_before_it_is_loaded_is_out_and_loaded_anew_when_it_comes_back() {
    excluded("excluded", u32::MAX).await;
}

/// What is not read yet cannot be read any more: the run must not wait for it under its snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_excluded_while_it_is_read_keeps_no_run_open() {
    excluded("half-read", 2).await;
}

/// Who reads the slot, and the sessions of the sink.
async fn sessions(scene: &Scene) -> Result<(i32, Vec<String>), String> {
    let reader =
        "SELECT active_pid FROM pg_replication_slots WHERE database = current_database() AND active_pid IS NOT NULL";
    let reader = scene.source.query_opt(reader, &[]).await.map_err(|error| error.to_string())?;
    let reader = reader.ok_or("nobody reads the slot")?.get(0);
    let apply = TaskId::apply(&scene.flow, &scene.sink).session_prefix();
    let sql = format!(
        "SELECT pid::text FROM pg_stat_activity WHERE datname = current_database() AND starts_with(application_name, '{apply}') ORDER BY 1"
    );
    match rows(&scene.target, &sql).await? {
        pids if pids.is_empty() => Err("the sink has no session".to_owned()),
        pids => Ok((reader, pids)),
    }
}

/// `snapshot: never` becomes `initial`: what `wallaby diff` shows is what happens, while rows flow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_that_loaded_nothing_loads_everything_once_its_file_says_so() {
    let scene = Arc::new(Scene::new("after-all").await);
    fill(&scene, 5000).await;
    scene.coordination.create_flow(scene.document("public.t", "never", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene
        .until("a row that is new arrives", async || {
            let new = "INSERT INTO t (id, pad) VALUES (900000, 'new') ON CONFLICT (id) DO UPDATE SET n = t.n + 1";
            scene.source.batch_execute(new).await.map_err(|error| error.to_string())?;
            match rows(&scene.target, "SELECT t::text FROM t").await?.len() {
                0 => Err("none".to_owned()),
                _ => Ok(()),
            }
        })
        .await;
    let there = rows(&scene.target, ALL).await.unwrap();
    assert_eq!(there.len(), 1, "rows that were there before are not loaded");
    let before = scene.until("both ends are open", async || sessions(&scene).await).await;

    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut after = seen.record.document.clone();
    after.spec.source.postgres.snapshot = SnapshotMode::Initial;
    let shown = flow_change(Some(&seen.record.document), &after, &UnderWay::default());
    assert!(shown.refused.is_empty(), "{shown:?}");
    let effects: Vec<_> = shown.effects.iter().map(|effect| (effect.subject.as_str(), effect.effect)).collect();
    let wanted = [("capture", Effect::Restarts), ("sink target", Effect::Restarts), ("run", Effect::Created)];
    assert_eq!(effects, wanted, "{shown:?}");
    let writing = write_on(&scene);
    scene.coordination.update_flow(&seen, after, &BTreeMap::new()).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    drop(writing);
    scene.equal(ALL).await;
    let run = scene.coordination.run(&scene.flow, RunId(1)).await.unwrap();
    assert_eq!((run.spec.reason, run.spec.tables), (RunReason::FirstLoad, vec!["public.t".to_owned()]));
    assert!(scene.coordination.run(&scene.flow, RunId(2)).await.is_err(), "one run is shown, and one is made");
    let (reader, pids) = scene.until("both ends are open", async || sessions(&scene).await).await;
    assert_ne!(reader, before.0, "the capture did not restart");
    assert!(pids.iter().all(|pid| !before.1.contains(pid)), "the sink did not restart: {pids:?}, {before:?}");
    scene.source.batch_execute("DELETE FROM t WHERE id % 5 = 0").await.unwrap();
    scene.equal(ALL).await;
}

/// What the publication of somebody else sends of a table: every second row, and not every column.
const PART: &str = "SELECT concat_ws('/', id, n, pad) FROM t WHERE id % 2 = 0 ORDER BY id";

/// A row filter and a list of columns hold for what is loaded, for what is streamed behind it, for large transactions, and for rows that
/// are read again by their key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_publication_leaves_out_is_neither_loaded_nor_streamed() {
    let scene = Arc::new(Scene::new("part").await);
    fill(&scene, 20_000).await;
    let columns =
        "ALTER TABLE t ADD secret text NOT NULL DEFAULT 'secret'; ALTER TABLE t ALTER pad SET STORAGE EXTERNAL";
    scene.source.batch_execute(columns).await.unwrap();
    let mut document = scene.in_chunks("initial");
    document.spec.source.postgres.large_transaction_bytes = wallaby_model::flow::ByteSize(1 << 20);
    let publication = document.publication_name();
    document.spec.source.postgres.publication.create = false;
    document.spec.source.postgres.publication.tables = Vec::new();
    let part = format!("CREATE PUBLICATION \"{publication}\" FOR TABLE t (pad, id, n) WHERE (id % 2 = 0)");
    scene.source.batch_execute(&part).await.unwrap();
    let writing = write_on(&scene);
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    drop(writing);
    scene.equal(PART).await;

    // Rows come into the filter and leave it; a large transaction goes beside the log.
    let moves =
        "UPDATE t SET id = id + 700001 WHERE id % 10 < 2 AND id < 20000; UPDATE t SET secret = 'told' WHERE id % 4 = 0";
    scene.source.batch_execute(moves).await.unwrap();
    scene.equal(PART).await;
    let large = "INSERT INTO t (id, pad) SELECT i, md5(i::text) || md5((-i)::text) || md5('x' || i)
        FROM generate_series(2000000, 2040000) i";
    scene.source.batch_execute(large).await.unwrap();
    scene.equal(PART).await;
    assert!(scene.shelf(Shelf::Transactions).await.last_sequence > 0, "it went through the side store");

    // The sink lost rows whose large value the stream does not repeat.
    let wide = "INSERT INTO t (id, pad) VALUES (3000000, repeat('w', 100000)), (3000001, repeat('w', 100000))";
    scene.source.batch_execute(wide).await.unwrap();
    scene.equal(PART).await;
    scene.target.batch_execute("DELETE FROM t WHERE id = 3000000").await.unwrap();
    scene.source.batch_execute("UPDATE t SET n = 7 WHERE id >= 3000000").await.unwrap();
    scene.equal(PART).await;

    let others = rows(&scene.target, "SELECT t::text FROM t WHERE id % 2 <> 0").await.unwrap();
    assert_eq!(others, Vec::<String>::new(), "rows that the filter leaves out");
    let columns = "SELECT attname::text FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY 1";
    assert_eq!(rows(&scene.target, columns).await.unwrap(), ["id", "n", "pad"], "columns that the list leaves out");
}
