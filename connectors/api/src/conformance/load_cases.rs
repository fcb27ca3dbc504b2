//! The cases about the first load: chunks, marks, catching up, the hand-over.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, ColumnType, Epoch, Position, RunId, TableName, TableSchema};

use super::builder::chunk_part;
use super::cases::{Outcome, PATIENCE, apply, case, expect_rows, opened};
use super::{Break, Case, Change, EmptySource, Log, PartFeed, Shape, SinkUnderTest, Value};
use crate::{Batch, BatchPart, ChunkLoad, CommitFault, Faults, Loaded, Sink, SinkError, TableFilter, TableLoads};

const RUN: RunId = RunId(1);

/// Cases that a sink must pass that has [`Sink::loads`].
pub const LOAD_CASES: &[Case] = &[
    case!("chunk exactly once", ForgetsNotes, chunk_exactly_once),
    case!("two loaders at one chunk", ForgetsNotes, two_loaders),
    case!("chunk of an older restart", IgnoresRestarts, older_restart),
    case!("loader killed between write and commit", CommitsWhenKilled, loader_killed),
    case!("tables that are left out", IgnoresFilters, tables_left_out),
    case!("first load and what the log has of its time", SkipsReplay, first_load_overlap),
    case!("hand-over at one position", SwallowsRefusals, hand_over),
    case!("older epoch changes no mark", IgnoresEpochs, older_epoch),
    case!("started anew", SwallowsRefusals, started_anew),
];

fn items() -> Arc<TableSchema> {
    Shape::new("items")
        .key("id", ColumnType::Int4)
        .column("n", ColumnType::Int4)
        .column("big", ColumnType::Text)
        .build()
}

fn events() -> Arc<TableSchema> {
    Shape::new("events").column("n", ColumnType::Int4).build()
}

fn item(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

fn chunk(table: &TableSchema, number: u32, restart: u32) -> ChunkLoad {
    ChunkLoad {
        run: RUN,
        chunk: ChunkId { table: 0, restart, number },
        table: table.table.clone(),
        restart,
        is_one_generation: true,
    }
}

fn part(table: &Arc<TableSchema>, log: &Log, rows: impl IntoIterator<Item = Vec<Value>>) -> PartFeed {
    PartFeed::new([chunk_part(table, log.start().commit, rows)])
}

fn loads(sink: &mut dyn Sink) -> Result<&mut dyn TableLoads, String> {
    sink.loads().ok_or_else(|| "the sink has no loads()".to_owned())
}

async fn prepare(sink: &mut dyn Sink, restart: u32, shape: &Arc<TableSchema>) -> Outcome {
    let prepared = loads(sink)?.prepare(RUN, restart, shape).await;
    prepared.map_err(|error| format!("prepare failed: {error}"))
}

async fn mark(sink: &mut dyn Sink, table: &TableSchema, stage: TableStage, position: Position) -> Outcome {
    let marked = loads(sink)?.mark(std::slice::from_ref(&table.table), stage, position).await;
    marked.map_err(|error| format!("marking as {stage:?} failed: {error}"))
}

async fn load(
    target: &dyn SinkUnderTest,
    faults: Faults,
    chunk: &ChunkLoad,
    mut parts: PartFeed,
) -> Result<Loaded, SinkError> {
    let Some(mut loader) = target.make_loader(faults) else {
        return Err(SinkError::Transient("there is no loader".to_owned()));
    };
    let loaded = tokio::time::timeout(PATIENCE, loader.load(chunk, &mut parts)).await;
    let loaded = loaded.map_err(|_| SinkError::Transient("the loader did not answer".to_owned()))?;
    loader.close().await;
    loaded
}

async fn expect_loaded(target: &dyn SinkUnderTest, chunk: &ChunkLoad, parts: PartFeed, expected: Loaded) -> Outcome {
    match load(target, Faults::default(), chunk, parts).await {
        Ok(loaded) if loaded == expected => Ok(()),
        outcome => Err(format!("expected {expected:?} of {}, got {outcome:?}", chunk.chunk)),
    }
}

/// A sink that was opened, but stands nowhere yet.
async fn fresh(target: &dyn SinkUnderTest) -> Result<Box<dyn Sink>, String> {
    let mut sink = target.make(Faults::default(), Arc::new(EmptySource));
    sink.open(Epoch(1)).await.map_err(|error| format!("the first open failed: {error}"))?;
    Ok(sink)
}

async fn chunk_exactly_once(target: &dyn SinkUnderTest) -> Outcome {
    let (log, events) = (Log::new(), events());
    let mut sink = fresh(target).await?;
    let first = chunk(&events, 0, 0);
    let rows = || part(&events, &log, [1, 2].map(|n| vec![Value::Int(n)]));
    // Nothing is being copied yet.
    expect_loaded(target, &first, rows(), Loaded::Stale).await?;
    prepare(sink.as_mut(), 0, &events).await?;
    let broken_off = PartFeed::interrupted([chunk_part(&events, log.start().commit, [vec![Value::Int(1)]])]);
    match load(target, Faults::default(), &first, broken_off).await {
        Err(SinkError::Interrupted(_)) => {}
        outcome => return Err(format!("a chunk that could not be read ends as {outcome:?}")),
    }
    expect_loaded(target, &first, rows(), Loaded::Now { rows: 2 }).await?;
    expect_loaded(target, &first, rows(), Loaded::Before).await?;
    // A chunk without rows is one too.
    let second = chunk(&events, 1, 0);
    expect_loaded(target, &second, part(&events, &log, []), Loaded::Now { rows: 0 }).await?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")], &[Some("2")]])?;
    let mut loaded = loads(sink.as_mut())?.loaded(RUN).await.map_err(|error| error.to_string())?;
    loaded.sort_unstable();
    if loaded != [first.chunk, second.chunk] {
        return Err(format!("the sink says that {loaded:?} are loaded"));
    }
    // To prepare again what is being copied changes nothing.
    prepare(sink.as_mut(), 0, &events).await?;
    expect_loaded(target, &first, rows(), Loaded::Before).await?;
    loads(sink.as_mut())?.forget(RUN).await.map_err(|error| error.to_string())?;
    let left = loads(sink.as_mut())?.loaded(RUN).await.map_err(|error| error.to_string())?;
    if left.is_empty() { Ok(()) } else { Err("the notes of a run that is over were not forgotten".to_owned()) }
}

async fn two_loaders(target: &dyn SinkUnderTest) -> Outcome {
    let (log, events) = (Log::new(), events());
    let mut sink = fresh(target).await?;
    prepare(sink.as_mut(), 0, &events).await?;
    let first = chunk(&events, 0, 0);
    let rows = || part(&events, &log, (0..500).map(|n| vec![Value::Int(n)]));
    let (left, right) =
        tokio::join!(load(target, Faults::default(), &first, rows()), load(target, Faults::default(), &first, rows()));
    let mut outcomes = [left, right].map(|outcome| outcome.map_err(|error| error.to_string()));
    outcomes.sort_by_key(|outcome| !matches!(outcome, Ok(Loaded::Now { .. })));
    if outcomes != [Ok(Loaded::Now { rows: 500 }), Ok(Loaded::Before)] {
        return Err(format!("two loads of one chunk at a time end as {outcomes:?}"));
    }
    let found = target.rows(&events.table).await.len();
    if found == 500 { Ok(()) } else { Err(format!("{found} rows instead of 500")) }
}

async fn older_restart(target: &dyn SinkUnderTest) -> Outcome {
    let (log, items) = (Log::new(), items());
    let mut sink = fresh(target).await?;
    prepare(sink.as_mut(), 0, &items).await?;
    let old = part(&items, &log, [item(1, 1, "old")]);
    expect_loaded(target, &chunk(&items, 0, 0), old.clone(), Loaded::Now { rows: 1 }).await?;
    prepare(sink.as_mut(), 1, &items).await?;
    // A chunk that was not loaded before, and the one that was.
    expect_loaded(target, &chunk(&items, 1, 0), part(&items, &log, [item(2, 2, "old")]), Loaded::Stale).await?;
    expect_loaded(target, &chunk(&items, 0, 0), old, Loaded::Stale).await?;
    expect_rows(target.rows(&items.table).await, &[])?;
    if !loads(sink.as_mut())?.loaded(RUN).await.map_err(|error| error.to_string())?.is_empty() {
        return Err("chunks of a table that was emptied still count as loaded".to_owned());
    }
    let new = part(&items, &log, [item(1, 9, "new")]);
    expect_loaded(target, &chunk(&items, 0, 1), new, Loaded::Now { rows: 1 }).await?;
    // An older restart that comes late empties nothing.
    prepare(sink.as_mut(), 0, &items).await?;
    expect_rows(target.rows(&items.table).await, &[&[Some("1"), Some("9"), Some("new")]])
}

async fn loader_killed(target: &dyn SinkUnderTest) -> Outcome {
    let (log, events) = (Log::new(), events());
    let mut sink = fresh(target).await?;
    prepare(sink.as_mut(), 0, &events).await?;
    let first = chunk(&events, 0, 0);
    let rows = || part(&events, &log, [1, 2].map(|n| vec![Value::Int(n)]));
    let faults = Faults { before_commit: Some(CommitFault::Die), ..Faults::default() };
    if let Ok(loaded) = load(target, faults, &first, rows()).await {
        return Err(format!("a load that died before its commit counts as {loaded:?}"));
    }
    expect_loaded(target, &first, rows(), Loaded::Now { rows: 2 }).await?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")], &[Some("2")]])
}

fn filtered(batch: Batch, filter: TableFilter) -> Batch {
    let filter = Arc::new(filter);
    let parts = batch.parts.into_iter().map(|part| BatchPart { tables: Some(Arc::clone(&filter)), ..part });
    Batch { parts: parts.collect(), ..batch }
}

async fn tables_left_out(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items, events) = (Log::new(), items(), events());
    let mut sink = opened(target, &log).await?;
    log.transaction([Change::insert(&items, item(1, 1, "a")), Change::insert(&events, [1.into()])]);
    let early = log.batch();
    log.transaction([Change::insert(&items, item(2, 2, "b")), Change::insert(&events, [2.into()])]);
    let late = log.batch();
    // `items` is taken from the second batch on, `events` not at all.
    let filter = TableFilter {
        taken: HashMap::from([(items.table.clone(), early.to)]),
        others: true,
        left_out: HashSet::from([events.table.clone()]),
    };
    apply(sink.as_mut(), &filtered(early, filter.clone())).await?;
    apply(sink.as_mut(), &filtered(late, filter)).await?;
    expect_rows(target.rows(&items.table).await, &[&[Some("2"), Some("2"), Some("b")]])?;
    expect_rows(target.rows(&events.table).await, &[])
}

/// A table that is loaded into a live sink: what the log has since C overlaps with what the chunks have.
async fn first_load_overlap(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut sink = opened(target, &log).await?;
    prepare(sink.as_mut(), 0, &items).await?;
    let early = log.start();
    // Two generations: the first chunk was read at `early`, the second one after what follows.
    let mixed = |number| ChunkLoad { is_one_generation: false, ..chunk(&items, number, 0) };
    let first = part(&items, &log, [item(1, 1, "a"), item(2, 2, "b"), item(3, 3, "c")]);
    log.transaction([
        Change::update(&items, item(2, 20, Value::Unchanged)),
        Change::update_key(&items, item(3, 0, Value::Null), item(30, 3, Value::Unchanged)),
        Change::delete(&items, item(1, 0, Value::Null)),
        Change::update(&items, item(5, 50, "E")),
    ]);
    let between = log.batch();
    let second = part(&items, &log, [item(5, 50, "E"), item(30, 3, "c")]);
    log.transaction([Change::insert(&items, item(6, 6, "f")), Change::delete(&items, item(5, 0, Value::Null))]);
    let later = log.batch();
    expect_loaded(target, &mixed(0), first, Loaded::Now { rows: 3 }).await?;
    expect_loaded(target, &mixed(1), second, Loaded::Now { rows: 2 }).await?;
    mark(sink.as_mut(), &items, TableStage::CatchingUp, early).await?;
    let tables = [items.table.clone()];
    for batch in [&between, &later] {
        let replayed = loads(sink.as_mut())?.replay(&tables, batch).await;
        replayed.map_err(|error| format!("the replay failed: {error}"))?;
    }
    let expected: &[&[Option<&str>]] =
        &[&[Some("2"), Some("20"), Some("b")], &[Some("30"), Some("3"), Some("c")], &[Some("6"), Some("6"), Some("f")]];
    expect_rows(target.rows(&items.table).await, expected)?;
    let marks = loads(sink.as_mut())?.marks().await.map_err(|error| error.to_string())?;
    match marks.as_slice() {
        [mark] if mark.stage == TableStage::CatchingUp && mark.position == Some(later.to) => Ok(()),
        marks => Err(format!("after the replay the marks are {marks:?}")),
    }
}

async fn hand_over(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items, events) = (Log::new(), items(), events());
    let mut sink = opened(target, &log).await?;
    let start = log.start();
    prepare(sink.as_mut(), 0, &items).await?;
    expect_loaded(target, &chunk(&items, 0, 0), part(&items, &log, [item(1, 1, "a")]), Loaded::Now { rows: 1 }).await?;
    if mark(sink.as_mut(), &items, TableStage::Ready, start).await.is_ok() {
        return Err("a table was handed over to a live stream without catching up".to_owned());
    }
    sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    mark(sink.as_mut(), &items, TableStage::CatchingUp, start).await?;
    expect_loaded(target, &chunk(&items, 1, 0), part(&items, &log, [item(9, 9, "z")]), Loaded::Stale).await?;
    log.transaction([Change::update(&items, item(1, 2, Value::Unchanged)), Change::insert(&events, [1.into()])]);
    let batch = log.batch();
    let without =
        TableFilter { others: true, left_out: HashSet::from([items.table.clone()]), ..TableFilter::default() };
    apply(sink.as_mut(), &filtered(batch.clone(), without)).await?;
    // The main stream is ahead of the mark: at neither position they can meet.
    for position in [start, batch.to] {
        let marked = loads(sink.as_mut())?.mark(std::slice::from_ref(&items.table), TableStage::Ready, position).await;
        if !matches!(marked, Err(SinkError::Position { .. })) {
            return Err(format!("a table was handed over at {position:?}, where it does not stand: {marked:?}"));
        }
        sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    }
    let tables = [items.table.clone()];
    loads(sink.as_mut())?.replay(&tables, &batch).await.map_err(|error| format!("the replay failed: {error}"))?;
    let again = loads(sink.as_mut())?.replay(&tables, &batch).await;
    if !matches!(again, Err(SinkError::Position { .. })) {
        return Err(format!("a batch was replayed twice: {again:?}"));
    }
    sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
    mark(sink.as_mut(), &items, TableStage::Ready, batch.to).await?;
    mark(sink.as_mut(), &items, TableStage::Ready, batch.to).await?;
    log.transaction([Change::update(&items, item(1, 3, Value::Unchanged))]);
    apply(sink.as_mut(), &log.batch()).await?;
    expect_rows(target.rows(&events.table).await, &[&[Some("1")]])?;
    expect_rows(target.rows(&items.table).await, &[&[Some("1"), Some("3"), Some("a")]])
}

async fn older_epoch(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut first = opened(target, &log).await?;
    prepare(first.as_mut(), 0, &items).await?;
    expect_loaded(target, &chunk(&items, 0, 0), part(&items, &log, [item(1, 1, "a")]), Loaded::Now { rows: 1 }).await?;
    // Their sessions live on, so that only their epoch can stop them; each gets one try, since a refused session is given up.
    let zombie = || target.make(Faults { keep_older_sessions: true, ..Faults::default() }, Arc::new(EmptySource));
    let mut zombies = Vec::new();
    for what in ["prepare", "mark", "replay", "forget", "start_anew"] {
        let mut sink = zombie();
        sink.open(Epoch(1)).await.map_err(|error| error.to_string())?;
        zombies.push((what, sink));
    }
    zombie().open(Epoch(2)).await.map_err(|error| error.to_string())?;
    log.transaction([Change::insert(&items, item(2, 2, "b"))]);
    let (batch, tables) = (log.batch(), [items.table.clone()]);
    for (what, sink) in &mut zombies {
        let loads = loads(sink.as_mut())?;
        let refused = match *what {
            "prepare" => loads.prepare(RUN, 1, &items).await,
            "mark" => loads.mark(&tables, TableStage::CatchingUp, batch.from).await,
            "replay" => loads.replay(&tables, &batch).await,
            "forget" => loads.forget(RUN).await,
            _ => loads.start_anew().await,
        };
        if !matches!(refused, Err(SinkError::Fenced(_))) {
            return Err(format!("{what} by an older epoch was not refused: {refused:?}"));
        }
    }
    expect_rows(target.rows(&items.table).await, &[&[Some("1"), Some("1"), Some("a")]])
}

async fn started_anew(target: &dyn SinkUnderTest) -> Outcome {
    let (mut log, items) = (Log::new(), items());
    let mut sink = fresh(target).await?;
    prepare(sink.as_mut(), 0, &items).await?;
    let start = log.start();
    expect_loaded(target, &chunk(&items, 0, 0), part(&items, &log, [item(1, 1, "a")]), Loaded::Now { rows: 1 }).await?;
    // The first load: nothing streams yet, and the table is ready where its snapshot was taken.
    mark(sink.as_mut(), &items, TableStage::Ready, start).await?;
    sink.start_at(start, log.epoch).await.map_err(|error| error.to_string())?;
    log.transaction([Change::insert(&items, item(2, 2, "b"))]);
    apply(sink.as_mut(), &log.batch()).await?;
    loads(sink.as_mut())?.start_anew().await.map_err(|error| error.to_string())?;
    let marks = loads(sink.as_mut())?.marks().await.map_err(|error| error.to_string())?;
    let position = sink.open(Epoch(2)).await.map_err(|error| error.to_string())?.position;
    if !marks.is_empty() || position.is_some() {
        return Err(format!("a sink that starts anew stands at {position:?} with {marks:?}"));
    }
    // Tables stay until they are prepared.
    if target.rows(&items.table).await.len() != 2 {
        return Err("a table was emptied before it was prepared".to_owned());
    }
    let tables: [TableName; 1] = [items.table.clone()];
    let early = loads(sink.as_mut())?.mark(&tables, TableStage::Ready, start).await;
    if early.is_ok() {
        return Err("a table became ready that was not prepared".to_owned());
    }
    sink.open(Epoch(2)).await.map_err(|error| error.to_string())?;
    prepare(sink.as_mut(), 0, &items).await?;
    expect_rows(target.rows(&items.table).await, &[])?;
    expect_loaded(target, &chunk(&items, 0, 0), part(&items, &log, [item(7, 7, "g")]), Loaded::Now { rows: 1 }).await?;
    expect_rows(target.rows(&items.table).await, &[&[Some("7"), Some("7"), Some("g")]])
}
