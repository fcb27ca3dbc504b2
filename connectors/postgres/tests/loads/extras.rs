//! What is added after a load: indexes, constraints, defaults, foreign keys.

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_connector_api::conformance::{Change, Log, PartFeed, Shape, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{
    ChunkLoad, Faults, ForeignKey, KeyValues, Loaded, Sink, SinkError, SourceLookup, SourceRow, TableExtra,
    TableExtras, TableIndex,
};
use wallaby_model::run::TableStage;
use wallaby_model::{ColumnType, Epoch, RunId, TableName, TableSchema};

use crate::target::{Target, apply, query, rows, try_apply};
use crate::{RUN, chunk, item, items, load};

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
