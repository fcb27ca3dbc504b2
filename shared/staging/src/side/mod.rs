//! The side store of one flow: parts that are too big or too early for the log, kept until a splice or a run makes them visible.
//!
//! Objects are named by [`SideKey`] and go by [`SideGroup`]. An object is whole or not there: what [`SideStore::put`] acknowledged is
//! as durable as the log's own acknowledgements (the same servers), or at rest (an object store). Objects are never
//! changed but for manifests, which a later owner may write again (hazard 9).
//!
//! The two shelves have quotas of their own: a dead sink whose chunks pile up must not keep large transactions out, nor the other
//! way round (hazard 16).

mod envelope;
mod jetstream;
#[cfg(feature = "object-store")]
mod objects;
mod open;
mod path;
mod puts;
mod sweep;

pub use jetstream::JetStreamSide;
#[cfg(feature = "object-store")]
pub use objects::ObjectSide;
pub use open::{Quotas, open_side};
pub use puts::{PutBudget, Puts};
pub use sweep::{Sweep, sweep, sweep_transactions};

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use wallaby_model::{Attempt, ChunkId, Epoch, Lsn, RunId};

use crate::error::Result;

/// Which quota an object counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Shelf {
    /// Parts and manifests of large transactions.
    Transactions,
    /// Parts of chunks.
    Chunks,
}

impl Shelf {
    /// Both.
    pub const ALL: [Shelf; 2] = [Shelf::Transactions, Shelf::Chunks];
}

/// Names an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SideKey {
    /// A part of a transaction.
    Part {
        /// Whose.
        attempt: Attempt,
        /// From 0.
        number: u32,
    },
    /// The manifest of the transaction with this commit LSN. The last one that was put counts.
    Manifest {
        /// Its commit LSN.
        commit: Lsn,
    },
    /// A part of a chunk.
    ChunkPart {
        /// The run.
        run: RunId,
        /// The chunk.
        chunk: ChunkId,
        /// The epoch of the chunk task that wrote it: two readers of one chunk never mix their parts.
        attempt: Epoch,
        /// From 0.
        number: u32,
    },
}

/// Objects that go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SideGroup {
    /// All parts of an attempt.
    Attempt(Attempt),
    /// One manifest.
    Manifest(Lsn),
    /// All parts of one attempt at a chunk.
    ChunkAttempt(RunId, ChunkId, Epoch),
    /// Everything of a run.
    Run(RunId),
}

/// How full a shelf is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ShelfUsage {
    /// Bytes that are taken.
    pub bytes: u64,
    /// Bytes that may be taken.
    pub bytes_max: u64,
}

impl SideKey {
    /// The shelf it stands on.
    pub fn shelf(&self) -> Shelf {
        match self {
            SideKey::Part { .. } | SideKey::Manifest { .. } => Shelf::Transactions,
            SideKey::ChunkPart { .. } => Shelf::Chunks,
        }
    }

    /// The smallest group that it goes with.
    pub fn group(&self) -> SideGroup {
        match self {
            SideKey::Part { attempt, .. } => SideGroup::Attempt(*attempt),
            SideKey::Manifest { commit } => SideGroup::Manifest(*commit),
            SideKey::ChunkPart { run, chunk, attempt, .. } => SideGroup::ChunkAttempt(*run, *chunk, *attempt),
        }
    }
}

impl SideGroup {
    /// The shelf it stands on.
    pub fn shelf(&self) -> Shelf {
        match self {
            SideGroup::Attempt(_) | SideGroup::Manifest(_) => Shelf::Transactions,
            SideGroup::ChunkAttempt(..) | SideGroup::Run(_) => Shelf::Chunks,
        }
    }
}

/// Where parts are kept.
#[async_trait]
pub trait SideStore: Send + Sync + fmt::Debug {
    /// Bytes of a part that cost one message or one request: cut parts to this. Larger objects are taken too, in pieces.
    fn part_bytes_target(&self) -> usize;

    /// Makes a shelf, or checks the one that is there and brings its quota to what the flow says. Before the first put: a put
    /// makes nothing, so that a late one cannot bring back what was removed.
    ///
    /// # Errors
    /// `SideNoRoom` when the quota cannot be reserved; `NotASide`, `NoServers`, `SidePlace`; `Unavailable` when it does not answer.
    async fn ensure(&self, shelf: Shelf) -> Result<()>;

    /// Keeps an object. Putting the same object again is harmless, also on a shelf that has become full. Waits through the
    /// election of a leader, some seconds.
    ///
    /// Of manifests with one commit LSN that of the highest attempt counts, and of one attempt's the last: a late put of an owner
    /// that was fenced never hides its successor's.
    ///
    /// # Errors
    /// `SideFull` when the shelf's quota is used up; `SideMissing` when the shelf was not made; `SideTailLost` when what was put before
    /// is gone in part; `NotAManifest`; `Unavailable` when it does not answer. After an error the object may be there or not.
    async fn put(&self, key: SideKey, body: Bytes) -> Result<()>;

    /// An object; `None` when it is not there, or not whole.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn get(&self, key: SideKey) -> Result<Option<Bytes>>;

    /// Removes all objects of a group. One that is not there is fine.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn delete(&self, group: SideGroup) -> Result<()>;

    /// The groups that have objects, or pieces of one: attempts and manifests, or chunk attempts. Each once, ascending; what is
    /// put or deleted meanwhile may be missing or not. Of a shelf that does not exist: none.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn list(&self, shelf: Shelf) -> Result<Vec<SideGroup>>;

    /// How full a shelf is. One that does not exist is empty.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn usage(&self, shelf: Shelf) -> Result<ShelfUsage>;

    /// The names of the servers that hold a copy of a shelf, whose sync policy counts for what was put
    /// ([`crate::sync_policy`]). Empty where the servers are not known by name, where what is acknowledged is at rest, and for a shelf
    /// that does not exist.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn holders(&self, shelf: Shelf) -> Result<Vec<String>>;

    /// Removes a shelf with everything on it, and what holds it. One that is not there is fine.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn remove_shelf(&self, shelf: Shelf) -> Result<()>;

    /// Removes everything, and what holds it: the flow is gone.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    async fn remove(&self) -> Result<()> {
        self.remove_shelf(Shelf::Transactions).await?;
        self.remove_shelf(Shelf::Chunks).await
    }
}
