//! The tables of a sink: which rows the main reader takes, and what is next for each table that a run brings in. Pure, no I/O.
//!
//! The sink's marks are the truth; what stands in etcd only says what could be next.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use wallaby_connector_api::{BatchPart, TableFilter, TableMark};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::run::{ChunkDone, PlannedRelation, RelationState, RunPlan, RunSpec, RunState, SinkRun, TableStage};
use wallaby_model::{ChunkId, Lsn, Position, RunId, SinkId, TableName};

use crate::runs::{FlowRuns, RunView};

/// Which rows the main reader of a sink takes; `None`: all of them.
pub fn main_filter(marks: &[TableMark], snapshot: SnapshotMode) -> Option<TableFilter> {
    let others = snapshot == SnapshotMode::Never;
    if others && marks.is_empty() {
        return None;
    }
    let mut filter = TableFilter { others, ..TableFilter::default() };
    for mark in marks {
        match (mark.stage, mark.position) {
            (TableStage::Ready, position) => {
                filter.taken.insert(mark.table.clone(), position.unwrap_or(Position::ZERO));
            }
            // What the sink has of it is not what the source has.
            (TableStage::Copying | TableStage::CatchingUp | TableStage::Gone, _) => {
                filter.left_out.insert(mark.table.clone());
            }
        }
    }
    Some(filter)
}

/// Tables that have rows in what the main reader took and whose rows are left out until a run brings them. One that a run copies now is
/// among them, and so are those that a run began with and did not bring: see [`stranger`].
pub fn strangers<'a>(filter: &'a TableFilter, parts: &'a [BatchPart]) -> impl Iterator<Item = &'a TableName> {
    let tables = parts.iter().flat_map(|part| part.body.tables.iter().map(|table| &table.schema.table));
    tables.filter(|table| is_stranger(filter, table))
}

/// Whether the rows of a table are left out until a run brings them.
pub fn is_stranger(filter: &TableFilter, table: &TableName) -> bool {
    !filter.others && !filter.taken.contains_key(table)
}

/// What is to be done about a table whose rows are left out at a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// A run that is not over has it.
    Awaited,
    /// Somebody cancelled the last run that had it: people decide.
    Cancelled(RunId),
    /// It was gone when a run looked for it, and has had no rows since.
    Gone,
    /// A run is to be made.
    Wanted,
}

/// See [`Stranger`]. `seen`: the table has no rows behind it.
pub fn stranger(runs: &FlowRuns, sink: &SinkId, table: &TableName, seen: Position) -> Stranger {
    let has_it = |spec: &RunSpec| spec.loads_into(sink) && spec.is_of(table);
    let mut of_it = runs.runs.iter().filter(|(_, run)| run.spec.as_ref().is_some_and(has_it));
    match of_it.next_back() {
        Some((number, run)) if runs.awaits(*number, run, sink) => Stranger::Awaited,
        // One that is open and done here had no such table, and may be open for long because of another sink.
        Some((number, run))
            if !run.is_open() && !run.plan.as_ref().is_some_and(|plan| plan.state == RunState::Done) =>
        {
            Stranger::Cancelled(*number)
        }
        Some((_, run)) if run.plan.as_ref().is_some_and(|plan| was_gone(plan, table, seen)) => Stranger::Gone,
        _ => Stranger::Wanted,
    }
}

/// Whether a table whose last rows stand at or before `seen` was gone when a run was planned last.
fn was_gone(plan: &RunPlan, table: &TableName, seen: Position) -> bool {
    let is_there = |relation: &PlannedRelation| relation.table == *table && relation.state != RelationState::Gone;
    let point = plan.generations.last().map(|generation| Position::before(generation.consistent_point));
    point.is_some_and(|point| seen <= point) && !plan.relations.iter().any(is_there)
}

/// One table of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTable {
    /// How often it was started again.
    pub restart: u32,
    /// Every relation of it is gone at the source.
    pub is_gone: bool,
    /// Its chunks.
    pub chunks: Vec<ChunkId>,
}

/// The tables of a plan: all relations of one table together.
pub fn tables_of(plan: &RunPlan) -> BTreeMap<TableName, PlannedTable> {
    let mut tables: BTreeMap<TableName, PlannedTable> = BTreeMap::new();
    for relation in &plan.relations {
        let table = tables.entry(relation.table.clone()).or_insert(PlannedTable {
            restart: relation.restart,
            is_gone: true,
            chunks: Vec::new(),
        });
        table.restart = table.restart.max(relation.restart);
        table.is_gone &= relation.state == RelationState::Gone;
    }
    for chunk in plan.chunks() {
        let name = plan.relations.get(chunk.table as usize).map(|relation| &relation.table);
        if let Some(table) = name.and_then(|name| tables.get_mut(name)) {
            table.chunks.push(chunk);
        }
    }
    tables
}

/// C of a table in a restart: the lowest consistent point of its chunks. Rows committed before it are in the chunks.
pub fn consistent_point(
    plan: &RunPlan,
    chunks: &BTreeMap<ChunkId, ChunkDone>,
    table: &TableName,
    restart: u32,
) -> Option<Lsn> {
    let is_of = |chunk: &ChunkId| {
        chunk.restart == restart && plan.relations.get(chunk.table as usize).is_some_and(|of| of.table == *table)
    };
    chunks.iter().filter(|(chunk, _)| is_of(chunk)).map(|(_, done)| done.consistent_point).min()
}

/// What is next for a sink in its runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// The table is made or emptied, and marked as copying. Its shape stands in the first part of the chunk.
    Prepare {
        /// The run.
        run: RunId,
        /// Its restart.
        restart: u32,
        /// Where the shape is.
        chunk: ChunkId,
        /// Whose parts.
        done: ChunkDone,
    },
    /// The table is gone at the source: it is marked so.
    Gone {
        /// The table.
        table: TableName,
    },
    /// Everything seems to be loaded: the sink is asked.
    AskLoaded(RunId),
    /// Everything is loaded into a sink without a position: the tables are ready and the stream begins.
    BeginStream {
        /// The run.
        run: RunId,
        /// Tables that an earlier run marked and that stand before the stream: nobody brings them what they lack.
        left: Vec<TableName>,
        /// The tables that are not marked yet, by their marks.
        ready: BTreeMap<Position, Vec<TableName>>,
        /// Where the stream begins.
        from: Position,
        /// How the sink then stands in the run.
        state: SinkRun,
    },
    /// Everything is loaded into a live sink: the tables catch up from here.
    CatchUp {
        /// The run.
        run: RunId,
        /// The tables.
        tables: Vec<TableName>,
        /// Where the replay begins.
        from: Position,
    },
    /// The log is replayed for these tables.
    Replay(Replay),
    /// Every table is ready.
    Done {
        /// The run.
        run: RunId,
        /// Where its tables were handed over.
        state: SinkRun,
    },
}

/// A replay of the log for the tables of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// The run.
    pub run: RunId,
    /// Where its tables stand, all of them.
    pub from: Position,
    /// The tables.
    pub tables: Vec<TableName>,
    /// Which rows are taken.
    pub filter: TableFilter,
}

/// What the sink knows of itself.
#[derive(Clone, Copy, Debug)]
pub struct AtSink<'a> {
    /// Its name.
    pub sink: &'a SinkId,
    /// Whether the main stream has begun.
    pub is_live: bool,
    /// The marks of its tables.
    pub marks: &'a [TableMark],
    /// The chunks that it has, of runs that it was asked about.
    pub loaded: &'a HashMap<RunId, BTreeSet<ChunkId>>,
    /// Runs that it is done with, also where the watch does not say so yet.
    pub done: &'a BTreeSet<RunId>,
}

/// An open run as a sink meets it.
#[derive(Clone, Copy, Debug)]
pub struct OpenRun<'a> {
    /// Its number.
    pub run: RunId,
    /// What is known of it.
    pub view: &'a RunView,
    /// What is asked of it.
    pub spec: &'a RunSpec,
    /// Its plan; none before its owner wrote one.
    pub plan: Option<&'a RunPlan>,
}

/// The open runs that still load into a sink, in order: those that were not done there, and that a sink which was cut off is not out of.
pub fn open_runs<'a>(runs: &'a FlowRuns, sink: &'a SinkId) -> impl Iterator<Item = OpenRun<'a>> {
    let open = runs.runs.iter().filter(move |(run, view)| runs.awaits(**run, view, sink));
    open.filter_map(|(run, view)| {
        view.spec.as_ref().map(|spec| OpenRun { run: *run, view, spec, plan: view.plan.as_ref() })
    })
}

/// The plan, of the runs that load into a sink without a position, that needs the log from the lowest place: what brings the sink to life is
/// the first of them that is not cancelled until then.
pub fn lowest_plan<'a>(runs: &'a FlowRuns, sink: &'a SinkId) -> Option<&'a RunPlan> {
    let first = |plan: &RunPlan| plan.generations.first().map(|generation| generation.consistent_point);
    let planned = open_runs(runs, sink).filter_map(|open| open.plan);
    planned.filter_map(|plan| Some((first(plan)?, plan))).min_by_key(|(point, _)| *point).map(|(_, plan)| plan)
}

/// What is next, and what the sink's state in each of its runs is. A sink without a position is brought to life by its first run, and
/// a run whose tables an earlier one loads comes after that one: other sinks of the run may be far ahead (see [`RunSpec::waits_for`]).
pub fn next(at: AtSink<'_>, runs: &FlowRuns) -> (Option<Next>, Vec<(RunId, SinkRun)>) {
    let mut said = Vec::new();
    let (mut first, mut replay) = (None, None);
    let mut earlier: Vec<&RunSpec> = Vec::new();
    for OpenRun { run, view, spec, plan } in open_runs(runs, at.sink).filter(|open| !at.done.contains(&open.run)) {
        let waits = earlier.iter().any(|earlier| spec.waits_for(earlier));
        earlier.push(spec);
        if let Some(plan) = plan.filter(|_| !waits) {
            let (next, state) = next_of(at, run, view, plan);
            if view.sinks.get(at.sink) != Some(&state) {
                said.push((run, state));
            }
            match next {
                // It goes on for long beside everything else: other runs do not wait for it.
                Some(Next::Replay(_)) => replay = replay.or(next),
                next => first = first.or(next),
            }
        }
        if !at.is_live {
            break;
        }
    }
    (first.or(replay), said)
}

fn next_of(at: AtSink<'_>, run: RunId, view: &RunView, plan: &RunPlan) -> (Option<Next>, SinkRun) {
    let tables = tables_of(plan);
    let marks: HashMap<&TableName, &TableMark> = at.marks.iter().map(|mark| (&mark.table, mark)).collect();
    let mut state = view.sinks.get(at.sink).cloned().unwrap_or_default();
    let mut next = None;
    // Tables that are neither copied nor further on: of a run that goes on, or that nobody has read anything of.
    let mut is_behind = false;
    let (mut copying, mut catching_up) = (Vec::new(), Vec::new());
    for (name, table) in &tables {
        let mark = marks.get(name).copied();
        let stage = match mark {
            // A later run has it.
            Some(mark) if mark.run > run => TableStage::Ready,
            Some(mark) if mark.run == run => mark.stage,
            _ if table.is_gone => TableStage::Gone,
            _ => {
                is_behind = true;
                next = next.or_else(|| prepare(run, table, view));
                continue;
            }
        };
        match (stage, mark) {
            (TableStage::Copying, _) if table.is_gone => {
                next = next.or_else(|| Some(Next::Gone { table: name.clone() }));
                is_behind = true;
            }
            (TableStage::Copying, Some(mark)) if mark.restart < table.restart => {
                is_behind = true;
                next = next.or_else(|| prepare(run, table, view));
            }
            (TableStage::Copying, _) => copying.push((name.clone(), table)),
            (TableStage::CatchingUp, Some(mark)) => catching_up.push(mark),
            (TableStage::CatchingUp | TableStage::Ready | TableStage::Gone, _) => {
                if let Some(position) = mark.and_then(|mark| mark.position)
                    && stage == TableStage::Ready
                {
                    state.handed_over.insert(name.to_string(), position);
                }
            }
        }
        state.tables.insert(name.to_string(), stage);
    }
    if next.is_some() || is_behind || plan.state != RunState::Loading {
        return (next, state);
    }
    if !copying.is_empty() {
        return (after_copy(at, run, view, plan, &copying), state);
    }
    if let Some(replay) = replay(run, view, plan, &catching_up) {
        return (Some(Next::Replay(replay)), state);
    }
    // A first load whose marks are set and whose stream did not begin yet, or a run over no table at all.
    let next =
        if at.is_live { Next::Done { run, state: state.clone() } } else { begin_stream(at, run, view, plan, &tables) };
    (Some(next), state)
}

fn prepare(run: RunId, table: &PlannedTable, view: &RunView) -> Option<Next> {
    let known = table.chunks.iter().find_map(|chunk| view.chunks.get(chunk).map(|done| (*chunk, done.clone())));
    known.map(|(chunk, done)| Next::Prepare { run, restart: table.restart, chunk, done })
}

/// All tables are copied, as far as etcd says.
fn after_copy(
    at: AtSink<'_>,
    run: RunId,
    view: &RunView,
    plan: &RunPlan,
    copying: &[(TableName, &PlannedTable)],
) -> Option<Next> {
    let has_all = |loaded: Option<&BTreeSet<ChunkId>>| {
        let chunks = copying.iter().flat_map(|(_, table)| &table.chunks);
        loaded.is_some_and(|loaded| chunks.clone().all(|chunk| loaded.contains(chunk)))
    };
    if !has_all(at.loaded.get(&run)) {
        return has_all(view.loaded.get(at.sink)).then_some(Next::AskLoaded(run));
    }
    if !at.is_live {
        return Some(begin_stream(at, run, view, plan, &tables_of(plan)));
    }
    let point = |(name, table): &(TableName, &PlannedTable)| consistent_point(plan, &view.chunks, name, table.restart);
    let from = copying.iter().filter_map(point).min()?;
    let tables = copying.iter().map(|(name, _)| name.clone()).collect();
    Some(Next::CatchUp { run, tables, from: Position::before(from) })
}

fn begin_stream(
    at: AtSink<'_>,
    run: RunId,
    view: &RunView,
    plan: &RunPlan,
    tables: &BTreeMap<TableName, PlannedTable>,
) -> Next {
    let is_ready = |mark: &&TableMark| mark.stage == TableStage::Ready;
    let marked: HashMap<&TableName, Option<Position>> =
        at.marks.iter().filter(is_ready).map(|mark| (&mark.table, mark.position)).collect();
    let mut ready: BTreeMap<Position, Vec<TableName>> = BTreeMap::new();
    let mut points: BTreeSet<Position> = BTreeSet::new();
    for (name, table) in tables.iter().filter(|(_, table)| !table.is_gone) {
        // One that is marked has its rows from there on: an owner that was killed here set it, and the table may have been read again for
        // another sink since.
        if let Some(mark) = marked.get(name) {
            points.extend(*mark);
        } else if let Some(point) = consistent_point(plan, &view.chunks, name, table.restart) {
            points.insert(Position::before(point));
            ready.entry(Position::before(point)).or_default().push(name.clone());
        }
    }
    // Without any table: where the last export stood.
    let exported = || plan.generations.last().map_or(Lsn(0), |generation| generation.consistent_point);
    let from = points.first().copied().unwrap_or_else(|| Position::before(exported()));
    // Of a run that was cancelled between its marks and its stream: it may lack what came since, and nobody adds its indexes.
    let is_left = |mark: &&TableMark| !tables.contains_key(&mark.table) && mark.run != run;
    let left = at.marks.iter().filter(is_ready).filter(is_left).map(|mark| mark.table.clone()).collect();
    let mut state = view.sinks.get(at.sink).cloned().unwrap_or_default();
    for (position, name) in ready.iter().flat_map(|(position, names)| names.iter().map(move |name| (position, name))) {
        state.tables.insert(name.to_string(), TableStage::Ready);
        state.handed_over.insert(name.to_string(), *position);
    }
    Next::BeginStream { run, left, ready, from, state }
}

/// The replay of the tables that stand lowest; others that stand elsewhere come after it.
fn replay(run: RunId, view: &RunView, plan: &RunPlan, catching_up: &[&TableMark]) -> Option<Replay> {
    let from = catching_up.iter().filter_map(|mark| mark.position).min()?;
    let here: Vec<&&TableMark> = catching_up.iter().filter(|mark| mark.position == Some(from)).collect();
    let mut filter = TableFilter::default();
    for mark in &here {
        let point = consistent_point(plan, &view.chunks, &mark.table, mark.restart).unwrap_or(Lsn(0));
        filter.taken.insert(mark.table.clone(), Position::before(point));
    }
    Some(Replay { run, from, tables: here.iter().map(|mark| mark.table.clone()).collect(), filter })
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::flow::change::sink_anew;
    use wallaby_model::run::{Generation, RunReason};
    use wallaby_model::{Epoch, WorkerId};

    const CHUNK: ChunkId = ChunkId { table: 0, restart: 0, number: 0 };

    pub(crate) fn sink() -> SinkId {
        SinkId::new("warehouse").unwrap()
    }

    fn spec(reason: RunReason, table: &str) -> RunSpec {
        RunSpec { reason, tables: vec![table.to_owned()], ..sink_anew(&sink(), Timestamp(1)) }
    }

    /// A run of one table that is read.
    pub(crate) fn read(reason: RunReason, name: &str) -> RunView {
        let table = TableName::new("public", name);
        let relation = PlannedRelation {
            relation: table.clone(),
            table,
            oid: 1,
            table_oid: 0,
            relfilenode: 1,
            pages: 1,
            chunk_pages: 1,
            restart: 0,
            state: RelationState::Reading,
            rows_estimate: None,
            has_key: true,
        };
        let generation = Generation { number: 1, consistent_point: Lsn(7), snapshot: None, exported_at: Timestamp(1) };
        let done = ChunkDone {
            attempt: Epoch(1),
            consistent_point: Lsn(7),
            parts: 1,
            rows: 1,
            bytes: 1,
            checksum: 0,
            worker: WorkerId::new("w1").unwrap(),
            took_ms: 1,
        };
        RunView {
            spec: Some(spec(reason, &format!("public.{name}"))),
            plan: Some(RunPlan {
                state: RunState::Loading,
                generations: vec![generation],
                relations: vec![relation],
                ..RunPlan::default()
            }),
            chunks: [(CHUNK, done)].into(),
            ..RunView::default()
        }
    }

    /// A sink of which a table catches up in the first run, for hours maybe, takes its part in the second one.
    #[test]
    fn a_replay_keeps_no_other_run_from_its_sink() {
        let catches_up = TableMark {
            table: TableName::new("public", "a"),
            run: RunId(1),
            restart: 0,
            stage: TableStage::CatchingUp,
            position: Some(Position::before(Lsn(7))),
        };
        let replayed = read(RunReason::Asked, "a");
        let marks = [catches_up];
        let step = |runs: BTreeMap<RunId, RunView>| {
            let runs = FlowRuns { runs, ..FlowRuns::default() };
            let at =
                AtSink { sink: &sink(), is_live: true, marks: &marks, loaded: &HashMap::new(), done: &BTreeSet::new() };
            next(at, &runs).0
        };
        assert!(matches!(step([(RunId(1), replayed.clone())].into()), Some(Next::Replay(_))));
        let both = [(RunId(1), replayed), (RunId(2), read(RunReason::TablesAdded, "b"))].into();
        assert!(matches!(step(both), Some(Next::Prepare { run: RunId(2), .. })));
    }

    fn mark(table: &str, run: u32, stage: TableStage, at: u64) -> TableMark {
        let position = Some(Position::before(Lsn(at)));
        TableMark { table: TableName::new("public", table), run: RunId(run), restart: 0, stage, position }
    }

    /// The sink was killed between its marks and the beginning of its stream.
    fn begins(
        run: u32,
        view: RunView,
        marks: &[TableMark],
    ) -> (Vec<TableName>, BTreeMap<Position, Vec<TableName>>, Position) {
        let runs = FlowRuns { runs: [(RunId(run), view)].into(), ..FlowRuns::default() };
        let loaded = HashMap::from([(RunId(run), BTreeSet::from([CHUNK]))]);
        let at = AtSink { sink: &sink(), is_live: false, marks, loaded: &loaded, done: &BTreeSet::new() };
        match next(at, &runs).0 {
            Some(Next::BeginStream { left, ready, from, .. }) => (left, ready, from),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn h23_a_stream_begins_where_the_lowest_mark_stands_also_when_its_table_was_read_again_since() {
        let at = |lsn| Position::before(Lsn(lsn));
        let copied = mark("a", 1, TableStage::Copying, 0);
        let (left, ready, from) = begins(1, read(RunReason::FirstLoad, "a"), std::slice::from_ref(&copied));
        assert_eq!((left, from), (vec![], at(7)));
        assert_eq!(ready, BTreeMap::from([(at(7), vec![copied.table])]));
        // Another sink lost a part of it: the plan has it at a later start, read under a later snapshot.
        let mut again = read(RunReason::FirstLoad, "a");
        let (chunk, done) = again.chunks.pop_first().unwrap();
        let plan = again.plan.as_mut().unwrap();
        plan.relations[0].restart = 1;
        plan.generations.push(Generation {
            number: 2,
            consistent_point: Lsn(9),
            snapshot: None,
            exported_at: Timestamp(1),
        });
        again.chunks.insert(ChunkId { restart: 1, ..chunk }, ChunkDone { consistent_point: Lsn(9), ..done });
        let (left, ready, from) = begins(1, again, &[mark("a", 1, TableStage::Ready, 7)]);
        assert_eq!((left, ready, from), (vec![], BTreeMap::new(), at(7)));
    }

    #[test]
    fn h23_a_table_that_a_cancelled_run_marked_before_the_stream_is_not_taken_for_ready() {
        let marks = [
            mark("b", 2, TableStage::Copying, 0),
            mark("a", 1, TableStage::Ready, 3),
            mark("c", 1, TableStage::Ready, 9),
            mark("d", 2, TableStage::Ready, 9),
        ];
        let (left, _, from) = begins(2, read(RunReason::Asked, "b"), &marks);
        assert_eq!(from, Position::before(Lsn(7)));
        // Not the last one: it is ours, and went from the plan since.
        assert_eq!(left, [TableName::new("public", "a"), TableName::new("public", "c")]);
    }

    #[test]
    fn a_run_that_the_sink_is_done_with_is_not_said_to_go_on_because_the_watch_is_late() {
        let runs = FlowRuns { runs: [(RunId(1), read(RunReason::Asked, "a"))].into(), ..FlowRuns::default() };
        let marks = [mark("a", 1, TableStage::Ready, 7)];
        let step = |done: &BTreeSet<RunId>| {
            next(AtSink { sink: &sink(), is_live: true, marks: &marks, loaded: &HashMap::new(), done }, &runs)
        };
        let (first, said) = step(&BTreeSet::new());
        assert!(matches!(first, Some(Next::Done { .. })) && said.len() == 1, "{first:?}, {said:?}");
        assert_eq!(step(&BTreeSet::from([RunId(1)])), (None, vec![]));
    }

    #[test]
    fn the_log_is_held_for_whichever_run_brings_the_sink_to_life() {
        let planned = |point| {
            let mut view = read(RunReason::Asked, "a");
            view.plan.as_mut().unwrap().generations[0].consistent_point = Lsn(point);
            view
        };
        let unplanned = RunView { plan: None, ..read(RunReason::SinkAnew, "a") };
        let lowest = |runs: BTreeMap<RunId, RunView>| {
            let runs = FlowRuns { runs, ..FlowRuns::default() };
            lowest_plan(&runs, &sink()).map(|plan| plan.generations[0].consistent_point)
        };
        assert_eq!(lowest([(RunId(1), unplanned.clone())].into()), None);
        assert_eq!(lowest([(RunId(1), unplanned), (RunId(2), planned(5))].into()), Some(Lsn(5)));
        // The first one was paused before its export. If it is cancelled, the second one is the first.
        assert_eq!(lowest([(RunId(1), planned(9)), (RunId(2), planned(5))].into()), Some(Lsn(5)));
    }

    /// The run whose table is prepared next.
    fn prepared(is_live: bool, runs: [RunView; 2]) -> Option<RunId> {
        let [first, second] = runs;
        let runs = FlowRuns { runs: [(RunId(1), first), (RunId(2), second)].into(), ..FlowRuns::default() };
        let at = AtSink { sink: &sink(), is_live, marks: &[], loaded: &HashMap::new(), done: &BTreeSet::new() };
        match next(at, &runs).0 {
            Some(Next::Prepare { run, .. }) => Some(run),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_run_waits_at_a_sink_for_one_before_it_that_has_the_same_tables_or_brings_it_to_life() {
        let unplanned = |reason, table: &str| RunView { spec: Some(spec(reason, table)), ..RunView::default() };
        let added = || read(RunReason::TablesAdded, "b");
        assert_eq!(prepared(false, [read(RunReason::FirstLoad, "a"), added()]), Some(RunId(1)));
        // Other sinks of the later run did not wait: it may be planned and read before the earlier one.
        assert_eq!(prepared(false, [unplanned(RunReason::FirstLoad, "public.a"), added()]), None);
        assert_eq!(prepared(true, [unplanned(RunReason::SinkAnew, "public.a"), added()]), None);
        assert_eq!(prepared(true, [unplanned(RunReason::Asked, "public.*"), added()]), None);
        assert_eq!(prepared(true, [unplanned(RunReason::Asked, "public.a"), added()]), Some(RunId(2)));
        let done = RunView {
            sinks: [(sink(), SinkRun { is_done: true, ..SinkRun::default() })].into(),
            ..read(RunReason::FirstLoad, "b")
        };
        assert_eq!(prepared(true, [done, added()]), Some(RunId(2)));
    }
}
