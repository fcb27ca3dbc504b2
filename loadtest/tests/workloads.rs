//! The workloads and the comparison against real servers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use wallaby_loadtest::shop::{Load, LoadOptions};
use wallaby_loadtest::{DifferenceKind, compare, shop, typ};
use wallaby_stack::{Postgres, PostgresOptions};

async fn database(postgres: &Postgres, name: &str) -> String {
    let admin = postgres.connect("postgres").await.unwrap();
    admin.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    postgres.dsn(name)
}

/// The length of every insert that pgoutput makes of a fill, and the number of transactions.
#[tokio::test]
async fn the_typical_row_is_239_bytes() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    database(&postgres, "typ").await;
    let client = postgres.connect("typ").await.unwrap();
    typ::create_schema(&client).await.unwrap();
    client.batch_execute("CREATE PUBLICATION p FOR TABLE public.typ").await.unwrap();
    client.batch_execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')").await.unwrap();
    typ::fill(&client, 0, 1_050, 100).await.unwrap();
    let sql = "SELECT chr(get_byte(data, 0)), count(*), avg(length(data))::float8, max(length(data))::int8 \
               FROM pg_logical_slot_get_binary_changes('s', NULL, NULL, 'proto_version', '4', 'publication_names', 'p') GROUP BY 1";
    let rows = client.query(sql, &[]).await.unwrap();
    let of = |kind: &str| rows.iter().find(|row| row.get::<_, String>(0) == kind).unwrap();
    assert_eq!(of("I").get::<_, i64>(1), 1_050);
    assert_eq!(of("B").get::<_, i64>(1), 11, "10 transactions of 100 rows and one of 50");
    let mean: f64 = of("I").get(2);
    assert!((mean - typ::ROW_BYTES as f64).abs() < 1.0, "the mean row has {mean} bytes");
}

#[tokio::test]
async fn an_open_loop_commits_every_transaction_once() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let dsn = database(&postgres, "typ").await;
    let client = postgres.connect("typ").await.unwrap();
    typ::create_schema(&client).await.unwrap();
    let load = typ::OpenLoop { dsn, first: 10, transactions: 300, per_second: 2_000, connections: 3 };
    let report = load.run().await.unwrap();
    assert_eq!(report.transactions, 300);
    let row =
        client.query_one("SELECT count(*), min(id), max(id), count(DISTINCT xmin::text) FROM typ", &[]).await.unwrap();
    let found: (i64, i64, i64, i64) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(found, (300, 1_000_010, 1_000_309, 300));
}

/// However short the load is: a sink that makes a table at its first row has all of them, and can be compared.
#[tokio::test]
async fn a_shop_that_opens_sends_a_row_of_every_table_and_one_that_is_open_none() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let dsn = database(&postgres, "shop").await;
    shop::create_schema(&dsn).await.unwrap();
    let client = postgres.connect("shop").await.unwrap();
    client.batch_execute("SELECT pg_create_logical_replication_slot('s', 'test_decoding')").await.unwrap();
    let options = || LoadOptions { dsn: dsn.clone(), seed: 42, rows_per_second: Some(1), writers: 1 };
    Load::start(options()).await.unwrap().stop().await.unwrap();
    let read = "SELECT data FROM pg_logical_slot_get_changes('s', NULL, NULL)";
    let changes: Vec<String> = client.query(read, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    for table in shop::TABLES {
        let insert = format!("table {table}: INSERT");
        assert!(changes.iter().any(|change| change.starts_with(&insert)), "no row of {table}");
    }
    let first_orders = async || {
        let found = client.query_one("SELECT count(*) FROM orders WHERE total = 1.99", &[]).await.unwrap();
        found.get::<_, i64>(0)
    };
    assert_eq!(first_orders().await, 1);
    Load::start(options()).await.unwrap().stop().await.unwrap();
    assert_eq!(first_orders().await, 1);
}

/// Runs the shop's load, copies the database by Postgres' own means, and compares.
#[tokio::test]
async fn a_copy_of_the_shop_is_equal_and_each_kind_of_difference_is_found() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let source = database(&postgres, "shop").await;
    shop::create_schema(&source).await.unwrap();
    let load =
        Load::start(LoadOptions { dsn: source.clone(), seed: 42, rows_per_second: None, writers: 2 }).await.unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while load.progress().transactions < 3_000 && !load.has_failed() {
        assert!(std::time::Instant::now() < deadline, "the load is too slow: {:?}", load.progress());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let done = load.stop().await.unwrap();
    assert!(done.rows > done.transactions, "{done:?}");
    let admin = postgres.connect("postgres").await.unwrap();
    admin.batch_execute("CREATE DATABASE warehouse TEMPLATE shop").await.unwrap();
    let target = postgres.dsn("warehouse");

    let same = compare(&source, &target, &shop::TABLES).await.unwrap();
    assert!(same.is_equal(), "{same}");
    assert!(same.tables.iter().all(|table| table.rows_equal > 0 || table.table == "public.carts"), "{same}");

    let client = postgres.connect("warehouse").await.unwrap();
    let break_it = "SET session_replication_role = replica; \
        UPDATE products SET description = 'x' || description WHERE number = 7; \
        DELETE FROM customers WHERE id = 3; \
        INSERT INTO inventory VALUES ('south', 'nothing', 1, now()); \
        ALTER TABLE orders ADD COLUMN _wallaby_position text; \
        ALTER TABLE order_items DROP COLUMN options; DROP TABLE carts";
    client.batch_execute(break_it).await.unwrap();
    let found = compare(&source, &target, &shop::TABLES).await.unwrap();
    let of = |name: &str| found.tables.iter().find(|table| table.table == name).unwrap();
    assert_eq!((of("public.customers").missing, of("public.customers").different), (1, 0), "{found}");
    assert_eq!(of("public.customers").first[0].key, "id='3'");
    assert_eq!(of("public.products").different, 1, "{found}");
    let DifferenceKind::Different(columns) = &of("public.products").first[0].kind else { panic!("{found}") };
    assert_eq!(columns[0].column, "description");
    assert_eq!(of("public.inventory").extra, 1, "{found}");
    assert!(of("public.orders").is_equal(), "{found}");
    assert!(of("public.order_items").unlike.as_ref().unwrap().contains("options"), "{found}");
    assert!(of("public.carts").unlike.is_some(), "{found}");
    assert!(!found.is_equal());
}

/// Without a key, rows are a bag: order means nothing, and a doubled row is found.
#[tokio::test]
async fn a_doubled_row_is_found_in_a_table_without_a_key() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let (one, other) = (database(&postgres, "one").await, database(&postgres, "other").await);
    let make = "CREATE TABLE bag (a int, b text)";
    for (name, rows) in [("one", "(1, NULL), (2, 'x'), (2, 'x')"), ("other", "(2, 'x'), (2, 'x'), (1, NULL)")] {
        let client = postgres.connect(name).await.unwrap();
        client.batch_execute(&format!("{make}; INSERT INTO bag VALUES {rows}")).await.unwrap();
    }
    assert!(compare(&one, &other, &["public.bag"]).await.unwrap().is_equal());
    postgres.connect("other").await.unwrap().batch_execute("INSERT INTO bag VALUES (2, 'x')").await.unwrap();
    let found = compare(&one, &other, &["public.bag"]).await.unwrap();
    assert_eq!((found.tables[0].extra, found.tables[0].rows_equal), (1, 3), "{found}");
    assert!(compare(&one, &other, &["public.nothing"]).await.is_err());
}
