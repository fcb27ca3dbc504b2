//! Tables and columns that are not the same at both sides, and those that need not be.

use std::time::Duration;

use crate::pair::{Pair, of, shown};
use wallaby_connector_api::verify::VerifyError;
use wallaby_model::verify::Verdict;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_the_sink_keeps_in_another_type_is_equal() {
    let pair = Pair::fresh("verify_wider").await;
    pair.at_source("CREATE TYPE mood AS ENUM ('sad'); CREATE TYPE spot AS (x int, since interval)").await;
    pair.at_source(
        "CREATE TABLE t (id smallint PRIMARY KEY, i int, n int, r real, c char(6), v varchar(5), iv interval, m mood, s spot, b boolean, a mood[])",
    )
    .await;
    pair.at_sink(
        "CREATE TABLE t (id bigint PRIMARY KEY, i bigint, n numeric, r float8, c text, v varchar(50), iv text, m text, s text, b text, a text)",
    )
    .await;
    // As the sink writes them: a composite in the WAL stream's words, an interval cast in the sink's own session.
    pair.at_source(
        "INSERT INTO t VALUES (1, 2, 3, 0.1, 'ab', 'x', '1 day 02:00', 'sad', '(1,1 day)', true, '{sad}'); INSERT INTO t (id) VALUES (2)",
    )
    .await;
    pair.at_sink(
        "INSERT INTO t VALUES (1, 2, 3, 0.1::real, 'ab    ', 'x', '1 day 02:00:00', 'sad', '(1,P1D)', 'true', '{sad}'); INSERT INTO t (id) VALUES (2)",
    )
    .await;
    pair.publish("t").await;
    let report = pair.verify().await;
    assert_eq!(report.verdict(), Verdict::Equal, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_and_columns_that_one_side_lacks_are_named() {
    let pair = Pair::fresh("verify_shapes").await;
    pair.at_source("CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1), (2)").await;
    pair.at_source("CREATE TABLE narrow (id int PRIMARY KEY, a int, b int); INSERT INTO narrow VALUES (1, 2, 3)").await;
    pair.at_sink("CREATE TABLE narrow (id int PRIMARY KEY, a int); INSERT INTO narrow VALUES (1, 2)").await;
    pair.at_source("CREATE TABLE wide (id int PRIMARY KEY); INSERT INTO wide VALUES (1)").await;
    pair.at_sink("CREATE TABLE wide (id int PRIMARY KEY, loaded_at timestamptz DEFAULT now(), _wallaby_op text)").await;
    pair.at_sink("INSERT INTO wide VALUES (1)").await;
    pair.at_source("CREATE TABLE keyless_there (id int PRIMARY KEY)").await;
    pair.at_sink("CREATE TABLE keyless_there (other int)").await;
    pair.at_sink("CREATE TABLE only_at_the_sink (id int); INSERT INTO only_at_the_sink VALUES (1)").await;
    pair.publish("gone, narrow, wide, keyless_there").await;
    let report = pair.verify().await;
    let gone = of(&report, "public.gone");
    assert_eq!(gone.shape, ["the sink has no table public.gone"]);
    assert_eq!((gone.verdict, gone.missing), (Verdict::Different, 2));
    assert_eq!(gone.seen_once, 0, "there is nothing to look at again");
    let narrow = of(&report, "public.narrow");
    assert_eq!(narrow.shape, ["the sink lacks the column b"]);
    assert_eq!((narrow.verdict, narrow.different), (Verdict::Different, 0));
    let wide = of(&report, "public.wide");
    assert_eq!((wide.verdict, wide.columns_ignored.clone()), (Verdict::Equal, vec!["loaded_at".to_owned()]));
    assert_eq!(of(&report, "public.keyless_there").verdict, Verdict::Different);
    assert_eq!(report.tables.len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quoted_names_collations_and_composite_text_keys() {
    let pair = Pair::fresh("verify_names").await;
    let table = "\"Sch.ema\".\"t'\"\"; --\"";
    pair.at_both("CREATE SCHEMA \"Sch.ema\"").await;
    pair.at_source(&format!("CREATE TABLE {table} (\"Key \"\"1\" text COLLATE \"C\", \"ключ\" text, v int, PRIMARY KEY (\"Key \"\"1\", \"ключ\"))")).await;
    pair.at_sink(&format!("CREATE TABLE {table} (v int, \"ключ\" text COLLATE \"C\", \"Key \"\"1\" text, PRIMARY KEY (\"ключ\", \"Key \"\"1\"))")).await;
    let rows = |sql: &str| format!("INSERT INTO {table} (\"Key \"\"1\", \"ключ\", v) {sql}");
    pair.at_both(&rows("SELECT CASE n % 3 WHEN 0 THEN 'a' WHEN 1 THEN 'Á' ELSE '_\\''' END || n, 'Z' || n, n FROM generate_series(1, 3000) n")).await;
    pair.at_sink(&format!("UPDATE {table} SET v = -1 WHERE v = 5; DELETE FROM {table} WHERE v = 7")).await;
    pair.publish(table).await;
    let report = pair.verify().await;
    let found = of(&report, "Sch.ema.t'\"; --");
    assert_eq!(shown(found), ["Different Key \"1=_\\'5, ключ=Z5 v", "Missing Key \"1=Á7, ключ=Z7"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_column_lists_and_row_filters_are_what_the_publication_says() {
    let pair = Pair::fresh("verify_published").await;
    pair.at_source(
        "CREATE TABLE parted (id int, day date, v text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
         CREATE TABLE parted_2 (v text, id int NOT NULL, day date NOT NULL);
         ALTER TABLE parted ATTACH PARTITION parted_2 FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
         INSERT INTO parted SELECT n, '2024-06-01'::date + n, 'v' FROM generate_series(1, 400) n;
         CREATE TABLE listed (id int PRIMARY KEY, shown int, secret text, twice int GENERATED ALWAYS AS (id * 2) STORED);
         INSERT INTO listed SELECT n, n, 's' FROM generate_series(1, 100) n",
    )
    .await;
    pair.at_sink(
        "CREATE TABLE parted (id int, day date, v text, PRIMARY KEY (id, day));
         INSERT INTO parted SELECT n, '2024-06-01'::date + n, 'v' FROM generate_series(1, 400) n;
         CREATE TABLE listed (id int PRIMARY KEY, shown int);
         INSERT INTO listed SELECT n, n FROM generate_series(1, 50) n",
    )
    .await;
    pair.publish("parted, listed (id, shown) WHERE (id <= 50)").await;
    let report = pair.verify().await;
    assert_eq!(report.verdict(), Verdict::Equal, "{report:?}");
    let listed = of(&report, "public.listed");
    assert_eq!((listed.rows_source, listed.rows_sink), (50, 50));
    assert_eq!(of(&report, "public.parted").rows_source, 400);
    assert_eq!(report.tables.len(), 2, "partitions are compared through their root");
    pair.at_sink("DELETE FROM parted WHERE id = 399; UPDATE listed SET shown = 0 WHERE id = 50").await;
    let report = pair.verify().await;
    assert_eq!(shown(of(&report, "public.parted")), ["Missing id=399, day=2025-07-05"]);
    assert_eq!(shown(of(&report, "public.listed")), ["Different id=50 shown"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_tables_that_are_named_and_only_those_there_are() {
    let pair = Pair::fresh("verify_named").await;
    pair.at_both("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)").await;
    pair.at_source("INSERT INTO b VALUES (1)").await;
    pair.publish("a, b").await;
    let patience = Duration::from_secs(60);
    let report = pair.verify_with(&["public.a"], 20, patience).await.unwrap();
    assert_eq!((report.tables.len(), report.verdict()), (1, Verdict::Equal));
    let error = pair.verify_with(&["public.c"], 20, patience).await.unwrap_err();
    assert!(matches!(&error, VerifyError::Refused(text) if text.contains("public.c")), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_too_long_to_carry_is_found_again() {
    let pair = Pair::fresh("verify_long_key").await;
    pair.at_both("CREATE TABLE t (k text PRIMARY KEY, v int)").await;
    pair.at_both("INSERT INTO t SELECT repeat('a', 100000) || n, 1 FROM generate_series(1, 3) n").await;
    pair.at_sink("UPDATE t SET v = 2 WHERE right(k, 1) = '2'").await;
    pair.publish("t").await;
    let report = pair.verify().await;
    assert_eq!(shown(of(&report, "public.t")), ["Different k=(too long to show)"]);
}
