//! When an acknowledged record may be confirmed to Postgres. Pure; time is an argument.
//!
//! An acknowledgement of JetStream is not an fsync. A record counts as durable when the servers sync every write, or when
//! its acknowledgement is older than twice their sync interval: the interval that was running and a whole one after it.
//! While a resync is open nothing is confirmed: the log may have lost what it acknowledged.

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
}

/// Acknowledged and not yet durable.
#[derive(Debug)]
pub struct Durability {
    policy: SyncPolicy,
    waiting: VecDeque<Acknowledged>,
    durable: Lsn,
    is_held: bool,
}

impl Durability {
    /// Nothing acknowledged yet.
    pub fn new(policy: SyncPolicy) -> Durability {
        Durability { policy, waiting: VecDeque::new(), durable: Lsn::ZERO, is_held: false }
    }

    /// How long an acknowledgement must be old.
    pub fn age(&self) -> Duration {
        self.policy.interval().map_or(Duration::ZERO, |interval| interval * 2 + MARGIN)
    }

    /// Another policy, for what is acknowledged and for what will be.
    pub fn set_policy(&mut self, policy: SyncPolicy) {
        self.policy = policy;
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
            _ if lsn > self.durable => self.waiting.push_back(Acknowledged { first_at: now, last_at: now, lsn }),
            _ => {}
        }
    }

    /// When something may become durable next.
    pub fn due_at(&self) -> Option<Instant> {
        if self.is_held {
            return None;
        }
        self.waiting.front().map(|first| first.last_at + self.age())
    }

    /// What is durable now; everything with a commit LSN below it may be confirmed.
    pub fn poll(&mut self, now: Instant) -> Lsn {
        let age = self.age();
        while !self.is_held
            && let Some(first) = self.waiting.front()
            && first.last_at + age <= now
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
