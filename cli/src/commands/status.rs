//! `wallaby status`: rates, lag, positions and owners, once or live.
//!
//! Rates come from two reports of a task's owner: the rows between them over the time between them, both the owner's own,
//! so a slow answer of ours distorts nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::StreamExt;
use wallaby_model::api;
use wallaby_proto::v1;

use super::{Target, get};
use crate::args::{Global, Output, Status};
use crate::failure::Failure;
use crate::render::{self, Table, bytes_text, or_dash, phase_word, short, span_text};
use crate::server::Server;

/// How long a single look waits for a second report.
const SECOND_REPORT: Duration = Duration::from_millis(2500);

/// The pause before a lost controller is tried again.
const RECONNECT: Duration = Duration::from_secs(1);

pub async fn run(global: &Global, options: &Status) -> Result<(), Failure> {
    let flow = options.flow.as_ref().map(|name| Target::parse_flow(std::slice::from_ref(name))).transpose()?;
    let name = flow.as_ref().map_or("flows/-".to_owned(), api::flow_name);
    let server = Server::connect(global).await?;
    let mut board = Board::default();
    if options.watch {
        return watch(global, options, server, &name, &mut board).await;
    }
    look_twice(&server, &name, &mut board).await?;
    match global.output {
        Output::Table => render::print(&board.text()),
        output => render::print_value(output, &board.value()),
    }
}

/// Two looks, far enough apart for rates where rows flow.
async fn look_twice(server: &Server, name: &str, board: &mut Board) -> Result<(), Failure> {
    board.take_all(look(server, name).await?);
    let deadline = Instant::now() + SECOND_REPORT;
    while board.waits_for_rates() && Instant::now() < deadline {
        tokio::time::sleep(super::LOOK_AGAIN).await;
        board.take_all(look(server, name).await?);
    }
    Ok(())
}

async fn look(server: &Server, name: &str) -> Result<Vec<v1::Flow>, Failure> {
    if name == "flows/-" {
        return get::all_flows(server).await;
    }
    let request = server.request(v1::GetFlowRequest { name: name.to_owned() });
    let answer = server.flows().get_flow(request).await.map_err(|status| server.failure(&status))?;
    Ok(answer.into_inner().flow.into_iter().collect())
}

async fn watch(
    global: &Global,
    options: &Status,
    mut server: Server,
    name: &str,
    board: &mut Board,
) -> Result<(), Failure> {
    let live = global.output == Output::Table && render::on_terminal();
    let mut ticks = tokio::time::interval(options.interval.max(Duration::from_millis(100)));
    loop {
        let request =
            v1::WatchFlowRequest { name: name.to_owned(), interval: Some(api::duration_to_message(options.interval)) };
        // No deadline: it is to last.
        let answer = server.flows().watch_flow(tonic::Request::new(request)).await;
        let mut changes = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) if is_passing(&status) => {
                board.trouble = Some(server.failure(&status).text().unwrap_or_default());
                show(global.output, live, board)?;
                server = reconnect(global, board, live).await?;
                continue;
            }
            Err(status) => return Err(server.failure(&status)),
        };
        board.trouble = None;
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(change)) => board.take(change),
                    Some(Err(status)) if !is_passing(&status) => return Err(server.failure(&status)),
                    Some(Err(_)) | None => break,
                },
                _ = ticks.tick() => show(global.output, live, board)?,
            }
        }
        server = reconnect(global, board, live).await?;
    }
}

fn is_passing(status: &tonic::Status) -> bool {
    matches!(
        status.code(),
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled | tonic::Code::Internal
    )
}

/// A controller that is gone, for whoever watches: said, and tried again until it is back.
async fn reconnect(global: &Global, board: &mut Board, live: bool) -> Result<Server, Failure> {
    loop {
        tokio::time::sleep(RECONNECT).await;
        match Server::connect(global).await {
            Ok(server) => return Ok(server),
            Err(failure) => {
                board.trouble = failure.text();
                show(global.output, live, board)?;
            }
        }
    }
}

fn show(output: Output, live: bool, board: &Board) -> Result<(), Failure> {
    match (output, live) {
        // Home, the text with the rest of each line cleared, then everything below: no flicker.
        (Output::Table, true) => {
            let text = board.text().replace('\n', "\x1b[K\n");
            render::print(&format!("\x1b[H{text}\x1b[J"))
        }
        (Output::Table, false) => render::print(&board.lines()),
        (output, _) => render::print_value(output, &board.value()),
    }
}

/// Rows at a moment, as a task's owner reported them.
#[derive(Clone, Copy)]
struct Report {
    rows: u64,
    at: f64,
}

/// Two reports of one task.
#[derive(Default)]
struct Rate {
    before: Option<Report>,
    now: Option<Report>,
}

impl Rate {
    fn take(&mut self, rows: u64, at: Option<prost_types::Timestamp>) {
        let Some(at) = at.map(|at| at.seconds as f64 + f64::from(at.nanos) / 1e9) else { return };
        if self.now.is_some_and(|now| now.at >= at) {
            return;
        }
        // A new owner counts from zero: no rate over that step.
        self.before = self.now.filter(|now| now.rows <= rows);
        self.now = Some(Report { rows, at });
    }

    fn per_second(&self) -> Option<f64> {
        let (before, now) = (self.before?, self.now?);
        Some((now.rows - before.rows) as f64 / (now.at - before.at))
    }

    fn text(&self) -> String {
        self.per_second().map_or("-".to_owned(), |rate| format!("{rate:.0}"))
    }
}

/// What is known of all flows.
#[derive(Default)]
struct Board {
    flows: BTreeMap<String, v1::Flow>,
    rates: BTreeMap<String, Rate>,
    trouble: Option<String>,
}

impl Board {
    fn take(&mut self, change: v1::WatchFlowResponse) {
        let Some(flow) = change.flow else { return };
        if change.deleted {
            self.flows.remove(&flow.name);
            self.rates.retain(|name, _| *name != flow.name && !name.starts_with(&format!("{}/", flow.name)));
        } else {
            self.take_flow(flow);
        }
    }

    fn take_all(&mut self, flows: Vec<v1::Flow>) {
        self.flows.clear();
        flows.into_iter().for_each(|flow| self.take_flow(flow));
    }

    fn take_flow(&mut self, flow: v1::Flow) {
        if let Some(status) = &flow.status {
            if let Some(capture) = &status.capture {
                self.rates.entry(flow.name.clone()).or_default().take(capture.rows_total, capture.report_time);
            }
            for sink in &status.sinks {
                if let Some(progress) = &sink.progress {
                    self.rates.entry(sink.name.clone()).or_default().take(progress.rows_total, progress.report_time);
                }
            }
        }
        self.flows.insert(flow.name.clone(), flow);
    }

    /// Whether some task has an owner and only one report so far.
    fn waits_for_rates(&self) -> bool {
        let owned = |task: Option<&v1::Task>| task.is_some_and(|task| !task.worker.is_empty());
        self.flows.values().filter_map(|flow| flow.status.as_ref().map(|status| (flow, status))).any(
            |(flow, status)| {
                let waits = |name: &str| self.rates.get(name).is_some_and(|rate| rate.before.is_none());
                (owned(status.tasks.first()) && waits(&flow.name))
                    || status.sinks.iter().any(|sink| owned(sink.task.as_ref()) && waits(&sink.name))
            },
        )
    }

    fn rate(&self, name: &str) -> String {
        self.rates.get(name).map_or("-".to_owned(), Rate::text)
    }

    fn text(&self) -> String {
        let mut table =
            Table::new(&["TASK", "PHASE", "ROWS/S", "LAG", "BEHIND", "POSITION", "WORKER", "EPOCH", "NOTE"]);
        for flow in self.flows.values() {
            let status = flow.status.clone().unwrap_or_default();
            let capture = status.capture.as_ref();
            let task = status.tasks.first().cloned().unwrap_or_default();
            table.row([
                short(&flow.name),
                phase_word(status.phase).to_owned(),
                self.rate(&flow.name),
                span_text(capture.and_then(|capture| capture.lag)),
                capture.map_or("-".to_owned(), |capture| bytes_text(capture.lag_bytes)),
                or_dash(capture.map_or("", |capture| &capture.staged_position)),
                or_dash(&task.worker),
                epoch_text(&task),
                note(&task),
            ]);
            for snapshot in &status.snapshots {
                let progress = snapshot.progress.clone().unwrap_or_default();
                table.row([
                    format!("  <- snapshot {}", short(&snapshot.name)),
                    render::snapshot_state_word(snapshot.state).to_owned(),
                    format!("{:.0}", progress.rows_per_second),
                    span_text(progress.remaining),
                    format!("{}/{} chunks", progress.chunks_done, progress.chunks_total),
                    or_dash(&progress.consistent_point),
                    or_dash(&snapshot.worker),
                    "-".to_owned(),
                    cut(&snapshot.message),
                ]);
            }
            for sink in &status.sinks {
                let task = sink.task.clone().unwrap_or_default();
                let progress = sink.progress.as_ref();
                table.row([
                    format!("  -> {}", short(&sink.name)),
                    task.state.clone(),
                    self.rate(&sink.name),
                    span_text(progress.and_then(|progress| progress.lag)),
                    progress.map_or("-".to_owned(), |progress| bytes_text(progress.lag_bytes)),
                    or_dash(progress.map_or("", |progress| &progress.position)),
                    or_dash(&task.worker),
                    epoch_text(&task),
                    note(&task),
                ]);
            }
        }
        let mut text = if self.flows.is_empty() { "no flows\n".to_owned() } else { table.text() };
        if let Some(trouble) = &self.trouble {
            text.push_str(&format!("{trouble}; trying again\n"));
        }
        text
    }

    /// One line for each flow and sink, for logs and pipes.
    fn lines(&self) -> String {
        let mut text = String::new();
        for flow in self.flows.values() {
            let status = flow.status.clone().unwrap_or_default();
            let capture = status.capture.clone().unwrap_or_default();
            let task = status.tasks.first().cloned().unwrap_or_default();
            text.push_str(&format!(
                "flow={} phase={} rows_per_second={} lag={} lag_bytes={} staged={} worker={} epoch={}\n",
                short(&flow.name),
                phase_word(status.phase),
                self.rate(&flow.name),
                span_text(capture.lag).replace(' ', ""),
                capture.lag_bytes,
                or_dash(&capture.staged_position),
                or_dash(&task.worker),
                epoch_text(&task),
            ));
            for snapshot in &status.snapshots {
                let progress = snapshot.progress.clone().unwrap_or_default();
                text.push_str(&format!(
                    "snapshot={} state={} chunks={}/{} rows={} rows_per_second={:.0} left={}\n",
                    short(&snapshot.name),
                    render::snapshot_state_word(snapshot.state),
                    progress.chunks_done,
                    progress.chunks_total,
                    progress.rows_done,
                    progress.rows_per_second,
                    span_text(progress.remaining).replace(' ', ""),
                ));
            }
            for sink in &status.sinks {
                let task = sink.task.clone().unwrap_or_default();
                let progress = sink.progress.clone().unwrap_or_default();
                text.push_str(&format!(
                    "sink={} state={} rows_per_second={} lag={} lag_bytes={} position={} worker={} epoch={}\n",
                    short(&sink.name),
                    or_dash(&task.state),
                    self.rate(&sink.name),
                    span_text(progress.lag).replace(' ', ""),
                    progress.lag_bytes,
                    or_dash(&progress.position),
                    or_dash(&task.worker),
                    epoch_text(&task),
                ));
            }
        }
        if let Some(trouble) = &self.trouble {
            text.push_str(&format!("{trouble}; trying again\n"));
        }
        text
    }

    fn value(&self) -> serde_json::Value {
        self.flows
            .values()
            .map(|flow| {
                let mut value = render::flow_value(flow);
                value["status"]["rowsPerSecond"] = self.rates.get(&flow.name).and_then(Rate::per_second).into();
                value
            })
            .collect()
    }
}

fn epoch_text(task: &v1::Task) -> String {
    if task.epoch == 0 { "-".to_owned() } else { task.epoch.to_string() }
}

fn note(task: &v1::Task) -> String {
    let text = if task.waits_for.is_empty() { &task.last_error } else { &task.waits_for };
    cut(text)
}

/// The beginning of a text that is too long for a table.
fn cut(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    }

    #[test]
    fn a_rate_needs_two_reports_of_one_owner() {
        let mut rate = Rate::default();
        rate.take(100, at(10));
        assert_eq!(rate.per_second(), None);
        rate.take(100, at(10));
        assert_eq!(rate.per_second(), None, "the same report twice is one report");
        rate.take(300, at(12));
        assert_eq!(rate.per_second(), Some(100.0));
        rate.take(5, at(14));
        assert_eq!(rate.per_second(), None, "a new owner counts from zero");
        rate.take(9, at(15));
        assert_eq!(rate.per_second(), Some(4.0));
    }

    #[test]
    fn a_run_shows_what_is_left_of_it() {
        let board = |remaining| {
            let snapshots = vec![crate::commands::snapshot::tests::reading(remaining)];
            let status = v1::FlowStatus { snapshots, ..v1::FlowStatus::default() };
            let flow = v1::Flow { name: "flows/shop".to_owned(), status: Some(status), ..v1::Flow::default() };
            let mut board = Board::default();
            board.take_all(vec![flow]);
            board
        };
        let line = "snapshot=shop/2 state=Reading chunks=3/8 rows=300 rows_per_second=5 left=";
        for (remaining, left, cell) in [(true, "90.0s", "90.0 s"), (false, "-", "-")] {
            let board = board(remaining);
            assert!(board.lines().contains(&format!("{line}{left}\n")), "{}", board.lines());
            let cells = format!("snapshot shop/2   Reading   5        {cell}");
            assert!(board.text().contains(&cells), "{cells:?} is missing: {}", board.text());
        }
    }
}
