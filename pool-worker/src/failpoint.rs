//! Switches that let tests break a protection on purpose, so that the protection behind it is what is tested.
//!
//! Read once from `WALLABY_FAILPOINTS`, a list of names separated by commas. A worker that runs with one says so
//! loudly: they are for tests only.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// A protection that can be switched off, or a fault that can be switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Failpoint {
    /// The worker does not fence itself when its lease may have run out: the log and the sinks must refuse it.
    NoSelfFencing,
    /// Opening a sink leaves sessions of older owners alive: the epoch alone must refuse them.
    KeepOlderSessions,
    /// The capture loop of this process stops turning, once, without saying what it waits for: the watchdog must see it.
    HangCapture,
    /// The apply loop of this process stops turning, once, without saying what it waits for.
    HangApply,
    /// The capture loop keeps the next segment at hand from SIGUSR1 to SIGUSR2, with nothing else on its way to the log, and
    /// the log's writer does not look for a younger owner by itself: a zombie appends for certain, and the chain must refuse it.
    HoldAppend,
}

impl Failpoint {
    const ALL: [(&'static str, Failpoint); 5] = [
        ("no-self-fencing", Failpoint::NoSelfFencing),
        ("keep-older-sessions", Failpoint::KeepOlderSessions),
        ("hang-capture", Failpoint::HangCapture),
        ("hang-apply", Failpoint::HangApply),
        ("hold-append", Failpoint::HoldAppend),
    ];
}

/// The failpoints of this process.
#[derive(Clone, Debug, Default)]
pub struct Failpoints(Arc<Switches>);

#[derive(Debug, Default)]
struct Switches {
    on: BTreeSet<Failpoint>,
    fired: Mutex<BTreeSet<Failpoint>>,
    /// Whether SIGUSR1 came after the last SIGUSR2.
    holds: watch::Sender<bool>,
}

impl Failpoints {
    /// Reads a list of names.
    ///
    /// # Errors
    /// When a name is unknown.
    pub fn parse(list: &str) -> Result<Failpoints, String> {
        let mut set = BTreeSet::new();
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let known = Failpoint::ALL.iter().find(|(known, _)| *known == name);
            let Some((_, failpoint)) = known else {
                let names: Vec<&str> = Failpoint::ALL.iter().map(|(name, _)| *name).collect();
                return Err(format!("unknown failpoint {name:?} in WALLABY_FAILPOINTS; known: {}", names.join(", ")));
            };
            set.insert(*failpoint);
        }
        Ok(Failpoints(Arc::new(Switches { on: set, ..Switches::default() })))
    }

    /// Whether a failpoint is on.
    pub fn is_on(&self, failpoint: Failpoint) -> bool {
        self.0.on.contains(&failpoint)
    }

    /// Whether a failpoint is on and was not asked for here before: for faults that happen once in a process.
    pub fn fires_once(&self, failpoint: Failpoint) -> bool {
        // A set of plain values, whole after any panic.
        self.is_on(failpoint) && self.0.fired.lock().unwrap_or_else(PoisonError::into_inner).insert(failpoint)
    }

    /// Listens to the signals of [`Failpoint::HoldAppend`] when it is on, for as long as the runtime lives.
    ///
    /// # Errors
    /// When the signals cannot be watched.
    pub fn listen(&self) -> std::io::Result<()> {
        if !self.is_on(Failpoint::HoldAppend) {
            return Ok(());
        }
        let (mut hold, mut release) = (signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?);
        let switches = Arc::clone(&self.0);
        tokio::spawn(async move {
            loop {
                let holds = tokio::select! {
                    _ = hold.recv() => true,
                    _ = release.recv() => false,
                };
                tracing::warn!(holds, "a test's signal");
                switches.holds.send_replace(holds);
            }
        });
        Ok(())
    }

    /// Whether appends are held back now.
    pub fn holds_append(&self) -> bool {
        self.is_on(Failpoint::HoldAppend) && *self.0.holds.borrow()
    }

    /// Returns once appends are held back no more.
    pub async fn released(&self) {
        // The sender lives as long as this value.
        let _ = self.0.holds.subscribe().wait_for(|holds| !holds).await;
    }

    /// The failpoints that are on.
    pub fn on(&self) -> impl Iterator<Item = Failpoint> + '_ {
        self.0.on.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn names_are_checked() {
        let on = Failpoints::parse("no-self-fencing, hang-capture").unwrap();
        assert!(on.is_on(Failpoint::NoSelfFencing) && on.is_on(Failpoint::HangCapture));
        assert!(!on.is_on(Failpoint::KeepOlderSessions));
        assert!(on.fires_once(Failpoint::HangCapture) && !on.fires_once(Failpoint::HangCapture));
        assert!(!on.fires_once(Failpoint::HangApply));
        assert!(Failpoints::parse("nonsense").unwrap_err().contains("nonsense"));
        assert_eq!(Failpoints::parse("").unwrap().on().count(), 0);
    }
}
