//! Cuts what a reader accepted into batches that a sink may show: pure, no I/O.
//!
//! A sink commits only where a source transaction ends. Segments are cut for size and so end anywhere; this holds what
//! lies past the last whole transaction until its end arrives. What is held is bounded by `largeTransactionBytes`:
//! capture stages no more than that of one transaction.

use std::collections::VecDeque;
use std::sync::Arc;

use wallaby_connector_api::{Batch, BatchPart};
use wallaby_model::{Epoch, Position, SegmentBody};

/// A data segment or a heartbeat that the reader rule accepted.
#[derive(Clone, Debug)]
pub struct AcceptedSegment {
    /// Rows at or before this were seen already.
    pub after: Position,
    /// Where the reader stands after it.
    pub to: Position,
    /// The end of the last whole transaction at or before `to`.
    pub complete_to: Position,
    /// The log's epoch.
    pub epoch: Epoch,
    /// The rows; `None` for a heartbeat.
    pub body: Option<Arc<SegmentBody>>,
    /// Encoded bytes, for bounds.
    pub bytes: usize,
}

/// Collects accepted segments and gives them out as batches.
#[derive(Debug)]
pub struct BatchAssembler {
    /// Where the sink stands.
    at: Position,
    /// The log's epoch at `at`.
    epoch: Epoch,
    /// Where the reader stands.
    end: Position,
    held: VecDeque<AcceptedSegment>,
    held_bytes: usize,
    held_rows: usize,
}

impl BatchAssembler {
    /// An assembler for a sink that stands at `at`.
    pub fn new(at: Position, epoch: Epoch) -> Self {
        BatchAssembler { at, epoch, end: at, held: VecDeque::new(), held_bytes: 0, held_rows: 0 }
    }

    /// Where the sink stands.
    pub fn at(&self) -> Position {
        self.at
    }

    /// Where the reader stands: everything up to here was pushed.
    pub fn end(&self) -> Position {
        self.end
    }

    /// The encoded bytes that are held.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// The rows that are held.
    pub fn held_rows(&self) -> usize {
        self.held_rows
    }

    /// Takes the next accepted segment. Segments come in order: each continues the one before it.
    pub fn push(&mut self, segment: AcceptedSegment) {
        assert!(segment.after <= self.end, "a segment past the reader's end is the reader's gap alarm, not ours");
        assert!(segment.to >= self.end, "the reader rule only moves forward");
        self.end = segment.to;
        self.held_bytes += segment.bytes;
        self.held_rows += segment.body.as_ref().map_or(0, |body| body.rows());
        self.held.push_back(segment);
    }

    /// Up to where a batch could go now.
    pub fn complete_to(&self) -> Position {
        self.held.iter().map(|segment| segment.complete_to).max().unwrap_or(self.at).max(self.at)
    }

    /// Whether a batch taken now would have rows.
    pub fn has_complete_rows(&self) -> bool {
        let up_to = self.complete_to();
        let mut bodies = self.held.iter().filter_map(|segment| segment.body.as_ref().map(|body| (segment, body)));
        bodies.any(|(segment, body)| {
            let after = segment.after.max(self.at);
            body.tables.iter().any(|table| table.slice(&body.transactions, after, up_to).rows.num_rows() > 0)
        })
    }

    /// A batch with everything up to the last whole transaction, or with as many held segments as stay within
    /// `bytes_max` and contain a transaction's end. `None` when no transaction ended. The assembler does not move:
    /// [`Self::applied`] does, so that a failed batch can be taken again.
    pub fn batch(&self, bytes_max: usize) -> Option<Batch> {
        let mut to = self.at;
        let mut bytes = 0;
        let mut epoch = self.epoch;
        for segment in &self.held {
            bytes += segment.bytes;
            if bytes > bytes_max && to > self.at {
                break;
            }
            if segment.complete_to > to {
                to = segment.complete_to;
                epoch = segment.epoch;
            }
        }
        if to <= self.at {
            return None;
        }
        let mut parts = Vec::new();
        for segment in &self.held {
            let after = segment.after.max(self.at);
            if after >= to {
                break;
            }
            if let Some(body) = &segment.body {
                parts.push(BatchPart { body: Arc::clone(body), after, up_to: to.min(segment.to), tables: None });
            }
        }
        Some(Batch { from: self.at, to, log_epoch: epoch, parts })
    }

    /// The sink has everything up to `position`.
    pub fn applied(&mut self, position: Position) {
        assert!(position >= self.at && position <= self.end, "a sink stands on what it was given");
        self.at = position;
        let reached = self.held.iter().filter(|segment| segment.complete_to <= position).map(|segment| segment.epoch);
        self.epoch = reached.max().unwrap_or(self.epoch).max(self.epoch);
        while self.held.front().is_some_and(|segment| segment.to <= position) {
            let Some(segment) = self.held.pop_front() else { break };
            self.held_bytes -= segment.bytes;
            self.held_rows -= segment.body.as_ref().map_or(0, |body| body.rows());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use arrow_array::{ArrayRef, BinaryArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
    use wallaby_model::change::arrow_schema;
    use wallaby_model::{Lsn, Op, ReplicaIdentity, TableChanges, TableName, TableSchema, Transaction};

    /// A body with one row per `(commit, change, index)`.
    fn body(rows: &[(u64, u64, u32)]) -> Arc<SegmentBody> {
        let schema = Arc::new(TableSchema {
            oid: 1,
            table: TableName::new("public", "t"),
            identity: ReplicaIdentity::Default,
            columns: vec![],
            primary_key: vec![],
        });
        let mut transactions: Vec<Transaction> = Vec::new();
        let mut txn = Vec::new();
        for (commit, _, _) in rows {
            if transactions.last().map(|t| t.commit) != Some(Lsn(*commit)) {
                transactions.push(Transaction { commit: Lsn(*commit), xid: 1, committed_at_micros: 0 });
            }
            txn.push(transactions.len() as u32 - 1);
        }
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(txn)),
            Arc::new(UInt64Array::from(rows.iter().map(|r| r.1).collect::<Vec<_>>())),
            Arc::new(UInt32Array::from(rows.iter().map(|r| r.2).collect::<Vec<_>>())),
            Arc::new(UInt8Array::from(vec![Op::Insert as u8; rows.len()])),
            Arc::new(BinaryArray::from(vec![None::<&[u8]>; rows.len()])),
        ];
        let rows = RecordBatch::try_new(arrow_schema(&schema), columns).unwrap();
        Arc::new(SegmentBody { transactions, tables: vec![TableChanges { schema, rows }] })
    }

    fn segment(after: Position, to: Position, complete_to: Position, rows: &[(u64, u64, u32)]) -> AcceptedSegment {
        AcceptedSegment { after, to, complete_to, epoch: Epoch(7), body: Some(body(rows)), bytes: 100 }
    }

    fn end(lsn: u64) -> Position {
        Position::before(Lsn(lsn))
    }

    #[test]
    fn h13_half_a_transaction_is_never_in_a_batch() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let middle = Position::of(Lsn(20), Lsn(12), 1);
        assembler.push(segment(end(10), middle, end(10), &[(20, 11, 1), (20, 12, 1)]));
        assert!(assembler.batch(1 << 20).is_none());
        assert!(!assembler.has_complete_rows());
        assembler.push(segment(middle, end(25), end(25), &[(20, 13, 1)]));
        let batch = assembler.batch(1 << 20).unwrap();
        assert_eq!((batch.from, batch.to, batch.rows()), (end(10), end(25), 3));
        assembler.applied(batch.to);
        assert_eq!((assembler.held_bytes(), assembler.held_rows()), (0, 0));
    }

    #[test]
    fn a_transaction_that_ends_inside_a_segment_is_cut_there() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let middle = Position::of(Lsn(40), Lsn(31), 1);
        assembler.push(segment(end(10), middle, end(25), &[(20, 11, 1), (40, 30, 1), (40, 31, 1)]));
        let first = assembler.batch(1 << 20).unwrap();
        assert_eq!((first.to, first.rows()), (end(25), 1));
        assembler.applied(first.to);
        assert!(assembler.batch(1 << 20).is_none());
        assembler.push(segment(middle, end(45), end(45), &[(40, 32, 1)]));
        let second = assembler.batch(1 << 20).unwrap();
        assert_eq!((second.from, second.to, second.rows()), (end(25), end(45), 3));
    }

    #[test]
    fn the_byte_bound_cuts_between_segments_but_never_starves() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        for n in 1..=5 {
            let (from, to) = (end(10 * n), end(10 * n + 10));
            assembler.push(segment(from, to, to, &[(10 * n + 5, 10 * n + 1, 1)]));
        }
        let batch = assembler.batch(250).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(30), 2));
        let tiny = assembler.batch(1).unwrap();
        assert_eq!(tiny.rows(), 1);
    }

    #[test]
    fn rows_that_the_sink_has_are_left_out() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let seen = Position::of(Lsn(20), Lsn(11), 1);
        assembler.push(segment(end(10), seen, end(10), &[(20, 11, 1)]));
        // The tail was cut again into another segment: the reader trims what it has.
        assembler.push(segment(seen, end(25), end(25), &[(20, 11, 1), (20, 12, 1)]));
        let batch = assembler.batch(1 << 20).unwrap();
        assert_eq!(batch.rows(), 2);
    }

    #[test]
    fn a_heartbeat_moves_the_position_without_rows() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        assembler.push(AcceptedSegment {
            after: end(10),
            to: end(90),
            complete_to: end(90),
            epoch: Epoch(8),
            body: None,
            bytes: 0,
        });
        assert!(!assembler.has_complete_rows());
        let batch = assembler.batch(1 << 20).unwrap();
        assert_eq!((batch.to, batch.parts.len(), batch.log_epoch), (end(90), 0, Epoch(8)));
    }
}
