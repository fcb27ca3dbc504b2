//! The first messages of a replication connection: startup, authentication, the server's parameters.

use bytes::{Buf, BytesMut};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::{ChannelBinding, ConnectConfig};
use crate::control::auth_error;
use crate::error::{ServerError, SourceError, is_shutdown};
use crate::transport::{ClearTextRefused, Transport};

/// No message before streaming is larger than this.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Text forms that the parsers rely on, and warnings, which report a publication that is missing (PG 18).
const SESSION_OPTIONS: &str = "-c datestyle=ISO -c intervalstyle=iso_8601 -c timezone=UTC -c extra_float_digits=3 \
                               -c bytea_output=hex -c search_path=pg_catalog -c client_min_messages=warning";

/// A transport with a buffer that whole messages are taken from.
pub(super) struct MessageStream {
    pub(super) transport: Transport,
    pub(super) buffer: BytesMut,
    /// For errors: where and as whom.
    pub(super) target: String,
    user: String,
}

impl MessageStream {
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        let sent = self.transport.write_all(bytes).await;
        match sent {
            Ok(()) => self.transport.flush().await.map_err(|error| self.lost(&error.to_string())),
            Err(error) => Err(self.lost(&error.to_string())),
        }
    }

    pub(super) fn lost(&self, reason: &str) -> SourceError {
        SourceError::Lost { during: format!("replication connection to {}", self.target), reason: reason.to_owned() }
    }

    /// Fills the buffer until a whole message stands at its front; returns its tag.
    pub(super) async fn wait_for_message(&mut self) -> Result<u8, SourceError> {
        loop {
            if let Some((header, rest)) = self.buffer.split_at_checked(5) {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
                    let reason = format!("a message length of {length}");
                    return Err(SourceError::Protocol { what: "replication connection", offset: 1, reason });
                }
                if rest.len() >= length - 4 {
                    return Ok(header[0]);
                }
            }
            match self.transport.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(self.lost("closed by the server")),
                Ok(_) => {}
                Err(error) if error.get_ref().is_some_and(|inner| inner.is::<ClearTextRefused>()) => {
                    return Err(SourceError::Auth {
                        user: self.user.clone(),
                        target: self.target.clone(),
                        reason: error.to_string(),
                    });
                }
                Err(error) => return Err(self.lost(&error.to_string())),
            }
        }
    }

    /// The next message that is no notice and no parameter. An error of the server is an `Err`.
    pub(super) async fn next(&mut self, during: &str) -> Result<Message, SourceError> {
        loop {
            let tag = self.wait_for_message().await?;
            if matches!(tag, b'S' | b'N' | b'v') {
                self.skip_message();
                continue;
            }
            let parsed = Message::parse(&mut self.buffer);
            return match parsed {
                Ok(Some(Message::ErrorResponse(body))) => Err(server_error(during, &body)),
                Ok(Some(message)) => Ok(message),
                Ok(None) => Err(self.lost("a message ended early")),
                Err(error) => {
                    Err(SourceError::Protocol { what: "replication connection", offset: 0, reason: error.to_string() })
                }
            };
        }
    }

    /// Drops the whole message at the front of the buffer.
    pub(super) fn skip_message(&mut self) {
        let length = u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
        self.buffer.advance(1 + length);
    }
}

/// The server's words, without DETAIL.
pub(super) fn server_error(during: &str, body: &ErrorResponseBody) -> SourceError {
    use tokio_postgres::fallible_iterator::FallibleIterator;
    let mut error = ServerError { sqlstate: String::new(), message: String::new(), hint: None };
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let text = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => error.sqlstate = text(),
            b'M' => error.message = text(),
            b'H' => error.hint = Some(text()),
            _ => {}
        }
    }
    if is_shutdown(&error.sqlstate) {
        return SourceError::ShuttingDown { sqlstate: error.sqlstate };
    }
    SourceError::Server { during: during.to_owned(), error }
}

/// Startup and authentication; returns when the server is ready for commands.
pub(super) async fn start(config: &ConnectConfig, transport: Transport) -> Result<MessageStream, SourceError> {
    let mut stream = MessageStream {
        transport,
        buffer: BytesMut::with_capacity(16 << 10),
        target: config.target(),
        user: config.user.clone(),
    };
    let mut out = BytesMut::new();
    let parameters = [
        ("user", config.user.as_str()),
        ("database", config.dbname.as_str()),
        ("replication", "database"),
        ("application_name", config.application_name.as_str()),
        ("client_encoding", "UTF8"),
        ("options", SESSION_OPTIONS),
    ];
    frontend::startup_message(parameters, &mut out).map_err(|error| auth_error(config, error.to_string()))?;
    stream.send(&out).await?;
    authenticate(config, &mut stream).await?;
    let during = format!("connecting to {}", config.target());
    loop {
        // BackendKeyData has no fixed length in newer protocols and is not needed.
        if stream.wait_for_message().await? == b'K' {
            stream.skip_message();
            continue;
        }
        if let Message::ReadyForQuery(_) = stream.next(&during).await? {
            return Ok(stream);
        }
    }
}

async fn authenticate(config: &ConnectConfig, stream: &mut MessageStream) -> Result<(), SourceError> {
    let during = format!("connecting to {}", config.target());
    let unbound_refused = || -> Result<(), SourceError> {
        if config.channel_binding == ChannelBinding::Require {
            return Err(auth_error(config, "channel_binding=require, but the server did not use it".into()));
        }
        Ok(())
    };
    let password = || -> Result<&str, SourceError> {
        config
            .password
            .as_deref()
            .ok_or_else(|| auth_error(config, "the server asks for a password and the dsn has none".into()))
    };
    let mut out = BytesMut::new();
    match stream.next(&during).await? {
        Message::AuthenticationOk => return unbound_refused(),
        Message::AuthenticationCleartextPassword => {
            unbound_refused()?;
            if !stream.transport.is_private() && !config.allow_cleartext_password {
                return Err(auth_error(config, ClearTextRefused.to_string()));
            }
            frontend::password_message(password()?.as_bytes(), &mut out)
                .map_err(|error| auth_error(config, error.to_string()))?;
            stream.send(&out).await?;
        }
        Message::AuthenticationMd5Password(body) => {
            unbound_refused()?;
            let answer = md5_hash(config.user.as_bytes(), password()?.as_bytes(), body.salt());
            frontend::password_message(answer.as_bytes(), &mut out)
                .map_err(|error| auth_error(config, error.to_string()))?;
            stream.send(&out).await?;
        }
        Message::AuthenticationSasl(body) => {
            let mut mechanisms = Vec::new();
            let mut offered = body.mechanisms();
            use tokio_postgres::fallible_iterator::FallibleIterator;
            while let Ok(Some(mechanism)) = offered.next() {
                mechanisms.push(mechanism.to_owned());
            }
            scram(config, stream, &mechanisms, password()?).await?;
        }
        _ => {
            let reason = "the server asks for a method other than password, md5, scram-sha-256, cert or trust";
            return Err(auth_error(config, reason.into()));
        }
    }
    match stream.next(&during).await? {
        Message::AuthenticationOk => Ok(()),
        _ => Err(auth_error(config, "the server did not finish the exchange".into())),
    }
}

async fn scram(
    config: &ConnectConfig,
    stream: &mut MessageStream,
    mechanisms: &[String],
    password: &str,
) -> Result<(), SourceError> {
    let during = format!("connecting to {}", config.target());
    let failed = |error: std::io::Error| auth_error(config, format!("SCRAM: {error}"));
    let offers = |name: &str| mechanisms.iter().any(|mechanism| mechanism == name);
    let end_point = stream.transport.end_point.clone().filter(|_| config.channel_binding != ChannelBinding::Disable);
    let (binding, mechanism) = match end_point {
        Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => {
            (sasl::ChannelBinding::tls_server_end_point(hash), sasl::SCRAM_SHA_256_PLUS)
        }
        // "We could, you did not offer": the server refuses when it did, so nobody can strip the offer on the way.
        Some(_) if offers(sasl::SCRAM_SHA_256) => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
        None if offers(sasl::SCRAM_SHA_256) => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
        _ => return Err(auth_error(config, "the server offers no SCRAM mechanism that we know".into())),
    };
    if mechanism != sasl::SCRAM_SHA_256_PLUS && config.channel_binding == ChannelBinding::Require {
        return Err(auth_error(config, "channel_binding=require, but it cannot be used on this connection".into()));
    }
    let mut exchange = sasl::ScramSha256::new(password.as_bytes(), binding);
    let mut out = BytesMut::new();
    frontend::sasl_initial_response(mechanism, exchange.message(), &mut out).map_err(failed)?;
    stream.send(&out).await?;
    let Message::AuthenticationSaslContinue(body) = stream.next(&during).await? else {
        return Err(auth_error(config, "SCRAM: the server did not continue".into()));
    };
    exchange.update(body.data()).map_err(failed)?;
    out.clear();
    frontend::sasl_response(exchange.message(), &mut out).map_err(failed)?;
    stream.send(&out).await?;
    let Message::AuthenticationSaslFinal(body) = stream.next(&during).await? else {
        return Err(auth_error(config, "SCRAM: the server did not prove that it knows the password".into()));
    };
    exchange.finish(body.data()).map_err(failed)
}
