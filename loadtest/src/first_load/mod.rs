//! The first load under fire: existing rows are loaded while transactions go on, workers are killed, the sink restarts; and in the end
//! every row is compared.
//!
//! `wallaby-loadtest first-load` runs it in full size, a test in a small one. What is watched meanwhile ([`watch`]): which worker
//! read which chunk, whether a chunk that was done is read again, which locks our sessions hold at the source, and how long they
//! hold its xmin. [`add_table`] is the other way to begin a run: a table is added to a live flow of ten.

pub mod add_table;
pub mod churn;
pub mod watch;

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use wallaby_coordination::Coordination;
use wallaby_model::{FlowId, Lsn};
use wallaby_stack::{NatsOptions, PostgresOptions, Shutdown};

use self::churn::{Churn, ChurnOptions};
use self::watch::{RunWatch, SourceWatch, Watched};
use crate::system::api::{self, FlowApi};
use crate::system::{self, Programs, Servers, ServersOptions, Wallaby, check_alive, until};
use crate::{Comparison, compare, typ};

/// How long the whole load may take.
const PATIENCE: Duration = Duration::from_secs(3600);
const FLOW: &str = "load";
/// Small enough that killed workers lose little, and that there are many chunks in the small form too.
const POLL: Duration = Duration::from_millis(100);
/// How long a chunk is read on under a snapshot that its run gave up, at most; and never longer than a snapshot is held.
const OUTLIVES_MAX: Duration = Duration::from_secs(60);
/// Between the end of a snapshot's time and the end of its session.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(5);
/// The share of the transactions that were asked for which has to be there.
const PACE_MIN: f64 = 0.9;

/// How large the load is.
#[derive(Debug, Clone)]
pub struct FirstLoadOptions {
    /// Rows that are there before the flow is made.
    pub rows: u64,
    /// Transactions a second while they are loaded.
    pub per_second: u32,
    /// How often a worker that reads is killed.
    pub kills: u32,
    /// Whether the sink's Postgres is restarted in the middle.
    pub restart_sink: bool,
    /// NATS servers.
    pub nodes: usize,
    /// Decides what the transactions do.
    pub seed: u64,
    /// `log.sideStore.jetstream.chunksMax`: a chunk has a quarter of it, at most 64 MiB.
    pub chunks_max: String,
    /// `safety.snapshotMax`: how long the run may hold a snapshot of the source.
    pub snapshot_max: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Source and target, row by row.
    pub comparison: Comparison,
    /// Transactions that were committed from the flow's creation to `SnapshotComplete`.
    pub transactions: u64,
    /// From the flow's creation to `SnapshotComplete`.
    pub took: Duration,
    /// Workers that were killed.
    pub killed: u32,
    /// What was seen meanwhile.
    pub watched: Watched,
}

impl Outcome {
    /// Whether the transactions went on all the time as they were asked for.
    pub fn keeps_pace(&self, per_second: u32) -> bool {
        self.transactions as f64 >= PACE_MIN * f64::from(per_second) * self.took.as_secs_f64()
    }

    /// Whether each transaction of ours let go of the source's xmin in time: the run's after `snapshot_max`, a chunk's a while later.
    pub fn lets_go_of_xmin(&self, snapshot_max: Duration) -> bool {
        self.watched.xmin_held_max <= snapshot_max + OUTLIVES_MAX.min(snapshot_max) + GIVEN_UP_WITHIN
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Watched { readers, chunks, read_again, strongest_lock, xmin_held_max, blocked_writers, looks } =
            &self.watched;
        writeln!(f, "loaded in {:.1} s while {} transactions went on", self.took.as_secs_f64(), self.transactions)?;
        writeln!(f, "workers killed: {}", self.killed)?;
        let readers: Vec<String> = readers.iter().map(|(worker, chunks)| format!("{worker} {chunks}")).collect();
        writeln!(f, "chunks: {chunks}, read by: {}", readers.join(", "))?;
        writeln!(f, "chunks that were done and read again: {read_again}")?;
        writeln!(
            f,
            "strongest lock of ours at the source: {strongest_lock}; writers that waited for us: {blocked_writers} ({looks} looks)"
        )?;
        writeln!(f, "xmin held at most {:.1} s", xmin_held_max.as_secs_f64())?;
        write!(f, "{}", self.comparison)
    }
}

fn flow_file(options: &FirstLoadOptions) -> String {
    let FirstLoadOptions { chunks_max, snapshot_max, .. } = options;
    format!(
        "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: {FLOW} }}\nspec:\n  source:\n    postgres:\n      dsn: {{ env: SHOP_DSN }}\n      \
         publication: {{ create: true, tables: [{}] }}\n      snapshot: initial\n      safety: {{ snapshotMax: {}s }}\n  \
         log: {{ maxBytes: 4Gi, sideStore: {{ jetstream: {{ chunksMax: {chunks_max} }} }} }}\n  sinks:\n    \
         - name: warehouse\n      postgres: {{ dsn: {{ env: WAREHOUSE_DSN }} }}\n",
        typ::TABLE,
        snapshot_max.as_secs()
    )
}

struct Stage {
    servers: Servers,
    wallaby: Wallaby,
    api: FlowApi,
    programs: Programs,
    started: usize,
}

impl Stage {
    fn alive(&self) -> anyhow::Result<()> {
        check_alive(&self.servers, &self.wallaby)
    }
}

/// Runs it from an empty folder to the comparison.
///
/// # Errors
/// When something dies that should not, or does not happen in time.
pub async fn run(
    options: &FirstLoadOptions,
    programs: &Programs,
    folder: &Path,
    mut told: impl FnMut(&str),
) -> anyhow::Result<Outcome> {
    let nats = NatsOptions { nodes: options.nodes, ..NatsOptions::default() };
    let servers = Servers::start(folder, &ServersOptions { postgres: PostgresOptions::default(), nats }).await?;
    let source = servers.source.connect(system::SOURCE_DATABASE).await?;
    typ::create_schema(&source).await?;
    typ::fill(&source, 0, options.rows, 10_000).await?;
    source.batch_execute(&format!("ANALYZE {}", typ::TABLE)).await.context("analysing the table")?;
    told(&format!("{} rows are there", options.rows));
    let wallaby = Wallaby::start(&servers, programs, folder, &["worker-1", "worker-2"])?;
    let api = FlowApi::new(&wallaby.endpoint(), FlowId::new(FLOW)?)?;
    let mut stage = Stage { servers, wallaby, api, programs: programs.clone(), started: 2 };
    let outcome = load(options, &mut stage, folder, &mut told).await;
    outcome.map_err(|error| anyhow::anyhow!("{error:#}{}", stage.wallaby.last_words()))
}

async fn load(
    options: &FirstLoadOptions,
    stage: &mut Stage,
    folder: &Path,
    told: &mut impl FnMut(&str),
) -> anyhow::Result<Outcome> {
    until("the controller's API", PATIENCE, || stage.alive(), || stage.api.is_up()).await?;
    let churn = Churn::start(ChurnOptions {
        dsn: stage.servers.source_dsn(),
        per_second: options.per_second,
        rows: options.rows,
        connections: 4,
        seed: options.seed,
    })
    .await?;
    let endpoints = stage.servers.etcd.endpoints();
    let coordination = Coordination::connect(&endpoints, wallaby_coordination::Options::default()).await?;
    let mut runs = RunWatch::new(coordination, FlowId::new(FLOW)?);
    let locks = SourceWatch::start(stage.servers.source.connect(system::SOURCE_DATABASE).await?);
    let document = wallaby_model::flow::parse(&flow_file(options), "the load test's flow")?;
    let (begun, done_before) = (Instant::now(), churn.done());
    stage.api.create(&document).await?;
    let (mut killed, mut is_restarted) = (0, !options.restart_sink);
    loop {
        stage.alive()?;
        ensure!(!churn.has_failed(), "the transactions at the source gave up");
        ensure!(begun.elapsed() < PATIENCE, "the load does not end: {}", api::complaints(&stage.api.get().await?));
        let share = runs.look().await?;
        if api::is_true(&stage.api.get().await?, "SnapshotComplete") {
            break;
        }
        let due = f64::from(killed + 1) / f64::from(options.kills + 1);
        if killed < options.kills && share.read >= due * 0.8 && share.read < 1.0 {
            killed += kill_a_reader(stage, folder, &runs, told).await?;
        }
        if !is_restarted && share.loaded >= 0.3 {
            told("restarting the sink's Postgres");
            stage.servers.target.restart(Shutdown::Immediate).await?;
            is_restarted = true;
        }
        tokio::time::sleep(POLL).await;
    }
    let (took, transactions) = (begun.elapsed(), churn.done() - done_before);
    told(&format!("SnapshotComplete after {:.1} s", took.as_secs_f64()));
    let watched = locks.stop().await.with(&runs);
    churn.stop().await?;
    ensure!(is_restarted, "the sink was not restarted in time: it proves nothing; use more rows");
    catch_up(stage).await?;
    let comparison = compare(&stage.servers.source_dsn(), &stage.servers.target_dsn(), &[typ::TABLE]).await?;
    Ok(Outcome { comparison, transactions, took, killed, watched })
}

/// Kills the worker that reads a chunk right now, and starts another one in its place. 0 when none reads.
async fn kill_a_reader(
    stage: &mut Stage,
    folder: &Path,
    runs: &RunWatch,
    told: &mut impl FnMut(&str),
) -> anyhow::Result<u32> {
    let Some(victim) = runs.reader_now().await? else { return Ok(0) };
    let Some(victim) = stage.wallaby.workers.iter().map(|(name, _)| name.clone()).find(|name| victim.starts_with(name))
    else {
        return Ok(0);
    };
    stage.wallaby.kill_worker(&victim).await?;
    stage.started += 1;
    let name = format!("worker-{}", stage.started);
    stage.wallaby.add_worker(&stage.servers, &stage.programs, folder, &name)?;
    told(&format!("kill -9 {victim}, which reads a chunk; {name} starts"));
    Ok(1)
}

/// Waits until the sink has everything that was committed at the source.
async fn catch_up(stage: &Stage) -> anyhow::Result<()> {
    let source = stage.servers.source.connect(system::SOURCE_DATABASE).await?;
    let row = source.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
    let end: Lsn = row.try_get::<_, String>(0)?.parse()?;
    let applied = || async {
        let flow = stage.api.get().await?;
        let applied = api::applied(&flow);
        ensure!(applied >= end, "the sink stands at {applied}, not at {end}: {}", api::complaints(&flow));
        Ok(())
    };
    until("the sink to have it all", PATIENCE, || stage.alive(), applied).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(transactions: u64, took_s: u64, xmin_held_s: u64) -> Outcome {
        let watched = Watched { xmin_held_max: Duration::from_secs(xmin_held_s), ..Watched::default() };
        let (comparison, took) = (Comparison::default(), Duration::from_secs(took_s));
        Outcome { comparison, transactions, took, killed: 0, watched }
    }

    #[test]
    fn transactions_that_stood_still_for_a_while_do_not_keep_the_pace() {
        assert!(outcome(10_000, 10, 0).keeps_pace(1_000));
        assert!(outcome(9_000, 10, 0).keeps_pace(1_000));
        assert!(!outcome(8_999, 10, 0).keeps_pace(1_000));
        assert!(!outcome(0, 10, 0).keeps_pace(1_000));
    }

    #[test]
    fn a_snapshot_is_held_for_its_time_and_a_chunk_for_a_while_longer() {
        let long = Duration::from_secs(600);
        assert!(outcome(0, 0, 665).lets_go_of_xmin(long));
        assert!(!outcome(0, 0, 666).lets_go_of_xmin(long));
        // A short time is doubled at most.
        assert!(outcome(0, 0, 11).lets_go_of_xmin(Duration::from_secs(3)));
        assert!(!outcome(0, 0, 12).lets_go_of_xmin(Duration::from_secs(3)));
    }
}
