//! The first load: existing rows read into the side store, beside binary COPY out of the same source on as many connections; and a
//! full side store loaded by the Postgres sink, beside binary COPY into the same target.
//!
//! A whole WALlaby reads and loads (two workers, one etcd), so what is measured is what a user gets: offers, locks and records of
//! chunks are in it. The clock of a read starts when the run has its plan and ends when the last chunk is recorded; the clock of
//! a load starts when a worker owns the first chunk's load and ends when the last one is recorded. Nothing else happens at the
//! source meanwhile. Each read is a flow and a sink of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{SinkExt, TryStreamExt};
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::run::RunPlan;
use wallaby_model::{FlowId, RunId, SinkId, TaskKind};
use wallaby_stack::{NatsOptions, SyncInterval};

use super::bench::{Clock, DEFAULT_SYNC, quiet_postgres};
use super::figures::{Figures, Kind, Run};
use super::proc;
use crate::system::api::{self, FlowApi};
use crate::system::{Programs, SOURCE_DATABASE, Servers, ServersOptions, TARGET_DATABASE, Wallaby, check_alive, until};
use crate::typ;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often etcd is looked at while the clock runs.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const SINK: &str = "target";
/// Every flow made here has one run.
const RUN: RunId = RunId(1);

/// How large the measurement is.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotOptions {
    /// Each kind is measured so often.
    pub pairs: u32,
    /// Rows in the table.
    pub rows: u64,
    /// NATS servers, each stream on all of them.
    pub nodes: usize,
    /// Whether NATS syncs every write.
    pub sync_always: bool,
    /// The number of the first pair: figures of several measurements are told apart by it.
    pub first_pair: u32,
}

/// A running system with a table that nobody has loaded.
pub struct SnapshotBench {
    options: SnapshotOptions,
    servers: Servers,
    wallaby: Wallaby,
    coordination: Coordination,
    source: Client,
    target: Client,
    /// The first page behind the table's first half.
    middle_page: i64,
}

fn flow_file(flow: &FlowId) -> String {
    format!(
        "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: {flow} }}\nspec:\n  source:\n    postgres:\n      dsn: {{ env: SHOP_DSN }}\n      \
         publication: {{ create: true, tables: [{table}] }}\n      snapshot: never\n  \
         log: {{ maxBytes: 256Mi, sideStore: {{ jetstream: {{ chunksMax: 4Gi, transactionsMax: 64Mi }} }} }}\n  sinks:\n    \
         - name: {SINK}\n      postgres: {{ dsn: {{ env: WAREHOUSE_DSN }}, schema: {schema} }}\n      paused: true\n",
        table = typ::TABLE,
        schema = schema_of(flow)
    )
}

fn schema_of(flow: &FlowId) -> String {
    flow.as_str().replace('-', "_")
}

impl SnapshotBench {
    /// Starts everything and fills the table.
    ///
    /// # Errors
    /// When something does not start, or refuses.
    pub async fn prepare(
        options: SnapshotOptions,
        programs: &Programs,
        folder: &Path,
    ) -> anyhow::Result<SnapshotBench> {
        let sync_interval = if options.sync_always { SyncInterval::Always } else { DEFAULT_SYNC };
        let nats = NatsOptions { nodes: options.nodes, sync_interval, ..NatsOptions::default() };
        let servers = Servers::start(folder, &ServersOptions { postgres: quiet_postgres(), nats }).await?;
        let source = servers.source.connect(SOURCE_DATABASE).await?;
        let target = servers.target.connect(TARGET_DATABASE).await?;
        typ::create_schema(&source).await?;
        typ::fill(&source, 0, options.rows, 10_000).await?;
        // Hint bits are set and statistics are there, so that the first reader does no more than the last.
        source.batch_execute(&format!("VACUUM (FREEZE, ANALYZE) {}", typ::TABLE)).await?;
        source.batch_execute("CHECKPOINT").await?;
        let sql = format!("SELECT pg_relation_size('{}') / current_setting('block_size')::int8 / 2", typ::TABLE);
        let middle_page = source.query_one(&sql, &[]).await?.try_get(0)?;
        let wallaby = Wallaby::start(&servers, programs, folder, &["worker-1", "worker-2"])?;
        let options_of_etcd = wallaby_coordination::Options::default();
        let coordination = Coordination::connect(&servers.etcd.endpoints(), options_of_etcd).await?;
        Ok(SnapshotBench { options, servers, wallaby, coordination, source, target, middle_page })
    }

    /// Measures every kind once for each pair, in turn. Only the reads through one connection when NATS syncs every write.
    ///
    /// # Errors
    /// When something dies, or rows are missing.
    pub async fn run_pairs(&self, figures: &mut Figures, mut told: impl FnMut(&Run)) -> anyhow::Result<()> {
        let mut keep = |run: Run| {
            told(&run);
            figures.runs.push(run);
        };
        let rows = self.rows_as_copy().await?;
        for pair in self.options.first_pair..self.options.first_pair + self.options.pairs {
            keep(self.copy_out(pair, 1).await?);
            if self.options.sync_always {
                keep(self.read(pair, 1, Kind::ChunksAlways, None).await?);
                continue;
            }
            keep(self.read(pair, 1, Kind::Chunks, None).await?);
            keep(self.copy_out(pair, 2).await?);
            let mut loaded = None;
            keep(self.read(pair, 2, Kind::ChunksTwo, Some(&mut loaded)).await?);
            keep(loaded.context("nothing was loaded")?);
            keep(self.copy_in(pair, 1, &rows).await?);
            keep(self.copy_in(pair, 2, &rows).await?);
        }
        Ok(())
    }

    /// The last log lines of WALlaby's processes, for an error.
    pub fn last_words(&self) -> String {
        self.wallaby.last_words()
    }

    fn alive(&self) -> anyhow::Result<()> {
        check_alive(&self.servers, &self.wallaby)
    }

    /// A run of a new flow, read by at most `readers` at a time; loaded as well where `loaded` is given.
    async fn read(&self, pair: u32, readers: u32, kind: Kind, loaded: Option<&mut Option<Run>>) -> anyhow::Result<Run> {
        let flow = FlowId::new(format!("read-{pair}-{readers}"))?;
        let api = FlowApi::new(&self.wallaby.endpoint(), flow.clone())?;
        let alive = || self.alive();
        until("the controller's API", PATIENCE, alive, || api.is_up()).await?;
        self.target.batch_execute(&format!("CREATE SCHEMA {}", schema_of(&flow))).await?;
        api.create(&wallaby_model::flow::parse(&flow_file(&flow), "the load test's flow")?).await?;
        let capturing = || async {
            let flow = api.get().await?;
            ensure!(api::is_true(&flow, "Capturing"), "the flow does not capture yet: {}", api::complaints(&flow));
            Ok(())
        };
        until("the flow to capture", PATIENCE, alive, capturing).await?;
        let before = self.cpu();
        api.start_snapshot(readers).await?;
        self.poll(&flow, "the run to have a plan", |seen| seen.planned > 0).await?;
        let clock = Clock::start()?;
        let began = Instant::now();
        let seen = self.poll(&flow, "every chunk to be read", |seen| seen.read == seen.planned).await?;
        let seconds = began.elapsed().as_secs_f64();
        ensure!(seen.rows == self.options.rows, "{} rows were read, not {}", seen.rows, self.options.rows);
        let cpu = self.cpu();
        let cpu: Vec<_> = cpu.iter().zip(&before).map(|((name, now), (_, then))| (*name, *now - *then)).collect();
        let run = clock.run(kind, pair, seen.rows, Some(seconds), &cpu, &[("worker", self.resident())])?;
        if let Some(loaded) = loaded {
            *loaded = Some(self.load(&api, &flow, pair).await?);
        }
        api.delete().await?;
        let gone = || async { api.is_gone().await };
        until("the flow to be gone", PATIENCE, alive, gone).await?;
        self.target.batch_execute(&format!("DROP SCHEMA {} CASCADE", schema_of(&flow))).await?;
        self.target.batch_execute("CHECKPOINT").await?;
        Ok(run)
    }

    /// Lets the flow's sink take the chunks that are there.
    async fn load(&self, api: &FlowApi, flow: &FlowId, pair: u32) -> anyhow::Result<Run> {
        self.target.batch_execute("CHECKPOINT").await?;
        let before = self.cpu();
        api.set_sink_running(&SinkId::new(SINK)?, true).await?;
        let deadline = Instant::now() + PATIENCE;
        while !self.coordination.locks(flow).await?.iter().any(|lock| matches!(lock.task.kind, TaskKind::Load(..))) {
            self.alive()?;
            ensure!(Instant::now() < deadline, "nobody loads: {}", api::complaints(&api.get().await?));
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let clock = Clock::start()?;
        let began = Instant::now();
        self.poll(flow, "every chunk to be loaded", |seen| seen.is_over || seen.loaded == seen.planned).await?;
        let seconds = began.elapsed().as_secs_f64();
        let cpu = self.cpu();
        let cpu: Vec<_> = cpu.iter().zip(&before).map(|((name, now), (_, then))| (*name, *now - *then)).collect();
        let run =
            clock.run(Kind::Load, pair, self.options.rows, Some(seconds), &cpu, &[("worker", self.resident())])?;
        self.count(&format!("{}.typ", schema_of(flow))).await?;
        Ok(run)
    }

    async fn count(&self, table: &str) -> anyhow::Result<()> {
        let row = self.target.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await?;
        let rows: i64 = row.try_get(0)?;
        ensure!(u64::try_from(rows)? == self.options.rows, "{table} has {rows} rows, not {}", self.options.rows);
        Ok(())
    }

    /// Looks at the run until it is as wanted.
    async fn poll(&self, flow: &FlowId, what: &str, is_so: impl Fn(&Seen) -> bool) -> anyhow::Result<Seen> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.look(flow).await?;
            if is_so(&seen) {
                return Ok(seen);
            }
            self.alive()?;
            ensure!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}: {seen:?}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self, flow: &FlowId) -> anyhow::Result<Seen> {
        let mut seen = Seen::default();
        for entry in self.coordination.list(&self.coordination.keys().run(flow, RUN)).await? {
            match &entry.key {
                Key::RunPlan(..) => {
                    let plan: RunPlan = entry.decode()?;
                    seen.planned = plan.chunks().count();
                    seen.is_over = plan.state.is_over();
                }
                Key::RunChunk(..) => {
                    seen.read += 1;
                    seen.rows += entry.decode::<wallaby_model::run::ChunkDone>()?.rows;
                }
                Key::RunLoaded(..) => seen.loaded += 1,
                _ => {}
            }
        }
        Ok(seen)
    }

    /// CPU time of both workers together, and of NATS.
    fn cpu(&self) -> [(&'static str, Duration); 2] {
        let of = |pid| proc::cpu_time(pid).unwrap_or_default();
        let workers = self.wallaby.workers.iter().map(|(_, worker)| of(worker.process.pid())).sum();
        let nats = self.servers.nats.nodes().iter().filter_map(|node| node.pid().ok()).map(of).sum();
        [("worker", workers), ("nats", nats)]
    }

    /// The most that one worker had resident.
    fn resident(&self) -> u64 {
        let of = |process: i32| proc::resident_bytes_max(process).unwrap_or_default();
        self.wallaby.workers.iter().map(|(_, worker)| of(worker.process.pid())).max().unwrap_or_default()
    }

    /// The selections that share the table between connections.
    fn shares(&self, connections: u32) -> Vec<String> {
        let (table, middle) = (typ::TABLE, self.middle_page);
        match connections {
            1 => vec![format!("COPY {table} TO STDOUT (FORMAT binary)")],
            _ => [format!("ctid < '({middle},0)'"), format!("ctid >= '({middle},0)'")]
                .map(|share| format!("COPY (SELECT * FROM {table} WHERE {share}) TO STDOUT (FORMAT binary)"))
                .into(),
        }
    }

    /// Binary COPY out of the source, everything discarded.
    async fn copy_out(&self, pair: u32, connections: u32) -> anyhow::Result<Run> {
        let kind = if connections == 1 { Kind::CopyOut } else { Kind::CopyOutTwo };
        let mut clients = Vec::new();
        for share in self.shares(connections) {
            clients.push((self.servers.source.connect(SOURCE_DATABASE).await?, share));
        }
        let clock = Clock::start()?;
        let copies = clients.into_iter().map(|(client, share)| {
            AbortOnDropHandle::new(tokio::spawn(async move {
                let copy = client.copy_out(&share).await?;
                copy.try_fold(0, async |bytes, data: Bytes| Ok(bytes + data.len())).await
            }))
        });
        let copies: Vec<_> = copies.collect();
        for copy in copies {
            ensure!(copy.await?.context("copying out of the source")? > 0, "nothing was copied out");
        }
        clock.run(kind, pair, self.options.rows, None, &[], &[])
    }

    /// The table as binary COPY, one stream for each of two connections.
    async fn rows_as_copy(&self) -> anyhow::Result<Vec<Vec<Bytes>>> {
        let mut shares = Vec::new();
        for share in self.shares(2) {
            shares.push(self.source.copy_out(&share).await?.try_collect().await?);
        }
        Ok(shares)
    }

    /// Binary COPY into a new table with its primary key, a transaction for each half.
    async fn copy_in(&self, pair: u32, connections: u32, rows: &[Vec<Bytes>]) -> anyhow::Result<Run> {
        let kind = if connections == 1 { Kind::CopyIn } else { Kind::CopyInTwo };
        let table = format!("public.by_copy_{pair}_{connections}");
        self.target.batch_execute(&typ::SCHEMA.replace(typ::TABLE, &table)).await?;
        self.target.batch_execute("CHECKPOINT").await?;
        let mut clients = Vec::new();
        for _ in 0..connections {
            clients.push(self.servers.target.connect(TARGET_DATABASE).await?);
        }
        let sql = format!("COPY {table} FROM STDIN (FORMAT binary)");
        let clock = Clock::start()?;
        let mut copies = Vec::new();
        for (index, client) in clients.into_iter().enumerate() {
            let shares: Vec<Vec<Bytes>> = rows.iter().skip(index).step_by(connections as usize).cloned().collect();
            let sql = sql.clone();
            copies.push(AbortOnDropHandle::new(tokio::spawn(async move {
                for share in shares {
                    let mut copy = Box::pin(client.copy_in::<_, Bytes>(&sql).await?);
                    for piece in share {
                        copy.feed(piece).await?;
                    }
                    copy.close().await?;
                }
                Ok::<(), tokio_postgres::Error>(())
            })));
        }
        for copy in copies {
            copy.await?.context("copying into the target")?;
        }
        let run = clock.run(kind, pair, self.options.rows, None, &[], &[])?;
        self.count(&table).await?;
        self.target.batch_execute(&format!("DROP TABLE {table}")).await?;
        Ok(run)
    }
}

/// How far a run is.
#[derive(Debug, Default)]
struct Seen {
    planned: usize,
    read: usize,
    rows: u64,
    loaded: usize,
    is_over: bool,
}
