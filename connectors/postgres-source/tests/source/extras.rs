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
