//! Streamed and large transactions from real servers: the same rows at the same positions, however they are decoded.

use std::collections::HashMap;
use std::path::PathBuf;

use rand::Rng;
use rand::rngs::StdRng;
use wallaby_model::Position;
use wallaby_postgres_source::{CaptureEvent, CaptureOptions, PartDraft, PartOptions};
use wallaby_testkit::{Database, Postgres, PostgresOptions, Seeded, skipped};
use wallaby_wire::splice::settle;

use crate::kit::{Flow, Row, rows_of, wal_end};

/// What one decode gave.
#[derive(Default)]
struct Decoded {
    rows: Vec<Row>,
    parts: usize,
    splices: usize,
    aborted: usize,
    abandoned: usize,
}

/// Decodes from `from` on, up to `until`, and then gives the rows as a reader sees them. `rows_max` ends it early, where it is.
async fn decode(flow: &Flow, options: CaptureOptions, from: Position, until: Position, rows_max: usize) -> Decoded {
    let mut run = flow.start_with(options, from).await.unwrap();
    let mut decoded = Decoded::default();
    let mut parts: HashMap<u32, Vec<PartDraft>> = HashMap::new();
    let mut end = from;
    while end < until && decoded.rows.len() < rows_max {
        match run.next().await.unwrap() {
            CaptureEvent::Segment(segment) => {
                decoded.rows.extend(rows_of(&segment.body));
                end = segment.to;
            }
            CaptureEvent::Heartbeat { to } => end = to,
            CaptureEvent::Part(part) => {
                decoded.parts += 1;
                parts.entry(part.xid).or_default().push(part);
            }
            CaptureEvent::Splice(splice) => {
                decoded.splices += 1;
                decoded.aborted += splice.aborted.len();
                for part in parts.remove(&splice.transaction.xid).unwrap() {
                    let body = settle(part.body, &splice.transaction, &splice.aborted, end).unwrap();
                    decoded.rows.extend(rows_of(&body));
                }
                end = splice.to;
            }
            CaptureEvent::Abandoned { xid } => {
                decoded.abandoned += 1;
                parts.remove(&xid).unwrap();
            }
        }
    }
    decoded
}

/// Statements of one random transaction: savepoints, rollbacks, nesting, changed tables, large values, truncates, changed keys.
fn transaction(rng: &mut StdRng, number: u32) -> String {
    let mut sql = "BEGIN;".to_owned();
    let mut depth = 0;
    for step in 0..rng.random_range(1..30) {
        let key = number * 100_000 + step * 1000;
        match rng.random_range(0..14) {
            0..5 => {
                let rows = rng.random_range(1..120);
                sql += &format!(
                    "INSERT INTO t SELECT {key} + g, g, repeat('v', g), NULL FROM generate_series(1, {rows}) g;"
                );
            }
            5 => {
                sql +=
                    &format!("INSERT INTO t VALUES ({key}, 1, '', repeat(md5('{key}'), 400)) ON CONFLICT DO NOTHING;")
            }
            6 => sql += "UPDATE t SET n = n + 1 WHERE id % 7 = 0;",
            7 => sql += &format!("UPDATE t SET id = -id WHERE id IN (SELECT max(id) FROM t WHERE id < {key});"),
            8 => sql += "DELETE FROM t WHERE id % 11 = 0; DELETE FROM f WHERE n % 3 = 0;",
            9 => {
                sql += &format!(
                    "INSERT INTO f SELECT g, repeat('w', 50) FROM generate_series(1, 40) g; UPDATE f SET n = {key};"
                )
            }
            10 => {
                sql += &format!("SAVEPOINT s{depth};");
                depth += 1;
            }
            11 if depth > 0 => {
                depth -= 1;
                sql += &format!("ROLLBACK TO s{depth}; RELEASE s{depth};");
            }
            12 if depth > 0 => {
                depth -= 1;
                sql += &format!("RELEASE s{depth};");
            }
            12 => sql += &format!("ALTER TABLE t ADD COLUMN c{key} int DEFAULT {step};"),
            13 => {
                sql += if rng.random_bool(0.3) {
                    "TRUNCATE t, f;"
                } else {
                    "SELECT pg_logical_emit_message(true, 'p', 'c');"
                }
            }
            _ => {}
        }
    }
    sql + if rng.random_bool(0.15) { "ROLLBACK;" } else { "COMMIT;" }
}

async fn compare(pg: &Postgres) {
    let db = Database::create_on(pg, "streamed").await;
    db.batch_execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, v text, big text); ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
         CREATE TABLE f (n int, v text); ALTER TABLE f REPLICA IDENTITY FULL;",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut rng = StdRng::seeded();
    for number in 1..30 {
        db.batch_execute(&transaction(&mut rng, number)).await.unwrap();
    }
    // Streamed before it is rolled back, in part and as a whole: PostgreSQL 18 tells of the latter whether asked to stream or not.
    let rows =
        |from: u32| format!("INSERT INTO f SELECT {from} + g, repeat('x', 100) FROM generate_series(1, 3000) g;");
    let (first, second, third) = (rows(1), rows(10_000), rows(20_000));
    db.batch_execute(&format!("BEGIN; {first} SAVEPOINT a; {second} ROLLBACK TO a; {third} COMMIT;")).await.unwrap();
    db.batch_execute(&format!("BEGIN; {first} SAVEPOINT a; {second} ROLLBACK;")).await.unwrap();
    let until = Position::before(wal_end(&db).await);
    db.batch_execute("INSERT INTO f VALUES (0, 'end')").await.unwrap();
    let first = flow.first_position();
    let all = usize::MAX;
    let plain = decode(&flow, flow.options(1), first, until, all).await;
    assert!(plain.rows.len() > 300 && plain.splices == 0);
    let mut options = flow.options(2);
    options.parts = Some(PartOptions::new(0));
    let streamed = decode(&flow, options.clone(), first, until, all).await;
    assert_eq!(streamed.rows, plain.rows);
    println!(
        "{} parts, {} splices, {} aborted, {} abandoned",
        streamed.parts, streamed.splices, streamed.aborted, streamed.abandoned
    );
    assert!(streamed.splices > 0 && streamed.aborted > 0, "the workload was too small to be streamed");
    // Not streamed, but too large for the log.
    let mut large = flow.options(3);
    large.parts = Some(PartOptions::new(0));
    large.large_transaction_bytes = 20_000;
    db.batch_execute("ALTER SYSTEM SET logical_decoding_work_mem = '1GB'").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let cut = decode(&flow, large, first, until, all).await;
    db.batch_execute("ALTER SYSTEM RESET logical_decoding_work_mem").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    assert_eq!(cut.rows, plain.rows);
    assert!(cut.splices > 0);
    // Decoded in part without streaming, killed, and gone on with streaming; and the other way round.
    for (epoch, (before, after)) in
        [(flow.options(4), options.clone()), (options.clone(), flow.options(4))].into_iter().enumerate()
    {
        let mut before = before;
        let mut after = after;
        before.owner = crate::kit::owner(&flow.name, 10 + 2 * epoch as u64);
        after.owner = crate::kit::owner(&flow.name, 11 + 2 * epoch as u64);
        before.segment_target_bytes = 10_000;
        let some = decode(&flow, before, first, until, rng.random_range(1..plain.rows.len())).await;
        let at = some.rows.last().map_or(first, |row| row.position);
        let rest = decode(&flow, after, at, until, all).await;
        let rows: Vec<Row> = some.rows.into_iter().chain(rest.rows).collect();
        assert_eq!(rows, plain.rows);
    }
}

#[tokio::test]
async fn h06_a_random_workload_is_the_same_streamed_and_not_on_postgres_18() {
    let options = PostgresOptions::default().setting("logical_decoding_work_mem", "64kB");
    compare(&Postgres::start(options).await.unwrap()).await;
}

#[tokio::test]
async fn h06_a_random_workload_is_the_same_streamed_and_not_on_postgres_15() {
    let bin = PathBuf::from("/usr/lib/postgresql/15/bin");
    if !bin.exists() {
        skipped!("PostgreSQL 15 is not installed");
        return;
    }
    let options = PostgresOptions { bin: Some(bin), ..Default::default() };
    compare(&Postgres::start(options.setting("logical_decoding_work_mem", "64kB")).await.unwrap()).await;
}

#[tokio::test]
async fn a_text_of_200_mb_passes_as_a_part() {
    let db = Database::create("huge").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    let flow = Flow::create(&db).await;
    let mut options = flow.options(1);
    options.parts = Some(PartOptions::new(0));
    db.batch_execute(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (2, repeat('x', 200000000)); INSERT INTO t VALUES (3, 'c'); COMMIT;",
    )
    .await
    .unwrap();
    let until = Position::before(wal_end(&db).await);
    db.batch_execute("INSERT INTO t VALUES (4, 'd')").await.unwrap();
    let decoded = decode(&flow, options, flow.first_position(), until, usize::MAX).await;
    let lengths: Vec<(String, usize)> =
        decoded.rows.iter().map(|row| (row.values[0].clone(), row.values[1].len())).take(3).collect();
    assert_eq!(lengths, [("1".to_owned(), 1), ("2".to_owned(), 200_000_000), ("3".to_owned(), 1)]);
    assert_eq!(decoded.splices, 1);
}
