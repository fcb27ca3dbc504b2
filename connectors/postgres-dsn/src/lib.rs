//! Postgres connection strings and TLS by `sslmode`: what source and sink read alike.
//!
//! libpq's names and meanings are kept. [`pairs`] reads both spellings; [`TlsSettings`] takes the parameters that are about TLS,
//! checks that they go together, and makes the client's settings of them. Errors name the parameter, never its value: a dsn is
//! a secret.

mod pairs;
mod tls;

pub use pairs::{Pairs, key_values, pairs};
pub use tls::{RootCert, SslMode, TlsSettings};

/// Why a connection string is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text as a whole has no readable form.
    #[error("the dsn cannot be read: {0}")]
    Form(&'static str),
    /// A parameter that we do not know.
    #[error("dsn parameter {0:?} is unknown")]
    Unknown(String),
    /// A parameter with a value that does not fit.
    #[error("dsn parameter {name}: {reason}")]
    Value {
        /// The parameter.
        name: &'static str,
        /// What it must be.
        reason: String,
    },
    /// A parameter that is needed.
    #[error("dsn parameter {0} is missing")]
    Missing(&'static str),
}

impl ConfigError {
    /// A parameter with a value that does not fit.
    pub fn value(name: &'static str, reason: impl Into<String>) -> ConfigError {
        ConfigError::Value { name, reason: reason.into() }
    }
}
