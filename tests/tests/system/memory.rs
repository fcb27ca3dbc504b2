//! The memory of one worker under a limit: transactions and rows that are larger than it.

use std::time::Instant;

use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use wallaby_model::flow::{FlowDocument, parse};
use wallaby_model::{Position, RecordKind, SegmentBody, Splice, TableChanges};
use wallaby_staging::{Connections, Log, LogReader, NatsTarget, ReaderOptions, SideKey, SideStore, Start, open_side};
use wallaby_testkit::{eventually, is_root, skipped};
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::System;
use wallaby_tests::{PATIENCE, alone, is_full_size};
use wallaby_wire::splice::{SpliceReader, decode_manifest};

use crate::bound::{Bound, MIB, PATIENCE_LARGE, are_equal, small};

const GIB: u64 = 1 << 30;
/// Texts of 1 KB, different and hardly to be packed, outside of what is published.
const FILLERS: &str = "\
    CREATE SCHEMA fill; CREATE TABLE fill.texts (n int PRIMARY KEY, text text NOT NULL); \
    INSERT INTO fill.texts SELECT n, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 32) WHERE n >= 0) \
    FROM generate_series(0, 1023) n; \
    CREATE TABLE bulk (id bigint PRIMARY KEY, filler text NOT NULL)";
/// Rows `$1` to `$2`, each with `$3` bytes of text.
const FILL: &str = "\
    INSERT INTO bulk SELECT i, left(text, $3::int) FROM generate_series($1::bigint, $2::bigint) i JOIN fill.texts ON n = i % 1024";
/// One row with a text of `$2` bytes that hardly packs.
const FILL_WIDE: &str = "\
    INSERT INTO wide SELECT $1::bigint, 'wide', left(string_agg(md5(random()::text), ''), $2::int) \
    FROM generate_series(1, $2::int / 32 + 1)";

/// How many transactions the server sent while they were in progress, and how many it kept on disk until their end.
pub async fn streamed_and_spilled(source: &Client) -> (i64, i64) {
    let sql = "SELECT coalesce(sum(stream_txns), 0)::bigint, coalesce(sum(spill_txns), 0)::bigint FROM pg_stat_replication_slots";
    let row = source.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

/// A transaction of so many rows, each with so many bytes of text, arrives whole.
async fn passes_large(bound: &Bound, system: &System, rows: i64, width: i32) {
    let (source, target) = (system.source().await, system.target().await);
    let at = Instant::now();
    source.execute(FILL, &[&1_i64, &rows, &width]).await.unwrap();
    println!("{rows} rows of {width} bytes of text committed after {:.1} s", at.elapsed().as_secs_f64());
    let last = format!("SELECT FROM bulk WHERE id = {rows}");
    bound.until(system, &target, "the large transaction is at the sink", &last).await;
    are_equal(system, &["public.bulk"]).await;
}

/// Sent while it is in progress: into the side store as it comes, and out of it in portions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b2_a_transaction_larger_than_the_worker_is_streamed_through_the_side_store() {
    let _alone = alone().await;
    let (rows, width, limit) = if is_full_size() { (2_000_000, 220, 256 * MIB) } else { (250_000, 1024, 128 * MIB) };
    let bound = Bound::new(limit);
    let flow = FlowFile {
        side_store: "{ jetstream: { transactionsMax: 2Gi } }".to_owned(),
        max_bytes: "256Mi".to_owned(),
        ..FlowFile::default()
    };
    let mut system = System::start(small(flow)).await;
    bound.start_worker(&mut system).await;
    system.source().await.batch_execute(FILLERS).await.unwrap();
    system.apply_flow().await;
    passes_large(&bound, &system, rows, width).await;
    let (streamed, _) = streamed_and_spilled(&system.source().await).await;
    assert!(streamed > 0, "the transaction was not sent while it was in progress");
}

/// The side store is too small: the server keeps the transaction until its end, and it stands in the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b2_a_transaction_larger_than_the_worker_passes_through_the_log() {
    let _alone = alone().await;
    let (rows, width, limit) = if is_full_size() { (2_000_000, 220, 256 * MIB) } else { (140_000, 1024, 128 * MIB) };
    let bound = Bound::new(limit);
    let flow = FlowFile {
        side_store: "{ jetstream: { transactionsMax: 16Mi } }".to_owned(),
        max_bytes: "2Gi".to_owned(),
        ..FlowFile::default()
    };
    let mut system = System::start(small(flow)).await;
    bound.start_worker(&mut system).await;
    system.source().await.batch_execute(FILLERS).await.unwrap();
    system.apply_flow().await;
    passes_large(&bound, &system, rows, width).await;
    let refused = system.workers[0].metric("wallaby_side_full_total", &[]).await.unwrap();
    let (_, spilled) = streamed_and_spilled(&system.source().await).await;
    assert!(refused > 0.0 && spilled > 0, "the side store refused {refused} puts, {spilled} transactions were kept");
}

/// What a worker needs for its largest row, beside the rest: it has the row several times, as text, as columns, packed.
const ROW_TIMES: u64 = 8;
/// The rest.
const BESIDE_ROWS: u64 = 64 * MIB;

/// A row larger than a message goes through the side store: one that is there already, in a small transaction, and in a large one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b2_rows_larger_than_a_message_arrive_within_a_multiple_of_their_size() {
    let _alone = alone().await;
    let wide: i32 = if is_full_size() { 200 << 20 } else { 12 << 20 };
    let bound = Bound::new(BESIDE_ROWS + ROW_TIMES * wide as u64);
    let flow = FlowFile {
        snapshot: "initial",
        side_store: "{ jetstream: { transactionsMax: 4Gi, chunksMax: 4Gi } }".to_owned(),
        large_transaction_bytes: "16Mi".to_owned(),
        max_bytes: "256Mi".to_owned(),
        ..FlowFile::default()
    };
    let mut system = System::start(small(flow)).await;
    let (source, target) = (system.source().await, system.target().await);
    source.batch_execute(FILLERS).await.unwrap();
    let table = "CREATE TABLE wide (id bigint PRIMARY KEY, note text, body text); ALTER TABLE wide ALTER body SET STORAGE EXTERNAL";
    source.batch_execute(table).await.unwrap();
    for id in 1..=2_i64 {
        source.execute(FILL_WIDE, &[&id, &wide]).await.unwrap();
    }
    source.batch_execute("INSERT INTO wide SELECT i, 'narrow', 'x' FROM generate_series(10, 200) i").await.unwrap();
    bound.start_worker(&mut system).await;
    let said = system.apply(&system.flow_file()).await;
    assert_eq!(said.code, 0, "{}", said.text);
    bound
        .until(
            &system,
            &target,
            "the sink begins after its load",
            "SELECT FROM wallaby.checkpoints WHERE position IS NOT NULL",
        )
        .await;
    are_equal(&system, &["public.wide"]).await;

    // In transactions with little beside it: new, and changed.
    source.batch_execute("BEGIN; INSERT INTO wide VALUES (201, 'before', 'y')").await.unwrap();
    source.execute(FILL_WIDE, &[&3_i64, &wide]).await.unwrap();
    source.batch_execute("INSERT INTO wide VALUES (202, 'after', 'z'); COMMIT").await.unwrap();
    bound.until(&system, &target, "a wide row is at the sink", "SELECT FROM wide WHERE id = 202").await;
    source.batch_execute("UPDATE wide SET body = reverse(body), note = 'changed' WHERE id = 1").await.unwrap();
    bound.until(&system, &target, "a changed one is", "SELECT FROM wide WHERE id = 1 AND note = 'changed'").await;

    // Among many others.
    source.batch_execute("BEGIN").await.unwrap();
    source.execute(FILL, &[&1_i64, &40_000_i64, &1024_i32]).await.unwrap();
    for id in [4_i64, 5, 6] {
        source.execute(FILL_WIDE, &[&id, &wide]).await.unwrap();
    }
    source.execute(FILL, &[&40_001_i64, &80_000_i64, &1024_i32]).await.unwrap();
    source.batch_execute("COMMIT").await.unwrap();
    bound.until(&system, &target, "the large one is", "SELECT FROM bulk WHERE id = 80000").await;
    are_equal(&system, &["public.wide", "public.bulk"]).await;
    let (streamed, _) = streamed_and_spilled(&source).await;
    assert!(streamed > 0, "the large transaction was not sent while it was in progress");
}

/// What a reader and the source have to agree on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sums {
    rows: u64,
    /// Of the first six bytes of each row's SHA-256.
    sum: u128,
}

const SUMS: &str = "\
    SELECT count(*), sum(('x' || encode(substr(sha256(convert_to(id::text || filler, 'UTF8')), 1, 6), 'hex'))::bit(48)::bigint)::text \
    FROM bulk";

impl Sums {
    async fn of_source(source: &Client) -> Sums {
        let row = source.query_one(SUMS, &[]).await.unwrap();
        let (rows, sum): (i64, String) = (row.get(0), row.get(1));
        Sums { rows: rows as u64, sum: sum.parse().unwrap() }
    }

    fn take(&mut self, changes: &TableChanges) {
        use arrow_array::cast::AsArray;
        use arrow_array::types::Int64Type;
        use wallaby_model::change::FIRST_COLUMN;
        let ids = changes.rows.column(FIRST_COLUMN).as_primitive::<Int64Type>();
        let fillers = changes.rows.column(FIRST_COLUMN + 1).as_string::<i32>();
        for row in 0..changes.rows.num_rows() {
            let mut hash = Sha256::new();
            hash.update(ids.value(row).to_string());
            hash.update(fillers.value(row));
            let first = hash.finalize()[..6].iter().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
            self.sum += u128::from(first);
        }
        self.rows += changes.rows.num_rows() as u64;
    }
}

/// How large the transaction for a reader is: 10 GiB, unless `WALLABY_PROVE_BYTES` says less.
fn reader_bytes() -> u64 {
    if !is_full_size() {
        return 48 * MIB;
    }
    std::env::var("WALLABY_PROVE_BYTES").ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(10 * GIB)
}

/// A worker that captures only, and a reader beside it that opens the splice and checks every row of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b2_a_reader_gets_every_row_of_a_transaction_of_any_size() {
    let _alone = alone().await;
    let bytes = reader_bytes();
    if is_full_size() {
        if !is_root() {
            return skipped!("needs root: bounds the worker's memory");
        }
        // Table, WAL and side store, and room to spare.
        let (needed, free) = (4 * bytes, free_disk());
        if free < needed {
            return skipped!("needs {} GiB of disk, {} GiB are free", needed / GIB, free / GIB);
        }
    }
    let bound = Bound::new(if is_full_size() { 256 * MIB } else { 128 * MIB });
    let flow = FlowFile {
        side_store: format!("{{ jetstream: {{ transactionsMax: {}Mi }} }}", 2 * bytes / MIB),
        max_bytes: "256Mi".to_owned(),
        // 4 Mi: the small form is a large transaction too.
        large_transaction_bytes: "4Mi".to_owned(),
        on_overrun: "backpressure\n      paused: true",
        ..FlowFile::default()
    };
    let mut system = System::start(small(flow)).await;
    bound.start_worker(&mut system).await;
    let source = system.source().await;
    source.batch_execute(FILLERS).await.unwrap();
    let flow = system.flow_file();
    let said = system.apply(&flow).await;
    assert_eq!(said.code, 0, "{}", said.text);
    eventually(PATIENCE, "the flow captures", async || {
        // A slot is also active while it is being made, and what commits then comes before it.
        let active = "SELECT FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid";
        let rows = source.query(active, &[]).await.map_err(|error| error.to_string())?;
        if rows.is_empty() { Err(format!("{:?}", system.status(&system.capture()).await)) } else { Ok(()) }
    })
    .await;

    let at = Instant::now();
    let rows = i64::try_from(bytes / 1024).unwrap();
    source.execute(FILL, &[&1_i64, &rows, &1000_i32]).await.unwrap();
    println!("{rows} rows committed after {:.1} s", at.elapsed().as_secs_f64());
    let wanted = Sums::of_source(&source).await;
    let servers = vec![system.nats.client_url()];
    let nats = NatsTarget { servers, name: "a reader".to_owned(), ..NatsTarget::default() };
    let connections = Connections::open(&nats).await.unwrap();
    let document: FlowDocument = parse(&flow.to_string(), "flow.yaml").unwrap();
    let side = open_side(&system.flow(), &document.spec.log, &connections).unwrap();
    let log = Log::new(system.flow(), connections);
    let (splice, from, mut read) = up_to_splice(&log).await;
    println!("its splice is in the log after {:.1} s: {splice:?}", at.elapsed().as_secs_f64());
    bound.check(&system, "the transaction is captured");
    let in_log = read.rows;
    read_splice(side.as_ref(), splice, from, &mut read).await;
    assert_eq!(read, wanted);
    assert_eq!((splice.rows, rows as u64), (read.rows - in_log, read.rows), "{in_log} rows are in the log");
    println!("every row was read and is as the source has it, after {:.1} s", at.elapsed().as_secs_f64());
    bound.check(&system, "the transaction was read");
}

fn free_disk() -> u64 {
    let disk = rustix::fs::statvfs(std::env::temp_dir()).unwrap();
    disk.f_bavail * disk.f_frsize
}

/// The first splice of the log, where a reader stands before it, and the rows before it: a transaction can begin in the log.
async fn up_to_splice(log: &Log) -> (Splice, Position, Sums) {
    let mut reader = LogReader::new(log, Start::FirstResume, ReaderOptions::default());
    let mut sums = Sums::default();
    loop {
        let accepted = tokio::time::timeout(PATIENCE_LARGE, reader.next()).await;
        let accepted = accepted.expect("no splice comes").unwrap();
        match accepted.staged.record.kind {
            RecordKind::Splice { .. } => {
                return (serde_json::from_slice(&accepted.staged.body).unwrap(), accepted.after, sums);
            }
            RecordKind::Data { .. } => {
                let body = wallaby_wire::decode(&accepted.staged.body).unwrap();
                body.tables.iter().for_each(|changes| sums.take(changes));
            }
            _ => {}
        }
    }
}

/// Every row behind a splice, in order, counted and summed.
async fn read_splice(side: &dyn SideStore, splice: Splice, after: Position, sums: &mut Sums) {
    let commit = splice.transaction.commit;
    let manifest = side.get(SideKey::Manifest { commit }).await.unwrap().expect("there is a manifest");
    let manifest = decode_manifest(commit, &manifest).unwrap();
    println!("{} parts, {} MiB packed", manifest.parts.len(), splice.bytes / MIB);
    let attempt = manifest.attempt;
    let mut reader = SpliceReader::new(manifest, after);
    let mut last = after;
    while let Some(number) = reader.wanted() {
        let part = side.get(SideKey::Part { attempt, number }).await.unwrap().expect("there is every part");
        let body: SegmentBody = reader.take(&part).unwrap();
        for changes in &body.tables {
            for row in 0..changes.rows.num_rows() {
                let position = changes.position(row, &body.transactions);
                assert!(position > last, "part {number}: {position} stands behind {last}");
                last = position;
            }
            sums.take(changes);
        }
    }
}
