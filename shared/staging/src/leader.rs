//! What is asked of the stream's leader, each question once and with a short time-out.
//!
//! STREAM.INFO and STREAM.MSG.GET are answered by the leader only. A direct get is not used anywhere: a follower may answer it,
//! and what a follower has not applied yet looks like the end of the log.

use std::time::{Duration, SystemTime};

use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Info, RawMessageErrorKind};
use async_nats::jetstream::{self, ErrorCode};

use crate::error::{Result, StagingError};
use crate::log::Log;
use crate::record::{self, Staged};

/// How long one question may take. Short: while a leader is elected nobody answers, and asking again finds the new one.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_millis(1500);

/// Bounds a question whole. The client bounds the wait for an answer only; handing a request to a connection that is being made again
/// has no bound of its own, and whoever asks counts on one.
pub(crate) async fn bounded<T>(
    bound: Duration,
    what: impl Fn() -> String,
    question: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(bound + HAND_OVER, question).await {
        Ok(answered) => answered,
        Err(_) => Err(StagingError::unavailable(what(), "the connection did not take the question in time")),
    }
}

/// How long the connection may take to take a question.
const HAND_OVER: Duration = Duration::from_millis(500);

/// One message of the log as the leader has it.
#[derive(Clone, Debug)]
pub(crate) struct LeaderMessage {
    pub(crate) staged: Staged,
    pub(crate) stored_at: SystemTime,
}

/// Asks the leader of one log, over one connection.
#[derive(Clone, Debug)]
pub(crate) struct Leader {
    pub(crate) context: jetstream::Context,
}

impl Leader {
    pub(crate) fn new(client: async_nats::Client) -> Leader {
        let mut context = jetstream::new(client);
        context.set_timeout(REQUEST_TIMEOUT);
        Leader { context }
    }

    /// The stream's state.
    pub(crate) async fn info(&self, log: &Log) -> Result<Info> {
        bounded(REQUEST_TIMEOUT, || format!("the state of {}", log.stream()), self.ask_info(log)).await
    }

    async fn ask_info(&self, log: &Log) -> Result<Info> {
        let what = || format!("the state of {}", log.stream());
        let subject = format!("STREAM.INFO.{}", log.stream());
        let response: Response<Info> =
            self.context.request(subject, &()).await.map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => {
                    StagingError::unavailable(what(), "no server with JetStream answers for this account")
                }
                _ => StagingError::unavailable(what(), error),
            })?;
        match response {
            Response::Ok(info) => Ok(info),
            Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Err(StagingError::Missing { stream: log.stream().to_owned() })
            }
            Response::Err { error } => Err(StagingError::unavailable(what(), error)),
        }
    }

    /// The message with this sequence; `None` when there is none.
    pub(crate) async fn message(&self, log: &Log, sequence: u64) -> Result<Option<LeaderMessage>> {
        self.get(log, |request| request.sequence(sequence)).await
    }

    /// The first message at or after `sequence`, whatever it is.
    pub(crate) async fn next(&self, log: &Log, sequence: u64) -> Result<Option<LeaderMessage>> {
        self.next_on(log, log.subjects(), sequence).await
    }

    /// The first message on `subject` at or after `sequence`.
    pub(crate) async fn next_on(&self, log: &Log, subject: &str, sequence: u64) -> Result<Option<LeaderMessage>> {
        self.get(log, |request| request.sequence(sequence.max(1)).next_by_subject(subject)).await
    }

    /// The last message on `subject`.
    pub(crate) async fn last_on(&self, log: &Log, subject: &str) -> Result<Option<LeaderMessage>> {
        self.get(log, |request| request.last_by_subject(subject)).await
    }

    async fn get(&self, log: &Log, ask: impl FnOnce(RawMessage) -> RawMessage) -> Result<Option<LeaderMessage>> {
        bounded(REQUEST_TIMEOUT, || format!("a message of {}", log.stream()), self.ask_message(log, ask)).await
    }

    async fn ask_message(
        &self,
        log: &Log,
        ask: impl FnOnce(RawMessage) -> RawMessage,
    ) -> Result<Option<LeaderMessage>> {
        let stream = self.context.get_stream_no_info(log.stream()).await;
        let stream = stream.map_err(|error| StagingError::unavailable("a message of the log", error))?;
        match ask(stream.raw_message_builder()).send().await {
            Ok(message) => read(log, message).map(Some),
            Err(error) => match error.kind() {
                RawMessageErrorKind::NoMessageFound => Ok(None),
                RawMessageErrorKind::JetStream(api) if api.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Err(StagingError::Missing { stream: log.stream().to_owned() })
                }
                _ => Err(StagingError::unavailable(format!("a message of {}", log.stream()), error)),
            },
        }
    }
}

type RawMessage = jetstream::stream::RawMessageBuilder<jetstream::stream::WithHeaders>;

fn read(log: &Log, message: StreamMessage) -> Result<LeaderMessage> {
    let sequence = message.sequence;
    let nanos = u64::try_from(message.time.unix_timestamp_nanos()).unwrap_or(0);
    let stored_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos);
    let staged = record::decode(&message.headers, message.payload, sequence, log.flow())
        .map_err(|reason| StagingError::Record { stream: log.stream().to_owned(), sequence, reason })?;
    Ok(LeaderMessage { staged, stored_at })
}
