//! The connections to NATS.
//!
//! Publishing and pulling never share one: a client with 64 MB pending is disconnected by the server, and a reader that
//! falls behind must not take the owner's appends with it. Every server that can be reached is asked for its version,
//! because any of them may become the log's leader.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, ServerAddr};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;

use crate::error::{Result, StagingError};

/// The oldest nats-server whose check of the expected last sequence is right.
pub const SERVER_VERSION_MIN: (u64, u64, u64) = (2, 14, 5);
/// How long one server may take to say its version; one that does not is checked when it is met.
const GREETING_TIMEOUT: Duration = Duration::from_secs(1);
/// The most bytes of a greeting that are read.
const GREETING_BYTES_MAX: u64 = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const PING_INTERVAL: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);

/// What the address of a server may begin with; without any, it is the first.
const SCHEMES: [&str; 2] = ["nats", "tls"];

/// Where NATS is and who we are to it. Addresses may carry user and password; they are never shown.
#[derive(Clone, Default)]
pub struct NatsTarget {
    /// `nats://[user:password@]host:port` or `tls://…`, one per server; one is enough, the others are learned.
    pub servers: Vec<String>,
    /// A `.creds` file.
    pub credentials_file: Option<PathBuf>,
    /// Certificate authorities beside those of the system, PEM.
    pub ca_file: Option<PathBuf>,
    /// Certificate and key, PEM.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// How the connections are named at the servers.
    pub name: String,
}

impl NatsTarget {
    /// The addresses without user and password, for messages.
    pub fn shown(&self) -> String {
        self.servers.iter().map(|server| without_credentials(server)).collect::<Vec<_>>().join(", ")
    }

    /// Refuses what can never be the address of a NATS server: it would be tried for ever.
    ///
    /// # Errors
    /// What is wrong with the first such address, without user and password.
    pub fn check(servers: &[String]) -> std::result::Result<(), String> {
        let problem = |server: &String| match server.parse::<ServerAddr>() {
            Ok(address) if !SCHEMES.contains(&address.scheme()) => Some("it begins with another scheme".to_owned()),
            Ok(address) if address.host().is_empty() => Some("it names no host".to_owned()),
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        };
        let found = servers.iter().find_map(|server| Some((server, problem(server)?)));
        found.map_or(Ok(()), |(server, problem)| {
            let shown = without_credentials(server);
            Err(format!("`{shown}` is no address of a NATS server ({problem}): write nats://host:port, tls://host:port or host:port"))
        })
    }

    /// User and password, or a token alone, of the first address that has some.
    fn credentials(&self) -> Option<(String, Option<String>)> {
        let addresses = self.servers.iter().filter_map(|server| server.parse::<ServerAddr>().ok());
        let mut found = addresses.filter_map(|address| {
            let user = percent_decoded(address.username()?)?;
            Some((user, address.password().and_then(percent_decoded)))
        });
        found.next()
    }

    /// One connection of this target. `role` is appended to its name.
    ///
    /// # Errors
    /// `Connect` when no server answers or the credentials are refused.
    pub async fn connect(&self, role: &str) -> Result<Client> {
        let failed = |reason: String| StagingError::Connect { servers: self.shown(), reason };
        let mut options = ConnectOptions::new()
            .name(format!("{} {role}", self.name))
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| {
                // The first tries come fast: a leader that died is away for less than the back-off's end.
                let shift = u32::try_from(attempts.min(6)).unwrap_or(6);
                (Duration::from_millis(20) * 2u32.pow(shift)).min(RECONNECT_DELAY_MAX)
            });
        if let Some(file) = &self.credentials_file {
            options =
                options.credentials_file(file).await.map_err(|error| failed(format!("{}: {error}", file.display())))?;
        }
        if let Some(file) = &self.ca_file {
            options = options.add_root_certificates(file.clone());
        }
        if let Some((certificate, key)) = &self.client_certificate {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        // The client takes no credentials from addresses.
        if let Some((user, password)) = self.credentials() {
            options = match password {
                Some(password) => options.user_and_password(user, password),
                None => options.token(user),
            };
        }
        options.connect(self.servers.clone()).await.map_err(|error| failed(error.to_string()))
    }
}

fn without_credentials(server: &str) -> String {
    match (server.find("://"), server.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}{}", &server[..scheme + 3], &server[at + 1..]),
        (None, Some(at)) => server[at + 1..].to_owned(),
        _ => server.to_owned(),
    }
}

/// Undoes the `%XX` of a URL; `None` when that is no text.
fn percent_decoded(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = if *first == b'%' { tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()) } else { None };
        match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                rest = &tail[2..];
            }
            None => {
                decoded.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(decoded).ok()
}

/// The two connections of a process to its log servers. Cheap to clone; shared by all logs.
#[derive(Clone, Debug)]
pub struct Connections {
    /// For appends and for what is asked of the leader.
    pub publish: Client,
    /// For readers.
    pub pull: Client,
}

impl Connections {
    /// Connects twice and checks every server that can be reached.
    ///
    /// # Errors
    /// `Connect`, `ServerTooOld`, or `NoJetStream` when the server has it switched off.
    pub async fn open(target: &NatsTarget) -> Result<Connections> {
        let publish = target.connect("publish").await?;
        let pull = target.connect("pull").await?;
        check_servers(&publish).await?;
        if !publish.server_info().jetstream {
            return Err(StagingError::NoJetStream { servers: target.shown() });
        }
        Ok(Connections { publish, pull })
    }
}

/// Checks the version of the connected server and of every one it knows.
///
/// # Errors
/// `ServerTooOld` names the first one that is.
pub async fn check_servers(client: &Client) -> Result<()> {
    let info = client.server_info();
    check_version(&info.server_name, &info.version)?;
    let others: BTreeSet<&String> = info.connect_urls.iter().collect();
    let asked = others
        .into_iter()
        .map(|address| async move { (address, tokio::time::timeout(GREETING_TIMEOUT, greeting(address)).await) });
    for (address, answer) in futures::future::join_all(asked).await {
        match answer {
            Ok(Ok(greeting)) => check_version(&format!("{} ({address})", greeting.server_name), &greeting.version)?,
            Ok(Err(error)) => tracing::debug!(%address, %error, "a NATS server does not say its version"),
            Err(_) => tracing::debug!(%address, "a NATS server does not say its version in time"),
        }
    }
    Ok(())
}

/// Refuses a version below [`SERVER_VERSION_MIN`].
///
/// # Errors
/// `ServerTooOld`, also for a text that is no version.
pub fn check_version(server: &str, version: &str) -> Result<()> {
    let too_old = || StagingError::ServerTooOld { server: server.to_owned(), version: version.to_owned() };
    let text = version.trim_start_matches('v');
    let (numbers, pre_release) = match text.split_once('-') {
        Some((numbers, _)) => (numbers, true),
        None => (text, false),
    };
    let mut parts = numbers.split('.').map(str::parse::<u64>);
    let (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(too_old());
    };
    let found = (major, minor, patch);
    // A pre-release of the first good version may lack what makes it good.
    if found < SERVER_VERSION_MIN || (pre_release && found == SERVER_VERSION_MIN) { Err(too_old()) } else { Ok(()) }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(default)]
    server_name: String,
    version: String,
}

/// A NATS server greets every connection with a line `INFO {…}` before anything else, encrypted or not.
async fn greeting(address: &str) -> std::io::Result<Greeting> {
    let stream = TcpStream::connect(address).await?;
    let mut line = String::new();
    BufReader::new(stream.take(GREETING_BYTES_MAX)).read_line(&mut line).await?;
    let json = line.strip_prefix("INFO ").unwrap_or_default();
    serde_json::from_str(json).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn servers_below_the_first_good_version_are_refused_with_the_reason() {
        for good in ["2.14.5", "2.15.2", "3.0.0", "2.15.0-RC.1", "v2.14.6"] {
            assert!(check_version("n1", good).is_ok(), "{good}");
        }
        for old in ["2.14.4", "2.9.25", "1.99.99", "2.14.5-RC.2", "", "2.14", "a.b.c", "2.14.5.1"] {
            let error = check_version("n1", old).unwrap_err().to_string();
            assert!(error.contains("n1") && error.contains("upgrade") && error.contains("2.14.5"), "{error}");
        }
    }

    #[test]
    fn what_can_never_be_a_server_is_refused_without_its_password() {
        let check = |servers: &[&str]| NatsTarget::check(&servers.iter().map(ToString::to_string).collect::<Vec<_>>());
        check(&["nats://a:4222", "tls://me:secret@b:4222", "c", "127.0.0.1:4222", "[::1]:4222", "me:secret@d"])
            .unwrap();
        for (wrong, shown) in [
            ("http://me:secret@x", "http://x"),
            ("ws://x:80", "ws://x:80"),
            ("nats://x:99999", "nats://x:99999"),
            ("me:secret@x:port", "x:port"),
            ("nats://", "nats://"),
            ("", ""),
        ] {
            let refused = check(&["nats://a:4222", wrong]).unwrap_err();
            assert!(refused.starts_with(&format!("`{shown}` is no address")), "{refused}");
            assert!(refused.contains("nats://host:port") && !refused.contains("secret"), "{refused}");
        }
    }

    #[test]
    fn addresses_are_shown_without_credentials() {
        let servers = vec!["nats://me:secret@a:4222".to_owned(), "b:4222".to_owned(), "me:secret@c:4222".to_owned()];
        let target = NatsTarget { servers, ..NatsTarget::default() };
        assert_eq!(target.shown(), "nats://a:4222, b:4222, c:4222");
        assert_eq!(target.credentials(), Some(("me".to_owned(), Some("secret".to_owned()))));
        let servers = vec!["nats://a:4222".to_owned(), "nats://tok%2Fen@b:4222".to_owned()];
        let target = NatsTarget { servers, ..NatsTarget::default() };
        assert_eq!(target.credentials(), Some(("tok/en".to_owned(), None)));
    }
}
