//! Constraints that are made while others read and write.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use wallaby_connector_api::conformance::{Change, Log, PartFeed, PortionFeed, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{
    Applied, Batch, BatchPart, ChunkLoad, Faults, KeyValues, Loaded, Sink, SinkError, SourceLookup, SourceRow,
    TableExtra, TableExtras, TableFilter,
};
use wallaby_model::run::TableStage;
use wallaby_model::{Epoch, RunId, TableName, TableSchema};
use wallaby_testkit::eventually;

use crate::target::{Target, apply, query, rows, try_apply};
use crate::{LIMIT, RUN, chunk, item, items, load, somebody_waits};

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
