//! A side store in JetStream: one stream per shelf, because a stream is what has a quota.
//!
//! An object stands in one message, its head. A larger one stands in pieces, acknowledged before its head is sent: a head that is
//! there has all of them, and a put that was killed leaves pieces without a head, which nobody reads and which go with the
//! group. The name of a piece holds the checksum of the whole, so that two puts of one name never mix.
//!
//! An object that any copy returns with its checksum is the object. That it is not there only the leader says: a follower
//! may not have applied an acknowledged put yet.
//!
//! Servers that lose what they acknowledged lose a stream's tail, and give its sequences out again: a put that lands at or below one
//! that was acknowledged before it was sent stands behind a hole (hazard 9). From then on this value puts nothing: what was
//! put through it is not known to be there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::Request;
use async_nats::jetstream::context::{CreateStreamErrorKind, RequestErrorKind};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RawMessageErrorKind, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::time::Instant;
use wallaby_model::flow::Replicas;
use wallaby_model::{Attempt, FlowId};

use super::envelope::{self, Envelope};
use super::{Quotas, Shelf, ShelfUsage, SideGroup, SideKey, SideStore, path};
use crate::connection::Connections;
use crate::error::{Result, StagingError};
use crate::leader::{REQUEST_TIMEOUT, bounded};
use crate::log::{Log, LogInfo};
use crate::metrics::{self, Refusal};
use crate::writer_task::answer_of;

/// One message may take this long to be acknowledged before it is sent again.
const ACK_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a call goes on without getting anywhere: longer than the election of a leader.
const PATIENCE: Duration = Duration::from_secs(15);
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Making a stream of three copies waits for its first election; a purge by subject looks at every message.
const MANAGE_TIMEOUT: Duration = Duration::from_secs(15);
/// Pieces of one object on their way at a time.
const PIECES_IN_FLIGHT: usize = 4;
/// The largest message that a part is cut to, whatever the server takes: more only costs memory.
const TARGET_BYTES_MAX: usize = 1 << 20;

/// The side store of one flow in JetStream.
#[derive(Clone, Debug)]
pub struct JetStreamSide {
    log: Log,
    replicas: Replicas,
    quotas: Quotas,
    /// For puts and for what changes something.
    publish: jetstream::Context,
    /// For reads.
    pull: jetstream::Context,
    /// What was acknowledged.
    transactions: Arc<Acked>,
    chunks: Arc<Acked>,
}

/// What the servers acknowledged on a shelf.
#[derive(Debug, Default)]
struct Acked {
    /// The highest sequence.
    sequence: AtomicU64,
    /// Whether some of it is lost.
    lost: AtomicBool,
}

/// What is at a name.
enum Found {
    Whole(Bytes),
    Absent,
    Damaged,
}

/// Whom to ask.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// Any copy.
    AnyCopy,
    /// The one that knows what is not there.
    Leader,
}

impl JetStreamSide {
    /// The side store of `flow`; no I/O. `replicas` as the log's. Must be called inside a tokio runtime.
    pub fn new(flow: FlowId, connections: Connections, replicas: Replicas, quotas: Quotas) -> JetStreamSide {
        let context = |client: &async_nats::Client| {
            let mut context = jetstream::new(client.clone());
            context.set_timeout(REQUEST_TIMEOUT);
            context
        };
        let (publish, pull) = (context(&connections.publish), context(&connections.pull));
        let (transactions, chunks) = (Arc::default(), Arc::default());
        JetStreamSide { log: Log::new(flow, connections), replicas, quotas, publish, pull, transactions, chunks }
    }

    fn acked(&self, shelf: Shelf) -> &Acked {
        match shelf {
            Shelf::Transactions => &self.transactions,
            Shelf::Chunks => &self.chunks,
        }
    }

    /// The stream that a shelf stands in.
    pub fn stream(&self, shelf: Shelf) -> String {
        match shelf {
            Shelf::Transactions => format!("SIDE_{}", self.log.flow()),
            Shelf::Chunks => format!("CHUNKS_{}", self.log.flow()),
        }
    }

    fn prefix(&self) -> String {
        format!("wallaby.side.{}.", self.log.flow())
    }

    /// The subject of an object's head; its pieces stand below it.
    fn subject(&self, key: &SideKey, attempt: Option<Attempt>) -> String {
        format!("{}{}", self.prefix(), path::object_path(key, attempt, '.'))
    }

    fn subjects(&self, shelf: Shelf) -> Vec<String> {
        let prefix = self.prefix();
        match shelf {
            Shelf::Transactions => {
                vec![format!("{prefix}{}.>", path::MANIFEST), format!("{prefix}{}.>", path::PART)]
            }
            Shelf::Chunks => vec![format!("{prefix}{}.>", path::CHUNK)],
        }
    }

    fn missing(&self, shelf: Shelf) -> StagingError {
        StagingError::SideMissing { shelf: self.stream(shelf) }
    }

    /// The shelf's state, from its leader; `None` when there is no such shelf.
    async fn info(&self, shelf: Shelf) -> Result<Option<Info>> {
        bounded(REQUEST_TIMEOUT, || format!("the state of {}", self.stream(shelf)), self.ask_info(shelf)).await
    }

    async fn ask_info(&self, shelf: Shelf) -> Result<Option<Info>> {
        let stream = self.stream(shelf);
        let what = || format!("the state of {stream}");
        let asked = self.publish.request(format!("STREAM.INFO.{stream}"), &()).await;
        let response: Response<Info> = asked.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => {
                StagingError::unavailable(what(), "no server with JetStream answers for this account")
            }
            _ => StagingError::unavailable(what(), error),
        })?;
        match response {
            Response::Ok(info) => Ok(Some(info)),
            Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
            Response::Err { error } => Err(StagingError::unavailable(what(), error)),
        }
    }
}

/// Making, changing and removing shelves.
impl JetStreamSide {
    fn managing(&self) -> jetstream::Context {
        let mut context = self.publish.clone();
        context.set_timeout(MANAGE_TIMEOUT);
        context
    }

    /// What changes a shelf, bounded whole.
    async fn managed<T>(&self, shelf: Shelf, change: impl Future<Output = T>) -> Result<T> {
        bounded(MANAGE_TIMEOUT, || format!("a change of {}", self.stream(shelf)), async { Ok(change.await) }).await
    }

    fn config(&self, shelf: Shelf, replicas: usize) -> Config {
        let of = match shelf {
            Shelf::Transactions => "large transactions",
            Shelf::Chunks => "chunks of a load",
        };
        Config {
            name: self.stream(shelf),
            description: Some(format!("WALlaby: {of} of flow {}", self.log.flow())),
            subjects: self.subjects(shelf),
            retention: RetentionPolicy::Limits,
            // Nothing goes by itself: a full shelf refuses.
            discard: DiscardPolicy::New,
            max_bytes: i64::try_from(self.quotas.on(shelf)).unwrap_or(i64::MAX),
            // A put that is sent again takes the place of the first.
            max_messages_per_subject: 1,
            storage: StorageType::File,
            num_replicas: replicas,
            duplicate_window: Duration::from_secs(1),
            allow_direct: true,
            ..Config::default()
        }
    }

    /// As many copies as the log has.
    async fn copies(&self) -> Result<usize> {
        match (self.replicas, self.log.info().await) {
            (Replicas::Exactly(count), _) => Ok(usize::from(count)),
            (Replicas::Auto, Ok(info)) => Ok(info.replicas),
            (Replicas::Auto, Err(StagingError::Missing { .. })) => {
                let is_cluster = self.log.connections().publish.server_info().cluster.is_some();
                Ok(if is_cluster { 3 } else { 1 })
            }
            (Replicas::Auto, Err(error)) => Err(error),
        }
    }

    async fn ensure_once(&self, shelf: Shelf) -> Result<()> {
        let copies = self.copies().await?;
        let wanted = self.config(shelf, copies);
        let max_bytes = self.quotas.on(shelf);
        let made = match self.info(shelf).await? {
            None => self.managed(shelf, self.managing().create_stream(wanted)).await?.map(|_| ()),
            Some(info) => {
                let now = &info.config;
                self.check(shelf, now)?;
                if now.max_bytes == wanted.max_bytes && now.num_replicas == copies {
                    return Ok(());
                }
                let changed = Config { max_bytes: wanted.max_bytes, num_replicas: copies, ..now.clone() };
                self.managed(shelf, self.managing().update_stream(changed)).await?.map(|_| ())
            }
        };
        match made {
            Ok(()) => {
                tracing::info!(stream = self.stream(shelf), copies, max_bytes, "made a shelf of the side store");
                Ok(())
            }
            Err(error) => match error.kind() {
                CreateStreamErrorKind::JetStream(api) => Err(self.refused(&api, shelf, copies)),
                _ => Err(StagingError::unavailable(format!("making {}", self.stream(shelf)), error)),
            },
        }
    }

    /// Whether a stream of that name keeps what it takes.
    fn check(&self, shelf: Shelf, now: &Config) -> Result<()> {
        let mut subjects = now.subjects.clone();
        subjects.sort();
        let what = if subjects != self.subjects(shelf) {
            "its subjects are not those of the flow's side store"
        } else if now.retention != RetentionPolicy::Limits || now.discard != DiscardPolicy::New {
            "its retention must be limits, and it must discard new messages"
        } else if now.max_age != Duration::ZERO || now.max_messages > 0 || now.max_messages_per_subject != 1 {
            "it must have no limit of age or of messages, but one message per subject"
        } else if now.storage != StorageType::File || now.sealed {
            "it must be kept in files and not be sealed"
        } else {
            return Ok(());
        };
        Err(StagingError::NotASide { stream: self.stream(shelf), what: what.to_owned() })
    }

    /// Says what a refused create or update means.
    fn refused(&self, api: &jetstream::Error, shelf: Shelf, replicas: usize) -> StagingError {
        let (stream, reason) = (self.stream(shelf), api.to_string());
        let no_room = |reason| StagingError::SideNoRoom {
            stream: self.stream(shelf),
            max_bytes: self.quotas.on(shelf),
            replicas,
            key: match shelf {
                Shelf::Transactions => "log.sideStore.jetstream.transactionsMax",
                Shelf::Chunks => "log.sideStore.jetstream.chunksMax",
            },
            reason,
        };
        match api.error_code() {
            ErrorCode::STORAGE_RESOURCES_EXCEEDED
            | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
            | ErrorCode::INSUFFICIENT_RESOURCES => no_room(reason),
            // Said both for too few servers and for too little room on them; the text tells.
            ErrorCode::CLUSTER_NO_PEERS if reason.contains("storage") => no_room(reason),
            ErrorCode::CLUSTER_NO_PEERS | ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => {
                StagingError::NoServers { flow: self.log.flow().clone(), replicas, reason }
            }
            ErrorCode::STREAM_SUBJECT_OVERLAP => {
                StagingError::NotASide { stream, what: "another stream already takes its subjects".to_owned() }
            }
            // Another worker was faster: the next try checks what it made.
            _ => StagingError::unavailable(format!("making {stream}"), reason),
        }
    }

    async fn delete_once(&self, group: SideGroup) -> Result<()> {
        let stream = self.stream(group.shelf());
        let what = || format!("removing {group:?} from {stream}");
        let context = self.managing();
        let stream = context.get_stream_no_info(&stream).await;
        let stream = stream.map_err(|error| StagingError::unavailable(what(), error))?;
        let filter = format!("{}{}.>", self.prefix(), path::group_path(&group, '.'));
        match self.managed(group.shelf(), stream.purge().filter(filter).into_future()).await? {
            Ok(_) => Ok(()),
            Err(error) => match self.info(group.shelf()).await {
                Ok(None) => Ok(()),
                _ => Err(StagingError::unavailable(what(), error)),
            },
        }
    }

    async fn remove_once(&self, shelf: Shelf) -> Result<()> {
        match self.managed(shelf, self.managing().delete_stream(self.stream(shelf))).await? {
            Ok(_) => Ok(()),
            Err(error) => match self.info(shelf).await {
                Ok(None) => Ok(()),
                _ => Err(StagingError::unavailable(format!("deleting {}", self.stream(shelf)), error)),
            },
        }
    }
}

/// Putting.
impl JetStreamSide {
    /// Sends one message until it is acknowledged.
    async fn publish(&self, shelf: Shelf, subject: &str, envelope: Envelope, body: Bytes) -> Result<()> {
        let mut patience = Patience::new();
        let acked = self.acked(shelf);
        loop {
            if acked.lost.load(Ordering::Acquire) {
                return Err(StagingError::SideTailLost { shelf: self.stream(shelf) });
            }
            let before = acked.sequence.load(Ordering::Acquire);
            let request = Request::new().headers(envelope.headers()).payload(body.clone()).timeout(Some(ACK_TIMEOUT));
            let what = || format!("a put into {}", self.stream(shelf));
            let put = async {
                let answered = self.log.connections().publish.send_request(subject.to_owned(), request).await;
                answered.map_err(|error| StagingError::unavailable(what(), error))
            };
            let error = match bounded(ACK_TIMEOUT, what, put).await.map(|message| answer_of(&message)) {
                Ok(Ok(sequence)) if sequence <= before => {
                    tracing::error!(
                        stream = self.stream(shelf),
                        sequence,
                        acked = before,
                        "the servers lost what they acknowledged"
                    );
                    acked.lost.store(true, Ordering::Release);
                    continue;
                }
                Ok(Ok(sequence)) => {
                    acked.sequence.fetch_max(sequence, Ordering::AcqRel);
                    return Ok(());
                }
                Ok(Err((Refusal::Full, _))) => return self.full(shelf, subject, envelope, body.len()).await,
                Ok(Err((_, reason))) => StagingError::unavailable(what(), reason),
                Err(error) => error,
            };
            // A server that starts has not read its streams yet: a missing one is believed in the end only.
            if let Err(error) = patience.wait(error).await {
                return match self.info(shelf).await {
                    Ok(None) => Err(self.missing(shelf)),
                    _ => Err(error),
                };
            }
        }
    }

    /// A full shelf refuses also what it has already: an answer was lost, and the message was sent again.
    async fn full(&self, shelf: Shelf, subject: &str, envelope: Envelope, bytes: usize) -> Result<()> {
        if let Some(message) = self.message(shelf, subject, From::Leader).await?
            && Envelope::read(&message.headers) == Some(envelope)
        {
            return Ok(());
        }
        let usage = self.usage(shelf).await.unwrap_or_default();
        metrics::side_full(self.log.flow(), shelf);
        Err(StagingError::SideFull {
            flow: self.log.flow().clone(),
            bytes: bytes as u64,
            used: usage.bytes,
            max: self.quotas.on(shelf),
        })
    }

    async fn put_pieces(&self, shelf: Shelf, head: &str, envelope: Envelope, body: &Bytes) -> Result<()> {
        let size = envelope.fragment_bytes as usize;
        let pieces = (0..body.len()).step_by(size.max(1)).enumerate().map(|(index, at)| {
            let subject = format!("{head}.{}.{index}", envelope.cut());
            let piece = body.slice(at..body.len().min(at + size));
            async move { self.publish(shelf, &subject, envelope, piece).await }
        });
        futures::stream::iter(pieces).buffer_unordered(PIECES_IN_FLIGHT).try_collect::<()>().await
    }

    /// Makes room again after pieces were put in vain. Whatever fails here goes with the group.
    async fn drop_pieces(&self, shelf: Shelf, head: &str, envelope: Envelope) {
        let Ok(stream) = self.publish.get_stream_no_info(self.stream(shelf)).await else {
            return;
        };
        let purge = stream.purge().filter(format!("{head}.{}.>", envelope.cut())).into_future();
        let dropped = self.managed(shelf, purge).await;
        let dropped = dropped.and_then(|purged| {
            purged
                .map(drop)
                .map_err(|error| StagingError::unavailable(format!("a purge of {}", self.stream(shelf)), error))
        });
        if let Err(error) = dropped {
            tracing::debug!(subject = head, %error, "pieces of a refused object stay until their group goes");
        }
    }
}

/// Reading.
impl JetStreamSide {
    /// The message on a subject.
    async fn message(&self, shelf: Shelf, subject: &str, from: From) -> Result<Option<StreamMessage>> {
        let what = || format!("an object of {}", self.stream(shelf));
        bounded(REQUEST_TIMEOUT, what, self.ask_message(shelf, subject, from)).await
    }

    async fn ask_message(&self, shelf: Shelf, subject: &str, from: From) -> Result<Option<StreamMessage>> {
        let name = self.stream(shelf);
        let what = || format!("an object of {name}");
        let stream = self.pull.get_stream_no_info(&name).await;
        let stream = stream.map_err(|error| StagingError::unavailable(what(), error))?;
        if from == From::AnyCopy {
            let asked = stream.direct_get_builder().last_by_subject(subject).send().await;
            return match asked {
                Ok(message) => Ok(Some(message)),
                Err(error) => Err(StagingError::unavailable(what(), error)),
            };
        }
        match stream.raw_message_builder().last_by_subject(subject).send().await {
            Ok(message) => Ok(Some(message)),
            Err(error) => match error.kind() {
                RawMessageErrorKind::NoMessageFound => Ok(None),
                RawMessageErrorKind::JetStream(api) if api.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Err(self.missing(shelf))
                }
                _ => Err(StagingError::unavailable(what(), error)),
            },
        }
    }

    async fn read(&self, shelf: Shelf, head: &str, from: From) -> Result<Found> {
        let Some(message) = self.message(shelf, head, from).await? else {
            return Ok(Found::Absent);
        };
        let Some(envelope) = Envelope::read(&message.headers) else {
            return Ok(Found::Damaged);
        };
        if envelope.fragment_bytes == 0 {
            let body = message.payload;
            return Ok(if envelope.is_of(&body) { Found::Whole(body) } else { Found::Damaged });
        }
        let cut = envelope.cut();
        let pieces = (0..envelope.fragments()).map(|index| {
            let subject = format!("{head}.{cut}.{index}");
            async move { self.message(shelf, &subject, from).await }
        });
        let mut pieces = futures::stream::iter(pieces).buffered(PIECES_IN_FLIGHT);
        // Grows as pieces come: a damaged head must not ask for memory.
        let mut body = Vec::new();
        while let Some(piece) = pieces.next().await {
            match piece? {
                Some(piece) => body.extend_from_slice(&piece.payload),
                None => return Ok(Found::Damaged),
            }
        }
        Ok(if envelope.is_of(&body) { Found::Whole(Bytes::from(body)) } else { Found::Damaged })
    }

    /// An object by its head's subject.
    async fn find(&self, shelf: Shelf, head: &str, any_copy: bool) -> Result<Option<Bytes>> {
        if any_copy && let Ok(Found::Whole(body)) = self.read(shelf, head, From::AnyCopy).await {
            return Ok(Some(body));
        }
        let mut patience = Patience::new();
        loop {
            match self.read(shelf, head, From::Leader).await {
                Ok(Found::Whole(body)) => return Ok(Some(body)),
                Ok(Found::Absent) => return Ok(None),
                Ok(Found::Damaged) => {
                    tracing::warn!(subject = head, "an object of the side store is damaged: it counts as not there");
                    metrics::side_damaged(self.log.flow(), shelf);
                    return Ok(None);
                }
                Err(error) => patience.wait(error).await?,
            }
        }
    }

    /// The subjects below a prefix, as the leader has them.
    async fn each_subject(&self, shelf: Shelf, filter: &str, mut take: impl FnMut(&str)) -> Result<()> {
        let name = self.stream(shelf);
        let what = || format!("the list of {name}");
        if self.info(shelf).await?.is_none() {
            return Ok(());
        }
        let stream = self.pull.get_stream_no_info(&name).await;
        let stream = stream.map_err(|error| StagingError::unavailable(what(), error))?;
        let asked = async { Ok(stream.info_with_subjects(filter).await) };
        let subjects = bounded(REQUEST_TIMEOUT, what, asked).await?;
        let mut subjects = subjects.map_err(|error| StagingError::unavailable(what(), error))?;
        while let Some(subject) = bounded(REQUEST_TIMEOUT, what, async { Ok(subjects.next().await) }).await? {
            let (subject, _) = subject.map_err(|error| StagingError::unavailable(what(), error))?;
            take(&subject);
        }
        Ok(())
    }

    async fn list_once(&self, shelf: Shelf) -> Result<Vec<SideGroup>> {
        let prefix = self.prefix();
        let mut groups = BTreeSet::new();
        for filter in self.subjects(shelf) {
            self.each_subject(shelf, &filter, |subject| {
                let tokens = subject.strip_prefix(&prefix).unwrap_or_default().split('.');
                groups.extend(path::group_of(tokens));
            })
            .await?;
        }
        Ok(groups.into_iter().collect())
    }

    /// Who put manifests of a transaction, the one that counts first.
    async fn manifests_once(&self, key: SideKey) -> Result<Vec<Attempt>> {
        let head = self.subject(&key, None);
        let mut attempts = BTreeSet::new();
        self.each_subject(key.shelf(), &format!("{head}.*"), |subject| {
            attempts.extend(subject.rsplit('.').next().and_then(|attempt| attempt.parse::<Attempt>().ok()));
        })
        .await?;
        Ok(attempts.into_iter().rev().collect())
    }
}

#[async_trait]
impl SideStore for JetStreamSide {
    fn part_bytes_target(&self) -> usize {
        let most = self.log.connections().publish.max_payload().saturating_sub(envelope::HEADER_BYTES_MAX);
        most.clamp(1, TARGET_BYTES_MAX)
    }

    async fn ensure(&self, shelf: Shelf) -> Result<()> {
        retried(|| self.ensure_once(shelf)).await
    }

    async fn put(&self, key: SideKey, body: Bytes) -> Result<()> {
        let shelf = key.shelf();
        let head = self.subject(&key, path::attempt_of(&key, &body)?);
        let envelope = Envelope::of(&body, self.part_bytes_target());
        if envelope.fragment_bytes == 0 {
            return self.publish(shelf, &head, envelope, body).await;
        }
        let put = match self.put_pieces(shelf, &head, envelope, &body).await {
            Ok(()) => self.publish(shelf, &head, envelope, Bytes::new()).await,
            Err(error) => Err(error),
        };
        if put.as_ref().is_err_and(StagingError::is_side_full) {
            self.drop_pieces(shelf, &head, envelope).await;
        }
        put
    }

    async fn get(&self, key: SideKey) -> Result<Option<Bytes>> {
        let shelf = key.shelf();
        let SideKey::Manifest { .. } = key else {
            return self.find(shelf, &self.subject(&key, None), true).await;
        };
        for attempt in retried(|| self.manifests_once(key)).await? {
            // It can be put again with another content: only the leader knows the last.
            if let Some(body) = self.find(shelf, &self.subject(&key, Some(attempt)), false).await? {
                return Ok(Some(body));
            }
        }
        Ok(None)
    }

    async fn delete(&self, group: SideGroup) -> Result<()> {
        retried(|| self.delete_once(group)).await
    }

    async fn list(&self, shelf: Shelf) -> Result<Vec<SideGroup>> {
        retried(|| self.list_once(shelf)).await
    }

    async fn usage(&self, shelf: Shelf) -> Result<ShelfUsage> {
        let info = retried(|| self.info(shelf)).await?;
        let max = self.quotas.on(shelf);
        Ok(match info {
            Some(info) => {
                ShelfUsage { bytes: info.state.bytes, bytes_max: u64::try_from(info.config.max_bytes).unwrap_or(max) }
            }
            None => ShelfUsage { bytes: 0, bytes_max: max },
        })
    }

    async fn holders(&self, shelf: Shelf) -> Result<Vec<String>> {
        let info = retried(|| self.info(shelf)).await?;
        Ok(info.map(|info| LogInfo::from(info).servers).unwrap_or_default())
    }

    async fn remove_shelf(&self, shelf: Shelf) -> Result<()> {
        retried(|| self.remove_once(shelf)).await?;
        // Another stream begins at its own first sequence.
        let acked = self.acked(shelf);
        acked.sequence.store(0, Ordering::Release);
        acked.lost.store(false, Ordering::Release);
        Ok(())
    }
}

/// Tries again what can succeed, for a while and ever more seldom.
struct Patience {
    ends: Instant,
    delay: Duration,
}

impl Patience {
    fn new() -> Patience {
        Patience { ends: Instant::now() + PATIENCE, delay: BACKOFF_FIRST }
    }

    /// Returns after a pause when there is to be another try; the error otherwise.
    async fn wait(&mut self, error: StagingError) -> Result<()> {
        let can_pass = error.is_transient() || matches!(error, StagingError::SideMissing { .. });
        if !can_pass || Instant::now() + self.delay >= self.ends {
            return Err(error);
        }
        tracing::debug!(%error, "the side store is asked again");
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(BACKOFF_MAX);
        Ok(())
    }
}

async fn retried<T, F: Future<Output = Result<T>>>(call: impl Fn() -> F) -> Result<T> {
    let mut patience = Patience::new();
    loop {
        match call().await {
            Ok(done) => return Ok(done),
            Err(error) => patience.wait(error).await?,
        }
    }
}
