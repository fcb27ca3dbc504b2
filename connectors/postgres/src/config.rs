//! The sink's settings: where it connects, how, and which schema a source table goes to.

use std::fmt;
use std::time::Duration;

use tokio_postgres::config::SslMode as TransportMode;
use tokio_postgres_rustls::MakeRustlsConnect;
use wallaby_connector_api::{Faults, SinkError};
use wallaby_model::TableName;
use wallaby_model::flow::{PostgresSinkSpec, SinkMode};
use wallaby_postgres_dsn::{ConfigError, SslMode, TlsSettings, key_values, pairs};

/// A server that does not answer within this is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time before the first TCP keepalive, so that a peer that vanished is noticed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);

/// Everything the sink needs to know, checked.
#[derive(Clone)]
pub struct PostgresSinkConfig {
    pub(crate) connection: tokio_postgres::Config,
    tls: TlsSettings,
    schema: String,
    pub(crate) faults: Faults,
}

impl fmt::Debug for PostgresSinkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresSinkConfig")
            .field("target", &self.target())
            .field("schema", &self.schema)
            .finish_non_exhaustive()
    }
}

impl PostgresSinkConfig {
    /// Reads the resolved `dsn`, a `postgres://` URL or a libpq key-value string, and checks the spec.
    ///
    /// Beside tokio-postgres' parameters it knows libpq's `sslmode` in all six values, `sslrootcert` (a PEM file or
    /// `system`), `sslcert` and `sslkey`.
    ///
    /// # Errors
    /// `Configuration`, naming the parameter and never the dsn, which is a secret.
    pub fn new(dsn: &str, spec: &PostgresSinkSpec) -> Result<PostgresSinkConfig, SinkError> {
        let SinkMode::Upsert = spec.mode;
        check_template(&spec.schema)?;
        let (plain, tls) = split_tls(dsn).map_err(|error| refused(format!("the sink's {error}")))?;
        let mut connection: tokio_postgres::Config = plain.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            refused(format!("the sink's dsn cannot be read: {cause}"))
        })?;
        connection.ssl_mode(transport_mode(tls.mode));
        if connection.get_connect_timeout().is_none() {
            connection.connect_timeout(CONNECT_TIMEOUT);
        }
        connection.keepalives_idle(KEEPALIVE_IDLE).keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
        if connection.get_hosts().is_empty() {
            return Err(refused("the sink's dsn names no host".to_owned()));
        }
        Ok(PostgresSinkConfig { connection, tls, schema: spec.schema.clone(), faults: Faults::default() })
    }

    /// The same settings with faults that tests and failpoints inject.
    #[must_use]
    pub fn with_faults(self, faults: Faults) -> Self {
        PostgresSinkConfig { faults, ..self }
    }

    /// Whether every table goes to one of its own name, so that in the source's own database it would be itself.
    pub(crate) fn keeps_names(&self) -> bool {
        ["a", "b"].iter().all(|schema| {
            let table = TableName::new(*schema, "t");
            self.target_table(&table) == table
        })
    }

    /// The table at the sink for a table of the source.
    pub fn target_table(&self, source: &TableName) -> TableName {
        let mut schema = String::with_capacity(self.schema.len());
        let mut rest = self.schema.as_str();
        while let Some((before, after)) = rest.split_once("{{") {
            schema.push_str(before);
            let (_, tail) = after.split_once("}}").unwrap_or(("", ""));
            schema.push_str(&source.schema);
            rest = tail;
        }
        schema.push_str(rest);
        TableName::new(schema, source.name.clone())
    }

    /// `user@host:port/database`, for messages.
    pub fn target(&self) -> String {
        use tokio_postgres::config::Host;
        let host = match self.connection.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            #[cfg(unix)]
            Some(Host::Unix(folder)) => folder.display().to_string(),
            None => String::new(),
        };
        let port = self.connection.get_ports().first().copied().unwrap_or(5432);
        let user = self.connection.get_user().unwrap_or("?");
        format!("{user}@{host}:{port}/{}", self.connection.get_dbname().unwrap_or(user))
    }

    /// The TLS connector. Reads the certificate files.
    pub(crate) fn connector(&self) -> Result<MakeRustlsConnect, SinkError> {
        let failed = |reason| SinkError::Configuration {
            reason: format!("the sink's TLS settings do not work: {reason}"),
            remedy: "Correct sslmode, sslrootcert, sslcert or sslkey in the sink's dsn".to_owned(),
        };
        Ok(MakeRustlsConnect::new(self.tls.client_config().map_err(failed)?))
    }

    /// The role that connects, for remedies.
    pub(crate) fn role(&self) -> &str {
        self.connection.get_user().unwrap_or("the sink's role")
    }
}

fn refused(reason: String) -> SinkError {
    SinkError::Configuration { reason, remedy: "Correct the sink's settings in the flow or its secret".to_owned() }
}

/// Only `{{ .schema }}` is known, and there must be something left to call a schema.
fn check_template(template: &str) -> Result<(), SinkError> {
    let mut rest = template;
    while let Some((_, after)) = rest.split_once("{{") {
        let Some((name, tail)) = after.split_once("}}") else {
            return Err(refused(format!("the sink's schema {template:?} opens {{{{ and does not close it")));
        };
        if name.trim() != ".schema" {
            let known = "{{ .schema }} is the only one";
            return Err(refused(format!("the sink's schema {template:?} has an unknown placeholder: {known}")));
        }
        rest = tail;
    }
    if template.trim().is_empty() {
        return Err(refused("the sink's schema is empty".to_owned()));
    }
    Ok(())
}

/// Takes the TLS parameters out of a dsn: tokio-postgres does not know them all.
fn split_tls(dsn: &str) -> Result<(String, TlsSettings), ConfigError> {
    let mut tls = TlsSettings::default();
    let mut plain = Vec::new();
    for pair in pairs(dsn)? {
        if !tls.take(&pair.0, &pair.1)? {
            plain.push(pair);
        }
    }
    tls.check()?;
    Ok((key_values(&plain), tls))
}

/// What tokio-postgres is told: it tries as libpq does, but for `allow`, which tries without first: for a server that takes both,
/// that is no TLS.
fn transport_mode(mode: SslMode) -> TransportMode {
    match mode {
        SslMode::Disable => TransportMode::Disable,
        SslMode::Allow | SslMode::Prefer => TransportMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => TransportMode::Require,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::flow::SecretRef;

    fn spec(schema: &str) -> PostgresSinkSpec {
        PostgresSinkSpec { dsn: SecretRef::Value(String::new()), schema: schema.to_owned(), mode: SinkMode::Upsert }
    }

    #[test]
    fn the_schema_template_is_filled() {
        let table = TableName::new("sales", "orders");
        for (template, expected) in [("{{ .schema }}", "sales"), ("dw", "dw"), ("raw_{{.schema}}_x", "raw_sales_x")] {
            let config = PostgresSinkConfig::new("postgres://a@b/c", &spec(template)).unwrap();
            assert_eq!(config.target_table(&table), TableName::new(expected, "orders"));
        }
        for bad in ["{{ .table }}", "{{ .schema", " "] {
            assert!(PostgresSinkConfig::new("postgres://a@b/c", &spec(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn tls_parameters_are_understood_in_both_forms() {
        let url = "postgres://a:s%20x@b:1/c?sslmode=verify-full&sslrootcert=%2Ftmp%2Fca.pem&options=-c%20x%3Dy";
        let words = r"host=b port=1 user=a password='s x' dbname=c sslmode=verify-full sslrootcert=/tmp/ca.pem";
        for dsn in [url, words] {
            let config = PostgresSinkConfig::new(dsn, &spec("x")).unwrap();
            assert_eq!(config.tls.mode, SslMode::VerifyFull, "{dsn}");
            assert_eq!(config.tls.root, Some(wallaby_postgres_dsn::RootCert::File("/tmp/ca.pem".into())));
            assert_eq!(config.connection.get_options(), dsn.contains("options").then_some("-c x=y"));
            assert_eq!(config.connection.get_password(), Some(&b"s x"[..]));
            assert_eq!(config.target(), "a@b:1/c");
        }
    }

    #[test]
    fn errors_and_debug_never_show_the_password() {
        for dsn in
            ["postgres://u:hunter2@h/d?sslmode=maybe", "host=h password='hunter2", "postgres://u:hunter2@h/d?x=y"]
        {
            let error = PostgresSinkConfig::new(dsn, &spec("x")).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        let config = PostgresSinkConfig::new("postgres://u:hunter2@h/d", &spec("x")).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
