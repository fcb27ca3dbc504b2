//! Snapshot runs as the API shows them: progress, what is left, and the condition `SnapshotComplete`.

use std::collections::BTreeMap;
use std::time::Duration;

use wallaby_coordination::{FlowEntry, wall_clock_now};
use wallaby_model::condition::{Condition, ConditionStatus, ConditionType, TaskPhase, Timestamp};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::run::{
    Generation, PlannedRelation, RelationState, RunPlan, RunReason, RunSpec, RunState, RunWish, TableStage, covers,
};
use wallaby_model::{FlowId, RunId, SinkId, TaskId, TaskKind, api};
use wallaby_proto::v1;

use super::timestamp;
use crate::runs::{Counts, RunView};
use crate::view::View;

/// A run as the API shows it. Specification and plan are given, because they may be newer than the view.
pub fn snapshot(view: &View, entry: &FlowEntry, run: RunId, spec: &RunSpec, plan: Option<&RunPlan>) -> v1::Snapshot {
    let nothing = RunView::default();
    let known = view.run(&entry.flow, run).unwrap_or(&nothing);
    let none = RunPlan::default();
    let shown = plan.unwrap_or(&none);
    let task = view.task(&TaskId { flow: entry.flow.clone(), kind: TaskKind::Run(run) });
    let tables = tables(known, shown);
    v1::Snapshot {
        name: api::snapshot_name(&entry.flow, run),
        spec: Some(spec_message(spec)),
        state: state(spec, shown).into(),
        message: message(view, entry, run, spec, plan),
        reason: match spec.reason {
            RunReason::FirstLoad => v1::SnapshotReason::FirstLoad,
            RunReason::TablesAdded => v1::SnapshotReason::TablesAdded,
            RunReason::TablesReplaced => v1::SnapshotReason::TablesReplaced,
            RunReason::Asked => v1::SnapshotReason::Asked,
            RunReason::SinkAnew => v1::SnapshotReason::SinkAnew,
        }
        .into(),
        create_time: Some(timestamp(spec.created_at)),
        update_time: plan.map(|plan| timestamp(plan.at)),
        worker: task.lock.map(|lock| lock.holder.worker.to_string()).unwrap_or_default(),
        progress: Some(progress(view, entry, run, known, shown, &tables)),
        tables,
        sinks: sinks(entry, spec, known),
    }
}

/// The runs of a flow that are not over.
pub fn open(view: &View, entry: &FlowEntry) -> Vec<v1::Snapshot> {
    let open = view.runs(&entry.flow).filter(|(_, known)| known.is_open());
    open.filter_map(|(run, known)| Some(snapshot(view, entry, run, known.spec()?, known.plan()))).collect()
}

fn spec_message(spec: &RunSpec) -> v1::SnapshotSpec {
    v1::SnapshotSpec {
        tables: spec.tables.clone(),
        sinks: spec.sinks.iter().map(SinkId::to_string).collect(),
        rows_per_second: spec.rows_per_second.unwrap_or(0),
        readers: spec.readers,
        exclude: spec.exclude.clone(),
    }
}

fn state(spec: &RunSpec, plan: &RunPlan) -> v1::SnapshotState {
    match (plan.state, spec.wish) {
        (RunState::Done, _) => v1::SnapshotState::Done,
        (RunState::Cancelled, _) => v1::SnapshotState::Cancelled,
        (_, RunWish::Cancel) => v1::SnapshotState::Cancelling,
        (RunState::Planning | RunState::Reading, RunWish::Pause) => v1::SnapshotState::Paused,
        (RunState::Planning, RunWish::Go) => v1::SnapshotState::Planning,
        (RunState::Reading, RunWish::Go) => v1::SnapshotState::Reading,
        (RunState::Loading, _) => v1::SnapshotState::Loading,
    }
}

fn message(view: &View, entry: &FlowEntry, run: RunId, spec: &RunSpec, plan: Option<&RunPlan>) -> String {
    if plan.is_some_and(|plan| plan.state.is_over()) {
        return plan.map(|plan| plan.message.clone()).unwrap_or_default();
    }
    let flow = &entry.flow;
    if spec.wish == RunWish::Pause {
        return format!("paused by request; `wallaby snapshot resume {flow} {run}` lets it go on");
    }
    if let Some(other) = view.waits_for_run(entry, run) {
        return format!("waits for run {other}, which loads the same tables or brings its sinks to life");
    }
    if entry.record.document.spec.paused {
        return format!("the flow is paused; `wallaby resume {flow}` lets it go on");
    }
    if view.pauses_for_the_slot(entry) {
        return "nothing is read until the slot holds back less WAL (`safety.onExceeded: pauseSnapshot`)".to_owned();
    }
    let said = plan.map(|plan| plan.message.clone()).unwrap_or_default();
    let id = TaskId { flow: flow.clone(), kind: TaskKind::Run(run) };
    let task = view.task(&id);
    if task.lock.is_none() && plan.is_none_or(|plan| plan.state != RunState::Loading) {
        return super::no_owner(view).1;
    }
    let error = task.status.and_then(|status| status.last_error).unwrap_or_default();
    let error = if error.is_empty() { error_of_chunks(view, flow, run) } else { error };
    if !error.is_empty() {
        return error;
    }
    let sinks = entry.record.document.spec.sinks.iter().map(|sink| &sink.name);
    let waits = |sink: &SinkId| view.run(flow, run).is_some_and(|known| view.awaits(entry, run, known, sink));
    let behind = sinks.filter(|sink| waits(sink)).filter_map(|sink| {
        let earlier = view.sink_waits_for(entry, run, sink)?;
        Some(format!("sink {sink} comes after run {earlier}"))
    });
    std::iter::once(said).filter(|said| !said.is_empty()).chain(behind).collect::<Vec<_>>().join("; ")
}

/// What a chunk of a run that is not read yet failed with, one of them; empty when none did.
fn error_of_chunks(view: &View, flow: &FlowId, run: RunId) -> String {
    let statuses = view.chunk_tasks(flow, run).filter_map(|task| task.status.as_ref());
    let mut failed = statuses.filter(|status| status.phase == TaskPhase::Backoff);
    failed.find_map(|status| status.last_error.clone()).unwrap_or_default()
}

fn tables(known: &RunView, plan: &RunPlan) -> Vec<v1::SnapshotTable> {
    let mut tables: BTreeMap<String, v1::SnapshotTable> = BTreeMap::new();
    for (index, relation) in plan.relations.iter().enumerate() {
        let name = relation.table.to_string();
        let table = tables.entry(name.clone()).or_insert_with(|| v1::SnapshotTable {
            table: name,
            gone: true,
            ..v1::SnapshotTable::default()
        });
        table.restarts += relation.restart;
        if relation.state == RelationState::Gone {
            continue;
        }
        let counts = known.read_of(index);
        table.gone = false;
        table.relations += 1;
        table.chunks_total += u64::from(relation.chunks());
        table.chunks_done += counts.chunks;
        table.rows_done += counts.rows;
        table.rows_estimate += rows_estimate(relation, counts).unwrap_or(0);
    }
    tables.into_values().collect()
}

/// How many rows a relation has: known once all of it is read, else by the planner's statistics, else by what was read.
fn rows_estimate(relation: &PlannedRelation, counts: Counts) -> Option<u64> {
    let chunks = u64::from(relation.chunks());
    if counts.chunks >= chunks {
        return Some(counts.rows);
    }
    let by_chunks = (counts.chunks > 0).then(|| counts.rows.saturating_mul(chunks) / counts.chunks.max(1));
    relation.rows_estimate.map(|rows| rows.max(counts.rows)).or(by_chunks)
}

fn progress(
    view: &View,
    entry: &FlowEntry,
    run: RunId,
    known: &RunView,
    plan: &RunPlan,
    tables: &[v1::SnapshotTable],
) -> v1::SnapshotProgress {
    let read = known.read();
    let reading = if plan.state.is_over() { 0 } else { view.chunks_reading(entry, run) };
    let chunks_total = match plan.state.is_over() {
        true => read.chunks,
        false => tables.iter().map(|table| table.chunks_total).sum(),
    };
    let rows_estimate = match plan.state.is_over() {
        true => read.rows,
        false => tables.iter().map(|table| table.rows_estimate).sum(),
    };
    let rate = known.rate_of_a_reader().map_or(0.0, |rate| rate * reading as f64);
    let left = rows_estimate.saturating_sub(read.rows);
    let is_known = rate > 0.0 && rows_estimate > 0 && read.chunks < chunks_total;
    let remaining = is_known.then(|| Duration::try_from_secs_f64(left as f64 / rate).ok()).flatten();
    let newest = plan.generations.last();
    let held = plan.snapshot().filter(|_| !plan.state.is_over());
    v1::SnapshotProgress {
        tables_total: u32::try_from(tables.iter().filter(|table| !table.gone).count()).unwrap_or(u32::MAX),
        chunks_total,
        chunks_done: read.chunks,
        chunks_reading: u32::try_from(reading).unwrap_or(u32::MAX),
        rows_done: read.rows,
        rows_estimate,
        bytes_done: read.bytes,
        rows_per_second: rate,
        remaining: remaining.map(api::duration_to_message),
        generation: newest.map_or(0, |generation| generation.number),
        snapshot_age: held.map(|generation| api::duration_to_message(age(generation))),
        consistent_point: newest.map(|generation| generation.consistent_point.to_string()).unwrap_or_default(),
    }
}

/// For people; clocks of two machines may differ.
fn age(generation: &Generation) -> Duration {
    Duration::from_millis(wall_clock_now().0.saturating_sub(generation.exported_at.0))
}

fn sinks(entry: &FlowEntry, spec: &RunSpec, known: &RunView) -> Vec<v1::SnapshotSink> {
    let of_flow = entry.record.document.spec.sinks.iter().map(|sink| &sink.name);
    let of_run = of_flow.filter(|sink| spec.loads_into(sink));
    let shown = |sink: &SinkId| {
        let state = known.sinks().get(sink).cloned().unwrap_or_default();
        let count = |stage: TableStage| {
            u32::try_from(state.tables.values().filter(|known| **known == stage).count()).unwrap_or(u32::MAX)
        };
        let (chunks_loaded, rows_loaded) = known.loaded(sink);
        v1::SnapshotSink {
            sink: api::sink_name(&entry.flow, sink),
            chunks_loaded,
            rows_loaded,
            tables_copying: count(TableStage::Copying),
            tables_catching_up: count(TableStage::CatchingUp),
            tables_ready: count(TableStage::Ready),
            done: state.is_done,
        }
    };
    of_run.map(shown).collect()
}

/// Whether a run loads whatever an earlier one was to load, into the one sink or wherever.
fn makes_up_for(spec: &RunSpec, earlier: &RunSpec, sink: Option<&SinkId>) -> bool {
    let has = |table: &String| spec.tables.iter().any(|pattern| covers(pattern, table));
    let is_wide = spec.tables.is_empty() || (!earlier.tables.is_empty() && earlier.tables.iter().all(has));
    let is_left_out = |table: &String| earlier.exclude.iter().any(|pattern| covers(pattern, table));
    let is_everywhere = match sink {
        Some(sink) => spec.loads_into(sink),
        None => {
            spec.sinks.is_empty()
                || (!earlier.sinks.is_empty() && earlier.sinks.iter().all(|sink| spec.loads_into(sink)))
        }
    };
    is_wide && spec.exclude.iter().all(is_left_out) && is_everywhere
}

/// Whether a run came to nothing and nothing is missing for it: a person asked for tables to be loaded anew, and cancelled it before
/// one was planned, so that no sink has emptied any. A run of another reason was to load what no sink has.
fn left_all_as_it_was(spec: &RunSpec, known: &RunView) -> bool {
    let is_unplanned = |plan: &RunPlan| plan.state == RunState::Cancelled && plan.relations.is_empty();
    spec.reason == RunReason::Asked && known.plan().is_some_and(is_unplanned)
}

/// Whether existing rows are where they should be: in the whole flow, or at one sink.
pub fn complete(view: &View, entry: &FlowEntry, sink: Option<&SinkId>) -> Condition {
    let of_sink = |spec: &RunSpec| sink.is_none_or(|sink| spec.loads_into(sink));
    let is_done_here =
        |known: &RunView| sink.is_some_and(|sink| known.sinks().get(sink).is_some_and(|state| state.is_done));
    let say = |status, reason: &str, message: String, since: Timestamp| {
        Condition::new(ConditionType::SnapshotComplete, status, reason, message, since)
    };
    let mut last_over = None;
    for (run, known) in view.runs(&entry.flow) {
        let Some(spec) = known.spec().filter(|spec| of_sink(spec)) else { continue };
        if left_all_as_it_was(spec, known) {
            continue;
        }
        if known.is_over() || is_done_here(known) {
            // What a run that was cancelled left out is still missing after one that loads something else.
            let is_cancelled = |plan: Option<&RunPlan>| plan.is_some_and(|plan| plan.state == RunState::Cancelled);
            if !last_over.is_some_and(|(_, before, plan)| is_cancelled(plan) && !makes_up_for(spec, before, sink)) {
                last_over = Some((run, spec, known.plan()));
            }
            continue;
        }
        let none = RunPlan::default();
        let plan = known.plan().unwrap_or(&none);
        let shown = state(spec, plan);
        let reason = match (shown, view.waits_for_run(entry, run)) {
            (v1::SnapshotState::Planning, Some(_)) => "WaitsForRun",
            (v1::SnapshotState::Reading, _) => "Reading",
            (v1::SnapshotState::Loading, _) => "Loading",
            (v1::SnapshotState::Paused, _) => "Paused",
            (v1::SnapshotState::Cancelling, _) => "Cancelling",
            _ => "Planning",
        };
        let read = known.read();
        let total: u64 = plan.relations.iter().map(|relation| u64::from(relation.chunks())).sum();
        let why = message(view, entry, run, spec, known.plan());
        let why = if why.is_empty() { String::new() } else { format!("; {why}") };
        let text = format!("run {run}: {} of {total} chunks are read{why}", read.chunks);
        return say(ConditionStatus::False, reason, text, spec.created_at);
    }
    let flow = &entry.flow;
    match last_over {
        Some((run, _, Some(plan))) if plan.state == RunState::Cancelled => {
            let text = format!(
                "run {run} was cancelled before all rows were loaded: `wallaby snapshot start {flow}` loads them"
            );
            say(ConditionStatus::False, "Cancelled", text, plan.at)
        }
        Some((_, spec, plan)) => {
            say(ConditionStatus::True, "Loaded", String::new(), plan.map_or(spec.created_at, |plan| plan.at))
        }
        None if entry.record.document.spec.source.postgres.snapshot == SnapshotMode::Never => {
            let text = "rows that were there before the flow are not loaded (`snapshot: never`)".to_owned();
            say(ConditionStatus::True, "NotWanted", text, entry.record.created_at)
        }
        // Its run was forgotten, long after it ended.
        None => say(ConditionStatus::True, "Loaded", String::new(), entry.record.created_at),
    }
}
