//! One consumer of a reader: made, pulled from within a bound of bytes, and given up at the first thing that is not right.
//!
//! The consumer is ephemeral, without acknowledgements, one replica in memory: its whole state is the next sequence, which the
//! reader knows. So nothing is repaired here: the reader makes another one. It lives on one of the servers that hold a copy, not always
//! the leader, and one that is alive may still deliver nothing: its server's copy stands still, or the log lost its tail and begins
//! again below what the consumer waits for. So during a silence the leader is asked what there is.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::client::Request;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, ReplayPolicy, pull};
use async_nats::jetstream::{self};
use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use serde::Serialize;
use tokio::time::Instant;

use crate::error::{Result, StagingError};
use crate::log::Log;
use crate::metrics;
use crate::record::{self, Staged};

/// Pulls that wait at the server at a time: one that fills, one that follows without a pause.
const PULLS: usize = 2;
/// Records of one pull at most; the bytes end it first.
const BATCH: usize = 4096;
/// Records of a consumer's first pull: whoever only looks whether the last record is still there pulls nothing else.
const BATCH_FIRST: usize = 1;
const EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence for longer means that the consumer is gone.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// After so long without a record the leader is asked whether there is one. Two looks in a row must find something wrong: what has just been
/// appended is on its way.
const LOOK_AFTER: Duration = Duration::from_secs(4);
/// While all is well it is asked ever more seldom, up to this.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(32);
/// A consumer that nobody pulls from is deleted by the server after this.
const INACTIVE: Duration = Duration::from_secs(120);
const CREATE_TIMEOUT: Duration = Duration::from_secs(5);

const SILENT: &str = "it delivers nothing of what the log has";
const PAST_END: &str = "it waits for what comes behind the end of the log";

#[derive(Serialize)]
struct PullRequest {
    /// Nanoseconds.
    expires: u64,
    batch: usize,
    max_bytes: usize,
    /// Nanoseconds.
    idle_heartbeat: u64,
}

#[derive(Debug)]
struct Outstanding {
    number: u64,
    left: usize,
    until: Instant,
}

/// A consumer and the pulls that wait at it.
#[derive(Debug)]
pub(crate) struct PullSession {
    log: Log,
    context: jetstream::Context,
    consumer: String,
    /// The server that it lives on; empty where one stands alone.
    server: String,
    inbox: String,
    messages: Subscriber,
    pulls: VecDeque<Outstanding>,
    next_pull: u64,
    pull_bytes: usize,
    /// The consumer's own count of what it delivered.
    delivered: u64,
    /// The sequence of the stream that it delivers next, or the first one behind it.
    expected: u64,
    /// When it delivered last, or when the leader was asked since.
    looked_at: Instant,
    look_after: Duration,
    /// What was wrong at the last look.
    suspicion: Option<&'static str>,
}

impl PullSession {
    /// Makes a consumer that begins at `sequence`.
    pub(crate) async fn open(log: &Log, sequence: u64, pull_bytes: usize) -> Result<PullSession> {
        let client = log.connections().pull.clone();
        let mut context = log.reader_leader().context.clone();
        context.set_timeout(CREATE_TIMEOUT);
        let what = || format!("a consumer of {}", log.stream());
        let consumer = format!("wallaby-{:016x}", rand::random::<u64>());
        let config = pull::Config {
            name: Some(consumer.clone()),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: sequence.max(1) },
            ack_policy: AckPolicy::None,
            replay_policy: ReplayPolicy::Instant,
            inactive_threshold: INACTIVE,
            num_replicas: 1,
            memory_storage: true,
            ..pull::Config::default()
        };
        let made = context.create_consumer_on_stream(config, log.stream()).await;
        let made = made.map_err(|error| StagingError::unavailable(what(), error))?;
        let server = made.cached_info().cluster.as_ref().and_then(|cluster| cluster.leader.clone()).unwrap_or_default();
        let inbox = client.new_inbox();
        let messages = client.subscribe(format!("{inbox}.*")).await;
        let messages = messages.map_err(|error| StagingError::unavailable(what(), error))?;
        let pulls = VecDeque::with_capacity(PULLS);
        let log = log.clone();
        Ok(PullSession {
            log,
            context,
            consumer,
            server,
            inbox,
            messages,
            pulls,
            next_pull: 0,
            pull_bytes,
            delivered: 0,
            expected: sequence.max(1),
            looked_at: Instant::now(),
            look_after: LOOK_AFTER,
            suspicion: None,
        })
    }

    /// The next message of the stream. Cancel-safe. After an error the session is of no more use.
    pub(crate) async fn next(&mut self) -> Result<Staged> {
        loop {
            self.pull().await?;
            let message = match tokio::time::timeout(SILENCE_MAX, self.messages.next()).await {
                Ok(Some(message)) => message,
                Ok(None) => return Err(self.gone("the connection was closed")),
                Err(_) => return Err(self.gone("it says nothing any more")),
            };
            match self.take(message)? {
                Some(staged) => return Ok(staged),
                // Only now: before what a reader that was not polled for long finds here, every log would seem to have more.
                None if self.looked_at.elapsed() >= self.look_after => self.look().await?,
                None => {}
            }
        }
    }

    fn gone(&self, reason: &str) -> StagingError {
        StagingError::unavailable(format!("the consumer of {}", self.log.stream()), reason)
    }

    /// Asks the leader whether the log has what this consumer should have delivered.
    async fn look(&mut self) -> Result<()> {
        // Of a reader that was not polled for long the last look says nothing.
        let before = self.suspicion.take().filter(|_| self.looked_at.elapsed() < 2 * LOOK_AFTER);
        self.looked_at = Instant::now();
        // Without an answer nothing is known: the consumer is alive.
        let Ok(now) = self.what_is_wrong().await else { return Ok(()) };
        let Some(what) = now else {
            self.look_after = (self.look_after * 2).min(LOOK_EVERY_MAX);
            return Ok(());
        };
        if before != now {
            (self.suspicion, self.look_after) = (now, LOOK_AFTER);
            return Ok(());
        }
        if what == SILENT {
            metrics::copy_is_silent(self.log.flow());
            tracing::warn!(
                flow = %self.log.flow(), server = self.server, expected = self.expected,
                "a consumer delivers nothing of what the log has: another one is made. Its server's copy of the log may stand still"
            );
        }
        Err(self.gone(what))
    }

    async fn what_is_wrong(&self) -> Result<Option<&'static str>> {
        let leader = self.log.reader_leader();
        let end = leader.info(&self.log).await?.state.last_sequence;
        if end + 1 < self.expected {
            return Ok(Some(PAST_END));
        }
        // The sequence alone proves nothing: what stood there may be gone.
        let is_silent = end >= self.expected && leader.next(&self.log, self.expected).await?.is_some();
        Ok(is_silent.then_some(SILENT))
    }

    /// Keeps pulls waiting at the server.
    async fn pull(&mut self) -> Result<()> {
        let now = Instant::now();
        self.pulls.retain(|pull| pull.left > 0 && pull.until > now);
        // Nothing is sent ahead until the first record is here.
        let (pulls, batch) = if self.delivered == 0 { (1, BATCH_FIRST) } else { (PULLS, BATCH) };
        while self.pulls.len() < pulls {
            // A message larger than the pull would never come.
            let max_bytes = self.pull_bytes.max(self.log.connections().pull.max_payload() + (64 << 10));
            let request = PullRequest { expires: nanos(EXPIRES), batch, max_bytes, idle_heartbeat: nanos(HEARTBEAT) };
            let body = serde_json::to_vec(&request).map_err(|error| self.gone(&error.to_string()))?;
            let number = self.next_pull;
            let subject = format!("CONSUMER.MSG.NEXT.{}.{}", self.log.stream(), self.consumer);
            let request = Request::new().payload(Bytes::from(body)).inbox(format!("{}.{number}", self.inbox));
            // Counted before it is sent: if this call is cancelled, the pull expires.
            self.next_pull += 1;
            self.pulls.push_back(Outstanding { number, left: batch, until: now + EXPIRES + HEARTBEAT });
            self.context.send_request(subject, request).await.map_err(|error| self.gone(&error.to_string()))?;
        }
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<Option<Staged>> {
        let number: Option<u64> = message.subject.as_str().rsplit('.').next().and_then(|number| number.parse().ok());
        let pull = self.pulls.iter_mut().find(|pull| Some(pull.number) == number);
        match message.status {
            None | Some(StatusCode::OK) => {}
            Some(StatusCode::IDLE_HEARTBEAT) => return Ok(None),
            // The pull is over: its bytes are used up, it expired, or there is nothing.
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => {
                self.pulls.retain(|pull| Some(pull.number) != number);
                return Ok(None);
            }
            Some(StatusCode::REQUEST_TERMINATED) => {
                let description = message.description.unwrap_or_default();
                let lower = description.to_ascii_lowercase();
                if lower.contains("consumer") || lower.contains("leadership") || lower.contains("shutdown") {
                    return Err(self.gone(&description));
                }
                self.pulls.retain(|pull| Some(pull.number) != number);
                return Ok(None);
            }
            Some(status) => return Err(self.gone(&status.to_string())),
        }
        if let Some(pull) = pull {
            pull.left = pull.left.saturating_sub(1);
        }
        let message = jetstream::Message { message, context: self.context.clone() };
        let (sequence, delivered) = match message.info() {
            Ok(info) => (info.stream_sequence, info.consumer_sequence),
            Err(error) => return Err(self.gone(&error.to_string())),
        };
        if delivered != self.delivered + 1 || sequence < self.expected {
            return Err(self.gone("a delivery was lost on the way"));
        }
        self.delivered = delivered;
        self.expected = sequence + 1;
        (self.looked_at, self.look_after, self.suspicion) = (Instant::now(), LOOK_AFTER, None);
        let jetstream::Message { message, .. } = message;
        let headers = message.headers.unwrap_or_default();
        record::decode(&headers, message.payload, sequence, self.log.flow())
            .map(Some)
            .map_err(|reason| StagingError::Record { stream: self.log.stream().to_owned(), sequence, reason })
    }
}

impl Drop for PullSession {
    /// Deletes the consumer; one that cannot be told is deleted by the server once it was idle for long.
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (context, stream) = (self.context.clone(), self.log.stream().to_owned());
        let consumer = std::mem::take(&mut self.consumer);
        runtime.spawn(async move {
            if let Err(error) = context.delete_consumer_from_stream(consumer, stream).await {
                tracing::debug!(%error, "a consumer was not deleted: it ends by itself");
            }
        });
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
