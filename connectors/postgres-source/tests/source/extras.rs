//! What a table has beyond columns and primary key, for sinks that made it.

use wallaby_connector_api::SourceLookup;
use wallaby_model::TableName;
use wallaby_postgres_source::Lookup;
use wallaby_testkit::Database;

use crate::kit::Flow;

#[tokio::test]
async fn extras_name_no_table_and_keep_quoted_names() {
    let db = Database::create("extras").await;
    db.batch_execute(
        r#"CREATE TABLE captured (id int PRIMARY KEY);
           CREATE SCHEMA "o d d";
           CREATE TABLE "o d d".parents (id int PRIMARY KEY);
           CREATE TABLE "o d d"."T ON x" (id int PRIMARY KEY, "a b" int DEFAULT 3, c text CHECK (c <> ''), d int UNIQUE,
               p int CONSTRAINT parent REFERENCES "o d d".parents ON DELETE CASCADE, g int GENERATED ALWAYS AS (id + 1) STORED);
           CREATE UNIQUE INDEX "I ON y" ON "o d d"."T ON x" USING btree ("a b", lower(c)) INCLUDE (d) WHERE ("a b" > 0)"#,
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let lookup = Lookup::new(flow.config.clone(), &flow.name);
    let extras = lookup.extras(&TableName::new("o d d", "T ON x")).await.unwrap();
    assert_eq!(extras.indexes.len(), 1, "{extras:?}");
    assert_eq!(extras.indexes[0].name, "I ON y");
    assert!(extras.indexes[0].is_unique);
    assert_eq!(extras.indexes[0].using, r#"USING btree ("a b", lower(c)) INCLUDE (d) WHERE ("a b" > 0)"#);
    let constraints: Vec<&str> = extras.constraints.iter().map(|extra| extra.definition.as_str()).collect();
    assert_eq!(constraints, ["UNIQUE (d)", "CHECK ((c <> ''::text))"]);
    let [key] = extras.foreign_keys.as_slice() else { panic!("{extras:?}") };
    assert_eq!((&key.columns, &key.referenced), (&vec!["p".to_owned()], &vec!["id".to_owned()]));
    assert_eq!(key.references, TableName::new("o d d", "parents"));
    assert_eq!(extras.defaults.len(), 1);
    assert_eq!((extras.defaults[0].name.as_str(), extras.defaults[0].definition.as_str()), ("a b", "3"));
    let gone = lookup.extras(&TableName::new("public", "nosuch")).await.unwrap();
    assert_eq!(gone, Default::default());
}

#[tokio::test]
async fn columns_say_what_rows_have_in_them_that_are_older() {
    let db = Database::create("columns").await;
    db.batch_execute(
        "CREATE TABLE captured (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id + 1) STORED);
         INSERT INTO captured VALUES (1);
         CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
         INSERT INTO parts VALUES (1), (11);
         ALTER TABLE captured ADD a int DEFAULT 3, ADD b text DEFAULT 'it''s \"', ADD c int[] DEFAULT '{1,NULL}', ADD d date,
             ADD e timestamptz DEFAULT '2020-01-01 00:00:00+00';
         CREATE TABLE boxes (id int PRIMARY KEY);
         INSERT INTO boxes VALUES (1);
         ALTER TABLE boxes ADD b box DEFAULT '(1,1),(0,0)';
         ALTER TABLE captured ALTER a SET DEFAULT 4;
         ALTER TABLE parts ADD a int DEFAULT 3;
         CREATE TABLE parts_3 PARTITION OF parts FOR VALUES FROM (20) TO (30)",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let lookup = Lookup::new(flow.config.clone(), &flow.name);
    let columns = async |table: &str| {
        let columns = lookup.columns(&TableName::new("public", table)).await.unwrap().columns;
        columns.into_iter().map(|column| (column.name, column.filled)).collect::<Vec<_>>()
    };
    let column = |name: &str, filled: Option<&str>| (name.to_owned(), filled.map(str::to_owned));
    let expected = [
        column("id", None),
        column("a", Some("3")),
        column("b", Some("it's \"")),
        column("c", Some("{1,NULL}")),
        column("d", None),
    ];
    let mut found = columns("captured").await;
    let (name, at) = found.pop().unwrap();
    assert_eq!(found, expected);
    let read = format!("SELECT 1 WHERE '{}'::timestamptz = '2020-01-01 00:00:00+00'", at.unwrap());
    let read = db.query(&read, &[]).await;
    assert_eq!((name.as_str(), read.unwrap().len()), ("e", 1));
    assert_eq!(columns("parts").await, [column("id", None), column("a", Some("3"))]);
    assert_eq!(columns("nosuch").await, []);
    assert_eq!(columns("boxes").await, [column("id", None), column("b", Some("(1,1),(0,0)"))]);
    // A value for each row: it is in the row.
    db.batch_execute("ALTER TABLE captured ADD f uuid DEFAULT gen_random_uuid()").await.unwrap();
    let rewritten = columns("captured").await;
    assert!(rewritten.len() == 7 && rewritten.iter().all(|(_, filled)| filled.is_none()), "{rewritten:?}");
}
