//! The sink's settings: where it connects, how, and which schema a source table goes to.

use std::fmt;
use std::time::Duration;

use tokio_postgres::config::SslMode as TransportMode;
use wallaby_connector_api::{Faults, SinkError};
use wallaby_model::TableName;
use wallaby_model::flow::{PostgresSinkSpec, SinkMode};

use crate::tls::{Tls, Verify};

/// A server that does not answer within this is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time before the first TCP keepalive, so that a peer that vanished is noticed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);

/// Everything the sink needs to know, checked.
#[derive(Clone)]
pub struct PostgresSinkConfig {
    pub(crate) connection: tokio_postgres::Config,
    pub(crate) tls: Tls,
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
        let (plain, tls) = split_tls(dsn)?;
        let mut connection: tokio_postgres::Config = plain.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            refused(format!("the sink's dsn cannot be read: {cause}"))
        })?;
        connection.ssl_mode(tls.transport_mode());
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
fn split_tls(dsn: &str) -> Result<(String, Tls), SinkError> {
    let mut tls = Tls::default();
    let is_url = dsn.starts_with("postgres://") || dsn.starts_with("postgresql://");
    if is_url {
        let Some((base, query)) = dsn.split_once('?') else { return Ok((dsn.to_owned(), tls)) };
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !take_tls(&mut tls, name, &percent_decoded(value)?)? {
                kept.push(pair);
            }
        }
        let query = kept.join("&");
        let plain = if query.is_empty() { base.to_owned() } else { format!("{base}?{query}") };
        return Ok((plain, tls));
    }
    let mut plain = String::new();
    for (name, value) in key_values(dsn)? {
        if !take_tls(&mut tls, &name, &value)? {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            plain.push_str(&format!("{name}='{quoted}' "));
        }
    }
    Ok((plain, tls))
}

fn take_tls(tls: &mut Tls, name: &str, value: &str) -> Result<bool, SinkError> {
    match name {
        "sslmode" => {
            (tls.mode, tls.verify) = match value {
                "disable" => (TransportMode::Disable, Verify::Nothing),
                // libpq's `allow` tries without first: for a server that takes both, that is no TLS.
                "allow" | "prefer" => (TransportMode::Prefer, Verify::Nothing),
                "require" => (TransportMode::Require, Verify::Nothing),
                "verify-ca" => (TransportMode::Require, Verify::Authority),
                "verify-full" => (TransportMode::Require, Verify::Host),
                _ => {
                    let known = "disable, allow, prefer, require, verify-ca or verify-full";
                    return Err(refused(format!("the sink's dsn parameter sslmode must be {known}")));
                }
            };
        }
        "sslrootcert" => tls.root = Some(value.to_owned()),
        "sslcert" => tls.certificate = Some(value.into()),
        "sslkey" => tls.key = Some(value.into()),
        _ => return Ok(false),
    }
    Ok(true)
}

fn percent_decoded(text: &str) -> Result<String, SinkError> {
    let bad = || refused("the sink's dsn has a broken % escape".to_owned());
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
        let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
        out.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
    }
    String::from_utf8(out).map_err(|_| bad())
}

/// libpq's `name = 'va\'lue'` pairs.
fn key_values(dsn: &str) -> Result<Vec<(String, String)>, SinkError> {
    let bad = || refused("the sink's dsn is neither a postgres:// URL nor key=value pairs".to_owned());
    let mut pairs = Vec::new();
    let mut rest = dsn.trim();
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=').ok_or_else(bad)?;
        let after = after.trim_start();
        let quoted = after.starts_with('\'');
        let mut value = String::new();
        let mut end = after.len();
        let mut escaped = false;
        let mut closed = !quoted;
        for (at, letter) in after.char_indices().skip(usize::from(quoted)) {
            match letter {
                _ if escaped => {
                    value.push(letter);
                    escaped = false;
                }
                '\\' => escaped = true,
                '\'' if quoted => {
                    (closed, end) = (true, at + 1);
                    break;
                }
                _ if !quoted && letter.is_whitespace() => {
                    end = at;
                    break;
                }
                _ => value.push(letter),
            }
        }
        if !closed || escaped {
            return Err(bad());
        }
        pairs.push((name.trim().to_owned(), value));
        rest = after[end..].trim_start();
    }
    Ok(pairs)
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
            assert_eq!(config.tls.verify, Verify::Host, "{dsn}");
            assert_eq!(config.tls.root.as_deref(), Some("/tmp/ca.pem"));
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
