//! What is wrong around a flow is described, with what to do about it; once that was done the flow goes on by itself.

use wallaby_coordination::{Acquired, Mark, SessionOptions, SourceSeen, WorkerInfo, WorkerSession};
use wallaby_model::condition::Timestamp;
use wallaby_model::{TaskId, WorkerId};
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::program::Program;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::{applied, describes, small};

/// Waits until a program's log says all `parts`.
async fn says(program: &Program, parts: &[&str]) {
    let said = eventually(PATIENCE, &format!("{} says {parts:?}", program.name()), async || {
        let said = program.process().log_tail(200).to_string();
        if parts.iter().all(|part| said.contains(part)) { Ok(said) } else { Err(said) }
    })
    .await;
    let line = said.lines().rev().find(|line| line.contains(parts[0])).unwrap_or_default();
    println!("{}: {}", program.name(), line.trim());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nats_server_that_is_too_old_is_named_and_used_once_it_is_upgraded() {
    let _alone = alone().await;
    let mut system = System::start(Plan { nats_claims: Some("2.9.25"), ..small() }).await;
    for program in [&system.workers[0], &system.controllers[0].0] {
        says(program, &["2.9.25", "2.14.5", "upgrade"]).await;
    }
    applied(&system, &FlowFile { replicas: 1, ..FlowFile::default() }).await;
    describes(&system, "nats-server too old", &["NatsUnavailable", "2.9.25", "2.14.5", "upgrade"]).await;
    system.greeter.as_ref().unwrap().upgrade();
    system.captures().await;
    system.row_passes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_that_start_without_etcd_say_so_and_go_on_once_it_is_there() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    let old = system.workers[0].name().to_owned();
    system.kill_worker(&old).await;
    let (controller, _api) = system.controllers.remove(0);
    controller.kill9().await;
    system.etcd.kill9_all().await.unwrap();
    system.start_controller();
    system.start_worker("");
    for program in [&system.workers[0], &system.controllers[0].0] {
        says(program, &["waiting for etcd", "127.0.0.1:"]).await;
    }
    let said = eventually(PATIENCE, "the command line says that etcd is away", async || {
        let said = system.cli(&["get", "flows"]).await;
        if said.code != 0 && said.text.contains("etcd") { Ok(said) } else { Err(said) }
    })
    .await;
    println!("wallaby get flows: {} (exit code {})", said.text.trim(), said.code);
    system.etcd.start_again().await.unwrap();
    system.row_passes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_in_use_is_described_with_its_user_and_taken_once_they_are_gone() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    let mut config: tokio_postgres::Config = system.source_dsn().parse().unwrap();
    let (holder, connection) = config.application_name("their tool").connect(tokio_postgres::NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let slot = system.flow().slot_name();
    holder.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput', true)", &[&slot]).await.unwrap();
    applied(&system, &FlowFile { replicas: 1, ..FlowFile::default() }).await;
    describes(&system, "slot in use", &["SlotInUse", "their tool", "pg_terminate_backend"]).await;
    drop(holder);
    connection.await.unwrap().unwrap();
    system.captures().await;
    system.row_passes().await;
}

async fn pause(system: &System) {
    let said = system.cli(&["pause", "shop"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    let sql = "SELECT 1 FROM pg_replication_slots WHERE slot_name = $1 AND NOT active";
    let source = system.source().await;
    eventually(PATIENCE, "nobody reads the slot, nobody owns the task", async || {
        let is_idle = !source.query(sql, &[&system.flow().slot_name()]).await.unwrap().is_empty();
        let owner = system.owner_now(&system.capture()).await;
        if is_idle && owner.is_none() { Ok(()) } else { Err(owner) }
    })
    .await;
}

async fn resume(system: &System) {
    let said = system.cli(&["resume", "shop"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
}

/// Nothing was staged that the source lacks: the slot alone is past the log's end, and the log is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_moved_or_lost_while_the_log_was_idle_is_described_as_that() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    system.row_passes().await;
    pause(&system).await;
    let source = system.source().await;
    let slot = system.flow().slot_name();
    source.batch_execute("INSERT INTO ledger VALUES (1, 1, 1, 'never staged')").await.unwrap();
    source.execute("SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())", &[&slot]).await.unwrap();
    resume(&system).await;
    let remedy = "delete the flow and create it again";
    describes(&system, "slot moved", &["SlotMoved", &slot, remedy]).await;
    let said = system.cli(&["describe", "shop"]).await;
    assert!(!said.text.contains("LogLost"), "{}", said.text);

    pause(&system).await;
    source.batch_execute("ALTER SYSTEM SET max_slot_wal_keep_size = '16MB'").await.unwrap();
    source.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    eventually(PATIENCE, "the server gives the slot up", async || {
        source.batch_execute("SELECT pg_logical_emit_message(true, 'x', 'y')").await.unwrap();
        source.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        source.batch_execute("CHECKPOINT").await.unwrap();
        let sql = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1";
        let status: Option<String> = source.query_one(sql, &[&slot]).await.unwrap().get(0);
        if status.as_deref() == Some("lost") { Ok(()) } else { Err(status) }
    })
    .await;
    resume(&system).await;
    describes(&system, "slot lost", &["SlotLost", &slot, "max_slot_wal_keep_size", remedy]).await;
}

/// The publication by its name, as the source has it.
async fn rename_publication(source: &tokio_postgres::Client, from: &str, to: &str) {
    source.batch_execute(&format!("ALTER PUBLICATION {from} RENAME TO {to}")).await.unwrap();
}

/// It goes on by itself while nobody wrote, after `wallaby resume` once it was described, and loaded anew where no one can decode what
/// was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h20_a_publication_that_goes_missing_while_the_flow_runs_is_described_and_nothing_is_lost() {
    let _alone = alone().await;
    let flow = FlowFile { snapshot: "initial", ..small().flow };
    let mut system = System::start(Plan { flow, ..small() }).await;
    system.apply_flow().await;
    system.row_passes().await;
    let source = system.source().await;
    let published = "SELECT pubname::text, string_agg(format('%I.%I', schemaname, tablename), ', ') \
        FROM pg_publication_tables GROUP BY 1";
    let row = source.query_one(published, &[]).await.unwrap();
    let (name, tables): (String, String) = (row.get(0), row.get(1));
    source.batch_execute(&format!("DROP PUBLICATION {name}")).await.unwrap();
    let make = format!("CREATE PUBLICATION {name} FOR TABLE {tables} WITH (publish_via_partition_root = true)");
    source.batch_execute(&make).await.unwrap();
    system.row_passes().await;

    rename_publication(&source, &name, "elsewhere").await;
    pause(&system).await;
    resume(&system).await;
    let remedy = ["PublicationMissing", &name, "any more", "dropped or renamed while the flow ran", "wallaby resume"];
    describes(&system, "publication renamed", &remedy).await;
    rename_publication(&source, "elsewhere", &name).await;
    resume(&system).await;
    system.row_passes().await;

    rename_publication(&source, &name, "elsewhere").await;
    source.batch_execute("INSERT INTO ledger VALUES (1, 1, 1, 'written while it was away')").await.unwrap();
    let remedy = ["PublicationMissing", &name, "at the slot's position", "Delete the flow and create it again"];
    describes(&system, "publication renamed and rows written", &remedy).await;
    rename_publication(&source, "elsewhere", &name).await;
    // Now it does exist: that is not enough, and nothing is skipped.
    source.batch_execute("INSERT INTO ledger VALUES (2, 2, 1, 'written when it was back')").await.unwrap();
    let stops = || system.workers[0].process().log_tail(2000).to_string().matches("waits for a person").count();
    let before = stops();
    resume(&system).await;
    eventually(PATIENCE, "the capture stops again", async || if stops() > before { Ok(()) } else { Err(stops()) })
        .await;
    describes(&system, "publication renamed back", &remedy).await;
    let found = "SELECT count(*) FROM ledger WHERE id IN (1, 2)";
    let rows: i64 = system.target().await.query_one(found, &[]).await.unwrap().get(0);
    assert_eq!(rows, 0, "what follows the rows that nobody can decode is at the sink");
    let said = system.cli(&["delete", "shop", "--wait"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    system.apply_flow().await;
    system.row_passes().await;
    // Tables are handed over one by one, and a row of one says nothing of the others.
    system.becomes_equal_at("warehouse").await;
    system.row_passes().await;
    system.is_equal_at("warehouse").await;
    let rows: i64 = system.target().await.query_one(found, &[]).await.unwrap().get(0);
    assert_eq!(rows, 2);
}

/// Two workers of one name: the second says so and waits, and is taken in once the first is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_name_is_taken_says_so_and_waits_for_it() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    let name = system.workers[0].name().to_owned();
    let second = system.spawn_worker("second", &name, &[]);
    says(&second, &[&name, "is alive", "--name"]).await;
    system.row_passes().await;
    system.kill_worker(&name).await;
    system.row_passes().await;
    assert!(second.process().is_alive());
    assert_eq!(system.owner(&TaskId::capture(&system.flow())).await, name, "the second has the first one's name now");
}

/// A second signal ends a worker at once, whatever it waits for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_worker_that_waits_for_its_sink() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    system.row_passes().await;
    let blocked = system.target().await;
    blocked.batch_execute("BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    system.source().await.batch_execute("INSERT INTO ledger VALUES (1, 1, 1, 'waits')").await.unwrap();
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'warehouse' AND wait_event_type = 'Lock'";
    let source = system.source().await;
    eventually(PATIENCE, "the sink waits", async || {
        let waiting: i64 = source.query_one(waits, &[]).await.unwrap().get(0);
        if waiting > 0 { Ok(()) } else { Err(waiting) }
    })
    .await;
    let worker = &system.workers[0];
    worker.terminate();
    says(worker, &["draining"]).await;
    assert!(worker.process().is_alive(), "the sink is waited for");
    worker.terminate();
    let exit = tokio::time::timeout(PATIENCE, worker.process().wait()).await.unwrap();
    assert_eq!(exit.code, Some(143), "{}", worker.process().log_tail(20));
    blocked.batch_execute("ROLLBACK").await.unwrap();
    system.workers.clear();
    system.start_worker("");
    system.row_passes().await;
}

/// The log's servers are away for long: the capture gives its lock up, for another worker may reach them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_that_is_cut_off_from_the_log_gives_its_lock_up() {
    let _alone = alone().await;
    let mut system = System::start(Plan { workers: vec![], ..small() }).await;
    let worker = system.start_worker_with(&[("WALLABY_LOG_PATIENCE", "3s")]);
    system.apply_flow().await;
    system.row_passes().await;
    system.nats.kill9_all().await.unwrap();
    let given_up = [("task", "shop.capture"), ("outcome", "given_up")];
    eventually(PATIENCE, "the capture was given up", async || {
        // A change to stage, so that it has something to wait with.
        let change = "INSERT INTO ledger VALUES (1, 1, 1, 'cut off')";
        system.source().await.batch_execute(change).await.map_err(|error| error.to_string())?;
        match system.worker(&worker).metric("wallaby_tasks_ended_total", &given_up).await {
            Ok(count) if count >= 1.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    says(system.worker(&worker), &["task given up", "have not answered for"]).await;
    describes(&system, "NATS away while nobody owns the capture", &["NatsUnavailable", "cannot be offered"]).await;
    system.nats.start_again().await.unwrap();
    system.row_passes().await;
}

/// A sink that says nothing for long is opened again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_sink_is_opened_again() {
    let _alone = alone().await;
    let mut system = System::start(Plan { workers: vec![], ..small() }).await;
    system.start_worker_with(&[("WALLABY_SINK_PATIENCE", "2s")]);
    system.apply_flow().await;
    system.row_passes().await;
    let blocked = system.target().await;
    blocked.batch_execute("BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    system.source().await.batch_execute("INSERT INTO ledger VALUES (1, 1, 1, 'waits')").await.unwrap();
    describes(&system, "a silent sink", &["SinkSilent", "has not answered for 2 s"]).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();
    system.row_passes().await;
    let found = "SELECT count(*) FROM ledger WHERE id = 1";
    let rows: i64 = system.target().await.query_one(found, &[]).await.unwrap().get(0);
    assert_eq!(rows, 1, "the change that was waited for stands there once");
}

/// An owner before this one read another server: its checkpoint says so, and the one that answers now is refused before anything is
/// written. (The test's clusters are copies of one template and share an identifier, so the owner before is the test itself.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_at_a_takeover_is_refused_by_the_checkpoints_identity() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    system.row_passes().await;
    pause(&system).await;
    let read = owned_once(&system, None).await;
    let other = SourceSeen { system_identifier: "4711".to_owned(), ..read.clone() };
    owned_once(&system, Some(other)).await;
    resume(&system).await;
    describes(&system, "another server", &["OtherSystem", "4711", &read.system_identifier]).await;
    pause(&system).await;
    owned_once(&system, Some(read)).await;
    resume(&system).await;
    system.row_passes().await;
}

/// Owns the capture for a moment and leaves its checkpoint as it is, but for the server that it names; returns that one.
async fn owned_once(system: &System, source: Option<SourceSeen>) -> SourceSeen {
    let info = WorkerInfo {
        capacity: 1,
        load: 0,
        version: String::new(),
        zone: None,
        capabilities: Vec::new(),
        address: String::new(),
        draining: false,
        started_at: Timestamp(0),
    };
    let (coordination, name) = (&system.coordination, WorkerId::new("the-test").unwrap());
    let session = WorkerSession::start(coordination, name, info, SessionOptions::default()).await.unwrap();
    let revision = coordination.flow(&system.flow()).await.unwrap().revision;
    let Acquired::Lock(lock) = session.acquire(&system.capture(), revision).await.unwrap() else {
        panic!("the paused capture has an owner");
    };
    let epoch = lock.found_checkpoint().map(|found| found.epoch);
    lock.fix_epoch(epoch).await.unwrap();
    let named = lock.source().unwrap();
    if let Some(source) = source {
        lock.set_source(source);
    }
    let position = lock.found_checkpoint().unwrap().position.unwrap();
    lock.release(Some(Mark { position, stream: None, seq_hint: None })).await.unwrap();
    session.revoke().await.unwrap();
    named
}
