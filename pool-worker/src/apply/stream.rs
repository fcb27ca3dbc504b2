//! The log as one reader of a sink takes it: what was read ahead, what is held of it, and its share of the byte bound.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use wallaby_connector_api::TableFilter;
use wallaby_model::{Epoch, Position};
use wallaby_staging::{Log, LogReader, ReaderOptions, SegmentCache, Start, Waiting};

use super::ApplyError;
use super::assemble::{BatchAssembler, Piece};
use super::feed::{Fed, Feed};
use crate::task::TaskContext;

/// See the module.
pub struct LogStream {
    feed: Feed,
    /// What was read and not applied.
    pub assembler: BatchAssembler,
    /// Shares of the byte bound of what the assembler holds, with the position up to which each goes.
    permits: VecDeque<(Position, OwnedSemaphorePermit)>,
    /// The sequence of the last record that was taken.
    pub sequence: Option<u64>,
}

/// A reader of the flow's log that begins at `start` and reads ahead at most the worker's bound for a sink.
///
/// # Errors
/// When the servers cannot be reached.
pub async fn feed(context: &TaskContext, start: Start) -> Result<Feed, ApplyError> {
    let log = Log::new(context.task.flow.clone(), context.shared.nats().await?.clone());
    let cache: Arc<dyn SegmentCache> = Arc::<crate::cache::RecordCache>::clone(&context.shared.cache);
    let reader = LogReader::new(&log, start, ReaderOptions { cache: Some(cache), ..ReaderOptions::default() });
    Ok(Feed::start(reader, buffer_bytes(context)))
}

/// The memory for what one reader has read and not applied.
pub fn buffer_bytes(context: &TaskContext) -> usize {
    usize::try_from(context.shared.options.sink_buffer_bytes.0).unwrap_or(usize::MAX)
}

impl LogStream {
    /// A stream for a reader that stands at `at`.
    pub fn new(feed: Feed, at: Position, epoch: Epoch) -> LogStream {
        LogStream { feed, assembler: BatchAssembler::new(at, epoch), permits: VecDeque::new(), sequence: None }
    }

    /// Takes a record that was read.
    pub fn take(&mut self, fed: Fed) {
        self.sequence = Some(fed.sequence);
        self.permits.push_back((fed.segment.to, fed.permit));
        self.assembler.push(fed.segment);
    }

    /// Takes what is there without waiting, up to a batch's worth.
    ///
    /// # Errors
    /// What ended the reading.
    pub fn fill(&mut self, bytes_max: usize, rows_max: usize) -> Result<(), ApplyError> {
        while self.assembler.held_bytes() < bytes_max && self.assembler.held_rows() < rows_max {
            match self.feed.ready()? {
                Some(fed) => self.take(fed),
                None => break,
            }
        }
        Ok(())
    }

    /// Waits for the next record. Cancel-safe.
    ///
    /// # Errors
    /// What ended the reading.
    pub async fn read(&mut self) -> Result<(), ApplyError> {
        let fed = self.feed.next().await?;
        self.take(fed);
        Ok(())
    }

    /// What is held of a transaction without its end gives its share of the bound back, or the reader would never get to that
    /// end. One of which too much is held is given to the sink piece by piece instead.
    pub fn release_permits(&mut self) {
        self.permits.clear();
    }

    /// The next piece of a large transaction, with the wait for it.
    ///
    /// # Errors
    /// What ended the reading.
    pub async fn piece(
        &mut self,
        limit: Option<Position>,
        tables: Option<&Arc<TableFilter>>,
    ) -> Result<Piece, ApplyError> {
        loop {
            if let Some(piece) = self.assembler.take_piece(limit, tables) {
                let given = match &piece {
                    Piece::Part(Some(part)) => part.up_to,
                    _ => Position::ZERO,
                };
                self.release_up_to(given);
                return Ok(piece);
            }
            self.read().await?;
        }
    }

    /// Everything up to `position` is applied.
    pub fn applied(&mut self, position: Position) {
        self.assembler.applied(position);
        self.release_up_to(position);
    }

    fn release_up_to(&mut self, position: Position) {
        while self.permits.front().is_some_and(|(to, _)| *to <= position) {
            self.permits.pop_front();
        }
    }

    /// What the reader waits for, beyond the next record.
    pub fn waiting(&self) -> Option<Waiting> {
        self.feed.waiting()
    }
}
