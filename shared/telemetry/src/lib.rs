//! Tracing, OTLP export and the Prometheus endpoint, set up the same way in every binary.
//!
//! [`init`] is called once, first thing in `main`'s runtime; what it returns is kept until the end and then shut down, so that
//! the last spans leave. Log lines go to standard error: standard output belongs to what a command prints.

mod error;
mod logs;
mod metrics_server;
mod process;
mod ratio;
mod traceparent;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio_util::task::AbortOnDropHandle;

pub use error::{Error, Result};
pub use ratio::{TraceRatio, TraceRatioError};
pub use traceparent::{failed, link, set_parent, traceparent};

/// Where the Prometheus endpoint listens when nothing is said: loopback, port 7118.
pub const DEFAULT_METRICS_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7118);

/// The most links that one span carries; it says how many it had beyond.
pub const LINKS_MAX: u32 = 128;

/// Whether this process begins traces of its own: set once, when telemetry is.
static BEGINS_TRACES: AtomicBool = AtomicBool::new(false);

/// Whether a span that has no parent can be exported: spans go somewhere, and the share of new traces is not zero. Asked before such
/// a span is made where that happens often, so that it costs nothing when nobody looks.
pub fn begins_traces() -> bool {
    BEGINS_TRACES.load(Ordering::Relaxed)
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What a binary wants.
#[derive(Clone, Debug)]
pub struct TelemetryOptions {
    /// `service.name` of spans: `wallaby-controller`, `wallaby-pool-worker`.
    pub service: String,
    /// `service.version` of spans.
    pub version: String,
    /// `service.instance.id` of spans: the worker's id.
    pub instance: Option<String>,
    /// Where spans go, over gRPC: `http://collector:4317`. `None`: nowhere.
    pub otlp_endpoint: Option<String>,
    /// The share of new traces that is exported. Traces that came in keep their sender's choice.
    pub trace_ratio: TraceRatio,
    /// Where `GET /metrics` and `GET /healthz` are served; port 0 takes a free one. `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines, as in `info,wallaby_staging=debug`. `None`: the variable `RUST_LOG`, else `info`.
    pub filter: Option<String>,
}

impl TelemetryOptions {
    /// The defaults of a server: metrics on [`DEFAULT_METRICS_LISTEN`], text logs, no export.
    pub fn new(service: impl Into<String>, version: impl Into<String>) -> TelemetryOptions {
        TelemetryOptions {
            service: service.into(),
            version: version.into(),
            instance: None,
            otlp_endpoint: None,
            trace_ratio: TraceRatio::default(),
            metrics_listen: Some(DEFAULT_METRICS_LISTEN),
            log_format: LogFormat::Text,
            filter: None,
        }
    }
}

/// Running telemetry. Keep it until the end of `main`.
#[must_use = "telemetry ends when this is dropped"]
#[derive(Debug)]
pub struct Telemetry {
    metrics_address: Option<SocketAddr>,
    tracer: Option<SdkTracerProvider>,
    _metrics_server: Option<AbortOnDropHandle<()>>,
}

/// Sets up logs, spans and metrics of this process. Call it once, inside the tokio runtime.
///
/// # Errors
/// `MetricsPort` when the port is taken, naming it; `Filter` and `Otlp` for settings that cannot be used; `Twice`. Nothing is
/// left half set up but the log lines.
pub async fn init(options: TelemetryOptions) -> Result<Telemetry> {
    // What can fail for reasons outside comes first.
    let listener = match options.metrics_listen {
        Some(address) => Some(metrics_server::bind(address).await?),
        None => None,
    };
    let tracer = logs::tracer(&options)?;
    logs::install(&options, tracer.as_ref())?;
    BEGINS_TRACES.store(tracer.is_some() && !options.trace_ratio.is_zero(), Ordering::Relaxed);
    let metrics_address = listener.as_ref().map(|(_, address)| *address);
    let metrics_server = match listener {
        Some((listener, _)) => Some(metrics_server::start(listener)?),
        None => None,
    };
    Ok(Telemetry { metrics_address, tracer, _metrics_server: metrics_server })
}

impl Telemetry {
    /// Where metrics are served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Sends what is left of the spans; waits at most 5 s.
    pub async fn shutdown(mut self) {
        let Some(tracer) = self.tracer.take() else { return };
        // It blocks until the exporter's thread, which needs this runtime, has sent the rest.
        let ended =
            tokio::task::spawn_blocking(move || tracer.shutdown_with_timeout(std::time::Duration::from_secs(5)));
        match ended.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not sent"),
            Err(error) => tracing::warn!(%error, "the exporter of spans did not end"),
        }
    }
}
