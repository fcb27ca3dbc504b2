//! What the sessions of a run have in common.

use tokio_postgres::types::Type;

use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::SourceError;

/// A session may sit in its transaction for as long as the run takes it; not every server has all of these.
const SESSION_SQL: &str = "
SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')";

/// A session without time-outs.
pub(super) async fn patient(config: &ConnectConfig) -> Result<Control, SourceError> {
    let control = connect_control(config).await?;
    be_patient(&control).await?;
    Ok(control)
}

pub(super) async fn be_patient(control: &Control) -> Result<(), SourceError> {
    let set = control.batch_execute(SESSION_SQL).await;
    set.map_err(|error| SourceError::from_client("preparing a session of a run", &error))
}

/// Begins a transaction that sees what the snapshot sees.
pub(super) async fn import(control: &Control, snapshot: &str) -> Result<(), SourceError> {
    let name = wallaby_model::schema::quote_literal(snapshot);
    let sql = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {name}");
    match control.batch_execute(&sql).await {
        Ok(()) => Ok(()),
        // An unknown name, in the words of several versions; an exporter that has just ended.
        Err(error) if error.code().is_some_and(|code| matches!(code.code(), "22023" | "42704" | "55000")) => {
            Err(SourceError::SnapshotGone { snapshot: snapshot.to_owned() })
        }
        Err(error) => Err(SourceError::from_client("importing a snapshot", &error)),
    }
}

/// The backend's process id.
pub(super) async fn backend_pid(control: &Control) -> Result<i32, SourceError> {
    let row = control.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[]).await;
    Ok(row.map_err(|error| SourceError::from_client("asking for the session's process id", &error))?.get(0))
}

/// An argument with its type.
pub(super) type Argument<'a> = (&'a (dyn tokio_postgres::types::ToSql + Sync), Type);
