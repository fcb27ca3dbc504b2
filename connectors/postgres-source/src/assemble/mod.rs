//! From pgoutput messages to segments. Pure: no I/O, time as an argument.
//!
//! The assembler counts positions, knows the open transaction, and decides when what it holds is a segment. Rows go
//! straight from the receive buffer into the columns of their table. Everything at or before the position that the log
//! already has is counted but not kept, so that a transaction that was cut in the middle goes on where it was cut.

mod buffer;
mod column;
mod draft;
mod limits;
mod relation;
mod streamed;
mod sub_xids;
mod table;
mod table_set;

#[cfg(test)]
mod large_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wallaby_model::{Lsn, Op, Position, SegmentBody, TableName, TableSchema, Transaction};

use crate::error::SourceError;
use crate::pgoutput::{Begin, Commit, DecodeError, Decoder, Message, Truncate, TupleUpdate};
use buffer::{Buffer, RowChange};
use streamed::StreamedSet;
use table::{RowHead, TableBuilder};

pub use draft::{CaptureEvent, PartDraft, SegmentDraft, SpliceDraft};
pub(crate) use limits::{Limits, PartLimits};
pub(crate) use relation::{RelationShape, ShapeColumn};
pub(crate) use table::binary::CopiedRows;

/// µs between 1970 and 2000.
const UNIX_TO_POSTGRES_MICROS: i64 = 946_684_800_000_000;

/// What became of a message.
#[derive(Debug)]
pub(crate) enum Step {
    /// Taken.
    Taken,
    /// Taken, and the segment is full: flush it.
    Full,
    /// Not taken: flush first, then push the same message again.
    FlushFirst,
    /// Taken, and something has to be given out before the next message: [`Assembler::take_ready`].
    Ready,
    /// A table's shape has to be completed from the catalog before the next message: [`Assembler::set_shape`].
    Shape(RelationShape),
}

/// The transaction whose messages arrive.
struct Open {
    begin: Begin,
    /// Its index in the buffer's transactions, once it has a row there.
    txn: Option<u32>,
    /// LSN and index of its last change.
    change: Lsn,
    index: u32,
    /// Bytes of its changes so far.
    bytes: u64,
    /// Whether it has any change, staged before or now.
    has_changes: bool,
    /// Parts given out, once it is too large for the log, or has a row that is.
    parts: Option<u32>,
}

/// Assembles segments.
pub(crate) struct Assembler {
    limits: Limits,
    /// Commit LSNs of transactions that go to the side store from their first row on.
    whole: BTreeSet<Lsn>,
    decoder: Decoder,
    /// Rows for the log, or of the open transaction's next part.
    buffer: Buffer,
    open: Option<Open>,
    streamed: StreamedSet,
    /// What has to be given out before the next message is taken.
    ready: VecDeque<CaptureEvent>,
    /// Counts the shapes that came, and says when that of a table in the log came.
    shapes: u64,
    shape_at: HashMap<u32, u64>,
    /// The end of everything that was taken.
    end: Position,
    /// The end of the last whole transaction of it.
    complete_to: Position,
    /// The end of everything that was given out.
    given: Position,
    transactions_ended: u64,
    /// A keepalive that came after everything taken.
    keepalive: Option<Lsn>,
    /// A heartbeat that ends a transaction of which the log has rows: it does not wait.
    urgent: bool,
    last_heartbeat: Option<Instant>,
}

impl Assembler {
    /// Goes on from `resume`, which is where the log ends. `protocol` is pgoutput's version.
    pub(crate) fn new(limits: Limits, protocol: u8, resume: Position) -> Assembler {
        Assembler {
            limits,
            whole: BTreeSet::new(),
            decoder: Decoder::new(protocol),
            buffer: Buffer::default(),
            open: None,
            streamed: StreamedSet::default(),
            ready: VecDeque::new(),
            shapes: 0,
            shape_at: HashMap::new(),
            end: resume,
            complete_to: if resume.is_between_transactions() { resume } else { Position::before(resume.commit) },
            given: resume,
            transactions_ended: 0,
            keepalive: None,
            urgent: false,
            last_heartbeat: None,
        }
    }

    /// These transactions go to the side store whole, however small they are and however they are sent: a splice of each stands
    /// in the log already, and a reader before it takes all of the transaction from what its manifest names.
    pub(crate) fn keep_whole(&mut self, commits: BTreeSet<Lsn>) {
        self.whole = commits;
    }

    fn is_kept_whole(&self, commit: Lsn) -> bool {
        self.limits.parts.is_some() && self.whole.contains(&commit)
    }

    /// Takes one pgoutput message with the LSN of its XLogData header.
    pub(crate) fn push(&mut self, start: Lsn, payload: &[u8]) -> Result<Step, SourceError> {
        match self.decoder.decode(payload)? {
            Message::Insert { xid, relation, new } => self.push_change(
                start,
                xid,
                relation,
                payload.len(),
                &RowChange { op: Op::Insert, row: &new, old: None },
            ),
            Message::Update { xid, relation, change: TupleUpdate { old, new } } => {
                let old = old.as_ref().map(|(whole, old)| (if *whole { Op::OldRow } else { Op::OldKey }, old));
                self.push_change(start, xid, relation, payload.len(), &RowChange { op: Op::Update, row: &new, old })
            }
            Message::Delete { xid, relation, whole, old } => {
                let op = if whole { Op::DeleteRow } else { Op::DeleteKey };
                self.push_change(start, xid, relation, payload.len(), &RowChange { op, row: &old, old: None })
            }
            Message::Truncate(truncate) => match truncate.xid {
                Some(xid) => self.truncate_streamed(start, xid, &truncate),
                None => self.push_truncate(start, &truncate),
            },
            Message::Begin(begin) => self.begin(begin),
            Message::Commit(commit) => self.commit(commit),
            Message::Relation(relation) => Ok(Step::Shape(RelationShape::of(&relation))),
            // Where a type or a transaction comes from changes no row; logical messages are not asked for, and have no
            // rows. One of a rolled-back savepoint would come all the same, and under the xid of the whole transaction: which
            // savepoint it is of, only its content could say (hazard 7).
            Message::Type(_) | Message::Origin { .. } | Message::Logical(_) => Ok(Step::Taken),
            Message::StreamStart(start) => self.stream_start(start),
            Message::StreamStop => Ok(self.stream_stop()),
            Message::StreamCommit { xid, commit } => self.stream_commit(xid, commit),
            Message::StreamAbort(abort) => self.stream_abort(abort),
            Message::Prepared(prepared) => {
                Err(out_of_order(prepared.kind, "two-phase commit was not asked for").into())
            }
        }
    }

    #[inline]
    fn push_change(
        &mut self,
        start: Lsn,
        xid: Option<u32>,
        oid: u32,
        message_bytes: usize,
        change: &RowChange<'_, '_>,
    ) -> Result<Step, SourceError> {
        match xid {
            None => self.push_rows(start, oid, message_bytes, change),
            Some(xid) => self.push_streamed(start, xid, oid, message_bytes, change),
        }
    }

    /// Takes a keepalive: everything before `end` was sent.
    pub(crate) fn keepalive(&mut self, end: Lsn) -> Result<(), SourceError> {
        if self.open.is_none() && Position::before(end) > self.end {
            self.check_goes_on(end)?;
            self.keepalive = self.keepalive.max(Some(end));
        }
        Ok(())
    }

    /// While the log has a part of a transaction, nothing later may come before the transaction itself: a server that
    /// goes on without it never had it (hazard 4), and half of it would be taken for all of it. `passed` is the commit of
    /// what came, or what the server says it has sent.
    fn check_goes_on(&self, passed: Lsn) -> Result<(), SourceError> {
        if self.end.is_between_transactions() || passed <= self.end.commit {
            return Ok(());
        }
        Err(SourceError::TransactionGone { log_end: self.end, passed })
    }

    /// The error for a row that was too large to be received whole.
    pub(crate) fn oversized(&self, frame_bytes: u64, head: &[u8]) -> SourceError {
        let at = if self.streamed.in_block() { 5 } else { 1 };
        let relation = match head {
            [b'I' | b'U' | b'D', ..] => {
                head.get(at..).and_then(|rest| rest.first_chunk()).copied().map(u32::from_be_bytes)
            }
            _ => None,
        };
        let table = relation.and_then(|oid| self.buffer.table(oid)).map(|table| table.schema().table.clone());
        SourceError::RowTooLarge {
            xid: self.open.as_ref().map_or(0, |open| open.begin.xid),
            table: table.unwrap_or_else(|| TableName::new("?", "?")),
            bytes: frame_bytes,
            limit: self.limits.largest_row_bytes() as u64,
        }
    }

    /// Sets the shape of a table from here on. An equal one changes nothing. Inside of a streamed block it holds for that
    /// transaction only.
    pub(crate) fn set_shape(&mut self, schema: TableSchema) -> Result<(), SourceError> {
        self.shapes += 1;
        let known = self.buffer.table(schema.oid).map(|table| Arc::clone(table.schema()));
        let schema = known.filter(|known| **known == schema).unwrap_or_else(|| Arc::new(schema));
        if self.streamed.in_block() {
            return self.streamed.set_shape(self.shapes, schema);
        }
        self.shape_at.insert(schema.oid, self.shapes);
        self.buffer.set_shape(schema)
    }

    /// The commit of the transaction at hand; `None` for one that is sent before it has ended.
    pub(crate) fn commit_at_hand(&self) -> Option<Lsn> {
        self.open.as_ref().map(|open| open.begin.final_lsn)
    }

    /// Whether flushing now would make a transaction visible without cutting another.
    pub(crate) fn has_whole_transactions(&self) -> bool {
        self.buffer.rows() > 0 && self.open.is_none()
    }

    /// What has to be given out before the next message is pushed.
    pub(crate) fn take_ready(&mut self) -> Option<CaptureEvent> {
        self.ready.pop_front()
    }

    fn step(&self) -> Step {
        if self.ready.is_empty() { Step::Taken } else { Step::Ready }
    }

    /// Gives the segment out.
    pub(crate) fn take_segment(&mut self) -> Result<Option<SegmentDraft>, SourceError> {
        if self.open.as_ref().is_some_and(|open| open.parts.is_some()) {
            // What is at hand belongs into a part.
            return Ok(None);
        }
        let Some(taken) = self.buffer.take()? else { return Ok(None) };
        if let Some(open) = &mut self.open {
            open.txn = None;
        }
        crate::metrics::segment(taken.rows, std::mem::take(&mut self.transactions_ended));
        self.given = self.end;
        self.urgent = false;
        Ok(Some(SegmentDraft {
            to: self.end,
            complete_to: self.complete_to,
            body: taken.body,
            content_bytes: taken.content_bytes,
            rows: taken.rows,
        }))
    }

    /// Gives a heartbeat out, when one is due at `now`. Only when there is no segment to give.
    pub(crate) fn take_heartbeat(&mut self, now: Instant) -> Option<Position> {
        if !self.heartbeat_wait(now)?.is_zero() {
            return None;
        }
        if let Some(lsn) = self.keepalive.take() {
            self.end = self.end.max(Position::before(lsn));
            self.complete_to = self.end;
        }
        self.given = self.end;
        self.urgent = false;
        self.last_heartbeat = Some(now);
        crate::metrics::heartbeat();
        Some(self.end)
    }

    /// How long until the next heartbeat is due; `None` when there is nothing to tell.
    pub(crate) fn heartbeat_wait(&self, now: Instant) -> Option<Duration> {
        if self.buffer.rows() > 0 || self.open.is_some() {
            return None;
        }
        let wanted = self.keepalive.map_or(self.end, |lsn| self.end.max(Position::before(lsn)));
        if wanted <= self.given {
            return None;
        }
        let due = self.last_heartbeat.filter(|_| !self.urgent).map(|last| last + self.limits.heartbeat_every);
        Some(due.map_or(Duration::ZERO, |due| due.saturating_duration_since(now)))
    }

    fn begin(&mut self, begin: Begin) -> Result<Step, SourceError> {
        if self.open.is_some() {
            return Err(out_of_order('B', "the transaction before it did not end").into());
        }
        self.check_goes_on(begin.final_lsn)?;
        let parts = self.is_kept_whole(begin.final_lsn).then_some(0);
        if parts.is_some() && self.buffer.rows() > 0 {
            // What committed before it goes first.
            return Ok(Step::FlushFirst);
        }
        let open = Open { begin, txn: None, change: Lsn::ZERO, index: 0, bytes: 0, has_changes: false, parts };
        self.open = Some(open);
        Ok(Step::Taken)
    }

    fn commit(&mut self, commit: Commit) -> Result<Step, SourceError> {
        let Some(mut open) = self.open.take() else {
            return Err(out_of_order('C', "no transaction is open").into());
        };
        if open.begin.final_lsn != commit.commit_lsn {
            return Err(out_of_order('C', "it ends another transaction").into());
        }
        let to = Position::before(commit.end_lsn);
        if open.parts.is_some() {
            self.take_open_part(&mut open)?;
        }
        match open.parts {
            Some(parts) if parts > 0 => {
                let transaction = transaction_of(&open.begin);
                self.give_splice(SpliceDraft { transaction, to, parts, aborted: Vec::new() });
            }
            _ if to > self.end => {
                self.urgent |= open.has_changes;
                self.end_transaction(to);
            }
            _ => {}
        }
        self.keepalive = self.keepalive.filter(|lsn| *lsn > commit.end_lsn);
        Ok(self.step())
    }

    /// Everything up to `to`, which is the end of a transaction, was taken.
    fn end_transaction(&mut self, to: Position) {
        self.end = to;
        self.complete_to = to;
        self.transactions_ended += 1;
    }

    fn give_splice(&mut self, splice: SpliceDraft) {
        self.end_transaction(splice.to);
        self.given = splice.to;
        self.urgent = false;
        self.ready.push_back(CaptureEvent::Splice(splice));
    }

    /// Gives out what is at hand of a transaction that goes to the side store.
    fn take_open_part(&mut self, open: &mut Open) -> Result<(), SourceError> {
        let Some(taken) = self.buffer.take()? else { return Ok(()) };
        let number = open.parts.unwrap_or(0);
        open.parts = Some(number + 1);
        open.txn = None;
        self.ready.push_back(CaptureEvent::Part(PartDraft {
            xid: open.begin.xid,
            number,
            body: taken.body,
            content_bytes: taken.content_bytes,
            rows: taken.rows,
            last: (open.change, open.index),
        }));
        Ok(())
    }

    /// Counts a change of the open transaction; its bytes with it. `None` when the transaction goes to the side store from here on, and
    /// the segment has to be flushed before.
    #[inline]
    fn count_transaction(&mut self, bytes: usize) -> Result<Option<u64>, SourceError> {
        let Some(open) = &mut self.open else {
            return Err(out_of_order('I', "no transaction is open").into());
        };
        let total = open.bytes + bytes as u64;
        if total > self.limits.large_transaction_bytes && self.limits.makes_parts() && open.parts.is_none() {
            if self.buffer.rows() > 0 {
                return Ok(None);
            }
            open.parts = Some(0);
        }
        Ok(Some(total))
    }

    fn push_rows(
        &mut self,
        start: Lsn,
        oid: u32,
        message_bytes: usize,
        change: &RowChange<'_, '_>,
    ) -> Result<Step, SourceError> {
        let Some(transaction_bytes) = self.count_transaction(message_bytes)? else {
            return Ok(Step::FlushFirst);
        };
        let Some((position, skipped)) = self.next_position(start)? else {
            return Err(out_of_order('I', "WAL positions fall inside of a transaction").into());
        };
        if !skipped {
            let Some(bytes) = self.make_room(oid, message_bytes, change)? else {
                return Ok(Step::FlushFirst);
            };
            let txn = self.txn_index();
            self.buffer.append(oid, txn, position, change, bytes)?;
        }
        self.advance(start, position, transaction_bytes, skipped);
        self.after_change()
    }

    /// The bytes that a change will take. `None` when the segment has to be flushed before it.
    #[inline]
    fn make_room(
        &mut self,
        oid: u32,
        message_bytes: usize,
        change: &RowChange<'_, '_>,
    ) -> Result<Option<usize>, SourceError> {
        let table = self.buffer.table(oid).ok_or(out_of_order('I', "its table was not described"))?;
        let bytes = table.row_bytes() * change.rows() + message_bytes;
        let bytes_max = self.limits.small_bytes_max();
        if self.buffer.added(oid, bytes) <= bytes_max && self.open.as_ref().is_some_and(|open| open.parts.is_none()) {
            return Ok(Some(bytes));
        }
        self.make_room_for_large(oid, bytes, change)
    }

    #[cold]
    fn make_room_for_large(
        &mut self,
        oid: u32,
        bytes_at_most: usize,
        change: &RowChange<'_, '_>,
    ) -> Result<Option<usize>, SourceError> {
        let (limits, xid) = (self.limits, self.open.as_ref().map_or(0, |open| open.begin.xid));
        let table = self.buffer.table(oid).ok_or(out_of_order('I', "its table was not described"))?;
        if self.open.as_ref().is_some_and(|open| open.parts.is_none()) {
            let bytes = table.exact_bytes(change, limits.row_bytes_max)?;
            if self.buffer.rows() > 0 && self.buffer.added(oid, bytes) > limits.small_bytes_max() {
                return Ok(None);
            }
            match table.check_row(xid, bytes, limits.row_bytes_max) {
                Ok(()) => return Ok(Some(bytes)),
                Err(error) if !limits.makes_parts() => return Err(error),
                Err(_) if self.buffer.rows() > 0 => return Ok(None),
                Err(_) => {}
            }
        }
        let mut bytes = bytes_at_most;
        if bytes > limits.part_row_bytes_max() {
            bytes = table.exact_bytes(change, limits.part_row_bytes_max())?;
            table.check_row(xid, bytes, limits.part_row_bytes_max())?;
        }
        let is_too_much = self.buffer.added(oid, bytes) > 2 * limits.part_target_bytes();
        if let Some(mut open) = self.open.take() {
            open.parts.get_or_insert(0);
            let taken = if is_too_much { self.take_open_part(&mut open) } else { Ok(()) };
            self.open = Some(open);
            taken?;
        }
        Ok(Some(bytes))
    }

    /// What is done once a change was taken.
    #[inline]
    fn after_change(&mut self) -> Result<Step, SourceError> {
        let content_bytes = self.buffer.content_bytes();
        if self.open.as_ref().is_some_and(|open| open.parts.is_none()) {
            let is_full = content_bytes >= self.limits.segment_target_bytes;
            return Ok(if is_full { Step::Full } else { Step::Taken });
        }
        if content_bytes >= self.limits.part_target_bytes()
            && let Some(mut open) = self.open.take()
        {
            let taken = self.take_open_part(&mut open);
            self.open = Some(open);
            taken?;
        }
        Ok(self.step())
    }

    /// The position of the next change, and whether the log has it already. `None` when LSNs fall.
    fn next_position(&self, start: Lsn) -> Result<Option<(Position, bool)>, SourceError> {
        let Some(open) = &self.open else {
            return Err(out_of_order('I', "no transaction is open").into());
        };
        if start < open.change {
            return Ok(None);
        }
        let index = if start == open.change { open.index + 1 } else { 1 };
        let position = Position::of(open.begin.final_lsn, start, index);
        Ok(Some((position, position <= self.end)))
    }

    fn advance(&mut self, start: Lsn, position: Position, transaction_bytes: u64, skipped: bool) {
        if let Some(open) = &mut self.open {
            open.change = start;
            open.index = position.index;
            open.bytes = transaction_bytes;
            open.has_changes = true;
        }
        if !skipped {
            self.end = position;
        }
    }

    /// The open transaction's index in the buffer.
    #[inline]
    fn txn_index(&mut self) -> u32 {
        let Some(open) = &mut self.open else { return 0 };
        if let Some(txn) = open.txn {
            return txn;
        }
        let mut transaction = transaction_of(&open.begin);
        if open.parts.is_some() {
            // The parts of all transactions look the same: their manifest says the rest.
            transaction = Transaction { commit: Lsn::ZERO, committed_at_micros: 0, ..transaction };
        }
        let txn = self.buffer.add_transaction(transaction);
        open.txn = Some(txn);
        txn
    }

    fn push_truncate(&mut self, start: Lsn, truncate: &Truncate) -> Result<Step, SourceError> {
        for oid in &truncate.relations {
            let Some((position, skipped)) = self.next_position(start)? else {
                return Err(out_of_order('T', "WAL positions fall inside of a transaction").into());
            };
            if !skipped {
                self.buffer.table(*oid).ok_or(out_of_order('T', "its table was not described"))?;
                let txn = self.txn_index();
                self.buffer.append_truncate(*oid, txn, position);
            }
            let bytes = self.open.as_ref().map_or(0, |open| open.bytes);
            self.advance(start, position, bytes, skipped);
        }
        self.after_change()
    }
}

fn out_of_order(kind: char, reason: &'static str) -> DecodeError {
    DecodeError::Order { kind, reason }
}

fn committed_at(postgres_micros: i64) -> i64 {
    postgres_micros.saturating_add(UNIX_TO_POSTGRES_MICROS)
}

fn transaction_of(begin: &Begin) -> Transaction {
    Transaction {
        commit: begin.final_lsn,
        xid: begin.xid,
        committed_at_micros: committed_at(begin.committed_at_micros),
    }
}

/// A body with one inserted row, from text forms, outside of any transaction.
pub(crate) fn single_row(schema: &Arc<TableSchema>, cells: &[Option<&[u8]>]) -> Result<SegmentBody, SourceError> {
    let count = u16::try_from(cells.len()).unwrap_or(u16::MAX);
    let mut message = vec![b'I'];
    message.extend_from_slice(&schema.oid.to_be_bytes());
    message.push(b'N');
    message.extend_from_slice(&count.to_be_bytes());
    for cell in cells {
        match cell {
            Some(text) => {
                message.push(b't');
                message.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
                message.extend_from_slice(text);
            }
            None => message.push(b'n'),
        }
    }
    let mut builder = TableBuilder::new(Arc::clone(schema));
    if let Message::Insert { new, .. } = Decoder::new(1).decode(&message)? {
        builder.push(RowHead { txn: 0, change: Lsn::ZERO, index: 0, op: Op::Insert }, &new, None)?;
    }
    let nowhere = Transaction { commit: Lsn::ZERO, xid: 0, committed_at_micros: 0 };
    Ok(SegmentBody { transactions: vec![nowhere], tables: vec![builder.finish()?] })
}
