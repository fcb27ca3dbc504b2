//! The worker's metrics: declared and described here, and nowhere else.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use wallaby_model::{FlowId, Lsn, Position, TaskId};
use wallaby_postgres_source::SourceStatus;

/// Describes every metric of this crate.
pub fn describe() {
    describe_counter!("wallaby_staged_rows_total", "Rows handed to the log, before-images included");
    describe_counter!("wallaby_staged_bytes_total", Unit::Bytes, "Packed segment bytes handed to the log");
    describe_gauge!("wallaby_staged_lsn", "Commit LSN up to which changes are acknowledged by the log");
    describe_gauge!("wallaby_confirmed_lsn", "LSN told to Postgres as flushed");
    describe_gauge!("wallaby_source_lsn", "End of the source's WAL as last heard");
    describe_gauge!("wallaby_source_lag_bytes", Unit::Bytes, "WAL between the source's end and the log's");
    describe_gauge!("wallaby_retained_wal_bytes", Unit::Bytes, "WAL that the slot keeps the source from removing");
    describe_counter!("wallaby_applied_rows_total", "Rows applied to a sink, before-images included");
    describe_histogram!("wallaby_apply_seconds", Unit::Seconds, "Time a sink took for one batch");
    describe_histogram!(
        "wallaby_commit_to_sink_seconds",
        Unit::Seconds,
        "From the commit at the source to durable in the sink"
    );
    describe_gauge!("wallaby_applied_lsn", "Commit LSN up to which a sink has everything");
    describe_gauge!("wallaby_sink_lag_bytes", Unit::Bytes, "WAL between what this worker read of the log and the sink");
    describe_gauge!(
        "wallaby_sink_lag_seconds",
        Unit::Seconds,
        "Age of the last applied change while the sink is behind; 0 when caught up"
    );
    describe_gauge!("wallaby_tasks", "Tasks that this worker owns");
    describe_counter!("wallaby_tasks_taken_total", "Tasks that this worker took");
    describe_counter!("wallaby_tasks_ended_total", "Tasks that ended, by outcome: released, given_up, lock_lost");
    describe_counter!("wallaby_tasks_wedged_total", "Tasks whose loop was silent and which the watchdog aborted");
    describe_counter!("wallaby_tasks_failed_total", "Tasks whose code failed");
    describe_counter!("wallaby_offers_total", "Offers pulled, by outcome: taken, held, unwanted, unreadable, failed");
    describe_gauge!("wallaby_cache_bytes", Unit::Bytes, "Staged records kept in memory for the sinks of this worker");
}

pub fn staged(flow: &FlowId, rows: usize, bytes: usize) {
    let flow = flow.to_string();
    counter!("wallaby_staged_rows_total", "flow" => flow.clone()).increment(rows as u64);
    counter!("wallaby_staged_bytes_total", "flow" => flow).increment(bytes as u64);
}

pub fn positions(flow: &FlowId, staged: Position, confirmed: Lsn, source: Lsn) {
    let flow = flow.to_string();
    gauge!("wallaby_staged_lsn", "flow" => flow.clone()).set(staged.commit.0 as f64);
    gauge!("wallaby_confirmed_lsn", "flow" => flow.clone()).set(confirmed.0 as f64);
    gauge!("wallaby_source_lsn", "flow" => flow.clone()).set(source.0 as f64);
    gauge!("wallaby_source_lag_bytes", "flow" => flow).set(source.0.saturating_sub(staged.commit.0) as f64);
}

pub fn source(flow: &FlowId, status: &SourceStatus) {
    gauge!("wallaby_retained_wal_bytes", "flow" => flow.to_string()).set(status.retained_bytes as f64);
}

pub fn applied(task: &TaskId, rows: usize, took: Duration, commit_to_sink_ms: u64) {
    let task = task.to_string();
    counter!("wallaby_applied_rows_total", "task" => task.clone()).increment(rows as u64);
    histogram!("wallaby_apply_seconds", "task" => task.clone()).record(took.as_secs_f64());
    histogram!("wallaby_commit_to_sink_seconds", "task" => task).record(commit_to_sink_ms as f64 / 1000.0);
}

pub fn sink_position(task: &TaskId, at: Position, lag_bytes: u64, lag_ms: u64) {
    let task = task.to_string();
    gauge!("wallaby_applied_lsn", "task" => task.clone()).set(at.commit.0 as f64);
    gauge!("wallaby_sink_lag_bytes", "task" => task.clone()).set(lag_bytes as f64);
    gauge!("wallaby_sink_lag_seconds", "task" => task).set(lag_ms as f64 / 1000.0);
}

pub fn tasks(count: usize) {
    gauge!("wallaby_tasks").set(count as f64);
}

pub fn task_taken(task: &TaskId) {
    counter!("wallaby_tasks_taken_total", "task" => task.to_string()).increment(1);
}

pub fn task_ended(task: &TaskId, outcome: &'static str) {
    counter!("wallaby_tasks_ended_total", "task" => task.to_string(), "outcome" => outcome).increment(1);
}

pub fn task_wedged(task: &TaskId) {
    counter!("wallaby_tasks_wedged_total", "task" => task.to_string()).increment(1);
}

pub fn task_failed(task: &TaskId) {
    counter!("wallaby_tasks_failed_total", "task" => task.to_string()).increment(1);
}

pub fn offer(outcome: &'static str) {
    counter!("wallaby_offers_total", "outcome" => outcome).increment(1);
}

pub fn cache(bytes: usize) {
    gauge!("wallaby_cache_bytes").set(bytes as f64);
}
