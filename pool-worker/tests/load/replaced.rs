//! Tables that are other ones than those that had their names: made again, or renamed into the place of another one. What they had before
//! is in the WAL under no such name; nor is what one had while it was not published.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::RunEntry;
use wallaby_model::TaskId;
use wallaby_model::condition::{ConditionStatus, ConditionType, Timestamp};
use wallaby_model::flow::change::tables_found;
use wallaby_model::run::{RunReason, RunSpec, RunState};
use wallaby_model::verify::{OperationResult, OperationSpec, OperationState, Verdict, VerifySpec};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};

use crate::scene::*;
use crate::{ALL, WIDE, fill};

async fn loaded(name: &str, tables: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    loaded_by(name, tables, Failpoints::default()).await
}

/// A flow of these tables whose first run, of 100 rows of `public.t`, is done; its capture knows its tables.
async fn loaded_by(name: &str, tables: &str, failpoints: Failpoints) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 100).await;
    scene.source.batch_execute("CREATE TABLE u (id int PRIMARY KEY); INSERT INTO u VALUES (1)").await.unwrap();
    scene.coordination.create_flow(scene.document(tables, "initial", "")).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker_with("w1", failpoints);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    knows(&scene).await;
    (scene, offers, worker)
}

/// Waits until the capture has noted which tables it has.
async fn knows(scene: &Scene) {
    scene
        .until("the capture has looked at its tables", async || {
            let known = scene.coordination.known_tables(&scene.flow).await.map_err(|error| error.to_string())?;
            known.filter(|known| !known.is_empty()).map(drop).ok_or_else(|| "it has not".to_owned())
        })
        .await;
}

async fn runs(scene: &Scene) -> Vec<RunEntry> {
    scene.coordination.runs(&scene.flow).await.unwrap()
}

/// Waits until what the capture says of the source is this.
async fn source_is(scene: &Scene, reason: &str, told: &str) {
    scene
        .until(&format!("the source is said to be {reason}"), async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.into_iter().find(|said| said.kind == ConditionType::SourceReady);
            match said {
                Some(said) if said.reason == reason && said.message.contains(told) => {
                    assert_eq!(said.status == ConditionStatus::True, reason == "Ready");
                    Ok(())
                }
                said => Err(format!("{said:?}")),
            }
        })
        .await;
}

/// Another table with other rows takes the name `t`; nobody changes it afterwards.
const SWAP: &str = "BEGIN; CREATE TABLE fresh (LIKE t INCLUDING ALL); INSERT INTO fresh (id, pad) SELECT i, 'fresh' FROM generate_series(50, 149) i;
    ALTER TABLE t RENAME TO t_old; ALTER TABLE fresh RENAME TO t; COMMIT";

/// The same by DROP and CREATE.
fn made_again() -> String {
    format!(
        "BEGIN; DROP TABLE t; {WIDE} INSERT INTO t (id, pad) SELECT i, 'again' FROM generate_series(50, 149) i; COMMIT"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_takes_the_name_of_another_one_is_loaded_anew() {
    let (scene, _offers, _worker) = loaded("swapped", "public.*").await;
    scene.source.batch_execute(SWAP).await.unwrap();
    // No change comes after it.
    scene.equal(ALL).await;
    let run = runs(&scene).await.into_iter().find(|run| run.spec.reason == RunReason::TablesReplaced).unwrap();
    assert_eq!(run.spec.tables, ["public.t"]);
    scene.run_is(run.run.0, RunState::Done).await;
    scene.source.batch_execute("UPDATE t SET n = 7 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0").await.unwrap();
    scene.equal(ALL).await;
    // The one that lost its name came to the publication under another one.
    scene.equal("SELECT t::text FROM t_old t ORDER BY id").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_a_list_that_is_made_again_is_published_and_loaded_again() {
    let (scene, _offers, _worker) = loaded("listed", "public.t, public.u").await;
    scene.source.batch_execute(&made_again()).await.unwrap();
    scene.equal(ALL).await;
    scene.source.batch_execute("DELETE FROM t WHERE id % 3 = 0; INSERT INTO t (id) VALUES (1000)").await.unwrap();
    scene.equal(ALL).await;
    let asked: Vec<Vec<String>> = runs(&scene).await.into_iter().map(|run| run.spec.tables).collect();
    assert_eq!(asked[1..], [["public.t".to_owned()]]);
}

/// Asks for a comparison, and what came of it.
async fn compared(scene: &Scene, tables: &[&str]) -> OperationResult {
    let flow = scene.coordination.flow(&scene.flow).await.unwrap();
    let tables = tables.iter().map(|table| (*table).to_owned()).collect();
    let verify = VerifySpec { sink: scene.sink.clone(), tables, show: 10, timeout_seconds: 60 };
    let asked = OperationSpec { verify, cancelled: false, created_at: Timestamp(1) };
    let number = scene.coordination.create_operation(&flow, asked).await.unwrap().number;
    scene
        .until("the comparison is over", async || {
            let made = scene.coordination.operation(&scene.flow, number).await.map_err(|error| error.to_string())?;
            made.filter(|made| made.is_over()).map(|made| made.result).ok_or_else(|| "it is not".to_owned())
        })
        .await
}

/// The others go on, also in a capture that begins anew; the condition names it while it is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_a_list_that_is_away_keeps_no_other_one_back() {
    let (scene, _offers, worker) = loaded("away", "public.t, public.u").await;
    const OTHER: &str = "SELECT u::text FROM u ORDER BY id";
    source_is(&scene, "Ready", "").await;
    scene.source.batch_execute("DROP TABLE t").await.unwrap();
    source_is(&scene, "TableMissing", "table public.t does not exist").await;
    scene.source.batch_execute("INSERT INTO u VALUES (2)").await.unwrap();
    scene.equal(OTHER).await;
    // Nothing is compared for equal that is not there; what is asked for is.
    let all = compared(&scene, &[]).await;
    assert_eq!(all.state, OperationState::Failed, "{all:?}");
    assert!(all.message.contains("public.t, which is not published"), "{}", all.message);
    let other = compared(&scene, &["public.u"]).await;
    assert_eq!(other.report.map(|report| report.verdict()), Some(Verdict::Equal), "{}", other.message);
    worker.end().await;
    scene.source.batch_execute("INSERT INTO u VALUES (3)").await.unwrap();
    let _worker = scene.worker("w2");
    scene.equal(OTHER).await;
    source_is(&scene, "TableMissing", "table public.t does not exist").await;
    scene.source.batch_execute(WIDE).await.unwrap();
    scene
        .source
        .batch_execute("INSERT INTO t (id, pad) SELECT i, 'again' FROM generate_series(1, 10) i")
        .await
        .unwrap();
    scene.equal(ALL).await;
    source_is(&scene, "Ready", "").await;
    assert_eq!(compared(&scene, &[]).await.report.map(|report| report.verdict()), Some(Verdict::Equal));
}

/// Nobody looks while it happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_made_again_while_nobody_captured_is_loaded_anew() {
    let (scene, _offers, worker) = loaded("unseen", "public.t, public.u").await;
    worker.end().await;
    scene.source.batch_execute(&made_again()).await.unwrap();
    let _worker = scene.worker("w2");
    scene.equal(ALL).await;
}

/// Its rows come before the run that makes the table anew at the sink, and do not fit there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_made_again_with_another_key_and_other_types_is_made_anew_at_the_sink() {
    const OTHER: &str = "SELECT t::text FROM t ORDER BY k";
    let (scene, _offers, _worker) = loaded("reshaped", "public.t, public.u").await;
    scene.target.batch_execute("GRANT SELECT, INSERT ON t TO PUBLIC").await.unwrap();
    let made = "BEGIN; DROP TABLE t; CREATE TABLE t (k uuid PRIMARY KEY, id text, n boolean, more numeric(9, 2)[]);
        INSERT INTO t SELECT md5(i::text)::uuid, 'x' || i, i % 2 = 0, ARRAY[i] FROM generate_series(1, 50) i; COMMIT;
        INSERT INTO u VALUES (2);";
    scene.source.batch_execute(made).await.unwrap();
    scene.equal(OTHER).await;
    scene
        .source
        .batch_execute("UPDATE t SET id = NULL WHERE n; DELETE FROM t WHERE id = 'x7'; INSERT INTO u VALUES (3)")
        .await
        .unwrap();
    scene.equal(OTHER).await;
    scene.equal("SELECT u::text FROM u ORDER BY id").await;
    let granted =
        "SELECT string_agg(privilege_type, ' ' ORDER BY privilege_type) FROM information_schema.table_privileges
        WHERE table_name = 't' AND grantee = 'PUBLIC'";
    let granted: String = scene.target.query_one(granted, &[]).await.unwrap().get(0);
    assert_eq!(granted, "INSERT SELECT");
    // What a person put on it is not dropped: the sink stops, and goes on once that is out of the way.
    scene.target.batch_execute("CREATE VIEW seen AS SELECT id FROM t").await.unwrap();
    let made = "BEGIN; DROP TABLE t; CREATE TABLE t (k int PRIMARY KEY, id int); INSERT INTO t VALUES (1, 1); COMMIT";
    scene.source.batch_execute(made).await.unwrap();
    scene
        .until("the sink says what does not fit", async || {
            let status = scene.status_of(&TaskId::apply(&scene.flow, &scene.sink)).await?;
            let said = status.conditions.into_iter().find(|said| said.kind == ConditionType::Delivering);
            match said {
                Some(said) if said.reason == "SinkConfiguration" => Ok(()),
                said => Err(format!("{said:?}")),
            }
        })
        .await;
    scene.target.batch_execute("DROP VIEW seen").await.unwrap();
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.resume_flow(&seen).await.unwrap();
    scene.equal(OTHER).await;
}

/// The catalog shows nothing of it afterwards: only the stream does, under whose names rows came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_had_each_others_names_for_a_moment_are_loaded_anew() {
    const SWAPPED: &str =
        "BEGIN; ALTER TABLE t RENAME TO x; ALTER TABLE v RENAME TO t; ALTER TABLE x RENAME TO v; COMMIT";
    const OTHER: &str = "SELECT v::text FROM v ORDER BY id";
    let scene = Arc::new(Scene::new("moment").await);
    fill(&scene, 100).await;
    scene.source.batch_execute("CREATE TABLE v (LIKE t INCLUDING ALL); INSERT INTO v (id) VALUES (1)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t, public.v", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    knows(&scene).await;
    // Changes before it are no reason to load anything.
    scene.source.batch_execute("UPDATE t SET n = 1; UPDATE v SET n = 1").await.unwrap();
    scene.equal(ALL).await;
    assert_eq!(runs(&scene).await.len(), 1);
    for statement in [SWAPPED, "INSERT INTO t (id) VALUES (900)", SWAPPED] {
        scene.source.batch_execute(statement).await.unwrap();
    }
    scene.equal(ALL).await;
    scene.equal(OTHER).await;
    assert_eq!(runs(&scene).await[1].spec.reason, RunReason::TablesReplaced);
    // The same while nobody captures.
    worker.end().await;
    for statement in [SWAPPED, "INSERT INTO t (id) VALUES (901); DELETE FROM v WHERE id < 50", SWAPPED] {
        scene.source.batch_execute(statement).await.unwrap();
    }
    let _worker = scene.worker("w2");
    scene.equal(ALL).await;
    scene.equal(OTHER).await;
}

/// What was changed meanwhile is in no log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_somebody_takes_out_of_the_publication_comes_back_whole() {
    let (scene, _offers, worker) = loaded("out", "public.t, public.u").await;
    let publication = scene.document("public.t", "initial", "").publication_name();
    let out = format!(
        "BEGIN; ALTER PUBLICATION \"{publication}\" DROP TABLE t; COMMIT; UPDATE t SET n = 5; DELETE FROM t WHERE id % 2 = 0"
    );
    scene.source.batch_execute(&out).await.unwrap();
    scene.equal(ALL).await;
    // Put back by hand, before anybody looks.
    let back = format!("{out}; ALTER PUBLICATION \"{publication}\" ADD TABLE t").replace("% 2", "% 7");
    for statement in back.split(';') {
        scene.source.batch_execute(statement).await.unwrap();
    }
    scene.equal(ALL).await;
    let loads = runs(&scene).await.len();
    // The same before a capture that begins anew.
    worker.end().await;
    scene.source.batch_execute(&out.replace("n = 5", "n = 6").replace("% 2", "% 3")).await.unwrap();
    let _worker = scene.worker("w2");
    scene.equal(ALL).await;
    assert_eq!(runs(&scene).await.len(), loads + 1);
}

/// It is published under its new name for a while; nobody asked for it there, and a table of that name at the sink is somebody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_renamed_out_of_a_list_is_not_loaded_under_its_new_name() {
    let (scene, _offers, _worker) = loaded("renamed", "public.t, public.u").await;
    let own = format!("{}; INSERT INTO t_old (id, pad) VALUES (1, 'own')", WIDE.replace(" t ", " t_old "));
    scene.target.batch_execute(&own).await.unwrap();
    scene.source.batch_execute(SWAP).await.unwrap();
    scene.source.batch_execute("UPDATE t_old SET n = 1; INSERT INTO t (id, pad) VALUES (900, 'new')").await.unwrap();
    scene.equal(ALL).await;
    scene
        .until("the table is published no more", async || {
            let sql = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 't_old'";
            match scene.source.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) {
                0 => Ok(()),
                _ => Err("it is".to_owned()),
            }
        })
        .await;
    scene.source.batch_execute("UPDATE t_old SET n = 2; UPDATE t SET n = 3").await.unwrap();
    scene.equal(ALL).await;
    let asked: BTreeSet<String> = runs(&scene).await.into_iter().skip(1).flat_map(|run| run.spec.tables).collect();
    assert_eq!(asked, BTreeSet::from(["public.t".to_owned()]));
    assert_eq!(rows(&scene.target, "SELECT pad FROM t_old").await.unwrap(), ["own"]);
}

/// Its rows came before the publication had it, and it is never changed again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_by_a_pattern_is_loaded_without_a_change() {
    let (scene, _offers, _worker) = loaded("still", "public.*").await;
    let made = "CREATE TABLE v AS SELECT i AS id, md5(i::text) AS pad FROM generate_series(1, 50) i; ALTER TABLE v ADD PRIMARY KEY (id)";
    scene.source.batch_execute(made).await.unwrap();
    scene.equal("SELECT v::text FROM v ORDER BY id").await;
    let added = runs(&scene).await.into_iter().map(|run| (run.spec.reason, run.spec.tables)).next_back();
    assert_eq!(added, Some((RunReason::TablesAdded, vec!["public.v".to_owned()])));
}

/// As a flow that loads nothing is told; changes of the other table flow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_that_loads_nothing_loads_no_replaced_table_either() {
    let scene = Arc::new(Scene::new("never").await);
    fill(&scene, 100).await;
    scene.target.batch_execute(WIDE).await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "never", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    knows(&scene).await;
    let before = scene.coordination.known_tables(&scene.flow).await.unwrap();
    scene.source.batch_execute(&made_again()).await.unwrap();
    scene
        .until("the capture knows the other table", async || {
            let known = scene.coordination.known_tables(&scene.flow).await.map_err(|error| error.to_string())?;
            let is_other = known != before && known.iter().flatten().all(|(_, known)| known.oid != 0);
            if is_other { Ok(()) } else { Err(format!("{known:?}")) }
        })
        .await;
    scene.source.batch_execute("INSERT INTO t (id, pad) VALUES (1000, 'new')").await.unwrap();
    scene.equal("SELECT t::text FROM t WHERE id >= 1000").await;
    assert_eq!(runs(&scene).await.len(), 0);
}

/// Somebody dies between two steps: the table is loaded all the same, at most once more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_made_again_is_loaded_whoever_dies_meanwhile() {
    for (name, point) in
        [("published", Failpoint::StopAfterTablesPublished), ("asked", Failpoint::StopBeforeTablesKnown)]
    {
        let failpoints = Failpoints::parse(point.name()).unwrap();
        let (scene, offers, worker) = loaded_by(name, "public.t, public.u", failpoints.clone()).await;
        // Nobody loads it while the worker stands there.
        drop(offers);
        scene.source.batch_execute(&made_again()).await.unwrap();
        scene.stands_at(&failpoints, point).await;
        let known = scene.coordination.known_tables(&scene.flow).await.unwrap().unwrap();
        let made = if point == Failpoint::StopBeforeTablesKnown { 2 } else { 1 };
        assert_eq!(runs(&scene).await.len(), made);
        drop(worker);
        let _offers = scene.offering();
        let _worker = scene.worker("w2");
        scene.equal(ALL).await;
        scene
            .until("the successor knows the table", async || {
                let now = scene.coordination.known_tables(&scene.flow).await.map_err(|error| error.to_string())?;
                match now {
                    Some(now) if now != known && now.values().all(|known| known.oid != 0) => Ok(()),
                    now => Err(format!("{now:?}")),
                }
            })
            .await;
        assert_eq!(runs(&scene).await.len(), 2, "{point:?}");
    }
}

/// What it had before is in no log under the name of its root; a reload of the whole root is a person's decision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_is_attached_with_rows_is_told_until_its_table_is_loaded() {
    const ROOT: &str = "SELECT r::text FROM r ORDER BY id";
    let scene = Arc::new(Scene::new("attached").await);
    let made = "CREATE TABLE r (id int PRIMARY KEY, pad text) PARTITION BY RANGE (id);
        CREATE TABLE r_0 PARTITION OF r FOR VALUES FROM (0) TO (100);
        INSERT INTO r SELECT i, 'first' FROM generate_series(0, 9) i";
    scene.source.batch_execute(made).await.unwrap();
    scene.coordination.create_flow(scene.document("public.r", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    knows(&scene).await;
    // One that is made as a partition has its rows in the log, as the root's; one that is made, attached and filled later, too.
    let made = "CREATE TABLE r_1 PARTITION OF r FOR VALUES FROM (100) TO (200); INSERT INTO r VALUES (100, 'second');
        BEGIN; CREATE TABLE r_2 (LIKE r INCLUDING ALL); ALTER TABLE r ATTACH PARTITION r_2 FOR VALUES FROM (200) TO (300); COMMIT;
        INSERT INTO r VALUES (200, 'third')";
    scene.source.batch_execute(made).await.unwrap();
    scene
        .until("the capture knows all partitions", async || {
            let known = scene.coordination.known_tables(&scene.flow).await.map_err(|error| error.to_string())?;
            let partitions = known.iter().flatten().filter_map(|(_, known)| known.partitions.clone()).next();
            if partitions.as_ref().is_some_and(|all| all.len() == 3) { Ok(()) } else { Err(format!("{partitions:?}")) }
        })
        .await;
    source_is(&scene, "Ready", "").await;
    scene.equal(ROOT).await;

    for statement in [
        "CREATE TABLE r_3 (LIKE r INCLUDING ALL); INSERT INTO r_3 VALUES (300, 'before')",
        "ALTER TABLE r ATTACH PARTITION r_3 FOR VALUES FROM (300) TO (400)",
        "INSERT INTO r VALUES (301, 'after')",
    ] {
        scene.source.batch_execute(statement).await.unwrap();
    }
    source_is(&scene, "PartitionRows", "public.r_3 was attached to public.r and has rows").await;
    source_is(&scene, "PartitionRows", &format!("`wallaby snapshot start {} public.r`", scene.flow)).await;
    let flow = scene.coordination.flow(&scene.flow).await.unwrap();
    let asked = RunSpec { reason: RunReason::Asked, ..tables_found(vec!["public.r".to_owned()], Timestamp(1)) };
    scene.coordination.create_run(&flow, asked).await.unwrap();
    scene.equal(ROOT).await;
    source_is(&scene, "Ready", "").await;
}
