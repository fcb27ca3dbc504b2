//! One connection to the sink: its settings, its prepared statements, and the temporary tables through which rows go.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use futures::future::join;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, CopyInSink, Statement};
use wallaby_connector_api::{CommitFault, SinkError};
use wallaby_model::{Epoch, TableName, TaskId};

use crate::checkpoint::IDLE_IN_TRANSACTION_MAX;
use crate::config::PostgresSinkConfig;
use crate::encode::{HEADER, TRAILER};
use crate::error::{Doing, PostgresError};

/// What is gathered before it is handed to the connection.
const COPY_CHUNK: usize = 128 << 10;
/// Temporary tables are emptied at each commit, which costs a little for each: more than this are thrown away. So many with rows in
/// them are emptied before the commit, to be used again.
const STAGES_MAX: usize = 64;
/// Prepared statements kept; past that all are thrown away.
const STATEMENTS_MAX: usize = 512;
/// A table whose rows were in the way of a direct copy takes the way of the upsert for so many batches.
const UPSERTS_AFTER_CONFLICT: u32 = 100;

/// While rows are waited for inside of a transaction, the server hears of us this often.
const STAY_ALIVE_EVERY: Duration = Duration::from_secs(10);

/// A temporary table: columns `c0`, `c1`, … of given types.
struct Stage {
    name: String,
    types: Vec<String>,
    /// May hold rows of this transaction.
    used: bool,
}

/// An open connection.
pub(crate) struct Session {
    pub client: Client,
    connection: JoinHandle<()>,
    statements: HashMap<String, Statement>,
    stages: Vec<Stage>,
    stages_made: u64,
    /// Batches for which a table still takes the way of the upsert.
    conflicts: HashMap<TableName, u32>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Connects under the session name of the task and epoch.
pub(crate) async fn connect(
    config: &PostgresSinkConfig,
    task: &TaskId,
    epoch: Epoch,
) -> Result<Session, PostgresError> {
    connect_as(config, &task.session_name(epoch), IDLE_IN_TRANSACTION_MAX).await
}

/// Connects under a session name. The server ends a session that does nothing inside of a transaction for longer than `idle_max`.
pub(crate) async fn connect_as(
    config: &PostgresSinkConfig,
    name: &str,
    idle_max: Duration,
) -> Result<Session, PostgresError> {
    let mut connection = config.connection.clone();
    connection.application_name(name);
    let doing = || format!("connecting to the sink at {}", config.target());
    let (client, driver) = connection.connect(config.connector()?).await.doing(doing)?;
    let connection = tokio::spawn(async move {
        // Every request that is under way gets the error too.
        if let Err(error) = driver.await {
            tracing::debug!(%error, "the connection to the sink ended");
        }
    });
    let session = Session {
        client,
        connection,
        statements: HashMap::new(),
        stages: Vec::new(),
        stages_made: 0,
        conflicts: HashMap::new(),
    };
    session.configure(idle_max).await?;
    Ok(session)
}

impl Session {
    /// Text forms as the source prints them, whatever the database's defaults are; plans by the tables' present size;
    /// a commit that is on disk, because only that may move a checkpoint; and a server that notices within half a minute that we
    /// vanished, also in the middle of a COPY, where it waits for us without a bound of its own. Over a Unix socket that has no effect.
    /// A row that a policy hides would be passed over by deletes and updates: with row_security off the server refuses instead.
    async fn configure(&self, idle_max: Duration) -> Result<(), PostgresError> {
        let settings = format!(
            "SET datestyle = 'ISO, MDY'; SET timezone = 'UTC'; SET intervalstyle = 'postgres'; \
             SET extra_float_digits = 1; SET bytea_output = 'hex'; SET client_encoding = 'UTF8'; \
             SET standard_conforming_strings = on; SET statement_timeout = 0; SET lock_timeout = 0; \
             SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; \
             SET tcp_user_timeout = 30000; SET idle_in_transaction_session_timeout = {}; SET plan_cache_mode = force_custom_plan; \
             SET temp_buffers = '32MB'; SET jit = off; SET row_security = off; SET default_transaction_isolation = 'read committed'; \
             SET default_transaction_read_only = off; SET default_transaction_deferrable = off; \
             SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
            idle_max.as_millis()
        );
        self.client.batch_execute(&settings).await.doing(|| "setting up the session at the sink".to_owned())
    }

    /// Cuts the connection, as the death of the process would.
    pub(crate) async fn cut(&mut self) {
        self.connection.abort();
        // Until it has ended it may still send what is asked of it next.
        let _ = (&mut self.connection).await;
    }

    /// Suffers a fault.
    pub(crate) async fn suffer(&mut self, fault: Option<&CommitFault>) {
        match fault {
            None => {}
            Some(CommitFault::Die) => self.cut().await,
            Some(CommitFault::Hang(point)) => point.hang().await,
        }
    }

    /// Waits for what is to be written next, inside an open transaction, and keeps the session from idling out meanwhile: an owner
    /// that lives may wait as long as it needs, one that is frozen loses its transaction.
    pub(crate) async fn wait_for<T>(&self, next: impl Future<Output = T>) -> Result<T, PostgresError> {
        let mut next = std::pin::pin!(next);
        loop {
            match tokio::time::timeout(STAY_ALIVE_EVERY, &mut next).await {
                Ok(next) => return Ok(next),
                Err(_) => {
                    let stayed = self.client.batch_execute("").await;
                    stayed.doing(|| "waiting inside of a transaction at the sink".to_owned())?;
                }
            }
        }
    }

    /// A prepared statement for `sql`.
    pub(crate) async fn prepared(&mut self, sql: &str) -> Result<Statement, PostgresError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        if self.statements.len() >= STATEMENTS_MAX {
            self.statements.clear();
        }
        let statement = self.client.prepare(sql).await.doing(|| "preparing a statement at the sink".to_owned())?;
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// An empty temporary table with columns `c0`, `c1`, … of these types; its name. It is the caller's alone until the stages are
    /// emptied.
    pub(crate) async fn stage(&mut self, types: &[&str]) -> Result<String, PostgresError> {
        if let Some(stage) = self.stages.iter_mut().find(|stage| stage.types == types && !stage.used) {
            stage.used = true;
            return Ok(stage.name.clone());
        }
        self.stages_made += 1;
        let name = format!("pg_temp.wallaby_stage_{}", self.stages_made);
        let columns: Vec<_> = types.iter().enumerate().map(|(n, sql_type)| format!("c{n} {sql_type}")).collect();
        let create = format!("CREATE TABLE {name} ({}) ON COMMIT DELETE ROWS", columns.join(", "));
        self.client.batch_execute(&create).await.doing(|| "making a temporary table at the sink".to_owned())?;
        let types = types.iter().map(|&sql_type| sql_type.to_owned()).collect();
        self.stages.push(Stage { name: name.clone(), types, used: true });
        Ok(name)
    }

    /// Empties the temporary tables if there are many with rows in them. For a place where nobody needs rows of one any more.
    pub(crate) async fn empty_many_stages(&mut self) -> Result<(), PostgresError> {
        match self.stages.iter().filter(|stage| stage.used).count() {
            0..STAGES_MAX => Ok(()),
            _ => self.empty_stages().await,
        }
    }

    /// Empties the temporary tables that were used, inside of a transaction. Outside of a savepoint the server gives their room back
    /// at once, except for what they had before the first time.
    pub(crate) async fn empty_stages(&mut self) -> Result<(), PostgresError> {
        let used: Vec<&str> = self.stages.iter().filter(|stage| stage.used).map(|stage| stage.name.as_str()).collect();
        if used.is_empty() {
            return Ok(());
        }
        let emptied = self.client.batch_execute(&format!("TRUNCATE {}", used.join(", "))).await;
        emptied.doing(|| "emptying temporary tables at the sink".to_owned())?;
        for stage in &mut self.stages {
            stage.used = false;
        }
        Ok(())
    }

    /// How many temporary tables there are: what a savepoint remembers.
    pub(crate) fn mark(&self) -> usize {
        self.stages.len()
    }

    /// Forgets the temporary tables that a rollback took back. That others were emptied since may be taken back too.
    pub(crate) fn rolled_back_to(&mut self, mark: usize) {
        self.stages.truncate(mark);
        for stage in &mut self.stages {
            stage.used = true;
        }
    }

    /// The transaction is over: all temporary tables that are left are empty.
    pub(crate) async fn transaction_ended(&mut self) -> Result<(), PostgresError> {
        for stage in &mut self.stages {
            stage.used = false;
        }
        for left in self.conflicts.values_mut() {
            *left = left.saturating_sub(1);
        }
        self.conflicts.retain(|_, left| *left > 0);
        if self.stages.len() > STAGES_MAX {
            self.stages.clear();
            self.statements.clear();
            self.client.batch_execute("DISCARD TEMP").await.doing(|| "dropping temporary tables".to_owned())?;
        }
        Ok(())
    }

    /// Whether new rows of this table may be tried as a direct copy.
    pub(crate) fn may_copy(&self, table: &TableName) -> bool {
        !self.conflicts.contains_key(table)
    }

    /// Rows of this table were in the way of a direct copy.
    pub(crate) fn copy_met_rows(&mut self, table: &TableName) {
        self.conflicts.insert(table.clone(), UPSERTS_AFTER_CONFLICT);
    }

    /// Runs a `COPY … FROM STDIN BINARY`, encoding while the server reads, and then `after`, which is sent at once behind
    /// it. `encode` writes row `n`. Returns the rows that `after` touched.
    pub(crate) async fn copy(
        &mut self,
        sql: &str,
        rows: usize,
        mut encode: impl FnMut(usize, &mut Vec<u8>) -> Result<(), PostgresError>,
        after: Option<&str>,
        doing: &str,
    ) -> Result<u64, PostgresError> {
        let statement = self.prepared(sql).await?;
        let after = match after {
            Some(sql) => Some(self.prepared(sql).await?),
            None => None,
        };
        let doing = || doing.to_owned();
        let mut sink = std::pin::pin!(self.client.copy_in::<_, Bytes>(&statement).await.doing(doing)?);
        let mut buffer = Vec::with_capacity(COPY_CHUNK + 4096);
        buffer.extend_from_slice(HEADER);
        for row in 0..rows {
            encode(row, &mut buffer)?;
            if buffer.len() >= COPY_CHUNK {
                let full = std::mem::replace(&mut buffer, Vec::with_capacity(COPY_CHUNK + 4096));
                if feed(sink.as_mut(), full).await.is_err() {
                    break;
                }
            }
        }
        buffer.extend_from_slice(TRAILER);
        // A server that refused a row has said so already; `finish` reads the answer.
        let _ = feed(sink.as_mut(), buffer).await;
        let Some(after) = after else {
            return sink.finish().await.doing(doing);
        };
        let (copied, touched) = join(sink.finish(), self.client.execute(&after, &[])).await;
        copied.doing(doing)?;
        touched.doing(doing)
    }

    /// Runs a statement without parameters; the rows that it touched.
    pub(crate) async fn run(&mut self, sql: &str, doing: &str) -> Result<u64, PostgresError> {
        let statement = self.prepared(sql).await?;
        self.client.execute(&statement, &[]).await.doing(|| doing.to_owned())
    }

    /// Runs a command that is not worth preparing.
    pub(crate) async fn command(&self, sql: &str) -> Result<(), PostgresError> {
        self.client.batch_execute(sql).await.doing(|| format!("running {sql} at the sink"))
    }
}

/// Hands over rows in messages of bounded size: the connection copies each into a buffer of its own, which it keeps. The server does
/// not mind where they are cut.
async fn feed(mut sink: Pin<&mut CopyInSink<Bytes>>, rows: Vec<u8>) -> Result<(), tokio_postgres::Error> {
    let mut rows = Bytes::from(rows);
    while rows.len() > 2 * COPY_CHUNK {
        sink.feed(rows.split_to(COPY_CHUNK)).await?;
    }
    sink.feed(rows).await
}

/// The answer of an `apply` without `open`.
pub(crate) fn not_open() -> SinkError {
    SinkError::Transient("the sink is not open: open it first".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
    use wallaby_testkit::Database;

    #[tokio::test]
    async fn the_server_notices_a_client_that_vanished() {
        let database = Database::create("keepalive").await;
        let spec =
            PostgresSinkSpec { dsn: SecretRef::Value(String::new()), schema: "s".to_owned(), mode: SinkMode::Upsert };
        let folder = database.postgres().socket_folder().display().to_string();
        let at = database.dsn();
        let (user, _) = at.split_once("@127.0.0.1").unwrap();
        let user = user.strip_prefix("postgres://").unwrap();
        let (user, password) = user.split_once(':').unwrap();
        let (port, name) = (database.postgres().port(), database.name());
        let socket = format!("host={folder} port={port} user={user} password={password} dbname={name}");
        // In seconds, and for the last one in milliseconds.
        for (dsn, expected) in [(at.as_str(), ["15", "5", "3", "30000"]), (&socket, ["0", "0", "0", "0"])] {
            let config = PostgresSinkConfig::new(dsn, &spec).unwrap();
            let session = connect_as(&config, "wallaby/test", IDLE_IN_TRANSACTION_MAX).await.unwrap();
            let query = "SELECT current_setting('tcp_keepalives_idle'), current_setting('tcp_keepalives_interval'), \
                current_setting('tcp_keepalives_count'), current_setting('tcp_user_timeout')";
            let row = session.client.query_one(query, &[]).await.unwrap();
            let found: Vec<String> = (0..4).map(|n| row.get(n)).collect();
            assert_eq!(found, expected, "{}", config.target());
        }
    }
}
