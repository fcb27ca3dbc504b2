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
    /// The code of every apply task panics as it begins.
    PanicApply,
    /// Every apply task gives itself up as it begins.
    GiveUpApply,
    /// The capture loop keeps the next segment at hand from SIGUSR1 to SIGUSR2, with nothing else on its way to the log, and
    /// the log's writer does not look for a younger owner by itself: a zombie appends for certain, and the chain must refuse it.
    HoldAppend,
    /// The capture loop stands still, once, when the log has acknowledged a segment that ends inside of a transaction.
    StopInsideTransaction,
    /// The capture loop stands still, once, after it sent off a part of a large transaction.
    StopAfterPart,
    /// The capture loop stands still, once, when a large transaction's parts and manifest are acknowledged and its splice is not sent.
    StopAfterManifest,
    /// The reader of a chunk stands still, once, with a part at hand that is not on its way to the side store.
    StopBeforeChunkPart,
    /// The reader of a chunk stands still, once, when etcd has its mark and it has not heard of that.
    StopAfterChunkMarked,
    /// The reader of a chunk is told, once, that etcd did not answer when it marked the chunk. It is marked.
    LoseChunkMark,
    /// The owner of a run stands still, once, when the log is held and the snapshot exported, and no plan says so.
    StopBeforePlan,
    /// The owner of a run that is over stands still, once, when its chunks are gone and etcd does not say that it is over.
    StopBeforeRunFinished,
    /// The same, when etcd says so and has the keys of its chunks.
    StopAfterRunFinished,
    /// A replay stands still, once, when it and the main stream stand at one position and its tables are not ready there.
    StopBeforeHandOver,
    /// The same, when they are.
    StopAfterHandOver,
    /// A new flow's capture stands still, once, when the publication is made and the slot is not.
    StopAfterPublicationMade,
    /// A new flow's capture stands still, once, when the slot is made and the log does not say where it begins.
    StopAfterSlotMade,
    /// The capture stands still, once, when the log has its resume record and etcd no checkpoint that says so.
    StopAfterResume,
    /// The capture stands still, once, when tables are in the publication and no run is made that loads them.
    StopAfterTablesPublished,
    /// The capture stands still, once, when a run is made that loads tables and etcd does not know these tables.
    StopBeforeTablesKnown,
    /// The purge stands still, once, when etcd has the purge point and the log is as it was.
    StopBeforePurge,
    /// The purge stands still, once, when the log was purged and nobody acted upon that.
    StopAfterPurge,
    /// An apply task stands still, once, with its sink opened and nothing else done there.
    StopAfterSinkOpened,
    /// A first load stands still, once, when the sink has made a table and etcd does not know it.
    StopAfterTableMade,
    /// An apply task stands still, once, when the sink has all that it needs but the position where its stream begins.
    StopBeforeStream,
    /// The removal of a flow stands still, once, before anything of it went.
    StopBeforeRemoval,
    /// The same, when the slot is gone.
    StopAfterSlotDropped,
    /// The same, when the publication is gone too.
    StopAfterPublicationDropped,
    /// The same, when the side store is gone too.
    StopAfterSideRemoved,
    /// The same, when everything is gone but the flow's keys.
    StopAfterLogDeleted,
}

impl Failpoint {
    /// Its name in the list.
    pub fn name(self) -> &'static str {
        Failpoint::ALL.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }

    const ALL: [(&'static str, Failpoint); 33] = [
        ("no-self-fencing", Failpoint::NoSelfFencing),
        ("keep-older-sessions", Failpoint::KeepOlderSessions),
        ("hang-capture", Failpoint::HangCapture),
        ("hang-apply", Failpoint::HangApply),
        ("panic-apply", Failpoint::PanicApply),
        ("give-up-apply", Failpoint::GiveUpApply),
        ("hold-append", Failpoint::HoldAppend),
        ("stop-inside-transaction", Failpoint::StopInsideTransaction),
        ("stop-after-part", Failpoint::StopAfterPart),
        ("stop-after-manifest", Failpoint::StopAfterManifest),
        ("stop-before-chunk-part", Failpoint::StopBeforeChunkPart),
        ("stop-after-chunk-marked", Failpoint::StopAfterChunkMarked),
        ("lose-chunk-mark", Failpoint::LoseChunkMark),
        ("stop-before-plan", Failpoint::StopBeforePlan),
        ("stop-before-run-finished", Failpoint::StopBeforeRunFinished),
        ("stop-after-run-finished", Failpoint::StopAfterRunFinished),
        ("stop-before-hand-over", Failpoint::StopBeforeHandOver),
        ("stop-after-hand-over", Failpoint::StopAfterHandOver),
        ("stop-after-publication-made", Failpoint::StopAfterPublicationMade),
        ("stop-after-slot-made", Failpoint::StopAfterSlotMade),
        ("stop-after-resume", Failpoint::StopAfterResume),
        ("stop-after-tables-published", Failpoint::StopAfterTablesPublished),
        ("stop-before-tables-known", Failpoint::StopBeforeTablesKnown),
        ("stop-before-purge", Failpoint::StopBeforePurge),
        ("stop-after-purge", Failpoint::StopAfterPurge),
        ("stop-after-sink-opened", Failpoint::StopAfterSinkOpened),
        ("stop-after-table-made", Failpoint::StopAfterTableMade),
        ("stop-before-stream", Failpoint::StopBeforeStream),
        ("stop-before-removal", Failpoint::StopBeforeRemoval),
        ("stop-after-slot-dropped", Failpoint::StopAfterSlotDropped),
        ("stop-after-publication-dropped", Failpoint::StopAfterPublicationDropped),
        ("stop-after-side-removed", Failpoint::StopAfterSideRemoved),
        ("stop-after-log-deleted", Failpoint::StopAfterLogDeleted),
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
    /// Where a loop stands still now.
    stopped: watch::Sender<BTreeSet<Failpoint>>,
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

    /// Stands still here, once, when the failpoint is on: until [`Failpoints::let_go`], or until a test ends the worker.
    pub async fn stop(&self, failpoint: Failpoint) {
        if !self.fires_once(failpoint) {
            return;
        }
        tracing::warn!(?failpoint, "standing still for a test");
        self.0.stopped.send_modify(|stopped| _ = stopped.insert(failpoint));
        // The sender lives as long as this value.
        let _ = self.0.stopped.subscribe().wait_for(|stopped| !stopped.contains(&failpoint)).await;
    }

    /// Returns once a loop stands still here.
    pub async fn reached(&self, failpoint: Failpoint) {
        let _ = self.0.stopped.subscribe().wait_for(|stopped| stopped.contains(&failpoint)).await;
    }

    /// Lets a loop go on that stands still here.
    pub fn let_go(&self, failpoint: Failpoint) {
        self.0.stopped.send_modify(|stopped| _ = stopped.remove(&failpoint));
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

    #[tokio::test]
    async fn a_loop_stands_still_once_until_it_is_let_go() {
        let on = Failpoints::parse("stop-after-part").unwrap();
        let stopped = on.clone();
        let standing = tokio::spawn(async move { stopped.stop(Failpoint::StopAfterPart).await });
        on.reached(Failpoint::StopAfterPart).await;
        assert!(!standing.is_finished());
        on.let_go(Failpoint::StopAfterPart);
        standing.await.unwrap();
        on.stop(Failpoint::StopAfterPart).await;
        on.stop(Failpoint::StopAfterManifest).await;
    }
}
