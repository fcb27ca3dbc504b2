//! Puts in flight, bounded in bytes: what feeds a side store waits for room instead of piling up. The bound is one of a window: from the
//! oldest object of an attempt that is not kept yet to the newest that was sent. So an object that is tried again for long lands before
//! those that are more than the budget behind it, and what a lost tail takes of an attempt is among its last objects.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::{SideKey, SideStore};
use crate::error::{Result, StagingError};

/// Bytes in flight when nothing else is said.
const BYTES_DEFAULT: u32 = 8 << 20;

/// How many bytes may be in flight, over all [`Puts`] that share it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PutBudget {
    room: Arc<Semaphore>,
    bytes: u32,
}

impl PutBudget {
    /// `bytes` at a time. One object larger than that goes alone.
    pub fn new(bytes: u32) -> PutBudget {
        PutBudget { room: Arc::new(Semaphore::new(bytes as usize)), bytes }
    }

    /// How many that are.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }
}

impl Default for PutBudget {
    /// 8 MiB.
    fn default() -> PutBudget {
        PutBudget::new(BYTES_DEFAULT)
    }
}

/// The puts of one attempt. Dropped, it gives up what is still on its way; that may arrive nevertheless.
pub struct Puts {
    side: Arc<dyn SideStore>,
    budget: PutBudget,
    running: JoinSet<Result<()>>,
    /// Resolves once everything that was sent is kept, or is not tried any more.
    before: Option<oneshot::Receiver<()>>,
    failed: Option<StagingError>,
}

impl fmt::Debug for Puts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Puts").field("in_flight", &self.running.len()).field("failed", &self.failed).finish()
    }
}

impl Puts {
    /// Into `side`, within `budget`. Must be used inside a tokio runtime.
    pub fn new(side: Arc<dyn SideStore>, budget: PutBudget) -> Puts {
        Puts { side, budget, running: JoinSet::new(), before: None, failed: None }
    }

    /// Sends an object off once there is room for it. Cancel-safe: cancelled, it was not sent.
    ///
    /// # Errors
    /// The first error of an object that was sent before: from then on nothing is sent any more.
    pub async fn put(&mut self, key: SideKey, body: Bytes) -> Result<()> {
        self.check()?;
        let bytes = u32::try_from(body.len()).unwrap_or(u32::MAX).clamp(1, self.budget.bytes.max(1));
        let room = Arc::clone(&self.budget.room).acquire_many_owned(bytes).await;
        let room = room.map_err(|error| StagingError::unavailable("room to put an object", error))?;
        self.check()?;
        let side = Arc::clone(&self.side);
        let (kept, is_kept) = oneshot::channel::<()>();
        let before = self.before.replace(is_kept);
        self.running.spawn(async move {
            let put = side.put(key, body).await;
            if put.is_ok()
                && let Some(before) = before
            {
                // Its room is part of the window as long as an older one is on its way.
                let _kept_or_given_up = before.await;
            }
            drop((room, kept));
            put
        });
        Ok(())
    }

    /// Waits until everything that was sent is kept. Cancel-safe.
    ///
    /// # Errors
    /// The first error; it stays.
    pub async fn settled(&mut self) -> Result<()> {
        while let Some(put) = self.running.join_next().await {
            self.note(put);
            self.check()?;
        }
        self.check()
    }

    /// Takes what is answered, without waiting.
    fn check(&mut self) -> Result<()> {
        while let Some(put) = self.running.try_join_next() {
            self.note(put);
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn note(&mut self, put: Result<Result<()>, tokio::task::JoinError>) {
        let put = put.unwrap_or_else(|error| Err(StagingError::unavailable("a put into the side store", error)));
        if let Err(error) = put
            && self.failed.is_none()
        {
            self.failed = Some(error);
            // Nobody will use the attempt.
            self.running.abort_all();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;
    use wallaby_model::{Attempt, Epoch};

    use super::super::{Shelf, ShelfUsage, SideGroup};
    use super::*;

    /// A store that keeps everything at once, but for the first part: that is tried until it is let through.
    #[derive(Debug, Default)]
    struct FirstLate {
        through: Notify,
        kept: AtomicU32,
    }

    #[async_trait::async_trait]
    impl SideStore for FirstLate {
        fn part_bytes_target(&self) -> usize {
            0
        }
        async fn ensure(&self, _shelf: Shelf) -> Result<()> {
            Ok(())
        }
        async fn put(&self, key: SideKey, _body: Bytes) -> Result<()> {
            if let SideKey::Part { number: 0, .. } = key {
                self.through.notified().await;
            }
            self.kept.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        async fn get(&self, _key: SideKey) -> Result<Option<Bytes>> {
            Ok(None)
        }
        async fn delete(&self, _group: SideGroup) -> Result<()> {
            Ok(())
        }
        async fn list(&self, _shelf: Shelf) -> Result<Vec<SideGroup>> {
            Ok(Vec::new())
        }
        async fn usage(&self, _shelf: Shelf) -> Result<ShelfUsage> {
            Ok(ShelfUsage::default())
        }
        async fn holders(&self, _shelf: Shelf) -> Result<Vec<String>> {
            Ok(Vec::new())
        }
        async fn remove_shelf(&self, _shelf: Shelf) -> Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn h09_what_is_sent_stays_within_the_budget_of_what_is_still_tried() {
        let side = Arc::new(FirstLate::default());
        let mut puts = Puts::new(Arc::clone(&side) as Arc<dyn SideStore>, PutBudget::new(10));
        let attempt = Attempt { epoch: Epoch(1), connection: 1, xid: 1 };
        let mut put = async |number| {
            let put = puts.put(SideKey::Part { attempt, number }, Bytes::from_static(b"x"));
            // Time only goes on when nothing else can.
            tokio::time::timeout(Duration::from_secs(60), put).await.map(|put| put.unwrap())
        };
        for number in 0..10 {
            put(number).await.unwrap();
        }
        put(10).await.unwrap_err();
        assert_eq!(side.kept.load(Ordering::Relaxed), 9);
        side.through.notify_one();
        for number in 10..100 {
            put(number).await.unwrap();
        }
        puts.settled().await.unwrap();
        assert_eq!(side.kept.load(Ordering::Relaxed), 100);
    }
}
