//! The deadline of a lease, without I/O: when to send a keepalive, and until when one may act.
//!
//! A keepalive that was answered was renewed by etcd at or after the moment it was *sent*, so the lease lives at least
//! until sent + TTL. We stop a third of the TTL before that: for clocks that differ in rate, and for what is under way.

use std::time::Duration;

use crate::clock::BootTime;

/// Not shorter than this, for machines that are busy.
const ATTEMPT_MIN: Duration = Duration::from_millis(250);

/// A process whose tasks had no turn for this long is stuck, and its lease is not kept alive for it: as long as the worker's watchdog
/// lets a task be silent, and not less than the TTL, within which a process that stood still as a whole meets its deadline. A process
/// that is only busy turns its tasks far sooner.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// Why a process must not act under its lease any more. Final: a new session is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceReason {
    /// No keepalive was answered in time: the lease may have run out.
    Deadline,
    /// etcd said that the lease is gone.
    LeaseGone,
    /// The process gave the lease up itself.
    Revoked,
    /// Keepalives are answered, and the process has given none of its tasks a turn for long: others may do its work.
    Stalled,
}

/// What the keeper does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send a keepalive; take it for lost after this long.
    KeepAlive(Duration),
    /// Nothing for this long.
    Wait(Duration),
    /// The end.
    Fenced(FenceReason),
}

#[derive(Debug)]
pub(crate) struct LeaseCore {
    ttl: Duration,
    deadline: BootTime,
    next_keepalive: BootTime,
    /// When the process was last seen to give its tasks a turn.
    turned: BootTime,
    fenced: Option<FenceReason>,
    /// False only in tests of what refuses a zombie's writes.
    self_fencing: bool,
}

impl LeaseCore {
    /// A lease that was asked for at `sent` and granted.
    pub(crate) fn granted(sent: BootTime, ttl: Duration, self_fencing: bool) -> LeaseCore {
        let (deadline, next_keepalive, turned) = (sent, sent, sent);
        let mut core = LeaseCore { ttl, deadline, next_keepalive, turned, fenced: None, self_fencing };
        core.renewed(sent);
        core
    }

    fn renewed(&mut self, sent: BootTime) {
        // Answers can come in any order; a deadline never moves back.
        self.deadline = self.deadline.max(sent.plus(self.ttl - self.ttl / 3));
        self.next_keepalive = self.next_keepalive.max(sent.plus(self.ttl / 3));
    }

    /// A keepalive sent at `sent` was answered; it is `now`. An answer that comes too late changes nothing.
    pub(crate) fn answered(&mut self, sent: BootTime, now: BootTime) {
        if self.check(now).is_none() {
            self.renewed(sent);
        }
    }

    /// A keepalive got no answer: try again soon.
    pub(crate) fn failed(&mut self, now: BootTime) {
        self.next_keepalive = now.plus(self.ttl / 60);
    }

    /// The process gives its tasks turns.
    pub(crate) fn turned(&mut self, now: BootTime) {
        self.turned = self.turned.max(now);
    }

    /// The lease is gone, or is given up. The first reason stays.
    pub(crate) fn end(&mut self, reason: FenceReason) {
        let is_ignored = !self.self_fencing && reason != FenceReason::Revoked;
        if self.fenced.is_none() && !is_ignored {
            self.fenced = Some(reason);
        }
    }

    /// Whether, and why, nothing may be done any more.
    pub(crate) fn check(&mut self, now: BootTime) -> Option<FenceReason> {
        if now >= self.deadline {
            self.end(FenceReason::Deadline);
        }
        if self.turned.until(now) >= STALLED_AFTER.max(self.ttl) {
            self.end(FenceReason::Stalled);
        }
        self.fenced
    }

    /// What to do at `now`.
    pub(crate) fn step(&mut self, now: BootTime) -> Step {
        if let Some(reason) = self.check(now) {
            return Step::Fenced(reason);
        }
        if now < self.next_keepalive {
            return Step::Wait(now.until(self.next_keepalive));
        }
        let until_deadline = if self.self_fencing { now.until(self.deadline) } else { self.ttl };
        Step::KeepAlive(attempt_timeout(self.ttl).min(until_deadline))
    }

    /// Until when one may act. `None` for ever (only without self-fencing).
    pub(crate) fn valid_until(&self) -> Option<BootTime> {
        match (self.fenced, self.self_fencing) {
            (Some(_), _) => Some(BootTime::default()),
            (None, true) => Some(self.deadline),
            (None, false) => None,
        }
    }
}

/// How long one keepalive may take. Short against the third of a TTL that is left for more attempts: one that a member
/// forwarded to a leader that is gone hangs until the end of its time, and only a new one finds the new leader.
fn attempt_timeout(ttl: Duration) -> Duration {
    (ttl / 12).max(ATTEMPT_MIN).min(ttl / 6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TTL: Duration = Duration::from_secs(9);

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(100 + seconds))
    }

    fn lease() -> LeaseCore {
        LeaseCore::granted(at(0), TTL, true)
    }

    #[test]
    fn the_deadline_counts_from_the_sending() {
        let mut lease = lease();
        assert_eq!(lease.valid_until(), Some(at(6)));
        assert_eq!(lease.step(at(1)), Step::Wait(Duration::from_secs(2)));
        assert!(matches!(lease.step(at(3)), Step::KeepAlive(_)));
        // Sent at 3, answered at 5: valid until 9, not until 11.
        lease.answered(at(3), at(5));
        assert_eq!(lease.valid_until(), Some(at(9)));
        assert_eq!(lease.step(at(8)), Step::KeepAlive(TTL / 12));
        let last = BootTime(at(9).0 - Duration::from_millis(100));
        assert_eq!(lease.step(last), Step::KeepAlive(Duration::from_millis(100)), "no longer than the deadline");
        assert_eq!(lease.step(at(9)), Step::Fenced(FenceReason::Deadline));
    }

    #[test]
    fn an_answer_after_the_deadline_revives_nothing() {
        let mut lease = lease();
        lease.answered(at(3), at(6));
        assert_eq!(lease.check(at(6)), Some(FenceReason::Deadline));
        assert_eq!(lease.valid_until(), Some(BootTime::default()));
    }

    #[test]
    fn a_failure_is_tried_again_before_the_deadline() {
        let mut lease = lease();
        lease.failed(at(4));
        assert_eq!(lease.step(at(4)), Step::Wait(TTL / 60));
        assert!(matches!(lease.step(at(5)), Step::KeepAlive(_)));
    }

    #[test]
    fn a_lost_lease_ends_at_once_and_the_first_reason_stays() {
        let mut lease = lease();
        lease.end(FenceReason::LeaseGone);
        assert_eq!(lease.step(at(1)), Step::Fenced(FenceReason::LeaseGone));
        assert_eq!(lease.step(at(20)), Step::Fenced(FenceReason::LeaseGone));
    }

    #[test]
    fn a_stuck_process_is_not_kept_alive_and_a_busy_one_is() {
        let mut lease = lease();
        let answered = |lease: &mut LeaseCore, seconds: std::ops::Range<u64>| {
            for now in seconds {
                lease.answered(at(now), at(now));
                assert_eq!(lease.check(at(now)), None, "after {now} s");
            }
        };
        answered(&mut lease, 1..30);
        lease.turned(at(29));
        answered(&mut lease, 30..59);
        assert_eq!(lease.step(at(59)), Step::Fenced(FenceReason::Stalled));
        lease.turned(at(61));
        assert_eq!(lease.check(at(61)), Some(FenceReason::Stalled), "what is fenced stays fenced");

        let mut long = LeaseCore::granted(at(0), Duration::from_secs(90), true);
        assert_eq!(long.check(at(59)), None, "it stood still for less than its lease lasts");
    }

    #[test]
    fn without_self_fencing_only_giving_up_ends_it() {
        let mut lease = LeaseCore::granted(at(0), TTL, false);
        lease.end(FenceReason::LeaseGone);
        assert!(matches!(lease.step(at(50)), Step::KeepAlive(_)));
        assert_eq!(lease.valid_until(), None);
        lease.end(FenceReason::Revoked);
        assert_eq!(lease.valid_until(), Some(BootTime::default()));
    }

    #[derive(Clone, Debug)]
    enum Happens {
        Answer { sent_ago_ms: u64 },
        Failure,
        Time { ms: u64 },
    }

    fn happens() -> impl Strategy<Value = Happens> {
        prop_oneof![
            (0_u64..4_000).prop_map(|sent_ago_ms| Happens::Answer { sent_ago_ms }),
            Just(Happens::Failure),
            (0_u64..5_000).prop_map(|ms| Happens::Time { ms }),
        ]
    }

    proptest! {
        /// Whatever happens, who is valid has an answered keepalive that was sent less than two thirds of a TTL ago, and
        /// who was fenced stays fenced.
        #[test]
        fn valid_means_renewed_lately(history in proptest::collection::vec(happens(), 0..60)) {
            let mut lease = lease();
            let mut now = at(0);
            let mut last_sent = at(0);
            let mut was_fenced = false;
            for event in history {
                match event {
                    Happens::Answer { sent_ago_ms } => {
                        let sent = BootTime(now.0.saturating_sub(Duration::from_millis(sent_ago_ms)).max(at(0).0));
                        lease.answered(sent, now);
                        last_sent = last_sent.max(sent);
                    }
                    Happens::Failure => lease.failed(now),
                    Happens::Time { ms } => {
                        now = now.plus(Duration::from_millis(ms));
                        lease.turned(now);
                    }
                }
                let is_fenced = lease.check(now).is_some();
                prop_assert!(is_fenced || last_sent.until(now) < TTL * 2 / 3);
                prop_assert!(is_fenced || !was_fenced);
                prop_assert_eq!(is_fenced, lease.valid_until().is_some_and(|until| now >= until));
                was_fenced = is_fenced;
            }
        }
    }
}
