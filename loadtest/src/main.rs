//! `make loadtest`: measures WALlaby on this machine and writes the figures as JSON and as Markdown.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Parser, Subcommand};
use wallaby_loadtest::first_load::FirstLoadOptions;
use wallaby_loadtest::first_load::add_table::{AddTableOptions, RISE_MAX_MS};
use wallaby_loadtest::measure::bench::{Bench, BenchOptions};
use wallaby_loadtest::measure::figures::{Figures, Run, Skipped};
use wallaby_loadtest::measure::parts::{self, Part};
use wallaby_loadtest::measure::report;
use wallaby_loadtest::measure::sink::{SinkBench, SinkOptions};
use wallaby_loadtest::measure::snapshot::{SnapshotBench, SnapshotOptions};
use wallaby_loadtest::system::Programs;
use wallaby_stack::Folder;

/// Measures WALlaby on this machine. Build it with --release, and let the machine rest meanwhile.
#[derive(Debug, Parser)]
#[command(name = "wallaby-loadtest", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Runs every measurement and writes figures.json and figures.md.
    Run(RunArguments),
    /// Loads existing rows while transactions go on, workers are killed and the sink restarts; compares every row.
    FirstLoad(FirstLoadArguments),
    /// Adds a table to a live flow of ten and plots how far the others fall behind.
    AddTable(AddTableArguments),
    /// One part of the path, run by `run` in a process of its own.
    #[command(hide = true)]
    Part {
        #[command(subcommand)]
        part: Part,
    },
}

#[derive(Debug, clap::Args)]
struct RunArguments {
    /// How often each kind is run, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Rows of a backlog in transactions of 100 rows.
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Rows of a backlog in transactions of one row.
    #[arg(long, default_value_t = 300_000)]
    rows_one: u64,
    /// Rows of the table that is loaded.
    #[arg(long, default_value_t = 2_000_000)]
    rows_load: u64,
    /// Measures only these; everything when absent.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Area>,
    /// Transactions per second while latencies are measured.
    #[arg(long, default_value_t = 1_000)]
    per_second: u32,
    /// Seconds that latencies are measured for.
    #[arg(long, default_value_t = 20)]
    latency_seconds: u64,
    /// Where figures.json and figures.md go.
    #[arg(long, default_value = "target/loadtest")]
    out: PathBuf,
    /// Where wallaby-controller and wallaby-worker are; beside this program when absent. Without them the sink is skipped.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// A small form that only shows that everything runs: its figures mean nothing.
    #[arg(long)]
    quick: bool,
}

/// What `run` measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Area {
    /// Ceilings, the pipeline to the log, and latencies to a reader of it.
    Pipeline,
    /// The Postgres sink, drained from the log.
    Sink,
    /// The first load: reading into the side store, and loading from it.
    Snapshot,
}

#[derive(Debug, clap::Args)]
struct FirstLoadArguments {
    /// Rows that are there before the flow is made.
    #[arg(long, default_value_t = 5_000_000)]
    rows: u64,
    /// Transactions a second while they are loaded.
    #[arg(long, default_value_t = 1_000)]
    per_second: u32,
    /// How often a worker that reads a chunk is killed.
    #[arg(long, default_value_t = 2)]
    kills: u32,
    /// Leaves the sink's Postgres alone.
    #[arg(long)]
    no_restart: bool,
    /// NATS servers: 1 or 3.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Decides what the transactions do.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// The side store's quota of chunks. A chunk has a quarter of it, at most 64 MiB.
    #[arg(long, default_value = "4Gi")]
    chunks_max: String,
    /// Seconds that the run may hold a snapshot of the source, and its xmin with it.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    snapshot_max_seconds: u64,
    /// Where wallaby-controller and wallaby-worker are; beside this program when absent.
    #[arg(long)]
    programs: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct AddTableArguments {
    /// Rows of the table that is added.
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Transactions a second on it.
    #[arg(long, default_value_t = 200)]
    per_second: u32,
    /// Seconds that the lag is watched before and after.
    #[arg(long, default_value_t = 10)]
    calm_seconds: u64,
    /// NATS servers: 1 or 3.
    #[arg(long, default_value_t = 1)]
    nodes: usize,
    /// Postgres leaves flushing to the operating system, as in most tests. In production it does not.
    #[arg(long)]
    no_fsync: bool,
    /// Where the plot goes.
    #[arg(long, default_value = "target/loadtest/add-table.svg")]
    plot: PathBuf,
    /// Where wallaby-controller and wallaby-worker are; beside this program when absent.
    #[arg(long)]
    programs: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match &arguments.command {
        // One thread, so that the client costs as little as it can.
        Task::Part { part: Part::Discard { .. } } => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        _ => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
    };
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wallaby-loadtest: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = perform(arguments.command) => outcome.map(|()| ExitCode::SUCCESS),
            () = interrupted => Ok(ExitCode::from(130)),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome.unwrap_or_else(|error| {
        eprintln!("wallaby-loadtest: {error:#}");
        ExitCode::FAILURE
    })
}

async fn perform(task: Task) -> anyhow::Result<()> {
    match task {
        Task::Part { part } => parts::run(part).await,
        Task::Run(arguments) => measure(arguments).await,
        Task::FirstLoad(arguments) => first_load(arguments).await,
        Task::AddTable(arguments) => add_table(arguments).await,
    }
}

async fn first_load(arguments: FirstLoadArguments) -> anyhow::Result<()> {
    let programs = Programs::find(arguments.programs.as_deref())?;
    let folder = Folder::temporary("first-load")?;
    let options = FirstLoadOptions {
        rows: arguments.rows,
        per_second: arguments.per_second,
        kills: arguments.kills,
        restart_sink: !arguments.no_restart,
        nodes: arguments.nodes,
        seed: arguments.seed,
        chunks_max: arguments.chunks_max,
        snapshot_max: Duration::from_secs(arguments.snapshot_max_seconds),
    };
    let outcome =
        wallaby_loadtest::first_load::run(&options, &programs, folder.path(), |line| println!("{line}")).await?;
    println!("{outcome}");
    anyhow::ensure!(outcome.comparison.is_equal(), "source and target differ");
    anyhow::ensure!(outcome.watched.read_again == 0, "chunks that were done were read again");
    anyhow::ensure!(outcome.watched.leaves_writers_alone(), "a writer at the source waited for us, or nobody looked");
    anyhow::ensure!(outcome.killed == arguments.kills, "{} workers were killed", outcome.killed);
    anyhow::ensure!(outcome.watched.readers.len() >= 2, "only one worker read");
    let asked = arguments.per_second;
    anyhow::ensure!(outcome.keeps_pace(asked), "the transactions did not go on at {asked} a second");
    anyhow::ensure!(
        outcome.lets_go_of_xmin(options.snapshot_max),
        "our sessions held the source's xmin for longer than they may"
    );
    Ok(())
}

async fn add_table(arguments: AddTableArguments) -> anyhow::Result<()> {
    let programs = Programs::find(arguments.programs.as_deref())?;
    let folder = Folder::temporary("add-table")?;
    let options = AddTableOptions {
        rows: arguments.rows,
        per_second: arguments.per_second,
        calm: Duration::from_secs(arguments.calm_seconds),
        nodes: arguments.nodes,
        fsync: !arguments.no_fsync,
    };
    let outcome = wallaby_loadtest::first_load::add_table::run(&options, &programs, folder.path()).await?;
    let plot = &arguments.plot;
    if let Some(parent) = plot.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    std::fs::write(plot, outcome.plot()).with_context(|| format!("writing {}", plot.display()))?;
    println!(
        "the other ten tables: at most {:.0} ms behind before, {:.0} ms while the table was added ({:.1} s); {} rises, {} without the time for \
         which the disk stood still ({:.0} ms at once at most); plot in {}\n{}",
        outcome.calm_max_ms(),
        outcome.run_max_ms(),
        outcome.done_s - outcome.added_s,
        outcome.excursions(),
        outcome.own_excursions(),
        outcome.stalled_max_ms(),
        plot.display(),
        outcome.comparison
    );
    anyhow::ensure!(outcome.comparison.is_equal(), "source and target differ");
    let rise = outcome.rise_ms();
    anyhow::ensure!(rise <= RISE_MAX_MS, "the other tables fell {rise:.0} ms further behind, not {RISE_MAX_MS:.0} ms");
    let (often, own) = (outcome.excursions(), outcome.own_excursions());
    anyhow::ensure!(
        often <= 1,
        "the other tables fell behind {often} times, not once ({own} without the time for which the disk stood still): see the plot"
    );
    Ok(())
}

async fn measure(arguments: RunArguments) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        println!("This is a debug build: the figures say nothing about WALlaby. Use --release, or `make loadtest`.");
    }
    let quick = arguments.quick;
    let options = BenchOptions {
        pairs: if quick { 1 } else { arguments.pairs },
        rows: if quick { 4_000 } else { arguments.rows },
        rows_one: if quick { 500 } else { arguments.rows_one },
        per_second: if quick { 200 } else { arguments.per_second },
        latency_for: Duration::from_secs(if quick { 1 } else { arguments.latency_seconds }),
        program: std::env::current_exe().context("finding this program")?,
    };
    let mut figures = Figures { command: command_line(), at_s: seconds_since_1970(), ..Figures::default() };
    describe_machine(&mut figures);
    let measured = measure_areas(&arguments, options, &mut figures).await;
    // What was measured until then is no less true.
    write(&arguments.out, &figures)?;
    measured
}

async fn measure_areas(arguments: &RunArguments, options: BenchOptions, figures: &mut Figures) -> anyhow::Result<()> {
    let told = |run: &Run| {
        println!("pair {} {:<41} {:>8.0} rows/s, load {:.2}", run.pair, run.kind.title(), run.rate(), run.load_average);
    };
    let measures = |area| arguments.only.is_empty() || arguments.only.contains(&area);
    if measures(Area::Pipeline) {
        println!(
            "Filling the source's WAL: {} rows, and {} in transactions of one row ...",
            options.rows, options.rows_one
        );
        let bench = Bench::prepare(options.clone()).await?;
        bench.run_pairs(figures, told).await?;
        println!("Latencies to a reader of the log ...");
        bench.latency(figures).await?;
    }
    let programs = Programs::find(arguments.programs.as_deref());
    let sink = SinkOptions {
        pairs: options.pairs,
        rows: options.rows,
        per_second: options.per_second,
        latency_for: options.latency_for,
    };
    let rows = if arguments.quick { 4_000 } else { arguments.rows_load };
    for (area, title) in [(Area::Sink, "the Postgres sink"), (Area::Snapshot, "the first load")] {
        match (&programs, measures(area)) {
            (_, false) => {}
            (Err(error), true) => {
                figures.skipped.push(Skipped { what: title.to_owned(), why: format!("{error:#}") });
            }
            (Ok(programs), true) if area == Area::Sink => measure_sink(sink, programs, figures, told).await?,
            (Ok(programs), true) => measure_snapshot(options.pairs, rows, programs, figures, told).await?,
        }
    }
    Ok(())
}

/// On one node with the default sync, and then on three that sync every write.
async fn measure_snapshot(
    pairs: u32,
    rows: u64,
    programs: &Programs,
    figures: &mut Figures,
    mut told: impl FnMut(&Run),
) -> anyhow::Result<()> {
    for (nodes, sync_always, first_pair) in [(1, false, 0), (3, true, pairs)] {
        let always = if sync_always { ", sync always" } else { "" };
        println!("The first load, R{nodes}{always}: filling the table ...");
        let folder = Folder::temporary("loadtest")?;
        let options = SnapshotOptions { pairs, rows, nodes, sync_always, first_pair };
        let bench = SnapshotBench::prepare(options, programs, folder.path()).await?;
        let measured = bench.run_pairs(figures, &mut told).await;
        measured.map_err(|error| anyhow::anyhow!("{error:#}{}", bench.last_words()))?;
    }
    Ok(())
}

async fn measure_sink(
    options: SinkOptions,
    programs: &Programs,
    figures: &mut Figures,
    told: impl FnMut(&Run),
) -> anyhow::Result<()> {
    println!("The Postgres sink: filling the log ...");
    let folder = Folder::temporary("loadtest")?;
    let bench = SinkBench::prepare(options, programs, folder.path()).await?;
    let measured = async {
        bench.run_pairs(figures, told).await?;
        println!("Latencies to the sink ...");
        bench.latency(figures).await
    };
    measured.await.map_err(|error| anyhow::anyhow!("{error:#}{}", bench.last_words()))
}

fn write(folder: &Path, figures: &Figures) -> anyhow::Result<()> {
    let page = report::markdown(figures);
    std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    for (name, text) in [("figures.json", serde_json::to_string_pretty(figures)?), ("figures.md", page.clone())] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("\n{page}\nWritten to {}/figures.json and figures.md.", folder.display());
    Ok(())
}

fn command_line() -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let build = if cfg!(debug_assertions) { "" } else { "--release " };
    format!("cargo run {build}-p wallaby-loadtest --bin wallaby-loadtest -- {}", arguments.join(" "))
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn describe_machine(figures: &mut Figures) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().next().and_then(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    let facts = [
        ("cores", cores.to_string()),
        ("memory", format!("{} GiB", memory.unwrap_or_default() >> 20)),
        ("kernel", kernel.trim().to_owned()),
        ("postgres", wallaby_stack::POSTGRES_VERSION.to_owned()),
        ("build", build.to_owned()),
    ];
    figures.machine.extend(facts.into_iter().map(|(what, value)| (what.to_owned(), value)));
}
