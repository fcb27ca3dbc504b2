//! One connection to the source: set up, take over, stream until something ends it.

use wallaby_coordination::{Mark, SourceSeen};
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::{Epoch, Lsn, Nonce, Position, ResumeInfo, TaskId};
use wallaby_postgres_source::{
    Capture, CaptureOptions, ConnectConfig, PartOptions, Prepared, PublicationWanted, SessionOwner, SlotWanted,
    SourceError, SourceIdentity, connect_control, ensure_publication, ensure_slot, evict,
};
use wallaby_staging::{
    Log, LogConfig, LogWriter, PutBudget, SegmentCache, Shelf, SideGroup, SideStore, StagingError, Sweep, TailClaims,
    TailVerdict, Takeover, WriterOptions, judge_tail, open_side, sweep_transactions,
};

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::side::SideWriter;
use super::splices::{self, Looked, Unconfirmed, find_broken};
use super::sync::{self, Syncing};
use super::{CaptureError, Fallback, Owned, enter, feedback, figures, publication, retention, stage};
use crate::backoff::Backoff;
use crate::detach::Overrun;
use crate::failpoint::Failpoint;
use crate::flows::CaptureDemand;
use crate::metrics;
use crate::secret;
use crate::task::TaskContext;

/// Room in a message for what frames a row: headers, shape, Arrow's own bytes.
const ROW_HEADROOM_BYTES: usize = 64 << 10;
/// How long slot creation waits for old transactions, and a slot for its old walsender to end.
const SLOT_PATIENCE: Duration = Duration::from_secs(30);

/// Runs one session. `Ok` when the task was asked to end: everything at hand is staged.
pub async fn run(
    context: &TaskContext,
    demand: &CaptureDemand,
    owned: &mut Owned,
    backoff: &mut Backoff,
) -> Result<Option<Mark>, CaptureError> {
    let log = open_log(context, demand).await?;
    let side = open_side(&context.task.flow, &demand.log, log.connections())?;
    let epoch = match context.lock.epoch() {
        Some(epoch) => epoch,
        None => context.lock.fix_epoch(log.last_epoch().await?).await?,
    };
    context.status.epoch(epoch);
    metrics::epoch(&context.task, epoch);
    let config = ConnectConfig::parse(&secret::resolve(&demand.source.dsn)?)?
        .with_application_name(&context.task.session_name(epoch));

    if owned.writer.as_ref().is_some_and(LogWriter::has_ended) {
        // Whatever ended it may be over: the log is taken over again, by us, and its tail judged.
        owned.writer = None;
    }
    let takeover = match owned.writer {
        Some(_) => None,
        None => {
            enter(context, TaskPhase::Fencing, "the fence");
            let nonce = *owned.nonce.get_or_insert_with(Nonce::random);
            let options =
                WriterOptions { may_stand: !owned.has_appended, ..writer_options(context, &log, side.as_ref()).await };
            Some(LogWriter::take_over(&log, epoch, nonce, options).await?)
        }
    };
    enter(context, TaskPhase::SlotWait, "the source");
    let is_first_start = takeover.as_ref().is_some_and(|takeover| is_first_start(context, takeover));
    let owner = SessionOwner { prefix: context.task.session_prefix(), epoch };
    set_up_source(context, &config, &owner, demand, is_first_start).await?;
    let mut options = CaptureOptions::new(config.clone(), owner, &demand.slot, &demand.publication);
    options.row_bytes_max = log.body_bytes_max().saturating_sub(ROW_HEADROOM_BYTES);
    options.large_transaction_bytes = demand.source.large_transaction_bytes.0;
    options.slot_wait = SLOT_PATIENCE;
    options.parts = Some(PartOptions {
        open_bytes_max: context.shared.sizes.open_parts,
        only_whole: owned.fallback.is_some(),
        ..PartOptions::new(side.part_bytes_target())
    });
    let mut prepared = Capture::prepare(options).await?;

    let previous = context
        .lock
        .source()
        .map(|seen| SourceIdentity { system_identifier: seen.system_identifier, timeline: seen.timeline });
    enter(context, TaskPhase::Resuming, "the log");
    owned.unconfirmed = Unconfirmed::default();
    let sweeper = retention::Sweeper {
        side: Arc::clone(&side),
        coordination: context.shared.coordination.clone(),
        epoch,
        living: owned.living.clone(),
        unconfirmed: owned.unconfirmed.clone(),
    };
    let retain = || {
        let (log, lock, window) = (log.clone(), context.lock.clone(), demand.log.replay_window.0);
        let (overrun, failpoints) = (Overrun::of(context), context.shared.failpoints.clone());
        retention::start(log, lock, window, sweeper.clone(), overrun, context.status.clone(), failpoints)
    };
    let confirmed = Position::before(prepared.slot().confirmed_flush);
    let mut again = BTreeSet::new();
    match takeover {
        Some(takeover) => {
            context.pulse.wait("the side store");
            let looking = find_broken(&log, side.as_ref(), confirmed, takeover.tail(), &owned.unconfirmed);
            let Some(looked) = patiently(context, &log, looking).await? else { return Ok(None) };
            let (mut position, mut rewind) = resume_position(context, &takeover, &mut prepared).await?;
            if let Some(broken) = looked.broken {
                tracing::error!(task = %context.task, commit = %broken.commit, resume = %broken.resume, "the side store lost parts of a transaction: publishing it again");
                (position, rewind) = (position.min(broken.resume), true);
            }
            if is_cut(position, &looked) {
                (position, rewind) = (Position::before(position.commit).max(confirmed), true);
            }
            again.clone_from(&looked.again);
            prepared.keep_whole(looked.again);
            // Before the resume record is written: one of a server that is refused would vouch for it to the next owner.
            prepared.verify(position, previous.as_ref()).await?;
            let info = resume_info(demand, prepared.identity(), rewind);
            owned.has_appended = true;
            let Some(writer) = patiently(context, &log, takeover.resume(position, info)).await? else {
                return Ok(None);
            };
            context.stop_at(Failpoint::StopAfterResume).await;
            vouch(context, &prepared, &log, writer.end()).await?;
            owned.writer = Some(writer);
        }
        None => {
            let Some(writer) = owned.writer.as_ref() else { return Err(CaptureError::Invalid) };
            // A full log takes what was handed in only once something was purged. Not while it is looked at: what the purge passes is
            // swept, and would count as lost.
            let retention = retain();
            // Before it is looked at: a splice that is still on its way would not be found, and not be looked after.
            if patiently(context, &log, writer.settled()).await?.is_none() {
                return Ok(super::close(context, owned).await);
            }
            drop(retention);
            context.pulse.wait("the side store");
            let tail = log.tail().await?;
            let looking =
                patiently(context, &log, find_broken(&log, side.as_ref(), confirmed, &tail, &owned.unconfirmed));
            let looked = tokio::select! {
                looked = looking => looked?,
                error = writer.ended() => return Err(error.into()),
            };
            let Some(looked) = looked else { return Ok(super::close(context, owned).await) };
            let cut = is_cut(writer.end(), &looked).then_some(writer.end().commit);
            if let Some(commit) = looked.broken.map(|broken| broken.commit).or(cut) {
                // The log goes back only with a new chain: it is taken over again, by us.
                owned.writer = None;
                return Err(CaptureError::PartLost { commit });
            }
            again.clone_from(&looked.again);
            prepared.keep_whole(looked.again);
            prepared.verify(writer.end(), previous.as_ref()).await?;
            vouch(context, &prepared, &log, writer.end()).await?;
        }
    }
    let _retention = retain();
    if !is_first_start {
        publication::settle(context, &config, demand).await?;
    }
    let Some(writer) = owned.writer.as_ref() else { return Err(CaptureError::Invalid) };
    let (capture, confirm) = prepared.start(writer.end(), previous.as_ref()).await?;
    // Only now is the source known to send it all again.
    make_room(context, owned, side.as_ref(), epoch, writer.end(), &again).await?;
    owned.connection += 1;
    let budget = PutBudget::new(context.shared.sizes.puts);
    let side_writer =
        SideWriter::new(Arc::clone(&side), epoch, owned.connection, demand.log.codec, budget, owned.living.clone());
    let syncing = Arc::new(Syncing::new(log.clone(), Arc::clone(&side), context.shared.sync_source(), writer.sync()));
    let _syncing = syncing.start(writer.moves());
    let _feedback = feedback::start(
        confirm.clone(),
        writer.durable(),
        context.lock.clone(),
        side,
        owned.unconfirmed.clone(),
        capture.sent_names(),
    );
    let _publication = publication::start(context, &config, demand, capture.sent_names());
    let (figures, _figures) = figures::start(config, demand.slot.clone());
    context.status.condition(ConditionType::SourceReady, true, "Ready", "");
    context.status.condition(ConditionType::Capturing, true, "Streaming", "");
    context.status.phase(TaskPhase::Streaming);
    tracing::info!(task = %context.task, %epoch, position = %writer.end(), "capturing");
    let failures = std::mem::take(backoff);
    let stage = stage::Stage { context, demand, log: &log, syncing: &syncing, confirm, figures };
    let outcome = stage::run(stage, capture, side_writer, owned).await.map_err(|error| match error {
        // Nothing else is put meanwhile.
        CaptureError::SideFull { xid, error } if owned.fallback.is_some() => CaptureError::WholeFull { xid, error },
        error => error,
    });
    match &outcome {
        Err(error @ CaptureError::SideFull { xid, .. }) => {
            owned.fallback = Some(Fallback { xid: *xid, said: error.to_string(), until: None });
        }
        Err(CaptureError::StreamAgain) => owned.fallback = None,
        // A row that needs the side store: it may have room again.
        Err(CaptureError::Source(SourceError::RowTooLarge { .. })) => {
            owned.fallback = None;
            *backoff = failures;
        }
        // That the source could be read is no success here: it is read in vain each time.
        Err(CaptureError::WholeFull { .. }) => *backoff = failures,
        Err(CaptureError::PartLost { .. }) => owned.writer = None,
        _ => {}
    }
    outcome
}

/// While the side store is full and transactions must go there whole, removes what is there of those that the source sends again: what
/// earlier connections left half put, the attempts behind splices that come again, and those whose splice never came into the log,
/// which ends at `end`. None can be read any more, or will be. What a younger owner put stays.
async fn make_room(
    context: &TaskContext,
    owned: &Owned,
    side: &dyn SideStore,
    epoch: Epoch,
    end: Position,
    again: &BTreeSet<Lsn>,
) -> Result<(), CaptureError> {
    if owned.fallback.is_none() || again.is_empty() {
        return Ok(());
    }
    context.pulse.wait("the side store");
    // Nothing lives: the connection has put nothing yet. What the purge has passed is not this sweep's.
    let what = Sweep { epoch, purged_to: Position::ZERO, living: &|| owned.living.now() };
    sweep_transactions(side, &what).await?;
    for group in side.list(Shelf::Transactions).await? {
        let SideGroup::Manifest(commit) = group else { continue };
        if !again.contains(&commit) && Position::before(commit) < end {
            continue;
        }
        let Some(manifest) = splices::manifest_of(side, commit).await? else { continue };
        let attempt = manifest.attempt;
        if (attempt.epoch, attempt.connection) <= (epoch, owned.connection) {
            tracing::warn!(task = %context.task, %commit, %attempt, "the side store is full: parts that are put again are removed");
            side.delete(SideGroup::Attempt(attempt)).await?;
        }
    }
    Ok(())
}

/// Says in etcd what is staged, and of which server. Before anything can be: from then on an empty log is a lost log.
async fn vouch(context: &TaskContext, prepared: &Prepared, log: &Log, end: Position) -> Result<(), CaptureError> {
    let identity = prepared.identity();
    let source = SourceSeen { system_identifier: identity.system_identifier.clone(), timeline: identity.timeline };
    context.lock.set_source(source);
    let mark = Mark { position: end, stream: Some(log.stream().to_owned()), seq_hint: None };
    context.lock.put_checkpoint(mark).await?;
    Ok(())
}

/// Whether the log ends inside of a transaction that has to come again whole.
fn is_cut(end: Position, looked: &Looked) -> bool {
    !end.is_between_transactions() && looked.again.contains(&end.commit)
}

/// Makes or checks the log.
async fn open_log(context: &TaskContext, demand: &CaptureDemand) -> Result<Log, CaptureError> {
    enter(context, TaskPhase::Locked, "the NATS servers");
    let connections = context.shared.nats().await?.clone();
    let log = Log::new(context.task.flow.clone(), connections);
    log.ensure(&LogConfig { replicas: demand.log.replicas, max_bytes: demand.log.max_bytes.0 }).await?;
    Ok(log)
}

/// How often the log's servers are asked whether they are there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Waits for what is done with the log before there is a stream, and tries without end by itself. Not when the task is asked to end
/// (`None`), nor while the log's servers are silent for too long.
async fn patiently<T>(
    context: &TaskContext,
    log: &Log,
    done: impl Future<Output = Result<T, StagingError>>,
) -> Result<Option<T>, CaptureError> {
    let silence = async {
        let mut answered_at = Instant::now();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if answers(log).await {
                answered_at = Instant::now();
            } else if answered_at.elapsed() > context.shared.options.log_patience.0 {
                return CaptureError::LogUnreachable(answered_at.elapsed().as_secs());
            }
        }
    };
    tokio::select! {
        biased;
        done = done => Ok(Some(done?)),
        _ = context.ending() => Ok(None),
        error = silence => Err(error),
    }
}

/// Whether the log's servers answer, whatever they say.
async fn answers(log: &Log) -> bool {
    !log.info().await.is_err_and(|error| error.is_transient())
}

/// The same, for a try that may not have come to its log.
pub async fn log_answers(context: &TaskContext) -> bool {
    match context.shared.nats().await {
        Ok(connections) => answers(&Log::new(context.task.flow.clone(), connections.clone())).await,
        Err(_) => false,
    }
}

async fn writer_options(context: &TaskContext, log: &Log, side: &dyn SideStore) -> WriterOptions {
    let cache: Arc<dyn SegmentCache> = Arc::<crate::cache::RecordCache>::clone(&context.shared.cache);
    let mut options = WriterOptions { cache: Some(cache), ..WriterOptions::default() };
    if context.shared.failpoints.is_on(Failpoint::HoldAppend) {
        options.tail_check_interval = Duration::from_secs(3600);
    }
    if let Ok(report) = sync::ask(log, side, &context.shared.sync_source()).await {
        tracing::info!(task = %context.task, policy = ?report.policy, silent = ?report.silent(), "when the log's servers sync");
        options.sync = report.policy;
    }
    options
}

/// Whether nothing was ever staged: only then the publication and the slot may be made.
fn is_first_start(context: &TaskContext, takeover: &Takeover) -> bool {
    let was_staged = context.lock.found_checkpoint().is_some_and(|checkpoint| checkpoint.position.is_some());
    takeover.tail().end.is_none() && !was_staged
}

/// Publication first, committed; then the slot. A slot that was lost later is never made again in silence.
async fn set_up_source(
    context: &TaskContext,
    config: &ConnectConfig,
    owner: &SessionOwner,
    demand: &CaptureDemand,
    is_first: bool,
) -> Result<(), CaptureError> {
    let control = connect_control(config).await?;
    let wanted = publication::wanted(demand.publication.clone(), &demand.source.publication);
    match is_first {
        true => ensure_publication(&control, &wanted).await?,
        // It is brought up to date once the server is known to be the right one. What went missing is not made again: the WAL before it
        // could not be decoded (hazard 20).
        false => {
            let found = ensure_publication(&control, &PublicationWanted { create: false, ..wanted }).await;
            found.map_err(SourceError::of_begun)?;
        }
    }
    context.stop_at(Failpoint::StopAfterPublicationMade).await;
    if is_first {
        // An owner that died while it made the slot left half a one behind: that looks like a slot, and goes with the session.
        evict(&control, owner, &demand.slot, SLOT_PATIENCE).await?;
    }
    let slot = SlotWanted {
        name: demand.slot.clone(),
        create: demand.source.slot.create && is_first,
        failover: demand.source.slot.failover,
        timeout: SLOT_PATIENCE,
    };
    ensure_slot(config, &control, &slot).await?;
    context.stop_at(Failpoint::StopAfterSlotMade).await;
    Ok(())
}

/// Where the log goes on: its end; or, when nothing was ever staged, what the slot confirmed. `true`: a tail was lost
/// that the source still has, and is published again.
async fn resume_position(
    context: &TaskContext,
    takeover: &Takeover,
    prepared: &mut Prepared,
) -> Result<(Position, bool), CaptureError> {
    let confirmed = Position::before(prepared.slot().confirmed_flush);
    let staged = context.lock.found_checkpoint().and_then(|checkpoint| checkpoint.position);
    let log_end = takeover.tail().end;
    let furthest_sink = furthest_sink(context).await?;
    // A slot that we made knows a position before anything was staged; it counts as a claim only once something was.
    let claims = TailClaims { log_end, checkpoint: staged, furthest_sink, confirmed: Some(confirmed), acked: None };
    match judge_tail(&claims) {
        TailVerdict::First => Ok((confirmed, false)),
        TailVerdict::Whole { end } => Ok((end, false)),
        TailVerdict::Rewind { end, claimed } => {
            tracing::error!(task = %context.task, %end, %claimed, "the log lost its tail: publishing it again");
            Ok((end, true))
        }
        TailVerdict::Lost { end, claimed } => {
            // Nobody but the slot is past the log's end: somebody moved the slot, and no staged change is missing.
            if let Some(end) = end
                && staged.max(furthest_sink).is_none_or(|known| known <= end)
            {
                prepared.verify(end, None).await?;
            }
            Err(CaptureError::LogLost { found: end, staged: claimed, confirmed })
        }
    }
}

async fn furthest_sink(context: &TaskContext) -> Result<Option<Position>, CaptureError> {
    let flow = context.flows.borrow().get(&context.task.flow).cloned();
    let mut furthest = None;
    for sink in flow.iter().flat_map(|flow| &flow.record.document.spec.sinks) {
        let task = TaskId::apply(&context.task.flow, &sink.name);
        let checkpoint = context.shared.coordination.checkpoint(&task).await?;
        furthest = furthest.max(checkpoint.and_then(|checkpoint| checkpoint.position));
    }
    Ok(furthest)
}

fn resume_info(demand: &CaptureDemand, identity: &SourceIdentity, rewind: bool) -> ResumeInfo {
    ResumeInfo {
        system_identifier: identity.system_identifier.clone(),
        timeline: identity.timeline,
        slot: demand.slot.clone(),
        publication: demand.publication.clone(),
        rewind,
    }
}
