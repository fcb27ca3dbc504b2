//! The two spellings of a connection string.

use crate::ConfigError;

/// Parameters by libpq's names, in the order of the text.
pub type Pairs = Vec<(String, String)>;

/// Reads a `postgres://user:password@host:port/dbname?parameter=value` URL or a `name=value` string. Several hosts, and their
/// ports, are one value each, separated by commas.
///
/// # Errors
/// `Form`: the text is neither.
pub fn pairs(dsn: &str) -> Result<Pairs, ConfigError> {
    match dsn.strip_prefix("postgres://").or_else(|| dsn.strip_prefix("postgresql://")) {
        Some(rest) => url_pairs(rest),
        None if dsn.contains("://") => Err(ConfigError::Form("a URL must begin with postgres:// or postgresql://")),
        None => key_value_pairs(dsn),
    }
}

/// The second spelling, with every value quoted.
pub fn key_values<'a>(pairs: impl IntoIterator<Item = &'a (String, String)>) -> String {
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
    let words: Vec<String> = pairs.into_iter().map(|(name, value)| format!("{name}='{}'", quoted(value))).collect();
    words.join(" ")
}

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
    let servers = host_port.split(',').map(host_and_port).collect::<Result<Vec<_>, _>>()?;
    let (hosts, ports): (Vec<&str>, Vec<&str>) = servers.into_iter().unzip();
    put("host", &hosts.join(","))?;
    // One port stands for all; none at all is left out.
    if ports.iter().any(|port| !port.is_empty()) {
        put("port", &ports.join(","))?;
    }
    put("dbname", path.unwrap_or(""))?;
    for parameter in query.unwrap_or("").split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or(ConfigError::Form("a parameter after ? has no ="))?;
        pairs.push((percent_decode(name)?, percent_decode(value)?));
    }
    Ok(pairs)
}

fn host_and_port(server: &str) -> Result<(&str, &str), ConfigError> {
    let Some(inner) = server.strip_prefix('[') else { return Ok(server.split_once(':').unwrap_or((server, ""))) };
    let (address, after) = inner.split_once(']').ok_or(ConfigError::Form("an address in [ has no ]"))?;
    Ok((address, after.strip_prefix(':').unwrap_or("")))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn of(list: &[(&str, &str)]) -> Pairs {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn both_spellings_say_the_same() {
        let expected = of(&[
            ("user", "wal@by"),
            ("password", "s ec'r\\et"),
            ("host", "db.example"),
            ("port", "5433"),
            ("dbname", "sh/op"),
            ("options", "-c x=y"),
        ]);
        let url = "postgres://wal%40by:s%20ec%27r%5Cet@db.example:5433/sh%2Fop?options=-c%20x%3Dy";
        assert_eq!(pairs(url).unwrap(), expected);
        let words = r"user = wal@by password='s ec\'r\\et' host=db.example port=5433 dbname=sh/op options='-c x=y'";
        assert_eq!(pairs(words).unwrap(), expected);
        assert_eq!(pairs(&key_values(&expected)).unwrap(), expected);
    }

    #[test]
    fn several_hosts_are_one_value() {
        let expected = of(&[("user", "u"), ("host", "a,::1,b"), ("port", "1,,3"), ("dbname", "d")]);
        assert_eq!(pairs("postgresql://u@a:1,[::1],b:3/d").unwrap(), expected);
        assert_eq!(pairs("postgres://u@a,b/").unwrap(), of(&[("user", "u"), ("host", "a,b")]));
    }

    #[test]
    fn what_is_neither_is_refused_without_its_text() {
        for dsn in [
            "mysql://u:hunter2@h/d",
            "host=h password='hunter2",
            "hunter2",
            "postgres://u:hunter2%@h",
            "postgres://u:hunter2@[h",
        ] {
            let said = pairs(dsn).unwrap_err().to_string();
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
}
