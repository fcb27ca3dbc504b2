//! A byte stream to the server: TCP, Unix socket or TLS.
//!
//! Both connections of a flow, control and replication, run over a [`Transport`], so that `sslmode`, certificates,
//! time-outs and keepalives mean the same for both.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::{ConnectConfig, Host, SslMode};
use crate::error::SourceError;
use crate::socket::{Arrivals, WireSocket};
use crate::tls;

/// Whether one attempt to connect encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encryption {
    /// Plain.
    Off,
    /// TLS when the server agrees, else plain.
    Offered,
    /// TLS or nothing.
    Required,
}

/// The attempts that an `sslmode` allows, in order. Unix sockets never encrypt, as with libpq.
pub(crate) fn attempts(config: &ConnectConfig) -> &'static [Encryption] {
    match (&config.host, config.tls.mode) {
        (Host::Unix(_), _) | (_, SslMode::Disable) => &[Encryption::Off],
        (_, SslMode::Allow) => &[Encryption::Off, Encryption::Required],
        (_, SslMode::Prefer) => &[Encryption::Offered, Encryption::Off],
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[Encryption::Required],
    }
}

/// Whether the next attempt may help: the handshake failed or was cut off, or pg_hba.conf has no entry for this kind of
/// connection.
pub(crate) fn tries_next(error: &SourceError) -> bool {
    match error {
        SourceError::Tls { .. } => true,
        SourceError::Connect { error, .. } => {
            matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
        }
        error => error.sqlstate() == Some("28000"),
    }
}

enum Wire {
    Tcp(WireSocket),
    Unix(WireSocket),
    Tls(Box<TlsStream<WireSocket>>),
}

/// A connected byte stream.
pub(crate) struct Transport {
    wire: Wire,
    /// For SCRAM's channel binding, when the stream is TLS and the certificate has one.
    pub(crate) end_point: Option<Vec<u8>>,
    guard: ClearTextGuard,
}

/// Ends a connection from anywhere, whoever holds its halves and whatever they wait for.
pub(crate) struct Closer(Socket);

impl Closer {
    /// Ends both directions. Doing it twice does nothing.
    pub(crate) fn close(&self) {
        // The peer may have closed it first, which is all that can go wrong here.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl Transport {
    /// Connects. `receive_buffer` is set before the connection is made, because the window is agreed upon then.
    pub(crate) async fn connect(
        config: &ConnectConfig,
        encryption: Encryption,
        receive_buffer: Option<u32>,
    ) -> Result<Transport, SourceError> {
        let failed = |error: io::Error| SourceError::Connect { target: config.target(), error };
        match &config.host {
            Host::Unix(folder) => {
                let stream = UnixStream::connect(config.socket_path(folder)).await.map_err(failed)?;
                let stream = stream.into_std().and_then(WireSocket::new).map_err(failed)?;
                Ok(Transport { wire: Wire::Unix(stream), end_point: None, guard: ClearTextGuard::off() })
            }
            Host::Tcp(host) => {
                let stream = connect_tcp(config, host, receive_buffer).await.map_err(failed)?;
                negotiate(config, host, stream, encryption).await
            }
        }
    }

    /// Whether nobody on the way can read along.
    pub(crate) fn is_private(&self) -> bool {
        matches!(self.wire, Wire::Tls(_) | Wire::Unix(_))
    }

    /// Whether it is TLS.
    pub(crate) fn is_tls(&self) -> bool {
        matches!(self.wire, Wire::Tls(_))
    }

    /// A handle that ends the connection.
    pub(crate) fn closer(&self) -> io::Result<Closer> {
        self.socket().socket().try_clone().map(Closer)
    }

    /// Says whether the reader wants to be told of arrivals.
    pub(crate) fn arrivals(&self) -> Arrivals {
        self.socket().arrivals()
    }

    fn socket(&self) -> &WireSocket {
        match &self.wire {
            Wire::Tcp(socket) | Wire::Unix(socket) => socket,
            Wire::Tls(stream) => stream.get_ref().0,
        }
    }
}

async fn connect_tcp(config: &ConnectConfig, host: &str, receive_buffer: Option<u32>) -> io::Result<WireSocket> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, config.port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_nodelay(true)?;
        if let Some(bytes) = receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        match socket.connect(address).await {
            Ok(stream) => {
                if config.keepalives.enabled {
                    let keepalive = TcpKeepalive::new()
                        .with_time(config.keepalives.idle)
                        .with_interval(config.keepalives.interval)
                        .with_retries(config.keepalives.count);
                    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
                }
                return WireSocket::new(stream.into_std()?);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn negotiate(
    config: &ConnectConfig,
    host: &str,
    mut stream: WireSocket,
    encryption: Encryption,
) -> Result<Transport, SourceError> {
    let lost = |error: io::Error| SourceError::Connect { target: config.target(), error };
    let plain = |stream| Transport {
        wire: Wire::Tcp(stream),
        end_point: None,
        guard: if config.allow_cleartext_password { ClearTextGuard::off() } else { ClearTextGuard::on() },
    };
    if encryption == Encryption::Off {
        return Ok(plain(stream));
    }
    let mut request = bytes::BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(lost)?;
    // Exactly one byte is read here: more would be bytes that somebody smuggled in before the handshake.
    let answer = stream.read_u8().await.map_err(lost)?;
    let refused = |reason: &str| SourceError::Tls { target: config.target(), reason: reason.into() };
    match answer {
        b'S' => {}
        b'N' if encryption == Encryption::Offered => return Ok(plain(stream)),
        b'N' => return Err(refused("the server does not offer TLS (ssl = off)")),
        // What an overloaded server says before it has come to know what was asked. The text is nobody's: no TLS yet.
        b'E' => return Err(lost(io::Error::other("the server answered the request for TLS with an error"))),
        _ => return Err(refused("the server did not answer the request for TLS; is it PostgreSQL?")),
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|error| refused(&format!("host: {error}")))?;
    let failed = |reason| SourceError::Tls { target: config.target(), reason };
    let connector = TlsConnector::from(Arc::new(config.tls.client_config().map_err(failed)?));
    let stream = connector.connect(name, stream).await.map_err(|error| match error.kind() {
        // What TLS itself makes of certificates and messages; all else is the wire's.
        io::ErrorKind::InvalidData => refused(&error.to_string()),
        _ => lost(error),
    })?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let end_point = certificate.and_then(|certificate| tls::server_end_point(certificate));
    Ok(Transport { wire: Wire::Tls(Box::new(stream)), end_point, guard: ClearTextGuard::off() })
}

/// Watches the server's first message: a request for a password in clear over an open wire is an error *before* the
/// client, whichever it is, sees it and answers.
struct ClearTextGuard {
    watching: bool,
    seen: Vec<u8>,
}

/// AuthenticationCleartextPassword.
const CLEAR_TEXT_REQUEST: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 3];

/// The error of [`ClearTextGuard`], found again inside of other errors.
#[derive(Debug, thiserror::Error)]
#[error(
    "the server asks for the password in clear text over an unencrypted connection; use sslmode=require, \
     scram-sha-256 in pg_hba.conf, or allow_cleartext_password=true in the dsn"
)]
pub(crate) struct ClearTextRefused;

impl ClearTextGuard {
    fn on() -> ClearTextGuard {
        ClearTextGuard { watching: true, seen: Vec::new() }
    }

    fn off() -> ClearTextGuard {
        ClearTextGuard { watching: false, seen: Vec::new() }
    }

    fn look(&mut self, bytes: &[u8]) -> io::Result<()> {
        let wanted = CLEAR_TEXT_REQUEST.len() - self.seen.len();
        self.seen.extend_from_slice(&bytes[..bytes.len().min(wanted)]);
        if self.seen == CLEAR_TEXT_REQUEST {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, ClearTextRefused));
        }
        self.watching = self.seen.len() < CLEAR_TEXT_REQUEST.len();
        Ok(())
    }
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let polled = match &mut this.wire {
            Wire::Tcp(stream) | Wire::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        };
        if this.guard.watching && polled.is_ready() {
            this.guard.look(&buf.filled()[before..])?;
        }
        polled
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Tcp(stream) | Wire::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Tcp(stream) | Wire::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Tcp(stream) | Wire::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
impl Closer {
    /// For tests of what closes connections.
    pub(crate) fn of_unix(stream: &UnixStream) -> io::Result<Closer> {
        SockRef::from(stream).try_clone().map(Closer)
    }
}
