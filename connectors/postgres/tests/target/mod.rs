//! A fresh database as the target of one task's sinks.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_connector_api::conformance::{EmptySource, Log, SinkUnderTest, TextRow};
use wallaby_connector_api::{
    Applied, Batch, ChunkLoader, Faults, Sink, SinkError, SinkFactory, SinkTask, SourceLookup,
};
use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
use wallaby_model::schema::quote_identifier;
use wallaby_model::{Epoch, FlowId, SinkId, TableName, TaskId};
use wallaby_postgres::{PostgresSinkConfig, PostgresSinkFactory};
use wallaby_testkit::Database;

pub struct Target {
    pub database: Database<'static>,
    pub task: TaskId,
}

impl Target {
    pub async fn fresh(hint: &str) -> Target {
        let task = TaskId::apply(&FlowId::new("shop").unwrap(), &SinkId::new("warehouse").unwrap());
        Target { database: Database::create(hint).await, task }
    }

    pub fn config(&self) -> PostgresSinkConfig {
        self.config_at(&self.database.dsn())
    }

    pub fn config_at(&self, dsn: &str) -> PostgresSinkConfig {
        Self::config_of(dsn, "{{ .schema }}")
    }

    pub fn config_of(dsn: &str, schema: &str) -> PostgresSinkConfig {
        let spec = PostgresSinkSpec {
            dsn: SecretRef::Value(String::new()),
            schema: schema.to_owned(),
            mode: SinkMode::Upsert,
        };
        PostgresSinkConfig::new(dsn, &spec).unwrap()
    }

    pub fn sink(&self) -> Box<dyn Sink> {
        self.make(Faults::default(), Arc::new(EmptySource))
    }

    /// A sink under epoch 1 at the log's start.
    pub async fn opened(&self, log: &Log) -> Box<dyn Sink> {
        self.opened_with(log, Arc::new(EmptySource)).await
    }

    pub async fn opened_with(&self, log: &Log, lookup: Arc<dyn SourceLookup>) -> Box<dyn Sink> {
        let mut sink = self.make(Faults::default(), lookup);
        sink.open(Epoch(1)).await.unwrap();
        sink.start_at(log.start(), log.epoch).await.unwrap();
        sink
    }

    pub async fn sql(&self, sql: &str) {
        self.database.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The rows of a query, each column as text, in the query's order.
    pub async fn query(&self, sql: &str) -> Vec<TextRow> {
        query(&self.database, sql).await
    }
}

/// The rows of a query, each column as text, in the query's order.
pub async fn query(client: &tokio_postgres::Client, sql: &str) -> Vec<TextRow> {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let rows = messages.into_iter().filter_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    });
    rows.collect()
}

/// All rows of a table as text, sorted, without columns of the sink's own.
pub async fn table_rows(client: &tokio_postgres::Client, table: &TableName) -> Vec<TextRow> {
    let columns = "SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 \
        AND NOT attisdropped AND NOT starts_with(attname, '_wallaby_') ORDER BY attnum";
    let columns = client.query(columns, &[&table.quoted()]).await.unwrap();
    if columns.is_empty() {
        return Vec::new();
    }
    let columns: Vec<String> = columns.iter().map(|row| quote_identifier(row.get(0))).collect();
    let mut rows = query(client, &format!("SELECT {} FROM {}", columns.join(", "), table.quoted())).await;
    rows.sort();
    rows
}

#[async_trait]
impl SinkUnderTest for Target {
    fn make(&self, faults: Faults, lookup: Arc<dyn SourceLookup>) -> Box<dyn Sink> {
        let factory = PostgresSinkFactory::new(self.config().with_faults(faults));
        factory.make(SinkTask { task: self.task.clone(), since: Epoch(0), lookup })
    }

    fn make_loader(&self, faults: Faults) -> Option<Box<dyn ChunkLoader>> {
        let factory = PostgresSinkFactory::new(self.config().with_faults(faults));
        factory.make_loader(SinkTask { task: self.task.clone(), since: Epoch(0), lookup: Arc::new(EmptySource) })
    }

    async fn rows(&self, table: &TableName) -> Vec<TextRow> {
        table_rows(&self.database, table).await
    }

    async fn constrain(&self, table: &TableName, columns: &[&str]) -> bool {
        let columns: Vec<String> = columns.iter().map(|column| quote_identifier(column)).collect();
        self.sql(&format!("ALTER TABLE {} ADD UNIQUE ({})", table.quoted(), columns.join(", "))).await;
        true
    }
}

pub async fn apply(sink: &mut Box<dyn Sink>, batch: &Batch) {
    assert_eq!(try_apply(sink, batch).await.unwrap(), Applied::Durable(batch.to));
}

pub async fn try_apply(sink: &mut Box<dyn Sink>, batch: &Batch) -> Result<Applied, SinkError> {
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, sink.apply(batch)).await.expect("apply did not answer")
}

/// `[Some("1"), None]` from `["1", ""]`-like literals: NULL is written `~`.
pub fn rows(expected: &[&[&str]]) -> Vec<TextRow> {
    let value = |text: &&str| if *text == "~" { None } else { Some((*text).to_owned()) };
    expected.iter().map(|row| row.iter().map(value).collect()).collect()
}
