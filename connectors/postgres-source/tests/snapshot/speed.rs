//! Rows a second of a chunk against a plain binary COPY of the same rows (M2). Run with `--release -- --ignored`.

use std::time::Instant;

use futures::StreamExt;
use wallaby_model::SegmentBody;
use wallaby_postgres_source::{PartSink, SourceError, read_chunk};
use wallaby_testkit::Database;

use crate::kit::Flow;
use crate::{export, request};

#[derive(Default)]
struct Counted(u64);

impl PartSink for Counted {
    type Error = SourceError;

    async fn part(&mut self, body: SegmentBody) -> Result<(), SourceError> {
        self.0 += body.rows() as u64;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn m2_rows_a_second_against_copy() {
    const ROWS: u64 = 1_000_000;
    let db = Database::create("speed").await;
    db.batch_execute(&format!(
        "CREATE TABLE typ (id bigint PRIMARY KEY, customer_id bigint NOT NULL, sku text NOT NULL, quantity integer NOT NULL, price numeric(12,2) NOT NULL,
           discount float8 NOT NULL, paid boolean NOT NULL, status text NOT NULL, created_at timestamptz NOT NULL, updated_at timestamp NOT NULL, reference uuid NOT NULL, note text NOT NULL);
         INSERT INTO typ SELECT n, 100000 + n, 'SKU-' || lpad(n::text, 8, '0'), 10 + n % 90, (10000 + n % 90000) / 100.0, (10 + n % 89) / 100.0, n % 3 = 0, 'shipped',
           now(), now(), md5(n::text)::uuid, 'note ' || substr(md5(n::text), 1, 30) FROM generate_series(1, {ROWS}) n"
    )).await.unwrap();
    db.batch_execute("VACUUM (ANALYZE, FREEZE) typ").await.unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let mut plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    plan[0].chunk_pages = u32::MAX;
    let mut asked = request(&export, &flow.name, &plan[0], 0);
    asked.part_bytes = 1 << 20;
    let (mut ours, mut theirs) = (f64::MAX, f64::MAX);
    for _ in 0..5 {
        let begun = Instant::now();
        let mut counted = Counted::default();
        read_chunk(&flow.config, &asked, &mut counted).await.unwrap();
        ours = ours.min(begun.elapsed().as_secs_f64());
        assert_eq!(counted.0, ROWS);
        let begun = Instant::now();
        let stream = db.copy_out("COPY typ TO STDOUT (FORMAT binary)").await.unwrap();
        assert!(Box::pin(stream).fold(0, async |bytes, data| bytes + data.unwrap().len()).await > 0);
        theirs = theirs.min(begun.elapsed().as_secs_f64());
    }
    println!(
        "chunk {:.0} rows/s, COPY {:.0} rows/s, ratio {:.2}",
        ROWS as f64 / ours,
        ROWS as f64 / theirs,
        theirs / ours
    );
}
