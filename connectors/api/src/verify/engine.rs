//! The run over all tables: snapshots, first pass, second looks, report.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use wallaby_model::verify::{DifferenceKind, TableReport, Verdict, VerifyPhase, VerifyProgress, VerifyReport};
use wallaby_model::{Lsn, Position, TableName};

use super::awake::beside;
use super::digest::Hash;
use super::merge::{Candidate, HashedRow, merge};
use super::recheck::look_again;
use super::sql::Reading;
use super::table::{Pair, Sides, compare_rows, compare_sums, difference, report, sum_up};
use super::{RowText, VerifyError, VerifySession, VerifySink, VerifySource};

/// Time between two looks at where the sink stands.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Rows that are looked at again, over all tables.
const KEPT_MAX: usize = 20_000;
/// Rows that are looked at again in each table, however many tables there are.
const KEPT_MIN: usize = 50;
/// Rows that are read by one statement in a second look.
const KEYS_PER_LOOK: usize = 500;

/// What is compared.
#[derive(Clone, Debug)]
pub struct VerifyRequest {
    /// `schema.table` as at the source; empty for all that the publication sends.
    pub tables: Vec<String>,
    /// How many differing rows of a table are named.
    pub show: usize,
    /// When it must be over.
    pub deadline: Instant,
    /// How often a side that waits for the other is asked something: servers end transactions that ask nothing for too long.
    pub awake_every: Duration,
}

/// A table between the first pass and the report.
struct Found {
    table: TableName,
    report: TableReport,
    pair: Option<Pair>,
    pending: Vec<Candidate>,
    confirmed: Vec<Candidate>,
}

/// Compares the sink with the source. Both sessions are of no use afterwards.
///
/// # Errors
/// When a side cannot be asked or refuses, when a table is named that is not published, and when the time is over before
/// the first pass is. Rows that still change when the time is over are in the report.
pub async fn verify(
    source: &mut dyn VerifySource,
    sink: &mut dyn VerifySink,
    request: &VerifyRequest,
    progress: &watch::Sender<VerifyProgress>,
) -> Result<VerifyReport, VerifyError> {
    let mut run = Run { source, sink, request, progress };
    let first = timeout_at(request.deadline, run.first_pass()).await;
    let Ok(first) = first else { return Err(timed_out(&progress.borrow())) };
    let (position, sink_position, mut found) = first?;
    run.settle(&mut found).await?;
    let named = timeout_at(request.deadline, run.name_columns(&mut found)).await;
    match named {
        Ok(named) => named?,
        // What differs is known; in which columns it differs is not.
        Err(_) => tracing::debug!("no time was left to look at single columns"),
    }
    let tables = found.into_iter().map(|found| found.report).collect();
    Ok(VerifyReport { position, sink_position, tables })
}

fn timed_out(progress: &VerifyProgress) -> VerifyError {
    let VerifyProgress { phase, tables_done, tables_total, table, position, sink_position, .. } = progress;
    let shown = |position: &Option<Position>| {
        position.map_or_else(|| "no position yet".to_owned(), |position| position.commit.to_string())
    };
    VerifyError::TimedOut(match phase {
        VerifyPhase::WaitingForSink => format!(
            "the time is over: the sink stands at {} and did not reach {}, where the source was read. Is it paused, stopped or behind? \
             wallaby describe says what it waits for",
            shown(sink_position),
            shown(position),
        ),
        _ => format!(
            "the time is over with {tables_done} of {tables_total} tables compared, at {table:?}: give more with --within, or name tables with --tables"
        ),
    })
}

struct Run<'a> {
    source: &'a mut dyn VerifySource,
    sink: &'a mut dyn VerifySink,
    request: &'a VerifyRequest,
    progress: &'a watch::Sender<VerifyProgress>,
}

impl Run<'_> {
    fn phase(&self, phase: VerifyPhase, table: &str) {
        self.progress.send_modify(|progress| {
            progress.phase = phase;
            table.clone_into(&mut progress.table);
        });
    }

    async fn first_pass(&mut self) -> Result<(Position, Position, Vec<Found>), VerifyError> {
        let tables = choose(self.source.tables().await?, &self.request.tables)?;
        let targets: Vec<TableName> = tables.iter().map(|table| self.sink.target(table)).collect();
        let lsn = self.source.renew(&tables).await?;
        let sink_position = self.reach(lsn, &targets).await?;
        let mut shapes = Vec::with_capacity(tables.len());
        for table in &tables {
            shapes.push(self.source.table(table).await?);
        }
        self.progress.send_modify(|progress| {
            progress.tables_total = u32::try_from(tables.len()).unwrap_or(u32::MAX);
            progress.rows_estimated = shapes.iter().map(|shape| shape.rows_estimated).sum();
        });
        let kept_max = (KEPT_MAX / tables.len().max(1)).max(KEPT_MIN);
        let mut found = Vec::with_capacity(tables.len());
        for ((table, target), shape) in tables.iter().zip(&targets).zip(&shapes) {
            self.phase(VerifyPhase::Comparing, &table.to_string());
            let mut report = report(table, target);
            let at_sink = self.sink.table(target).await?;
            let one = match at_sink.as_ref() {
                None => {
                    report.shape.push(format!("the sink has no table {target}"));
                    let columns: Vec<_> = shape.columns.iter().collect();
                    let reading = Reading::new(shape, RowText::new(&columns, &columns, &[]));
                    let sums = sum_up(&mut *self.source, &reading, 0, counter(self.progress));
                    let rows = beside(&mut *self.sink, self.request.awake_every, sums).await?.rows();
                    (report.rows_source, report.missing) = (rows, rows);
                    report.has_key = !shape.key.is_empty();
                    Found { table: table.clone(), report, pair: None, pending: Vec::new(), confirmed: Vec::new() }
                }
                Some(at_sink) => {
                    let pair = Pair::new(shape, at_sink, &mut report);
                    let pending = match &pair {
                        Some(pair) => self.compare(pair, shape.rows_estimated, kept_max, &mut report).await?,
                        None => Vec::new(),
                    };
                    Found { table: table.clone(), report, pair, pending, confirmed: Vec::new() }
                }
            };
            found.push(one);
            self.progress.send_modify(|progress| progress.tables_done += 1);
        }
        Ok((Position::before(lsn), sink_position, found))
    }

    async fn compare(
        &mut self,
        pair: &Pair,
        rows_estimated: u64,
        kept_max: usize,
        report: &mut TableReport,
    ) -> Result<Vec<Candidate>, VerifyError> {
        let counted = counter(self.progress);
        let ranges = compare_sums(self.sides(), pair, rows_estimated, report, counted).await?;
        if ranges.differing.is_empty() {
            return Ok(Vec::new());
        }
        self.phase(VerifyPhase::ReadingRows, &report.table.to_string());
        let found = compare_rows(self.sides(), pair, &ranges, kept_max, report).await?;
        let (missing, extra, different) = found.once;
        (report.missing, report.extra, report.different) = found.once;
        report.seen_once = missing + extra + different;
        Ok(found.kept)
    }

    fn sides(&mut self) -> Sides<'_> {
        Sides { source: &mut *self.source, sink: &mut *self.sink, awake_every: self.request.awake_every }
    }

    /// Waits until the sink's snapshot has all that lies below `lsn`.
    async fn reach(&mut self, lsn: Lsn, targets: &[TableName]) -> Result<Position, VerifyError> {
        let wanted = Position::before(lsn);
        loop {
            let position = self.sink.renew(targets).await?;
            self.progress.send_modify(|progress| {
                progress.position = Some(wanted);
                progress.sink_position = position;
            });
            match position {
                Some(position) if position >= wanted => return Ok(position),
                _ => {}
            }
            self.progress.send_if_modified(|progress| {
                let is_new = progress.phase == VerifyPhase::Preparing;
                if is_new {
                    progress.phase = VerifyPhase::WaitingForSink;
                }
                is_new
            });
            sleep(LOOK_EVERY).await;
            // The source's session must not look idle.
            self.source.rows("SELECT 1").await?;
        }
    }

    /// Looks at the rows that differed again and again, until each is known or the time is over.
    async fn settle(&mut self, found: &mut [Found]) -> Result<(), VerifyError> {
        while found.iter().any(|found| !found.pending.is_empty()) && Instant::now() < self.request.deadline {
            let Ok(looked) = timeout_at(self.request.deadline, self.look(found)).await else { break };
            looked?;
        }
        for found in found.iter_mut() {
            found.report.unsettled = found.pending.len() as u64;
            conclude(found, self.request.show);
        }
        Ok(())
    }

    /// One more look at all rows that are not known yet. Cancelled, it leaves them as they were.
    async fn look(&mut self, found: &mut [Found]) -> Result<(), VerifyError> {
        let waiting: Vec<usize> = (0..found.len()).filter(|&index| !found[index].pending.is_empty()).collect();
        let tables: Vec<TableName> = waiting.iter().map(|&index| found[index].table.clone()).collect();
        let targets: Vec<TableName> = waiting.iter().map(|&index| found[index].report.sink_table.clone()).collect();
        let awake_every = self.request.awake_every;
        self.phase(VerifyPhase::LookingAgain, "");
        let lsn = self.source.renew(&tables).await?;
        let mut at_source = Vec::with_capacity(waiting.len());
        for &index in &waiting {
            let read = read_pending(&mut *self.source, &found[index], |pair| &pair.source);
            at_source.push(beside(&mut *self.sink, awake_every, read).await?);
        }
        self.reach(lsn, &targets).await?;
        let mut at_sink = Vec::with_capacity(waiting.len());
        for &index in &waiting {
            let read = read_pending(&mut *self.sink, &found[index], |pair| &pair.sink);
            at_sink.push(beside(&mut *self.source, awake_every, read).await?);
        }
        for ((index, source), sink) in waiting.into_iter().zip(at_source).zip(at_sink) {
            let found = &mut found[index];
            let looked = look_again(std::mem::take(&mut found.pending), merge(source, sink));
            found.report.settled += looked.settled;
            found.confirmed.extend(looked.confirmed);
            found.pending = looked.pending;
        }
        Ok(())
    }

    /// Says which columns of the rows that are shown differ.
    async fn name_columns(&mut self, found: &mut [Found]) -> Result<(), VerifyError> {
        let awake_every = self.request.awake_every;
        for found in found.iter_mut() {
            let Some(pair) = &found.pair else { continue };
            let shown = found.confirmed.iter().take(self.request.show);
            let both: Vec<&Candidate> = shown.filter(|row| row.kind() == DifferenceKind::Different).collect();
            let keys: Vec<_> = both.iter().map(|candidate| &candidate.key).collect();
            if keys.is_empty() || !pair.source.text.has_key() {
                continue;
            }
            let (at_source, at_sink) = (pair.source.columns_by_key(&keys), pair.sink.columns_by_key(&keys));
            let source = beside(&mut *self.sink, awake_every, self.source.rows(&at_source)).await?;
            let sink = beside(&mut *self.source, awake_every, self.sink.rows(&at_sink)).await?;
            let by_hash = |rows: Vec<super::VerifyRow>| -> HashMap<String, super::VerifyRow> {
                rows.into_iter().filter_map(|mut row| Some((row.first_mut()?.take()?, row))).collect()
            };
            let (source, sink) = (by_hash(source), by_hash(sink));
            let names = &pair.source.text.names;
            for (candidate, difference) in found.confirmed.iter().zip(&mut found.report.differences) {
                let hash = candidate.key_hash.to_string();
                let (Some(source), Some(sink)) = (source.get(&hash), sink.get(&hash)) else { continue };
                let differs = |index: &usize| source.get(index + 1) != sink.get(index + 1);
                difference.columns = (0..names.len()).filter(differs).map(|index| names[index].clone()).collect();
            }
        }
        Ok(())
    }
}

fn counter(progress: &watch::Sender<VerifyProgress>) -> impl FnMut(u64) + Send {
    let progress = progress.clone();
    move |rows| progress.send_modify(|progress| progress.rows_done += rows)
}

/// The tables that were asked for.
fn choose(published: Vec<TableName>, wanted: &[String]) -> Result<Vec<TableName>, VerifyError> {
    if published.is_empty() {
        return Err(VerifyError::Refused("the publication has no tables: there is nothing to compare".to_owned()));
    }
    if wanted.is_empty() {
        return Ok(published);
    }
    let unknown = wanted.iter().find(|name| !published.iter().any(|table| table.to_string() == **name));
    if let Some(name) = unknown {
        return Err(VerifyError::Refused(format!(
            "the flow does not capture a table {name}: write schema.table as the source spells it, without quotes"
        )));
    }
    Ok(published.into_iter().filter(|table| wanted.contains(&table.to_string())).collect())
}

/// The rows of a table's pending keys at one side.
async fn read_pending(
    session: &mut dyn VerifySession,
    found: &Found,
    reading: impl Fn(&Pair) -> &Reading,
) -> Result<Vec<HashedRow>, VerifyError> {
    let Some(pair) = &found.pair else { return Ok(Vec::new()) };
    let reading = reading(pair);
    let is_whole = |candidate: &Candidate| candidate.key.iter().all(Option::is_some);
    let mut rows = Vec::new();
    if reading.text.has_key() && found.pending.iter().all(is_whole) {
        for some in found.pending.chunks(KEYS_PER_LOOK) {
            let keys: Vec<_> = some.iter().map(|candidate| &candidate.key).collect();
            rows.extend(session.rows(&reading.rows_by_key(&keys)).await?);
        }
    } else {
        let hashes: Vec<Hash> = found.pending.iter().map(|candidate| candidate.key_hash).collect();
        rows = session.rows(&reading.rows_by_hash(&hashes)).await?;
    }
    rows.into_iter().map(HashedRow::parse).collect()
}

/// Counts what is certain, and says it in one word.
fn conclude(found: &mut Found, show: usize) {
    let Found { report, confirmed, pair, .. } = found;
    for candidate in confirmed.iter() {
        let (missing, extra, different) = candidate.counts();
        report.missing += missing;
        report.extra += extra;
        report.different += different;
    }
    if let Some(pair) = pair {
        report.differences = confirmed.iter().take(show).map(|candidate| difference(pair, candidate)).collect();
    }
    report.verdict = if !confirmed.is_empty() || !report.shape.is_empty() {
        Verdict::Different
    } else if report.unsettled + report.seen_once > 0 {
        Verdict::Unsettled
    } else {
        Verdict::Equal
    };
}
