//! Cuts what a reader accepted into batches that a sink may show: pure, no I/O.
//!
//! A sink commits only where a source transaction ends. Segments are cut for size and so end anywhere; this holds what
//! lies past the last whole transaction until its end arrives. A transaction of which too much is held, or whose rest stands
//! in the side store, is not waited for: [`BatchAssembler::is_large_next`] says so, and it is taken out piece by piece.

use std::collections::VecDeque;
use std::sync::Arc;

use wallaby_connector_api::{Batch, BatchPart, TableFilter};
use wallaby_model::{Epoch, Lsn, Position, SegmentBody, Splice, TraceParent};

/// A data segment, a splice or a heartbeat that the reader rule accepted.
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
    /// The rows; `None` for a heartbeat and a splice.
    pub body: Option<Arc<SegmentBody>>,
    /// The rows stand in the side store.
    pub splice: Option<Splice>,
    /// Encoded bytes, for bounds.
    pub bytes: usize,
    /// The span that it was made in, if somebody looks at traces.
    pub made_in: Option<TraceParent>,
}

/// A piece of a large transaction.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Rows; `None` for a record without any. More comes.
    Part(Option<BatchPart>),
    /// The rest stands in the side store; it ends there.
    Splice {
        /// Which transaction.
        splice: Splice,
        /// Rows at or before this were seen already.
        after: Position,
        /// The transaction's end.
        to: Position,
        /// The log's epoch there.
        epoch: Epoch,
    },
    /// The last rows.
    Last {
        /// Rows, if there are any.
        part: Option<BatchPart>,
        /// The end.
        to: Position,
        /// The log's epoch there.
        epoch: Epoch,
    },
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

    /// When the oldest transaction was committed that is held and that the sink does not have, µs since 1970.
    pub fn oldest_micros(&self) -> Option<i64> {
        let of = |segment: &AcceptedSegment| {
            let bodies = segment.body.iter().flat_map(|body| &body.transactions);
            let mut open = bodies.chain(segment.splice.iter().map(|splice| &splice.transaction));
            open.find(|transaction| transaction.commit >= self.at.commit)
                .map(|transaction| transaction.committed_at_micros)
        };
        self.held.iter().find_map(of)
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

    /// What may go into a batch: what is held before the first splice.
    fn plain(&self) -> impl Iterator<Item = &AcceptedSegment> {
        self.held.iter().take_while(|segment| segment.splice.is_none())
    }

    /// Up to where a batch could go now.
    pub fn complete_to(&self) -> Position {
        self.plain().map(|segment| segment.complete_to).max().unwrap_or(self.at).max(self.at)
    }

    /// Whether a batch taken now would have rows.
    pub fn has_complete_rows(&self) -> bool {
        let up_to = self.complete_to();
        let mut bodies = self.plain().filter_map(|segment| segment.body.as_ref().map(|body| (segment, body)));
        bodies.any(|(segment, body)| {
            let after = segment.after.max(self.at);
            body.tables.iter().any(|table| table.slice(&body.transactions, after, up_to).rows.num_rows() > 0)
        })
    }

    /// Whether what comes next is a transaction that is not to be held as a whole: one that goes on in the side store, or one
    /// without an end of which more than `bytes_max` are held.
    pub fn is_large_next(&self, bytes_max: usize) -> bool {
        let has_splice = self.held.iter().any(|segment| segment.splice.is_some());
        self.complete_to() <= self.at && (has_splice || self.held_bytes > bytes_max)
    }

    /// The commit LSN of the large transaction that is next: see [`Self::is_large_next`].
    pub fn large_next(&self, bytes_max: usize) -> Option<Lsn> {
        let front = self.held.front().filter(|_| self.is_large_next(bytes_max))?;
        Some(front.splice.map_or(front.to.commit, |splice| splice.transaction.commit))
    }

    /// A batch without rows: nothing stands between where the sink is and `to`.
    pub fn nothing_up_to(&self, to: Position) -> Batch {
        Batch { from: self.at, to, log_epoch: self.epoch, parts: Vec::new() }
    }

    /// Whether the position has to move although there are no rows to apply: what stands behind it is more than `bytes_max`, and no
    /// piece of it can be given out before.
    pub fn must_move(&self, bytes_max: usize) -> bool {
        self.complete_to() > self.at && self.held_bytes > bytes_max
    }

    /// A batch with everything up to the last whole transaction before a splice and at or before `limit`, or with as many held
    /// segments as stay within `bytes_max` and contain a transaction's end. `None` when no transaction ended. The assembler
    /// does not move: [`Self::applied`] does, so that a failed batch can be taken again.
    pub fn batch(&self, bytes_max: usize, limit: Option<Position>, tables: Option<&Arc<TableFilter>>) -> Option<Batch> {
        let mut to = self.at;
        let mut bytes = 0;
        let mut epoch = self.epoch;
        for segment in self.plain() {
            bytes += segment.bytes;
            if (bytes > bytes_max && to > self.at) || limit.is_some_and(|limit| to >= limit) {
                break;
            }
            if segment.complete_to > to {
                to = segment.complete_to;
                epoch = segment.epoch;
            }
        }
        // A limit is a place between transactions, so everything before it is whole.
        to = limit.map_or(to, |limit| to.min(limit));
        if to <= self.at {
            return None;
        }
        let mut parts = Vec::new();
        for segment in self.plain() {
            let after = segment.after.max(self.at);
            if after >= to {
                break;
            }
            if let Some(body) = &segment.body {
                let (body, tables) = (Arc::clone(body), tables.cloned());
                parts.push(BatchPart { body, after, up_to: to.min(segment.to), tables });
            }
        }
        Some(Batch { from: self.at, to, log_epoch: epoch, parts })
    }

    /// The spans that what a batch up to `to` consists of was made in, in order.
    pub fn made_in(&self, to: Position) -> impl Iterator<Item = TraceParent> {
        let of_batch = self.plain().take_while(move |segment| segment.after.max(self.at) < to);
        of_batch.filter_map(|segment| segment.made_in)
    }

    /// The span that the piece which is next was made in.
    pub fn piece_made_in(&self) -> Option<TraceParent> {
        self.held.front()?.made_in
    }

    /// The next piece of the large transaction that is next, and of whole ones behind it up to `limit`; `None` when it has to be
    /// read first. What was given out is no longer held: after an error the log is read again.
    pub fn take_piece(&mut self, limit: Option<Position>, tables: Option<&Arc<TableFilter>>) -> Option<Piece> {
        let front = self.held.front()?;
        let after = front.after.max(self.at);
        let part = |up_to: Position| {
            let body = front.body.as_ref().map(Arc::clone)?;
            Some(BatchPart { body, after, up_to, tables: tables.cloned() })
        };
        if let Some(splice) = front.splice {
            let piece = Piece::Splice { splice, after, to: front.to, epoch: front.epoch };
            self.drop_front();
            return Some(piece);
        }
        if front.complete_to > self.at {
            // Its end, and maybe whole transactions behind it. The segment stays: it may have the beginning of another one.
            let to = limit.map_or(front.complete_to, |limit| limit.min(front.complete_to));
            let epoch = front.epoch;
            return Some(Piece::Last { part: part(to.min(front.to)), to, epoch });
        }
        let piece = Piece::Part(part(front.to));
        self.drop_front();
        Some(piece)
    }

    fn drop_front(&mut self) {
        let Some(segment) = self.held.pop_front() else { return };
        self.held_bytes -= segment.bytes;
        self.held_rows -= segment.body.as_ref().map_or(0, |body| body.rows());
    }

    /// The sink has everything up to `position`.
    pub fn applied(&mut self, position: Position) {
        assert!(position >= self.at && position <= self.end, "a sink stands on what it was given");
        self.at = position;
        let reached = self.held.iter().filter(|segment| segment.complete_to <= position).map(|segment| segment.epoch);
        self.epoch = reached.max().unwrap_or(self.epoch).max(self.epoch);
        while self.held.front().is_some_and(|segment| segment.to <= position) {
            self.drop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use arrow_array::{ArrayRef, BinaryArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
    use wallaby_model::change::arrow_schema;
    use wallaby_model::{Op, ReplicaIdentity, TableChanges, TableName, TableSchema, Transaction};

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
        let (body, made_in) = (Some(body(rows)), TraceParent::new(1, to.commit.0, true));
        AcceptedSegment { after, to, complete_to, epoch: Epoch(7), body, splice: None, bytes: 100, made_in }
    }

    fn end(lsn: u64) -> Position {
        Position::before(Lsn(lsn))
    }

    #[test]
    fn h13_half_a_transaction_is_never_in_a_batch() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let middle = Position::of(Lsn(20), Lsn(12), 1);
        assembler.push(segment(end(10), middle, end(10), &[(20, 11, 1), (20, 12, 1)]));
        assert!(assembler.batch(1 << 20, None, None).is_none());
        assert!(!assembler.has_complete_rows());
        assembler.push(segment(middle, end(25), end(25), &[(20, 13, 1)]));
        let batch = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((batch.from, batch.to, batch.rows()), (end(10), end(25), 3));
        assembler.applied(batch.to);
        assert_eq!((assembler.held_bytes(), assembler.held_rows()), (0, 0));
    }

    #[test]
    fn a_transaction_that_ends_inside_a_segment_is_cut_there() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let middle = Position::of(Lsn(40), Lsn(31), 1);
        assembler.push(segment(end(10), middle, end(25), &[(20, 11, 1), (40, 30, 1), (40, 31, 1)]));
        let first = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((first.to, first.rows()), (end(25), 1));
        assembler.applied(first.to);
        assert!(assembler.batch(1 << 20, None, None).is_none());
        assembler.push(segment(middle, end(45), end(45), &[(40, 32, 1)]));
        let second = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((second.from, second.to, second.rows()), (end(25), end(45), 3));
    }

    #[test]
    fn the_byte_bound_cuts_between_segments_but_never_starves() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        for n in 1..=5 {
            let (from, to) = (end(10 * n), end(10 * n + 10));
            assembler.push(segment(from, to, to, &[(10 * n + 5, 10 * n + 1, 1)]));
        }
        let batch = assembler.batch(250, None, None).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(30), 2));
        let tiny = assembler.batch(1, None, None).unwrap();
        assert_eq!(tiny.rows(), 1);
    }

    #[test]
    fn a_batch_is_told_the_spans_of_its_segments_and_of_no_others() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let spans = |assembler: &BatchAssembler, to| assembler.made_in(to).map(|made| made.span()).collect::<Vec<_>>();
        assembler.push(segment(end(10), end(20), end(20), &[(15, 11, 1)]));
        assembler.push(segment(end(20), Position::of(Lsn(45), Lsn(31), 1), end(30), &[(25, 21, 1), (45, 31, 1)]));
        assembler.push(AcceptedSegment {
            made_in: None,
            ..segment(Position::of(Lsn(45), Lsn(31), 1), end(50), end(50), &[(45, 32, 1)])
        });
        assembler.push(segment(end(50), end(60), end(60), &[(55, 51, 1)]));
        let batch = assembler.batch(200, None, None).unwrap();
        assert_eq!(batch.to, end(30));
        assert_eq!(spans(&assembler, batch.to), [20, 45]);
        assembler.applied(batch.to);
        // A segment of two batches is of both.
        assert_eq!(assembler.piece_made_in().map(|made| made.span()), Some(45));
        assert_eq!(spans(&assembler, assembler.batch(1 << 20, None, None).unwrap().to), [45, 60]);
        assembler.applied(end(60));
        assert_eq!((assembler.piece_made_in(), spans(&assembler, end(60))), (None, vec![]));
    }

    #[test]
    fn rows_that_the_sink_has_are_left_out() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let seen = Position::of(Lsn(20), Lsn(11), 1);
        assembler.push(segment(end(10), seen, end(10), &[(20, 11, 1)]));
        // The tail was cut again into another segment: the reader trims what it has.
        assembler.push(segment(seen, end(25), end(25), &[(20, 11, 1), (20, 12, 1)]));
        let batch = assembler.batch(1 << 20, None, None).unwrap();
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
            splice: None,
            bytes: 0,
            made_in: None,
        });
        assert!(!assembler.has_complete_rows());
        let batch = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((batch.to, batch.parts.len(), batch.log_epoch), (end(90), 0, Epoch(8)));
    }

    fn splice(after: Position, to: Position, commit: u64) -> AcceptedSegment {
        let transaction = Transaction { commit: Lsn(commit), xid: 9, committed_at_micros: 0 };
        let splice = Splice { transaction, rows: 3, bytes: 10 };
        AcceptedSegment { splice: Some(splice), body: None, bytes: 0, ..segment(after, to, to, &[]) }
    }

    #[test]
    fn a_batch_ends_before_a_splice_and_a_splice_is_a_large_transaction_of_its_own() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        assembler.push(segment(end(10), end(25), end(25), &[(20, 11, 1)]));
        assembler.push(splice(end(25), end(45), 40));
        assembler.push(segment(end(45), end(55), end(55), &[(50, 46, 1)]));
        let batch = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(25), 1));
        assert!(!assembler.is_large_next(1 << 20));
        assembler.applied(batch.to);
        assert!(assembler.is_large_next(1 << 20) && assembler.batch(1 << 20, None, None).is_none());
        assert_eq!(assembler.large_next(1 << 20), Some(Lsn(40)));
        let Some(Piece::Splice { to, after, .. }) = assembler.take_piece(None, None) else {
            panic!("a splice is next")
        };
        assert_eq!((after, to), (end(25), end(45)));
        assembler.applied(to);
        assert_eq!(assembler.batch(1 << 20, None, None).unwrap().to, end(55));
    }

    #[test]
    fn a_splice_continues_what_stands_in_the_log() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let middle = Position::of(Lsn(40), Lsn(31), 1);
        assembler.push(segment(end(10), middle, end(25), &[(20, 11, 1), (40, 31, 1)]));
        assembler.push(splice(middle, end(45), 40));
        let batch = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(25), 1));
        assembler.applied(batch.to);
        assert!(assembler.is_large_next(1 << 20));
        let Some(Piece::Part(Some(part))) = assembler.take_piece(None, None) else {
            panic!("the log's rows come first")
        };
        assert_eq!((part.after, part.up_to), (end(25), middle));
        assert!(matches!(assembler.take_piece(None, None), Some(Piece::Splice { after, .. }) if after == middle));
    }

    #[test]
    fn a_transaction_that_is_large_in_the_log_is_not_held() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        let at = |n: u64| Position::of(Lsn(90), Lsn(n), 1);
        assembler.push(segment(end(10), at(20), end(10), &[(90, 20, 1)]));
        assert!(!assembler.is_large_next(150));
        assembler.push(segment(at(20), at(30), end(10), &[(90, 30, 1)]));
        assert!(assembler.is_large_next(150));
        let mut rows = 0;
        for _ in 0..2 {
            let Some(Piece::Part(Some(part))) = assembler.take_piece(None, None) else { panic!("a part") };
            rows += part.tables().map(|table| table.rows.num_rows()).sum::<usize>();
        }
        assert!(assembler.take_piece(None, None).is_none() && assembler.held_bytes() == 0);
        let next = Position::of(Lsn(120), Lsn(101), 1);
        assembler.push(segment(at(30), next, end(95), &[(90, 31, 1), (120, 101, 1)]));
        let Some(Piece::Last { part: Some(part), to, .. }) = assembler.take_piece(None, None) else {
            panic!("the end")
        };
        rows += part.tables().map(|table| table.rows.num_rows()).sum::<usize>();
        assert_eq!((rows, to), (3, end(95)));
        assembler.applied(to);
        assembler.push(segment(next, end(125), end(125), &[]));
        assert_eq!(assembler.batch(1 << 20, None, None).unwrap().rows(), 1, "the next one is whole");
    }

    #[test]
    fn a_heartbeat_before_a_large_transaction_does_not_keep_it_in_memory() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        assembler.push(AcceptedSegment { body: None, bytes: 0, ..segment(end(10), end(15), end(15), &[]) });
        let at = |n: u64| Position::of(Lsn(90), Lsn(n), 1);
        assembler.push(segment(end(15), at(20), end(15), &[(90, 20, 1)]));
        assert!(!assembler.must_move(150), "there is room for more of it");
        assembler.push(segment(at(20), at(30), end(15), &[(90, 30, 1)]));
        assert!(!assembler.has_complete_rows() && !assembler.is_large_next(150));
        assert!(assembler.must_move(150));
        let batch = assembler.batch(1 << 20, None, None).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(15), 0));
        assembler.applied(batch.to);
        assert!(assembler.is_large_next(150) && !assembler.must_move(150));
    }

    #[test]
    fn a_limit_cuts_between_transactions() {
        let mut assembler = BatchAssembler::new(end(10), Epoch(7));
        assembler.push(segment(end(10), end(35), end(35), &[(20, 11, 1), (30, 26, 1)]));
        let batch = assembler.batch(1 << 20, Some(end(25)), None).unwrap();
        assert_eq!((batch.to, batch.rows()), (end(25), 1));
        assembler.applied(batch.to);
        assert!(assembler.batch(1 << 20, Some(end(25)), None).is_none());
        assert_eq!(assembler.batch(1 << 20, None, None).unwrap().rows(), 1);
    }
}
