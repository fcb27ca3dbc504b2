//! Retention: holds of readers, and the purge point of the log.
//!
//! A hold says what a reader still needs, the purge point up to where the log may be gone. No hold ever stands below the
//! purge point: a new hold is written only if the purge point has not moved since it was compared, and the purge point is
//! written only if no hold was written since they were compared.

use std::collections::BTreeMap;

use etcd_client::{Compare, CompareOp, TxnOp};
use wallaby_model::{FlowId, Position, Reader, RunId, SinkId};

use crate::client::encode;
use crate::clock::wall_clock_now;
use crate::flows::check_hold;
use crate::keys::Key;
use crate::lock::TaskLock;
use crate::records::{Detached, Hold, PurgePoint};
use crate::watch;
use crate::{Coordination, Error, Result};

/// How often moving the purge point, or a hold, is tried again because holds moved meanwhile.
const RACES_MAX: u32 = 32;
const MOVED_EACH_TIME: &str = "it moved at each of many attempts";

/// What came of an attempt to move the purge point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurgeOutcome {
    /// The log may be purged up to and with this position. The purge point stands there.
    UpTo(Position),
    /// Nothing may be purged: no hold exists, or one needs everything from the first resume on.
    Nothing,
}

/// What came of an attempt to cut a sink off from the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetachOutcome {
    /// It is cut off: its hold is gone. It was so before, when it has no hold.
    Detached,
    /// Its hold is another one than was judged: judge again.
    Moved(Hold),
}

impl Coordination {
    /// Whether, since when and why a sink is cut off from the log; `None` when it is not.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn detached(&self, flow: &FlowId, sink: &SinkId) -> Result<Option<Detached>> {
        let entry = self.get(&Key::SinkDetached(flow.clone(), sink.clone())).await?;
        entry.map(|entry| entry.decode()).transpose()
    }

    /// The holds of a flow.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn holds(&self, flow: &FlowId) -> Result<BTreeMap<Reader, Hold>> {
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

    /// The owner of a reader (apply, run): says that it needs nothing up to `position` any more. Never moves back. Not for
    /// every batch.
    ///
    /// # Errors
    /// `HoldGone` when the sink was removed or detached, or the run is over; `LockLost`; `Malformed`; when etcd cannot be
    /// reached.
    pub async fn advance_hold(&self, reader: impl Into<Reader>, position: Position) -> Result<()> {
        const DOING: &str = "moving the hold";
        let (flow, reader) = (&self.inner.task.flow, reader.into());
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
        Err(Error::Refused { doing: DOING, cause: MOVED_EACH_TIME.to_owned() })
    }

    /// Run: makes a hold at `position` (`None`: at the flow's first resume), so that the log keeps everything after it, in a
    /// transaction that compares the purge point. A hold that is there already, a former owner's, stays as it is. What it
    /// returns is the hold that counts.
    ///
    /// # Errors
    /// `HoldBelowPurge` when the log was purged past the position: take the log's end again; `LockLost`; `Malformed`; when
    /// etcd cannot be reached.
    pub async fn put_hold(&self, reader: impl Into<Reader>, position: Option<Position>) -> Result<Hold> {
        const DOING: &str = "making a hold";
        let (flow, reader) = (&self.inner.task.flow, reader.into());
        let keys = self.coordination().keys();
        let text = keys.text(&Key::FlowHold(flow.clone(), reader.clone()));
        let purge_key = keys.text(&Key::FlowPurge(flow.clone()));
        let hold = Hold { position };
        let value = encode(&text, &hold)?;
        for _ in 0..RACES_MAX {
            if let Some(found) = self.coordination().get(&Key::FlowHold(flow.clone(), reader.clone())).await? {
                return found.decode();
            }
            // A purge that is under way either sees this hold or moves the purge point before this transaction.
            let purge = self.coordination().get(&Key::FlowPurge(flow.clone())).await?;
            let unmoved = purge.as_ref().map_or(0, |entry| entry.mod_revision.0);
            let purged = purge.map(|entry| entry.decode::<PurgePoint>()).transpose()?.map(|point| point.position);
            check_hold(flow, &reader, hold, purged)?;
            let compares = vec![
                Compare::create_revision(text.clone(), CompareOp::Equal, 0),
                Compare::mod_revision(purge_key.clone(), CompareOp::Equal, unmoved),
            ];
            let put = vec![TxnOp::put(text.clone(), value.clone(), None)];
            if self.guarded(DOING, compares, put, Vec::new()).await?.succeeded {
                return Ok(hold);
            }
        }
        Err(Error::Refused { doing: DOING, cause: MOVED_EACH_TIME.to_owned() })
    }

    /// Run: gives its hold up. One that is gone already is no error. See [`TaskLock::finish_run`] for the end of a run.
    ///
    /// # Errors
    /// `LockLost`; when etcd cannot be reached.
    pub async fn delete_hold(&self, reader: impl Into<Reader>) -> Result<()> {
        let key = Key::FlowHold(self.inner.task.flow.clone(), reader.into());
        let delete = TxnOp::delete(self.coordination().keys().text(&key), None);
        self.guarded("deleting the hold", Vec::new(), vec![delete], Vec::new()).await.map(drop)
    }

    /// Capture and run: cuts a sink off from the log: deletes its hold, and writes down that and why, in one transaction, only if the
    /// hold still is `judged`. The controller then makes a run that loads it anew.
    ///
    /// # Errors
    /// `HoldGone` when the sink was removed; `LockLost`; `Malformed`; when etcd cannot be reached.
    pub async fn detach_sink(&self, sink: &SinkId, judged: Hold, reason: &str) -> Result<DetachOutcome> {
        const DOING: &str = "detaching a sink";
        let flow = &self.inner.task.flow;
        let (hold_key, detached_key) =
            (Key::FlowHold(flow.clone(), sink.into()), Key::SinkDetached(flow.clone(), sink.clone()));
        let keys = self.coordination().keys();
        let (hold_text, detached_text) = (keys.text(&hold_key), keys.text(&detached_key));
        let detached =
            Detached { at: wall_clock_now(), position: judged.position, reason: reason.to_owned(), run: None };
        let value = encode(&detached_text, &detached)?;
        for _ in 0..RACES_MAX {
            let Some(found) = self.coordination().get(&hold_key).await? else {
                // Done before, by this call even, when its answer was lost; or the sink is gone.
                return match self.coordination().get(&detached_key).await? {
                    Some(_) => Ok(DetachOutcome::Detached),
                    None => Err(Error::HoldGone { flow: flow.clone(), reader: sink.into() }),
                };
            };
            let hold: Hold = found.decode()?;
            if hold != judged {
                return Ok(DetachOutcome::Moved(hold));
            }
            let unmoved = Compare::mod_revision(hold_text.clone(), CompareOp::Equal, found.mod_revision.0);
            let then =
                vec![TxnOp::delete(hold_text.clone(), None), TxnOp::put(detached_text.clone(), value.clone(), None)];
            if self.guarded(DOING, vec![unmoved], then, Vec::new()).await?.succeeded {
                return Ok(DetachOutcome::Detached);
            }
        }
        Err(Error::Refused { doing: DOING, cause: MOVED_EACH_TIME.to_owned() })
    }

    /// Apply: the sink has loaded everything anew with `run`: it counts as detached no longer. Nothing happens when it was
    /// detached again meanwhile, or was not detached.
    ///
    /// # Errors
    /// `LockLost`; `Malformed`; when etcd cannot be reached.
    pub async fn clear_detached(&self, sink: &SinkId, run: RunId) -> Result<()> {
        const DOING: &str = "ending a detachment";
        let key = Key::SinkDetached(self.inner.task.flow.clone(), sink.clone());
        let text = self.coordination().keys().text(&key);
        for _ in 0..RACES_MAX {
            let Some(found) = self.coordination().get(&key).await? else { return Ok(()) };
            // An earlier one than was to bring it back was cancelled, and this one did.
            if found.decode::<Detached>()?.is_out_of(run) {
                return Ok(());
            }
            let unchanged = Compare::mod_revision(text.clone(), CompareOp::Equal, found.mod_revision.0);
            let delete = vec![TxnOp::delete(text.clone(), None)];
            if self.guarded(DOING, vec![unchanged], delete, Vec::new()).await?.succeeded {
                return Ok(());
            }
        }
        Err(Error::Refused { doing: DOING, cause: MOVED_EACH_TIME.to_owned() })
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
