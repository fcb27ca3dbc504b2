//! Writes the latest of many values, now and then: what keeps etcd off the per-batch path.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::clock::BootTime;
use crate::{Error, Result};

/// When to write, without I/O.
#[derive(Debug)]
struct Pacer {
    interval: Duration,
    last_attempt: Option<BootTime>,
    /// Counts values; the highest is the latest.
    noted: u64,
    /// Values up to this one are wanted at once.
    urgent: u64,
    written: u64,
}

impl Pacer {
    fn new(interval: Duration) -> Pacer {
        Pacer { interval, last_attempt: None, noted: 0, urgent: 0, written: 0 }
    }

    fn note(&mut self, is_urgent: bool) {
        self.noted += 1;
        if is_urgent {
            self.urgent = self.noted;
        }
    }

    fn hurry(&mut self) {
        self.urgent = self.noted;
    }

    /// How long until the next write; `None` when there is nothing to write.
    fn due_in(&self, now: BootTime) -> Option<Duration> {
        if self.written == self.noted {
            return None;
        }
        if self.urgent > self.written {
            return Some(Duration::ZERO);
        }
        Some(self.last_attempt.map_or(Duration::ZERO, |last| now.until(last.plus(self.interval))))
    }

    /// A write of value number `version` was begun.
    fn attempted(&mut self, now: BootTime) -> u64 {
        self.last_attempt = Some(now);
        self.noted
    }

    fn succeeded(&mut self, version: u64) {
        self.written = self.written.max(version);
    }

    /// The write failed for now: again after the interval, urgent or not.
    fn failed(&mut self) {
        self.urgent = self.written;
    }
}

struct State<T> {
    pacer: Pacer,
    latest: Option<T>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    wake: Notify,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the background task has done.
#[derive(Clone, Debug, Default)]
struct Done {
    written: u64,
    attempts: u64,
    last_failure: Option<String>,
    has_ended: bool,
}

/// Writes the latest value at most once per interval, and at once on a change of state. Ends when dropped, or when the
/// ownership is lost.
pub struct PacedWriter<T> {
    shared: Arc<Shared<T>>,
    done: watch::Receiver<Done>,
    _task: AbortOnDropHandle<()>,
}

impl<T: Clone + Send + 'static> PacedWriter<T> {
    /// Starts a writer that hands values to `write`.
    pub fn start<W>(interval: Duration, write: W) -> PacedWriter<T>
    where
        W: Fn(T) -> BoxFuture<'static, Result<()>> + Send + 'static,
    {
        let state = State { pacer: Pacer::new(interval), latest: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Notify::new() });
        let (sender, done) = watch::channel(Done::default());
        let task = AbortOnDropHandle::new(tokio::spawn(run(shared.clone(), sender, write)));
        PacedWriter { shared, done, _task: task }
    }

    /// Takes a value; it is written when the interval has passed. Cheap, never waits.
    pub fn note(&self, value: T) {
        self.take(value, false);
    }

    /// Takes a value that is a change of state; it is written at once.
    pub fn note_now(&self, value: T) {
        self.take(value, true);
    }

    fn take(&self, value: T, is_urgent: bool) {
        let mut state = self.shared.state();
        state.latest = Some(value);
        state.pacer.note(is_urgent);
        drop(state);
        self.shared.wake.notify_one();
    }

    /// The latest value taken.
    pub fn latest(&self) -> Option<T> {
        self.shared.state().latest.clone()
    }

    /// Writes what is not yet written, and returns when it is.
    ///
    /// # Errors
    /// What the write failed with, as text in `Refused`; the value stays and is tried again.
    pub async fn flush(&self) -> Result<()> {
        let wanted = {
            let mut state = self.shared.state();
            state.pacer.hurry();
            state.pacer.noted
        };
        let mut done = self.done.clone();
        let attempts_before = done.borrow_and_update().attempts;
        self.shared.wake.notify_one();
        let settled = done
            .wait_for(|done| {
                done.written >= wanted
                    || done.has_ended
                    || (done.attempts > attempts_before && done.last_failure.is_some())
            })
            .await;
        let refused = |cause: String| Err(Error::Refused { doing: "a paced write", cause });
        match settled {
            Ok(done) if done.written >= wanted => Ok(()),
            Ok(done) => refused(done.last_failure.clone().unwrap_or_else(|| "the writer has ended".to_owned())),
            Err(_) => refused("the writer has ended".to_owned()),
        }
    }
}

async fn run<T, W>(shared: Arc<Shared<T>>, sender: watch::Sender<Done>, write: W)
where
    T: Clone + Send + 'static,
    W: Fn(T) -> BoxFuture<'static, Result<()>> + Send + 'static,
{
    loop {
        let due_in = shared.state().pacer.due_in(BootTime::now());
        match due_in {
            Some(Duration::ZERO) => {}
            Some(pause) => {
                tokio::select! {
                    () = shared.wake.notified() => {}
                    () = tokio::time::sleep(pause) => {}
                }
                continue;
            }
            None => {
                shared.wake.notified().await;
                continue;
            }
        }
        let (version, value) = {
            let mut state = shared.state();
            (state.pacer.attempted(BootTime::now()), state.latest.clone())
        };
        let Some(value) = value else { continue };
        let outcome = write(value).await;
        let has_ended = outcome.as_ref().is_err_and(Error::is_ownership_lost);
        {
            let mut state = shared.state();
            match &outcome {
                Ok(()) => state.pacer.succeeded(version),
                Err(_) => state.pacer.failed(),
            }
        }
        sender.send_modify(|done| {
            done.attempts += 1;
            done.last_failure = outcome.as_ref().err().map(ToString::to_string);
            done.written = if outcome.is_ok() { version } else { done.written };
            done.has_ended = has_ended;
        });
        if has_ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(100 + seconds))
    }

    #[test]
    fn the_first_value_goes_at_once_later_ones_wait() {
        let mut pacer = Pacer::new(Duration::from_secs(10));
        assert_eq!(pacer.due_in(at(0)), None);
        pacer.note(false);
        assert_eq!(pacer.due_in(at(0)), Some(Duration::ZERO));
        let version = pacer.attempted(at(0));
        pacer.note(false);
        pacer.succeeded(version);
        assert_eq!(pacer.due_in(at(4)), Some(Duration::from_secs(6)));
        assert_eq!(pacer.due_in(at(10)), Some(Duration::ZERO));
    }

    #[test]
    fn a_change_of_state_does_not_wait() {
        let mut pacer = Pacer::new(Duration::from_secs(10));
        pacer.note(false);
        let version = pacer.attempted(at(0));
        pacer.succeeded(version);
        pacer.note(true);
        assert_eq!(pacer.due_in(at(1)), Some(Duration::ZERO));
        pacer.attempted(at(1));
        pacer.failed();
        assert_eq!(pacer.due_in(at(2)), Some(Duration::from_secs(9)));
    }
}
