//! The owner's side of the log: the task that owns the chain.
//!
//! It sends what the window allows, takes answers, and after anything unexpected stops, settles, and reads the log before
//! it sends again. It retries for ever; it ends when another owner has the log, or when the log lost what it acknowledged.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::{Message, Subject, Subscriber};
use futures::StreamExt;
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use wallaby_model::RecordKind;

use crate::chain::{Append, Chain, LogView, Lost, Window};
use crate::durability::Durability;
use crate::error::{Result, StagingError};
use crate::log::{Log, LogInfo, RESERVE_BYTES};
use crate::metrics::{Refusal, WriterMetrics};
use crate::record::{self, Incarnation};
use crate::segment_cache::SegmentKey;
use crate::sync::SyncPolicy;
use crate::tail::{self, FenceAt, Tail};
use crate::takeover::{Standing, Takeover, standing};
use crate::waiting::Wait;
use crate::writer::{Acked, Shared};

/// At least this often the task looks whether the connection was made anew.
const TICK: Duration = Duration::from_millis(500);
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A full log is asked this often whether there is room.
const FULL_POLL: Duration = Duration::from_millis(250);
/// Confirmations that wait for a sync interval are checked against the leader at most this often.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stream may seem not to exist before it is believed: a server that starts has not read its streams yet.
const MISSING_CONFIRMED_AFTER: Duration = Duration::from_secs(10);

/// What the handle asks.
pub(crate) enum Command {
    /// Append this.
    Append(Box<Append>),
    /// Answer once all that was handed in before is acknowledged.
    Settle(oneshot::Sender<()>),
}

pub(crate) struct WriterTask {
    log: Log,
    takeover: Takeover,
    incarnation: Incarnation,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    sync: watch::Receiver<SyncPolicy>,
    settling: Vec<oneshot::Sender<()>>,
    chain: Chain,
    answers: Subscriber,
    inbox: String,
    subject: Subject,
    durability: Durability,
    metrics: WriterMetrics,
    acked: Acked,
    fences: Vec<FenceAt>,
    leader: Option<String>,
    connects: u64,
    tail_checked_at: Instant,
    /// Failures in a row without an acknowledgement between them.
    failures: u32,
    /// Nothing is sent before.
    hold_until: Option<Instant>,
    full_since: Option<Instant>,
    room_checked_at: Instant,
}

impl WriterTask {
    pub(crate) async fn new(
        takeover: Takeover,
        incarnation: Incarnation,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        sync: watch::Receiver<SyncPolicy>,
        resume: Append,
    ) -> Result<WriterTask> {
        let log = takeover.log.clone();
        let client = &log.connections().publish;
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await;
        let answers = answers.map_err(|error| StagingError::unavailable("the inbox for acknowledgements", error))?;
        let window = Window { count: takeover.options.window_count, bytes: takeover.options.window_bytes as u64 };
        let mut chain = Chain::new(window, takeover.tail.last_sequence, takeover.tail.end);
        chain.set_room(room(&takeover.info));
        chain.push(resume);
        let now = Instant::now();
        let acked = *shared.acked.borrow();
        let mut durability = Durability::new(takeover.options.sync);
        // The leader has it and our fence was acknowledged after it: that is as good as an acknowledgement, and as young.
        if let Some(complete_to) = acked.complete_to {
            durability.acknowledged(complete_to.commit, now);
        }
        Ok(WriterTask {
            subject: Subject::from(log.data_subject()),
            connects: client.statistics().connects.load(Ordering::Relaxed),
            metrics: WriterMetrics::new(log.flow()),
            fences: takeover.fences.clone(),
            leader: takeover.info.leader.clone(),
            settling: Vec::new(),
            tail_checked_at: now,
            failures: 0,
            hold_until: None,
            full_since: None,
            room_checked_at: now,
            log,
            takeover,
            incarnation,
            shared,
            commands,
            sync,
            chain,
            answers,
            inbox,
            durability,
            acked,
        })
    }

    pub(crate) async fn run(mut self) {
        if let Err(error) = self.work().await {
            self.metrics.ended(&error);
            tracing::warn!(flow = %self.log.flow(), epoch = %self.takeover.epoch, %error, "the writer ended");
            self.shared.ended.send_replace(Some(error));
        }
    }

    /// Returns without an error when the handle is gone.
    async fn work(&mut self) -> Result<()> {
        loop {
            self.send().await;
            if self.chain.is_broken() {
                self.resync().await?;
                continue;
            }
            // What is confirmed from here on is confirmed by what is known of the servers now.
            self.durability.set_policy(*self.sync.borrow_and_update());
            self.publish_state();
            let wake = self.wake_at();
            tokio::select! {
                biased;
                answer = self.answers.next() => match answer {
                    Some(answer) => self.take_answer(&answer),
                    None => return Err(StagingError::Closed { flow: self.log.flow().clone() }),
                },
                command = self.commands.recv(), if self.chain.has_room() => match command {
                    Some(Command::Append(append)) => self.chain.push(*append),
                    Some(Command::Settle(done)) => self.settling.push(done),
                    None => return Ok(()),
                },
                // Also while the log is full and no command is taken.
                Ok(()) = self.sync.changed() => {}
                () = tokio::time::sleep_until(wake) => self.wake().await?,
            }
        }
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let confirm = self.durability.due_at().map(|due| due.max(self.tail_checked_at + CONFIRM_INTERVAL));
        let full = self.chain.is_full().then(|| self.room_checked_at + FULL_POLL);
        let others = [self.chain.deadline(), confirm, full, self.hold_until];
        others.into_iter().flatten().fold(now + TICK, Instant::min)
    }

    /// Sends what may go.
    async fn send(&mut self) {
        let now = Instant::now();
        if self.hold_until.is_some_and(|until| until > now) {
            return;
        }
        self.hold_until = None;
        let client = &self.log.connections().publish;
        let timeout = self.takeover.options.ack_timeout;
        while let Some(send) = self.chain.next(now, timeout) {
            let mut headers = send.append.headers.clone();
            record::set_link(&mut headers, send.link);
            headers.insert(async_nats::header::NATS_EXPECTED_LAST_SEQUENCE, send.expected.to_string());
            let reply = format!("{}.{}", self.inbox, send.token);
            let body = send.append.body.clone();
            let publish = client.publish_with_reply_and_headers(self.subject.clone(), reply, headers, body);
            // The client queues while it reconnects; a queue that stays full is an append without an answer.
            let sent = tokio::time::timeout_at(now + timeout, publish).await;
            if !matches!(sent, Ok(Ok(()))) {
                self.chain.break_off();
            }
        }
    }

    fn take_answer(&mut self, message: &Message) {
        let Some(token) = message.subject.as_str().rsplit('.').next().and_then(|token| token.parse().ok()) else {
            return;
        };
        match answer_of(message) {
            Ok(sequence) => {
                for stored in self.chain.stored(token, sequence) {
                    self.failures = 0;
                    self.metrics.acknowledged(stored.sent_at.elapsed());
                    stored.append.span.record("sequence", stored.sequence as i64);
                    self.count_stored(&stored.append, stored.sequence);
                    if let Some(cache) = &self.takeover.options.cache {
                        let key = SegmentKey {
                            flow: self.log.flow().clone(),
                            incarnation: self.incarnation,
                            sequence: stored.sequence,
                        };
                        cache.put(key, &stored.staged(self.incarnation));
                    }
                }
            }
            Err((refusal, reason)) => {
                if self.chain.refused(token) {
                    self.metrics.refused(refusal);
                    tracing::debug!(flow = %self.log.flow(), ?refusal, %reason, "an append was refused");
                    if refusal == Refusal::Full {
                        self.full_since.get_or_insert_with(Instant::now);
                    }
                }
            }
        }
    }

    /// A record of ours is in the log.
    fn count_stored(&mut self, append: &Append, sequence: u64) {
        let kind = &append.record.kind;
        self.metrics.appended(append.stored_bytes);
        self.shared.in_flight.send_modify(|count| *count = count.saturating_sub(1));
        self.acked.sequence = self.acked.sequence.max(sequence);
        if !matches!(kind, RecordKind::Resume { .. }) {
            self.acked.position = kind.to().unwrap_or(self.acked.position);
            self.acked.complete_to = self.acked.complete_to.max(kind.complete_to());
        }
        if let Some(lsn) = kind.confirmable() {
            self.durability.acknowledged(lsn, Instant::now());
        }
    }

    /// Shows what changed.
    fn publish_state(&mut self) {
        let now = Instant::now();
        self.shared.acked.send_if_modified(|acked| std::mem::replace(acked, self.acked) != self.acked);
        // With an interval the leader is asked first whether it still has everything.
        if !self.durability.takes_time() {
            self.confirm(now);
        }
        if self.chain.pending() == 0 {
            for settled in self.settling.drain(..) {
                // Whoever asked may have gone.
                let _ = settled.send(());
            }
        }
        if !self.chain.is_full() && self.failures == 0 {
            if let Some(since) = self.full_since.take() {
                self.metrics.full(since.elapsed());
            }
            self.shared.waiting.set(None, now);
        }
    }

    fn confirm(&mut self, now: Instant) {
        let durable = self.durability.poll(now);
        self.shared.durable.send_if_modified(|current| {
            let risen = durable > *current;
            *current = durable.max(*current);
            risen
        });
    }

    /// What is done when nothing came: overdue answers, a full log, the look at the tail, confirmations.
    async fn wake(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.chain.deadline().is_some_and(|deadline| deadline <= now) {
            self.metrics.overdue();
            self.chain.check_deadline(now);
            return Ok(());
        }
        if self.client_connects() != self.connects {
            self.chain.break_off();
            return Ok(());
        }
        let is_full = self.chain.is_full();
        if is_full {
            if now < self.room_checked_at + FULL_POLL {
                return Ok(());
            }
            self.full_since.get_or_insert(now);
        }
        // A full log does not end this: it is what Postgres keeps its WAL for.
        let confirms = self.durability.due_at().is_some_and(|due| due <= now);
        let age = now.duration_since(self.tail_checked_at);
        if is_full || age >= self.takeover.options.tail_check_interval || (confirms && age >= CONFIRM_INTERVAL) {
            let is_whole = self.check_tail().await;
            if is_whole && confirms {
                self.confirm(now);
            }
        }
        Ok(())
    }

    fn client_connects(&self) -> u64 {
        self.log.connections().publish.statistics().connects.load(Ordering::Relaxed)
    }

    /// Asks the leader whether it is the same and has what was acknowledged. Returns whether it says so.
    async fn check_tail(&mut self) -> bool {
        let asked_at = Instant::now();
        (self.tail_checked_at, self.room_checked_at) = (asked_at, asked_at);
        let info = match self.log.info().await {
            Ok(info) => info,
            Err(error) => {
                self.unanswered(&error, asked_at);
                return false;
            }
        };
        // With nothing on its way, a sequence that is not ours means that somebody fenced: an idle owner hears of it here.
        let is_foreign = self.chain.pending() == 0 && info.last_sequence != self.chain.predicted();
        if is_foreign || info.leader != self.leader || info.last_sequence < self.acked.sequence {
            self.chain.break_off();
            return false;
        }
        self.chain.set_room(room(&info).saturating_sub(self.chain.in_flight_bytes()));
        if self.chain.is_full() {
            self.shared.waiting.set(Some(Wait::Full), self.full_since.unwrap_or(asked_at));
        }
        true
    }

    /// The leader did not say how it stands. An open log finds that out with its next append; a full one sends none, and its owner may
    /// be the one who is cut off, or the log may be gone.
    fn unanswered(&mut self, error: &StagingError, asked_at: Instant) {
        if !self.chain.is_full() {
            return;
        }
        if error.is_transient() {
            self.shared.waiting.set(Some(Wait::Unreachable), asked_at);
        } else {
            self.chain.break_off();
        }
    }

    /// Settles, reads the log, and mends the chain. Returns an error only when this owner must end.
    async fn resync(&mut self) -> Result<()> {
        self.metrics.resync();
        self.durability.hold();
        let started = Instant::now();
        let (wait, since) = self.full_since.map_or((Wait::Resync, started), |since| (Wait::Full, since));
        self.shared.waiting.set(Some(wait), since);
        self.settle().await;
        let (mut lost_since, mut missing_since) = (None::<Instant>, None::<Instant>);
        let mut delay = BACKOFF_FIRST;
        loop {
            if self.commands.is_closed() {
                return Err(StagingError::Closed { flow: self.log.flow().clone() });
            }
            let connects = self.client_connects();
            match self.read_log().await {
                Ok((tail, info)) => {
                    missing_since = None;
                    let are_others = self.connects != connects || self.leader != info.leader;
                    match self.mend(&tail, &info) {
                        Ok(()) => {
                            self.connects = connects;
                            if are_others {
                                self.shared.moves.send_modify(|count| *count += 1);
                            }
                            break;
                        }
                        Err(Lost) if !info.has_quorum => lost_since = None,
                        Err(Lost) => {
                            let since = *lost_since.get_or_insert_with(Instant::now);
                            if since.elapsed() >= self.takeover.options.loss_confirmed_after {
                                let (flow, acked) = (self.log.flow().clone(), self.acked.position);
                                return Err(StagingError::TailLost { flow, log_end: tail.end, acked });
                            }
                        }
                    }
                }
                Err(error @ StagingError::Missing { .. }) => {
                    if missing_since.get_or_insert_with(Instant::now).elapsed() >= MISSING_CONFIRMED_AFTER {
                        return Err(error);
                    }
                }
                Err(error) if error.is_transient() => {
                    tracing::debug!(flow = %self.log.flow(), %error, "the log's end cannot be read yet");
                    self.shared.waiting.set(Some(Wait::Unreachable), Instant::now());
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(BACKOFF_MAX);
        }
        self.durability.release();
        self.shared.waiting.set(Some(wait), since);
        let backoff = match self.failures {
            0 => Duration::ZERO,
            failures => (BACKOFF_FIRST * 2u32.pow(failures.min(8))).min(BACKOFF_MAX),
        };
        self.failures = self.failures.saturating_add(1);
        if self.chain.pending() == 0 {
            // Nothing is left whose answer could show that all is well: it is.
            self.failures = 0;
        }
        self.hold_until = Some(Instant::now() + backoff);
        Ok(())
    }

    /// Waits until every answer is in or overdue.
    async fn settle(&mut self) {
        loop {
            if self.chain.is_settled(Instant::now()) {
                return;
            }
            let deadline = self.chain.deadline().unwrap_or_else(Instant::now);
            match tokio::time::timeout_at(deadline, self.answers.next()).await {
                Ok(Some(answer)) => self.take_answer(&answer),
                Ok(None) => return,
                Err(_) => self.chain.expire(Instant::now()),
            }
        }
    }

    /// Fences first: an owner that was fenced must not read on. Then the state, then the tail, all from the leader.
    async fn read_log(&mut self) -> Result<(Tail, LogInfo)> {
        let known = self.fences.last().map_or(0, |fence| fence.sequence);
        self.fences.extend(tail::read_fences(&self.log, known).await?);
        let (epoch, nonce, flow) = (self.takeover.epoch, self.takeover.nonce, self.log.flow());
        match standing(&self.fences, epoch, nonce) {
            Standing::Fenced(by) => return Err(StagingError::Fenced { flow: flow.clone(), mine: epoch, by }),
            Standing::Taken => return Err(StagingError::EpochTaken { flow: flow.clone(), epoch }),
            Standing::Owner { .. } | Standing::Absent => {}
        }
        let info = self.log.info().await?;
        if info.last_sequence < known {
            // The tail was lost, fences with it, and their sequences come again.
            self.fences = tail::read_fences(&self.log, 0).await?;
        }
        let tail = tail::read_at(&self.log, &self.fences, &info).await?;
        Ok((tail, info))
    }

    fn mend(&mut self, tail: &Tail, info: &LogInfo) -> Result<(), Lost> {
        let has_ours = tail.written_by == Some(self.takeover.epoch);
        let view = LogView { last_sequence: tail.last_sequence, end: tail.end, has_ours };
        let found = self.chain.resynced(view)?;
        for append in &found {
            self.count_stored(append, tail.last_sequence);
        }
        self.leader.clone_from(&info.leader);
        self.chain.set_room(room(info));
        self.tail_checked_at = Instant::now();
        self.room_checked_at = self.tail_checked_at;
        tracing::debug!(flow = %self.log.flow(), found = found.len(), left = self.chain.pending(), end = ?tail.end, "read the log's end again");
        Ok(())
    }
}

/// What data may still take.
fn room(info: &LogInfo) -> u64 {
    info.max_bytes.saturating_sub(RESERVE_BYTES).saturating_sub(info.bytes)
}

#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    err_code: u32,
    #[serde(default)]
    description: String,
}

/// Reads the answer to a publish: the sequence, or why it was refused.
pub(crate) fn answer_of(message: &Message) -> Result<u64, (Refusal, String)> {
    if message.status == Some(async_nats::StatusCode::NO_RESPONDERS) {
        return Err((Refusal::Other, "no stream takes the subject: the log has no leader, or is gone".to_owned()));
    }
    match serde_json::from_slice::<PubAck>(&message.payload) {
        Ok(PubAck { error: None, seq }) if seq > 0 => Ok(seq),
        Ok(PubAck { error: Some(error), .. }) => {
            let refusal = match (error.code, error.err_code) {
                (_, 10071 | 10164) => Refusal::Chain,
                (_, 10077) if error.description.contains("maximum bytes") => Refusal::Full,
                // The account's or the server's own limit.
                (_, 10002 | 10023 | 10047) => Refusal::Full,
                (429, _) => Refusal::Busy,
                _ => Refusal::Other,
            };
            Err((refusal, format!("{} ({})", error.description, error.err_code)))
        }
        _ => Err((Refusal::Other, "the answer is not an acknowledgement".to_owned())),
    }
}
