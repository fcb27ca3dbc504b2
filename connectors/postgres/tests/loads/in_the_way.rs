//! What stands at the sink and is in a load's way.

use std::sync::Arc;

use wallaby_connector_api::conformance::{Change, Log, PartFeed, Shape, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{Loaded, SinkError, SinkFactory, SinkTask};
use wallaby_model::run::TableStage;
use wallaby_model::{ColumnType, Epoch, RunId, TableName, TableSchema};
use wallaby_postgres::PostgresSinkFactory;

use crate::target::{Target, apply, rows};
use crate::{LIMIT, RUN, chunk, events, item, items, load};

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

/// The stream goes on while a table is added: to look at every other table anew is seconds of waiting on a busy machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_known_of_a_table_outlives_the_load_of_another() {
    let target = Target::fresh("other_tables").await;
    let mut log = Log::new();
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&events(), [1.into()])]);
    apply(&mut sink, &log.batch()).await;
    let loads = sink.loads().unwrap();
    loads.prepare(RUN, 0, &items()).await.unwrap();
    loads.mark(std::slice::from_ref(&items().table), TableStage::CatchingUp, log.start()).await.unwrap();
    loads.forget(RUN).await.unwrap();
    // Who looks at a table notes here what it has.
    target.sql("BEGIN; LOCK TABLE wallaby.columns IN ACCESS EXCLUSIVE MODE").await;
    log.transaction([Change::insert(&events(), [2.into()])]);
    let goes_on = tokio::time::timeout(LIMIT, apply(&mut sink, &log.batch())).await;
    target.sql("ROLLBACK").await;
    assert!(goes_on.is_ok(), "the sink looks again at a table that nobody changed");
    assert_eq!(target.rows(&events().table).await, rows(&[&["1"], &["2"]]));
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
