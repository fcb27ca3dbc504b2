//! A plain connection to a local Postgres.

use tokio_postgres::{Client, NoTls};

use crate::Error;

/// Connects without TLS: everything this crate talks to is on this machine. The connection's task ends with the client.
pub(crate) async fn connect(dsn: &str, what: &str) -> Result<Client, Error> {
    let doing = || format!("connecting to {what}");
    let (client, connection) = tokio_postgres::connect(dsn, NoTls).await.map_err(Error::postgres(doing()))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection ended");
        }
    });
    Ok(client)
}
