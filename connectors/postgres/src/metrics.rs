//! The sink's metrics. Each carries the label `sink`, the task's id.

use ::metrics::{Unit, describe_counter, describe_histogram};

/// Rows of the log applied, before-images included.
pub(crate) const LOG_ROWS: &str = "wallaby_sink_log_rows_total";
/// Rows written to or deleted from the sink's tables after the net effect.
pub(crate) const ROWS: &str = "wallaby_sink_rows_total";
/// Batches committed.
pub(crate) const BATCHES: &str = "wallaby_sink_batches_total";
/// Time from the start of a batch to its commit.
pub(crate) const BATCH_SECONDS: &str = "wallaby_sink_batch_seconds";
/// Commits refused because of the epoch.
pub(crate) const WRITES_REFUSED: &str = "wallaby_sink_writes_refused_total";
/// Sessions of older owners that `open` ended.
pub(crate) const SESSIONS_ENDED: &str = "wallaby_sink_sessions_ended_total";
/// Partial changes that met no row and were read again from the source.
pub(crate) const ROWS_READ_AGAIN: &str = "wallaby_sink_rows_read_again_total";
/// Batches that violated a constraint as a whole and were applied in smaller steps.
pub(crate) const VIOLATIONS: &str = "wallaby_sink_batches_split_total";
/// Inserts that met a row and were repeated as upserts.
pub(crate) const COPIES_REPEATED: &str = "wallaby_sink_copies_repeated_total";
/// Columns whose type does not exist at the sink and that are kept as text.
pub(crate) const COLUMNS_AS_TEXT: &str = "wallaby_sink_columns_as_text_total";
/// Chunks of a first load that were loaded.
pub(crate) const CHUNKS: &str = "wallaby_sink_chunks_loaded_total";
/// Their rows.
pub(crate) const LOADED_ROWS: &str = "wallaby_sink_loaded_rows_total";
/// Time from the start of a chunk's load to its commit.
pub(crate) const CHUNK_SECONDS: &str = "wallaby_sink_chunk_seconds";

/// Describes the metrics to the installed recorder. Call once at start.
pub fn describe_metrics() {
    describe_counter!(LOG_ROWS, Unit::Count, "Rows of the log applied to the sink, before-images included");
    describe_counter!(ROWS, Unit::Count, "Rows written or deleted at the sink after the net effect");
    describe_counter!(BATCHES, Unit::Count, "Batches committed at the sink");
    describe_histogram!(BATCH_SECONDS, Unit::Seconds, "Time from the start of a batch to its commit");
    describe_counter!(WRITES_REFUSED, Unit::Count, "Commits that the sink refused because a younger owner exists");
    describe_counter!(SESSIONS_ENDED, Unit::Count, "Sessions of older owners ended when the sink was opened");
    describe_counter!(ROWS_READ_AGAIN, Unit::Count, "Partial changes that met no row and were read again by key");
    describe_counter!(VIOLATIONS, Unit::Count, "Batches split because they violated a constraint as a whole");
    describe_counter!(COPIES_REPEATED, Unit::Count, "Direct copies of new rows that were repeated as upserts");
    describe_counter!(COLUMNS_AS_TEXT, Unit::Count, "Columns kept as text because their type is missing at the sink");
    describe_counter!(CHUNKS, Unit::Count, "Chunks of a first load that were loaded into the sink");
    describe_counter!(LOADED_ROWS, Unit::Count, "Rows of a first load that were loaded into the sink");
    describe_histogram!(CHUNK_SECONDS, Unit::Seconds, "Time from the start of a chunk's load to its commit");
}
