//! Very many transactions inside of one, and very many beside each other, through one small worker.

use std::time::Instant;

use futures::future::{join_all, try_join_all};
use wallaby_staging::{Shelf, SideGroup, SideKey};
use wallaby_testkit::PostgresOptions;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{alone, is_full_size};
use wallaby_wire::splice::decode_manifest;

use crate::bound::{Bound, MIB, are_equal, small};
use crate::memory::streamed_and_spilled;

/// The source sends each change of a transaction in progress at once: the worst that it can do.
const AT_ONCE: &str = "immediate";
/// It sends what it has no more memory for.
const AS_IT_DOES: &str = "buffered";

/// A system with one small worker.
async fn with_streaming(streaming: &str, bound: &Bound) -> System {
    let flow = FlowFile {
        side_store: "{ jetstream: { transactionsMax: 1Gi } }".to_owned(),
        max_bytes: "256Mi".to_owned(),
        ..FlowFile::default()
    };
    let postgres = PostgresOptions::default()
        .setting("debug_logical_replication_streaming", streaming)
        .setting("logical_decoding_work_mem", "64kB")
        .setting("max_connections", "500");
    let mut system = System::start(Plan { postgres, ..small(flow) }).await;
    system.source().await.batch_execute("CREATE TABLE bulk (id bigint PRIMARY KEY, text text NOT NULL)").await.unwrap();
    bound.start_worker(&mut system).await;
    system.apply_flow().await;
    system
}

/// One row of five hundred stays, a larger one than the others: it makes the source send what it has.
async fn rolled_back(streaming: &str, count: u64) {
    let bound = Bound::new(128 * MIB);
    let system = with_streaming(streaming, &bound).await;
    let (source, target, side) = (system.source().await, system.target().await, system.side_store().await);
    let at = Instant::now();
    let sql = format!(
        "DO $$ BEGIN FOR i IN 1..{count} LOOP
            BEGIN
                INSERT INTO bulk SELECT i, string_agg(md5(i::text || '/' || j), '')
                    FROM generate_series(1, CASE WHEN i % 500 = 0 THEN 60 ELSE 8 END) j;
                IF i % 500 <> 0 THEN RAISE EXCEPTION 'rolled back'; END IF;
            EXCEPTION WHEN raise_exception THEN NULL;
            END;
        END LOOP; END $$"
    );
    source.batch_execute(&sql).await.unwrap();
    println!("{count} sub-transactions committed after {:.1} s", at.elapsed().as_secs_f64());
    let last = format!("SELECT FROM bulk WHERE id = {count}");
    bound.until(&system, &target, "what was not rolled back is at the sink", &last).await;
    are_equal(&system, &["public.bulk"]).await;
    let (streamed, _) = streamed_and_spilled(&source).await;
    assert!(streamed > 0, "the transaction was not sent while it was in progress");
    // Rolled-back rows are sent, and some of them put, before it is known that they are: each takes less than half a KiB.
    // A transaction that is small without them comes through the log.
    let (mut parts, mut ranges) = (Vec::new(), 0);
    for group in side.list(Shelf::Transactions).await.unwrap() {
        let SideGroup::Manifest(commit) = group else { continue };
        let manifest = side.get(SideKey::Manifest { commit }).await.unwrap().expect("it is there");
        let manifest = decode_manifest(commit, &manifest).unwrap();
        ranges += manifest.aborted.len() as u64;
        parts.push(manifest.parts.len() as u64);
    }
    assert!(parts.len() <= 1, "one transaction, and {parts:?} parts");
    let parts: u64 = parts.iter().sum();
    println!("{parts} parts, {ranges} rolled-back ranges");
    assert!(parts <= count * 512 / MIB + 2, "{parts} parts");
    assert!(ranges <= count / 500 + 2, "{ranges} ranges: more than there are rows that stay");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h17_a_million_rolled_back_sub_transactions_take_a_small_worker_and_few_messages() {
    let _alone = alone().await;
    rolled_back(AS_IT_DOES, if is_full_size() { 1_000_000 } else { 50_000 }).await;
}

/// The source describes the table anew after each one that it sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h17_rolled_back_sub_transactions_that_were_sent_take_a_small_worker_and_few_messages() {
    let _alone = alone().await;
    rolled_back(AT_ONCE, if is_full_size() { 100_000 } else { 3_000 }).await;
}

/// They are all open at once, and end in another order than they began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h17_hundreds_of_open_streamed_transactions_pass_a_small_worker() {
    let _alone = alone().await;
    let (sessions, rows) = if is_full_size() { (400, 300) } else { (200, 100) };
    let bound = Bound::new(128 * MIB);
    let system = with_streaming(AT_ONCE, &bound).await;
    let target = system.target().await;
    let clients = join_all((0..sessions).map(|_| system.source())).await;
    let write = async |turn: i64| {
        let writes = clients.iter().zip(0_i64..).map(async |(client, session)| {
            let from = (session * 2 + turn) * rows + 1;
            let sql = format!(
                "INSERT INTO bulk SELECT i, repeat(md5(i::text), 16) FROM generate_series({from}, {}) i",
                from + rows - 1
            );
            client.batch_execute(&sql).await
        });
        try_join_all(writes).await.unwrap();
    };
    try_join_all(clients.iter().map(|client| client.batch_execute("BEGIN"))).await.unwrap();
    write(0).await;
    write(1).await;
    // Behind all that is open: once it is at the sink, everything before it was read.
    system.source().await.batch_execute("INSERT INTO bulk VALUES (0, 'read so far')").await.unwrap();
    bound.until(&system, &target, "all that is open was read", "SELECT FROM bulk WHERE id = 0").await;
    let seen: i64 = target.query_one("SELECT count(*) FROM bulk", &[]).await.unwrap().get(0);
    assert_eq!(seen, 1, "a transaction that is open is shown");
    // Every third is rolled back.
    for (number, client) in clients.iter().enumerate().rev() {
        client.batch_execute(if number % 3 == 0 { "ROLLBACK" } else { "COMMIT" }).await.unwrap();
    }
    system.source().await.batch_execute("INSERT INTO bulk VALUES (-1, 'the end')").await.unwrap();
    bound.until(&system, &target, "all that was committed is at the sink", "SELECT FROM bulk WHERE id = -1").await;
    are_equal(&system, &["public.bulk"]).await;
}
