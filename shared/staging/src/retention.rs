//! What goes from the log, what stays, and what it means when a tail came back shorter.
//!
//! The capture's owner purges up to the lowest hold (the holds are etcd's, the point is given), but never the newest record that
//! carries a position: an idle log that was purged still knows where it ends (hazard 10).

use std::time::{Duration, SystemTime};

use wallaby_model::{Position, RecordKind};

use crate::error::{Result, StagingError};
use crate::leader::{Leader, LeaderMessage};
use crate::log::Log;
use crate::metrics;
use crate::tail::ChainRun;

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
/// rewind, the record that is found still follows its predecessor, and the reader rule does the rest.
/// Where owners met, positions do not ascend for a stretch (orphans, then the same again): whatever is found there, what a
/// reader needs stands at or after [`Place::Holds::before`].
pub(crate) async fn locate(log: &Log, leader: &Leader, position: Position) -> Result<Place> {
    let info = leader.info(log).await?;
    let (first, next) = (info.state.first_sequence.max(1), info.state.last_sequence + 1);
    let (mut low, mut high) = (first, next);
    let mut found: Option<LeaderMessage> = None;
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

impl Log {
    /// Removes what ends at or before `up_to` and is older than the replay window. A few records before the one
    /// that holds it stay, and so does the newest record that carries a position.
    ///
    /// Only the holder of the capture lock purges. `up_to` is the purge point that was written to etcd under the lock before. With the
    /// log short of room the caller gives a window of zero.
    ///
    /// # Errors
    /// `Unavailable` when the leader does not answer; nothing is lost by trying again later.
    pub async fn purge(&self, up_to: Position, replay_window: Duration, now: SystemTime) -> Result<Purged> {
        let leader = self.leader();
        let mut keep_from = match locate(self, leader, up_to).await? {
            // What stands before it stays: behind a hole that a fence made only that tells where the log went on.
            Place::Holds { before, sequence, .. } => before.unwrap_or(sequence),
            // What came since the end was looked for ends past the position: it stays, and so the newest does too.
            Place::AtEnd { newest: Some(newest), next, .. } => newest.min(next),
            Place::AtEnd { newest: None, .. } => return Ok(Purged { records: 0, kept_from: 0 }),
        };
        if !replay_window.is_zero() {
            keep_from = self.oldest_within(keep_from, now.checked_sub(replay_window)).await?;
        }
        let info = leader.info(self).await?;
        if keep_from <= info.state.first_sequence {
            return Ok(Purged { records: 0, kept_from: info.state.first_sequence });
        }
        let stream = leader.context.get_stream_no_info(self.stream()).await;
        let stream = stream.map_err(|error| StagingError::unavailable(format!("purging {}", self.stream()), error))?;
        // Everything below this sequence goes.
        let purged = stream.purge().sequence(keep_from).await;
        let purged = purged.map_err(|error| StagingError::unavailable(format!("purging {}", self.stream()), error))?;
        metrics::purged(self.flow(), purged.purged);
        Ok(Purged { records: purged.purged, kept_from: keep_from })
    }

    /// The first record, no later than `limit`, that was stored at or after `since`.
    async fn oldest_within(&self, limit: u64, since: Option<SystemTime>) -> Result<u64> {
        let Some(since) = since else {
            return Ok(1);
        };
        let leader = self.leader();
        let info = leader.info(self).await?;
        let (mut low, mut high) = (info.state.first_sequence.max(1), limit);
        while low < high {
            let middle = low + (high - low) / 2;
            match leader.next_on(self, self.data_subject(), middle).await? {
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

#[cfg(test)]
mod tests {
    use super::*;
    use wallaby_model::Lsn;

    #[test]
    fn the_end_of_a_log_is_judged_by_everything_that_was_said_of_it() {
        let at = |lsn| Position::before(Lsn(lsn));
        // The log's end, what was acknowledged, etcd's checkpoint, the furthest sink, what the slot confirmed.
        let judge = |log_end: Option<u64>, [acked, checkpoint, sink, confirmed]: [Option<u64>; 4]| {
            judge_tail(&TailClaims {
                log_end: log_end.map(at),
                acked: acked.map(at),
                checkpoint: checkpoint.map(at),
                furthest_sink: sink.map(at),
                confirmed: confirmed.map(at),
            })
        };
        let lost = |end: Option<u64>, claimed| TailVerdict::Lost { end: end.map(at), claimed: at(claimed) };
        let whole = TailVerdict::Whole { end: at(20) };
        let rewind = |claimed| TailVerdict::Rewind { end: at(20), claimed: at(claimed) };

        // A slot has a position before anything was staged.
        assert_eq!(judge(None, [None, None, None, Some(10)]), TailVerdict::First);
        assert_eq!(judge(None, [None; 4]), TailVerdict::First);

        // Whoever knows of something that was staged, an empty log has lost it.
        assert_eq!(judge(None, [Some(5), None, None, Some(10)]), lost(None, 5));
        assert_eq!(judge(None, [None, Some(5), None, Some(10)]), lost(None, 5));
        assert_eq!(judge(None, [None, None, Some(5), Some(10)]), lost(None, 5));
        assert_eq!(judge(None, [Some(5), Some(7), Some(6), None]), lost(None, 7));

        // Nobody is past its end.
        assert_eq!(judge(Some(20), [None; 4]), whole);
        assert_eq!(judge(Some(20), [None, Some(20), Some(20), Some(20)]), whole);
        assert_eq!(judge(Some(20), [None, Some(15), Some(3), Some(10)]), whole, "a checkpoint may be late");

        // Somebody is, and the source still has what is missing.
        assert_eq!(judge(Some(20), [Some(21), None, None, Some(20)]), rewind(21));
        assert_eq!(judge(Some(20), [None, Some(30), None, Some(20)]), rewind(30));
        assert_eq!(judge(Some(20), [None, Some(20), Some(25), Some(10)]), rewind(25));
        assert_eq!(judge(Some(20), [None, Some(30), None, None]), rewind(30));

        // The source was told that it need not keep it.
        assert_eq!(judge(Some(20), [None, Some(30), Some(30), Some(21)]), lost(Some(20), 21));
        assert_eq!(judge(Some(20), [None, Some(20), None, Some(21)]), lost(Some(20), 21));
        assert_eq!(judge(Some(20), [None, None, None, Some(21)]), lost(Some(20), 21));
    }
}
