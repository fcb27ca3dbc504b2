//! Values, shapes and selections: what the snapshot says is what the stream says.

use std::sync::Arc;

use wallaby_connector_api::verify::{VerifyError, VerifySession};
use wallaby_connector_api::{SinkError, SourceLookup};
use wallaby_postgres_source::{Lookup, SourceVerify};
use wallaby_testkit::Database;

use crate::kit::{Flow, as_user, rows_of};
use crate::{export, read};

/// Types, each with values.
const VALUES: &[(&str, &[&str])] = &[
    ("bool", &["t", "f"]),
    ("int2", &["-32768", "32767"]),
    ("int4", &["-2147483648", "2147483647"]),
    ("int8", &["-9223372036854775808", "9223372036854775807"]),
    ("oid", &["0", "4000000000"]),
    ("float4", &["3.3", "NaN", "-Infinity", "-0", "1e-45"]),
    ("float8", &["4.44", "NaN", "Infinity", "-0", "5e-324", "1.7976931348623157e308"]),
    (
        "numeric",
        &[
            "NaN",
            "Infinity",
            "-Infinity",
            "10.1111",
            "3.30",
            "-0.00",
            "0",
            "1e100",
            "1e-100",
            "12345678.000000000001",
            "-9999.99990",
        ],
    ),
    ("numeric(12,2)", &["0", "10000000.10", "-0.01"]),
    ("text", &["", "žš𝄞", "back\\slash"]),
    ("varchar(10)", &["x ", ""]),
    ("char(5)", &["ab", ""]),
    ("\"char\"", &["a", "", "\\377"]),
    ("name", &["n"]),
    ("bytea", &["\\x", "\\x00ff5c"]),
    ("uuid", &["ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("json", &["{\"a\":  1, \"a\": 2}"]),
    ("jsonb", &["{\"b\":  1, \"a\": [1.00]}", "null"]),
    ("xml", &["<a>1</a>"]),
    ("date", &["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31"]),
    ("time", &["00:00:00", "24:00:00", "23:59:59.999999"]),
    ("timetz", &["23:59:59.999999+00", "12:00:00+05:30"]),
    ("timestamp", &["infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"]),
    ("timestamptz", &["infinity", "-infinity", "2026-03-29 02:30:00+02"]),
    ("interval", &["0", "178000000 years", "1 year -1 month 1 day -00:00:00.000001"]),
    ("money", &["-1234.11", "0"]),
    ("bit(3)", &["101"]),
    ("varbit", &["", "1011"]),
    ("inet", &["192.168.2.0/12", "10.0.0.1", "::1"]),
    ("cidr", &["10.0.0.0/8", "10.0.0.1/32"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("int4range", &["[1,5)", "empty", "(,)"]),
    ("tstzrange", &["[2026-01-01 00:00+00,infinity)"]),
    ("int4multirange", &["{[1,2),[5,6)}"]),
    ("point", &["(1.5,-0)"]),
    ("polygon", &["((0,0),(1,1),(1,0))"]),
    ("tsvector", &["a:1 b:2"]),
    ("tsquery", &["a & b"]),
    ("regclass", &["pg_class", "marked"]),
    ("int4[]", &["{}", "{1,NULL,3}", "[2:3]={1,2}"]),
    ("text[]", &["{\"a,b\",NULL,\"\"}"]),
    ("inet[]", &["{10.0.0.1,10.0.0.0/8}"]),
    ("float8[]", &["{0.1,NaN}"]),
    ("bytea[]", &["{\"\\\\x00ff\"}"]),
    ("timestamptz[]", &["{\"2026-03-29 02:30:00+02\"}"]),
    ("mood", &["sad", "it's"]),
    ("mood[]", &["{sad,it's}"]),
    ("pair", &["(1,\"a b\")"]),
    ("small", &["7"]),
    ("smalls", &["{7,8}"]),
    ("small[]", &["{7,8}"]),
    ("price", &["1.50"]),
];

#[tokio::test]
async fn b01_to_b34_values_of_the_snapshot_are_those_of_the_stream() {
    let db = Database::create("same").await;
    db.batch_execute(
        "CREATE TYPE mood AS ENUM ('sad', 'it''s'); CREATE TYPE pair AS (a int, b text);
         CREATE DOMAIN small AS int CHECK (VALUE < 10); CREATE DOMAIN smalls AS int[]; CREATE DOMAIN price AS numeric(9,2);
         CREATE TABLE marked (id int PRIMARY KEY)",
    )
    .await
    .unwrap();
    let columns: Vec<String> =
        VALUES.iter().enumerate().map(|(index, (kind, _))| format!("\"c {index}\" {kind}")).collect();
    db.batch_execute(&format!("CREATE TABLE v (id int PRIMARY KEY, {})", columns.join(", "))).await.unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    let rows = VALUES.iter().map(|(_, values)| values.len()).max().unwrap() + 1;
    let tuples = (0..rows).map(|row| {
        let values = VALUES.iter().map(|(_, values)| match values.get(row) {
            Some(value) => format!("'{}'", value.replace('\'', "''")),
            None => "NULL".into(),
        });
        format!("({row}, {})", values.collect::<Vec<_>>().join(", "))
    });
    let tuples: Vec<String> = tuples.collect();
    db.batch_execute(&format!("INSERT INTO v VALUES {}", tuples.join(", "))).await.unwrap();
    let segment = run.segment().await;
    let streamed = &segment.body.tables[0];

    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan(&flow.name, &["public.v".into()], &[], u64::MAX).await.unwrap();
    let kept = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    let read = &kept.0[0].tables[0];
    assert_eq!(read.schema, streamed.schema);
    assert_eq!(read.rows.num_rows(), rows);
    for (index, (kind, _)) in VALUES.iter().enumerate() {
        let column = wallaby_model::change::FIRST_COLUMN + 1 + index;
        let (ours, theirs) = (read.rows.column(column).to_data(), streamed.rows.column(column).to_data());
        for row in 0..rows {
            let ours = crate::kit::show(read.rows.column(column).as_ref(), row);
            let theirs = crate::kit::show(streamed.rows.column(column).as_ref(), row);
            assert_eq!(ours, theirs, "{kind}, row {row}");
        }
        // NaN is not equal to itself.
        assert!(ours == theirs || kind.starts_with("float"), "{kind}");
    }
}

/// Within a transaction two rows may have it.
#[tokio::test]
async fn a_primary_key_that_is_deferrable_is_no_key() {
    let db = Database::create("deferrable").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v text); ALTER TABLE t REPLICA IDENTITY FULL")
        .await
        .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t VALUES (1, 'a'), (2, 'b')").await.unwrap();
    let segment = run.segment().await;
    let streamed = &segment.body.tables[0].schema;
    db.batch_execute("UPDATE t SET id = id + 1").await.unwrap();
    let ids: Vec<String> = run.rows(4).await.into_iter().map(|row| row.values[0].clone()).collect();
    assert_eq!(ids, ["1", "2", "2", "3"]);
    assert!(streamed.key().is_empty(), "{streamed:?}");
    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    assert!(!plan[0].has_key);
    let kept = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    assert_eq!(kept.0[0].tables[0].schema, *streamed);
}

#[tokio::test]
async fn b50_b109_partitions_filters_and_column_lists_are_honoured() {
    let db = Database::create("select").await;
    db.batch_execute(
        "CREATE TABLE p (id int, k text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
         CREATE TABLE p2 (k text, gone int, id int NOT NULL); ALTER TABLE p2 DROP COLUMN gone;
         ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20);
         INSERT INTO p SELECT n, 'k' || n FROM generate_series(1, 19) n;
         CREATE TABLE \"Odd \"\"one\" (id int PRIMARY KEY, \"a.B\" text, secret text, g int GENERATED ALWAYS AS (id * 2) STORED);
         INSERT INTO \"Odd \"\"one\" SELECT n, 'v' || n, 's' FROM generate_series(1, 10) n;
         CREATE TABLE empty (id int PRIMARY KEY); CREATE TABLE keyless (v int); INSERT INTO keyless VALUES (1), (1);
         CREATE TABLE bare (); INSERT INTO bare DEFAULT VALUES;
         ALTER TABLE keyless REPLICA IDENTITY FULL; ALTER TABLE bare REPLICA IDENTITY FULL;
         CREATE PUBLICATION rooted FOR TABLE p WHERE (id > 3), \"Odd \"\"one\" (id, \"a.B\") WHERE (id < 6 AND \"a.B\" <> 'v1'), empty, keyless, bare WITH (publish_via_partition_root = true);
         CREATE PUBLICATION leaves FOR TABLE p",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan("rooted", &[], &[], u64::MAX).await.unwrap();
    let found: Vec<String> =
        plan.iter().map(|one| format!("{}<{} {}", one.table.name, one.relation.name, one.has_key)).collect();
    assert_eq!(
        found,
        [
            "Odd \"one<Odd \"one true",
            "bare<bare false",
            "empty<empty true",
            "keyless<keyless false",
            "p<p1 true",
            "p<p2 true"
        ]
    );
    let mut rows = Vec::new();
    for relation in &plan {
        let kept = read(&flow.config, &export, "rooted", relation).await.unwrap();
        assert_eq!(kept.0[0].tables[0].schema.table, relation.table);
        rows.push(kept.rows());
    }
    let counts: Vec<usize> = rows.iter().map(Vec::len).collect();
    assert_eq!(counts, [4, 1, 0, 2, 6, 10]);
    assert_eq!(rows[0][0], ["2", "v2"]);
    assert_eq!(rows[5][0], ["10", "k10"]);
    let plan = export.plan("leaves", &["public.*".into()], &["public.p1".into()], u64::MAX).await.unwrap();
    assert_eq!(plan.iter().map(|one| one.table.name.as_str()).collect::<Vec<_>>(), ["p2"]);
    let kept = read(&flow.config, &export, "leaves", &plan[0]).await.unwrap();
    assert_eq!(kept.rows()[0], ["k10", "10"]);
    let said = export.plan("rooted", &["public.p1".into()], &[], u64::MAX).await.unwrap_err().to_string();
    assert!(said.contains("public.p1") && said.contains("partition of public.p"), "{said}");
    assert!(
        export
            .plan("rooted", &["public.none".into()], &[], u64::MAX)
            .await
            .unwrap_err()
            .to_string()
            .contains("public.none")
    );
    assert_eq!(export.plan("missing", &[], &[], u64::MAX).await.unwrap_err().reason(), "PublicationMissing");
}

#[tokio::test]
async fn chunks_cover_every_row_once_and_parts_are_cut() {
    let db = Database::create("chunks").await;
    db.batch_execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n;
         CREATE TABLE big (id int PRIMARY KEY, v text); INSERT INTO big SELECT n, repeat(md5(n::text), 1000000) FROM generate_series(1, 2) n",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let mut plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    // Rows that come later, on new pages, are not in the snapshot.
    db.batch_execute("INSERT INTO t SELECT n, 'late' FROM generate_series(20001, 40000) n").await.unwrap();
    plan[1].chunk_pages = 17;
    assert!(plan[1].chunks() > 10);
    let kept = read(&flow.config, &export, &flow.name, &plan[1]).await.unwrap();
    let mut ids: Vec<u32> = kept.rows().iter().map(|row| row[0].parse().unwrap()).collect();
    ids.sort_unstable();
    assert!(ids.iter().copied().eq(1..=20000), "{} rows", ids.len());
    assert!(kept.0.len() > 20);
    let kept = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    assert_eq!(kept.0.len(), 2, "a row that is larger than a part is a part");
    assert!(rows_of(&kept.0[1])[0].values[1].len() == 32_000_000);
}

/// It would be lost without a word: not loaded, taken for deleted where a change has to be completed, and not compared.
#[tokio::test]
async fn a_row_that_a_policy_hides_is_refused_and_not_missing() {
    let db = Database::create("policy").await;
    let user = format!("u_{}", db.name());
    db.batch_execute(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'seen'), (2, 'hidden');
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY seen ON t USING (v = 'seen');
         CREATE ROLE {user} LOGIN PASSWORD 'pw'; GRANT SELECT ON t TO {user}"
    ))
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut export = export(&flow.config, &flow.name, 1).await;
    let plan = export.plan(&flow.name, &[], &[], u64::MAX).await.unwrap();
    let all = read(&flow.config, &export, &flow.name, &plan[0]).await.unwrap();
    assert_eq!(all.rows(), [["1", "seen"], ["2", "hidden"]]);
    let schema = Arc::clone(&all.0[0].tables[0].schema);

    let clerk = as_user(&db, &user);
    let refused = read(&clerk, &export, &flow.name, &plan[0]).await;
    let refused = refused.map(|kept| kept.rows()).expect_err("rows that the role sees were taken for all");
    assert_eq!(
        (refused.reason(), refused.sqlstate(), refused.is_transient()),
        ("PrivilegeMissing", Some("42501"), false)
    );
    assert!(refused.remedy().unwrap().contains("ALTER ROLE ... BYPASSRLS"), "{:?}", refused.remedy());
    for id in ["2", "1"] {
        let lookup = Lookup::new(clerk.clone(), &flow.name);
        let found = lookup.row_by_key(&schema, &vec![Some(id.to_owned())]).await;
        let found = found.map(|row| row.map(|body| rows_of(&body)));
        let Err(SinkError::Configuration { reason, remedy }) = found else { panic!("row {id}: {found:?}") };
        assert!(reason.contains("row-level security") && remedy.contains("BYPASSRLS"), "{reason}; {remedy}");
    }
    let mut verify = SourceVerify::connect(&clerk, &flow.name).await.unwrap();
    let compared = verify.rows("SELECT count(*)::text FROM public.t").await;
    assert!(matches!(&compared, Err(VerifyError::Refused(why)) if why.contains("BYPASSRLS")), "{compared:?}");

    db.batch_execute(&format!("ALTER ROLE {user} BYPASSRLS")).await.unwrap();
    assert_eq!(read(&clerk, &export, &flow.name, &plan[0]).await.unwrap().rows(), all.rows());
    let found = Lookup::new(clerk, &flow.name).row_by_key(&schema, &vec![Some("2".to_owned())]).await.unwrap();
    assert_eq!(rows_of(&found.unwrap())[0].values, ["2", "hidden"]);
    assert_eq!(verify.rows("SELECT count(*)::text FROM public.t").await.unwrap(), [[Some("2".to_owned())]]);
    db.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}")).await.unwrap();
}
