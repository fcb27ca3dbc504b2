//! `wallaby-worker`: connects, then lives until it is asked to end.

use std::process::ExitCode;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use wallaby_coordination::Coordination;
use wallaby_model::WorkerId;
use wallaby_pool_worker::failpoint::Failpoints;
use wallaby_pool_worker::options::Options;
use wallaby_pool_worker::worker::{self, Outcome, Start};
use wallaby_telemetry::{LogFormat, TelemetryOptions};

fn main() -> ExitCode {
    // A refusal costs memory and nothing else.
    wallaby_allocator::give_large_blocks_back();
    let options = Options::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wallaby-worker: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wallaby-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> anyhow::Result<()> {
    let failpoints =
        Failpoints::parse(&std::env::var("WALLABY_FAILPOINTS").unwrap_or_default()).map_err(anyhow::Error::msg)?;
    let name = match &options.name {
        Some(name) => WorkerId::new(name.clone())?,
        None => WorkerId::new(format!("worker-{:08x}", rand::random::<u32>()))?,
    };
    let telemetry = wallaby_telemetry::init(TelemetryOptions {
        instance: Some(name.to_string()),
        otlp_endpoint: options.otlp.clone(),
        trace_ratio: options.trace_ratio,
        metrics_listen: Some(options.metrics),
        log_format: if options.log_format == "json" { LogFormat::Json } else { LogFormat::Text },
        filter: Some(options.log.clone()),
        ..TelemetryOptions::new("wallaby-worker", env!("CARGO_PKG_VERSION"))
    })
    .await?;
    wallaby_pool_worker::describe_metrics();
    failpoints.listen()?;
    for failpoint in failpoints.on() {
        tracing::error!(?failpoint, "A FAILPOINT IS ON: this worker breaks a protection on purpose. For tests only");
    }
    let shutdown = CancellationToken::new();
    tokio::spawn(watch_signals(shutdown.clone()));
    let address = telemetry.metrics_address().map(|address| address.to_string()).unwrap_or_default();
    let outcome = live(options, name, failpoints, address, shutdown).await;
    telemetry.shutdown().await;
    outcome
}

/// One life after another: a lease that was lost is followed by a new one.
async fn live(
    options: Options,
    name: WorkerId,
    failpoints: Failpoints,
    address: String,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let settings = options.etcd.options()?;
    let coordination = loop {
        match Coordination::connect(&options.etcd.endpoints, settings.clone()).await {
            Ok(coordination) => break coordination,
            Err(error) if !error.is_transient() => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "waiting for etcd");
                if pause(&shutdown).await {
                    return Ok(());
                }
            }
        }
    };
    loop {
        let start = Start {
            options: options.clone(),
            name: name.clone(),
            coordination: coordination.clone(),
            failpoints: failpoints.clone(),
            address: address.clone(),
        };
        match worker::run(start, shutdown.clone()).await {
            Ok(Outcome::Drained) => return Ok(()),
            Ok(Outcome::Fenced) => tracing::warn!("beginning again with a new lease"),
            Err(error) if !error.is_transient() && !error.is_ownership_lost() => return Err(error.into()),
            Err(error) => tracing::warn!(%error, "no lease at the moment"),
        }
        if pause(&shutdown).await {
            return Ok(());
        }
    }
}

/// A second's pause; true when it is time to end.
async fn pause(shutdown: &CancellationToken) -> bool {
    tokio::select! {
        () = shutdown.cancelled() => true,
        () = tokio::time::sleep(Duration::from_secs(1)) => false,
    }
}

/// SIGTERM and SIGINT end the worker gracefully; a second one ends it at once.
async fn watch_signals(shutdown: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("signals cannot be watched: this worker ends only by being killed");
        return;
    };
    let mut next = async || {
        tokio::select! {
            _ = term.recv() => 143,
            _ = interrupt.recv() => 130,
        }
    };
    let _first = next().await;
    tracing::info!("asked to end");
    shutdown.cancel();
    let code = next().await;
    tracing::warn!("asked twice: ending at once");
    std::process::exit(code);
}
