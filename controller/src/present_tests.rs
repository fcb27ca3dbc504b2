//! What people are told, for each situation.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use wallaby_coordination::{Entry, FlowRecord, Key, LockRecord, Revision, WatchEvent};
use wallaby_model::flow::{page::EXAMPLE, parse};
use wallaby_model::{Epoch, FlowId, Lsn, Position};

use super::*;

/// A world to look at: the example flow, with what a test adds.
struct World {
    entries: Vec<Entry>,
    record: FlowRecord,
}

fn key_task(text: &str) -> TaskId {
    text.parse().unwrap()
}

impl World {
    fn new() -> World {
        let document = parse(EXAMPLE, "-").unwrap();
        let created_at = Timestamp(1_000);
        World {
            entries: Vec::new(),
            record: FlowRecord {
                document,
                generation: 3,
                resumes: 0,
                created_at,
                deleting_since: None,
                sinks_since: std::collections::BTreeMap::new(),
            },
        }
    }

    fn put(&mut self, key: Key, value: &impl serde::Serialize) {
        let value = serde_json::to_vec(value).unwrap();
        let revision = Revision(40 + self.entries.len() as i64);
        self.entries.push(Entry { key, value, create_revision: revision, mod_revision: revision, lease: 0 });
    }

    fn worker(mut self, name: &str, capacity: u32) -> World {
        let info = WorkerInfo {
            capacity,
            load: 0,
            version: "1".into(),
            zone: None,
            capabilities: Vec::new(),
            address: "h:1".into(),
            draining: false,
            started_at: Timestamp(1),
        };
        self.put(Key::Worker(WorkerId::new(name).unwrap()), &info);
        self
    }

    fn owned(mut self, task: &str, worker: &str) -> World {
        let lock =
            LockRecord { worker: WorkerId::new(worker).unwrap(), address: "h:1".into(), attempt: uuid::Uuid::nil() };
        self.put(Key::TaskLock(key_task(task)), &lock);
        self
    }

    fn status(mut self, task: &str, worker: &str, phase: TaskPhase, edit: impl FnOnce(&mut TaskStatus)) -> World {
        let mut status = TaskStatus {
            phase,
            phase_since: Timestamp(2_000),
            worker: Some(WorkerId::new(worker).unwrap()),
            epoch: Some(Epoch(99)),
            generation: 3,
            at: Timestamp(3_000),
            ..TaskStatus::default()
        };
        edit(&mut status);
        self.put(Key::TaskStatus(key_task(task)), &status);
        self
    }

    /// Both tasks owned by one worker and streaming.
    fn running() -> World {
        World::new()
            .worker("w1", 8)
            .owned("shop.capture", "w1")
            .owned("shop.apply.warehouse", "w1")
            .status("shop.capture", "w1", TaskPhase::Streaming, |status| {
                status.progress.staged = Some(Position::before(Lsn(7)));
                status.progress.rows = 5;
                status.progress.lag_ms = Some(12);
            })
            .status("shop.apply.warehouse", "w1", TaskPhase::Streaming, |status| status.progress.lag_ms = Some(3))
    }

    fn shown(mut self) -> v1::Flow {
        let record = self.record.clone();
        self.put(Key::FlowSpec(FlowId::new("shop").unwrap()), &record);
        let mut view = View::default();
        view.take(WatchEvent::Snapshot { entries: self.entries, revision: Revision(100) });
        let entry = view.flows().next().unwrap().clone();
        flow(&view, &entry)
    }
}

fn phase_of(flow: &v1::Flow) -> v1::Phase {
    v1::Phase::try_from(flow.status.as_ref().unwrap().phase).unwrap()
}

#[track_caller]
fn condition<'a>(flow: &'a v1::Flow, kind: &str) -> &'a v1::Condition {
    let status = flow.status.as_ref().unwrap();
    let all = status.conditions.iter().chain(status.sinks.iter().flat_map(|sink| &sink.conditions));
    all.into_iter().find(|condition| condition.r#type == kind).unwrap()
}

#[test]
fn a_flow_nobody_has_taken_says_what_to_do() {
    let flow = World::new().shown();
    assert_eq!(phase_of(&flow), v1::Phase::Pending);
    let capturing = condition(&flow, "Capturing");
    assert_eq!(capturing.reason, "NoWorker");
    assert!(capturing.message.contains("start one with `wallaby-worker`"), "{}", capturing.message);
    assert_eq!(flow.status.unwrap().observed_generation, 0);

    let flow = World::new().worker("w1", 8).shown();
    assert_eq!(condition(&flow, "Capturing").reason, "Offered");

    let flow = World::new().worker("w1", 1).owned("other.capture", "w1").shown();
    let delivering = condition(&flow, "Delivering");
    assert_eq!(delivering.reason, "NoCapacity");
    assert!(delivering.message.contains("--capacity"));
}

#[test]
fn a_flow_that_runs_is_running() {
    let flow = World::running().shown();
    assert_eq!(phase_of(&flow), v1::Phase::Running);
    for kind in ["Accepted", "Capturing", "Delivering", "CaughtUp"] {
        assert_eq!(condition(&flow, kind).status, i32::from(v1::ConditionStatus::True), "{kind}");
    }
    let status = flow.status.unwrap();
    assert_eq!(status.observed_generation, 3);
    assert_eq!(
        (status.tasks[0].task.as_str(), status.tasks[0].worker.as_str(), status.tasks[0].epoch),
        ("shop.capture", "w1", 99)
    );
    assert_eq!(status.capture.unwrap().rows_total, 5);
}

#[test]
fn the_word_of_an_owner_that_lost_its_lock_does_not_count() {
    let world = World::new().worker("w1", 8).status("shop.capture", "w1", TaskPhase::Streaming, |status| {
        status.progress.staged = Some(Position::before(Lsn(7)));
    });
    let flow = world.shown();
    assert_eq!(condition(&flow, "Capturing").status, i32::from(v1::ConditionStatus::False));
    assert_eq!(phase_of(&flow), v1::Phase::Degraded);
    assert!(!flow.status.unwrap().capture.unwrap().staged_position.is_empty(), "how far it came is still true");

    let world = World::new().worker("w2", 8).owned("shop.capture", "w2");
    let flow = world.status("shop.capture", "w1", TaskPhase::Streaming, |_| {}).shown();
    assert_eq!(condition(&flow, "Capturing").reason, "TakingOver");
    assert_eq!(flow.status.unwrap().tasks[0].state, "LOCKED");
}

#[test]
fn a_task_that_waits_for_a_person_blocks_the_flow() {
    let world = World::running().status("shop.apply.warehouse", "w1", TaskPhase::Stopped, |status| {
        status.last_error = Some("column x is missing: run ALTER TABLE".into());
    });
    let flow = world.shown();
    assert_eq!(phase_of(&flow), v1::Phase::Blocked);
    let delivering = condition(&flow, "Delivering");
    assert!(delivering.message.contains("ALTER TABLE") && delivering.message.contains("wallaby resume"));
    let status = flow.status.unwrap();
    assert!(status.sinks[0].task.as_ref().unwrap().stopped);
}

#[test]
fn a_task_that_retries_degrades_the_flow() {
    let world = World::running().status("shop.capture", "w1", TaskPhase::Backoff, |status| {
        status.last_error = Some("the source is away".into());
        status.retry_at = Some(Timestamp(9_000));
    });
    let flow = world.shown();
    assert_eq!(phase_of(&flow), v1::Phase::Degraded);
    assert_eq!(condition(&flow, "Capturing").message, "the source is away");
}

#[test]
fn pauses_and_deletions_are_told_apart() {
    let mut world = World::new().worker("w1", 8);
    world.record.document.spec.paused = true;
    let flow = world.shown();
    assert_eq!(phase_of(&flow), v1::Phase::Paused);
    assert!(condition(&flow, "Capturing").message.contains("`wallaby resume shop` lets it go on"));

    let mut world = World::running();
    world.record.document.spec.sinks[0].paused = true;
    let flow = world.shown();
    assert_eq!(phase_of(&flow), v1::Phase::Running, "a sink paused by request is no trouble");
    let message = &condition(&flow, "Delivering").message;
    assert!(message.contains("`wallaby resume shop/warehouse`") && message.contains("it is cut off"), "{message}");

    let mut world = World::running();
    world.record.document.spec.sinks[0].paused = true;
    world.record.document.spec.sinks[0].on_overrun = OnOverrun::Backpressure;
    let flow = world.shown();
    let message = &condition(&flow, "Delivering").message;
    assert!(message.contains("the flow waits for it") && !message.contains("cut off"), "{message}");

    let mut world = World::new();
    world.record.deleting_since = Some(Timestamp(5));
    assert_eq!(phase_of(&world.shown()), v1::Phase::Deleting);
}

#[test]
fn a_literal_secret_is_never_shown() {
    let mut world = World::new();
    world.record.document.spec.source.postgres.dsn = wallaby_model::flow::SecretRef::Value("hunter2".into());
    world.record.document.spec.sinks[0].postgres.dsn = wallaby_model::flow::SecretRef::Value("hunter2".into());
    assert!(!format!("{:?}", world.shown()).contains("hunter2"));
}

#[test]
fn a_flow_that_this_version_cannot_act_upon_is_blocked() {
    let mut world = World::running();
    world.record.document.spec.source.postgres.publication.tables.clear();
    let flow = world.shown();
    assert_eq!(phase_of(&flow), v1::Phase::Blocked);
    assert!(condition(&flow, "Accepted").message.contains("publication"));
}

mod of_runs {
    //! Runs: which tasks they need, and what is said of them.
    use wallaby_coordination::Detached;
    use wallaby_model::flow::{OnExceeded, SnapshotMode};
    use wallaby_model::run::{ChunkDone, RunPlan, RunReason, RunSpec, RunState, RunWish, SinkRun, TableStage};
    use wallaby_model::{ChunkId, RunId, SinkId};

    use super::*;
    use crate::runs::tests::{done, reading, relation};

    const RUN: RunId = RunId(1);

    fn shop() -> FlowId {
        FlowId::new("shop").unwrap()
    }

    fn chunk(number: u32) -> ChunkId {
        ChunkId { table: 0, restart: 0, number }
    }

    fn spec(edit: impl FnOnce(&mut RunSpec)) -> RunSpec {
        let anew = wallaby_model::flow::change::sink_anew(&SinkId::new("warehouse").unwrap(), Timestamp(1_500));
        let mut spec = RunSpec { reason: RunReason::FirstLoad, sinks: Vec::new(), readers: 2, ..anew };
        edit(&mut spec);
        spec
    }

    impl World {
        fn run(mut self, run: RunId, spec: &RunSpec, plan: Option<&RunPlan>) -> World {
            self.record.document.spec.source.postgres.snapshot = SnapshotMode::Initial;
            self.put(Key::RunSpec(shop(), run), spec);
            if let Some(plan) = plan {
                self.put(Key::RunPlan(shop(), run), plan);
            }
            self
        }

        fn read(mut self, number: u32, done: &ChunkDone) -> World {
            self.put(Key::RunChunk(shop(), RUN, chunk(number)), done);
            self
        }

        fn copying(mut self) -> World {
            let tables = [("public.a".to_owned(), TableStage::Copying)].into();
            let sink = SinkId::new("warehouse").unwrap();
            self.put(Key::RunSink(shop(), RUN, sink), &SinkRun { tables, ..SinkRun::default() });
            self
        }

        /// The tasks beside capture and sinks.
        fn wanted(mut self) -> Vec<String> {
            let record = self.record.clone();
            self.put(Key::FlowSpec(shop()), &record);
            let mut view = View::default();
            view.take(WatchEvent::Snapshot { entries: self.entries, revision: Revision(100) });
            let entry = view.flows().next().unwrap().clone();
            view.wanted_tasks(&entry).iter().map(|task| task.to_string().replacen("shop.", "", 1)).collect()
        }
    }

    #[test]
    fn no_more_chunks_are_wanted_than_readers_and_none_that_is_read() {
        let plan = reading(vec![relation("a", 5, 0)]);
        let world = || World::running().run(RUN, &spec(|_| ()), Some(&plan)).read(0, &done(5));
        let standing = ["capture", "apply.warehouse", "run.1"];
        assert_eq!(world().wanted(), [&standing[..], &["chunk.1.0-0-1", "chunk.1.0-0-2"]].concat());
        // Another one would be more than a row a second.
        let slow = spec(|spec| spec.rows_per_second = Some(1));
        let slow = World::running().run(RUN, &slow, Some(&plan)).read(0, &done(5));
        assert_eq!(slow.wanted(), [&standing[..], &["chunk.1.0-0-1"]].concat());
        let busy = world().owned("shop.chunk.1.0-0-2", "w1");
        assert_eq!(busy.wanted(), [&standing[..], &["chunk.1.0-0-1"]].concat());
        let full = world().owned("shop.chunk.1.0-0-2", "w1").owned("shop.chunk.1.0-0-4", "w1");
        assert_eq!(full.wanted(), standing);
        let loads = world().owned("shop.chunk.1.0-0-2", "w1").owned("shop.chunk.1.0-0-4", "w1").copying();
        assert_eq!(loads.wanted(), [&standing[..], &["load.warehouse.1.0-0-0"]].concat());
        // Cut off, it is loaded by the run that brings it back.
        let cut_off = |run| {
            let mut world = world().owned("shop.chunk.1.0-0-2", "w1").owned("shop.chunk.1.0-0-4", "w1").copying();
            let detached = Detached { at: Timestamp(1), position: None, reason: "it slept".to_owned(), run: Some(run) };
            world.put(Key::SinkDetached(shop(), SinkId::new("warehouse").unwrap()), &detached);
            world.wanted()
        };
        assert_eq!(cut_off(RUN), [&standing[..], &["load.warehouse.1.0-0-0"]].concat());
        assert_eq!(cut_off(RunId(2)), standing);
    }

    #[test]
    fn a_run_that_rests_keeps_its_owner_and_one_that_is_over_needs_nobody() {
        let plan = reading(vec![relation("a", 5, 0)]);
        let paused = World::running().run(RUN, &spec(|spec| spec.wish = RunWish::Pause), Some(&plan)).read(0, &done(5));
        assert_eq!(paused.copying().wanted(), ["capture", "apply.warehouse", "run.1", "load.warehouse.1.0-0-0"]);
        let over = RunPlan { state: RunState::Done, ..plan.clone() };
        assert_eq!(World::running().run(RUN, &spec(|_| ()), Some(&over)).wanted(), ["capture", "apply.warehouse"]);
        let mut stopped = World::running().run(RUN, &spec(|_| ()), Some(&plan));
        stopped.record.document.spec.paused = true;
        assert_eq!(stopped.wanted(), [""; 0]);
        let mut full_slot = World::new().status("shop.capture", "w1", TaskPhase::Streaming, |status| {
            status.progress.retained_wal_bytes = Some(u64::MAX);
        });
        full_slot = full_slot.run(RUN, &spec(|_| ()), Some(&plan));
        full_slot.record.document.spec.source.postgres.safety.on_exceeded = OnExceeded::PauseSnapshot;
        assert_eq!(full_slot.wanted(), ["capture", "apply.warehouse", "run.1"]);
    }

    #[test]
    fn a_deleted_flow_waits_for_the_owners_of_its_runs() {
        let plan = reading(vec![relation("a", 5, 0)]);
        let deleting = |mut world: World| {
            world.record.deleting_since = Some(Timestamp(5));
            world.run(RUN, &spec(|_| ()), Some(&plan)).wanted()
        };
        assert_eq!(deleting(World::new().owned("shop.run.1", "w1")), [""; 0]);
        assert_eq!(deleting(World::new()), ["capture"]);
    }

    #[test]
    fn a_deleted_flow_whose_run_was_begun_has_something_to_drop() {
        let goes_at_once = |mut world: World| {
            world.record.deleting_since = Some(Timestamp(5));
            let record = world.record.clone();
            world.put(Key::FlowSpec(shop()), &record);
            let mut view = View::default();
            view.take(WatchEvent::Snapshot { entries: world.entries, revision: Revision(100) });
            !crate::schedule::goners(&view).is_empty()
        };
        let world = || World::new().run(RUN, &spec(|_| ()), None);
        assert!(goes_at_once(world()));
        assert!(!goes_at_once(world().owned("shop.run.1", "w1")), "its owner may have made the publication");
        let mut was_owned = world();
        was_owned.put(Key::TaskCheckpoint(key_task("shop.run.1")), &serde_json::json!({ "epoch": 3 }));
        assert!(!goes_at_once(was_owned), "and be dead");
    }

    #[test]
    fn a_run_waits_for_one_before_it_and_one_that_is_cancelled_does_not() {
        let later = |wish| spec(|spec| (spec.reason, spec.wish) = (RunReason::Asked, wish));
        let world = |wish| World::running().run(RUN, &spec(|_| ()), None).run(RunId(2), &later(wish), None);
        assert_eq!(world(RunWish::Go).wanted(), ["capture", "apply.warehouse", "run.1"]);
        assert_eq!(world(RunWish::Cancel).wanted(), ["capture", "apply.warehouse", "run.1", "run.2"]);
        let shown = world(RunWish::Go).shown().status.unwrap().snapshots;
        assert!(shown[1].message.contains("waits for run 1"), "{:?}", shown[1]);
    }

    /// Invariant 7: a run goes on for the sinks that need not wait.
    #[test]
    fn a_sink_that_comes_after_another_run_keeps_no_table_from_the_others() {
        let second = SinkId::new("second").unwrap();
        let added = |plan: Option<&RunPlan>, before: &RunSpec| {
            let mut world = World::running();
            let mut sink = world.record.document.spec.sinks[0].clone();
            sink.name = second.clone();
            world.record.document.spec.sinks.push(sink);
            let tables =
                spec(|spec| (spec.reason, spec.tables) = (RunReason::TablesAdded, vec!["public.a".to_owned()]));
            world.run(RUN, before, None).run(RunId(2), &tables, plan)
        };
        let anew = wallaby_model::flow::change::sink_anew(&second, Timestamp(1));
        let standing = ["capture", "apply.warehouse", "apply.second", "run.1"];
        assert_eq!(added(None, &anew).wanted(), [&standing[..], &["run.2"]].concat());
        assert_eq!(added(None, &spec(|_| ())).wanted(), standing, "both sinks are brought to life by the first run");

        let taken = |mut world: World, run: RunId| {
            let done = SinkRun { is_done: true, ..SinkRun::default() };
            world.put(Key::RunSink(shop(), run, SinkId::new("warehouse").unwrap()), &done);
            world
        };
        let live = taken(added(None, &spec(|_| ())), RUN);
        assert_eq!(live.wanted(), [&standing[..], &["run.2"]].concat(), "one of them is alive");
        let plan = RunPlan { state: RunState::Loading, ..reading(vec![relation("a", 1, 0)]) };
        let begun = || taken(added(Some(&plan), &anew), RunId(2));
        assert_eq!(begun().wanted(), [&standing[..], &["run.2"]].concat(), "what has begun keeps its owner");
        let shown = begun().owned("shop.run.2", "w1").shown().status.unwrap().snapshots;
        assert!(shown[1].message.ends_with("sink second comes after run 1"), "{:?}", shown[1]);

        // Cut off again, the second sink is in none of them.
        let mut cut_off = added(None, &anew);
        let detached = Detached { at: Timestamp(1), position: None, reason: "it slept".to_owned(), run: None };
        cut_off.put(Key::SinkDetached(shop(), second.clone()), &detached);
        assert_eq!(cut_off.wanted(), ["capture", "apply.warehouse", "run.1", "run.2"]);
    }

    #[test]
    fn two_runs_that_read_share_the_side_store() {
        let plan = reading(vec![relation("a", 9, 0)]);
        let other = spec(|spec| (spec.reason, spec.tables) = (RunReason::TablesAdded, vec!["public.b".to_owned()]));
        let chunks = |bytes: u64, read: u32, is_alone: bool| {
            let second = if is_alone { RunPlan { state: RunState::Loading, ..plan.clone() } } else { plan.clone() };
            let mut world = World::running().run(RUN, &spec(|spec| spec.readers = 8), Some(&plan));
            world = world.run(RunId(2), &other, Some(&second));
            let side = r#"{ "jetstream": { "chunksMax": "64Mi" } }"#;
            world.record.document.spec.log.side_store = serde_json::from_str(side).unwrap();
            for number in 0..read {
                world = world.read(number, &ChunkDone { bytes, ..done(5) });
            }
            world.wanted().iter().filter(|task| task.starts_with("chunk.1.")).count()
        };
        assert_eq!(chunks(8 << 20, 0, false), 1, "nothing is known of its chunks");
        assert_eq!(chunks(8 << 20, 1, false), 3, "three more are half of the store");
        assert_eq!(chunks(8 << 20, 4, false), 0);
        assert_eq!(chunks(8 << 20, 4, true), 5, "nobody else reads");
        assert_eq!(chunks(40 << 20, 1, false), 0);
    }

    #[test]
    fn only_loads_and_then_stops() {
        let only = |plan: &RunPlan| {
            let mut world = World::new().run(RUN, &spec(|_| ()), Some(plan));
            world.record.document.spec.source.postgres.snapshot = SnapshotMode::Only;
            world
        };
        let plan = RunPlan { state: RunState::Loading, ..reading(vec![relation("a", 1, 0)]) };
        assert_eq!(only(&plan).wanted(), ["apply.warehouse", "run.1"]);
        let over = RunPlan { state: RunState::Done, ..plan };
        assert_eq!(only(&over).wanted(), [""; 0]);
        assert_eq!(phase_of(&only(&over).shown()), v1::Phase::Running);
    }

    #[test]
    fn what_is_read_and_what_is_left_is_told() {
        let plan = reading(vec![relation("a", 4, 0), relation("b", 1, 0)]);
        let world = World::running().run(RUN, &spec(|_| ()), Some(&plan)).read(0, &done(50)).read(1, &done(50));
        let flow = world.owned("shop.chunk.1.0-0-2", "w1").owned("shop.chunk.1.0-0-3", "w1").shown();
        assert_eq!(phase_of(&flow), v1::Phase::Snapshotting);
        let complete = condition(&flow, "SnapshotComplete");
        assert_eq!((complete.reason.as_str(), complete.status), ("Reading", v1::ConditionStatus::False.into()));
        let progress = flow.status.unwrap().snapshots.remove(0).progress.unwrap();
        assert_eq!((progress.chunks_done, progress.chunks_total, progress.chunks_reading), (2, 5, 2));
        // The planner's 100 for `a`, of which 100 are read by now, and its 100 for `b`.
        assert_eq!((progress.rows_done, progress.rows_estimate), (100, 200));
        // Two readers, each 50 rows in 100 ms.
        assert_eq!((progress.rows_per_second, progress.remaining.map(|left| left.nanos)), (1000.0, Some(100_000_000)));
        let mut never = World::running();
        never.record.document.spec.source.postgres.snapshot = SnapshotMode::Never;
        assert_eq!(condition(&never.shown(), "SnapshotComplete").reason, "NotWanted");
    }

    /// A run of one table that is done says nothing of what an earlier one left out.
    #[test]
    fn rows_that_a_cancelled_run_left_out_are_missing_until_a_run_loads_them() {
        let cancelled = RunPlan { state: RunState::Cancelled, ..RunPlan::default() };
        let done = RunPlan { state: RunState::Done, ..RunPlan::default() };
        let reason = |first: &[&str], second: &[&str]| {
            let of = |tables: &[&str]| spec(|spec| spec.tables = tables.iter().map(ToString::to_string).collect());
            let world = World::running().run(RUN, &of(first), Some(&cancelled));
            let shown = world.run(RunId(2), &of(second), Some(&done)).shown();
            condition(&shown, "SnapshotComplete").reason.clone()
        };
        assert_eq!(reason(&[], &["public.a"]), "Cancelled");
        assert_eq!(reason(&["public.a", "public.b"], &["public.a"]), "Cancelled");
        assert_eq!(reason(&["public.a"], &["public.*"]), "Loaded");
        assert_eq!(reason(&["public.a"], &[]), "Loaded");
        assert_eq!(reason(&[], &[]), "Loaded");
    }

    /// It emptied no table: nothing is missing but what was missing before it.
    #[test]
    fn a_run_that_was_asked_for_and_cancelled_before_it_had_a_table_degrades_nothing() {
        let unplanned = RunPlan { state: RunState::Cancelled, ..RunPlan::default() };
        let planned = RunPlan { relations: vec![relation("a", 1, 0)], ..unplanned.clone() };
        let asked = |tables: &[&str]| {
            spec(|spec| {
                spec.reason = RunReason::Asked;
                spec.tables = tables.iter().map(ToString::to_string).collect();
            })
        };
        let shown = |plan: &RunPlan, run: &RunSpec| World::running().run(RUN, run, Some(plan)).shown();
        let nothing_was_there = shown(&unplanned, &asked(&["public.nope"]));
        assert_eq!(phase_of(&nothing_was_there), v1::Phase::Running);
        assert_eq!(condition(&nothing_was_there, "SnapshotComplete").reason, "Loaded");
        assert_eq!(condition(&shown(&planned, &asked(&["public.a"])), "SnapshotComplete").reason, "Cancelled");
        for reason in [RunReason::FirstLoad, RunReason::SinkAnew, RunReason::TablesAdded] {
            let by_itself = shown(&unplanned, &spec(|spec| spec.reason = reason));
            assert_eq!(condition(&by_itself, "SnapshotComplete").reason, "Cancelled", "{reason:?}");
            assert_eq!(phase_of(&by_itself), v1::Phase::Degraded, "{reason:?}");
        }

        // Nor does it make up for what was missing before it.
        let after_another = World::running().run(RUN, &spec(|_| ()), Some(&unplanned));
        let after_another = after_another.run(RunId(2), &asked(&[]), Some(&unplanned)).shown();
        let complete = condition(&after_another, "SnapshotComplete");
        assert!(complete.message.starts_with("run 1 was cancelled"), "{complete:?}");
    }

    #[test]
    fn a_sink_that_was_cut_off_says_so_and_rests_until_its_run_is_made() {
        let detached = |run| {
            let mut world = World::running();
            let record = Detached { at: Timestamp(9), position: None, reason: "75 % of the log".into(), run };
            world.put(Key::SinkDetached(shop(), SinkId::new("warehouse").unwrap()), &record);
            world
        };
        let flow = detached(None).shown();
        let delivering = condition(&flow, "Delivering");
        assert_eq!(delivering.reason, "Detached");
        assert!(delivering.message.contains("75 % of the log"));
        assert!(delivering.message.contains("made 10 s after that"), "{}", delivering.message);
        assert_eq!(detached(None).wanted(), ["capture"]);
        assert_eq!(detached(Some(RUN)).wanted(), ["capture", "apply.warehouse"]);
        let back = |wish, plan: Option<&RunPlan>| {
            let spec = spec(|spec| (spec.reason, spec.wish) = (RunReason::SinkAnew, wish));
            condition(&detached(Some(RUN)).run(RUN, &spec, plan).shown(), "Delivering").message.clone()
        };
        assert!(back(RunWish::Go, None).ends_with("run 1 loads it anew"), "{}", back(RunWish::Go, None));
        let over = RunPlan { state: RunState::Cancelled, ..RunPlan::default() };
        for cancelled in [back(RunWish::Cancel, None), back(RunWish::Cancel, Some(&over))] {
            assert!(cancelled.contains("was cancelled: `wallaby snapshot start shop`"), "{cancelled}");
        }
        let mut paused = detached(None);
        paused.record.document.spec.sinks[0].paused = true;
        let flow = paused.shown();
        let delivering = condition(&flow, "Delivering");
        assert_eq!(delivering.reason, "Paused");
        assert!(delivering.message.contains("It was cut off, because"), "{}", delivering.message);
    }
}
