//! Retention: holds of readers, and the purge point of the log.
//!
//! A hold says what a reader still needs, the purge point up to where the log may be gone. No hold ever stands below the
//! purge point: a new hold is written only if the purge point has not moved since it was compared, and the purge point is
//! written only if no hold was written since they were compared.

use std::collections::BTreeMap;

use etcd_client::{Compare, CompareOp, TxnOp};
use wallaby_model::{FlowId, Position, SinkId};

use crate::client::encode;
use crate::keys::Key;
use crate::lock::TaskLock;
use crate::records::{Hold, PurgePoint};
use crate::watch;
use crate::{Coordination, Error, Result};

/// How often moving the purge point, or a hold, is tried again because holds moved meanwhile.
const RACES_MAX: u32 = 32;

/// What came of an attempt to move the purge point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurgeOutcome {
    /// The log may be purged up to and with this position. The purge point stands there.
    UpTo(Position),
    /// Nothing may be purged: no hold exists, or one needs everything from the first resume on.
    Nothing,
}

impl Coordination {
    /// The holds of a flow.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn holds(&self, flow: &FlowId) -> Result<BTreeMap<SinkId, Hold>> {
        let mut holds = BTreeMap::new();
        for entry in self.list(&self.keys().holds(flow)).await? {
            if let Key::FlowHold(_, reader) = &entry.key {
                holds.insert(reader.clone(), entry.decode()?);
            }
        }
        Ok(holds)
    }

    /// The purge point of a flow's log. `None`: nothing was ever purged.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn purge_point(&self, flow: &FlowId) -> Result<Option<Position>> {
        let entry = self.get(&Key::FlowPurge(flow.clone())).await?;
        Ok(entry.map(|entry| entry.decode::<PurgePoint>()).transpose()?.map(|point| point.position))
    }
}

impl TaskLock {
    /// Capture: moves the purge point up to `wanted` or the lowest hold, whichever is lower, in one transaction that compares
    /// the holds and the lock. Purge the log only after this, and only up to what it returns. Never moves back.
    ///
    /// # Errors
    /// `LockLost`; `Malformed`; `Refused` when holds moved at each of many attempts (try again at the next round); when etcd
    /// cannot be reached.
    pub async fn advance_purge_point(&self, wanted: Position) -> Result<PurgeOutcome> {
        const DOING: &str = "moving the purge point";
        let flow = &self.inner.task.flow;
        let keys = self.coordination().keys();
        let (holds_prefix, purge_key) = (keys.holds(flow), keys.text(&Key::FlowPurge(flow.clone())));
        for _ in 0..RACES_MAX {
            let (entries, store) = watch::list(self.coordination().requests(), keys, &holds_prefix).await?;
            let holds = entries.iter().map(|entry| entry.decode::<Hold>()).collect::<Result<Vec<_>>>()?;
            let purged = self.coordination().get(&Key::FlowPurge(flow.clone())).await?;
            let point =
                purged.as_ref().map(|entry| entry.decode::<PurgePoint>()).transpose()?.map(|point| point.position);
            let Some(lowest) = lowest_hold(&holds) else { return Ok(PurgeOutcome::Nothing) };
            let target = wanted.min(lowest);
            if let Some(point) = point
                && point >= target
            {
                return Ok(PurgeOutcome::UpTo(point));
            }
            let value = encode(&purge_key, &PurgePoint { position: target })?;
            let compares = vec![
                // No hold was made or moved since they were read. (One that was deleted needs nothing any more.)
                Compare::mod_revision(holds_prefix.clone(), CompareOp::Less, store.revision + 1).with_prefix(),
                Compare::mod_revision(
                    purge_key.clone(),
                    CompareOp::Equal,
                    purged.map_or(0, |entry| entry.mod_revision.0),
                ),
            ];
            let put = vec![TxnOp::put(purge_key.clone(), value, None)];
            if self.guarded(DOING, compares, put, Vec::new()).await?.succeeded {
                return Ok(PurgeOutcome::UpTo(target));
            }
        }
        Err(Error::Refused { doing: DOING, cause: "holds moved at each of many attempts".to_owned() })
    }

    /// Apply: says that its reader needs nothing up to `position` any more. Never moves back. Not for every batch.
    ///
    /// # Errors
    /// `HoldGone` when the sink was removed; `LockLost`; `Malformed`; when etcd cannot be reached.
    pub async fn advance_hold(&self, reader: &SinkId, position: Position) -> Result<()> {
        const DOING: &str = "moving the hold";
        let flow = &self.inner.task.flow;
        let key = Key::FlowHold(flow.clone(), reader.clone());
        let text = self.coordination().keys().text(&key);
        let value = encode(&text, &Hold { position: Some(position) })?;
        for _ in 0..RACES_MAX {
            let gone = || Error::HoldGone { flow: flow.clone(), reader: reader.clone() };
            let entry = self.coordination().get(&key).await?.ok_or_else(gone)?;
            let hold: Hold = entry.decode()?;
            if hold.position.is_some_and(|held| held >= position) {
                return Ok(());
            }
            let unchanged = Compare::mod_revision(text.clone(), CompareOp::Equal, entry.mod_revision.0);
            let put = vec![TxnOp::put(text.clone(), value.clone(), None)];
            if self.guarded(DOING, vec![unchanged], put, Vec::new()).await?.succeeded {
                return Ok(());
            }
        }
        Err(Error::Refused { doing: DOING, cause: "it moved at each of many attempts".to_owned() })
    }
}

/// The lowest position that all holds allow to purge to; `None` for none at all.
fn lowest_hold(holds: &[Hold]) -> Option<Position> {
    holds.iter().map(|hold| hold.position).min().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use wallaby_model::Lsn;

    #[test]
    fn no_hold_no_purge() {
        let at = |lsn| Hold { position: Some(Position::before(Lsn(lsn))) };
        assert_eq!(lowest_hold(&[]), None);
        assert_eq!(lowest_hold(&[at(5), Hold { position: None }]), None);
        assert_eq!(lowest_hold(&[at(5), at(3)]), Some(Position::before(Lsn(3))));
    }
}
