//! What every side store must do, wherever it stands.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use wallaby_model::{Epoch, Lsn};
use wallaby_staging::{PutBudget, Puts, Quotas, Shelf, SideGroup, SideKey, SideStore, StagingError};

use crate::support::{attempt, body, chunk, chunk_part, manifest, manifest_key, part};

/// A place where side stores can stand.
pub trait Place {
    /// The side store of a fresh flow there, both shelves made.
    async fn side(&self, quotas: Quotas) -> Arc<dyn SideStore>;
}

/// Runs all cases.
pub async fn all(place: &impl Place) {
    let roomy = crate::support::QUOTAS;
    keeps_lists_and_deletes_by_group(&*place.side(roomy).await).await;
    keeps_objects_of_any_size(&*place.side(roomy).await).await;
    the_last_manifest_counts(&*place.side(roomy).await).await;
    puts_are_pipelined(place.side(roomy).await).await;
    let tight = Quotas { transactions: 8 << 20, chunks: 8 << 20 };
    h16_a_full_shelf_leaves_the_other_one_writable(&*place.side(tight).await).await;
    what_is_removed_stays_removed(&*place.side(roomy).await).await;
}

async fn keeps_lists_and_deletes_by_group(side: &dyn SideStore) {
    let (old, new) = (attempt(5, 900), attempt(6, 900));
    // A name that begins as another one does.
    let longer = attempt(5, 9001);
    let keys = [part(old, 0), part(old, 1), part(old, 11), part(new, 0), part(longer, 0)];
    for (seed, key) in (0..).zip(keys) {
        side.put(key, body(seed, 1000)).await.unwrap();
    }
    let chunks = [chunk_part(1, 1, 3, 0), chunk_part(1, 1, 4, 0), chunk_part(1, 11, 3, 0), chunk_part(11, 1, 3, 0)];
    for (seed, key) in (100..).zip(chunks) {
        side.put(key, body(seed, 1000)).await.unwrap();
    }
    side.put(manifest_key(77), manifest(77, old, 1)).await.unwrap();
    for (seed, key) in (0..).zip(keys) {
        assert_eq!(side.get(key).await.unwrap(), Some(body(seed, 1000)), "{key:?}");
    }
    assert_eq!(side.get(part(old, 2)).await.unwrap(), None);
    let groups = BTreeSet::from([
        SideGroup::Attempt(old),
        SideGroup::Attempt(new),
        SideGroup::Attempt(longer),
        SideGroup::Manifest(Lsn(77)),
    ]);
    let listed = side.list(Shelf::Transactions).await.unwrap();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), groups);
    assert_eq!(listed.len(), groups.len(), "each once");
    let of_chunk = |run, number, epoch| {
        let (run, chunk) = chunk(run, number);
        SideGroup::ChunkAttempt(run, chunk, Epoch(epoch))
    };
    let listed: BTreeSet<SideGroup> = side.list(Shelf::Chunks).await.unwrap().into_iter().collect();
    assert_eq!(listed, BTreeSet::from([of_chunk(1, 1, 3), of_chunk(1, 1, 4), of_chunk(1, 11, 3), of_chunk(11, 1, 3)]));

    side.delete(SideGroup::Attempt(old)).await.unwrap();
    side.delete(SideGroup::Attempt(old)).await.unwrap();
    assert_eq!(side.get(part(old, 0)).await.unwrap(), None);
    assert_eq!(side.get(part(old, 11)).await.unwrap(), None);
    assert_eq!(side.get(part(new, 0)).await.unwrap(), Some(body(3, 1000)));
    assert_eq!(side.get(part(longer, 0)).await.unwrap(), Some(body(4, 1000)));
    side.delete(of_chunk(1, 1, 3)).await.unwrap();
    assert_eq!(side.get(chunks[0]).await.unwrap(), None);
    assert_eq!(side.get(chunks[1]).await.unwrap(), Some(body(101, 1000)));
    side.delete(SideGroup::Run(wallaby_model::RunId(1))).await.unwrap();
    assert_eq!(side.list(Shelf::Chunks).await.unwrap(), [of_chunk(11, 1, 3)]);
    side.delete(SideGroup::Manifest(Lsn(77))).await.unwrap();
    assert_eq!(side.get(manifest_key(77)).await.unwrap(), None);
    side.remove().await.unwrap();
}

async fn keeps_objects_of_any_size(side: &dyn SideStore) {
    let target = side.part_bytes_target();
    assert!(target >= 64 << 10, "{target}");
    let sizes = [0, 1, target - 1, target, target + 1, 3 * target, 7 * target + 13];
    for (number, bytes) in (0..).zip(sizes) {
        let key = part(attempt(5, 1), number);
        side.put(key, body(number, bytes)).await.unwrap();
        // A lost answer: it is put again.
        side.put(key, body(number, bytes)).await.unwrap();
    }
    for (number, bytes) in (0..).zip(sizes) {
        let got = side.get(part(attempt(5, 1), number)).await.unwrap();
        assert!(got == Some(body(number, bytes)), "{bytes} bytes came back as {:?}", got.map(|got| got.len()));
    }
    let stored: usize = sizes.iter().sum();
    let usage = side.usage(Shelf::Transactions).await.unwrap();
    assert!(usage.bytes >= stored as u64, "{usage:?}");
    assert!(usage.bytes < stored as u64 + (64 << 10), "what was put again is kept twice: {usage:?}");
    side.delete(SideGroup::Attempt(attempt(5, 1))).await.unwrap();
    let usage = side.usage(Shelf::Transactions).await.unwrap();
    assert!(usage.bytes < 4096, "pieces stay: {usage:?}");
    side.remove().await.unwrap();
}

async fn the_last_manifest_counts(side: &dyn SideStore) {
    let key = manifest_key(100);
    assert_eq!(side.get(key).await.unwrap(), None);
    let refused = side.put(key, Bytes::from_static(b"{}")).await.unwrap_err();
    assert!(matches!(refused, StagingError::NotAManifest { .. }), "{refused}");
    // Long and short, of one attempt: the last counts.
    for marks in [1, 200_000, 2, 100_000, 3] {
        side.put(key, manifest(100, attempt(5, 9), marks)).await.unwrap();
        assert!(side.get(key).await.unwrap() == Some(manifest(100, attempt(5, 9), marks)), "{marks}");
    }
    // A later owner's counts, also when the fenced one's comes late.
    side.put(key, manifest(100, attempt(6, 9), 1)).await.unwrap();
    side.put(key, manifest(100, attempt(5, 9), 7)).await.unwrap();
    assert_eq!(side.get(key).await.unwrap(), Some(manifest(100, attempt(6, 9), 1)));
    assert_eq!(side.get(manifest_key(101)).await.unwrap(), None);
    side.delete(key.group()).await.unwrap();
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), []);
    side.remove().await.unwrap();
}

async fn puts_are_pipelined(side: Arc<dyn SideStore>) {
    // Less than two objects: a third waits, and one that is larger than everything goes alone.
    let budget = PutBudget::new(100_000);
    let mut of_one = Puts::new(Arc::clone(&side), budget.clone());
    let mut of_other = Puts::new(Arc::clone(&side), budget);
    for number in 0..20 {
        of_one.put(part(attempt(5, 1), number), body(number, 60_000)).await.unwrap();
        of_other.put(part(attempt(5, 2), number), body(number, 300_000)).await.unwrap();
    }
    of_one.settled().await.unwrap();
    of_other.settled().await.unwrap();
    for number in 0..20 {
        assert!(side.get(part(attempt(5, 1), number)).await.unwrap() == Some(body(number, 60_000)));
        assert!(side.get(part(attempt(5, 2), number)).await.unwrap() == Some(body(number, 300_000)));
    }
    // An error stays, and nothing more is sent.
    of_one.put(manifest_key(1), Bytes::from_static(b"no manifest")).await.unwrap();
    of_one.settled().await.unwrap_err();
    of_one.put(part(attempt(5, 3), 0), body(1, 10)).await.unwrap_err();
    of_one.settled().await.unwrap_err();
    assert_eq!(side.get(part(attempt(5, 3), 0)).await.unwrap(), None);
    // The other attempt goes on.
    of_other.put(part(attempt(5, 2), 20), body(20, 10)).await.unwrap();
    of_other.settled().await.unwrap();
    side.remove().await.unwrap();
}

async fn h16_a_full_shelf_leaves_the_other_one_writable(side: &dyn SideStore) {
    let fill = async |shelf_key: &dyn Fn(u32) -> SideKey| {
        for number in 0..1000 {
            match side.put(shelf_key(number), body(number, 700_000)).await {
                Ok(()) => {}
                Err(error) => return (number, error),
            }
        }
        panic!("it never fills up");
    };
    let chunk_key = |number| chunk_part(1, number, 3, 0);
    let (kept, error) = fill(&chunk_key).await;
    assert!(matches!(error, StagingError::SideFull { .. }) && error.is_side_full(), "{error}");
    assert!((8..=11).contains(&kept), "{kept} of 700000 bytes went into 8 MiB");
    let usage = side.usage(Shelf::Chunks).await.unwrap();
    assert_eq!(usage.bytes_max, 8 << 20);
    assert!(usage.bytes <= usage.bytes_max, "{usage:?}");
    // What is there already is taken again: its answer may have been lost.
    side.put(chunk_key(kept - 1), body(kept - 1, 700_000)).await.unwrap();
    // The other shelf takes as much.
    let part_key = |number| part(attempt(5, 1), number);
    let (parts, error) = fill(&part_key).await;
    assert!(error.is_side_full(), "{error}");
    assert!(parts.abs_diff(kept) <= 1, "{parts} and {kept}");
    // One in pieces that does not fit leaves none behind.
    let before = side.usage(Shelf::Chunks).await.unwrap();
    side.put(chunk_part(1, 2000, 3, 0), body(1, 3 << 20)).await.unwrap_err();
    let after = side.usage(Shelf::Chunks).await.unwrap();
    assert!(after.bytes < before.bytes + 4096, "{before:?} {after:?}");
    // Nothing that was kept was lost to what did not fit.
    for number in 0..kept {
        assert!(side.get(chunk_key(number)).await.unwrap() == Some(body(number, 700_000)), "{number}");
    }
    // With room again it goes on.
    side.delete(SideGroup::Run(wallaby_model::RunId(1))).await.unwrap();
    side.put(chunk_key(0), body(0, 700_000)).await.unwrap();
    side.remove().await.unwrap();
}

async fn what_is_removed_stays_removed(side: &dyn SideStore) {
    side.put(part(attempt(5, 1), 0), body(0, 1000)).await.unwrap();
    side.put(chunk_part(1, 1, 3, 0), body(1, 1000)).await.unwrap();
    side.remove_shelf(Shelf::Chunks).await.unwrap();
    assert_eq!(side.list(Shelf::Chunks).await.unwrap(), []);
    assert_eq!(side.usage(Shelf::Chunks).await.unwrap().bytes, 0);
    assert_eq!(side.get(part(attempt(5, 1), 0)).await.unwrap(), Some(body(0, 1000)));
    // The next run makes it again, empty.
    side.ensure(Shelf::Chunks).await.unwrap();
    side.ensure(Shelf::Chunks).await.unwrap();
    assert_eq!(side.get(chunk_part(1, 1, 3, 0)).await.unwrap(), None);
    side.put(chunk_part(1, 1, 3, 0), body(1, 1000)).await.unwrap();
    side.remove().await.unwrap();
    side.remove().await.unwrap();
    for shelf in Shelf::ALL {
        assert_eq!(side.list(shelf).await.unwrap(), []);
        side.delete(SideGroup::Run(wallaby_model::RunId(1))).await.unwrap();
        assert_eq!(side.holders(shelf).await.unwrap(), [] as [String; 0]);
    }
    // A late put does not bring back what is gone.
    let error = side.put(part(attempt(5, 1), 0), body(0, 1000)).await.unwrap_err();
    assert!(matches!(error, StagingError::SideMissing { .. }), "{error}");
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), []);
}
