//! What is counted. Every series carries the label `flow`.

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use wallaby_model::FlowId;

use crate::side::Shelf;

const APPENDED_SEGMENTS: &str = "wallaby_log_appended_records_total";
const APPENDED_BYTES: &str = "wallaby_log_appended_bytes_total";
const ACK_SECONDS: &str = "wallaby_log_append_ack_seconds";
const REFUSED: &str = "wallaby_log_appends_refused_total";
const OVERDUE: &str = "wallaby_log_append_acks_overdue_total";
const RESYNCS: &str = "wallaby_log_resyncs_total";
const FENCES: &str = "wallaby_log_fences_total";
const FENCED: &str = "wallaby_log_fenced_total";
const TAIL_LOST: &str = "wallaby_log_tail_lost_total";
const FULL_SECONDS: &str = "wallaby_log_full_wait_seconds";
const READ_SEGMENTS: &str = "wallaby_log_read_records_total";
const READ_BYTES: &str = "wallaby_log_read_bytes_total";
const PULLED_RECORDS: &str = "wallaby_log_pulled_records_total";
const PULLED_BYTES: &str = "wallaby_log_pulled_bytes_total";
const CACHE_HITS: &str = "wallaby_log_cache_hits_total";
const DROPPED: &str = "wallaby_log_read_dropped_total";
const RECOVERIES: &str = "wallaby_log_reader_recoveries_total";
const REWOUND: &str = "wallaby_log_rewinds_seen_total";
const GAPS: &str = "wallaby_log_gaps_total";
const COPIES_LEFT: &str = "wallaby_log_copies_left_total";
const SIDE_DAMAGED: &str = "wallaby_side_damaged_objects_total";
const SIDE_FULL: &str = "wallaby_side_full_total";
const PURGED: &str = "wallaby_log_purged_records_total";

/// Tells the recorder what each name means. Once per process, after a recorder is installed.
pub fn describe() {
    describe_counter!(APPENDED_SEGMENTS, Unit::Count, "Records that the log acknowledged");
    describe_counter!(APPENDED_BYTES, Unit::Bytes, "Bytes of acknowledged records, headers included");
    describe_histogram!(ACK_SECONDS, Unit::Seconds, "From sending an append to its acknowledgement");
    describe_counter!(
        REFUSED,
        Unit::Count,
        "Appends that the log refused, by reason: chain (another owner fenced, or an earlier append failed), full, busy (429), other"
    );
    describe_counter!(OVERDUE, Unit::Count, "Times that an acknowledgement did not come in time");
    describe_counter!(RESYNCS, Unit::Count, "Times that an owner read the log's end again after an error");
    describe_counter!(FENCES, Unit::Count, "Takeovers of the log by this process");
    describe_counter!(FENCED, Unit::Count, "Owners of this process that met a younger owner's fence and gave up");
    describe_counter!(TAIL_LOST, Unit::Count, "Times that the log came back shorter than it was acknowledged");
    describe_histogram!(FULL_SECONDS, Unit::Seconds, "How long appends waited for room in a full log");
    describe_counter!(READ_SEGMENTS, Unit::Count, "Records that readers accepted");
    describe_counter!(READ_BYTES, Unit::Bytes, "Body bytes of accepted records");
    describe_counter!(
        PULLED_RECORDS,
        Unit::Count,
        "Records that came from the servers, once for all readers that stood there"
    );
    describe_counter!(PULLED_BYTES, Unit::Bytes, "Body bytes of the records that came from the servers");
    describe_counter!(
        CACHE_HITS,
        Unit::Count,
        "Records that readers took from the cache, or from another reader's pull"
    );
    describe_counter!(DROPPED, Unit::Count, "Records that readers left out: an old epoch, or already known");
    describe_counter!(RECOVERIES, Unit::Count, "Times that a reader made its consumer anew");
    describe_counter!(REWOUND, Unit::Count, "Rewinds after a lost tail that lay before a reader's end");
    describe_counter!(GAPS, Unit::Count, "Readers that stopped at a gap");
    describe_counter!(
        COPIES_LEFT,
        Unit::Count,
        "Times that a reader went round a server's copy of the log, by reason: silent (it delivers nothing of what the leader has), gap (it lacks records that the leader has)"
    );
    describe_counter!(
        SIDE_DAMAGED,
        Unit::Count,
        "Reads of the side store that met a damaged or half-written object, by shelf: transactions, chunks"
    );
    describe_counter!(SIDE_FULL, Unit::Count, "Puts that a full side store refused, by shelf: transactions, chunks");
    describe_counter!(PURGED, Unit::Count, "Records that a purge removed");
}

/// Why an append was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Its expected sequence does not fit.
    Chain,
    /// Maximum bytes exceeded.
    Full,
    /// Too many requests.
    Busy,
    /// Anything else.
    Other,
}

impl Refusal {
    fn label(self) -> &'static str {
        match self {
            Refusal::Chain => "chain",
            Refusal::Full => "full",
            Refusal::Busy => "busy",
            Refusal::Other => "other",
        }
    }
}

/// A server's copy delivered nothing of what the leader has.
pub(crate) fn copy_is_silent(flow: &FlowId) {
    copy_left(flow, "silent");
}

fn copy_left(flow: &FlowId, reason: &'static str) {
    counter!(COPIES_LEFT, "flow" => label(flow), "reason" => reason).increment(1);
}

fn label(flow: &FlowId) -> String {
    flow.as_str().to_owned()
}

/// The series of one writer, looked up once: its path is hot.
#[derive(Clone)]
pub(crate) struct WriterMetrics {
    flow: FlowId,
    appended: metrics::Counter,
    appended_bytes: metrics::Counter,
    ack_seconds: metrics::Histogram,
}

impl WriterMetrics {
    pub(crate) fn new(flow: &FlowId) -> WriterMetrics {
        WriterMetrics {
            appended: counter!(APPENDED_SEGMENTS, "flow" => label(flow)),
            appended_bytes: counter!(APPENDED_BYTES, "flow" => label(flow)),
            ack_seconds: histogram!(ACK_SECONDS, "flow" => label(flow)),
            flow: flow.clone(),
        }
    }

    pub(crate) fn appended(&self, bytes: u64) {
        self.appended.increment(1);
        self.appended_bytes.increment(bytes);
    }

    pub(crate) fn acknowledged(&self, after: std::time::Duration) {
        self.ack_seconds.record(after);
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        counter!(REFUSED, "flow" => label(&self.flow), "reason" => refusal.label()).increment(1);
    }

    pub(crate) fn overdue(&self) {
        counter!(OVERDUE, "flow" => label(&self.flow)).increment(1);
    }

    pub(crate) fn resync(&self) {
        counter!(RESYNCS, "flow" => label(&self.flow)).increment(1);
    }

    pub(crate) fn full(&self, waited: std::time::Duration) {
        histogram!(FULL_SECONDS, "flow" => label(&self.flow)).record(waited);
    }

    pub(crate) fn ended(&self, error: &crate::StagingError) {
        if error.is_fenced() {
            counter!(FENCED, "flow" => label(&self.flow)).increment(1);
        } else if matches!(error, crate::StagingError::TailLost { .. }) {
            counter!(TAIL_LOST, "flow" => label(&self.flow)).increment(1);
        }
    }
}

pub(crate) fn took_over(flow: &FlowId) {
    counter!(FENCES, "flow" => label(flow)).increment(1);
}

pub(crate) fn fenced(flow: &FlowId) {
    counter!(FENCED, "flow" => label(flow)).increment(1);
}

pub(crate) fn purged(flow: &FlowId, records: u64) {
    counter!(PURGED, "flow" => label(flow)).increment(records);
}

fn shelf_label(shelf: Shelf) -> &'static str {
    match shelf {
        Shelf::Transactions => "transactions",
        Shelf::Chunks => "chunks",
    }
}

pub(crate) fn side_damaged(flow: &FlowId, shelf: Shelf) {
    counter!(SIDE_DAMAGED, "flow" => label(flow), "shelf" => shelf_label(shelf)).increment(1);
}

pub(crate) fn side_full(flow: &FlowId, shelf: Shelf) {
    counter!(SIDE_FULL, "flow" => label(flow), "shelf" => shelf_label(shelf)).increment(1);
}

/// The series of one reader.
#[derive(Clone)]
pub(crate) struct ReaderMetrics {
    flow: FlowId,
    read: metrics::Counter,
    read_bytes: metrics::Counter,
    pulled: metrics::Counter,
    pulled_bytes: metrics::Counter,
    cache_hits: metrics::Counter,
    dropped: metrics::Counter,
}

impl ReaderMetrics {
    pub(crate) fn new(flow: &FlowId) -> ReaderMetrics {
        ReaderMetrics {
            read: counter!(READ_SEGMENTS, "flow" => label(flow)),
            read_bytes: counter!(READ_BYTES, "flow" => label(flow)),
            pulled: counter!(PULLED_RECORDS, "flow" => label(flow)),
            pulled_bytes: counter!(PULLED_BYTES, "flow" => label(flow)),
            cache_hits: counter!(CACHE_HITS, "flow" => label(flow)),
            dropped: counter!(DROPPED, "flow" => label(flow)),
            flow: flow.clone(),
        }
    }

    pub(crate) fn read(&self, bytes: usize) {
        self.read.increment(1);
        self.read_bytes.increment(bytes as u64);
    }

    pub(crate) fn pulled(&self, bytes: usize) {
        self.pulled.increment(1);
        self.pulled_bytes.increment(bytes as u64);
    }

    pub(crate) fn cache_hit(&self) {
        self.cache_hits.increment(1);
    }

    pub(crate) fn dropped(&self) {
        self.dropped.increment(1);
    }

    pub(crate) fn recovered(&self) {
        counter!(RECOVERIES, "flow" => label(&self.flow)).increment(1);
    }

    pub(crate) fn rewound(&self) {
        counter!(REWOUND, "flow" => label(&self.flow)).increment(1);
    }

    pub(crate) fn gap(&self) {
        counter!(GAPS, "flow" => label(&self.flow)).increment(1);
    }

    pub(crate) fn gap_of_a_copy(&self) {
        copy_left(&self.flow, "gap");
    }
}
