//! How far a sink is behind, told every second by a loop of its own: also while the sink does not answer, takes minutes over one
//! transaction, or cannot be opened. That is when people look.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::Checkpoint;
use wallaby_model::condition::ConditionType;
use wallaby_model::{Position, TaskId};

use crate::task::TaskContext;
use crate::{metrics, status};

const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often the log's end is asked for: as often as the capture writes it down.
const END_EVERY: Duration = Duration::from_secs(10);
/// A sink within this of the log's end counts as caught up.
const CAUGHT_UP_WITHIN_MS: u64 = 10_000;

/// Where a sink stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stands {
    /// It has everything up to here.
    pub at: Position,
    /// What was read of the log, at least.
    pub end: Position,
    /// When the oldest change was committed that was read and that it does not have, µs since 1970; `None` when it has all.
    pub oldest_micros: Option<i64>,
    /// Since when nothing is read for it: its session failed.
    pub lost_since: Option<Instant>,
}

impl Stands {
    /// Where an earlier owner left the sink, which was given nothing since. `None` when it never stood anywhere.
    fn left(checkpoint: &Checkpoint, now_ms: u64, now: Instant) -> Option<Stands> {
        let at = checkpoint.position?;
        let since = Duration::from_millis(now_ms.saturating_sub(checkpoint.at.0));
        Some(Stands { at, end: at, oldest_micros: None, lost_since: Some(now.checked_sub(since).unwrap_or(now)) })
    }

    /// Bytes of WAL and milliseconds that it is behind. `staged`: the log's end, as far as it is known. Of a sink for which nothing is
    /// read it is only known that it is behind at all, and since when that can be so.
    fn lag(&self, staged: Position, now_ms: u64, now: Instant) -> (u64, u64) {
        let bytes = self.end.max(staged).commit.0.saturating_sub(self.at.commit.0);
        let since_commit = self.oldest_micros.map(|micros| now_ms.saturating_sub((micros / 1000).max(0) as u64));
        let since_lost = self
            .lost_since
            .filter(|_| staged > self.at)
            .map(|since| u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX));
        (bytes, since_commit.max(since_lost).unwrap_or(0))
    }
}

/// The running loop; ends when dropped.
pub struct Lag {
    stands: Arc<Mutex<Option<Stands>>>,
    /// What is told when the sink cannot even be opened.
    left: Option<Stands>,
    task: TaskId,
    _telling: AbortOnDropHandle<()>,
}

impl Lag {
    /// Begins to tell once it is known where the sink stands.
    pub fn start(context: &Arc<TaskContext>) -> Lag {
        let stands = Arc::new(Mutex::new(None));
        let found = context.lock.found_checkpoint();
        let left = found.and_then(|found| Stands::left(found, status::now().0, Instant::now()));
        let telling = tokio::spawn(tell(Arc::clone(context), Arc::clone(&stands)));
        Lag { stands, left, task: context.task.clone(), _telling: AbortOnDropHandle::new(telling) }
    }

    /// Says where the sink stands.
    pub fn stands(&self, stands: Stands) {
        *self.stands.lock().unwrap_or_else(PoisonError::into_inner) = Some(stands);
    }

    /// Nothing is read for the sink from now on. One that was never open here stands where its last owner left it.
    pub fn is_lost(&self) {
        let mut stands = self.stands.lock().unwrap_or_else(PoisonError::into_inner);
        *stands = stands.or(self.left);
        if let Some(stands) = stands.as_mut() {
            stands.lost_since.get_or_insert_with(Instant::now);
        }
    }
}

impl Drop for Lag {
    /// Another worker tells it from here on.
    fn drop(&mut self) {
        metrics::sink_lag(&self.task, 0, 0);
    }
}

async fn tell(context: Arc<TaskContext>, stands: Arc<Mutex<Option<Stands>>>) {
    let mut ticks = tokio::time::interval(TELL_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let capture = TaskId::capture(&context.task.flow);
    let (mut staged, mut asked_at): (_, Option<Instant>) = (Position::ZERO, None);
    loop {
        ticks.tick().await;
        if asked_at.is_none_or(|at| at.elapsed() >= END_EVERY) {
            asked_at = Some(Instant::now());
            // What is not known now is known later.
            if let Ok(Some(checkpoint)) = context.shared.coordination.checkpoint(&capture).await {
                staged = checkpoint.position.unwrap_or(Position::ZERO);
            }
        }
        let Some(now) = *stands.lock().unwrap_or_else(PoisonError::into_inner) else { continue };
        let (lag_bytes, lag_ms) = now.lag(staged, status::now().0, Instant::now());
        if lag_ms <= CAUGHT_UP_WITHIN_MS {
            context.status.condition(ConditionType::CaughtUp, true, "WithinLag", "");
        } else {
            let message = format!("the sink is {} s behind the log", lag_ms / 1000);
            context.status.condition(ConditionType::CaughtUp, false, "Behind", &message);
        }
        metrics::sink_lag(&context.task, lag_bytes, lag_ms);
        context.status.progress(|progress| {
            progress.lag_bytes = Some(lag_bytes);
            progress.lag_ms = Some(lag_ms);
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::{Epoch, Lsn};

    #[test]
    fn a_sink_is_behind_by_the_oldest_change_that_it_lacks_and_by_all_that_is_staged() {
        let at = |lsn| Position::before(Lsn(lsn));
        let begun = Instant::now();
        let later = begun + Duration::from_secs(30);
        let stands = Stands { at: at(100), end: at(150), oldest_micros: None, lost_since: None };
        let lag = |stands: Stands, staged| stands.lag(at(staged), 60_000, later);
        assert_eq!(lag(stands, 0), (50, 0), "what was read has no rows");
        assert_eq!(lag(Stands { oldest_micros: Some(57_000_000), ..stands }, 0), (50, 3000));
        assert_eq!(lag(stands, 900), (800, 0), "the rest was not read yet");
        let lost = Stands { lost_since: Some(begun), ..stands };
        assert_eq!(lag(lost, 900), (800, 30_000), "how old it is nobody knows");
        assert_eq!(lag(lost, 100), (50, 0), "there is nothing");
        assert_eq!(lag(Stands { oldest_micros: Some(10_000_000), ..lost }, 900), (800, 50_000));
        let left = Checkpoint {
            epoch: Epoch(1),
            position: None,
            stream: None,
            seq_hint: None,
            source: None,
            at: Timestamp(40_000),
        };
        assert_eq!(Stands::left(&left, 60_000, later), None, "it never stood anywhere");
        let left = Stands::left(&Checkpoint { position: Some(at(100)), ..left }, 60_000, later).unwrap();
        assert_eq!(lag(left, 900), (800, 20_000), "its last owner ended that long ago");
        assert_eq!(lag(left, 100), (0, 0));
    }
}
