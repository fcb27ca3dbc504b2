//! The watchdog's view of a task: its loop turns, or it says what it waits for.
//!
//! A wait with a name is progress (each has a time-out of its own that retries inside the task). A loop that reports
//! nothing is wedged, whatever the reason: it is aborted and its lock dropped, while the worker lives on.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A loop that reports nothing for this long is wedged.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What a task waits for, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// In words, for people: "the log is full", "the sink's answer".
    pub for_what: String,
    /// Since when.
    pub since: Instant,
}

#[derive(Debug)]
struct State {
    last_beat: Instant,
    wait: Option<Wait>,
}

/// A task's pulse; cheap to clone, shared with the watchdog.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<Mutex<State>>);

impl Default for Pulse {
    fn default() -> Self {
        Pulse(Arc::new(Mutex::new(State { last_beat: Instant::now(), wait: None })))
    }
}

impl Pulse {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is two plain values, whole after any panic.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The loop turned.
    pub fn beat(&self) {
        let mut state = self.state();
        state.last_beat = Instant::now();
        state.wait = None;
    }

    /// The loop waits for something that has a time-out of its own.
    pub fn wait(&self, for_what: impl Into<String>) {
        let mut state = self.state();
        let for_what = for_what.into();
        let now = Instant::now();
        state.last_beat = now;
        match &mut state.wait {
            Some(wait) if wait.for_what == for_what => {}
            other => *other = Some(Wait { for_what, since: now }),
        }
    }

    /// What the task waits for, if it said so.
    #[cfg(test)]
    pub fn waiting(&self) -> Option<Wait> {
        self.state().wait.clone()
    }

    /// For how long the loop has been silent without a named wait; `None` when it waits or turned within `silence_max`.
    pub fn wedged_for(&self, now: Instant, silence_max: Duration) -> Option<Duration> {
        let state = self.state();
        if state.wait.is_some() {
            return None;
        }
        let silence = now.saturating_duration_since(state.last_beat);
        (silence > silence_max).then_some(silence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h24_silence_is_wedged_and_a_named_wait_is_not() {
        let pulse = Pulse::default();
        let later = Instant::now() + Duration::from_secs(31);
        assert!(pulse.wedged_for(later, SILENCE_MAX).is_some());
        pulse.wait("the sink's answer");
        assert_eq!(pulse.wedged_for(later, SILENCE_MAX), None);
        pulse.beat();
        assert_eq!(pulse.wedged_for(Instant::now(), SILENCE_MAX), None);
        assert!(pulse.wedged_for(Instant::now() + Duration::from_secs(31), SILENCE_MAX).is_some());
    }

    #[test]
    fn a_wait_keeps_its_beginning() {
        let pulse = Pulse::default();
        pulse.wait("a full log");
        let first = pulse.waiting().map(|wait| wait.since);
        pulse.wait("a full log");
        assert_eq!(pulse.waiting().map(|wait| wait.since), first);
    }
}
