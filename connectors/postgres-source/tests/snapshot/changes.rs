//! What happens at the source while a run goes on.

use std::time::{Duration, Instant};

use wallaby_model::SegmentBody;
use wallaby_postgres_source::{PartSink, SnapshotExport, SourceError, read_chunk};
use wallaby_testkit::Database;

use crate::kit::{Flow, owner, wal_end};
use crate::{Kept, export, read, request};

#[tokio::test]
async fn h01_a_rewritten_table_is_never_read_as_empty() {
    let db = Database::create("rewrite").await;
    let changes = [
        "ALTER TABLE t ALTER v TYPE bigint",
        "VACUUM FULL t",
        "CLUSTER t USING t_pkey",
        "TRUNCATE t",
        "ALTER TABLE t DROP COLUMN v",
        "ALTER TABLE t DROP COLUMN v; ALTER TABLE t ADD COLUMN v int",
        "ALTER TABLE t RENAME v TO w",
    ];
    for (index, change) in changes.iter().enumerate() {
        db.batch_execute("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 100) n")
            .await
            .unwrap();
        let flow = Flow::create(&db).await;
        let mut export = export(&flow.config, &flow.name, index as u64 + 1).await;
        db.batch_execute(change).await.unwrap();
        // Planned after the change: what counts is what the snapshot shows.
        let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
        let error = match read(&flow.config, &export, &flow.name, &plan[0]).await {
            Ok(kept) => panic!("{change}: {} rows were read", kept.rows().len()),
            Err(error) => error,
        };
        assert!(matches!(error, SourceError::Rewritten { .. }), "{change}: {error}");
        assert!(export.is_outdated(&[&plan[0]]).await.unwrap(), "{change}");
    }
}

#[tokio::test]
async fn changes_that_do_no_harm_and_tables_that_are_gone() {
    let db = Database::create("harmless").await;
    let fill = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 100) n";
    db.batch_execute(fill).await.unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    db.batch_execute("ALTER TABLE t ADD COLUMN w int DEFAULT 7; DELETE FROM t WHERE id > 50").await.unwrap();
    assert!(!export.is_outdated(&[&plan[0]]).await.unwrap());
    let kept = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    assert_eq!(kept.rows().len(), 100);
    assert_eq!(kept.0[0].tables[0].schema.columns.len(), 2);
    db.batch_execute("DROP TABLE t").await.unwrap();
    let error = read(&flow.config, &export, &flow.name, &plan[0]).await.err().unwrap();
    assert!(matches!(error, SourceError::RelationGone { .. }), "{error}");
    db.batch_execute(fill).await.unwrap();
    let error = read(&flow.config, &export, &flow.name, &plan[0]).await.err().unwrap();
    assert!(matches!(error, SourceError::RelationGone { .. }), "{error}");
    assert!(export.is_outdated(&[&plan[0]]).await.unwrap());
}

#[tokio::test]
async fn h08_b71_a_row_is_in_the_snapshot_or_behind_its_point_and_never_both() {
    let db = Database::create("exactly").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2)").await.unwrap();
    let flow = Flow::create(&db).await;
    let open = db.connect().await;
    open.batch_execute("BEGIN; INSERT INTO t VALUES (3, 3)").await.unwrap();
    // It waits for the open transaction, says so, and gives up.
    let error = SnapshotExport::open(&flow.config, &owner(&flow.name, 1), Duration::from_secs(5)).await.err().unwrap();
    assert!(matches!(&error, SourceError::SlotWaits { blockers, .. } if blockers.contains("backend")), "{error}");
    let config = flow.config.clone();
    let name = flow.name.clone();
    let exporting = tokio::spawn(async move { export(&config, &name, 2).await });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE_REPLICATION_SLOT%' AND wait_event_type = 'Lock'";
    wallaby_testkit::eventually(Duration::from_secs(10), "the export waits", async || {
        let count: i64 = db.query_one(waits, &[]).await.map_err(|error| error.to_string())?.get(0);
        if count > 0 { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    db.batch_execute("INSERT INTO t VALUES (4, 4)").await.unwrap();
    open.batch_execute("COMMIT").await.unwrap();
    let mut export = exporting.await.unwrap();
    db.batch_execute("INSERT INTO t VALUES (5, 5); DELETE FROM t WHERE id = 1").await.unwrap();
    let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    let kept = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    let end = wal_end(&db).await;
    let mut run = flow.start(3, flow.first_position()).await;
    let mut ids: Vec<String> = kept.rows().into_iter().map(|row| row[0].clone()).collect();
    assert!(ids.contains(&"1".to_owned()) && ids.contains(&"3".to_owned()) && !ids.contains(&"5".to_owned()));
    while run.end.commit < end {
        let wallaby_postgres_source::CaptureEvent::Segment(segment) = run.next().await.unwrap() else { continue };
        let later = crate::kit::rows_of(&segment.body)
            .into_iter()
            .filter(|row| row.op == wallaby_model::Op::Insert && row.position.commit >= export.consistent_point());
        ids.extend(later.map(|row| row.values[0].clone()));
    }
    ids.sort();
    assert_eq!(ids, ["1", "2", "3", "4", "5"]);
    let slots: i64 = db
        .query_one("SELECT count(*) FROM pg_replication_slots WHERE temporary AND database = current_database()", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(slots, 0, "no WAL is held by an export");
}

#[tokio::test]
async fn h23_a_dead_exporter_is_told_from_everything_else() {
    let db = Database::create("exporter").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    let flow = Flow::create(&db).await;
    let mut first = export(&flow.config, &flow.name, 1).await;
    let plan = first.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    // A successor ends the session of the older owner, and is not disturbed by its own.
    let second = export(&flow.config, &flow.name, 2).await;
    let third = export(&flow.config, &flow.name, 2).await;
    first.ended().await;
    for gone in [first.snapshot(), "nonsense"] {
        let mut asked = request(&first, &flow.name, &plan[0], 0);
        asked.snapshot = gone.to_owned();
        let error = read_chunk(&flow.config, &asked, &mut Kept::default()).await.unwrap_err();
        assert!(matches!(error, SourceError::SnapshotGone { .. }), "{error}");
        assert!(error.is_transient());
    }
    for export in [&second, &third] {
        assert_eq!(read(&flow.config, export, &flow.name, &plan[0]).await.unwrap().rows().len(), 1);
    }
    let error = SnapshotExport::open(&flow.config, &owner(&flow.name, 1), Duration::from_secs(1)).await.err().unwrap();
    assert!(error.is_fenced(), "{error}");
}

/// Takes the first part and then waits for ever.
struct Stuck<'a>(&'a tokio::sync::Notify);

impl PartSink for Stuck<'_> {
    type Error = SourceError;

    async fn part(&mut self, _: SegmentBody) -> Result<(), SourceError> {
        self.0.notify_one();
        std::future::pending().await
    }
}

#[tokio::test]
async fn m4_a_reader_takes_the_weakest_lock_and_yields_to_who_needs_the_table() {
    let db = Database::create("locks").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n")
        .await
        .unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    let asked = request(&export, &flow.name, &plan[0], 0);
    let begun = tokio::sync::Notify::new();
    let mut stuck = Stuck(&begun);
    let reading = read_chunk(&flow.config, &asked, &mut stuck);
    let altering = async {
        begun.notified().await;
        let modes = "SELECT string_agg(DISTINCT l.mode, ',') FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.relation = 't'::regclass AND a.query LIKE 'COPY%'";
        let modes: Option<String> = db.query_one(modes, &[]).await.unwrap().get(0);
        assert_eq!(modes.as_deref(), Some("AccessShareLock"));
        db.batch_execute("SET lock_timeout = '15s'; ALTER TABLE t ADD COLUMN w int; RESET lock_timeout").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(reading, altering);
    let error = outcome.unwrap_err();
    assert!(matches!(error, SourceError::TableBusy { .. }), "{error}");
    // The other way round: an exclusive lock is not waited for for long, and nobody queues behind us.
    let other = db.connect().await;
    other.batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let begun = Instant::now();
    let error = read_chunk(&flow.config, &asked, &mut Kept::default()).await.unwrap_err();
    assert!(matches!(error, SourceError::TableBusy { .. }), "{error}");
    assert!(begun.elapsed() < crate::kit::LIMIT);
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap().rows().len(), 20000);
}
