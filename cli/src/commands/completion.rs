//! `wallaby completion`: the script that makes a shell complete our words.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::Failure;
use crate::render;

pub fn run(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "wallaby", &mut script);
    render::print(&String::from_utf8_lossy(&script))
}
