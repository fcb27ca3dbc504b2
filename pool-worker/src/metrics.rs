//! The worker's metrics: declared and described here, and nowhere else.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use wallaby_model::{Epoch, FlowId, Lsn, Position, RunId, SinkId, TaskId, TaskKind};
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
    describe_gauge!(
        "wallaby_task_epoch",
        "Epoch of this worker's last ownership of a task: the highest of all workers is the owner's"
    );
    describe_gauge!("wallaby_sink_lag_bytes", Unit::Bytes, "WAL between the log's end and the sink");
    describe_gauge!(
        "wallaby_sink_lag_seconds",
        Unit::Seconds,
        "Age of the oldest change that the sink lacks; 0 when it lacks none"
    );
    describe_counter!("wallaby_replayed_rows_total", "Rows replayed for tables that catch up, before-images included");
    describe_counter!("wallaby_chunks_read_total", "Chunks of snapshot runs read from the source");
    describe_counter!("wallaby_snapshot_rows_total", "Rows read by snapshot runs");
    describe_counter!("wallaby_snapshot_bytes_total", Unit::Bytes, "Bytes of chunks put into the side store");
    describe_histogram!("wallaby_chunk_read_seconds", Unit::Seconds, "Time to read one chunk into the side store");
    describe_counter!("wallaby_chunks_loaded_total", "Chunks loaded into a sink");
    describe_counter!("wallaby_loaded_rows_total", "Rows loaded into a sink from chunks");
    describe_histogram!("wallaby_chunk_load_seconds", Unit::Seconds, "Time a sink took for one chunk");
    describe_gauge!("wallaby_run_chunks", "Chunks of a snapshot run");
    describe_gauge!("wallaby_run_chunks_read", "Chunks of a snapshot run that are in the side store");
    describe_gauge!("wallaby_snapshot_age_seconds", Unit::Seconds, "For how long a run has held the source's snapshot");
    describe_gauge!("wallaby_side_store_bytes", Unit::Bytes, "Bytes in the side store, by shelf");
    describe_counter!("wallaby_sinks_detached_total", "Sinks that were cut off from a log that got too long for them");
    describe_gauge!("wallaby_tasks", "Tasks that this worker owns");
    describe_counter!("wallaby_tasks_taken_total", "Tasks that this worker took");
    describe_counter!(
        "wallaby_tasks_ended_total",
        "Tasks that ended, by outcome: released, completed, given_up, failed, lock_lost"
    );
    describe_counter!("wallaby_tasks_wedged_total", "Tasks whose loop was silent and which the watchdog aborted");
    describe_counter!("wallaby_tasks_failed_total", "Tasks whose code failed");
    describe_counter!(
        "wallaby_offers_total",
        "Offers pulled, by outcome: taken, held, unwanted, unreadable, no_memory, resting, failed"
    );
    describe_gauge!(
        "wallaby_memory_limit_bytes",
        Unit::Bytes,
        "The limit by which this worker sizes what it keeps and reads ahead; 0 without one"
    );
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

pub fn applied(task: &TaskId, rows: u64, took: Duration, commit_to_sink_ms: u64) {
    let task = task.to_string();
    counter!("wallaby_applied_rows_total", "task" => task.clone()).increment(rows);
    histogram!("wallaby_apply_seconds", "task" => task.clone()).record(took.as_secs_f64());
    histogram!("wallaby_commit_to_sink_seconds", "task" => task).record(commit_to_sink_ms as f64 / 1000.0);
}

pub fn replayed(task: &TaskId, rows: usize) {
    counter!("wallaby_replayed_rows_total", "task" => task.to_string()).increment(rows as u64);
}

pub fn chunk_read(flow: &FlowId, rows: u64, bytes: u64, took: Duration) {
    let flow = flow.to_string();
    counter!("wallaby_chunks_read_total", "flow" => flow.clone()).increment(1);
    counter!("wallaby_snapshot_rows_total", "flow" => flow.clone()).increment(rows);
    counter!("wallaby_snapshot_bytes_total", "flow" => flow.clone()).increment(bytes);
    histogram!("wallaby_chunk_read_seconds", "flow" => flow).record(took.as_secs_f64());
}

pub fn chunk_loaded(flow: &FlowId, sink: &SinkId, rows: u64, took: Duration) {
    let (flow, sink) = (flow.to_string(), sink.to_string());
    counter!("wallaby_chunks_loaded_total", "flow" => flow.clone(), "sink" => sink.clone()).increment(1);
    counter!("wallaby_loaded_rows_total", "flow" => flow.clone(), "sink" => sink.clone()).increment(rows);
    histogram!("wallaby_chunk_load_seconds", "flow" => flow, "sink" => sink).record(took.as_secs_f64());
}

pub fn run(flow: &FlowId, run: RunId, chunks: usize, chunks_read: usize, snapshot_age: Duration) {
    let (flow, run) = (flow.to_string(), run.to_string());
    gauge!("wallaby_run_chunks", "flow" => flow.clone(), "run" => run.clone()).set(chunks as f64);
    gauge!("wallaby_run_chunks_read", "flow" => flow.clone(), "run" => run).set(chunks_read as f64);
    gauge!("wallaby_snapshot_age_seconds", "flow" => flow).set(snapshot_age.as_secs_f64());
}

pub fn side_store(flow: &FlowId, shelf: &'static str, bytes: u64) {
    gauge!("wallaby_side_store_bytes", "flow" => flow.to_string(), "shelf" => shelf).set(bytes as f64);
}

pub fn sink_detached(flow: &FlowId, sink: &SinkId) {
    counter!("wallaby_sinks_detached_total", "flow" => flow.to_string(), "sink" => sink.to_string()).increment(1);
}

/// A task for a metric: those of which there are tens of thousands by their kind.
fn label(task: &TaskId) -> String {
    match &task.kind {
        TaskKind::Chunk(..) => format!("{}.chunk", task.flow),
        TaskKind::Load(sink, ..) => format!("{}.load.{sink}", task.flow),
        _ => task.to_string(),
    }
}

pub fn sink_position(task: &TaskId, at: Position) {
    gauge!("wallaby_applied_lsn", "task" => task.to_string()).set(at.commit.0 as f64);
}

pub fn sink_lag(task: &TaskId, lag_bytes: u64, lag_ms: u64) {
    let task = task.to_string();
    gauge!("wallaby_sink_lag_bytes", "task" => task.clone()).set(lag_bytes as f64);
    gauge!("wallaby_sink_lag_seconds", "task" => task).set(lag_ms as f64 / 1000.0);
}

pub fn epoch(task: &TaskId, epoch: Epoch) {
    gauge!("wallaby_task_epoch", "task" => task.to_string()).set(epoch.0 as f64);
}

pub fn tasks(count: usize) {
    gauge!("wallaby_tasks").set(count as f64);
}

pub fn task_taken(task: &TaskId) {
    counter!("wallaby_tasks_taken_total", "task" => label(task)).increment(1);
}

pub fn task_ended(task: &TaskId, outcome: &'static str) {
    counter!("wallaby_tasks_ended_total", "task" => label(task), "outcome" => outcome).increment(1);
}

pub fn task_wedged(task: &TaskId) {
    counter!("wallaby_tasks_wedged_total", "task" => label(task)).increment(1);
}

pub fn task_failed(task: &TaskId) {
    counter!("wallaby_tasks_failed_total", "task" => label(task)).increment(1);
}

pub fn offer(outcome: &'static str) {
    counter!("wallaby_offers_total", "outcome" => outcome).increment(1);
}

pub fn memory(limit: Option<u64>) {
    gauge!("wallaby_memory_limit_bytes").set(limit.unwrap_or(0) as f64);
}

pub fn cache(bytes: usize) {
    gauge!("wallaby_cache_bytes").set(bytes as f64);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Mutex;

    use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

    /// Keeps what is described: names and texts.
    #[derive(Default)]
    struct Described(Mutex<BTreeMap<String, String>>);

    impl Described {
        fn note(&self, name: &KeyName, text: &SharedString) {
            self.0.lock().unwrap().insert(name.as_str().to_owned(), text.to_string());
        }
    }

    impl Recorder for Described {
        fn describe_counter(&self, name: KeyName, _: Option<Unit>, text: SharedString) {
            self.note(&name, &text);
        }
        fn describe_gauge(&self, name: KeyName, _: Option<Unit>, text: SharedString) {
            self.note(&name, &text);
        }
        fn describe_histogram(&self, name: KeyName, _: Option<Unit>, text: SharedString) {
            self.note(&name, &text);
        }
        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            Counter::noop()
        }
        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }
        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    /// The metrics that a page names, with their labels: what stands in backticks and begins as ours do.
    fn named(page: &str) -> Vec<&str> {
        let spans = page.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
        spans.filter(|span| span.starts_with("wallaby_") && !span.contains('<')).collect()
    }

    #[test]
    fn the_metrics_of_the_pages_are_those_that_a_worker_describes() {
        let described = Described::default();
        metrics::with_local_recorder(&described, crate::describe_metrics);
        let described = described.0.into_inner().unwrap();
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let mut count = 0;
        for page in ["operations.md", "log.md", "sinks/postgres.md", "verify.md", "loadtest.md"] {
            for name in named(&std::fs::read_to_string(docs.join(page)).unwrap()) {
                let (bare, labels) = name.split_once('{').unwrap_or((name, ""));
                let text = described.get(bare).unwrap_or_else(|| panic!("{page} names {bare}, which nobody describes"));
                for label in labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()) {
                    let (key, value) = label.split_once('=').unwrap();
                    let is_told = text.contains(&format!("by {key}:")) && text.contains(value.trim_matches('"'));
                    assert!(is_told, "{page} names {name}, which is described as: {text}");
                }
                count += 1;
            }
        }
        assert!(count >= 10, "only {count} names were found: the pages are read wrongly");
    }
}
