//! The sink's side of `wallaby verify`: one session that reads rows and checkpoint under one snapshot, so that the position
//! is that of exactly these rows.

use async_trait::async_trait;
use tokio_postgres::SimpleQueryMessage;
use wallaby_connector_api::SinkError;
use wallaby_connector_api::verify::{
    VERIFY_SETTINGS, VerifyError, VerifyRow, VerifySession, VerifySink, VerifyTable, read_table, table_sql,
};
use wallaby_model::schema::quote_literal;
use wallaby_model::{Epoch, Position, TableName, TaskId};

use crate::config::PostgresSinkConfig;
use crate::error::{Doing, PostgresError};
use crate::session::{Session, connect};

/// A session at the sink for one comparison.
pub struct PostgresVerify {
    session: Session,
    config: PostgresSinkConfig,
    apply: TaskId,
}

impl PostgresVerify {
    /// Connects under the session name of `task`, the comparison. `apply` is the task whose checkpoint says where the sink stands.
    ///
    /// # Errors
    /// When the sink cannot be reached or refuses.
    pub async fn connect(
        config: PostgresSinkConfig,
        task: &TaskId,
        epoch: Epoch,
        apply: TaskId,
    ) -> Result<PostgresVerify, SinkError> {
        let opened = async {
            let session = connect(&config, task, epoch).await?;
            let set = session.client.batch_execute(VERIFY_SETTINGS).await;
            set.doing(|| "setting up a session to compare".to_owned())?;
            Ok::<_, PostgresError>(session)
        };
        match opened.await {
            Ok(session) => Ok(PostgresVerify { session, config, apply }),
            Err(error) => Err(error.into_sink(config.role())),
        }
    }

    async fn ask(&self, doing: impl FnOnce() -> String, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        let messages = self.session.client.simple_query(sql).await.doing(doing);
        let messages = messages.map_err(|error| VerifyError::from(error.into_sink(self.config.role())))?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Those of these tables that exist and can be locked.
    async fn existing(&self, tables: &[TableName]) -> Result<Vec<TableName>, VerifyError> {
        let literal = |table: &TableName| format!("({}, {})", quote_literal(&table.schema), quote_literal(&table.name));
        let list = tables.iter().map(literal).collect::<Vec<_>>().join(", ");
        let sql = format!(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p') AND (n.nspname::text, c.relname::text) IN ({list})"
        );
        if tables.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self.ask(|| "looking for tables at the sink".to_owned(), &sql).await?;
        let name = |mut row: VerifyRow| {
            let table = row.pop()??;
            Some(TableName::new(row.pop()??, table))
        };
        Ok(rows.into_iter().filter_map(name).collect())
    }
}

#[async_trait]
impl VerifySession for PostgresVerify {
    async fn rows(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        self.ask(|| "comparing rows at the sink".to_owned(), sql).await
    }
}

#[async_trait]
impl VerifySink for PostgresVerify {
    fn target(&self, source: &TableName) -> TableName {
        self.config.target_table(source)
    }

    async fn renew(&mut self, tables: &[TableName]) -> Result<Option<Position>, VerifyError> {
        self.ask(|| "ending a snapshot of the sink".to_owned(), "ROLLBACK").await?;
        let lock = self.existing(tables).await?;
        let lock = lock.iter().map(TableName::quoted).collect::<Vec<_>>().join(", ");
        let lock = if lock.is_empty() { lock } else { format!("LOCK TABLE {lock} IN ACCESS SHARE MODE; ") };
        let sql = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {lock}SELECT to_regclass('wallaby.checkpoints')::text"
        );
        let doing = || "taking a snapshot of the sink".to_owned();
        let rows = self.ask(doing, &sql).await?;
        if rows.into_iter().flatten().flatten().next().is_none() {
            return Ok(None);
        }
        let sql = format!(
            "SELECT position::text FROM wallaby.checkpoints WHERE task = {}",
            quote_literal(&self.apply.to_string())
        );
        let rows = self.ask(doing, &sql).await?;
        let Some(text) = rows.into_iter().flatten().flatten().next() else { return Ok(None) };
        let position = text.parse().map_err(|error| {
            VerifyError::Refused(format!("the position in wallaby.checkpoints at the sink cannot be read: {error}"))
        })?;
        Ok(Some(position))
    }

    async fn table(&mut self, table: &TableName) -> Result<Option<VerifyTable>, VerifyError> {
        let rows = self.ask(|| format!("describing {table} at the sink"), &table_sql(table, None)).await?;
        read_table(table, None, &rows)
    }
}
