//! The worker's cache of staged records: one for all flows, bounded in bytes, in memory.
//!
//! Capture puts a record after its acknowledgement, readers put what they pull, and pull together where they stand together:
//! several sinks of a flow pull a record once, and find it here also when one is a little behind.

use std::sync::Arc;

use foyer_memory::{Cache, CacheBuilder, EvictionConfig, FifoConfig};
use wallaby_staging::{SegmentCache, SegmentKey, SharedPulls, Staged};

/// Bytes that a record costs beside its body.
const RECORD_OVERHEAD_BYTES: usize = 512;

/// See the module.
#[derive(Clone)]
pub struct RecordCache {
    records: Cache<SegmentKey, Staged>,
    pulls: Arc<SharedPulls>,
}

impl RecordCache {
    /// A cache of at most `bytes`. First in, first out: readers move forward, so the oldest is the least wanted.
    pub fn new(bytes: usize) -> RecordCache {
        let builder = CacheBuilder::new(bytes)
            .with_shards(4)
            .with_eviction_config(EvictionConfig::Fifo(FifoConfig::default()))
            .with_weighter(|_key: &SegmentKey, staged: &Staged| staged.body.len() + RECORD_OVERHEAD_BYTES);
        RecordCache { records: builder.build(), pulls: Arc::default() }
    }

    /// The bytes it holds now.
    pub fn usage_bytes(&self) -> usize {
        self.records.usage()
    }
}

impl SegmentCache for RecordCache {
    fn get(&self, key: &SegmentKey) -> Option<Staged> {
        self.records.get(key).map(|entry| entry.value().clone())
    }

    fn put(&self, key: SegmentKey, staged: &Staged) {
        self.records.insert(key, staged.clone());
    }

    fn pulls(&self) -> Option<&SharedPulls> {
        Some(&self.pulls)
    }
}
