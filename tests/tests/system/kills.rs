//! Somebody dies, or loses a connection, while rows flow.

use std::collections::BTreeSet;
use std::time::Instant;

use wallaby_coordination::{Candidate, Key};
use wallaby_model::Attempt;
use wallaby_staging::{Shelf, SideGroup, SideStore};
use wallaby_testkit::{PostgresOptions, eventually};
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::traffic::Traffic;
use wallaby_tests::{PATIENCE, alone, rounds};

use crate::power::large;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_kills_while_rows_flow_lose_nothing_double_nothing_and_show_no_half() {
    let _alone = alone().await;
    let plan = Plan { controllers: 2, workers: vec![""; 3], ..Plan::default() };
    let (mut system, traffic) = System::start_with_traffic(plan, 300).await;
    system.log_is_on_three_servers().await;
    system.row_passes().await;
    for _ in 0..rounds(5) {
        capturing_worker(&mut system, &traffic).await;
        applying_worker(&mut system, &traffic).await;
        leading_controller_and_a_worker(&mut system, &traffic).await;
        walsender(&mut system, &traffic).await;
        log_leader(&mut system, &traffic).await;
        etcd(&mut system, &traffic).await;
        drain(&mut system, &traffic).await;
        walsender_with_kill_9(&mut system, &traffic).await;
    }
    system.all_is_equal(traffic).await;
}

/// A large transaction is on its way into the side store, or out of it, when the worker that has it dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h12_kills_while_a_large_transaction_passes_lose_nothing_and_double_nothing() {
    let _alone = alone().await;
    let plan = Plan {
        workers: vec![""; 3],
        postgres: PostgresOptions::default().setting("logical_decoding_work_mem", "64kB"),
        flow: FlowFile { large_transaction_bytes: "1Mi".to_owned(), ..FlowFile::default() },
        ..Plan::default()
    };
    let (mut system, traffic) = System::start_with_traffic(plan, 100).await;
    system.log_is_on_three_servers().await;
    system.row_passes().await;
    let side = system.side_store().await;
    let mut rows = 0;
    let mut more = |count: u32| {
        rows += count;
        large(rows - count + 1, rows)
    };
    for _ in 0..rounds(5) {
        let writer = system.source().await;
        let mut known = attempts(side.as_ref()).await.unwrap();
        writer.batch_execute(&format!("BEGIN; {}", more(6_000))).await.unwrap();
        // Its parts are of no use any more when it is dead: the next owner puts what it is sent, and dies over it as well.
        for _ in 0..2 {
            known = eventually(PATIENCE, "parts of another attempt are put", async || {
                let now = attempts(side.as_ref()).await?;
                if now.is_subset(&known) { Err(format!("{now:?}")) } else { Ok(now) }
            })
            .await;
            capturing_worker(&mut system, &traffic).await;
        }
        // Without a pause: the transaction may be with the next owner, at the sink, or on its way there.
        writer.batch_execute(&format!("{}; COMMIT", more(6_000))).await.unwrap();
        capturing_worker(&mut system, &traffic).await;
        writer.batch_execute(&more(6_000)).await.unwrap();
        applying_worker(&mut system, &traffic).await;
    }
    system.all_is_equal(traffic).await;
}

/// Whose parts stand in the side store.
async fn attempts(side: &dyn SideStore) -> Result<BTreeSet<Attempt>, String> {
    let groups = side.list(Shelf::Transactions).await.map_err(|error| error.to_string())?;
    let attempt = |group| match group {
        SideGroup::Attempt(attempt) => Some(attempt),
        _ => None,
    };
    Ok(groups.into_iter().filter_map(attempt).collect())
}

async fn capturing_worker(system: &mut System, traffic: &Traffic) {
    let task = system.capture();
    let owner = system.owner(&task).await;
    let at = Instant::now();
    system.kill_worker(&owner).await;
    let next = system.owner_other_than(&task, &owner).await;
    println!("kill -9 of {owner}, which captures: {next} owns it after {:.1} s", at.elapsed().as_secs_f64());
    system.recovers("kill -9 of the capturing worker", at, traffic).await;
    system.start_worker("");
}

async fn applying_worker(system: &mut System, traffic: &Traffic) {
    let task = system.apply_task();
    let owner = system.owner(&task).await;
    let at = Instant::now();
    system.kill_worker(&owner).await;
    let next = system.owner_other_than(&task, &owner).await;
    println!("kill -9 of {owner}, which applies: {next} owns it after {:.1} s", at.elapsed().as_secs_f64());
    system.recovers("kill -9 of the applying worker", at, traffic).await;
    system.start_worker("");
}

async fn leader(system: &System) -> Result<Candidate, String> {
    let entry = system.coordination.get(&Key::ControllerLeader).await.map_err(|error| error.to_string())?;
    entry.ok_or("no controller leads")?.decode::<Candidate>().map_err(|error| error.to_string())
}

/// The controller that schedules dies: rows flow on. Then the capturing worker dies too: the other controller offers its task.
async fn leading_controller_and_a_worker(system: &mut System, traffic: &Traffic) {
    let old = eventually(PATIENCE, "a controller leads", async || leader(system).await).await;
    let leads = |port: u16| old.address.ends_with(&format!(":{port}"));
    let index = system.controllers.iter().position(|(_, api)| leads(api.port())).unwrap();
    let at = Instant::now();
    let (program, _api) = system.controllers.remove(index);
    program.kill9().await;
    let passed = system.row_passes().await;
    println!("kill -9 of the leading controller: a row passed in {:.2} s meanwhile", passed.as_secs_f64());
    let task = system.capture();
    let owner = system.owner(&task).await;
    system.kill_worker(&owner).await;
    system.owner_other_than(&task, &owner).await;
    system.recovers("kill -9 of the leading controller and of the capturing worker", at, traffic).await;
    let new = eventually(PATIENCE, "the other controller leads", async || leader(system).await).await;
    assert_ne!(new.id, old.id);
    system.start_worker("");
    system.start_controller();
}

async fn active_walsender(system: &System) -> Result<i32, String> {
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL";
    let slot = system.flow().slot_name();
    let row = system.source().await.query_opt(sql, &[&slot]).await.map_err(|error| error.to_string())?;
    row.map(|row| row.get(0)).ok_or_else(|| "no walsender reads the slot".to_owned())
}

async fn walsender(system: &mut System, traffic: &Traffic) {
    let pid = eventually(PATIENCE, "a walsender is active", async || active_walsender(system).await).await;
    let owner = system.owner(&system.capture()).await;
    let at = Instant::now();
    let sql = "SELECT pg_terminate_backend($1)";
    let ended: bool = system.source().await.query_one(sql, &[&pid]).await.unwrap().get(0);
    assert!(ended, "the walsender {pid} was not there");
    system.recovers("end of the walsender", at, traffic).await;
    let new = eventually(PATIENCE, "a walsender is active", async || active_walsender(system).await).await;
    assert_ne!(new, pid);
    assert_eq!(system.owner(&system.capture()).await, owner, "the task stays where it is");
}

/// A backend that is killed takes the whole Postgres down: it restarts and recovers, source and target both.
async fn walsender_with_kill_9(system: &mut System, traffic: &Traffic) {
    let pid = eventually(PATIENCE, "a walsender is active", async || active_walsender(system).await).await;
    let at = Instant::now();
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(killed.success());
    system.recovers("kill -9 of the walsender, which restarts Postgres", at, traffic).await;
    let restarts = "SELECT pg_postmaster_start_time() < now() - interval '1 second', pg_is_in_recovery()";
    let row = system.source().await.query_one(restarts, &[]).await.unwrap();
    assert!(!row.get::<_, bool>(1));
    let new = eventually(PATIENCE, "a walsender is active", async || active_walsender(system).await).await;
    assert_ne!(new, pid);
}

async fn log_leader(system: &mut System, traffic: &Traffic) {
    let stream = system.flow().log_stream();
    let leader = system.nats.leader_of_stream(&stream).await.unwrap();
    let at = Instant::now();
    system.nats.node(leader).unwrap().kill9().await.unwrap();
    system.recovers("kill -9 of the NATS server that leads the log", at, traffic).await;
    let new = system.nats.leader_of_stream(&stream).await.unwrap();
    assert_ne!(new, leader);
    system.nats.start_node(leader).await.unwrap();
    system.nats.wait_for_peers().await.unwrap();
}

async fn etcd(system: &mut System, traffic: &Traffic) {
    let at = Instant::now();
    system.etcd.kill9_all().await.unwrap();
    system.etcd.start_again().await.unwrap();
    system.recovers("kill -9 and restart of etcd", at, traffic).await;
    system.owner(&system.capture()).await;
    system.owner(&system.apply_task()).await;
}

/// A planned move: the worker hands its tasks over and ends by itself.
async fn drain(system: &mut System, traffic: &Traffic) {
    let task = system.capture();
    let owner = system.owner(&task).await;
    let at = Instant::now();
    let said = system.cli(&["drain", &owner, "--wait", "--timeout", "60s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    system.owner_other_than(&task, &owner).await;
    system.recovers("drain of the capturing worker", at, traffic).await;
    let worker = system.worker(&owner).process();
    eventually(PATIENCE, "the drained worker ended by itself", async || worker.exit().ok_or("still alive")).await;
    let index = system.workers.iter().position(|worker| worker.name() == owner).unwrap();
    system.workers.remove(index);
    system.start_worker("");
}
