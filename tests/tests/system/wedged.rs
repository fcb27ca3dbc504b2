//! A task that hangs in a healthy worker.

use std::time::Instant;

use wallaby_testkit::eventually;
use wallaby_tests::PATIENCE;
use wallaby_tests::system::{Plan, System};

/// Runs beside the other tests: for half a minute it does nothing but wait for the watchdog.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h24_a_wedged_task_is_dropped_by_the_watchdog_and_taken_over() {
    // Each worker hangs once in each of its loops; the watchdog drops both tasks, and they go on.
    let plan = Plan { workers: vec!["hang-capture,hang-apply"], ..Plan::default() };
    let mut system = System::start(plan).await;
    let said = system.apply(&wallaby_tests::flow::FlowFile::default()).await;
    assert_eq!(said.code, 0, "{}", said.text);
    let sick = system.owner(&system.apply_task()).await;
    system.owner(&system.capture()).await;
    let at = Instant::now();
    for task in [system.capture(), system.apply_task()] {
        let name = task.to_string();
        let worker = system.worker(&sick);
        eventually(PATIENCE, &format!("the watchdog drops {name}"), async || {
            match worker.metric("wallaby_tasks_wedged_total", &[("task", &name)]).await {
                Ok(count) if count >= 1.0 => Ok(()),
                other => Err(other),
            }
        })
        .await;
        println!("{name} was wedged and dropped after {:.1} s", at.elapsed().as_secs_f64());
    }
    assert!(system.worker(&sick).process().is_alive(), "the worker itself is healthy");
    system.start_worker("");
    let passed = system.row_passes().await;
    println!("rows pass {:.1} s later", passed.as_secs_f64());
}
