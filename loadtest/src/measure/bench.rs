//! Runs the parts against real servers, interleaved, and collects what they did.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use wallaby_model::Lsn;
use wallaby_stack::{NatsCluster, NatsOptions, Postgres, PostgresOptions, SyncInterval};

use super::figures::{Figures, Kind, Latency, Run, Skipped};
use super::parts::{DSN_VARIABLE, PartReport};
use super::proc::{self, MachineClock};
use super::report::TO_READER;
use crate::typ::{self, OpenLoop};

/// The server's own default, which most installations run with.
pub(crate) const DEFAULT_SYNC: SyncInterval = SyncInterval::Every(Duration::from_secs(120));
/// How long one run may take.
const RUN_PATIENCE: Duration = Duration::from_secs(300);
/// Where Debian keeps `pg_recvlogical` of its versions, newest last.
const DEBIAN_POSTGRES: &str = "/usr/lib/postgresql";
const DATABASE: &str = "loadtest";
const PUBLICATION: &str = "typ";
/// Slots at the beginning of each backlog; every run reads a copy.
const BASE_HUNDRED: &str = "base_hundred";
const BASE_ONE: &str = "base_one";

/// How large the measurement is.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Each kind is run so often, in turn.
    pub pairs: u32,
    /// Rows of a backlog in transactions of 100 rows.
    pub rows: u64,
    /// Rows of a backlog in transactions of one row.
    pub rows_one: u64,
    /// For latencies: transactions per second.
    pub per_second: u32,
    /// For latencies: how long.
    pub latency_for: Duration,
    /// This program, which the parts are run by.
    pub program: PathBuf,
}

/// The source with its backlogs.
pub struct Bench {
    options: BenchOptions,
    source: Postgres,
    recvlogical: Option<PathBuf>,
    /// The end of the backlog of 100-row transactions: where `pg_recvlogical` stops.
    end_hundred: Lsn,
}

/// The settings of a Postgres that is measured: nothing happens by itself, commits are flushed as anywhere.
pub(crate) fn quiet_postgres() -> PostgresOptions {
    let settings = [
        ("shared_buffers", "512MB"),
        ("max_wal_size", "16GB"),
        ("checkpoint_timeout", "1h"),
        ("autovacuum", "off"),
        ("track_commit_timestamp", "on"),
    ];
    let options = PostgresOptions { fsync: true, ..PostgresOptions::default() };
    settings.into_iter().fold(options, |options, (name, value)| options.setting(name, value))
}

impl Bench {
    /// Starts the source and fills both backlogs.
    ///
    /// # Errors
    /// When Postgres does not start or refuses.
    pub async fn prepare(options: BenchOptions) -> anyhow::Result<Bench> {
        let source = Postgres::start(quiet_postgres()).await?;
        source.connect("postgres").await?.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await?;
        let client = source.connect(DATABASE).await?;
        typ::create_schema(&client).await?;
        client.batch_execute(&format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {}", typ::TABLE)).await?;
        make_slot(&client, BASE_HUNDRED).await?;
        typ::fill(&client, 0, options.rows, 100).await?;
        let end = client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?;
        let end_hundred = end.try_get::<_, String>(0)?.parse()?;
        make_slot(&client, BASE_ONE).await?;
        typ::fill(&client, options.rows, options.rows_one, 1).await?;
        client.batch_execute("CHECKPOINT").await?;
        Ok(Bench { options, source, recvlogical: find_recvlogical(), end_hundred })
    }

    /// Runs every kind once for each pair, the order turning, so that a slow minute of the machine hits all of them.
    ///
    /// # Errors
    /// When a run fails.
    pub async fn run_pairs(&self, figures: &mut Figures, mut told: impl FnMut(&Run)) -> anyhow::Result<()> {
        let mut kinds = vec![Kind::S1, Kind::R1, Kind::R3, Kind::R3Always, Kind::S1OneRow, Kind::R1OneRow];
        match &self.recvlogical {
            Some(_) => kinds.insert(0, Kind::S0),
            None => figures.skipped.push(Skipped {
                what: Kind::S0.title().to_owned(),
                why: "pg_recvlogical is neither on the PATH nor at Debian's place: install postgresql".to_owned(),
            }),
        }
        for pair in 0..self.options.pairs {
            for turn in 0..kinds.len() {
                let kind = kinds[(turn + pair as usize) % kinds.len()];
                let run = self.run(kind, pair).await.with_context(|| format!("{}, pair {pair}", kind.title()))?;
                told(&run);
                figures.runs.push(run);
            }
        }
        Ok(())
    }

    /// The client's version and path, if there is one.
    pub fn recvlogical(&self) -> Option<&PathBuf> {
        self.recvlogical.as_ref()
    }

    async fn run(&self, kind: Kind, pair: u32) -> anyhow::Result<Run> {
        let (base, rows) = match kind {
            Kind::S1OneRow | Kind::R1OneRow => (BASE_ONE, self.options.rows_one),
            _ => (BASE_HUNDRED, self.options.rows),
        };
        let slot = "measured";
        let client = self.source.connect(DATABASE).await?;
        client.execute("SELECT pg_copy_logical_replication_slot($1, $2)", &[&base, &slot]).await?;
        let run = match kind {
            Kind::S0 => self.recv(pair, slot).await,
            Kind::S1 | Kind::S1OneRow => self.discard(kind, pair, slot, rows).await,
            _ => self.pipeline(kind, pair, slot, rows).await,
        };
        drop_slot(&client, slot).await?;
        run
    }

    async fn walsender(&self, slot: &str) -> Option<i32> {
        let client = self.source.connect(DATABASE).await.ok()?;
        let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        client.query_one(sql, &[&slot]).await.ok()?.try_get(0).ok()
    }

    /// S0. The walsender is gone when the client is, so it is watched.
    async fn recv(&self, pair: u32, slot: &str) -> anyhow::Result<Run> {
        let program = self.recvlogical.as_ref().context("no pg_recvlogical")?;
        let clock = Clock::start()?;
        let mut child = Command::new(program)
            .args(["--start", "--no-loop", "-f", "/dev/null", "-S", slot, "-d", &self.source.dsn(DATABASE)])
            .args(["-o", "proto_version=1", "-o", &format!("publication_names={PUBLICATION}")])
            .arg(format!("--endpos={}", self.end_hundred))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let pid = pid_of(&child)?;
        let (mut walsender, mut sender_cpu, mut client_cpu) = (None, Duration::ZERO, Duration::ZERO);
        let status = loop {
            if let Ok(status) = tokio::time::timeout(Duration::from_millis(10), child.wait()).await {
                break status?;
            }
            if walsender.is_none() {
                walsender = self.walsender(slot).await;
            }
            sender_cpu = walsender.and_then(proc::cpu_time).unwrap_or(sender_cpu);
            client_cpu = proc::cpu_time(pid).unwrap_or(client_cpu);
            ensure!(clock.began.elapsed() < RUN_PATIENCE, "pg_recvlogical has not ended after {RUN_PATIENCE:?}");
        };
        ensure!(status.success(), "pg_recvlogical failed: {status}");
        let rows = self.options.rows;
        clock.run(Kind::S0, pair, rows, None, &[("walsender", sender_cpu), ("client", client_cpu)], &[])
    }

    async fn discard(&self, kind: Kind, pair: u32, slot: &str, rows: u64) -> anyhow::Result<Run> {
        let clock = Clock::start()?;
        let rows_text = rows.to_string();
        let arguments = ["discard", "--slot", slot, "--publication", PUBLICATION, "--rows", &rows_text];
        let mut part = self.start_part(&arguments)?;
        let report = part.report().await?;
        let sender_cpu = self.walsender(slot).await.and_then(proc::cpu_time).unwrap_or_default();
        part.end().await?;
        ensure!(report.rows >= rows, "{} rows came, not {rows}", report.rows);
        // The last gulp may reach into what follows the backlog.
        let rows = report.rows;
        let cpu = [("walsender", sender_cpu), ("client", Duration::from_micros(report.cpu_micros))];
        let seconds = seconds(report.started_micros, report.ended_micros);
        clock.run(kind, pair, rows, Some(seconds), &cpu, &[("client", report.resident_bytes_max)])
    }

    async fn pipeline(&self, kind: Kind, pair: u32, slot: &str, rows: u64) -> anyhow::Result<Run> {
        let nats = start_nats(kind).await?;
        let clock = Clock::start()?;
        let before = nats_cpu(&nats)?;
        let rows_text = rows.to_string();
        let (mut writer, mut reader) = self.start_pipeline(&nats, slot, &rows_text, false)?;
        let (written, read) = tokio::try_join!(writer.report(), reader.report())?;
        let nats_cpu = nats_cpu(&nats)?.saturating_sub(before);
        let sender_cpu = self.walsender(slot).await.and_then(proc::cpu_time).unwrap_or_default();
        tokio::try_join!(writer.end(), reader.end())?;
        // The last segment may reach into what follows the backlog.
        let (staged, rows) = (written.rows, read.rows.max(rows));
        ensure!(staged == rows && read.rows == rows, "{staged} rows staged, {} read, not {rows}", read.rows);
        let cpu = [
            ("walsender", sender_cpu),
            ("worker", Duration::from_micros(written.cpu_micros)),
            ("reader", Duration::from_micros(read.cpu_micros)),
            ("nats", nats_cpu),
        ];
        let memory = [("worker", written.resident_bytes_max), ("reader", read.resident_bytes_max)];
        let seconds = seconds(written.started_micros, read.ended_micros);
        clock.run(kind, pair, rows, Some(seconds), &cpu, &memory)
    }

    fn start_pipeline(
        &self,
        nats: &NatsCluster,
        slot: &str,
        rows: &str,
        latency: bool,
    ) -> anyhow::Result<(PartProcess, PartProcess)> {
        let (url, replicas) = (nats.client_url(), nats.nodes().len().to_string());
        let writer = [
            "capture",
            "--slot",
            slot,
            "--publication",
            PUBLICATION,
            "--rows",
            rows,
            "--nats",
            &url,
            "--replicas",
            &replicas,
        ];
        let mut reader = vec!["read", "--rows", rows, "--nats", &url];
        if latency {
            reader.push("--latency");
        }
        // The reader first: it waits for the log, and is there when the first segment is.
        let reader = self.start_part(&reader)?;
        Ok((self.start_part(&writer)?, reader))
    }

    fn start_part(&self, arguments: &[&str]) -> anyhow::Result<PartProcess> {
        PartProcess::start(&self.options.program, arguments, &self.source.dsn(DATABASE))
    }

    /// Commits one-row transactions at a steady rate, and measures how long each takes to a reader of the log.
    ///
    /// # Errors
    /// When something fails on the way.
    pub async fn latency(&self, figures: &mut Figures) -> anyhow::Result<()> {
        let BenchOptions { per_second, latency_for, rows, rows_one, .. } = self.options;
        let transactions = (f64::from(per_second) * latency_for.as_secs_f64()) as u64;
        let client = self.source.connect(DATABASE).await?;
        let slot = "latency";
        make_slot(&client, slot).await?;
        let nats = start_nats(Kind::R1).await?;
        // Some come before the clock counts: connections, caches and plans are cold at first.
        let warm_up = u64::from(per_second);
        let count = (warm_up + transactions).to_string();
        let (mut writer, mut reader) = self.start_pipeline(&nats, slot, &count, true)?;
        self.wait_until_streaming(slot).await?;
        let first = rows + rows_one;
        let dsn = self.source.dsn(DATABASE);
        let load = OpenLoop { dsn, first, transactions: warm_up + transactions, per_second, connections: 8 };
        let load = load.run();
        let (loaded, written, read) =
            tokio::try_join!(async { load.await.map_err(anyhow::Error::from) }, writer.report(), reader.report())?;
        tokio::try_join!(writer.end(), reader.end())?;
        drop_slot(&client, slot).await?;
        ensure!(written.rows == loaded.transactions && read.rows == loaded.transactions, "rows got lost on the way");
        let [p50, p90, p99, p999, max, count] = read.latency.context("the reader measured no latency")?;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (commit_p50, late_max) = (micros(loaded.commit_p50), micros(loaded.late_max));
        let path = TO_READER.to_owned();
        figures.latencies.push(Latency { path, count, per_second, p50, p90, p99, p999, max, commit_p50, late_max });
        Ok(())
    }

    async fn wait_until_streaming(&self, slot: &str) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.walsender(slot).await.is_none() {
            ensure!(began.elapsed() < Duration::from_secs(30), "nobody streams from the slot {slot}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

async fn start_nats(kind: Kind) -> anyhow::Result<NatsCluster> {
    let (nodes, sync_interval) = match kind {
        Kind::R3 => (3, DEFAULT_SYNC),
        Kind::R3Always => (3, SyncInterval::Always),
        _ => (1, DEFAULT_SYNC),
    };
    Ok(NatsCluster::start(NatsOptions { nodes, sync_interval, ..NatsOptions::default() }).await?)
}

fn nats_cpu(nats: &NatsCluster) -> anyhow::Result<Duration> {
    let mut sum = Duration::ZERO;
    for node in nats.nodes() {
        sum += proc::cpu_time(node.pid()?).unwrap_or_default();
    }
    Ok(sum)
}

async fn make_slot(client: &tokio_postgres::Client, slot: &str) -> anyhow::Result<()> {
    client.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&slot]).await?;
    Ok(())
}

/// The client is gone, but its walsender may need a moment to notice.
async fn drop_slot(client: &tokio_postgres::Client, slot: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match client.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() > Duration::from_secs(10) => return Err(error).context("dropping a slot"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn seconds(from_micros: u64, to_micros: u64) -> f64 {
    to_micros.saturating_sub(from_micros).max(1) as f64 / 1e6
}

fn pid_of(child: &Child) -> anyhow::Result<i32> {
    Ok(i32::try_from(child.id().context("the process has ended already")?)?)
}

/// On the PATH, or the newest of Debian's.
fn find_recvlogical() -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&paths).map(|folder| folder.join("pg_recvlogical")).find(|path| path.is_file());
    let mut debian: Vec<PathBuf> = std::fs::read_dir(DEBIAN_POSTGRES)
        .map(|versions| versions.flatten().map(|version| version.path().join("bin/pg_recvlogical")).collect())
        .unwrap_or_default();
    debian.retain(|path| path.is_file());
    debian.sort();
    on_path.or_else(|| debian.pop())
}

/// Time and machine load around one run.
pub(crate) struct Clock {
    began: Instant,
    machine: MachineClock,
}

impl Clock {
    pub(crate) fn start() -> anyhow::Result<Clock> {
        Ok(Clock { machine: MachineClock::now()?, began: Instant::now() })
    }

    pub(crate) fn run(
        &self,
        kind: Kind,
        pair: u32,
        rows: u64,
        seconds: Option<f64>,
        cpu: &[(&str, Duration)],
        memory: &[(&str, u64)],
    ) -> anyhow::Result<Run> {
        let elapsed = self.began.elapsed().as_secs_f64();
        let busy = MachineClock::now()?.busy_since(&self.machine).as_secs_f64();
        let ours: f64 = cpu.iter().map(|(_, time)| time.as_secs_f64()).sum();
        let per_row = |time: &Duration| time.as_secs_f64() * 1e6 / rows as f64;
        Ok(Run {
            kind,
            pair,
            rows,
            seconds: seconds.unwrap_or(elapsed),
            cpu_micros_per_row: cpu.iter().map(|(name, time)| ((*name).to_owned(), per_row(time))).collect(),
            resident_bytes_max: memory
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), *bytes))
                .collect::<BTreeMap<_, _>>(),
            load_average: self.machine.load_average,
            cores_busy_elsewhere: ((busy - ours) / elapsed).max(0.0),
        })
    }
}

/// A part in a process of its own.
struct PartProcess {
    name: String,
    child: Child,
}

impl PartProcess {
    fn start(program: &PathBuf, arguments: &[&str], dsn: &str) -> anyhow::Result<PartProcess> {
        let name = arguments.first().copied().unwrap_or_default().to_owned();
        let child = Command::new(program)
            .arg("part")
            .args(arguments)
            .env(DSN_VARIABLE, dsn)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {} for {name}", program.display()))?;
        Ok(PartProcess { name, child })
    }

    /// What it did. It still holds its connections afterwards.
    async fn report(&mut self) -> anyhow::Result<PartReport> {
        let output = self.child.stdout.as_mut().with_context(|| format!("{} has no output", self.name))?;
        let mut line = String::new();
        let read = tokio::time::timeout(RUN_PATIENCE, BufReader::new(output).read_line(&mut line)).await;
        match read {
            Err(_) => bail!("{} has not ended after {RUN_PATIENCE:?}", self.name),
            Ok(Ok(0)) => bail!("{} failed; it said why above", self.name),
            Ok(read) => read.context("reading a report")?,
        };
        serde_json::from_str(&line).with_context(|| format!("{} reported something unreadable", self.name))
    }

    /// Lets it go.
    async fn end(&mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = tokio::time::timeout(Duration::from_secs(30), self.child.wait()).await;
        let status = status.with_context(|| format!("{} does not end", self.name))??;
        ensure!(status.success(), "{} failed: {status}", self.name);
        Ok(())
    }
}
