//! The process: listening, TLS, health, and an orderly end.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::layer::util::{Identity as Unchanged, Stack};
use wallaby_coordination::{Candidate, Key};
use wallaby_proto::v1::flow_service_server::FlowServiceServer;
use wallaby_proto::v1::operation_service_server::OperationServiceServer;
use wallaby_proto::v1::sink_service_server::SinkServiceServer;
use wallaby_proto::v1::snapshot_service_server::SnapshotServiceServer;
use wallaby_proto::v1::verify_service_server::VerifyServiceServer;
use wallaby_proto::v1::worker_service_server::WorkerServiceServer;

use crate::backend::{Backend, Etcd};
use crate::options::Options;
use crate::request_spans::RequestSpansLayer;
use crate::schedule::{self, SchedulerParts};
use crate::service::{FlowApi, OperationApi, SinkApi, SnapshotApi, VerifyApi, WorkerApi};

/// How often the servers behind us are asked whether they are there.
const HEALTH_EVERY: Duration = Duration::from_secs(2);

/// How long open requests may take once the controller was asked to end.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// A request larger than this is refused: a flow of 50 sinks with 10,000 tables is below.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Why a controller cannot start. Whatever may pass by itself is waited for instead.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port is somebody else's.
    #[error(
        "the address {0} is taken: another controller or program listens there; end it, or choose another with --listen"
    )]
    Taken(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {cause}; choose another address with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
    /// Without TLS only loopback is safe, because there are no roles yet.
    #[error(
        "--listen {0} is not loopback: give --tls-cert and --tls-key (and --tls-client-ca, so that not everybody may change flows), or listen on 127.0.0.1"
    )]
    NeedsTls(SocketAddr),
    /// What is said of etcd cannot be used.
    #[error(transparent)]
    Etcd(#[from] wallaby_coordination::Error),
    /// A file of the settings cannot be read.
    #[error("cannot read {path}: {cause}")]
    File {
        /// The file.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Certificate and key do not make a server.
    #[error("the certificate, the key or the client authority cannot be used: {0}")]
    Tls(tonic::transport::Error),
    /// The descriptions of the services cannot be served.
    #[error("reflection cannot be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Reads a file of the settings.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, StartError> {
    std::fs::read(path).map_err(|cause| StartError::File { path: path.display().to_string(), cause })
}

/// A running controller. Dropping it ends it abruptly; [`Controller::stop`] in good order.
pub struct Controller {
    address: SocketAddr,
    shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Controller {
    /// Starts: listens at once, and reaches etcd and NATS as soon as they answer.
    ///
    /// # Errors
    /// When the settings cannot be used, or the address is taken.
    pub async fn start(options: Options) -> Result<Controller, StartError> {
        if options.tls_cert.is_none() && !options.listen.ip().is_loopback() {
            return Err(StartError::NeedsTls(options.listen));
        }
        let etcd_settings = options.etcd.options()?;
        let tls = server_tls(&options)?;
        let listener = TcpListener::bind(options.listen).await.map_err(|cause| match cause.kind() {
            ErrorKind::AddrInUse => StartError::Taken(options.listen),
            _ => StartError::Listen { address: options.listen, cause },
        })?;
        let address = listener.local_addr().map_err(|cause| StartError::Listen { address: options.listen, cause })?;
        let shutdown = CancellationToken::new();
        let backend = Backend::new(&options, shutdown.clone());
        let (health, health_service) = tonic_health::server::health_reporter();
        set_health(&health, false).await;
        let router = router(&backend, tls)?.add_service(health_service);
        let ended = shutdown.clone();
        let serving = tokio::spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let served = router.serve_with_incoming_shutdown(incoming, ended.cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!(%error, "the API ended");
            }
        });
        let mut tasks = vec![serving];
        tasks.push(tokio::spawn(watch_health(backend.clone(), health, shutdown.clone())));
        let nats = backend.clone();
        let until = shutdown.clone();
        tasks.push(tokio::spawn(async move {
            let _reached = nats.reach_nats(&until).await;
        }));
        let until = shutdown.clone();
        tasks.push(tokio::spawn(async move {
            let reached = backend.reach_etcd(&options.etcd.endpoints, &etcd_settings, &until).await.cloned();
            if let Some(etcd) = reached {
                schedule_tasks(backend, etcd, &options, address, until).await;
            }
        }));
        Ok(Controller { address, shutdown, tasks })
    }

    /// Where the API is served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends: no new requests, open ones may finish for a while, watches are closed, the leadership is given up.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        let tasks = std::mem::take(&mut self.tasks);
        let all = futures::future::join_all(tasks);
        if tokio::time::timeout(STOP_PATIENCE, all).await.is_err() {
            tracing::warn!("some requests did not end in time and are cut off");
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn server_tls(options: &Options) -> Result<Option<ServerTlsConfig>, StartError> {
    let (Some(certificate), Some(key)) = (&options.tls_cert, &options.tls_key) else { return Ok(None) };
    let mut tls = ServerTlsConfig::new().identity(Identity::from_pem(read_file(certificate)?, read_file(key)?));
    if let Some(ca) = &options.tls_client_ca {
        tls = tls.client_ca_root(Certificate::from_pem(read_file(ca)?));
    }
    Ok(Some(tls))
}

type TracedRouter = Router<Stack<RequestSpansLayer, Unchanged>>;

fn router(backend: &Backend, tls: Option<ServerTlsConfig>) -> Result<TracedRouter, StartError> {
    let mut server = Server::builder()
        .layer(RequestSpansLayer)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)));
    if let Some(tls) = tls {
        server = server.tls_config(tls).map_err(StartError::Tls)?;
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(wallaby_proto::DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    Ok(server
        .add_service(reflection)
        .add_service(FlowServiceServer::new(FlowApi::new(backend.clone())).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(SinkServiceServer::new(SinkApi::new(backend.clone())).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(
            SnapshotServiceServer::new(SnapshotApi::new(backend.clone())).max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .add_service(
            VerifyServiceServer::new(VerifyApi::new(backend.clone())).max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .add_service(
            OperationServiceServer::new(OperationApi::new(backend.clone()))
                .max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .add_service(
            WorkerServiceServer::new(WorkerApi::new(backend.clone())).max_decoding_message_size(REQUEST_BYTES_MAX),
        ))
}

async fn schedule_tasks(
    backend: Backend,
    etcd: Etcd,
    options: &Options,
    address: SocketAddr,
    until: CancellationToken,
) {
    let candidate =
        Candidate { id: format!("controller-{}", uuid::Uuid::new_v4().simple()), address: address.to_string() };
    let election = etcd.coordination.campaign(candidate, options.leader_ttl.0);
    schedule::run(SchedulerParts { backend, etcd, election, pool: options.pool.clone() }, until).await;
}

/// SERVING while etcd answers and NATS is connected; asked for by name, each service says the same.
async fn watch_health(backend: Backend, health: HealthReporter, until: CancellationToken) {
    let mut ticks = tokio::time::interval(HEALTH_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_healthy = false;
    loop {
        tokio::select! {
            () = until.cancelled() => return set_health(&health, false).await,
            _ = ticks.tick() => {}
        }
        let is_healthy = is_healthy(&backend).await;
        if is_healthy != was_healthy {
            set_health(&health, is_healthy).await;
            was_healthy = is_healthy;
        }
    }
}

async fn is_healthy(backend: &Backend) -> bool {
    let Ok(etcd) = backend.etcd() else { return false };
    let is_connected =
        |client: &async_nats::Client| client.connection_state() == async_nats::connection::State::Connected;
    if !backend.nats().is_some_and(|connections| is_connected(&connections.publish)) {
        return false;
    }
    // Any key will do: whether etcd answers is the question.
    etcd.coordination.get(&Key::ControllerLeader).await.is_ok()
}

async fn set_health(health: &HealthReporter, is_healthy: bool) {
    let status = if is_healthy { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in [
        "",
        "wallaby.v1.FlowService",
        "wallaby.v1.OperationService",
        "wallaby.v1.SinkService",
        "wallaby.v1.SnapshotService",
        "wallaby.v1.VerifyService",
        "wallaby.v1.WorkerService",
    ] {
        health.set_service_status(service, status).await;
    }
}
