//! Several sinks of one flow in one worker: a record is pulled once for all of them, and one that stands still delays nobody.

use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

const READ_BYTES: &str = "wallaby_log_read_bytes_total";
const PULLED_BYTES: &str = "wallaby_log_pulled_bytes_total";
const EPOCH: &str = "wallaby_task_epoch";
const CAPTURE: (&str, &str) = ("task", "shop.capture");
/// What docs/operations.md tells people to watch, but for what counts from its first event on: tests of these events look at that.
const WATCHED: [&str; 15] = [
    "wallaby_retained_wal_bytes",
    "wallaby_confirmed_lsn",
    "wallaby_staged_lsn",
    "wallaby_source_lsn",
    "wallaby_source_lag_bytes",
    "wallaby_applied_lsn",
    "wallaby_sink_lag_bytes",
    "wallaby_sink_lag_seconds",
    "wallaby_commit_to_sink_seconds",
    "wallaby_tasks",
    EPOCH,
    "wallaby_cache_bytes",
    "wallaby_log_appended_records_total",
    PULLED_BYTES,
    READ_BYTES,
];

async fn confirmed(system: &System) -> String {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    system.source().await.query_one(sql, &[&system.flow().slot_name()]).await.unwrap().get(0)
}

/// Waits until a metric of the first worker is above something; its value.
async fn rises_above(system: &System, name: &str, labels: &[(&str, &str)], bound: f64) -> f64 {
    let what = format!("{name} {labels:?} is above {bound}");
    eventually(PATIENCE, &what, async || match system.workers[0].metric(name, labels).await {
        Ok(value) if value > bound => Ok(value),
        other => Err(other),
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_sinks_pull_a_record_once_and_a_blocked_one_delays_nobody() {
    let _alone = alone().await;
    let more_sinks = ["second", "third"].map(str::to_owned).to_vec();
    let plan = Plan { workers: vec![""], flow: FlowFile { more_sinks, ..FlowFile::default() }, ..Plan::default() };
    let (mut system, traffic) = System::start_with_traffic(plan, 300).await;
    system.row_passes().await;
    let blocked = system.postgres.connect("second").await.unwrap();
    eventually(PATIENCE, "the second sink has its table", async || {
        // A try that came before the table leaves its transaction failed.
        blocked
            .batch_execute("ROLLBACK; BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE")
            .await
            .map_err(|e| e.to_string())
    })
    .await;
    let told = confirmed(&system).await;
    for _ in 0..20 {
        system.row_passes().await;
    }
    system.is_passed_by("third").await;
    eventually(PATIENCE, "Postgres is told of what is staged meanwhile", async || match confirmed(&system).await {
        now if now != told => Ok(()),
        now => Err(now),
    })
    .await;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'second' AND wait_event_type = 'Lock'";
    let source = system.source().await;
    eventually(PATIENCE, "the second sink is blocked", async || {
        let waiting: i64 = source.query_one(waits, &[]).await.map_err(|error| error.to_string())?.get(0);
        if waiting > 0 { Ok(()) } else { Err("no session waits for a lock".to_owned()) }
    })
    .await;
    // An alarm has what to go by: the blocked sink is behind, for longer and longer, and what is not confirmed yet holds WAL back.
    let labels = [("task", "shop.apply.second")];
    rises_above(&system, "wallaby_sink_lag_bytes", &labels, 0.0).await;
    let behind = rises_above(&system, "wallaby_sink_lag_seconds", &labels, 0.0).await;
    rises_above(&system, "wallaby_sink_lag_seconds", &labels, behind).await;
    rises_above(&system, "wallaby_retained_wal_bytes", &[("flow", "shop")], 0.0).await;
    blocked.batch_execute("ROLLBACK").await.unwrap();

    let worker = system.workers[0].name().to_owned();
    system.all_is_equal(traffic).await;
    for sink in ["second", "third"] {
        system.is_equal_at(sink).await;
    }
    let worker = system.worker(&worker);
    let (read, pulled) =
        (worker.metric(READ_BYTES, &[]).await.unwrap(), worker.metric(PULLED_BYTES, &[]).await.unwrap());
    let once = read / 3.0;
    println!("three sinks read {read} bytes and pulled {pulled}; one reads {once}");
    assert!(pulled < once * 1.3, "three sinks pulled {pulled} bytes; one reads {once}");
    let metrics = worker.metrics().await.unwrap();
    for name in WATCHED {
        let is_there =
            metrics.lines().any(|line| line.starts_with(name) && line.ends_with(|c: char| c.is_ascii_digit()));
        assert!(is_there, "{name} is not served");
    }
    for (lsn, task) in [("wallaby_confirmed_lsn", None), ("wallaby_applied_lsn", Some("shop.apply.third"))] {
        let labels: Vec<_> = task.map(|task| ("task", task)).into_iter().collect();
        assert!(worker.metric(lsn, &labels).await.unwrap() > 0.0, "{lsn} stands at nothing");
    }

    // The capture changes hands: its epoch says so.
    let epoch = worker.metric(EPOCH, &[CAPTURE]).await.unwrap();
    let name = worker.name().to_owned();
    system.kill_worker(&name).await;
    system.start_worker("");
    let next = rises_above(&system, EPOCH, &[CAPTURE], epoch).await;
    println!("the capture's epoch went from {epoch} to {next}");
    system.row_passes().await;
}
