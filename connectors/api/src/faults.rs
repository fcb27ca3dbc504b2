//! Faults that a sink injects into itself on demand, so that tests can stop it at the moments that matter.
//!
//! A session that dies between its writes and its commit, or freezes there with its locks held, cannot be made from
//! outside at the right instant. Sinks take a [`Faults`] in their configuration; the default does nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// What a sink does to itself.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// `open` ends no session of an older owner, so that an old owner lives on and must be refused by its epoch.
    pub keep_older_sessions: bool,
    /// What happens to a batch after its rows are written and before they are committed.
    pub before_commit: Option<CommitFault>,
}

/// A fault between write and commit.
#[derive(Clone, Debug)]
pub enum CommitFault {
    /// The session is gone, as after `kill -9`; `apply` answers with a transient error.
    Die,
    /// The owner freezes inside its open transaction: `apply` never answers until the point is released.
    Hang(Arc<HangPoint>),
}

/// Where a sink freezes.
#[derive(Debug, Default)]
pub struct HangPoint {
    is_reached: AtomicBool,
    reached: Notify,
    is_released: AtomicBool,
    released: Notify,
}

impl HangPoint {
    /// Called by the sink: says that it is here, and waits to be released.
    pub async fn hang(&self) {
        self.is_reached.store(true, Ordering::SeqCst);
        self.reached.notify_waiters();
        wait(&self.is_released, &self.released).await;
    }

    /// Returns once the sink hangs.
    pub async fn reached(&self) {
        wait(&self.is_reached, &self.reached).await;
    }

    /// Lets the sink go on.
    pub fn release(&self) {
        self.is_released.store(true, Ordering::SeqCst);
        self.released.notify_waiters();
    }
}

async fn wait(flag: &AtomicBool, notify: &Notify) {
    loop {
        // Registered before the flag is read, or a notification in between would be missed.
        let mut notified = std::pin::pin!(notify.notified());
        notified.as_mut().enable();
        if flag.load(Ordering::SeqCst) {
            return;
        }
        notified.await;
    }
}
