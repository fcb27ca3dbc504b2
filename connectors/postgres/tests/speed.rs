//! The sink against the bulk ceiling of its own database, in pairs. Not an assertion: a figure to look at.
//!
//! `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test -p wallaby-postgres --test speed -- --ignored --nocapture`
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use target::{Target, apply};
use wallaby_connector_api::conformance::{Change, Log, Shape, Value};
use wallaby_model::{ColumnType as T, TableSchema};

const ROWS: i64 = 50_000;
const PAIRS: i64 = 6;

/// limits.md's typical row: 12 columns.
fn typical() -> Arc<TableSchema> {
    let shape = Shape::new("typical").key("id", T::Int8).column("a", T::Int4).column("b", T::Int8);
    let shape = shape.column("c", T::Text).column("d", T::Text).column("e", T::Numeric).column("f", T::Timestamptz);
    let shape = shape.column("g", T::Bool).column("h", T::Float8).column("i", T::Uuid).column("j", T::Jsonb);
    shape.column("k", T::Text).build()
}

fn row(id: i64, n: i64) -> Vec<Value> {
    vec![
        id.into(),
        (id % 1000).into(),
        (id * 7).into(),
        Value::Text(format!("customer-{id}")),
        "a street with a longer name 17".into(),
        Value::Text(format!("{}.{:02}", id % 10_000, n % 100)),
        (800_000_000_000_000 + id).into(),
        Value::Bool(id % 2 == 0),
        Value::Float(id as f64 * 0.5),
        Value::Bytes((id as u128).to_be_bytes().to_vec()),
        Value::Text(format!("{{\"n\": {n}}}")),
        "pending".into(),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn sink_against_bulk_ceiling() {
    let target = Target::fresh("speed").await;
    let mut log = Log::new();
    let typical = typical();
    let mut sink = target.opened(&log).await;
    let client = &target.database;
    for what in ["new rows", "updates"] {
        for pair in 0..PAIRS {
            let ids = pair * ROWS..(pair + 1) * ROWS;
            for first in ids.clone().step_by(100) {
                log.transaction((first..first + 100).map(|id| match what {
                    "new rows" => Change::insert(&typical, row(id, 0)),
                    _ => Change::update(&typical, row(id, 1)),
                }));
            }
            let batch = log.batch_in_segments(700);
            let started = Instant::now();
            apply(&mut sink, &batch).await;
            let ours = started.elapsed().as_secs_f64();
            if what == "new rows" && pair == 0 {
                let make = "CREATE TABLE ceiling (LIKE typical INCLUDING ALL); \
                    CREATE TEMP TABLE stage (LIKE typical) ON COMMIT DELETE ROWS; SET temp_buffers = '32MB'";
                target.sql(make).await;
            }
            let bulk =
                format!("COPY (SELECT * FROM typical WHERE id >= {} AND id < {}) TO STDOUT BINARY", ids.start, ids.end);
            let bytes: Vec<Bytes> = client.copy_out(&bulk).await.unwrap().map(Result::unwrap).collect().await;
            let mut whole = Vec::new();
            bytes.iter().for_each(|piece| whole.extend_from_slice(piece));
            let whole = Bytes::from(whole);
            let started = Instant::now();
            client.batch_execute("BEGIN").await.unwrap();
            let mut copy = std::pin::pin!(client.copy_in("COPY stage FROM STDIN BINARY").await.unwrap());
            for at in (0..whole.len()).step_by(128 << 10) {
                copy.feed(whole.slice(at..(at + (128 << 10)).min(whole.len()))).await.unwrap();
            }
            copy.finish().await.unwrap();
            let sets: Vec<String> =
                typical.columns[1..].iter().map(|c| format!("{0} = EXCLUDED.{0}", c.name)).collect();
            let upsert =
                format!("INSERT INTO ceiling SELECT * FROM stage ON CONFLICT (id) DO UPDATE SET {}", sets.join(", "));
            assert_eq!(client.execute(&upsert, &[]).await.unwrap(), ROWS as u64);
            client.batch_execute("COMMIT").await.unwrap();
            let ceiling = started.elapsed().as_secs_f64();
            let rate = |seconds: f64| ROWS as f64 / seconds / 1000.0;
            println!("{what}: sink {:.0}k/s, ceiling {:.0}k/s, ratio {:.2}", rate(ours), rate(ceiling), ceiling / ours);
        }
    }
}
