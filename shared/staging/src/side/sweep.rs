//! What nobody needs any more on the shelf of transactions: the decision, and the going through with it.
//!
//! The next owner sweeps after its fence was acknowledged: from then on no owner of a lower epoch can make a splice visible, so an
//! attempt of a lower epoch that no manifest names stays without one. What such an owner still sends lands after the sweep and
//! goes with the next one, so an owner sweeps now and then, not once.

use std::collections::BTreeSet;

use serde::Deserialize;
use wallaby_model::{Attempt, Epoch, Lsn, Position};

use super::{Shelf, SideGroup, SideKey, SideStore};
use crate::error::Result;

/// What decides over the shelf of transactions.
#[derive(Clone, Copy)]
pub struct Sweep<'a> {
    /// Of the owner that sweeps. Its fence is acknowledged.
    pub epoch: Epoch,
    /// The purge has passed everything up to here: the purge point, or where the log begins when that is lower (a replay window
    /// keeps more).
    pub purged_to: Position,
    /// The owner's own attempts that are still being put, or whose manifest is: asked for between two looks at the shelf. One
    /// that begins after the first look is not seen there, and one that ends before the second has its manifest by then.
    pub living: &'a (dyn Fn() -> BTreeSet<Attempt> + Sync),
}

/// What a manifest of any version says of its parts.
#[derive(Deserialize)]
struct Names {
    attempt: Attempt,
}

impl Sweep<'_> {
    /// Whether the splice of the transaction with this commit LSN may still be read.
    ///
    /// The splice ends at `(end LSN, 0)` and the end lies above the commit LSN. A purge point with the very commit LSN stands
    /// inside the transaction.
    fn keeps_manifest(&self, commit: Lsn) -> bool {
        self.purged_to.commit <= commit
    }

    /// What to keep, given the attempts that live or are named by manifests that are kept.
    fn keeps(&self, group: &SideGroup, needed: &BTreeSet<Attempt>) -> bool {
        match group {
            SideGroup::Manifest(commit) => self.keeps_manifest(*commit),
            SideGroup::Attempt(attempt) => {
                // A younger owner's: we were fenced and do not know it yet.
                attempt.epoch > self.epoch || needed.contains(attempt)
            }
            // Not on this shelf.
            SideGroup::ChunkAttempt(..) | SideGroup::Run(_) => true,
        }
    }
}

/// Removes the groups of a shelf that `keep` does not hold. Returns them.
///
/// # Errors
/// `Unavailable`; what was removed until then is gone, and sweeping again goes on.
pub async fn sweep(
    side: &dyn SideStore,
    shelf: Shelf,
    keep: &(dyn Fn(SideGroup) -> bool + Sync),
) -> Result<Vec<SideGroup>> {
    let swept: Vec<SideGroup> = side.list(shelf).await?.into_iter().filter(|group| !keep(*group)).collect();
    for group in &swept {
        side.delete(*group).await?;
    }
    Ok(swept)
}

/// Removes attempts that no manifest names, and manifests behind the purge with their parts. Returns the groups that went.
///
/// A manifest that cannot be read names nothing: its parts are of no use to anybody.
///
/// # Errors
/// `Unavailable`; what was removed until then is gone, and sweeping again goes on.
pub async fn sweep_transactions(side: &dyn SideStore, what: &Sweep<'_>) -> Result<Vec<SideGroup>> {
    let groups = side.list(Shelf::Transactions).await?;
    let mut needed = (what.living)();
    for group in side.list(Shelf::Transactions).await? {
        if let SideGroup::Manifest(commit) = group
            && what.keeps_manifest(commit)
            && let Some(body) = side.get(SideKey::Manifest { commit }).await?
            && let Ok(Names { attempt }) = serde_json::from_slice(&body)
        {
            needed.insert(attempt);
        }
    }
    // Parts first: killed between, a manifest whose parts are gone is still listed and goes the next time.
    let mut swept: Vec<SideGroup> = groups.into_iter().filter(|group| !what.keeps(group, &needed)).collect();
    swept.sort_by_key(|group| matches!(group, SideGroup::Manifest(_)));
    for group in &swept {
        side.delete(*group).await?;
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(epoch: u64, xid: u32) -> Attempt {
        Attempt { epoch: Epoch(epoch), connection: 1, xid }
    }

    #[test]
    fn attempts_stay_that_are_needed_or_a_younger_owners() {
        let what = Sweep { epoch: Epoch(7), purged_to: Position::ZERO, living: &BTreeSet::new };
        let needed = BTreeSet::from([attempt(7, 1), attempt(5, 2)]);
        let keeps = |attempt| what.keeps(&SideGroup::Attempt(attempt), &needed);
        assert!(keeps(attempt(7, 1)), "living");
        assert!(keeps(attempt(5, 2)), "named");
        assert!(keeps(attempt(8, 3)), "a younger owner's");
        assert!(!keeps(attempt(7, 4)), "ours, and given up");
        assert!(!keeps(attempt(6, 1)), "an older owner's without a manifest");
    }

    #[test]
    fn a_manifest_stays_until_the_purge_is_past_its_transaction() {
        let keeps = |purged_to| {
            let what = Sweep { epoch: Epoch(7), purged_to, living: &BTreeSet::new };
            what.keeps(&SideGroup::Manifest(Lsn(100)), &BTreeSet::new())
        };
        assert!(keeps(Position::ZERO));
        assert!(keeps(Position::before(Lsn(100))));
        let inside = Position { commit: Lsn(100), change: Lsn(90), index: 3 };
        assert!(keeps(inside), "the purge stands inside the transaction");
        assert!(!keeps(Position::before(Lsn(101))));
    }
}
