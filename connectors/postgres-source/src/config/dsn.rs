//! The meaning of each parameter of the source's connection string.

use std::time::Duration;

use wallaby_postgres_dsn::{Pairs, SslMode, TlsSettings};

use super::{ChannelBinding, ConfigError, ConnectConfig, Host, Keepalives};

/// Reads either spelling.
pub(super) fn parse(dsn: &str) -> Result<ConnectConfig, ConfigError> {
    build(wallaby_postgres_dsn::pairs(dsn)?)
}

fn build(pairs: Pairs) -> Result<ConnectConfig, ConfigError> {
    let mut host = None;
    let mut user = None;
    let mut dbname = None;
    let mut config = ConnectConfig {
        host: Host::Tcp(String::new()),
        port: 5432,
        user: String::new(),
        password: None,
        dbname: String::new(),
        application_name: "wallaby".into(),
        tls: TlsSettings::default(),
        channel_binding: ChannelBinding::default(),
        connect_timeout: Duration::from_secs(10),
        keepalives: Keepalives {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
        },
        allow_cleartext_password: false,
    };
    for (name, value) in pairs {
        if config.tls.take(&name, &value)? {
            continue;
        }
        if !ConnectConfig::PARAMETERS.contains(&name.as_str()) {
            return Err(ConfigError::Unknown(name));
        }
        match name.as_str() {
            "host" | "hostaddr" => host = Some(parse_host(value)?),
            "port" => config.port = number("port", &value, 1, u64::from(u16::MAX))? as u16,
            "user" => user = Some(without_nul("user", value)?),
            "password" => config.password = Some(without_nul("password", value)?),
            "dbname" => dbname = Some(without_nul("dbname", value)?),
            "application_name" | "fallback_application_name" => {
                config.application_name = without_nul("application_name", value)?
            }
            "channel_binding" => config.channel_binding = channel_binding(&value)?,
            "connect_timeout" => {
                config.connect_timeout = Duration::from_secs(number("connect_timeout", &value, 1, 3600)?)
            }
            "keepalives" => config.keepalives.enabled = number("keepalives", &value, 0, 1)? == 1,
            "keepalives_idle" => {
                config.keepalives.idle = Duration::from_secs(number("keepalives_idle", &value, 1, 86_400)?)
            }
            "keepalives_interval" => {
                config.keepalives.interval = Duration::from_secs(number("keepalives_interval", &value, 1, 86_400)?);
            }
            "keepalives_count" => config.keepalives.count = number("keepalives_count", &value, 1, 127)? as u32,
            "allow_cleartext_password" => {
                config.allow_cleartext_password = match value.as_str() {
                    "true" | "1" => true,
                    "false" | "0" => false,
                    _ => return Err(ConfigError::value("allow_cleartext_password", "must be true or false")),
                }
            }
            _ => return Err(ConfigError::Unknown(name)),
        }
    }
    config.host = host.ok_or(ConfigError::Missing("host"))?;
    config.user = user.filter(|user| !user.is_empty()).ok_or(ConfigError::Missing("user"))?;
    config.dbname = dbname.filter(|dbname| !dbname.is_empty()).unwrap_or_else(|| config.user.clone());
    config.tls.check()?;
    if config.channel_binding == ChannelBinding::Require && config.tls.mode == SslMode::Disable {
        return Err(ConfigError::value("channel_binding", "require needs TLS, and sslmode is disable"));
    }
    Ok(config)
}

fn without_nul(name: &'static str, value: String) -> Result<String, ConfigError> {
    if value.contains('\0') { Err(ConfigError::value(name, "must not hold a zero byte")) } else { Ok(value) }
}

fn parse_host(value: String) -> Result<Host, ConfigError> {
    if value.contains(',') {
        return Err(ConfigError::value("host", "one host only: logical decoding reads one server"));
    }
    if value.is_empty() {
        return Err(ConfigError::Missing("host"));
    }
    Ok(if value.starts_with('/') { Host::Unix(value.into()) } else { Host::Tcp(value) })
}

fn number(name: &'static str, text: &str, least: u64, most: u64) -> Result<u64, ConfigError> {
    let parsed = text.parse::<u64>().ok().filter(|number| (least..=most).contains(number));
    parsed.ok_or_else(|| ConfigError::Value { name, reason: format!("must be a whole number from {least} to {most}") })
}

fn channel_binding(text: &str) -> Result<ChannelBinding, ConfigError> {
    Ok(match text {
        "disable" => ChannelBinding::Disable,
        "prefer" => ChannelBinding::Prefer,
        "require" => ChannelBinding::Require,
        _ => return Err(ConfigError::value("channel_binding", "must be disable, prefer or require")),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn both_spellings_say_the_same() {
        let url =
            parse("postgres://wal%40by:s%20ecret@db.example:5433/sh%2Fop?sslmode=require&application_name=x").unwrap();
        let pairs = parse(r"host=db.example port = 5433 user=wal@by password='s ecret' dbname=sh/op sslmode=require application_name=x").unwrap();
        assert_eq!(url, pairs);
        assert_eq!(url.password.as_deref(), Some("s ecret"));
        assert_eq!(url.target(), "db.example:5433");
    }

    #[test]
    fn unix_sockets_and_addresses() {
        let socket = parse("postgres:///shop?host=/run/pg&user=u").unwrap();
        assert_eq!(socket.target(), "/run/pg/.s.PGSQL.5432");
        assert_eq!(parse("postgres://u@%2Frun%2Fpg/shop").unwrap().host, Host::Unix("/run/pg".into()));
        assert_eq!(parse("postgres://u@[::1]:7/d").unwrap().target(), "[::1]:7");
        assert_eq!(parse("postgres://u@h").unwrap().dbname, "u");
    }

    #[test]
    fn errors_name_the_parameter_and_hide_values() {
        let secret = "hunter2";
        let cases = [
            ("host=h user=u password=hunter2 sslmod=require", "sslmod"),
            ("host=h user=u password=hunter2 port=hunter2", "port"),
            ("host=h password=hunter2", "user"),
            ("user=u password=hunter2", "host"),
            ("postgres://u:hunter2@h/d?sslmode=hunter2", "sslmode"),
            ("postgres://u:hunter2@a,b/d", "host"),
            ("postgres://u:hunter2@h/d?sslcert=x", "sslkey"),
            ("postgres://u:hunter2@h/d?sslmode=verify-ca", "sslrootcert"),
            ("postgres://u:hunter2@h/d?sslmode=disable&channel_binding=require", "channel_binding"),
            ("host=h user=u password='hunter2", "quote"),
            ("mysql://u:hunter2@h/d", "postgres://"),
        ];
        for (dsn, named) in cases {
            let message = parse(dsn).unwrap_err().to_string();
            assert!(message.contains(named), "{dsn}: {message}");
            assert!(!message.contains(secret), "{message}");
        }
    }

    #[test]
    fn debug_hides_the_password() {
        let shown = format!("{:?}", parse("postgres://u:hunter2@h/d").unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("(hidden)"), "{shown}");
    }
}
