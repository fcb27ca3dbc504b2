//! A source that comes back as another one (hazard 4): on a timeline that has everything of the log, and on one that has not.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use wallaby_coordination::{Change, Checkpoint, Key, WatchEvent};
use wallaby_model::TaskId;
use wallaby_model::condition::{ConditionStatus, ConditionType, TaskPhase};
use wallaby_model::run::RunState;
use wallaby_testkit::{Database, Folder, Postgres, PostgresOptions, Shutdown};

use crate::scene::*;

const ALL: &str = "SELECT t::text FROM t ORDER BY id";

/// A cluster in this folder. In archive recovery it finds nothing in the archive, and goes on by itself on a new timeline.
async fn cluster_in(folder: &Path, port: Option<u16>) -> &'static Postgres {
    let options = PostgresOptions { folder: Some(folder.to_owned()), port, ..Default::default() };
    cluster(options.setting("restore_command", "false")).await
}

/// Its next start ends on a new timeline.
fn recovers(folder: &Path) {
    fs::write(folder.join("data/recovery.signal"), "").unwrap();
}

/// A flow from a source of its own, of which a row is applied.
async fn flowing(name: &str, source: &'static Postgres) -> Arc<Scene> {
    let (source, target) = tokio::join!(Database::create_on(source, "source"), Database::create("target"));
    let scene = Arc::new(Scene::with(name, source, target).await);
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    scene
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_a_promoted_source_that_has_all_of_the_log_is_followed() {
    let base = Folder::temporary("timeline").unwrap();
    let folder = base.path().join("a");
    let source = cluster_in(&folder, None).await;
    let scene = flowing("followed", source).await;
    let offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    scene.equal(ALL).await;
    // The owner itself meets the new timeline; then a successor of it does, and nobody wrote a checkpoint in the meantime.
    for id in [3, 4] {
        recovers(&folder);
        source.restart(Shutdown::Fast).await.unwrap();
        let client = scene.source.connect().await;
        client.batch_execute(&format!("INSERT INTO t VALUES ({id})")).await.unwrap();
        scene.equal_to(&client, ALL).await;
    }
    drop(worker);
    let worker = scene.worker("w2");
    let client = scene.source.connect().await;
    client.batch_execute("INSERT INTO t VALUES (5)").await.unwrap();
    scene.equal_to(&client, ALL).await;
    let end = wal_end(&client).await;
    scene
        .until("Postgres is told", async || {
            let confirmed = confirmed(&client).await;
            if confirmed >= end { Ok(()) } else { Err(format!("{confirmed} of {end}")) }
        })
        .await;
    drop((worker, offers));
    drop(scene);
    source.stop(Shutdown::Immediate).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_a_source_on_a_timeline_that_left_before_the_logs_end_stops_the_capture() {
    let base = Folder::temporary("timeline").unwrap();
    let (old, new) = (base.path().join("a"), base.path().join("b"));
    let primary = cluster_in(&old, None).await;
    let scene = flowing("left", primary).await;
    let offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Done).await;
    scene.equal(ALL).await;
    worker.end().await;
    primary.stop(Shutdown::Fast).await.unwrap();
    assert!(Command::new("cp").arg("-a").args([&old, &new]).status().unwrap().success());
    primary.start_again().await.unwrap();
    let worker = scene.worker("w2");
    let client = scene.source.connect().await;
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    scene.equal_to(&client, ALL).await;
    worker.end().await;
    let log_end = scene.log_end().await.unwrap();
    primary.stop(Shutdown::Fast).await.unwrap();

    recovers(&new);
    let promoted = cluster_in(&new, Some(primary.port())).await;
    let client = promoted.connect(scene.source.name()).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (3)").await.unwrap();
    while wal_end(&client).await <= log_end.commit {
        client.batch_execute("SELECT pg_logical_emit_message(true, 'x', 'x'); SELECT pg_switch_wal()").await.unwrap();
    }
    let told = confirmed(&client).await;
    assert!(told < log_end.commit, "its slot is older");
    let worker = scene.worker("w3");
    let said = scene
        .until("the capture stops", async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.iter().find(|condition| condition.kind == ConditionType::SourceReady);
            match said {
                Some(said) if status.phase == TaskPhase::Stopped => Ok(said.clone()),
                said => Err(format!("{:?} {said:?}", status.phase)),
            }
        })
        .await;
    assert_eq!((said.status, said.reason.as_str()), (ConditionStatus::False, "TimelineDiverged"));
    assert!(said.message.contains("timeline 2, which left timeline 1 at"), "{}", said.message);
    assert!(said.message.contains(&format!("{log_end:?}")), "what is missing ends at {log_end:?}: {}", said.message);
    assert!(said.message.contains("Compare source and sinks"), "{}", said.message);
    assert_eq!(scene.log_end().await.unwrap(), log_end, "nothing was appended");
    assert_eq!(confirmed(&client).await, told, "nothing was confirmed");
    assert_eq!(rows(&scene.target, ALL).await.unwrap(), ["(1)", "(2)"]);
    drop((worker, offers));
    drop(scene);
    promoted.stop(Shutdown::Immediate).await.unwrap();
}

/// Or a source that fails over before the next checkpoint would not be compared with anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_the_first_checkpoint_that_has_a_position_names_its_server() {
    let scene = Arc::new(Scene::new("server").await);
    scene.source.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let mut watch = scene.coordination.watch(scene.coordination.keys().task(&TaskId::capture(&scene.flow)));
    let _offers = scene.offering();
    let _worker = scene.worker("w1");
    let first = async {
        loop {
            let entries = match watch.next().await.unwrap() {
                WatchEvent::Snapshot { entries, .. } => entries,
                WatchEvent::Changes(changes) => changes
                    .into_iter()
                    .filter_map(|change| if let Change::Put(entry) = change { Some(entry) } else { None })
                    .collect(),
            };
            let checkpoints = entries.iter().filter(|entry| matches!(entry.key, Key::TaskCheckpoint(_)));
            let mut checkpoints = checkpoints.map(|entry| entry.decode::<Checkpoint>().unwrap());
            if let Some(found) = checkpoints.find(|checkpoint| checkpoint.position.is_some()) {
                return found;
            }
        }
    };
    let first = tokio::time::timeout(PATIENCE, first).await.unwrap();
    let source = first.source.expect("a position without its server");
    let identifier = "SELECT system_identifier::text FROM pg_control_system()";
    assert_eq!(vec![source.system_identifier], rows(&scene.source, identifier).await.unwrap());
    assert_eq!(source.timeline, 1);
}
