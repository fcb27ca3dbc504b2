//! One table: sums of both sides, then the rows of the ranges that differ.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use wallaby_model::TableName;
use wallaby_model::verify::{DifferenceKind, RowDifference, TableReport, Verdict};

use super::awake::{Half, halves};
use super::canonical::RowText;
use super::digest::{Digest, range_bits};
use super::merge::{Candidate, HashedRow, Merge, Side, next};
use super::sql::Reading;
use super::{VerifyColumn, VerifyError, VerifySession, VerifyTable};

/// Columns that sinks add for themselves.
const OWN_COLUMNS: &str = "_wallaby_";
/// The beginning of a key's value that is shown, in characters.
const KEY_SHOWN: usize = 120;
/// How much of the keys of one table's candidates is kept for a second look, in bytes.
const KEY_BYTES_KEPT: usize = 8 << 20;

/// How one table is read at both sides.
pub(super) struct Pair {
    pub source: Reading,
    pub sink: Reading,
}

impl Pair {
    /// Pairs the columns of both sides by name. `None` when rows cannot be compared at all; what differs is in the report.
    pub fn new(source: &VerifyTable, sink: &VerifyTable, report: &mut TableReport) -> Option<Pair> {
        let at_sink = |name: &str| sink.columns.iter().find(|column| column.name == name);
        let pairs: Vec<(&VerifyColumn, &VerifyColumn)> =
            source.columns.iter().filter_map(|column| Some((column, at_sink(&column.name)?))).collect();
        let missing = source.columns.iter().filter(|column| at_sink(&column.name).is_none());
        report.shape.extend(missing.map(|column| format!("the sink lacks the column {}", column.name)));
        let known = |name: &str| source.columns.iter().any(|column| column.name == name);
        let only_there = sink.columns.iter().map(|column| &column.name);
        let only_there = only_there.filter(|name| !known(name) && !name.starts_with(OWN_COLUMNS));
        report.columns_ignored.extend(only_there.cloned());
        report.has_key = !source.key.is_empty();
        if source.key.iter().any(|name| at_sink(name).is_none()) {
            return None;
        }
        let (own, theirs): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        Some(Pair {
            source: Reading::new(source, RowText::new(&own, &theirs, &source.key)),
            sink: Reading::new(sink, RowText::new(&theirs, &own, &source.key)),
        })
    }
}

/// An empty report.
pub(super) fn report(table: &TableName, sink_table: &TableName) -> TableReport {
    TableReport {
        table: table.clone(),
        sink_table: sink_table.clone(),
        verdict: Verdict::Equal,
        rows_source: 0,
        rows_sink: 0,
        missing: 0,
        extra: 0,
        different: 0,
        unsettled: 0,
        settled: 0,
        seen_once: 0,
        differences: Vec::new(),
        shape: Vec::new(),
        columns_ignored: Vec::new(),
        has_key: false,
        ranges: 0,
        ranges_differing: 0,
        rows_read: 0,
    }
}

/// Sums up one side, piece by piece.
pub(super) async fn sum_up(
    session: &mut dyn VerifySession,
    reading: &Reading,
    bits: u32,
    mut counted: impl FnMut(u64) + Send,
) -> Result<Digest, VerifyError> {
    let mut digest = Digest::default();
    for piece in reading.pieces() {
        let rows = session.rows(&reading.sums(&piece, bits)).await?;
        counted(digest.add(&rows)?);
    }
    Ok(digest)
}

/// Both digests of a table, by the same ranges; the ranges that differ.
pub(super) struct Ranges {
    pub bits: u32,
    pub differing: Vec<u32>,
}

/// The sessions of both sides.
pub(super) struct Sides<'a> {
    pub source: &'a mut dyn VerifySession,
    pub sink: &'a mut dyn VerifySession,
    /// How often a side that waits for the other is asked something.
    pub awake_every: Duration,
}

/// Sums up both sides at once.
pub(super) async fn compare_sums(
    sides: Sides<'_>,
    pair: &Pair,
    rows_estimated: u64,
    report: &mut TableReport,
    counted: impl FnMut(u64) + Send,
) -> Result<Ranges, VerifyError> {
    let bits = range_bits(rows_estimated);
    let Sides { source, sink, awake_every } = sides;
    let (here, there) = halves(awake_every);
    let of_source = async {
        let digest = sum_up(&mut *source, &pair.source, bits, counted).await?;
        here.done(source).await.map(|()| digest)
    };
    let of_sink = async {
        let digest = sum_up(&mut *sink, &pair.sink, bits, |_| ()).await?;
        there.done(sink).await.map(|()| digest)
    };
    let (at_source, at_sink) = tokio::try_join!(of_source, of_sink)?;
    let differing = at_source.differing(&at_sink);
    report.rows_source = at_source.rows();
    report.rows_sink = at_sink.rows();
    report.ranges = u32::try_from(at_source.ranges_with(&at_sink)).unwrap_or(u32::MAX);
    report.ranges_differing = u32::try_from(differing.len()).unwrap_or(u32::MAX);
    Ok(Ranges { bits, differing })
}

/// The differences of one pass over a table.
#[derive(Default)]
pub(super) struct Candidates {
    /// Those that will be looked at again.
    pub kept: Vec<Candidate>,
    key_bytes: usize,
    /// Of those that are not kept: missing, extra, different.
    pub once: (u64, u64, u64),
}

impl Candidates {
    fn take(&mut self, candidate: Candidate, kept_max: usize) {
        let bytes: usize = candidate.key.iter().flatten().map(String::len).sum();
        if self.kept.len() < kept_max && (self.kept.is_empty() || self.key_bytes + bytes <= KEY_BYTES_KEPT) {
            self.key_bytes += bytes;
            self.kept.push(candidate);
            return;
        }
        let (missing, extra, different) = candidate.counts();
        self.once = (self.once.0 + missing, self.once.1 + extra, self.once.2 + different);
    }
}

/// Rows of one side, sorted by hashes, in bounded pieces.
struct Rows<'a> {
    session: &'a mut dyn VerifySession,
    waiting: VecDeque<HashedRow>,
    read: u64,
    is_over: bool,
    asked_at: Instant,
    awake_every: Duration,
}

impl<'a> Rows<'a> {
    async fn open(
        session: &'a mut dyn VerifySession,
        reading: &Reading,
        ranges: &Ranges,
        half: Half,
    ) -> Result<Rows<'a>, VerifyError> {
        session.rows(&reading.open_rows(&ranges.differing, ranges.bits)).await?;
        let (waiting, asked_at, awake_every) = (VecDeque::new(), Instant::now(), half.every);
        let mut rows = Rows { session, waiting, read: 0, is_over: false, asked_at, awake_every };
        // The first ones come when all are sorted.
        rows.fill().await?;
        half.done(&mut *rows.session).await?;
        Ok(rows)
    }

    async fn fill(&mut self) -> Result<(), VerifyError> {
        if !self.waiting.is_empty() || self.is_over {
            // Of the other side there may be very many in a row.
            if self.asked_at.elapsed() >= self.awake_every {
                self.session.rows("SELECT 1").await?;
                self.asked_at = Instant::now();
            }
            return Ok(());
        }
        let fetched = self.session.rows(&Reading::fetch_rows()).await?;
        self.asked_at = Instant::now();
        for row in fetched {
            self.waiting.push_back(HashedRow::parse(row)?);
        }
        self.read += self.waiting.len() as u64;
        self.is_over = self.waiting.is_empty();
        Ok(())
    }

    async fn close(self) -> Result<u64, VerifyError> {
        self.session.rows(&Reading::close_rows()).await?;
        Ok(self.read)
    }
}

/// Reads the rows of the ranges that differ, and merges them.
pub(super) async fn compare_rows(
    sides: Sides<'_>,
    pair: &Pair,
    ranges: &Ranges,
    kept_max: usize,
    report: &mut TableReport,
) -> Result<Candidates, VerifyError> {
    let mut found = Candidates::default();
    let (here, there) = halves(sides.awake_every);
    let (mut source, mut sink) = tokio::try_join!(
        Rows::open(sides.source, &pair.source, ranges, here),
        Rows::open(sides.sink, &pair.sink, ranges, there)
    )?;
    let mut merge = Merge::default();
    loop {
        tokio::try_join!(source.fill(), sink.fill())?;
        let Some(side) = next(source.waiting.front(), sink.waiting.front()) else { break };
        let of_source = if side == Side::Sink { None } else { source.waiting.pop_front() };
        let of_sink = if side == Side::Source { None } else { sink.waiting.pop_front() };
        if let Some(row) = of_source.or(of_sink)
            && let Some(candidate) = merge.push(row, side)
        {
            found.take(candidate, kept_max);
        }
    }
    if let Some(candidate) = merge.end() {
        found.take(candidate, kept_max);
    }
    report.rows_read = source.close().await? + sink.close().await?;
    Ok(found)
}

/// `a=1, b='x'`: how a person finds the row.
pub(super) fn shown_key(names: &[String], key: &[usize], candidate: &Candidate) -> String {
    if key.is_empty() {
        let place = candidate.place.as_deref();
        return place.map_or_else(|| format!("hash {}", candidate.key_hash), |place| format!("ctid {place}"));
    }
    let part = |(index, value): (&usize, &Option<String>)| {
        let name = names.get(*index).map_or("?", String::as_str);
        match value {
            None => format!("{name}=(too long to show)"),
            Some(text) if text.chars().count() > KEY_SHOWN => {
                format!("{name}={}…", text.chars().take(KEY_SHOWN).collect::<String>())
            }
            Some(text) => format!("{name}={text}"),
        }
    };
    key.iter().zip(&candidate.key).map(part).collect::<Vec<_>>().join(", ")
}

/// A difference to show, its columns not known yet.
pub(super) fn difference(pair: &Pair, candidate: &Candidate) -> RowDifference {
    let text = &pair.source.text;
    let mut key = shown_key(&text.names, &text.key, candidate);
    if text.key.is_empty() && candidate.kind() == DifferenceKind::Extra && candidate.source.rows > 0 {
        key.push_str(&format!(", {} times and not {}", candidate.sink.rows, candidate.source.rows));
    }
    RowDifference { kind: candidate.kind(), key, columns: Vec::new() }
}
