//! Purges the log up to what no reader needs: right after the takeover, then every 20 seconds.

use std::time::{Duration, SystemTime};

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{PurgeOutcome, TaskLock};
use wallaby_model::Position;
use wallaby_staging::{Log, Retention};

const EVERY: Duration = Duration::from_secs(20);

/// Starts the loop; it ends when dropped or when the lock is lost.
pub fn start(log: Log, lock: TaskLock, replay_window: Duration) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut retention = Retention::new(&log);
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !lock.is_valid_now() {
                return;
            }
            // The lowest hold decides; our own wish has no bound.
            let wanted = Position { commit: wallaby_model::Lsn(u64::MAX), ..Position::ZERO };
            let up_to = match lock.advance_purge_point(wanted).await {
                Ok(PurgeOutcome::UpTo(position)) => position,
                Ok(PurgeOutcome::Nothing) => continue,
                Err(error) if error.is_ownership_lost() => return,
                Err(error) => {
                    tracing::debug!(%error, "the purge point was not moved");
                    continue;
                }
            };
            if let Err(error) = retention.purge(up_to, replay_window, SystemTime::now()).await {
                tracing::warn!(flow = %log.flow(), %error, "the log was not purged");
            }
        }
    }))
}
