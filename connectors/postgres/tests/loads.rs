//! The first load at a real database: the hazards of overlapping loads, mixed generations, and what is added after it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use target::{Target, apply, query, rows, try_apply};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use wallaby_connector_api::conformance::{
    Change, EmptySource, Log, PartFeed, PortionFeed, Shape, SinkUnderTest, Value, chunk_part,
};
use wallaby_connector_api::{
    Applied, Batch, BatchPart, ChunkLoad, ChunkParts, CommitFault, Faults, ForeignKey, HangPoint, KeyValues, Loaded,
    Portion, Portions, Sink, SinkError, SinkFactory, SinkTask, SourceColumn, SourceColumns, SourceLookup, SourceRow,
    TableExtra, TableExtras, TableFilter, TableIndex,
};
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, ColumnType, Epoch, Lsn, RunId, SegmentBody, TableName, TableSchema};
use wallaby_postgres::PostgresSinkFactory;
use wallaby_testkit::eventually;

const RUN: RunId = RunId(1);
const LIMIT: Duration = Duration::from_secs(20);

fn items() -> Arc<TableSchema> {
    let shape = Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    shape.column("big", ColumnType::Text).build()
}

fn events() -> Arc<TableSchema> {
    Shape::new("events").column("n", ColumnType::Int4).build()
}

fn item(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

fn chunk(table: &TableSchema, number: u32, restart: u32, is_one_generation: bool) -> ChunkLoad {
    let chunk = ChunkId { table: 0, restart, number };
    ChunkLoad { run: RUN, chunk, table: table.table.clone(), restart, is_one_generation }
}

async fn load(target: &Target, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, SinkError> {
    target.make_loader(Faults::default()).unwrap().load(chunk, parts).await
}

/// Gives its parts out once it is allowed to.
struct Held {
    asked: Arc<Notify>,
    release: Arc<Notify>,
    inner: PartFeed,
    is_released: bool,
}

impl Held {
    fn new(inner: PartFeed) -> (Held, Arc<Notify>, Arc<Notify>) {
        let (asked, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let held = Held { asked: Arc::clone(&asked), release: Arc::clone(&release), inner, is_released: false };
        (held, asked, release)
    }
}

#[async_trait]
impl ChunkParts for Held {
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError> {
        if !self.is_released {
            self.asked.notify_one();
            self.release.notified().await;
            self.is_released = true;
        }
        self.inner.next().await
    }
}

/// A backend of ours waits for a lock.
async fn somebody_waits(target: &Target) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually(LIMIT, "somebody waits for a lock", async || {
        if query(&target.database, waiting).await == rows(&[&["0"]]) { Err("nobody") } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_two_attempts_at_one_chunk_overlap() {
    let target = Arc::new(Target::fresh("h23").await);
    let (log, events) = (Log::new(), events());
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &events).await.unwrap();
    let part = || PartFeed::new([chunk_part(&events, log.start().commit, (0..100).map(|n| vec![Value::Int(n)]))]);
    let (mut held, asked, release) = Held::new(part());
    let first = tokio::spawn({
        let (target, chunk) = (Arc::clone(&target), chunk(&events, 0, 0, true));
        async move { load(&target, &chunk, &mut held).await }
    });
    asked.notified().await;
    let second = tokio::spawn({
        let (target, chunk, mut part) = (Arc::clone(&target), chunk(&events, 0, 0, true), part());
        async move { load(&target, &chunk, &mut part).await }
    });
    somebody_waits(&target).await;
    release.notify_one();
    assert_eq!(first.await.unwrap().unwrap(), Loaded::Now { rows: 100 });
    assert_eq!(second.await.unwrap().unwrap(), Loaded::Before);
    assert_eq!(target.rows(&events.table).await.len(), 100);
}

/// The port of a wire to the server over which so many bytes go there and then none, while it stays open: a client that vanished.
async fn wire_that_falls_silent(port: u16, after: u64) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let ((from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let mut first = from_client.take(after);
        let requests = async {
            tokio::io::copy(&mut first, &mut to_server).await.unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
            () = requests => {}
        }
    });
    here
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_a_loader_that_vanished_in_the_middle_of_a_copy_is_ended_by_the_next_one() {
    let target = Target::fresh("h23_vanished").await;
    let (log, table) = (Log::new(), Shape::new("big").column("t", ColumnType::Text).build());
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &table).await.unwrap();
    let row = |n: i64| vec![Value::Text(n.to_string().repeat(1000))];
    let part = PartFeed::new([chunk_part(&table, log.start().commit, (1000..2000).map(row))]);
    // Numbers of every length: the session's name has room for them.
    let mut largest = chunk(&table, u32::MAX, 0, true);
    largest.chunk.table = u32::MAX;
    let port = target.database.postgres().port();
    let wire = wire_that_falls_silent(port, 1 << 20).await;
    let dsn = target.database.dsn().replace(&format!(":{port}/"), &format!(":{wire}/"));
    let factory = PostgresSinkFactory::new(target.config_at(&dsn));
    let lookup = Arc::new(wallaby_connector_api::conformance::EmptySource);
    let mut vanished = factory.make_loader(SinkTask { task: target.task.clone(), since: Epoch(0), lookup }).unwrap();
    let first = tokio::spawn({
        let (chunk, mut part) = (largest.clone(), part.clone());
        async move { vanished.load(&chunk, &mut part).await }
    });
    let copying = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' \
        AND wait_event = 'ClientRead' AND query LIKE 'COPY%'";
    eventually(LIMIT, "the server waits for more rows", async || {
        if query(&target.database, copying).await == rows(&[&["1"]]) { Ok(()) } else { Err("not yet") }
    })
    .await;
    let second = tokio::time::timeout(3 * LIMIT, load(&target, &largest, &mut part.clone())).await;
    assert_eq!(second.expect("the next one waits for it without end").unwrap(), Loaded::Now { rows: 1000 });
    assert!(matches!(first.await.unwrap(), Err(SinkError::Transient(_))));
    assert_eq!(target.rows(&table.table).await.len(), 1000);
}

/// The table is started again while a load of its last start is in mid-transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h23_an_older_load_does_not_commit_into_the_emptied_table() {
    let target = Arc::new(Target::fresh("h23_restart").await);
    let (log, events) = (Log::new(), events());
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &events).await.unwrap();
    let part = PartFeed::new([chunk_part(&events, log.start().commit, [vec![Value::Int(1)]])]);
    let (mut held, asked, release) = Held::new(part.clone());
    let old = tokio::spawn({
        let (target, chunk) = (Arc::clone(&target), chunk(&events, 0, 0, true));
        async move { load(&target, &chunk, &mut held).await }
    });
    asked.notified().await;
    let prepared = tokio::spawn({
        let events = Arc::clone(&events);
        async move {
            let prepared = sink.loads().unwrap().prepare(RUN, 1, &events).await;
            (sink, prepared)
        }
    });
    // Either it waits for the load, or it is through and must not be undone by it.
    somebody_waits_unless(&target, || prepared.is_finished()).await;
    release.notify_one();
    old.await.unwrap().unwrap();
    let (mut sink, prepared) = prepared.await.unwrap();
    prepared.unwrap();
    assert!(target.rows(&events.table).await.is_empty(), "a row of the old start is in the table");
    assert!(sink.loads().unwrap().loaded(RUN).await.unwrap().is_empty());
    assert_eq!(load(&target, &chunk(&events, 0, 0, true), &mut part.clone()).await.unwrap(), Loaded::Stale);
    assert_eq!(load(&target, &chunk(&events, 0, 1, true), &mut part.clone()).await.unwrap(), Loaded::Now { rows: 1 });
}

/// The source as it is now: one row.
struct OneRow(SegmentBody);

#[async_trait]
impl SourceLookup for OneRow {
    async fn row_by_key(&self, _: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok((key[0].as_deref() == Some("70")).then(|| self.0.clone()))
    }
}

/// A row moves between two snapshots so that neither has it, and its large value is in no change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_chunks_of_two_generations_converge() {
    let target = Target::fresh("h02").await;
    let (mut log, items) = (Log::new(), items());
    let now = SegmentBody::clone(&chunk_part(&items, log.start().commit, [item(70, 8, "big 7")]));
    let mut sink = target.opened_with(&log, Arc::new(OneRow(now))).await;
    let start = log.start();
    sink.loads().unwrap().prepare(RUN, 0, &items).await.unwrap();
    let mut first = PartFeed::new([chunk_part(&items, start.commit, [item(1, 1, "a"), item(2, 2, "b")])]);
    assert_eq!(load(&target, &chunk(&items, 0, 0, false), &mut first).await.unwrap(), Loaded::Now { rows: 2 });
    log.transaction([
        Change::update_key(&items, item(7, 0, Value::Null), item(70, 7, Value::Unchanged)),
        Change::update(&items, item(2, 20, Value::Unchanged)),
        Change::update_key(&items, item(1, 0, Value::Null), item(10, 1, Value::Unchanged)),
    ]);
    log.transaction([Change::update(&items, item(70, 8, Value::Unchanged))]);
    let batch = log.batch();
    // The second chunk is of a later snapshot: it has a row again that the first one has under its old key, and one that it has too.
    let mut second = PartFeed::new([chunk_part(&items, batch.to.commit, [item(10, 1, "a"), item(2, 20, "b")])]);
    assert_eq!(load(&target, &chunk(&items, 1, 0, false), &mut second).await.unwrap(), Loaded::Now { rows: 2 });
    let tables = [items.table.clone()];
    let loads = sink.loads().unwrap();
    loads.mark(&tables, TableStage::CatchingUp, start).await.unwrap();
    loads.replay(&tables, &batch).await.unwrap();
    let expected = rows(&[&["10", "1", "a"], &["2", "20", "b"], &["70", "8", "big 7"]]);
    assert_eq!(target.rows(&items.table).await, expected);
}

/// Rows come and go between C and P; whatever P is, there is no ghost and no row twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_no_ghost_around_the_hand_over() {
    for handed_over_after in 1..=4 {
        let target = Target::fresh("h08").await;
        let (mut log, items, events) = (Log::new(), items(), events());
        let mut sink = target.opened(&log).await;
        let (start, tables) = (log.start(), [items.table.clone(), events.table.clone()]);
        for (index, table) in [&items, &events].into_iter().enumerate() {
            sink.loads().unwrap().prepare(RUN, 0, table).await.unwrap();
            let row = if index == 0 { item(1, 1, "a") } else { vec![Value::Int(1)] };
            let mut chunk = chunk(table, 0, 0, true);
            chunk.chunk.table = index as u32;
            load(&target, &chunk, &mut PartFeed::new([chunk_part(table, start.commit, [row])])).await.unwrap();
        }
        let mut batches = Vec::new();
        for n in 2..=5 {
            log.transaction([
                Change::insert(&items, item(n, n, "b")),
                Change::insert(&events, [n.into()]),
                Change::delete(&items, item(n - 1, 0, Value::Null)),
            ]);
            batches.push(log.batch());
        }
        sink.loads().unwrap().mark(&tables, TableStage::CatchingUp, start).await.unwrap();
        let left_out: HashSet<TableName> = tables.iter().cloned().collect();
        let filter = Arc::new(TableFilter { others: true, left_out, ..TableFilter::default() });
        let (before, after) = batches.split_at(handed_over_after);
        for batch in before {
            let parts = batch.parts.iter().cloned();
            let parts = parts.map(|part| BatchPart { tables: Some(Arc::clone(&filter)), ..part }).collect();
            apply(&mut sink, &Batch { parts, ..batch.clone() }).await;
        }
        for batch in before {
            sink.loads().unwrap().replay(&tables, batch).await.unwrap();
        }
        let at = before.last().unwrap().to;
        sink.loads().unwrap().mark(&tables, TableStage::Ready, at).await.unwrap();
        for batch in after {
            apply(&mut sink, batch).await;
        }
        assert_eq!(target.rows(&items.table).await, rows(&[&["5", "5", "b"]]), "P after {handed_over_after}");
        let expected = rows(&[&["1"], &["2"], &["3"], &["4"], &["5"]]);
        assert_eq!(target.rows(&events.table).await, expected, "P after {handed_over_after}");
    }
}

/// What the source has beside the rows.
struct WithExtras;

#[async_trait]
impl SourceLookup for WithExtras {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn extras(&self, table: &TableName) -> Result<TableExtras, SinkError> {
        let extra = |name: &str, definition: &str| TableExtra { name: name.into(), definition: definition.into() };
        let using =
            |name: &str, is_unique, using: &str| TableIndex { name: name.into(), is_unique, using: using.into() };
        if table.name != "items" {
            return Ok(TableExtras::default());
        }
        Ok(TableExtras {
            indexes: vec![
                using("items_n", false, "USING btree (n)"),
                using("items_big", true, "USING btree (lower(big)) WHERE (n > 0)"),
                using("items_odd", false, "USING nosuch (n)"),
            ],
            constraints: vec![extra("items_n_check", "CHECK ((n >= 0))"), extra("items_big_key", "UNIQUE (big)")],
            foreign_keys: vec![ForeignKey {
                name: "items_parent".into(),
                columns: vec!["n".into()],
                references: TableName::new("public", "parents"),
                referenced: vec!["id".into()],
            }],
            defaults: vec![extra("n", "7"), extra("big", "nextval('nosuch'::regclass)")],
        })
    }
}

/// What of that is at the sink: indexes, constraints, defaults.
const ADDED: &str = "\
    SELECT count(*) FROM pg_class WHERE relname IN ('items_n', 'items_big', 'items_big_key') AND relkind = 'i' \
    UNION ALL SELECT count(*) FROM pg_constraint WHERE conname IN ('items_n_check', 'items_big_key', 'items_parent') AND convalidated \
    UNION ALL SELECT count(*) FROM pg_attrdef WHERE adrelid = 'items'::regclass";

/// `items`, and `parents` that it refers to, loaded by a sink whose source has extras.
async fn loaded_with_extras(target: &Target, log: &Log) -> (Box<dyn Sink>, [Arc<TableSchema>; 2]) {
    let (items, parents) = (items(), Shape::new("parents").key("id", ColumnType::Int4).build());
    let mut sink = target.make(Faults::default(), Arc::new(WithExtras));
    sink.open(Epoch(1)).await.unwrap();
    for (table, row) in [(&parents, vec![Value::Int(1)]), (&items, item(1, 1, "a"))] {
        sink.loads().unwrap().prepare(RUN, 0, table).await.unwrap();
        let mut chunk = chunk(table, 0, 0, true);
        chunk.chunk.table = u32::from(table.table.name == "items");
        load(target, &chunk, &mut PartFeed::new([chunk_part(table, log.start().commit, [row])])).await.unwrap();
        sink.loads().unwrap().mark(std::slice::from_ref(&table.table), TableStage::Ready, log.start()).await.unwrap();
    }
    (sink, [items, parents])
}

/// Also where its foreign key could be made, because a table of ours is what it refers to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_added_to_a_table_that_a_person_made() {
    let target = Target::fresh("persons_table").await;
    target.sql("CREATE TABLE items (id int PRIMARY KEY, n int, big text)").await;
    let log = Log::new();
    let (mut sink, [items, _]) = loaded_with_extras(&target, &log).await;
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "1", "a"]]));
    let none = rows(&[&["0"], &["0"], &["0"]]);
    for run in [None, Some(RunId(2))] {
        // It was there before another load too, and then by a mark of ours.
        if let Some(run) = run {
            sink.loads().unwrap().prepare(run, 0, &items).await.unwrap();
            let tables = std::slice::from_ref(&items.table);
            sink.loads().unwrap().mark(tables, TableStage::Ready, log.start()).await.unwrap();
        }
        assert_eq!(sink.loads().unwrap().finish(&items.table).await.unwrap(), [""; 0]);
        assert_eq!(query(&target.database, ADDED).await, none, "{run:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extras_are_added_once_and_foreign_keys_come_back_after_another_load() {
    let target = Target::fresh("extras").await;
    let log = Log::new();
    let (mut sink, [items, parents]) = loaded_with_extras(&target, &log).await;
    let sentences = sink.loads().unwrap().finish(&items.table).await.unwrap();
    assert_eq!(sentences.len(), 2, "{sentences:?}");
    assert!(sentences[0].contains("items_odd") && sentences[0].contains("CREATE INDEX CONCURRENTLY"), "{sentences:?}");
    assert!(sentences[1].contains("nosuch") && sentences[1].contains("SET DEFAULT"), "{sentences:?}");
    let all = rows(&[&["3"], &["3"], &["1"]]);
    assert_eq!(query(&target.database, ADDED).await, all);
    // A second try, by a sink that was not opened, changes nothing.
    let mut beside = target.make(Faults::default(), Arc::new(WithExtras));
    assert_eq!(beside.loads().unwrap().finish(&items.table).await.unwrap().len(), 2);
    assert_eq!(query(&target.database, ADDED).await, all);
    // One that died between making constraints and looking at their rows.
    let not_valid = "UPDATE pg_constraint SET convalidated = false WHERE conname IN ('items_n_check', 'items_parent')";
    target.sql(not_valid).await;
    assert_eq!(beside.loads().unwrap().finish(&items.table).await.unwrap().len(), 2);
    assert_eq!(query(&target.database, ADDED).await, all);
    // Loaded anew, from chunks of two generations: a value went from one row to the other in between.
    target.sql("ALTER TABLE items ADD CONSTRAINT a_persons UNIQUE (n, id)").await;
    sink.loads().unwrap().prepare(RunId(2), 0, &items).await.unwrap();
    for number in 1..=2 {
        let mut part = PartFeed::new([chunk_part(&items, log.start().commit, [item(number, 1, "one")])]);
        let chunk = ChunkLoad { run: RunId(2), ..chunk(&items, u32::try_from(number).unwrap(), 0, false) };
        assert_eq!(load(&target, &chunk, &mut part).await.unwrap(), Loaded::Now { rows: 1 });
    }
    let persons = "SELECT count(*) FROM pg_constraint WHERE conname = 'a_persons'";
    assert_eq!(query(&target.database, persons).await, rows(&[&["1"]]), "the source does not have it");
    target.sql("DELETE FROM items WHERE id = 1").await;
    sink.loads().unwrap().mark(std::slice::from_ref(&items.table), TableStage::Ready, log.start()).await.unwrap();
    assert_eq!(beside.loads().unwrap().finish(&items.table).await.unwrap().len(), 2);
    assert_eq!(query(&target.database, ADDED).await, all);
    // The table that is referred to is loaded anew, alone.
    sink.loads().unwrap().prepare(RunId(2), 0, &parents).await.unwrap();
    let foreign_keys = "SELECT conname::text FROM pg_constraint WHERE contype = 'f'";
    assert!(query(&target.database, foreign_keys).await.is_empty());
    target.sql("INSERT INTO parents VALUES (1)").await;
    assert!(beside.loads().unwrap().finish(&parents.table).await.unwrap().is_empty());
    assert_eq!(query(&target.database, foreign_keys).await, rows(&[&["items_parent"]]));
}

/// A default that the source's table has is on the column at the sink too, which does not make the column a person's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_with_a_default_of_ours_is_missed_when_the_source_has_it_no_more() {
    let renamed = Shape::new("items").key("id", ColumnType::Int4).column("m", ColumnType::Int4);
    let renamed = renamed.column("big", ColumnType::Text).build();
    let dropped = Shape::new("items").key("id", ColumnType::Int4).column("big", ColumnType::Text).build();
    for (shape, row, statement) in [
        (renamed, item(2, 2, "b"), r#"RENAME COLUMN "n" TO "m""#),
        (dropped, vec![2.into(), "b".into()], r#"DROP COLUMN "n""#),
    ] {
        let target = Target::fresh("defaults").await;
        let (mut log, items) = (Log::new(), items());
        let mut sink = target.make(Faults::default(), Arc::new(WithExtras));
        sink.open(Epoch(1)).await.unwrap();
        let tables = std::slice::from_ref(&items.table);
        sink.loads().unwrap().prepare(RUN, 0, &items).await.unwrap();
        sink.loads().unwrap().mark(tables, TableStage::Ready, log.start()).await.unwrap();
        sink.start_at(log.start(), Epoch(1)).await.unwrap();
        sink.loads().unwrap().finish(&items.table).await.unwrap();
        target.sql("ALTER TABLE items ADD COLUMN loaded_at timestamptz DEFAULT now()").await;
        log.transaction([Change::insert(&items, item(1, 1, "a"))]);
        apply(&mut sink, &log.batch()).await;
        log.transaction([Change::insert(&shape, row)]);
        let batch = log.batch();
        let Err(SinkError::Configuration { reason, remedy }) = try_apply(&mut sink, &batch).await else {
            panic!("the column stays, and its rows are wrong: {statement}")
        };
        assert!(remedy.contains(statement) && !reason.contains("loaded_at"), "{reason}: {remedy}");
        target.sql(&format!("ALTER TABLE items {statement}")).await;
        sink.open(Epoch(2)).await.unwrap();
        apply(&mut sink, &batch).await;
        if statement.starts_with("DROP") {
            // A person's column of that name is nothing that the source had.
            target.sql("ALTER TABLE items ADD COLUMN n integer DEFAULT 5").await;
            sink.open(Epoch(3)).await.unwrap();
            log.transaction([Change::insert(&shape, vec![3.into(), "c".into()])]);
            apply(&mut sink, &log.batch()).await;
        }
    }
}

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persons_foreign_key_in_the_way_is_named() {
    let target = Target::fresh("fk_in_the_way").await;
    target.sql("CREATE TABLE items (id int PRIMARY KEY, n int, big text)").await;
    target.sql("CREATE TABLE lines (item int CONSTRAINT of_item REFERENCES items)").await;
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    let prepared = sink.loads().unwrap().prepare(RUN, 0, &items()).await;
    let Err(SinkError::Configuration { remedy, .. }) = prepared else { panic!("{prepared:?}") };
    assert!(remedy.contains(r#"ALTER TABLE "public"."lines" DROP CONSTRAINT "of_item""#), "{remedy}");
}

/// What two tables that go to one here are told.
fn collision<T: std::fmt::Debug>(outcome: Result<T, SinkError>) -> String {
    match outcome {
        Err(SinkError::Configuration { reason, remedy }) if reason.contains("both go to dw.orders") => remedy,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tables_of_the_source_do_not_share_one_here() {
    let target = Target::fresh("shared").await;
    let factory = PostgresSinkFactory::new(Target::config_of(&target.database.dsn(), "dw"));
    let lookup = Arc::new(wallaby_connector_api::conformance::EmptySource);
    let task = SinkTask { task: target.task.clone(), since: Epoch(0), lookup };
    let [a, b] = ["tenant_a", "tenant_b"].map(|schema| {
        let mut shape = TableSchema::clone(&Shape::new("orders").key("id", ColumnType::Int4).build());
        shape.table.schema = schema.to_owned();
        Arc::new(shape)
    });
    let (mut log, here) = (Log::new(), TableName::new("dw", "orders"));
    let mut sink = factory.make(task.clone());
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, &a).await.unwrap();
    let mut loader = factory.make_loader(task.clone()).unwrap();
    let mut part = PartFeed::new([chunk_part(&a, log.start().commit, [vec![Value::Int(1)]])]);
    assert_eq!(loader.load(&chunk(&a, 0, 0, true), &mut part).await.unwrap(), Loaded::Now { rows: 1 });
    // In the same run, in whatever stage the first one is.
    let first = rows(&[&["1"]]);
    collision(sink.loads().unwrap().prepare(RUN, 0, &b).await);
    assert_eq!(target.rows(&here).await, first, "the rows of the other one are gone");
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().mark(std::slice::from_ref(&a.table), TableStage::Ready, log.start()).await.unwrap();
    sink.start_at(log.start(), log.epoch).await.unwrap();
    // In a later one.
    collision(sink.loads().unwrap().prepare(RunId(2), 0, &b).await);
    assert_eq!(target.rows(&here).await, first, "the rows of the other one are gone");
    // Without a load of its own, in an opening in which the first one had no change.
    sink.open(Epoch(1)).await.unwrap();
    log.transaction([Change::insert(&b, [1.into()]), Change::delete(&b, [1.into()])]);
    let batch = log.batch();
    let remedy = collision(sink.apply(&batch).await);
    assert_eq!(target.rows(&here).await, first, "the row of the other one is gone");
    // A table that went to another schema at the source.
    let (_, forget) = remedy.split_once("run at the sink: ").unwrap();
    let (forget, _) = forget.split_once(';').unwrap();
    assert!(forget.contains("'tenant_a'"), "{forget}");
    let forget = format!("BEGIN; {forget}; ROLLBACK");
    target.sql(&forget).await;
    // The same one anew, and the other one when it is gone.
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RunId(2), 0, &a).await.unwrap();
    sink.loads().unwrap().mark(std::slice::from_ref(&a.table), TableStage::Gone, log.start()).await.unwrap();
    sink.loads().unwrap().prepare(RunId(2), 0, &b).await.unwrap();
    sink.loads().unwrap().start_anew().await.unwrap();
    sink.loads().unwrap().prepare(RunId(3), 0, &a).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_flow_of_the_name_left_is_not_taken_for_this_ones() {
    let target = Target::fresh("again").await;
    let factory = PostgresSinkFactory::new(target.config());
    let of_flow = |since: u64| SinkTask {
        task: target.task.clone(),
        since: Epoch(since),
        lookup: Arc::new(wallaby_connector_api::conformance::EmptySource),
    };
    let (log, items) = (Log::new(), items());
    let mut earlier = factory.make(of_flow(3));
    earlier.open(Epoch(5)).await.unwrap();
    earlier.loads().unwrap().prepare(RUN, 0, &items).await.unwrap();
    let first = chunk(&items, 0, 0, true);
    let mut parts = PartFeed::new([chunk_part(&items, log.start().commit, [item(1, 1, "a")])]);
    assert_eq!(load(&target, &first, &mut parts).await.unwrap(), Loaded::Now { rows: 1 });
    let tables = [items.table.clone()];
    earlier.loads().unwrap().mark(&tables, TableStage::Ready, log.start()).await.unwrap();
    earlier.start_at(log.start(), log.epoch).await.unwrap();
    // Another owner in the same flow finds it all.
    let mut later = factory.make(of_flow(3));
    assert_eq!(later.open(Epoch(7)).await.unwrap().position, Some(log.start()));
    assert_eq!(later.loads().unwrap().loaded(RUN).await.unwrap(), [first.chunk]);

    let mut again = factory.make(of_flow(9));
    assert_eq!(again.open(Epoch(11)).await.unwrap().position, None);
    let loads = again.loads().unwrap();
    assert_eq!((loads.marks().await.unwrap(), loads.loaded(RUN).await.unwrap()), (vec![], vec![]));
    loads.prepare(RUN, 0, &items).await.unwrap();
    let mut parts = PartFeed::new([chunk_part(&items, log.start().commit, [item(2, 2, "b")])]);
    assert_eq!(load(&target, &first, &mut parts).await.unwrap(), Loaded::Now { rows: 1 });
    assert_eq!(target.rows(&items.table).await, rows(&[&["2", "2", "b"]]));
}

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

/// A backend of ours waits for a lock, or what should wait is through.
async fn somebody_waits_unless(target: &Target, is_through: impl Fn() -> bool) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually(LIMIT, "somebody waits for a lock, or is through", async || {
        let waits = query(&target.database, waiting).await != rows(&[&["0"]]);
        if waits || is_through() { Ok(()) } else { Err("neither") }
    })
    .await;
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

/// A source whose table `items` has one constraint beside its key.
struct WithConstraint(&'static str);

#[async_trait]
impl SourceLookup for WithConstraint {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn extras(&self, _: &TableName) -> Result<TableExtras, SinkError> {
        let constraint = TableExtra { name: "items_u".into(), definition: self.0.into() };
        Ok(TableExtras { constraints: vec![constraint], ..TableExtras::default() })
    }
}

const CONSTRAINT: &str = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'items_u'";
const INDEXES: &str = "SELECT indexrelid::regclass::text, indisvalid::text FROM pg_index \
    WHERE indrelid = 'items'::regclass AND NOT indisprimary";

/// A live sink with a table that was loaded.
async fn live(target: &Target, log: &Log, items: &Arc<TableSchema>, rows: [Vec<Value>; 2]) -> Box<dyn Sink> {
    let mut sink = target.sink();
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RUN, 0, items).await.unwrap();
    let mut part = PartFeed::new([chunk_part(items, log.start().commit, rows)]);
    assert_eq!(load(target, &chunk(items, 0, 0, true), &mut part).await.unwrap(), Loaded::Now { rows: 2 });
    let tables = std::slice::from_ref(&items.table);
    sink.loads().unwrap().mark(tables, TableStage::Ready, log.start()).await.unwrap();
    sink.start_at(log.start(), log.epoch).await.unwrap();
    sink
}

fn finish(
    target: &Target,
    definition: &'static str,
    items: &Arc<TableSchema>,
) -> tokio::task::JoinHandle<Result<Vec<String>, SinkError>> {
    let mut beside = target.make(Faults::default(), Arc::new(WithConstraint(definition)));
    let table = items.table.clone();
    tokio::spawn(async move { beside.loads().unwrap().finish(&table).await })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unique_constraint_is_added_while_others_read_and_write() {
    for definition in [
        "UNIQUE (n)",
        "UNIQUE NULLS NOT DISTINCT (n) INCLUDE (big)",
        "UNIQUE (n) DEFERRABLE",
        "UNIQUE (n) DEFERRABLE INITIALLY DEFERRED",
    ] {
        let target = Target::fresh("unique").await;
        let (log, items) = (Log::new(), items());
        let _sink = live(&target, &log, &items, [item(1, 1, "a"), item(2, 2, "b")]).await;
        let writer = target.database.connect().await;
        writer.batch_execute("BEGIN; INSERT INTO items VALUES (3, 3, 'c')").await.unwrap();
        let finishing = finish(&target, definition, &items);
        somebody_waits(&target).await;
        // Behind somebody who waits for the whole table this would wait too.
        target.sql("BEGIN; LOCK TABLE items IN ROW EXCLUSIVE MODE NOWAIT").await;
        target.sql("INSERT INTO items VALUES (4, 4, 'd'); COMMIT").await;
        writer.batch_execute("COMMIT").await.unwrap();
        assert_eq!(finishing.await.unwrap().unwrap(), [""; 0], "{definition}");
        assert_eq!(query(&target.database, CONSTRAINT).await, rows(&[&[definition]]));
        assert_eq!(query(&target.database, INDEXES).await, rows(&[&["items_u", "true"]]), "{definition}");
        assert_eq!(target.rows(&items.table).await.len(), 4);
        // A second try finds it.
        assert_eq!(finish(&target, definition, &items).await.unwrap().unwrap(), [""; 0], "{definition}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unique_constraint_that_rows_violate_leaves_nothing_that_refuses_rows() {
    for definition in ["UNIQUE (n)", "UNIQUE (n) DEFERRABLE"] {
        let target = Target::fresh("violated").await;
        let (mut log, items) = (Log::new(), items());
        let mut sink = live(&target, &log, &items, [item(1, 1, "a"), item(2, 1, "b")]).await;
        let sentences = finish(&target, definition, &items).await.unwrap().unwrap();
        let statement = format!("run: ALTER TABLE \"public\".\"items\" ADD CONSTRAINT \"items_u\" {definition}");
        assert!(sentences.len() == 1 && sentences[0].ends_with(&statement), "{sentences:?}");
        assert!(query(&target.database, INDEXES).await.is_empty(), "{definition}");
        log.transaction([Change::insert(&items, item(3, 1, "c"))]);
        apply(&mut sink, &log.batch()).await;
        target.sql("DELETE FROM items WHERE id > 1").await;
        assert_eq!(finish(&target, definition, &items).await.unwrap().unwrap(), [""; 0], "{definition}");
        assert_eq!(query(&target.database, CONSTRAINT).await, rows(&[&[definition]]));
    }
}

/// Nothing is made of it, and nothing becomes of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persons_index_that_has_a_constraints_name_is_left_alone() {
    for theirs in [
        "INDEX items_u ON items (n)",
        "UNIQUE INDEX items_u ON items (big)",
        "UNIQUE INDEX items_u ON items (n) WHERE n > 1",
    ] {
        let target = Target::fresh("persons").await;
        let (log, items) = (Log::new(), items());
        let _sink = live(&target, &log, &items, [item(1, 1, "a"), item(2, 2, "b")]).await;
        target.sql(&format!("CREATE {theirs}")).await;
        let before = query(&target.database, "SELECT indexdef FROM pg_indexes WHERE indexname = 'items_u'").await;
        let sentences = finish(&target, "UNIQUE (n)", &items).await.unwrap().unwrap();
        assert!(sentences.len() == 1 && sentences[0].contains("another index has its name"), "{theirs}: {sentences:?}");
        assert!(query(&target.database, CONSTRAINT).await.is_empty(), "{theirs}");
        let after = query(&target.database, "SELECT indexdef FROM pg_indexes WHERE indexname = 'items_u'").await;
        assert!(before.len() == 1 && before == after, "{theirs}: {after:?}");
    }
}

/// Until its index belongs to it nothing is checked at the end of a transaction: rows that would be refused for good wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_deferrable_constraint_lets_pass_waits_until_it_is_there() {
    for is_large in [false, true] {
        let target = Target::fresh("not_yet").await;
        let (mut log, items) = (Log::new(), items());
        let mut sink = live(&target, &log, &items, [item(1, 1, "a"), item(2, 2, "b")]).await;
        // Keeps the index from being valid, in the way of nobody else.
        let older = target.database.connect().await;
        older.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class").await.unwrap();
        let finishing = finish(&target, "UNIQUE (n) DEFERRABLE", &items);
        let ready =
            "SELECT count(*) FROM pg_index WHERE indrelid = 'items'::regclass AND NOT indisprimary AND indisready";
        eventually(LIMIT, "the index takes rows", async || {
            if query(&target.database, ready).await == rows(&[&["1"]]) { Ok(()) } else { Err("not yet") }
        })
        .await;
        log.transaction([Change::update(&items, item(1, 2, "a")), Change::update(&items, item(2, 1, "b"))]);
        let swapped = log.batch();
        let applying = tokio::spawn({
            let swapped = swapped.clone();
            async move {
                let applied = match is_large {
                    true => sink.apply_large(swapped.from, &mut PortionFeed::new(&swapped)).await,
                    false => try_apply(&mut sink, &swapped).await,
                };
                (sink, applied)
            }
        });
        let looks = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%' \
            AND datname = current_database() AND query LIKE 'SELECT to_regclass%'";
        eventually(LIMIT, "the rows wait, or are refused", async || {
            let waits = query(&target.database, looks).await == rows(&[&["1"]]);
            if waits || applying.is_finished() { Ok(()) } else { Err("neither") }
        })
        .await;
        older.batch_execute("COMMIT").await.unwrap();
        assert_eq!(finishing.await.unwrap().unwrap(), [""; 0]);
        let (mut sink, applied) = applying.await.unwrap();
        if is_large {
            // What has been given out cannot be had again but by another opening.
            assert!(matches!(&applied, Err(SinkError::Transient(why)) if why.contains("DEFERRABLE")), "{applied:?}");
            sink.open(Epoch(1)).await.unwrap();
            sink.apply_large(swapped.from, &mut PortionFeed::new(&swapped)).await.unwrap();
        } else {
            assert_eq!(applied.unwrap(), Applied::Durable(swapped.to));
        }
        assert_eq!(target.rows(&items.table).await, rows(&[&["1", "2", "a"], &["2", "1", "b"]]));
    }
}

/// Chunks of several generations would not go in otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_was_not_yet_a_constraint_is_taken_off_for_another_load() {
    let target = Target::fresh("taken_off").await;
    let (log, items) = (Log::new(), items());
    drop(live(&target, &log, &items, [item(1, 1, "a"), item(2, 2, "b")]).await);
    target.sql("CREATE UNIQUE INDEX items_u ON items (n); CREATE UNIQUE INDEX a_persons ON items (n)").await;
    target.sql("CREATE UNIQUE INDEX wallaby_deferrable_1 ON items (n)").await;
    let mut sink = target.make(Faults::default(), Arc::new(WithConstraint("UNIQUE (n)")));
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RunId(2), 0, &items).await.unwrap();
    assert_eq!(query(&target.database, INDEXES).await, rows(&[&["a_persons", "true"]]));
}

/// A value goes from one row to another between two snapshots: chunks of both have it, and only the log's replay sets that right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_secondary_unique_key_does_not_refuse_chunks_of_two_generations() {
    let target = Target::fresh("h02_unique").await;
    let (mut log, items) = (Log::new(), items());
    drop(live(&target, &log, &items, [item(1, 1, "a"), item(2, 2, "b")]).await);
    assert_eq!(finish(&target, "UNIQUE (n)", &items).await.unwrap().unwrap(), [""; 0]);
    let unique = rows(&[&["UNIQUE (n)"]]);
    assert_eq!(query(&target.database, CONSTRAINT).await, unique);

    let mut sink = target.make(Faults::default(), Arc::new(WithConstraint("UNIQUE (n)")));
    sink.open(Epoch(1)).await.unwrap();
    sink.loads().unwrap().prepare(RunId(2), 0, &items).await.unwrap();
    let start = log.start();
    log.transaction([Change::update(&items, item(1, 3, "a")), Change::update(&items, item(2, 1, "b"))]);
    let moved = log.batch();
    // The first chunk's snapshot is older than the transaction, the second one's younger.
    for (number, at, row) in [(0, start.commit, item(1, 1, "a")), (1, moved.to.commit, item(2, 1, "b"))] {
        let chunk = ChunkLoad { run: RunId(2), ..chunk(&items, number, 0, false) };
        let loaded = load(&target, &chunk, &mut PartFeed::new([chunk_part(&items, at, [row])])).await;
        assert_eq!(loaded.unwrap(), Loaded::Now { rows: 1 });
    }
    let tables = std::slice::from_ref(&items.table);
    sink.loads().unwrap().mark(tables, TableStage::CatchingUp, start).await.unwrap();
    let left_out = HashSet::from([items.table.clone()]);
    let filter = Arc::new(TableFilter { others: true, left_out, ..TableFilter::default() });
    let parts = moved.parts.iter().cloned().map(|part| BatchPart { tables: Some(Arc::clone(&filter)), ..part });
    apply(&mut sink, &Batch { parts: parts.collect(), ..moved.clone() }).await;
    sink.loads().unwrap().replay(tables, &moved).await.unwrap();
    sink.loads().unwrap().mark(tables, TableStage::Ready, moved.to).await.unwrap();
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "3", "a"], &["2", "1", "b"]]));
    assert_eq!(finish(&target, "UNIQUE (n)", &items).await.unwrap().unwrap(), [""; 0]);
    assert_eq!(query(&target.database, CONSTRAINT).await, unique, "it is there again");
}
