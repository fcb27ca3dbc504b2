//! A source and a sink, two databases, and a comparison of them.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use wallaby_connector_api::verify::{VerifyError, VerifyRequest, VerifySink, VerifySource, verify};
use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
use wallaby_model::verify::{TableReport, VerifyProgress, VerifyReport};
use wallaby_model::{Epoch, FlowId, SinkId, TaskId, TaskKind};
use wallaby_postgres::{PostgresSinkConfig, PostgresVerify};
use wallaby_postgres_source::{ConnectConfig, SourceVerify};
use wallaby_testkit::Database;

pub const FAR_AHEAD: &str = "7FFFFFFFFFFFFFFF-0000000000000000-00000000";
const PUBLICATION: &str = "verified";

pub struct Pair {
    pub source: Database<'static>,
    pub sink: Database<'static>,
}

impl Pair {
    /// Two databases; the sink's position is far ahead until a test says otherwise.
    pub async fn fresh(hint: &str) -> Pair {
        let source = Database::create(&format!("{hint}_source")).await;
        let sink = Database::create(&format!("{hint}_sink")).await;
        let pair = Pair { source, sink };
        pair.at_sink(
            "CREATE SCHEMA wallaby; CREATE TABLE wallaby.checkpoints (task text PRIMARY KEY, epoch bigint, position text)",
        )
        .await;
        pair.position(FAR_AHEAD).await;
        pair
    }

    pub async fn position(&self, position: &str) {
        self.at_sink(&format!(
            "INSERT INTO wallaby.checkpoints VALUES ('shop.apply.warehouse', 1, '{position}') \
             ON CONFLICT (task) DO UPDATE SET position = EXCLUDED.position"
        ))
        .await;
    }

    pub async fn at_source(&self, sql: &str) {
        self.source.batch_execute(sql).await.unwrap_or_else(|error| panic!("at the source: {sql}: {error:?}"));
    }

    pub async fn at_sink(&self, sql: &str) {
        self.sink.batch_execute(sql).await.unwrap_or_else(|error| panic!("at the sink: {sql}: {error:?}"));
    }

    pub async fn at_both(&self, sql: &str) {
        self.at_source(sql).await;
        self.at_sink(sql).await;
    }

    /// Publishes these tables, `s.t [(columns)] [WHERE (…)], …`.
    pub async fn publish(&self, tables: &str) {
        self.at_source(&format!(
            "CREATE PUBLICATION {PUBLICATION} FOR TABLE {tables} WITH (publish_via_partition_root = true)"
        ))
        .await;
    }

    pub fn sink_config(&self) -> PostgresSinkConfig {
        let spec = PostgresSinkSpec {
            dsn: SecretRef::Value(String::new()),
            schema: "{{ .schema }}".to_owned(),
            mode: SinkMode::Upsert,
        };
        PostgresSinkConfig::new(&self.sink.dsn(), &spec).unwrap()
    }

    pub async fn source_session(&self) -> SourceVerify {
        let config = ConnectConfig::parse(&self.source.dsn()).unwrap();
        SourceVerify::connect(&config, PUBLICATION).await.unwrap()
    }

    pub async fn sink_session(&self) -> PostgresVerify {
        let flow = FlowId::new("shop").unwrap();
        let apply = TaskId::apply(&flow, &SinkId::new("warehouse").unwrap());
        let task = TaskId { flow, kind: TaskKind::Verify(1) };
        PostgresVerify::connect(self.sink_config(), &task, Epoch(1), apply).await.unwrap()
    }

    pub async fn verify(&self) -> VerifyReport {
        self.verify_with(&[], 20, Duration::from_secs(120)).await.unwrap()
    }

    pub async fn verify_with(
        &self,
        tables: &[&str],
        show: usize,
        patience: Duration,
    ) -> Result<VerifyReport, VerifyError> {
        let (mut source, mut sink) = (self.source_session().await, self.sink_session().await);
        run(&mut source, &mut sink, tables, show, patience).await
    }
}

pub async fn run(
    source: &mut dyn VerifySource,
    sink: &mut dyn VerifySink,
    tables: &[&str],
    show: usize,
    patience: Duration,
) -> Result<VerifyReport, VerifyError> {
    let tables = tables.iter().map(|table| (*table).to_owned()).collect();
    let awake_every = Duration::from_millis(100);
    let request = VerifyRequest { tables, show, deadline: Instant::now() + patience, awake_every };
    let (progress, _) = watch::channel(VerifyProgress::default());
    verify(source, sink, &request, &progress).await
}

/// The report of a table, `schema.table` as at the source.
pub fn of<'r>(report: &'r VerifyReport, table: &str) -> &'r TableReport {
    let found = report.tables.iter().find(|report| report.table.to_string() == table);
    found.unwrap_or_else(|| panic!("{table} is not in the report: {report:?}"))
}

/// What is shown of a table's differences: kind, key, columns.
pub fn shown(report: &TableReport) -> Vec<String> {
    let line = |difference: &wallaby_model::verify::RowDifference| {
        format!("{:?} {} {}", difference.kind, difference.key, difference.columns.join(",")).trim_end().to_owned()
    };
    let mut lines: Vec<String> = report.differences.iter().map(line).collect();
    lines.sort();
    lines
}
