#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
//! Streamed and large transactions: made by hand, made at random, and recorded.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use arrow_array::cast::AsArray;
use proptest::prelude::*;
use wallaby_model::{Column, ColumnType, Lsn, Position, TableSchema};
use wallaby_wire::splice::settle;

use super::tests::{LIMITS, begin, commit, insert, shape};
use super::{Assembler, CaptureEvent, Limits, PartDraft, PartLimits, RelationShape, SegmentDraft, SpliceDraft, Step};
use crate::error::SourceError;

const PARTS: PartLimits =
    PartLimits { target_bytes: 8 << 10, open_bytes_max: 32 << 10, row_bytes_max: 1 << 20, only_whole: false };

/// A change as a reader sees it: position, transaction, table with its number of columns, operation, values.
type Seen = (Position, u32, String, u8, Vec<String>);

/// What a reader of the log and of the side store would see.
#[derive(Default)]
struct Reader {
    end: Position,
    rows: Vec<Seen>,
    parts: HashMap<u32, Vec<PartDraft>>,
    segments: usize,
    splices: Vec<SpliceDraft>,
    abandoned: Vec<u32>,
}

impl Reader {
    fn take(&mut self, event: CaptureEvent) {
        match event {
            CaptureEvent::Segment(SegmentDraft { to, body, rows, .. }) => {
                assert!(to > self.end && rows == body.rows());
                self.segments += 1;
                self.add(&body, to);
            }
            CaptureEvent::Heartbeat { to } => self.end = to,
            CaptureEvent::Part(part) => {
                assert!(part.body.rows() == part.rows && part.rows > 0);
                let parts = self.parts.entry(part.xid).or_default();
                assert_eq!(part.number as usize, parts.len());
                parts.push(part);
            }
            CaptureEvent::Splice(splice) => {
                let parts = self.parts.remove(&splice.transaction.xid).unwrap();
                assert_eq!(parts.len(), splice.parts as usize);
                let after = self.end;
                for part in parts {
                    let body = settle(part.body, &splice.transaction, &splice.aborted, after).unwrap();
                    self.add(&body, splice.to);
                }
                assert!(splice.to > after);
                self.splices.push(splice);
            }
            CaptureEvent::Abandoned { xid } => {
                self.parts.remove(&xid).unwrap();
                self.abandoned.push(xid);
            }
        }
    }

    fn add(&mut self, body: &wallaby_model::SegmentBody, to: Position) {
        let mut rows = Vec::new();
        for table in &body.tables {
            assert!(table.is_well_formed(body.transactions.len()));
            for row in 0..table.rows.num_rows() {
                let columns = table.rows.columns().iter().skip(wallaby_model::change::FIRST_COLUMN);
                let values = columns.map(|column| match column.data_type() {
                    arrow_schema::DataType::Utf8 if !column.is_null(row) => {
                        column.as_string::<i32>().value(row).to_owned()
                    }
                    _ => format!("{:?}", column.slice(row, 1)),
                });
                let name = format!("{}/{}", table.schema.table.name, table.schema.columns.len());
                let transaction = body.transactions[table.txn().value(row) as usize];
                let op = table.op().value(row);
                let position = table.position(row, &body.transactions);
                rows.push((position, transaction.xid, name, op, values.collect()));
            }
        }
        rows.sort_by_key(|row| row.0);
        self.rows.extend(rows);
        self.end = to;
    }
}

/// Pushes messages and takes what comes of them. `flush_at` says where the log is flushed though nothing is full.
fn run(
    assembler: &mut Assembler,
    messages: &[(Lsn, Vec<u8>)],
    shapes: &mut dyn FnMut(RelationShape) -> TableSchema,
    flush_at: &dyn Fn(usize) -> bool,
) -> Result<Reader, SourceError> {
    let mut reader = Reader { end: assembler.end, ..Reader::default() };
    for (at, (lsn, message)) in messages.iter().enumerate() {
        loop {
            let step = assembler.push(*lsn, message)?;
            if let Step::Shape(shape) = &step {
                assembler.set_shape(shapes(shape.clone()))?;
            }
            if matches!(step, Step::Full | Step::FlushFirst) || flush_at(at) {
                while let Some(event) = assembler.take_ready() {
                    reader.take(event);
                }
                if let Some(segment) = assembler.take_segment()? {
                    reader.take(CaptureEvent::Segment(segment));
                }
            }
            while let Some(event) = assembler.take_ready() {
                reader.take(event);
            }
            if !matches!(step, Step::FlushFirst) {
                break;
            }
        }
    }
    if let Some(segment) = assembler.take_segment()? {
        reader.take(CaptureEvent::Segment(segment));
    }
    Ok(reader)
}

fn limits() -> Limits {
    Limits { parts: Some(PARTS), large_transaction_bytes: 64 << 10, ..LIMITS }
}

fn with_shapes(limits: Limits, protocol: u8, resume: Position) -> Assembler {
    let mut assembler = Assembler::new(limits, protocol, resume);
    for oid in 1..4 {
        assembler.set_shape(shape(oid)).unwrap();
    }
    assembler
}

fn no_shapes(_: RelationShape) -> TableSchema {
    unreachable!("the shapes are known")
}

fn start(xid: u32, first: bool) -> Vec<u8> {
    let mut message = vec![b'S'];
    message.extend_from_slice(&xid.to_be_bytes());
    message.push(u8::from(first));
    message
}

fn stop() -> Vec<u8> {
    vec![b'E']
}

/// A message inside of a streamed block.
fn of(sub: u32, message: &[u8]) -> Vec<u8> {
    let mut streamed = vec![message[0]];
    streamed.extend_from_slice(&sub.to_be_bytes());
    streamed.extend_from_slice(&message[1..]);
    streamed
}

pub(super) fn stream_commit(xid: u32, lsn: u64, end: u64) -> Vec<u8> {
    let mut message = vec![b'c'];
    message.extend_from_slice(&xid.to_be_bytes());
    message.extend_from_slice(&commit(lsn, end)[1..]);
    message
}

fn abort(xid: u32, sub: u32) -> Vec<u8> {
    let mut message = vec![b'A'];
    message.extend_from_slice(&xid.to_be_bytes());
    message.extend_from_slice(&sub.to_be_bytes());
    message
}

fn relation(oid: u32, columns: &[&str]) -> Vec<u8> {
    let mut message = vec![b'R'];
    message.extend_from_slice(&oid.to_be_bytes());
    message.extend_from_slice(format!("public\0t{oid}\0d").as_bytes());
    message.extend_from_slice(&u16::try_from(columns.len()).unwrap().to_be_bytes());
    for column in columns {
        message.push(0);
        message.extend_from_slice(column.as_bytes());
        message.push(0);
        message.extend_from_slice(&25u32.to_be_bytes());
        message.extend_from_slice(&(-1i32).to_be_bytes());
    }
    message
}

/// A row of texts.
fn texts(oid: u32, values: &[&str]) -> Vec<u8> {
    let mut message = vec![b'I'];
    message.extend_from_slice(&oid.to_be_bytes());
    message.push(b'N');
    message.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
    for value in values {
        message.push(b't');
        message.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
        message.extend_from_slice(value.as_bytes());
    }
    message
}

/// A shape with every column as text.
fn text_shape(shape: RelationShape) -> TableSchema {
    let columns = shape.columns.iter().map(|column| Column {
        name: column.name.clone(),
        kind: ColumnType::Text,
        sql_type: "text".into(),
        type_oid: 25,
        type_modifier: -1,
        identity: column.identity,
        not_null: false,
    });
    let columns = columns.collect();
    TableSchema { oid: shape.oid, table: shape.table, identity: shape.identity, columns, primary_key: vec![] }
}

#[test]
fn a_streamed_transaction_stands_where_it_commits_without_what_was_rolled_back() {
    let large = "v".repeat(5000);
    let mut messages = vec![(Lsn(10), start(7, true))];
    for n in 0..6 {
        messages.push((Lsn(10 + n), of(if n % 2 == 0 { 7 } else { 8 }, &insert(1, n as u32, &large))));
    }
    messages.push((Lsn(15), stop()));
    // Another one commits while it is in progress.
    messages.extend([(Lsn(20), begin(22, 9)), (Lsn(20), insert(2, 1, "x")), (Lsn(22), commit(22, 23))]);
    messages.extend([
        (Lsn(30), start(7, false)),
        (Lsn(30), of(7, &insert(2, 2, "y"))),
        (Lsn(30), of(7, &insert(2, 3, "z"))),
    ]);
    messages.extend([(Lsn(30), stop()), (Lsn(31), abort(7, 8)), (Lsn(40), stream_commit(7, 40, 41))]);
    let mut assembler = with_shapes(limits(), 4, Position::before(Lsn(5)));
    for oid in 1..3 {
        messages.insert(1, (Lsn(0), of(7, &relation(oid, &["id", "v"]))));
    }
    let reader = run(&mut assembler, &messages, &mut |shape_| shape(shape_.oid), &|_| false).unwrap();
    let seen: Vec<(Position, u32)> = reader.rows.iter().map(|row| (row.0, row.1)).collect();
    let at = |change, index| (Position::of(Lsn(40), Lsn(change), index), 7);
    let other = (Position::of(Lsn(22), Lsn(20), 1), 9);
    assert_eq!(seen, [other, at(10, 1), at(12, 1), at(14, 1), at(30, 1), at(30, 2)]);
    assert_eq!((reader.segments, reader.splices.len(), reader.end), (1, 1, Position::before(Lsn(41))));
    assert_eq!(reader.splices[0].aborted, [(8, 8)]);
}

#[test]
fn little_that_is_left_of_a_streamed_transaction_is_a_segment_and_nothing_a_heartbeat() {
    let mut assembler = Assembler::new(limits(), 2, Position::before(Lsn(5)));
    let mut messages = vec![(Lsn(10), start(7, true)), (Lsn(0), of(7, &relation(1, &["id", "v"])))];
    messages.extend([
        (Lsn(10), of(8, &insert(1, 1, "gone"))),
        (Lsn(11), of(9, &insert(1, 2, "kept"))),
        (Lsn(11), stop()),
    ]);
    messages.extend([(Lsn(12), abort(7, 8)), (Lsn(20), stream_commit(7, 20, 21))]);
    // All of it rolled back by sub-transaction; all of it at once; nothing in it that is published.
    messages.extend([(Lsn(30), start(17, true)), (Lsn(0), of(17, &relation(1, &["id", "v"])))]);
    messages.extend([(Lsn(30), of(18, &insert(1, 1, "gone"))), (Lsn(30), stop()), (Lsn(31), abort(17, 18))]);
    messages.extend([(Lsn(32), stream_commit(17, 32, 33)), (Lsn(40), start(27, true)), (Lsn(40), stop())]);
    messages.extend([
        (Lsn(41), stream_commit(27, 41, 42)),
        (Lsn(50), start(37, true)),
        (Lsn(50), stop()),
        (Lsn(51), abort(37, 37)),
    ]);
    let reader = run(&mut assembler, &messages, &mut |shape_| shape(shape_.oid), &|_| false).unwrap();
    assert_eq!(reader.rows.iter().map(|row| row.0).collect::<Vec<_>>(), [Position::of(Lsn(20), Lsn(11), 1)]);
    assert!(reader.splices.is_empty() && reader.parts.is_empty());
    assert_eq!(assembler.take_heartbeat(std::time::Instant::now()), Some(Position::before(Lsn(42))));
}

/// A message of `pg_logical_emit_message`, part of its transaction.
fn logical(lsn: u64, prefix: &str) -> Vec<u8> {
    let mut message = vec![b'M', 1];
    message.extend_from_slice(&lsn.to_be_bytes());
    message.extend_from_slice(prefix.as_bytes());
    message.extend_from_slice(&[0, 0, 0, 0, 1, b'x']);
    message
}

#[test]
fn h07_messages_also_of_rolled_back_savepoints_change_no_row_no_position_and_no_survivor() {
    let large = "v".repeat(5000);
    let mut messages = vec![(Lsn(10), start(7, true)), (Lsn(0), of(7, &relation(1, &["id", "v"])))];
    // Before, between and at the place of rows. 8 is rolled back, and 9, which had nothing but messages; a message comes under the
    // xid of the whole transaction.
    for n in 0..6_u64 {
        let sub = if n % 2 == 0 { 7 } else { 8 };
        messages.push((Lsn(10 + n), of(7, &logical(10 + n, "ddl"))));
        messages.push((Lsn(10 + n), of(sub, &insert(1, n as u32, &large))));
        messages.push((Lsn(10 + n), of(7, &logical(10 + n, "ddl"))));
        messages.push((Lsn(10 + n), of(sub, &insert(1, 100 + n as u32, "at the same LSN"))));
    }
    messages.extend([(Lsn(15), stop()), (Lsn(31), abort(7, 8)), (Lsn(32), abort(7, 9))]);
    messages.push((Lsn(40), stream_commit(7, 40, 41)));
    // One of which only messages are left, and one that had nothing else.
    messages.extend([(Lsn(50), start(17, true)), (Lsn(0), of(17, &relation(1, &["id", "v"])))]);
    messages.extend([(Lsn(50), of(18, &insert(1, 1, "gone"))), (Lsn(51), of(17, &logical(51, "ddl")))]);
    messages.extend([(Lsn(51), stop()), (Lsn(52), abort(17, 18)), (Lsn(53), stream_commit(17, 53, 54))]);
    messages.extend([(Lsn(60), start(27, true)), (Lsn(60), of(27, &logical(60, "ddl"))), (Lsn(60), stop())]);
    messages.extend([(Lsn(61), abort(27, 28)), (Lsn(62), stream_commit(27, 62, 63))]);
    // One that is not streamed.
    messages.extend([(Lsn(70), begin(71, 3)), (Lsn(70), logical(70, "ddl")), (Lsn(70), insert(2, 1, "x"))]);
    messages.push((Lsn(71), commit(71, 72)));
    let read = |messages: &[(Lsn, Vec<u8>)]| {
        let mut assembler = with_shapes(limits(), 4, Position::before(Lsn(5)));
        run(&mut assembler, messages, &mut |shape_| shape(shape_.oid), &|_| false).unwrap()
    };
    let got = read(&messages);
    let is_row = |(_, message): &&(Lsn, Vec<u8>)| message[0] != b'M';
    let without: Vec<(Lsn, Vec<u8>)> = messages.iter().filter(is_row).cloned().collect();
    assert_eq!(messages.len() - without.len(), 15);
    let wanted = read(&without);
    assert_eq!(got.rows, wanted.rows);
    let place = |row: &Seen| (row.0.change, row.0.index);
    let places: Vec<(Lsn, u32)> = got.rows.iter().map(place).collect();
    let at = |lsn, index| (Lsn(lsn), index);
    assert_eq!(places, [at(10, 1), at(10, 2), at(12, 1), at(12, 2), at(14, 1), at(14, 2), at(70, 1)]);
    let aborted: Vec<&[(u32, u32)]> = got.splices.iter().map(|splice| &splice.aborted[..]).collect();
    assert_eq!(aborted, [[(8, 8)]], "9 had no rows, and the other transactions have none left");
    assert_eq!((got.end, got.segments), (Position::before(Lsn(72)), 1));
}

#[test]
fn h12_each_streamed_transaction_decodes_with_its_own_shape() {
    let mut messages = vec![(Lsn(1), begin(3, 1)), (Lsn(0), relation(1, &["a"])), (Lsn(1), texts(1, &["before"]))];
    messages.push((Lsn(3), commit(3, 4)));
    // 7 alters the table; 8 uses it as it was, in between; a third commits meanwhile.
    messages.extend([(Lsn(8), start(8, true)), (Lsn(0), of(8, &relation(1, &["a"]))), (Lsn(8), stop())]);
    messages.extend([(Lsn(10), start(7, true)), (Lsn(0), of(7, &relation(1, &["a", "b"])))]);
    messages.extend([(Lsn(10), of(7, &texts(1, &["7", "new"]))), (Lsn(10), stop())]);
    messages.extend([(Lsn(11), start(8, false)), (Lsn(11), of(8, &texts(1, &["8"]))), (Lsn(11), stop())]);
    messages.extend([(Lsn(12), begin(13, 2)), (Lsn(12), texts(1, &["as it was"])), (Lsn(13), commit(13, 14))]);
    messages.extend([(Lsn(15), start(7, false)), (Lsn(15), of(7, &texts(1, &["7", "again"]))), (Lsn(15), stop())]);
    messages.push((Lsn(20), stream_commit(8, 20, 21)));
    messages.push((Lsn(22), stream_commit(7, 22, 23)));
    // The server counts the new shape as sent.
    messages.extend([(Lsn(30), begin(31, 3)), (Lsn(30), texts(1, &["after", "x"])), (Lsn(31), commit(31, 32))]);
    // One that is rolled back leaves no shape behind.
    messages.extend([(Lsn(40), start(9, true)), (Lsn(0), of(9, &relation(1, &["a", "b", "c"])))]);
    messages.extend([(Lsn(40), of(9, &texts(1, &["9", "9", "9"]))), (Lsn(40), stop()), (Lsn(41), abort(9, 9))]);
    messages.extend([(Lsn(50), begin(51, 4)), (Lsn(50), texts(1, &["last", "x"])), (Lsn(51), commit(51, 52))]);
    let mut assembler = Assembler::new(limits(), 4, Position::ZERO);
    let reader = run(&mut assembler, &messages, &mut text_shape, &|_| false).unwrap();
    let seen: Vec<String> = reader.rows.iter().map(|row| format!("{} {} {}", row.1, row.2, row.4.join(","))).collect();
    let wanted = [
        "1 t1/1 before",
        "2 t1/1 as it was",
        "8 t1/1 8",
        "7 t1/2 7,new",
        "7 t1/2 7,again",
        "3 t1/2 after,x",
        "4 t1/2 last,x",
    ];
    assert_eq!(seen, wanted);
}

#[test]
fn h12_an_older_shape_of_a_streamed_transaction_does_not_replace_a_newer_one() {
    let mut messages = vec![(Lsn(10), start(7, true)), (Lsn(0), of(7, &relation(1, &["a"])))];
    messages.extend([(Lsn(10), of(7, &texts(1, &["7"]))), (Lsn(10), stop())]);
    // The publication's column list changed beside it.
    messages.extend([(Lsn(11), begin(12, 2)), (Lsn(0), relation(1, &["a", "b"])), (Lsn(11), texts(1, &["x", "y"]))]);
    messages.extend([(Lsn(12), commit(12, 13)), (Lsn(20), stream_commit(7, 20, 21))]);
    messages.extend([(Lsn(30), begin(31, 3)), (Lsn(30), texts(1, &["z", "z"])), (Lsn(31), commit(31, 32))]);
    let mut assembler = Assembler::new(limits(), 4, Position::ZERO);
    let reader = run(&mut assembler, &messages, &mut text_shape, &|_| false).unwrap();
    assert_eq!(reader.rows.iter().map(|row| row.2.as_str()).collect::<Vec<_>>(), ["t1/2", "t1/1", "t1/2"]);
}

#[test]
fn h17_hundreds_of_open_streamed_transactions_share_one_budget() {
    let mut assembler = Assembler::new(limits(), 4, Position::ZERO);
    let mut reader = Reader::default();
    let mut lsn = 10;
    let mut largest = 0;
    for round in 0..8 {
        for xid in 1..400_u32 {
            lsn += 1;
            let mut messages = vec![(Lsn(lsn), start(xid, round == 0))];
            if round == 0 {
                messages.push((Lsn(0), of(xid, &relation(1, &["a"]))));
            }
            messages.push((Lsn(lsn), of(xid, &texts(1, &[&"v".repeat(500)]))));
            messages.push((Lsn(lsn), stop()));
            for (lsn, message) in messages {
                if let Step::Shape(shape) = assembler.push(lsn, &message).unwrap() {
                    assembler.set_shape(text_shape(shape)).unwrap();
                }
                while let Some(event) = assembler.take_ready() {
                    reader.take(event);
                }
                largest = largest.max(assembler.streamed.open_bytes());
            }
        }
    }
    assert!(largest <= PARTS.open_bytes_max, "{largest}");
    assert!(reader.parts.values().map(Vec::len).sum::<usize>() > 300);
    for xid in 1..400_u32 {
        lsn += 2;
        assembler.push(Lsn(lsn), &stream_commit(xid, lsn, lsn + 1)).unwrap();
        while let Some(event) = assembler.take_ready() {
            reader.take(event);
        }
    }
    assert_eq!(reader.rows.len(), 399 * 8);
    assert_eq!(assembler.streamed.open_bytes(), 0);
}

#[test]
fn a_large_transaction_goes_on_in_parts_where_the_log_leaves_it() {
    let mut messages = vec![(Lsn(1), begin(2, 1)), (Lsn(1), insert(1, 0, "small")), (Lsn(2), commit(2, 3))];
    messages.push((Lsn(10), begin(2000, 77)));
    messages.extend((0..200).map(|n| (Lsn(10 + u64::from(n / 3)), insert(1 + n % 3, n, &"v".repeat(1000)))));
    messages.push((Lsn(2000), commit(2000, 2001)));
    messages.extend([(Lsn(2002), begin(2003, 78)), (Lsn(2002), insert(1, 0, "s")), (Lsn(2003), commit(2003, 2004))]);
    let whole = with_shapes(Limits { parts: None, ..limits() }, 1, Position::ZERO);
    let mut all_in_log = whole;
    let wanted = run(&mut all_in_log, &messages, &mut no_shapes, &|_| false).unwrap();
    assert!(wanted.splices.is_empty());
    let mut assembler = with_shapes(limits(), 1, Position::ZERO);
    let got = run(&mut assembler, &messages, &mut no_shapes, &|_| false).unwrap();
    assert_eq!(got.rows, wanted.rows);
    assert_eq!((got.splices.len(), got.splices[0].transaction.xid), (1, 77));
    assert!(got.splices[0].parts > 5, "{:?}", got.splices);
    // Resumed in the middle of what the log has of it: the parts hold the rest.
    let middle = wanted.rows[20].0;
    let mut resumed = with_shapes(limits(), 1, middle);
    let rest = run(&mut resumed, &messages[3..], &mut no_shapes, &|_| false).unwrap();
    assert_eq!(rest.rows, wanted.rows[21..]);
    // Resumed behind it: nothing of it is told again.
    let mut resumed = with_shapes(limits(), 1, Position::before(Lsn(2001)));
    let rest = run(&mut resumed, &messages[3..], &mut no_shapes, &|_| false).unwrap();
    assert_eq!((rest.rows.len(), rest.splices.len()), (1, 0));
}

#[test]
fn a_row_that_no_message_takes_goes_to_the_side_store_and_one_above_all_bounds_is_named() {
    let limits = Limits { row_bytes_max: 20_000, segment_bytes_max: 20_000, ..limits() };
    let mut messages = vec![(Lsn(10), begin(20, 77)), (Lsn(10), insert(1, 1, "a"))];
    messages.push((Lsn(11), insert(1, 2, &"v".repeat(50_000))));
    messages.extend([(Lsn(12), insert(1, 3, "c")), (Lsn(20), commit(20, 21))]);
    let mut assembler = with_shapes(limits, 1, Position::ZERO);
    let reader = run(&mut assembler, &messages, &mut no_shapes, &|_| false).unwrap();
    assert_eq!(reader.rows.iter().map(|row| row.4[1].len()).collect::<Vec<_>>(), [1, 50_000, 1]);
    assert_eq!((reader.segments, reader.splices.len()), (1, 1));
    messages[2].1 = insert(1, 2, &"v".repeat(1_100_000));
    let mut assembler = with_shapes(limits, 1, Position::ZERO);
    let Err(error) = run(&mut assembler, &messages, &mut no_shapes, &|_| false) else { panic!("it was taken") };
    assert!(matches!(&error, SourceError::RowTooLarge { xid: 77, limit: 1_048_576, .. }), "{error}");
}

/// One step of a session inside a transaction.
#[derive(Clone, Debug)]
enum Act {
    /// Rows of one WAL record: table, sizes.
    Rows(u32, Vec<usize>),
    Savepoint,
    Release,
    RollBack,
    /// The server streams what it has.
    Flush,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        5 => (1u32..4, proptest::collection::vec(0usize..3000, 1..4)).prop_map(|(oid, sizes)| Act::Rows(oid, sizes)),
        2 => Just(Act::Savepoint),
        1 => Just(Act::Release),
        1 => Just(Act::RollBack),
        1 => Just(Act::Flush),
    ];
    proptest::collection::vec(act, 0..40)
}

/// LSN of the XLogData header, and the message.
type Messages = Vec<(Lsn, Vec<u8>)>;

/// What a server sends of transactions that run one after the other, streamed and not.
fn sent(transactions: &[Vec<Act>]) -> (Messages, Messages) {
    let (mut plain, mut streamed) = (Vec::new(), Vec::new());
    let (mut lsn, mut next_xid, mut id) = (100_u64, 10_u32, 0_u32);
    for acts in transactions {
        let top = next_xid;
        next_xid += 1;
        let mut stack = vec![top];
        // (sub-xid, lsn, message); the parent of each sub-transaction.
        let mut changes: Vec<(u32, Lsn, Vec<u8>)> = Vec::new();
        let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
        let mut given = 0;
        let mut blocks = 0;
        let mut shapes_sent = false;
        for act in acts {
            lsn += 10;
            match act {
                Act::Rows(oid, sizes) => {
                    for size in sizes {
                        id += 1;
                        changes.push((*stack.last().unwrap(), Lsn(lsn), insert(*oid, id, &"v".repeat(*size))));
                    }
                }
                Act::Savepoint => {
                    parents.insert(next_xid, *stack.last().unwrap());
                    stack.push(next_xid);
                    next_xid += 1;
                }
                Act::Release if stack.len() > 1 => _ = stack.pop(),
                Act::RollBack if stack.len() > 1 => {
                    let root = stack.pop().unwrap();
                    let is_under = |mut xid: u32| loop {
                        if xid == root {
                            break true;
                        }
                        match parents.get(&xid) {
                            Some(parent) => xid = *parent,
                            None => break false,
                        }
                    };
                    let given_changes = &changes[..given];
                    let gone: std::collections::BTreeSet<u32> =
                        given_changes.iter().map(|change| change.0).filter(|xid| is_under(*xid)).collect();
                    streamed.extend(gone.iter().map(|xid| (Lsn(lsn), abort(top, *xid))));
                    let before = changes.len();
                    let kept_given = given_changes.iter().filter(|change| !is_under(change.0)).count();
                    changes.retain(|change| !is_under(change.0));
                    let _ = before;
                    given = kept_given;
                }
                Act::Flush if given < changes.len() => {
                    streamed.push((Lsn(lsn), start(top, blocks == 0)));
                    if !shapes_sent {
                        streamed.extend((1..4).map(|oid| (Lsn(0), of(top, &relation(oid, &["id", "v"])))));
                        shapes_sent = true;
                    }
                    streamed.extend(changes[given..].iter().map(|(xid, at, message)| (*at, of(*xid, message))));
                    streamed.push((Lsn(lsn), stop()));
                    blocks += 1;
                    given = changes.len();
                }
                _ => {}
            }
        }
        lsn += 10;
        let end = lsn + 5;
        let plain_of = |out: &mut Vec<(Lsn, Vec<u8>)>| {
            out.push((changes.first().map_or(Lsn(lsn), |change| change.1), begin(lsn, top)));
            out.extend(changes.iter().map(|(_, at, message)| (*at, message.clone())));
            out.push((Lsn(lsn), commit(lsn, end)));
        };
        plain_of(&mut plain);
        if blocks == 0 {
            plain_of(&mut streamed);
        } else {
            if given < changes.len() {
                streamed.push((Lsn(lsn), start(top, false)));
                streamed.extend(changes[given..].iter().map(|(xid, at, message)| (*at, of(*xid, message))));
                streamed.push((Lsn(lsn), stop()));
            }
            streamed.push((Lsn(lsn), stream_commit(top, lsn, end)));
        }
        lsn = end;
    }
    (plain, streamed)
}

proptest! {
    #[test]
    fn h06_streamed_and_not_streamed_give_the_same_rows_at_the_same_positions(
        transactions in proptest::collection::vec(acts(), 1..5),
        flushes in proptest::collection::vec(any::<bool>(), 64),
        cut in 0usize..1000,
    ) {
        let (plain, streamed) = sent(&transactions);
        let flush_at = |at: usize| flushes[at % 64];
        let in_log = Limits { parts: None, ..limits() };
        let wanted = run(&mut with_shapes(in_log, 1, Position::ZERO), &plain, &mut no_shapes, &|_| false).unwrap();
        let mut shapes = |shape_: RelationShape| shape(shape_.oid);
        let got = run(&mut with_shapes(limits(), 4, Position::ZERO), &streamed, &mut shapes, &flush_at).unwrap();
        prop_assert_eq!(&got.rows, &wanted.rows);
        prop_assert!(got.parts.is_empty());
        // Decoded once the one way, killed, then the other way: nothing is skipped or repeated.
        if !wanted.rows.is_empty() {
            let at = cut % wanted.rows.len();
            let resume = wanted.rows[at].0;
            let mut other = with_shapes(limits(), 4, resume);
            let from = |messages: &[(Lsn, Vec<u8>)]| messages.to_vec();
            let rest = run(&mut other, &from(&streamed), &mut shapes, &flush_at).unwrap();
            prop_assert_eq!(&rest.rows[..], &wanted.rows[at + 1..]);
            let rest = run(&mut with_shapes(limits(), 1, resume), &from(&plain), &mut no_shapes, &flush_at).unwrap();
            prop_assert_eq!(&rest.rows[..], &wanted.rows[at + 1..]);
        }
    }
}

fn recording(name: &str) -> Vec<(Lsn, Vec<u8>)> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.bin"));
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let lsn = u64::from_be_bytes(rest[..8].try_into().unwrap());
        let length = u32::from_be_bytes(rest[8..12].try_into().unwrap()) as usize;
        messages.push((Lsn(lsn), rest[12..12 + length].to_vec()));
        rest = &rest[12 + length..];
    }
    messages
}

#[test]
fn h06_recorded_streams_give_the_same_rows_and_positions_in_every_protocol() {
    for version in ["pg15", "pg18"] {
        let in_log = Limits { parts: None, ..limits() };
        let plain = recording(&format!("{version}-proto1"));
        let wanted = run(&mut Assembler::new(in_log, 1, Position::ZERO), &plain, &mut text_shape, &|_| false).unwrap();
        assert!(wanted.rows.len() > 400, "{}", wanted.rows.len());
        // Small parts: the recordings are small.
        let limits = Limits { parts: Some(PartLimits { target_bytes: 4 << 10, ..PARTS }), ..limits() };
        for (suffix, protocol) in [("proto2-streaming", 2), ("proto3-streaming", 3), ("proto4-streaming", 4)] {
            if (version, protocol) == ("pg15", 4) {
                continue;
            }
            let streamed = recording(&format!("{version}-{suffix}"));
            let mut assembler = Assembler::new(limits, protocol, Position::ZERO);
            let got = run(&mut assembler, &streamed, &mut text_shape, &|_| false).unwrap();
            assert_eq!(got.rows, wanted.rows, "{version} {suffix}");
            assert!(!got.splices.is_empty(), "{version} {suffix}");
            let has_aborted = |splice: &SpliceDraft| !splice.aborted.is_empty();
            let aborts = streamed.iter().filter(|(_, message)| message[0] == b'A').count();
            assert!(
                aborts > 0 && (got.splices.iter().any(has_aborted) || !got.abandoned.is_empty()),
                "{version} {suffix}"
            );
        }
    }
}

/// However it is decoded this time, and however small it is: a splice of it stands in the log, and what its manifest names must be all.
#[test]
fn h06_h09_a_transaction_with_a_splice_in_the_log_becomes_parts_from_its_first_row_on() {
    let given = |assembler: &mut Assembler| {
        let events = std::iter::from_fn(|| assembler.take_ready()).collect::<Vec<_>>();
        match events.as_slice() {
            [CaptureEvent::Part(part), CaptureEvent::Splice(splice)] => {
                assert_eq!((part.number, part.rows, splice.parts), (0, 2, 1));
                assert_eq!((splice.transaction.commit, splice.to), (Lsn(40), Position::before(Lsn(50))));
                assert!(part.body.transactions.iter().all(|transaction| transaction.commit == Lsn::ZERO));
            }
            events => panic!("{events:?}"),
        }
        assert!(assembler.take_segment().unwrap().is_none(), "a part of it is in the log");
    };
    // Whole, at its commit. What committed before it goes into the log as ever.
    let mut assembler = with_shapes(limits(), 1, Position::before(Lsn(5)));
    assembler.keep_whole([Lsn(40)].into());
    for (lsn, message) in [(10, begin(20, 1)), (11, insert(1, 1, "x")), (20, commit(20, 30))] {
        assert!(matches!(assembler.push(Lsn(lsn), &message).unwrap(), Step::Taken));
    }
    assert!(matches!(assembler.push(Lsn(31), &begin(40, 2)).unwrap(), Step::FlushFirst));
    assert_eq!(assembler.take_segment().unwrap().unwrap().to, Position::before(Lsn(30)));
    for (lsn, message) in [(31, begin(40, 2)), (31, insert(1, 2, "x")), (32, insert(1, 3, "x"))] {
        assert!(matches!(assembler.push(Lsn(lsn), &message).unwrap(), Step::Taken));
    }
    assert!(matches!(assembler.push(Lsn(40), &commit(40, 50)).unwrap(), Step::Ready));
    given(&mut assembler);
    // While it is in progress.
    let mut assembler = with_shapes(limits(), 2, Position::before(Lsn(5)));
    assembler.keep_whole([Lsn(40)].into());
    assert!(matches!(assembler.push(Lsn(31), &start(2, true)).unwrap(), Step::Taken));
    assembler.set_shape(shape(1)).unwrap();
    for message in [of(2, &insert(1, 2, "x")), of(2, &insert(1, 3, "x")), stop()] {
        assert!(matches!(assembler.push(Lsn(31), &message).unwrap(), Step::Taken));
    }
    assert!(matches!(assembler.push(Lsn(40), &stream_commit(2, 40, 50)).unwrap(), Step::Ready));
    given(&mut assembler);
}

/// The side store is full: what a splice of stands in the log goes there all the same, and nothing else does.
#[test]
fn h09_while_the_side_store_is_full_only_what_must_be_whole_becomes_parts() {
    let full = Limits { large_transaction_bytes: 1, parts: Some(PartLimits { only_whole: true, ..PARTS }), ..limits() };
    let mut assembler = with_shapes(full, 1, Position::before(Lsn(5)));
    assembler.keep_whole([Lsn(40)].into());
    for (lsn, message) in [(10, begin(20, 1)), (11, insert(1, 1, "x")), (12, insert(1, 2, "x")), (20, commit(20, 30))] {
        assert!(matches!(assembler.push(Lsn(lsn), &message).unwrap(), Step::Taken));
    }
    assert_eq!(assembler.take_segment().unwrap().unwrap().rows, 2);
    for (lsn, message) in [(31, begin(40, 2)), (31, insert(1, 2, "x"))] {
        assert!(matches!(assembler.push(Lsn(lsn), &message).unwrap(), Step::Taken));
    }
    assert!(matches!(assembler.push(Lsn(40), &commit(40, 50)).unwrap(), Step::Ready));
    let events = std::iter::from_fn(|| assembler.take_ready()).collect::<Vec<_>>();
    assert!(matches!(events.as_slice(), [CaptureEvent::Part(_), CaptureEvent::Splice(_)]), "{events:?}");
}
