//! Tells Postgres what is durable in the log: a loop of its own, so that it goes on while the capture loop waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::TaskLock;
use wallaby_model::Lsn;
use wallaby_postgres_source::Feedback;
use wallaby_staging::SideStore;

use super::splices::Unconfirmed;

/// When a splice could not be looked at, it is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// Starts the loop; it ends when dropped, when the log's writer ends, or when the lock is no longer ours.
pub fn start(
    feedback: Feedback,
    mut durable: watch::Receiver<Lsn>,
    lock: TaskLock,
    side: Arc<dyn SideStore>,
    unconfirmed: Unconfirmed,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let lsn = *durable.borrow_and_update();
            // A zombie confirms nothing: what it thinks is durable may have been staged by a successor, or not at all.
            let allowed = unconfirmed.allow(side.as_ref(), lsn).await;
            if allowed > Lsn::ZERO && lock.is_valid_now() {
                feedback.confirm(allowed);
            }
            tokio::select! {
                changed = durable.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if allowed < lsn => {}
            }
        }
    }))
}
