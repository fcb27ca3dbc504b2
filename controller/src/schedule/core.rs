//! Which tasks are offered when. Pure: time is an argument, nothing is published here.
//!
//! The rules (protocol.md, "Offers"): a task whose lock disappears is offered at once; an offer that led to no lock is
//! repeated after 2 s. Two replicas that both offer do no harm, because the lock decides: so a replica that does not lead
//! also offers, only later, and a dead leader costs seconds and not its lease.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use wallaby_model::TaskId;
use wallaby_model::offer::OFFER_INTERVAL;

/// Between two offers while no worker is alive: nobody would pull them.
const IDLE_INTERVAL: Duration = Duration::from_secs(10);

/// How long a task is left to the leader by a replica that does not lead.
const FOLLOWER_PATIENCE: Duration = Duration::from_secs(6);

/// Offers in one plan; the rest comes with the next, right after.
const OFFERS_MAX: usize = 256;

/// What is, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Situation {
    /// The tasks that should run, with the mod revision of their flow's specification.
    pub wanted: BTreeMap<TaskId, i64>,
    /// The tasks that have an owner.
    pub owned: BTreeSet<TaskId>,
    /// Whether some worker is alive and takes offers.
    pub has_workers: bool,
    /// Whether this replica leads.
    pub is_leader: bool,
}

/// What to do now, and when to ask again at the latest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The tasks to offer, each with the revision it should carry.
    pub offers: Vec<(TaskId, i64)>,
    /// When the next offer is due, if nothing happens before.
    pub wake_at: Option<Duration>,
}

/// A task without an owner.
#[derive(Clone, Copy, Debug)]
struct Unowned {
    since: Duration,
    offered_at: Option<Duration>,
}

/// The memory between two plans.
#[derive(Debug, Default)]
pub struct Scheduler {
    unowned: BTreeMap<TaskId, Unowned>,
    had_workers: bool,
}

impl Scheduler {
    /// Decides. `now` counts from any fixed moment. Every offer of a plan counts as made.
    pub fn plan(&mut self, situation: &Situation, now: Duration) -> Plan {
        let Situation { wanted, owned, has_workers, is_leader } = situation;
        // A lock that came takes the memory of its offers with it: when it goes, the next offer is due at once.
        self.unowned.retain(|task, _| wanted.contains_key(task) && !owned.contains(task));
        // The first worker finds everything offered, however long ago the last offer was.
        if *has_workers && !self.had_workers {
            self.unowned.values_mut().for_each(|task| task.offered_at = None);
        }
        self.had_workers = *has_workers;
        let interval = if *has_workers { OFFER_INTERVAL } else { IDLE_INTERVAL };
        let patience = if *is_leader { Duration::ZERO } else { FOLLOWER_PATIENCE };
        let mut plan = Plan::default();
        for (task, revision) in wanted.iter().filter(|(task, _)| !owned.contains(*task)) {
            let unowned = self.unowned.entry(task.clone()).or_insert(Unowned { since: now, offered_at: None });
            let due = unowned.offered_at.map_or(unowned.since + patience, |at| at + interval);
            if due > now {
                plan.wake_at = Some(plan.wake_at.map_or(due, |wake| wake.min(due)));
            } else if plan.offers.len() < OFFERS_MAX {
                unowned.offered_at = Some(now);
                plan.offers.push((task.clone(), *revision));
                plan.wake_at = Some(plan.wake_at.map_or(now + interval, |wake| wake.min(now + interval)));
            } else {
                plan.wake_at = Some(now);
            }
        }
        plan
    }

    /// An offer that could not be published is due again after the interval, like one that nobody took; this makes it due at
    /// once, for a queue that was just made again.
    pub fn forget_offers(&mut self) {
        self.unowned.values_mut().for_each(|task| task.offered_at = None);
    }

    /// Since when each task without an owner has none.
    pub fn unowned_since(&self) -> impl Iterator<Item = (&TaskId, Duration)> {
        self.unowned.iter().map(|(task, unowned)| (task, unowned.since))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    fn task(text: &str) -> TaskId {
        text.parse().unwrap()
    }

    fn situation(wanted: &[&str], owned: &[&str]) -> Situation {
        Situation {
            wanted: wanted.iter().map(|text| (task(text), 7)).collect(),
            owned: owned.iter().map(|text| task(text)).collect(),
            has_workers: true,
            is_leader: true,
        }
    }

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn offered(plan: &Plan) -> Vec<String> {
        plan.offers.iter().map(|(task, _)| task.to_string()).collect()
    }

    #[test]
    fn a_task_without_an_owner_is_offered_at_once_and_again_after_two_seconds() {
        let mut scheduler = Scheduler::default();
        let now = situation(&["a.capture"], &[]);
        let plan = scheduler.plan(&now, at(0));
        assert_eq!(offered(&plan), ["a.capture"]);
        assert_eq!(plan.wake_at, Some(at(2000)));
        assert!(scheduler.plan(&now, at(1999)).offers.is_empty());
        assert_eq!(offered(&scheduler.plan(&now, at(2000))), ["a.capture"]);
    }

    #[test]
    fn a_lock_that_goes_is_answered_at_once() {
        let mut scheduler = Scheduler::default();
        scheduler.plan(&situation(&["a.capture"], &[]), at(0));
        assert!(scheduler.plan(&situation(&["a.capture"], &["a.capture"]), at(10)).offers.is_empty());
        assert_eq!(offered(&scheduler.plan(&situation(&["a.capture"], &[]), at(20))), ["a.capture"]);
    }

    #[test]
    fn what_is_not_wanted_is_not_offered() {
        let mut scheduler = Scheduler::default();
        scheduler.plan(&situation(&["a.capture"], &[]), at(0));
        let plan = scheduler.plan(&situation(&[], &[]), at(5000));
        assert_eq!(plan, Plan::default());
        assert_eq!(scheduler.unowned_since().count(), 0);
    }

    #[test]
    fn the_first_worker_finds_everything_offered() {
        let mut scheduler = Scheduler::default();
        let alone = Situation { has_workers: false, ..situation(&["a.capture"], &[]) };
        assert_eq!(offered(&scheduler.plan(&alone, at(0))), ["a.capture"]);
        assert!(scheduler.plan(&alone, at(9999)).offers.is_empty(), "nobody would pull it");
        assert_eq!(offered(&scheduler.plan(&situation(&["a.capture"], &[]), at(9999))), ["a.capture"]);
    }

    #[test]
    fn a_replica_that_does_not_lead_waits_longer() {
        let mut scheduler = Scheduler::default();
        let follower = Situation { is_leader: false, ..situation(&["a.capture"], &[]) };
        assert_eq!(scheduler.plan(&follower, at(0)).wake_at, Some(at(6000)));
        assert!(scheduler.plan(&follower, at(5999)).offers.is_empty());
        assert_eq!(offered(&scheduler.plan(&follower, at(6000))), ["a.capture"], "the leader seems to be dead");
        let mut fresh = Scheduler::default();
        fresh.plan(&follower, at(0));
        let leader = Situation { is_leader: true, ..follower };
        assert_eq!(offered(&fresh.plan(&leader, at(1))), ["a.capture"], "a new leader offers at once");
    }

    #[test]
    fn many_offers_come_in_portions() {
        let mut scheduler = Scheduler::default();
        let names: Vec<String> = (0..600).map(|number| format!("f{number}.capture")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let now = situation(&names, &[]);
        let sizes: Vec<usize> = (0..4).map(|step| scheduler.plan(&now, at(step)).offers.len()).collect();
        assert_eq!(sizes, [256, 256, 88, 0]);
    }

    proptest! {
        /// Whatever happens: an owned or unwanted task is never offered, and no task without an owner waits longer than the
        /// interval, when the scheduler is asked at the times it names.
        #[test]
        fn no_task_is_forgotten(steps in proptest::collection::vec((0u64..1500, 0u8..16, 0u8..16), 1..60)) {
            let names = ["a.capture", "a.apply.x", "b.capture", "b.apply.y"];
            let mut scheduler = Scheduler::default();
            let mut last: BTreeMap<String, u64> = BTreeMap::new();
            let mut now = 0;
            for (wait, wanted, owned) in steps {
                let pick = |bits: u8| -> Vec<&str> {
                    names.iter().enumerate().filter(|(bit, _)| bits & (1 << bit) != 0).map(|(_, name)| *name).collect()
                };
                let state = situation(&pick(wanted), &pick(owned));
                let mut steps = vec![now];
                let until = now + wait;
                while let Some(step) = steps.pop() {
                    let plan = scheduler.plan(&state, at(step));
                    for name in offered(&plan) {
                        prop_assert!(pick(wanted).contains(&name.as_str()) && !pick(owned).contains(&name.as_str()));
                        last.insert(name, step);
                    }
                    let wake = plan.wake_at.map(|wake| wake.as_millis() as u64).filter(|wake| *wake < until);
                    steps.extend(wake.map(|wake| wake.max(step + 1)));
                }
                for name in pick(wanted).into_iter().filter(|name| !pick(owned).contains(name)) {
                    let offered_at = last.get(name).copied();
                    prop_assert!(offered_at.is_some_and(|at| until <= at + 2000), "{name} at {until}: {offered_at:?}");
                }
                for name in pick(owned) {
                    last.remove(name);
                }
                now = until;
            }
        }
    }
}
