//! A table is added to a live flow of ten: how far the other tables fall behind meanwhile.
//!
//! Rows are written into the ten tables in turn all the time; the lag of the sink is how long the oldest row has been committed that is
//! not there yet. It is plotted over the time of the run, with the moment of the hand-over. How long a commit itself takes at the source is
//! not in it: on one machine the disk that is busy with what is loaded makes a commit slower, too. It makes the log's servers slower as well, which
//! sync each write here; so it is watched beside them for how long it stands still.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::run::{RunPlan, RunState};
use wallaby_model::{FlowId, RunId};
use wallaby_stack::{NatsOptions, PostgresOptions};

use crate::first_load::churn::{Churn, ChurnOptions};
use crate::system::api::{self, FlowApi};
use crate::system::{self, Programs, Servers, ServersOptions, Wallaby, check_alive, until};
use crate::{Comparison, compare, typ};

const FLOW: &str = "tables";
const TABLES: usize = 10;
const PATIENCE: Duration = Duration::from_secs(1800);
const BEAT_EVERY: Duration = Duration::from_millis(20);
const SAMPLE_EVERY: Duration = Duration::from_millis(20);
/// What a table that is added may cost the others.
pub const RISE_MAX_MS: f64 = 1000.0;
/// What the lag rises by before it is called a rise: below it is what the machine does while rows are read and loaded.
const RISE_SEEN_MS: f64 = RISE_MAX_MS / 4.0;
/// How often the disk is asked to sync a few bytes, and from when on it is said to have stood still.
const PROBE_EVERY: Duration = Duration::from_millis(20);
const STALL_SEEN: Duration = Duration::from_millis(50);
/// For how long the lag has to be down again before another rise is one more.
const REST_S: f64 = 1.0;

/// How large it is.
#[derive(Debug, Clone)]
pub struct AddTableOptions {
    /// Rows of the table that is added.
    pub rows: u64,
    /// Transactions a second on it while it is loaded.
    pub per_second: u32,
    /// How long the lag is watched before the table is added, and after its run.
    pub calm: Duration,
    /// NATS servers.
    pub nodes: usize,
    /// Whether both Postgres flush what they write to disk, as in production. Without it the operating system does, later and in bursts that
    /// the log's servers wait for.
    pub fsync: bool,
}

/// The lag of the ten tables over time.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Seconds since the beginning, lag in milliseconds.
    pub samples: Vec<(f64, f64)>,
    /// When the disk stood still, from and to, in seconds since the beginning.
    pub stalls: Vec<(f64, f64)>,
    /// When the table was added, in seconds since the beginning.
    pub added_s: f64,
    /// When the sink was seen to have handed the table over: P.
    pub handed_over_s: f64,
    /// When the run was over.
    pub done_s: f64,
    /// Every table, row by row.
    pub comparison: Comparison,
}

impl Outcome {
    /// The largest lag before the table was added.
    pub fn calm_max_ms(&self) -> f64 {
        self.max_of(0.0, self.added_s)
    }

    /// The largest lag during the run.
    pub fn run_max_ms(&self) -> f64 {
        self.max_of(self.added_s, self.done_s + 1.0)
    }

    /// How much further behind the other tables fell during the run.
    pub fn rise_ms(&self) -> f64 {
        self.run_max_ms() - self.calm_max_ms()
    }

    /// The longest time for which the disk stood still during the run.
    pub fn stalled_max_ms(&self) -> f64 {
        let during = self.stalls.iter().filter(|(from, _)| *from >= self.added_s);
        during.map(|(from, to)| (to - from) * 1000.0).fold(0.0, f64::max)
    }

    /// For how long of a time the disk stood still, all in seconds.
    fn stalled_s(&self, from: f64, to: f64) -> f64 {
        self.stalls.iter().map(|stall| (stall.1.min(to) - stall.0.max(from)).max(0.0)).sum()
    }

    /// How often the lag rose above what it was before the table was added, and came down again.
    pub fn excursions(&self) -> usize {
        self.rises(|_, lag| lag)
    }

    /// The same without the time for which the disk stood still while a row waited: the disk is everybody's here.
    pub fn own_excursions(&self) -> usize {
        self.rises(|at, lag| lag - self.stalled_s(at - lag / 1000.0, at) * 1000.0)
    }

    fn rises(&self, waited: impl Fn(f64, f64) -> f64) -> usize {
        let waited: Vec<_> = self.samples.iter().map(|(at, lag)| (*at, waited(*at, *lag))).collect();
        let before = waited.iter().filter(|(at, _)| *at <= self.added_s).map(|(_, lag)| *lag);
        let high = before.fold(0.0, f64::max) + RISE_SEEN_MS;
        let above = waited.iter().filter(|(at, lag)| *at > self.added_s && *lag > high).map(|(at, _)| *at);
        let (mut count, mut last) = (0, f64::NEG_INFINITY);
        for at in above {
            count += usize::from(at - last > REST_S);
            last = at;
        }
        count
    }

    fn max_of(&self, from: f64, to: f64) -> f64 {
        let inside = self.samples.iter().filter(|(at, _)| *at >= from && *at <= to);
        inside.map(|(_, lag)| *lag).fold(0.0, f64::max)
    }

    /// The plot, as SVG.
    pub fn plot(&self) -> String {
        let (width, height) = (900.0, 300.0);
        let end = self.samples.last().map_or(1.0, |(at, _)| at.max(1.0));
        let top = self.samples.iter().map(|(_, lag)| *lag).fold(100.0, f64::max);
        let (x, y) =
            (|at: f64| 50.0 + at / end * (width - 60.0), |lag: f64| height - 30.0 - lag / top * (height - 50.0));
        let points: Vec<String> =
            self.samples.iter().map(|(at, lag)| format!("{:.1},{:.1}", x(*at), y(*lag))).collect();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
             <polyline fill=\"none\" stroke=\"#2563eb\" points=\"{}\"/>",
            points.join(" ")
        );
        let moments = [(self.added_s, "table added"), (self.handed_over_s, "P"), (self.done_s, "run done")];
        for (line, (at, what)) in moments.into_iter().enumerate() {
            // A line of its own for each: the hand-over and the end may be close. Writing to a String cannot fail.
            let _ = write!(
                svg,
                "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"15\" y2=\"{1}\" stroke=\"#999\" stroke-dasharray=\"4\"/>\
                 <text x=\"{0:.1}\" y=\"{2}\">{what} {at:.1} s</text>",
                x(at),
                height - 30.0,
                12 + 14 * line
            );
        }
        let _ = write!(
            svg,
            "<text x=\"2\" y=\"{:.0}\">{top:.0} ms</text><text x=\"2\" y=\"{}\">0 ms</text><text x=\"{:.0}\" y=\"{}\">{end:.0} s</text></svg>",
            y(top) + 4.0,
            height - 30.0,
            width - 40.0,
            height - 10.0
        );
        svg
    }
}

fn flow_file(with_typ: bool) -> String {
    let mut tables: Vec<String> = (0..TABLES).map(|n| format!("public.beat{n}")).collect();
    if with_typ {
        tables.push(typ::TABLE.to_owned());
    }
    format!(
        "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: {FLOW} }}\nspec:\n  source:\n    postgres:\n      dsn: {{ env: SHOP_DSN }}\n      \
         publication: {{ create: true, tables: [{}] }}\n      snapshot: initial\n  log: {{ maxBytes: 4Gi }}\n  sinks:\n    \
         - name: warehouse\n      postgres: {{ dsn: {{ env: WAREHOUSE_DSN }} }}\n",
        tables.join(", ")
    )
}

/// Runs it from an empty folder to the comparison.
///
/// # Errors
/// When something dies that should not, or does not happen in time.
pub async fn run(options: &AddTableOptions, programs: &Programs, folder: &Path) -> anyhow::Result<Outcome> {
    let nats = NatsOptions { nodes: options.nodes, ..NatsOptions::default() };
    let postgres = PostgresOptions { fsync: options.fsync, ..PostgresOptions::default() };
    let servers = Servers::start(folder, &ServersOptions { postgres, nats }).await?;
    let source = servers.source.connect(system::SOURCE_DATABASE).await?;
    for n in 0..TABLES {
        let sql = format!(
            "CREATE TABLE beat{n} (id bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())"
        );
        source.batch_execute(&sql).await.context("making the ten tables")?;
    }
    typ::create_schema(&source).await?;
    typ::fill(&source, 0, options.rows, 10_000).await?;
    let wallaby = Wallaby::start(&servers, programs, folder, &["worker-1", "worker-2"])?;
    let outcome = watch(options, &servers, &wallaby, source, folder).await;
    outcome.map_err(|error| anyhow::anyhow!("{error:#}{}", wallaby.last_words()))
}

async fn watch(
    options: &AddTableOptions,
    servers: &Servers,
    wallaby: &Wallaby,
    source: Client,
    folder: &Path,
) -> anyhow::Result<Outcome> {
    let alive = || check_alive(servers, wallaby);
    let flow = FlowId::new(FLOW)?;
    let api = FlowApi::new(&wallaby.endpoint(), flow.clone())?;
    until("the controller's API", PATIENCE, alive, || api.is_up()).await?;
    api.create(&wallaby_model::flow::parse(&flow_file(false), "the flow of ten")?).await?;
    let complete = || async {
        let flow = api.get().await?;
        ensure!(api::is_true(&flow, "SnapshotComplete"), "not loaded yet: {}", api::complaints(&flow));
        Ok(())
    };
    until("the ten tables to be loaded", PATIENCE, alive, complete).await?;
    let churn = Churn::start(ChurnOptions {
        dsn: servers.source_dsn(),
        per_second: options.per_second,
        rows: options.rows,
        connections: 2,
        seed: 1,
    })
    .await?;
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let waiting: Arc<Mutex<Waiting>> = Arc::default();
    let beats = AbortOnDropHandle::new(tokio::spawn(beat(source, Arc::clone(&waiting), stop.clone())));
    let probe = File::create(folder.join("probe")).context("making a file to watch the disk with")?;
    let stalls = AbortOnDropHandle::new(tokio::spawn(probe_disk(probe, stop.clone(), begun)));
    let target = servers.target.connect(system::TARGET_DATABASE).await?;
    let samples = AbortOnDropHandle::new(tokio::spawn(sample(target, waiting, stop.clone(), begun)));
    tokio::time::sleep(options.calm).await;
    let added_s = begun.elapsed().as_secs_f64();
    api.update(&wallaby_model::flow::parse(&flow_file(true), "the flow of eleven")?).await?;
    let endpoints = servers.etcd.endpoints();
    let coordination = Coordination::connect(&endpoints, wallaby_coordination::Options::default()).await?;
    let second = Key::RunPlan(flow, RunId(2));
    let done = || async {
        let plan = coordination.get(&second).await?.context("no second run yet")?.decode::<RunPlan>()?;
        ensure!(plan.state == RunState::Done, "the run is {:?}: {}", plan.state, plan.message);
        Ok(())
    };
    until("the added table to be loaded", PATIENCE, alive, done).await?;
    let done_s = begun.elapsed().as_secs_f64();
    tokio::time::sleep(options.calm).await;
    churn.stop().await?;
    stop.cancel();
    let (samples, handed_over_s) = samples.await??;
    let handed_over_s = handed_over_s.context("the table was not seen to be handed over")?;
    beats.await??;
    let stalls = stalls.await??;
    let source = servers.source.connect(system::SOURCE_DATABASE).await?;
    let row = source.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
    let end: wallaby_model::Lsn = row.try_get::<_, String>(0)?.parse()?;
    let applied = || async {
        let flow = api.get().await?;
        ensure!(api::applied(&flow) >= end, "the sink is behind: {}", api::complaints(&flow));
        Ok(())
    };
    until("the sink to have it all", PATIENCE, alive, applied).await?;
    let names: Vec<String> = (0..TABLES).map(|n| format!("public.beat{n}")).chain([typ::TABLE.to_owned()]).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let comparison = compare(&servers.source_dsn(), &servers.target_dsn(), &names).await?;
    Ok(Outcome { samples, stalls, added_s, handed_over_s, done_s, comparison })
}

/// The rows of the ten tables that are committed at the source and were not seen at the sink yet, oldest first: each with its id, and
/// when its commit was answered.
#[derive(Debug, Default)]
struct Waiting([VecDeque<(i64, SystemTime)>; TABLES]);

impl Waiting {
    /// How long (ms) the oldest row has been waiting at `now` when each table was seen to end with the row `seen`. A row that came since
    /// the last look counts as if it had come at this one: it may have waited as long, and a look that took long hides nothing.
    fn lag_ms(&mut self, seen: &[i64], now: SystemTime) -> f64 {
        let oldest = self.0.iter_mut().zip(seen).filter_map(|(rows, seen)| {
            let oldest = rows.front().map(|(_, committed)| *committed);
            while rows.front().is_some_and(|(id, _)| id <= seen) {
                rows.pop_front();
            }
            oldest
        });
        // A row that was committed after the look has not waited.
        oldest.min().and_then(|committed| now.duration_since(committed).ok()).unwrap_or_default().as_secs_f64() * 1000.0
    }
}

async fn beat(source: Client, waiting: Arc<Mutex<Waiting>>, stop: CancellationToken) -> anyhow::Result<()> {
    for n in (0..TABLES).cycle() {
        if stop.is_cancelled() {
            return Ok(());
        }
        let row = source.query_one(&format!("INSERT INTO beat{n} DEFAULT VALUES RETURNING id"), &[]).await?;
        let beat = (row.try_get(0)?, SystemTime::now());
        waiting.lock().unwrap_or_else(PoisonError::into_inner).0[n].push_back(beat);
        tokio::time::sleep(BEAT_EVERY).await;
    }
    Ok(())
}

/// Lets a file grow, which waits for the file system's journal as the log's servers do; when that took long.
async fn probe_disk(mut file: File, stop: CancellationToken, begun: Instant) -> anyhow::Result<Vec<(f64, f64)>> {
    let mut stalls = Vec::new();
    while !stop.is_cancelled() {
        // The times are taken where it is done: waiting for a thread is not the disk's.
        let probe = tokio::task::spawn_blocking(move || {
            let from = begun.elapsed();
            file.write_all(&[0; 8])?;
            file.sync_data()?;
            std::io::Result::Ok((file, from, begun.elapsed()))
        });
        let (same, from, to) = probe.await?.context("watching the disk")?;
        file = same;
        if to - from > STALL_SEEN {
            stalls.push((from.as_secs_f64(), to.as_secs_f64()));
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
    Ok(stalls)
}

/// The lag of the sink over time, and when the table that is added was first seen to be part of its main stream. The look's time is that
/// of the target, which has one clock with us.
async fn sample(
    target: Client,
    waiting: Arc<Mutex<Waiting>>,
    stop: CancellationToken,
    begun: Instant,
) -> anyhow::Result<(Vec<(f64, f64)>, Option<f64>)> {
    let newest: Vec<String> = (0..TABLES).map(|n| format!("(SELECT coalesce(max(id), 0) FROM beat{n})")).collect();
    let sql = format!(
        "SELECT ARRAY[{}], clock_timestamp(), EXISTS (SELECT FROM wallaby.tables \
         WHERE format('%s.%s', source_schema, source_table) = '{}' AND stage = 'ready')",
        newest.join(", "),
        typ::TABLE,
    );
    let (mut samples, mut handed_over) = (Vec::new(), None);
    while !stop.is_cancelled() {
        let row = target.query_one(&sql, &[]).await.context("reading the newest rows")?;
        let at = begun.elapsed().as_secs_f64();
        let lag = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .lag_ms(&row.try_get::<_, Vec<i64>>(0)?, row.try_get(1)?);
        samples.push((at, lag));
        if row.get::<_, bool>(2) {
            handed_over.get_or_insert(at);
        }
        tokio::time::sleep(SAMPLE_EVERY).await;
    }
    Ok((samples, handed_over))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten samples a second: 200 ms behind before the table is added at 2 s, then as `during` says, one number for each.
    fn outcome(during: &[f64]) -> Outcome {
        let calm = (0..20).map(|n| (f64::from(n) / 10.0, 200.0));
        let run = during.iter().zip(20_u32..).map(|(lag, n)| (f64::from(n) / 10.0 + 0.01, *lag));
        let samples: Vec<_> = calm.chain(run).collect();
        let done_s = samples.last().map_or(0.0, |(at, _)| *at);
        Outcome {
            samples,
            stalls: Vec::new(),
            added_s: 2.0,
            handed_over_s: 2.5,
            done_s,
            comparison: Comparison::default(),
        }
    }

    #[test]
    fn a_rise_is_counted_once_until_the_lag_was_down_for_a_while() {
        let rests = [200.0; 12];
        let rise = [500.0, 900.0, 300.0, 700.0];
        assert_eq!(outcome(&rests).excursions(), 0);
        let small = outcome(&[449.0; 10]);
        assert_eq!((small.excursions(), small.rise_ms()), (0, 249.0), "that much the machine itself does");
        let once = outcome(&[&rests[..], &rise, &rests].concat());
        assert_eq!((once.excursions(), once.rise_ms()), (1, 700.0));
        assert_eq!(outcome(&[&rise[..], &rests, &rise].concat()).excursions(), 2);
        // The second one's highest sample, at 3.7 s, has waited 900 ms: 300 of them for the disk, and 600.
        let stalled = |from| Outcome { stalls: vec![(from, 3.5)], ..outcome(&[&rise[..], &rests, &rise].concat()) };
        let counts = |outcome: Outcome| (outcome.excursions(), outcome.own_excursions(), outcome.rise_ms());
        assert_eq!(counts(stalled(3.2)), (2, 2, 700.0));
        assert_eq!(counts(stalled(2.9)), (2, 1, 700.0), "the bound holds whatever the disk does");
        assert_eq!(stalled(2.9).stalled_max_ms().round(), 600.0);
        // What the disk did before the table was added is no measure for what it costs.
        let mut calm = outcome(&rise);
        calm.samples[10].1 = 700.0;
        calm.stalls = vec![(0.4, 1.0)];
        assert_eq!(counts(calm), (0, 1, 200.0));
    }

    #[test]
    fn the_lag_is_that_of_the_oldest_committed_row_that_is_not_there() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let mut waiting = Waiting::default();
        assert_eq!(waiting.lag_ms(&[0; TABLES], at(5)), 0.0, "nothing was written");
        waiting.0[0].extend([(1, at(100)), (2, at(300))]);
        waiting.0[7].push_back((1, at(200)));
        let mut seen = [0; TABLES];
        assert_eq!(waiting.lag_ms(&seen, at(1000)), 900.0);
        seen[0] = 1;
        assert_eq!(waiting.lag_ms(&seen, at(1000)), 900.0, "it came since the last look");
        assert_eq!(waiting.lag_ms(&seen, at(1000)), 800.0, "the other table's is the oldest now");
        seen[7] = 1;
        waiting.lag_ms(&seen, at(1000));
        assert_eq!(waiting.lag_ms(&seen, at(1000)), 700.0);
        assert_eq!(waiting.lag_ms(&seen, at(250)), 0.0, "committed after the look");
        seen[0] = 2;
        waiting.lag_ms(&seen, at(1000));
        waiting.0[0].push_back((2, at(900)));
        assert_eq!(waiting.lag_ms(&seen, at(890)), 0.0, "seen before its commit was answered");
    }

    #[test]
    fn the_plot_names_the_three_moments() {
        let plot = outcome(&[200.0; 10]).plot();
        for moment in ["table added 2.0 s", "P 2.5 s", "run done 2.9 s"] {
            assert!(plot.contains(&format!(">{moment}<")), "{moment:?} is missing: {plot}");
        }
    }
}
