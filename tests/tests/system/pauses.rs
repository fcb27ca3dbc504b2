//! A worker stands still beyond its lease and then goes on: once it notices by itself, once it does not and everybody refuses it.
//!
//! One task per worker, so that one task stands still at a time. Three log servers: one hides what fencing needs.

use std::time::{Duration, Instant};

use wallaby_model::TaskId;
use wallaby_model::condition::TaskStatus;
use wallaby_testkit::eventually;
use wallaby_tests::program::Program;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::traffic::Traffic;
use wallaby_tests::{PATIENCE, alone, rounds};

const SELF_FENCED: &str = "wallaby_coordination_self_fenced_total";
const APPENDS_REFUSED: &str = "wallaby_log_appends_refused_total";
const TASKS_ENDED: &str = "wallaby_tasks_ended_total";
const LOG_FENCED: &str = "wallaby_log_fenced_total";
const SINK_REFUSED: &str = "wallaby_sink_writes_refused_total";
const SESSIONS_ENDED: &str = "wallaby_sink_sessions_ended_total";

fn plan(failpoints: &'static str) -> Plan {
    Plan { workers: vec![failpoints; 3], capacity: 1, ..Plan::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stood_still_beyond_its_lease_fences_itself() {
    let _alone = alone().await;
    let (mut system, traffic) = System::start_with_traffic(plan(""), 300).await;
    system.log_is_on_three_servers().await;
    system.row_passes().await;
    for _ in 0..rounds(3) {
        for task in [system.capture(), system.apply_task()] {
            let zombie = stand_still(&mut system, &task, &traffic).await;
            let worker = system.worker(&zombie);
            worker.resume();
            at_least_one(worker, SELF_FENCED, &[]).await;
            // It begins again with a new lease, and takes tasks again.
            system.recovers("the worker goes on", Instant::now(), &traffic).await;
            let worker = system.worker(&zombie);
            for refused in [SINK_REFUSED, LOG_FENCED] {
                assert_eq!(
                    worker.metric(refused, &[]).await.unwrap(),
                    0.0,
                    "{zombie} fenced itself and yet wrote: {refused}"
                );
            }
        }
    }
    system.all_is_equal(traffic).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_without_self_fencing_the_log_and_the_sink_refuse() {
    let _alone = alone().await;
    let failpoints = "no-self-fencing,hold-append";
    let (mut system, traffic) = System::start_with_traffic(plan(failpoints), 300).await;
    system.log_is_on_three_servers().await;
    system.row_passes().await;
    for _ in 0..rounds(3) {
        let (capture, apply) = (system.capture(), system.apply_task());
        let owner = system.owner(&capture).await;
        holds_a_segment(&system, &owner).await;
        let zombie = stand_still(&mut system, &capture, &traffic).await;
        assert_eq!(zombie, owner);
        let worker = system.worker(&zombie);
        worker.resume();
        worker.release_append();
        at_least_one(worker, APPENDS_REFUSED, &[("reason", "chain")]).await;
        at_least_one(worker, LOG_FENCED, &[]).await;
        at_least_one(worker, TASKS_ENDED, &[("task", "shop.capture"), ("outcome", "given_up")]).await;
        replace(&mut system, &zombie, failpoints).await;

        let zombie = stand_still(&mut system, &apply, &traffic).await;
        let successor = system.owner(&apply).await;
        at_least_one(system.worker(&successor), SESSIONS_ENDED, &[]).await;
        let worker = system.worker(&zombie);
        worker.resume();
        at_least_one(worker, SINK_REFUSED, &[]).await;
        at_least_one(worker, TASKS_ENDED, &[("task", "shop.apply.warehouse"), ("outcome", "given_up")]).await;
        system.recovers("the zombie whose sessions were ended goes on", Instant::now(), &traffic).await;
        replace(&mut system, &zombie, failpoints).await;
    }
    system.all_is_equal(traffic).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_zombie_whose_session_lives_on_is_refused_by_the_epoch() {
    let _alone = alone().await;
    let failpoints = "no-self-fencing,keep-older-sessions";
    let (mut system, traffic) = System::start_with_traffic(plan(failpoints), 300).await;
    system.log_is_on_three_servers().await;
    system.row_passes().await;
    for _ in 0..rounds(3) {
        let apply = system.apply_task();
        let zombie = stand_still(&mut system, &apply, &traffic).await;
        let successor = system.owner(&apply).await;
        let ended = system.worker(&successor).metric(SESSIONS_ENDED, &[]).await.unwrap();
        assert_eq!(ended, 0.0, "the failpoint keeps older sessions");
        system.worker(&zombie).resume();
        at_least_one(system.worker(&zombie), SINK_REFUSED, &[]).await;
        replace(&mut system, &zombie, failpoints).await;
    }
    system.all_is_equal(traffic).await;
}

/// Stops the owner of a task until another worker has taken over and rows pass; returns its name. It stays stopped.
async fn stand_still(system: &mut System, task: &TaskId, traffic: &Traffic) -> String {
    let owner = system.owner(task).await;
    let at = Instant::now();
    pause_between_transactions(system, &owner).await;
    let next = system.owner_other_than(task, &owner).await;
    println!("SIGSTOP of {owner}: {next} owns {task} after {:.1} s", at.elapsed().as_secs_f64());
    system.recovers(&format!("SIGSTOP of the owner of {task}"), at, traffic).await;
    assert_eq!(system.owner_now(task).await.as_deref(), Some(next.as_str()));
    owner
}

/// Stops a worker while its sink's session is in no transaction: one that is would hold the lock that a successor, forbidden to end the
/// session, waits for. (That case is a test of the sink's own.)
async fn pause_between_transactions(system: &System, name: &str) {
    let target = system.target().await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'warehouse' AND application_name LIKE 'wallaby/%' \
               AND xact_start IS NOT NULL";
    eventually(PATIENCE, "the worker stands still between two transactions", async || {
        let worker = system.worker(name);
        worker.pause().await;
        // What was sent before the stop is finished by the server by itself.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let open: i64 = target.query_one(sql, &[]).await.unwrap().get(0);
        if open == 0 {
            return Ok(());
        }
        worker.resume();
        Err(open)
    })
    .await;
}

/// Makes the owner of the capture keep rows at hand. Without that a zombie that wakes up may meet its successor at the source first,
/// and append nothing.
async fn holds_a_segment(system: &System, owner: &str) {
    system.worker(owner).hold_append();
    let holds =
        |status: &TaskStatus| status.waiting_for.as_ref().is_some_and(|waiting| waiting.what.contains("hold-append"));
    system.until_status(&system.capture(), "the capture has a segment at hand", holds).await;
}

async fn at_least_one(worker: &Program, metric: &str, labels: &[(&str, &str)]) {
    let what = format!("{metric} {labels:?} of {} counts", worker.name());
    let count = eventually(PATIENCE, &what, async || match worker.metric(metric, labels).await {
        Ok(count) if count >= 1.0 => Ok(count),
        other => Err(other),
    })
    .await;
    println!("{}: {metric} {labels:?} = {count}", worker.name());
}

/// A worker that does not fence itself lives on without a lease, and would go on taking offers that it cannot keep.
async fn replace(system: &mut System, zombie: &str, failpoints: &str) {
    system.kill_worker(zombie).await;
    system.start_worker(failpoints);
}
