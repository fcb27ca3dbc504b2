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
        SideStoreSpec::ObjectStore(spec) => open_url(flow, &spec.url, quotas),
    }
}

fn refused(flow: &FlowId, url: &str, reason: impl std::fmt::Display) -> StagingError {
    StagingError::SidePlace { flow: flow.clone(), place: url.to_owned(), reason: reason.to_string() }
}

/// By the URL of the flow's file, which was checked there.
#[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "nothing to open it with"))]
fn open_url(flow: &FlowId, url: &str, quotas: Quotas) -> Result<Arc<dyn SideStore>> {
    #[cfg(feature = "object-store")]
    if let Some(folder) = url.strip_prefix("file://") {
        return Ok(Arc::new(super::ObjectSide::in_folder(std::path::Path::new(folder), flow.clone(), quotas)?));
    }
    #[cfg(feature = "s3")]
    if let Some(place) = url.strip_prefix("s3://") {
        return Ok(Arc::new(open_s3(flow, url, place, quotas)?));
    }
    Err(refused(flow, url, "this program was built without what speaks to such a place"))
}

/// Credentials, region and endpoint come from the environment of the worker (`AWS_…`), never from the flow's file.
#[cfg(feature = "s3")]
fn open_s3(flow: &FlowId, url: &str, place: &str, quotas: Quotas) -> Result<super::ObjectSide> {
    use std::time::Duration;

    use object_store::RetryConfig;
    use object_store::aws::AmazonS3Builder;

    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    // A task that waits for longer is taken for one that hangs.
    let retry = RetryConfig { retry_timeout: Duration::from_secs(15), ..RetryConfig::default() };
    let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).build();
    let store =
        store.map_err(|error| refused(flow, url, format!("{error}; set AWS_REGION and credentials on the workers")))?;
    let prefix = prefix.trim_matches('/');
    Ok(super::ObjectSide::new(Arc::new(store), url.to_owned(), prefix, flow.clone(), quotas))
}
