//! How things are printed: tables and figures for people, JSON and YAML for programs.

use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use wallaby_model::api;
use wallaby_proto::v1;

use crate::args::Output;
use crate::failure::Failure;

/// A table whose columns are as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these titles.
    pub fn new(titles: &[&str]) -> Table {
        Table { rows: vec![titles.iter().map(|title| (*title).to_owned()).collect()] }
    }

    /// Adds a row with as many cells as there are titles.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.rows[0].len());
        self.rows.push(cells.into());
    }

    /// The text, a line for each row.
    pub fn text(&self) -> String {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            text.push_str(cells.join("   ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Writes text to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Whether standard output is a terminal that understands cursor movements.
pub fn on_terminal() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes a value as JSON or YAML.
pub fn print_value(output: Output, value: &Value) -> Result<(), Failure> {
    let text = match output {
        Output::Yaml => serde_yaml_ng::to_string(value).map_err(|error| Failure::Failed(error.to_string()))?,
        Output::Json | Output::Table => {
            let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Failed(error.to_string()))?;
            text + "\n"
        }
    };
    print(&text)
}

/// A flow as its file, with what is under `status`: `wallaby apply` takes it back.
pub fn flow_value(flow: &v1::Flow) -> Value {
    // A controller of another version may know specifications that we do not: then only the status is shown.
    let document = api::flow_from_message(flow).ok().and_then(|document| serde_json::to_value(document).ok());
    let mut value = document.unwrap_or_else(|| json!({ "metadata": { "name": short(&flow.name) } }));
    value["status"] = flow_status_value(flow);
    value
}

fn flow_status_value(flow: &v1::Flow) -> Value {
    let status = flow.status.clone().unwrap_or_default();
    let capture = status.capture.map(|capture| {
        json!({
            "sourceLsn": capture.source_lsn,
            "confirmedLsn": capture.confirmed_lsn,
            "stagedPosition": capture.staged_position,
            "retainedWalBytes": capture.retained_wal_bytes,
            "lagBytes": capture.lag_bytes,
            "lagSeconds": capture.lag.map(seconds),
            "rows": capture.rows_total,
        })
    });
    json!({
        "phase": phase_word(status.phase),
        "generation": flow.generation,
        "observedGeneration": status.observed_generation,
        "etag": flow.etag,
        "created": flow.create_time.map(|time| time.to_string()),
        "conditions": status.conditions.iter().map(condition_value).collect::<Vec<_>>(),
        "capture": capture,
        "tasks": status.tasks.iter().map(task_value).collect::<Vec<_>>(),
        "sinks": status.sinks.iter().map(sink_value).collect::<Vec<_>>(),
        "snapshots": status.snapshots.iter().map(snapshot_value).collect::<Vec<_>>(),
    })
}

fn condition_value(condition: &v1::Condition) -> Value {
    json!({
        "type": condition.r#type,
        "status": condition_word(condition.status),
        "reason": condition.reason,
        "message": condition.message,
        "since": condition.since.map(|time| time.to_string()),
    })
}

fn task_value(task: &v1::Task) -> Value {
    json!({
        "task": task.task,
        "state": task.state,
        "worker": task.worker,
        "epoch": task.epoch,
        "waitsFor": task.waits_for,
        "stopped": task.stopped,
        "lastError": task.last_error,
        "since": task.since.map(|time| time.to_string()),
        "retryAt": task.retry_time.map(|time| time.to_string()),
    })
}

/// A sink as it is.
pub fn sink_value(sink: &v1::Sink) -> Value {
    let progress = sink.progress.clone().unwrap_or_default();
    json!({
        "name": sink.name,
        "paused": sink.spec.as_ref().is_some_and(|spec| spec.paused),
        "conditions": sink.conditions.iter().map(condition_value).collect::<Vec<_>>(),
        "task": sink.task.as_ref().map(task_value),
        "position": progress.position,
        "lagBytes": progress.lag_bytes,
        "lagSeconds": progress.lag.map(seconds),
        "rows": progress.rows_total,
    })
}

/// A worker as it is.
pub fn worker_value(worker: &v1::Worker) -> Value {
    json!({
        "name": short(&worker.name),
        "address": worker.address,
        "version": worker.version,
        "capacity": worker.capacity,
        "tasks": worker.tasks,
        "zone": worker.zone,
        "draining": worker.draining,
        "started": worker.start_time.map(|time| time.to_string()),
    })
}

/// A snapshot run as it is.
pub fn snapshot_value(snapshot: &v1::Snapshot) -> Value {
    let spec = snapshot.spec.clone().unwrap_or_default();
    let progress = snapshot.progress.clone().unwrap_or_default();
    let table = |table: &v1::SnapshotTable| {
        json!({
            "table": table.table,
            "relations": table.relations,
            "chunksTotal": table.chunks_total,
            "chunksDone": table.chunks_done,
            "rowsDone": table.rows_done,
            "rowsEstimate": table.rows_estimate,
            "restarts": table.restarts,
            "gone": table.gone,
        })
    };
    let sink = |sink: &v1::SnapshotSink| {
        json!({
            "sink": sink.sink,
            "chunksLoaded": sink.chunks_loaded,
            "rowsLoaded": sink.rows_loaded,
            "tablesCopying": sink.tables_copying,
            "tablesCatchingUp": sink.tables_catching_up,
            "tablesReady": sink.tables_ready,
            "done": sink.done,
        })
    };
    json!({
        "name": snapshot.name,
        "state": snapshot_state_word(snapshot.state),
        "reason": snapshot_reason_word(snapshot.reason),
        "message": snapshot.message,
        "created": snapshot.create_time.map(|time| time.to_string()),
        "updated": snapshot.update_time.map(|time| time.to_string()),
        "worker": snapshot.worker,
        "spec": {
            "tables": spec.tables,
            "exclude": spec.exclude,
            "sinks": spec.sinks,
            "rowsPerSecond": spec.rows_per_second,
            "readers": spec.readers,
        },
        "chunksTotal": progress.chunks_total,
        "chunksDone": progress.chunks_done,
        "chunksReading": progress.chunks_reading,
        "rowsDone": progress.rows_done,
        "rowsEstimate": progress.rows_estimate,
        "bytesDone": progress.bytes_done,
        "rowsPerSecond": progress.rows_per_second,
        "remainingSeconds": progress.remaining.map(seconds),
        "generation": progress.generation,
        "snapshotAgeSeconds": progress.snapshot_age.map(seconds),
        "consistentPoint": progress.consistent_point,
        "tables": snapshot.tables.iter().map(table).collect::<Vec<_>>(),
        "sinks": snapshot.sinks.iter().map(sink).collect::<Vec<_>>(),
    })
}

/// Where a run stands, in one word.
pub fn snapshot_state_word(state: i32) -> &'static str {
    match v1::SnapshotState::try_from(state) {
        Ok(v1::SnapshotState::Planning) => "Planning",
        Ok(v1::SnapshotState::Reading) => "Reading",
        Ok(v1::SnapshotState::Loading) => "Loading",
        Ok(v1::SnapshotState::Done) => "Done",
        Ok(v1::SnapshotState::Cancelled) => "Cancelled",
        Ok(v1::SnapshotState::Paused) => "Paused",
        Ok(v1::SnapshotState::Cancelling) => "Cancelling",
        _ => "Unknown",
    }
}

/// Why a run exists, in one word.
pub fn snapshot_reason_word(reason: i32) -> &'static str {
    match v1::SnapshotReason::try_from(reason) {
        Ok(v1::SnapshotReason::FirstLoad) => "FirstLoad",
        Ok(v1::SnapshotReason::TablesAdded) => "TablesAdded",
        Ok(v1::SnapshotReason::TablesReplaced) => "TablesReplaced",
        Ok(v1::SnapshotReason::Asked) => "Asked",
        Ok(v1::SnapshotReason::SinkAnew) => "SinkAnew",
        _ => "Unknown",
    }
}

/// The last part of a resource name; `flow/sink` for a sink, `flow/run` for a snapshot run.
pub fn short(name: &str) -> String {
    if let Some((flow, run)) = api::parse_snapshot_name(name) {
        return format!("{flow}/{run}");
    }
    match api::parse_sink_name(name) {
        Some((flow, sink)) => format!("{flow}/{sink}"),
        None => name.rsplit('/').next().unwrap_or(name).to_owned(),
    }
}

/// A phase in one word.
pub fn phase_word(phase: i32) -> &'static str {
    match v1::Phase::try_from(phase) {
        Ok(v1::Phase::Pending) => "Pending",
        Ok(v1::Phase::Running) => "Running",
        Ok(v1::Phase::Degraded) => "Degraded",
        Ok(v1::Phase::Paused) => "Paused",
        Ok(v1::Phase::Blocked) => "Blocked",
        Ok(v1::Phase::Deleting) => "Deleting",
        Ok(v1::Phase::Snapshotting) => "Snapshotting",
        _ => "Unknown",
    }
}

/// Whether a condition holds, in one word.
pub fn condition_word(status: i32) -> &'static str {
    match v1::ConditionStatus::try_from(status) {
        Ok(v1::ConditionStatus::True) => "True",
        Ok(v1::ConditionStatus::False) => "False",
        _ => "Unknown",
    }
}

/// The status of one condition among several; `-` when it is not there.
pub fn condition_of(conditions: &[v1::Condition], kind: &str) -> String {
    let found = conditions.iter().find(|condition| condition.r#type == kind);
    found.map_or("-", |condition| condition_word(condition.status)).to_owned()
}

/// Seconds as a number.
pub fn seconds(span: prost_types::Duration) -> f64 {
    span.seconds as f64 + f64::from(span.nanos) / 1e9
}

/// A length of time for people, for lag: `3 ms`, `2.5 s`, `4 min`.
pub fn span_text(span: Option<prost_types::Duration>) -> String {
    let Some(span) = span else { return "-".to_owned() };
    match seconds(span) {
        short if short < 1.0 => format!("{:.0} ms", short * 1e3),
        medium if medium < 120.0 => format!("{medium:.1} s"),
        long => format!("{:.0} min", long / 60.0),
    }
}

/// Bytes for people: `0 B`, `3.4 KiB`, `12 MiB`.
pub fn bytes_text(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if value < 10.0 && unit != "B" {
                format!("{value:.1} {unit}")
            } else {
                format!("{value:.0} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// How long ago something was: `5s`, `3m`, `2h`, `4d`.
pub fn age_text(since: Option<prost_types::Timestamp>) -> String {
    let Some(since) = since.and_then(|since| SystemTime::try_from(since).ok()) else { return "-".to_owned() };
    match now().duration_since(since).unwrap_or(Duration::ZERO).as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn now() -> SystemTime {
    SystemTime::now()
}

/// A text, or `-` in the place of an empty one.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (12 << 20, "12 MiB"), (3 << 40, "3.0 TiB")]
        {
            assert_eq!(bytes_text(bytes), text);
        }
        let span = |seconds, nanos| span_text(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(
            (span(0, 3_000_000), span(2, 500_000_000), span(300, 0)),
            ("3 ms".into(), "2.5 s".into(), "5 min".into())
        );
        assert_eq!(short("flows/a/sinks/b"), "a/b");
        assert_eq!(short("flows/a/snapshots/3"), "a/3");
        assert_eq!(short("workers/w"), "w");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(["xyz".into(), "1".into()]);
        assert_eq!(table.text(), "A     LONG\nxyz   1\n");
    }
}
