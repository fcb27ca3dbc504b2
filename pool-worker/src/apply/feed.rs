//! Reads the log ahead of the sink: pulls and decodes in a loop of its own, bounded in bytes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use wallaby_model::{Epoch, Position, RecordKind, SegmentBody, Splice, TableChanges};
use wallaby_staging::{Accepted, LogReader, Waiting};

use super::ApplyError;
use super::assemble::AcceptedSegment;

/// Segments that wait for the sink, at most; the byte bound is what usually holds.
const SEGMENTS_MAX: usize = 1024;

/// A segment and its share of the byte bound, given back when it is dropped.
pub struct Fed {
    /// The segment.
    pub segment: AcceptedSegment,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// Its share of the bound.
    pub permit: OwnedSemaphorePermit,
}

/// The running loop; ends when dropped.
pub struct Feed {
    received: mpsc::Receiver<Result<Fed, ApplyError>>,
    waiting: watch::Receiver<Option<Waiting>>,
    _task: AbortOnDropHandle<()>,
}

impl Feed {
    /// Starts reading ahead, at most `bytes` that were not dropped yet.
    pub fn start(reader: LogReader, bytes: usize) -> Feed {
        let waiting = reader.waiting();
        let (sender, received) = mpsc::channel(SEGMENTS_MAX);
        let task =
            tokio::spawn(read(reader, sender, bytes.clamp(1 << 16, Semaphore::MAX_PERMITS.min(u32::MAX as usize))));
        Feed { received, waiting, _task: AbortOnDropHandle::new(task) }
    }

    /// One that gives nothing.
    #[cfg(test)]
    pub fn empty() -> Feed {
        let ((_, received), (_, waiting)) = (mpsc::channel(1), watch::channel(None));
        Feed { received, waiting, _task: AbortOnDropHandle::new(tokio::spawn(async {})) }
    }

    /// The next segment. Cancel-safe.
    ///
    /// # Errors
    /// What ended the reading.
    pub async fn next(&mut self) -> Result<Fed, ApplyError> {
        match self.received.recv().await {
            Some(fed) => fed,
            None => Err(ApplyError::Invalid),
        }
    }

    /// The next segment, if one is there already.
    ///
    /// # Errors
    /// What ended the reading.
    pub fn ready(&mut self) -> Result<Option<Fed>, ApplyError> {
        match self.received.try_recv() {
            Ok(fed) => fed.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// What the reader waits for, beyond the next record.
    pub fn waiting(&self) -> Option<Waiting> {
        *self.waiting.borrow()
    }
}

async fn read(mut reader: LogReader, sender: mpsc::Sender<Result<Fed, ApplyError>>, bytes: usize) {
    let room = Arc::new(Semaphore::new(bytes));
    loop {
        let outcome = match reader.next().await {
            Ok(accepted) => share(accepted, &room, bytes).await,
            Err(error) => Err(error.into()),
        };
        match outcome {
            Ok(None) => {}
            Ok(Some(fed)) => {
                if sender.send(Ok(fed)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let _nobody_listens = sender.send(Err(error)).await;
                return;
            }
        }
    }
}

/// Decodes a record and waits until its share of the bound is free: by what it takes in memory, not packed.
async fn share(accepted: Accepted, room: &Arc<Semaphore>, bytes: usize) -> Result<Option<Fed>, ApplyError> {
    let sequence = accepted.staged.sequence;
    let Some(segment) = decode(accepted)? else { return Ok(None) };
    let wanted = u32::try_from(segment.bytes.clamp(1, bytes)).unwrap_or(u32::MAX);
    let permit = Arc::clone(room).acquire_many_owned(wanted).await.map_err(|_| ApplyError::Invalid)?;
    Ok(Some(Fed { segment, sequence, permit }))
}

/// Decodes what the reader rule accepted; `None` for a record without rows that moves nothing (a fence).
fn decode(accepted: Accepted) -> Result<Option<AcceptedSegment>, ApplyError> {
    let Accepted { staged, after, to, complete_to, log_epoch } = accepted;
    let made_in = staged.traceparent;
    let splice = match &staged.record.kind {
        RecordKind::Splice { .. } => {
            let read = serde_json::from_slice::<Splice>(&staged.body);
            Some(read.map_err(|source| ApplyError::Splice { sequence: staged.sequence, source })?)
        }
        _ => None,
    };
    let body = match &staged.record.kind {
        RecordKind::Data { .. } => {
            let decoded = wallaby_wire::decode(&staged.body)
                .map_err(|source| ApplyError::Segment { sequence: staged.sequence, source })?;
            Some(Arc::new(decoded))
        }
        RecordKind::Heartbeat { .. } | RecordKind::Resume { .. } | RecordKind::Splice { .. } => None,
        RecordKind::Fence { .. } => return Ok(None),
    };
    Ok(Some(AcceptedSegment {
        after,
        to,
        complete_to: complete_to.unwrap_or(Position::ZERO),
        epoch: log_epoch,
        bytes: body.as_ref().map_or(0, |body: &Arc<SegmentBody>| body.tables.iter().map(TableChanges::bytes).sum()),
        body,
        splice,
        made_in,
    }))
}

/// Where a reader that had no position begins: the first record it accepts.
pub fn beginning(fed: &Fed) -> (Position, Epoch) {
    (fed.segment.after, fed.segment.epoch)
}
