//! The cases about transactions that are given out in portions.

use std::sync::Arc;

use wallaby_model::{ColumnType, Epoch, TableSchema};

use super::cases::{Outcome, apply, case, expect_position, make, opened};
use super::{Break, Case, Change, Log, PortionFeed, Shape, SinkUnderTest, Value};
use crate::{Applied, SinkError};

/// Portions that a sink may keep at a time: the one that it writes, the next one, and one that it is just given.
const ALIVE_MAX: usize = 3;

/// Cases that a sink must pass whose transactions may be larger than memory.
pub const LARGE_CASES: &[Case] = &[
    case!("large transaction equals small batches", ForgetsPortions, equals_small_batches),
    case!("large transaction cut in its middle", CommitsPortions, cut_in_the_middle),
    case!("large transaction in bounded memory", GathersPortions, bounded_memory),
    case!("large transaction by an older epoch", IgnoresEpochs, older_epoch),
];

fn wide(name: &str, with_note: bool) -> Arc<TableSchema> {
    let shape = Shape::new(name).key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    let shape = shape.column("big", ColumnType::Text);
    if with_note { shape.column("note", ColumnType::Text).build() } else { shape.build() }
}

fn row(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

/// Everything that may stand in a transaction, in many small segments.
fn changes(prefix: &str) -> Vec<Change> {
    let narrow = wide(&format!("{prefix}_wide"), false);
    let wide = wide(&format!("{prefix}_wide"), true);
    let emptied = Shape::new(&format!("{prefix}_emptied")).key("id", ColumnType::Int4).build();
    let bag = Shape::new(&format!("{prefix}_bag")).column("n", ColumnType::Int4).build();
    let mut changes = Vec::new();
    for id in 0..200 {
        changes.push(Change::insert(&narrow, row(id, 0, format!("big {id}").as_str())));
        changes.push(Change::insert(&emptied, [id.into()]));
        changes.push(Change::insert(&bag, [(id % 7).into()]));
    }
    changes.extend((0..200).step_by(2).map(|id| Change::update(&narrow, row(id, 1, Value::Unchanged))));
    // Keys move up by one, the last first; what is not carried stands in an earlier portion.
    for id in (100..200).rev() {
        changes.push(Change::update_key(&narrow, row(id, 0, Value::Null), row(id + 1, 2, Value::Unchanged)));
    }
    changes.push(Change::truncate(&emptied));
    changes.extend((0..50).map(|id| Change::insert(&emptied, [(1000 + id).into()])));
    changes.extend((0..50).map(|id| Change::delete(&narrow, row(id, 0, Value::Null))));
    let with_note = |id: i64| [row(id, 3, Value::Unchanged), vec!["noted".into()]].concat();
    changes.extend((60..90).map(|id| Change::update(&wide, with_note(id))));
    changes
}

async fn equals_small_batches(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let mut sink = opened(target, &log).await?;
    for change in changes("small") {
        log.transaction([change]);
        apply(sink.as_mut(), &log.batch()).await?;
    }
    log.transaction(changes("large"));
    let batch = log.batch_in_segments(40);
    match sink.apply_large(batch.from, &mut PortionFeed::new(&batch)).await {
        Ok(Applied::Durable(to)) if to == batch.to => {}
        outcome => return Err(format!("the large transaction was not applied: {outcome:?}")),
    }
    for table in ["wide", "emptied", "bag"] {
        let name = |prefix: &str| wallaby_model::TableName::new("public", format!("{prefix}_{table}"));
        let (small, large) = (target.rows(&name("small")).await, target.rows(&name("large")).await);
        if small.is_empty() || small != large {
            return Err(format!("{table}: {} rows by batches, {} by portions, or not equal", small.len(), large.len()));
        }
    }
    expect_position(Some(sink.barrier().await.map_err(|error| error.to_string())?), batch.to)?;
    // And the main stream goes on behind it.
    let more = wide("large_wide", true);
    log.transaction([Change::insert(&more, [row(5000, 5, "x"), vec![Value::Null]].concat())]);
    apply(sink.as_mut(), &log.batch()).await
}

async fn cut_in_the_middle(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let mut sink = opened(target, &log).await?;
    let events = Shape::new("events").column("n", ColumnType::Int4).build();
    log.transaction((0..500).map(|n| Change::insert(&events, [n.into()])));
    let batch = log.batch_in_segments(50);
    match sink.apply_large(batch.from, &mut PortionFeed::interrupted_after(&batch, 6)).await {
        Err(SinkError::Interrupted(_)) => {}
        outcome => return Err(format!("a transaction that was cut ends as {outcome:?}")),
    }
    let found = target.rows(&events.table).await.len();
    if found > 0 {
        return Err(format!("{found} rows of a transaction that was cut are to be seen"));
    }
    let at = sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    expect_position(at.position, batch.from)?;
    sink.apply_large(batch.from, &mut PortionFeed::new(&batch)).await.map_err(|error| error.to_string())?;
    let found = target.rows(&events.table).await.len();
    if found == 500 { Ok(()) } else { Err(format!("{found} rows instead of 500")) }
}

async fn bounded_memory(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let mut sink = opened(target, &log).await?;
    let table = wide("bounded", false);
    log.transaction((0..3000).map(|id| Change::insert(&table, row(id, id, "x"))));
    let batch = log.batch_in_segments(100);
    let mut feed = PortionFeed::new(&batch);
    sink.apply_large(batch.from, &mut feed).await.map_err(|error| error.to_string())?;
    if target.rows(&table.table).await.len() != 3000 {
        return Err("rows are missing".to_owned());
    }
    let alive = feed.alive_max;
    if alive <= ALIVE_MAX { Ok(()) } else { Err(format!("{alive} portions were kept at a time")) }
}

async fn older_epoch(target: &dyn SinkUnderTest) -> Outcome {
    let mut log = Log::new();
    let mut old = opened(target, &log).await?;
    let faults = crate::Faults { keep_older_sessions: true, ..crate::Faults::default() };
    let mut young = target.make(faults, Arc::new(super::EmptySource));
    young.open(Epoch(2)).await.map_err(|error| error.to_string())?;
    let table = wide("fenced", false);
    log.transaction((0..100).map(|id| Change::insert(&table, row(id, id, "x"))));
    let batch = log.batch_in_segments(30);
    match old.apply_large(batch.from, &mut PortionFeed::new(&batch)).await {
        Err(SinkError::Fenced(_)) => {}
        outcome => return Err(format!("the older epoch was not refused: {outcome:?}")),
    }
    // A replay is refused by its position.
    young.apply_large(batch.from, &mut PortionFeed::new(&batch)).await.map_err(|error| error.to_string())?;
    match young.apply_large(batch.from, &mut PortionFeed::new(&batch)).await {
        Err(SinkError::Position { found, .. }) if found == batch.to => {}
        outcome => return Err(format!("a replayed transaction was not refused by its position: {outcome:?}")),
    }
    let next = make(target).open(Epoch(3)).await.map_err(|error| error.to_string())?;
    expect_position(next.position, batch.to)
}
