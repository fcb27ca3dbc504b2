//! Sessions that wait for the other side. A snapshot is a transaction that stays open, and servers end those that ask nothing for too
//! long: one side of a table may take hours longer than the other.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::{VerifyError, VerifySession};

/// One side's half of something that both sides do at once.
pub(super) struct Half {
    is_done: watch::Sender<bool>,
    other: watch::Receiver<bool>,
    /// How often this side is asked something while it waits.
    pub every: Duration,
}

/// The halves of something that both sides do at once. `every`: how often a side that is done first is asked something meanwhile.
pub(super) fn halves(every: Duration) -> (Half, Half) {
    let ((one, of_one), (two, of_two)) = (watch::channel(false), watch::channel(false));
    (Half { is_done: one, other: of_two, every }, Half { is_done: two, other: of_one, every })
}

impl Half {
    /// This side is done, and stays awake until the other one is.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn done(mut self, session: &mut dyn VerifySession) -> Result<(), VerifyError> {
        self.is_done.send_replace(true);
        // Also when the other one failed: then nobody waits for this side either.
        let other_is_done = async {
            let _or_gone = self.other.wait_for(|is_done| *is_done).await.is_ok();
            Ok(())
        };
        beside(session, self.every, other_is_done).await
    }
}

/// Works with the one side while the other stays awake.
///
/// # Errors
/// As the work, or when the other side cannot be asked.
pub(super) async fn beside<T>(
    other: &mut dyn VerifySession,
    every: Duration,
    work: impl Future<Output = Result<T, VerifyError>>,
) -> Result<T, VerifyError> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = sleep(every) => drop(other.rows("SELECT 1").await?),
        }
    }
}
