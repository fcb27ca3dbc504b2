//! The worker's settings: defaults < environment < flags.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use wallaby_coordination::EtcdArguments;
use wallaby_model::PoolId;
use wallaby_model::flow::{ByteSize, Span};
use wallaby_staging::NatsTarget;
use wallaby_telemetry::TraceRatio;

use crate::memory;

/// A worker of the pool: takes offers, owns tasks, captures and applies.
///
/// Stops gracefully on SIGTERM and Ctrl-C: takes no more offers, finishes the batch at hand, writes the last
/// checkpoints, gives its tasks back and exits.
#[derive(Clone, Debug, Parser)]
#[command(name = "wallaby-worker", version)]
pub struct Options {
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArguments,

    /// The NATS servers, separated by commas. All servers of the cluster that holds the logs.
    #[arg(long, env = "WALLABY_NATS", value_delimiter = ',', default_value = "nats://127.0.0.1:4222")]
    pub nats: Vec<String>,

    /// A NATS credentials file.
    #[arg(long, env = "WALLABY_NATS_CREDS", value_name = "FILE")]
    pub nats_creds: Option<PathBuf>,

    /// The certificate authority that the NATS servers' certificates are checked against, PEM.
    #[arg(long, env = "WALLABY_NATS_CA", value_name = "FILE")]
    pub nats_ca: Option<PathBuf>,

    /// The monitoring URLs of the NATS servers, separated by commas: read for their sync interval. Without them an
    /// acknowledgement counts as on disk after four minutes.
    #[arg(long, env = "WALLABY_NATS_MONITORING", value_delimiter = ',')]
    pub nats_monitoring: Vec<String>,

    /// The pool whose offers this worker takes.
    #[arg(long, env = "WALLABY_POOL", default_value = wallaby_model::offer::DEFAULT_POOL)]
    pub pool: PoolId,

    /// The name of this worker; a random one when absent. Two live workers never share one.
    #[arg(long, env = "WALLABY_WORKER_NAME")]
    pub name: Option<String>,

    /// The most tasks that this worker owns at a time.
    #[arg(long, env = "WALLABY_CAPACITY", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub capacity: u32,

    /// The time to live of the worker's lease: how long a dead worker's tasks stay without an owner. At least 2s.
    #[arg(long, env = "WALLABY_LEASE_TTL", default_value = "10s")]
    pub lease_ttl: Span,

    /// The memory that this worker may take: what it keeps and reads ahead is sized by it. At least 64Mi. When absent: the limit of its
    /// cgroup.
    #[arg(long, env = "WALLABY_MEMORY_LIMIT", value_name = "BYTES", value_parser = memory::limit_of_flag)]
    pub memory_limit: Option<ByteSize>,

    /// Memory for segments that several sinks of a flow read. When absent: an eighth of the memory limit, at most 64Mi.
    #[arg(long, env = "WALLABY_CACHE_BYTES")]
    pub cache_bytes: Option<ByteSize>,

    /// Memory for what one sink has read and not applied. When absent: a sixteenth of the memory limit, at most 16Mi.
    #[arg(long, env = "WALLABY_SINK_BUFFER_BYTES")]
    pub sink_buffer_bytes: Option<ByteSize>,

    /// Cut off from the log's servers for this long, a capture is given up: another worker may reach them.
    #[arg(long, env = "WALLABY_LOG_PATIENCE", default_value = "60s")]
    pub log_patience: Span,

    /// A sink's sessions are given up and opened again after this long without an answer.
    #[arg(long, env = "WALLABY_SINK_PATIENCE", default_value = "5m")]
    pub sink_patience: Span,

    /// Where /metrics is served. Port 0 takes a free one and prints it.
    #[arg(long, env = "WALLABY_METRICS", default_value = "127.0.0.1:7118")]
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

    /// Which log lines are written, as in `info,wallaby_staging=debug`.
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
        let error = Options::read(["wallaby-worker", "--nats", "nats://a,http://me:secret@x"]).unwrap_err();
        let said = error.to_string();
        assert_eq!(error.exit_code(), 2, "{said}");
        assert!(said.contains("--nats: `http://x` is no address") && !said.contains("secret"), "{said}");
        assert_eq!(
            Options::read(["wallaby-worker", "--nats", "nats://a,b:4222"]).unwrap().nats,
            ["nats://a", "b:4222"]
        );
    }

    #[test]
    fn a_memory_limit_that_no_worker_can_live_with_is_bad_usage() {
        for little in ["0", "1", "63Mi"] {
            let error = Options::read(["wallaby-worker", "--memory-limit", little]).unwrap_err();
            let said = error.to_string();
            assert_eq!(error.exit_code(), 2, "{said}");
            assert!(said.contains("--memory-limit") && said.contains("at least 64Mi"), "{said}");
        }
        let least = Options::read(["wallaby-worker", "--memory-limit", "64Mi"]).unwrap();
        assert_eq!(least.memory_limit, Some(ByteSize(64 << 20)));
    }
}
