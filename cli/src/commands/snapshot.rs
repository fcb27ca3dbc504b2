//! `wallaby snapshot`: runs that load rows which are there already.

use std::io::Write;
use std::time::Duration;

use tokio::time::Instant;
use wallaby_model::{FlowId, RunId, api};
use wallaby_proto::v1;

use super::{Lasting, Target};
use crate::args::{Global, Output, Snapshot, SnapshotList, SnapshotNamed, SnapshotStart};
use crate::failure::Failure;
use crate::render::{self, Table, age_text, bytes_text, or_dash, short, span_text};
use crate::server::Server;

/// The time between two looks at a run that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The time between two lines about it, where the output is no terminal.
const SAY_EVERY: Duration = Duration::from_secs(5);

pub async fn run(global: &Global, command: &Snapshot) -> Result<(), Failure> {
    let server = Server::connect(global).await?;
    match command {
        Snapshot::Start(options) => start(global, &server, options).await,
        Snapshot::Pause(named) => pause(global, &server, named).await,
        Snapshot::Resume(named) => resume(global, &server, named).await,
        Snapshot::Cancel(named) => cancel(global, &server, named).await,
        Snapshot::Get(named) => get(global, &server, named).await,
        Snapshot::List(options) => list(global, &server, options).await,
    }
}

async fn start(global: &Global, server: &Server, options: &SnapshotStart) -> Result<(), Failure> {
    let flow = Target::parse_flow(std::slice::from_ref(&options.flow))?;
    let spec = v1::SnapshotSpec {
        tables: options.tables.clone(),
        sinks: options.sinks.clone(),
        rows_per_second: options.rows_per_second.unwrap_or(0),
        readers: options.readers.unwrap_or(0),
        exclude: options.exclude.clone(),
    };
    let request = server.request(v1::StartSnapshotRequest { parent: api::flow_name(&flow), spec: Some(spec) });
    let answer = server.snapshots().start_snapshot(request).await.map_err(|status| server.failure(&status))?;
    let snapshot = answer.into_inner().snapshot.unwrap_or_default();
    said_and_waited(global, server, &snapshot, "asked for", options.wait).await
}

async fn pause(global: &Global, server: &Server, named: &SnapshotNamed) -> Result<(), Failure> {
    let name = name_of(server, named).await?;
    let request = server.request(v1::PauseSnapshotRequest { name });
    let answer = server.snapshots().pause_snapshot(request).await.map_err(|status| server.failure(&status))?;
    said(global, &answer.into_inner().snapshot.unwrap_or_default(), "paused: what is read stays")
}

async fn resume(global: &Global, server: &Server, named: &SnapshotNamed) -> Result<(), Failure> {
    let name = name_of(server, named).await?;
    let request = server.request(v1::ResumeSnapshotRequest { name });
    let answer = server.snapshots().resume_snapshot(request).await.map_err(|status| server.failure(&status))?;
    said_and_waited(global, server, &answer.into_inner().snapshot.unwrap_or_default(), "resumed", named.wait).await
}

async fn cancel(global: &Global, server: &Server, named: &SnapshotNamed) -> Result<(), Failure> {
    let name = name_of(server, named).await?;
    let request = server.request(v1::CancelSnapshotRequest { name });
    let answer = server.snapshots().cancel_snapshot(request).await.map_err(|status| server.failure(&status))?;
    let snapshot = answer.into_inner().snapshot.unwrap_or_default();
    said_and_waited(global, server, &snapshot, "is being cancelled", named.wait).await
}

async fn get(global: &Global, server: &Server, named: &SnapshotNamed) -> Result<(), Failure> {
    let name = name_of(server, named).await?;
    if named.wait {
        return wait_for(global, server, &name).await;
    }
    let snapshot = read(server, &name).await?;
    match global.output {
        Output::Table => render::print(&describe(&snapshot)),
        output => render::print_value(output, &render::snapshot_value(&snapshot)),
    }
}

async fn list(global: &Global, server: &Server, options: &SnapshotList) -> Result<(), Failure> {
    let flow = options.flow.as_ref().map(|flow| Target::parse_flow(std::slice::from_ref(flow))).transpose()?;
    let snapshots = all(server, flow.as_ref()).await?;
    if global.output != Output::Table {
        let values = snapshots.iter().map(render::snapshot_value).collect();
        return render::print_value(global.output, &serde_json::Value::Array(values));
    }
    if snapshots.is_empty() {
        return render::print("no snapshot runs\n");
    }
    let mut table = Table::new(&["RUN", "STATE", "WHY", "TABLES", "CHUNKS", "ROWS", "ROWS/S", "LEFT", "AGE", "NOTE"]);
    for snapshot in &snapshots {
        let progress = snapshot.progress.clone().unwrap_or_default();
        table.row([
            short(&snapshot.name),
            render::snapshot_state_word(snapshot.state).to_owned(),
            render::snapshot_reason_word(snapshot.reason).to_owned(),
            progress.tables_total.to_string(),
            format!("{}/{}", progress.chunks_done, progress.chunks_total),
            progress.rows_done.to_string(),
            format!("{:.0}", progress.rows_per_second),
            span_text(progress.remaining),
            age_text(snapshot.create_time),
            snapshot.message.clone(),
        ]);
    }
    render::print(&table.text())
}

/// Prints what was done to a run.
fn said(global: &Global, snapshot: &v1::Snapshot, what: &str) -> Result<(), Failure> {
    match global.output {
        Output::Table => render::print(&format!("snapshot {} {what}\n", short(&snapshot.name))),
        output => render::print_value(output, &render::snapshot_value(snapshot)),
    }
}

/// Prints what was done to a run, and what came of it when that is waited for; for programs the latter alone, as one value.
async fn said_and_waited(
    global: &Global,
    server: &Server,
    snapshot: &v1::Snapshot,
    what: &str,
    waits: bool,
) -> Result<(), Failure> {
    if !waits {
        return said(global, snapshot, what);
    }
    if global.output == Output::Table {
        said(global, snapshot, what)?;
    }
    wait_for(global, server, &snapshot.name).await
}

async fn read(server: &Server, name: &str) -> Result<v1::Snapshot, Failure> {
    let request = server.request(v1::GetSnapshotRequest { name: name.to_owned() });
    let answer = server.snapshots().get_snapshot(request).await.map_err(|status| server.failure(&status))?;
    Ok(answer.into_inner().snapshot.unwrap_or_default())
}

async fn all(server: &Server, flow: Option<&FlowId>) -> Result<Vec<v1::Snapshot>, Failure> {
    let parent = flow.map_or("flows/-".to_owned(), api::flow_name);
    let request = server.request(v1::ListSnapshotsRequest { parent });
    let answer = server.snapshots().list_snapshots(request).await.map_err(|status| server.failure(&status))?;
    Ok(answer.into_inner().snapshots)
}

/// The run that is meant: `shop 3`, `shop/3`, `flows/shop/snapshots/3`, or `shop` when it has one that is not over, or only
/// one at all.
async fn name_of(server: &Server, named: &SnapshotNamed) -> Result<String, Failure> {
    if api::parse_snapshot_name(&named.flow).is_some() {
        return Ok(named.flow.clone());
    }
    let (flow, run) = match (named.flow.split_once('/'), &named.run) {
        (Some((flow, run)), None) if flow != "flows" => (flow.to_owned(), Some(run.to_owned())),
        _ => (named.flow.clone(), named.run.clone()),
    };
    let flow = Target::parse_flow(&[flow])?;
    if let Some(run) = run {
        let run: RunId = run.parse().map_err(|error: wallaby_model::IdError| Failure::Invalid(error.to_string()))?;
        return Ok(api::snapshot_name(&flow, run));
    }
    let snapshots = all(server, Some(&flow)).await?;
    let open: Vec<&v1::Snapshot> = snapshots.iter().filter(|snapshot| !is_over(snapshot)).collect();
    match (open.as_slice(), snapshots.as_slice()) {
        ([one], _) => Ok(one.name.clone()),
        ([], [.., last]) => Ok(last.name.clone()),
        ([], []) => Err(Failure::Failed(format!("flow {flow} has no snapshot run"))),
        (several, _) => {
            let names: Vec<String> = several.iter().map(|snapshot| short(&snapshot.name)).collect();
            Err(Failure::Invalid(format!(
                "flow {flow} has several runs that are not over: name one of {}",
                names.join(", ")
            )))
        }
    }
}

fn is_over(snapshot: &v1::Snapshot) -> bool {
    matches!(v1::SnapshotState::try_from(snapshot.state), Ok(v1::SnapshotState::Done | v1::SnapshotState::Cancelled))
}

/// Whether no worker has begun with it.
fn waits_for_a_worker(snapshot: &v1::Snapshot) -> bool {
    snapshot.state == i32::from(v1::SnapshotState::Planning) && snapshot.worker.is_empty()
}

/// Waits for the end of a run, at most --timeout, and says how far it is.
async fn wait_for(global: &Global, server: &Server, name: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + global.timeout;
    let mut line = Line::new(global.output);
    let mut untaken = Lasting::default();
    loop {
        let snapshot = match read(server, name).await {
            Ok(snapshot) => snapshot,
            // A controller that restarts while we wait is not the outcome.
            Err(Failure::Unreachable(text)) if Instant::now() < deadline => {
                line.say(&text);
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let text = progress_line(&snapshot);
        if is_over(&snapshot) {
            line.end();
            let is_done = snapshot.state == i32::from(v1::SnapshotState::Done);
            match global.output {
                Output::Table => render::print(&format!("{text}\n"))?,
                output => render::print_value(output, &render::snapshot_value(&snapshot))?,
            }
            let cancelled = || Failure::Failed(format!("snapshot {} was cancelled", short(name)));
            return if is_done { Ok(()) } else { Err(cancelled()) };
        }
        if Instant::now() >= deadline {
            line.end();
            if global.output != Output::Table {
                render::print_value(global.output, &render::snapshot_value(&snapshot))?;
            }
            let seconds = global.timeout.as_secs_f32();
            return Err(Failure::TimedOut(format!("not done after {seconds} s, it goes on by itself: {text}")));
        }
        let is_untaken = waits_for_a_worker(&snapshot);
        if is_untaken == untaken.look(is_untaken, Instant::now()) {
            line.say(&text);
        }
        tokio::time::sleep_until(deadline.min(Instant::now() + LOOK_EVERY)).await;
    }
}

/// One line that is written over on a terminal, and now and then a new one elsewhere. On standard error: the outcome alone goes
/// to standard output.
struct Line {
    live: bool,
    said_at: Option<Instant>,
}

impl Line {
    fn new(output: Output) -> Line {
        Line { live: output == Output::Table && render::on_terminal(), said_at: None }
    }

    fn say(&mut self, text: &str) {
        let mut out = std::io::stderr().lock();
        // Whoever does not see it misses nothing: the outcome is printed apart.
        let _unseen = if self.live {
            write!(out, "\r{text}\x1b[K").and_then(|()| out.flush())
        } else if self.said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
            self.said_at = Some(Instant::now());
            writeln!(out, "{text}")
        } else {
            Ok(())
        };
    }

    fn end(&self) {
        if self.live {
            let _unseen = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

/// How far a run is, in one line.
pub fn progress_line(snapshot: &v1::Snapshot) -> String {
    let progress = snapshot.progress.clone().unwrap_or_default();
    let mut parts = vec![
        format!("snapshot {} {}", short(&snapshot.name), render::snapshot_state_word(snapshot.state)),
        format!("{}/{} chunks", progress.chunks_done, progress.chunks_total),
        match progress.rows_estimate {
            0 => format!("{} rows", progress.rows_done),
            estimate => format!("{} of about {estimate} rows", progress.rows_done),
        },
        bytes_text(progress.bytes_done),
    ];
    if progress.rows_per_second > 0.0 {
        parts.push(format!("{:.0} rows/s", progress.rows_per_second));
    }
    if progress.remaining.is_some() {
        parts.push(format!("about {} left to read", span_text(progress.remaining)));
    }
    if !is_over(snapshot) {
        let of_sink = |sink: &v1::SnapshotSink| {
            let name = short(&sink.sink);
            let state = if sink.done { "has all".to_owned() } else { format!("{} loaded", sink.chunks_loaded) };
            format!("{name} {state}")
        };
        parts.extend(snapshot.sinks.iter().map(of_sink));
    }
    if !snapshot.message.is_empty() {
        parts.push(snapshot.message.clone());
    }
    parts.join(", ")
}

/// Everything about a run.
pub fn describe(snapshot: &v1::Snapshot) -> String {
    let progress = snapshot.progress.clone().unwrap_or_default();
    let spec = snapshot.spec.clone().unwrap_or_default();
    let mut text = format!("snapshot {}\n", short(&snapshot.name));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<14} {value}\n"));
    line("state", render::snapshot_state_word(snapshot.state).to_owned());
    line("why", render::snapshot_reason_word(snapshot.reason).to_owned());
    if !snapshot.message.is_empty() {
        line("note", snapshot.message.clone());
    }
    line("asked for", format!("{} ago", age_text(snapshot.create_time)));
    line("worker", or_dash(&snapshot.worker));
    line("tables", if spec.tables.is_empty() { "every captured one".to_owned() } else { spec.tables.join(" ") });
    line("sinks", if spec.sinks.is_empty() { "every one".to_owned() } else { spec.sinks.join(" ") });
    let throttle =
        if spec.rows_per_second == 0 { String::new() } else { format!(", at most {} rows/s", spec.rows_per_second) };
    line("readers", format!("{} of {}{throttle}", progress.chunks_reading, spec.readers));
    line("chunks", format!("{} of {} read", progress.chunks_done, progress.chunks_total));
    line("rows", format!("{} of about {}", progress.rows_done, progress.rows_estimate));
    line("bytes", bytes_text(progress.bytes_done));
    line("rate", format!("{:.0} rows/s", progress.rows_per_second));
    line("left to read", span_text(progress.remaining));
    let held =
        progress.snapshot_age.map_or("none held now".to_owned(), |age| format!("held for {}", span_text(Some(age))));
    line("generation", format!("{} at {}, {held}", progress.generation, or_dash(&progress.consistent_point)));
    if !snapshot.tables.is_empty() {
        let mut table = Table::new(&["  TABLE", "CHUNKS", "ROWS", "ABOUT", "PARTS", "RESTARTS"]);
        for one in &snapshot.tables {
            table.row([
                format!("  {}", one.table),
                if one.gone { "gone".to_owned() } else { format!("{}/{}", one.chunks_done, one.chunks_total) },
                one.rows_done.to_string(),
                one.rows_estimate.to_string(),
                one.relations.to_string(),
                one.restarts.to_string(),
            ]);
        }
        text.push_str(&table.text());
    }
    let mut table = Table::new(&["  SINK", "CHUNKS", "ROWS", "COPYING", "CATCHING UP", "READY", "DONE"]);
    for sink in &snapshot.sinks {
        table.row([
            format!("  {}", short(&sink.sink)),
            sink.chunks_loaded.to_string(),
            sink.rows_loaded.to_string(),
            sink.tables_copying.to_string(),
            sink.tables_catching_up.to_string(),
            sink.tables_ready.to_string(),
            if sink.done { "yes" } else { "no" }.to_owned(),
        ]);
    }
    text + &table.text()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run in the middle of its reading, with 90 s of it left where that is known.
    pub(in crate::commands) fn reading(remaining: bool) -> v1::Snapshot {
        let progress = v1::SnapshotProgress {
            chunks_total: 8,
            chunks_done: 3,
            rows_done: 300,
            rows_estimate: 800,
            bytes_done: 3 << 20,
            rows_per_second: 5.4,
            remaining: remaining.then_some(prost_types::Duration { seconds: 90, nanos: 0 }),
            ..v1::SnapshotProgress::default()
        };
        let sink = |sink: &str, done| v1::SnapshotSink {
            sink: format!("flows/shop/sinks/{sink}"),
            chunks_loaded: 2,
            done,
            ..v1::SnapshotSink::default()
        };
        v1::Snapshot {
            name: "flows/shop/snapshots/2".to_owned(),
            state: v1::SnapshotState::Reading.into(),
            progress: Some(progress),
            sinks: vec![sink("warehouse", false), sink("lake", true)],
            ..v1::Snapshot::default()
        }
    }

    #[test]
    fn the_line_of_a_run_says_what_is_left_of_it() {
        let begin = "snapshot shop/2 Reading, 3/8 chunks, 300 of about 800 rows, 3.0 MiB, 5 rows/s";
        let end = "shop/warehouse 2 loaded, shop/lake has all";
        assert_eq!(progress_line(&reading(true)), format!("{begin}, about 90.0 s left to read, {end}"));
        assert_eq!(progress_line(&reading(false)), format!("{begin}, {end}"));
        let over = v1::Snapshot {
            state: v1::SnapshotState::Done.into(),
            message: "all is there".to_owned(),
            ..reading(false)
        };
        assert_eq!(progress_line(&over), begin.replace("Reading", "Done") + ", all is there");
    }

    #[test]
    fn what_is_left_of_a_run_has_a_line_of_its_description() {
        let line = |snapshot: &v1::Snapshot| {
            let text = describe(snapshot);
            let found = text.lines().find_map(|line| line.trim_start().strip_prefix("left to read"));
            found.map(|rest| rest.trim().to_owned())
        };
        assert_eq!(line(&reading(true)).as_deref(), Some("90.0 s"));
        assert_eq!(line(&reading(false)).as_deref(), Some("-"));
    }
}
