//! One opening of a sink: take over, read from where it stands, apply until something ends it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span};
use wallaby_connector_api::{Applied as Outcome, Batch, Faults, Opened, Sink, SinkFactory, SinkTask, TableFilter};
use wallaby_coordination::{Key, Mark, PacedWriter};
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::flow::change::tables_found;
use wallaby_model::run::{SinkRun, covers, pattern_of};
use wallaby_model::{Epoch, Position, RunId, SinkId, TableName, TaskId};
use wallaby_postgres::{PostgresSinkConfig, PostgresSinkFactory};
use wallaby_postgres_source::{ConnectConfig, Lookup};
use wallaby_staging::Start;

use super::feed::{self, Fed, Feed};
use super::lag::Stands;
use super::load::{Loads, Stepped};
use super::portions::LogPortions;
use super::replay::CatchUp;
use super::stream::{self, LogStream};
use super::tables::{self, Stranger};
use super::{Applied, ApplyError, finish, first};
use crate::backoff::Backoff;
use crate::failpoint::Failpoint;
use crate::flows::ApplyDemand;
use crate::task::TaskContext;
use crate::{metrics, secret, spans, status};

/// How often figures are brought up to date.
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked whether a run wants something of this sink.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Steps in the runs between two batches.
const STEPS_MAX: usize = 16;
/// How often the checkpoint in etcd follows the sink.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// How often the hold follows: a full log gets room no faster than this.
const HOLD_EVERY: Duration = Duration::from_secs(3);
/// A sink that has nothing to apply is told so rarely: its position moves on heartbeats alone.
const IDLE_MOVE_EVERY: Duration = Duration::from_secs(5);

/// Runs one opening. `Ok` when the task was asked to end.
pub async fn run(
    context: &Arc<TaskContext>,
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
    metrics::epoch(&context.task, epoch);
    let opened = sink.open(epoch).await?;
    if opened.sessions_ended > 0 {
        tracing::info!(task = %context.task, ended = opened.sessions_ended, "sessions of an older owner were ended");
    }
    context.stop_at(Failpoint::StopAfterSinkOpened).await;
    let outcome = drive(context, demand, applied, backoff, sink.as_mut(), opened).await;
    sink.close().await;
    outcome
}

/// A new, unopened sink.
pub fn make(context: &TaskContext, demand: &ApplyDemand) -> Result<Box<dyn Sink>, ApplyError> {
    let (factory, task) = factory(context, demand)?;
    Ok(factory.make(task))
}

/// A second sink of the same owner, that works beside the first: its opening leaves the first one's sessions alone. Older owners' were
/// ended by the first.
fn make_beside(context: &TaskContext, demand: &ApplyDemand) -> Result<Box<dyn Sink>, ApplyError> {
    let (factory, task) = factory_with(context, demand, true)?;
    Ok(factory.make(task))
}

/// What makes the sink, and for whom: its apply task, also where a load task asks.
pub fn factory(context: &TaskContext, demand: &ApplyDemand) -> Result<(PostgresSinkFactory, SinkTask), ApplyError> {
    factory_with(context, demand, context.shared.failpoints.is_on(Failpoint::KeepOlderSessions))
}

fn factory_with(
    context: &TaskContext,
    demand: &ApplyDemand,
    keep_older_sessions: bool,
) -> Result<(PostgresSinkFactory, SinkTask), ApplyError> {
    let key = format!("spec.sinks[{}].postgres.dsn", demand.sink.name);
    let dsn = secret::resolve(&demand.sink.postgres.dsn).map_err(|source| ApplyError::Secret { key, source })?;
    let key = "spec.source.postgres.dsn".to_owned();
    let source = secret::resolve(&demand.source.dsn).map_err(|source| ApplyError::Secret { key, source })?;
    let source = ConnectConfig::parse(&source)?.with_application_name(&format!("wallaby lookup {}", context.task));
    let config = PostgresSinkConfig::new(&dsn, &demand.sink.postgres)?
        .with_faults(Faults { keep_older_sessions, ..Faults::default() });
    let lookup = Arc::new(Lookup::new(source, &demand.source.publication));
    let task = TaskId::apply(&context.task.flow, &demand.sink.name);
    let task = SinkTask { task, since: demand.since, lookup };
    Ok((PostgresSinkFactory::new(config), task))
}

/// Where the main stream begins.
fn start_of(context: &TaskContext, position: Position, epoch: Option<Epoch>) -> Start {
    let found = context.lock.found_checkpoint();
    let sequence_hint = found.filter(|found| found.position == Some(position)).and_then(|found| found.seq_hint);
    Start::At { position, epoch, sequence_hint }
}

/// Where a sink that never had a position begins when nothing is loaded, as the controller said when it was added.
async fn hold(context: &TaskContext, sink: &SinkId) -> Result<Start, ApplyError> {
    let key = Key::FlowHold(context.task.flow.clone(), sink.into());
    let entry = context.shared.coordination.get(&key).await?;
    let position = entry.map(|entry| entry.decode::<wallaby_coordination::Hold>()).transpose()?;
    Ok(match position.and_then(|hold| hold.position) {
        Some(position) => Start::At { position, epoch: None, sequence_hint: None },
        None => Start::FirstResume,
    })
}

/// The state of one opening.
struct Run<'a> {
    context: &'a Arc<TaskContext>,
    demand: &'a ApplyDemand,
    applied: &'a mut Applied,
    sink: &'a mut dyn Sink,
    stream: LogStream,
    loads: Loads,
    replay: Option<CatchUp>,
    finishing: Option<AbortOnDropHandle<()>>,
    checkpoints: PacedWriter<Mark>,
    bytes_max: usize,
    rows_max: usize,
    /// More held of one transaction makes it a large one.
    large_bytes: usize,
    moved_at: Instant,
    /// Tables whose rows are left out because no run ever brought them here.
    strangers: BTreeMap<TableName, LeftOut>,
}

/// What is known of a table whose rows are left out.
struct LeftOut {
    /// It has no rows behind this, as far as the main reader came.
    seen: Position,
    /// A person was told.
    is_said: bool,
}

async fn drive(
    context: &Arc<TaskContext>,
    demand: &ApplyDemand,
    applied: &mut Applied,
    backoff: &mut Backoff,
    sink: &mut dyn Sink,
    opened: Opened,
) -> Result<(), ApplyError> {
    let capabilities = sink.capabilities();
    let log = context.log_spec().ok_or(ApplyError::Invalid)?;
    let side = context.shared.side(&context.task.flow, &log).await?;
    let mut loads = Loads::open(sink, &demand.sink.name, demand.snapshot, side).await?;
    let is_cut_off = first::take_stock(context, &demand.sink.name, sink, &mut loads, opened.position).await?;
    let (stream, position) = match opened.position.filter(|_| !is_cut_off) {
        Some(position) => {
            let epoch = opened.log_epoch.unwrap_or_default();
            let feed = stream::feed(context, start_of(context, position, opened.log_epoch)).await?;
            (LogStream::new(feed, position, epoch), position)
        }
        None if is_cut_off || demand.snapshot != SnapshotMode::Never => {
            let Some(from) = first::load(context, demand, sink, &mut loads).await? else { return Ok(()) };
            context.stop_at(Failpoint::StopBeforeStream).await;
            // The log's epoch there is not known: any that is met is younger.
            sink.start_at(from, Epoch::default()).await?;
            let feed = stream::feed(context, start_of(context, from, None)).await?;
            (LogStream::new(feed, from, Epoch::default()), from)
        }
        None => {
            let mut feed = stream::feed(context, hold(context, &demand.sink.name).await?).await?;
            let Some(fed) = first_record(context, &mut feed).await? else { return Ok(()) };
            let (position, epoch) = feed::beginning(&fed);
            context.stop_at(Failpoint::StopBeforeStream).await;
            sink.start_at(position, epoch).await?;
            let mut stream = LogStream::new(feed, position, epoch);
            stream.take(fed);
            (stream, position)
        }
    };
    tracing::info!(task = %context.task, position = %position, "applying");
    context.status.condition(ConditionType::Delivering, true, "Applying", "");
    context.status.phase(TaskPhase::Streaming);
    applied.mark = Some(Mark { position, stream: None, seq_hint: None });
    backoff.reset();
    let finishing = finish::unfinished(context, &demand.sink.name);
    let finishing = match finishing.is_empty() {
        true => None,
        false => Some(finish::start(context, &demand.sink.name, make(context, demand)?, finishing)),
    };
    let run = Run {
        context,
        demand,
        applied,
        sink,
        stream,
        loads,
        replay: None,
        finishing,
        checkpoints: context.lock.checkpoint_writer(CHECKPOINT_EVERY),
        bytes_max: capabilities.batch_bytes_max,
        rows_max: capabilities.batch_rows_max,
        large_bytes: stream::buffer_bytes(context) / 2,
        moved_at: Instant::now(),
        strangers: BTreeMap::new(),
    };
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
    async fn turn(mut self) -> Result<(), ApplyError> {
        let context = self.context;
        let ending = context.ending();
        tokio::pin!(ending);
        let (mut ticks, mut holds, mut looks) = (Every::new(TICK), Every::new(HOLD_EVERY), Every::new(LOOK_EVERY));
        loop {
            if context.shared.failpoints.fires_once(Failpoint::HangApply) {
                // Without a named wait, or it would count as one.
                context.pulse.beat();
                std::future::pending::<()>().await;
            }
            let is_held = self.replay.as_ref().is_some_and(CatchUp::holds);
            let is_busy = !is_held && self.advance().await?;
            if !is_busy {
                context.pulse.wait(if is_held { "tables that catch up" } else { "changes in the log" });
            }
            // Also a sink that is always busy, and takes longer over each batch than the shortest of these, reports, moves its hold, does
            // its part in runs, and ends when it is asked to.
            if ticks.is_due() {
                self.report();
                self.introduce().await;
            }
            if holds.is_due() {
                self.move_hold().await?;
            }
            if looks.is_due() {
                self.look().await?;
            }
            let due = ticks.next.min(holds.next).min(looks.next);
            let replay = self.replay.as_mut();
            tokio::select! {
                biased;
                _ = &mut ending => break,
                () = tokio::time::sleep_until(due.into()), if !is_busy => {}
                ended = replayed(replay) => match ended {
                    // Its run was cancelled: the log keeps nothing for it any more.
                    Err(error) => return Err(self.void_replay().map_or(error, ApplyError::ReplayGivenUp)),
                    Ok(true) => self.handed_over().await?,
                    Ok(false) => {}
                },
                read = self.stream.read(), if !is_busy && !is_held => read?,
                () = std::future::ready(()), if is_busy => {}
            }
            context.pulse.beat();
        }
        (self.replay, self.finishing) = (None, None);
        context.status.phase(TaskPhase::Draining);
        let durable = self.sink.barrier().await?;
        self.note(durable);
        self.move_hold().await
    }

    /// Applies what is there, at most one batch or one large transaction; says whether something was.
    async fn advance(&mut self) -> Result<bool, ApplyError> {
        self.stream.fill(self.bytes_max, self.rows_max)?;
        self.tell_lag();
        let filter = self.loads.filter.clone();
        if self.stream.assembler.is_large_next(self.large_bytes) {
            self.apply_large(filter).await?;
            return Ok(true);
        }
        let is_worth = self.is_worth_applying();
        let batch = if is_worth { self.stream.assembler.batch(self.bytes_max, None, filter.as_ref()) } else { None };
        match batch {
            Some(batch) => {
                self.apply(&batch).await?;
                Ok(true)
            }
            None => {
                self.stream.release_permits(self.large_bytes);
                Ok(false)
            }
        }
    }

    /// Rows go at once; a position that moves without rows waits a little.
    fn is_worth_applying(&self) -> bool {
        let assembler = &self.stream.assembler;
        assembler.has_complete_rows()
            || (assembler.complete_to() > assembler.at() && self.moved_at.elapsed() >= IDLE_MOVE_EVERY)
            || assembler.must_move(self.large_bytes)
    }

    async fn apply(&mut self, batch: &Batch) -> Result<(), ApplyError> {
        let context = self.context;
        context.pulse.wait("the sink's answer");
        if !context.is_valid_now() {
            return Err(ApplyError::Invalid);
        }
        let begun = Instant::now();
        let span = match batch.parts.is_empty() {
            // It only moves the sink's position.
            true => Span::none(),
            false => spans::apply(context, batch.from, self.stream.assembler.made_in(batch.to)),
        };
        let durable = match self.commit(batch).instrument(span.clone()).await {
            Ok(durable) => durable,
            Err(error) => {
                wallaby_telemetry::failed(&span, &error);
                return Err(error);
            }
        };
        if let Some(filter) = &self.loads.filter {
            for table in tables::strangers(filter, &batch.parts) {
                meet(&mut self.strangers, table, batch.to);
            }
        }
        let rows = batch.rows();
        spans::committed(&span, batch.to, rows as u64);
        self.applied.transactions += transactions_of(batch);
        self.applied_rows(rows as u64, last_commit(batch), begun);
        self.note(durable);
        Ok(())
    }

    /// Gives the batch to the sink; up to where that is durable then.
    async fn commit(&mut self, batch: &Batch) -> Result<Position, ApplyError> {
        let context = self.context;
        let patience = context.shared.options.sink_patience.0;
        let outcome = tokio::time::timeout(patience, self.sink.apply(batch)).await;
        let outcome = outcome.map_err(|_| ApplyError::Silent(patience.as_secs()))??;
        context.pulse.beat();
        match outcome {
            Outcome::Durable(position) => Ok(position),
            Outcome::Accepted => Ok(self.sink.barrier().await?),
        }
    }

    async fn apply_large(&mut self, filter: Option<Arc<TableFilter>>) -> Result<(), ApplyError> {
        let context = self.context;
        if !context.is_valid_now() {
            return Err(ApplyError::Invalid);
        }
        // The rest of the transaction may not be in the log yet, and the log may be full: what the sink has makes room for it.
        self.move_hold().await?;
        let begun = Instant::now();
        let from = self.stream.assembler.at();
        let span = spans::apply(context, from, self.stream.assembler.piece_made_in().into_iter());
        let side = self.loads.side();
        let mut portions = LogPortions::new(&mut self.stream, side, filter, None, &context.pulse, span.clone());
        let outcome = self.sink.apply_large(from, &mut portions).instrument(span).await;
        let (rows, committed) = (portions.rows, portions.committed_at_micros);
        let strangers = std::mem::take(&mut portions.strangers);
        let to = portions.finish(outcome)?;
        strangers.iter().for_each(|table| meet(&mut self.strangers, table, to));
        context.pulse.beat();
        tracing::info!(task = %context.task, rows, %to, took_ms = begun.elapsed().as_millis() as u64, "a large transaction was applied");
        let durable = self.sink.barrier().await?;
        self.applied.transactions += 1;
        self.applied_rows(rows, committed, begun);
        self.note(durable.max(to));
        Ok(())
    }

    fn applied_rows(&mut self, rows: u64, committed_at_micros: Option<i64>, begun: Instant) {
        self.applied.rows += rows;
        if let Some(micros) = committed_at_micros {
            let late_ms = status::now().0.saturating_sub((micros / 1000).max(0) as u64);
            metrics::applied(&self.context.task, rows, begun.elapsed(), late_ms);
        }
        self.moved_at = Instant::now();
    }

    fn note(&mut self, durable: Position) {
        if durable < self.stream.assembler.at() {
            return;
        }
        self.stream.applied(durable);
        if let Some(replay) = &self.replay {
            replay.follow(durable);
        }
        let mark = Mark { position: durable, stream: None, seq_hint: self.stream.sequence };
        self.applied.mark = Some(mark.clone());
        self.checkpoints.note(mark);
    }

    /// The run of a replay, if it wants nothing of this sink any more.
    fn void_replay(&self) -> Option<RunId> {
        let (context, sink) = (self.context, &self.demand.sink.name);
        let run = self.replay.as_ref()?.run();
        let is_void = context
            .runs
            .of(&context.task.flow, |runs| !runs.runs.get(&run).is_some_and(|view| runs.awaits(run, view, sink)));
        is_void.then_some(run)
    }

    /// Does what is to be done in the runs of this sink.
    async fn look(&mut self) -> Result<(), ApplyError> {
        if let Some(run) = self.void_replay() {
            return Err(ApplyError::ReplayGivenUp(run));
        }
        for _ in 0..STEPS_MAX {
            let at = self.stream.assembler.at();
            match self.loads.step(self.context, self.sink, Some(at)).await? {
                Stepped::Moved => {}
                Stepped::Replay(replay) if self.replay.is_none() => {
                    let sink = make_beside(self.context, self.demand)?;
                    self.replay = Some(CatchUp::start(self.context, sink, self.loads.side(), replay, at));
                    return Ok(());
                }
                Stepped::Done { run, state } => self.finish_tables(run, state)?,
                Stepped::Idle | Stepped::Replay(_) | Stepped::Begin { .. } => return Ok(()),
            }
        }
        Ok(())
    }

    /// Asks for a run that loads tables which came to the publication by themselves, into all sinks: the first one that asks does.
    async fn introduce(&mut self) {
        if self.strangers.is_empty() {
            return;
        }
        let (context, sink) = (self.context, &self.demand.sink.name);
        let filter = self.loads.filter.as_deref();
        self.strangers.retain(|table, _| filter.is_some_and(|filter| tables::is_stranger(filter, table)));
        let (mut wanted, mut gone) = (Vec::new(), Vec::new());
        for (table, LeftOut { seen, is_said }) in &mut self.strangers {
            match context.runs.of(&context.task.flow, |runs| tables::stranger(runs, sink, table, *seen)) {
                Stranger::Awaited => {}
                Stranger::Gone => gone.push(table.clone()),
                Stranger::Cancelled(run) if !*is_said => {
                    tracing::warn!(task = %context.task, %table, %run, "rows are left out: the run that would load their table was cancelled; load it with `wallaby snapshot start`");
                    *is_said = true;
                }
                Stranger::Cancelled(_) => {}
                // One that was renamed out of what the file names is published for a moment more.
                Stranger::Wanted if !is_named(context, table) => gone.push(table.clone()),
                Stranger::Wanted => wanted.push(pattern_of(table)),
            }
        }
        for table in gone {
            tracing::info!(task = %context.task, %table, "a table that came to the publication was gone before a run could load it, or is not named by the flow");
            self.strangers.remove(&table);
        }
        if wanted.is_empty() {
            return;
        }
        // Somebody else's run, or a change of the flow, may come first: the next tick looks again.
        match ask_for(context, wanted.clone()).await {
            Ok(run) => {
                tracing::info!(task = %context.task, tables = ?wanted, %run, "tables came to the publication: a run loads them")
            }
            Err(error) => {
                tracing::debug!(task = %context.task, tables = ?wanted, %error, "no run was made for new tables")
            }
        }
    }

    fn finish_tables(&mut self, run: RunId, state: SinkRun) -> Result<(), ApplyError> {
        let (context, name) = (self.context, &self.demand.sink.name);
        let mut all = finish::unfinished(context, name);
        all.retain(|(known, ..)| *known != run);
        all.extend(context.runs.run(&context.task.flow, run, |view| finish::tables_of(run, view, state)));
        self.finishing = Some(finish::start(context, name, make(context, self.demand)?, all));
        Ok(())
    }

    /// The replay is done: its tables are the main stream's from here on.
    async fn handed_over(&mut self) -> Result<(), ApplyError> {
        self.replay = None;
        self.loads.refresh(self.sink).await?;
        self.look().await
    }

    async fn move_hold(&mut self) -> Result<(), ApplyError> {
        match self.context.lock.advance_hold(&self.demand.sink.name, self.stream.assembler.at()).await {
            Err(error) if error.is_transient() => Ok(()),
            // An owner that is not to fence itself is not to learn of its end here: the sink has to refuse it.
            Err(wallaby_coordination::Error::LockLost { .. })
                if self.context.shared.failpoints.is_on(Failpoint::NoSelfFencing) =>
            {
                Ok(())
            }
            other => other.map_err(ApplyError::from),
        }
    }

    /// Says where the sink stands: before each wait for it, and after.
    fn tell_lag(&self) {
        let assembler = &self.stream.assembler;
        let (at, end, oldest_micros) = (assembler.at(), assembler.end(), assembler.oldest_micros());
        self.applied.lag.stands(Stands { at, end, oldest_micros, lost_since: None });
    }

    fn report(&mut self) {
        let board = &self.context.status;
        let at = self.stream.assembler.at();
        let end = self.stream.assembler.end();
        match self.stream.waiting() {
            Some(waiting) => board.waiting(Some(&waiting.what.to_string())),
            None => board.waiting(None),
        }
        metrics::sink_position(&self.context.task, at);
        let (rows, transactions, bytes) = (self.applied.rows, self.applied.transactions, self.applied.bytes);
        board.progress(|progress| {
            progress.applied = Some(at);
            progress.staged = Some(end);
            progress.rows = rows;
            progress.transactions = transactions;
            progress.bytes = bytes;
        });
    }
}

/// Rows of a table were left out, up to here.
fn meet(strangers: &mut BTreeMap<TableName, LeftOut>, table: &TableName, up_to: Position) {
    match strangers.get_mut(table) {
        Some(known) => known.seen = up_to,
        None => drop(strangers.insert(table.clone(), LeftOut { seen: up_to, is_said: false })),
    }
}

/// Whether the flow's file names a table; a publication that is not ours names its tables itself.
fn is_named(context: &TaskContext, table: &TableName) -> bool {
    let flows = context.flows.borrow();
    let Some(flow) = flows.get(&context.task.flow) else { return false };
    let publication = &flow.record.document.spec.source.postgres.publication;
    let (plain, quoted) = (pattern_of(table), table.quoted());
    let is_in = |patterns: &[String]| patterns.iter().any(|pattern| covers(pattern, &plain) || *pattern == quoted);
    !publication.create || (is_in(&publication.tables) && !is_in(&publication.exclude))
}

/// A run of these tables into all sinks of the flow.
async fn ask_for(context: &TaskContext, tables: Vec<String>) -> Result<RunId, wallaby_coordination::Error> {
    let coordination = &context.shared.coordination;
    let flow = coordination.flow(&context.task.flow).await?;
    Ok(coordination.create_run(&flow, tables_found(tables, status::now())).await?.run)
}

/// What is done again and again; the first time at once.
struct Every {
    period: Duration,
    next: Instant,
}

impl Every {
    fn new(period: Duration) -> Every {
        Every { period, next: Instant::now() }
    }

    /// Whether it is time; the next time comes a period later.
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = now >= self.next;
        if is_due {
            self.next = now + self.period;
        }
        is_due
    }
}

/// Returns when the replay has ended (`true`) or asks the main stream to stop; never when there is none.
async fn replayed(replay: Option<&mut CatchUp>) -> Result<bool, ApplyError> {
    match replay {
        Some(replay) => replay.ended_or_asks().await,
        None => std::future::pending().await,
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
