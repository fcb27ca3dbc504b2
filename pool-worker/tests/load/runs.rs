//! Runs that are paused, resumed and cancelled half-way, that lose what they read, and that load tables without a key.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::condition::{ConditionType, TaskPhase, Timestamp};
use wallaby_model::flow::{ByteSize, OnExceeded};
use wallaby_model::run::{ChunkDone, RunReason, RunSpec, RunState, RunWish};
use wallaby_model::{ChunkId, Reader, RunId, TaskId, TaskKind};
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::{Shelf, SideKey, open_side};
use wallaby_testkit::{Held, Wire};

use crate::scene::*;
use crate::{ALL, fill};

const RUN: RunId = RunId(1);

/// Many rows change that are read already, and many that are not.
const CHANGES: &str = "UPDATE t SET n = n + 1 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0; INSERT INTO t (id, pad) VALUES (30000, 'new')";

/// A run of six chunks of which two are read.
async fn half_read(name: &str, snapshot: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    scene.offer_chunks(2);
    scene.coordination.create_flow(scene.in_chunks(snapshot)).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker("w1");
    scene.chunks_read(1, 2).await;
    (scene, offers, worker)
}

async fn wish(scene: &Scene, wish: RunWish) {
    scene.coordination.set_run_wish(&scene.flow, RUN, wish).await.unwrap();
}

/// Asks for a run of these tables, or of everything.
pub(crate) async fn ask(scene: &Scene, tables: &[&str]) {
    ask_for(scene, spec(scene, tables)).await;
}

pub(crate) async fn ask_for(scene: &Scene, spec: RunSpec) {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.create_run(&seen, spec).await.unwrap();
}

pub(crate) fn spec(scene: &Scene, tables: &[&str]) -> RunSpec {
    RunSpec {
        reason: RunReason::Asked,
        tables: tables.iter().map(ToString::to_string).collect(),
        exclude: Vec::new(),
        sinks: vec![scene.sink.clone()],
        wish: RunWish::Go,
        rows_per_second: None,
        readers: 4,
        created_at: Timestamp(0),
    }
}

async fn chunks(scene: &Scene) -> BTreeMap<ChunkId, ChunkDone> {
    scene.coordination.run_chunks(&scene.flow, RUN).await.unwrap()
}

/// Waits until nothing of the run is left at the source: no session, and so no snapshot that holds vacuum back.
async fn no_session_is_left(scene: &Scene) {
    let sql = "SELECT coalesce(string_agg(application_name || ' ' || state, ', '), '') FROM pg_stat_activity
               WHERE datname = current_database() AND starts_with(application_name, $1)";
    let run = TaskId { flow: scene.flow.clone(), kind: TaskKind::Run(RUN) }.session_prefix();
    scene
        .until("the exporting session is given up", async || {
            let row = scene.source.query_one(sql, &[&run]).await.map_err(|error| error.to_string())?;
            let left: String = row.get(0);
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
    let held = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
                AND backend_type = 'client backend' AND state <> 'active' AND backend_xmin IS NOT NULL";
    assert_eq!(scene.source.query_one(held, &[]).await.unwrap().get::<_, i64>(0), 0, "a snapshot is still held");
}

/// The session goes first, and then the plan says so.
async fn the_snapshot_is_given_up(scene: &Scene) {
    no_session_is_left(scene).await;
    scene
        .until("the plan names no snapshot", async || match scene.plan(1).await?.snapshot() {
            Some(generation) => Err(format!("{generation:?}")),
            None => Ok(()),
        })
        .await;
}

async fn no_chunk_is_left(scene: &Scene) {
    let left = scene.on_shelf(Shelf::Chunks).await.unwrap();
    assert!(left.is_empty(), "chunks are left in the side store: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_run_that_is_paused_half_way_gives_its_snapshot_up_and_goes_on_with_what_it_has() {
    let (scene, _offers, _worker) = half_read("paused", "initial").await;
    wish(&scene, RunWish::Pause).await;
    the_snapshot_is_given_up(&scene).await;
    let read = chunks(&scene).await;
    scene.offer_chunks(u32::MAX);
    scene.source.batch_execute(CHANGES).await.unwrap();
    assert_eq!(chunks(&scene).await, read, "a paused run reads nothing");
    // Before the last one is loaded, what was read is looked at again.
    scene.offer_loads(false);
    wish(&scene, RunWish::Go).await;
    scene.run_is(1, RunState::Loading).await;
    let all = chunks(&scene).await;
    for (chunk, done) in &read {
        assert_eq!(all.get(chunk), Some(done), "{chunk} was read again");
    }
    let plan = scene.plan(1).await.unwrap();
    assert_eq!((plan.relations[0].restart, plan.generations.len()), (0, 2));
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

/// A snapshot holds back WAL, and vacuum, as the slot does that holds back too much of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_gives_its_snapshot_up_while_the_slot_holds_back_too_much_wal() {
    let (scene, _offers, _worker) = half_read("retained", "initial").await;
    let bound = async |bytes: u64| {
        let seen = scene.coordination.flow(&scene.flow).await.unwrap();
        let mut document = seen.record.document.clone();
        document.spec.source.postgres.safety.retained_wal_max = ByteSize(bytes);
        document.spec.source.postgres.safety.on_exceeded = OnExceeded::PauseSnapshot;
        scene.coordination.update_flow(&seen, document, &BTreeMap::new()).await.unwrap();
    };
    scene.slot_is("WithinBound").await;
    bound(1).await;
    scene.slot_is("RetainedWal").await;
    the_snapshot_is_given_up(&scene).await;
    let read = chunks(&scene).await;
    scene.offer_loads(false);
    bound(1 << 40).await;
    scene.offer_chunks(u32::MAX);
    scene.run_is(1, RunState::Loading).await;
    let all = chunks(&scene).await;
    for (chunk, done) in &read {
        assert_eq!(all.get(chunk), Some(done), "{chunk} was read again");
    }
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_snapshot_only_is_of_one_moment_also_when_it_was_paused() {
    let (scene, _offers, _worker) = half_read("only", "only").await;
    wish(&scene, RunWish::Pause).await;
    no_session_is_left(&scene).await;
    // No log brings these to what was read before.
    scene.source.batch_execute(CHANGES).await.unwrap();
    wish(&scene, RunWish::Go).await;
    scene.offer_chunks(u32::MAX);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    assert_eq!(scene.plan(1).await.unwrap().relations[0].restart, 1, "it started again");
    no_session_is_left(&scene).await;
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
    assert_eq!(scene.source.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 0, "nothing holds WAL back");
    assert!(scene.log_end().await.is_err(), "there is no log");
    no_chunk_is_left(&scene).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_cancelled_half_way_leaves_nothing_and_the_next_one_loads_everything() {
    let (scene, _offers, _worker) = half_read("cancelled", "initial").await;
    assert!(scene.shelf(Shelf::Chunks).await.messages > 0, "chunks are in the side store");
    wish(&scene, RunWish::Cancel).await;
    scene.run_is(1, RunState::Cancelled).await;
    no_session_is_left(&scene).await;
    no_chunk_is_left(&scene).await;
    let holds = scene.coordination.holds(&scene.flow).await.unwrap();
    assert!(!holds.contains_key(&Reader::Run(RUN)), "the run still holds the log: {holds:?}");
    scene.offer_chunks(u32::MAX);
    scene.source.batch_execute(CHANGES).await.unwrap();
    ask(&scene, &[]).await;
    scene.run_is(2, RunState::Done).await;
    scene.equal(ALL).await;
    scene.source.batch_execute("INSERT INTO t (id, pad) VALUES (30001, 'streamed')").await.unwrap();
    scene.equal(ALL).await;
}

/// Nothing but a part has so many bytes.
const PART_LEAST: usize = 4096;

/// A run of which a part lands when everything of it was removed, because it was on its way while the run was cancelled: nobody reads it,
/// and it must not stay. `owner` has room for the tasks that it has, and no more: another worker reads the chunk, and lives on.
async fn a_part_lands_late(
    scene: &Arc<Scene>,
    snapshot: &str,
    owner_tasks: u32,
) -> (AbortOnDropHandle<()>, Running, Running, Wire) {
    fill(scene, 20_000).await;
    scene.offer_chunks(0);
    scene.coordination.create_flow(scene.in_chunks(snapshot)).await.unwrap();
    let offers = scene.offering();
    let owner = scene.worker_of("w1", owner_tasks);
    scene
        .until("the run has a snapshot", async || {
            let plan = scene.plan(1).await?;
            plan.snapshot().map(|_| ()).ok_or(plan.message)
        })
        .await;
    scene
        .until("its tasks are owned", async || {
            let locks = scene.coordination.locks(&scene.flow).await.map_err(|error| error.to_string())?;
            if locks.len() == owner_tasks as usize { Ok(()) } else { Err(format!("{locks:?}")) }
        })
        .await;
    let wire = Wire::to(&scene.nats.url()).await;
    let failpoints = Failpoints::parse("stop-before-chunk-part").unwrap();
    let reader = scene.worker_at("w2", failpoints.clone(), &wire.url());
    scene.offer_chunks(1);
    scene.stands_at(&failpoints, Failpoint::StopBeforeChunkPart).await;
    wire.hold(Held::Requests);
    failpoints.let_go(Failpoint::StopBeforeChunkPart);
    let mut before = (0, 0);
    scene
        .until("the part is on its way as a whole", async || {
            let waiting = wire.waiting();
            before = if before.0 == waiting { (waiting, before.1 + 1) } else { (waiting, 0) };
            if waiting > PART_LEAST && before.1 > 10 { Ok(()) } else { Err(format!("{waiting} bytes")) }
        })
        .await;
    // Its worker dies: it would remove what it sent.
    drop(reader);
    wish(scene, RunWish::Cancel).await;
    scene.run_is(1, RunState::Cancelled).await;
    no_chunk_is_left(scene).await;
    wire.hold(Held::Nothing);
    scene
        .until("the part lands", async || match scene.on_shelf(Shelf::Chunks).await?.len() {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        })
        .await;
    (offers, owner, scene.worker("w3"), wire)
}

async fn it_is_swept(scene: &Scene) {
    scene
        .until("it is swept", async || {
            let left = scene.on_shelf(Shelf::Chunks).await?;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_part_that_lands_after_its_run_was_cancelled_is_swept() {
    let scene = Arc::new(Scene::new("late").await);
    // Capture, apply and run.
    let (_offers, owner, _next, _wire) = a_part_lands_late(&scene, "initial", 3).await;
    // The next sweep is the next owner's.
    owner.end().await;
    it_is_swept(&scene).await;
}

/// Where nothing is captured, nobody is there until there is another run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_part_that_lands_late_where_nothing_is_captured_is_swept_by_the_next_run() {
    let scene = Arc::new(Scene::new("late-only").await);
    // Apply and run.
    let (_offers, _owner, _reader, _wire) = a_part_lands_late(&scene, "only", 2).await;
    scene.offer_chunks(0);
    ask(&scene, &[]).await;
    it_is_swept(&scene).await;
    scene.offer_chunks(u32::MAX);
    scene.run_is(2, RunState::Done).await;
    scene.equal(ALL).await;
}

/// A run whose chunks are all read, and none is loaded.
async fn read_and_not_loaded(name: &str) -> (Arc<Scene>, AbortOnDropHandle<()>, Running) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    scene.offer_loads(false);
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Loading).await;
    (scene, offers, worker)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_chunk_that_lost_a_part_before_it_was_loaded_is_read_again() {
    let (scene, _offers, _worker) = read_and_not_loaded("lost").await;
    let chunk = ChunkId { table: 0, restart: 0, number: 3 };
    let stream = scene.stream_of(Shelf::Chunks).await;
    let last = scene.shelf(Shelf::Chunks).await.last_sequence;
    let mut deleted = 0;
    for sequence in 1..=last {
        let Ok(message) = stream.get_raw_message(sequence).await else { continue };
        if message.subject.contains(&format!(".chunk.{RUN}.{chunk}.")) {
            deleted += u32::from(stream.delete_message(sequence).await.unwrap());
            break;
        }
    }
    assert_eq!(deleted, 1, "a part of {chunk} was there");
    scene.source.batch_execute(CHANGES).await.unwrap();
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    assert_eq!(scene.plan(1).await.unwrap().relations[0].restart, 1, "the table started again");
}

/// What stands there is an object of its own, whole and readable: only the chunk's mark says that it is another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_chunk_with_a_part_of_other_rows_is_read_again() {
    let (scene, _offers, _worker) = read_and_not_loaded("other").await;
    let flow = scene.coordination.flow(&scene.flow).await.unwrap();
    let log = &flow.record.document.spec.log;
    let side = open_side(&scene.flow, log, &scene.connections().await.unwrap()).unwrap();
    let chunk = ChunkId { table: 0, restart: 0, number: 3 };
    let key = SideKey::ChunkPart { run: RUN, chunk, attempt: chunks(&scene).await[&chunk].attempt, number: 0 };
    let mut part = wallaby_wire::decode(&side.get(key).await.unwrap().unwrap()).unwrap();
    let rows = &mut part.tables[0].rows;
    *rows = rows.slice(0, rows.num_rows() - 1);
    let other = wallaby_wire::encode(&part, log.codec).unwrap();
    side.put(key, other.clone()).await.unwrap();
    assert_eq!(side.get(key).await.unwrap(), Some(other), "it stands there");
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    assert_eq!(scene.plan(1).await.unwrap().relations[0].restart, 1, "the table started again");
}

/// Without the column that the sink adds to a table without a key.
const COPIES: &str = "SELECT concat_ws(' ', id, n, pad) FROM t ORDER BY id, n, pad";

/// Nothing finds a row of another snapshot again in a table without a key: when the exporting session dies, the table starts again whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_table_without_a_key_is_loaded_of_one_snapshot() {
    let scene = Arc::new(Scene::new("keyless").await);
    fill(&scene, 20_000).await;
    // Every third row stands there twice.
    let copies = "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t SELECT * FROM t WHERE id % 3 = 0";
    scene.source.batch_execute(copies).await.unwrap();
    scene.offer_chunks(2);
    scene.coordination.create_flow(scene.in_chunks("initial")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.chunks_read(1, 2).await;
    let changes =
        "INSERT INTO t SELECT i, 1, 'new' FROM generate_series(40000, 40100) i; DELETE FROM t WHERE id % 2000 = 1;
                   UPDATE t SET n = 7 WHERE id % 2000 = 2";
    scene.source.batch_execute(changes).await.unwrap();
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE starts_with(application_name, $1)";
    let run = TaskId { flow: scene.flow.clone(), kind: TaskKind::Run(RUN) }.session_prefix();
    assert!(scene.source.query_one(end, &[&run]).await.unwrap().get::<_, i64>(0) > 0, "a session held the snapshot");
    scene.offer_chunks(u32::MAX);
    scene.run_is(1, RunState::Done).await;
    scene.equal(COPIES).await;
    assert_eq!(scene.plan(1).await.unwrap().relations[0].restart, 1, "the table started again");
    scene.source.batch_execute("DELETE FROM t WHERE id = 3; INSERT INTO t SELECT * FROM t WHERE id = 6").await.unwrap();
    scene.equal(COPIES).await;
}

/// With nothing that says which row is meant, publishing a table would make its updates fail at the source: it is not published, and the
/// condition says what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_any_identity_is_not_published_until_it_has_one() {
    let scene = Arc::new(Scene::new("identity").await);
    scene.source.batch_execute(NO_IDENTITY).await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene
        .until("the condition names the table and the remedy", async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.into_iter().find(|said| said.kind == ConditionType::SourceReady);
            match said {
                Some(said) if said.message.contains("public.t") && said.message.contains("REPLICA IDENTITY") => Ok(()),
                said => Err(format!("{said:?}")),
            }
        })
        .await;
    scene.source.batch_execute("UPDATE t SET n = 2; ALTER TABLE t REPLICA IDENTITY FULL").await.unwrap();
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.resume_flow(&seen).await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("DELETE FROM t WHERE id = 2").await.unwrap();
    scene.equal(COPIES).await;
}

/// A publication of inserts alone, which somebody else made, takes such a table as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_any_identity_of_which_only_inserts_are_published_is_loaded_and_followed() {
    let scene = Arc::new(Scene::new("inserts").await);
    let mut document = scene.document("public.t", "initial", "");
    let publication = document.publication_name();
    document.spec.source.postgres.publication.create = false;
    document.spec.source.postgres.publication.tables = Vec::new();
    scene.source.batch_execute(NO_IDENTITY).await.unwrap();
    let inserts = format!("CREATE PUBLICATION \"{publication}\" FOR TABLE t WITH (publish = 'insert')");
    scene.source.batch_execute(&inserts).await.unwrap();
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.equal(COPIES).await;
    scene.source.batch_execute("INSERT INTO t VALUES (1, 1, 'a'), (3, 3, 'c')").await.unwrap();
    scene.equal(COPIES).await;
}

const NO_IDENTITY: &str = "CREATE TABLE t (id int, n int, pad text); ALTER TABLE t REPLICA IDENTITY NOTHING;
    INSERT INTO t VALUES (1, 1, 'a'), (1, 1, 'a'), (2, 2, 'b')";

/// It waits for a person; that person wants it no more, and does not have to mend it first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_stopped_is_cancelled_without_a_resume() {
    let scene = Arc::new(Scene::new("stopped").await);
    fill(&scene, 100).await;
    let mut document = scene.document("public.t", "initial", "");
    document.spec.source.postgres.dsn =
        wallaby_model::flow::SecretRef::Value(scene.source.dsn().replace(scene.source.name(), "nowhere"));
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    let task = TaskId { flow: scene.flow.clone(), kind: TaskKind::Run(RUN) };
    scene
        .until("the run waits for a person", async || match scene.status_of(&task).await? {
            status if status.phase == TaskPhase::Stopped => Ok(()),
            status => Err(format!("{status:?}")),
        })
        .await;
    scene.coordination.set_run_wish(&scene.flow, RUN, RunWish::Cancel).await.unwrap();
    scene.run_is(1, RunState::Cancelled).await;
}

/// The sessions at the source that hold a snapshot, and for whom.
async fn holders(scene: &Scene) -> Result<Vec<(i32, String)>, String> {
    let sql = "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()
               AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND backend_xmin IS NOT NULL";
    let rows = scene.source.query(sql, &[]).await.map_err(|error| error.to_string())?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// A run that is stuck in the middle of a chunk, and who holds a snapshot then.
async fn in_a_chunk(
    name: &str,
    more: &str,
) -> (Arc<Scene>, AbortOnDropHandle<()>, Running, Failpoints, Vec<(i32, String)>) {
    let scene = Arc::new(Scene::new(name).await);
    fill(&scene, 20_000).await;
    scene.coordination.create_flow(scene.document("public.t", "initial", more)).await.unwrap();
    let offers = scene.offering();
    let failpoints = Failpoints::parse("stop-before-chunk-part").unwrap();
    let worker = scene.worker_with("w1", failpoints.clone());
    scene.stands_at(&failpoints, Failpoint::StopBeforeChunkPart).await;
    // Nor could the run end without it.
    scene.offer_chunks(0);
    let held = holders(&scene).await.unwrap();
    assert_eq!(held.len(), 2, "who exported it, and who reads: {held:?}");
    (scene, offers, worker, failpoints, held)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_paused_in_the_middle_of_a_chunk_holds_no_snapshot() {
    let (scene, _offers, _worker, failpoints, _) = in_a_chunk("inside", "").await;
    wish(&scene, RunWish::Pause).await;
    scene
        .until("nobody holds a snapshot", async || match holders(&scene).await?.as_slice() {
            [] => Ok(()),
            held => Err(format!("{held:?}")),
        })
        .await;
    failpoints.let_go(Failpoint::StopBeforeChunkPart);
    scene.offer_chunks(u32::MAX);
    wish(&scene, RunWish::Go).await;
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}

/// Whoever reads a chunk holds the snapshot as its exporter does: vacuum waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_chunk_holds_its_snapshot_for_much_longer_than_the_bound() {
    let (scene, _offers, _worker, failpoints, held) = in_a_chunk("bound", "safety: { snapshotMax: 2s }").await;
    scene
        .until("the first snapshot is given up", async || {
            let now = holders(&scene).await?;
            let left: Vec<_> = now.iter().filter(|holder| held.contains(holder)).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    failpoints.let_go(Failpoint::StopBeforeChunkPart);
    scene.offer_chunks(u32::MAX);
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
}
