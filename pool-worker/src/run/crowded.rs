//! Sinks that keep the side store full. Chunks stay there until every sink of their run has them, so one that takes nothing keeps the
//! others from the rest of their tables: it is cut off alone, as one that the log has no room for is (hazard 16).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wallaby_model::flow::{OnOverrun, SinkSpec};
use wallaby_model::run::{RunSpec, TableStage};
use wallaby_model::{SinkId, TaskKind};

use crate::apply::tables::{OpenRun, open_runs};
use crate::runs::FlowRuns;

/// How far a sink is in the runs that wait for it: grows with each chunk that is loaded, and each table that is prepared.
type Progress = (usize, usize);

/// A sink for which chunks are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// Its name.
    pub sink: SinkId,
    /// How far it is.
    pub progress: Progress,
    /// It lacks what load tasks bring it; only its apply task can go on otherwise.
    pub awaits_loads: bool,
    /// Its tasks are offered to nobody, because a person wants it so.
    pub is_paused: bool,
}

impl Keeper {
    /// Whether the standstill is its own, given the tasks that have owners: that nobody works for it, because no controller offers its
    /// tasks or no worker has room for them, is not. One that is paused stands still by itself.
    pub fn is_to_blame<'a>(&self, mut owned: impl Iterator<Item = &'a TaskKind>) -> bool {
        self.is_paused
            || owned.any(|kind| match kind {
                TaskKind::Load(sink, ..) => self.awaits_loads && *sink == self.sink,
                TaskKind::Apply(sink) => !self.awaits_loads && *sink == self.sink,
                _ => false,
            })
    }
}

/// What the owner of a run sees while its chunks find the side store full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// The chunks that are read in its run.
    pub read: usize,
    /// Whether chunks are left to be read, and a sink has all that are read: it waits for the others.
    pub is_waited_for: bool,
    /// The sinks that lack a chunk of any run, and may be cut off.
    pub keepers: Vec<Keeper>,
}

/// The sinks of a flow that lack a chunk which is read, and which they could load now, in any run that waits for them, and may be cut off.
/// Not one with a table that catches up: it works, and whether it is too late for the log is judged there.
pub fn keepers(runs: &FlowRuns, sinks: &[SinkSpec]) -> Vec<Keeper> {
    let may_go = sinks.iter().filter(|spec| spec.on_overrun == OnOverrun::Detach);
    let of = |spec: &SinkSpec| {
        let sink = &spec.name;
        let (mut lacks, mut awaits_loads, mut progress) = (0, false, Progress::default());
        let mut earlier: Vec<&RunSpec> = Vec::new();
        for OpenRun { view, spec: run, .. } in open_runs(runs, sink) {
            let state = view.sinks.get(sink);
            if state.is_some_and(|state| state.tables.values().any(|stage| *stage == TableStage::CatchingUp)) {
                return None;
            }
            if !earlier.iter().any(|earlier| run.waits_for(earlier)) {
                lacks += view.lacks(sink);
                awaits_loads |= view.awaits_loads(sink);
            }
            earlier.push(run);
            progress.0 += view.loaded.get(sink).map_or(0, |loaded| loaded.len());
            progress.1 += state.map_or(0, |state| state.tables.len());
        }
        (lacks > 0).then(|| Keeper { sink: sink.clone(), progress, awaits_loads, is_paused: spec.paused })
    };
    may_go.filter_map(of).collect()
}

/// Looks that are further apart than this say nothing of the time between them.
const LOOKS_APART_MAX: Duration = Duration::from_secs(30);

/// Since when sinks take nothing although others wait for it.
#[derive(Debug, Default)]
pub struct Crowding {
    read: usize,
    looked: Option<Instant>,
    since: BTreeMap<SinkId, (Progress, Instant)>,
}

impl Crowding {
    /// There is room.
    pub fn is_over(&mut self) {
        self.since.clear();
    }

    /// Takes what is seen; the sinks that took nothing for as long as they may.
    pub fn ripe(&mut self, crowd: &Crowd, now: Instant, patience: Duration) -> Vec<SinkId> {
        let before = self.looked.replace(now);
        let is_gap = before.is_some_and(|before| now.saturating_duration_since(before) > LOOKS_APART_MAX);
        if !crowd.is_waited_for || crowd.read != self.read || is_gap {
            self.read = crowd.read;
            self.is_over();
        }
        if !crowd.is_waited_for {
            return Vec::new();
        }
        self.since.retain(|sink, _| crowd.keepers.iter().any(|keeper| keeper.sink == *sink));
        for keeper in &crowd.keepers {
            let since = self.since.entry(keeper.sink.clone()).or_insert((keeper.progress, now));
            if since.0 != keeper.progress {
                *since = (keeper.progress, now);
            }
        }
        let is_ripe = |since: Instant| now.saturating_duration_since(since) >= patience;
        self.since.iter().filter(|(_, (_, since))| is_ripe(*since)).map(|(sink, _)| sink.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use crate::apply::tables::tests::{read, sink};
    use crate::runs::RunView;
    use wallaby_model::RunId;
    use wallaby_model::run::{RunReason, SinkRun};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn crowd(read: usize, is_waited_for: bool, keepers: &[(&str, Progress)]) -> Crowd {
        let keeper = |(sink, progress): &(&str, Progress)| Keeper {
            sink: SinkId::new(*sink).unwrap(),
            progress: *progress,
            awaits_loads: false,
            is_paused: false,
        };
        Crowd { read, is_waited_for, keepers: keepers.iter().map(keeper).collect() }
    }

    /// What comes of looks in turn, one every ten seconds: the names of those that are ripe at the last one.
    fn ripe(looks: &[Crowd]) -> Vec<String> {
        let (mut crowding, begun) = (Crowding::default(), Instant::now());
        let mut ripe = Vec::new();
        for (number, crowd) in (0_u32..).zip(looks) {
            ripe = crowding.ripe(crowd, begun + Duration::from_secs(10) * number, PATIENCE);
        }
        ripe.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn who_takes_nothing_while_another_waits_is_cut_off_after_a_while() {
        let stuck = || crowd(4, true, &[("dead", (0, 0)), ("slow", (1, 1))]);
        assert_eq!(ripe(&[stuck(), stuck(), stuck()]), [""; 0]);
        assert_eq!(ripe(&[stuck(), stuck(), stuck(), stuck()]), ["dead", "slow"]);
        let moves = |loaded| crowd(4, true, &[("dead", (0, 0)), ("slow", (loaded, 1))]);
        assert_eq!(ripe(&[moves(1), moves(1), moves(2), moves(2)]), ["dead"]);
        let prepares = |tables| crowd(4, true, &[("dead", (0, 0)), ("slow", (1, tables))]);
        assert_eq!(ripe(&[prepares(1), prepares(1), prepares(1), prepares(2)]), ["dead"]);
    }

    #[test]
    fn a_sink_keeps_what_it_could_load_now_and_nothing_while_it_catches_up() {
        let mut spec =
            wallaby_model::flow::parse(wallaby_model::flow::page::EXAMPLE, "-").unwrap().spec.sinks.remove(0);
        spec.name = sink();
        let (first, second) = (read(RunReason::SinkAnew, "a"), read(RunReason::TablesAdded, "b"));
        let of = |first: &RunView, on_overrun| {
            let runs = [(RunId(1), first.clone()), (RunId(2), second.clone())].into();
            let runs = FlowRuns { runs, ..FlowRuns::default() };
            keepers(&runs, &[SinkSpec { on_overrun, ..spec.clone() }]).len()
        };
        assert_eq!(of(&first, OnOverrun::Detach), 1);
        assert_eq!(of(&first, OnOverrun::Backpressure), 0, "it is waited for");
        let runs = FlowRuns { runs: [(RunId(1), first.clone())].into(), ..FlowRuns::default() };
        let paused = |paused| keepers(&runs, &[SinkSpec { paused, ..spec.clone() }]).remove(0).is_paused;
        assert!(paused(true) && !paused(false));
        // Only the second run has chunks, and it comes after the first one, of which nothing is read.
        let unread = RunView { chunks: Default::default(), ..first.clone() };
        assert_eq!(of(&unread, OnOverrun::Detach), 0);
        let state = SinkRun { tables: [("public.a".to_owned(), TableStage::CatchingUp)].into(), ..SinkRun::default() };
        let catches_up = RunView { sinks: [(sink(), state)].into(), ..first.clone() };
        assert_eq!(of(&catches_up, OnOverrun::Detach), 0);
    }

    #[test]
    fn who_was_not_looked_at_is_not_cut_off() {
        let (mut crowding, begun) = (Crowding::default(), Instant::now());
        let stuck = crowd(4, true, &[("dead", (0, 0))]);
        let mut at = |seconds| crowding.ripe(&stuck, begun + Duration::from_secs(seconds), PATIENCE).len();
        assert_eq!([at(0), at(20), at(600), at(625)], [0, 0, 0, 0]);
        assert_eq!(at(631), 1);
    }

    #[test]
    fn a_sink_whose_tasks_nobody_has_is_not_to_blame() {
        let here = |awaits_loads| Keeper { sink: sink(), progress: (0, 0), awaits_loads, is_paused: false };
        let elsewhere = SinkId::new("elsewhere").unwrap();
        let chunk = wallaby_model::ChunkId { table: 0, restart: 0, number: 0 };
        let (apply, load) = (TaskKind::Apply(sink()), TaskKind::Load(sink(), RunId(1), chunk));
        let others =
            [TaskKind::Capture, TaskKind::Apply(elsewhere.clone()), TaskKind::Load(elsewhere, RunId(1), chunk)];
        for awaits_loads in [false, true] {
            assert!(!here(awaits_loads).is_to_blame(others.iter()));
            assert_eq!(here(awaits_loads).is_to_blame([&apply].into_iter()), !awaits_loads);
            assert_eq!(here(awaits_loads).is_to_blame([&load].into_iter()), awaits_loads);
            assert!(
                Keeper { is_paused: true, ..here(awaits_loads) }.is_to_blame([].into_iter()),
                "a person stopped it"
            );
        }
    }

    #[test]
    fn nobody_is_cut_off_while_chunks_are_read_or_nobody_waits() {
        let seen = |read, is_waited_for| crowd(read, is_waited_for, &[("dead", (0, 0))]);
        assert_eq!(ripe(&[seen(1, true), seen(1, true), seen(2, true), seen(2, true), seen(2, true)]), [""; 0]);
        assert_eq!(ripe(&[seen(1, true), seen(1, true), seen(1, false), seen(1, true), seen(1, true)]), [""; 0]);
        let gone = || crowd(1, true, &[]);
        assert_eq!(ripe(&[seen(1, true), gone(), seen(1, true), seen(1, true), seen(1, true)]), [""; 0]);
    }
}
