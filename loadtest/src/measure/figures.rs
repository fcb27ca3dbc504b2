//! What is measured: runs, pairs of runs, latencies; and the medians and ratios over them. No I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What one run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `pg_recvlogical -f /dev/null`.
    S0,
    /// Our replication client, everything discarded.
    S1,
    /// Capture, log on one node with default sync, a discarding reader of the log.
    R1,
    /// The same on three nodes.
    R3,
    /// The same on three nodes that sync every write.
    R3Always,
    /// S1 of one-row transactions.
    S1OneRow,
    /// R1 of one-row transactions.
    R1OneRow,
    /// A full log applied by the Postgres sink, the source idle.
    Drain,
    /// The same rows by hand: COPY into a temporary table and an upsert.
    Bulk,
    /// Binary COPY out of the source through one connection, discarded.
    CopyOut,
    /// Existing rows read into the side store, one chunk at a time, log on one node with default sync.
    Chunks,
    /// The same on three nodes that sync every write.
    ChunksAlways,
    /// Binary COPY out of the source through two connections.
    CopyOutTwo,
    /// Existing rows read into the side store, two chunks at a time.
    ChunksTwo,
    /// A full side store loaded by the Postgres sink, the source idle.
    Load,
    /// Binary COPY into the target through one connection, into a table with its primary key.
    CopyIn,
    /// The same through two connections.
    CopyInTwo,
}

impl Kind {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Kind::S0 => "S0: pg_recvlogical to /dev/null",
            Kind::S1 => "S1: our client, discarding",
            Kind::R1 => "pipeline, R1, default sync",
            Kind::R3 => "pipeline, R3, default sync",
            Kind::R3Always => "pipeline, R3, sync always",
            Kind::S1OneRow => "S1, 1-row transactions",
            Kind::R1OneRow => "pipeline, R1, 1-row transactions",
            Kind::Drain => "Postgres sink, drained from the log",
            Kind::Bulk => "COPY and upsert by hand",
            Kind::CopyOut => "COPY out, 1 connection",
            Kind::Chunks => "chunks to the side store, R1, 1 reader",
            Kind::ChunksAlways => "chunks, R3, sync always, 1 reader",
            Kind::CopyOutTwo => "COPY out, 2 connections",
            Kind::ChunksTwo => "chunks to the side store, R1, 2 readers",
            Kind::Load => "Postgres sink, loaded from the side store",
            Kind::CopyIn => "COPY in, 1 connection",
            Kind::CopyInTwo => "COPY in, 2 connections",
        }
    }
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What it did.
    pub kind: Kind,
    /// Runs with the same number were made one after the other.
    pub pair: u32,
    /// Rows that arrived.
    pub rows: u64,
    /// From the start of replication to the last row.
    pub seconds: f64,
    /// CPU time per row, by process (`walsender`, `worker`, `nats`, `reader`, `client`).
    pub cpu_micros_per_row: BTreeMap<String, f64>,
    /// The most resident memory, by process, in bytes.
    pub resident_bytes_max: BTreeMap<String, u64>,
    /// Load average before the run.
    pub load_average: f64,
    /// How many cores everything else on the machine kept busy during the run.
    pub cores_busy_elsewhere: f64,
}

impl Run {
    /// Rows per second.
    pub fn rate(&self) -> f64 {
        self.rows as f64 / self.seconds
    }
}

/// Latencies of one path, in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// From where to where.
    pub path: String,
    /// How many were measured.
    pub count: u64,
    /// Transactions per second that were asked for.
    pub per_second: u32,
    /// Median.
    pub p50: u64,
    /// 90 of 100 are not above.
    pub p90: u64,
    /// 99 of 100 are not above.
    pub p99: u64,
    /// 999 of 1000 are not above.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// The median of the source's own commits, as the load saw them.
    pub commit_p50: u64,
    /// How late the load sent a transaction at worst.
    pub late_max: u64,
}

/// Something that could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What.
    pub what: String,
    /// Why, and what to do about it.
    pub why: String,
}

/// Everything that was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The command that made them.
    pub command: String,
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Of the machine and the programs, such as `cores` or `postgres`.
    pub machine: BTreeMap<String, String>,
    /// Every run, in the order made.
    pub runs: Vec<Run>,
    /// Latencies.
    pub latencies: Vec<Latency>,
    /// What is missing.
    pub skipped: Vec<Skipped>,
}

impl Figures {
    /// The runs of a kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |run| run.kind == kind)
    }

    /// Rates of `kind` over rates of `base`, pair by pair.
    pub fn ratios(&self, kind: Kind, base: Kind) -> Vec<f64> {
        let partner = |run: &Run| self.of(base).find(|other| other.pair == run.pair);
        self.of(kind).filter_map(|run| Some(run.rate() / partner(run)?.rate())).collect()
    }

    /// CPU time per row of one process over the runs of a kind.
    pub fn cpu(&self, kind: Kind, process: &str) -> Vec<f64> {
        self.of(kind).filter_map(|run| run.cpu_micros_per_row.get(process).copied()).collect()
    }
}

/// Middle, lowest and highest of some values; `None` of none.
pub fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    Some((median, low, high))
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    pub(crate) fn run(kind: Kind, pair: u32, seconds: f64) -> Run {
        Run {
            kind,
            pair,
            rows: 1_000_000,
            seconds,
            cpu_micros_per_row: BTreeMap::from([("walsender".to_owned(), 2.0), ("worker".to_owned(), seconds)]),
            resident_bytes_max: BTreeMap::from([("worker".to_owned(), 50 << 20)]),
            load_average: 0.5,
            cores_busy_elsewhere: 0.01,
        }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(spread(&[4.0, 1.0]), Some((2.5, 1.0, 4.0)));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn ratios_are_of_runs_of_one_pair() {
        let runs = vec![run(Kind::S1, 0, 1.0), run(Kind::R1, 0, 2.0), run(Kind::R1, 1, 4.0), run(Kind::S1, 1, 8.0)];
        let figures = Figures { runs, ..Figures::default() };
        assert_eq!(figures.ratios(Kind::R1, Kind::S1), vec![0.5, 2.0]);
        assert!(figures.ratios(Kind::R1, Kind::S0).is_empty());
    }
}
