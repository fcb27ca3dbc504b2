//! One opening of a sink: take over, read from where it stands, apply until something ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use wallaby_connector_api::{Applied as Outcome, Batch, Faults, Opened, Sink, SinkFactory, SinkTask};
use wallaby_coordination::{Key, Mark, PacedWriter};
use wallaby_model::Position;
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_postgres::{PostgresSinkConfig, PostgresSinkFactory};
use wallaby_postgres_source::{ConnectConfig, Lookup};
use wallaby_staging::{Log, LogReader, ReaderOptions, SegmentCache, Start};

use super::assemble::BatchAssembler;
use super::feed::{self, Fed, Feed};
use super::{Applied, ApplyError};
use crate::backoff::Backoff;
use crate::failpoint::Failpoint;
use crate::flows::ApplyDemand;
use crate::task::TaskContext;
use crate::{metrics, secret, status};

/// How often figures are brought up to date.
const TICK: Duration = Duration::from_secs(1);
/// How often the checkpoint in etcd follows the sink.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// How often the hold follows: a full log gets room no faster than this.
const HOLD_EVERY: Duration = Duration::from_secs(3);
/// A sink that has nothing to apply is told so rarely: its position moves on heartbeats alone.
const IDLE_MOVE_EVERY: Duration = Duration::from_secs(5);
/// The sink's sessions are given up and opened again after this long without an answer.
const SINK_PATIENCE: Duration = Duration::from_secs(300);
/// A sink within this of the log's end counts as caught up.
const CAUGHT_UP_WITHIN_MS: u64 = 10_000;

/// Runs one opening. `Ok` when the task was asked to end.
pub async fn run(
    context: &TaskContext,
    demand: &ApplyDemand,
    applied: &mut Applied,
    backoff: &mut Backoff,
) -> Result<(), ApplyError> {
    enter(context, TaskPhase::Opening, "the sink");
    let mut sink = make(context, demand)?;
    let epoch = match context.lock.epoch() {
        Some(epoch) => epoch,
        None => context.lock.fix_epoch(sink.last_epoch().await?).await?,
    };
    context.status.epoch(epoch);
    let opened = sink.open(epoch).await?;
    if opened.sessions_ended > 0 {
        tracing::info!(task = %context.task, ended = opened.sessions_ended, "sessions of an older owner were ended");
    }
    let outcome = drive(context, applied, backoff, sink.as_mut(), opened).await;
    sink.close().await;
    outcome
}

fn make(context: &TaskContext, demand: &ApplyDemand) -> Result<Box<dyn Sink>, ApplyError> {
    let key = format!("spec.sinks[{}].postgres.dsn", demand.sink.name);
    let dsn = secret::resolve(&demand.sink.postgres.dsn).map_err(|source| ApplyError::Secret { key, source })?;
    let key = "spec.source.postgres.dsn".to_owned();
    let source = secret::resolve(&demand.source.dsn).map_err(|source| ApplyError::Secret { key, source })?;
    let source = ConnectConfig::parse(&source)?.with_application_name(&format!("wallaby lookup {}", context.task));
    let keep_older_sessions = context.shared.failpoints.is_on(Failpoint::KeepOlderSessions);
    let config = PostgresSinkConfig::new(&dsn, &demand.sink.postgres)?
        .with_faults(Faults { keep_older_sessions, ..Faults::default() });
    let task = SinkTask { task: context.task.clone(), lookup: Arc::new(Lookup::new(source, &demand.publication)) };
    Ok(PostgresSinkFactory::new(config).make(task))
}

/// A reader of the flow's log for a sink that stands as `opened` says.
async fn reader(context: &TaskContext, opened: Opened) -> Result<LogReader, ApplyError> {
    let log = Log::new(context.task.flow.clone(), context.shared.nats().await?.clone());
    let start = match opened.position {
        Some(position) => {
            let found = context.lock.found_checkpoint();
            let sequence_hint = found.filter(|found| found.position == Some(position)).and_then(|found| found.seq_hint);
            Start::At { position, epoch: opened.log_epoch, sequence_hint }
        }
        None => match hold(context).await? {
            Some(position) => Start::At { position, epoch: None, sequence_hint: None },
            None => Start::FirstResume,
        },
    };
    let cache: Arc<dyn SegmentCache> = Arc::<crate::cache::RecordCache>::clone(&context.shared.cache);
    Ok(LogReader::new(&log, start, ReaderOptions { cache: Some(cache), ..ReaderOptions::default() }))
}

/// Where a sink that never had a position begins, as the controller said when it was added.
async fn hold(context: &TaskContext) -> Result<Option<Position>, ApplyError> {
    let wallaby_model::TaskKind::Apply(sink) = &context.task.kind else { return Ok(None) };
    let key = Key::FlowHold(context.task.flow.clone(), sink.into());
    let Some(entry) = context.shared.coordination.get(&key).await? else { return Ok(None) };
    Ok(entry.decode::<wallaby_coordination::Hold>()?.position)
}

/// The state of one opening.
struct Run<'a> {
    context: &'a TaskContext,
    applied: &'a mut Applied,
    sink: &'a mut dyn Sink,
    feed: Feed,
    assembler: BatchAssembler,
    /// Shares of the byte bound of what the assembler holds, with the position up to which each goes.
    permits: std::collections::VecDeque<(Position, OwnedSemaphorePermit)>,
    checkpoints: PacedWriter<Mark>,
    sequence: Option<u64>,
    bytes_max: usize,
    rows_max: usize,
    /// The commit time of the last change the sink has, µs since 1970.
    last_commit_micros: Option<i64>,
    moved_at: Instant,
}

async fn drive(
    context: &TaskContext,
    applied: &mut Applied,
    backoff: &mut Backoff,
    sink: &mut dyn Sink,
    opened: Opened,
) -> Result<(), ApplyError> {
    let capabilities = sink.capabilities();
    let buffer = usize::try_from(context.shared.options.sink_buffer_bytes.0).unwrap_or(usize::MAX);
    let mut feed = Feed::start(reader(context, opened).await?, buffer);
    let (position, epoch, first) = match opened.position {
        Some(position) => (position, opened.log_epoch.unwrap_or_default(), None),
        None => {
            let Some(fed) = first_record(context, &mut feed).await? else { return Ok(()) };
            let (position, epoch) = feed::beginning(&fed);
            sink.start_at(position, epoch).await?;
            (position, epoch, Some(fed))
        }
    };
    tracing::info!(task = %context.task, position = %position, "applying");
    context.status.condition(ConditionType::Delivering, true, "Applying", "");
    context.status.phase(TaskPhase::Streaming);
    applied.mark = Some(Mark { position, stream: None, seq_hint: None });
    backoff.reset();
    let mut run = Run {
        context,
        applied,
        sink,
        feed,
        assembler: BatchAssembler::new(position, epoch),
        permits: std::collections::VecDeque::new(),
        checkpoints: context.lock.checkpoint_writer(CHECKPOINT_EVERY),
        sequence: None,
        bytes_max: capabilities.batch_bytes_max,
        rows_max: capabilities.batch_rows_max,
        last_commit_micros: None,
        moved_at: Instant::now(),
    };
    if let Some(fed) = first {
        run.take(fed);
    }
    run.turn().await
}

/// The first record of a log that may not have one yet. `None` when the task was asked to end.
async fn first_record(context: &TaskContext, feed: &mut Feed) -> Result<Option<Fed>, ApplyError> {
    context.pulse.wait("the capture's first record");
    context.status.waiting(Some("the capture's first record"));
    let fed = tokio::select! {
        fed = feed.next() => Some(fed?),
        _ = context.ending() => None,
    };
    context.status.waiting(None);
    Ok(fed)
}

impl Run<'_> {
    fn take(&mut self, fed: Fed) {
        self.sequence = Some(fed.sequence);
        self.permits.push_back((fed.segment.to, fed.permit));
        self.assembler.push(fed.segment);
    }

    async fn turn(&mut self) -> Result<(), ApplyError> {
        let context = self.context;
        let ending = context.ending();
        tokio::pin!(ending);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut holds = tokio::time::interval(HOLD_EVERY);
        holds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if context.shared.failpoints.fires_once(Failpoint::HangApply) {
                // Without a named wait, or it would count as one.
                context.pulse.beat();
                std::future::pending::<()>().await;
            }
            self.fill()?;
            let batch = if self.is_worth_applying() { self.assembler.batch(self.bytes_max) } else { None };
            let is_busy = batch.is_some();
            match &batch {
                Some(batch) => self.apply(batch).await?,
                None => {
                    // What is held of a transaction without its end gives its share of the bound back, or the reader would
                    // never get to that end. Capture bounds a transaction by largeTransactionBytes.
                    self.permits.clear();
                    context.pulse.wait("changes in the log");
                }
            }
            // Also a sink that is always busy reports, moves its hold, and ends when it is asked to.
            tokio::select! {
                biased;
                _ = &mut ending => break,
                _ = ticks.tick() => self.report(),
                _ = holds.tick() => self.move_hold().await?,
                fed = self.feed.next(), if !is_busy => { let fed = fed?; self.take(fed); }
                () = std::future::ready(()), if is_busy => {}
            }
            context.pulse.beat();
        }
        context.status.phase(TaskPhase::Draining);
        let durable = self.sink.barrier().await?;
        self.note(durable);
        self.move_hold().await
    }

    /// Takes what is there without waiting, up to a batch's worth.
    fn fill(&mut self) -> Result<(), ApplyError> {
        while self.assembler.held_bytes() < self.bytes_max && self.assembler.held_rows() < self.rows_max {
            match self.feed.ready()? {
                Some(fed) => self.take(fed),
                None => break,
            }
        }
        Ok(())
    }

    /// Rows go at once; a position that moves without rows waits a little.
    fn is_worth_applying(&self) -> bool {
        self.assembler.has_complete_rows()
            || (self.assembler.complete_to() > self.assembler.at() && self.moved_at.elapsed() >= IDLE_MOVE_EVERY)
    }

    async fn apply(&mut self, batch: &Batch) -> Result<(), ApplyError> {
        let context = self.context;
        context.pulse.wait("the sink's answer");
        if !context.is_valid_now() {
            return Err(ApplyError::Invalid);
        }
        let begun = Instant::now();
        let outcome = tokio::time::timeout(SINK_PATIENCE, self.sink.apply(batch)).await;
        let outcome = outcome.map_err(|_| ApplyError::Silent(SINK_PATIENCE.as_secs()))??;
        context.pulse.beat();
        let durable = match outcome {
            Outcome::Durable(position) => position,
            Outcome::Accepted => self.sink.barrier().await?,
        };
        let rows = batch.rows();
        let transactions: u64 = transactions_of(batch);
        self.applied.rows += rows as u64;
        self.applied.transactions += transactions;
        if let Some(micros) = last_commit(batch) {
            self.last_commit_micros = Some(micros);
            let now = status::now().0;
            metrics::applied(&context.task, rows, begun.elapsed(), now.saturating_sub((micros / 1000).max(0) as u64));
        }
        self.moved_at = Instant::now();
        self.note(durable);
        Ok(())
    }

    fn note(&mut self, durable: Position) {
        if durable < self.assembler.at() {
            return;
        }
        self.assembler.applied(durable);
        while self.permits.front().is_some_and(|(to, _)| *to <= durable) {
            self.permits.pop_front();
        }
        let mark = Mark { position: durable, stream: None, seq_hint: self.sequence };
        self.applied.mark = Some(mark.clone());
        self.checkpoints.note(mark);
    }

    async fn move_hold(&mut self) -> Result<(), ApplyError> {
        let wallaby_model::TaskKind::Apply(sink) = &self.context.task.kind else { return Ok(()) };
        match self.context.lock.advance_hold(sink, self.assembler.at()).await {
            Err(error) if error.is_transient() => Ok(()),
            other => other.map_err(ApplyError::from),
        }
    }

    fn report(&mut self) {
        let board = &self.context.status;
        let at = self.assembler.at();
        let end = self.assembler.end();
        let is_behind = self.assembler.held_rows() > 0;
        let now = status::now().0;
        let lag_ms = match self.last_commit_micros {
            Some(micros) if is_behind => now.saturating_sub((micros / 1000).max(0) as u64),
            _ => 0,
        };
        let lag_bytes = end.commit.0.saturating_sub(at.commit.0);
        match self.feed.waiting() {
            Some(waiting) => board.waiting(Some(&waiting.what.to_string())),
            None => board.waiting(None),
        }
        if lag_ms <= CAUGHT_UP_WITHIN_MS {
            board.condition(ConditionType::CaughtUp, true, "WithinLag", "");
        } else {
            let message = format!("the sink is {} s behind the log", lag_ms / 1000);
            board.condition(ConditionType::CaughtUp, false, "Behind", &message);
        }
        metrics::sink_position(&self.context.task, at, lag_bytes, lag_ms);
        let (rows, transactions, bytes) = (self.applied.rows, self.applied.transactions, self.applied.bytes);
        board.progress(|progress| {
            progress.applied = Some(at);
            progress.staged = Some(end);
            progress.lag_bytes = Some(lag_bytes);
            progress.lag_ms = Some(lag_ms);
            progress.rows = rows;
            progress.transactions = transactions;
            progress.bytes = bytes;
        });
    }
}

fn enter(context: &TaskContext, phase: TaskPhase, waits_for: &str) {
    context.status.phase(phase);
    context.pulse.wait(waits_for);
}

fn last_commit(batch: &Batch) -> Option<i64> {
    batch
        .parts
        .iter()
        .flat_map(|part| part.transactions())
        .filter(|t| t.commit < batch.to.commit)
        .map(|t| t.committed_at_micros)
        .max()
}

/// The transactions that end inside the batch: one that is spread over several segments stands in each of them.
fn transactions_of(batch: &Batch) -> u64 {
    let commits = batch.parts.iter().flat_map(|part| part.transactions()).map(|transaction| transaction.commit);
    let mut inside: Vec<_> =
        commits.filter(|commit| *commit >= batch.from.commit && *commit < batch.to.commit).collect();
    inside.sort_unstable();
    inside.dedup();
    inside.len() as u64
}
