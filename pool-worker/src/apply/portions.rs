//! A transaction that is not held as a whole, given to the sink in portions: what stands of it in the log, then its parts in the
//! side store.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::Span;
use wallaby_connector_api::{BatchPart, Portion, Portions, SinkError, TableFilter};
use wallaby_model::{Epoch, Position, Splice, TableName, TraceParent};
use wallaby_staging::{SideKey, SideStore, StagingError};
use wallaby_wire::splice::{SpliceReader, decode_manifest};

use super::ApplyError;
use super::assemble::Piece;
use super::stream::LogStream;
use super::tables;
use crate::pulse::Pulse;
use crate::spans;

/// Parts that are fetched ahead of the sink, at most; and as many bytes, packed.
const AHEAD: u32 = 2;
const AHEAD_BYTES: u64 = 4 << 20;
/// One object of the side store is waited for this long.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// See the module.
pub struct LogPortions<'a> {
    stream: &'a mut LogStream,
    side: Arc<dyn SideStore>,
    tables: Option<Arc<TableFilter>>,
    limit: Option<Position>,
    pulse: &'a Pulse,
    /// Of the whole: a child of the first record's, linked to that of each other one.
    span: Span,
    /// The span of the record that was taken last.
    made_in: Option<TraceParent>,
    splice: Option<OpenSplice>,
    /// After the last rows.
    end: Option<(Position, Epoch)>,
    /// Rows given out, and the commit time of their transaction.
    pub rows: u64,
    /// The commit time of the last transaction in it, µs since 1970.
    pub committed_at_micros: Option<i64>,
    /// Tables with rows in it that no run ever brought to the sink.
    pub strangers: BTreeSet<TableName>,
    /// What really went wrong, when the sink was told that the reading was interrupted.
    pub error: Option<ApplyError>,
}

impl<'a> LogPortions<'a> {
    /// The large transaction that is next in `stream`.
    pub fn new(
        stream: &'a mut LogStream,
        side: Arc<dyn SideStore>,
        tables: Option<Arc<TableFilter>>,
        limit: Option<Position>,
        pulse: &'a Pulse,
        span: Span,
    ) -> LogPortions<'a> {
        LogPortions {
            made_in: stream.assembler.piece_made_in(),
            stream,
            side,
            tables,
            limit,
            pulse,
            span,
            splice: None,
            end: None,
            rows: 0,
            committed_at_micros: None,
            strangers: BTreeSet::new(),
            error: None,
        }
    }

    /// What came of it: where the reader stands after it. An error of the reading is told as it was, not as the sink saw it.
    ///
    /// # Errors
    /// The reading's error, or the sink's.
    pub fn finish<T>(self, outcome: Result<T, SinkError>) -> Result<Position, ApplyError> {
        let (span, rows) = (self.span.clone(), self.rows);
        let outcome = self.outcome(outcome);
        match &outcome {
            Ok(to) => spans::committed(&span, *to, rows),
            Err(error) => wallaby_telemetry::failed(&span, error),
        }
        outcome
    }

    fn outcome<T>(self, outcome: Result<T, SinkError>) -> Result<Position, ApplyError> {
        match (outcome, self.error, self.end) {
            (Ok(_), _, Some((to, _))) => Ok(to),
            (Ok(_), ..) => Err(SinkError::Transient("the sink did not take a whole transaction".to_owned()).into()),
            (Err(SinkError::Interrupted(_)), Some(error), _) => Err(error),
            (Err(error), ..) => Err(error.into()),
        }
    }

    async fn advance(&mut self) -> Result<Portion, ApplyError> {
        loop {
            if let Some((to, log_epoch)) = self.end {
                return Ok(Portion::End { to, log_epoch });
            }
            if let Some(splice) = &mut self.splice {
                self.pulse.wait("a part of a large transaction in the side store");
                match splice.next(self.tables.as_ref()).await? {
                    Some(part) => return Ok(self.rows_of(part)),
                    None => {
                        self.end = Some((splice.to, splice.epoch));
                        continue;
                    }
                }
            }
            self.pulse.wait("the rest of a large transaction in the log");
            let (piece, made_in) = self.stream.piece(self.limit, self.tables.as_ref()).await?;
            if let Some(made_in) = made_in.filter(|_| made_in != self.made_in) {
                wallaby_telemetry::link(&self.span, made_in);
                self.made_in = Some(made_in);
            }
            match piece {
                Piece::Part(None) => {}
                Piece::Part(Some(part)) => return Ok(self.rows_of(part)),
                Piece::Last { part, to, epoch } => {
                    self.end = Some((to, epoch));
                    if let Some(part) = part {
                        return Ok(self.rows_of(part));
                    }
                }
                Piece::Splice { splice, after, to, epoch } => {
                    self.pulse.wait("the manifest of a large transaction");
                    self.splice = Some(OpenSplice::open(&self.side, splice, after, to, epoch).await?);
                }
            }
        }
    }

    fn rows_of(&mut self, part: BatchPart) -> Portion {
        self.pulse.wait("the sink's answer");
        self.rows += part.tables().map(|table| table.rows.num_rows() as u64).sum::<u64>();
        if let Some(filter) = &self.tables {
            for table in tables::strangers(filter, std::slice::from_ref(&part)) {
                if !self.strangers.contains(table) {
                    self.strangers.insert(table.clone());
                }
            }
        }
        if let Some(transaction) = part.transactions().last() {
            self.committed_at_micros = Some(transaction.committed_at_micros);
        }
        Portion::Rows(vec![part])
    }
}

#[async_trait]
impl Portions for LogPortions<'_> {
    async fn next(&mut self) -> Result<Portion, SinkError> {
        match self.advance().await {
            Ok(portion) => Ok(portion),
            Err(error) => {
                let said = error.to_string();
                self.error = Some(error);
                Err(SinkError::Interrupted(said))
            }
        }
    }
}

type Fetch = AbortOnDropHandle<Result<Option<Bytes>, StagingError>>;

/// The parts of one transaction, fetched a little ahead.
struct OpenSplice {
    side: Arc<dyn SideStore>,
    reader: SpliceReader,
    /// Fetches under way, in order.
    ahead: VecDeque<(u32, Fetch)>,
    next: u32,
    parts: u32,
    after: Position,
    to: Position,
    epoch: Epoch,
}

impl OpenSplice {
    async fn open(
        side: &Arc<dyn SideStore>,
        splice: Splice,
        after: Position,
        to: Position,
        epoch: Epoch,
    ) -> Result<OpenSplice, ApplyError> {
        let commit = splice.transaction.commit;
        let lost = || ApplyError::SpliceLost { commit, what: "its manifest is".to_owned() };
        let body = fetched(side.get(SideKey::Manifest { commit })).await?.ok_or_else(lost)?;
        let manifest = decode_manifest(commit, &body).map_err(ApplyError::Parts)?;
        let parts = u32::try_from(manifest.parts.len()).unwrap_or(u32::MAX);
        let reader = SpliceReader::new(manifest, after);
        Ok(OpenSplice {
            side: Arc::clone(side),
            next: reader.wanted().unwrap_or(parts),
            reader,
            ahead: VecDeque::new(),
            parts,
            after,
            to,
            epoch,
        })
    }

    async fn next(&mut self, tables: Option<&Arc<TableFilter>>) -> Result<Option<BatchPart>, ApplyError> {
        loop {
            let Some(wanted) = self.reader.wanted() else { return Ok(None) };
            self.fetch_ahead(wanted);
            let Some((number, fetch)) = self.ahead.pop_front() else { return Ok(None) };
            if number < wanted {
                continue;
            }
            let attempt = self.reader.manifest().attempt;
            let commit = self.reader.manifest().transaction.commit;
            let lost = || ApplyError::SpliceLost { commit, what: format!("part {number} of attempt {attempt} is") };
            let answer = async {
                match fetch.await {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        Err(StagingError::Unavailable { what: "the side store".to_owned(), reason: error.to_string() })
                    }
                }
            };
            let bytes = fetched(answer).await?.ok_or_else(lost)?;
            let body = self.reader.take(&bytes).map_err(ApplyError::Parts)?;
            if body.rows() > 0 {
                let (after, up_to) = (self.after, self.to);
                return Ok(Some(BatchPart { body: Arc::new(body), after, up_to, tables: tables.cloned() }));
            }
        }
    }

    fn fetch_ahead(&mut self, wanted: u32) {
        self.next = self.next.max(wanted);
        let attempt = self.reader.manifest().attempt;
        while self.next < self.parts && self.next <= wanted.saturating_add(AHEAD) {
            let ahead = &self.reader.manifest().parts[wanted as usize..=self.next as usize];
            let is_much = ahead.iter().map(|part| part.bytes).sum::<u64>() > AHEAD_BYTES;
            if self.next > wanted && is_much {
                // A part with one huge row comes alone.
                return;
            }
            let (side, number) = (Arc::clone(&self.side), self.next);
            let fetch = async move { side.get(SideKey::Part { attempt, number }).await };
            self.ahead.push_back((number, AbortOnDropHandle::new(tokio::spawn(fetch))));
            self.next += 1;
        }
    }
}

async fn fetched(
    answer: impl Future<Output = Result<Option<Bytes>, StagingError>>,
) -> Result<Option<Bytes>, ApplyError> {
    match timeout(PATIENCE, answer).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => {
            let (what, reason) = ("reading the side store".to_owned(), "no answer".to_owned());
            Err(StagingError::Unavailable { what, reason }.into())
        }
    }
}
