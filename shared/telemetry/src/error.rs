//! What can go wrong while telemetry is set up.

use std::net::SocketAddr;

/// An error of the set-up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The metrics address cannot be listened on.
    #[error(
        "metrics cannot be served on {address}: {cause}. Is port {port} taken by another process (`ss -ltnp 'sport = :{port}'`)? Choose another address with --metrics (or the variable WALLABY_METRICS), port 0 for any free one",
        port = address.port()
    )]
    MetricsPort {
        /// The address.
        address: SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
    /// The log filter cannot be read.
    #[error("{filter:?} is not a log filter: {cause}. Write levels by module, as in info,wallaby_staging=debug")]
    Filter {
        /// The filter.
        filter: String,
        /// Why.
        cause: String,
    },
    /// The OTLP endpoint cannot be used.
    #[error(
        "spans cannot be sent to {endpoint:?}: {cause}. Write the collector's gRPC address, as in http://127.0.0.1:4317"
    )]
    Otlp {
        /// The endpoint.
        endpoint: String,
        /// Why.
        cause: String,
    },
    /// Somebody set telemetry up in this process before.
    #[error("telemetry is set up already in this process ({0})")]
    Twice(String),
}

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;
