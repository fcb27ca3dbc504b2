//! Entry point of `wallaby-controller`.

use std::io::Write;
use std::process::ExitCode;

use wallaby_controller::{Controller, Options};
use wallaby_telemetry::{LogFormat, TelemetryOptions};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let telemetry = wallaby_telemetry::init(TelemetryOptions {
        otlp_endpoint: options.otlp.clone(),
        trace_ratio: options.trace_ratio,
        metrics_listen: Some(options.metrics),
        log_format: if options.log_format == "json" { LogFormat::Json } else { LogFormat::Text },
        filter: Some(options.log.clone()),
        ..TelemetryOptions::new("wallaby-controller", env!("CARGO_PKG_VERSION"))
    })
    .await?;
    wallaby_controller::metrics::describe();
    wallaby_coordination::metrics::describe();
    let metrics_wanted = options.metrics;
    let controller = Controller::start(options).await?;
    // Programs that start a controller on port 0 read these.
    let metrics = telemetry.metrics_address().unwrap_or(metrics_wanted);
    tracing::info!(api = %controller.address(), %metrics, "controller started");
    wait_for_the_end().await?;
    controller.stop().await;
    telemetry.shutdown().await;
    Ok(())
}

async fn wait_for_the_end() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("asked to end");
    Ok(())
}
