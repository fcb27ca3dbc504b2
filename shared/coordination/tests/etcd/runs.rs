//! Runs, their holds, their chunks; sinks that are cut off and come back.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use wallaby_coordination::{
    Change, ChunkOutcome, Coordination, DetachOutcome, Entry, Error, FlowEntry, Hold, Key, PurgeOutcome, RunIndex,
    WatchEvent, WorkerSession,
};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::flow::change::sink_anew;
use wallaby_model::run::{
    ChunkDone, ChunkLoaded, PlannedRelation, RelationState, RunPlan, RunReason, RunSpec, RunState, RunWish, SinkRun,
    TableStage,
};
use wallaby_model::{ChunkId, Epoch, Lsn, Reader, RunId, TableName, TaskId, TaskKind, WorkerId};
use wallaby_testkit::Seeded;

use crate::setup::*;

const CHUNK: ChunkId = ChunkId { table: 0, restart: 0, number: 0 };

fn asked(tables: &[&str], sinks: &[&str]) -> RunSpec {
    let spec = sink_anew(&sink_id("a"), wallaby_coordination::wall_clock_now());
    RunSpec {
        reason: RunReason::Asked,
        tables: tables.iter().map(|&table| table.to_owned()).collect(),
        sinks: sinks.iter().map(|sink| sink_id(sink)).collect(),
        ..spec
    }
}

fn of(flow: &FlowEntry, kind: TaskKind) -> TaskId {
    TaskId { flow: flow.flow.clone(), kind }
}

fn done(attempt: u64, parts: u32) -> ChunkDone {
    ChunkDone {
        attempt: Epoch(attempt),
        consistent_point: Lsn(100),
        parts,
        rows: 10,
        bytes: 100,
        checksum: attempt,
        worker: WorkerId::new("w1").unwrap(),
        took_ms: 5,
    }
}

fn over() -> RunPlan {
    RunPlan { state: RunState::Done, ..RunPlan::default() }
}

async fn loading(coordination: &Coordination, sinks: &[&str]) -> FlowEntry {
    let mut document = document("shop", sinks);
    document.spec.source.postgres.snapshot = SnapshotMode::Initial;
    coordination.create_flow(document).await.unwrap()
}

#[tokio::test]
async fn a_flow_that_loads_makes_its_runs_in_the_transaction_that_changes_it() {
    let (_scope, coordination) = shared("runs").await;
    let never = coordination.create_flow(document("never", &["a"])).await.unwrap();
    assert!(coordination.runs(&never.flow).await.unwrap().is_empty());

    let flow = loading(&coordination, &["a"]).await;
    let runs = coordination.runs(&flow.flow).await.unwrap();
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].run, runs[0].spec.reason, runs[0].is_over()), (RunId(1), RunReason::FirstLoad, false));
    assert_eq!(runs[0].spec.sinks, [sink_id("a")], "a sink that is added later would be of it");

    let mut grown = flow.record.document.clone();
    grown.spec.sinks.push(document("x", &["b"]).spec.sinks[0].clone());
    grown.spec.source.postgres.publication.tables.push("crm.*".into());
    let refused = coordination.update_flow(&flow, grown.clone(), &BTreeMap::new()).await;
    assert!(matches!(refused, Err(Error::HoldMissing { .. })));
    assert_eq!(coordination.runs(&flow.flow).await.unwrap().len(), 1, "all or nothing");
    let starts = BTreeMap::from([(sink_id("b"), Some(at(5)))]);
    let flow = coordination.update_flow(&flow, grown, &starts).await.unwrap();
    let runs = coordination.runs(&flow.flow).await.unwrap();
    let reasons: Vec<RunReason> = runs.iter().map(|run| run.spec.reason).collect();
    assert_eq!(reasons, [RunReason::FirstLoad, RunReason::TablesAdded, RunReason::SinkAnew]);
    assert_eq!(runs[1].spec.sinks, [sink_id("a")]);

    let deleting = coordination.mark_flow_deleting(&flow).await.unwrap();
    let refused = coordination.create_run(&deleting, asked(&[], &[])).await;
    assert!(matches!(refused, Err(Error::FlowDeleting(_))));
    coordination.remove_flow(&deleting).await.unwrap();
    assert!(coordination.list(&coordination.keys().flow(&flow.flow)).await.unwrap().is_empty());
    assert!(matches!(coordination.run(&flow.flow, RunId(1)).await, Err(Error::RunNotFound { .. })));
}

#[tokio::test]
async fn a_run_goes_its_way_and_leaves_only_what_is_worth_keeping() {
    let (_scope, coordination) = shared("run").await;
    let flow = loading(&coordination, &["a"]).await;
    let name = &flow.flow;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let owner = take(&session, &of(&flow, TaskKind::Run(RunId(1))), flow.revision).await;
    owner.put_plan(RunId(1), &RunPlan::default()).await.unwrap();
    assert!(matches!(owner.put_plan(RunId(7), &RunPlan::default()).await, Err(Error::RunNotFound { .. })));
    assert!(matches!(owner.finish_run(RunId(1), &RunPlan::default()).await, Err(Error::Refused { .. })));
    assert!(!coordination.clear_run(name, RunId(1)).await.unwrap(), "it is not over");

    // More chunks than one transaction has operations, each with its task's keys.
    for number in 0..130 {
        let chunk = ChunkId { number, ..CHUNK };
        let reader = take(&session, &of(&flow, TaskKind::Chunk(RunId(1), chunk)), flow.revision).await;
        assert_eq!(reader.put_chunk_done(RunId(1), chunk, &done(1, 1)).await.unwrap(), ChunkOutcome::Ours);
        match number {
            0 => drop(reader.fix_epoch(None).await.unwrap()),
            _ => reader.complete().await.unwrap(),
        }
    }
    let loader = take(&session, &of(&flow, TaskKind::Load(sink_id("a"), RunId(1), CHUNK)), flow.revision).await;
    let loaded = ChunkLoaded { rows: 10, worker: WorkerId::new("w1").unwrap() };
    loader.put_loaded(RunId(1), &sink_id("a"), CHUNK, &loaded).await.unwrap();
    loader.fix_epoch(None).await.unwrap();
    loader.complete().await.unwrap();
    assert!(coordination.list(&coordination.keys().task(loader.task())).await.unwrap().is_empty());
    let apply = take(&session, &TaskId::apply(name, &sink_id("a")), flow.revision).await;
    apply.put_sink_run(RunId(1), &sink_id("a"), &SinkRun { is_done: true, ..SinkRun::default() }).await.unwrap();
    assert_eq!(coordination.run_chunks(name, RunId(1)).await.unwrap().len(), 130);
    assert_eq!(coordination.run_loaded(name, RunId(1), &sink_id("a")).await.unwrap().len(), 1);

    owner.put_hold(RunId(1), Some(at(5))).await.unwrap();
    owner.finish_run(RunId(1), &over()).await.unwrap();
    assert!(!coordination.holds(name).await.unwrap().contains_key(&Reader::Run(RunId(1))), "its hold went with it");
    assert!(coordination.clear_run(name, RunId(1)).await.unwrap());
    assert!(coordination.clear_run(name, RunId(1)).await.unwrap(), "twice is no harm");
    let keys = coordination.keys();
    for prefix in [keys.chunks(name, RunId(1)), keys.loaded(name, RunId(1)), keys.chunk_tasks(name, RunId(1))] {
        assert!(coordination.list(&prefix).await.unwrap().is_empty(), "{prefix}");
    }
    let kept = coordination.run(name, RunId(1)).await.unwrap();
    assert_eq!(kept.plan.unwrap().totals.map(|totals| (totals.chunks, totals.rows)), Some((130, 1300)));
    assert!(coordination.sink_run(name, RunId(1), &sink_id("a")).await.unwrap().unwrap().is_done);

    // Ten of those that are over stay; numbers are not given again.
    for number in 2..=13 {
        let run = coordination.create_run(&flow, asked(&[], &[])).await.unwrap().run;
        assert_eq!(run, RunId(number));
        let owner = take(&session, &of(&flow, TaskKind::Run(run)), flow.revision).await;
        owner.finish_run(run, &over()).await.unwrap();
        coordination.clear_run(name, run).await.unwrap();
    }
    let kept: Vec<u32> = coordination.runs(name).await.unwrap().iter().map(|run| run.run.0).collect();
    assert_eq!(kept, (4..=13).collect::<Vec<_>>());
    assert!(coordination.list(&keys.run(name, RunId(1))).await.unwrap().is_empty());
}

/// Makes a run of its own table and ends it; it is not cleared.
async fn ended_run(coordination: &Coordination, flow: &FlowEntry, session: &WorkerSession, table: &str) -> RunId {
    let run = coordination.create_run(flow, asked(&[table], &["a"])).await.unwrap().run;
    let owner = take(session, &of(flow, TaskKind::Run(run)), flow.revision).await;
    owner.finish_run(run, &over()).await.unwrap();
    owner.complete().await.unwrap();
    run
}

async fn index_of(coordination: &Coordination, flow: &FlowEntry) -> RunIndex {
    coordination.get(&Key::RunIndex(flow.flow.clone())).await.unwrap().unwrap().decode().unwrap()
}

#[tokio::test]
async fn what_an_interrupted_forgetting_left_goes_with_the_next_run_that_is_cleared() {
    let (scope, coordination) = shared("dangling").await;
    let flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    // Numbers of which nothing stands, more than there are runs at most.
    let index_key = coordination.keys().text(&Key::RunIndex(flow.flow.clone()));
    let write = async |index: &RunIndex| {
        let value = serde_json::to_vec(index).unwrap();
        scope.client().put(index_key.clone(), value, None).await.unwrap();
    };
    write(&RunIndex { last: 50, kept: (1..=50).map(RunId).collect() }).await;
    let first = ended_run(&coordination, &flow, &session, "public.t1").await;
    assert_eq!(first, RunId(51));
    coordination.clear_run(&flow.flow, first).await.unwrap();
    assert_eq!(index_of(&coordination, &flow).await, RunIndex { last: 51, kept: vec![first] });

    // Keys of a run that the index has forgotten.
    write(&RunIndex { last: 51, kept: Vec::new() }).await;
    let keys = coordination.keys().run(&flow.flow, first);
    assert!(!coordination.list(&keys).await.unwrap().is_empty());
    assert!(coordination.clear_run(&flow.flow, first).await.unwrap());
    assert_eq!(coordination.list(&keys).await.unwrap(), Vec::new());
    assert!(matches!(coordination.run(&flow.flow, first).await, Err(Error::RunNotFound { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_made_while_old_ones_are_forgotten_leaves_no_number_without_its_keys() {
    let (_scope, coordination) = shared("forget").await;
    let flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    for round in 0..10 {
        ended_run(&coordination, &flow, &session, &format!("public.first{round}")).await;
    }
    let mut random = StdRng::seeded();
    for round in 0..20 {
        let run = ended_run(&coordination, &flow, &session, &format!("public.t{round}")).await;
        let clearing = tokio::spawn({
            let (coordination, flow) = (coordination.clone(), flow.flow.clone());
            async move { coordination.clear_run(&flow, run).await }
        });
        // Somewhere between the reading of the index and its writing.
        tokio::time::sleep(Duration::from_micros(random.random_range(0..20_000))).await;
        let made = coordination.create_run(&flow, asked(&[&format!("public.m{round}")], &["a"])).await.unwrap().run;
        assert!(clearing.await.unwrap().unwrap());
        let stand: Vec<RunId> = coordination.runs(&flow.flow).await.unwrap().into_iter().map(|run| run.run).collect();
        assert_eq!(index_of(&coordination, &flow).await.kept, stand, "round {round}: a number without its keys");
        let owner = take(&session, &of(&flow, TaskKind::Run(made)), flow.revision).await;
        owner.finish_run(made, &over()).await.unwrap();
        owner.complete().await.unwrap();
    }
}

#[tokio::test]
async fn only_runs_that_are_not_over_are_too_many() {
    let (_scope, coordination) = shared("toomany").await;
    let flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    // Over, and cleared by nobody yet.
    for round in 0..12 {
        ended_run(&coordination, &flow, &session, &format!("public.old{round}")).await;
    }
    for round in 0..32 {
        coordination.create_run(&flow, asked(&[&format!("public.t{round}")], &["a"])).await.unwrap();
    }
    let refused = coordination.create_run(&flow, asked(&["public.more"], &["a"])).await.unwrap_err();
    assert!(matches!(refused, Error::TooManyRuns { open: 32, .. }), "{refused}");
}

/// A sink that is removed and added again is another one: what was asked for the first is not for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_goes_is_taken_out_of_the_runs_that_are_not_over() {
    let (_scope, coordination) = shared("gone").await;
    let mut flow = coordination.create_flow(document("shop", &["a", "b"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let make = async |flow: &FlowEntry, table: &str, sinks: &[&str]| {
        coordination.create_run(flow, asked(&[table], sinks)).await.unwrap().run
    };
    let ended = make(&flow, "public.ended", &["a", "b"]).await;
    let owner = take(&session, &of(&flow, TaskKind::Run(ended)), flow.revision).await;
    owner.finish_run(ended, &over()).await.unwrap();
    for round in 0..25 {
        let both = make(&flow, &format!("public.t{round}"), &["a", "b"]).await;
        let alone = make(&flow, &format!("public.alone{round}"), &["b"]).await;
        // Somebody changes what is wanted of the run meanwhile, again and again: neither change is lost. Fewer times than a change
        // of a flow is tried: who never lets go of a run would keep a slow change of its flow out of turn after turn.
        let (ended, is_over) = tokio::sync::oneshot::channel::<()>();
        let wishing = tokio::spawn({
            let (coordination, name) = (coordination.clone(), flow.flow.clone());
            async move {
                for wish in [RunWish::Pause, RunWish::Go].into_iter().cycle().take(12) {
                    coordination.set_run_wish(&name, both, wish).await.unwrap();
                    let seen = coordination.run(&name, both).await.unwrap().spec.wish;
                    assert_eq!(seen, wish, "round {round}: it was wanted otherwise");
                    if ended.is_closed() {
                        return;
                    }
                }
            }
        });
        let without = coordination.update_flow(&flow, document("shop", &["a"]), &BTreeMap::new()).await.unwrap();
        drop(is_over);
        wishing.await.unwrap();
        let seen = coordination.run(&flow.flow, both).await.unwrap().spec.sinks;
        assert_eq!(seen, [sink_id("a")], "round {round}");
        let seen = coordination.run(&flow.flow, alone).await.unwrap().spec;
        assert_eq!(
            (seen.sinks, seen.wish),
            (vec![sink_id("b")], RunWish::Cancel),
            "without a sink it would be for all"
        );
        let starts = BTreeMap::from([(sink_id("b"), Some(at(5)))]);
        flow = coordination.update_flow(&without, document("shop", &["a", "b"]), &starts).await.unwrap();
        for run in [both, alone] {
            let owner = take(&session, &of(&flow, TaskKind::Run(run)), flow.revision).await;
            owner.finish_run(run, &over()).await.unwrap();
            owner.complete().await.unwrap();
        }
    }
    assert_eq!(coordination.run(&flow.flow, ended).await.unwrap().spec.sinks, [sink_id("a"), sink_id("b")]);
}

/// A plan over so many tables, each of one name, size and oid or another.
fn plan_over(tables: u32, random: &mut StdRng) -> RunPlan {
    let relation = |number: u32| {
        let table = TableName::new("public", format!("{:x}_{number}", random.random::<u32>()));
        PlannedRelation {
            relation: table.clone(),
            table,
            oid: random.random(),
            table_oid: 0,
            relfilenode: random.random(),
            pages: random.random_range(0..1_000_000),
            chunk_pages: random.random_range(1..8192),
            restart: 0,
            state: RelationState::Reading,
            rows_estimate: Some(random.random_range(0..1_000_000_000)),
            has_key: true,
        }
    };
    RunPlan { state: RunState::Reading, relations: (0..tables).map(relation).collect(), ..RunPlan::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_over_twenty_thousand_tables_is_planned_and_one_over_far_more_says_why_not() {
    let (_scope, coordination) = shared("wide").await;
    let flow = loading(&coordination, &["a"]).await;
    let (name, run) = (&flow.flow, RunId(1));
    let mut random = StdRng::seeded();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let owner = take(&session, &of(&flow, TaskKind::Run(run)), flow.revision).await;
    let mut watch = coordination.watch(coordination.keys().flows());
    let plan = plan_over(20_000, &mut random);
    owner.put_plan(run, &plan).await.unwrap();
    assert_eq!(coordination.run(name, run).await.unwrap().plan.unwrap(), plan);
    let is_plan = |entry: &Entry| matches!(&entry.key, Key::RunPlan(..));
    let watched = async {
        loop {
            let entries = match watch.next().await.unwrap() {
                WatchEvent::Snapshot { entries, .. } => entries,
                WatchEvent::Changes(changes) => changes
                    .into_iter()
                    .filter_map(|change| if let Change::Put(entry) = change { Some(entry) } else { None })
                    .collect(),
            };
            if let Some(entry) = entries.iter().find(|entry| is_plan(entry)) {
                return entry.decode::<RunPlan>().unwrap();
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, watched).await.unwrap(), plan);

    let apply = take(&session, &TaskId::apply(name, &sink_id("a")), flow.revision).await;
    let tables = plan.relations.iter().map(|relation| relation.table.to_string());
    let state = SinkRun {
        tables: tables.clone().map(|table| (table, TableStage::Ready)).collect(),
        handed_over: tables.zip(1..).map(|(table, number)| (table, at(number))).collect(),
        ..SinkRun::default()
    };
    apply.put_sink_run(run, &sink_id("a"), &state).await.unwrap();
    assert_eq!(coordination.sink_run(name, run, &sink_id("a")).await.unwrap().unwrap(), state);

    // A table of any size is one entry of the plan.
    let mut larger = plan.clone();
    (larger.relations[0].pages, larger.relations[0].chunk_pages) = (u32::MAX, 1);
    owner.put_plan(run, &larger).await.unwrap();

    let refused = owner.put_plan(run, &plan_over(120_000, &mut random)).await.unwrap_err();
    let said = refused.to_string();
    assert!(matches!(refused, Error::TooLarge { .. }) && said.contains("runs/1/plan"), "{said}");
    assert!(said.contains("fewer tables by name or in one snapshot run"), "{said}");
    let over = RunPlan { state: RunState::Cancelled, ..larger };
    owner.finish_run(run, &over).await.unwrap();
    assert!(coordination.clear_run(name, run).await.unwrap());
    let kept = coordination.run(name, run).await.unwrap().plan.unwrap();
    assert_eq!(kept.relations, over.relations);
}

#[tokio::test]
async fn what_is_wanted_of_a_run_changes_until_it_is_over() {
    let (_scope, coordination) = shared("wish").await;
    let flow = loading(&coordination, &["a"]).await;
    let wish = async |wish| coordination.set_run_wish(&flow.flow, RunId(1), wish).await.map(|run| run.spec.wish);
    assert_eq!(wish(RunWish::Pause).await.unwrap(), RunWish::Pause);
    assert_eq!(wish(RunWish::Go).await.unwrap(), RunWish::Go);
    assert_eq!(wish(RunWish::Cancel).await.unwrap(), RunWish::Cancel);
    assert!(matches!(wish(RunWish::Go).await, Err(Error::RunOver { .. })));
    let unknown = coordination.set_run_wish(&flow.flow, RunId(5), RunWish::Go).await;
    assert!(matches!(unknown, Err(Error::RunNotFound { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_runs_over_one_table_one_is_made() {
    let (_scope, coordination) = shared("race").await;
    let flow = coordination.create_flow(document("shop", &["a", "b"])).await.unwrap();
    for round in 0..20 {
        let make = |spec| {
            let (coordination, flow) = (coordination.clone(), flow.clone());
            tokio::spawn(async move { coordination.create_run(&flow, spec).await })
        };
        let table = format!("public.t{round}");
        let same = [make(asked(&[&table], &["a"])), make(asked(&["public.*"], &["a"])), make(asked(&[], &["a"]))];
        let mut made = Vec::new();
        for outcome in same {
            match outcome.await.unwrap() {
                Ok(run) => made.push(run.run),
                Err(Error::RunOverlaps { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(made.len(), 1, "runs over one table at one sink");
        // At another sink it is another matter.
        let other = coordination.create_run(&flow, asked(&[&table], &["b"])).await.unwrap().run;
        assert!(other > made[0]);
        for run in [made[0], other] {
            coordination.set_run_wish(&flow.flow, run, RunWish::Cancel).await.unwrap();
            let session = worker(&coordination, &format!("w{run}"), lease(10, true)).await;
            let owner = take(&session, &of(&flow, TaskKind::Run(run)), flow.revision).await;
            owner.finish_run(run, &RunPlan { state: RunState::Cancelled, ..RunPlan::default() }).await.unwrap();
            coordination.clear_run(&flow.flow, run).await.unwrap();
            session.revoke().await.unwrap();
        }
    }
    let numbers: Vec<u32> = coordination.runs(&flow.flow).await.unwrap().iter().map(|run| run.run.0).collect();
    assert_eq!(numbers, (31..=40).collect::<Vec<_>>());
}

/// Invariant 7: as long as one sink of it need not wait, a run over the same tables is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_over_the_same_tables_is_refused_only_when_every_sink_is_about_to_have_them() {
    let (_scope, coordination) = shared("overlap").await;
    let flow = loading(&coordination, &["a", "b"]).await;
    let make = async |tables: &[&str]| match coordination.create_run(&flow, asked(tables, &[])).await {
        Ok(run) => Ok(run.run),
        Err(Error::RunOverlaps { run, .. }) => Err(run),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(make(&["public.t"]).await, Err(RunId(1)));
    // The first load has the one sink alive; the other may never come.
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let apply = take(&session, &TaskId::apply(&flow.flow, &sink_id("a")), flow.revision).await;
    let done = SinkRun { is_done: true, ..SinkRun::default() };
    apply.put_sink_run(RunId(1), &sink_id("a"), &done).await.unwrap();
    assert_eq!(make(&["public.t"]).await, Ok(RunId(2)));
    assert_eq!(make(&["public.*"]).await, Err(RunId(1)), "now it is about to have them");
    assert_eq!(make(&["other.t"]).await, Ok(RunId(3)));
    // A sink that is cut off gets nothing from the runs before the one that will bring it back, of which this would be another.
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    let hold = coordination.holds(&flow.flow).await.unwrap()[&Reader::Sink(sink_id("b"))];
    assert_eq!(capture.detach_sink(&sink_id("b"), hold, "it slept").await.unwrap(), DetachOutcome::Detached);
    assert_eq!(make(&["public.t"]).await, Err(RunId(1)));
    let back = coordination.reattach_sink(&flow, &sink_id("b"), None).await.unwrap();
    assert_eq!(make(&["public.t"]).await, Err(RunId(1)), "{back} loads it into the one, run 2 into the other");
    coordination.set_run_wish(&flow.flow, back, RunWish::Cancel).await.unwrap();
    assert_eq!(make(&["public.t"]).await, Ok(RunId(back.0 + 1)));
}

/// Hazard 10 for a run: its hold is there before the purge, or it is refused; never a hole under it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_runs_hold_and_a_purge_that_runs_never_miss_each_other() {
    let (_scope, coordination) = shared("h10run").await;
    let flow = loading(&coordination, &["a"]).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    let run = take(&session, &of(&flow, TaskKind::Run(RunId(1))), flow.revision).await;
    let (mut runs_won, mut purges_won) = (0, 0);
    let mut random = StdRng::seeded();
    for round in 1..=150_u64 {
        let (high, start) = (at(1000 * round), at(1000 * round - 1));
        capture.advance_hold(sink_id("a"), high).await.unwrap();
        let purging = tokio::spawn({
            let capture = capture.clone();
            async move { capture.advance_purge_point(high).await.unwrap() }
        });
        let holding = tokio::spawn({
            let run = run.clone();
            let head_start =
                Duration::from_micros(if random.random_bool(0.5) { random.random_range(0..2000) } else { 0 });
            async move {
                if !head_start.is_zero() {
                    tokio::time::sleep(head_start).await;
                }
                run.put_hold(RunId(1), Some(start)).await
            }
        });
        let (purged, held) = (purging.await.unwrap(), holding.await.unwrap());
        let PurgeOutcome::UpTo(purged) = purged else { panic!("all holds have positions") };
        match held {
            Ok(hold) => {
                runs_won += 1;
                assert_eq!(hold, Hold { position: Some(start) });
                assert!(purged <= start, "the log was purged up to {purged} under a run that holds {start}");
                // A second owner finds it, and asks in vain for a later one.
                assert_eq!(run.put_hold(RunId(1), Some(high)).await.unwrap(), hold);
                run.delete_hold(RunId(1)).await.unwrap();
                run.delete_hold(RunId(1)).await.unwrap();
            }
            Err(Error::HoldBelowPurge { purged: seen, .. }) => {
                purges_won += 1;
                assert_eq!((purged, seen), (high, high), "refused for no reason");
            }
            Err(error) => panic!("{error}"),
        }
    }
    println!("{runs_won} runs were first, {purges_won} purges");
    assert!(runs_won > 0 && purges_won > 0, "no race took place: {runs_won} to {purges_won}");
}

/// Hazard 23: two attempts at one chunk. One of them is the chunk, and both hear which.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_of_two_attempts_at_a_chunk_one_is_the_chunk() {
    let (_scope, coordination) = shared("h23").await;
    let flow = loading(&coordination, &["a"]).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    for number in 0..30 {
        let chunk = ChunkId { number, ..CHUNK };
        let task = of(&flow, TaskKind::Chunk(RunId(1), chunk));
        // The lock guards a task against its former owners; two writers under one lock are what is left of an attempt that was
        // given up and one that took over in the same worker.
        let lock = take(&session, &task, flow.revision).await;
        let write = |attempt: u64| {
            let lock = lock.clone();
            tokio::spawn(async move { lock.put_chunk_done(RunId(1), chunk, &done(attempt, attempt as u32)).await })
        };
        let (first, second) = (write(1), write(2));
        let outcomes = [first.await.unwrap().unwrap(), second.await.unwrap().unwrap()];
        let stands = coordination.run_chunk(&flow.flow, RunId(1), chunk).await.unwrap().unwrap();
        assert_eq!(stands, done(stands.attempt.0, stands.attempt.0 as u32), "never mixed");
        for (attempt, outcome) in (1..).zip(outcomes) {
            let expected = if stands.attempt == Epoch(attempt) {
                ChunkOutcome::Ours
            } else {
                ChunkOutcome::Theirs(stands.clone())
            };
            assert_eq!(outcome, expected, "attempt {attempt}");
        }
        // The winner asks again, because an answer was lost.
        let again = lock.put_chunk_done(RunId(1), chunk, &stands).await.unwrap();
        assert_eq!(again, ChunkOutcome::Ours);
        lock.complete().await.unwrap();
        // A zombie of a lock that is gone writes nothing.
        let zombie = lock.put_chunk_done(RunId(1), ChunkId { number: 1000 + number, ..CHUNK }, &done(9, 9)).await;
        assert!(matches!(zombie, Err(Error::LockLost { .. })), "{zombie:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_moves_on_is_not_cut_off_for_where_it_was() {
    let (_scope, coordination) = shared("detach").await;
    let flow = coordination.create_flow(document("shop", &["a", "b"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    let apply = take(&session, &TaskId::apply(&flow.flow, &sink_id("a")), flow.revision).await;
    apply.advance_hold(sink_id("a"), at(1)).await.unwrap();
    let (mut detached, mut moved) = (0, 0);
    let mut random = StdRng::seeded();
    for round in 1..=400_u64 {
        // Who wins depends on how fast the machine is: until both have.
        if round > 60 && detached > 0 && moved > 0 {
            break;
        }
        let judged = coordination.holds(&flow.flow).await.unwrap()[&reader("a")];
        let moving = tokio::spawn({
            let apply = apply.clone();
            let pause = Duration::from_micros(random.random_range(0..1500));
            async move {
                tokio::time::sleep(pause).await;
                apply.advance_hold(sink_id("a"), at(10 * round)).await
            }
        });
        // Either may come first.
        tokio::time::sleep(Duration::from_micros(random.random_range(0..4000))).await;
        let cut = capture.detach_sink(&sink_id("a"), judged, "it is too far behind").await.unwrap();
        let moving = moving.await.unwrap();
        match cut {
            DetachOutcome::Moved(hold) => {
                moved += 1;
                moving.unwrap();
                assert_eq!(hold, Hold { position: Some(at(10 * round)) });
                assert!(coordination.detached(&flow.flow, &sink_id("a")).await.unwrap().is_none());
            }
            DetachOutcome::Detached => {
                detached += 1;
                assert!(matches!(moving, Err(Error::HoldGone { .. })), "{moving:?}");
                let record = coordination.detached(&flow.flow, &sink_id("a")).await.unwrap().unwrap();
                assert_eq!((record.position, record.run), (judged.position, None));
                assert_eq!(capture.detach_sink(&sink_id("a"), judged, "again").await.unwrap(), DetachOutcome::Detached);
                let run = coordination.reattach_sink(&flow, &sink_id("a"), Some(at(10 * round))).await.unwrap();
                assert_eq!(coordination.reattach_sink(&flow, &sink_id("a"), None).await.unwrap(), run, "once");
                apply.clear_detached(&sink_id("a"), RunId(run.0 - 1)).await.unwrap();
                assert!(coordination.detached(&flow.flow, &sink_id("a")).await.unwrap().is_some(), "an earlier run's");
                // One that was made for it was cancelled, every other time.
                let by = RunId(run.0 + detached % 2);
                apply.clear_detached(&sink_id("a"), by).await.unwrap();
                assert!(coordination.detached(&flow.flow, &sink_id("a")).await.unwrap().is_none());
                let owner = take(&session, &of(&flow, TaskKind::Run(run)), flow.revision).await;
                owner.finish_run(run, &over()).await.unwrap();
                coordination.clear_run(&flow.flow, run).await.unwrap();
            }
        }
    }
    println!("{detached} times cut off, {moved} times it had moved");
    assert!(detached > 0 && moved > 0, "no race took place: {detached} to {moved}");
    let error = coordination.reattach_sink(&flow, &sink_id("a"), None).await;
    assert!(matches!(error, Err(Error::NotDetached { .. })));
}
