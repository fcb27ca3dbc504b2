//! The log as one reader of a sink takes it: what was read ahead, what is held of it, and its share of the byte bound.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use wallaby_connector_api::TableFilter;
use wallaby_model::{Epoch, Position, TraceParent};
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
    context.shared.sizes.sink_buffer
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
    /// end. Not with more than `bytes_max` held: that is given to the sink piece by piece, or waits for somebody else (a replay for the
    /// main stream), and the reader with it.
    pub fn release_permits(&mut self, bytes_max: usize) {
        if self.assembler.held_bytes() <= bytes_max {
            self.permits.clear();
        }
    }

    /// The next piece of a large transaction, with the wait for it, and the span that it was made in.
    ///
    /// # Errors
    /// What ended the reading.
    pub async fn piece(
        &mut self,
        limit: Option<Position>,
        tables: Option<&Arc<TableFilter>>,
    ) -> Result<(Piece, Option<TraceParent>), ApplyError> {
        loop {
            let made_in = self.assembler.piece_made_in();
            if let Some(piece) = self.assembler.take_piece(limit, tables) {
                let given = match &piece {
                    Piece::Part(Some(part)) => part.up_to,
                    _ => Position::ZERO,
                };
                self.release_up_to(given);
                return Ok((piece, made_in));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use tokio::sync::Semaphore;
    use wallaby_model::Lsn;

    use super::super::assemble::AcceptedSegment;
    use super::*;

    #[tokio::test]
    async fn what_is_held_above_the_bound_keeps_its_share_of_it() {
        let room = Arc::new(Semaphore::new(1000));
        let at = |n: u64| Position::of(Lsn(90), Lsn(n), 1);
        let mut stream = LogStream::new(Feed::empty(), Position::before(Lsn(10)), Epoch(7));
        let take = async |stream: &mut LogStream, n: u64| {
            let (after, to) = (if n == 1 { Position::before(Lsn(10)) } else { at(n - 1) }, at(n));
            let complete_to = Position::before(Lsn(10));
            let segment = AcceptedSegment {
                after,
                to,
                complete_to,
                epoch: Epoch(7),
                body: None,
                splice: None,
                bytes: 100,
                made_in: None,
            };
            let permit = Arc::clone(&room).acquire_many_owned(100).await.unwrap();
            stream.take(Fed { segment, sequence: n, permit });
        };
        take(&mut stream, 1).await;
        take(&mut stream, 2).await;
        stream.release_permits(200);
        assert_eq!(room.available_permits(), 1000, "its end has to be read");
        take(&mut stream, 3).await;
        stream.release_permits(200);
        assert_eq!(room.available_permits(), 900, "more would be read than may be held");
        stream.assembler.take_piece(None, None).unwrap();
        stream.release_permits(200);
        assert_eq!(room.available_permits(), 1000);
    }
}
