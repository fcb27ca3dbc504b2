//! From a flow's file to its side store.

use std::sync::Arc;

use wallaby_model::FlowId;
use wallaby_model::flow::{LogSpec, SideStoreSpec};

use super::{JetStreamSide, Shelf, SideStore};
use crate::connection::Connections;
use crate::error::{Result, StagingError};

/// The most bytes on each shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Of parts and manifests of large transactions.
    pub transactions: u64,
    /// Of parts of chunks.
    pub chunks: u64,
}

impl Quotas {
    /// As the flow's file says.
    pub fn of(log: &LogSpec) -> Quotas {
        Quotas { transactions: log.side_transactions_max().0, chunks: log.side_chunks_max().0 }
    }

    /// Of one shelf.
    pub fn on(&self, shelf: Shelf) -> u64 {
        match shelf {
            Shelf::Transactions => self.transactions,
            Shelf::Chunks => self.chunks,
        }
    }
}

/// The side store of a flow; no I/O. Call [`SideStore::ensure`] for a shelf before the first put on it. Must be called inside a tokio
/// runtime.
///
/// # Errors
/// `SidePlace` when the place that the flow's file names cannot be used from this program.
pub fn open_side(flow: &FlowId, log: &LogSpec, connections: &Connections) -> Result<Arc<dyn SideStore>> {
    let quotas = Quotas::of(log);
    match &log.side_store {
        SideStoreSpec::Jetstream(_) => {
            Ok(Arc::new(JetStreamSide::new(flow.clone(), connections.clone(), log.replicas, quotas)))
        }
        SideStoreSpec::ObjectStore(spec) => Err(StagingError::SidePlace {
            flow: flow.clone(),
            place: spec.url.clone(),
            reason: "this program was built without object stores".to_owned(),
        }),
    }
}
