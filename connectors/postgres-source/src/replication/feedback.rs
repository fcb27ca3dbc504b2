//! Status updates, from a task of their own.
//!
//! The server ends a walsender that hears nothing for `wal_sender_timeout`. So status goes out unprompted, from a task
//! that waits for nothing but the clock and its own socket: not for the reader, whose buffer may be full, nor for
//! anything downstream (hazard 24). What is confirmed only ever rises.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use wallaby_model::Lsn;

use crate::error::SourceError;
use crate::metrics;
use crate::transport::Closer;

/// A changed confirmation goes out at once, but no more often than this.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
/// A write that takes longer means that the peer is gone or frozen; it would otherwise hold a close back.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// Why a replication connection was closed from our side.
#[derive(Clone, Debug)]
pub(crate) enum CloseReason {
    /// The owner is done with it.
    Done,
    /// The control connection said that the server goes down.
    Shutdown {
        /// 57P01 or 57P03.
        sqlstate: String,
    },
    /// The control connection, or the status task, failed.
    Lost(String),
}

impl CloseReason {
    pub(crate) fn into_error(self) -> SourceError {
        let during = || "streaming".to_owned();
        match self {
            CloseReason::Done => SourceError::Lost { during: during(), reason: "closed by us".into() },
            CloseReason::Shutdown { sqlstate } => SourceError::ShuttingDown { sqlstate },
            CloseReason::Lost(reason) => SourceError::Lost { during: during(), reason },
        }
    }
}

struct Shared {
    confirmed: watch::Sender<Lsn>,
    line: Arc<Line>,
}

/// What the status task and the handles share. The task must not keep `Shared` alive: it ends when all handles are gone.
struct Line {
    received: watch::Sender<Lsn>,
    reply: Notify,
    closing: Notify,
    closed: Mutex<Option<CloseReason>>,
    closer: Closer,
}

impl Line {
    fn close(&self, reason: CloseReason) {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.closer.close();
        self.closing.notify_one();
    }
}

/// Tells the server what is confirmed. Cheap to clone; the connection closes when the last one is dropped.
#[derive(Clone)]
pub struct Feedback {
    shared: Arc<Shared>,
}

impl Feedback {
    /// Everything up to `lsn` is durable and may be forgotten by the server. A lower one than before changes nothing.
    pub fn confirm(&self, lsn: Lsn) {
        self.shared.confirmed.send_if_modified(|confirmed| {
            let rises = lsn > *confirmed;
            if rises {
                *confirmed = lsn;
            }
            rises
        });
    }

    /// What was confirmed last.
    pub fn confirmed(&self) -> Lsn {
        *self.shared.confirmed.borrow()
    }

    /// Closes the connection now, whatever reads or writes it.
    pub fn close(&self) {
        self.close_because(CloseReason::Done);
    }

    pub(crate) fn close_because(&self, reason: CloseReason) {
        self.shared.line.close(reason);
    }

    /// Why it was closed from our side, if it was.
    pub(crate) fn close_reason(&self) -> Option<CloseReason> {
        self.shared.line.closed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The server asked for an answer.
    pub(crate) fn reply_now(&self) {
        self.shared.line.reply.notify_one();
    }

    /// What was received, for the `write` column of `pg_stat_replication`.
    pub(crate) fn received(&self, lsn: Lsn) {
        self.shared.line.received.send_replace(lsn);
    }
}

/// Starts the status task over the writing half.
pub(super) fn spawn(
    writer: impl AsyncWrite + Send + Unpin + 'static,
    closer: Closer,
    confirmed: Lsn,
    every: Duration,
) -> Feedback {
    let (confirm, confirms) = watch::channel(confirmed);
    let line = Arc::new(Line {
        received: watch::Sender::new(confirmed),
        reply: Notify::new(),
        closing: Notify::new(),
        closed: Mutex::new(None),
        closer,
    });
    tokio::spawn(run(writer, confirms, Arc::clone(&line), every));
    Feedback { shared: Arc::new(Shared { confirmed: confirm, line }) }
}

async fn run(
    mut writer: impl AsyncWrite + Send + Unpin,
    mut confirms: watch::Receiver<Lsn>,
    line: Arc<Line>,
    every: Duration,
) {
    let mut schedule = Schedule { every, sent: None };
    loop {
        let due = schedule.due(*confirms.borrow_and_update());
        let due_now = tokio::select! {
            biased;
            () = line.closing.notified() => break,
            () = line.reply.notified() => true,
            () = sleep_until(due) => true,
            changed = confirms.changed() => {
                if changed.is_err() {
                    line.close(CloseReason::Done);
                    break;
                }
                false
            }
        };
        if !due_now {
            continue;
        }
        let confirmed = *confirms.borrow_and_update();
        let status = status_message(confirmed, (*line.received.borrow()).max(confirmed));
        let written = timeout(WRITE_LIMIT, async {
            writer.write_all(&status).await?;
            writer.flush().await
        });
        let outcome = tokio::select! {
            biased;
            () = line.closing.notified() => break,
            outcome = written => outcome,
        };
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("a status update could not be sent: {error}")),
            Err(_) => Some("the server did not take a status update".to_owned()),
        };
        if let Some(reason) = failure {
            line.close(CloseReason::Lost(reason));
            break;
        }
        metrics::status_sent();
        schedule.sent = Some((Instant::now(), confirmed));
    }
}

/// When the next status is due. Pure.
struct Schedule {
    every: Duration,
    sent: Option<(Instant, Lsn)>,
}

impl Schedule {
    fn due(&self, confirmed: Lsn) -> Instant {
        match self.sent {
            None => Instant::now(),
            Some((at, sent)) if sent != confirmed => at + CONFIRM_EVERY.min(self.every),
            Some((at, _)) => at + self.every,
        }
    }
}

/// CopyData around a standby status update: write, flush, apply, time, no answer wanted.
fn status_message(confirmed: Lsn, received: Lsn) -> [u8; 39] {
    let mut message = [0; 39];
    message[0] = b'd';
    message[1..5].copy_from_slice(&38u32.to_be_bytes());
    message[5] = b'r';
    message[6..14].copy_from_slice(&received.0.to_be_bytes());
    message[14..22].copy_from_slice(&confirmed.0.to_be_bytes());
    message[22..30].copy_from_slice(&confirmed.0.to_be_bytes());
    message[30..38].copy_from_slice(&server_clock_micros().to_be_bytes());
    message
}

/// µs since 2000-01-01, the protocol's clock.
fn server_clock_micros() -> i64 {
    const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;
    #[allow(clippy::disallowed_methods, reason = "the protocol wants the wall clock; the server only shows it")]
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX) - POSTGRES_EPOCH_MICROS
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn pair(every: Duration) -> (Feedback, tokio::net::UnixStream) {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let closer = Closer::of_unix(&ours).unwrap();
        let (_, writer) = tokio::io::split(ours);
        (spawn(writer, closer, Lsn(5), every), theirs)
    }

    async fn flushed(theirs: &mut tokio::net::UnixStream) -> u64 {
        let mut message = [0; 39];
        theirs.read_exact(&mut message).await.unwrap();
        assert_eq!(&message[..6], b"d\0\0\0\x26r");
        u64::from_be_bytes(message[14..22].try_into().unwrap())
    }

    #[tokio::test]
    async fn h24_status_goes_out_unprompted_and_the_confirmation_never_falls() {
        let (feedback, mut theirs) = pair(Duration::from_millis(20)).await;
        assert_eq!(flushed(&mut theirs).await, 5);
        assert_eq!(flushed(&mut theirs).await, 5, "unprompted");
        feedback.confirm(Lsn(9));
        feedback.confirm(Lsn(7));
        assert_eq!(feedback.confirmed(), Lsn(9));
        while flushed(&mut theirs).await != 9 {}
        assert_eq!(flushed(&mut theirs).await, 9);
    }

    #[tokio::test]
    async fn a_request_is_answered_at_once() {
        let (feedback, mut theirs) = pair(Duration::from_secs(3600)).await;
        flushed(&mut theirs).await;
        feedback.reply_now();
        let answer = timeout(Duration::from_secs(5), flushed(&mut theirs)).await;
        assert_eq!(answer.unwrap(), 5);
    }

    #[tokio::test]
    async fn dropping_or_closing_ends_the_connection() {
        let (feedback, mut theirs) = pair(Duration::from_secs(3600)).await;
        flushed(&mut theirs).await;
        drop(feedback);
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
        let (feedback, mut theirs) = pair(Duration::from_secs(3600)).await;
        feedback.close();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).await.unwrap();
        assert!(matches!(feedback.close_reason(), Some(CloseReason::Done)));
    }
}
