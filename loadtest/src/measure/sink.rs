//! The Postgres sink in a whole WALlaby: drained from a filled log, beside the same rows brought in by hand; and the latency to it.
//!
//! Times are the target's own commit timestamps: from the first commit of a drain to the last, so that neither finding an owner nor
//! polling is in the figure.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{SinkExt, TryStreamExt};
use hdrhistogram::Histogram;
use tokio_postgres::Client;
use wallaby_model::{FlowId, Lsn, SinkId};
use wallaby_stack::NatsOptions;

use super::bench::{Clock, DEFAULT_SYNC, quiet_postgres};
use super::figures::{Figures, Kind, Latency, Run};
use super::parts::percentiles;
use super::proc;
use super::report::TO_SINK;
use crate::system::api::{self, FlowApi};
use crate::system::{Programs, SOURCE_DATABASE, Servers, ServersOptions, TARGET_DATABASE, Wallaby, check_alive, until};
use crate::typ::{self, OpenLoop};

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Rows of a batch by hand: as many as the sink takes at most.
const BATCH_ROWS: u64 = 65_536;
const FLOW: &str = "loadtest";
/// In microseconds.
const LATENCY_MAX: u64 = 600_000_000;

/// How large the measurement is.
#[derive(Debug, Clone, Copy)]
pub struct SinkOptions {
    /// Drains, each by a sink of its own.
    pub pairs: u32,
    /// Rows in the log.
    pub rows: u64,
    /// For latencies: transactions per second.
    pub per_second: u32,
    /// For latencies: how long.
    pub latency_for: Duration,
}

/// A running system with a filled log and paused sinks.
pub struct SinkBench {
    options: SinkOptions,
    servers: Servers,
    wallaby: Wallaby,
    api: FlowApi,
    sinks: Vec<SinkId>,
    source: Client,
    target: Client,
}

/// A flow with one paused sink for each pair, each in a schema of its own.
fn flow_file(pairs: u32) -> String {
    let mut text = format!(
        "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: {FLOW} }}\nspec:\n  source:\n    postgres:\n      dsn: {{ env: SHOP_DSN }}\n      \
         publication: {{ create: true, tables: [{}] }}\n      snapshot: never\n  log: {{ replicas: 1, maxBytes: 8Gi }}\n  sinks:\n",
        typ::TABLE
    );
    for pair in 0..pairs {
        text.push_str(&format!(
            "    - name: w{pair}\n      postgres: {{ dsn: {{ env: WAREHOUSE_DSN }}, schema: w{pair} }}\n      paused: true\n"
        ));
    }
    text
}

impl SinkBench {
    /// Starts everything and fills the log.
    ///
    /// # Errors
    /// When something does not start, or dies.
    pub async fn prepare(options: SinkOptions, programs: &Programs, folder: &Path) -> anyhow::Result<SinkBench> {
        let nats = NatsOptions { sync_interval: DEFAULT_SYNC, ..NatsOptions::default() };
        let servers = Servers::start(folder, &ServersOptions { postgres: quiet_postgres(), nats }).await?;
        let source = servers.source.connect(SOURCE_DATABASE).await?;
        let target = servers.target.connect(TARGET_DATABASE).await?;
        typ::create_schema(&source).await?;
        let wallaby = Wallaby::start(&servers, programs, folder, &["worker-1"])?;
        let api = FlowApi::new(&wallaby.endpoint(), FlowId::new(FLOW)?)?;
        let mut sinks = Vec::new();
        for pair in 0..options.pairs {
            sinks.push(SinkId::new(format!("w{pair}"))?);
            target.batch_execute(&format!("CREATE SCHEMA w{pair}")).await?;
        }
        let bench = SinkBench { options, servers, wallaby, api, sinks, source, target };
        bench.begin().await?;
        Ok(bench)
    }

    async fn begin(&self) -> anyhow::Result<()> {
        let alive = || check_alive(&self.servers, &self.wallaby);
        until("the controller's API", PATIENCE, alive, || self.api.is_up()).await?;
        let document = wallaby_model::flow::parse(&flow_file(self.options.pairs), "the load test's flow")?;
        self.api.create(&document).await?;
        let capturing = || async {
            let flow = self.api.get().await?;
            ensure!(api::is_true(&flow, "Capturing"), "the flow does not capture yet: {}", api::complaints(&flow));
            Ok(())
        };
        until("the flow to capture", PATIENCE, alive, capturing).await?;
        typ::fill(&self.source, 0, self.options.rows, 100).await?;
        let end = self.source_end().await?;
        let staged = || async {
            let flow = self.api.get().await?;
            let staged = api::staged(&flow).commit;
            ensure!(staged >= end, "the log stands at {staged}, not at {end}: {}", api::complaints(&flow));
            Ok(())
        };
        until("the log to be filled", PATIENCE, alive, staged).await
    }

    async fn source_end(&self) -> anyhow::Result<Lsn> {
        let row = self.source.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?;
        Ok(row.try_get::<_, String>(0)?.parse()?)
    }

    /// Drains the log into one sink after the other, and brings the same rows in by hand after each.
    ///
    /// # Errors
    /// When something dies, or rows are missing.
    pub async fn run_pairs(&self, figures: &mut Figures, mut told: impl FnMut(&Run)) -> anyhow::Result<()> {
        let batches = self.batches().await?;
        for (pair, sink) in (0..).zip(&self.sinks) {
            self.target.batch_execute("CHECKPOINT").await?;
            let drained = self.drain(pair, sink).await?;
            self.target.batch_execute("CHECKPOINT").await?;
            let by_hand = self.bulk(pair, &batches).await?;
            for run in [drained, by_hand] {
                told(&run);
                figures.runs.push(run);
            }
        }
        Ok(())
    }

    async fn drain(&self, pair: u32, sink: &SinkId) -> anyhow::Result<Run> {
        let end = self.source_end().await?;
        let (_, worker) = self.wallaby.workers.first().context("no worker runs")?;
        let worker = worker.process.pid();
        let (clock, cpu_before) = (Clock::start()?, proc::cpu_time(worker).unwrap_or_default());
        self.api.set_sink_running(sink, true).await?;
        self.wait_until_applied(sink, end).await?;
        let cpu = proc::cpu_time(worker).unwrap_or_default().saturating_sub(cpu_before);
        let memory = proc::resident_bytes_max(worker).unwrap_or_default();
        let (rows, seconds) = self.commits(&format!("w{pair}.typ")).await?;
        clock.run(Kind::Drain, pair, rows, seconds, &[("worker", cpu)], &[("worker", memory)])
    }

    async fn wait_until_applied(&self, sink: &SinkId, end: Lsn) -> anyhow::Result<()> {
        let alive = || check_alive(&self.servers, &self.wallaby);
        let applied = || async {
            let flow = self.api.get().await?;
            let applied = api::applied_by(&flow, sink);
            ensure!(applied >= end, "the sink {sink} stands at {applied}, not at {end}: {}", api::complaints(&flow));
            Ok(())
        };
        until("the sink to have it all", PATIENCE, alive, applied).await
    }

    /// All rows in a table, and the seconds that they took: of `n` commits the first is where the clock starts, so its rows are
    /// taken out by scaling. `None` when one commit brought them all.
    async fn commits(&self, table: &str) -> anyhow::Result<(u64, Option<f64>)> {
        let sql = format!(
            "SELECT sum(rows)::int8, (array_agg(rows ORDER BY at))[1]::int8, extract(epoch FROM max(at) - min(at))::float8 \
             FROM (SELECT count(*) AS rows, pg_xact_commit_timestamp(xmin) AS at FROM {table} GROUP BY xmin) commits"
        );
        let row = self.target.query_one(&sql, &[]).await.with_context(|| format!("counting {table}"))?;
        let (rows, first, seconds): (i64, i64, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        ensure!(u64::try_from(rows)? == self.options.rows, "{table} has {rows} rows, not {}", self.options.rows);
        let timed = rows - first;
        let seconds = (timed > 0).then(|| seconds * rows as f64 / timed as f64);
        Ok((u64::try_from(rows)?, seconds))
    }

    /// The rows as binary COPY, in batches.
    async fn batches(&self) -> anyhow::Result<Vec<Vec<Bytes>>> {
        let mut batches = Vec::new();
        let range = self.source.query_one("SELECT min(id), max(id) FROM public.typ", &[]).await?;
        let (mut from, last): (i64, i64) = (range.try_get(0)?, range.try_get(1)?);
        while from <= last {
            let to = from + i64::try_from(BATCH_ROWS)?;
            let sql = format!(
                "COPY (SELECT * FROM public.typ WHERE id >= {from} AND id < {to} ORDER BY id) TO STDOUT (FORMAT binary)"
            );
            batches.push(self.source.copy_out(&sql).await?.try_collect().await?);
            from = to;
        }
        Ok(batches)
    }

    async fn bulk(&self, pair: u32, batches: &[Vec<Bytes>]) -> anyhow::Result<Run> {
        let client = self.servers.target.connect(TARGET_DATABASE).await?;
        let table = format!("by_hand_{pair}");
        let make = typ::SCHEMA.replace(typ::TABLE, &table);
        client.batch_execute(&format!("{make}; CREATE TEMP TABLE incoming (LIKE {table})")).await?;
        let columns =
            "customer_id, sku, quantity, price, discount, paid, status, created_at, updated_at, reference, note";
        let set: Vec<String> = columns.split(", ").map(|column| format!("{column} = EXCLUDED.{column}")).collect();
        let set = set.join(", ");
        let upsert = format!(
            "INSERT INTO {table} SELECT * FROM incoming ON CONFLICT (id) DO UPDATE SET {set}; TRUNCATE incoming; COMMIT"
        );
        let clock = Clock::start()?;
        for batch in batches {
            client.batch_execute("BEGIN").await?;
            let mut copy = Box::pin(client.copy_in::<_, Bytes>("COPY incoming FROM STDIN (FORMAT binary)").await?);
            for piece in batch {
                copy.feed(piece.clone()).await?;
            }
            copy.close().await?;
            client.batch_execute(&upsert).await?;
        }
        let (rows, seconds) = self.commits(&table).await?;
        clock.run(Kind::Bulk, pair, rows, seconds, &[], &[])
    }

    /// Commits one-row transactions at a steady rate; the latency of each is from its commit at the source to the commit of the
    /// batch that brought it to the sink.
    ///
    /// # Errors
    /// When something dies, or rows are missing.
    pub async fn latency(&self, figures: &mut Figures) -> anyhow::Result<()> {
        let sink = self.sinks.first().context("no sink")?;
        for other in self.sinks.iter().skip(1) {
            self.api.set_sink_running(other, false).await?;
        }
        let per_second = self.options.per_second;
        let warm_up = u64::from(per_second);
        let transactions = warm_up + (f64::from(per_second) * self.options.latency_for.as_secs_f64()) as u64;
        let (dsn, first) = (self.servers.source_dsn(), self.options.rows);
        let loaded = OpenLoop { dsn, first, transactions, per_second, connections: 8 }.run().await?;
        self.wait_until_applied(sink, self.source_end().await?).await?;
        let from = i64::try_from(typ::FIRST_ID + first + warm_up)?;
        let left = commit_times(&self.source, typ::TABLE, from).await?;
        let right = commit_times(&self.target, &format!("{sink}.typ"), from).await?;
        ensure!(left.len() == right.len(), "{} rows at the source, {} at the sink", left.len(), right.len());
        let mut histogram = Histogram::<u64>::new_with_bounds(1, LATENCY_MAX, 3).context("making a histogram")?;
        for (id, committed) in &left {
            let applied = right.get(id).with_context(|| format!("row {id} is not at the sink"))?;
            histogram.saturating_record(u64::try_from(applied - committed).unwrap_or_default().max(1));
        }
        let [p50, p90, p99, p999, max, count] = percentiles(&histogram);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (commit_p50, late_max) = (micros(loaded.commit_p50), micros(loaded.late_max));
        let path = TO_SINK.to_owned();
        figures.latencies.push(Latency { path, count, per_second, p50, p90, p99, p999, max, commit_p50, late_max });
        Ok(())
    }

    /// The last log lines of WALlaby's processes, for an error.
    pub fn last_words(&self) -> String {
        self.wallaby.last_words()
    }
}

/// When each row from `first` on was committed, in µs since 1970.
async fn commit_times(client: &Client, table: &str, first: i64) -> anyhow::Result<HashMap<i64, i64>> {
    let sql = format!(
        "SELECT id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::int8 FROM {table} WHERE id >= $1"
    );
    let rows = client.query(&sql, &[&first]).await.with_context(|| format!("reading commit times of {table}"))?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}
