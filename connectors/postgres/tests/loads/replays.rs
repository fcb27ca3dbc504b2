//! Replays beside the main stream, and hands that change meanwhile.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Notify;
use wallaby_connector_api::conformance::{
    Change, EmptySource, Log, PartFeed, PortionFeed, Shape, SinkUnderTest, Value, chunk_part,
};
use wallaby_connector_api::{
    Applied, Batch, BatchPart, CommitFault, Faults, HangPoint, Loaded, Portion, Portions, Sink, SinkError, TableFilter,
};
use wallaby_model::run::TableStage;
use wallaby_model::{ColumnType, Epoch, RunId, TableSchema};
use wallaby_testkit::eventually;

use crate::target::{Target, apply, query, rows};
use crate::{LIMIT, RUN, chunk, events, item, items, load, somebody_waits_unless};

/// Gives its first portion out, and what follows once it is allowed to.
struct HeldPortions {
    asked: Arc<Notify>,
    release: Arc<Notify>,
    inner: PortionFeed,
    is_begun: bool,
    is_released: bool,
}

impl HeldPortions {
    fn new(inner: PortionFeed) -> (HeldPortions, Arc<Notify>, Arc<Notify>) {
        let (asked, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (theirs, mine) = (Arc::clone(&asked), Arc::clone(&release));
        (HeldPortions { asked, release, inner, is_begun: false, is_released: false }, theirs, mine)
    }
}

#[async_trait]
impl Portions for HeldPortions {
    async fn next(&mut self) -> Result<Portion, SinkError> {
        if self.is_begun && !self.is_released {
            self.asked.notify_one();
            self.release.notified().await;
            self.is_released = true;
        }
        self.is_begun = true;
        self.inner.next().await
    }
}

/// A live sink with a table that catches up from the log's start on.
async fn catching_up(target: &Target, log: &Log, table: &Arc<TableSchema>, row: Vec<Value>) -> Box<dyn Sink> {
    let mut sink = target.opened(log).await;
    sink.loads().unwrap().prepare(RUN, 0, table).await.unwrap();
    let mut part = PartFeed::new([chunk_part(table, log.start().commit, [row])]);
    assert_eq!(load(target, &chunk(table, 0, 0, true), &mut part).await.unwrap(), Loaded::Now { rows: 1 });
    let tables = std::slice::from_ref(&table.table);
    sink.loads().unwrap().mark(tables, TableStage::CatchingUp, log.start()).await.unwrap();
    sink
}

/// A second sink of the owner, as a replay has it.
async fn beside(target: &Target, before_commit: Option<CommitFault>) -> Box<dyn Sink> {
    let mut sink = target.make(Faults { keep_older_sessions: true, before_commit }, Arc::new(EmptySource));
    sink.open(Epoch(1)).await.unwrap();
    sink
}

fn without(batch: &Batch, table: &TableSchema) -> Batch {
    let left_out = HashSet::from([table.table.clone()]);
    let filter = Arc::new(TableFilter { others: true, left_out, ..TableFilter::default() });
    let parts = batch.parts.iter().map(|part| BatchPart { tables: Some(Arc::clone(&filter)), ..part.clone() });
    Batch { parts: parts.collect(), ..batch.clone() }
}

/// What is not to wait for anything that the test holds back.
async fn without_waiting<T>(what: &str, done: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, done).await.unwrap_or_else(|_| panic!("{what} waits"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_main_stream_does_not_wait_for_a_large_transaction_of_a_replay() {
    let target = Target::fresh("large_replay").await;
    let (mut log, items, events) = (Log::new(), items(), events());
    let others = Shape::new("others").key("id", ColumnType::Int4).build();
    let mut main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
    let tables = [items.table.clone()];
    let new = (2..=100).map(|id| Change::insert(&items, item(id, id, "b")));
    log.transaction(new.chain([Change::insert(&events, [1.into()])]));
    let large = log.batch_in_segments(30);
    let (mut held, asked, release) = HeldPortions::new(PortionFeed::new(&large));
    let mut replay = beside(&target, None).await;
    let replaying = tokio::spawn({
        let (tables, from) = (tables.clone(), large.from);
        async move {
            let replayed = replay.loads().unwrap().replay_large(&tables, from, &mut held).await;
            (replay, replayed)
        }
    });
    asked.notified().await;
    without_waiting("the main stream", apply(&mut main, &without(&large, &items))).await;
    without_waiting("a run", main.loads().unwrap().prepare(RunId(2), 0, &others)).await.unwrap();
    let mut late = PartFeed::new([chunk_part(&items, large.from.commit, [item(1, 1, "a")])]);
    let late = without_waiting("a load that comes late", load(&target, &chunk(&items, 0, 0, true), &mut late)).await;
    assert_eq!(late.unwrap(), Loaded::Before);
    log.transaction((0..50).map(|n| Change::insert(&events, [n.into()])));
    let next = log.batch_in_segments(20);
    let mut feed = PortionFeed::new(&next);
    let applied =
        without_waiting("a large transaction of the main stream", main.apply_large(next.from, &mut feed)).await;
    assert_eq!(applied.unwrap(), Applied::Durable(next.to));
    assert!(!replaying.is_finished());
    release.notify_one();
    let (mut replay, replayed) = replaying.await.unwrap();
    replayed.unwrap();
    let loads = replay.loads().unwrap();
    loads.replay(&tables, &next).await.unwrap();
    loads.mark(&tables, TableStage::Ready, next.to).await.unwrap();
    assert_eq!(target.rows(&items.table).await.len(), 100);
    assert_eq!(target.rows(&events.table).await.len(), 51);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_and_loads_do_not_wait_for_a_large_transaction_of_the_main_stream() {
    let target = Target::fresh("large_main").await;
    let (mut log, items, events) = (Log::new(), items(), events());
    let copied = Shape::new("copied").key("id", ColumnType::Int4).build();
    let mut main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
    main.loads().unwrap().prepare(RUN, 0, &copied).await.unwrap();
    let tables = [items.table.clone()];
    let new = (0..100).map(|n| Change::insert(&events, [n.into()]));
    log.transaction(new.chain([Change::insert(&items, item(2, 2, "b"))]));
    let large = log.batch_in_segments(30);
    let (mut held, asked, release) = HeldPortions::new(PortionFeed::new(&without(&large, &items)));
    let from = large.from;
    let applying = tokio::spawn(async move { main.apply_large(from, &mut held).await });
    asked.notified().await;
    let mut replay = without_waiting("a replay that begins", beside(&target, None)).await;
    let loads = replay.loads().unwrap();
    without_waiting("a replay", loads.replay(&tables, &large)).await.unwrap();
    log.transaction((3..=50).map(|id| Change::insert(&items, item(id, id, "c"))));
    let next = log.batch_in_segments(20);
    let mut feed = PortionFeed::new(&next);
    let replayed = loads.replay_large(&tables, next.from, &mut feed);
    without_waiting("a large transaction of a replay", replayed).await.unwrap();
    let mut part = PartFeed::new([chunk_part(&copied, large.from.commit, [vec![Value::Int(1)]])]);
    let loaded = without_waiting("a load", load(&target, &chunk(&copied, 1, 0, true), &mut part)).await;
    assert_eq!(loaded.unwrap(), Loaded::Now { rows: 1 });
    assert!(!applying.is_finished());
    release.notify_one();
    assert_eq!(applying.await.unwrap().unwrap(), Applied::Durable(large.to));
    assert_eq!(target.rows(&items.table).await.len(), 50);
    assert_eq!(target.rows(&events.table).await.len(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_the_main_stream_stands_still_while_tables_are_handed_over() {
    let target = Target::fresh("h08_still").await;
    let (mut log, items, events) = (Log::new(), items(), events());
    let mut main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
    let point = Arc::new(HangPoint::default());
    let mut replay = beside(&target, Some(CommitFault::Hang(Arc::clone(&point)))).await;
    let handing_over = tokio::spawn({
        let (tables, at) = ([items.table.clone()], log.start());
        async move { replay.loads().unwrap().mark(&tables, TableStage::Ready, at).await }
    });
    point.reached().await;
    log.transaction([Change::insert(&events, [1.into()])]);
    let batch = log.batch();
    let applying = tokio::spawn(async move { main.apply(&batch).await });
    somebody_waits_unless(&target, || applying.is_finished()).await;
    assert!(!applying.is_finished(), "the main stream moved on from where a table is just handed over");
    point.release();
    handing_over.await.unwrap().unwrap();
    applying.await.unwrap().unwrap();
}

/// A replay of one row, frozen before its commit.
struct FrozenReplay {
    batch: Batch,
    point: Arc<HangPoint>,
    replaying: tokio::task::JoinHandle<Result<(), SinkError>>,
}

impl FrozenReplay {
    async fn new(target: &Target, log: &mut Log, items: &Arc<TableSchema>) -> FrozenReplay {
        log.transaction([Change::insert(items, item(2, 2, "b"))]);
        let (batch, point) = (log.batch(), Arc::new(HangPoint::default()));
        let mut replay = beside(target, Some(CommitFault::Hang(Arc::clone(&point)))).await;
        let replaying = tokio::spawn({
            let (tables, batch) = ([items.table.clone()], batch.clone());
            async move { replay.loads().unwrap().replay(&tables, &batch).await }
        });
        point.reached().await;
        FrozenReplay { batch, point, replaying }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_frozen_replay_is_ended_by_a_successor() {
    let target = Target::fresh("h14_replay").await;
    let (mut log, items) = (Log::new(), items());
    let _main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
    let frozen = FrozenReplay::new(&target, &mut log, &items).await;
    let mut young = target.sink();
    let opened = without_waiting("a successor", young.open(Epoch(2))).await.unwrap();
    assert_eq!(opened.sessions_ended, 2, "the main stream's and the replay's");
    frozen.point.release();
    assert!(matches!(frozen.replaying.await.unwrap(), Err(SinkError::Transient(_))));
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "1", "a"]]));
    assert_eq!(young.loads().unwrap().marks().await.unwrap()[0].position, Some(frozen.batch.from));
}

/// Makes statements on a table wait, outside of any lock, until `gate` is opened.
const GATE: &str = "CREATE TABLE gate (shut boolean); INSERT INTO gate VALUES (true); \
    CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS \
        'BEGIN WHILE (SELECT shut FROM public.gate) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN new; END'";
const OPEN_GATE: &str = "UPDATE gate SET shut = false";

async fn somebody_is_at_the_gate(target: &Target) {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    eventually(LIMIT, "somebody waits at the gate", async || {
        if query(&target.database, waiting).await == rows(&[&["0"]]) { Err("nobody") } else { Ok(()) }
    })
    .await;
}

/// The older sessions live on: only the lock on the epoch keeps a successor from taking over while a replay is about to commit, also
/// where the successor began when the task had no row yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_successor_waits_for_the_commit_of_a_replay() {
    for row_is_there in [true, false] {
        let target = Target::fresh("h14_waits").await;
        let (mut log, items) = (Log::new(), items());
        target.sink().open(Epoch(1)).await.unwrap();
        target.sql(GATE).await;
        let gate = "CREATE TRIGGER gate BEFORE INSERT ON wallaby.checkpoints FOR EACH ROW WHEN (new.epoch = 2) \
            EXECUTE FUNCTION wait_at_gate()";
        target.sql(gate).await;
        if !row_is_there {
            target.sql("DELETE FROM wallaby.checkpoints").await;
        }
        let mut young = target.make(Faults { keep_older_sessions: true, ..Faults::default() }, Arc::new(EmptySource));
        let opening = tokio::spawn(async move { young.open(Epoch(2)).await });
        somebody_is_at_the_gate(&target).await;
        let _main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
        let frozen = FrozenReplay::new(&target, &mut log, &items).await;
        target.sql(OPEN_GATE).await;
        somebody_waits_unless(&target, || opening.is_finished()).await;
        assert!(!opening.is_finished(), "a replay of an older epoch commits after the task was taken over");
        frozen.point.release();
        frozen.replaying.await.unwrap().unwrap();
        opening.await.unwrap().unwrap();
        assert_eq!(target.rows(&items.table).await, rows(&[&["1", "1", "a"], &["2", "2", "b"]]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_replay_that_begins_while_the_task_is_taken_over_is_refused() {
    let target = Target::fresh("h14_taken").await;
    let (mut log, items) = (Log::new(), items());
    let _main = catching_up(&target, &log, &items, item(1, 1, "a")).await;
    let mut replay = beside(&target, None).await;
    target.sql(GATE).await;
    let gate = "CREATE TRIGGER gate BEFORE UPDATE ON wallaby.checkpoints FOR EACH ROW WHEN (old.epoch <> new.epoch) \
        EXECUTE FUNCTION wait_at_gate()";
    target.sql(gate).await;
    let mut young = target.make(Faults { keep_older_sessions: true, ..Faults::default() }, Arc::new(EmptySource));
    let opening = tokio::spawn(async move { young.open(Epoch(2)).await });
    somebody_is_at_the_gate(&target).await;
    log.transaction([Change::insert(&items, item(2, 2, "b"))]);
    let (batch, tables) = (log.batch(), [items.table.clone()]);
    let replaying = tokio::spawn(async move { replay.loads().unwrap().replay(&tables, &batch).await });
    somebody_waits_unless(&target, || replaying.is_finished()).await;
    target.sql(OPEN_GATE).await;
    opening.await.unwrap().unwrap();
    let refused = replaying.await.unwrap();
    assert!(matches!(refused, Err(SinkError::Fenced(_))), "{refused:?}");
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "1", "a"]]));
}
