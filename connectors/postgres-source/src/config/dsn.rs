//! The two spellings of a connection string, and the meaning of each parameter.

use std::time::Duration;

use super::{ChannelBinding, ConfigError, ConnectConfig, Host, Keepalives, RootCert, SslMode};

/// Reads either spelling.
pub(super) fn parse(dsn: &str) -> Result<ConnectConfig, ConfigError> {
    let pairs = match dsn.strip_prefix("postgres://").or_else(|| dsn.strip_prefix("postgresql://")) {
        Some(rest) => url_pairs(rest)?,
        None if dsn.contains("://") => {
            return Err(ConfigError::Form("a URL must begin with postgres:// or postgresql://"));
        }
        None => key_value_pairs(dsn)?,
    };
    build(pairs)
}

type Pairs = Vec<(String, String)>;

fn url_pairs(rest: &str) -> Result<Pairs, ConfigError> {
    let (before_query, query) = match rest.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = match before_query.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (before_query, None),
    };
    let mut pairs = Pairs::new();
    let mut put = |name: &str, raw: &str| -> Result<(), ConfigError> {
        if !raw.is_empty() {
            pairs.push((name.to_owned(), percent_decode(raw)?));
        }
        Ok(())
    };
    let host_port = match authority.rsplit_once('@') {
        Some((credentials, host_port)) => {
            match credentials.split_once(':') {
                Some((user, password)) => {
                    put("user", user)?;
                    put("password", password)?;
                }
                None => put("user", credentials)?,
            }
            host_port
        }
        None => authority,
    };
    if host_port.contains(',') {
        return Err(ConfigError::Value {
            name: "host",
            reason: "one host only: logical decoding reads one server".into(),
        });
    }
    let (host, port) = if let Some(inner) = host_port.strip_prefix('[') {
        let (address, after) = inner.split_once(']').ok_or(ConfigError::Form("an address in [ has no ]"))?;
        (address, after.strip_prefix(':').unwrap_or(""))
    } else {
        host_port.split_once(':').unwrap_or((host_port, ""))
    };
    put("host", host)?;
    put("port", port)?;
    put("dbname", path.unwrap_or(""))?;
    for parameter in query.unwrap_or("").split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or(ConfigError::Form("a parameter after ? has no ="))?;
        pairs.push((percent_decode(name)?, percent_decode(value)?));
    }
    Ok(pairs)
}

fn percent_decode(text: &str) -> Result<String, ConfigError> {
    let bad = ConfigError::Form("a % is not followed by two hexadecimal digits of UTF-8 text");
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|digit| (digit as char).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return Err(bad),
        }
    }
    String::from_utf8(out).map_err(|_| bad)
}

/// `name = value` separated by blanks; values may stand in single quotes; `\` takes the next character as it is.
fn key_value_pairs(text: &str) -> Result<Pairs, ConfigError> {
    let mut pairs = Pairs::new();
    let mut rest = text.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.peek().is_none() {
            return Ok(pairs);
        }
        let mut name = String::new();
        while let Some(c) = rest.next_if(|c| !c.is_whitespace() && *c != '=') {
            name.push(c);
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.next() != Some('=') {
            return Err(ConfigError::Form("expected postgres://… or name=value pairs: a name has no ="));
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = rest.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match rest.next() {
                Some('\\') => value.extend(rest.next()),
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_whitespace() => break,
                Some(c) => value.push(c),
                None if quoted => return Err(ConfigError::Form("a quoted value has no closing quote")),
                None => break,
            }
        }
        pairs.push((name, value));
    }
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
        sslmode: SslMode::default(),
        sslrootcert: None,
        sslcert: None,
        sslkey: None,
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
        match name.as_str() {
            "host" | "hostaddr" => host = Some(parse_host(value)?),
            "port" => config.port = number("port", &value, 1, u64::from(u16::MAX))? as u16,
            "user" => user = Some(without_nul("user", value)?),
            "password" => config.password = Some(without_nul("password", value)?),
            "dbname" => dbname = Some(without_nul("dbname", value)?),
            "application_name" | "fallback_application_name" => {
                config.application_name = without_nul("application_name", value)?
            }
            "sslmode" => config.sslmode = sslmode(&value)?,
            "sslrootcert" if value == "system" => config.sslrootcert = Some(RootCert::System),
            "sslrootcert" => config.sslrootcert = Some(RootCert::File(value.into())),
            "sslcert" => config.sslcert = Some(value.into()),
            "sslkey" => config.sslkey = Some(value.into()),
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
                    _ => return Err(value_error("allow_cleartext_password", "must be true or false")),
                }
            }
            _ => return Err(ConfigError::Unknown(name)),
        }
    }
    config.host = host.ok_or(ConfigError::Missing("host"))?;
    config.user = user.filter(|user| !user.is_empty()).ok_or(ConfigError::Missing("user"))?;
    config.dbname = dbname.filter(|dbname| !dbname.is_empty()).unwrap_or_else(|| config.user.clone());
    check_together(&config)?;
    Ok(config)
}

fn check_together(config: &ConnectConfig) -> Result<(), ConfigError> {
    if config.sslcert.is_some() != config.sslkey.is_some() {
        let name = if config.sslcert.is_some() { "sslkey" } else { "sslcert" };
        return Err(ConfigError::Missing(name));
    }
    if config.sslmode == SslMode::VerifyCa && config.sslrootcert.is_none() {
        return Err(value_error("sslrootcert", "sslmode=verify-ca needs the authority's certificate here"));
    }
    if config.sslrootcert == Some(RootCert::System) && config.sslmode != SslMode::VerifyFull {
        return Err(value_error(
            "sslmode",
            "sslrootcert=system needs sslmode=verify-full: anybody can get a certificate of a public authority",
        ));
    }
    if config.channel_binding == ChannelBinding::Require && config.sslmode == SslMode::Disable {
        return Err(value_error("channel_binding", "require needs TLS, and sslmode is disable"));
    }
    Ok(())
}

fn value_error(name: &'static str, reason: &str) -> ConfigError {
    ConfigError::Value { name, reason: reason.to_owned() }
}

fn without_nul(name: &'static str, value: String) -> Result<String, ConfigError> {
    if value.contains('\0') { Err(value_error(name, "must not hold a zero byte")) } else { Ok(value) }
}

fn parse_host(value: String) -> Result<Host, ConfigError> {
    if value.contains(',') {
        return Err(value_error("host", "one host only: logical decoding reads one server"));
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

fn sslmode(text: &str) -> Result<SslMode, ConfigError> {
    Ok(match text {
        "disable" => SslMode::Disable,
        "allow" => SslMode::Allow,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        _ => return Err(value_error("sslmode", "must be disable, allow, prefer, require, verify-ca or verify-full")),
    })
}

fn channel_binding(text: &str) -> Result<ChannelBinding, ConfigError> {
    Ok(match text {
        "disable" => ChannelBinding::Disable,
        "prefer" => ChannelBinding::Prefer,
        "require" => ChannelBinding::Require,
        _ => return Err(value_error("channel_binding", "must be disable, prefer or require")),
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
