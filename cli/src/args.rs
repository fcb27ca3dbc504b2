//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use wallaby_model::flow::Span;

const EXAMPLES: &str = "\
Examples:
  wallaby apply -f flow.yaml          create or update the flows of a file
  wallaby diff -f flow.yaml           what applying the file would do to each task
  wallaby snapshot get shop --wait    how far the first load is, until it is done
  wallaby status --watch              rows per second, lag, positions and owners, live
  wallaby describe shop               everything about a flow, and what to do when it waits
  wallaby doctor -f flow.yaml         is this source ready? needs no controller
  wallaby get sinks -o json           for programs

Exit codes:
  0 done   1 failed   2 usage or an invalid file   3 findings (doctor, diff, verify)   4 not reachable
  5 not permitted   6 timed out waiting   130 interrupted";

/// Moves committed changes out of PostgreSQL, in order, to many places at once.
#[derive(Debug, Parser)]
#[command(name = "wallaby", version, after_help = EXAMPLES, max_term_width = 120, subcommand_required = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub struct Global {
    /// The controller, as host:port or http(s)://host:port.
    #[arg(long, global = true, env = "WALLABY_SERVER", default_value = "127.0.0.1:7117", value_name = "ADDRESS")]
    pub server: String,
    /// The authority that signed the controller's certificate, PEM. Needed with https.
    #[arg(long, global = true, env = "WALLABY_CA_CERT", value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// Our certificate, PEM, for a controller that asks for one.
    #[arg(long, global = true, env = "WALLABY_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    pub client_cert: Option<PathBuf>,
    /// The key of our certificate, PEM.
    #[arg(long, global = true, env = "WALLABY_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    pub client_key: Option<PathBuf>,
    /// How long to wait for an answer, or with --wait for the outcome: 500ms, 30s, 5m.
    #[arg(long, global = true, default_value = "30s", value_name = "TIME", value_parser = time)]
    pub timeout: Duration,
    /// How to print.
    #[arg(short, long, global = true, default_value = "table", value_name = "FORMAT")]
    pub output: Output,
}

/// Whoever types more has mistyped it; and neither clocks nor requests can carry any length.
const TIME_MAX: Span = Span(Duration::from_secs(365 * 86_400));

fn time(text: &str) -> Result<Duration, String> {
    let Span(time) = text.parse()?;
    if time > TIME_MAX.0 {
        return Err(format!("{text} is too long: at most {TIME_MAX}"));
    }
    Ok(time)
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For people and for `wallaby apply`.
    Yaml,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create or update flows from a file.
    #[command(after_help = "Examples:\n  wallaby apply -f flow.yaml --wait\n  cat flow.yaml | wallaby apply -f -")]
    Apply(Apply),
    /// Show what applying a file would do to each task, without doing it. Exits with 3 when something would change.
    #[command(after_help = "Examples:\n  wallaby diff -f flow.yaml\n  cat flow.yaml | wallaby diff -f - -o json")]
    Diff(Diff),
    /// Load rows that are there already: start, watch, pause, resume or cancel a run.
    #[command(
        subcommand,
        after_help = "A flow with `snapshot: initial` makes its runs by itself; these are for watching, throttling and repair.\n\nExamples:\n  wallaby snapshot list shop\n  wallaby snapshot get shop --wait --timeout 1h\n  wallaby snapshot start shop public.orders --sinks warehouse --rows-per-second 20000"
    )]
    Snapshot(Snapshot),
    /// List flows, sinks or workers, or show one.
    #[command(
        after_help = "Examples:\n  wallaby get flows\n  wallaby get flow shop -o yaml > flow.yaml\n  wallaby get sinks shop"
    )]
    Get(Get),
    /// Show everything about a flow: conditions, tasks, sinks, and what to do.
    #[command(after_help = "Examples:\n  wallaby describe shop\n  wallaby describe flow shop")]
    Describe(Named),
    /// Stop a flow and drop its slot, its publication and its log. Rows at the sinks stay.
    #[command(after_help = "Examples:\n  wallaby delete shop --wait\n  wallaby delete -f flow.yaml")]
    Delete(Delete),
    /// Stop a flow, or one sink of it. Slot, log and positions stay. A run that reads lets its snapshot go, and comparisons begin again
    /// later: `wallaby diff` says what becomes of each. A paused sink that the log has no room for is cut off, and
    /// loaded anew once it is resumed, unless the flow file says `onOverrun: backpressure`.
    #[command(after_help = "Examples:\n  wallaby pause shop\n  wallaby pause shop/warehouse")]
    Pause(Named),
    /// Let a paused flow or sink go on, and let a task that stopped for a person try again.
    #[command(after_help = "Examples:\n  wallaby resume shop\n  wallaby resume shop/warehouse")]
    Resume(Named),
    /// Rates, lag, positions and owners of all flows, once or live.
    #[command(after_help = "Examples:\n  wallaby status\n  wallaby status shop --watch")]
    Status(Status),
    /// Compare the source with a sink, row by row where they differ. Exit code 3 when they do.
    #[command(
        after_help = "Examples:\n  wallaby verify shop\n  wallaby verify shop/warehouse --tables public.orders --show 100 -o json\n  wallaby verify shop --cancel 3"
    )]
    Verify(Verify),
    /// List the workers that are alive and what they own.
    Workers,
    /// Ask a worker to hand its tasks over and end.
    #[command(after_help = "Examples:\n  wallaby drain worker-1 --wait")]
    Drain(Drain),
    /// Is this source ready? Each finding comes with the SQL that mends it. Needs no controller.
    #[command(
        after_help = "Examples:\n  wallaby doctor -f flow.yaml\n  wallaby doctor --dsn postgres://wallaby@db/shop --table 'public.*'"
    )]
    Doctor(Doctor),
    /// Print the completion script of a shell.
    #[command(after_help = "Examples:\n  wallaby completion bash > /etc/bash_completion.d/wallaby")]
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct Apply {
    /// The file, or - for standard input; may be repeated.
    #[arg(short, long = "file", required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Only say what is wrong with the file.
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until each flow runs, at most --timeout.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Diff {
    /// The file, or - for standard input; may be repeated.
    #[arg(short, long = "file", required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// What can be done with snapshot runs.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Empty tables at the sinks and load them anew, while their changes go on to be captured.
    #[command(
        after_help = "Examples:\n  wallaby snapshot start shop\n  wallaby snapshot start shop public.orders 'crm.*' --sinks warehouse --wait --timeout 1h"
    )]
    Start(SnapshotStart),
    /// Stop reading. What is read stays, sinks go on to load it, and the snapshot at the source is given up. On resume, tables
    /// without a key begin again unless they are whole, and with `snapshot: only` any table does.
    #[command(after_help = "Examples:\n  wallaby snapshot pause shop\n  wallaby snapshot pause shop 3")]
    Pause(SnapshotNamed),
    /// Let a paused run go on, under another snapshot.
    #[command(after_help = "Examples:\n  wallaby snapshot resume shop --wait --timeout 1h")]
    Resume(SnapshotNamed),
    /// End a run. Tables that are not yet taken over stay as they are at the sinks: not whole.
    #[command(after_help = "Examples:\n  wallaby snapshot cancel shop 3 --wait")]
    Cancel(SnapshotNamed),
    /// Show how far a run is.
    #[command(after_help = "Examples:\n  wallaby snapshot get shop\n  wallaby snapshot get shop/3 --wait --timeout 1h")]
    Get(SnapshotNamed),
    /// List the runs of a flow, or of all.
    #[command(after_help = "Examples:\n  wallaby snapshot list\n  wallaby snapshot list shop -o json")]
    List(SnapshotList),
}

#[derive(Debug, Args)]
pub struct SnapshotStart {
    /// The flow.
    pub flow: String,
    /// The tables: schema.table or schema.*. Every captured one when none is named.
    #[arg(value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Tables of these to leave out; separated by commas.
    #[arg(long, value_name = "TABLES", value_delimiter = ',')]
    pub exclude: Vec<String>,
    /// The sinks that load, separated by commas. Every one when none is named.
    #[arg(long, value_name = "SINKS", value_delimiter = ',')]
    pub sinks: Vec<String>,
    /// Read at most this many rows a second, all workers together.
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..))]
    pub rows_per_second: Option<u64>,
    /// Read at most this many chunks at a time, each with a connection to the source. 4 when nothing is said.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub readers: Option<u32>,
    /// Wait until it is done, at most --timeout, and say how far it is.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct SnapshotNamed {
    /// The flow, or flow/run.
    #[arg(value_name = "FLOW")]
    pub flow: String,
    /// The number of the run. Without it: the one that is not over, else the last one.
    #[arg(value_name = "RUN")]
    pub run: Option<String>,
    /// Wait until the run is over, at most --timeout, and say how far it is.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct SnapshotList {
    /// Only of this flow.
    pub flow: Option<String>,
}

#[derive(Debug, Args)]
pub struct Get {
    /// What to list.
    pub kind: Kind,
    /// One of them: a flow's name, `flow/sink`, or a worker's name. For sinks also a flow's name.
    pub name: Option<String>,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Flows.
    #[value(alias = "flow")]
    Flows,
    /// Sinks.
    #[value(alias = "sink")]
    Sinks,
    /// Workers.
    #[value(alias = "worker")]
    Workers,
}

#[derive(Debug, Args)]
pub struct Named {
    /// The name: a flow (`shop`), or a sink of it (`shop/warehouse`). The word `flow` or `sink` may stand before it.
    #[arg(required = true, num_args = 1..=2, value_name = "NAME")]
    pub words: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// The flows. The word `flow` may stand before them.
    #[arg(value_name = "FLOW", required_unless_present = "files", conflicts_with = "files")]
    pub words: Vec<String>,
    /// Delete the flows of this file, or - for standard input.
    #[arg(short, long = "file", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// A flow that is not there is no error.
    #[arg(long)]
    pub if_exists: bool,
    /// Forget the flow at once, without its source: only for a source that is gone for good. A slot that is still there goes
    /// on holding WAL back until you drop it.
    #[arg(long)]
    pub force: bool,
    /// Wait until each flow is gone, at most --timeout.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    /// Only this flow.
    pub flow: Option<String>,
    /// Keep going, until interrupted. A live table on a terminal, plain lines elsewhere.
    #[arg(short, long)]
    pub watch: bool,
    /// The time between two looks.
    #[arg(long, default_value = "1s", value_name = "TIME", value_parser = time)]
    pub interval: Duration,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// The flow (`shop`), or the sink (`shop/warehouse`).
    #[arg(required = true, num_args = 1..=2, value_name = "NAME")]
    pub words: Vec<String>,
    /// The sink; not needed when the flow has one, or when NAME is a sink.
    #[arg(long, value_name = "SINK")]
    pub sink: Option<String>,
    /// Only these tables, schema.table as at the source; may be repeated.
    #[arg(long, value_name = "TABLE", value_delimiter = ',')]
    pub tables: Vec<String>,
    /// How many differing rows of each table are named; at most 200.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub show: u32,
    /// How long the comparison may take. It holds a snapshot of the source all the time.
    #[arg(long, default_value = "30m", value_name = "TIME", value_parser = time)]
    pub within: Duration,
    /// End a comparison that goes on, by its number.
    #[arg(long, value_name = "NUMBER")]
    pub cancel: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// The worker.
    pub worker: String,
    /// Wait until it is gone, at most --timeout.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Doctor {
    /// Look at the source of each flow in this file, or - for standard input.
    #[arg(short, long = "file", value_name = "FILE", conflicts_with = "dsn")]
    pub file: Option<PathBuf>,
    /// Look at this database: a URL or key=value text.
    #[arg(long, env = "WALLABY_DOCTOR_DSN", hide_env_values = true)]
    pub dsn: Option<String>,
    /// With --dsn: a table to capture, schema.table or schema.*; may be repeated.
    #[arg(long = "table", value_name = "TABLE", default_value = "public.*")]
    pub tables: Vec<String>,
    /// With --dsn: the name of the publication and the slot that would be made.
    #[arg(long, value_name = "NAME", default_value = "wallaby_doctor")]
    pub name: String,
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
