//! `make demo`: a whole WALlaby on this machine, a kill -9 while rows flow, and the proof that nothing was lost or doubled.
//!
//! Exit codes: 0 source and target are equal · 1 something failed · 3 they differ · 130 interrupted.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use wallaby_loadtest::demo::{self, DemoOptions, Told};

/// Runs WALlaby on this machine: two Postgres, three NATS nodes, etcd, a controller, two workers; kills one in the middle.
#[derive(Debug, Parser)]
#[command(name = "wallaby-demo", version)]
struct Arguments {
    /// Where everything is kept while it runs.
    #[arg(long, default_value = ".wallaby/demo")]
    folder: PathBuf,
    /// The flow to apply.
    #[arg(long, default_value = "examples/shop/flow.yaml")]
    flow: PathBuf,
    /// Where wallaby-controller and wallaby-worker are; beside this program when absent.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Rows that the shop writes each second.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..))]
    rows_per_second: u32,
    /// Seconds that rows flow before the kill, and again after the takeover.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(..=86_400))]
    seconds: u64,
    /// Decides what the shop writes.
    #[arg(long, env = "WALLABY_SEED", default_value_t = 1)]
    seed: u64,
    /// Leaves everything running at the end, until Ctrl-C. KEEP=1 does the same.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let keep = arguments.keep || std::env::var("KEEP").is_ok_and(|value| !value.is_empty() && value != "0");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wallaby-demo: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    // What runs is dropped inside: its processes are gone before we are.
    let code = runtime.block_on(async {
        match play(arguments, keep).await {
            Ok(code) => code,
            Err(error) => {
                eprintln!("\nwallaby-demo: {error:#}");
                ExitCode::FAILURE
            }
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    code
}

async fn play(arguments: Arguments, keep: bool) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut interrupted =
        async || tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hang_up.recv() => {} };
    let options = DemoOptions {
        folder: arguments.folder,
        flow: arguments.flow,
        programs: arguments.programs,
        rows_per_second: arguments.rows_per_second,
        flow_for: Duration::from_secs(arguments.seconds),
        seed: arguments.seed,
    };
    let told = tokio::select! {
        told = demo::run(&options) => told?,
        () = interrupted() => {
            println!("\nInterrupted: ending everything.");
            return Ok(ExitCode::from(130));
        }
    };
    let code = verdict(&told);
    if keep {
        println!("\nEverything keeps running until you press Ctrl-C.\n\n{}", told.how_to_look_around());
        interrupted().await;
        println!("\nEnding everything.");
    }
    told.end()?;
    Ok(code)
}

fn verdict(told: &Told) -> ExitCode {
    let takeover = told.outcome.takeover.as_secs_f64();
    if told.outcome.is_equal() {
        println!(
            "\nEQUAL: {} rows, nothing lost, nothing doubled. Takeover after kill -9: {takeover:.1} s.",
            told.outcome.comparison.rows_equal()
        );
        return ExitCode::SUCCESS;
    }
    println!("\nDIFFERENT: source and target are not equal (above). Takeover after kill -9: {takeover:.1} s.");
    ExitCode::from(3)
}
