//! How etcd is reached.

use std::fmt;
use std::time::Duration;

/// Settings of the connection to etcd.
#[derive(Clone)]
pub struct Options {
    /// What every key starts with. Tests take their own.
    pub prefix: String,
    /// How long [`crate::Coordination::connect`] tries before it says that etcd cannot be reached.
    pub connect_timeout: Duration,
    /// How long one attempt of one request may take.
    pub request_timeout: Duration,
    /// How long a request is repeated, on one endpoint after the other, before it fails as unreachable.
    pub retry_for: Duration,
    /// Name and password, where etcd asks for them.
    pub user: Option<(String, String)>,
    /// TLS, for `https://` endpoints.
    pub tls: Option<Tls>,
}

/// TLS material, PEM.
#[derive(Clone, Default)]
pub struct Tls {
    /// The authority that signed the servers' certificates; the platform's when absent.
    pub ca_pem: Option<Vec<u8>>,
    /// Our certificate and key.
    pub identity_pem: Option<(Vec<u8>, Vec<u8>)>,
    /// The name that the servers' certificates carry, when it is not the endpoint's host.
    pub domain: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            prefix: "/wallaby".to_owned(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            retry_for: Duration::from_secs(8),
            user: None,
            tls: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("prefix", &self.prefix)
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("retry_for", &self.retry_for)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("tls", &self.tls.is_some())
            .finish()
    }
}
