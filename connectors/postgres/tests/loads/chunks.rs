//! Chunks at a real table: attempts that overlap, generations that differ, the hand-over.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use wallaby_connector_api::conformance::{Change, Log, PartFeed, Shape, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{
    Batch, BatchPart, KeyValues, Loaded, SinkError, SinkFactory, SinkTask, SourceLookup, SourceRow, TableFilter,
};
use wallaby_model::run::TableStage;
use wallaby_model::{ColumnType, Epoch, SegmentBody, TableName, TableSchema};
use wallaby_postgres::PostgresSinkFactory;
use wallaby_testkit::eventually;

use crate::target::{Target, apply, query, rows};
use crate::{Held, LIMIT, RUN, chunk, events, item, items, load, somebody_waits, somebody_waits_unless};

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
