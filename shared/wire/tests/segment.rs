//! The segment codec: what comes back is what went in; what earlier versions wrote is read for ever; what is damaged is refused.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::path::PathBuf;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, FixedSizeBinaryArray, Float32Array, Float64Array, Int16Array,
    Int32Array, Int64Array, RecordBatch, StringArray, StructArray, Time64MicrosecondArray, UInt8Array, UInt32Array,
    UInt64Array,
};
use proptest::prelude::*;
use wallaby_model::change::arrow_schema;
use wallaby_model::schema::interval_fields;
use wallaby_model::{
    Codec, Column, ColumnType, Lsn, Op, Position, ReplicaIdentity, SegmentBody, TableChanges, TableName, TableSchema,
    Transaction,
};
use wallaby_wire::{SegmentEncoder, SegmentError, decode, encode};

/// Every way in which values travel.
const KINDS: [ColumnType; 21] = [
    ColumnType::Bool,
    ColumnType::Int2,
    ColumnType::Int4,
    ColumnType::Int8,
    ColumnType::Oid,
    ColumnType::Float4,
    ColumnType::Float8,
    ColumnType::Numeric,
    ColumnType::Text,
    ColumnType::Bytea,
    ColumnType::Uuid,
    ColumnType::Json,
    ColumnType::Jsonb,
    ColumnType::Date,
    ColumnType::Time,
    ColumnType::Timestamp,
    ColumnType::Timestamptz,
    ColumnType::Interval,
    ColumnType::Enum,
    ColumnType::Array,
    ColumnType::Other,
];

fn table(name: &str, kinds: &[ColumnType]) -> Arc<TableSchema> {
    let column = |(index, kind): (usize, &ColumnType)| Column {
        name: format!("c{index} \"ä\""),
        kind: *kind,
        sql_type: format!("{kind:?}").to_lowercase(),
        type_oid: 1000 + u32::try_from(index).unwrap(),
        type_modifier: -1,
        identity: index == 0,
        not_null: index == 0,
    };
    Arc::new(TableSchema {
        oid: 16_384,
        table: TableName::new("shop", name),
        identity: ReplicaIdentity::Default,
        columns: kinds.iter().enumerate().map(column).collect(),
        primary_key: vec![0],
    })
}

/// A column of `rows` values: a null first, then extremes, then numbers.
fn values(kind: ColumnType, rows: usize) -> ArrayRef {
    let number = |row: usize| (row > 0).then_some(row as i64);
    let text = |row: usize| (row > 0).then(|| format!("{kind:?} {row} ✓"));
    let extreme = |row: usize, low: i64, high: i64| match row {
        1 => Some(low),
        2 => Some(high),
        _ => number(row),
    };
    let rows = 0..rows;
    match kind {
        ColumnType::Bool => Arc::new(rows.map(|row| number(row).map(|n| n % 2 == 0)).collect::<BooleanArray>()),
        ColumnType::Int2 => Arc::new(rows.map(|row| number(row).map(|n| n as i16)).collect::<Int16Array>()),
        ColumnType::Int4 => Arc::new(rows.map(|row| number(row).map(|n| n as i32)).collect::<Int32Array>()),
        ColumnType::Int8 | ColumnType::Timestamp | ColumnType::Timestamptz => {
            Arc::new(rows.map(|row| extreme(row, i64::MIN, i64::MAX)).collect::<Int64Array>())
        }
        ColumnType::Oid => Arc::new(rows.map(|row| number(row).map(|n| n as u32)).collect::<UInt32Array>()),
        ColumnType::Float4 => Arc::new(rows.map(|row| number(row).map(|n| n as f32 / 3.0)).collect::<Float32Array>()),
        ColumnType::Float8 => Arc::new(rows.map(|row| number(row).map(|n| n as f64 / 3.0)).collect::<Float64Array>()),
        ColumnType::Bytea => {
            let bytes: Vec<Option<Vec<u8>>> = rows.map(|row| number(row).map(|n| vec![n as u8; row])).collect();
            Arc::new(BinaryArray::from_iter(bytes))
        }
        ColumnType::Uuid => {
            let bytes = rows.map(|row| number(row).map(|n| [n as u8; 16]));
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(bytes, 16).unwrap())
        }
        ColumnType::Date => {
            let days = rows.map(|row| extreme(row, i32::MIN.into(), i32::MAX.into()).map(|n| n as i32));
            Arc::new(days.collect::<Date32Array>())
        }
        ColumnType::Time => Arc::new(rows.map(number).collect::<Time64MicrosecondArray>()),
        ColumnType::Interval => {
            let months = Arc::new(rows.clone().map(|row| row as i32).collect::<Int32Array>()) as ArrayRef;
            let days = Arc::new(rows.clone().map(|row| -(row as i32)).collect::<Int32Array>()) as ArrayRef;
            let micros = Arc::new(rows.clone().map(|row| row as i64).collect::<Int64Array>()) as ArrayRef;
            let nulls = rows.map(|row| row > 0).collect::<Vec<_>>().into();
            Arc::new(StructArray::new(interval_fields(), vec![months, days, micros], Some(nulls)))
        }
        _ => Arc::new(rows.map(text).collect::<StringArray>()),
    }
}

fn changes(schema: &Arc<TableSchema>, rows: usize, transactions: usize) -> TableChanges {
    let txn = (0..rows).map(|row| (row * transactions / rows.max(1)) as u32);
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(txn.collect::<UInt32Array>()),
        Arc::new((0..rows).map(|row| 1000 + row as u64).collect::<UInt64Array>()),
        Arc::new((0..rows).map(|_| 1).collect::<UInt32Array>()),
        Arc::new(
            (0..rows).map(|row| if row % 2 == 0 { Op::Insert as u8 } else { Op::Update as u8 }).collect::<UInt8Array>(),
        ),
        Arc::new(BinaryArray::from_iter((0..rows).map(|row| (row % 3 == 1).then_some(vec![0b10_u8])))),
    ];
    columns.extend(schema.columns.iter().map(|column| values(column.kind, rows)));
    TableChanges { schema: Arc::clone(schema), rows: RecordBatch::try_new(arrow_schema(schema), columns).unwrap() }
}

fn transactions(count: usize) -> Vec<Transaction> {
    let transaction = |n: usize| Transaction {
        commit: Lsn(2000 + 100 * n as u64),
        xid: 700 + n as u32,
        committed_at_micros: 1_700_000_000_000_000 + n as i64,
    };
    (0..count).map(transaction).collect()
}

/// What the stored fixtures hold: every type, a table in two shapes, an empty table.
fn sample() -> SegmentBody {
    let all = table("everything", &KINDS);
    let narrow = table("orders", &[ColumnType::Int8, ColumnType::Text]);
    let wider = table("orders", &[ColumnType::Int8, ColumnType::Text, ColumnType::Jsonb]);
    SegmentBody {
        transactions: transactions(3),
        tables: vec![changes(&all, 9, 3), changes(&narrow, 4, 2), changes(&wider, 1, 1), changes(&narrow, 0, 1)],
    }
}

fn assert_same(left: &SegmentBody, right: &SegmentBody) {
    assert_eq!(left.transactions, right.transactions);
    assert_eq!(left.tables.len(), right.tables.len());
    for (left, right) in left.tables.iter().zip(&right.tables) {
        assert_eq!(left.schema, right.schema);
        assert_eq!(left.rows, right.rows);
    }
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Fails when a change of the code can no longer read what version 1 wrote. The files are never written again; a new version
/// gets new ones: `WALLABY_WRITE_FIXTURES=1 cargo test -p wallaby-wire` writes those that are missing.
#[test]
fn segments_of_earlier_versions_are_read() {
    for (name, codec) in [("segment-v1-none.bin", Codec::None), ("segment-v1-lz4.bin", Codec::Lz4)] {
        let path = fixture(name);
        if !path.exists() && std::env::var_os("WALLABY_WRITE_FIXTURES").is_some() {
            std::fs::write(&path, encode(&sample(), codec).unwrap()).unwrap();
        }
        let stored = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(stored[0], 1);
        let body = decode(&stored).unwrap();
        assert_same(&body, &sample());
        assert_eq!(body.tables[0].position(8, &body.transactions), Position::of(Lsn(2200), Lsn(1008), 1));
        assert!(body.tables[0].is_unchanged(1, 1) && !body.tables[0].is_unchanged(0, 1));
    }
}

#[test]
fn one_encoder_serves_many_segments_and_shapes() {
    let mut encoder = SegmentEncoder::default();
    for codec in [Codec::None, Codec::Lz4, Codec::None, Codec::Lz4] {
        for _ in 0..3 {
            let bytes = encoder.encode(&sample(), codec).unwrap();
            assert_eq!(bytes, encode(&sample(), codec).unwrap());
            assert_same(&decode(&bytes).unwrap(), &sample());
        }
    }
    let empty = SegmentBody::default();
    assert_same(&decode(&encoder.encode(&empty, Codec::Lz4).unwrap()).unwrap(), &empty);
}

#[test]
fn rows_that_share_a_buffer_are_counted_once() {
    let body = sample();
    let bytes = |body: &SegmentBody| body.tables.iter().map(TableChanges::bytes).sum::<usize>();
    let packed = encode(&body, Codec::None).unwrap();
    let read = decode(&packed).unwrap();
    assert!(bytes(&read) <= packed.len(), "{} of {}", bytes(&read), packed.len());
    assert_eq!(bytes(&read), bytes(&body));
}

#[test]
fn what_is_not_a_segment_says_why() {
    let good = encode(&sample(), Codec::Lz4).unwrap().to_vec();
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        decode(&bad).unwrap_err()
    };
    assert!(with(0, 2).to_string().contains("upgrade the readers first"));
    for (at, byte) in good.iter().enumerate().skip(1) {
        assert!(matches!(with(at, byte ^ 0x10), SegmentError::Checksum), "byte {at}");
    }
    assert!(matches!(decode(&[]).unwrap_err(), SegmentError::Damaged(0)));
    let cut = encode(&sample(), Codec::None).unwrap();
    assert!(matches!(decode(&cut[..cut.len() - 1]).unwrap_err(), SegmentError::Checksum));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bodies_come_back(rows in prop::collection::vec((0_usize..40, prop::collection::vec(0..KINDS.len(), 1..6)), 0..5), lz4 in any::<bool>()) {
        let count = 3;
        let tables = rows.iter().map(|(rows, kinds)| {
            let kinds: Vec<ColumnType> = kinds.iter().map(|kind| KINDS[*kind]).collect();
            changes(&table("t", &kinds), *rows, count)
        });
        let body = SegmentBody { transactions: transactions(count), tables: tables.collect() };
        let bytes = encode(&body, if lz4 { Codec::Lz4 } else { Codec::None }).unwrap();
        assert_same(&decode(&bytes).unwrap(), &body);
    }

    /// Damage is an error, never a panic, never another body.
    #[test]
    fn damage_is_survived(flips in prop::collection::vec((any::<usize>(), any::<u8>()), 1..20), cut in any::<usize>(), lz4 in any::<bool>()) {
        let mut bytes = encode(&sample(), if lz4 { Codec::Lz4 } else { Codec::None }).unwrap().to_vec();
        for (at, byte) in flips {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        let length = bytes.len() - cut % 7;
        if let Ok(body) = decode(&bytes[..length]) {
            assert_same(&body, &sample());
        }
    }
}
