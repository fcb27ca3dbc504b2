//! The gRPC services: requests in, refusals or messages out.

mod flows;
mod operations;
mod sinks;
mod snapshots;
mod store;
mod verify;
mod watch;
mod workers;

pub use flows::FlowApi;
pub use operations::OperationApi;
pub use sinks::SinkApi;
pub use snapshots::SnapshotApi;
pub use verify::VerifyApi;
pub use workers::WorkerApi;

use tonic::{Response, Status};
use wallaby_model::{FlowId, api};

use crate::metrics;
use crate::reason::{ApiError, Reason};

/// Names every flow.
const ALL_FLOWS: &str = "flows/-";

/// An outcome as tonic wants it; refusals are counted.
fn answer<T>(outcome: Result<T, ApiError>) -> Result<Response<T>, Status> {
    outcome.map(Response::new).map_err(|error| {
        metrics::refused(error.reason().text());
        error.into()
    })
}

fn flow_named(name: &str) -> Result<FlowId, ApiError> {
    api::parse_flow_name(name).ok_or_else(|| {
        ApiError::new(Reason::NameInvalid, format!("`{name}` is not the name of a flow: write it as flows/{{flow}}"))
    })
}
