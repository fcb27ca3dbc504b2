//! From pgoutput messages to segments. Pure: no I/O, time as an argument.
//!
//! The assembler counts positions, knows the open transaction, and decides when what it holds is a segment. Rows go
//! straight from the receive buffer into the columns of their table. Everything at or before the position that the log
//! already has is counted but not kept, so that a transaction that was cut in the middle goes on where it was cut.

mod column;
mod relation;
mod table;
mod table_set;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wallaby_model::{Lsn, Op, Position, SegmentBody, TableName, TableSchema, Transaction};

use crate::error::SourceError;
use crate::pgoutput::{Begin, Commit, DecodeError, Decoder, Message, Truncate, Tuple, TupleUpdate};
use table::{RowHead, TableBuilder};
use table_set::TableSet;

pub(crate) use relation::{RelationShape, ShapeColumn};
pub(crate) use table::binary::CopiedRows;

/// µs between 1970 and 2000.
const UNIX_TO_POSTGRES_MICROS: i64 = 946_684_800_000_000;

/// The bounds of segments, rows and transactions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A segment with this much content is done.
    pub(crate) segment_target_bytes: usize,
    /// No segment grows beyond this, unless a single row does.
    pub(crate) segment_bytes_max: usize,
    /// The largest content of a segment with a single row.
    pub(crate) row_bytes_max: usize,
    /// The largest transaction.
    pub(crate) large_transaction_bytes: u64,
    /// Heartbeats that nobody waits for are not made more often.
    pub(crate) heartbeat_every: Duration,
}

/// A segment that is ready to be staged.
#[derive(Clone, Debug)]
pub struct SegmentDraft {
    /// Where a reader stands after it.
    pub to: Position,
    /// The end of the last whole transaction at or before `to`.
    pub complete_to: Position,
    /// The rows.
    pub body: SegmentBody,
    /// About how large the content is before it is packed.
    pub content_bytes: usize,
    /// The number of rows, before-images included.
    pub rows: usize,
}

/// What became of a message.
#[derive(Debug)]
pub(crate) enum Step {
    /// Taken.
    Taken,
    /// Taken, and the segment is full: flush it.
    Full,
    /// Not taken: flush first, then push the same message again.
    FlushFirst,
    /// A table's shape has to be completed from the catalog before the next message: [`Assembler::set_shape`].
    Shape(RelationShape),
}

/// The transaction whose messages arrive.
struct Open {
    begin: Begin,
    /// Its index in the segment's transactions, once it has a row there.
    txn: Option<u32>,
    /// LSN and index of its last change.
    change: Lsn,
    index: u32,
    /// Bytes of its changes so far.
    bytes: u64,
    /// Whether it has any change, staged before or now.
    has_changes: bool,
}

/// Assembles segments.
pub(crate) struct Assembler {
    limits: Limits,
    decoder: Decoder,
    tables: TableSet,
    /// Tables with rows in the segment.
    touched: Vec<u32>,
    /// Rows of shapes that were replaced inside the segment.
    finished: Vec<wallaby_model::TableChanges>,
    transactions: Vec<Transaction>,
    open: Option<Open>,
    /// The end of everything that was taken.
    end: Position,
    /// The end of the last whole transaction of it.
    complete_to: Position,
    /// The end of everything that was given out.
    given: Position,
    rows: usize,
    content_bytes: usize,
    transactions_ended: u64,
    /// A keepalive that came after everything taken.
    keepalive: Option<Lsn>,
    /// A heartbeat that ends a transaction of which the log has rows: it does not wait.
    urgent: bool,
    last_heartbeat: Option<Instant>,
}

impl Assembler {
    /// Goes on from `resume`, which is where the log ends.
    pub(crate) fn new(limits: Limits, resume: Position) -> Assembler {
        Assembler {
            limits,
            decoder: Decoder::new(1),
            tables: TableSet::default(),
            touched: Vec::new(),
            finished: Vec::new(),
            transactions: Vec::new(),
            open: None,
            end: resume,
            complete_to: if resume.is_between_transactions() { resume } else { Position::before(resume.commit) },
            given: resume,
            rows: 0,
            content_bytes: 0,
            transactions_ended: 0,
            keepalive: None,
            urgent: false,
            last_heartbeat: None,
        }
    }

    /// Takes one pgoutput message with the LSN of its XLogData header.
    pub(crate) fn push(&mut self, start: Lsn, payload: &[u8]) -> Result<Step, SourceError> {
        match self.decoder.decode(payload)? {
            Message::Insert { relation, new, .. } => {
                let rows = RowChange { op: Op::Insert, row: &new, old: None };
                self.push_rows(start, relation, payload.len(), rows)
            }
            Message::Update { relation, change: TupleUpdate { old, new }, .. } => {
                let old = old.as_ref().map(|(whole, old)| (if *whole { Op::OldRow } else { Op::OldKey }, old));
                self.push_rows(start, relation, payload.len(), RowChange { op: Op::Update, row: &new, old })
            }
            Message::Delete { relation, whole, old, .. } => {
                let op = if whole { Op::DeleteRow } else { Op::DeleteKey };
                self.push_rows(start, relation, payload.len(), RowChange { op, row: &old, old: None })
            }
            Message::Truncate(truncate) => self.push_truncate(start, &truncate),
            Message::Begin(begin) => self.begin(begin),
            Message::Commit(commit) => self.commit(commit),
            Message::Relation(relation) => Ok(Step::Shape(RelationShape::of(&relation))),
            // Where a type or a transaction comes from changes no row; logical messages are not asked for.
            Message::Type(_) | Message::Origin { .. } | Message::Logical(_) => Ok(Step::Taken),
            Message::StreamStart(_) | Message::StreamStop | Message::StreamCommit { .. } | Message::StreamAbort(_) => {
                Err(DecodeError::Order { kind: 'S', reason: "streaming was not asked for" }.into())
            }
            Message::Prepared(prepared) => {
                Err(DecodeError::Order { kind: prepared.kind, reason: "two-phase commit was not asked for" }.into())
            }
        }
    }

    /// Takes a keepalive: everything before `end` was sent.
    pub(crate) fn keepalive(&mut self, end: Lsn) {
        if self.open.is_none() && Position::before(end) > self.end {
            self.keepalive = self.keepalive.max(Some(end));
        }
    }

    /// The error for a row that was too large to be received whole.
    pub(crate) fn oversized(&self, frame_bytes: u64, head: &[u8]) -> SourceError {
        let relation = match head {
            [b'I' | b'U' | b'D', a, b, c, d, ..] => Some(u32::from_be_bytes([*a, *b, *c, *d])),
            _ => None,
        };
        let table = relation.and_then(|oid| self.tables.get(oid)).map(|table| table.schema().table.clone());
        SourceError::RowTooLarge {
            xid: self.open.as_ref().map_or(0, |open| open.begin.xid),
            table: table.unwrap_or_else(|| TableName::new("?", "?")),
            bytes: frame_bytes,
            limit: self.limits.row_bytes_max as u64,
        }
    }

    /// Sets the shape of a table from here on. An equal one changes nothing.
    pub(crate) fn set_shape(&mut self, schema: TableSchema) -> Result<(), SourceError> {
        let oid = schema.oid;
        if let Some(known) = self.tables.get_mut(oid) {
            if **known.schema() == schema {
                return Ok(());
            }
            if known.rows() > 0 {
                self.finished.push(known.finish()?);
                self.touched.retain(|touched| *touched != oid);
            }
        }
        self.tables.insert(oid, TableBuilder::new(Arc::new(schema)));
        Ok(())
    }

    /// Whether flushing now would make a transaction visible without cutting another.
    pub(crate) fn has_whole_transactions(&self) -> bool {
        self.rows > 0 && self.open.is_none()
    }

    /// Gives the segment out.
    pub(crate) fn take_segment(&mut self) -> Result<Option<SegmentDraft>, SourceError> {
        if self.rows == 0 {
            return Ok(None);
        }
        let mut tables = std::mem::take(&mut self.finished);
        for oid in self.touched.drain(..) {
            if let Some(table) = self.tables.get_mut(oid) {
                tables.push(table.finish()?);
            }
        }
        let body = SegmentBody { transactions: std::mem::take(&mut self.transactions), tables };
        if let Some(open) = &mut self.open {
            open.txn = None;
        }
        let draft = SegmentDraft {
            to: self.end,
            complete_to: self.complete_to,
            body,
            content_bytes: self.content_bytes,
            rows: self.rows,
        };
        crate::metrics::segment(draft.rows, self.transactions_ended);
        self.given = self.end;
        self.rows = 0;
        self.content_bytes = 0;
        self.transactions_ended = 0;
        self.urgent = false;
        Ok(Some(draft))
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
        if self.rows > 0 || self.open.is_some() {
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
            return Err(DecodeError::Order { kind: 'B', reason: "the transaction before it did not end" }.into());
        }
        let open = Open { begin, txn: None, change: Lsn::ZERO, index: 0, bytes: 0, has_changes: false };
        self.open = Some(open);
        Ok(Step::Taken)
    }

    fn commit(&mut self, commit: Commit) -> Result<Step, SourceError> {
        let Some(open) = self.open.take() else {
            return Err(DecodeError::Order { kind: 'C', reason: "no transaction is open" }.into());
        };
        if open.begin.final_lsn != commit.commit_lsn {
            return Err(DecodeError::Order { kind: 'C', reason: "it ends another transaction" }.into());
        }
        let end = Position::before(commit.end_lsn);
        if end > self.end {
            self.end = end;
            self.complete_to = end;
            self.urgent |= open.has_changes;
            self.transactions_ended += 1;
        }
        self.keepalive = self.keepalive.filter(|lsn| *lsn > commit.end_lsn);
        Ok(Step::Taken)
    }

    /// Checks the transaction's bound; `None` when the segment has to be flushed before the error is told.
    fn count_transaction(&mut self, oid: u32, bytes: usize) -> Result<Option<u64>, SourceError> {
        let Some(open) = &self.open else {
            return Err(DecodeError::Order { kind: 'I', reason: "no transaction is open" }.into());
        };
        let total = open.bytes + bytes as u64;
        if total <= self.limits.large_transaction_bytes {
            return Ok(Some(total));
        }
        if self.rows > 0 {
            return Ok(None);
        }
        Err(SourceError::LargeTransaction {
            xid: open.begin.xid,
            table: self.table_name(oid),
            bytes: total,
            limit: self.limits.large_transaction_bytes,
        })
    }

    fn table_name(&self, oid: u32) -> TableName {
        self.tables.get(oid).map_or_else(|| TableName::new("?", "?"), |table| table.schema().table.clone())
    }

    fn push_rows(
        &mut self,
        start: Lsn,
        oid: u32,
        message_bytes: usize,
        change: RowChange<'_, '_>,
    ) -> Result<Step, SourceError> {
        let Some(transaction_bytes) = self.count_transaction(oid, message_bytes)? else {
            return Ok(Step::FlushFirst);
        };
        let Some((position, skipped)) = self.next_position(start)? else {
            return Err(DecodeError::Order { kind: 'I', reason: "WAL positions fall inside of a transaction" }.into());
        };
        if !skipped {
            let mut bytes = match self.tables.get(oid) {
                Some(table) => table.row_bytes() * change.rows() + message_bytes,
                None => return Err(DecodeError::Order { kind: 'I', reason: "its table was not described" }.into()),
            };
            if self.added(oid, bytes) > self.limits.segment_bytes_max.min(self.limits.row_bytes_max) {
                bytes = self.exact_bytes(oid, &change)?;
                if self.rows > 0 && self.added(oid, bytes) > self.limits.segment_bytes_max {
                    return Ok(Step::FlushFirst);
                }
                self.check_row(oid, bytes)?;
            }
            self.append(oid, position, &change, bytes)?;
        }
        self.advance(start, position, transaction_bytes, skipped);
        Ok(if self.content_bytes >= self.limits.segment_target_bytes { Step::Full } else { Step::Taken })
    }

    /// What the segment would hold with `bytes` more in this table.
    fn added(&self, oid: u32, bytes: usize) -> usize {
        let overhead = match self.tables.get(oid) {
            Some(table) if table.rows() == 0 => table.overhead_bytes(),
            _ => 0,
        };
        self.content_bytes + overhead + bytes
    }

    fn exact_bytes(&self, oid: u32, change: &RowChange<'_, '_>) -> Result<usize, SourceError> {
        let Some(table) = self.tables.get(oid) else { return Ok(0) };
        let old = match change.old {
            Some((_, old)) => table.bytes_of(old)?,
            None => 0,
        };
        // A value that is filled in from the old row counts a second time.
        let filled = if change.old.is_some_and(|(op, _)| op == Op::OldRow) { old } else { 0 };
        Ok(old + filled.min(self.limits.row_bytes_max) + table.bytes_of(change.row)?)
    }

    fn check_row(&self, oid: u32, bytes: usize) -> Result<(), SourceError> {
        let with_overhead = bytes + self.tables.get(oid).map_or(0, TableBuilder::overhead_bytes);
        if with_overhead <= self.limits.row_bytes_max {
            return Ok(());
        }
        Err(SourceError::RowTooLarge {
            xid: self.open.as_ref().map_or(0, |open| open.begin.xid),
            table: self.table_name(oid),
            bytes: with_overhead as u64,
            limit: self.limits.row_bytes_max as u64,
        })
    }

    /// The position of the next change, and whether the log has it already. `None` when LSNs fall.
    fn next_position(&self, start: Lsn) -> Result<Option<(Position, bool)>, SourceError> {
        let Some(open) = &self.open else {
            return Err(DecodeError::Order { kind: 'I', reason: "no transaction is open" }.into());
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

    /// The open transaction's index in the segment, and the table's builder, marked as having rows.
    fn txn_index(&mut self) -> u32 {
        let next = self.transactions.len() as u32;
        let Some(open) = &mut self.open else { return 0 };
        if let Some(txn) = open.txn {
            return txn;
        }
        open.txn = Some(next);
        self.transactions.push(Transaction {
            commit: open.begin.final_lsn,
            xid: open.begin.xid,
            committed_at_micros: open.begin.committed_at_micros.saturating_add(UNIX_TO_POSTGRES_MICROS),
        });
        next
    }

    fn append(
        &mut self,
        oid: u32,
        position: Position,
        change: &RowChange<'_, '_>,
        bytes: usize,
    ) -> Result<(), SourceError> {
        let txn = self.txn_index();
        let with_overhead = self.added(oid, bytes);
        let Some(table) = self.tables.get_mut(oid) else { return Ok(()) };
        if table.rows() == 0 {
            self.touched.push(oid);
        }
        let head = |op| RowHead { txn, change: position.change, index: position.index, op };
        let mut whole_old = None;
        if let Some((op, old)) = change.old {
            table.push(head(op), old, None)?;
            whole_old = (op == Op::OldRow).then_some(old);
        }
        table.push(head(change.op), change.row, whole_old)?;
        self.rows += change.rows();
        self.content_bytes = with_overhead;
        Ok(())
    }

    fn push_truncate(&mut self, start: Lsn, truncate: &Truncate) -> Result<Step, SourceError> {
        for oid in &truncate.relations {
            let Some((position, skipped)) = self.next_position(start)? else {
                return Err(
                    DecodeError::Order { kind: 'T', reason: "WAL positions fall inside of a transaction" }.into()
                );
            };
            if !skipped {
                let row_bytes = match self.tables.get(*oid) {
                    Some(table) => table.row_bytes(),
                    None => return Err(DecodeError::Order { kind: 'T', reason: "its table was not described" }.into()),
                };
                let txn = self.txn_index();
                let with_overhead = self.added(*oid, row_bytes);
                if let Some(table) = self.tables.get_mut(*oid) {
                    if table.rows() == 0 {
                        self.touched.push(*oid);
                    }
                    let head = RowHead { txn, change: position.change, index: position.index, op: Op::Truncate };
                    table.push_empty(head);
                }
                self.rows += 1;
                self.content_bytes = with_overhead;
            }
            let bytes = self.open.as_ref().map_or(0, |open| open.bytes);
            self.advance(start, position, bytes, skipped);
        }
        Ok(if self.content_bytes >= self.limits.segment_target_bytes { Step::Full } else { Step::Taken })
    }
}

/// A change of one row: the row, and what the WAL carries of the old one.
struct RowChange<'m, 'a> {
    op: Op,
    row: &'m Tuple<'a>,
    old: Option<(Op, &'m Tuple<'a>)>,
}

impl RowChange<'_, '_> {
    fn rows(&self) -> usize {
        1 + usize::from(self.old.is_some())
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
