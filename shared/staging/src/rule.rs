//! The reader rule: what a reader of the log accepts, trims and drops, and when it must stop.
//!
//! This one function decides for everybody: sinks, the search for the end of the log, the tests. protocol.md, "Reader".

use wallaby_model::{Epoch, Position, RecordKind};

use crate::record::{Incarnation, Link, Staged};

/// The most appends that an owner may have in flight, and so the most orphans that one foreign fence can make.
pub const WINDOW_COUNT_MAX: usize = 32;

/// Why a record is not for the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Written under an epoch that was fenced before it.
    OldEpoch,
    /// The reader has all of it.
    Known,
    /// Stored behind a hole that a foreign record made: its owner saw the refusal and appends again from the hole.
    Orphan,
}

/// What the rule says of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A fence; the state knows it, nobody else needs to.
    Fence,
    /// A resume that fits. It moves no position, except that it is where a reader without one begins.
    Resumed {
        /// An acknowledged tail was lost before the end of this reader and comes again.
        rewound: bool,
    },
    /// Rows or a heartbeat that continue the reader. Rows at or before `after` are not for it.
    Accept {
        /// Where the reader stood.
        after: Position,
    },
    /// Nothing for the reader.
    Drop(Dropped),
    /// Positions are missing. The state did not change; the reader stops and alarms, it never skips.
    Gap {
        /// Where the reader stands; `None` when it wants the first resume and something else comes first.
        end: Option<Position>,
        /// Where the record begins.
        from: Position,
    },
}

/// Where a reader stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReaderState {
    /// The log's epoch, as far as the reader knows: from its checkpoint, fences, and records.
    pub epoch: Option<Epoch>,
    /// The reader has everything up to here.
    pub end: Option<Position>,
    /// The end of the last whole transaction it has.
    pub complete_to: Option<Position>,
    /// The life of the log that it reads.
    pub incarnation: Option<Incarnation>,
    /// Whether a reader without a position may begin at any record, or only at a resume.
    starts_anywhere: bool,
    /// The place of the last record in its owner's chain; `None` before the first record that was met.
    link: Option<Link>,
    /// Whether a fence, or a record of an old owner, stood between that record and here.
    foreign_since: bool,
    /// Orphans since the last record that was accepted.
    orphans: usize,
}

impl ReaderState {
    /// A reader that stands at `end`, with the log's epoch of its checkpoint.
    pub fn at(end: Position, epoch: Option<Epoch>) -> ReaderState {
        ReaderState { epoch, end: Some(end), ..ReaderState::at_first_resume() }
    }

    /// A reader that begins at the first resume.
    pub fn at_first_resume() -> ReaderState {
        ReaderState {
            epoch: None,
            end: None,
            complete_to: None,
            incarnation: None,
            starts_anywhere: false,
            link: None,
            foreign_since: false,
            orphans: 0,
        }
    }

    /// A reader that begins at the first record that it meets.
    pub fn anywhere() -> ReaderState {
        ReaderState { starts_anywhere: true, ..ReaderState::at_first_resume() }
    }

    /// Applies the rule to the next record of the stream.
    pub fn observe(&mut self, staged: &Staged) -> Verdict {
        let record = &staged.record;
        if self.epoch.is_some_and(|epoch| record.epoch < epoch) {
            // Whatever it is, it took a sequence that a chain expected.
            self.foreign_since = true;
            return Verdict::Drop(Dropped::OldEpoch);
        }
        if self.is_orphan(staged.link) {
            self.orphans += 1;
            self.foreign_since = true;
            return Verdict::Drop(Dropped::Orphan);
        }
        let verdict = match &record.kind {
            RecordKind::Fence { .. } => {
                self.foreign_since = true;
                Verdict::Fence
            }
            RecordKind::Resume { position, info } => self.resume(*position, info.rewind),
            RecordKind::Data { from, to, complete_to, .. } => self.advance(*from, *to, *complete_to),
            RecordKind::Splice { from, to } | RecordKind::Heartbeat { from, to } => self.advance(*from, *to, *to),
        };
        if matches!(verdict, Verdict::Gap { .. }) {
            return verdict;
        }
        // An epoch above ours without its fence: the fence stood before the place where we began. An owner appends only
        // after its fence, and nothing older can follow that, so the record proves the epoch.
        self.epoch = Some(record.epoch);
        if let Some(link) = staged.link {
            self.link = Some(link);
            self.foreign_since = false;
            self.orphans = 0;
        }
        if matches!(verdict, Verdict::Resumed { .. } | Verdict::Accept { .. }) && staged.incarnation.is_some() {
            self.incarnation = staged.incarnation;
        }
        verdict
    }

    /// Whether a record stands behind a hole in its chain that a foreign record explains. It is left out also where its position
    /// would fit: the log does not end behind it, and its owner appends it again. A hole without that explanation, or with
    /// more records behind it than can have been in flight, is a loss: then the positions decide.
    fn is_orphan(&self, link: Option<Link>) -> bool {
        let (Some(link), Some(last)) = (link, self.link) else {
            return false;
        };
        let is_explained = self.foreign_since || link.chain != last.chain;
        !link.follows(last) && is_explained && self.orphans < WINDOW_COUNT_MAX
    }

    /// The reader jumps to another place of the stream: what stood before it is not known.
    pub fn jump(&mut self) {
        self.link = None;
        self.foreign_since = false;
        self.orphans = 0;
    }

    fn resume(&mut self, position: Position, rewind: bool) -> Verdict {
        match self.end {
            None => {
                self.end = Some(position);
                Verdict::Resumed { rewound: false }
            }
            Some(end) if position > end => Verdict::Gap { end: Some(end), from: position },
            Some(end) => Verdict::Resumed { rewound: rewind && position < end },
        }
    }

    fn advance(&mut self, from: Position, to: Position, complete_to: Position) -> Verdict {
        let end = match self.end {
            Some(end) => end,
            None if self.starts_anywhere => from,
            None => return Verdict::Gap { end: None, from },
        };
        if to <= end {
            return Verdict::Drop(Dropped::Known);
        }
        if from > end {
            return Verdict::Gap { end: Some(end), from };
        }
        self.end = Some(to);
        self.complete_to = self.complete_to.max(Some(complete_to));
        Verdict::Accept { after: end }
    }
}
