//! The cases.

use std::sync::Arc;
use std::time::Duration;

use wallaby_model::{ColumnType, Epoch, Position, TableSchema};

use super::{Break, Case, Change, EmptySource, Log, Shape, SinkUnderTest, TextRow, Value};
use crate::{Applied, Batch, CommitFault, Faults, HangPoint, Sink, SinkError};

/// A sink that does not answer for so long waits for something that never comes.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
const LARGE: i64 = 20_000;

macro_rules! case {
    ($name:literal, $breaks:ident, $run:ident) => {
        Case { name: $name, breaks: Break::$breaks, run: |target| Box::pin($run(target)) }
    };
}
pub(super) use case;

/// All cases. Each wants a target of its own.
pub const CASES: &[Case] = &[
    case!("replay", AcceptsReplays, replay),
    case!("older epoch", IgnoresEpochs, older_epoch),
    case!("frozen predecessor", KeepsOlderSessions, frozen_predecessor),
    case!("kill between write and checkpoint", ForgetsCheckpoints, kill_before_commit),
    case!("key change with unchanged TOAST", UnchangedIsNull, key_change_with_unchanged_toast),
    case!("swapped unique values", LastRowWins, swapped_unique_values),
    case!("added column", DropsNewColumns, added_column),
    case!("empty batch", ForgetsEmptyBatches, empty_batch),
    case!("large batch", LosesRowsOfLargeBatches, large_batch),
];

pub(super) type Outcome = Result<(), String>;

pub(super) fn make(target: &dyn SinkUnderTest) -> Box<dyn Sink> {
    target.make(Faults::default(), Arc::new(EmptySource))
}

/// A sink under epoch 1 that stands at the log's start.
pub(super) async fn opened(target: &dyn SinkUnderTest, log: &Log) -> Result<Box<dyn Sink>, String> {
    let mut sink = make(target);
    sink.open(Epoch(1)).await.map_err(|error| format!("the first open failed: {error}"))?;
    sink.start_at(log.start(), log.epoch).await.map_err(|error| format!("start_at failed: {error}"))?;
    Ok(sink)
}

pub(super) async fn apply(sink: &mut dyn Sink, batch: &Batch) -> Outcome {
    let applied = tokio::time::timeout(PATIENCE, sink.apply(batch)).await;
    let applied = applied.map_err(|_| "apply did not answer".to_owned())?;
    match applied.map_err(|error| format!("apply failed: {error}"))? {
        Applied::Durable(to) if to == batch.to => Ok(()),
        Applied::Durable(to) => Err(format!("durable up to {to:?}, not {:?}", batch.to)),
        Applied::Accepted => {
            let to = sink.barrier().await.map_err(|error| format!("barrier failed: {error}"))?;
            if to >= batch.to { Ok(()) } else { Err(format!("the barrier ends at {to:?}, not {:?}", batch.to)) }
        }
    }
}

pub(super) fn expect_rows(found: Vec<TextRow>, expected: &[&[Option<&str>]]) -> Outcome {
    let expected: Vec<TextRow> =
        expected.iter().map(|row| row.iter().map(|value| value.map(str::to_owned)).collect()).collect();
    if found == expected { Ok(()) } else { Err(format!("expected rows {expected:?}, found {found:?}")) }
}

pub(super) fn expect_position(found: Option<Position>, expected: Position) -> Outcome {
    if found == Some(expected) { Ok(()) } else { Err(format!("expected the sink at {expected:?}, found {found:?}")) }
}

fn items() -> Arc<TableSchema> {
    Shape::new("items")
        .key("id", ColumnType::Int4)
        .column("n", ColumnType::Int4)
        .column("big", ColumnType::Text)
        .build()
}

/// A table without a key: a row that is applied twice is there twice.
fn events() -> Arc<TableSchema> {
    Shape::new("events").column("n", ColumnType::Int4).build()
}

fn item(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

async fn replay(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items, events) = (Log::new(), items(), events());
    let mut sink = opened(target, &log).await?;
    log.transaction([Change::insert(&items, item(1, 1, "a")), Change::insert(&events, [1.into()])]);
    let first = log.batch();
    log.transaction([Change::update(&items, item(1, 2, "b")), Change::insert(&events, [2.into()])]);
    let second = log.batch();
    apply(sink.as_mut(), &first).await?;
    apply(sink.as_mut(), &second).await?;
    match sink.apply(&first).await {
        Err(SinkError::Position { expected, found }) if expected == first.from && found == second.to => {}
        outcome => return Err(format!("a replayed batch was not refused by its position: {outcome:?}")),
    }
    expect_rows(target.rows(&items.table).await, &[&[Some("1"), Some("2"), Some("b")]])?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")], &[Some("2")]])?;
    let again = sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    expect_position(again.position, second.to)
}

async fn older_epoch(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, events) = (Log::new(), events());
    let mut old = opened(target, &log).await?;
    log.transaction([Change::insert(&events, [1.into()])]);
    apply(old.as_mut(), &log.batch()).await?;
    // The old owner's session lives on, so that only its epoch can stop it.
    let faults = Faults { keep_older_sessions: true, ..Faults::default() };
    let mut young = target.make(faults, Arc::new(EmptySource));
    young.open(Epoch(2)).await.map_err(|error| error.to_string())?;
    log.transaction([Change::insert(&events, [2.into()])]);
    let batch = log.batch();
    match old.apply(&batch).await {
        Err(SinkError::Fenced(_)) => {}
        outcome => return Err(format!("the older epoch was not refused: {outcome:?}")),
    }
    match old.open(Epoch(1)).await {
        Err(SinkError::Fenced(_)) => {}
        outcome => return Err(format!("the older epoch could open the sink: {outcome:?}")),
    }
    if make(target).last_epoch().await.map_err(|error| error.to_string())? != Some(Epoch(2)) {
        return Err("the sink does not say the younger epoch as its last".to_owned());
    }
    apply(young.as_mut(), &batch).await?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")], &[Some("2")]])
}

async fn frozen_predecessor(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut first = opened(target, &log).await?;
    log.transaction([Change::insert(&items, item(1, 1, "a"))]);
    apply(first.as_mut(), &log.batch()).await?;
    first.close().await;
    let point = Arc::new(HangPoint::default());
    let faults = Faults { before_commit: Some(CommitFault::Hang(Arc::clone(&point))), ..Faults::default() };
    let mut frozen = target.make(faults, Arc::new(EmptySource));
    frozen.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    let start = log.start();
    log.transaction([Change::update(&items, item(1, 2, "b"))]);
    let batch = log.batch();
    let theirs = batch.clone();
    let frozen = tokio::spawn(async move { frozen.apply(&theirs).await });
    let reached = tokio::time::timeout(PATIENCE, point.reached()).await;
    reached.map_err(|_| "the predecessor did not get to its commit".to_owned())?;
    let mut young = make(target);
    let opened = tokio::time::timeout(PATIENCE, young.open(Epoch(2))).await;
    let opened = opened.map_err(|_| "the successor waits for the frozen one".to_owned())?;
    let opened = opened.map_err(|error| format!("the successor could not open: {error}"))?;
    expect_position(opened.position, start)?;
    apply(young.as_mut(), &batch).await?;
    point.release();
    match frozen.await {
        Ok(Err(_)) => {}
        outcome => return Err(format!("the frozen one could commit after its thaw: {outcome:?}")),
    }
    expect_rows(target.rows(&items.table).await, &[&[Some("1"), Some("2"), Some("b")]])
}

async fn kill_before_commit(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, events) = (Log::new(), events());
    opened(target, &log).await?.close().await;
    let faults = Faults { before_commit: Some(CommitFault::Die), ..Faults::default() };
    let mut killed = target.make(faults, Arc::new(EmptySource));
    killed.open(Epoch(2)).await.map_err(|error| error.to_string())?;
    log.transaction([Change::insert(&events, [1.into()])]);
    let batch = log.batch();
    if let Ok(applied) = killed.apply(&batch).await {
        return Err(format!("a batch that died before its commit counts as {applied:?}"));
    }
    let mut next = make(target);
    let opened = next.open(Epoch(3)).await.map_err(|error| error.to_string())?;
    expect_position(opened.position, batch.from)?;
    apply(next.as_mut(), &batch).await?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")]])
}

async fn key_change_with_unchanged_toast(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut sink = opened(target, &log).await?;
    let moved =
        |from: i64, to: i64| Change::update_key(&items, item(from, 0, Value::Null), item(to, 0, Value::Unchanged));
    log.transaction([1, 2, 5].map(|id| Change::insert(&items, item(id, 0, format!("big {id}").as_str()))));
    apply(sink.as_mut(), &log.batch()).await?;
    // A chain, in the order that the key allows: 2 → 3, then 1 → 2.
    log.transaction([moved(2, 3), moved(1, 2)]);
    // Set and moved in one batch: the value is in the batch.
    log.transaction([Change::update(&items, item(5, 0, "BIG 5")), moved(5, 6)]);
    apply(sink.as_mut(), &log.batch()).await?;
    let expected: &[&[Option<&str>]] = &[
        &[Some("2"), Some("0"), Some("big 1")],
        &[Some("3"), Some("0"), Some("big 2")],
        &[Some("6"), Some("0"), Some("BIG 5")],
    ];
    expect_rows(target.rows(&items.table).await, expected)
}

async fn swapped_unique_values(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let seats = Shape::new("seats").key("id", ColumnType::Int4).column("seat", ColumnType::Int4).build();
    let mut sink = opened(target, &log).await?;
    let seat = |id: i64, seat: i64| vec![Value::from(id), Value::from(seat)];
    log.transaction([Change::insert(&seats, seat(1, 10)), Change::insert(&seats, seat(2, 20))]);
    apply(sink.as_mut(), &log.batch()).await?;
    if !target.constrain(&seats.table, &["seat"]).await {
        return Ok(());
    }
    log.transaction([
        Change::update(&seats, seat(1, 99)),
        Change::update(&seats, seat(2, 10)),
        Change::update(&seats, seat(1, 20)),
    ]);
    apply(sink.as_mut(), &log.batch()).await?;
    expect_rows(target.rows(&seats.table).await, &[&[Some("1"), Some("20")], &[Some("2"), Some("10")]])
}

async fn added_column(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let narrow = Shape::new("wide").key("id", ColumnType::Int4).build();
    let wide = Shape::new("wide").key("id", ColumnType::Int4).column("note", ColumnType::Text).build();
    let mut sink = opened(target, &log).await?;
    log.transaction([Change::insert(&narrow, [1.into()])]);
    apply(sink.as_mut(), &log.batch()).await?;
    // The change of shape in mid-batch.
    log.transaction([Change::insert(&narrow, [2.into()])]);
    log.transaction([Change::insert(&wide, [3.into(), "c".into()]), Change::update(&wide, [1.into(), "a".into()])]);
    apply(sink.as_mut(), &log.batch()).await?;
    let expected: &[&[Option<&str>]] = &[&[Some("1"), Some("a")], &[Some("2"), None], &[Some("3"), Some("c")]];
    expect_rows(target.rows(&wide.table).await, expected)
}

async fn empty_batch(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let mut sink = opened(target, &log).await?;
    // The first one only carries what the builder's log has: nothing.
    apply(sink.as_mut(), &log.batch()).await?;
    let batch = log.batch();
    apply(sink.as_mut(), &batch).await?;
    let position = sink.barrier().await.map_err(|error| error.to_string())?;
    expect_position(Some(position), batch.to)?;
    sink.close().await;
    let opened = make(target).open(Epoch(2)).await.map_err(|error| error.to_string())?;
    expect_position(opened.position, batch.to)?;
    if opened.log_epoch == Some(log.epoch) { Ok(()) } else { Err("the log's epoch was not kept".to_owned()) }
}

async fn large_batch(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut sink = opened(target, &log).await?;
    log.transaction((0..LARGE).map(|id| Change::insert(&items, item(id, id, "x"))));
    log.transaction((0..LARGE).step_by(2).map(|id| Change::update(&items, item(id, -id, "y"))));
    apply(sink.as_mut(), &log.batch_in_segments(700)).await?;
    let rows = target.rows(&items.table).await;
    let mut expected: Vec<TextRow> = (0..LARGE)
        .map(|id| {
            let (n, big) = if id % 2 == 0 { (-id, "y") } else { (id, "x") };
            vec![Some(id.to_string()), Some(n.to_string()), Some(big.to_owned())]
        })
        .collect();
    expected.sort();
    if rows == expected {
        return Ok(());
    }
    let different = expected.iter().filter(|row| rows.binary_search(row).is_err()).count();
    Err(format!("{} rows instead of {}, {different} missing or different", rows.len(), expected.len()))
}
