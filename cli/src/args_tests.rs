//! Each command that the pages and the help print can be typed.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::*;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The README and every page.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![Path::new(ROOT).join("README.md")];
    let mut folders = vec![Path::new(ROOT).join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    pages
}

/// The pieces of a page that may be commands: what stands in backticks, and indented lines.
fn pieces(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in page.lines() {
        if let Some(command) = line.strip_prefix("    ") {
            found.push(command.to_owned());
        }
        found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    found
}

/// The words of a command of ours: without what is told beside it, and without the shell's own.
fn command_words(piece: &str) -> Option<Vec<String>> {
    let piece = piece.rsplit_once("| ").map_or(piece, |(_, after)| after);
    let piece = [" #", " > ", "  "].iter().fold(piece, |piece, end| piece.split(end).next().unwrap());
    let words: Vec<String> = piece.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect();
    (words.first()? == "wallaby" && words.len() > 1).then_some(words)
}

/// A text may name a verb without what it needs, as in "`wallaby verify` compares".
fn can_be_typed(words: &[String]) -> Result<(), String> {
    use ErrorKind as E;
    match Cli::try_parse_from(words) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), E::MissingRequiredArgument | E::MissingSubcommand) => Ok(()),
        Err(error) if matches!(error.kind(), E::DisplayHelp | E::DisplayHelpOnMissingArgumentOrSubcommand) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn every_command_of_the_pages_can_be_typed() {
    let mut count = 0;
    for path in pages() {
        for words in pieces(&std::fs::read_to_string(&path).unwrap()).iter().filter_map(|piece| command_words(piece)) {
            count += 1;
            can_be_typed(&words).unwrap_or_else(|error| panic!("{}: {}: {error}", path.display(), words.join(" ")));
        }
    }
    assert!(count > 20, "only {count} commands were found: the pages are read wrongly");
}

#[test]
fn every_example_of_the_help_can_be_typed() {
    fn examples(command: &mut clap::Command, found: &mut Vec<Vec<String>>) {
        let help = command.render_long_help().to_string();
        found.extend(help.lines().filter_map(|line| command_words(line.strip_prefix("  ")?)));
        command.get_subcommands_mut().for_each(|inner| examples(inner, found));
    }
    let mut found = Vec::new();
    examples(&mut Cli::command(), &mut found);
    for words in &found {
        // Nothing may be missing here.
        if let Err(error) = Cli::try_parse_from(words) {
            panic!("{}: {error}", words.join(" "));
        }
    }
    assert!(found.len() > 25, "only {} examples were found", found.len());
}

#[test]
fn every_make_target_of_the_pages_is_there() {
    let makefile = std::fs::read_to_string(Path::new(ROOT).join("Makefile")).unwrap();
    let mut count = 0;
    for path in pages() {
        for piece in pieces(&std::fs::read_to_string(&path).unwrap()) {
            let Some((_, target)) =
                piece.split_once("make ").filter(|(before, _)| !before.contains(' ') || before.ends_with("=1 "))
            else {
                continue;
            };
            let target = target.split_whitespace().next().unwrap_or_default();
            count += 1;
            let is_there = makefile.lines().any(|line| line.starts_with(&format!("{target}: ")));
            assert!(is_there, "{}: `{piece}`: the Makefile has no {target}", path.display());
        }
    }
    assert!(count > 3, "only {count} targets were found");
}
