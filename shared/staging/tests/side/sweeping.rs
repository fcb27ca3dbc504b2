//! What is swept, and what is not, wherever the side store stands.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use wallaby_model::{Attempt, Epoch, Lsn, Position};
use wallaby_staging::{
    Shelf, ShelfUsage, SideGroup, SideKey, SideStore, StagingError, Sweep, sweep, sweep_transactions,
};

use crate::suite::Place;
use crate::support::{QUOTAS, attempt, body, chunk, chunk_part, manifest, manifest_key, part};

/// Runs all cases.
pub async fn all(place: &impl Place) {
    h12_parts_of_dead_attempts_go_and_named_ones_stay(&*place.side(QUOTAS).await).await;
    h12_what_begins_or_ends_while_it_is_swept_stays(place.side(QUOTAS).await).await;
    h09_a_manifest_written_again_keeps_its_own_parts_and_not_the_lost_ones(&*place.side(QUOTAS).await).await;
    h23_the_attempt_at_a_chunk_that_lost_is_swept_alone(&*place.side(QUOTAS).await).await;
}

async fn groups(side: &dyn SideStore) -> BTreeSet<SideGroup> {
    side.list(Shelf::Transactions).await.unwrap().into_iter().collect()
}

async fn h12_parts_of_dead_attempts_go_and_named_ones_stay(side: &dyn SideStore) {
    let (dead, named, living, given_up, younger) =
        (attempt(5, 1), attempt(5, 2), attempt(7, 3), attempt(7, 4), attempt(8, 5));
    for attempt in [dead, named, living, given_up, younger] {
        side.put(part(attempt, 0), body(attempt.xid, 1000)).await.unwrap();
    }
    side.put(manifest_key(100), manifest(100, named, 1)).await.unwrap();
    let still = BTreeSet::from([living]);
    let what = Sweep { epoch: Epoch(7), purged_to: Position::before(Lsn(100)), living: &|| still.clone() };
    let swept = sweep_transactions(side, &what).await.unwrap();
    assert_eq!(BTreeSet::from_iter(swept), BTreeSet::from([SideGroup::Attempt(dead), SideGroup::Attempt(given_up)]));
    let left = [named, living, younger].map(SideGroup::Attempt);
    let mut expected = BTreeSet::from(left);
    expected.insert(SideGroup::Manifest(Lsn(100)));
    assert_eq!(groups(side).await, expected);
    // The purge passes the transaction: manifest and parts go together.
    let what = Sweep { purged_to: Position::before(Lsn(120)), ..what };
    let swept = sweep_transactions(side, &what).await.unwrap();
    assert_eq!(BTreeSet::from_iter(swept), BTreeSet::from([SideGroup::Attempt(named), SideGroup::Manifest(Lsn(100))]));
    assert_eq!(sweep_transactions(side, &what).await.unwrap(), []);
    side.remove().await.unwrap();
}

/// A transaction begins, and another one ends, while the shelf is looked at.
async fn h12_what_begins_or_ends_while_it_is_swept_stays(side: Arc<dyn SideStore>) {
    let (ends, begins) = (attempt(7, 1), attempt(7, 2));
    side.put(part(ends, 0), body(1, 1000)).await.unwrap();
    let living = Arc::new(Mutex::new(BTreeSet::from([ends])));
    let busy = Busy { side: Arc::clone(&side), living: Arc::clone(&living), ends, begins, looks: AtomicU32::new(0) };
    let what = Sweep { epoch: Epoch(7), purged_to: Position::ZERO, living: &|| living.lock().unwrap().clone() };
    assert_eq!(sweep_transactions(&busy, &what).await.unwrap(), []);
    let left = BTreeSet::from([SideGroup::Attempt(ends), SideGroup::Attempt(begins), SideGroup::Manifest(Lsn(100))]);
    assert_eq!(groups(&*side).await, left);
    side.remove().await.unwrap();
}

/// A side store whose owner goes on before each look at it.
#[derive(Debug)]
struct Busy {
    side: Arc<dyn SideStore>,
    living: Arc<Mutex<BTreeSet<Attempt>>>,
    ends: Attempt,
    begins: Attempt,
    looks: AtomicU32,
}

#[async_trait::async_trait]
impl SideStore for Busy {
    async fn list(&self, shelf: Shelf) -> Result<Vec<SideGroup>, StagingError> {
        match self.looks.fetch_add(1, Ordering::Relaxed) {
            0 => {
                self.living.lock().unwrap().insert(self.begins);
                self.side.put(part(self.begins, 0), body(2, 1000)).await?;
            }
            1 => {
                self.side.put(manifest_key(100), manifest(100, self.ends, 1)).await?;
                self.living.lock().unwrap().remove(&self.ends);
            }
            _ => {}
        }
        self.side.list(shelf).await
    }
    fn part_bytes_target(&self) -> usize {
        self.side.part_bytes_target()
    }
    async fn ensure(&self, shelf: Shelf) -> Result<(), StagingError> {
        self.side.ensure(shelf).await
    }
    async fn put(&self, key: SideKey, body: Bytes) -> Result<(), StagingError> {
        self.side.put(key, body).await
    }
    async fn get(&self, key: SideKey) -> Result<Option<Bytes>, StagingError> {
        self.side.get(key).await
    }
    async fn delete(&self, group: SideGroup) -> Result<(), StagingError> {
        self.side.delete(group).await
    }
    async fn usage(&self, shelf: Shelf) -> Result<ShelfUsage, StagingError> {
        self.side.usage(shelf).await
    }
    async fn holders(&self, shelf: Shelf) -> Result<Vec<String>, StagingError> {
        self.side.holders(shelf).await
    }
    async fn remove_shelf(&self, shelf: Shelf) -> Result<(), StagingError> {
        self.side.remove_shelf(shelf).await
    }
}

async fn h09_a_manifest_written_again_keeps_its_own_parts_and_not_the_lost_ones(side: &dyn SideStore) {
    let (lost, again) = (attempt(5, 1), attempt(6, 1));
    side.put(part(lost, 1), body(1, 1000)).await.unwrap();
    side.put(manifest_key(100), manifest(100, lost, 1)).await.unwrap();
    side.put(part(again, 0), body(2, 1000)).await.unwrap();
    side.put(manifest_key(100), manifest(100, again, 1)).await.unwrap();
    // The fenced owner comes late.
    side.put(manifest_key(100), manifest(100, lost, 2)).await.unwrap();
    let what = Sweep { epoch: Epoch(7), purged_to: Position::ZERO, living: &BTreeSet::new };
    assert_eq!(sweep_transactions(side, &what).await.unwrap(), [SideGroup::Attempt(lost)]);
    assert_eq!(side.get(part(again, 0)).await.unwrap(), Some(body(2, 1000)));
    assert_eq!(side.get(manifest_key(100)).await.unwrap(), Some(manifest(100, again, 1)));
    side.remove().await.unwrap();
}

async fn h23_the_attempt_at_a_chunk_that_lost_is_swept_alone(side: &dyn SideStore) {
    for epoch in [3, 4] {
        side.put(chunk_part(1, 1, epoch, 0), body(1, 1000)).await.unwrap();
    }
    let (run, chunk) = chunk(1, 1);
    let done = SideGroup::ChunkAttempt(run, chunk, Epoch(4));
    let swept = sweep(side, Shelf::Chunks, &|group| group == done).await.unwrap();
    assert_eq!(swept, [SideGroup::ChunkAttempt(run, chunk, Epoch(3))]);
    assert_eq!(side.get(chunk_part(1, 1, 4, 0)).await.unwrap(), Some(body(1, 1000)));
    side.remove().await.unwrap();
}
