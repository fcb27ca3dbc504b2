//! The loop that turns what the source sends into records of the log.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use wallaby_coordination::{Mark, PacedWriter};
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::{Lsn, Position};
use wallaby_postgres_source::{
    Capture, CaptureEvent, Control, Feedback, PartDraft, SegmentDraft, SourceStatus, ended_before,
};
use wallaby_staging::{DataAppend, Log, LogWriter, Wait};
use wallaby_wire::SegmentEncoder;

use super::side::SideWriter;
use super::sync::Syncing;
use super::{CaptureError, Owned};
use crate::failpoint::Failpoint;
use crate::flows::CaptureDemand;
use crate::task::TaskContext;
use crate::{metrics, spans, status};

/// How often figures and conditions are brought up to date.
const TICK: Duration = Duration::from_secs(1);
/// How often the checkpoint in etcd follows.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// Without a change for this long the capture counts as caught up with the source.
const QUIET_AFTER: Duration = Duration::from_secs(3);

/// What the loop works with.
pub struct Stage<'a> {
    /// The task.
    pub context: &'a TaskContext,
    /// What is wanted.
    pub demand: &'a CaptureDemand,
    /// The log.
    pub log: &'a Log,
    /// Learns when the servers sync.
    pub syncing: &'a Syncing,
    /// What Postgres was told.
    pub confirm: Feedback,
    /// What the source says of the slot.
    pub figures: watch::Receiver<Option<SourceStatus>>,
}

/// Stages until the task is asked to end (`Ok`) or something fails.
pub async fn run(
    stage: Stage<'_>,
    mut capture: Capture,
    mut side: SideWriter,
    owned: &mut Owned,
) -> Result<Option<Mark>, CaptureError> {
    let context = stage.context;
    let Some(writer) = owned.writer.take() else { return Err(CaptureError::Invalid) };
    let checkpoints = context.lock.checkpoint_writer(CHECKPOINT_EVERY);
    let outcome = stream(&stage, &mut capture, &mut side, &writer, &checkpoints, owned).await;
    report(&stage, capture.server_end(), &writer, owned);
    owned.writer = Some(writer);
    outcome?;
    // Asked to end: what was handed in is settled, and what is durable by now is confirmed.
    context.status.phase(TaskPhase::Draining);
    let mark =
        super::close(context, owned).await.map(|mark| Mark { stream: Some(stage.log.stream().to_owned()), ..mark });
    Ok(mark)
}

async fn stream(
    stage: &Stage<'_>,
    capture: &mut Capture,
    side: &mut SideWriter,
    writer: &LogWriter,
    checkpoints: &PacedWriter<Mark>,
    owned: &mut Owned,
) -> Result<(), CaptureError> {
    let context = stage.context;
    let mut in_flight = writer.in_flight();
    let mut encoder = SegmentEncoder::default();
    let ended = writer.ended();
    tokio::pin!(ended);
    let ending = context.ending();
    tokio::pin!(ending);
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if context.shared.failpoints.fires_once(Failpoint::HangCapture) {
            // Without a named wait, or it would count as one.
            context.pulse.beat();
            std::future::pending::<()>().await;
        }
        context.pulse.wait("changes from the source");
        let event = tokio::select! {
            biased;
            _ = &mut ending => return Ok(()),
            error = &mut ended => return Err(error.into()),
            _ = ticks.tick() => {
                report(stage, capture.server_end(), writer, owned);
                note_checkpoint(stage.log, writer, checkpoints);
                watch_log(stage, writer)?;
                if let Some(commit) = owned.unconfirmed.lost() {
                    return Err(CaptureError::PartLost { commit });
                }
                watch_fallback(capture.control(), writer, owned).await?;
                continue;
            }
            event = capture.next(&mut in_flight) => event?,
        };
        context.pulse.beat();
        let server_end = capture.server_end();
        if !context.is_valid_now() {
            return Err(CaptureError::Invalid);
        }
        match event {
            CaptureEvent::Segment(draft) => {
                let trace = spans::stage(&context.task.flow, writer.epoch(), writer.end(), draft.to);
                let append = pack(stage, &mut encoder, writer, &draft)?;
                spans::packed(&trace.span, draft.rows as u64, append.body.len() as u64);
                owned.rows += draft.rows as u64;
                owned.transactions += draft.body.transactions.len() as u64;
                owned.bytes += append.body.len() as u64;
                if let Some(transaction) = draft.body.transactions.last() {
                    owned.staged_last = Some((transaction.committed_at_micros, Instant::now()));
                }
                metrics::staged(&context.task.flow, draft.rows, append.body.len());
                let was_held = hold_append(context, writer).await?;
                context.pulse.wait("the log");
                // Taken whole or not at all, so an end in the middle loses nothing: it is read from the source again.
                tokio::select! {
                    biased;
                    taken = writer.append_traced(append, trace) => taken?,
                    _ = &mut ending => return Ok(()),
                    error = &mut ended => return Err(error.into()),
                    error = log_silence(stage, server_end, writer, owned) => return Err(error),
                }
                if was_held {
                    // Before the source can end this task too: the log's answer is what the test is about.
                    writer.settled().await?;
                }
                stop_inside(context, writer, draft.to).await?;
            }
            CaptureEvent::Heartbeat { to } => {
                context.pulse.wait("the log");
                tokio::select! {
                    biased;
                    taken = writer.heartbeat(to.commit) => taken?,
                    _ = &mut ending => return Ok(()),
                    error = &mut ended => return Err(error.into()),
                    error = log_silence(stage, server_end, writer, owned) => return Err(error),
                }
            }
            CaptureEvent::Part(draft) => {
                context.pulse.wait("the side store");
                let xid = draft.xid;
                tokio::select! {
                    biased;
                    taken = put(stage, side, draft) => taken.map_err(|error| side_full(xid, error))?,
                    _ = &mut ending => return Ok(()),
                    error = &mut ended => return Err(error.into()),
                }
                context.stop_at(Failpoint::StopAfterPart).await;
            }
            CaptureEvent::Splice(draft) => {
                context.pulse.wait("the side store");
                let (xid, committed_at_micros) = (draft.transaction.xid, draft.transaction.committed_at_micros);
                let trace = spans::stage(&context.task.flow, writer.epoch(), writer.end(), draft.to);
                let kept = tokio::select! {
                    biased;
                    kept = side.keep(draft) => kept.map_err(|error| side_full(xid, error))?,
                    _ = &mut ending => return Ok(()),
                    error = &mut ended => return Err(error.into()),
                };
                context.stop_at(Failpoint::StopAfterManifest).await;
                if !context.is_valid_now() {
                    return Err(CaptureError::Invalid);
                }
                owned.rows += kept.splice.rows;
                owned.transactions += 1;
                owned.bytes += kept.splice.bytes;
                owned.staged_last = Some((committed_at_micros, Instant::now()));
                // Before the append: it may be durable right after it.
                owned.unconfirmed.add(&kept);
                spans::packed(&trace.span, kept.splice.rows, kept.splice.bytes);
                context.pulse.wait("the log");
                tokio::select! {
                    biased;
                    taken = writer.splice(writer.end(), kept.to, &kept.splice, trace) => taken?,
                    _ = &mut ending => return Ok(()),
                    error = &mut ended => return Err(error.into()),
                    error = log_silence(stage, server_end, writer, owned) => return Err(error),
                }
            }
            CaptureEvent::Abandoned { xid } => {
                context.pulse.wait("the side store");
                tokio::select! {
                    biased;
                    () = side.abandon(xid) => {}
                    _ = &mut ending => return Ok(()),
                }
            }
        }
    }
}

/// Puts a part. Before the first one the shelf is made, and its servers' sync policy counts beside that of the log's: a splice is
/// durable only when its parts are.
async fn put(stage: &Stage<'_>, side: &mut SideWriter, draft: PartDraft) -> Result<(), CaptureError> {
    if side.ensure_shelf().await? {
        stage.syncing.learn().await?;
    }
    side.put(draft).await
}

fn side_full(xid: u32, error: CaptureError) -> CaptureError {
    match error {
        CaptureError::Staging(error) if error.is_side_full() => CaptureError::SideFull { xid, error },
        other => other,
    }
}

/// Whether the transaction that did not fit into the side store has ended, and its end is in the log: then transactions are
/// streamed again.
async fn watch_fallback(control: &Control, writer: &LogWriter, owned: &mut Owned) -> Result<(), CaptureError> {
    let Some(fallback) = &mut owned.fallback else { return Ok(()) };
    if let Some(until) = fallback.until {
        return if writer.end().commit >= until { Err(CaptureError::StreamAgain) } else { Ok(()) };
    }
    fallback.until = ended_before(control, fallback.xid).await?;
    Ok(())
}

/// A failpoint: keeps what comes next from the log, with nothing else on its way, until a test lets go. Says whether it did.
async fn hold_append(context: &TaskContext, writer: &LogWriter) -> Result<bool, CaptureError> {
    let failpoints = &context.shared.failpoints;
    if !failpoints.holds_append() {
        return Ok(false);
    }
    writer.settled().await?;
    let what = "the failpoint hold-append";
    context.pulse.wait(what);
    context.status.waiting(Some(what));
    failpoints.released().await;
    context.status.waiting(None);
    Ok(true)
}

/// A failpoint: stands still when the log has half a transaction.
async fn stop_inside(context: &TaskContext, writer: &LogWriter, to: Position) -> Result<(), CaptureError> {
    if !to.is_between_transactions() && context.shared.failpoints.is_on(Failpoint::StopInsideTransaction) {
        writer.settled().await?;
        context.stop_at(Failpoint::StopInsideTransaction).await;
    }
    Ok(())
}

fn pack(
    stage: &Stage<'_>,
    encoder: &mut SegmentEncoder,
    writer: &LogWriter,
    draft: &SegmentDraft,
) -> Result<DataAppend, CaptureError> {
    let codec = stage.demand.log.codec;
    let body = encoder.encode(&draft.body, codec)?;
    Ok(DataAppend {
        from: writer.end(),
        to: draft.to,
        complete_to: draft.complete_to,
        rows: u32::try_from(draft.rows).unwrap_or(u32::MAX),
        codec,
        body,
    })
}

/// While the log takes nothing: keeps the figures going; resolves when its servers are silent for too long.
async fn log_silence(stage: &Stage<'_>, server_end: Lsn, writer: &LogWriter, owned: &Owned) -> CaptureError {
    let mut ticks = tokio::time::interval(TICK);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        report(stage, server_end, writer, owned);
        if let Err(error) = watch_log(stage, writer) {
            return error;
        }
    }
}

fn watch_log(stage: &Stage<'_>, writer: &LogWriter) -> Result<(), CaptureError> {
    let patience = stage.context.shared.options.log_patience.0;
    match *writer.waiting().borrow() {
        Some(waiting) if waiting.what == Wait::Unreachable && waiting.since.elapsed() > patience => {
            Err(CaptureError::LogUnreachable(waiting.since.elapsed().as_secs()))
        }
        _ => Ok(()),
    }
}

fn note_checkpoint(log: &Log, writer: &LogWriter, checkpoints: &PacedWriter<Mark>) {
    let acked = *writer.acked().borrow();
    checkpoints.note(Mark {
        position: acked.position,
        stream: Some(log.stream().to_owned()),
        seq_hint: Some(acked.sequence),
    });
}

/// What a person does about a wait of the log's.
fn remedy(what: Wait) -> &'static str {
    match what {
        Wait::Resync => "it goes on by itself",
        Wait::Full => "see which sink is behind (wallaby status), or raise log.maxBytes",
        Wait::Unreachable => "check the NATS servers, --nats and the network; it goes on by itself",
    }
}

/// Brings figures, phase and conditions up to date.
fn report(stage: &Stage<'_>, server_end: Lsn, writer: &LogWriter, owned: &Owned) {
    let board = &stage.context.status;
    let flow = &stage.context.task.flow;
    let acked = *writer.acked().borrow();
    let confirmed = stage.confirm.confirmed();
    let figures = stage.figures.borrow().clone();
    let source_lsn = figures.as_ref().map_or(server_end, |figures| figures.current.max(server_end));
    let lag_bytes = source_lsn.0.saturating_sub(acked.position.commit.0);
    let waiting = *writer.waiting().borrow();
    match waiting {
        Some(waiting) => {
            board.phase(TaskPhase::Backpressured);
            board.waiting(Some(&waiting.what.to_string()));
            let (what, seconds) = (waiting.what, waiting.since.elapsed().as_secs());
            let message = format!("waits for {what} since {seconds} s: {}", remedy(what));
            board.condition(ConditionType::Capturing, waiting.what == Wait::Resync, "LogWaits", &message);
        }
        None => {
            board.phase(TaskPhase::Streaming);
            board.waiting(None);
            match &owned.fallback {
                Some(fallback) => board.condition(ConditionType::Capturing, true, "SideStoreFull", &fallback.said),
                None => board.condition(ConditionType::Capturing, true, "Streaming", ""),
            }
        }
    }
    if let Some(figures) = &figures {
        slot_health(stage, figures);
        metrics::source(flow, figures);
    }
    metrics::positions(flow, acked.position, confirmed, source_lsn);
    board.progress(|progress| {
        progress.staged = Some(acked.position);
        progress.confirmed_lsn = Some(confirmed);
        progress.source_lsn = Some(source_lsn);
        progress.retained_wal_bytes = figures.as_ref().map(|figures| figures.retained_bytes);
        progress.lag_bytes = Some(lag_bytes);
        progress.lag_ms = Some(lag_ms(owned));
        progress.rows = owned.rows;
        progress.transactions = owned.transactions;
        progress.bytes = owned.bytes;
    });
}

/// How old the last change was when it was staged; 0 once nothing came for a while.
fn lag_ms(owned: &Owned) -> u64 {
    match owned.staged_last {
        Some((committed_at_micros, staged_at)) if staged_at.elapsed() < QUIET_AFTER => {
            let staged_ago = u64::try_from(staged_at.elapsed().as_millis()).unwrap_or(u64::MAX);
            let committed_at_ms = (committed_at_micros / 1000).max(0) as u64;
            status::now().0.saturating_sub(committed_at_ms).saturating_sub(staged_ago)
        }
        _ => 0,
    }
}

fn slot_health(stage: &Stage<'_>, figures: &SourceStatus) {
    let bound = stage.demand.source.safety.retained_wal_max;
    if figures.retained_bytes > bound.0 {
        let message = format!(
            "the slot {} holds back {} bytes of WAL, above safety.retainedWalMax ({bound}). Look at what the capture waits for, or raise the bound",
            stage.demand.slot, figures.retained_bytes
        );
        stage.context.status.condition(ConditionType::SlotHealthy, false, "RetainedWal", &message);
    } else if stage.syncing.is_unknown() {
        let message = "a NATS server that holds the log or the side store does not say when it syncs: Postgres is told of what is staged four minutes \
            later, and keeps its WAL for so long. Give the workers the monitoring URL of every NATS server (--nats-monitoring), and see that each answers";
        stage.context.status.condition(ConditionType::SlotHealthy, true, "SyncUnknown", message);
    } else {
        stage.context.status.condition(ConditionType::SlotHealthy, true, "WithinBound", "");
    }
}
