//! Names, bodies and places.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use wallaby_model::flow::Replicas;
use wallaby_model::{Attempt, ChunkId, Epoch, FlowId, Lsn, Manifest, RunId, Transaction};
use wallaby_staging::{Connections, JetStreamSide, NatsTarget, Quotas, Shelf, SideKey, SideStore};
use wallaby_testkit::unique;

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const QUOTAS: Quotas = Quotas { transactions: 64 << 20, chunks: 64 << 20 };

pub fn attempt(epoch: u64, xid: u32) -> Attempt {
    Attempt { epoch: Epoch(epoch), connection: 1, xid }
}

pub fn part(attempt: Attempt, number: u32) -> SideKey {
    SideKey::Part { attempt, number }
}

pub fn chunk(run: u32, number: u32) -> (RunId, ChunkId) {
    (RunId(run), ChunkId { table: 1, restart: 0, number })
}

pub fn chunk_part(run: u32, number: u32, epoch: u64, part: u32) -> SideKey {
    let (run, chunk) = chunk(run, number);
    SideKey::ChunkPart { run, chunk, attempt: Epoch(epoch), number: part }
}

pub fn manifest_key(commit: u64) -> SideKey {
    SideKey::Manifest { commit: Lsn(commit) }
}

/// A manifest of `attempt`; `marks` ranges of rolled-back sub-transactions tell one from another, and make it long.
pub fn manifest(commit: u64, attempt: Attempt, marks: u32) -> Bytes {
    let manifest = Manifest {
        version: 1,
        attempt,
        transaction: Transaction { commit: Lsn(commit), xid: attempt.xid, committed_at_micros: 0 },
        parts: Vec::new(),
        aborted: (0..marks).map(|mark| (10 * mark, 10 * mark + 1)).collect(),
    };
    Bytes::from(serde_json::to_vec(&manifest).unwrap())
}

/// Bytes that do not repeat, told apart by `seed`.
pub fn body(seed: u32, bytes: usize) -> Bytes {
    let mut state = u64::from(seed) * 2 + 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    Bytes::from(out)
}

pub fn flow(hint: &str) -> FlowId {
    let name = unique(hint).replace('_', "-").to_lowercase();
    FlowId::new(name.chars().take(40).collect::<String>()).unwrap()
}

pub async fn connections(url: &str) -> Connections {
    let target = NatsTarget {
        servers: url.split(',').map(str::to_owned).collect(),
        name: "wallaby-test".to_owned(),
        ..NatsTarget::default()
    };
    Connections::open(&target).await.unwrap()
}

pub async fn jetstream(url: &str, replicas: u8, flow: &FlowId, quotas: Quotas) -> JetStreamSide {
    JetStreamSide::new(flow.clone(), connections(url).await, Replicas::Exactly(replicas), quotas)
}

/// Both shelves made.
pub async fn made<S: SideStore + 'static>(side: S) -> Arc<dyn SideStore> {
    for shelf in Shelf::ALL {
        wallaby_testkit::eventually(PATIENCE, "a shelf", async || side.ensure(shelf).await).await;
    }
    Arc::new(side)
}
