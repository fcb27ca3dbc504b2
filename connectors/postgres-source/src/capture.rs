//! The loop of a capture task: bytes in, segments and heartbeats out.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use wallaby_model::{Lsn, Position};

use crate::assemble::{Assembler, CaptureEvent, Limits, PartLimits, RelationShape, Step};
use crate::catalog;
use crate::config::ConnectConfig;
use crate::control::{Control, wait_for_end};
use crate::error::{PUBLICATION_AT_SLOT, ServerError, SourceError};
use crate::prepare::Prepared;
use crate::replication::{CloseReason, Feedback, Frame, FrameReader};
use crate::sent::SentNames;
use crate::sessions::SessionOwner;

/// What a capture task needs to know.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// How to connect.
    pub connect: ConnectConfig,
    /// Whose sessions these are.
    pub owner: SessionOwner,
    /// The slot.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// A segment with this much content is done.
    pub segment_target_bytes: usize,
    /// No segment grows beyond this, unless a single row does.
    pub segment_bytes_max: usize,
    /// The largest content of a segment with one row: the log's `max_payload` less headroom for headers.
    pub row_bytes_max: usize,
    /// A larger transaction goes to the side store, if there is one.
    pub large_transaction_bytes: u64,
    /// Asks for transactions while they are in progress, and cuts large ones into parts. `None`: there is no side store; every
    /// transaction becomes segments when it commits.
    pub parts: Option<PartOptions>,
    /// Commit LSNs of transactions that become parts from their first row on: a splice of each stands in the log already.
    pub whole: BTreeSet<Lsn>,
    /// With fewer publishes than this in flight, a whole transaction is flushed as soon as nothing more is readable.
    pub eager_in_flight: u32,
    /// How long older owners may take to let go of the slot.
    pub slot_wait: Duration,
    /// Heartbeats that nobody waits for are not made more often.
    pub heartbeat_every: Duration,
}

/// How parts are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartOptions {
    /// A part with this much content is done: what the side store takes at a time. At least 128 KiB are used.
    pub target_bytes: usize,
    /// What the open parts of all transactions may have together in memory; the largest goes out first.
    pub open_bytes_max: usize,
    /// The side store is full: nothing is asked for while it is in progress, and only [`CaptureOptions::whole`] becomes parts.
    /// Any other transaction becomes segments, however large it is.
    pub only_whole: bool,
}

impl PartOptions {
    /// For a side store that takes `target_bytes` at a time.
    pub fn new(target_bytes: usize) -> PartOptions {
        PartOptions { target_bytes, open_bytes_max: 16 << 20, only_whole: false }
    }

    fn limits(self) -> PartLimits {
        PartLimits {
            target_bytes: self.target_bytes.max(PART_TARGET_BYTES_LEAST),
            open_bytes_max: self.open_bytes_max,
            row_bytes_max: PART_ROW_BYTES_MAX,
            only_whole: self.only_whole,
        }
    }
}

/// A part smaller than this costs more than it holds.
const PART_TARGET_BYTES_LEAST: usize = 128 << 10;
/// PostgreSQL's own bound: no message of it reaches 1 GiB.
const FRAME_BYTES_MAX: usize = 1 << 30;
/// The largest row of a part: as large as a message, framed.
const PART_ROW_BYTES_MAX: usize = FRAME_BYTES_MAX + (4 << 20);

impl CaptureOptions {
    /// How parts are cut; `None` when no transaction becomes parts.
    pub(crate) fn parts_used(&self) -> Option<PartOptions> {
        self.parts.filter(|parts| !parts.only_whole || !self.whole.is_empty())
    }

    /// The defaults of api.md.
    pub fn new(connect: ConnectConfig, owner: SessionOwner, slot: &str, publication: &str) -> CaptureOptions {
        CaptureOptions {
            connect,
            owner,
            slot: slot.to_owned(),
            publication: publication.to_owned(),
            segment_target_bytes: 128 << 10,
            segment_bytes_max: 512 << 10,
            row_bytes_max: (1 << 20) - (64 << 10),
            large_transaction_bytes: 64 << 20,
            parts: None,
            whole: BTreeSet::new(),
            eager_in_flight: 2,
            slot_wait: Duration::from_secs(30),
            heartbeat_every: Duration::from_secs(1),
        }
    }
}

/// A running capture. Closes its connections when it is dropped.
pub struct Capture {
    options: CaptureOptions,
    control: Control,
    reader: FrameReader,
    feedback: Feedback,
    assembler: Assembler,
    /// A Relation message that the catalog has not completed yet.
    shape: Option<RelationShape>,
    sent: SentNames,
    /// The error that follows the segment that was given out before it.
    failed: Option<SourceError>,
    received: Lsn,
    server_end: Lsn,
    shutdown_watch: JoinHandle<()>,
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shutdown_watch.abort();
        self.feedback.close();
    }
}

/// Whether the buffer was used up.
enum Drained {
    /// All whole frames were taken.
    Empty,
    /// A segment has to be given out before the next frame.
    Flush,
    /// What is ready has to be given out before the next frame.
    Ready,
    /// The catalog has to be asked before the next frame.
    Shape,
}

impl Capture {
    /// Connects, ends sessions of older owners, reads identity and slot. Does not take the slot.
    ///
    /// # Errors
    /// As classified by [`SourceError`].
    pub async fn prepare(options: CaptureOptions) -> Result<Prepared, SourceError> {
        Prepared::connect(options).await
    }

    pub(crate) fn new(
        options: CaptureOptions,
        control: Control,
        mut reader: FrameReader,
        feedback: Feedback,
        protocol: u8,
        log_end: Position,
    ) -> Capture {
        // Hex doubles a bytea, and REPLICA IDENTITY FULL sends a row twice.
        let frame_bytes_max = 4 * options.row_bytes_max + (64 << 10);
        let parts = options.parts_used();
        reader.set_frame_bytes_max(if parts.is_some() { FRAME_BYTES_MAX } else { frame_bytes_max });
        let limits = Limits {
            segment_target_bytes: options.segment_target_bytes,
            segment_bytes_max: options.segment_bytes_max,
            row_bytes_max: options.row_bytes_max,
            large_transaction_bytes: options.large_transaction_bytes,
            parts: parts.map(PartOptions::limits),
            heartbeat_every: options.heartbeat_every,
        };
        let shutdown_watch = tokio::spawn(close_when_control_ends(control.end_watch(), feedback.clone()));
        let mut assembler = Assembler::new(limits, protocol, log_end);
        assembler.keep_whole(options.whole.clone());
        Capture {
            options,
            control,
            reader,
            feedback,
            assembler,
            shape: None,
            sent: SentNames::default(),
            failed: None,
            received: Lsn::ZERO,
            server_end: Lsn::ZERO,
            shutdown_watch,
        }
    }

    /// The names that tables are sent under, from the start of the stream on.
    pub fn sent_names(&self) -> SentNames {
        self.sent.clone()
    }

    /// The LSN of the last message that was taken.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// The server's end of WAL as of the last message.
    pub fn server_end(&self) -> Lsn {
        self.server_end
    }

    /// The control connection, for the status of the slot.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Waits for the next event. `in_flight` is the number of publishes that are not acknowledged yet:
    /// with few of them a segment goes out as soon as it ends with a whole transaction and nothing more is readable,
    /// with many it fills up. Cancel-safe.
    ///
    /// # Errors
    /// After an error the capture is of no use any more.
    pub async fn next(&mut self, in_flight: &mut watch::Receiver<u32>) -> Result<CaptureEvent, SourceError> {
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if let Some(event) = self.assembler.take_ready() {
                return Ok(event);
            }
            if let Some(shape) = &self.shape {
                let schema = catalog::resolve(&self.control, shape).await?;
                self.sent.see(shape.table.clone(), shape.oid, self.assembler.commit_at_hand(), self.received);
                self.assembler.set_shape(schema)?;
                self.shape = None;
            }
            match self.drain() {
                Ok(Drained::Empty) => {}
                Ok(Drained::Shape | Drained::Ready) => continue,
                Ok(Drained::Flush) => {
                    if let Some(segment) = self.assembler.take_segment()? {
                        return Ok(CaptureEvent::Segment(segment));
                    }
                    continue;
                }
                Err(error) => {
                    // What came whole before the error is not held back by it.
                    if self.assembler.has_whole_transactions()
                        && let Ok(Some(segment)) = self.assembler.take_segment()
                    {
                        self.failed = Some(error);
                        return Ok(CaptureEvent::Segment(segment));
                    }
                    return Err(error);
                }
            }
            if let Some(event) = self.wait(in_flight).await? {
                return Ok(event);
            }
        }
    }

    /// Takes all whole frames that are in the buffer.
    fn drain(&mut self) -> Result<Drained, SourceError> {
        while let Some(frame) =
            self.reader.next_frame().map_err(|error| explain_stream_error(error, &self.options.publication))?
        {
            match frame {
                Frame::Wal { start, end, payload, .. } => {
                    self.server_end = self.server_end.max(end);
                    match self.assembler.push(start, payload)? {
                        Step::Taken => self.received = self.received.max(start),
                        Step::Full => {
                            self.received = self.received.max(start);
                            return Ok(Drained::Flush);
                        }
                        Step::Ready => {
                            self.received = self.received.max(start);
                            // What is packed next is in memory several times already.
                            self.reader.trim();
                            return Ok(Drained::Ready);
                        }
                        Step::FlushFirst => {
                            self.reader.put_back();
                            return Ok(Drained::Flush);
                        }
                        Step::Shape(shape) => {
                            self.shape = Some(shape);
                            return Ok(Drained::Shape);
                        }
                    }
                }
                Frame::Keepalive { end, .. } => {
                    self.server_end = self.server_end.max(end);
                    self.received = self.received.max(end);
                    self.assembler.keepalive(end)?;
                }
                Frame::Oversized { bytes, head, .. } => return Err(self.assembler.oversized(bytes, head)),
                Frame::Notice(notice) => check_notice(&notice, &self.options.publication)?,
                Frame::Done => {
                    let reason = "the server ended the stream".to_owned();
                    return Err(SourceError::Lost { during: "streaming".into(), reason });
                }
            }
        }
        self.reader.took(self.received);
        Ok(Drained::Empty)
    }

    /// Waits for more bytes, or gives out what is due.
    async fn wait(&mut self, in_flight: &mut watch::Receiver<u32>) -> Result<Option<CaptureEvent>, SourceError> {
        let whole = self.assembler.has_whole_transactions();
        if whole && *in_flight.borrow_and_update() < self.options.eager_in_flight {
            let more = self.reader.fill_without_waiting().await.map_err(|error| self.explain(error))?;
            if more.is_some() {
                return Ok(None);
            }
            return Ok(self.assembler.take_segment()?.map(CaptureEvent::Segment));
        }
        if let Some(to) = self.assembler.take_heartbeat(now()) {
            return Ok(Some(CaptureEvent::Heartbeat { to }));
        }
        let heartbeat_wait = self.assembler.heartbeat_wait(now());
        let filled = tokio::select! {
            filled = self.reader.fill() => filled,
            Ok(()) = in_flight.changed(), if whole => return Ok(None),
            () = sleep(heartbeat_wait.unwrap_or_default()), if heartbeat_wait.is_some() => return Ok(None),
        };
        filled.map(|_| None).map_err(|error| self.explain(error))
    }

    fn explain(&self, error: SourceError) -> SourceError {
        explain_stream_error(error, &self.options.publication)
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// A server that goes down ends ordinary sessions first and then waits for walsenders, which wait for our flush to
/// catch up: so the replication connection goes as soon as the control connection is told (hazard 15). A control
/// connection that is lost otherwise ends the stream too, because nobody would be told of the next shutdown.
async fn close_when_control_ends(end: watch::Receiver<Option<crate::control::ControlEnd>>, feedback: Feedback) {
    let end = wait_for_end(end).await;
    let reason = match end.sqlstate.clone().filter(|_| end.is_shutdown()) {
        Some(sqlstate) => CloseReason::Shutdown { sqlstate },
        None => CloseReason::Lost(format!("the control connection ended: {}", end.message)),
    };
    feedback.close_because(reason);
}

/// From PG 18 on a publication that is missing at the slot's position is only warned of, and the changes are left out:
/// that would be a silent hole (hazard 20).
fn check_notice(notice: &ServerError, publication: &str) -> Result<(), SourceError> {
    if notice.message.contains("skipped loading publication") {
        return Err(publication_missing(publication));
    }
    tracing::info!(sqlstate = %notice.sqlstate, message = %notice.message, "the walsender says");
    Ok(())
}

/// Up to PG 17 it is an error: 42704, naming the publication.
fn explain_stream_error(error: SourceError, publication: &str) -> SourceError {
    match &error {
        SourceError::Server { error: server, .. }
            if server.sqlstate == "42704" && server.message.contains("publication") =>
        {
            publication_missing(publication)
        }
        _ => error,
    }
}

fn publication_missing(publication: &str) -> SourceError {
    SourceError::PublicationMissing { publication: publication.to_owned(), when: PUBLICATION_AT_SLOT }
}
