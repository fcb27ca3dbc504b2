//! Tells Postgres what is durable in the log: a loop of its own, so that it goes on while the capture loop waits.

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::TaskLock;
use wallaby_model::Lsn;
use wallaby_postgres_source::Feedback;

/// Starts the loop; it ends when dropped, when the log's writer ends, or when the lock is no longer ours.
pub fn start(feedback: Feedback, mut durable: watch::Receiver<Lsn>, lock: TaskLock) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let lsn = *durable.borrow_and_update();
            // A zombie confirms nothing: what it thinks is durable may have been staged by a successor, or not at all.
            if lsn > Lsn::ZERO && lock.is_valid_now() {
                feedback.confirm(lsn);
            }
            if durable.changed().await.is_err() {
                return;
            }
        }
    }))
}
