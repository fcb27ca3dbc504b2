//! What all tasks of one worker share.

use std::sync::Arc;

use tokio::sync::OnceCell;
use wallaby_coordination::{Coordination, WorkerSession};
use wallaby_model::FlowId;
use wallaby_model::flow::LogSpec;
use wallaby_staging::{Connections, NatsTarget, PutBudget, SideStore, StagingError, SyncSource, open_side};

use crate::cache::RecordCache;
use crate::failpoint::Failpoints;
use crate::failures::Failures;
use crate::memory::Sizes;
use crate::options::Options;
use crate::places::Places;

/// See the module.
pub struct Shared {
    /// The settings.
    pub options: Options,
    /// etcd.
    pub coordination: Coordination,
    /// This worker's lease.
    pub session: WorkerSession,
    /// Protections that a test switched off.
    pub failpoints: Failpoints,
    /// Staged records in memory.
    pub cache: Arc<RecordCache>,
    /// What the parts of this worker may hold.
    pub sizes: Sizes,
    /// Bytes of chunks on their way to the side store, of all chunks that are read here.
    pub chunk_puts: PutBudget,
    /// For tasks that read or load chunks.
    pub places: Places,
    /// For those of them that pack or write rows larger than a message: each is in memory several times meanwhile, so they do it one
    /// after the other.
    pub huge_rows: Places,
    /// The tasks that failed here and rest.
    pub failures: Failures,
    nats: OnceCell<Connections>,
}

impl Shared {
    /// Puts the parts together; connects to NATS when it is first needed.
    pub fn new(
        options: Options,
        sizes: Sizes,
        coordination: Coordination,
        session: WorkerSession,
        failpoints: Failpoints,
    ) -> Shared {
        Shared {
            options,
            coordination,
            session,
            failpoints,
            cache: Arc::new(RecordCache::new(sizes.cache)),
            sizes,
            chunk_puts: PutBudget::new(sizes.chunk_puts),
            places: Places::new(sizes.chunks),
            huge_rows: Places::new(1),
            failures: Failures::default(),
            nats: OnceCell::new(),
        }
    }

    /// The NATS connections of this worker: made once, they heal themselves.
    ///
    /// # Errors
    /// When no server can be reached, or one is too old.
    pub async fn nats(&self) -> Result<&Connections, StagingError> {
        let target = nats_target(&self.options);
        self.nats.get_or_try_init(|| Connections::open(&target)).await
    }

    /// The side store of a flow.
    ///
    /// # Errors
    /// When no NATS server can be reached, or its place cannot be used.
    pub async fn side(&self, flow: &FlowId, log: &LogSpec) -> Result<Arc<dyn SideStore>, StagingError> {
        open_side(flow, log, self.nats().await?)
    }

    /// Where the servers' sync interval is read.
    pub fn sync_source(&self) -> SyncSource {
        if self.options.nats_monitoring.is_empty() {
            SyncSource::Unknown
        } else {
            SyncSource::Monitoring(self.options.nats_monitoring.clone())
        }
    }
}

/// The servers as the settings name them.
pub fn nats_target(options: &Options) -> NatsTarget {
    NatsTarget {
        servers: options.nats.clone(),
        credentials_file: options.nats_creds.clone(),
        ca_file: options.nats_ca.clone(),
        client_certificate: None,
        name: "wallaby-worker".to_owned(),
    }
}
