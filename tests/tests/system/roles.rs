//! The least rights of docs/operations.md, typed as the page has them: enough for a first load, for what comes after it, for rows that are
//! read again, and for `wallaby verify`. On the way, what is counted of all that.

use tokio_postgres::Client;
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::System;
use wallaby_tests::traffic::Traffic;
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::{applied, small};

const READ_AGAIN: &str = "wallaby_sink_rows_read_again_total";
const LOOKUPS: &str = "wallaby_source_lookups_total";
const UNKNOWN_TYPES: &str = "wallaby_source_unknown_type_columns_total";
const AS_TEXT: &str = "wallaby_sink_columns_as_text_total";

/// The page's block of SQL that is marked for `place`.
fn documented_sql(place: &str) -> &'static str {
    let page = include_str!("../../../docs/operations.md");
    let (_, after) = page.split_once(&format!("<!-- run: {place} -->\n```sql\n")).unwrap();
    after.split_once("```").unwrap().0
}

/// A type that only the source has, and a value that is kept out of line: an update that leaves it alone does not carry it.
const PLACES: &str = "\
    CREATE TYPE spot AS (x int, y int); \
    CREATE TABLE places (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, at spot, map text); \
    ALTER TABLE places ALTER map SET STORAGE EXTERNAL; \
    INSERT INTO places SELECT i, 0, ROW(i, -i)::spot, repeat(md5(i::text), 200) FROM generate_series(1, 200) i";
const ALL_PLACES: &str = "SELECT concat_ws('/', id, n, at::text, md5(map)) FROM places ORDER BY id";

/// Every table of the schema belongs to the role that the page names.
const OWNED: &str = "\
    CREATE ROLE app_owner NOLOGIN; \
    DO $$ DECLARE t text; BEGIN \
      FOR t IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP \
        EXECUTE format('ALTER TABLE public.%I OWNER TO app_owner', t); \
      END LOOP; \
    END $$";

async fn texts(client: &Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn places_are_equal(system: &System) {
    let (source, target) = (system.source().await, system.target().await);
    eventually(PATIENCE, "the places are equal", async || {
        let there = target.query(ALL_PLACES, &[]).await.map_err(|error| error.to_string())?;
        let there: Vec<String> = there.iter().map(|row| row.get(0)).collect();
        let wanted = texts(&source, ALL_PLACES).await;
        if there == wanted { Ok(()) } else { Err(format!("{} of {}", there.len(), wanted.len())) }
    })
    .await;
}

async fn counted(system: &System, metric: &str) -> f64 {
    let worker = &system.workers[0];
    worker.metric(metric, &[]).await.unwrap()
}

/// Rows that the sink lacks are changed without their large value: each is read again by its key, and counted.
async fn rows_are_read_again(system: &System) {
    let before = (counted(system, READ_AGAIN).await, counted(system, LOOKUPS).await);
    system.target().await.batch_execute("DELETE FROM places WHERE id IN (7, 70, 170)").await.unwrap();
    system.source().await.batch_execute("UPDATE places SET n = n + 1 WHERE id % 10 = 0 OR id = 7").await.unwrap();
    places_are_equal(system).await;
    let after = (counted(system, READ_AGAIN).await, counted(system, LOOKUPS).await);
    assert_eq!((after.0 - before.0, after.1 - before.1), (3.0, 3.0), "three rows were read again by their keys");
}

async fn verified(system: &System) {
    let said = system.cli(&["verify", "shop", "--within", "60s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    let is_equal = |line: &str| line.split_whitespace().take(2).eq(["public.places", "equal"]);
    assert!(said.text.lines().any(is_equal), "{}", said.text);
}

/// A connection string for another role.
fn dsn_as(dsn: &str, role: &str) -> String {
    let (_, address) = dsn.rsplit_once('@').unwrap();
    format!("{{ value: \"postgres://{role}:choose-one@{address}\" }}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roles_of_the_operations_page_load_follow_and_verify() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    let (source, target) = (system.source().await, system.target().await);
    for sql in [PLACES, OWNED, documented_sql("source")] {
        source.batch_execute(sql).await.unwrap();
    }
    target.batch_execute(documented_sql("sink")).await.unwrap();
    let flow = FlowFile {
        source: dsn_as(&system.source_dsn(), "wallaby"),
        sink: dsn_as(&system.target_dsn(), "wallaby_sink"),
        snapshot: "initial",
        ..small().flow
    };
    applied(&system, &flow).await;
    system.captures().await;
    let traffic = Traffic::start(system.source_dsn(), system.target_dsn(), 7, 100).await;
    places_are_equal(&system).await;
    let users =
        "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%' ORDER BY 1";
    assert_eq!(texts(&source, users).await, ["wallaby", "wallaby_sink"], "nobody else works here");
    rows_are_read_again(&system).await;
    source
        .batch_execute("DELETE FROM places WHERE id % 9 = 0; UPDATE places SET id = -id WHERE id % 8 = 0")
        .await
        .unwrap();
    places_are_equal(&system).await;
    system.all_is_equal(traffic).await;
    verified(&system).await;

    let kept_as =
        "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'places'::regclass AND attname = 'at'";
    assert_eq!(texts(&target, kept_as).await, ["text"]);
    assert!(
        counted(&system, UNKNOWN_TYPES).await >= 1.0,
        "a column of a type without a rule of its own is not counted"
    );
    assert!(counted(&system, AS_TEXT).await >= 1.0, "a column that is kept as text at the sink is not counted");

    // The page's other way: an administrator makes the publication before, and the role only reads.
    let said = system.cli(&["delete", "shop", "--wait", "--timeout", "80s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    let reader = "CREATE ROLE reader LOGIN REPLICATION PASSWORD 'choose-one'; GRANT USAGE ON SCHEMA public TO reader; \
        GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader; UPDATE places SET n = n + 100 WHERE id % 3 = 0";
    source.batch_execute(reader).await.unwrap();
    let publication = format!(
        "CREATE PUBLICATION {} FOR TABLE customers, products, orders, order_items, inventory, carts, ledger, places",
        system.flow().slot_name()
    );
    source.batch_execute(&publication).await.unwrap();
    applied(&system, &FlowFile { source: dsn_as(&system.source_dsn(), "reader"), create: false, ..flow }).await;
    places_are_equal(&system).await;
    system.row_passes().await;
    rows_are_read_again(&system).await;
    verified(&system).await;
}
