//! The append chain, without I/O: what is sent with which expected sequence, what the answers mean, what is left after a
//! resync.
//!
//! Each message expects the sequence of the one before it, predicted, so that many are in flight and one refusal refuses
//! all later ones. One exception: a foreign fence takes a sequence, and a later append may find the one it expects behind
//! it. Its link ([`Link`]) shows that to every reader; here it counts as refused like the one before it. After anything but the expected answer the chain is *broken*: nothing is sent until every answer is
//! in or overdue, and the log has been read. What an error meant is never guessed.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use tokio::time::Instant;
use tracing::Span;
use wallaby_model::{Position, Record, RecordKind};

use crate::record::{self, Incarnation, Link, Staged};
use crate::rule::WINDOW_COUNT_MAX;

/// One message to append.
#[derive(Clone, Debug)]
pub struct Append {
    /// What it says.
    pub record: Record,
    /// The same as headers, without the expected sequence.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// What it takes of the stream's `max_bytes`, at most.
    pub stored_bytes: u64,
    /// Ends with the message: once it is acknowledged, or given up.
    pub span: Span,
}

impl Append {
    fn to(&self) -> Position {
        self.record.kind.to().unwrap_or(Position::ZERO)
    }

    fn is_resume(&self) -> bool {
        matches!(self.record.kind, RecordKind::Resume { .. })
    }

    fn is_data(&self) -> bool {
        matches!(self.record.kind, RecordKind::Data { .. } | RecordKind::Splice { .. })
    }
}

/// How much may be in flight.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Messages; at most [`WINDOW_COUNT_MAX`].
    pub count: usize,
    /// Bytes; a single message may be larger.
    pub bytes: u64,
}

/// A message that is to be sent now.
#[derive(Debug)]
pub struct Send<'a> {
    /// Names the answer.
    pub token: u64,
    /// The sequence that the stream must have when it arrives.
    pub expected: u64,
    /// Its place in the chain.
    pub link: Link,
    /// The message.
    pub append: &'a Append,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Awaited,
    Stored,
    Refused,
}

#[derive(Debug)]
struct InFlight {
    sent_at: Instant,
    deadline: Instant,
    expected: u64,
    link: Link,
    answer: Answer,
}

/// What the log said at a resync.
#[derive(Clone, Copy, Debug)]
pub struct LogView {
    /// Its last sequence.
    pub last_sequence: u64,
    /// Its end.
    pub end: Option<Position>,
    /// Whether it holds a record of ours.
    pub has_ours: bool,
}

/// A message that is in the log.
#[derive(Debug)]
pub struct Stored {
    /// The message.
    pub append: Append,
    /// Its sequence.
    pub sequence: u64,
    /// Its place in the chain.
    pub link: Link,
    /// When it was sent.
    pub sent_at: Instant,
}

/// The log ends before what it acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

/// The chain of one owner.
#[derive(Debug)]
pub struct Chain {
    window: Window,
    /// Everything that is not known to be in the log, in order; the first `in_flight.len()` were sent.
    queue: VecDeque<Append>,
    queue_bytes: u64,
    in_flight: VecDeque<InFlight>,
    /// The token of `queue[0]`, once sent.
    front_token: u64,
    /// The last sequence of the stream once everything sent is stored.
    predicted: u64,
    /// Where the last stored record ends.
    stored_to: Option<Position>,
    /// Whether a record of ours is known to be stored.
    has_stored: bool,
    is_broken: bool,
    /// Until the first answer after a resync one message is sent and no more.
    is_probing: bool,
    /// Bytes that data may still take.
    room: u64,
    /// The place of the next message.
    link: Link,
}

impl Chain {
    /// A chain on a log that was just read.
    pub fn new(mut window: Window, last_sequence: u64, end: Option<Position>) -> Chain {
        window.count = window.count.clamp(1, WINDOW_COUNT_MAX);
        Chain {
            window,
            queue: VecDeque::with_capacity(window.count),
            queue_bytes: 0,
            in_flight: VecDeque::with_capacity(window.count),
            front_token: 0,
            predicted: last_sequence,
            stored_to: end,
            has_stored: false,
            is_broken: false,
            is_probing: true,
            room: u64::MAX,
            link: Link::first(),
        }
    }

    /// Whether one more message may be taken.
    pub fn has_room(&self) -> bool {
        self.queue.is_empty() || (self.queue.len() < self.window.count && self.queue_bytes < self.window.bytes)
    }

    /// Takes a message. The caller checked that it continues the one before.
    pub fn push(&mut self, append: Append) {
        self.queue_bytes += append.stored_bytes;
        self.queue.push_back(append);
    }

    /// Messages that are not known to be stored.
    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// The last sequence of the stream once everything sent is stored.
    pub fn predicted(&self) -> u64 {
        self.predicted
    }

    /// Where the last record ends that is known to be stored.
    pub fn stored_to(&self) -> Option<Position> {
        self.stored_to
    }

    /// Whether nothing may be sent before a resync.
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Breaks the chain from outside: the connection was made anew, the leader changed.
    pub fn break_off(&mut self) {
        self.is_broken = true;
    }

    /// Says how many bytes data may still take.
    pub fn set_room(&mut self, bytes: u64) {
        self.room = bytes;
    }

    /// Whether the next message is data that does not fit into the room that is left.
    pub fn is_full(&self) -> bool {
        self.queue.get(self.in_flight.len()).is_some_and(|next| next.is_data() && next.stored_bytes > self.room)
    }

    /// The next message to send, if there is one and it may go. It counts as sent.
    pub fn next(&mut self, now: Instant, timeout: Duration) -> Option<Send<'_>> {
        let at = self.in_flight.len();
        if self.is_broken || at >= self.queue.len() || (self.is_probing && at > 0) || self.is_full() {
            return None;
        }
        let expected = self.predicted;
        self.predicted += 1;
        let link = self.link;
        self.link = link.next();
        self.in_flight.push_back(InFlight {
            sent_at: now,
            deadline: now + timeout,
            expected,
            link,
            answer: Answer::Awaited,
        });
        let append = &self.queue[at];
        self.room = self.room.saturating_sub(append.stored_bytes);
        Some(Send { token: self.front_token + at as u64, expected, link, append })
    }

    /// A message was stored with this sequence. Returns what is known to be stored by that, in order.
    pub fn stored(&mut self, token: u64, sequence: u64) -> Vec<Stored> {
        let Some(in_flight) = self.find(token) else {
            return Vec::new();
        };
        if in_flight.expected + 1 != sequence {
            // Somebody wrote between, and the check did not see it: only reading the log can tell.
            in_flight.answer = Answer::Refused;
            self.is_broken = true;
            return Vec::new();
        }
        in_flight.answer = Answer::Stored;
        let mut done = Vec::new();
        while let Some(front) = self.in_flight.front()
            && front.answer == Answer::Stored
        {
            let (sequence, link, sent_at) = (front.expected + 1, front.link, front.sent_at);
            self.in_flight.pop_front();
            if let Some(append) = self.pop() {
                self.front_token += 1;
                done.push(Stored { append, sequence, link, sent_at });
            }
        }
        self.is_probing = false;
        done
    }

    /// A message was refused. Returns whether the answer was awaited.
    pub fn refused(&mut self, token: u64) -> bool {
        let Some(in_flight) = self.find(token) else {
            return false;
        };
        in_flight.answer = Answer::Refused;
        self.is_broken = true;
        true
    }

    /// When the oldest answer is overdue.
    pub fn deadline(&self) -> Option<Instant> {
        self.in_flight.iter().find(|sent| sent.answer == Answer::Awaited).map(|sent| sent.deadline)
    }

    /// Breaks the chain when an answer is overdue.
    pub fn check_deadline(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.is_broken = true;
        }
    }

    /// Gives up waiting for answers that are overdue.
    pub fn expire(&mut self, now: Instant) {
        for sent in &mut self.in_flight {
            if sent.answer == Answer::Awaited && sent.deadline <= now {
                sent.answer = Answer::Refused;
                self.is_broken = true;
            }
        }
    }

    /// What is in flight, in bytes of the stream.
    pub fn in_flight_bytes(&self) -> u64 {
        self.queue.iter().take(self.in_flight.len()).map(|append| append.stored_bytes).sum()
    }

    /// Whether every answer is in or overdue.
    pub fn is_settled(&self, now: Instant) -> bool {
        self.in_flight.iter().all(|sent| sent.answer != Answer::Awaited || sent.deadline <= now)
    }

    /// Mends a broken and settled chain with what the log says. Returns what turned out to be in the log, in order; the rest
    /// is sent again, from memory.
    ///
    /// # Errors
    /// `Lost` when the log ends before what it acknowledged. The chain stays broken.
    pub fn resynced(&mut self, view: LogView) -> Result<Vec<Append>, Lost> {
        if view.end < self.stored_to || (self.has_stored && !view.has_ours) {
            return Err(Lost);
        }
        self.front_token += self.in_flight.len() as u64;
        self.in_flight.clear();
        let mut done = Vec::new();
        while let Some(front) = self.queue.front() {
            // A resume moves no position. It is the first record of its owner, so any record of ours proves it.
            let is_there = if front.is_resume() { view.has_ours } else { Some(front.to()) <= view.end };
            if !is_there {
                break;
            }
            done.extend(self.pop());
        }
        self.predicted = view.last_sequence;
        self.is_broken = false;
        self.is_probing = true;
        self.link = Link::first();
        Ok(done)
    }

    fn pop(&mut self) -> Option<Append> {
        let append = self.queue.pop_front()?;
        self.queue_bytes -= append.stored_bytes;
        self.stored_to = self.stored_to.max(append.record.kind.to());
        self.has_stored = true;
        Some(append)
    }

    fn find(&mut self, token: u64) -> Option<&mut InFlight> {
        let at = usize::try_from(token.checked_sub(self.front_token)?).ok()?;
        self.in_flight.get_mut(at).filter(|sent| sent.answer == Answer::Awaited)
    }
}

impl Stored {
    /// The record as a reader will see it.
    pub fn staged(self, incarnation: Incarnation) -> Staged {
        let Append { record, headers, body, .. } = self.append;
        let traceparent = record::traceparent(&headers);
        let (incarnation, link) = (Some(incarnation), Some(self.link));
        Staged { sequence: self.sequence, incarnation, link, traceparent, record, body }
    }
}
