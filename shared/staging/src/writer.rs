//! The owner's side of the log: the handle.
//!
//! One task ([`crate::writer_task`]) owns the chain and does what takes time; the handle hands records to it and shows
//! what became of them. Everything that an owner can do something about is an error here; everything that only needs
//! patience is retried inside and shown by [`LogWriter::waiting`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::Span;
use wallaby_model::{Codec, Epoch, Lsn, Nonce, Position, Record, RecordKind, ResumeInfo, Splice, TraceParent};

use crate::chain::Append;
use crate::error::{Result, StagingError};
use crate::log::Log;
use crate::record::{self, HEADER_BYTES_MAX, Incarnation};
use crate::segment_cache::SegmentCache;
use crate::sync::SyncPolicy;
use crate::takeover::Takeover;
use crate::waiting::{WaitSender, Waiting};
use crate::writer_task::{Command, WriterTask};

/// What the file store of the server adds to a message, and what the client adds to the headers, at most.
const STORED_OVERHEAD_BYTES: u64 = 64;

/// How an owner writes.
#[derive(Clone)]
pub struct WriterOptions {
    /// The most records in flight; at most [`crate::rule::WINDOW_COUNT_MAX`].
    pub window_count: usize,
    /// The most bytes in flight; one record may be larger.
    pub window_bytes: usize,
    /// How long an acknowledgement may take before the chain counts as broken.
    pub ack_timeout: Duration,
    /// How long a takeover tries.
    pub takeover_timeout: Duration,
    /// Nothing was appended under a fence with this nonce yet: one that stands is as good as a new one. Where something was, only
    /// a new fence keeps out what of it is still on its way.
    pub may_stand: bool,
    /// How often the leader is asked whether it is still the same and still has what it acknowledged.
    pub tail_check_interval: Duration,
    /// How long a leader with a quorum must say that the tail is lost before it is believed.
    pub loss_confirmed_after: Duration,
    /// When the servers sync; see [`crate::sync_policy`].
    pub sync: SyncPolicy,
    /// Gets every record after its acknowledgement.
    pub cache: Option<Arc<dyn SegmentCache>>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        WriterOptions {
            window_count: 16,
            window_bytes: 4 << 20,
            ack_timeout: Duration::from_secs(2),
            takeover_timeout: Duration::from_secs(30),
            may_stand: false,
            tail_check_interval: Duration::from_secs(5),
            loss_confirmed_after: Duration::from_secs(3),
            sync: SyncPolicy::Unknown,
            cache: None,
        }
    }
}

impl fmt::Debug for WriterOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriterOptions")
            .field("window_count", &self.window_count)
            .field("window_bytes", &self.window_bytes)
            .field("ack_timeout", &self.ack_timeout)
            .field("sync", &self.sync)
            .field("cache", &self.cache.is_some())
            .finish_non_exhaustive()
    }
}

/// A data segment to append.
#[derive(Clone, Debug)]
pub struct DataAppend {
    /// [`LogWriter::end`] as it is before.
    pub from: Position,
    /// The last row's position, or `(end_lsn, 0)` when it ends with a whole transaction.
    pub to: Position,
    /// The end of the last whole transaction at or before `to`.
    pub complete_to: Position,
    /// Rows in the body.
    pub rows: u32,
    /// How the body is packed.
    pub codec: Codec,
    /// The body, at most [`Log::body_bytes_max`] bytes.
    pub body: Bytes,
}

/// Who looks at a record on its way.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Lives until the record is acknowledged or given up; its field `sequence` is filled in at the acknowledgement.
    pub span: Span,
    /// The same span for those who read the record: a header of it.
    pub parent: Option<TraceParent>,
}

impl Trace {
    /// Nobody.
    pub const fn none() -> Trace {
        Trace { span: Span::none(), parent: None }
    }
}

/// The last acknowledged record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// Its end.
    pub position: Position,
    /// The end of the last whole transaction in the log; `None` until it is known.
    pub complete_to: Option<Position>,
    /// Its sequence: a hint.
    pub sequence: u64,
}

/// What the handle and its task share.
pub(crate) struct Shared {
    pub(crate) log: Log,
    /// The end of everything that was handed in.
    pub(crate) end: Mutex<Position>,
    pub(crate) in_flight: watch::Sender<u32>,
    pub(crate) acked: watch::Sender<Acked>,
    pub(crate) durable: watch::Sender<Lsn>,
    pub(crate) waiting: WaitSender,
    pub(crate) moves: watch::Sender<u64>,
    pub(crate) ended: watch::Sender<Option<StagingError>>,
}

impl Shared {
    fn end(&self) -> MutexGuard<'_, Position> {
        // Nothing can panic while it is held.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one writer of a log, under one epoch. Dropping it stops it; what is in flight may or may not land.
pub struct LogWriter {
    shared: Arc<Shared>,
    epoch: Epoch,
    incarnation: Incarnation,
    commands: mpsc::Sender<Command>,
    sync: watch::Sender<SyncPolicy>,
    task: JoinHandle<()>,
}

impl LogWriter {
    /// Fences the log for `epoch` and reads where it ends. `nonce` is fresh for every owner.
    ///
    /// # Errors
    /// `Fenced` or `EpochTaken` when another owner has it; `Unavailable` when the servers did not answer in time.
    pub async fn take_over(log: &Log, epoch: Epoch, nonce: Nonce, options: WriterOptions) -> Result<Takeover> {
        Takeover::run(log, epoch, nonce, options).await
    }

    pub(crate) async fn start(
        takeover: Takeover,
        position: Position,
        info: ResumeInfo,
        incarnation: Incarnation,
    ) -> Result<LogWriter> {
        let (log, epoch) = (takeover.log.clone(), takeover.epoch);
        let acked = Acked { position, complete_to: takeover.tail.complete_to, sequence: takeover.tail.last_sequence };
        let shared = Arc::new(Shared {
            log: log.clone(),
            end: Mutex::new(position),
            in_flight: watch::Sender::new(1),
            acked: watch::Sender::new(acked),
            durable: watch::Sender::new(Lsn::ZERO),
            waiting: WaitSender::new(),
            moves: watch::Sender::new(0),
            ended: watch::Sender::new(None),
        });
        let kind = RecordKind::Resume { position, info };
        let resume = append(&log, epoch, incarnation, kind, Bytes::new(), Trace::none());
        let (commands, receiver) = mpsc::channel(1);
        let sync = watch::Sender::new(takeover.options.sync);
        let task =
            WriterTask::new(takeover, incarnation, Arc::clone(&shared), receiver, sync.subscribe(), resume).await?;
        let writer = LogWriter { shared, epoch, incarnation, commands, sync, task: tokio::spawn(task.run()) };
        writer.settled().await?;
        Ok(writer)
    }

    /// The epoch it writes under.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The life of the log it writes.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The end of everything that was handed in, acknowledged or not.
    pub fn end(&self) -> Position {
        *self.shared.end()
    }

    /// Hands a segment in; returns once it is taken for sending. Waits while the window is full, the log is full, or a resync
    /// is under way. Cancelled, it is taken whole or not at all.
    ///
    /// # Errors
    /// `TooLarge` and `NotContinuing` refuse this segment; `Fenced`, `EpochTaken`, `TailLost`, `Missing` end the writer.
    pub async fn append(&self, data: DataAppend) -> Result<()> {
        self.append_traced(data, Trace::none()).await
    }

    /// [`LogWriter::append`], with somebody who looks at the segment on its way.
    ///
    /// # Errors
    /// As [`LogWriter::append`].
    pub async fn append_traced(&self, data: DataAppend, trace: Trace) -> Result<()> {
        let max = self.shared.log.body_bytes_max();
        if data.body.len() > max {
            return Err(StagingError::TooLarge { bytes: data.body.len(), max });
        }
        let DataAppend { from, to, complete_to, rows, codec, body } = data;
        let kind = RecordKind::Data { from, to, complete_to, rows, codec };
        self.hand_in(from, to, kind, body, trace).await
    }

    /// Hands in a splice: the rest of a transaction whose parts and manifest are acknowledged by the side store. `to` is the end of
    /// the transaction. As [`LogWriter::append_traced`] otherwise.
    ///
    /// # Errors
    /// As [`LogWriter::append`].
    pub async fn splice(&self, from: Position, to: Position, splice: &Splice, trace: Trace) -> Result<()> {
        // A splice is a handful of numbers: it always serialises, and always fits.
        let body = Bytes::from(serde_json::to_vec(splice).unwrap_or_default());
        self.hand_in(from, to, RecordKind::Splice { from, to }, body, trace).await
    }

    /// Hands in that nothing happened with a commit LSN below `to`. One that does not lie past [`LogWriter::end`] is no news and
    /// is left out.
    ///
    /// # Errors
    /// As [`LogWriter::append`].
    pub async fn heartbeat(&self, to: Lsn) -> Result<()> {
        let (from, to) = (self.end(), Position::before(to));
        if to <= from {
            return Ok(());
        }
        self.hand_in(from, to, RecordKind::Heartbeat { from, to }, Bytes::new(), Trace::none()).await
    }

    async fn hand_in(&self, from: Position, to: Position, kind: RecordKind, body: Bytes, trace: Trace) -> Result<()> {
        let append = append(&self.shared.log, self.epoch, self.incarnation, kind, body, trace);
        let Ok(place) = self.commands.reserve().await else {
            return Err(self.ended().await);
        };
        let mut end = self.shared.end();
        if from != *end || to <= from {
            return Err(StagingError::NotContinuing { flow: self.shared.log.flow().clone(), from, end: Some(*end) });
        }
        *end = to;
        self.shared.in_flight.send_modify(|count| *count += 1);
        place.send(Command::Append(Box::new(append)));
        Ok(())
    }

    /// The records that were handed in and are not yet acknowledged.
    pub fn in_flight(&self) -> watch::Receiver<u32> {
        self.shared.in_flight.subscribe()
    }

    /// The last acknowledged record.
    pub fn acked(&self) -> watch::Receiver<Acked> {
        self.shared.acked.subscribe()
    }

    /// What may be confirmed to Postgres: everything with a commit LSN below it is durable. Zero: nothing yet.
    pub fn durable(&self) -> watch::Receiver<Lsn> {
        self.shared.durable.subscribe()
    }

    /// What the writer waits for, if it does.
    pub fn waiting(&self) -> watch::Receiver<Option<Waiting>> {
        self.shared.waiting.subscribe()
    }

    /// How often the log was found under another leader, or over a connection that was made anew: its servers may have been started with
    /// other settings.
    pub fn moves(&self) -> watch::Receiver<u64> {
        self.shared.moves.subscribe()
    }

    /// Where to say how the servers sync, whenever it is known better: it counts for what is confirmed from then on. Keeps no writer
    /// alive.
    pub fn sync(&self) -> watch::Sender<SyncPolicy> {
        self.sync.clone()
    }

    /// Returns once everything that was handed in is acknowledged.
    ///
    /// # Errors
    /// When the writer ended.
    pub async fn settled(&self) -> Result<()> {
        let (done, settled) = oneshot::channel();
        if self.commands.send(Command::Settle(done)).await.is_err() || settled.await.is_err() {
            return Err(self.ended().await);
        }
        Ok(())
    }

    /// Returns why the writer ended, once it has.
    pub async fn ended(&self) -> StagingError {
        let closed = StagingError::Closed { flow: self.shared.log.flow().clone() };
        let mut ended = self.shared.ended.subscribe();
        let ended = ended.wait_for(Option::is_some).await;
        ended.ok().and_then(|error| error.clone()).unwrap_or(closed)
    }

    /// Whether it has ended: nothing is appended any more, and nothing that was handed in is waited for.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.borrow().is_some()
    }

    /// Waits for every acknowledgement, then stops.
    ///
    /// # Errors
    /// When the writer ended before.
    pub async fn close(self) -> Result<Acked> {
        self.settled().await?;
        Ok(*self.shared.acked.borrow())
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Makes a message of a record.
fn append(log: &Log, epoch: Epoch, incarnation: Incarnation, kind: RecordKind, body: Bytes, trace: Trace) -> Append {
    let record = Record { flow: log.flow().clone(), epoch, kind };
    let mut headers = record::encode(&record, Some(incarnation));
    if let Some(made_in) = trace.parent {
        record::set_traceparent(&mut headers, made_in);
    }
    let headers_max = headers.iter().map(|(_, values)| values.iter().map(|value| value.as_str().len()).sum::<usize>());
    let headers_max = headers_max.sum::<usize>() + HEADER_BYTES_MAX;
    let stored_bytes = (body.len() + headers_max + log.data_subject().len()) as u64 + STORED_OVERHEAD_BYTES;
    Append { record, headers, body, stored_bytes, span: trace.span }
}
