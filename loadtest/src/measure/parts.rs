//! The parts of the path, each run in a process of its own so that its CPU time and memory are its own.
//!
//! A part says what it did as one line of JSON on its standard output, and then waits until its input ends before it closes its
//! connections: so the parent can still look at the walsender behind it.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use wallaby_model::flow::Replicas;
use wallaby_model::{Codec, Epoch, FlowId, Lsn, Nonce, Position, RecordKind, ResumeInfo, TaskId};
use wallaby_postgres_source::{
    Capture, CaptureEvent, CaptureOptions, ConnectConfig, Frame, ReplicationClient, SegmentDraft, SessionOwner,
    StartOptions, Streaming,
};
use wallaby_staging::{
    Connections, DataAppend, Log, LogConfig, LogReader, LogWriter, NatsTarget, ReaderOptions, Start, WriterOptions,
};
use wallaby_wire::SegmentEncoder;

use super::proc;

/// The environment variable in which a part gets its source: it holds a password.
pub const DSN_VARIABLE: &str = "WALLABY_LOADTEST_DSN";
/// The flow whose log the parts use.
const FLOW: &str = "loadtest";
/// Reserved for the log.
const LOG_BYTES_MAX: u64 = 8 << 30;
/// How long the reader waits until the capture has made the log.
const LOG_PATIENCE: Duration = Duration::from_secs(30);
/// What lies between two commits of one-row transactions is below this, in microseconds.
const LATENCY_MAX_MICROS: u64 = 600_000_000;

/// What a part has to do.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Part {
    /// Reads a slot and discards everything.
    Discard {
        /// The slot.
        #[arg(long)]
        slot: String,
        /// The publication.
        #[arg(long)]
        publication: String,
        /// Ends after so many rows.
        #[arg(long)]
        rows: u64,
    },
    /// Captures a slot into the log.
    Capture {
        /// The slot.
        #[arg(long)]
        slot: String,
        /// The publication.
        #[arg(long)]
        publication: String,
        /// Ends when so many rows are acknowledged.
        #[arg(long)]
        rows: u64,
        /// The NATS servers.
        #[arg(long)]
        nats: String,
        /// Copies of the log.
        #[arg(long)]
        replicas: u8,
    },
    /// Reads the log and discards everything.
    Read {
        /// Ends after so many rows.
        #[arg(long)]
        rows: u64,
        /// The NATS servers.
        #[arg(long)]
        nats: String,
        /// Decodes the segments and measures the time since the commit.
        #[arg(long)]
        latency: bool,
    },
}

/// What a part did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PartReport {
    /// Rows that came by.
    pub rows: u64,
    /// Just before replication or reading was started, in µs since 1970.
    pub started_micros: u64,
    /// When the last row was there, or acknowledged.
    pub ended_micros: u64,
    /// CPU time of the process.
    pub cpu_micros: u64,
    /// The most memory that the process had resident.
    pub resident_bytes_max: u64,
    /// p50, p90, p99, p99.9, highest and count of the time since the commit, in µs.
    pub latency: Option<[u64; 6]>,
}

/// Runs a part to its end and prints its report.
///
/// # Errors
/// When a server refuses or goes away.
pub async fn run(part: Part) -> anyhow::Result<()> {
    match part {
        Part::Discard { slot, publication, rows } => discard(&slot, &publication, rows).await,
        Part::Capture { slot, publication, rows, nats, replicas } => {
            capture(&slot, &publication, rows, &nats, replicas).await
        }
        Part::Read { rows, nats, latency } => read(rows, &nats, latency).await,
    }
}

fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn source() -> anyhow::Result<ConnectConfig> {
    let dsn = std::env::var(DSN_VARIABLE).with_context(|| format!("{DSN_VARIABLE} is not set"))?;
    Ok(ConnectConfig::parse(&dsn)?)
}

/// Prints the report and keeps what the caller holds open until the parent has looked.
async fn report(rows: u64, started_micros: u64, ended_micros: u64, latency: Option<[u64; 6]>) -> anyhow::Result<()> {
    let own = i32::try_from(std::process::id())?;
    let cpu_micros = proc::cpu_time(own).unwrap_or_default().as_micros().try_into()?;
    let resident_bytes_max = proc::resident_bytes_max(own).unwrap_or_default();
    let report = PartReport { rows, started_micros, ended_micros, cpu_micros, resident_bytes_max, latency };
    println!("{}", serde_json::to_string(&report)?);
    let mut ignored = Vec::new();
    tokio::io::stdin().read_to_end(&mut ignored).await.context("waiting for the parent")?;
    Ok(())
}

async fn discard(slot: &str, publication: &str, wanted: u64) -> anyhow::Result<()> {
    let client = ReplicationClient::connect(&source()?).await?;
    let options = StartOptions {
        slot: slot.to_owned(),
        publication: publication.to_owned(),
        start: Lsn::ZERO,
        protocol: 1,
        streaming: Streaming::Off,
        messages: false,
        confirmed: Lsn::ZERO,
        status_every: Duration::from_secs(10),
    };
    let started = now_micros();
    let (mut reader, feedback) = client.start_replication(&options).await?;
    let mut rows = 0;
    while rows < wanted {
        reader.fill().await?;
        while let Some(frame) = reader.next_frame()? {
            if let Frame::Wal { payload, .. } = frame
                && payload.first() == Some(&b'I')
            {
                rows += 1;
            }
        }
    }
    report(rows, started, now_micros(), None).await?;
    feedback.close();
    Ok(())
}

async fn open_log(nats: &str) -> anyhow::Result<Log> {
    let servers = nats.split(',').map(str::to_owned).collect();
    let target = NatsTarget {
        servers,
        credentials_file: None,
        ca_file: None,
        client_certificate: None,
        name: "wallaby-loadtest".to_owned(),
    };
    Ok(Log::new(FlowId::new(FLOW)?, Connections::open(&target).await?))
}

async fn capture(slot: &str, publication: &str, wanted: u64, nats: &str, replicas: u8) -> anyhow::Result<()> {
    let log = open_log(nats).await?;
    log.ensure(&LogConfig { replicas: Replicas::Exactly(replicas), max_bytes: LOG_BYTES_MAX }).await?;
    let epoch = Epoch(1);
    let owner = SessionOwner { prefix: TaskId::capture(&FlowId::new(FLOW)?).session_prefix(), epoch };
    let prepared = Capture::prepare(CaptureOptions::new(source()?, owner, slot, publication)).await?;
    let first = Position::before(prepared.slot().confirmed_flush);
    let info = ResumeInfo {
        system_identifier: prepared.identity().system_identifier.clone(),
        timeline: prepared.identity().timeline,
        slot: slot.to_owned(),
        publication: publication.to_owned(),
        rewind: false,
    };
    let takeover = LogWriter::take_over(&log, epoch, Nonce::random(), WriterOptions::default()).await?;
    let writer = takeover.resume(first, info).await?;
    let mut in_flight = writer.in_flight();
    let started = now_micros();
    let (mut capture, feedback) = prepared.start(first, None).await?;
    let mut rows = 0;
    let mut encoder = SegmentEncoder::default();
    while rows < wanted {
        match capture.next(&mut in_flight).await? {
            CaptureEvent::Segment(draft) => {
                rows += draft.rows as u64;
                writer.append(pack(&mut encoder, &writer, &draft)?).await?;
            }
            CaptureEvent::Heartbeat { to } => writer.heartbeat(to.commit).await?,
            // Without a side store nothing of the kind comes.
            CaptureEvent::Part(_) | CaptureEvent::Splice(_) | CaptureEvent::Abandoned { .. } => {}
        }
    }
    writer.settled().await?;
    report(rows, started, now_micros(), None).await?;
    feedback.close();
    Ok(())
}

fn pack(encoder: &mut SegmentEncoder, writer: &LogWriter, draft: &SegmentDraft) -> anyhow::Result<DataAppend> {
    let codec = Codec::Lz4;
    let body = encoder.encode(&draft.body, codec)?;
    let rows = u32::try_from(draft.rows)?;
    Ok(DataAppend { from: writer.end(), to: draft.to, complete_to: draft.complete_to, rows, codec, body })
}

async fn read(wanted: u64, nats: &str, latency: bool) -> anyhow::Result<()> {
    let log = open_log(nats).await?;
    let deadline = tokio::time::Instant::now() + LOG_PATIENCE;
    while let Err(error) = log.info().await {
        ensure!(tokio::time::Instant::now() < deadline, "the capture has not made the log: {error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut reader = LogReader::new(&log, Start::FirstResume, ReaderOptions::default());
    let mut histogram = Histogram::<u64>::new_with_bounds(1, LATENCY_MAX_MICROS, 3).context("making a histogram")?;
    let started = now_micros();
    let mut seen = 0;
    while seen < wanted {
        let accepted = reader.next().await?;
        let RecordKind::Data { rows, .. } = accepted.staged.record.kind else { continue };
        seen += u64::from(rows);
        if latency {
            let now = now_micros();
            let body = wallaby_wire::decode(&accepted.staged.body)?;
            for transaction in &body.transactions {
                let committed = u64::try_from(transaction.committed_at_micros).unwrap_or_default();
                histogram.saturating_record(now.saturating_sub(committed).max(1));
            }
        }
    }
    let ended = now_micros();
    let latency = latency.then(|| percentiles(&histogram));
    report(seen, started, ended, latency).await
}

/// p50, p90, p99, p99.9, highest, count.
pub(crate) fn percentiles(histogram: &Histogram<u64>) -> [u64; 6] {
    let at = |quantile| histogram.value_at_quantile(quantile);
    [at(0.5), at(0.9), at(0.99), at(0.999), histogram.max(), histogram.len()]
}
