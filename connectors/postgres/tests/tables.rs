//! Tables, types and rows: what is made, what stops the sink, how values arrive.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use target::{Target, apply, query, rows, try_apply};
use wallaby_connector_api::conformance::{Change, Log, PortionFeed, Shape, SinkUnderTest, Value, chunk_part};
use wallaby_connector_api::{
    DatabaseIdentity, Faults, KeyValues, SinkError, SourceColumn, SourceColumns, SourceLookup, SourceRow,
};
use wallaby_connector_api::{SinkFactory, SinkTask};
use wallaby_model::{ColumnType, Epoch, Lsn, SegmentBody, TableName, TableSchema};
use wallaby_postgres::PostgresSinkFactory;

fn misfit<T: std::fmt::Debug>(outcome: Result<T, SinkError>) -> (String, String) {
    match outcome {
        Err(SinkError::Configuration { reason, remedy }) => (reason, remedy),
        other => panic!("not a configuration error: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_every_type_arrive_as_the_source_prints_them() {
    use ColumnType as T;
    let target = Target::fresh("types").await;
    target.sql("CREATE TYPE mood AS ENUM ('sad', 'ok')").await;
    let text = |s: &str| Value::Text(s.to_owned());
    // Kind, SQL type, oid, value, what SELECT shows.
    let cases: Vec<(T, &str, u32, Value, &str)> = vec![
        (T::Bool, "boolean", 16, Value::Bool(true), "t"),
        (T::Int2, "smallint", 21, Value::Int(-32768), "-32768"),
        (T::Int8, "bigint", 20, Value::Int(i64::MIN), "-9223372036854775808"),
        (T::Oid, "oid", 26, Value::Int(4_000_000_000), "4000000000"),
        (T::Float4, "real", 700, Value::Float(3.3), "3.3"),
        (T::Float8, "double precision", 701, Value::Float(f64::NAN), "NaN"),
        (T::Float8, "double precision", 701, Value::Float(f64::NEG_INFINITY), "-Infinity"),
        (T::Numeric, "numeric", 1700, text("-12345678901234567890.123400"), "-12345678901234567890.123400"),
        (T::Numeric, "numeric", 1700, text("0.00000000100"), "0.00000000100"),
        (T::Numeric, "numeric(10,2)", 1700, text("10000.00"), "10000.00"),
        (T::Numeric, "numeric", 1700, text("Infinity"), "Infinity"),
        (T::Numeric, "numeric", 1700, text("NaN"), "NaN"),
        (T::Text, "text", 25, text("žš \" ' \\ \n"), "žš \" ' \\ \n"),
        (T::Text, "character varying(5)", 1043, text("abcde"), "abcde"),
        (T::Text, "character(4)", 1042, text("a   "), "a   "),
        (T::Bytea, "bytea", 17, Value::Bytes(vec![0, 255, 92]), "\\x00ff5c"),
        (T::Uuid, "uuid", 2950, Value::Bytes(vec![0xAB; 16]), "abababab-abab-abab-abab-abababababab"),
        (T::Json, "json", 114, text("{\"b\": 1,  \"a\":2}"), "{\"b\": 1,  \"a\":2}"),
        (T::Jsonb, "jsonb", 3802, text("{\"a\": 1.50}"), "{\"a\": 1.50}"),
        (T::Date, "date", 1082, Value::Int(-2_440_588), "4714-11-24 BC"),
        (T::Date, "date", 1082, Value::Int(i64::from(i32::MAX)), "infinity"),
        (T::Time, "time without time zone", 1083, Value::Int(86_400_000_000), "24:00:00"),
        (T::Timestamp, "timestamp without time zone", 1114, Value::Int(0), "2000-01-01 00:00:00"),
        (T::Timestamptz, "timestamp with time zone", 1184, Value::Int(i64::MIN), "-infinity"),
        (T::Interval, "interval", 1186, Value::Interval(14, -3, 4_000_001), "1 year 2 mons -3 days +00:00:04.000001"),
        (T::Interval, "interval", 1186, Value::Interval(i32::MAX, i32::MAX, i64::MAX), "infinity"),
        (T::Enum, "mood", 99_999, text("sad"), "sad"),
        (T::Enum, "shop.colour", 99_998, text("red"), "red"),
        (T::Array, "integer[]", 1007, text("[0:1]={1,NULL}"), "[0:1]={1,NULL}"),
        (T::Array, "text[]", 1009, text("{{a,\"b,c\"},{NULL,\"\"}}"), "{{a,\"b,c\"},{NULL,\"\"}}"),
        (T::Other, "inet", 869, text("192.168.2.0/12"), "192.168.2.0/12"),
        (T::Other, "int4range", 3904, text("[1,5)"), "[1,5)"),
        (T::Other, "shop.point3", 99_997, text("(1,2,3)"), "(1,2,3)"),
        (T::Text, "text", 25, Value::Null, "~"),
    ];
    let mut shape = Shape::new("types").key("id", T::Int4);
    for (index, (kind, sql_type, oid, ..)) in cases.iter().enumerate() {
        shape = shape.typed(&format!("c{index}"), *kind, sql_type, *oid);
    }
    let types = shape.build();
    let row =
        |id: i64| -> Vec<Value> { [id.into()].into_iter().chain(cases.iter().map(|case| case.3.clone())).collect() };
    let mut log = Log::new();
    let mut sink = target.opened(&log).await;
    // Insert as a new row, and as an update that meets it.
    log.transaction([Change::insert(&types, row(1)), Change::insert(&types, row(2))]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::update(&types, row(2))]);
    apply(&mut sink, &log.batch()).await;
    let found = target.rows(&types.table).await;
    assert_eq!(found.len(), 2);
    for found in found {
        for (index, (.., sql_type, _, _, expected)) in cases.iter().map(|c| ((), c.1, (), (), c.4)).enumerate() {
            let expected = (expected != "~").then(|| expected.to_owned());
            assert_eq!(found[index + 1], expected, "{sql_type}");
        }
    }
    let moods =
        query(&target.database, "SELECT pg_typeof(c26), pg_typeof(c27), pg_typeof(c30) FROM types LIMIT 1").await;
    assert_eq!(moods, rows(&[&["mood", "text", "inet"]]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_column_stops_the_sink_until_the_statement_was_run() {
    let target = Target::fresh("shape").await;
    let mut log = Log::new();
    let shape = || Shape::new("t").key("id", ColumnType::Int4).column("a", ColumnType::Int4);
    let before = shape().column("b", ColumnType::Text).build();
    let after = shape().build();
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&before, [1.into(), 1.into(), "x".into()])]);
    apply(&mut sink, &log.batch()).await;
    // b is dropped at the source in mid-batch. What came before is applied, in the old shape, before the sink stops.
    log.transaction([Change::update(&before, [1.into(), 2.into(), "y".into()])]);
    log.transaction([Change::insert(&after, [2.into(), 2.into()])]);
    let batch = log.batch();
    let (reason, remedy) = misfit(try_apply(&mut sink, &batch).await);
    assert!(reason.contains("public.t") && reason.contains("\"b\""), "{reason}");
    let statement = "ALTER TABLE \"public\".\"t\" DROP COLUMN \"b\"";
    assert!(remedy.contains(statement) && remedy.contains("wallaby resume"), "{remedy}");
    assert_eq!(target.rows(&before.table).await, rows(&[&["1", "2", "y"]]));
    // It stays stopped, and says the same.
    let position = sink.open(Epoch(1)).await.unwrap().position.unwrap();
    assert!(position > batch.from && position < batch.to && position.is_between_transactions());
    let parts = batch.parts.iter().cloned().map(|part| wallaby_connector_api::BatchPart { after: position, ..part });
    let rest = wallaby_connector_api::Batch { from: position, parts: parts.collect(), ..batch };
    assert!(misfit(try_apply(&mut sink, &rest).await).1.contains(statement));
    target.sql(statement).await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &rest).await;
    assert_eq!(target.rows(&before.table).await, rows(&[&["1", "2"], &["2", "2"]]));
}

/// The source's columns, with what older rows have in them.
struct Columns(Vec<(&'static str, Option<&'static str>)>);

#[async_trait]
impl SourceLookup for Columns {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn columns(&self, _: &TableName) -> Result<SourceColumns, SinkError> {
        let column = |&(name, filled): &(&str, Option<&str>)| SourceColumn {
            name: name.to_owned(),
            filled: filled.map(str::to_owned),
        };
        Ok(SourceColumns { at: Lsn(u64::MAX), columns: self.0.iter().map(column).collect() })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_older_than_a_column_have_in_it_what_they_have_at_the_source() {
    let target = Target::fresh("filled").await;
    let mut log = Log::new();
    let before = Shape::new("t").key("id", ColumnType::Int4).build();
    let shape = Shape::new("t").key("id", ColumnType::Int4).column("note", ColumnType::Text);
    let after = shape.column("n", ColumnType::Int4).column("bare", ColumnType::Int4).build();
    let columns = Columns(vec![("id", None), ("note", Some("it's")), ("n", Some("7")), ("bare", None)]);
    let mut sink = target.opened_with(&log, Arc::new(columns)).await;
    log.transaction([Change::insert(&before, [1.into()])]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::insert(&before, [2.into()])]);
    log.transaction([
        Change::insert(&after, [3.into(), Value::Null, 8.into(), 8.into()]),
        Change::update(&after, [1.into(), "new".into(), 9.into(), Value::Null]),
    ]);
    apply(&mut sink, &log.batch()).await;
    let expected = rows(&[&["1", "new", "9", "~"], &["2", "it's", "7", "~"], &["3", "~", "8", "8"]]);
    assert_eq!(target.rows(&after.table).await, expected);
    // It has a default now, and is the source's all the same: what the source renames or drops is not passed over.
    let shape = Shape::new("t").key("id", ColumnType::Int4).column("remark", ColumnType::Text);
    let renamed = shape.column("n", ColumnType::Int4).column("bare", ColumnType::Int4).build();
    log.transaction([Change::insert(&renamed, [4.into(), Value::Null, 8.into(), 8.into()])]);
    let (_, remedy) = misfit(try_apply(&mut sink, &log.batch()).await);
    assert!(remedy.contains("RENAME COLUMN \"note\" TO \"remark\""), "{remedy}");
}

/// The source cannot be asked.
struct Away;

#[async_trait]
impl SourceLookup for Away {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn columns(&self, _: &TableName) -> Result<SourceColumns, SinkError> {
        Err(SinkError::Transient("nobody answers".to_owned()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_column_waits_for_the_source_or_for_a_person() {
    let target = Target::fresh("away").await;
    let mut log = Log::new();
    let before = Shape::new("t").key("id", ColumnType::Int4).build();
    let after = Shape::new("t").key("id", ColumnType::Int4).column("n", ColumnType::Int4).build();
    let mut sink = target.opened_with(&log, Arc::new(Away)).await;
    log.transaction([Change::insert(&before, [1.into()])]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::insert(&after, [2.into(), 8.into()])]);
    let batch = log.batch();
    let Err(SinkError::Transient(said)) = try_apply(&mut sink, &batch).await else { panic!("it did not wait") };
    let statement = r#"ALTER TABLE "public"."t" ADD COLUMN IF NOT EXISTS "n" integer"#;
    assert!(said.contains("nobody answers") && said.ends_with(statement), "{said}");
    target.sql(&format!("{statement} DEFAULT 7")).await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &batch).await;
    assert_eq!(target.rows(&after.table).await, rows(&[&["1", "7"], &["2", "8"]]));
}

/// Both shapes in one transaction: there is no place to stop in between, and the old rows must not bring the column back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_superseded_shape_do_not_bring_a_dropped_column_back() {
    let target = Target::fresh("superseded").await;
    let mut log = Log::new();
    let shape = || Shape::new("t").key("id", ColumnType::Int4).column("a", ColumnType::Int4);
    let before = shape().column("b", ColumnType::Text).build();
    let after = shape().build();
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&before, [1.into(), 1.into(), "x".into()])]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([
        Change::insert(&before, [2.into(), 2.into(), "y".into()]),
        Change::insert(&after, [3.into(), 3.into()]),
    ]);
    let batch = log.batch();
    misfit(try_apply(&mut sink, &batch).await);
    target.sql("ALTER TABLE t DROP COLUMN b").await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &batch).await;
    assert_eq!(target.rows(&before.table).await, rows(&[&["1", "1"], &["2", "2"], &["3", "3"]]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_a_key_is_a_bag_of_rows() {
    let target = Target::fresh("bag").await;
    let mut log = Log::new();
    let bag = Shape::new("bag").column("n", ColumnType::Int4).column("j", ColumnType::Json).full().build();
    let row = |n: i64, j: &str| vec![Value::from(n), Value::from(j)];
    let null = || vec![Value::Null, Value::Null];
    let mut sink = target.opened(&log).await;
    log.transaction([
        Change::insert(&bag, row(1, "{}")),
        Change::insert(&bag, row(1, "{}")),
        Change::insert(&bag, row(2, "[]")),
        Change::insert(&bag, null()),
    ]);
    apply(&mut sink, &log.batch()).await;
    // One of two equal rows goes; a row is changed, with its unchanged TOAST taken from the old row; one comes and goes.
    log.transaction([
        Change::delete_full(&bag, row(1, "{}")),
        Change::update_full(&bag, row(2, "[]"), vec![3.into(), Value::Unchanged]),
        Change::insert(&bag, row(9, "9")),
        Change::delete_full(&bag, row(9, "9")),
        Change::delete_full(&bag, null()),
    ]);
    apply(&mut sink, &log.batch()).await;
    assert_eq!(target.rows(&bag.table).await, rows(&[&["1", "{}"], &["3", "[]"]]));
    let positions = query(&target.database, "SELECT _wallaby_position FROM bag").await;
    assert!(positions.iter().all(|row| row[0].as_ref().unwrap().parse::<wallaby_model::Position>().is_ok()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncate_empties_what_came_before_it_only() {
    let target = Target::fresh("truncate").await;
    let mut log = Log::new();
    let t = Shape::new("t").key("id", ColumnType::Int4).column("a", ColumnType::Text).build();
    let row = |id: i64, a: &str| vec![Value::from(id), Value::from(a)];
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&t, row(1, "a")), Change::insert(&t, row(2, "b"))]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::update(&t, row(1, "x")), Change::truncate(&t), Change::insert(&t, row(3, "c"))]);
    log.transaction([Change::truncate(&t), Change::insert(&t, row(2, "d"))]);
    apply(&mut sink, &log.batch_in_segments(2)).await;
    assert_eq!(target.rows(&t.table).await, rows(&[&["2", "d"]]));
    log.transaction([Change::truncate(&t)]);
    apply(&mut sink, &log.batch()).await;
    assert!(target.rows(&t.table).await.is_empty());
}

/// A source with one table: knows rows by the text of their key.
struct OneTable {
    rows: Vec<(String, SegmentBody)>,
}

#[async_trait]
impl SourceLookup for OneTable {
    async fn row_by_key(&self, _: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError> {
        let key = key[0].clone().unwrap();
        Ok(self.rows.iter().find(|(known, _)| *known == key).map(|(_, body)| body.clone()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partial_change_that_meets_no_row_is_read_again() {
    let target = Target::fresh("again").await;
    let mut log = Log::new();
    let shape = || Shape::new("t").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    let t = shape().column("big", ColumnType::Text).build();
    // The source is ahead by a column already.
    let ahead = shape().column("big", ColumnType::Text).column("new", ColumnType::Int4).build();
    let found = |id: i64, big: &str| {
        let mut log = Log::new();
        log.transaction([Change::insert(&ahead, [id.into(), 7.into(), big.into(), 1.into()])]);
        (id.to_string(), (*log.batch().parts[0].body).clone())
    };
    let lookup = Arc::new(OneTable { rows: vec![found(1, "one"), found(30, "thirty")] });
    let mut sink = target.opened_with(&log, lookup).await;
    log.transaction([Change::insert(&t, [9.into(), 9.into(), "nine".into()])]);
    apply(&mut sink, &log.batch()).await;
    let partial = |id: i64| vec![Value::from(id), 5.into(), Value::Unchanged];
    log.transaction([
        Change::update(&t, partial(1)),
        // Gone at the source: a later change in the log deletes it.
        Change::update(&t, partial(2)),
        Change::update_key(&t, [3.into(), Value::Null, Value::Null], partial(30)),
        Change::update(&t, partial(9)),
    ]);
    apply(&mut sink, &log.batch()).await;
    let expected = rows(&[&["1", "7", "one"], &["30", "7", "thirty"], &["9", "5", "nine"]]);
    assert_eq!(target.rows(&t.table).await, expected);
}

/// A source that looks at what the sink's session did last, whenever it is asked for a row.
struct Watching {
    client: tokio_postgres::Client,
    shape: Arc<TableSchema>,
    /// The value of each row's last column.
    big: String,
    /// The session has to say that it lives before the first row comes.
    is_slow: bool,
    /// What the session did last when each row was asked for.
    seen: Mutex<Vec<String>>,
}

impl Watching {
    async fn last(&self) -> String {
        let sql = "SELECT query FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%' AND datname = current_database()";
        query(&self.client, sql).await[0][0].clone().unwrap()
    }
}

#[async_trait]
impl SourceLookup for Watching {
    async fn row_by_key(&self, _: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError> {
        if self.is_slow && self.seen.lock().unwrap().is_empty() {
            let deadline = Instant::now() + Duration::from_secs(40);
            while !self.last().await.is_empty() {
                assert!(Instant::now() < deadline, "the session does not say that it lives");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        let last = self.last().await;
        self.seen.lock().unwrap().push(last);
        let id: i64 = key[0].as_ref().unwrap().parse().unwrap();
        let row = vec![id.into(), 7.into(), self.big.as_str().into()];
        Ok(Some(SegmentBody::clone(&chunk_part(&self.shape, Log::new().start().commit, [row]))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_read_again_are_written_in_groups_while_the_session_lives() {
    for (rows, bytes, is_slow) in [(600, 1, true), (200, 64 << 10, false)] {
        let target = Target::fresh("again_many").await;
        let mut log = Log::new();
        let shape = Shape::new("t").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
        let t = shape.column("big", ColumnType::Text).build();
        let source = Arc::new(Watching {
            client: target.database.connect().await,
            shape: Arc::clone(&t),
            big: "x".repeat(bytes),
            is_slow,
            seen: Mutex::default(),
        });
        let mut sink = target.opened_with(&log, Arc::clone(&source) as Arc<dyn SourceLookup>).await;
        log.transaction([Change::insert(&t, [0.into(), 0.into(), "zero".into()])]);
        apply(&mut sink, &log.batch()).await;
        log.transaction((1..=rows).map(|id| Change::update(&t, [id.into(), 5.into(), Value::Unchanged])));
        apply(&mut sink, &log.batch()).await;
        let found = query(&target.database, "SELECT count(*), min(length(big)) FROM t WHERE n = 7").await;
        assert_eq!(found, [[Some(rows.to_string()), Some(bytes.to_string())]]);
        let seen = source.seen.lock().unwrap();
        assert_eq!(seen.len() as i64, rows);
        assert!(
            seen.last().unwrap().starts_with("INSERT INTO \"public\".\"t\""),
            "nothing was written before: {seen:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_were_there_before_are_taken_over() {
    let target = Target::fresh("before").await;
    let mut log = Log::new();
    let t = Shape::new("t").key("id", ColumnType::Int4).column("a", ColumnType::Int4).build();
    // Wider types, a column of one's own with a default, another order.
    target.sql("CREATE TABLE t (loaded timestamptz DEFAULT now(), a bigint, id bigint UNIQUE NOT NULL)").await;
    target.sql("INSERT INTO t (id, a) VALUES (1, 0)").await;
    let mut sink = target.opened(&log).await;
    log.transaction((0..5).map(|id| Change::insert(&t, [id.into(), 10.into()])));
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::insert(&t, [7.into(), 7.into()]), Change::delete(&t, [0.into(), Value::Null])]);
    apply(&mut sink, &log.batch()).await;
    let found = query(&target.database, "SELECT id, a FROM t ORDER BY id").await;
    assert_eq!(found, rows(&[&["1", "10"], &["2", "10"], &["3", "10"], &["4", "10"], &["7", "7"]]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_and_a_key_of_many_types_work() {
    let target = Target::fresh("odd").await;
    let mut log = Log::new();
    let odd = Shape::new("O\"dd. t\\able é")
        .key("Id", ColumnType::Text)
        .key("id", ColumnType::Numeric)
        .key("w\"hen", ColumnType::Timestamptz)
        .column("'quoted'", ColumnType::Array)
        .build();
    let row =
        |key: &str, value: &str| -> Vec<Value> { vec![key.into(), "1.50".into(), 86_400_000_000.into(), value.into()] };
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&odd, row("a", "{1}")), Change::insert(&odd, row("b", "{2}"))]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([Change::update(&odd, row("a", "{3}")), Change::delete(&odd, row("b", "{}"))]);
    apply(&mut sink, &log.batch()).await;
    assert_eq!(target.rows(&odd.table).await, rows(&[&["a", "1.50", "2000-01-02 00:00:00+00", "{3}"]]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_and_a_missing_right_say_what_to_do() {
    use wallaby_connector_api::{SinkFactory, SinkTask, conformance::EmptySource};
    use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
    let target = Target::fresh("rights").await;
    let role = wallaby_testkit::unique("sink_role");
    target.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'right'")).await;
    let (port, name) = (target.database.postgres().port(), target.database.name());
    let open = async |password: &str| {
        let dsn = format!("postgres://{role}:{password}@127.0.0.1:{port}/{name}");
        let spec =
            PostgresSinkSpec { dsn: SecretRef::Value(String::new()), schema: "s".into(), mode: SinkMode::Upsert };
        let factory =
            wallaby_postgres::PostgresSinkFactory::new(wallaby_postgres::PostgresSinkConfig::new(&dsn, &spec).unwrap());
        let mut sink =
            factory.make(SinkTask { task: target.task.clone(), since: Epoch(0), lookup: Arc::new(EmptySource) });
        sink.open(Epoch(1)).await
    };
    let (reason, remedy) = misfit(open("wrong").await);
    assert!(reason.contains("28P01") && remedy.contains("password") && !reason.contains("wrong"), "{reason} {remedy}");
    let (reason, remedy) = misfit(open("right").await);
    assert!(reason.contains("42501") && remedy.contains("GRANT CREATE, TEMPORARY ON DATABASE"), "{reason} {remedy}");
    target.sql(&format!("GRANT CREATE ON DATABASE {name} TO {role}")).await;
    open("right").await.unwrap();
    target.sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// Class 55: a lock that is not free is tried again, everything else of it is for a person.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_other_try_can_mend_stops_the_sink() {
    let target = Target::fresh("prerequisites").await;
    let mut log = Log::new();
    let bag = || Shape::new("bag").full().column("n", ColumnType::Int4);
    let (narrow, wide) = (bag().build(), bag().column("m", ColumnType::Int4).build());
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&narrow, [1.into()]), Change::insert(&narrow, [2.into()])]);
    apply(&mut sink, &log.batch()).await;

    // Published on, without an identity.
    target.sql("CREATE PUBLICATION onward FOR TABLE bag").await;
    log.transaction([Change::delete_full(&narrow, [1.into()])]);
    let batch = log.batch();
    let (reason, remedy) = misfit(try_apply(&mut sink, &batch).await);
    assert!(reason.contains("bag") && reason.contains("55000"), "{reason}");
    assert!(remedy.contains("REPLICA IDENTITY") && remedy.contains("wallaby resume"), "{remedy}");
    target.sql("ALTER TABLE bag REPLICA IDENTITY FULL").await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &batch).await;

    let reader = target.database.connect().await;
    reader.batch_execute("BEGIN; LOCK TABLE bag IN ACCESS SHARE MODE").await.unwrap();
    log.transaction([Change::insert(&wide, [3.into(), 3.into()])]);
    let batch = log.batch();
    let outcome = try_apply(&mut sink, &batch).await;
    assert!(matches!(&outcome, Err(SinkError::Transient(why)) if why.contains("55P03")), "{outcome:?}");
    reader.batch_execute("COMMIT").await.unwrap();
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &batch).await;
    assert_eq!(target.rows(&wide.table).await, rows(&[&["2", "~"], &["3", "3"]]));

    // Emptied behind changes whose triggers fire at the end of the transaction only.
    let children = Shape::new("children").key("id", ColumnType::Int4).column("parent", ColumnType::Int4).build();
    target.sql("CREATE TABLE parents (id int PRIMARY KEY); INSERT INTO parents VALUES (1)").await;
    let deferred = "parent int CONSTRAINT of_parent REFERENCES parents DEFERRABLE INITIALLY DEFERRED";
    target.sql(&format!("CREATE TABLE children (id int PRIMARY KEY, {deferred})")).await;
    log.transaction([Change::insert(&children, [1.into(), 1.into()]), Change::truncate(&children)]);
    let batch = log.batch_in_segments(1);
    let (reason, remedy) = misfit(sink.apply_large(batch.from, &mut PortionFeed::new(&batch)).await);
    assert!(reason.contains("children") && reason.contains("55006"), "{reason}");
    assert!(remedy.contains("DEFERRABLE") && remedy.contains("wallaby resume"), "{remedy}");
    target.sql("ALTER TABLE children DROP CONSTRAINT of_parent").await;
    sink.open(Epoch(1)).await.unwrap();
    sink.apply_large(batch.from, &mut PortionFeed::new(&batch)).await.unwrap();
    assert!(target.rows(&children.table).await.is_empty());
}

/// A portion may have both shapes, or one each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_a_large_transaction_drops_stays_until_it_is_over() {
    for changes_max in [1, 3] {
        let target = Target::fresh("large_drop").await;
        let mut log = Log::new();
        let shape = || Shape::new("t").key("id", ColumnType::Int4).column("a", ColumnType::Int4);
        let (wide, narrow) = (shape().column("b", ColumnType::Text).build(), shape().build());
        let mut sink = target.opened(&log).await;
        log.transaction([Change::insert(&wide, [2.into(), 2.into(), "y".into()])]);
        apply(&mut sink, &log.batch()).await;
        log.transaction([
            Change::insert(&wide, [1.into(), 1.into(), "x".into()]),
            Change::update(&narrow, [1.into(), 10.into()]),
            Change::insert(&narrow, [3.into(), 3.into()]),
        ]);
        let large = log.batch_in_segments(changes_max);
        sink.apply_large(large.from, &mut PortionFeed::new(&large)).await.unwrap();
        let expected = rows(&[&["1", "10", "x"], &["2", "2", "y"], &["3", "3", "~"]]);
        assert_eq!(target.rows(&wide.table).await, expected, "{changes_max}");
        // Then a person is asked, as after any other transaction: left there, it would meet a later column of its name.
        log.transaction([Change::insert(&narrow, [4.into(), 4.into()])]);
        let after = log.batch();
        let (_, remedy) = misfit(try_apply(&mut sink, &after).await);
        let statement = "ALTER TABLE \"public\".\"t\" DROP COLUMN \"b\"";
        assert!(remedy.contains(statement), "{remedy}");
        target.sql(statement).await;
        sink.open(Epoch(1)).await.unwrap();
        apply(&mut sink, &after).await;
        let expected = rows(&[&["1", "10"], &["2", "2"], &["3", "3"], &["4", "4"]]);
        assert_eq!(target.rows(&narrow.table).await, expected, "{changes_max}");
    }
}

/// What older rows have in the column would be lost with a new one beside it. With both there the transaction passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_a_large_transaction_renames_stops_the_sink() {
    let target = Target::fresh("large_rename").await;
    let mut log = Log::new();
    let shape = || Shape::new("t").key("id", ColumnType::Int4);
    let (before, after) =
        (shape().column("b", ColumnType::Text).build(), shape().column("c", ColumnType::Text).build());
    let mut sink = target.opened(&log).await;
    log.transaction([Change::insert(&before, [1.into(), "old".into()])]);
    apply(&mut sink, &log.batch()).await;
    log.transaction([
        Change::insert(&before, [2.into(), "x".into()]),
        Change::insert(&after, [3.into(), "y".into()]),
        Change::update(&after, [2.into(), "z".into()]),
    ]);
    let large = log.batch_in_segments(1);
    let (reason, remedy) = misfit(sink.apply_large(large.from, &mut PortionFeed::new(&large)).await);
    let statement = "ALTER TABLE \"public\".\"t\" RENAME COLUMN \"b\" TO \"c\"";
    assert!(reason.contains("\"b\" is not at the source, and \"c\" not at the sink"), "{reason}");
    assert!(remedy.contains(statement), "{remedy}");
    assert_eq!(target.rows(&before.table).await, rows(&[&["1", "old"]]), "nothing of it is seen");
    assert_eq!(sink.open(Epoch(1)).await.unwrap().position, Some(large.from));

    // With a default it passes for a person's column until the transaction writes to it.
    target.sql("ALTER TABLE t ADD COLUMN c text DEFAULT ''").await;
    sink.open(Epoch(1)).await.unwrap();
    sink.apply_large(large.from, &mut PortionFeed::new(&large)).await.unwrap();
    log.transaction([Change::insert(&after, [4.into(), "w".into()])]);
    let next = log.batch();
    let (_, remedy) = misfit(try_apply(&mut sink, &next).await);
    assert!(remedy.contains("DROP COLUMN \"b\""), "{remedy}");
    target.sql("UPDATE t SET c = b WHERE c = ''; ALTER TABLE t DROP COLUMN b").await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &next).await;
    assert_eq!(target.rows(&after.table).await, rows(&[&["1", "old"], &["2", "z"], &["3", "y"], &["4", "w"]]));
}

/// A delete would pass it over, and nobody would know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_a_policy_at_the_sink_hides_stops_the_sink() {
    use wallaby_connector_api::conformance::EmptySource;
    use wallaby_connector_api::{SinkFactory, SinkTask};
    let target = Target::fresh("policy").await;
    let role = wallaby_testkit::unique("sink_role");
    let (port, name) = (target.database.postgres().port(), target.database.name());
    let setup = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'hidden'), (2, 'seen'); \
        ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY seen ON t USING (v = 'seen')";
    target.sql(setup).await;
    target.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'pw'; GRANT CREATE ON DATABASE {name} TO {role}")).await;
    target.sql(&format!("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON t TO {role}")).await;
    let factory = wallaby_postgres::PostgresSinkFactory::new(
        target.config_at(&format!("postgres://{role}:pw@127.0.0.1:{port}/{name}")),
    );
    let mut sink = factory.make(SinkTask { task: target.task.clone(), since: Epoch(0), lookup: Arc::new(EmptySource) });
    let mut log = Log::new();
    sink.open(Epoch(1)).await.unwrap();
    sink.start_at(log.start(), log.epoch).await.unwrap();
    let table = Shape::new("t").key("id", ColumnType::Int4).column("v", ColumnType::Text).build();
    log.transaction([Change::delete(&table, [1.into(), Value::Null])]);
    let batch = log.batch();
    let (reason, remedy) = misfit(try_apply(&mut sink, &batch).await);
    let statement = format!("ALTER ROLE \"{role}\" BYPASSRLS");
    assert!(reason.contains("42501") && remedy.contains(&statement), "{reason}: {remedy}");
    target.sql(&statement).await;
    sink.open(Epoch(1)).await.unwrap();
    apply(&mut sink, &batch).await;
    assert_eq!(target.rows(&table.table).await, rows(&[&["2", "seen"]]));
    target.sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// A source that is in this database, or does not answer.
struct Somewhere(Mutex<Option<DatabaseIdentity>>);

#[async_trait]
impl SourceLookup for Somewhere {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }

    async fn database(&self) -> Result<Option<DatabaseIdentity>, SinkError> {
        let configuration = || SinkError::Configuration { reason: "nobody answers".to_owned(), remedy: String::new() };
        self.0.lock().unwrap().clone().map(Some).ok_or_else(configuration)
    }
}

/// Before a task has a position here, nothing is made until it is known that the source is elsewhere; once it has one, nobody is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_waits_until_the_source_says_that_it_is_another_database() {
    let target = Target::fresh("elsewhere").await;
    let there = target.query(DatabaseIdentity::SQL).await.remove(0).into_iter().map(Option::unwrap).collect::<Vec<_>>();
    let here = DatabaseIdentity { started_at_micros: there[0].parse().unwrap(), oid: there[1].parse().unwrap() };
    let source = Arc::new(Somewhere(Mutex::new(None)));
    let mut sink = target.make(Faults::default(), source.clone());
    // What is wrong with the source is not mended here: it is waited for.
    let Err(SinkError::Transient(said)) = sink.open(Epoch(1)).await else { panic!("it did not wait") };
    assert!(said.contains("nobody answers") && said.contains("another database"), "{said}");
    *source.0.lock().unwrap() = Some(here.clone());
    let (reason, remedy) = misfit(sink.open(Epoch(1)).await);
    assert!(reason.contains(&there[2]) && reason.contains("the source's own"), "{reason}");
    assert!(remedy.contains("postgres.dsn"), "{remedy}");
    assert_eq!(target.query("SELECT to_regnamespace('wallaby')").await, vec![vec![None]], "something was made");
    // Schemas of their own are no tables of the source.
    let beside = PostgresSinkFactory::new(Target::config_of(&target.database.dsn(), "copy_{{ .schema }}"));
    let task = SinkTask { task: target.task.clone(), since: Epoch(0), lookup: source.clone() };
    assert_eq!(beside.make(task).open(Epoch(1)).await.unwrap().position, None);
    // A copy of the whole server has the same oids, and was started by itself.
    *source.0.lock().unwrap() =
        Some(DatabaseIdentity { started_at_micros: here.started_at_micros + 1, ..here.clone() });
    sink.open(Epoch(1)).await.unwrap();
    let log = Log::new();
    sink.start_at(log.start(), log.epoch).await.unwrap();
    *source.0.lock().unwrap() = None;
    sink.open(Epoch(2)).await.unwrap();
}
