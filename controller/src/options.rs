//! The controller's settings: defaults < environment < flags. The same names as the worker's where they mean the same.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use wallaby_coordination::EtcdArguments;
use wallaby_model::PoolId;
use wallaby_model::flow::Span;
use wallaby_telemetry::TraceRatio;

/// The control plane: serves the API, offers tasks without an owner to the pool, and says how flows are.
///
/// Any number of replicas may run; one of them schedules. Flows that run go on without any.
#[derive(Clone, Debug, Parser)]
#[command(name = "wallaby-controller", version)]
pub struct Options {
    /// Where the API listens. Anything but loopback needs --tls-cert and --tls-key. Port 0 takes a free one and prints it.
    #[arg(long, env = "WALLABY_LISTEN", default_value = "127.0.0.1:7117")]
    pub listen: SocketAddr,

    /// The API's certificate, PEM.
    #[arg(long, env = "WALLABY_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The key of the API's certificate, PEM.
    #[arg(long, env = "WALLABY_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Clients must show a certificate that this authority signed, PEM.
    #[arg(long, env = "WALLABY_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,

    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArguments,

    /// The NATS servers, separated by commas.
    #[arg(long, env = "WALLABY_NATS", value_delimiter = ',', default_value = "nats://127.0.0.1:4222")]
    pub nats: Vec<String>,

    /// A NATS credentials file.
    #[arg(long, env = "WALLABY_NATS_CREDS", value_name = "FILE")]
    pub nats_creds: Option<PathBuf>,

    /// The certificate authority that the NATS servers' certificates are checked against, PEM.
    #[arg(long, env = "WALLABY_NATS_CA", value_name = "FILE")]
    pub nats_ca: Option<PathBuf>,

    /// The pool that tasks are offered to.
    #[arg(long, env = "WALLABY_POOL", default_value = wallaby_model::offer::DEFAULT_POOL)]
    pub pool: PoolId,

    /// How long after the death of the replica that schedules another one takes over. At least 2s.
    #[arg(long, env = "WALLABY_LEADER_TTL", default_value = "5s")]
    pub leader_ttl: Span,

    /// Where /metrics is served. Port 0 takes a free one and prints it.
    #[arg(long, env = "WALLABY_METRICS", default_value = "127.0.0.1:7119")]
    pub metrics: SocketAddr,

    /// An OTLP collector (gRPC) that gets the traces, as http://host:4317.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp: Option<String>,

    /// The share of new traces that the collector gets, from 0 to 1. A trace that began elsewhere is kept or not as it was there.
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value_t)]
    pub trace_ratio: TraceRatio,

    /// How log lines look.
    #[arg(long, env = "WALLABY_LOG_FORMAT", default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,

    /// Which log lines are written, as in `info,wallaby_controller=debug`.
    #[arg(long, env = "WALLABY_LOG", default_value = "info")]
    pub log: String,
}
