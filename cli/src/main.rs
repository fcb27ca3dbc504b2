//! Entry point of the `wallaby` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    wallaby_cli::run(std::env::args_os())
}
