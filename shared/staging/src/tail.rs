//! The end of the log: what the reader rule gives over its tail, read from the leader.
//!
//! Never the header of the last message as such: that may be a fence, or void, or an orphan. The walk goes back from the last message
//! to a record that every reader accepted: its epoch was the highest fenced one at its place, and it begins a chain, or
//! stands in one with more records after it than can be orphans. From there the rule runs forward.

use wallaby_model::{Epoch, Nonce, Position, RecordKind};

use crate::error::{Result, StagingError};
use crate::log::Log;
use crate::record::{Incarnation, Link, Staged};
use crate::rule::{ReaderState, Verdict, WINDOW_COUNT_MAX};

/// Messages beside fences that are looked at before the walk gives up.
const WALK_MAX: usize = 4096;
/// Valid records over which the end of the last whole transaction is looked for.
const COMPLETE_DEPTH: usize = 64;

/// A fence in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FenceAt {
    /// Its sequence.
    pub sequence: u64,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its nonce.
    pub nonce: Nonce,
}

/// Where the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Tail {
    /// The log's epoch: the highest fence, or that of the newest record.
    pub epoch: Option<Epoch>,
    /// The end; `None` when the log carries no position.
    pub end: Option<Position>,
    /// The end of the last whole transaction. `None` when it was not found: then nothing of the tail is known to be one.
    pub complete_to: Option<Position>,
    /// The log's present life.
    pub incarnation: Option<Incarnation>,
    /// The epoch of the newest record that was accepted.
    pub written_by: Option<Epoch>,
    /// The last sequence that the stream gave.
    pub last_sequence: u64,
}

/// The walk back, without I/O: takes the messages from the last one on, newest first.
#[derive(Debug)]
pub struct TailWalk<'a> {
    fences: &'a [FenceAt],
    /// Newest first.
    kept: Vec<Staged>,
    valid: usize,
    run: ChainRun,
    is_certain: bool,
}

/// Whether the reader rule may begin at a record: told going back, newest first. It may where a chain begins, because its owner
/// read where the log ends and had nothing else in flight, and where more records of one chain follow without a
/// break than can be orphans.
#[derive(Debug, Default)]
pub struct ChainRun {
    length: usize,
    newer: Option<Link>,
}

impl ChainRun {
    /// Takes the next older message; a fence, and a record that is void, count as no link.
    pub fn push(&mut self, link: Option<Link>) -> bool {
        let Some(link) = link else {
            *self = ChainRun::default();
            return false;
        };
        let continues = self.newer.is_none_or(|newer| link.next() == newer);
        self.length = if continues { self.length + 1 } else { 1 };
        self.newer = Some(link);
        link.index == 0 || self.length > WINDOW_COUNT_MAX
    }
}

impl<'a> TailWalk<'a> {
    /// A walk that knows all fences of the stream, in order of sequence.
    pub fn new(fences: &'a [FenceAt]) -> TailWalk<'a> {
        TailWalk { fences, kept: Vec::new(), valid: 0, run: ChainRun::default(), is_certain: false }
    }

    /// The epoch that is valid for records right after `sequence`.
    fn epoch_before(&self, sequence: u64) -> Option<Epoch> {
        self.fences.iter().filter(|fence| fence.sequence < sequence).map(|fence| fence.epoch).max()
    }

    /// Takes the next older message. Returns whether older ones are needed.
    pub fn push(&mut self, mut staged: Staged) -> bool {
        let is_void = self.epoch_before(staged.sequence).is_some_and(|epoch| staged.record.epoch < epoch);
        let link = if is_void { None } else { staged.link };
        self.is_certain = self.run.push(link);
        self.valid += usize::from(link.is_some());
        // The rows are not needed.
        staged.body = bytes::Bytes::new();
        self.kept.push(staged);
        !self.is_certain || (self.valid < COMPLETE_DEPTH && self.lacks_complete_to())
    }

    /// Nothing older is looked at. An end that is not certain is no end: it would count as that of an empty log.
    fn give_up(&self, log: &Log) -> Result<()> {
        if self.is_certain {
            return Ok(());
        }
        let reason = format!("its newest {WALK_MAX} records do not show where its last chain begins");
        Err(StagingError::unavailable(format!("the tail of {}", log.stream()), reason))
    }

    fn lacks_complete_to(&self) -> bool {
        self.judge().is_ok_and(|(state, _)| whole_of(&state).is_none())
    }

    /// Runs the rule over what was taken.
    fn judge(&self) -> Result<(ReaderState, Option<Epoch>), (u64, Position, Position)> {
        let mut state = ReaderState::anywhere();
        let oldest = self.kept.last().map_or(u64::MAX, |staged| staged.sequence);
        state.epoch = self.epoch_before(oldest);
        let mut written_by = None;
        for staged in self.kept.iter().rev() {
            match state.observe(staged) {
                Verdict::Gap { end, from } => return Err((staged.sequence, end.unwrap_or(Position::ZERO), from)),
                Verdict::Accept { .. } | Verdict::Resumed { .. } => written_by = Some(staged.record.epoch),
                Verdict::Fence | Verdict::Drop(_) => {}
            }
        }
        Ok((state, written_by))
    }

    /// Where the log ends by what was taken.
    ///
    /// # Errors
    /// The sequence, end and beginning of a gap.
    pub fn finish(self, last_sequence: u64) -> Result<Tail, (u64, Position, Position)> {
        let (state, written_by) = self.judge()?;
        Ok(Tail {
            epoch: state.epoch.max(self.epoch_before(u64::MAX)),
            end: state.end,
            complete_to: whole_of(&state),
            incarnation: state.incarnation,
            written_by,
            last_sequence,
        })
    }
}

/// The end of the last whole transaction: between transactions everything before is whole.
fn whole_of(state: &ReaderState) -> Option<Position> {
    state.complete_to.max(state.end.filter(Position::is_between_transactions))
}

/// All fences with a sequence above `after`, from the leader, in order.
///
/// # Errors
/// `Missing`, `Record`, `Unavailable`.
pub(crate) async fn read_fences(log: &Log, after: u64) -> Result<Vec<FenceAt>> {
    let mut fences = Vec::new();
    let mut from = after + 1;
    while let Some(message) = log.leader().next_on(log, log.fence_subject(), from).await? {
        let staged = message.staged;
        if staged.sequence < from {
            return Err(StagingError::unavailable(
                format!("the fences of {}", log.stream()),
                format!("asked for those from {from} on, its leader gave {}", staged.sequence),
            ));
        }
        if let RecordKind::Fence { nonce } = staged.record.kind {
            fences.push(FenceAt { sequence: staged.sequence, epoch: staged.record.epoch, nonce });
        }
        from = staged.sequence + 1;
    }
    Ok(fences)
}

/// Reads the end of the log. `fences` are all of them, read before.
///
/// # Errors
/// `Gap` when the tail has one; `Missing`, `Record`, `Unavailable`.
pub(crate) async fn read(log: &Log, fences: &[FenceAt]) -> Result<Tail> {
    let info = log.info().await?;
    read_at(log, fences, &info).await
}

/// As [`read`], with the stream's state read before.
pub(crate) async fn read_at(log: &Log, fences: &[FenceAt], info: &crate::log::LogInfo) -> Result<Tail> {
    let last = info.last_sequence;
    let mut walk = TailWalk::new(fences);
    let mut read = 0;
    if info.messages > 0 {
        for sequence in (info.first_sequence.max(1)..=last).rev() {
            match log.leader().message(log, sequence).await? {
                Some(message) => {
                    // Where an owner came no further, however many tries it took, there are fences only.
                    read += usize::from(!matches!(message.staged.record.kind, RecordKind::Fence { .. }));
                    let needs_older = walk.push(message.staged);
                    if !needs_older {
                        break;
                    }
                    if read == WALK_MAX {
                        walk.give_up(log)?;
                        break;
                    }
                }
                // The state and the messages must come from one leader: the last message of the state has to be there.
                None if sequence == last => {
                    return Err(StagingError::unavailable(
                        format!("the tail of {}", log.stream()),
                        format!("its last message, {last}, is not there (yet): the log changes its leader"),
                    ));
                }
                None => {}
            }
        }
    }
    walk.finish(last).map_err(|(sequence, end, from)| StagingError::Gap {
        flow: log.flow().clone(),
        sequence,
        end,
        from,
    })
}
