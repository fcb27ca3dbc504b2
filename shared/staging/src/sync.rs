//! What the servers that hold the log say of their fsync.
//!
//! `sync_interval` and `sync_always` stand in VARZ, which a server gives on its monitoring port (`/varz`) and to the system
//! account (`$SYS.REQ.SERVER.PING.VARZ`). On the port it puts them together once, at the first question: asked before its JetStream
//! was up (by an exporter, or a probe) it leaves them out for as long as it runs, and `/jsz` has them. Of the servers that hold a copy
//! the longest interval counts; one that cannot be asked counts as the server's own default, two minutes.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::Client;
use futures::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::log::LogInfo;

/// nats-server's default.
pub const INTERVAL_UNKNOWN: Duration = Duration::from_secs(120);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// After an answer of the system account, how long others may take where it is not known who will answer.
const QUIET: Duration = Duration::from_millis(300);
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// When the servers bring to disk what they acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPolicy {
    /// Before they acknowledge.
    Always,
    /// Each interval.
    Interval(Duration),
    /// Not known: [`INTERVAL_UNKNOWN`].
    Unknown,
}

impl SyncPolicy {
    /// The interval; `None` when every write is synced.
    pub fn interval(self) -> Option<Duration> {
        match self {
            SyncPolicy::Always => None,
            SyncPolicy::Interval(interval) => Some(interval),
            SyncPolicy::Unknown => Some(INTERVAL_UNKNOWN),
        }
    }

    /// The one that waits longer.
    fn longer(self, other: SyncPolicy) -> SyncPolicy {
        // Equally long: `Unknown` says more to a person.
        if (other.interval(), other == SyncPolicy::Unknown) > (self.interval(), self == SyncPolicy::Unknown) {
            other
        } else {
            self
        }
    }
}

/// Whom to ask.
#[derive(Clone, Debug)]
pub enum SyncSource {
    /// Nobody: every server counts as unknown.
    Unknown,
    /// The monitoring port of each server, as `http://host:8222`.
    Monitoring(Vec<String>),
    /// A connection of the system account.
    SystemAccount(Client),
}

/// What came of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncReport {
    /// What counts for the log.
    pub policy: SyncPolicy,
    /// Each server that holds a copy, by name. Empty when the log's holders are not known by name.
    pub servers: BTreeMap<String, SyncPolicy>,
}

impl SyncReport {
    /// The servers that do not say it, or that nobody asked.
    pub fn silent(&self) -> Vec<&str> {
        let silent = self.servers.iter().filter(|(_, policy)| **policy == SyncPolicy::Unknown);
        silent.map(|(name, _)| name.as_str()).collect()
    }
}

/// Asks the servers that hold a copy of the log. Never fails: who does not answer is unknown.
pub async fn sync_policy(log: &LogInfo, source: &SyncSource) -> SyncReport {
    sync_policy_with(log, &[], source).await
}

/// As [`sync_policy`], for a log whose splices refer to a side store: `side` are the servers that hold it
/// ([`crate::SideStore::holders`]), which need not be those of the log.
pub async fn sync_policy_with(log: &LogInfo, side: &[String], source: &SyncSource) -> SyncReport {
    let holders: Vec<String> = log.servers.iter().chain(side).cloned().collect();
    let answers = match source {
        SyncSource::Unknown => BTreeMap::new(),
        SyncSource::Monitoring(urls) => ask_monitoring(urls).await,
        SyncSource::SystemAccount(client) => ask_system_account(client, &holders).await,
    };
    judge(&holders, &answers)
}

/// The rule, without I/O. `holders` is empty for a server that stands alone: then every server that answered counts.
fn judge(holders: &[String], answers: &BTreeMap<String, SyncPolicy>) -> SyncReport {
    let mut servers = BTreeMap::new();
    if holders.is_empty() {
        servers.clone_from(answers);
    }
    for holder in holders {
        servers.insert(holder.clone(), answers.get(holder).copied().unwrap_or(SyncPolicy::Unknown));
    }
    let policy = servers.values().copied().reduce(SyncPolicy::longer).unwrap_or(SyncPolicy::Unknown);
    SyncReport { policy, servers }
}

#[derive(Deserialize)]
struct Varz {
    server_name: String,
    #[serde(default)]
    jetstream: Option<JetStreamVarz>,
}

#[derive(Deserialize)]
struct JetStreamVarz {
    #[serde(default)]
    config: Option<JetStreamConfig>,
}

#[derive(Deserialize)]
struct JetStreamConfig {
    /// Nanoseconds.
    #[serde(default)]
    sync_interval: u64,
    #[serde(default)]
    sync_always: bool,
}

#[derive(Deserialize)]
struct SystemAnswer {
    data: Varz,
}

impl JetStreamVarz {
    fn policy(&self) -> SyncPolicy {
        match &self.config {
            Some(config) if config.sync_always => SyncPolicy::Always,
            Some(config) if config.sync_interval > 0 => {
                SyncPolicy::Interval(Duration::from_nanos(config.sync_interval))
            }
            _ => SyncPolicy::Unknown,
        }
    }
}

impl Varz {
    fn policy(&self) -> SyncPolicy {
        self.jetstream.as_ref().map_or(SyncPolicy::Unknown, JetStreamVarz::policy)
    }
}

async fn ask_monitoring(urls: &[String]) -> BTreeMap<String, SyncPolicy> {
    let asked = urls.iter().map(|url| async move {
        match tokio::time::timeout(ASK_TIMEOUT, ask_port(url)).await {
            Ok(Ok(said)) => Some(said),
            Ok(Err(error)) => {
                tracing::warn!(%url, %error, "a NATS server does not say how it syncs: it counts as two minutes");
                None
            }
            Err(_) => {
                tracing::warn!(%url, "a NATS server does not say in time how it syncs: it counts as two minutes");
                None
            }
        }
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

/// The server's name, and what it says.
async fn ask_port(url: &str) -> std::io::Result<(String, SyncPolicy)> {
    let varz: Varz = get(url, "/varz").await?;
    let mut policy = varz.policy();
    if policy == SyncPolicy::Unknown {
        policy = get::<JetStreamVarz>(url, "/jsz").await?.policy();
    }
    Ok((varz.server_name, policy))
}

/// One GET. HTTP/1.0, so that the answer ends with the connection and is not chunked.
async fn get<T: DeserializeOwned>(url: &str, path: &str) -> std::io::Result<T> {
    let Some(address) = url.strip_prefix("http://") else {
        return Err(std::io::Error::other("only http:// can be asked; use the system account instead"));
    };
    let address = address.split('/').next().unwrap_or_default();
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: application/json\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return Err(std::io::Error::other("the answer is not HTTP"));
    };
    if head.split_whitespace().nth(1) != Some("200") {
        return Err(std::io::Error::other(format!("the answer is {}", head.lines().next().unwrap_or_default())));
    }
    serde_json::from_str(body).map_err(std::io::Error::other)
}

/// One question reaches every server. Those of `holders` are waited for, as long as a question may take: a busy one must not count
/// as two minutes because the others were quick. Without `holders` nobody knows how many will answer, and a silence ends it.
async fn ask_system_account(client: &Client, holders: &[String]) -> BTreeMap<String, SyncPolicy> {
    let mut answers = BTreeMap::new();
    let inbox = client.new_inbox();
    let Ok(mut subscriber) = client.subscribe(inbox.clone()).await else {
        return answers;
    };
    if client.publish_with_reply("$SYS.REQ.SERVER.PING.VARZ", inbox, bytes::Bytes::new()).await.is_err() {
        return answers;
    }
    let end = Instant::now() + ASK_TIMEOUT;
    let mut until = end;
    while let Ok(Some(message)) = tokio::time::timeout_at(until, subscriber.next()).await {
        if let Ok(SystemAnswer { data }) = serde_json::from_slice(&message.payload) {
            answers.insert(data.server_name.clone(), data.policy());
        }
        let is_missing = |holder: &String| !answers.contains_key(holder);
        until = match holders {
            [] => end.min(Instant::now() + QUIET),
            holders if holders.iter().any(is_missing) => end,
            _ => break,
        };
    }
    answers
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn of(name: &str, policy: SyncPolicy) -> (String, SyncPolicy) {
        (name.to_owned(), policy)
    }

    #[test]
    fn the_longest_interval_of_the_holders_counts() {
        let short = SyncPolicy::Interval(Duration::from_secs(10));
        let long = SyncPolicy::Interval(Duration::from_secs(300));
        let answers = BTreeMap::from([of("a", SyncPolicy::Always), of("b", short), of("c", long)]);
        let holders = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(judge(&holders(&["a"]), &answers).policy, SyncPolicy::Always);
        assert_eq!(judge(&holders(&["a", "b"]), &answers).policy, short);
        assert_eq!(judge(&holders(&["a", "b", "c"]), &answers).policy, long);
        assert_eq!(judge(&holders(&["a", "b", "d"]), &answers).policy, SyncPolicy::Unknown);
        assert_eq!(judge(&holders(&["a", "b", "d"]), &answers).silent(), ["d"]);
        assert_eq!(judge(&holders(&["c", "d"]), &answers).policy, long);
        assert_eq!(judge(&[], &answers).policy, long);
        assert_eq!(judge(&[], &BTreeMap::new()).policy, SyncPolicy::Unknown);
    }

    #[test]
    fn varz_is_read() {
        let varz: Varz = serde_json::from_str(
            r#"{"server_name":"n1","jetstream":{"config":{"sync_interval":120000000000,"sync_always":true}},"x":1}"#,
        )
        .unwrap();
        assert_eq!(varz.policy(), SyncPolicy::Always);
        let varz: Varz =
            serde_json::from_str(r#"{"server_name":"n1","jetstream":{"config":{"sync_interval":5000000000}}}"#)
                .unwrap();
        assert_eq!(varz.policy(), SyncPolicy::Interval(Duration::from_secs(5)));
        let varz: Varz = serde_json::from_str(r#"{"server_name":"n1"}"#).unwrap();
        assert_eq!(varz.policy(), SyncPolicy::Unknown);
    }
}
