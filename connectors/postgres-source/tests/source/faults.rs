//! Hazards and limits.

use std::time::Duration;

use wallaby_model::{Lsn, Position};
use wallaby_postgres_source::{
    Capture, ReplicationClient, SourceError, SourceIdentity, StartOptions, Streaming, drop_slot, ensure_slot,
};
use wallaby_testkit::{Database, Postgres, PostgresOptions, Shutdown, eventually};

use crate::kit::{Flow, LIMIT, confirmed, owner, rows_of, slot, wal_end};

async fn table(db: &Database<'_>) -> Flow {
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    Flow::create(db).await
}

#[tokio::test]
async fn h05_a_commit_at_the_confirmed_lsn_is_delivered() {
    let db = Database::create("h05").await;
    let flow = table(&db).await;
    let other = db.connect().await;
    let mut end = flow.first_position();
    for attempt in 0..20 {
        let mut run = flow.start(attempt * 2 + 1, end).await;
        other.batch_execute(&format!("BEGIN; INSERT INTO t VALUES ({attempt}, 'x')")).await.unwrap();
        // Flushes the WAL, so that a keepalive tells its end, with the transaction still open.
        db.query("SELECT pg_logical_emit_message(false, 'x', 'x', true)", &[]).await.unwrap();
        let target = wal_end(&db).await;
        while run.end < Position::before(target) {
            run.next().await.unwrap();
        }
        end = run.end;
        run.feedback.confirm(end.commit);
        eventually(LIMIT, "it is confirmed", async || match confirmed(&db, &flow.name).await {
            lsn if lsn == end.commit => Ok(()),
            lsn => Err(lsn),
        })
        .await;
        drop(run);
        other.batch_execute("COMMIT").await.unwrap();
        let mut run = flow.start(attempt * 2 + 2, end).await;
        let segment = run.segment().await;
        let rows = rows_of(&segment.body);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].values[0], attempt.to_string());
        if rows[0].position.commit == end.commit {
            return;
        }
        // The server wrote something of its own in between: once more.
        end = run.end;
    }
    panic!("no commit shared the LSN of a keepalive");
}

/// A walsender that waits for a client's flush waits for ever.
async fn stops_fast(pg: &Postgres) {
    let patience = Duration::from_secs(10);
    tokio::time::timeout(patience, pg.stop(Shutdown::Fast)).await.expect("the shutdown hangs").unwrap();
}

#[tokio::test]
async fn h15_a_fast_shutdown_is_not_delayed_by_a_lagging_flush() {
    let pg = Postgres::start(PostgresOptions::default()).await.unwrap();
    let db = Database::create_on(&pg, "h15").await;
    let flow = table(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g").await.unwrap();
    run.rows(100).await;
    // Nothing is confirmed, and status updates go on: the walsender would wait for the rest for ever.
    let reader = tokio::spawn(async move { (run.error().await, run) });
    stops_fast(&pg).await;
    let (error, _run) = reader.await.unwrap();
    assert!(matches!(error, SourceError::ShuttingDown { .. }), "{error}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn h15_it_is_not_delayed_by_a_client_that_reads_nothing_either() {
    let pg = Postgres::start(PostgresOptions::default()).await.unwrap();
    let db = Database::create_on(&pg, "h15b").await;
    let flow = table(&db).await;
    let _run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1, 30000) g").await.unwrap();
    stops_fast(&pg).await;
}

#[tokio::test]
async fn h20_a_publication_made_after_the_slots_position_stops_with_the_remedy() {
    let db = Database::create("h20").await;
    let flow = table(&db).await;
    db.batch_execute(&format!(
        "DROP PUBLICATION \"{0}\"; INSERT INTO t VALUES (1, 'x'); CREATE PUBLICATION \"{0}\" FOR TABLE t",
        flow.name
    ))
    .await
    .unwrap();
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t VALUES (2, 'y')").await.unwrap();
    let error = run.error().await;
    assert!(matches!(error, SourceError::PublicationMissing { .. }), "{error}");
    assert!(!error.is_transient());
    assert!(error.to_string().contains("at the slot's position"), "{error}");
    assert!(error.remedy().unwrap().contains("Delete the flow"), "{:?}", error.remedy());
}

#[tokio::test]
async fn h24_status_goes_out_while_nobody_reads_and_the_socket_is_full() {
    let pg = Postgres::start(PostgresOptions::default().setting("wal_sender_timeout", "1s")).await.unwrap();
    let db = Database::create_on(&pg, "h24").await;
    let flow = table(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    let sender = pg.walsender_pids().unwrap();
    assert_eq!(sender.len(), 1);
    db.batch_execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 40000) g").await.unwrap();
    // Four time-outs long nothing takes a segment. This waits for time itself to pass, not for a condition.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(pg.walsender_pids().unwrap(), sender, "the walsender gave us up");
    let mut rows = 0;
    while rows < 40_000 {
        rows += run.segment().await.rows;
    }
    assert_eq!(pg.walsender_pids().unwrap(), sender);
}

#[tokio::test]
async fn b103_an_older_owners_walsender_is_ended_and_a_younger_one_is_obeyed() {
    let db = Database::create("evict").await;
    let flow = table(&db).await;
    let mut old = flow.start(1, flow.first_position()).await;
    let prepared = Capture::prepare(flow.options(2)).await.unwrap();
    assert!(prepared.sessions_ended() >= 1);
    let (_young, _feedback) = prepared.start(flow.first_position(), None).await.unwrap();
    let error = old.error().await;
    assert!(error.is_transient(), "{error}");
    let refused = Capture::prepare(flow.options(1)).await.err().unwrap();
    assert!(refused.is_fenced(), "{refused}");
}

async fn hold_slot(flow: &Flow, name: &str) -> impl Sized + use<> {
    let client = ReplicationClient::connect(&flow.config.with_application_name(name)).await.unwrap();
    let start = StartOptions {
        slot: flow.name.clone(),
        publication: flow.name.clone(),
        start: Lsn::ZERO,
        protocol: 1,
        streaming: Streaming::Off,
        messages: false,
        confirmed: Lsn::ZERO,
        status_every: Duration::from_secs(1),
    };
    client.start_replication(&start).await.unwrap()
}

#[tokio::test]
async fn a_slot_in_use_by_somebody_else_is_named_and_not_ended() {
    let db = Database::create("in_use").await;
    let flow = table(&db).await;
    let _held = hold_slot(&flow, "their tool").await;
    let error = Capture::prepare(flow.options(5)).await.err().unwrap();
    assert!(matches!(&error, SourceError::SlotInUse { application, .. } if application == "their tool"), "{error}");
    assert!(error.is_transient());
    assert!(error.remedy().unwrap().contains("pg_terminate_backend"));
    let error = drop_slot(&flow.control, &flow.name, &owner(&flow.name, 5)).await.unwrap_err();
    assert_eq!(error.reason(), "SlotInUse");
}

#[tokio::test]
async fn b99_a_slot_that_was_moved_or_made_again_is_never_streamed() {
    let db = Database::create("moved").await;
    let flow = table(&db).await;
    db.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    db.query("SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())", &[&flow.name]).await.unwrap();
    let error = flow.start_with(flow.options(1), flow.first_position()).await.err().unwrap();
    assert!(matches!(error, SourceError::SlotMoved { .. }), "{error}");
    assert!(!error.is_transient());
    drop_slot(&flow.control, &flow.name, &owner(&flow.name, 1)).await.unwrap();
    drop_slot(&flow.control, &flow.name, &owner(&flow.name, 1)).await.unwrap();
    let error = Capture::prepare(flow.options(2)).await.err().unwrap();
    assert!(matches!(error, SourceError::SlotMissing { .. }), "{error}");
    ensure_slot(&flow.config, &flow.control, &slot(&flow.name)).await.unwrap();
    let error = flow.start_with(flow.options(3), flow.first_position()).await.err().unwrap();
    assert!(matches!(error, SourceError::SlotMoved { .. }), "{error}");
}

#[tokio::test]
async fn b100_another_cluster_or_an_unknown_timeline_is_refused_before_anything_is_written() {
    let db = Database::create("other").await;
    let flow = table(&db).await;
    let mut prepared = Capture::prepare(flow.options(1)).await.unwrap();
    let here = prepared.identity().clone();
    prepared.verify(flow.first_position(), Some(&here)).await.unwrap();
    let other = SourceIdentity { system_identifier: "1".into(), ..here.clone() };
    let error = prepared.verify(flow.first_position(), Some(&other)).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("OtherSystem", false));
    let older = SourceIdentity { timeline: here.timeline + 1, ..here };
    let error = prepared.verify(flow.first_position(), Some(&older)).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("TimelineDiverged", false));
}

#[tokio::test]
async fn b68_a_lost_slot_stops_with_the_reason() {
    let options = PostgresOptions::default().setting("max_slot_wal_keep_size", "1MB").setting("max_wal_size", "64MB");
    let pg = Postgres::start(options).await.unwrap();
    let db = Database::create_on(&pg, "lost").await;
    let flow = table(&db).await;
    for _ in 0..4 {
        db.batch_execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1000) g; TRUNCATE t; SELECT pg_switch_wal(); CHECKPOINT").await.unwrap();
    }
    let error = flow.start_with(flow.options(1), flow.first_position()).await.err().unwrap();
    assert!(matches!(error, SourceError::SlotLost { .. }), "{error}");
    assert!(!error.is_transient());
    assert!(error.remedy().unwrap().contains("max_slot_wal_keep_size"));
}

#[tokio::test]
async fn b64_a_killed_walsender_is_a_transient_error_and_nothing_is_lost() {
    let db = Database::create("killed").await;
    let flow = table(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    assert_eq!(run.rows(1).await[0].values[0], "1");
    let end = run.end;
    let killed = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1";
    db.query(killed, &[&flow.name]).await.unwrap();
    let error = run.error().await;
    assert!(error.is_transient(), "{error}");
    db.batch_execute("INSERT INTO t VALUES (2, 'y')").await.unwrap();
    let mut run = flow.start(2, end).await;
    assert_eq!(run.rows(1).await[0].values[0], "2");
}

#[tokio::test]
async fn a_large_row_is_a_segment_of_its_own_and_a_larger_one_an_error() {
    let db = Database::create("rows").await;
    let flow = table(&db).await;
    // Not compressible, so that its size is what is sent.
    let insert = |id: i32, bytes: i32| {
        format!("INSERT INTO t SELECT {id}, string_agg(md5(random()::text), '') FROM generate_series(1, {bytes} / 32)")
    };
    db.batch_execute(&format!(
        "BEGIN; INSERT INTO t VALUES (1, 'a'); {}; INSERT INTO t VALUES (3, 'c'); COMMIT; {}; {}",
        insert(2, 700_000),
        insert(4, 1_200_000),
        insert(5, 9_000_000)
    ))
    .await
    .unwrap();
    let mut run = flow.start(1, flow.first_position()).await;
    let sizes: Vec<usize> = [run.segment().await.rows, run.segment().await.rows, run.segment().await.rows].into();
    assert_eq!(sizes, [1, 1, 1]);
    let error = run.error().await;
    assert!(
        matches!(&error, SourceError::RowTooLarge { table, bytes, .. } if table.name == "t" && *bytes > 1_200_000),
        "{error}"
    );
    assert!(error.remedy().unwrap().contains("side store"));
    // A row above everything that is buffered is named without being read whole.
    let end = run.end;
    drop(run);
    db.batch_execute("DELETE FROM t WHERE id = 4").await.unwrap();
    let mut options = flow.options(2);
    options.row_bytes_max = 1_500_000;
    let mut run = flow.start_with(options, end).await.unwrap();
    assert_eq!(run.segment().await.rows, 1);
    let error = run.error().await;
    assert!(
        matches!(&error, SourceError::RowTooLarge { table, bytes, .. } if table.name == "t" && *bytes > 8_900_000),
        "{error}"
    );
}

#[tokio::test]
async fn segments_fill_up_while_publishes_are_in_flight() {
    let db = Database::create("eager").await;
    let flow = table(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    run.in_flight.send_replace(2);
    for id in 0..20 {
        db.batch_execute(&format!("INSERT INTO t VALUES ({id}, 'x')")).await.unwrap();
    }
    let target = wal_end(&db).await;
    let waited = tokio::time::timeout(Duration::from_secs(5), run.next()).await;
    assert!(waited.is_err(), "nothing is flushed with two in flight: {waited:?}");
    run.in_flight.send_replace(1);
    let segment = run.segment().await;
    assert_eq!(segment.rows, 20);
    assert!(segment.to <= Position::before(target));
}

#[tokio::test]
async fn b102_slot_creation_says_whom_it_waits_for_and_gives_up() {
    let db = Database::create("waits").await;
    let flow = table(&db).await;
    let blocker = db.connect().await;
    blocker.batch_execute("SET application_name = 'old report'; BEGIN; INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let mut wanted = slot(&format!("{}_2", flow.name));
    wanted.timeout = Duration::from_secs(5);
    let error = ensure_slot(&flow.config, &flow.control, &wanted).await.unwrap_err();
    assert!(matches!(error, SourceError::SlotWaits { .. }), "{error}");
    assert!(error.to_string().contains("old report"), "{error}");
    let left = db.query("SELECT 1 FROM pg_replication_slots WHERE slot_name = $1", &[&wanted.name]).await.unwrap();
    assert!(left.is_empty(), "nothing is left behind");
    blocker.batch_execute("ROLLBACK").await.unwrap();
    ensure_slot(&flow.config, &flow.control, &wanted).await.unwrap();
    drop_slot(&flow.control, &wanted.name, &owner(&flow.name, 1)).await.unwrap();
}
