//! Operations of a flow: what is asked, what came of it. The controller writes the specification, the task's owner the result.

use std::collections::BTreeMap;

use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};
use wallaby_model::verify::{OperationResult, OperationSpec};
use wallaby_model::{FlowId, TaskId, TaskKind};

use crate::client::encode;
use crate::flows::FlowEntry;
use crate::keys::Key;
use crate::{Coordination, Error, Result, Revision};

/// How often a write is tried again because others came between.
const RACES_MAX: u32 = 16;

/// Operations that are kept, the last ones; those that are not over are kept beside them.
const KEPT: usize = 10;

/// Operations of a flow that are not over, at most.
const OPEN_MAX: usize = 4;

/// An operation as it stands in etcd.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationEntry {
    /// Its number inside the flow, from 1.
    pub number: u32,
    /// What is asked.
    pub spec: OperationSpec,
    /// The revision of the specification.
    pub spec_revision: Revision,
    /// What its owner says; the default before one said something.
    pub result: OperationResult,
}

impl OperationEntry {
    /// Whether nothing more comes of it: also one that was cancelled before a worker took it.
    pub fn is_over(&self) -> bool {
        self.result.state.is_over()
    }
}

impl Coordination {
    /// The operations of a flow that are kept, by number.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn operations(&self, flow: &FlowId) -> Result<Vec<OperationEntry>> {
        let mut found: BTreeMap<u32, (Option<(OperationSpec, Revision)>, OperationResult)> = BTreeMap::new();
        for entry in self.list(&self.keys().operations(flow)).await? {
            match &entry.key {
                Key::OperationSpec(_, number) => {
                    found.entry(*number).or_default().0 = Some((entry.decode()?, entry.mod_revision));
                }
                Key::OperationResult(_, number) => found.entry(*number).or_default().1 = entry.decode()?,
                _ => {}
            }
        }
        let whole = found.into_iter().filter_map(|(number, (spec, result))| {
            let (spec, spec_revision) = spec?;
            Some(OperationEntry { number, spec, spec_revision, result })
        });
        Ok(whole.collect())
    }

    /// One operation; `None` when it is not kept any more, or never was.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn operation(&self, flow: &FlowId, number: u32) -> Result<Option<OperationEntry>> {
        let Some(spec) = self.get(&Key::OperationSpec(flow.clone(), number)).await? else { return Ok(None) };
        let result = self.get(&Key::OperationResult(flow.clone(), number)).await?;
        let result = result.map(|entry| entry.decode()).transpose()?.unwrap_or_default();
        Ok(Some(OperationEntry { number, spec: spec.decode()?, spec_revision: spec.mod_revision, result }))
    }

    /// Makes an operation of a flow, and forgets the oldest that are over.
    ///
    /// # Errors
    /// `TooManyOpen` when too many are not over; `FlowNotFound` when the flow is gone meanwhile; when etcd cannot be reached.
    pub async fn create_operation(&self, flow: &FlowEntry, spec: OperationSpec) -> Result<OperationEntry> {
        let doing = "making an operation";
        let refused = |cause: String| Error::Refused { doing, cause };
        let flow_key = self.keys().text(&Key::FlowSpec(flow.flow.clone()));
        for _ in 0..RACES_MAX {
            let kept = self.operations(&flow.flow).await?;
            let open = kept.iter().filter(|known| !known.is_over()).count();
            if open >= OPEN_MAX {
                return Err(Error::TooManyOpen { flow: flow.flow.clone(), open });
            }
            let number = kept.last().map_or(1, |last| last.number.saturating_add(1));
            let key = self.keys().text(&Key::OperationSpec(flow.flow.clone(), number));
            let value = encode(&key, &spec)?;
            let mut then = vec![TxnOp::put(key.clone(), value.clone(), None)];
            let over: Vec<u32> = kept.iter().filter(|known| known.is_over()).map(|known| known.number).collect();
            for number in over.iter().take(over.len().saturating_sub(KEPT - 1)) {
                then.extend(self.forgets(&flow.flow, *number));
            }
            // The newest is always kept, so that its number is not given twice.
            let when = vec![
                Compare::create_revision(key.clone(), CompareOp::Equal, 0),
                Compare::create_revision(flow_key.clone(), CompareOp::Greater, 0),
            ];
            let reads = vec![TxnOp::get(key, None), TxnOp::get(flow_key.clone(), None)];
            let outcome = self.transact(doing, Txn::new().when(when).and_then(then).or_else(reads)).await?;
            let made = |spec_revision| {
                let result = OperationResult::default();
                OperationEntry { number, spec: spec.clone(), spec_revision, result }
            };
            if outcome.succeeded {
                return Ok(made(outcome.revision));
            }
            if let Some(found) = outcome.read(0)
                && outcome.is_repeated
                && found.value == value
            {
                // An earlier attempt of this call was done, its answer lost.
                return Ok(made(found.mod_revision));
            }
            if outcome.read(1).is_none() {
                return Err(Error::FlowNotFound(flow.flow.clone()));
            }
        }
        Err(refused("other operations were made at each of many attempts".to_owned()))
    }

    /// Asks that an operation ends. `None` when there is no such operation; one that is over stays as it is.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn cancel_operation(&self, flow: &FlowId, number: u32) -> Result<Option<OperationEntry>> {
        let doing = "cancelling an operation";
        for _ in 0..RACES_MAX {
            let Some(mut found) = self.operation(flow, number).await? else { return Ok(None) };
            if found.is_over() || found.spec.cancelled {
                return Ok(Some(found));
            }
            found.spec.cancelled = true;
            let key = self.keys().text(&Key::OperationSpec(flow.clone(), number));
            let when = vec![Compare::mod_revision(key.clone(), CompareOp::Equal, found.spec_revision.0)];
            let put = TxnOp::put(key.clone(), encode(&key, &found.spec)?, None);
            let outcome = self.transact(doing, Txn::new().when(when).and_then(vec![put])).await?;
            if outcome.succeeded {
                found.spec_revision = outcome.revision;
                return Ok(Some(found));
            }
        }
        Err(Error::Refused { doing, cause: "it is being changed by somebody else".to_owned() })
    }

    fn forgets(&self, flow: &FlowId, number: u32) -> Vec<TxnOp> {
        let task = TaskId { flow: flow.clone(), kind: TaskKind::Verify(number) };
        let all = || Some(DeleteOptions::new().with_prefix());
        let keys = [Key::OperationSpec(flow.clone(), number), Key::OperationResult(flow.clone(), number)];
        let own = keys.iter().map(|key| TxnOp::delete(self.keys().text(key), None));
        own.chain([TxnOp::delete(self.keys().task(&task), all())]).collect()
    }
}
