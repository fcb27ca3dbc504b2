//! Purges the log up to what no reader needs: right after the takeover, then every 20 seconds, and at once when room runs short.
//!
//! The replay window is a wish. While the log is short of room it is halved until there is room again, down to nothing; what a
//! reader still needs is never touched. When there is room it grows back.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, PurgeOutcome, TaskLock};
use wallaby_model::condition::ConditionType;
use wallaby_model::{Epoch, Position};
use wallaby_staging::{Log, LogInfo, RESERVE_BYTES, Shelf, SideStore, Sweep, log_begins, sweep_transactions};

use super::CaptureError;
use super::side::Living;
use super::splices::Unconfirmed;
use crate::detach::Overrun;
use crate::failpoint::{Failpoint, Failpoints};
use crate::metrics;
use crate::run::sweep::sweep_chunks;
use crate::status::StatusBoard;

/// How often it is looked whether there is room.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Every how many looks a purge is due although there is room.
const PURGE_EVERY_LOOKS: u64 = 10;
/// Every how many looks the side store is swept.
const SWEEP_EVERY_LOOKS: u64 = 30;
/// A window below this is none.
const WINDOW_LEAST: Duration = Duration::from_secs(1);

/// Starts the loop; it ends when dropped or when the lock is lost.
pub fn start(
    log: Log,
    lock: TaskLock,
    replay_window: Duration,
    sweeper: Sweeper,
    mut overrun: Overrun,
    status: StatusBoard,
    failpoints: Failpoints,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut purged_to = Position::ZERO;
        let mut window = Window { wanted: replay_window, now: replay_window };
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for look in 0_u64.. {
            ticks.tick().await;
            if !lock.is_valid_now() {
                return;
            }
            let is_due = look.is_multiple_of(PURGE_EVERY_LOOKS);
            let mut is_short = is_short_of_room(&log).await;
            if is_due && !is_short {
                window.grow();
            }
            let was_short = is_short;
            let mut again = is_due || is_short;
            while again {
                if is_short {
                    window.shrink(&log);
                }
                let Ok(has_purged) = purge(&log, &lock, window.now, &failpoints).await else { return };
                purged_to = has_purged.unwrap_or(purged_to);
                is_short = has_purged.is_some() && is_short_of_room(&log).await;
                again = is_short && !window.now.is_zero();
            }
            window.tell(&status);
            // Everything went that the holds allow: who holds it now, and goes on holding it, is cut off.
            if was_short && window.now.is_zero() && is_short_of_room(&log).await {
                if let Err(error) = overrun.detach().await {
                    tracing::warn!(flow = %log.flow(), %error, "it was not decided who is to be cut off from a full log");
                }
            } else {
                overrun.acquit();
            }
            if is_due && let Ok(usage) = sweeper.side.usage(Shelf::Transactions).await {
                metrics::side_store(log.flow(), "transactions", usage.bytes);
            }
            if look.is_multiple_of(SWEEP_EVERY_LOOKS)
                && let Err(error) = sweeper.sweep(&log, purged_to).await
            {
                tracing::warn!(flow = %log.flow(), %error, "the side store was not swept");
            }
        }
    }))
}

struct Window {
    wanted: Duration,
    now: Duration,
}

impl Window {
    fn grow(&mut self) {
        self.now = (self.now * 2).max(WINDOW_LEAST).min(self.wanted);
    }

    fn shrink(&mut self, log: &Log) {
        if self.now == self.wanted && !self.wanted.is_zero() {
            let wanted_s = self.wanted.as_secs();
            tracing::warn!(flow = %log.flow(), wanted_s, "the log is short of room: its replay window is shortened");
        }
        let half = self.now / 2;
        self.now = if half < WINDOW_LEAST { Duration::ZERO } else { half };
    }

    /// Says whether the wish is fulfilled (protocol.md, "retention": it is shortened, with a condition).
    fn tell(&self, status: &StatusBoard) {
        let (now, wanted) = (self.now.as_secs(), self.wanted.as_secs());
        if self.now >= self.wanted {
            return status.condition(ConditionType::LogHealthy, true, "ReplayWindowKept", "");
        }
        let message = format!(
            "the log was short of room: segments that no reader needs any more stay for {now} s, not for the {wanted} s of \
             spec.log.replayWindow; this grows back while there is room. Raise spec.log.maxBytes, or ask for a shorter window"
        );
        status.condition(ConditionType::LogHealthy, false, "ReplayWindowShortened", &message);
    }
}

/// Removes from the side store what nobody reads any more: attempts that no manifest names, and, once the purge has passed a splice,
/// its manifest and parts; and what landed of a run after its end, when everything of it had been removed.
#[derive(Clone)]
pub struct Sweeper {
    /// The side store.
    pub side: Arc<dyn SideStore>,
    /// Says which runs are over.
    pub coordination: Coordination,
    /// The owner's epoch. Its fence is acknowledged.
    pub epoch: Epoch,
    /// What it is putting just now.
    pub living: Living,
    /// What is looked for before Postgres is told of it.
    pub unconfirmed: Unconfirmed,
}

impl Sweeper {
    /// Sweeps once. `purged_to` is the purge point.
    pub async fn sweep(&self, log: &Log, purged_to: Position) -> Result<(), CaptureError> {
        // A replay window keeps more than the purge point says.
        let begins = log_begins(log).await?.unwrap_or(Position::ZERO);
        let mut purged_to = purged_to.min(begins);
        if let Some(commit) = self.unconfirmed.first() {
            // The sinks can be past a splice long before Postgres is told of it. What is not found then counts as lost.
            purged_to = purged_to.min(Position::before(commit));
        }
        let what = Sweep { epoch: self.epoch, purged_to, living: &|| self.living.now() };
        let mut swept = sweep_transactions(self.side.as_ref(), &what).await?;
        swept.extend(sweep_chunks(&self.coordination, log.flow(), self.side.as_ref()).await?);
        if !swept.is_empty() {
            tracing::info!(flow = %log.flow(), groups = swept.len(), "swept the side store");
        }
        Ok(())
    }
}

/// Purges once, and says up to where. `Ok(None)` when nothing may go, `Err` when the lock is lost.
async fn purge(log: &Log, lock: &TaskLock, window: Duration, failpoints: &Failpoints) -> Result<Option<Position>, ()> {
    // The lowest hold decides; our own wish has no bound.
    let wanted = Position { commit: wallaby_model::Lsn(u64::MAX), ..Position::ZERO };
    let up_to = match lock.advance_purge_point(wanted).await {
        Ok(PurgeOutcome::UpTo(position)) => position,
        Ok(PurgeOutcome::Nothing) => return Ok(None),
        Err(error) if error.is_ownership_lost() => return Err(()),
        Err(error) => {
            tracing::debug!(%error, "the purge point was not moved");
            return Ok(None);
        }
    };
    failpoints.stop(Failpoint::StopBeforePurge).await;
    if let Err(error) = log.purge(up_to, window, SystemTime::now()).await {
        tracing::warn!(flow = %log.flow(), %error, "the log was not purged");
        return Ok(None);
    }
    failpoints.stop(Failpoint::StopAfterPurge).await;
    Ok(Some(up_to))
}

async fn is_short_of_room(log: &Log) -> bool {
    log.info().await.is_ok_and(|info| is_short(&info))
}

/// Whether three quarters of what data may take are taken.
fn is_short(info: &LogInfo) -> bool {
    let room = info.max_bytes.saturating_sub(RESERVE_BYTES);
    info.bytes > room / 4 * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_quarters_of_the_room_for_data_are_short() {
        let info = |bytes| LogInfo {
            replicas: 1,
            leader: None,
            servers: vec![],
            has_quorum: true,
            messages: 1,
            bytes,
            max_bytes: 2 * RESERVE_BYTES,
            first_sequence: 1,
            last_sequence: 1,
        };
        assert!(!is_short(&info(12 << 20)));
        assert!(is_short(&info((12 << 20) + 1)));
    }
}
