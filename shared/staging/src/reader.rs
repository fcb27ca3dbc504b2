//! A reader of the log.
//!
//! The truth is the position; a sequence is a hint that is checked. The reader finds its place by position, takes each record
//! from the cache if it is there and else from the servers, together with those readers of its worker that stand where it stands,
//! and applies the reader rule to it. A consumer that is lost is made anew from where the reader stands. A gap is looked at twice: sequences are used again after a
//! loss of data, so before it is believed the place is searched by position once more, and read from the leader itself. A consumer reads
//! its server's copy, and after a loss of data a follower may have the lost records where the leader has those that came in their place.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use wallaby_model::{Epoch, Position, RecordKind};

use crate::error::{Result, StagingError};
use crate::log::Log;
use crate::metrics::ReaderMetrics;
use crate::pulls::{Found, Place, Wanted};
use crate::record::{Mark, Staged};
use crate::retention::{self, locate};
use crate::rule::{ReaderState, Verdict};
use crate::segment_cache::{SegmentCache, SegmentKey};
use crate::waiting::{Wait, WaitSender, Waiting};

/// How often it is looked whether a log that is read up to its end still has that end.
const END_LOOK_EVERY: Duration = Duration::from_secs(2);
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long the stream may seem not to exist before it is believed.
const MISSING_CONFIRMED_AFTER: Duration = Duration::from_secs(10);

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first resume of the log: a sink made with the flow. `PastHold` when it was purged.
    FirstResume,
    /// At the first record that is there.
    Available,
    /// After a position.
    At {
        /// It has everything up to here.
        position: Position,
        /// The log's epoch of its checkpoint, if it has one.
        epoch: Option<Epoch>,
        /// Where the record of that position was last seen. Checked, never trusted.
        sequence_hint: Option<u64>,
    },
}

/// How a reader reads.
#[derive(Clone)]
pub struct ReaderOptions {
    /// Bytes of one pull; two wait at the server at a time. Raised to `max_payload` when smaller.
    pub pull_bytes: usize,
    /// Asked before the servers; gets what they deliver. Readers with one cache share their pulls.
    pub cache: Option<Arc<dyn SegmentCache>>,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        ReaderOptions { pull_bytes: 2 << 20, cache: None }
    }
}

/// A record that the reader rule accepted: a resume, rows or a heartbeat.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The record, its body undecoded.
    pub staged: Staged,
    /// Rows at or before this are not for this reader.
    pub after: Position,
    /// Where the reader stands now. A resume moves nothing: then it equals `after`.
    pub to: Position,
    /// The end of the last whole transaction that the reader has seen, if it has seen one.
    pub complete_to: Option<Position>,
    /// The log's epoch now.
    pub log_epoch: Epoch,
}

/// A reader of one log.
pub struct LogReader {
    log: Log,
    start: Start,
    options: ReaderOptions,
    metrics: ReaderMetrics,
    waiting: WaitSender,
    state: ReaderState,
    /// The next sequence to read, once the place is known.
    next: Option<u64>,
    /// Where it pulls.
    place: Option<Arc<Place>>,
    /// The last record that was read: it must still stand at its sequence when the next one is pulled.
    last: Option<Mark>,
    /// Up to this sequence the leader is asked for each record: what a consumer, or the cache, gave there had a gap. 0: nowhere.
    by_leader_to: u64,
    /// The record behind that gap.
    gap: Option<Mark>,
    /// The record that was read last came from the leader itself.
    is_leaders: bool,
    /// Records before the one that comes next were purged: a resume that is met now is not the log's first.
    lacks_beginning: bool,
    backoff: Duration,
    missing_since: Option<Instant>,
}

impl LogReader {
    /// A reader that has not read yet; no I/O.
    pub fn new(log: &Log, start: Start, options: ReaderOptions) -> LogReader {
        let state = match start {
            Start::FirstResume => ReaderState::at_first_resume(),
            Start::Available => ReaderState::anywhere(),
            Start::At { position, epoch, .. } => ReaderState::at(position, epoch),
        };
        LogReader {
            metrics: ReaderMetrics::new(log.flow()),
            log: log.clone(),
            start,
            options,
            waiting: WaitSender::new(),
            state,
            next: None,
            place: None,
            last: None,
            by_leader_to: 0,
            gap: None,
            is_leaders: false,
            lacks_beginning: false,
            backoff: BACKOFF_FIRST,
            missing_since: None,
        }
    }

    /// Where the reader stands.
    pub fn state(&self) -> ReaderState {
        self.state
    }

    /// The sequence that it reads next: a hint for a checkpoint.
    pub fn next_sequence(&self) -> Option<u64> {
        self.next
    }

    /// What the reader waits for besides new records.
    pub fn waiting(&self) -> watch::Receiver<Option<Waiting>> {
        self.waiting.subscribe()
    }

    /// The next record for this reader. Waits for one as long as it takes; reconnects and searches by itself. Cancel-safe. Poll it
    /// or drop it: other readers of the worker may stand in line behind it.
    ///
    /// # Errors
    /// `PastHold`, `Gap`, `Record` and `Missing` end the reader: it would lose changes if it went on.
    pub async fn next(&mut self) -> Result<Accepted> {
        loop {
            if let Some(accepted) = self.next_up_to(u64::MAX).await? {
                return Ok(accepted);
            }
        }
    }

    /// As [`LogReader::next`], but `None` once nothing up to the sequence `last` is left: whoever wants what stands in the log now need
    /// not guess from a silence that this was all. A silence may be a search, and cancelled each time it would never end.
    ///
    /// # Errors
    /// As [`LogReader::next`]; `Unavailable` when the log ends before `last`: it lost its tail meanwhile, and nobody may be there to
    /// write on.
    pub async fn next_up_to(&mut self, last: u64) -> Result<Option<Accepted>> {
        if last == u64::MAX {
            return self.advance(last).await;
        }
        let log = self.log.clone();
        let next = self.advance(last);
        tokio::pin!(next);
        loop {
            // What is under way is never cut off by the look: a search that is would begin anew each time.
            if let Ok(found) = tokio::time::timeout(END_LOOK_EVERY, &mut next).await {
                return found;
            }
            if let Ok(info) = log.info().await
                && info.last_sequence < last
            {
                let end = info.last_sequence;
                let reason = format!("it ends at {end} now and was to be read up to {last}: it lost its tail");
                return Err(StagingError::unavailable(format!("the end of {}", log.stream()), reason));
            }
        }
    }

    async fn advance(&mut self, last: u64) -> Result<Option<Accepted>> {
        loop {
            match self.read(last).await {
                Ok(None) => return Ok(None),
                Ok(Some(staged)) => {
                    self.missing_since = None;
                    self.waiting.set(None, Instant::now());
                    // Only now: cancelled before, the record is read again.
                    let wanted = self.next.replace(staged.sequence + 1);
                    self.lacks_beginning |= wanted != Some(staged.sequence);
                    self.last = Some(Mark::of(&staged));
                    if let Some(accepted) = self.judge(staged)? {
                        // Not for a record that is known: a place that is searched again and again gives those each time.
                        self.backoff = BACKOFF_FIRST;
                        return Ok(Some(accepted));
                    }
                }
                Err(error) => {
                    self.place = None;
                    self.wait_after(error).await?;
                }
            }
        }
    }

    /// Decides whether an error is worth another try, and waits before it.
    async fn wait_after(&mut self, error: StagingError) -> Result<()> {
        if matches!(error, StagingError::Missing { .. }) {
            if self.missing_since.get_or_insert_with(Instant::now).elapsed() >= MISSING_CONFIRMED_AFTER {
                return Err(error);
            }
        } else if !error.is_transient() {
            return Err(error);
        }
        tracing::debug!(flow = %self.log.flow(), %error, "the reader starts again from where it stands");
        self.metrics.recovered();
        self.waiting.set(Some(Wait::Unreachable), Instant::now());
        let delay = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// The next record of the stream, from the cache or the servers; `None` when the next one stands behind `last`.
    async fn read(&mut self, last: u64) -> Result<Option<Staged>> {
        let next = match self.next {
            Some(next) => next,
            None => self.search().await?,
        };
        self.next = Some(next);
        if next > self.by_leader_to {
            (self.by_leader_to, self.gap) = (0, None);
        }
        if next > last {
            return Ok(None);
        }
        self.is_leaders = next <= self.by_leader_to;
        if self.is_leaders {
            return self.ask_leader(next, last).await;
        }
        loop {
            if let Some(staged) = self.cached(next) {
                self.metrics.cache_hit();
                return Ok(Some(staged));
            }
            let place = self.place(next);
            let wanted = Wanted {
                log: &self.log,
                pull_bytes: self.options.pull_bytes,
                sequence: next,
                last: self.last.filter(|last| last.sequence + 1 == next),
                incarnation: self.state.incarnation,
                metrics: &self.metrics,
            };
            match place.take(wanted).await? {
                Found::Record(staged) => {
                    if let (Some(cache), Some(incarnation)) = (&self.options.cache, staged.incarnation) {
                        let key = SegmentKey { flow: self.log.flow().clone(), incarnation, sequence: staged.sequence };
                        cache.put(key, &staged);
                    }
                    return Ok(Some(*staged));
                }
                Found::Elsewhere => self.place = None,
                Found::NumberedAnew => return Err(self.numbered_anew()),
            }
        }
    }

    /// The first record from `next` on as the leader has it, unless that is behind `last`. Over the publishing connection: on the pulling one
    /// the answers would stand behind what a consumer that was just given up still delivers.
    async fn ask_leader(&mut self, next: u64, last: u64) -> Result<Option<Staged>> {
        match self.log.leader().next(&self.log, next).await? {
            Some(message) if message.staged.sequence <= last => Ok(Some(message.staged)),
            Some(_) => Ok(None),
            None => {
                // Not yet, or not any more: then what comes may come below this.
                (self.next, self.last) = (None, None);
                Err(StagingError::unavailable(
                    format!("record {next} of {}", self.log.stream()),
                    "its leader has none (yet)",
                ))
            }
        }
    }

    /// Whether a record of a consumer that shows a gap is put aside until the leader itself was asked. The place is searched, and read from the
    /// leader up to there.
    fn is_to_be_shown(&mut self, staged: &Staged) -> bool {
        self.place = None;
        self.next = None;
        if !self.is_leaders {
            self.by_leader_to = staged.sequence;
            self.gap = Some(Mark::of(staged));
        }
        !self.is_leaders
    }

    /// Where the record with this sequence is pulled: where others wait for it, or else where the reader was before.
    fn place(&mut self, next: u64) -> Arc<Place> {
        let own = self.place.take().filter(|place| place.is_near(next));
        let shared = self.options.cache.as_ref().and_then(|cache| cache.pulls());
        let place = match (shared, own) {
            (Some(pulls), own) => pulls.place(self.log.flow(), next, own),
            (None, Some(own)) => own,
            (None, None) => Arc::new(Place::new(self.log.flow().clone(), next)),
        };
        self.place = Some(Arc::clone(&place));
        place
    }

    /// The place is searched by position.
    fn numbered_anew(&mut self) -> StagingError {
        (self.next, self.last, self.place) = (None, None, None);
        // The cache may still have the old life's records under the sequences that come: the servers say which life this is.
        self.state.incarnation = None;
        StagingError::unavailable("the reader's place", "the log was purged or numbered anew")
    }

    fn cached(&self, sequence: u64) -> Option<Staged> {
        let cache = self.options.cache.as_ref()?;
        let incarnation = self.state.incarnation?;
        let cached = cache.get(&SegmentKey { flow: self.log.flow().clone(), incarnation, sequence });
        // One of an epoch that is over: the rule would drop it. It may be of a tail that was lost and that nobody missed, and then another
        // record has its sequence.
        cached.filter(|staged| self.state.epoch.is_none_or(|epoch| staged.record.epoch >= epoch))
    }

    /// Finds the sequence to begin at.
    async fn search(&mut self) -> Result<u64> {
        self.state.jump();
        let Some(end) = self.state.end else {
            let first = self.log.reader_leader().info(&self.log).await?.state.first_sequence.max(1);
            self.lacks_beginning = first > 1;
            return Ok(first);
        };
        if let Start::At { sequence_hint: Some(hint), .. } = self.start
            && self.gap.is_none()
            && let Some(message) = self.log.reader_leader().message(&self.log, hint).await?
            && message.staged.record.kind.to().is_some_and(|to| to <= end)
        {
            // What lies before the hint is behind the reader, if the hint is of this life of the log. If it is not, and
            // something is missing, the rule says so and the place is searched.
            return Ok(hint);
        }
        match locate(&self.log, self.log.reader_leader(), end).await? {
            retention::Place::Holds { from, before: None, .. } if from > end => {
                Err(StagingError::PastHold { flow: self.log.flow().clone(), position: Some(end), begins: Some(from) })
            }
            retention::Place::Holds { before, sequence, .. } => Ok(before.unwrap_or(sequence)),
            retention::Place::AtEnd { before, next, .. } => Ok(before.unwrap_or(next)),
        }
    }

    /// Applies the rule. `None`: nothing for the caller.
    fn judge(&mut self, staged: Staged) -> Result<Option<Accepted>> {
        let before = self.state.end;
        if let RecordKind::Resume { position, .. } = staged.record.kind
            && before.is_none()
            && self.lacks_beginning
            && self.start == Start::FirstResume
        {
            if self.is_to_be_shown(&staged) {
                return Ok(None);
            }
            // Every owner writes one: a later one would hide what stood before it.
            let (flow, begins) = (self.log.flow().clone(), Some(position));
            return Err(StagingError::PastHold { flow, position: None, begins });
        }
        match self.state.observe(&staged) {
            Verdict::Fence => Ok(None),
            Verdict::Drop(_) => {
                self.metrics.dropped();
                Ok(None)
            }
            Verdict::Resumed { rewound } => {
                if rewound {
                    self.metrics.rewound();
                }
                Ok(self.accepted(staged, before))
            }
            Verdict::Accept { after } => {
                self.metrics.read(staged.body.len());
                if self.is_leaders && self.gap.take_if(|gap| *gap == Mark::of(&staged)).is_some() {
                    self.metrics.gap_of_a_copy();
                    let sequence = staged.sequence;
                    tracing::warn!(flow = %self.log.flow(), sequence, "a server's copy of the log lacks records before this one that its leader has");
                }
                Ok(self.accepted(staged, Some(after)))
            }
            Verdict::Gap { .. } if self.is_to_be_shown(&staged) => Ok(None),
            Verdict::Gap { end: None, from } => {
                Err(StagingError::PastHold { flow: self.log.flow().clone(), position: None, begins: Some(from) })
            }
            Verdict::Gap { end: Some(end), from } => {
                self.metrics.gap();
                let (flow, sequence) = (self.log.flow().clone(), staged.sequence);
                Err(StagingError::Gap { flow, sequence, end, from })
            }
        }
    }

    fn accepted(&self, staged: Staged, after: Option<Position>) -> Option<Accepted> {
        let to = self.state.end?;
        let log_epoch = self.state.epoch?;
        let after = match staged.record.kind {
            RecordKind::Resume { .. } => to,
            _ => after.unwrap_or(to),
        };
        Some(Accepted { staged, after, to, complete_to: self.state.complete_to, log_epoch })
    }
}
