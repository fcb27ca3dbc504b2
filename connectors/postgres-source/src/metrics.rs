//! The metrics of this crate: each is declared and described here, and nowhere else.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const STATUS_SENT: &str = "wallaby_source_status_updates_total";
const GULP_BYTES: &str = "wallaby_source_gulp_bytes";
const ROWS: &str = "wallaby_source_rows_total";
const TRANSACTIONS: &str = "wallaby_source_transactions_total";
const SEGMENTS: &str = "wallaby_source_segments_total";
const HEARTBEATS: &str = "wallaby_source_heartbeats_total";
const UNKNOWN_TYPES: &str = "wallaby_source_unknown_type_columns_total";
const SHAPES: &str = "wallaby_source_table_shapes_total";
const EVICTED: &str = "wallaby_source_sessions_ended_total";
const LOOKUPS: &str = "wallaby_source_lookups_total";
const RETAINED: &str = "wallaby_source_retained_wal_bytes";

/// Describes every metric to the recorder. Called once at start.
pub fn describe_metrics() {
    describe_counter!(STATUS_SENT, "Status updates sent to the walsender");
    describe_histogram!(GULP_BYTES, Unit::Bytes, "Bytes taken from the replication socket at once");
    describe_counter!(ROWS, "Rows put into segments, before-images included");
    describe_counter!(TRANSACTIONS, "Source transactions whose end was seen");
    describe_counter!(SEGMENTS, "Segments assembled");
    describe_counter!(HEARTBEATS, "Heartbeats assembled");
    describe_counter!(UNKNOWN_TYPES, "Columns met whose type has no rule of its own and travels as text");
    describe_counter!(SHAPES, "Table shapes resolved from the catalog");
    describe_counter!(EVICTED, "Sessions of older owners of a capture task that were ended at the source");
    describe_counter!(LOOKUPS, "Rows read again by key");
    describe_gauge!(RETAINED, Unit::Bytes, "WAL that the flow's slot holds back");
}

pub(crate) fn status_sent() {
    counter!(STATUS_SENT).increment(1);
}

pub(crate) fn gulp(bytes: usize) {
    histogram!(GULP_BYTES).record(bytes as f64);
}

pub(crate) fn segment(rows: usize, transactions: u64) {
    counter!(SEGMENTS).increment(1);
    counter!(ROWS).increment(rows as u64);
    counter!(TRANSACTIONS).increment(transactions);
}

pub(crate) fn heartbeat() {
    counter!(HEARTBEATS).increment(1);
}

pub(crate) fn shape(unknown_columns: usize) {
    counter!(SHAPES).increment(1);
    counter!(UNKNOWN_TYPES).increment(unknown_columns as u64);
}

pub(crate) fn sessions_ended(count: u32) {
    counter!(EVICTED).increment(u64::from(count));
}

pub(crate) fn lookup() {
    counter!(LOOKUPS).increment(1);
}

pub(crate) fn retained(slot: &str, bytes: u64) {
    gauge!(RETAINED, "slot" => slot.to_owned()).set(bytes as f64);
}
