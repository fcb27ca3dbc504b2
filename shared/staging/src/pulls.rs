//! The pulls of one worker: readers that stand at the same place share one consumer, so a record is pulled once for all of them.
//!
//! A *place* is a consumer and the sequence that it delivers next. A reader takes from the cache while it has what comes next;
//! else it goes to the place that delivers it, or makes one. There the readers stand in line: the first one pulls, the others find
//! the record when it is their turn. Nobody waits for a reader, only for a record: a reader stands in line no longer than it polls
//! [`crate::LogReader::next`], so one that its sink blocks, or that is dropped, leaves the line. One that falls behind finds nothing
//! at the place any more, and makes one of its own; when it has caught up it meets the others again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use wallaby_model::FlowId;

use crate::error::Result;
use crate::log::Log;
use crate::metrics::ReaderMetrics;
use crate::pull::PullSession;
use crate::record::{Incarnation, Mark, Staged};

/// A reader that got this many records elsewhere lets the consumer catch up; further ahead it is cheaper to make another one.
const SKIP_MAX: u64 = 64;

/// The places of all readers of one worker. One value per process, behind its cache.
#[derive(Debug, Default)]
pub struct SharedPulls(Mutex<Vec<Weak<Place>>>);

impl SharedPulls {
    /// The oldest place of this flow that delivers `sequence` next; else the reader's `own`, else a new one.
    pub(crate) fn place(&self, flow: &FlowId, sequence: u64, own: Option<Arc<Place>>) -> Arc<Place> {
        // A list of plain values, whole after any panic.
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|place| place.strong_count() > 0);
        let fits = |place: &Arc<Place>| place.flow == *flow && place.next() == sequence && !place.is_over();
        if let Some(found) = places.iter().filter_map(Weak::upgrade).find(fits) {
            return found;
        }
        if let Some(own) = own {
            return own;
        }
        let made = Arc::new(Place::new(flow.clone(), sequence));
        places.push(Arc::downgrade(&made));
        made
    }
}

/// What a reader wants from a place.
pub(crate) struct Wanted<'a> {
    pub(crate) log: &'a Log,
    pub(crate) pull_bytes: usize,
    /// The sequence that comes next.
    pub(crate) sequence: u64,
    /// What the reader read before it, if that had the sequence before it: it must still stand there.
    pub(crate) last: Option<Mark>,
    /// The life of the log that the reader knows.
    pub(crate) incarnation: Option<Incarnation>,
    pub(crate) metrics: &'a ReaderMetrics,
}

/// What a place has for a reader.
pub(crate) enum Found {
    /// The record that comes next, or the first one behind it that is still there.
    Record(Box<Staged>),
    /// Nothing: the place is past it, far before it, or of no more use.
    Elsewhere,
    /// The log was purged or numbered anew: the reader's place is searched by position.
    NumberedAnew,
}

/// One consumer, and the readers in line for what it delivers.
#[derive(Debug)]
pub(crate) struct Place {
    flow: FlowId,
    /// What readers come here for.
    next: AtomicU64,
    is_over: AtomicBool,
    line: tokio::sync::Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    session: Option<PullSession>,
    /// The sequence that the consumer delivers next, or the first one behind it.
    at: u64,
    /// What the consumer delivered last.
    last: Option<Mark>,
    /// The same whole, for those who came second and a cache that forgets; with the sequence that it was the answer to.
    latest: Option<(u64, Staged)>,
}

impl Place {
    pub(crate) fn new(flow: FlowId, sequence: u64) -> Place {
        let line = Line { at: sequence, ..Line::default() };
        Place { flow, next: AtomicU64::new(sequence), is_over: AtomicBool::new(false), line: line.into() }
    }

    fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Whether a reader that already comes here for `sequence` need not look elsewhere.
    pub(crate) fn is_near(&self, sequence: u64) -> bool {
        let next = self.next();
        next <= sequence && sequence - next <= SKIP_MAX && !self.is_over()
    }

    /// Waits in line, then takes what was pulled meanwhile, or pulls. Cancel-safe.
    ///
    /// # Errors
    /// Of the consumer. The place is over then, for everybody.
    pub(crate) async fn take(&self, wanted: Wanted<'_>) -> Result<Found> {
        loop {
            let mut line = self.line.lock().await;
            if self.is_over() {
                return Ok(Found::Elsewhere);
            }
            match self.pull(&mut line, &wanted).await {
                // Who stands in line may want just this one, and be there before the next one comes: the lock is fair.
                Ok(Pulled::Passed) => {}
                Ok(Pulled::Found(found)) if !matches!(found, Found::NumberedAnew) => return Ok(found),
                over => {
                    self.is_over.store(true, Ordering::Release);
                    *line = Line::default();
                    return over.map(|_| Found::NumberedAnew);
                }
            }
        }
    }

    async fn pull(&self, line: &mut Line, wanted: &Wanted<'_>) -> Result<Pulled> {
        let Wanted { log, sequence, last, .. } = *wanted;
        if let Some((asked, staged)) = &line.latest
            && (*asked..=staged.sequence).contains(&sequence)
            // As in the cache: a sequence means something within one life of the log only.
            && wanted.incarnation.is_some_and(|incarnation| staged.incarnation == Some(incarnation))
        {
            wanted.metrics.cache_hit();
            return Ok(Pulled::Found(Found::Record(Box::new(staged.clone()))));
        }
        if !self.is_near(sequence) || line.at > sequence {
            return Ok(Pulled::Found(Found::Elsewhere));
        }
        // Sequences come again after a loss of data: the last record is read once more, to see whether it is still there.
        let is_unseen = line.at == sequence && line.last.is_none() && last.is_some();
        if line.session.is_none() || is_unseen {
            let begin = last.map_or(sequence, |last| last.sequence);
            let info = log.reader_leader().info(log).await?;
            // What was read last must be there still; where nothing was read, the place may at most be the end.
            if info.state.last_sequence + u64::from(last.is_none()) < begin {
                return Ok(Pulled::Found(Found::NumberedAnew));
            }
            let session = PullSession::open(log, begin, wanted.pull_bytes).await?;
            *line = Line { session: Some(session), at: begin, ..Line::default() };
        }
        let Some(session) = &mut line.session else { return Ok(Pulled::Found(Found::Elsewhere)) };
        let staged = session.next().await?;
        wanted.metrics.pulled(staged.body.len());
        let asked = std::mem::replace(&mut line.at, staged.sequence + 1);
        let before = line.last.replace(Mark::of(&staged));
        let is_passed = staged.sequence < sequence;
        if !is_passed && last.is_some() && before != last {
            return Ok(Pulled::Found(Found::NumberedAnew));
        }
        // Also of one that this reader got elsewhere: others come here for what is next, or have come for it already.
        self.next.store(line.at, Ordering::Release);
        line.latest = Some((asked, staged.clone()));
        Ok(if is_passed { Pulled::Passed } else { Pulled::Found(Found::Record(Box::new(staged))) })
    }
}

/// What one step at a place came to.
enum Pulled {
    /// Something for the reader.
    Found(Found),
    /// A record that the reader has already.
    Passed,
}
