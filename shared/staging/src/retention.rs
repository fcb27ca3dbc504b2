//! What goes from the log, what stays, and what it means when a tail came back shorter.
//!
//! The capture's owner purges up to the lowest hold (the holds are etcd's, the point is given), but never the newest record that
//! carries a position: an idle log that was purged still knows where it ends (hazard 10).

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use wallaby_model::{Position, RecordKind};

use crate::error::{Result, StagingError};
use crate::leader::{Leader, LeaderMessage};
use crate::log::Log;
use crate::metrics;
use crate::tail::ChainRun;

/// Places that are remembered, so that a search asks a few times and not twenty.
const REMEMBERED: usize = 256;

/// Where a position stands in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The first record that ends past the position.
    Holds {
        /// A record before it where the reader rule may begin, so that it knows what is an orphan. `None`: it is the first.
        before: Option<u64>,
        sequence: u64,
        /// Where it begins.
        from: Position,
    },
    /// No record ends past it.
    AtEnd {
        /// A record where the reader rule may begin.
        before: Option<u64>,
        /// The newest record that carries a position. It may have come after `next` was asked for.
        newest: Option<u64>,
        /// The sequence that came next when it was looked.
        next: u64,
    },
}

/// Where a record begins: a resume begins where it ends.
fn from_of(message: &LeaderMessage) -> Option<Position> {
    match message.staged.record.kind {
        RecordKind::Fence { .. } => None,
        RecordKind::Resume { position, .. } => Some(position),
        RecordKind::Data { from, .. } | RecordKind::Splice { from, .. } | RecordKind::Heartbeat { from, .. } => {
            Some(from)
        }
    }
}

/// Finds the first record that ends past `position`, by halving. Ends ascend with the sequence; where they do not, after a
/// rewind, the record that is found still follows its predecessor, and the reader rule does the rest. `known` bounds the search:
/// a sequence before which everything ends at or before `position`, and one from which on everything ends past it.
/// Where owners met, positions do not ascend for a stretch (orphans, then the same again): whatever is found there, what a
/// reader needs stands at or after [`Place::Holds::before`].
pub(crate) async fn locate(log: &Log, leader: &Leader, position: Position, known: Option<(u64, u64)>) -> Result<Place> {
    let info = leader.info(log).await?;
    let (first, next) = (info.state.first_sequence.max(1), info.state.last_sequence + 1);
    let (mut low, mut high) = (first, next);
    if let Some((not_before, not_after)) = known {
        low = low.max(not_before);
        high = high.min(not_after.max(low));
    }
    let mut found: Option<LeaderMessage> = None;
    if high < next {
        found = leader.next_on(log, log.data_subject(), high).await?;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        match leader.next_on(log, log.data_subject(), middle).await? {
            Some(message) if message.staged.sequence < high => {
                if message.staged.record.kind.to().is_some_and(|to| to <= position) {
                    low = message.staged.sequence + 1;
                } else {
                    high = middle;
                    found = Some(message);
                }
            }
            // Nothing that carries a position stands from the middle on.
            _ => high = middle,
        }
    }
    let Some(found) = found else {
        let newest = leader.last_on(log, log.data_subject()).await?;
        let newest = newest.map(|message| message.staged.sequence);
        let before = place_before(log, leader, next, first).await?;
        return Ok(Place::AtEnd { before, newest, next });
    };
    let sequence = found.staged.sequence;
    let from = from_of(&found).unwrap_or(Position::ZERO);
    let before = place_before(log, leader, sequence, first).await?;
    Ok(Place::Holds { before, sequence, from })
}

/// The newest record before `sequence` at which the reader rule may begin; the oldest record when there is none such.
async fn place_before(log: &Log, leader: &Leader, sequence: u64, first: u64) -> Result<Option<u64>> {
    let mut run = ChainRun::default();
    let mut oldest = None;
    for before in (first..sequence).rev() {
        let Some(message) = leader.message(log, before).await? else {
            continue;
        };
        if message.staged.record.kind.to().is_some() {
            oldest = Some(before);
        }
        if run.push(message.staged.link) {
            break;
        }
    }
    Ok(oldest)
}

/// Where the log begins: what it holds comes after this. `None` when no record of it carries a position.
///
/// # Errors
/// `Unavailable`, `Missing`, `Record`.
pub async fn log_begins(log: &Log) -> Result<Option<Position>> {
    let leader = log.leader();
    let first = leader.info(log).await?.state.first_sequence.max(1);
    let oldest = leader.next_on(log, log.data_subject(), first).await?;
    Ok(oldest.as_ref().and_then(from_of))
}

/// What a purge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purged {
    /// Records that went.
    pub records: u64,
    /// The first sequence that is kept.
    pub kept_from: u64,
}

/// Purges one log. The holder of the capture lock has one.
#[derive(Debug)]
pub struct Retention {
    log: Log,
    /// Sequence and end of records seen, ascending in both.
    places: VecDeque<(u64, Position)>,
    /// Of the places that come, one in so many is kept.
    stride: u64,
    seen: u64,
}

impl Retention {
    /// For the log of one flow; no I/O.
    pub fn new(log: &Log) -> Retention {
        Retention { log: log.clone(), places: VecDeque::with_capacity(REMEMBERED), stride: 1, seen: 0 }
    }

    /// Remembers that the record with this sequence ends here, from the owner's acknowledgements. Optional: it only spares
    /// questions.
    pub fn note(&mut self, sequence: u64, end: Position) {
        self.seen += 1;
        if !self.seen.is_multiple_of(self.stride) {
            return;
        }
        if self.places.back().is_some_and(|last| sequence <= last.0 || end < last.1) {
            // Numbered anew: what was remembered means nothing.
            self.places.clear();
            self.stride = 1;
        }
        self.places.push_back((sequence, end));
        if self.places.len() >= REMEMBERED {
            let mut keep = false;
            self.places.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
    }

    /// Removes what ends at or before `up_to` and is older than the replay window. A few records before the one
    /// that holds it stay, and so does the newest record that carries a position.
    ///
    /// `up_to` is the purge point that was written to etcd under the lock before. With the log short of room the caller gives
    /// a window of zero.
    ///
    /// # Errors
    /// `Unavailable` when the leader does not answer; nothing is lost by trying again later.
    pub async fn purge(&mut self, up_to: Position, replay_window: Duration, now: SystemTime) -> Result<Purged> {
        let (log, leader) = (&self.log, self.log.leader());
        let bounds = self.bounds(up_to);
        let place = match locate(log, leader, up_to, bounds).await? {
            // The remembered places may lie after a loss; what is found must hold the position, or nothing is removed by it.
            Place::Holds { from, before: Some(_), .. } if bounds.is_some() && from > up_to => {
                self.places.clear();
                locate(log, leader, up_to, None).await?
            }
            place => place,
        };
        let mut keep_from = match place {
            // What stands before it stays: behind a hole that a fence made only that tells where the log went on.
            Place::Holds { before, sequence, .. } => before.unwrap_or(sequence),
            // What came since the end was looked for ends past the position: it stays, and so the newest does too.
            Place::AtEnd { newest: Some(newest), next, .. } => newest.min(next),
            Place::AtEnd { newest: None, .. } => return Ok(Purged { records: 0, kept_from: 0 }),
        };
        if !replay_window.is_zero() {
            keep_from = self.oldest_within(keep_from, now.checked_sub(replay_window)).await?;
        }
        let info = leader.info(log).await?;
        if keep_from <= info.state.first_sequence {
            return Ok(Purged { records: 0, kept_from: info.state.first_sequence });
        }
        let stream = leader.context.get_stream_no_info(log.stream()).await;
        let stream = stream.map_err(|error| StagingError::unavailable(format!("purging {}", log.stream()), error))?;
        // Everything below this sequence goes.
        let purged = stream.purge().sequence(keep_from).await;
        let purged = purged.map_err(|error| StagingError::unavailable(format!("purging {}", log.stream()), error))?;
        metrics::purged(log.flow(), purged.purged);
        while self.places.len() > 1 && self.places[1].0 <= keep_from {
            self.places.pop_front();
        }
        Ok(Purged { records: purged.purged, kept_from: keep_from })
    }

    /// What the remembered places say of a position: everything before the first ends at or before it, everything from the second
    /// on past it.
    fn bounds(&self, position: Position) -> Option<(u64, u64)> {
        let after = self.places.partition_point(|(_, end)| *end <= position);
        let low = if after == 0 { 1 } else { self.places[after - 1].0 };
        let high = self.places.get(after).map_or(u64::MAX, |(sequence, _)| *sequence);
        (!self.places.is_empty()).then_some((low, high))
    }

    /// The first record, no later than `limit`, that was stored at or after `since`.
    async fn oldest_within(&self, limit: u64, since: Option<SystemTime>) -> Result<u64> {
        let Some(since) = since else {
            return Ok(1);
        };
        let leader = self.log.leader();
        let info = leader.info(&self.log).await?;
        let (mut low, mut high) = (info.state.first_sequence.max(1), limit);
        while low < high {
            let middle = low + (high - low) / 2;
            match leader.next_on(&self.log, self.log.data_subject(), middle).await? {
                Some(message) if message.staged.sequence < high && message.stored_at < since => {
                    low = message.staged.sequence + 1;
                }
                _ => high = middle,
            }
        }
        Ok(low)
    }
}

/// What is claimed about a log's end, by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TailClaims {
    /// Where the log ends, by [`Log::tail`].
    pub log_end: Option<Position>,
    /// What this worker saw acknowledged, if it wrote before.
    pub acked: Option<Position>,
    /// The capture's checkpoint in etcd.
    pub checkpoint: Option<Position>,
    /// The sink that is furthest.
    pub furthest_sink: Option<Position>,
    /// What Postgres was told: its slot's `confirmed_flush_lsn`, as `(L, 0)`.
    pub confirmed: Option<Position>,
}

/// What to make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TailVerdict {
    /// Nothing was ever staged: the first resume is `(confirmed_flush, 0)`.
    First,
    /// Nothing is missing: resume at the log's end.
    Whole {
        /// It.
        end: Position,
    },
    /// A tail was lost, and Postgres still has it: resume with rewind at the log's end and publish it again.
    Rewind {
        /// The log's end.
        end: Position,
        /// How far it had been.
        claimed: Position,
    },
    /// What was lost was confirmed to Postgres, which may not have it any more: stop, name it, offer repair runs.
    Lost {
        /// Where the log ends; `None` when it carries no position at all.
        end: Option<Position>,
        /// How far it had been.
        claimed: Position,
    },
}

/// Compares the log's end with everything that was said of it. Before each resume.
pub fn judge_tail(claims: &TailClaims) -> TailVerdict {
    let staged = claims.acked.max(claims.checkpoint).max(claims.furthest_sink);
    match (claims.log_end, staged) {
        (None, None) => TailVerdict::First,
        (None, Some(claimed)) => TailVerdict::Lost { end: None, claimed },
        (Some(end), staged) => {
            // Behind what was confirmed: the WAL between may be gone.
            if let Some(confirmed) = claims.confirmed
                && confirmed > end
            {
                return TailVerdict::Lost { end: Some(end), claimed: confirmed };
            }
            match staged {
                Some(claimed) if claimed > end => TailVerdict::Rewind { end, claimed },
                _ => TailVerdict::Whole { end },
            }
        }
    }
}
