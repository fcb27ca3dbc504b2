//! Gives out what a sink asks for piece by piece, as the log and the side store would.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use wallaby_model::{Epoch, Position, SegmentBody};

use crate::{Batch, BatchPart, ChunkParts, Portion, Portions, SinkError};

/// A batch of one transaction, given out one segment at a time; counts how many segments the sink keeps.
pub struct PortionFeed {
    parts: VecDeque<BatchPart>,
    end: Option<(Position, Epoch)>,
    given: Vec<Weak<SegmentBody>>,
    /// The most segments that were alive at a time, the one that is just given out included.
    pub alive_max: usize,
}

impl PortionFeed {
    /// The whole batch, then its end.
    pub fn new(batch: &Batch) -> PortionFeed {
        let parts = batch.parts.iter().cloned().collect();
        PortionFeed { parts, end: Some((batch.to, batch.log_epoch)), given: Vec::new(), alive_max: 0 }
    }

    /// The first so many segments; then the log cannot be read on.
    pub fn interrupted_after(batch: &Batch, segments: usize) -> PortionFeed {
        let parts = batch.parts.iter().take(segments).cloned().collect();
        PortionFeed { parts, end: None, given: Vec::new(), alive_max: 0 }
    }
}

#[async_trait]
impl Portions for PortionFeed {
    async fn next(&mut self) -> Result<Portion, SinkError> {
        let Some(part) = self.parts.pop_front() else {
            let interrupted = || SinkError::Interrupted("the feed ends here".to_owned());
            let (to, log_epoch) = self.end.take().ok_or_else(interrupted)?;
            return Ok(Portion::End { to, log_epoch });
        };
        // A copy, so that only the sink keeps it alive.
        let body = Arc::new(SegmentBody::clone(&part.body));
        self.given.retain(|given| given.strong_count() > 0);
        self.given.push(Arc::downgrade(&body));
        self.alive_max = self.alive_max.max(self.given.len());
        Ok(Portion::Rows(vec![BatchPart { body, ..part }]))
    }
}

/// The parts of a chunk.
#[derive(Clone)]
pub struct PartFeed {
    parts: VecDeque<Arc<SegmentBody>>,
    is_whole: bool,
}

impl PartFeed {
    /// All of them.
    pub fn new(parts: impl IntoIterator<Item = Arc<SegmentBody>>) -> PartFeed {
        PartFeed { parts: parts.into_iter().collect(), is_whole: true }
    }

    /// These; then the side store cannot be read on.
    pub fn interrupted(parts: impl IntoIterator<Item = Arc<SegmentBody>>) -> PartFeed {
        PartFeed { is_whole: false, ..PartFeed::new(parts) }
    }
}

#[async_trait]
impl ChunkParts for PartFeed {
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError> {
        match self.parts.pop_front() {
            None if !self.is_whole => Err(SinkError::Interrupted("the feed ends here".to_owned())),
            part => Ok(part),
        }
    }
}
