//! An older server: other catalogs, other ways to say the same. Skipped where PostgreSQL 15 is not installed.

use std::path::PathBuf;
use std::sync::Arc;

use wallaby_connector_api::SourceLookup;
use wallaby_postgres_source::{Lookup, SourceError, Status, preflight, source_status};
use wallaby_testkit::{Database, Postgres, PostgresOptions, skipped};

use crate::kit::{Flow, publication, rows_of, slot};

const BIN: &str = "/usr/lib/postgresql/15/bin";

#[tokio::test]
async fn everything_works_on_postgres_15_and_h20_stops_there_too() {
    if !PathBuf::from(BIN).exists() {
        skipped!("PostgreSQL 15 is not installed");
        return;
    }
    let options = PostgresOptions { bin: Some(BIN.into()), ..Default::default() };
    let pg = Postgres::start(options).await.unwrap();
    let db = Database::create_on(&pg, "older").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    let flow = Flow::create(&db).await;
    let findings = preflight(&flow.config, &publication(&flow.name, &["public.*"]), &slot(&flow.name)).await;
    assert!(findings.iter().all(|finding| finding.status == Status::Ok), "{findings:#?}");
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let segment = run.segment().await;
    let schema = Arc::clone(&segment.body.tables[0].schema);
    let lookup = Lookup::new(flow.config.clone(), &flow.name);
    let body = lookup.row_by_key(&schema, &vec![Some("1".into())]).await.unwrap().unwrap();
    assert_eq!(rows_of(&body)[0].values, rows_of(&segment.body)[0].values);
    assert_eq!(body.tables[0].schema.id(), schema.id());
    assert!(source_status(&db, &flow.name).await.unwrap().active);
    let end = run.end;
    drop(run);
    db.batch_execute(&format!("DROP PUBLICATION \"{0}\"", flow.name)).await.unwrap();
    db.batch_execute("INSERT INTO t VALUES (2, 'y')").await.unwrap();
    db.batch_execute(&format!("CREATE PUBLICATION \"{0}\" FOR TABLE t", flow.name)).await.unwrap();
    let mut run = flow.start(2, end).await;
    let error = run.error().await;
    assert!(matches!(error, SourceError::PublicationMissing { .. }), "{error}");
    assert!(!error.is_transient());
}
