//! Puts in flight, bounded in bytes: what feeds a side store waits for room instead of piling up.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Semaphore;
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
        Puts { side, budget, running: JoinSet::new(), failed: None }
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
        self.running.spawn(async move {
            let put = side.put(key, body).await;
            drop(room);
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
