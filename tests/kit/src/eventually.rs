//! Waiting in tests.

use std::fmt::Debug;
use std::future::Future;
use std::panic::Location;
use std::time::{Duration, Instant};

use crate::server_logs;

const POLL: Duration = Duration::from_millis(10);
/// How many log lines of each shared server a failure carries.
const LOG_LINES: usize = 10;

/// Asks until the answer is `Ok`, at most for `patience`, and returns it. Panics at the caller's line with the last `Err`, which is the state that
/// was seen, and the last log lines of the shared servers.
///
/// The clock is the real one, also in a test that stopped tokio's.
#[track_caller]
pub fn eventually<T, E, Q>(patience: Duration, what: &str, mut question: Q) -> impl Future<Output = T>
where
    Q: AsyncFnMut() -> Result<T, E>,
    E: Debug,
{
    let caller = Location::caller();
    async move {
        let started = Instant::now();
        loop {
            let left = patience.saturating_sub(started.elapsed());
            // An answer that never comes counts as one, or a hanging server would hang the test.
            let last = match tokio::time::timeout(left.max(POLL), question()).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(state)) => format!("{state:?}"),
                Err(_) => "the question itself was not answered in time".to_owned(),
            };
            if started.elapsed() >= patience {
                panic!("{caller}: not within {patience:?}: {what}; last seen: {last}\n{}", server_logs(LOG_LINES));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
