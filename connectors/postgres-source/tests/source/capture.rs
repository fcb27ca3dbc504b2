//! Rows, positions, restarts.

use wallaby_model::{ColumnType, Op, Position};
use wallaby_postgres_source::CaptureEvent;
use wallaby_testkit::{Database, eventually};

use crate::kit::{Flow, LIMIT, confirmed, rows_of, wal_end};

fn ops(rows: &[crate::kit::Row]) -> Vec<Op> {
    rows.iter().map(|row| row.op).collect()
}

#[tokio::test]
async fn b35_changes_come_with_the_old_values_that_each_identity_gives() {
    let db = Database::create("identities").await;
    db.batch_execute(
        "CREATE TABLE by_key (id int PRIMARY KEY, v text);
         CREATE TABLE by_index (id int, code int NOT NULL, v text);
         CREATE UNIQUE INDEX by_index_code ON by_index (code);
         ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code;
         CREATE TABLE whole (id int, v text);
         ALTER TABLE whole REPLICA IDENTITY FULL;",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute(
        "BEGIN;
         INSERT INTO by_key VALUES (1, 'a');
         UPDATE by_key SET v = 'b';
         UPDATE by_key SET id = 2;
         DELETE FROM by_key;
         INSERT INTO by_index VALUES (1, 10, 'a');
         UPDATE by_index SET code = 11;
         DELETE FROM by_index;
         INSERT INTO whole VALUES (1, 'a');
         UPDATE whole SET v = 'b';
         DELETE FROM whole;
         TRUNCATE by_key, whole;
         COMMIT;",
    )
    .await
    .unwrap();
    let rows = run.rows(15).await;
    use Op::*;
    assert_eq!(
        ops(&rows),
        [
            Insert, Update, OldKey, Update, DeleteKey, Insert, OldKey, Update, DeleteKey, Insert, OldRow, Update,
            DeleteRow, Truncate, Truncate
        ]
    );
    let values: Vec<String> = rows.iter().map(|row| row.values.join(",")).collect();
    assert_eq!(
        values,
        [
            "1,a",
            "1,b",
            "1,NULL",
            "2,b",
            "2,NULL",
            "1,10,a",
            "NULL,10,NULL",
            "1,11,a",
            "NULL,11,NULL",
            "1,a",
            "1,a",
            "1,b",
            "1,b",
            "NULL,NULL",
            "NULL,NULL"
        ]
    );
    assert_eq!(rows[2].position, rows[3].position, "a before-image stands at the position of its row");
    assert_eq!((rows[13].position.index, rows[14].position.index), (1, 2), "a truncate of two tables counts two");
    assert_eq!(rows[13].position.change, rows[14].position.change);
    assert!(run.end.is_between_transactions());
    run.feedback.confirm(run.end.commit);
    let end = run.end.commit;
    eventually(LIMIT, "the confirmation arrives", async || match confirmed(&db, &flow.name).await {
        lsn if lsn == end => Ok(()),
        lsn => Err(lsn),
    })
    .await;
}

#[tokio::test]
async fn b43_unchanged_toast_is_distinct_from_null_and_b44_full_gives_the_value() {
    let db = Database::create("toast").await;
    db.batch_execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, big text, bytes bytea, absent text);
         ALTER TABLE t ALTER big SET STORAGE EXTERNAL, ALTER bytes SET STORAGE EXTERNAL;
         CREATE TABLE f (id int PRIMARY KEY, n int, big text);
         ALTER TABLE f REPLICA IDENTITY FULL;
         ALTER TABLE f ALTER big SET STORAGE EXTERNAL;",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute(
        "INSERT INTO t VALUES (1, 1, repeat('x', 5000), decode(repeat('ab', 4000), 'hex'), NULL);
         UPDATE t SET n = 2;
         UPDATE t SET id = 2;
         INSERT INTO f VALUES (1, 1, repeat('y', 5000));
         UPDATE f SET n = 2;",
    )
    .await
    .unwrap();
    let rows = run.rows(7).await;
    assert_eq!(rows[0].values[2].len(), 5000);
    assert_eq!(rows[0].values[3].len(), 8000);
    assert_eq!(rows[1].values, ["1", "2", "(unchanged)", "(unchanged)", "NULL"]);
    assert_eq!(rows[3].values, ["2", "2", "(unchanged)", "(unchanged)", "NULL"]);
    assert_eq!(rows[6].op, Op::Update);
    assert_eq!(rows[6].values[2], "y".repeat(5000));
}

#[tokio::test]
async fn b43_a_partition_with_less_identity_than_its_root_makes_no_null_of_unchanged_toast() {
    let db = Database::create("leaf_toast").await;
    db.batch_execute(
        "CREATE TABLE root (id int PRIMARY KEY, n int, big text) PARTITION BY RANGE (id);
         CREATE TABLE by_key PARTITION OF root FOR VALUES FROM (0) TO (100);
         CREATE TABLE whole PARTITION OF root FOR VALUES FROM (100) TO (200);
         ALTER TABLE by_key ALTER big SET STORAGE EXTERNAL; ALTER TABLE whole ALTER big SET STORAGE EXTERNAL;
         ALTER TABLE root REPLICA IDENTITY FULL; ALTER TABLE whole REPLICA IDENTITY FULL;",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute(
        "INSERT INTO root VALUES (1, 1, repeat('x', 5000)), (101, 1, repeat('y', 5000));
         UPDATE root SET id = id + 1 WHERE id = 1;
         UPDATE root SET n = 2 WHERE id = 2;
         UPDATE root SET id = id + 1 WHERE id = 101;",
    )
    .await
    .unwrap();
    let rows = run.rows(7).await;
    assert!(rows.iter().all(|row| row.table == "public.root"));
    use Op::*;
    assert_eq!(ops(&rows), [Insert, Insert, OldKey, Update, Update, OldRow, Update]);
    // The server sends 'O', and of the old row the key alone.
    assert_eq!(rows[2].values, ["1", "NULL", "NULL"]);
    assert_eq!(rows[3].values, ["2", "1", "(unchanged)"]);
    assert_eq!(rows[4].values, ["2", "2", "(unchanged)"]);
    assert_eq!(rows[5].values, ["101".to_owned(), "1".into(), "y".repeat(5000)]);
    assert_eq!(rows[6].values, ["102".to_owned(), "1".into(), "y".repeat(5000)]);
}

#[tokio::test]
async fn b53_shapes_change_in_mid_stream_and_in_mid_transaction() {
    let db = Database::create("shapes").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, a text)").await.unwrap();
    let flow = Flow::create(&db).await;
    // All of it happens while nothing reads: each row must come in the shape of its time (b56).
    db.batch_execute(
        "BEGIN;
         INSERT INTO t VALUES (1, 'x');
         ALTER TABLE t ADD COLUMN b numeric(10,2) DEFAULT 1.5;
         INSERT INTO t VALUES (2, 'y', 2.50);
         COMMIT;
         ALTER TABLE t DROP COLUMN a;
         INSERT INTO t VALUES (3, 3);
         ALTER TABLE t RENAME COLUMN b TO c;
         INSERT INTO t VALUES (4, 4);",
    )
    .await
    .unwrap();
    let mut run = flow.start(1, flow.first_position()).await;
    let mut shapes = Vec::new();
    let mut rows = Vec::new();
    while rows.len() < 4 {
        let segment = run.segment().await;
        for table in &segment.body.tables {
            let names: Vec<&str> = table.schema.columns.iter().map(|column| column.name.as_str()).collect();
            shapes.push((names.join(","), table.schema.key()));
        }
        rows.extend(rows_of(&segment.body));
    }
    let values: Vec<String> = rows.iter().map(|row| row.values.join(",")).collect();
    assert_eq!(values, ["1,x", "2,y,2.50", "3,3.00", "4,4.00"]);
    let names: Vec<&str> = shapes.iter().map(|(names, _)| names.as_str()).collect();
    assert_eq!(names, ["id,a", "id,a,b", "id,b", "id,c"]);
    assert!(shapes.iter().all(|(_, key)| key == &[0]), "{shapes:?}");
}

#[tokio::test]
async fn a_row_of_before_the_key_was_changed_has_the_key_of_then() {
    let db = Database::create("old_key").await;
    db.batch_execute(
        "CREATE TABLE t (id int PRIMARY KEY, b int NOT NULL UNIQUE);
         CREATE TABLE grown (a int PRIMARY KEY);
         CREATE TABLE named (a int, b int, PRIMARY KEY (b, a));
         CREATE TABLE made (a int, g int GENERATED ALWAYS AS (a + 1) STORED, PRIMARY KEY (a, g));
         CREATE TABLE listed (a int, b int, PRIMARY KEY (a, b));
         INSERT INTO t VALUES (5, 50); INSERT INTO grown VALUES (1); INSERT INTO named VALUES (1, 2);",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let own = flow.name.clone();
    db.batch_execute(&format!(
        "ALTER PUBLICATION \"{own}\" SET (publish = 'insert'); ALTER PUBLICATION \"{own}\" DROP TABLE listed;
         ALTER PUBLICATION \"{own}\" ADD TABLE listed (a);
         INSERT INTO made VALUES (1); INSERT INTO listed VALUES (1, 1);
         ALTER PUBLICATION \"{own}\" SET (publish = 'insert, update, delete');
         DELETE FROM t; DELETE FROM grown; DELETE FROM named;
         ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (b);
         ALTER TABLE grown ADD b int NOT NULL DEFAULT 1, DROP CONSTRAINT grown_pkey, ADD PRIMARY KEY (b, a);
         ALTER TABLE named RENAME a TO c;
         INSERT INTO t VALUES (6, 60); INSERT INTO grown VALUES (2, 2); INSERT INTO named VALUES (3, 4);"
    ))
    .await
    .unwrap();
    let mut run = flow.start(1, flow.first_position()).await;
    let mut found = Vec::new();
    while found.len() < 8 {
        let segment = run.segment().await;
        for table in &segment.body.tables {
            for row in 0..table.rows.num_rows() {
                let position = table.position(row, &segment.body.transactions);
                found.push((position, table.schema.table.name.clone(), table.op_at(row).unwrap(), table.schema.key()));
            }
        }
    }
    found.sort_by_key(|(position, ..)| *position);
    let found: Vec<(&str, Op, &[u16])> =
        found.iter().map(|(_, table, op, key)| (table.as_str(), *op, key.as_slice())).collect();
    use Op::*;
    assert_eq!(
        found,
        [
            // A part of the key is never sent.
            ("made", Insert, &[][..]),
            ("listed", Insert, &[]),
            ("t", DeleteKey, &[0]),
            ("grown", DeleteKey, &[0]),
            ("named", DeleteKey, &[0, 1]),
            ("t", Insert, &[1]),
            ("grown", Insert, &[1, 0]),
            ("named", Insert, &[1, 0]),
        ]
    );
}

#[tokio::test]
async fn types_are_resolved_through_domains_enums_and_arrays() {
    let db = Database::create("types").await;
    db.batch_execute(
        "CREATE SCHEMA other;
         CREATE TYPE other.mood AS ENUM ('sad', 'ok');
         CREATE DOMAIN price AS numeric(8,2);
         CREATE DOMAIN net_price AS price;
         CREATE TABLE t (id int PRIMARY KEY, m other.mood NOT NULL, p net_price, ps net_price[], ms other.mood[], ints int[],
                         r int4range, j jsonb, rs int4range[], c char(5), i interval(3), o oid);
         INSERT INTO t VALUES (0, 'ok');",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute(
        "INSERT INTO t VALUES (1, 'ok', 1.10, '{1.1,NULL}', '{sad}', '{{1,2},{3,4}}', '[1,5)', '{\"a\": 1}', '{\"[1,2)\"}',
                               'ab', '1 year 2 days 3.5 seconds', 4000000000)",
    )
    .await
    .unwrap();
    let segment = run.segment().await;
    let schema = &segment.body.tables[0].schema;
    let kinds: Vec<(ColumnType, &str)> =
        schema.columns.iter().map(|column| (column.kind, column.sql_type.as_str())).collect();
    use ColumnType as T;
    assert_eq!(
        kinds,
        [
            (T::Int4, "integer"),
            (T::Enum, "other.mood"),
            (T::Numeric, "numeric(8,2)"),
            (T::Array, "numeric[]"),
            (T::Array, "other.mood[]"),
            (T::Array, "integer[]"),
            (T::Other, "int4range"),
            (T::Jsonb, "jsonb"),
            (T::Other, "int4range[]"),
            (T::Text, "character(5)"),
            (T::Interval, "interval(3)"),
            (T::Oid, "oid"),
        ]
    );
    assert!(schema.columns[1].not_null && !schema.columns[2].not_null);
    let rows = rows_of(&segment.body);
    assert_eq!(
        rows[0].values,
        [
            "1",
            "ok",
            "1.10",
            "{1.10,NULL}",
            "{sad}",
            "{{1,2},{3,4}}",
            "[1,5)",
            "{\"a\": 1}",
            "{\"[1,2)\"}",
            "ab   ",
            "12/2/3500000",
            "4000000000"
        ]
    );
}

#[tokio::test]
async fn b58_a_restart_inside_a_transaction_goes_on_with_the_next_row() {
    let db = Database::create("inside").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, pad text)").await.unwrap();
    let flow = Flow::create(&db).await;
    // One multi-insert: many rows share an LSN (b59).
    db.batch_execute("INSERT INTO t VALUES (0, ''); COPY t FROM PROGRAM 'seq 1 500 | sed s/$/\\\\t/'").await.unwrap();
    let mut options = flow.options(1);
    options.segment_target_bytes = 4000;
    let mut run = flow.start_with(options.clone(), flow.first_position()).await.unwrap();
    let mut all = Vec::new();
    let mut shared = 0;
    let mut epoch = 1;
    while all.len() < 501 {
        let segment = run.segment().await;
        let rows = rows_of(&segment.body);
        shared += rows.iter().filter(|row| row.position.index > 1).count();
        all.extend(rows.into_iter().map(|row| row.values[0].parse::<i32>().unwrap()));
        let inside = !segment.to.is_between_transactions();
        if inside {
            assert!(
                segment.complete_to < Position::before(segment.to.commit.max(segment.complete_to.commit))
                    || segment.complete_to.commit <= segment.to.commit
            );
            let end = run.end;
            drop(run);
            epoch += 1;
            options.owner.epoch.0 = epoch;
            run = flow.start_with(options.clone(), end).await.unwrap();
        }
    }
    assert_eq!(all, (0..=500).collect::<Vec<_>>());
    assert!(epoch > 3, "it was cut {epoch} times");
    assert!(shared > 100, "rows share an LSN: {shared}");
}

#[tokio::test]
async fn b84_heartbeats_follow_the_wal_without_any_captured_change() {
    let db = Database::create("quiet").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE uncaptured (id int)").await.unwrap();
    db.batch_execute("ALTER TABLE uncaptured REPLICA IDENTITY FULL").await.unwrap();
    let flow = Flow::create(&db).await;
    db.batch_execute(&format!("ALTER PUBLICATION \"{}\" DROP TABLE uncaptured", flow.name)).await.unwrap();
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO uncaptured SELECT generate_series(1, 1000)").await.unwrap();
    let target = wal_end(&db).await;
    let mut beats = Vec::new();
    while run.end < Position::before(target) {
        match run.next().await.unwrap() {
            CaptureEvent::Heartbeat { to } => beats.push((to, std::time::Instant::now())),
            other => panic!("{other:?}"),
        }
    }
    run.feedback.confirm(run.end.commit);
    eventually(LIMIT, "the slot follows", async || match confirmed(&db, &flow.name).await {
        lsn if lsn >= target => Ok(()),
        lsn => Err(lsn),
    })
    .await;
    for pair in beats.windows(2) {
        let apart = pair[1].1 - pair[0].1;
        assert!(apart.as_millis() >= 900, "heartbeats at most once a second: {apart:?}");
    }
}
