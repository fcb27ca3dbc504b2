//! `safety.onExceeded: pauseSnapshot`: whether reading has to wait because of the WAL that the flow's slot holds back.

use std::collections::{BTreeMap, BTreeSet};

use wallaby_coordination::{Hold, Key};
use wallaby_model::condition::{TaskPhase, TaskStatus};
use wallaby_model::flow::OnExceeded;
use wallaby_model::run::RunReason;
use wallaby_model::{Position, Reader, RunId, SinkId, TaskId};

use crate::runs::FlowRuns;
use crate::task::TaskContext;

/// Whether a run has to wait, by what the flow's capture said last. Once it does (`waits`), until there is some distance to the bound: each
/// export costs the source a look through all of its running transactions.
pub async fn holds_too_much(context: &TaskContext, run: RunId, waits: bool) -> bool {
    let flow = &context.task.flow;
    let bound = context.flows.borrow().get(flow).and_then(|known| {
        let safety = &known.record.document.spec.source.postgres.safety;
        (safety.on_exceeded == OnExceeded::PauseSnapshot).then_some(safety.retained_wal_max.0)
    });
    let Some(bound) = bound else { return false };
    let bound = if waits { bound / 4 * 3 } else { bound };
    match context.shared.coordination.get(&Key::TaskStatus(TaskId::capture(flow))).await {
        Ok(said) => {
            let Some(status) = said.and_then(|entry| entry.decode::<TaskStatus>().ok()) else { return false };
            let is_exceeded = status.progress.retained_wal_bytes.is_some_and(|retained| retained > bound);
            is_exceeded && !(status.phase == TaskPhase::Backpressured && holds_the_log_back(context, run).await)
        }
        // No reason to change anything.
        Err(_) => waits,
    }
}

/// Whether a log that is full gets room by the end of this run alone: then the slot gets it from nobody else.
async fn holds_the_log_back(context: &TaskContext, run: RunId) -> bool {
    let flow = &context.task.flow;
    let Ok(holds) = context.shared.coordination.holds(flow).await else { return false };
    let sinks: Vec<SinkId> = match context.flows.borrow().get(flow) {
        Some(known) => known.record.document.spec.sinks.iter().map(|sink| sink.name.clone()).collect(),
        None => Vec::new(),
    };
    let waiting = context.runs.of(flow, |runs| waiting_for(runs, run, &sinks));
    is_held_by(&waiting, &holds)
}

/// The holds that go, or move, with the end of a run: its own, those of the sinks that it brings to life, and those of the runs that wait
/// for it.
fn waiting_for(runs: &FlowRuns, run: RunId, sinks: &[SinkId]) -> BTreeSet<Reader> {
    let mut waiting = BTreeSet::from([Reader::Run(run)]);
    let Some((view, spec)) = runs.runs.get(&run).and_then(|view| Some((view, view.spec.as_ref()?))) else {
        return waiting;
    };
    let awaits: Vec<&SinkId> = sinks.iter().filter(|sink| runs.awaits(run, view, sink)).collect();
    if matches!(spec.reason, RunReason::FirstLoad | RunReason::SinkAnew) {
        waiting.extend(awaits.iter().map(|sink| Reader::Sink((*sink).clone())));
    }
    for (later, view) in runs.runs.range(run..).skip(1) {
        let waits = view.spec.as_ref().is_some_and(|later| later.waits_for(spec));
        if waits && awaits.iter().any(|sink| runs.awaits(*later, view, sink)) {
            waiting.insert(Reader::Run(*later));
        }
    }
    waiting
}

/// Whether none of the other holds is below the lowest of these. One without a position needs the log from its beginning.
fn is_held_by(readers: &BTreeSet<Reader>, holds: &BTreeMap<Reader, Hold>) -> bool {
    let lowest = |is_ours: bool| -> Option<Option<Position>> {
        holds.iter().filter(|(reader, _)| readers.contains(reader) == is_ours).map(|(_, hold)| hold.position).min()
    };
    match (lowest(true), lowest(false)) {
        (Some(ours), Some(others)) => ours <= others,
        (ours, _) => ours.is_some(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_model::Lsn;

    use super::*;
    use crate::apply::tables::tests::{read, sink};
    use crate::runs::RunView;

    fn holds<const N: usize>(holds: [(Reader, Option<u64>); N]) -> BTreeMap<Reader, Hold> {
        let hold = |at: Option<u64>| Hold { position: at.map(|at| Position::before(Lsn(at))) };
        holds.into_iter().map(|(reader, at)| (reader, hold(at))).collect()
    }

    fn run(number: u32) -> Reader {
        Reader::Run(RunId(number))
    }

    fn other() -> SinkId {
        SinkId::new("other").unwrap()
    }

    fn is_held(reasons: &[(u32, RunReason, &str)], held: &BTreeMap<Reader, Hold>) -> bool {
        let view = |reason, table: &str| {
            let view = read(reason, table);
            let spec = view.spec.clone().map(|spec| wallaby_model::run::RunSpec { sinks: Vec::new(), ..spec });
            RunView { spec, ..view }
        };
        let runs = reasons.iter().map(|(number, reason, table)| (RunId(*number), view(*reason, table))).collect();
        let runs = FlowRuns { runs, ..FlowRuns::default() };
        is_held_by(&waiting_for(&runs, RunId(5), &[sink(), other()]), held)
    }

    #[test]
    fn a_log_is_held_by_a_run_whose_hold_is_the_lowest() {
        let asked = [(5, RunReason::Asked, "a")];
        assert!(is_held(&asked, &holds([(run(5), Some(3)), (Reader::Sink(sink()), Some(4))])));
        assert!(!is_held(&asked, &holds([(run(5), Some(3)), (Reader::Sink(sink()), Some(2))])));
        assert!(!is_held(&asked, &holds([(run(5), Some(3)), (Reader::Sink(sink()), None)])), "from its beginning on");
        assert!(!is_held(&asked, &holds([(Reader::Sink(sink()), Some(4))])), "it holds nothing");
    }

    #[test]
    fn a_log_is_held_by_a_run_for_the_sinks_that_it_brings_to_life() {
        let first = [(5, RunReason::FirstLoad, "a")];
        // They have no position before it, and nobody else gives them one.
        let before = holds([(run(5), Some(9)), (Reader::Sink(sink()), None), (Reader::Sink(other()), Some(2))]);
        assert!(is_held(&first, &before));
        assert!(is_held(&first, &holds([(Reader::Sink(sink()), None)])), "also before its first export");
        assert!(!is_held(&first, &holds([(run(5), Some(9)), (run(4), Some(2))])), "another run does");
    }

    #[test]
    fn a_log_is_held_by_a_run_for_those_that_wait_for_it() {
        let held = holds([(run(5), Some(9)), (run(6), Some(3)), (Reader::Sink(sink()), Some(20))]);
        assert!(is_held(&[(5, RunReason::Asked, "a"), (6, RunReason::Asked, "a")], &held));
        assert!(
            !is_held(&[(5, RunReason::Asked, "a"), (6, RunReason::TablesAdded, "b")], &held),
            "it waits for nobody"
        );
    }
}
