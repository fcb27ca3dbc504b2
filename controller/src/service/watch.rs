//! `WatchFlow`: flows at once, then after each change, not more often than asked for.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wallaby_model::FlowId;
use wallaby_proto::v1;

use super::{ALL_FLOWS, flow_named};
use crate::backend::{Backend, Etcd};
use crate::present;
use crate::reason::{ApiError, Reason};
use crate::view::View;

/// Between two answers about one flow when nothing is said, at least, and at most.
const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(86_400);

/// Answers that wait for a slow client before the watch itself waits.
const ANSWERS_WAITING_MAX: usize = 64;

/// The answers of one watch.
pub type FlowChanges = Pin<Box<dyn Stream<Item = Result<v1::WatchFlowResponse, Status>> + Send>>;

/// Starts a watch; it ends with its client.
pub fn watch(backend: &Backend, request: v1::WatchFlowRequest) -> Result<FlowChanges, ApiError> {
    let only = match request.name.as_str() {
        ALL_FLOWS => None,
        name => Some(flow_named(name)?),
    };
    let interval = match request.interval {
        None => INTERVAL,
        Some(interval) => Duration::try_from(interval)
            .map_err(|_| ApiError::new(Reason::ArgumentInvalid, "interval must not be negative"))?
            .max(INTERVAL_MIN),
    };
    // A message can say more than a clock can count.
    if interval > INTERVAL_MAX {
        return Err(ApiError::new(Reason::ArgumentInvalid, "interval must be at most a day"));
    }
    let etcd = backend.etcd()?.clone();
    if let Some(flow) = &only
        && etcd.view.with(|view| view.flow(flow).is_none())
    {
        return Err(ApiError::new(Reason::FlowNotFound, format!("there is no flow {flow}")));
    }
    let (sender, receiver) = mpsc::channel(ANSWERS_WAITING_MAX);
    let ending = backend.ending();
    tokio::spawn(async move {
        tokio::select! {
            () = tell(etcd, only, interval, sender) => {}
            // An open watch must not hold up the controller's end; its client asks another replica.
            () = ending.cancelled() => {}
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn tell(
    etcd: Etcd,
    only: Option<FlowId>,
    interval: Duration,
    sender: mpsc::Sender<Result<v1::WatchFlowResponse, Status>>,
) {
    let mut version = etcd.view.version();
    let mut told: BTreeMap<FlowId, v1::Flow> = BTreeMap::new();
    loop {
        let next = Instant::now() + interval;
        version.borrow_and_update();
        for answer in etcd.view.with(|view| changes(view, only.as_ref(), &mut told)) {
            if sender.send(Ok(answer)).await.is_err() {
                return;
            }
        }
        // Whatever happens in between comes in one answer. A client that is gone ends the watch at once.
        let quiet = async {
            sleep_until(next).await;
            version.changed().await
        };
        tokio::select! {
            () = sender.closed() => return,
            changed = quiet => if changed.is_err() { return },
        }
    }
}

/// What differs from what was told, which it then counts as.
fn changes(view: &View, only: Option<&FlowId>, told: &mut BTreeMap<FlowId, v1::Flow>) -> Vec<v1::WatchFlowResponse> {
    let mut answers = Vec::new();
    for entry in view.flows().filter(|entry| only.is_none_or(|only| entry.flow == *only)) {
        let flow = present::flow(view, entry);
        if told.get(&entry.flow) != Some(&flow) {
            told.insert(entry.flow.clone(), flow.clone());
            answers.push(v1::WatchFlowResponse { flow: Some(flow), deleted: false });
        }
    }
    let gone: Vec<FlowId> = told.keys().filter(|flow| view.flow(flow).is_none()).cloned().collect();
    for flow in gone {
        let name = told.remove(&flow).map(|flow| flow.name).unwrap_or_default();
        let flow = v1::Flow { name, ..v1::Flow::default() };
        answers.push(v1::WatchFlowResponse { flow: Some(flow), deleted: true });
    }
    answers
}
