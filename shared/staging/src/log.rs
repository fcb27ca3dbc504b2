//! The log of one flow: its stream is made, checked, asked and deleted here.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType};
use wallaby_model::flow::Replicas;
use wallaby_model::{Epoch, FlowId};

use crate::connection::Connections;
use crate::error::{Result, StagingError};
use crate::leader::Leader;
use crate::record::HEADER_BYTES_MAX;
use crate::tail::{self, Tail};

/// Data stops this far below `maxBytes`; what is above is for fences, resumes and heartbeats.
pub const RESERVE_BYTES: u64 = 16 << 20;
/// The least `maxBytes`: the reserve and as much again for data.
pub const MAX_BYTES_LEAST: u64 = 2 * RESERVE_BYTES;
/// We send no message ids; the window only has to be there.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(1);
/// Making a stream of three copies waits for its first election.
const CREATE_TIMEOUT: Duration = Duration::from_secs(15);

/// How the log is made. From the flow's `log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Copies.
    pub replicas: Replicas,
    /// Bytes that the servers reserve, on each copy.
    pub max_bytes: u64,
}

/// The stream's state, from its leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogInfo {
    /// Copies as the stream has them.
    pub replicas: usize,
    /// The server that leads; `None` on a server that stands alone.
    pub leader: Option<String>,
    /// The names of the servers that hold a copy. Empty on a server that stands alone.
    pub servers: Vec<String>,
    /// Whether the leader heard from a majority of the copies within 2 s.
    pub has_quorum: bool,
    /// Messages that are there.
    pub messages: u64,
    /// Their bytes, with what the server adds to each.
    pub bytes: u64,
    /// What is reserved.
    pub max_bytes: u64,
    /// The lowest sequence that is there.
    pub first_sequence: u64,
    /// The last sequence that was given.
    pub last_sequence: u64,
}

#[derive(Debug)]
struct Inner {
    flow: FlowId,
    stream: String,
    fence_subject: String,
    data_subject: String,
    subjects: String,
    connections: Connections,
    /// Over the publishing connection, so that what we ask comes after what we sent.
    leader: Leader,
    /// Over the pulling connection, for readers.
    reader_leader: Leader,
}

/// The log of one flow. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log(Arc<Inner>);

impl Log {
    /// The log of `flow`; no I/O. Must be called inside a tokio runtime.
    pub fn new(flow: FlowId, connections: Connections) -> Log {
        Log(Arc::new(Inner {
            stream: flow.log_stream(),
            fence_subject: format!("wallaby.log.{flow}.fence"),
            data_subject: format!("wallaby.log.{flow}.data"),
            subjects: format!("wallaby.log.{flow}.*"),
            flow,
            leader: Leader::new(connections.publish.clone()),
            reader_leader: Leader::new(connections.pull.clone()),
            connections,
        }))
    }

    /// Whose log this is.
    pub fn flow(&self) -> &FlowId {
        &self.0.flow
    }

    /// The stream's name.
    pub fn stream(&self) -> &str {
        &self.0.stream
    }

    /// The subject of fences.
    pub fn fence_subject(&self) -> &str {
        &self.0.fence_subject
    }

    /// Both subjects.
    pub(crate) fn subjects(&self) -> &str {
        &self.0.subjects
    }

    /// The subject of everything that is chained.
    pub fn data_subject(&self) -> &str {
        &self.0.data_subject
    }

    /// The connections it uses.
    pub fn connections(&self) -> &Connections {
        &self.0.connections
    }

    pub(crate) fn leader(&self) -> &Leader {
        &self.0.leader
    }

    pub(crate) fn reader_leader(&self) -> &Leader {
        &self.0.reader_leader
    }

    /// The most bytes that a segment's body may have on the connected server: its `max_payload` less the headers.
    pub fn body_bytes_max(&self) -> usize {
        self.0.connections.publish.max_payload().saturating_sub(HEADER_BYTES_MAX)
    }

    /// Makes the stream, or checks the one that is there and brings its size and copies to what `config` says.
    ///
    /// # Errors
    /// `TooSmall`, `NoRoom`, `NoServers`, `NoJetStream`, `NotALog`; `Unavailable` when another try may succeed.
    pub async fn ensure(&self, config: &LogConfig) -> Result<LogInfo> {
        if config.max_bytes < MAX_BYTES_LEAST {
            return Err(StagingError::TooSmall {
                flow: self.flow().clone(),
                max_bytes: config.max_bytes,
                least: MAX_BYTES_LEAST,
                reserve: RESERVE_BYTES,
            });
        }
        match self.leader().info(self).await {
            Ok(info) => self.adjust(config, info).await,
            Err(StagingError::Missing { .. }) => self.create(config).await,
            Err(error) => Err(error),
        }
    }

    /// Deletes the stream and everything in it. One that is not there is fine.
    ///
    /// # Errors
    /// `Unavailable` when the servers do not answer.
    pub async fn delete(&self) -> Result<()> {
        let mut context = self.leader().context.clone();
        context.set_timeout(CREATE_TIMEOUT);
        match context.delete_stream(self.stream()).await {
            Ok(_) => Ok(()),
            Err(error) => match self.leader().info(self).await {
                Err(StagingError::Missing { .. }) => Ok(()),
                _ => Err(StagingError::unavailable(format!("deleting {}", self.stream()), error)),
            },
        }
    }

    /// The stream's state.
    ///
    /// # Errors
    /// `Missing`, or `Unavailable` while it has no leader.
    pub async fn info(&self) -> Result<LogInfo> {
        Ok(LogInfo::from(self.leader().info(self).await?))
    }

    /// The end of the log: the reader rule over its tail, read from the leader.
    ///
    /// # Errors
    /// `Missing`, `Record`, or `Unavailable`.
    pub async fn tail(&self) -> Result<Tail> {
        tail::read(self, &tail::read_fences(self, 0).await?).await
    }

    /// The highest epoch that the log has seen, in a fence or in its newest record. A new owner's is above it.
    ///
    /// # Errors
    /// As [`Log::tail`].
    pub async fn last_epoch(&self) -> Result<Option<Epoch>> {
        let of_fences = tail::read_fences(self, 0).await?.iter().map(|fence| fence.epoch).max();
        let newest = self.leader().last_on(self, self.data_subject()).await?;
        Ok(of_fences.max(newest.map(|message| message.staged.record.epoch)))
    }

    async fn create(&self, config: &LogConfig) -> Result<LogInfo> {
        let is_cluster = self.0.connections.publish.server_info().cluster.is_some();
        let (replicas, may_fall_back) = match config.replicas {
            Replicas::Exactly(count) => (usize::from(count), false),
            Replicas::Auto if is_cluster => (3, true),
            Replicas::Auto => (1, false),
        };
        match self.create_with(config, replicas).await {
            // A cluster of fewer than three servers is a choice; one whose servers are down is not: it knows them.
            Err(StagingError::NoServers { .. }) if may_fall_back && self.servers_known() < 3 => {
                self.create_with(config, 1).await
            }
            other => other,
        }
    }

    /// How many servers of the cluster the connected one knows; it gossips those that are up.
    fn servers_known(&self) -> usize {
        self.0.connections.publish.server_info().connect_urls.len().max(1)
    }

    fn stream_config(&self, max_bytes: u64, replicas: usize) -> Config {
        Config {
            name: self.stream().to_owned(),
            description: Some(format!("WALlaby: the log of flow {}", self.flow())),
            subjects: vec![self.fence_subject().to_owned(), self.data_subject().to_owned()],
            retention: RetentionPolicy::Limits,
            // The oldest records must never go by themselves: a full log is back-pressure.
            discard: DiscardPolicy::New,
            max_bytes: i64::try_from(max_bytes).unwrap_or(i64::MAX),
            storage: StorageType::File,
            num_replicas: replicas,
            duplicate_window: DUPLICATE_WINDOW,
            allow_direct: true,
            deny_delete: true,
            ..Config::default()
        }
    }

    async fn create_with(&self, config: &LogConfig, replicas: usize) -> Result<LogInfo> {
        let mut context = self.leader().context.clone();
        context.set_timeout(CREATE_TIMEOUT);
        let made = context.create_stream(self.stream_config(config.max_bytes, replicas)).await;
        match made {
            Ok(stream) => {
                tracing::info!(stream = self.stream(), replicas, max_bytes = config.max_bytes, "made the log");
                Ok(LogInfo::from(stream.cached_info().clone()))
            }
            Err(error) => match error.kind() {
                // Another controller was faster.
                CreateStreamErrorKind::JetStream(api) if api.error_code() == ErrorCode::STREAM_NAME_EXIST => {
                    self.info().await
                }
                CreateStreamErrorKind::JetStream(api) => Err(self.refused(&api, config.max_bytes, replicas)),
                _ => Err(StagingError::unavailable(format!("making {}", self.stream()), error)),
            },
        }
    }

    /// Says what a refused create or update means.
    fn refused(&self, api: &async_nats::jetstream::Error, max_bytes: u64, replicas: usize) -> StagingError {
        let (flow, reason) = (self.flow().clone(), api.to_string());
        match api.error_code() {
            ErrorCode::STORAGE_RESOURCES_EXCEEDED
            | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
            | ErrorCode::INSUFFICIENT_RESOURCES => StagingError::NoRoom { flow, max_bytes, replicas, reason },
            // "no suitable peers" is said both for too few servers and for too little room on them; the text tells.
            ErrorCode::CLUSTER_NO_PEERS if reason.contains("storage") => {
                StagingError::NoRoom { flow, max_bytes, replicas, reason }
            }
            ErrorCode::CLUSTER_NO_PEERS | ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => {
                StagingError::NoServers { flow, replicas, reason }
            }
            ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
                StagingError::NoJetStream { servers: self.0.connections.publish.server_info().server_name }
            }
            ErrorCode::STREAM_SUBJECT_OVERLAP => StagingError::NotALog {
                stream: self.stream().to_owned(),
                what: "another stream already takes its subjects".to_owned(),
            },
            _ => StagingError::unavailable(format!("making {}", self.stream()), reason),
        }
    }

    async fn adjust(&self, config: &LogConfig, info: Info) -> Result<LogInfo> {
        let now = &info.config;
        let not_a_log = |what: &str| StagingError::NotALog { stream: self.stream().to_owned(), what: what.to_owned() };
        let mut subjects = now.subjects.clone();
        subjects.sort();
        if subjects != [self.data_subject(), self.fence_subject()] {
            return Err(not_a_log("its subjects are not those of the flow's log"));
        }
        if now.retention != RetentionPolicy::Limits || now.discard != DiscardPolicy::New {
            return Err(not_a_log("its retention must be limits, and it must discard new messages"));
        }
        if now.max_age != Duration::ZERO || now.max_messages > 0 || now.max_messages_per_subject > 0 {
            return Err(not_a_log("it has a limit of age or of messages, which would drop changes silently"));
        }
        if now.storage != StorageType::File || now.sealed {
            return Err(not_a_log("it must be kept in files and not be sealed"));
        }
        let replicas = match config.replicas {
            Replicas::Exactly(count) => usize::from(count),
            // What auto chose when the log was made stays.
            Replicas::Auto => now.num_replicas,
        };
        let wanted_bytes = i64::try_from(config.max_bytes).unwrap_or(i64::MAX);
        if now.max_bytes == wanted_bytes && now.num_replicas == replicas {
            return Ok(LogInfo::from(info));
        }
        let changed = Config { max_bytes: wanted_bytes, num_replicas: replicas, ..now.clone() };
        let mut context = self.leader().context.clone();
        context.set_timeout(CREATE_TIMEOUT);
        match context.update_stream(changed).await {
            Ok(info) => Ok(LogInfo::from(info)),
            Err(error) => match error.kind() {
                CreateStreamErrorKind::JetStream(api) => Err(self.refused(&api, config.max_bytes, replicas)),
                _ => Err(StagingError::unavailable(format!("changing {}", self.stream()), error)),
            },
        }
    }
}

/// A leader that has not heard from a copy for longer does not count it for its quorum.
const QUORUM_AGE: Duration = Duration::from_secs(2);

impl From<Info> for LogInfo {
    fn from(info: Info) -> LogInfo {
        let replicas = info.config.num_replicas.max(1);
        let (mut leader, mut servers, mut heard) = (None, Vec::new(), 1);
        if let Some(cluster) = info.cluster {
            servers.extend(cluster.leader.clone());
            servers.extend(cluster.replicas.iter().map(|peer| peer.name.clone()));
            heard += cluster.replicas.iter().filter(|peer| !peer.offline && peer.active <= QUORUM_AGE).count();
            leader = cluster.leader;
        }
        LogInfo {
            replicas,
            leader,
            servers,
            has_quorum: heard > replicas / 2,
            messages: info.state.messages,
            bytes: info.state.bytes,
            max_bytes: u64::try_from(info.config.max_bytes).unwrap_or(u64::MAX),
            first_sequence: info.state.first_sequence,
            last_sequence: info.state.last_sequence,
        }
    }
}
