//! The control connection: catalog, settings, the slot's state, other sessions.
//!
//! tokio-postgres speaks over our own [`Transport`], so that it follows the same TLS rules as the replication client.
//! How the connection ended can be asked for: a server that shuts down says so here first, and the replication
//! connection has to go before the server can.

use std::io;
use std::ops::Deref;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::{Ready, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding as PgChannelBinding, SslMode as PgSslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use crate::config::{self, ConnectConfig};
use crate::error::{SourceError, is_shutdown};
use crate::transport::{ClearTextRefused, Transport, attempts, tries_next};

/// How a control connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlEnd {
    /// The server's SQLSTATE, when it said goodbye.
    pub sqlstate: Option<String>,
    /// What happened.
    pub message: String,
}

impl ControlEnd {
    /// Whether the server goes down: 57P01 (an administrator ended it) or 57P03 (it does not take connections).
    pub fn is_shutdown(&self) -> bool {
        self.sqlstate.as_deref().is_some_and(is_shutdown)
    }
}

/// A connection for queries. Ends when it is dropped.
pub struct Control {
    client: tokio_postgres::Client,
    end: watch::Receiver<Option<ControlEnd>>,
    task: AbortHandle,
}

/// Cuts the connection when it is dropped: a COPY that nobody reads on would otherwise be drained to its end.
pub(crate) struct CutOnDrop(AbortHandle);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Deref for Control {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &tokio_postgres::Client {
        &self.client
    }
}

impl Control {
    /// Returns when the connection has ended, with the reason. Cancel-safe.
    pub async fn ended(&self) -> ControlEnd {
        wait_for_end(self.end.clone()).await
    }

    /// Cuts the connection, whatever it does, when the answer is dropped.
    pub(crate) fn cut_on_drop(&self) -> CutOnDrop {
        CutOnDrop(self.task.clone())
    }

    pub(crate) fn end_watch(&self) -> watch::Receiver<Option<ControlEnd>> {
        self.end.clone()
    }
}

pub(crate) async fn wait_for_end(mut end: watch::Receiver<Option<ControlEnd>>) -> ControlEnd {
    let ended = end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
    ended.unwrap_or_else(|| ControlEnd { sqlstate: None, message: "the connection's task ended".into() })
}

/// Opens a control connection.
///
/// # Errors
/// As classified by [`SourceError`]; a wrong password is `Server` with SQLSTATE 28P01.
pub async fn connect_control(config: &ConnectConfig) -> Result<Control, SourceError> {
    let connecting = async {
        let mut outcome = None;
        for &encryption in attempts(config) {
            let connected = match Transport::connect(config, encryption, None).await {
                Ok(transport) => open(config, transport).await,
                Err(error) => Err(error),
            };
            match connected {
                Err(error) if tries_next(&error) => outcome = Some(Err(error)),
                done => return done,
            }
        }
        outcome.unwrap_or_else(|| unreachable_attempts(config))
    };
    match timeout(config.connect_timeout, connecting).await {
        Ok(connected) => connected,
        Err(_) => Err(SourceError::Timeout {
            what: format!("connecting to {}", config.target()),
            after: config.connect_timeout,
        }),
    }
}

fn unreachable_attempts<T>(config: &ConnectConfig) -> Result<T, SourceError> {
    let error = io::Error::new(io::ErrorKind::Unsupported, "sslmode allows no way to connect");
    Err(SourceError::Connect { target: config.target(), error })
}

async fn open(config: &ConnectConfig, transport: Transport) -> Result<Control, SourceError> {
    let mut settings = tokio_postgres::Config::new();
    settings.user(&config.user).dbname(&config.dbname).application_name(&config.application_name);
    // Text forms and names must not depend on the server's settings; a hanging lock must not hang us, and a control
    // connection is idle for as long as nothing happens. A row that a policy hides would be lost without a word: with
    // row_security off the server refuses to read its table instead.
    settings.options(
        "-c datestyle=ISO -c intervalstyle=iso_8601 -c timezone=UTC -c extra_float_digits=3 -c bytea_output=hex -c search_path=pg_catalog \
         -c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s -c idle_session_timeout=0 \
         -c row_security=off",
    );
    if let Some(password) = &config.password {
        settings.password(password);
    }
    settings.channel_binding(match config.channel_binding {
        config::ChannelBinding::Disable => PgChannelBinding::Disable,
        config::ChannelBinding::Prefer => PgChannelBinding::Prefer,
        config::ChannelBinding::Require => PgChannelBinding::Require,
    });
    // The transport has done the handshake already: "direct" makes tokio-postgres take it over as it is.
    if transport.is_tls() {
        settings.ssl_mode(PgSslMode::Require).ssl_negotiation(SslNegotiation::Direct);
    } else {
        settings.ssl_mode(PgSslMode::Disable);
    }
    let connected = settings.connect_raw(transport, HandedOver).await;
    let (client, connection) = connected.map_err(|error| connect_error(config, &error))?;
    let (ended, end) = watch::channel(None);
    let task = tokio::spawn(async move {
        let outcome = connection.await;
        let end = match outcome {
            Ok(()) => ControlEnd { sqlstate: None, message: "closed".into() },
            Err(error) => {
                ControlEnd { sqlstate: error.code().map(|code| code.code().to_owned()), message: error.to_string() }
            }
        };
        ended.send_replace(Some(end));
    });
    Ok(Control { client, end, task: task.abort_handle() })
}

fn connect_error(config: &ConnectConfig, error: &tokio_postgres::Error) -> SourceError {
    if error.as_db_error().is_some() {
        return SourceError::from_client(format!("connecting to {}", config.target()), error);
    }
    let cause = std::error::Error::source(error);
    let refused = cause.and_then(|cause| cause.downcast_ref::<io::Error>()).and_then(|error| error.get_ref());
    if refused.is_some_and(|inner| inner.is::<ClearTextRefused>()) {
        return auth_error(config, ClearTextRefused.to_string());
    }
    match cause {
        Some(cause) if cause.is::<io::Error>() => {
            SourceError::Lost { during: format!("connecting to {}", config.target()), reason: cause.to_string() }
        }
        Some(cause) => auth_error(config, cause.to_string()),
        None => SourceError::Lost { during: format!("connecting to {}", config.target()), reason: error.to_string() },
    }
}

pub(crate) fn auth_error(config: &ConnectConfig, reason: String) -> SourceError {
    SourceError::Auth { user: config.user.clone(), target: config.target(), reason }
}

/// Hands a finished TLS stream to tokio-postgres.
struct HandedOver;

/// The finished stream.
struct Finished(Transport);

impl TlsConnect<Transport> for HandedOver {
    type Stream = Finished;
    type Error = io::Error;
    type Future = Ready<io::Result<Finished>>;

    fn connect(self, stream: Transport) -> Self::Future {
        ready(Ok(Finished(stream)))
    }
}

impl TlsStream for Finished {
    fn channel_binding(&self) -> ChannelBinding {
        self.0.end_point.clone().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl AsyncRead for Finished {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Finished {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
