//! The fold of a run's keys: whatever order they come in, what is left is the same.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use proptest::prelude::*;
use wallaby_model::condition::Timestamp;
use wallaby_model::flow::change::sink_anew;
use wallaby_model::run::{Generation, RelationState};
use wallaby_model::schema::TableName;
use wallaby_model::{Epoch, Lsn, WorkerId};

use super::*;

pub(crate) fn relation(table: &str, chunks: u32, restart: u32) -> PlannedRelation {
    let table = TableName::new("public", table);
    PlannedRelation {
        relation: table.clone(),
        table,
        oid: 1,
        table_oid: 0,
        relfilenode: 1,
        pages: chunks,
        chunk_pages: 1,
        restart,
        state: RelationState::Reading,
        rows_estimate: Some(100),
        has_key: true,
    }
}

pub(crate) fn reading(relations: Vec<PlannedRelation>) -> RunPlan {
    let generation =
        Generation { number: 1, consistent_point: Lsn(7), snapshot: Some("1-1".into()), exported_at: Timestamp(1_000) };
    RunPlan { state: RunState::Reading, generations: vec![generation], relations, ..RunPlan::default() }
}

pub(crate) fn done(rows: u64) -> ChunkDone {
    ChunkDone {
        attempt: Epoch(1),
        consistent_point: Lsn(7),
        parts: 1,
        rows,
        bytes: rows * 10,
        checksum: 0,
        worker: worker(),
        took_ms: 100,
    }
}

fn worker() -> WorkerId {
    WorkerId::new("w1").unwrap()
}

fn chunk(table: u32, restart: u32, number: u32) -> ChunkId {
    ChunkId { table, restart, number }
}

fn sink() -> SinkId {
    SinkId::new("warehouse").unwrap()
}

fn copying(tables: &[&str]) -> SinkRun {
    let tables = tables.iter().map(|table| (format!("public.{table}"), TableStage::Copying)).collect();
    SinkRun { tables, ..SinkRun::default() }
}

fn run(plan: RunPlan) -> RunView {
    let mut view = RunView::default();
    view.put_spec(sink_anew(&sink(), Timestamp(1)));
    view.put_plan(plan);
    view
}

#[test]
fn a_sink_loads_what_is_read_of_tables_that_it_has_prepared() {
    let mut view = run(reading(vec![relation("a", 6, 0), relation("b", 2, 0)]));
    for number in 0..6 {
        view.put_done(chunk(0, 0, number), &done(5));
    }
    view.put_done(chunk(1, 0, 1), &done(5));
    assert!(view.loads(&sink()).is_empty(), "it has prepared nothing");
    view.put_sink(&sink(), copying(&["b"]));
    assert_eq!(view.loads(&sink()), [chunk(1, 0, 1)]);
    view.put_sink(&sink(), copying(&["a", "b"]));
    assert_eq!(view.loads(&sink()).len(), LOADS_AT_ONCE);
    for number in 0..6 {
        view.put_loaded(&sink(), chunk(0, 0, number), &ChunkLoaded { rows: 5, worker: worker() });
    }
    assert_eq!(view.loads(&sink()), [chunk(1, 0, 1)]);
    view.put_sink(&sink(), SinkRun { is_done: true, ..copying(&["a", "b"]) });
    assert!(view.loads(&sink()).is_empty());
}

#[test]
fn chunks_of_a_table_that_was_started_again_do_not_count() {
    let mut view = run(reading(vec![relation("a", 2, 0)]));
    view.put_sink(&sink(), copying(&["a"]));
    view.put_done(chunk(0, 0, 0), &done(5));
    view.put_done(chunk(0, 0, 1), &done(5));
    assert_eq!((view.read().rows, view.pending().count()), (10, 0));
    view.put_plan(reading(vec![relation("a", 3, 1)]));
    assert_eq!((view.read().rows, view.pending().count()), (0, 3));
    assert!(view.loads(&sink()).is_empty());
    // One that comes late, by an attempt that did not know.
    view.put_done(chunk(0, 0, 2), &done(5));
    assert_eq!((view.read().rows, view.pending().count()), (0, 3));
}

#[test]
fn nothing_is_read_without_a_snapshot_or_against_the_wish() {
    let plan = || reading(vec![relation("a", 2, 0)]);
    assert!(run(plan()).may_read());
    let mut none = plan();
    none.generations[0].snapshot = None;
    assert!(!run(none).may_read());
    for wish in [RunWish::Pause, RunWish::Cancel] {
        let mut view = run(plan());
        view.put_spec(RunSpec { wish, ..sink_anew(&sink(), Timestamp(1)) });
        assert!(!view.may_read());
    }
    assert!(!run(RunPlan { state: RunState::Loading, ..plan() }).may_read());
}

proptest! {
    /// Chunks read, loaded, plans that start relations again, in any order: what is pending and what is to be loaded is what a
    /// count of everything from nothing says.
    #[test]
    fn the_fold_agrees_with_counting_anew(
        steps in proptest::collection::vec((0u8..4, 0u32..3, 0u32..2, 0u32..5), 1..80)
    ) {
        let mut view = run(reading(vec![relation("a", 4, 0), relation("b", 2, 0)]));
        view.put_sink(&sink(), copying(&["a", "b"]));
        for (kind, table, restart, number) in steps {
            let id = chunk(table, restart, number);
            match kind {
                0 | 1 => view.put_done(id, &done(5)),
                2 => view.put_loaded(&sink(), id, &ChunkLoaded { rows: 5, worker: worker() }),
                _ => view.put_plan(reading(vec![relation("a", 4, restart), relation("b", 1 + number, 0)])),
            }
            let mut anew = view.clone();
            anew.count_anew();
            prop_assert_eq!(&anew.pending, &view.pending);
            prop_assert_eq!(&anew.by_relation, &view.by_relation);
            prop_assert_eq!(anew.unloaded.get(&sink()), view.unloaded.get(&sink()));
            let planned = view.plan().unwrap().chunks().count() as u64;
            prop_assert_eq!(view.read().chunks + view.pending().count() as u64, planned);
            let loaded = view.loaded.get(&sink());
            for load in view.loads(&sink()) {
                prop_assert!(view.done.contains_key(&load));
                prop_assert!(!loaded.is_some_and(|loaded| loaded.contains_key(&load)));
            }
        }
    }
}

#[test]
fn a_sink_that_is_cut_off_again_and_again_rests_longer_each_time() {
    let run = |wish| RunView { spec: Some(RunSpec { wish, ..sink_anew(&sink(), Timestamp(1)) }), ..RunView::default() };
    let other = RunView { spec: Some(sink_anew(&SinkId::new("other").unwrap(), Timestamp(1))), ..RunView::default() };
    let at = |runs: &[RunView]| reattached_at(runs.iter(), &sink(), Timestamp(5)).0 - 5;
    let (in_vain, done) = (run(RunWish::Cancel), run(RunWish::Go));
    assert_eq!(at(&[]), 10_000);
    assert_eq!(at(&[in_vain.clone(), other.clone(), in_vain.clone()]), 40_000);
    assert_eq!(at(&[in_vain.clone(), in_vain.clone(), done]), 10_000);
    assert_eq!(at(&vec![in_vain; 30]), 640_000);
    // Nobody cancelled it: it ended by itself, because its sink was cut off again.
    let ended =
        RunView { plan: Some(RunPlan { state: RunState::Cancelled, ..RunPlan::default() }), ..run(RunWish::Go) };
    assert_eq!(at(&[ended.clone(), ended]), 40_000);
}
