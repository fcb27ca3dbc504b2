//! When an acknowledged record may be confirmed to Postgres. Pure; time is an argument.
//!
//! An acknowledgement of JetStream is not an fsync. A record counts as durable when the servers sync every write, or when
//! its acknowledgement is older than twice their sync interval: the interval that was running and a whole one after it.
//! While a resync is open nothing is confirmed: the log may have lost what it acknowledged.
//!
//! Servers that are started with another interval promise nothing for what they acknowledged before. What waits keeps the longest age
//! that was known for it; only what was acknowledged before anything was known is as old as what is learned first.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use wallaby_model::Lsn;

use crate::sync::SyncPolicy;

/// Added to twice the interval: timers of the servers fire late.
pub const MARGIN: Duration = Duration::from_secs(1);
/// Acknowledgements this close together share an age, that of the youngest: bounds what is remembered.
const GRAIN: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug)]
struct Acknowledged {
    first_at: Instant,
    last_at: Instant,
    lsn: Lsn,
    /// How old it must be at least, by what was known since it was acknowledged.
    age_least: Duration,
}

/// Acknowledged and not yet durable.
#[derive(Debug)]
pub struct Durability {
    policy: SyncPolicy,
    /// The age by the last policy that was known; none while nothing was. A server that is silent may be one that is started anew.
    age_known: Duration,
    /// What was acknowledged earlier never has the smaller `age_least`.
    waiting: VecDeque<Acknowledged>,
    durable: Lsn,
    is_held: bool,
}

impl Durability {
    /// Nothing acknowledged yet.
    pub fn new(policy: SyncPolicy) -> Durability {
        let mut durability = Durability {
            policy,
            age_known: Duration::ZERO,
            waiting: VecDeque::new(),
            durable: Lsn::ZERO,
            is_held: false,
        };
        durability.set_policy(policy);
        durability
    }

    /// How old an acknowledgement of now must be.
    fn age(&self) -> Duration {
        self.policy.interval().map_or(Duration::ZERO, |interval| interval * 2 + MARGIN)
    }

    /// When this may become durable.
    fn due(&self, what: &Acknowledged) -> Instant {
        what.last_at + self.age().max(what.age_least)
    }

    /// Whether what comes next must grow old: then the log may lose it meanwhile.
    pub fn takes_time(&self) -> bool {
        !self.waiting.front().map_or(Duration::ZERO, |first| first.age_least).max(self.age()).is_zero()
    }

    /// Another policy. A longer one counts for what waits as well; a shorter one only for what is acknowledged from now on.
    pub fn set_policy(&mut self, policy: SyncPolicy) {
        self.policy = policy;
        if policy != SyncPolicy::Unknown {
            self.age_known = self.age();
            for waits in &mut self.waiting {
                waits.age_least = waits.age_least.max(self.age_known);
            }
        }
    }

    /// Holds everything while a resync is open.
    pub fn hold(&mut self) {
        self.is_held = true;
    }

    /// The resync is over and found everything acknowledged.
    pub fn release(&mut self) {
        self.is_held = false;
    }

    /// Everything with a commit LSN below `lsn` is acknowledged, as of `now`.
    pub fn acknowledged(&mut self, lsn: Lsn, now: Instant) {
        match self.waiting.back_mut() {
            Some(last) if lsn <= last.lsn => {}
            // The bucket is younger than a grain: joining it makes its age that of the newcomer.
            Some(last) if now.duration_since(last.first_at) < GRAIN => {
                last.lsn = lsn;
                last.last_at = now;
            }
            _ if lsn > self.durable => {
                let age_least = self.age_known;
                self.waiting.push_back(Acknowledged { first_at: now, last_at: now, lsn, age_least });
            }
            _ => {}
        }
    }

    /// When something may become durable next.
    pub fn due_at(&self) -> Option<Instant> {
        if self.is_held {
            return None;
        }
        self.waiting.front().map(|first| self.due(first))
    }

    /// What is durable now; everything with a commit LSN below it may be confirmed.
    pub fn poll(&mut self, now: Instant) -> Lsn {
        while !self.is_held
            && let Some(first) = self.waiting.front()
            && self.due(first) <= now
        {
            self.durable = self.durable.max(first.lsn);
            self.waiting.pop_front();
        }
        self.durable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn with_sync_always_an_acknowledgement_is_enough() {
        let now = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Always);
        durability.acknowledged(Lsn(10), now);
        assert_eq!(durability.poll(now), Lsn(10));
    }

    #[test]
    fn an_acknowledgement_must_be_older_than_twice_the_interval() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Interval(seconds(10)));
        durability.acknowledged(Lsn(10), start);
        durability.acknowledged(Lsn(20), start + seconds(5));
        assert_eq!(durability.poll(start + seconds(20)), Lsn(0));
        assert_eq!(durability.poll(start + seconds(21)), Lsn(10));
        assert_eq!(durability.due_at(), Some(start + seconds(26)));
        assert_eq!(durability.poll(start + seconds(26)), Lsn(20));
    }

    #[test]
    fn unknown_servers_count_as_two_minutes() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Unknown);
        durability.acknowledged(Lsn(10), start);
        assert_eq!(durability.poll(start + seconds(240)), Lsn(0));
        assert_eq!(durability.poll(start + seconds(241)), Lsn(10));
    }

    #[test]
    fn h09_what_was_acknowledged_under_a_longer_interval_waits_for_that() {
        let start = Instant::now();
        for between in [None, Some(SyncPolicy::Unknown)] {
            for shorter in [SyncPolicy::Always, SyncPolicy::Interval(seconds(1))] {
                let mut durability = Durability::new(SyncPolicy::Interval(seconds(10)));
                durability.acknowledged(Lsn(10), start);
                // One that is started anew does not answer for a while, and others go on.
                between.into_iter().for_each(|silent| durability.set_policy(silent));
                durability.acknowledged(Lsn(20), start + seconds(5));
                durability.set_policy(shorter);
                durability.acknowledged(Lsn(30), start + seconds(6));
                assert!(durability.takes_time(), "the log may lose what is not synced");
                let at = |after| start + seconds(after);
                assert_eq!(durability.poll(at(20)), Lsn(0), "{between:?}, {shorter:?}");
                assert_eq!(durability.due_at(), Some(at(21)));
                assert_eq!(durability.poll(at(21)), Lsn(10));
                assert_eq!(durability.poll(at(25)), Lsn(10));
                assert_eq!(durability.poll(at(26)), Lsn(30), "what came later has no longer to wait");
                assert_eq!(durability.takes_time(), shorter != SyncPolicy::Always);
            }
        }
    }

    #[test]
    fn what_was_acknowledged_before_anything_was_known_waits_for_what_is_learned_first() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Unknown);
        durability.acknowledged(Lsn(10), start);
        durability.set_policy(SyncPolicy::Always);
        assert!(!durability.takes_time(), "it was always so");
        assert_eq!(durability.poll(start), Lsn(10));
        let mut durability = Durability::new(SyncPolicy::Unknown);
        durability.acknowledged(Lsn(10), start);
        durability.set_policy(SyncPolicy::Interval(seconds(10)));
        durability.set_policy(SyncPolicy::Always);
        assert_eq!(durability.poll(start + seconds(20)), Lsn(0));
        assert_eq!(durability.poll(start + seconds(21)), Lsn(10));
    }

    #[test]
    fn a_longer_interval_counts_for_what_waits() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Interval(seconds(1)));
        durability.acknowledged(Lsn(10), start);
        durability.set_policy(SyncPolicy::Interval(seconds(10)));
        assert_eq!(durability.poll(start + seconds(20)), Lsn(0));
        assert_eq!(durability.poll(start + seconds(21)), Lsn(10));
    }

    #[test]
    fn h09_nothing_is_confirmed_while_a_resync_is_open() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Interval(seconds(1)));
        durability.acknowledged(Lsn(10), start);
        durability.hold();
        assert_eq!(durability.poll(start + seconds(100)), Lsn(0));
        assert_eq!(durability.due_at(), None);
        durability.release();
        assert_eq!(durability.poll(start + seconds(100)), Lsn(10));
    }

    #[test]
    fn a_steady_stream_of_acknowledgements_neither_starves_nor_grows() {
        let start = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Interval(seconds(1)));
        let mut most = 0;
        for millis in 0..60_000 {
            let now = start + Duration::from_millis(millis);
            durability.acknowledged(Lsn(millis + 1), now);
            let durable = durability.poll(now);
            most = most.max(durability.waiting.len());
            // Never early: what is durable was acknowledged at least the age ago.
            assert!(durable.0 <= millis.saturating_sub(3000) + 1, "{durable} at {millis}");
            if millis > 4000 {
                assert!(durable.0 + 3300 > millis, "{durable} at {millis}");
            }
        }
        assert!(most < 40, "{most}");
    }

    #[test]
    fn repeated_and_older_positions_change_nothing() {
        let now = Instant::now();
        let mut durability = Durability::new(SyncPolicy::Always);
        durability.acknowledged(Lsn(10), now);
        assert_eq!(durability.poll(now), Lsn(10));
        durability.acknowledged(Lsn(10), now);
        durability.acknowledged(Lsn(5), now);
        assert_eq!(durability.due_at(), None);
        assert_eq!(durability.poll(now), Lsn(10));
    }
}
