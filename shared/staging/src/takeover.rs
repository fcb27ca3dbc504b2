//! Taking a log over: the fence, and what the log says after it.
//!
//! The fence is the one message without an expected sequence: it always lands, and by landing it breaks the chain of an
//! owner that still pipelines. Chained, it would lose every race: the server checks against what is proposed, and a read
//! shows what is applied.

use std::time::Duration;

use async_nats::client::Request;
use tokio::time::Instant;
use wallaby_model::{Epoch, Nonce, Position, Record, RecordKind, ResumeInfo};

use crate::error::{Result, StagingError};
use crate::leader;
use crate::log::{Log, LogInfo};
use crate::metrics::{self, Refusal};
use crate::record::{self, Incarnation};
use crate::tail::{self, FenceAt, Tail};
use crate::writer::{LogWriter, WriterOptions};
use crate::writer_task::answer_of;

const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// What the fences of the log say to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Ours is there, and none is above it.
    Owner {
        /// Its sequence.
        fence: u64,
    },
    /// Neither ours nor one above it.
    Absent,
    /// A younger owner.
    Fenced(Epoch),
    /// Another owner of our epoch fenced first.
    Taken,
}

/// Reads the fences, in order of sequence, with the eyes of one owner.
pub(crate) fn standing(fences: &[FenceAt], epoch: Epoch, nonce: Nonce) -> Standing {
    if let Some(highest) = fences.iter().map(|fence| fence.epoch).max()
        && highest > epoch
    {
        return Standing::Fenced(highest);
    }
    match fences.iter().find(|fence| fence.epoch == epoch) {
        Some(first) if first.nonce == nonce => Standing::Owner { fence: first.sequence },
        Some(_) => Standing::Taken,
        None => Standing::Absent,
    }
}

/// A log that is fenced and read, and not yet resumed.
#[derive(Debug)]
pub struct Takeover {
    pub(crate) log: Log,
    pub(crate) epoch: Epoch,
    pub(crate) nonce: Nonce,
    pub(crate) options: WriterOptions,
    pub(crate) fences: Vec<FenceAt>,
    pub(crate) tail: Tail,
    pub(crate) info: LogInfo,
}

/// Retries what is worth another try, until a deadline.
struct Patience {
    until: Instant,
    delay: Duration,
}

impl Patience {
    async fn after(&mut self, error: StagingError) -> Result<()> {
        if !error.is_transient() || Instant::now() + self.delay > self.until {
            return Err(error);
        }
        tracing::info!(%error, "the log is not taken over yet");
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(RETRY_MAX);
        Ok(())
    }
}

impl Takeover {
    pub(crate) async fn run(log: &Log, epoch: Epoch, nonce: Nonce, options: WriterOptions) -> Result<Takeover> {
        let mut patience = Patience { until: Instant::now() + options.takeover_timeout, delay: RETRY_FIRST };
        let mut has_landed = options.may_stand && has_stood(log, epoch, nonce).await;
        loop {
            // A fence whose acknowledgement was lost is found by its nonce; one that is published twice does no harm.
            let published = match has_landed {
                true => Ok(()),
                false => publish_fence(log, epoch, nonce, options.ack_timeout).await,
            };
            let fences = match tail::read_fences(log, 0).await {
                Ok(fences) => fences,
                Err(error) => {
                    patience.after(error).await?;
                    continue;
                }
            };
            let fence = match standing(&fences, epoch, nonce) {
                Standing::Owner { fence } => fence,
                Standing::Absent => {
                    let reason =
                        || StagingError::unavailable(format!("the fence in {}", log.stream()), "it is not there yet");
                    patience.after(published.err().unwrap_or_else(reason)).await?;
                    continue;
                }
                Standing::Fenced(by) => {
                    metrics::fenced(log.flow());
                    return Err(StagingError::Fenced { flow: log.flow().clone(), mine: epoch, by });
                }
                Standing::Taken => {
                    metrics::fenced(log.flow());
                    return Err(StagingError::EpochTaken { flow: log.flow().clone(), epoch });
                }
            };
            has_landed = true;
            tracing::info!(flow = %log.flow(), %epoch, fence, fences = fences.len(), "the fence stands: reading what is behind it");
            match read_behind(log, &fences, fence).await {
                Ok((tail, info)) => {
                    metrics::took_over(log.flow());
                    tracing::info!(flow = %log.flow(), %epoch, fence, end = ?tail.end, "fenced the log");
                    return Ok(Takeover { log: log.clone(), epoch, nonce, options, fences, tail, info });
                }
                Err(error) => patience.after(error).await?,
            }
        }
    }

    /// Where the log ended when it was fenced. Nobody else appends to it now.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// The stream's state at the fence.
    pub fn info(&self) -> &LogInfo {
        &self.info
    }

    /// Publishes `resume`, chained, and starts the writer. `position` is the log's end, or, in a log that carries no position,
    /// where the flow begins. `info.rewind` opens a new incarnation; with it `position` may lie before the log's end: what stands behind
    /// a splice was lost, and is published again from there (hazard 9).
    ///
    /// # Errors
    /// `NotContinuing` when `position` is not the log's end; `Fenced` and the other final errors of a writer.
    pub async fn resume(mut self, position: Position, info: ResumeInfo) -> Result<LogWriter> {
        if info.rewind && self.tail.end.is_some_and(|end| position < end) {
            self.tail.end = Some(position);
            self.tail.complete_to = self.tail.complete_to.map(|complete_to| complete_to.min(position));
        }
        if self.tail.end.is_some_and(|end| end != position) {
            return Err(StagingError::NotContinuing {
                flow: self.log.flow().clone(),
                from: position,
                end: self.tail.end,
            });
        }
        let incarnation = match self.tail.incarnation {
            Some(incarnation) if !info.rewind => incarnation,
            _ => Incarnation::random(),
        };
        LogWriter::start(self, position, info, incarnation).await
    }
}

/// Whether our fence stands already. Not known counts as no: another one does no harm.
async fn has_stood(log: &Log, epoch: Epoch, nonce: Nonce) -> bool {
    let fences = tail::read_fences(log, 0).await.unwrap_or_default();
    matches!(standing(&fences, epoch, nonce), Standing::Owner { .. })
}

/// Publishes the fence and waits for its acknowledgement. An error says nothing about whether it landed.
async fn publish_fence(log: &Log, epoch: Epoch, nonce: Nonce, timeout: Duration) -> Result<()> {
    let record = Record { flow: log.flow().clone(), epoch, kind: RecordKind::Fence { nonce } };
    let request = Request::new().headers(record::encode(&record, None)).timeout(Some(timeout));
    let what = || format!("fencing {}", log.stream());
    let client = &log.connections().publish;
    let sent = async {
        let answer = client.send_request(log.fence_subject().to_owned(), request).await;
        answer.map_err(|error| StagingError::unavailable(what(), error))
    };
    let answer = leader::bounded(timeout, what, sent).await?;
    match answer_of(&answer) {
        Ok(_) => Ok(()),
        Err((Refusal::Full, reason)) => Err(StagingError::unavailable(
            what(),
            format!("{reason}: the log is full, reserve included; raise log.maxBytes"),
        )),
        Err((_, reason)) => Err(StagingError::unavailable(what(), reason)),
    }
}

/// Reads the tail from a leader that has our fence: one that was cut off does not have it.
async fn read_behind(log: &Log, fences: &[FenceAt], fence: u64) -> Result<(Tail, LogInfo)> {
    let info = log.info().await?;
    if info.last_sequence < fence {
        return Err(StagingError::unavailable(
            format!("the tail of {}", log.stream()),
            "a leader answers that lacks our fence",
        ));
    }
    let tail = tail::read_at(log, fences, &info).await?;
    Ok((tail, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(sequence: u64, epoch: u64, nonce: Nonce) -> FenceAt {
        FenceAt { sequence, epoch: Epoch(epoch), nonce }
    }

    #[test]
    fn the_highest_fence_owns_the_log_and_of_equals_the_first() {
        let (mine, other) = (Nonce::random(), Nonce::random());
        let at = |fences: &[FenceAt]| standing(fences, Epoch(5), mine);
        assert_eq!(at(&[]), Standing::Absent);
        assert_eq!(at(&[fence(1, 4, other)]), Standing::Absent);
        assert_eq!(at(&[fence(1, 4, other), fence(7, 5, mine)]), Standing::Owner { fence: 7 });
        assert_eq!(at(&[fence(7, 5, mine), fence(9, 6, other)]), Standing::Fenced(Epoch(6)));
        assert_eq!(at(&[fence(3, 6, other), fence(7, 5, mine)]), Standing::Fenced(Epoch(6)));
        // A lower fence that comes late is nothing to us.
        assert_eq!(at(&[fence(7, 5, mine), fence(9, 4, other)]), Standing::Owner { fence: 7 });
        assert_eq!(at(&[fence(7, 5, mine), fence(8, 5, other)]), Standing::Owner { fence: 7 });
        assert_eq!(at(&[fence(6, 5, other), fence(7, 5, mine)]), Standing::Taken);
        // Ours twice, because an acknowledgement was lost.
        assert_eq!(at(&[fence(7, 5, mine), fence(8, 5, mine)]), Standing::Owner { fence: 7 });
    }
}
