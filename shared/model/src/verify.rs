//! What a comparison of the source with a sink is asked, and what it says: kept in etcd, shown by the command line.

use serde::{Deserialize, Serialize};

use crate::condition::Timestamp;
use crate::{Position, SinkId, TableName};

/// How many differing rows of a table are named when nobody says.
pub const SHOW_DEFAULT: u32 = 20;
/// How many differing rows of a table can be named at most: a report is kept in etcd.
pub const SHOW_MAX: u32 = 200;
/// How long a comparison may take when nobody says, in seconds. It holds one snapshot of the source all the time.
pub const TIMEOUT_DEFAULT_SECONDS: u32 = 1800;

/// A comparison as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifySpec {
    /// The sink.
    pub sink: SinkId,
    /// Only these tables, `schema.table` as at the source; empty for all that are published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
    /// How many differing rows of a table are named; at most [`SHOW_MAX`].
    pub show: u32,
    /// How long it may take, in seconds, counted from when a worker began.
    pub timeout_seconds: u32,
}

/// What a comparison does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyPhase {
    /// Connecting, reading the catalogs.
    #[default]
    Preparing,
    /// The sink has not reached the source's snapshot yet.
    WaitingForSink,
    /// Checksums of both sides.
    Comparing,
    /// Rows of the ranges that differ.
    ReadingRows,
    /// Rows that differed are read again on both sides.
    LookingAgain,
}

/// How far a comparison is.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// What it does.
    pub phase: VerifyPhase,
    /// The table it is at, as at the source; empty between tables.
    pub table: String,
    /// Tables that are compared.
    pub tables_done: u32,
    /// Tables in all.
    pub tables_total: u32,
    /// Rows of the source that are in a checksum.
    pub rows_done: u64,
    /// About how many rows the source has in all.
    pub rows_estimated: u64,
    /// V: the sink is compared once it has everything below.
    pub position: Option<Position>,
    /// Where the sink stands.
    pub sink_position: Option<Position>,
}

/// What was found of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The same rows on both sides.
    Equal,
    /// Rows or columns differ, or the table is missing.
    Different,
    /// Rows that differed went on changing until the time was over: neither equal nor different.
    Unsettled,
}

/// How one row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// The sink lacks it.
    Missing,
    /// Only the sink has it, or has it more often.
    Extra,
    /// Both have it, with other values.
    Different,
}

/// One row that is not the same on both sides. Values are never in it, its key apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowDifference {
    /// How it differs.
    pub kind: DifferenceKind,
    /// Its key as `column=value, …`; of a table without a key the place of the row: `ctid (0,7)`.
    pub key: String,
    /// The columns that differ; empty when a side lacks the row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
}

/// What was found of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableReport {
    /// As at the source.
    pub table: TableName,
    /// As at the sink.
    pub sink_table: TableName,
    /// In one word.
    pub verdict: Verdict,
    /// Rows of the source under the snapshot, those that the publication leaves out apart.
    pub rows_source: u64,
    /// Rows of the sink.
    pub rows_sink: u64,
    /// Rows that the sink lacks.
    pub missing: u64,
    /// Rows that only the sink has; a doubled row counts here.
    pub extra: u64,
    /// Rows with the same key and other values.
    pub different: u64,
    /// Rows that went on changing until the time was over.
    pub unsettled: u64,
    /// Rows that differed at first and were the same when they were looked at again: they were on their way.
    pub settled: u64,
    /// Of the rows that are counted as missing, extra or different: those that were seen once only, because there are
    /// too many to look at each again.
    pub seen_once: u64,
    /// The first differences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<RowDifference>,
    /// What differs beyond rows: a table or a column that the sink lacks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<String>,
    /// Columns that only the sink has; no difference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns_ignored: Vec<String>,
    /// Whether rows are told apart by a key. Without one, equal rows are counted.
    pub has_key: bool,
    /// Ranges of the key's hash that hold rows.
    pub ranges: u32,
    /// Ranges whose checksums differ: the only ones that were read row by row.
    pub ranges_differing: u32,
    /// Rows of both sides that were read one by one.
    pub rows_read: u64,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// V: the sink had every transaction whose commit lies below.
    pub position: Position,
    /// Where the sink stood when it was read.
    pub sink_position: Position,
    /// Per table, by name.
    pub tables: Vec<TableReport>,
}

impl VerifyReport {
    /// Different if one table is; else unsettled if one is; else equal.
    pub fn verdict(&self) -> Verdict {
        let any = |verdict: Verdict| self.tables.iter().any(|table| table.verdict == verdict);
        if any(Verdict::Different) {
            Verdict::Different
        } else if any(Verdict::Unsettled) {
            Verdict::Unsettled
        } else {
            Verdict::Equal
        }
    }
}

/// An operation: work that is asked for once, done by a worker, and kept for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationSpec {
    /// What is compared.
    pub verify: VerifySpec,
    /// Somebody asked that it ends.
    #[serde(default)]
    pub cancelled: bool,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// No worker took it yet.
    #[default]
    Pending,
    /// A worker is at it.
    Running,
    /// It has a report.
    Done,
    /// It cannot be done; the message says why.
    Failed,
    /// Its time was over before there was a report.
    TimedOut,
    /// Somebody ended it.
    Cancelled,
}

impl OperationState {
    /// Whether nothing more comes of it.
    pub fn is_over(self) -> bool {
        !matches!(self, OperationState::Pending | OperationState::Running)
    }
}

/// What its worker says of an operation: one key, guarded by the task's lock.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OperationResult {
    /// Where it stands.
    pub state: OperationState,
    /// What it waits for, or why it failed; empty when there is nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// How far it is.
    pub progress: VerifyProgress,
    /// What it found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<VerifyReport>,
    /// When this was written.
    pub at: Timestamp,
}
