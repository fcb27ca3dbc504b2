//! The source side of a run against a real PostgreSQL.
#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is the test's failure")]

#[path = "../source/kit.rs"]
#[allow(dead_code, reason = "shared with the other tests")]
mod kit;

mod changes;
mod shapes;

use std::time::Duration;

use wallaby_model::SegmentBody;
use wallaby_model::run::PlannedRelation;
use wallaby_postgres_source::{
    ChunkRead, ChunkRequest, ConnectConfig, PartSink, SnapshotExport, SourceError, read_chunk,
};

/// Keeps parts.
#[derive(Default)]
pub struct Kept(pub Vec<SegmentBody>);

impl PartSink for Kept {
    type Error = SourceError;

    async fn part(&mut self, body: SegmentBody) -> Result<(), SourceError> {
        assert!(body.tables[0].is_well_formed(body.transactions.len()));
        self.0.push(body);
        Ok(())
    }
}

impl Kept {
    pub fn rows(&self) -> Vec<Vec<String>> {
        self.0.iter().flat_map(kit::rows_of).map(|row| row.values).collect()
    }
}

pub async fn export(config: &ConnectConfig, name: &str, epoch: u64) -> SnapshotExport {
    SnapshotExport::open(config, &kit::owner(name, epoch), Duration::from_secs(10)).await.unwrap()
}

pub fn request(export: &SnapshotExport, publication: &str, relation: &PlannedRelation, number: u32) -> ChunkRequest {
    ChunkRequest {
        snapshot: export.snapshot().to_owned(),
        consistent_point: export.consistent_point(),
        exported_at: export.exported_at(),
        publication: publication.to_owned(),
        relation: relation.clone(),
        number,
        part_bytes: 64 << 10,
        rows_per_second: None,
    }
}

/// Every chunk of a relation.
pub async fn read(
    config: &ConnectConfig,
    export: &SnapshotExport,
    publication: &str,
    relation: &PlannedRelation,
) -> Result<Kept, SourceError> {
    let mut kept = Kept::default();
    for number in 0..relation.chunks() {
        let read: ChunkRead = read_chunk(config, &request(export, publication, relation, number), &mut kept).await?;
        assert!(read.parts >= 1);
    }
    Ok(kept)
}
