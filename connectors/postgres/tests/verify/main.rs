//! `wallaby verify` between two databases: what is the same, what is not, and what was only on its way.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod moving;
mod pair;
mod shapes;

use pair::{Pair, of, shown};
use wallaby_model::verify::Verdict;

const EVERY_TYPE: &str = "\
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE DOMAIN code AS char(4);
    CREATE TABLE t (id bigint PRIMARY KEY, b boolean, i2 smallint, i4 int, r real, d double precision, n numeric, n2 numeric(10,2),
      t text, v varchar(9), c char(6), dom code, by bytea, u uuid, j json, jb jsonb, da date, ti time, tz timetz, ts timestamp,
      tstz timestamptz, iv interval, m mood, ia int[], ta text[][], ra tstzrange, ip inet, mo money, x xml, bits bit varying(9));
    INSERT INTO t VALUES
      (1, true, -1, 2, 3.3, 0.1, 1.00, 1, E'a\"b\\\\c\\n', '', 'ab', 'xy', '\\x00ff', '00000000-0000-0000-0000-000000000001', '{\"a\":  1}',
       '{\"b\":1,\"a\":1.50}', '2024-02-29', '24:00', '12:00+03', '2024-01-01 00:00:00.000001', '2024-01-01 00:00+05', '1 year 2 days 03:04:05.6',
       'ok', '[0:1]={1,NULL}', '{{\"a,b\",\"\"},{NULL,\"NULL\"}}', '[2024-01-01 00:00+02,)', '10.0.0.0/8', 12.34, '<a>1</a>', B'101'),
      (2, false, 0, 0, '-0', '-0', 'NaN', 0.00, '💥 žš', '💥', '', '', '', NULL, 'null', '[]', 'infinity', '00:00', '00:00+00', '-infinity',
       'infinity', '0', 'sad', '{}', '{}', 'empty', '::1', -1, '', B''),
      (3, NULL, NULL, NULL, 'NaN', 'Infinity', -12345678901234567890.123400, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '4714-11-24 BC',
       NULL, NULL, '4713-01-01 BC', NULL, '-1 mons', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_every_type_are_equal_whatever_a_database_prefers() {
    let pair = Pair::fresh("verify_types").await;
    pair.at_both(EVERY_TYPE).await;
    pair.publish("t").await;
    let name = pair.sink.name();
    for setting in [
        "timezone = 'Asia/Tokyo'",
        "datestyle = 'German, DMY'",
        "intervalstyle = 'sql_standard'",
        "extra_float_digits = -5",
        "bytea_output = 'escape'",
        "search_path = 'nowhere'",
    ] {
        pair.at_sink(&format!("ALTER DATABASE {name} SET {setting}")).await;
    }
    let report = pair.verify().await;
    let table = of(&report, "public.t");
    assert_eq!(report.verdict(), Verdict::Equal, "{table:?}");
    assert_eq!((table.rows_source, table.rows_sink, table.rows_read, table.has_key), (3, 3, 0, true));
}

/// Type, the source's value, the sink's value: each is a difference.
const DIFFERENT: &[(&str, &str, &str)] = &[
    ("int", "1", "2"),
    ("text", "NULL", "''"),
    ("text", "''", "'NULL'"),
    ("text", "'a'", "'a '"),
    ("text", "'💥'", "'💦'"),
    ("numeric", "1.0", "1.00"),
    ("float8", "0", "'-0'"),
    ("float8", "0.1", "0.10000000000000002"),
    ("float4", "'NaN'", "'Infinity'"),
    ("timestamptz", "'2024-01-01 00:00+00'", "'2024-01-01 00:00+01'"),
    ("timestamptz", "'infinity'", "'-infinity'"),
    ("timestamp", "'2024-01-01 00:00:00'", "'2024-01-01 00:00:00.000001'"),
    ("date", "'infinity'", "'2024-01-01'"),
    ("interval", "'1 day'", "'24 hours'"),
    ("jsonb", "'{\"a\": 1.0}'", "'{\"a\": 1}'"),
    ("jsonb", "'null'", "NULL"),
    ("json", "'{\"a\":1}'", "'{\"a\": 1}'"),
    ("bytea", "'\\x00'", "'\\x'"),
    ("boolean", "true", "false"),
    ("mood", "'sad'", "'ok'"),
    ("int[]", "'{1,2}'", "'{2,1}'"),
    ("int[]", "'{1}'", "'[0:0]={1}'"),
    ("text[]", "'{NULL}'", "'{\"NULL\"}'"),
    ("varchar(5)", "'ab'", "'ab '"),
    ("uuid", "'00000000-0000-0000-0000-000000000001'", "'00000000-0000-0000-0000-000000000002'"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_cell_of_any_type_is_found_and_its_column_named() {
    let pair = Pair::fresh("verify_cells").await;
    pair.at_both("CREATE TYPE mood AS ENUM ('sad', 'ok')").await;
    let mut names = Vec::new();
    for (number, (sql_type, source, sink)) in DIFFERENT.iter().enumerate() {
        let table = format!("c{number}");
        pair.at_both(&format!("CREATE TABLE {table} (id int PRIMARY KEY, same text, v {sql_type})")).await;
        pair.at_source(&format!("INSERT INTO {table} VALUES (1, 'x', NULL), (7, 'x', {source})")).await;
        pair.at_sink(&format!("INSERT INTO {table} VALUES (1, 'x', NULL), (7, 'x', {sink})")).await;
        names.push(table);
    }
    pair.publish(&names.join(", ")).await;
    let report = pair.verify().await;
    for (number, case) in DIFFERENT.iter().enumerate() {
        let table = of(&report, &format!("public.c{number}"));
        assert_eq!(shown(table), ["Different id=7 v"], "{case:?}");
        assert_eq!(
            (table.verdict, table.different, table.missing, table.extra),
            (Verdict::Different, 1, 0, 0),
            "{case:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_extra_and_doubled_rows_are_told_apart() {
    let pair = Pair::fresh("verify_rows").await;
    pair.at_both("CREATE TABLE keyed (a int, b text, v int, PRIMARY KEY (b, a)); CREATE TABLE equal_bag (v text)")
        .await;
    pair.at_source("CREATE TABLE bag (v text)").await;
    pair.at_sink("CREATE TABLE bag (v text, _wallaby_position text)").await;
    pair.at_both("INSERT INTO keyed SELECT n, 'k' || n, n FROM generate_series(1, 50) n").await;
    pair.at_source("DELETE FROM keyed WHERE a = 3; INSERT INTO keyed VALUES (99, 'k''\\\"', 0)").await;
    pair.at_source("INSERT INTO bag VALUES ('one'), ('two'), ('two'), ('only'), (NULL)").await;
    pair.at_sink("INSERT INTO bag SELECT unnest(ARRAY[NULL, 'two', 'one', 'two', 'two', '']), 'x'").await;
    pair.at_source("INSERT INTO equal_bag VALUES ('a'), ('b'), ('b'), (NULL)").await;
    pair.at_sink("INSERT INTO equal_bag VALUES (NULL), ('b'), ('a'), ('b')").await;
    pair.publish("keyed, bag, equal_bag").await;
    let report = pair.verify().await;

    let keyed = of(&report, "public.keyed");
    assert_eq!(shown(keyed), ["Extra b=k3, a=3", "Missing b=k'\\\", a=99"]);
    assert_eq!((keyed.missing, keyed.extra, keyed.different), (1, 1, 0));

    let bag = of(&report, "public.bag");
    assert_eq!((bag.verdict, bag.has_key), (Verdict::Different, false));
    assert_eq!((bag.missing, bag.extra, bag.different), (1, 2, 0), "{bag:?}");
    assert_eq!(shown(bag), ["Extra ctid (0,2), 3 times and not 2", "Extra ctid (0,6)", "Missing ctid (0,4)"]);
    assert_eq!(of(&report, "public.equal_bag").verdict, Verdict::Equal);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_ranges_that_differ_are_read_row_by_row() {
    let pair = Pair::fresh("verify_ranges").await;
    pair.at_both("CREATE TABLE big (id bigint PRIMARY KEY, v text)").await;
    pair.at_both("INSERT INTO big SELECT n, 'row ' || n FROM generate_series(1, 100000) n").await;
    pair.at_both("ANALYZE big").await;
    pair.at_sink("UPDATE big SET v = 'other' WHERE id = 77; DELETE FROM big WHERE id = 50000; INSERT INTO big VALUES (100001, '')")
        .await;
    pair.publish("big").await;
    let report = pair.verify().await;
    let big = of(&report, "public.big");
    assert_eq!(shown(big), ["Different id=77 v", "Extra id=100001", "Missing id=50000"]);
    assert_eq!((big.rows_source, big.rows_sink), (100_000, 100_000));
    assert!(big.ranges >= 128, "{big:?}");
    assert!((1..=3).contains(&big.ranges_differing), "{big:?}");
    assert!(big.rows_read < 10_000, "{big:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_shown_is_bounded_and_what_is_counted_is_not() {
    let pair = Pair::fresh("verify_many").await;
    pair.at_both("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    pair.at_source("INSERT INTO t SELECT n, 'x' FROM generate_series(1, 30000) n").await;
    pair.publish("t").await;
    let report = pair.verify_with(&["public.t"], 5, std::time::Duration::from_secs(120)).await.unwrap();
    let table = of(&report, "public.t");
    assert_eq!((table.verdict, table.missing, table.differences.len()), (Verdict::Different, 30_000, 5));
    assert_eq!(table.seen_once, 10_000, "the rest was looked at again");
}
