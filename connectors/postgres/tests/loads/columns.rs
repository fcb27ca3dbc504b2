//! Columns that the source has, had, or is about to have.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Notify;
use wallaby_connector_api::conformance::{Change, Log, PartFeed, Shape, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{
    Batch, BatchPart, ChunkLoad, ChunkParts, Faults, KeyValues, Loaded, SinkError, SinkFactory, SinkTask, SourceColumn,
    SourceColumns, SourceLookup, SourceRow, TableExtra, TableExtras, TableFilter,
};
use wallaby_model::run::TableStage;
use wallaby_model::{ColumnType, Epoch, Lsn, SegmentBody, TableName, TableSchema};
use wallaby_postgres::PostgresSinkFactory;

use crate::target::{Target, apply, query, rows, try_apply};
use crate::{RUN, chunk, items, load, somebody_waits};

/// The source has these columns now, and its WAL is there; older rows have 7 in `late`.
struct Ahead(Vec<&'static str>, Lsn);

#[async_trait]
impl SourceLookup for Ahead {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn columns(&self, _: &TableName) -> Result<SourceColumns, SinkError> {
        let filled = |name: &str| (name == "late").then(|| "7".to_owned());
        let column = |&name: &&str| SourceColumn { name: name.to_owned(), filled: filled(name) };
        Ok(SourceColumns { at: self.1, columns: self.0.iter().map(column).collect() })
    }

    async fn extras(&self, _: &TableName) -> Result<TableExtras, SinkError> {
        let default = TableExtra { name: "late".into(), definition: "40 + 2".into() };
        Ok(TableExtras { defaults: vec![default], ..TableExtras::default() })
    }
}

/// Loads a chunk with somebody who can ask the source.
async fn load_asking(target: &Target, lookup: Arc<Ahead>, chunk: &ChunkLoad, part: &mut PartFeed) {
    let factory = PostgresSinkFactory::new(target.config_at(&target.database.dsn()));
    let task = SinkTask { task: target.task.clone(), since: Epoch(0), lookup };
    factory.make_loader(task).unwrap().load(chunk, part).await.unwrap();
}

/// A column comes while a table is loaded: it is at the sink before the log, which is replayed from the snapshot on, has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_may_be_at_the_sink_before_the_log_has_it() {
    // Who brings it: the table as it was before, the first chunk, a later one.
    for who in ["the main stream", "the first chunk", "a later chunk"] {
        let target = Target::fresh("early").await;
        let mut log = Log::new();
        let shape = || Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
        let (old, mut new) = (shape().build(), shape().column("late", ColumnType::Int4).build());
        if who == "the first chunk" {
            Arc::get_mut(&mut new).unwrap().columns[2].not_null = true;
        }
        let source = || Arc::new(Ahead(vec!["id", "n", "late"], Lsn(u64::MAX)));
        let mut sink = target.opened_with(&log, source()).await;
        if who == "the main stream" {
            target.sql("CREATE TABLE items (id int PRIMARY KEY, n int, late int)").await;
        }
        let (start, tables) = (log.start(), [old.table.clone()]);
        let first = if who == "the first chunk" { &new } else { &old };
        sink.loads().unwrap().prepare(RUN, 0, first).await.unwrap();
        for (number, shape) in [(0, first), (1, if who == "a later chunk" { &new } else { first })] {
            let mut row = vec![Value::Int(number), Value::Int(0)];
            row.extend((shape.columns.len() == 3).then_some(Value::Int(5)));
            let mut part = PartFeed::new([chunk_part(shape, start.commit, [row])]);
            load_asking(&target, source(), &chunk(shape, u32::try_from(number).unwrap(), 0, true), &mut part).await;
        }
        sink.loads().unwrap().mark(&tables, TableStage::CatchingUp, start).await.unwrap();
        log.transaction([Change::update(&old, [1.into(), 1.into()]), Change::insert(&old, [9.into(), 9.into()])]);
        let before = log.batch();
        log.transaction([Change::update(&old, [1.into(), 2.into()])]);
        let at = log.batch();
        log.transaction([Change::update(&new, [1.into(), 3.into(), 6.into()])]);
        let after = log.batch();
        log.transaction([Change::update(&old, [1.into(), 4.into()])]);
        let gone = log.batch();
        // The main stream has none of these tables' rows until it has the table.
        sink.loads().unwrap().replay(&tables, &before).await.unwrap();
        let filter =
            Arc::new(TableFilter { others: true, left_out: tables.iter().cloned().collect(), ..Default::default() });
        let parts = before.parts.iter().map(|part| BatchPart { tables: Some(Arc::clone(&filter)), ..part.clone() });
        apply(&mut sink, &Batch { parts: parts.collect(), ..before.clone() }).await;
        sink.loads().unwrap().mark(&tables, TableStage::Ready, before.to).await.unwrap();
        // A new owner knows as much.
        sink.close().await;
        sink.open(Epoch(2)).await.unwrap();
        for batch in [&at, &after] {
            apply(&mut sink, batch).await;
        }
        let found = query(&target.database, "SELECT n, late FROM items WHERE id IN (1, 9) ORDER BY id").await;
        let ninth = if who == "the main stream" { None } else { Some("7".to_owned()) };
        assert_eq!(found, [[Some("3".to_owned()), Some("6".to_owned())], [Some("9".to_owned()), ninth]], "{who}");
        // The log has had it: it was dropped.
        let Err(SinkError::Configuration { remedy, .. }) = try_apply(&mut sink, &gone).await else {
            panic!("{who}: the column stays")
        };
        assert!(remedy.contains(r#"DROP COLUMN "late""#), "{who}: {remedy}");
    }
}

/// A log that is past the moment at which the source was seen to have a column has it, or the column was dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_the_log_never_has_is_missed_once_the_log_is_past_the_load() {
    let target = Target::fresh("dropped").await;
    let mut log = Log::new();
    let mut sink = target.opened_with(&log, Arc::new(Ahead(vec!["id", "n", "big"], log.start().commit))).await;
    let tables = std::slice::from_ref(&items().table).to_vec();
    sink.loads().unwrap().prepare(RUN, 0, &items()).await.unwrap();
    sink.loads().unwrap().mark(&tables, TableStage::CatchingUp, log.start()).await.unwrap();
    sink.loads().unwrap().mark(&tables, TableStage::Ready, log.start()).await.unwrap();
    let dropped = Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4).build();
    log.transaction([Change::insert(&dropped, [1.into(), 1.into()])]);
    let Err(SinkError::Configuration { remedy, .. }) = try_apply(&mut sink, &log.batch()).await else {
        panic!("the column stays")
    };
    assert!(remedy.contains(r#"DROP COLUMN "big""#), "{remedy}");
}

/// The value of older rows is no default of the source's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_of_an_added_column_becomes_the_sources() {
    let target = Target::fresh("constant").await;
    let log = Log::new();
    let shape = || Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    let (old, new) = (shape().build(), shape().column("late", ColumnType::Int4).build());
    let source = || Arc::new(Ahead(vec!["id", "n", "late"], Lsn(u64::MAX)));
    let mut sink = target.make(Faults::default(), source());
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &old).await.unwrap();
    let mut part = PartFeed::new([chunk_part(&new, log.start().commit, [vec![1.into(), 1.into(), 1.into()]])]);
    load_asking(&target, source(), &chunk(&new, 0, 0, true), &mut part).await;
    sink.loads().unwrap().mark(std::slice::from_ref(&old.table), TableStage::Ready, log.start()).await.unwrap();
    let default = "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'items'::regclass";
    assert_eq!(query(&target.database, default).await, rows(&[&["7"]]));
    for _ in 0..2 {
        assert_eq!(sink.loads().unwrap().finish(&old.table).await.unwrap(), [""; 0]);
        assert_eq!(query(&target.database, default).await, rows(&[&["(40 + 2)"]]));
    }
}

/// Two loads add the same column at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_loads_that_meet_a_new_column_at_once_both_go_on() {
    let target = Arc::new(Target::fresh("at_once").await);
    let log = Log::new();
    let shape = || Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    let (old, new) = (shape().build(), shape().column("late", ColumnType::Text).build());
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &old).await.unwrap();
    let part = |id: i64, big: &str| chunk_part(&new, log.start().commit, [vec![id.into(), 1.into(), big.into()]]);
    // The first one holds its lock on the table until its second part has come.
    let (asked, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let mut slow =
        Parts { first: Some(part(1, &"x".repeat(9 << 20))), asked: Arc::clone(&asked), release: Arc::clone(&release) };
    let first = tokio::spawn({
        let (target, chunk) = (Arc::clone(&target), chunk(&new, 0, 0, true));
        async move { load(&target, &chunk, &mut slow).await }
    });
    let second = tokio::spawn({
        let (target, chunk, mut feed) = (Arc::clone(&target), chunk(&new, 1, 0, true), PartFeed::new([part(2, "y")]));
        async move {
            asked.notified().await;
            load(&target, &chunk, &mut feed).await
        }
    });
    somebody_waits(&target).await;
    release.notify_one();
    assert_eq!(first.await.unwrap().unwrap(), Loaded::Now { rows: 1 });
    assert_eq!(second.await.unwrap().unwrap(), Loaded::Now { rows: 1 });
}

/// One huge part, which is written before the next one is asked for, and then nothing until it is allowed to end.
struct Parts {
    first: Option<Arc<SegmentBody>>,
    asked: Arc<Notify>,
    release: Arc<Notify>,
}

#[async_trait]
impl ChunkParts for Parts {
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError> {
        match self.first.take() {
            Some(part) => Ok(Some(part)),
            None => {
                self.asked.notify_one();
                self.release.notified().await;
                Ok(None)
            }
        }
    }
}

/// What nobody knows of is named before hours are spent on a load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_with_a_column_that_the_source_never_had_is_not_loaded() {
    let target = Target::fresh("strange").await;
    target.sql("CREATE TABLE items (id int PRIMARY KEY, n int, big text, strange int)").await;
    let mut sink = target.make(Faults::default(), Arc::new(Ahead(vec!["id", "n", "big"], Lsn(u64::MAX))));
    sink.open(Epoch(1)).await.unwrap();
    let prepared = sink.loads().unwrap().prepare(RUN, 0, &items()).await;
    let Err(SinkError::Configuration { remedy, .. }) = prepared else { panic!("{prepared:?}") };
    assert!(remedy.contains(r#"DROP COLUMN "strange""#), "{remedy}");
}
