//! Reading and changing flows in etcd: read, change, write if nobody came between, again.

use std::collections::{BTreeMap, BTreeSet};

use wallaby_coordination::{Error as CoordinationError, FlowEntry};
use wallaby_model::flow::FlowDocument;
use wallaby_model::flow::change::{ComparisonUnderWay, RunUnderWay, UnderWay};
use wallaby_model::run::RunWish;
use wallaby_model::{FlowId, Position, SinkId};
use wallaby_proto::v1;

use crate::backend::Backend;
use crate::present;
use crate::reason::{ApiError, Reason};

/// Tries at a change that others keep coming between.
const ATTEMPTS_MAX: usize = 8;

/// Flows, as the services use them.
#[derive(Clone)]
pub struct Store {
    pub backend: Backend,
}

impl Store {
    /// Reads a flow from etcd itself, so that what was just written is seen.
    pub async fn read(&self, flow: &FlowId) -> Result<FlowEntry, ApiError> {
        Ok(self.backend.etcd()?.coordination.flow(flow).await?)
    }

    /// What of a flow is not over yet.
    pub async fn under_way(&self, flow: &FlowId) -> Result<UnderWay, ApiError> {
        let coordination = &self.backend.etcd()?.coordination;
        let (runs, operations) = (coordination.runs(flow).await?, coordination.operations(flow).await?);
        let going_on = runs.into_iter().filter(|run| !run.is_over() && run.spec.wish != RunWish::Cancel);
        let open = operations.into_iter().filter(|made| !made.is_over());
        Ok(UnderWay {
            runs: going_on
                .map(|run| RunUnderWay {
                    run: run.run,
                    is_paused: run.spec.wish == RunWish::Pause,
                    sinks: run.spec.sinks,
                    holds_snapshot: run.plan.is_some_and(|plan| plan.snapshot().is_some()),
                })
                .collect(),
            comparisons: open
                .map(|made| ComparisonUnderWay { number: made.number, sink: made.spec.verify.sink })
                .collect(),
        })
    }

    /// A flow as the API shows it.
    pub fn show(&self, entry: &FlowEntry) -> Result<v1::Flow, ApiError> {
        Ok(self.backend.etcd()?.view.with(|view| present::flow(view, entry)))
    }

    /// What was just written, once the view shows it with all that was written beside it: runs, holds.
    async fn written(&self, entry: FlowEntry) -> Result<FlowEntry, ApiError> {
        self.backend.etcd()?.view.reaches(entry.revision).await;
        Ok(entry)
    }

    /// Makes a flow.
    pub async fn create(&self, document: FlowDocument) -> Result<FlowEntry, ApiError> {
        self.written(self.backend.etcd()?.coordination.create_flow(document).await?).await
    }

    /// Changes the document of a flow until nobody comes between. `edit` says false when there is nothing to change.
    pub async fn edit(
        &self,
        flow: &FlowId,
        edit: impl Fn(&mut FlowDocument) -> Result<bool, ApiError>,
    ) -> Result<FlowEntry, ApiError> {
        let coordination = &self.backend.etcd()?.coordination;
        let mut last = None;
        for _ in 0..ATTEMPTS_MAX {
            let seen = coordination.flow(flow).await?;
            if seen.record.deleting_since.is_some() {
                return Err(wallaby_coordination::Error::FlowDeleting(flow.clone()).into());
            }
            let mut document = seen.record.document.clone();
            if !edit(&mut document)? {
                return Ok(seen);
            }
            match self.replace(&seen, document).await {
                Err(error) if matches!(error.reason(), Reason::FlowChanged | Reason::LogMoved) => last = Some(error),
                outcome => return outcome,
            }
        }
        Err(last.unwrap_or_else(|| ApiError::new(Reason::FlowChanged, format!("flow {flow} changes all the time"))))
    }

    /// Writes a document in the place of the one that was seen.
    pub async fn replace(&self, seen: &FlowEntry, document: FlowDocument) -> Result<FlowEntry, ApiError> {
        let starts = self.starts(&seen.record.document, &document).await?;
        self.written(self.backend.etcd()?.coordination.update_flow(seen, document, &starts).await?).await
    }

    /// Where each sink that is new starts to read: at the log's end.
    async fn starts(
        &self,
        before: &FlowDocument,
        after: &FlowDocument,
    ) -> Result<BTreeMap<SinkId, Option<Position>>, ApiError> {
        let names = |document: &FlowDocument| -> BTreeSet<SinkId> {
            document.spec.sinks.iter().map(|sink| sink.name.clone()).collect()
        };
        let added: Vec<SinkId> = names(after).difference(&names(before)).cloned().collect();
        if added.is_empty() {
            return Ok(BTreeMap::new());
        }
        let end = self.backend.log_end(&after.metadata.name).await?;
        Ok(added.into_iter().map(|sink| (sink, end)).collect())
    }

    /// Lets a task that stopped for a person try again.
    pub async fn bump(&self, flow: &FlowId) -> Result<FlowEntry, ApiError> {
        let coordination = &self.backend.etcd()?.coordination;
        for _ in 0..ATTEMPTS_MAX {
            let seen = coordination.flow(flow).await?;
            match coordination.resume_flow(&seen).await {
                Err(CoordinationError::FlowChanged { .. }) => {}
                outcome => return self.written(outcome?).await,
            }
        }
        Err(ApiError::new(Reason::FlowChanged, format!("flow {flow} changes all the time; try again")))
    }

    /// Marks a flow as to be deleted.
    pub async fn mark_deleting(&self, flow: &FlowId, etag: &str) -> Result<FlowEntry, ApiError> {
        let coordination = &self.backend.etcd()?.coordination;
        for _ in 0..ATTEMPTS_MAX {
            let seen = coordination.flow(flow).await?;
            check_etag(&seen, etag)?;
            match coordination.mark_flow_deleting(&seen).await {
                Err(CoordinationError::FlowChanged { .. }) if etag.is_empty() => {}
                outcome => return self.written(outcome?).await,
            }
        }
        Err(ApiError::new(Reason::FlowChanged, format!("flow {flow} changes all the time; try again")))
    }
}

/// Refuses a request that was made for another version of the flow.
pub fn check_etag(seen: &FlowEntry, etag: &str) -> Result<(), ApiError> {
    if etag.is_empty() || etag == present::etag(seen) {
        return Ok(());
    }
    let flow = &seen.flow;
    Err(ApiError::new(
        Reason::FlowChanged,
        format!("flow {flow} was changed by somebody else: read it again and repeat the change"),
    )
    .with("etag", present::etag(seen)))
}
