//! What the demo shows while rows flow: a table that is redrawn in place on a terminal, one line a second elsewhere.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use wallaby_model::Position;
use wallaby_proto::v1;

/// One task as shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// `shop.capture` or `shop.apply.warehouse`.
    pub task: String,
    /// The owner, or nothing.
    pub worker: String,
    /// What the owner says it does.
    pub state: String,
    /// Rows since the owner took the task, and when it said so, in seconds since 1970.
    pub rows_total: u64,
    /// See `rows_total`.
    pub reported_at_s: f64,
    /// Behind what is before it: the end of the WAL, or the end of the log.
    pub lag_bytes: u64,
    /// The same in time.
    pub lag: Duration,
    /// How far it is.
    pub position: String,
    /// What it waits for, or its last error.
    pub note: String,
}

/// The tasks of a flow, the capture first.
pub fn lines(flow: &v1::Flow) -> Vec<Line> {
    let Some(status) = &flow.status else { return Vec::new() };
    let line = |task: &v1::Task| {
        let sink = status.sinks.iter().find(|sink| sink.task.as_ref().is_some_and(|owned| owned.task == task.task));
        let mut line = Line {
            task: task.task.clone(),
            worker: task.worker.clone(),
            state: task.state.clone(),
            rows_total: 0,
            reported_at_s: 0.0,
            lag_bytes: 0,
            lag: Duration::ZERO,
            position: String::new(),
            note: if task.last_error.is_empty() { task.waits_for.clone() } else { task.last_error.clone() },
        };
        if let Some(progress) = sink.and_then(|sink| sink.progress.as_ref()) {
            (line.rows_total, line.lag_bytes) = (progress.rows_total, progress.lag_bytes);
            line.position = shown_position(&progress.position);
            line.lag = duration(progress.lag.as_ref());
            line.reported_at_s = seconds(progress.report_time.as_ref());
        } else if let Some(progress) = status.capture.as_ref().filter(|_| task.task.ends_with(".capture")) {
            (line.rows_total, line.lag_bytes) = (progress.rows_total, progress.lag_bytes);
            line.position = shown_position(&progress.staged_position);
            line.lag = duration(progress.lag.as_ref());
            line.reported_at_s = seconds(progress.report_time.as_ref());
        }
        line
    };
    status.tasks.iter().map(line).collect()
}

/// The commit LSN of a position, the way Postgres writes it: short enough for a table.
fn shown_position(text: &str) -> String {
    text.parse::<Position>().map_or_else(|_| text.to_owned(), |position| position.commit.to_string())
}

fn duration(span: Option<&prost_types::Duration>) -> Duration {
    span.and_then(|span| Duration::try_from(*span).ok()).unwrap_or_default()
}

fn seconds(time: Option<&prost_types::Timestamp>) -> f64 {
    time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9)
}

/// Draws, and remembers what it drew.
#[derive(Debug)]
pub struct Board {
    in_place: bool,
    drawn: usize,
    previous: Vec<Line>,
    rates: Vec<(String, f64)>,
}

impl Board {
    /// A board on standard output.
    pub fn new() -> Board {
        Board { in_place: std::io::stdout().is_terminal(), drawn: 0, previous: Vec::new(), rates: Vec::new() }
    }

    /// Says something that stays.
    pub fn say(&mut self, text: &str) {
        self.erase();
        println!("{text}");
    }

    /// Shows where everything stands.
    pub fn show(&mut self, elapsed: Duration, load_rows_per_second: f64, now: Vec<Line>) {
        self.note_rates(&now);
        if self.in_place {
            let table = table(elapsed, load_rows_per_second, &now, &self.rates);
            self.erase();
            // A line that wraps would take two rows of the screen, and be erased by half.
            let columns = columns();
            table.iter().for_each(|line| println!("{}", line.chars().take(columns).collect::<String>()));
            self.drawn = table.len();
        } else {
            println!("{}", plain(elapsed, load_rows_per_second, &now, &self.rates));
        }
        let _ = std::io::stdout().flush();
        self.previous = now;
    }

    fn erase(&mut self) {
        if self.drawn > 0 {
            // Up to the first line of the table, then clear to the end of the screen.
            print!("\x1b[{}A\x1b[J", self.drawn);
            self.drawn = 0;
        }
    }

    /// A rate needs two reports of one owner; between reports it stands.
    fn note_rates(&mut self, now: &[Line]) {
        for line in now {
            let before = self.previous.iter().find(|old| old.task == line.task);
            let rate = match before {
                Some(old) if line.worker.is_empty() || old.worker != line.worker => 0.0,
                Some(old) if line.reported_at_s > old.reported_at_s => {
                    line.rows_total.saturating_sub(old.rows_total) as f64 / (line.reported_at_s - old.reported_at_s)
                }
                _ => continue,
            };
            self.rates.retain(|(task, _)| *task != line.task);
            self.rates.push((line.task.clone(), rate));
        }
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::new()
    }
}

fn rate(rates: &[(String, f64)], task: &str) -> f64 {
    rates.iter().find(|(name, _)| name == task).map_or(0.0, |(_, rate)| *rate)
}

fn table(elapsed: Duration, load: f64, lines: &[Line], rates: &[(String, f64)]) -> Vec<String> {
    let mut out = vec![format!("  {:>4.0} s   the shop writes {:.0} rows/s", elapsed.as_secs_f64(), load)];
    out.push(format!(
        "  {:<21} {:<9} {:<13} {:>6} {:>8} {:>7}  {:<10}",
        "task", "owner", "state", "rows/s", "lag", "lag", "position"
    ));
    for line in lines {
        let owner = if line.worker.is_empty() { "nobody" } else { &line.worker };
        let mut text = format!(
            "  {:<21} {:<9} {:<13} {:>6.0} {:>8} {:>5.1} s  {:<10} ",
            line.task,
            owner,
            line.state,
            rate(rates, &line.task),
            bytes(line.lag_bytes),
            line.lag.as_secs_f64(),
            line.position,
        );
        if !line.note.is_empty() {
            // Kept short: a wrapped line would break the redrawing.
            text.push_str(&line.note.chars().take(40).collect::<String>());
        }
        out.push(text);
    }
    out
}

fn plain(elapsed: Duration, load: f64, lines: &[Line], rates: &[(String, f64)]) -> String {
    let mut out = format!("{:>5.1} s  shop {load:.0} rows/s", elapsed.as_secs_f64());
    for line in lines {
        let owner = if line.worker.is_empty() { "nobody" } else { &line.worker };
        let (rate, lag) = (rate(rates, &line.task), line.lag.as_secs_f64());
        let lag_bytes = bytes(line.lag_bytes);
        out.push_str(&format!(
            " | {} @ {owner} {} {rate:.0} rows/s, lag {lag_bytes} {lag:.1} s",
            line.task, line.state
        ));
        if !line.position.is_empty() {
            out.push_str(&format!(", at {}", line.position));
        }
        if !line.note.is_empty() {
            out.push_str(&format!(" ({})", line.note));
        }
    }
    out
}

/// How wide the terminal is; 80 when it does not say.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(80)
}

/// A number of bytes for people.
pub fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{} kB", count / 1_000),
        _ => format!("{} MB", count / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn flow(worker: &str, rows: u64, at_s: i64) -> v1::Flow {
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let task = |task: &str| v1::Task {
            task: task.to_owned(),
            state: "STREAMING".to_owned(),
            worker: worker.to_owned(),
            ..v1::Task::default()
        };
        let progress = v1::SinkProgress {
            position: "00000001000000FF-0000000000000000-00000000".to_owned(),
            lag_bytes: 12_345,
            lag: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            rows_total: rows,
            report_time: time(at_s),
        };
        let apply = task("shop.apply.warehouse");
        let sink = v1::Sink { task: Some(apply.clone()), progress: Some(progress), ..v1::Sink::default() };
        let capture =
            v1::CaptureProgress { rows_total: 2 * rows, report_time: time(at_s), ..v1::CaptureProgress::default() };
        let status = v1::FlowStatus {
            tasks: vec![task("shop.capture"), apply],
            sinks: vec![sink],
            capture: Some(capture),
            ..v1::FlowStatus::default()
        };
        v1::Flow { status: Some(status), ..v1::Flow::default() }
    }

    #[test]
    fn each_task_shows_its_own_progress() {
        let lines = lines(&flow("worker-1", 10, 100));
        assert_eq!((lines[0].rows_total, lines[1].rows_total), (20, 10));
        assert_eq!(lines[1].position, "1/FF");
        let text = plain(Duration::from_secs(3), 1_000.0, &lines, &[("shop.apply.warehouse".to_owned(), 77.0)]);
        assert!(
            text.contains("shop.apply.warehouse @ worker-1 STREAMING 77 rows/s, lag 12 kB 1.5 s, at 1/FF"),
            "{text}"
        );
    }

    #[test]
    fn a_rate_is_between_two_reports_of_one_owner() {
        let mut board = Board { in_place: false, drawn: 0, previous: Vec::new(), rates: Vec::new() };
        let mut see = |flow: &v1::Flow| {
            let now = lines(flow);
            board.note_rates(&now);
            board.previous = now;
            rate(&board.rates, "shop.apply.warehouse")
        };
        assert_eq!(see(&flow("worker-1", 100, 10)), 0.0);
        assert_eq!(see(&flow("worker-1", 600, 12)), 250.0);
        assert_eq!(see(&flow("worker-1", 600, 12)), 250.0, "no new report");
        assert_eq!(see(&flow("worker-2", 5, 14)), 0.0, "a new owner counts from zero");
        assert_eq!(see(&flow("worker-2", 25, 16)), 10.0);
    }

    #[test]
    fn every_row_of_the_table_fits_its_header() {
        let now = lines(&flow("", 10, 100));
        let table = table(Duration::from_secs(3), 1_000.0, &now, &[]);
        assert_eq!(table.len(), 4);
        assert!(table[2].contains("nobody"));
        assert!(table.iter().all(|line| line.chars().count() <= 120));
    }
}
