//! Connection settings from a `postgres://` URL or a libpq key-value string.
//!
//! libpq's names and meanings are kept where they exist. What is unknown is refused by name: a setting that is silently
//! ignored, such as a misspelt `sslmode`, would connect in a way nobody asked for. Errors name the parameter, never
//! its value: a dsn is a secret.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use wallaby_postgres_dsn::{ConfigError, SslMode, TlsSettings};

mod dsn;

/// Whether SCRAM is bound to the TLS channel; libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// When the server can.
    #[default]
    Prefer,
    /// Always, or there is no connection.
    Require,
}

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A name or an address.
    Tcp(String),
    /// The folder of a Unix socket.
    Unix(PathBuf),
}

/// TCP keepalives, so that a peer that vanished is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalives {
    /// Whether they are sent.
    pub enabled: bool,
    /// Idle time before the first.
    pub idle: Duration,
    /// Time between them.
    pub interval: Duration,
    /// How many may stay unanswered.
    pub count: u32,
}

/// Everything needed to connect.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectConfig {
    pub(crate) host: Host,
    pub(crate) port: u16,
    pub(crate) user: String,
    pub(crate) password: Option<String>,
    pub(crate) dbname: String,
    pub(crate) application_name: String,
    pub(crate) tls: TlsSettings,
    pub(crate) channel_binding: ChannelBinding,
    pub(crate) connect_timeout: Duration,
    pub(crate) keepalives: Keepalives,
    pub(crate) allow_cleartext_password: bool,
}

impl ConnectConfig {
    /// What is taken beside [`TlsSettings::PARAMETERS`]. docs/operations.md says what each is; all but `allow_cleartext_password`, which
    /// is ours, are libpq's.
    pub const PARAMETERS: [&str; 15] = [
        "host",
        "hostaddr",
        "port",
        "user",
        "password",
        "dbname",
        "application_name",
        "fallback_application_name",
        "channel_binding",
        "connect_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "allow_cleartext_password",
    ];

    /// Reads a `postgres://user:password@host:port/dbname?parameter=value` URL or a `host=… user=…` string of
    /// [`ConnectConfig::PARAMETERS`].
    ///
    /// # Errors
    /// Names the parameter that is unknown, missing or out of range.
    pub fn parse(dsn: &str) -> Result<ConnectConfig, ConfigError> {
        dsn::parse(dsn)
    }

    /// The same connection under another `application_name`.
    #[must_use]
    pub fn with_application_name(&self, name: &str) -> ConnectConfig {
        ConnectConfig { application_name: name.to_owned(), ..self.clone() }
    }

    /// Where the server listens.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port, also part of a Unix socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The role.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// The session's name.
    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    /// How TLS is used.
    pub fn sslmode(&self) -> SslMode {
        self.tls.mode
    }

    /// `host:port` or the path of the socket, for messages.
    pub fn target(&self) -> String {
        match &self.host {
            Host::Tcp(host) if host.contains(':') => format!("[{host}]:{}", self.port),
            Host::Tcp(host) => format!("{host}:{}", self.port),
            Host::Unix(folder) => self.socket_path(folder).display().to_string(),
        }
    }

    pub(crate) fn socket_path(&self, folder: &std::path::Path) -> PathBuf {
        folder.join(format!(".s.PGSQL.{}", self.port))
    }
}

impl fmt::Debug for ConnectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectConfig")
            .field("target", &self.target())
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "(hidden)"))
            .field("dbname", &self.dbname)
            .field("application_name", &self.application_name)
            .field("sslmode", &self.tls.mode)
            .field("channel_binding", &self.channel_binding)
            .finish_non_exhaustive()
    }
}
