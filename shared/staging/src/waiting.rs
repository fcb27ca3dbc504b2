//! A wait that says what for and since when: to the watchdog it is progress.

use std::fmt;

use tokio::sync::watch;
use tokio::time::Instant;

/// What a writer or a reader waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// An append was refused or not answered: the log's end is read again.
    Resync,
    /// The log is full; only a purge, or a larger `maxBytes`, ends it.
    Full,
    /// No answer: the servers are gone, or the log has no leader.
    Unreachable,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wait::Resync => "the log's end to be read again",
            Wait::Full => "room in the log",
            Wait::Unreachable => "the NATS servers",
        })
    }
}

/// A wait and its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What for.
    pub what: Wait,
    /// Since when.
    pub since: Instant,
}

/// Publishes the current wait; keeps `since` while `what` stays.
#[derive(Debug)]
pub(crate) struct WaitSender(watch::Sender<Option<Waiting>>);

impl WaitSender {
    pub(crate) fn new() -> WaitSender {
        WaitSender(watch::Sender::new(None))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Waiting>> {
        self.0.subscribe()
    }

    pub(crate) fn set(&self, what: Option<Wait>, now: Instant) {
        self.0.send_if_modified(|current| {
            if current.map(|waiting| waiting.what) == what {
                return false;
            }
            *current = what.map(|what| Waiting { what, since: now });
            true
        });
    }
}
