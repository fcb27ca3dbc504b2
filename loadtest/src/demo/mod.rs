//! The demo: a shop, a warehouse, WALlaby between them, and a kill -9 in the middle.
//!
//! [`run`] is the story from beginning to end; each phase is a function. Everything it starts is a value that ends its processes
//! when it is dropped, so an error, Ctrl-C or the end of the story leaves nothing behind; after a kill -9 of the demo itself the
//! stack's reaper does it.

pub mod board;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use wallaby_model::flow::FlowDocument;
use wallaby_model::{FlowId, Lsn};
use wallaby_proto::v1;
use wallaby_stack::{FolderLock, NatsOptions, PostgresOptions};

use self::board::Board;
use crate::shop::{self, Load, LoadOptions};
use crate::system::api::{self, FlowApi};
use crate::system::{self, LEASE_TTL, Programs, Servers, ServersOptions, Wallaby, check_alive, until};
use crate::{Comparison, compare};

/// How long a fresh flow may take until rows can flow.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long the takeover may take. It should take the lease's time to live and a second.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(60);
/// How long the sink may take to catch up after the load has stopped.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);
/// Connections of the shop: each commit waits for a disk, so a few of them make the rate.
const WRITERS: u32 = 8;
/// Rows that the shop has before WALlaby comes: they are loaded first.
const ROWS_BEFORE: u64 = 30_000;
/// How long the first load may take.
const LOAD_PATIENCE: Duration = Duration::from_secs(180);
/// What `wallaby verify` exits with when source and sink differ.
const EXIT_DIFFERENT: i32 = 3;
/// How often the table is refreshed.
const REFRESH: Duration = Duration::from_millis(1_000);

/// What the demo does.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Where everything is kept while it runs.
    pub folder: PathBuf,
    /// The flow file.
    pub flow: PathBuf,
    /// Where WALlaby's programs are; beside this one when absent.
    pub programs: Option<PathBuf>,
    /// Rows that the shop writes each second.
    pub rows_per_second: u32,
    /// How long rows flow before the kill, and again after the takeover.
    pub flow_for: Duration,
    /// Decides what the shop writes.
    pub seed: u64,
}

/// What came of a demo.
#[derive(Debug)]
pub struct Outcome {
    /// Source and target, row by row.
    pub comparison: Comparison,
    /// Whether `wallaby verify` found them equal too.
    pub is_verified: bool,
    /// From the kill to the first row that the successor staged.
    pub takeover: Duration,
}

impl Outcome {
    /// Whether both comparisons found source and target equal.
    pub fn is_equal(&self) -> bool {
        self.is_verified && self.comparison.is_equal()
    }
}

/// Everything that runs. The table of the demo is drawn by it as well.
struct Stage {
    cli: PathBuf,
    servers: Servers,
    wallaby: Wallaby,
    api: FlowApi,
    board: Board,
    started: Instant,
    /// The load's rows when the table was last shown, for its rate.
    shown: (u64, Instant),
}

/// A demo that has told its story and still runs. Dropping it ends everything.
pub struct Told {
    /// What came of it.
    pub outcome: Outcome,
    stage: Stage,
    folder: FolderLock,
}

/// Tells the whole story. The caller may drop this future to end it early.
///
/// # Errors
/// When something dies that should not, or does not happen in time: says what, with the last log lines.
pub async fn run(options: &DemoOptions) -> anyhow::Result<Told> {
    let programs = Programs::find(options.programs.as_deref())?;
    let document = api::read_flow(&options.flow)?;
    let folder = FolderLock::acquire(&options.folder)?;
    system::clear(folder.path())?;
    let mut stage = raise(options, &programs, folder.path(), document.metadata.name.clone()).await?;
    match tell(options, &mut stage, &document).await {
        Ok(outcome) => Ok(Told { outcome, stage, folder }),
        Err(error) => {
            let (words, logs) = (stage.wallaby.last_words(), folder.path().display());
            Err(anyhow::anyhow!(
                "{error:#}\n\nThe last words of WALlaby's processes:{words}\n\nAll logs are below {logs}."
            ))
        }
    }
}

async fn tell(options: &DemoOptions, stage: &mut Stage, document: &FlowDocument) -> anyhow::Result<Outcome> {
    fill_shop(stage, options).await?;
    let load = start_load(stage, options).await?;
    apply_flow(stage, options, document).await?;
    watch_first_load(stage, &load).await?;
    watch_rows_flow(stage, &load, options.flow_for).await?;
    let takeover = kill_and_take_over(stage, &load).await?;
    watch_rows_flow(stage, &load, options.flow_for).await?;
    let end = stop_load(stage, load).await?;
    catch_up(stage, end).await?;
    let comparison = compare_all(stage, &document.publication_name()).await?;
    let is_verified = verify(stage, &document.metadata.name).await?;
    Ok(Outcome { comparison, is_verified, takeover })
}

/// Starts servers, controller and workers, and makes the shop's tables.
async fn raise(
    options: &DemoOptions,
    programs: &Programs,
    folder: &std::path::Path,
    flow: FlowId,
) -> anyhow::Result<Stage> {
    let mut board = Board::new();
    let started = Instant::now();
    board.say("Starting two Postgres, three NATS nodes and etcd ...");
    let postgres = PostgresOptions { fsync: true, ..PostgresOptions::default() };
    let nats = NatsOptions { nodes: 3, ..NatsOptions::default() };
    let servers = Servers::start(folder, &ServersOptions { postgres, nats }).await?;
    shop::create_schema(&servers.source_dsn()).await?;
    board.say("Starting one controller and two workers ...");
    let wallaby = Wallaby::start(&servers, programs, folder, &["worker-1", "worker-2"])?;
    let api = FlowApi::new(&wallaby.endpoint(), flow)?;
    let alive = || check_alive(&servers, &wallaby);
    until("the controller's API", START_PATIENCE, alive, || api.is_up()).await?;
    board.say(&format!("All up after {:.1} s, in {}.", started.elapsed().as_secs_f64(), options.folder.display()));
    Ok(Stage { cli: programs.cli.clone(), servers, wallaby, api, board, started, shown: (0, Instant::now()) })
}

/// Applies the flow and waits until changes are captured and the sink knows where it begins.
async fn apply_flow(stage: &mut Stage, options: &DemoOptions, document: &FlowDocument) -> anyhow::Result<()> {
    stage.board.say(&format!("\nApplying {} ...", options.flow.display()));
    stage.api.create(document).await?;
    let alive = || check_alive(&stage.servers, &stage.wallaby);
    let ready = || async {
        let flow = stage.api.get().await?;
        ensure!(api::is_true(&flow, "Capturing"), "the flow does not capture yet: {}", api::complaints(&flow));
        Ok(())
    };
    until("the flow to capture", START_PATIENCE, alive, ready).await
}

/// What the shop has before WALlaby comes.
async fn fill_shop(stage: &mut Stage, options: &DemoOptions) -> anyhow::Result<()> {
    let dsn = stage.servers.source_dsn();
    let seed = options.seed.wrapping_add(1_000_000);
    let load = Load::start(LoadOptions { dsn, seed, rows_per_second: None, writers: WRITERS }).await?;
    let alive = || check_alive(&stage.servers, &stage.wallaby);
    let filled = || async {
        let rows = load.progress().rows;
        ensure!(rows >= ROWS_BEFORE, "{rows} of {ROWS_BEFORE} rows are there");
        Ok(())
    };
    until("the shop to have some rows", LOAD_PATIENCE, alive, filled).await?;
    let done = load.stop().await?;
    stage.board.say(&format!("The shop has {} rows already.", done.rows));
    Ok(())
}

/// Shows the table until the rows that were there are loaded and the sink follows the log, while new ones flow.
async fn watch_first_load(stage: &mut Stage, load: &Load) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        refresh(stage, Some(load)).await?;
        let flow = stage.api.get().await?;
        if api::is_true(&flow, "SnapshotComplete") && api::applied(&flow) > Lsn::ZERO {
            let seconds = began.elapsed().as_secs_f64();
            stage.board.say(&format!("\nThe rows that were there are loaded after {seconds:.1} s.\n"));
            return Ok(());
        }
        ensure!(began.elapsed() < LOAD_PATIENCE, "the first load does not end: {}", api::complaints(&flow));
    }
}

async fn start_load(stage: &mut Stage, options: &DemoOptions) -> anyhow::Result<Load> {
    let rate = options.rows_per_second;
    stage.board.say(&format!("The shop opens: about {rate} rows a second, seed {}.\n", options.seed));
    let load = LoadOptions {
        dsn: stage.servers.source_dsn(),
        seed: options.seed,
        rows_per_second: Some(rate),
        writers: WRITERS,
    };
    Ok(Load::start(load).await?)
}

/// Shows the table until `time` is over.
async fn watch_rows_flow(stage: &mut Stage, load: &Load, time: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        refresh(stage, Some(load)).await?;
    }
    Ok(())
}

/// One refresh of the table; takes [`REFRESH`].
async fn refresh(stage: &mut Stage, load: Option<&Load>) -> anyhow::Result<()> {
    tokio::time::sleep(REFRESH).await;
    check_alive(&stage.servers, &stage.wallaby)?;
    let flow = stage.api.get().await?;
    show(stage, load, &flow)
}

fn show(stage: &mut Stage, load: Option<&Load>, flow: &v1::Flow) -> anyhow::Result<()> {
    ensure!(!load.is_some_and(Load::has_failed), "the shop's load gave up; run the demo again");
    let (rows_before, before) = stage.shown;
    let rows = load.map_or(rows_before, |load| load.progress().rows);
    let rate = rows.saturating_sub(rows_before) as f64 / before.elapsed().as_secs_f64().max(0.001);
    stage.shown = (rows, Instant::now());
    stage.board.show(stage.started.elapsed(), rate, board::lines(flow));
    Ok(())
}

/// Kills the worker that captures, and waits until another one has staged something new.
async fn kill_and_take_over(stage: &mut Stage, load: &Load) -> anyhow::Result<Duration> {
    let flow = stage.api.get().await?;
    let victim = api::capture(&flow).map(|task| task.worker.clone()).unwrap_or_default();
    ensure!(!victim.is_empty(), "nobody owns the capture: {}", api::complaints(&flow));
    let rows_before = load.progress().rows;
    stage.wallaby.kill_worker(&victim).await?;
    let killed = Instant::now();
    stage.board.say(&format!("\nkill -9 {victim}, which captures. The lease lives {} s.\n", LEASE_TTL.as_secs()));
    let at_kill = api::staged(&stage.api.get().await?);
    let mut owner_seen = None;
    loop {
        check_alive(&stage.servers, &stage.wallaby)?;
        let flow = stage.api.get().await?;
        let task = api::capture(&flow).filter(|task| !task.worker.is_empty() && task.worker != victim);
        if let Some(task) = task {
            owner_seen.get_or_insert_with(|| (task.worker.clone(), killed.elapsed()));
        }
        if let Some((owner, locked)) = owner_seen.as_ref().filter(|_| api::staged(&flow) > at_kill) {
            let takeover = killed.elapsed();
            ensure!(load.progress().rows > rows_before, "no row was written during the takeover: it proves nothing");
            let (locked, takeover_s) = (locked.as_secs_f64(), takeover.as_secs_f64());
            let text =
                format!("\n{owner} took over: owner after {locked:.1} s, staging again after {takeover_s:.1} s.\n");
            stage.board.say(&text);
            return Ok(takeover);
        }
        ensure!(
            killed.elapsed() < TAKEOVER_PATIENCE,
            "nobody took over within {TAKEOVER_PATIENCE:?}: {}",
            api::complaints(&flow)
        );
        if stage.shown.1.elapsed() >= REFRESH {
            show(stage, Some(load), &flow)?;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Stops the load at transaction boundaries. Returns the end of the source's WAL.
async fn stop_load(stage: &mut Stage, load: Load) -> anyhow::Result<Lsn> {
    let done = load.stop().await?;
    let client = stage.servers.source.connect(system::SOURCE_DATABASE).await?;
    let row = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
    let end: Lsn = row.try_get::<_, String>(0)?.parse()?;
    let (rows, transactions) = (done.rows, done.transactions);
    stage.board.say(&format!("\nThe shop closes: {rows} rows in {transactions} transactions, up to {end}."));
    Ok(end)
}

/// Waits until the sink has everything up to `end`.
async fn catch_up(stage: &mut Stage, end: Lsn) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let flow = stage.api.get().await?;
        if api::applied(&flow) >= end {
            stage.board.say(&format!("The warehouse has it all after {:.1} s.", began.elapsed().as_secs_f64()));
            return Ok(());
        }
        let (applied, why) = (api::applied(&flow), api::complaints(&flow));
        ensure!(began.elapsed() < CATCH_UP_PATIENCE, "the sink stands at {applied} and not at {end}: {why}");
        refresh(stage, None).await?;
    }
}

/// Compares every table of the flow's publication.
async fn compare_all(stage: &mut Stage, publication: &str) -> anyhow::Result<Comparison> {
    let client = stage.servers.source.connect(system::SOURCE_DATABASE).await?;
    let sql = "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = $1 ORDER BY 1";
    let rows = client.query(sql, &[&publication]).await.context("reading the publication")?;
    let tables: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let is_captured = |table: &&str| !tables.iter().any(|captured| captured == table);
    let lacks: Vec<&str> = shop::TABLES.into_iter().filter(is_captured).collect();
    ensure!(lacks.is_empty(), "the publication {publication} lacks {lacks:?}");
    let names: Vec<&str> = tables.iter().map(String::as_str).collect();
    let comparison = compare(&stage.servers.source_dsn(), &stage.servers.target_dsn(), &names).await?;
    stage.board.say(&format!("\nSource and target, row by row:\n{comparison}"));
    Ok(comparison)
}

/// Ends the story as a user would: with `wallaby verify`. Whether it found both sides equal.
async fn verify(stage: &mut Stage, flow: &FlowId) -> anyhow::Result<bool> {
    let server = format!("127.0.0.1:{}", stage.wallaby.api.port());
    stage.board.say(&format!("\nwallaby --server {server} verify {flow}"));
    let mut command = tokio::process::Command::new(&stage.cli);
    command.args(["--server", &server, "verify", flow.as_str()]).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(CATCH_UP_PATIENCE, command.output()).await;
    let output = output.context("`wallaby verify` does not end")?.context("running `wallaby verify`")?;
    stage.board.say(&String::from_utf8_lossy(&output.stdout));
    match output.status.code() {
        Some(0) => Ok(true),
        // It did what was asked: that they differ is its answer.
        Some(EXIT_DIFFERENT) => Ok(false),
        _ => anyhow::bail!("`wallaby verify`: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)),
    }
}

impl Told {
    /// How to look around while everything runs.
    pub fn how_to_look_around(&self) -> String {
        let (servers, wallaby) = (&self.stage.servers, &self.stage.wallaby);
        let mut text = format!(
            "The shop          psql '{}'\n\
             The warehouse     psql '{}'\n\
             The flow          wallaby --server 127.0.0.1:{} status --watch\n\
             NATS              {}\n\
             etcd              etcdctl --endpoints {} get --prefix /wallaby/\n\
             Logs              {}/*.log\n",
            servers.source_dsn(),
            servers.target_dsn(),
            wallaby.api.port(),
            servers.nats.client_url(),
            servers.etcd.endpoints().join(","),
            self.folder.path().display(),
        );
        let controller = ("controller", &wallaby.controller);
        let workers = wallaby.workers.iter().map(|(name, worker)| (name.as_str(), worker));
        for (name, program) in std::iter::once(controller).chain(workers) {
            text.push_str(&format!("Metrics           http://127.0.0.1:{}/metrics ({name})\n", program.metrics.port()));
        }
        text
    }

    /// Ends everything. What went well is not worth the disk; what did not is kept for a look.
    ///
    /// # Errors
    /// When the folder cannot be emptied.
    pub fn end(self) -> anyhow::Result<Outcome> {
        drop(self.stage);
        if self.outcome.is_equal() {
            system::clear(self.folder.path())?;
        }
        Ok(self.outcome)
    }
}
