//! Transactions that arrive while they are in progress (protocols 2 to 4).
//!
//! Their rows go into parts: nothing is known yet of their commit. Each has its own map of relations until it ends, because a
//! Relation message inside of it holds for it alone (hazard 12). All open parts share one budget of bytes: when
//! it is used up, the largest goes out (hazard 17).

use std::collections::HashMap;
use std::sync::Arc;

use wallaby_model::{Lsn, Position, TableSchema, Transaction};
use wallaby_wire::splice::settle;

use super::buffer::{Buffer, RowChange};
use super::sub_xids::SubXids;
use super::{Assembler, CaptureEvent, PartDraft, SegmentDraft, SpliceDraft, Step, committed_at, out_of_order};
use crate::error::SourceError;
use crate::pgoutput::{Commit, StreamAbort, StreamStart, Truncate};

/// One of them.
#[derive(Default)]
pub(super) struct Streamed {
    buffer: Buffer,
    /// When each shape came, and the shape: the newest one of a table holds for later transactions, once this one commits.
    shapes: HashMap<u32, (u64, Arc<TableSchema>)>,
    /// The sub-transactions of the open part: their index in its transactions.
    txns: HashMap<u32, u32>,
    last_txn: Option<(u32, u32)>,
    /// Parts given out.
    parts: u32,
    /// LSN and index of the last change.
    change: Lsn,
    index: u32,
    xids: SubXids,
}

impl Streamed {
    fn txn_index(&mut self, xid: u32) -> u32 {
        if let Some((last, index)) = self.last_txn
            && last == xid
        {
            return index;
        }
        let buffer = &mut self.buffer;
        let add = || buffer.add_transaction(Transaction { commit: Lsn::ZERO, xid, committed_at_micros: 0 });
        let index = *self.txns.entry(xid).or_insert_with(add);
        self.last_txn = Some((xid, index));
        index
    }

    /// The place of the next change; `None` when LSNs fall.
    fn next_place(&self, start: Lsn) -> Option<(Lsn, u32)> {
        match start.cmp(&self.change) {
            std::cmp::Ordering::Less => None,
            std::cmp::Ordering::Equal => Some((start, self.index + 1)),
            std::cmp::Ordering::Greater => Some((start, 1)),
        }
    }

    fn take_part(&mut self, xid: u32) -> Result<Option<PartDraft>, SourceError> {
        let Some(taken) = self.buffer.take()? else { return Ok(None) };
        self.txns.clear();
        self.last_txn = None;
        let number = self.parts;
        self.parts += 1;
        Ok(Some(PartDraft {
            xid,
            number,
            body: taken.body,
            content_bytes: taken.content_bytes,
            rows: taken.rows,
            last: (self.change, self.index),
        }))
    }
}

/// All that are open.
#[derive(Default)]
pub(super) struct StreamedSet {
    transactions: HashMap<u32, Streamed>,
    /// The transaction whose block is open.
    block: Option<u32>,
    /// Content of all open parts.
    open_bytes: usize,
}

impl StreamedSet {
    pub(super) fn in_block(&self) -> bool {
        self.block.is_some()
    }

    #[cfg(test)]
    pub(super) fn open_bytes(&self) -> usize {
        self.open_bytes
    }

    /// The transaction whose block is open.
    fn current(&mut self, kind: char) -> Result<(u32, &mut Streamed), SourceError> {
        let block = self.block.ok_or(out_of_order(kind, "no streamed block is open"))?;
        let streamed = self.transactions.get_mut(&block).ok_or(out_of_order(kind, "its transaction is not open"))?;
        Ok((block, streamed))
    }

    pub(super) fn set_shape(&mut self, at: u64, schema: Arc<TableSchema>) -> Result<(), SourceError> {
        let (_, streamed) = self.current('R')?;
        streamed.shapes.insert(schema.oid, (at, Arc::clone(&schema)));
        streamed.buffer.set_shape(schema)
    }

    /// The one with the largest open part.
    fn largest(&self) -> Option<u32> {
        let sizes = self.transactions.iter().map(|(xid, streamed)| (streamed.buffer.content_bytes(), *xid));
        sizes.max().map(|(_, xid)| xid)
    }
}

impl Assembler {
    pub(super) fn stream_start(&mut self, start: StreamStart) -> Result<Step, SourceError> {
        if self.open.is_some() {
            return Err(out_of_order('S', "a transaction is open").into());
        }
        if !self.limits.makes_parts() {
            return Err(out_of_order('S', "streaming was not asked for").into());
        }
        let is_known = self.streamed.transactions.contains_key(&start.xid);
        if is_known == start.first_segment {
            return Err(out_of_order('S', "a transaction has one first block").into());
        }
        self.streamed.transactions.entry(start.xid).or_default();
        self.streamed.block = Some(start.xid);
        Ok(Step::Taken)
    }

    pub(super) fn stream_stop(&mut self) -> Step {
        self.streamed.block = None;
        Step::Taken
    }

    /// Takes a change inside of a streamed block. `xid` is the sub-transaction's.
    pub(super) fn push_streamed(
        &mut self,
        start: Lsn,
        xid: u32,
        oid: u32,
        message_bytes: usize,
        change: &RowChange<'_, '_>,
    ) -> Result<Step, SourceError> {
        let limits = self.limits;
        let (top, streamed) = self.streamed.current('I')?;
        let (lsn, index) = streamed.next_place(start).ok_or(out_of_order('I', "WAL positions fall"))?;
        let table = streamed.buffer.table(oid).ok_or(out_of_order('I', "its table was not described"))?;
        let mut bytes = table.row_bytes() * change.rows() + message_bytes;
        if bytes > limits.part_row_bytes_max() {
            bytes = table.exact_bytes(change, limits.part_row_bytes_max())?;
            table.check_row(top, bytes, limits.part_row_bytes_max())?;
        }
        let before = streamed.buffer.content_bytes();
        let mut flushed = None;
        if streamed.buffer.rows() > 0 && streamed.buffer.added(oid, bytes) > 2 * limits.part_target_bytes() {
            flushed = streamed.take_part(top)?;
        }
        let txn = streamed.txn_index(xid);
        streamed.buffer.append(oid, txn, Position::of(Lsn::ZERO, lsn, index), change, bytes)?;
        streamed.xids.saw(xid);
        (streamed.change, streamed.index) = (lsn, index);
        let now = streamed.buffer.content_bytes();
        self.streamed.open_bytes = self.streamed.open_bytes + now - before;
        self.ready.extend(flushed.map(CaptureEvent::Part));
        self.flush_parts(top)
    }

    /// Takes a truncate inside of a streamed block.
    pub(super) fn truncate_streamed(&mut self, start: Lsn, xid: u32, truncate: &Truncate) -> Result<Step, SourceError> {
        let (top, streamed) = self.streamed.current('T')?;
        let before = streamed.buffer.content_bytes();
        for oid in &truncate.relations {
            let (lsn, index) = streamed.next_place(start).ok_or(out_of_order('T', "WAL positions fall"))?;
            streamed.buffer.table(*oid).ok_or(out_of_order('T', "its table was not described"))?;
            let txn = streamed.txn_index(xid);
            streamed.buffer.append_truncate(*oid, txn, Position::of(Lsn::ZERO, lsn, index));
            streamed.xids.saw(xid);
            (streamed.change, streamed.index) = (lsn, index);
        }
        let now = streamed.buffer.content_bytes();
        self.streamed.open_bytes = self.streamed.open_bytes + now - before;
        self.flush_parts(top)
    }

    /// Gives out the part of `top` when it is full, or the largest when all together are too much.
    fn flush_parts(&mut self, top: u32) -> Result<Step, SourceError> {
        let is_full = |streamed: &Streamed| streamed.buffer.content_bytes() >= self.limits.part_target_bytes();
        let mut flush = self.streamed.transactions.get(&top).is_some_and(is_full).then_some(top);
        if flush.is_none() && self.streamed.open_bytes > self.limits.open_parts_bytes_max() {
            flush = self.streamed.largest();
        }
        if let Some(xid) = flush
            && let Some(streamed) = self.streamed.transactions.get_mut(&xid)
        {
            self.streamed.open_bytes -= streamed.buffer.content_bytes();
            self.ready.extend(streamed.take_part(xid)?.map(CaptureEvent::Part));
        }
        Ok(self.step())
    }

    /// A streamed transaction, or a sub-transaction of it, was rolled back.
    pub(super) fn stream_abort(&mut self, abort: StreamAbort) -> Result<Step, SourceError> {
        if abort.xid == abort.subxid {
            if let Some(streamed) = self.remove_streamed(abort.xid)
                && streamed.parts > 0
            {
                self.ready.push_back(CaptureEvent::Abandoned { xid: abort.xid });
            }
        } else if let Some(streamed) = self.streamed.transactions.get_mut(&abort.xid) {
            streamed.xids.abort(abort.subxid);
        }
        Ok(self.step())
    }

    fn remove_streamed(&mut self, xid: u32) -> Option<Streamed> {
        let streamed = self.streamed.transactions.remove(&xid)?;
        self.streamed.open_bytes -= streamed.buffer.content_bytes();
        Some(streamed)
    }

    /// A streamed transaction committed: here is its place in the log.
    pub(super) fn stream_commit(&mut self, xid: u32, commit: Commit) -> Result<Step, SourceError> {
        self.check_goes_on(commit.commit_lsn)?;
        if self.buffer.rows() > 0 {
            // What committed before it goes first.
            return Ok(Step::FlushFirst);
        }
        let mut streamed = self.remove_streamed(xid).unwrap_or_default();
        self.keep_shapes(&mut streamed)?;
        let to = Position::before(commit.end_lsn);
        self.keepalive = self.keepalive.filter(|lsn| *lsn > commit.end_lsn);
        let is_known = to <= self.end;
        if is_known || !streamed.xids.any_survives() {
            if streamed.parts > 0 {
                self.ready.push_back(CaptureEvent::Abandoned { xid });
            }
            if !is_known {
                // Of a transaction that stands in the log in part the end is told at once.
                let is_in_log = self.end.commit == commit.commit_lsn && !self.end.is_between_transactions();
                self.urgent |= is_in_log;
                self.end_transaction(to);
            }
            return Ok(self.step());
        }
        let transaction = Transaction {
            commit: commit.commit_lsn,
            xid,
            committed_at_micros: committed_at(commit.committed_at_micros),
        };
        let is_small = streamed.parts == 0 && streamed.buffer.content_bytes() <= self.limits.small_bytes_max();
        if is_small && !self.is_kept_whole(commit.commit_lsn) {
            return self.commit_into_log(streamed, &transaction, to);
        }
        self.ready.extend(streamed.take_part(xid)?.map(CaptureEvent::Part));
        let parts = streamed.parts;
        let aborted = streamed.xids.into_aborted();
        self.give_splice(SpliceDraft { transaction, to, parts, aborted });
        Ok(self.step())
    }

    /// A streamed transaction of which little is left needs no side store: it becomes a segment.
    fn commit_into_log(
        &mut self,
        mut streamed: Streamed,
        transaction: &Transaction,
        to: Position,
    ) -> Result<Step, SourceError> {
        let after = self.end;
        if let Some(taken) = streamed.buffer.take()? {
            let aborted = streamed.xids.into_aborted();
            let body = settle(taken.body, transaction, &aborted, after).map_err(|_| SourceError::Columns {
                table: wallaby_model::TableName::new("?", "?"),
                reason: "rolled-back rows could not be left out".into(),
            })?;
            let rows = body.rows();
            self.urgent = true;
            self.end_transaction(to);
            if rows > 0 {
                let content_bytes = taken.content_bytes;
                let draft = SegmentDraft { to, complete_to: to, body, content_bytes, rows };
                crate::metrics::segment(rows, std::mem::take(&mut self.transactions_ended));
                self.given = to;
                self.urgent = false;
                self.ready.push_back(CaptureEvent::Segment(draft));
            }
        }
        Ok(self.step())
    }

    /// The server counts a shape that it sent inside of a streamed transaction as known once that has committed. The newest one
    /// counts: a table can have been altered beside it.
    fn keep_shapes(&mut self, streamed: &mut Streamed) -> Result<(), SourceError> {
        for (oid, (at, schema)) in streamed.shapes.drain() {
            if self.shape_at.get(&oid).is_none_or(|known| *known < at) {
                self.shape_at.insert(oid, at);
                self.buffer.set_shape(schema)?;
            }
        }
        Ok(())
    }
}
