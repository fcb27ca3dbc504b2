//! The source's side of `wallaby verify`: one session that reads under one snapshot.

use async_trait::async_trait;
use tokio_postgres::SimpleQueryMessage;
use wallaby_connector_api::verify::{
    VERIFY_SETTINGS, VerifyError, VerifyRow, VerifySession, VerifySource, VerifyTable, read_table, settled_lsn,
    table_sql,
};
use wallaby_model::schema::quote_literal;
use wallaby_model::{Lsn, TableName};

use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::{PUBLICATION_NOW, SourceError};
use crate::setup::PublicationWanted;
use crate::tables::{self, Pattern};

/// A session at the source for one comparison.
pub struct SourceVerify {
    control: Control,
    publication: String,
}

impl SourceVerify {
    /// Connects. The publication says which tables, columns and rows are sent.
    ///
    /// # Errors
    /// As [`connect_control`].
    pub async fn connect(config: &ConnectConfig, publication: &str) -> Result<SourceVerify, SourceError> {
        let control = connect_control(config).await?;
        let set = control.batch_execute(VERIFY_SETTINGS).await;
        set.map_err(|error| SourceError::from_client("setting up a session to compare", &error))?;
        Ok(SourceVerify { control, publication: publication.to_owned() })
    }

    /// The tables that a flow names one by one and that its publication does not have. None of a publication that is not ours to alter:
    /// what it has is what is wanted.
    ///
    /// # Errors
    /// `PublicationMissing`; when the server cannot be asked.
    pub async fn unpublished(&self, wanted: &PublicationWanted) -> Result<Vec<String>, SourceError> {
        if !wanted.create {
            return Ok(Vec::new());
        }
        let missing = || SourceError::PublicationMissing { publication: wanted.name.clone(), when: PUBLICATION_NOW };
        let existing = tables::publication(&self.control, &wanted.name).await?.ok_or_else(missing)?;
        let is_absent = |text: &&String| {
            Pattern::parse(text).is_ok_and(|pattern| {
                pattern.table.is_some() && !existing.tables.keys().any(|table| pattern.matches(table))
            })
        };
        Ok(wanted.tables.iter().filter(is_absent).cloned().collect())
    }

    async fn ask(&self, during: &str, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        let messages = self.control.simple_query(sql).await;
        let messages = messages.map_err(|error| refused(SourceError::from_client(during, &error)))?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }
}

fn refused(error: SourceError) -> VerifyError {
    match error.remedy() {
        _ if error.is_transient() => VerifyError::Transient(error.to_string()),
        Some(remedy) => VerifyError::Refused(format!("{error}. {remedy}")),
        None => VerifyError::Refused(error.to_string()),
    }
}

#[async_trait]
impl VerifySession for SourceVerify {
    async fn rows(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        self.ask("comparing rows at the source", sql).await
    }
}

#[async_trait]
impl VerifySource for SourceVerify {
    async fn tables(&mut self) -> Result<Vec<TableName>, VerifyError> {
        let sql = format!(
            "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = {} ORDER BY 1, 2",
            quote_literal(&self.publication)
        );
        let rows = self.ask("listing the publication's tables", &sql).await?;
        let name = |mut row: VerifyRow| {
            let table = row.pop()??;
            Some(TableName::new(row.pop()??, table))
        };
        Ok(rows.into_iter().filter_map(name).collect())
    }

    async fn renew(&mut self, tables: &[TableName]) -> Result<Lsn, VerifyError> {
        let lock = tables.iter().map(TableName::quoted).collect::<Vec<_>>().join(", ");
        let lock = if lock.is_empty() { lock } else { format!("LOCK TABLE {lock} IN ACCESS SHARE MODE; ") };
        // The lock comes before the snapshot: a table that is rewritten in between would be read as empty. The LSN comes
        // after it, so that whatever the snapshot shows was committed below.
        let sql = format!(
            "ROLLBACK; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {lock}\
             SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text"
        );
        let rows = self.ask("taking a snapshot of the source", &sql).await?;
        let lsn = rows.into_iter().flatten().flatten().next();
        let lsn = lsn.and_then(|lsn| lsn.parse::<Lsn>().ok());
        lsn.map(settled_lsn)
            .ok_or_else(|| VerifyError::Refused("the source does not say where its WAL ends".to_owned()))
    }

    async fn table(&mut self, table: &TableName) -> Result<VerifyTable, VerifyError> {
        let publication = Some(self.publication.as_str());
        let rows = self.ask(&format!("describing {table} at the source"), &table_sql(table, publication)).await?;
        let found = read_table(table, publication, &rows)?;
        found.ok_or_else(|| VerifyError::Transient(format!("the table {table} is gone from the source")))
    }
}
