//! The `wallaby` command: what people type.
//!
//! Everything but `doctor` and `completion` talks to a controller over its gRPC API and knows nothing of etcd or NATS.
//!
//! | module | holds |
//! |---|---|
//! | `args` | what can be typed |
//! | `failure` | what can go wrong, what is said about it, and the exit codes |
//! | `server` | the connection to the controller |
//! | `commands` | one module per verb |
//! | `render` | tables, JSON, YAML, and figures for people |

mod args;
mod commands;
mod failure;
mod render;
mod server;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::Failure;

/// Runs one command line and says how it ended (exit codes: see `wallaby --help`).
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; anything else is a usage error, and clap exits with 2 for it as we do.
            let code = if error.use_stderr() { failure::EXIT_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::Failed(format!("cannot start: {error}"))),
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = dispatch(&cli) => outcome,
            _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
        }
    });
    // A doctor's look-up may hang in the resolver; nobody waits for it.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

async fn dispatch(cli: &Cli) -> Result<(), Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Apply(options) => commands::apply::run(global, options).await,
        Command::Diff(options) => commands::diff::run(global, options).await,
        Command::Snapshot(command) => commands::snapshot::run(global, command).await,
        Command::Get(options) => commands::get::run(global, options).await,
        Command::Describe(options) => commands::describe::run(global, options).await,
        Command::Delete(options) => commands::delete::run(global, options).await,
        Command::Pause(options) => commands::pause::pause(global, options).await,
        Command::Resume(options) => commands::pause::resume(global, options).await,
        Command::Status(options) => commands::status::run(global, options).await,
        Command::Verify(options) => commands::verify::run(global, options).await,
        Command::Workers => commands::get::workers(global, None).await,
        Command::Drain(options) => commands::drain::run(global, options).await,
        Command::Doctor(options) => commands::doctor::run(global, options).await,
        Command::Completion { shell } => commands::completion::run(*shell),
    }
}

fn report(failure: &Failure) -> ExitCode {
    if let Some(text) = failure.text() {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
    ExitCode::from(failure.exit_code())
}
