//! The controller's settings: defaults < environment < flags. The same names as the worker's where they mean the same.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use wallaby_coordination::EtcdArguments;
use wallaby_model::PoolId;
use wallaby_model::flow::Span;
use wallaby_staging::NatsTarget;
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

impl Options {
    /// From the words of a command line and the environment.
    ///
    /// # Errors
    /// Says what cannot be; also how the program is used, when that was asked for.
    pub fn read<T: Into<OsString> + Clone>(words: impl IntoIterator<Item = T>) -> Result<Options, clap::Error> {
        let options = Options::try_parse_from(words)?;
        // Not by a parser of the value: its error would show the value, which may hold a password.
        let refused = |problem| Options::command().error(ErrorKind::ValueValidation, format!("--nats: {problem}"));
        NatsTarget::check(&options.nats).map_err(refused)?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn nats_servers_that_cannot_be_are_bad_usage() {
        let error = Options::read(["wallaby-controller", "--nats", "nats://a,http://me:secret@x"]).unwrap_err();
        let said = error.to_string();
        assert_eq!(error.exit_code(), 2, "{said}");
        assert!(said.contains("--nats: `http://x` is no address") && !said.contains("secret"), "{said}");
        assert_eq!(
            Options::read(["wallaby-controller", "--nats", "nats://a,b:4222"]).unwrap().nats,
            ["nats://a", "b:4222"]
        );
    }
}
