#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
//! Streams made by hand: positions, cuts, restarts, heartbeats.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use wallaby_model::{Column, ColumnType, Lsn, Op, Position, ReplicaIdentity, TableName, TableSchema};

use super::{Assembler, Limits, SegmentDraft, Step};
use crate::error::SourceError;

pub(super) const LIMITS: Limits = Limits {
    segment_target_bytes: 128 << 10,
    segment_bytes_max: 512 << 10,
    row_bytes_max: 900 << 10,
    large_transaction_bytes: 64 << 20,
    parts: None,
    heartbeat_every: Duration::from_secs(1),
};

pub(super) fn shape(oid: u32) -> TableSchema {
    let column = |name: &str, kind, identity| Column {
        name: name.into(),
        kind,
        sql_type: String::new(),
        type_oid: 0,
        type_modifier: -1,
        identity,
        not_null: identity,
    };
    TableSchema {
        oid,
        table: TableName::new("public", format!("t{oid}")),
        identity: ReplicaIdentity::Default,
        columns: vec![column("id", ColumnType::Int4, true), column("v", ColumnType::Text, false)],
        primary_key: vec![0],
    }
}

pub(super) fn begin(commit: u64, xid: u32) -> Vec<u8> {
    let mut message = vec![b'B'];
    message.extend_from_slice(&commit.to_be_bytes());
    message.extend_from_slice(&0i64.to_be_bytes());
    message.extend_from_slice(&xid.to_be_bytes());
    message
}

pub(super) fn commit(lsn: u64, end: u64) -> Vec<u8> {
    let mut message = vec![b'C', 0];
    message.extend_from_slice(&lsn.to_be_bytes());
    message.extend_from_slice(&end.to_be_bytes());
    message.extend_from_slice(&0i64.to_be_bytes());
    message
}

pub(super) fn insert(oid: u32, id: u32, text: &str) -> Vec<u8> {
    let mut message = vec![b'I'];
    message.extend_from_slice(&oid.to_be_bytes());
    message.extend_from_slice(&[b'N', 0, 2]);
    for value in [&id.to_string(), text] {
        message.push(b't');
        message.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
        message.extend_from_slice(value.as_bytes());
    }
    message
}

fn assembler(limits: Limits, resume: Position) -> Assembler {
    let mut assembler = Assembler::new(limits, 1, resume);
    for oid in 1..4 {
        assembler.set_shape(shape(oid)).unwrap();
    }
    assembler
}

fn positions(draft: &SegmentDraft) -> Vec<Position> {
    let body = &draft.body;
    let mut all: Vec<Position> = body
        .tables
        .iter()
        .flat_map(|table| (0..table.rows.num_rows()).map(|row| table.position(row, &body.transactions)))
        .collect();
    all.sort();
    all
}

#[test]
fn an_empty_transaction_is_a_heartbeat_and_extends_a_segment() {
    let now = Instant::now();
    let mut assembler = assembler(LIMITS, Position::before(Lsn(10)));
    assembler.push(Lsn(20), &begin(20, 1)).unwrap();
    assert_eq!(assembler.heartbeat_wait(now), None, "not inside of a transaction");
    assembler.push(Lsn(20), &commit(20, 30)).unwrap();
    assert_eq!(assembler.take_heartbeat(now), Some(Position::before(Lsn(30))));
    assert_eq!(assembler.take_heartbeat(now), None);

    assembler.push(Lsn(31), &begin(40, 2)).unwrap();
    assembler.push(Lsn(31), &insert(1, 1, "x")).unwrap();
    assert!(!assembler.has_whole_transactions());
    assembler.push(Lsn(40), &commit(40, 50)).unwrap();
    assembler.push(Lsn(60), &begin(60, 3)).unwrap();
    assembler.push(Lsn(60), &commit(60, 70)).unwrap();
    assert_eq!(assembler.take_heartbeat(now), None, "rows go first");
    let draft = assembler.take_segment().unwrap().unwrap();
    assert_eq!((draft.to, draft.complete_to), (Position::before(Lsn(70)), Position::before(Lsn(70))));
    assert_eq!(positions(&draft), [Position::of(Lsn(40), Lsn(31), 1)]);
}

#[test]
fn b84_keepalives_make_a_heartbeat_a_second_in_stream_order() {
    let now = Instant::now();
    let mut assembler = assembler(LIMITS, Position::before(Lsn(10)));
    assembler.keepalive(Lsn(10)).unwrap();
    assert_eq!(assembler.take_heartbeat(now), None, "nothing new");
    assembler.keepalive(Lsn(11)).unwrap();
    assert_eq!(assembler.take_heartbeat(now), Some(Position::before(Lsn(11))));
    assembler.keepalive(Lsn(12)).unwrap();
    assert_eq!(assembler.take_heartbeat(now + Duration::from_millis(900)), None);
    assert_eq!(assembler.heartbeat_wait(now + Duration::from_millis(900)), Some(Duration::from_millis(100)));
    assembler.keepalive(Lsn(13)).unwrap();
    assert_eq!(assembler.take_heartbeat(now + Duration::from_secs(1)), Some(Position::before(Lsn(13))));
    // While a transaction is open a keepalive says nothing.
    assembler.push(Lsn(14), &begin(20, 1)).unwrap();
    assembler.push(Lsn(14), &insert(1, 1, "x")).unwrap();
    assembler.keepalive(Lsn(99)).unwrap();
    assembler.push(Lsn(20), &commit(20, 30)).unwrap();
    let draft = assembler.take_segment().unwrap().unwrap();
    assert_eq!(draft.to, Position::before(Lsn(30)));
    assert_eq!(assembler.take_heartbeat(now + Duration::from_secs(9)), None);
}

#[test]
fn a_transaction_that_ends_after_its_rows_were_given_out_is_completed_at_once() {
    let now = Instant::now();
    let mut assembler = assembler(LIMITS, Position::before(Lsn(10)));
    assembler.keepalive(Lsn(11)).unwrap();
    assembler.take_heartbeat(now).unwrap();
    assembler.push(Lsn(14), &begin(20, 1)).unwrap();
    assembler.push(Lsn(14), &insert(1, 1, "x")).unwrap();
    let draft = assembler.take_segment().unwrap().unwrap();
    assert_eq!((draft.to, draft.complete_to), (Position::of(Lsn(20), Lsn(14), 1), Position::before(Lsn(11))));
    assembler.push(Lsn(20), &commit(20, 30)).unwrap();
    assert_eq!(assembler.take_heartbeat(now), Some(Position::before(Lsn(30))), "no waiting for the second");
}

#[test]
fn what_came_whole_is_given_out_before_a_row_that_is_too_large_is_an_error() {
    let limits = Limits { row_bytes_max: 10_000, ..LIMITS };
    let mut assembler = assembler(limits, Position::ZERO);
    assembler.push(Lsn(1), &begin(5, 1)).unwrap();
    assembler.push(Lsn(1), &insert(1, 1, "x")).unwrap();
    assembler.push(Lsn(5), &commit(5, 6)).unwrap();
    assembler.push(Lsn(7), &begin(9, 77)).unwrap();
    let row = insert(2, 2, &"x".repeat(10_000));
    assert!(matches!(assembler.push(Lsn(7), &row).unwrap(), Step::FlushFirst));
    let draft = assembler.take_segment().unwrap().unwrap();
    assert_eq!((draft.to, draft.rows), (Position::before(Lsn(6)), 1));
    let error = assembler.push(Lsn(7), &row).unwrap_err();
    assert!(matches!(&error, SourceError::RowTooLarge { xid: 77, table, .. } if table.name == "t2"), "{error}");
}

/// A server with a small `max_payload`: a segment that it refuses would be tried again for ever.
#[test]
fn no_segment_grows_beyond_what_the_log_takes() {
    let limits = Limits { row_bytes_max: 200 << 10, ..LIMITS };
    let mut assembler = assembler(limits, Position::ZERO);
    assembler.push(Lsn(1), &begin(99, 1)).unwrap();
    let mut drafts = Vec::new();
    // Each of them fits, no two of them do, and the first one is less than what a segment should have.
    for (id, bytes) in [(1, 100 << 10), (2, 150 << 10), (3, 100 << 10), (4, 150 << 10)] {
        let (lsn, row) = (Lsn(10 * u64::from(id)), insert(1, id, &"x".repeat(bytes)));
        let mut step = assembler.push(lsn, &row).unwrap();
        if matches!(step, Step::FlushFirst) {
            drafts.extend(assembler.take_segment().unwrap());
            step = assembler.push(lsn, &row).unwrap();
        }
        match step {
            Step::Taken => {}
            Step::Full => drafts.extend(assembler.take_segment().unwrap()),
            other => panic!("{other:?}"),
        }
    }
    drafts.extend(assembler.take_segment().unwrap());
    let bytes: Vec<usize> = drafts.iter().map(|draft| draft.content_bytes).collect();
    assert!(bytes.iter().all(|bytes| *bytes <= limits.row_bytes_max), "{bytes:?} of {}", limits.row_bytes_max);
    assert_eq!(drafts.iter().map(|draft| draft.rows).sum::<usize>(), 4);
}

#[test]
fn h04_a_half_staged_transaction_that_never_comes_is_an_error_and_not_taken_for_whole() {
    let log_end = Position::of(Lsn(40), Lsn(30), 2);
    let gone = |error: SourceError, passed| {
        assert!(
            matches!(error, SourceError::TransactionGone { log_end: end, passed: at } if end == log_end && at == Lsn(passed)),
            "{error}"
        );
        assert!(!error.is_transient() && error.remedy().is_some());
    };
    let parts = Some(super::PartLimits {
        target_bytes: 1 << 20,
        open_bytes_max: 4 << 20,
        row_bytes_max: 8 << 20,
        only_whole: false,
    });
    let limits = Limits { parts, ..LIMITS };
    gone(assembler(LIMITS, log_end).push(Lsn(31), &begin(41, 2)).unwrap_err(), 41);
    gone(assembler(LIMITS, log_end).keepalive(Lsn(41)).unwrap_err(), 41);
    let mut streams = Assembler::new(limits, 2, log_end);
    gone(streams.push(Lsn(50), &super::large_tests::stream_commit(7, 50, 51)).unwrap_err(), 50);

    // What committed before it may come again, and the server may say how far it has got.
    let mut whole = assembler(LIMITS, log_end);
    whole.keepalive(Lsn(40)).unwrap();
    whole.push(Lsn(20), &begin(25, 1)).unwrap();
    whole.push(Lsn(25), &commit(25, 26)).unwrap();
    whole.push(Lsn(30), &begin(40, 2)).unwrap();
    whole.push(Lsn(30), &insert(1, 1, "x")).unwrap();
    whole.keepalive(Lsn(99)).unwrap();
    whole.push(Lsn(40), &commit(40, 45)).unwrap();
    whole.keepalive(Lsn(46)).unwrap();
    whole.push(Lsn(50), &begin(60, 3)).unwrap();
}

#[test]
fn messages_out_of_order_are_errors_and_never_panics() {
    let mut assembler = assembler(LIMITS, Position::ZERO);
    assert!(assembler.push(Lsn(1), &insert(1, 1, "x")).is_err(), "no transaction");
    assert!(assembler.push(Lsn(1), &commit(1, 2)).is_err());
    assert!(assembler.push(Lsn(1), b"S\0\0\0\x01\x01").is_err(), "not asked for");
    assembler.push(Lsn(3), &begin(9, 1)).unwrap();
    assert!(assembler.push(Lsn(3), &begin(9, 1)).is_err());
    assert!(assembler.push(Lsn(3), &insert(99, 1, "x")).is_err(), "an unknown table");
    assembler.push(Lsn(5), &insert(1, 1, "x")).unwrap();
    assert!(assembler.push(Lsn(4), &insert(1, 1, "x")).is_err(), "LSNs fall");
    assert!(assembler.push(Lsn(9), &commit(8, 9)).is_err(), "the end of another transaction");
}

/// A stream of transactions: per transaction, per LSN, rows with their table and size.
fn streams() -> impl Strategy<Value = Vec<Vec<Vec<(u32, usize)>>>> {
    let rows = proptest::collection::vec((1u32..4, 0usize..300), 1..5);
    proptest::collection::vec(proptest::collection::vec(rows, 0..6), 1..12)
}

fn messages(stream: &[Vec<Vec<(u32, usize)>>]) -> Vec<(Lsn, u64, Vec<u8>)> {
    let mut lsn = 100;
    let mut id = 0;
    let mut out = Vec::new();
    for (xid, transaction) in stream.iter().enumerate() {
        let commit_lsn = lsn + 10 * transaction.len() as u64;
        out.push((Lsn(lsn), commit_lsn, begin(commit_lsn, xid as u32 + 1)));
        for record in transaction {
            for (oid, size) in record {
                id += 1;
                out.push((Lsn(lsn), commit_lsn, insert(*oid, id, &"v".repeat(*size))));
            }
            lsn += 10;
        }
        lsn = commit_lsn + 5;
        out.push((Lsn(commit_lsn), commit_lsn, commit(commit_lsn, lsn)));
    }
    out
}

proptest! {
    #[test]
    fn b58_cuts_and_restarts_anywhere_leave_no_gap_and_no_repeat(
        stream in streams(),
        target in 2000usize..12_000,
        restarts in proptest::collection::vec(any::<bool>(), 40),
    ) {
        let all = messages(&stream);
        let limits = Limits { segment_target_bytes: target, segment_bytes_max: 2 * target, ..LIMITS };
        let mut end = Position::before(Lsn(100));
        let mut got = Vec::new();
        let mut restarts = restarts.into_iter();
        let mut state = assembler(limits, end);
        let mut next = 0;
        let mut complete_to = end;
        loop {
            let flush = match all.get(next) {
                Some((lsn, _, message)) => match state.push(*lsn, message).unwrap() {
                    Step::Taken => { next += 1; false }
                    Step::Full => { next += 1; true }
                    Step::FlushFirst => true,
                    Step::Shape(_) | Step::Ready => unreachable!(),
                },
                None => true,
            };
            if !flush {
                continue;
            }
            match state.take_segment().unwrap() {
                Some(draft) => {
                    prop_assert!(draft.to > end && draft.complete_to >= complete_to && draft.complete_to <= draft.to);
                    let rows = positions(&draft);
                    prop_assert!(*rows.first().unwrap() > end && *rows.last().unwrap() <= draft.to);
                    for table in &draft.body.tables {
                        prop_assert!(table.is_well_formed(draft.body.transactions.len()));
                        prop_assert!((0..table.rows.num_rows()).all(|row| table.op_at(row) == Some(Op::Insert)));
                    }
                    got.extend(rows);
                    end = draft.to;
                    complete_to = draft.complete_to;
                }
                None if next == all.len() => break,
                None => {}
            }
            if restarts.next().unwrap_or(false) {
                // The server begins again with the first transaction whose commit LSN is not before ours.
                state = assembler(limits, end);
                next = all.iter().position(|(_, commit_lsn, _)| *commit_lsn >= end.commit.0).unwrap_or(all.len());
            }
        }
        let mut wanted = Vec::new();
        let mut last = (0, Lsn(0), 0);
        for (lsn, commit_lsn, message) in &all {
            if message[0] == b'I' {
                let index = if (last.0, last.1) == (*commit_lsn, *lsn) { last.2 + 1 } else { 1 };
                last = (*commit_lsn, *lsn, index);
                wanted.push(Position::of(Lsn(*commit_lsn), *lsn, index));
            }
        }
        prop_assert_eq!(got, wanted);
    }
}
