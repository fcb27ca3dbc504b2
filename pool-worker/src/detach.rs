//! Sinks that need more of the log than it can hold: cut off, so that the log, the slot and the other sinks go on (hazard 16).
//!
//! The capture task asks, after a purge that went as far as the holds allow: if the log is still short of room then, it is the
//! lowest hold that keeps it. A dead sink has no owner that could do this by itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use wallaby_coordination::{Coordination, DetachOutcome, Hold, TaskLock};
use wallaby_model::flow::{OnOverrun, SinkSpec};
use wallaby_model::{Position, Reader, RunId, SinkId};

use crate::flows::Flows;
use crate::metrics;
use crate::runs::RunBoard;
use crate::status::StatusBoard;
use crate::task::TaskContext;

/// A sink as the judgement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkSeen {
    /// Its name.
    pub sink: SinkId,
    /// What happens when it falls behind.
    pub on_overrun: OnOverrun,
    /// The open runs that wait for it.
    pub awaited_by: Vec<RunId>,
}

/// The sinks that are to be cut off, given that the lowest hold keeps the log short of room: those that hold it themselves, and
/// those that a run waits for which holds it, unless they keep up with the log: then it is the run that takes long. `staged` is the
/// log's end.
pub fn overrun<'a>(holds: &BTreeMap<Reader, Hold>, sinks: &'a [SinkSeen], staged: Position) -> Vec<&'a SinkId> {
    let Some(lowest) = holds.values().map(|hold| hold.position).min() else { return Vec::new() };
    let is_lowest = |reader: &Reader| holds.get(reader).is_some_and(|hold| hold.position == lowest);
    let begin = lowest.unwrap_or(Position::ZERO).commit.0;
    let middle = begin + staged.commit.0.saturating_sub(begin) / 2;
    let is_behind = |reader: &Reader| {
        holds.get(reader).is_some_and(|hold| hold.position.unwrap_or(Position::ZERO).commit.0 <= middle)
    };
    let is_to_blame = |seen: &&SinkSeen| {
        let reader = Reader::Sink(seen.sink.clone());
        let is_awaited = seen.awaited_by.iter().any(|run| is_lowest(&Reader::Run(*run)));
        seen.on_overrun == OnOverrun::Detach && (is_lowest(&reader) || (is_awaited && is_behind(&reader)))
    };
    sinks.iter().filter(is_to_blame).map(|seen| &seen.sink).collect()
}

/// How long a sink must be the one that keeps the log short of room. Holds follow their sinks every few seconds only: one that keeps up
/// stands further than its hold says.
const BLAMED_FOR: Duration = Duration::from_secs(8);

/// Since when each sink is the one that keeps the log short of room, without a break.
#[derive(Debug, Default)]
struct Blame(BTreeMap<SinkId, Instant>);

impl Blame {
    /// Takes a verdict; the sinks that were blamed long enough.
    fn ripe(&mut self, blamed: &[&SinkId], now: Instant) -> Vec<SinkId> {
        self.0.retain(|sink, _| blamed.contains(&sink));
        for sink in blamed {
            self.0.entry((*sink).clone()).or_insert(now);
        }
        let is_ripe = |since: Instant| now.saturating_duration_since(since) >= BLAMED_FOR;
        self.0.iter().filter(|(_, since)| is_ripe(**since)).map(|(sink, _)| sink.clone()).collect()
    }
}

/// What the decision is made from, for a loop beside the capture.
pub struct Overrun {
    blame: Blame,
    coordination: Coordination,
    lock: TaskLock,
    flows: watch::Receiver<Flows>,
    runs: RunBoard,
    status: StatusBoard,
}

impl Overrun {
    /// Of the flow that a capture task is of.
    pub fn of(context: &TaskContext) -> Overrun {
        Overrun {
            blame: Blame::default(),
            coordination: context.shared.coordination.clone(),
            lock: context.lock.clone(),
            flows: context.flows.clone(),
            runs: context.runs.clone(),
            status: context.status.clone(),
        }
    }

    /// There is room: nobody is to blame.
    pub fn acquit(&mut self) {
        self.blame = Blame::default();
    }

    /// Cuts off the sinks that keep a log short of room that was purged as far as the holds allow. Says whether one was.
    ///
    /// # Errors
    /// When etcd cannot be reached, or the capture's lock is lost.
    pub async fn detach(&mut self) -> Result<bool, wallaby_coordination::Error> {
        let flow = &self.lock.task().flow;
        let seen = self.sinks();
        let holds = self.coordination.holds(flow).await?;
        let staged = self.status.snapshot().progress.staged.unwrap_or(Position::ZERO);
        let mut has_detached = false;
        for sink in self.blame.ripe(&overrun(&holds, &seen, staged), Instant::now()) {
            has_detached |= detach(&self.lock, &sink, &holds, lacks_room).await?;
        }
        Ok(has_detached)
    }

    fn sinks(&self) -> Vec<SinkSeen> {
        let flow = &self.lock.task().flow;
        let specs = match self.flows.borrow().get(flow) {
            Some(known) => known.record.document.spec.sinks.clone(),
            None => return Vec::new(),
        };
        self.runs.of(flow, |runs| {
            let awaits = |sink: &SinkId| {
                let open = runs.runs.iter().filter(|(run, view)| runs.awaits(**run, view, sink));
                open.map(|(run, _)| *run).collect()
            };
            let seen = |spec: &SinkSpec| {
                let (sink, on_overrun) = (spec.name.clone(), spec.on_overrun);
                SinkSeen { awaited_by: awaits(&sink), sink, on_overrun }
            };
            specs.iter().map(seen).collect()
        })
    }
}

/// What the log has no room for, for people.
fn lacks_room(hold: &Hold) -> String {
    match hold.position {
        Some(position) => format!("it stands at {position}, and the log has no room for what it still needs"),
        None => "it was not loaded before the log had no room left for the changes since".to_owned(),
    }
}

/// Cuts a sink off, unless it has moved since the holds were read. Says whether anything is to be looked at again.
///
/// # Errors
/// When etcd cannot be reached, or the lock is lost.
pub async fn detach(
    lock: &TaskLock,
    sink: &SinkId,
    holds: &BTreeMap<Reader, Hold>,
    reason: impl Fn(&Hold) -> String,
) -> Result<bool, wallaby_coordination::Error> {
    let Some(hold) = holds.get(&Reader::Sink(sink.clone())) else { return Ok(false) };
    let reason = reason(hold);
    match lock.detach_sink(sink, *hold, &reason).await {
        Ok(DetachOutcome::Detached) => {
            tracing::warn!(flow = %lock.task().flow, %sink, reason, "the sink was cut off from the log; it is loaded anew by a run");
            metrics::sink_detached(&lock.task().flow, sink);
            Ok(true)
        }
        // It moved just now: then the log may be purged further.
        Ok(DetachOutcome::Moved(_)) => Ok(true),
        Err(wallaby_coordination::Error::HoldGone { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::Lsn;

    fn sink(name: &str) -> SinkId {
        SinkId::new(name).unwrap()
    }

    fn seen(name: &str, on_overrun: OnOverrun, awaited_by: &[u32]) -> SinkSeen {
        SinkSeen { sink: sink(name), on_overrun, awaited_by: awaited_by.iter().map(|run| RunId(*run)).collect() }
    }

    fn at(lsn: u64) -> Hold {
        Hold { position: Some(Position::before(Lsn(lsn))) }
    }

    fn end() -> Position {
        Position::before(Lsn(100))
    }

    #[test]
    fn h16_only_who_holds_the_log_is_cut_off() {
        let holds = BTreeMap::from([(Reader::Sink(sink("slow")), at(5)), (Reader::Sink(sink("quick")), at(90))]);
        let sinks = [seen("slow", OnOverrun::Detach, &[]), seen("quick", OnOverrun::Detach, &[])];
        assert_eq!(overrun(&holds, &sinks, end()), [&sink("slow")]);
        let patient = [seen("slow", OnOverrun::Backpressure, &[]), seen("quick", OnOverrun::Detach, &[])];
        assert!(overrun(&holds, &patient, end()).is_empty(), "the flow waits for a sink that asked for it");
        assert!(overrun(&BTreeMap::new(), &sinks, end()).is_empty());
    }

    #[test]
    fn h16_a_sink_whose_hold_follows_in_time_stays() {
        let (start, slow, quick) = (Instant::now(), sink("slow"), sink("quick"));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut blame = Blame::default();
        assert!(blame.ripe(&[&slow, &quick], at(0)).is_empty());
        assert!(blame.ripe(&[&slow], at(2)).is_empty());
        assert!(blame.ripe(&[&slow, &quick], at(4)).is_empty());
        assert_eq!(blame.ripe(&[&slow, &quick], at(8)), std::slice::from_ref(&slow));
        assert_eq!(blame.ripe(&[&slow, &quick], at(12)), [quick, slow]);
    }

    #[test]
    fn h16_a_run_that_holds_the_log_waits_no_longer_for_a_dead_sink() {
        let holds = BTreeMap::from([
            (Reader::Run(RunId(3)), at(5)),
            (Reader::Sink(sink("dead")), at(20)),
            (Reader::Sink(sink("quick")), at(90)),
        ]);
        let sinks = [seen("dead", OnOverrun::Detach, &[3]), seen("quick", OnOverrun::Detach, &[3])];
        assert_eq!(overrun(&holds, &sinks, end()), [&sink("dead")]);
    }

    #[test]
    fn a_sink_that_needs_the_log_from_its_beginning_stands_lowest() {
        let holds =
            BTreeMap::from([(Reader::Sink(sink("new")), Hold { position: None }), (Reader::Sink(sink("b")), at(9))]);
        let sinks = [seen("new", OnOverrun::Detach, &[]), seen("b", OnOverrun::Detach, &[])];
        assert_eq!(overrun(&holds, &sinks, end()), [&sink("new")]);
    }
}
