//! Tables that come to a flow by themselves and go again, and sinks that come while a run is open.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Hold, Key};
use wallaby_model::flow::{ByteSize, FlowDocument, SinkSpec};
use wallaby_model::run::{RunSpec, RunState};
use wallaby_model::{RunId, SinkId};
use wallaby_testkit::{Database, PostgresOptions};

use crate::scene::*;
use crate::{ALL, WIDE, fill, fill_dense};

/// A flow of everything in `public`, whose first run is done. What comes of it is offered while the first handle lives.
async fn loaded(name: &str, more: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 100).await;
    scene.coordination.create_flow(scene.document("public.*", "initial", more)).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    (scene, offers, worker)
}

/// Makes a table, and waits until its changes are captured.
async fn make(scene: &Scene, table: &str) {
    scene.source.batch_execute(&format!("CREATE TABLE {table} (id int PRIMARY KEY, filler text)")).await.unwrap();
    published(scene, table).await;
}

async fn published(scene: &Scene, table: &str) {
    let sql = "SELECT count(*) FROM pg_publication_tables WHERE tablename = $1";
    scene
        .until("the publication has the table", async || {
            match scene.source.query_one(sql, &[&table]).await.unwrap().get::<_, i64>(0) {
                0 => Err("it has not".to_owned()),
                _ => Ok(()),
            }
        })
        .await;
}

async fn specs(scene: &Scene) -> Vec<RunSpec> {
    let runs = scene.coordination.runs(&scene.flow).await.unwrap();
    runs.into_iter().map(|run| run.spec).collect()
}

/// Its run has nothing to read: it ends, and no other one is made for the table until that has rows again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_came_and_is_dropped_before_its_run_is_planned_keeps_no_run_open() {
    let (scene, offers, _worker) = loaded("dropped", "").await;
    // The sink asks for a run by itself; nobody plans it.
    drop(offers);
    make(&scene, "u").await;
    scene.source.batch_execute("INSERT INTO u VALUES (1, 'lost')").await.unwrap();
    scene
        .until("a run is made for the table", async || match specs(&scene).await.as_slice() {
            [_, second] if second.tables == ["public.u"] => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    scene.source.batch_execute("DROP TABLE u").await.unwrap();
    let _offers = scene.offering();
    scene.run_is(2, RunState::Done).await;
    assert!(scene.plan(2).await.unwrap().relations.is_empty());

    // The next one to come has the next run; and so has one of the same name.
    for (run, table) in [(3, "v"), (4, "u")] {
        make(&scene, table).await;
        scene.source.batch_execute(&format!("INSERT INTO {table} VALUES (2, 'kept')")).await.unwrap();
        scene.run_is(run, RunState::Done).await;
        assert_eq!(specs(&scene).await.last().unwrap().tables, [format!("public.{table}")]);
        scene.equal(&format!("SELECT t::text FROM {table} t ORDER BY id")).await;
    }
    scene.equal(ALL).await;
}

/// What a sink does not read as a whole it does not overlook.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_with_one_large_transaction_is_loaded_too() {
    let (scene, _offers, _worker) = loaded("large-new", "largeTransactionBytes: 1Mi").await;
    make(&scene, "u").await;
    let large = "INSERT INTO u SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 20000) i";
    scene.source.batch_execute(large).await.unwrap();
    scene.run_is(2, RunState::Done).await;
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
}

/// It has a run of its own, and loads everything once; the run that was open when it came is over without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_comes_while_a_run_is_open_is_none_of_that_run() {
    let scene = Arc::new(Scene::new("later").await);
    fill(&scene, 20_000).await;
    let late = Database::create("late").await;
    scene.offer_loads(false);
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    // Every chunk is read, and no sink has them.
    scene.run_is(1, RunState::Loading).await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let mut document = seen.record.document.clone();
    let mut sink = document.spec.sinks[0].clone();
    sink.name = SinkId::new("late").unwrap();
    sink.postgres.dsn = wallaby_model::flow::SecretRef::Value(late.dsn());
    document.spec.sinks.push(sink.clone());
    let starts = BTreeMap::from([(sink.name.clone(), Some(scene.log_end().await.unwrap()))]);
    scene.coordination.update_flow(&seen, document, &starts).await.unwrap();
    scene.source.batch_execute("UPDATE t SET n = 1 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0").await.unwrap();
    scene
        .until("the late sink's own run is read", async || match scene.plan(2).await?.state {
            RunState::Loading => Ok(()),
            state => Err(format!("{state:?}")),
        })
        .await;
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.run_is(2, RunState::Done).await;
    for (run, sink) in [(RunId(1), &scene.sink), (RunId(2), &sink.name)] {
        let took_part = scene.coordination.sink_runs(&scene.flow, run).await.unwrap();
        assert_eq!(took_part.keys().collect::<Vec<_>>(), [sink], "run {run}");
    }
    scene.source.batch_execute("INSERT INTO t (id, pad) VALUES (30000, 'new')").await.unwrap();
    scene.equal(ALL).await;
    scene
        .until("the late sink has what the source has", async || {
            let (source, there) = (rows(&scene.source, ALL).await?, rows(&late, ALL).await?);
            if source == there { Ok(()) } else { Err(format!("{} of {} rows", there.len(), source.len())) }
        })
        .await;
}

/// Its note of chunks that it has is of another database, and of an earlier life of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_comes_back_elsewhere_while_a_run_is_open_is_loaded_whole() {
    let scene = Arc::new(Scene::new("back").await);
    fill(&scene, 20_000).await;
    let (here, there) = (Database::create("here").await, Database::create("there").await);
    scene.offer_chunks(1);
    let mut both = scene.in_chunks("initial");
    let mut other = both.spec.sinks[0].clone();
    other.name = SinkId::new("other").unwrap();
    other.postgres.dsn = wallaby_model::flow::SecretRef::Value(here.dsn());
    both.spec.sinks.push(other.clone());
    scene.coordination.create_flow(both.clone()).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene
        .until("the other sink has a chunk", async || {
            let loaded = scene.coordination.run_loaded(&scene.flow, RunId(1), &other.name).await;
            let loaded = loaded.map_err(|error| error.to_string())?;
            if loaded.is_empty() { Err("none".to_owned()) } else { Ok(()) }
        })
        .await;
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let seen = scene.coordination.update_flow(&seen, scene.in_chunks("initial"), &BTreeMap::new()).await.unwrap();
    other.postgres.dsn = wallaby_model::flow::SecretRef::Value(there.dsn());
    both.spec.sinks[1] = other.clone();
    let starts = BTreeMap::from([(other.name, Some(scene.log_end().await.unwrap()))]);
    scene.coordination.update_flow(&seen, both, &starts).await.unwrap();
    scene.offer_chunks(u32::MAX);
    scene.run_is(1, RunState::Done).await;
    scene.run_is(2, RunState::Done).await;
    scene.source.batch_execute("DELETE FROM t WHERE id % 5 = 0").await.unwrap();
    scene.equal(ALL).await;
    scene
        .until("the other sink has what the source has", async || {
            let (source, there) = (rows(&scene.source, ALL).await?, rows(&there, ALL).await?);
            if source == there { Ok(()) } else { Err(format!("{} of {} rows", there.len(), source.len())) }
        })
        .await;
}

/// It was blocked until a run was to load it anew, and then goes on where it stood: what it would read is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_sink_that_wakes_up_after_its_run_was_made_is_loaded_anew() {
    let target = cluster(PostgresOptions::default()).await;
    let (source, target) = tokio::join!(Database::create("source"), Database::create_on(target, "target"));
    let scene = Arc::new(Scene::with("wakes", source, target).await);
    fill(&scene, 100).await;
    let mut document = scene.document("public.t", "initial", "");
    document.spec.log.max_bytes = ByteSize(32 << 20);
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker_narrow("w1");
    scene.run_is(1, RunState::Done).await;
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    // Values that do not shrink, one transaction after the other: more than the sink reads ahead, and some that the log has no room for.
    for from in (1000..120_000).step_by(2000) {
        let rows = format!(
            "INSERT INTO t SELECT i, 0, (SELECT string_agg(md5(i::text || '/' || j), '') FROM generate_series(1, 9) j)
             FROM generate_series({from}, {from} + 1999) i"
        );
        scene.source.batch_execute(&rows).await.unwrap();
        let end = scene.wal_end().await;
        if scene.staged_or_full(end).await {
            break;
        }
    }
    // More than the log can hold before it comes to the snapshot of the run that is made now.
    for from in (200_000..260_000).step_by(5000) {
        let rows = format!(
            "INSERT INTO t SELECT i, 0, repeat(md5(i::text), 10) FROM generate_series({from}, {from} + 4999) i"
        );
        scene.source.batch_execute(&rows).await.unwrap();
    }
    scene
        .until("the sink is cut off", async || {
            let detached = scene.coordination.detached(&scene.flow, &scene.sink).await;
            detached.map_err(|error| error.to_string())?.map(|_| ()).ok_or_else(|| "it is not".to_owned())
        })
        .await;
    // What the controller does ten seconds later.
    scene
        .until("it has a run", async || {
            let seen = scene.coordination.flow(&scene.flow).await.map_err(|error| error.to_string())?;
            let start = Some(scene.log_end().await?);
            let made = scene.coordination.reattach_sink(&seen, &scene.sink, start).await;
            made.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.run_is(2, RunState::Done).await;
    scene.equal("SELECT count(*) || '/' || sum(hashtext(t::text)) FROM t").await;
}

/// Each batch takes longer than the pauses between what is done beside them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_slow_sink_with_a_backlog_moves_its_hold() {
    let scene = Arc::new(Scene::new("slow").await);
    fill(&scene, 100).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let first = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    first.end().await;
    let slow =
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1.1); RETURN NULL; END';
        CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION slow()";
    scene.target.batch_execute(slow).await.unwrap();
    let key = Key::FlowHold(scene.flow.clone(), (&scene.sink).into());
    let hold = async || scene.coordination.get(&key).await.unwrap().unwrap().decode::<Hold>().unwrap().position;
    let before = hold().await;
    // A batch each, and several of them in the memory for what is read ahead: the sink is always busy.
    for from in (1000..480_000).step_by(60_000) {
        let rows = format!("INSERT INTO t (id) SELECT i FROM generate_series({from}, {from} + 59999) i");
        scene.source.batch_execute(&rows).await.unwrap();
    }
    let all = "SELECT count(*)::text FROM t";
    let wanted = rows(&scene.source, all).await.unwrap();
    let _second = scene.worker("w2");
    scene
        .until("the hold moves while there is a backlog", async || {
            let (now, there) = (hold().await, rows(&scene.target, all).await?);
            assert!(now > before || there != wanted, "everything is applied, and the hold stands where it stood");
            if now > before && there != wanted { Ok(()) } else { Err(format!("{now:?}, {there:?} of {wanted:?}")) }
        })
        .await;
}

/// A sink beside the first one, at which nobody listens.
fn dead_sink(document: &FlowDocument) -> SinkSpec {
    let mut dead = document.spec.sinks[0].clone();
    dead.name = SinkId::new("dead").unwrap();
    let nowhere = "postgres://nobody@127.0.0.1:1/nothing?sslmode=disable&connect_timeout=2";
    dead.postgres.dsn = wallaby_model::flow::SecretRef::Value(nowhere.to_owned());
    dead
}

/// Its chunks are kept in the side store, which is smaller than the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_dead_sink_whose_chunks_fill_the_side_store_is_cut_off_alone() {
    let scene = Arc::new(Scene::new("keeper").await);
    fill_dense(&scene, 60_000).await;
    let mut both = scene.in_chunks("initial");
    let dead = dead_sink(&both);
    both.spec.sinks.push(dead.clone());
    scene.coordination.create_flow(both).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.impatient_worker("w1");
    scene.run_is(1, RunState::Done).await;
    let detached = scene.coordination.detached(&scene.flow, &dead.name).await.unwrap();
    let reason = detached.map(|detached| detached.reason);
    assert!(reason.as_ref().is_some_and(|reason| reason.contains("side store")), "{reason:?}");
    scene.source.batch_execute("DELETE FROM t WHERE id % 5 = 0").await.unwrap();
    scene.equal(ALL).await;
}

/// Its mark at the sink is of a run that brought nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_dropped_while_it_was_loaded_and_is_made_again_is_loaded_again() {
    let scene = Arc::new(Scene::new("again").await);
    fill(&scene, 20_000).await;
    scene.source.batch_execute("CREATE TABLE other (id int PRIMARY KEY)").await.unwrap();
    scene.offer_chunks(1);
    let mut document = scene.in_chunks("initial");
    document.spec.source.postgres.publication.tables = vec!["public.*".to_owned()];
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.chunks_read(1, 2).await;
    scene
        .until("the table is begun at the sink", async || {
            let sinks = scene.coordination.sink_runs(&scene.flow, RunId(1)).await.map_err(|error| error.to_string())?;
            let tables = sinks.get(&scene.sink).map(|state| state.tables.clone()).unwrap_or_default();
            if tables.contains_key("public.t") { Ok(()) } else { Err(format!("{tables:?}")) }
        })
        .await;
    scene.source.batch_execute("DROP TABLE t").await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.offer_chunks(u32::MAX);
    scene.source.batch_execute(WIDE).await.unwrap();
    published(&scene, "t").await;
    scene.source.batch_execute("INSERT INTO t (id, pad) SELECT i, 'anew' FROM generate_series(1, 10) i").await.unwrap();
    scene.equal(ALL).await;
    scene.source.batch_execute("UPDATE t SET n = 7 WHERE id = 3").await.unwrap();
    scene.equal(ALL).await;
}

/// One sink has all of the first load, the other may never have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_waits_for_no_sink_that_is_dead() {
    let scene = Arc::new(Scene::new("dead").await);
    fill(&scene, 100).await;
    let mut both = scene.document("public.*", "initial", "");
    both.spec.sinks.push(dead_sink(&both));
    scene.coordination.create_flow(both).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Loading).await;
    scene.equal(ALL).await;
    make(&scene, "late").await;
    scene.source.batch_execute("INSERT INTO late SELECT generate_series(1, 10)").await.unwrap();
    scene.equal("SELECT id::text FROM late ORDER BY id").await;
    assert_eq!(scene.plan(1).await.unwrap().state, RunState::Loading, "the other sink is not done");
}
