//! The servers behind the controller, reached when they can be reached.
//!
//! The API is served from the first moment on; what needs a server that is not there answers UNAVAILABLE and names it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use wallaby_coordination::Coordination;
use wallaby_model::flow::{LogSpec, SideStoreSpec};
use wallaby_model::{FlowId, Position};
use wallaby_staging::{Connections, Log, NatsTarget, StagingError, open_side};

use crate::options::Options;
use crate::reason::{ApiError, Reason};
use crate::view::LiveView;

/// Between two tries at a server that does not answer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// etcd, once it was reached.
#[derive(Clone)]
pub struct Etcd {
    /// The connection.
    pub coordination: Coordination,
    /// What is in it.
    pub view: LiveView,
}

struct Inner {
    etcd_shown: String,
    nats_target: NatsTarget,
    etcd: OnceLock<Etcd>,
    nats: OnceLock<Connections>,
    ending: CancellationToken,
}

/// The servers. Cheap to clone.
#[derive(Clone)]
pub struct Backend(Arc<Inner>);

impl Backend {
    /// The servers of these settings; no I/O. `ending` fires when the controller ends.
    pub fn new(options: &Options, ending: CancellationToken) -> Backend {
        let nats_target = NatsTarget {
            servers: options.nats.clone(),
            credentials_file: options.nats_creds.clone(),
            ca_file: options.nats_ca.clone(),
            client_certificate: None,
            name: "wallaby-controller".to_owned(),
        };
        let etcd_shown = options.etcd.shown();
        Backend(Arc::new(Inner { etcd_shown, nats_target, etcd: OnceLock::new(), nats: OnceLock::new(), ending }))
    }

    /// etcd.
    ///
    /// # Errors
    /// UNAVAILABLE before it was reached, and before the state of all flows was read.
    pub fn etcd(&self) -> Result<&Etcd, ApiError> {
        let Some(etcd) = self.0.etcd.get() else {
            let message =
                format!("etcd at {} was not reached yet: check that it runs and has a quorum", self.0.etcd_shown);
            return Err(ApiError::new(Reason::EtcdUnreachable, message));
        };
        if !etcd.view.is_filled() {
            let message = "the controller is still reading the state of all flows; try again in a moment";
            return Err(ApiError::new(Reason::Starting, message));
        }
        Ok(etcd)
    }

    /// Fires when the controller ends: what would last longer ends by itself.
    pub fn ending(&self) -> CancellationToken {
        self.0.ending.clone()
    }

    /// NATS, once it was reached.
    pub fn nats(&self) -> Option<&Connections> {
        self.0.nats.get()
    }

    /// The log of a flow.
    ///
    /// # Errors
    /// UNAVAILABLE before NATS was reached.
    fn log(&self, flow: &FlowId) -> Result<Log, ApiError> {
        let Some(connections) = self.nats() else {
            let message = format!("NATS at {} was not reached yet: check that it runs", self.0.nats_target.shown());
            return Err(ApiError::new(Reason::NatsUnreachable, message));
        };
        Ok(Log::new(flow.clone(), connections.clone()))
    }

    /// Where a sink that is added now starts to read: the end of the last whole transaction in the log. None when nothing was
    /// ever staged.
    ///
    /// # Errors
    /// UNAVAILABLE when NATS does not answer; ABORTED when the end of a transaction was not found.
    pub async fn log_end(&self, flow: &FlowId) -> Result<Option<Position>, ApiError> {
        match self.log(flow)?.tail().await {
            Ok(tail) if tail.end.is_none() => Ok(None),
            Ok(tail) => tail.complete_to.map(Some).ok_or_else(|| {
                let message = "the log ends inside a large transaction: add the sink again when it is through";
                ApiError::new(Reason::LogMoved, message)
            }),
            Err(StagingError::Missing { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Drops what a flow has in NATS, its side store before its log; what is not there is no error. A side store elsewhere stays: only
    /// workers can reach it.
    ///
    /// # Errors
    /// UNAVAILABLE when NATS does not answer.
    pub async fn drop_staged(&self, flow: &FlowId, spec: &LogSpec) -> Result<(), ApiError> {
        let log = self.log(flow)?;
        if let SideStoreSpec::Jetstream(_) = spec.side_store {
            open_side(flow, spec, log.connections())?.remove().await?;
        }
        Ok(log.delete().await?)
    }

    /// Reaches etcd, however long it takes. None when the controller ends before.
    pub async fn reach_etcd(
        &self,
        endpoints: &[String],
        settings: &wallaby_coordination::Options,
        shutdown: &CancellationToken,
    ) -> Option<&Etcd> {
        let mut said = String::new();
        loop {
            let reached = tokio::select! {
                reached = Coordination::connect(endpoints, settings.clone()) => reached,
                () = shutdown.cancelled() => return None,
            };
            match reached {
                Ok(coordination) => {
                    tracing::info!(endpoints = %self.0.etcd_shown, "etcd reached");
                    let view = LiveView::start(&coordination);
                    return Some(self.0.etcd.get_or_init(|| Etcd { coordination, view }));
                }
                Err(error) => say_once(&mut said, &error.to_string(), "waiting for etcd"),
            }
            pause(shutdown).await;
        }
    }

    fn say_queue(&self, error: Option<String>) {
        if let Some(etcd) = self.0.etcd.get() {
            etcd.view.say_queue(error);
        }
    }

    /// Reaches NATS, however long it takes. None when the controller ends before.
    pub async fn reach_nats(&self, shutdown: &CancellationToken) -> Option<&Connections> {
        let mut said = String::new();
        loop {
            let reached = tokio::select! {
                reached = Connections::open(&self.0.nats_target) => reached,
                () = shutdown.cancelled() => return None,
            };
            match reached {
                Ok(connections) => {
                    tracing::info!(servers = %self.0.nats_target.shown(), "NATS reached");
                    self.say_queue(None);
                    return Some(self.0.nats.get_or_init(|| connections));
                }
                Err(error) => {
                    self.say_queue(Some(error.to_string()));
                    say_once(&mut said, &error.to_string(), "waiting for NATS");
                }
            }
            pause(shutdown).await;
        }
    }
}

/// A wait that lasts is told once, not each second.
fn say_once(said: &mut String, error: &str, what: &str) {
    if said != error {
        tracing::warn!(%error, "{what}; trying again until it answers");
        error.clone_into(said);
    }
}

async fn pause(shutdown: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(RETRY_AFTER) => {}
        () = shutdown.cancelled() => {}
    }
}
