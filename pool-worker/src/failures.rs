//! Tasks that failed here in a way that their next owner may well meet again, and how long each is left alone. The scheduler answers
//! a lock that goes at once and counts nothing: without a rest here, a row that no code can take would be taken tens of times a second.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use wallaby_coordination::Revision;
use wallaby_model::TaskId;
use wallaby_model::offer::Offer;

use crate::backoff::{Backoff, LAST};

/// A task that did not fail for this long after its rest is well, here or elsewhere: what was is forgotten.
const WELL_AFTER: Duration = LAST;

#[derive(Debug)]
struct Row {
    backoff: Backoff,
    until: Instant,
    /// The flow's specification then: another one may be what mends the task.
    revision: Revision,
}

/// The memory of one worker.
#[derive(Debug, Default)]
pub struct Failures(Mutex<BTreeMap<TaskId, Row>>);

impl Failures {
    /// Counts one more failure of a task under a specification of its flow; how long it rests.
    pub fn failed(&self, task: &TaskId, revision: Revision, now: Instant) -> Duration {
        // Plain values, whole after any panic.
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.retain(|_, row| now < row.until + WELL_AFTER);
        let row = rows.entry(task.clone()).or_insert(Row { backoff: Backoff::default(), until: now, revision });
        let delay = row.backoff.next_delay();
        (row.until, row.revision) = (now + delay, revision);
        delay
    }

    /// Whether an offered task rests: another worker may take it. Not once somebody changed its flow, or resumed it.
    pub fn rests(&self, offer: &Offer, now: Instant) -> bool {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.get(&offer.task).is_some_and(|row| now < row.until && offer.spec_revision <= row.revision.0)
    }

    /// The task ended well, or it is another's.
    pub fn forget(&self, task: &TaskId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(task);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn a_task_that_fails_again_and_again_rests_longer_until_it_is_well() {
        let failures = Failures::default();
        let offer = |task: &str, spec_revision| Offer { task: task.parse().unwrap(), spec_revision };
        let (bad, seen) = (offer("shop.apply.a", 7), Revision(7));
        let mut now = Instant::now();
        for n in 0..10 {
            let whole = Duration::from_secs(1 << n).min(LAST);
            let delay = failures.failed(&bad.task, seen, now);
            assert!(delay >= whole / 2 && delay <= whole, "{n}: {delay:?}");
            assert!(failures.rests(&bad, now) && !failures.rests(&bad, now + delay));
            assert!(!failures.rests(&offer("shop.apply.b", 7), now), "another task");
            assert!(!failures.rests(&offer("shop.apply.a", 8), now), "the flow was changed since");
            // It works for a while each time, and fails.
            now += delay + WELL_AFTER / 2;
        }
        now += WELL_AFTER;
        let delay = failures.failed(&bad.task, seen, now);
        assert!(delay <= Duration::from_secs(1), "it was well for a minute: {delay:?}");
        failures.failed(&bad.task, seen, now);
        failures.forget(&bad.task);
        assert!(!failures.rests(&bad, now));
        assert!(failures.failed(&bad.task, seen, now) <= Duration::from_secs(1));
    }
}
