//! What the pages tell people to type is taken by our programs. (Whole commands of `wallaby` are typed by the command's own tests.)

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use wallaby_tests::programs::program;

/// Whose `--help` is asked: that of each of its verbs too.
const PROGRAMS: [&str; 3] = ["wallaby-controller", "wallaby-worker", "wallaby"];

/// Flags that need no page: everybody knows them.
const KNOWN_BY_ALL: [&str; 2] = ["help", "version"];

/// Pages about these programs; docs/loadtest.md is about others.
const PAGES: [&str; 10] = [
    "README.md",
    "docs/concepts.md",
    "docs/conditions.md",
    "docs/errors.md",
    "docs/flow-file.md",
    "docs/getting-started.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/sinks/postgres.md",
    "docs/verify.md",
];

fn page_text(page: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page)).unwrap()
}

/// What `--help` says, for the program and each of its verbs.
fn helps(name: &str) -> Vec<String> {
    let (mut found, mut asked) = (Vec::new(), vec![Vec::<String>::new()]);
    while let Some(verbs) = asked.pop() {
        let output = Command::new(program(name)).args(&verbs).arg("--help").output().unwrap();
        assert!(output.status.success(), "{name} {verbs:?} --help: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let commands = text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let verb = |line: &str| line.strip_prefix("  ")?.split_whitespace().next().map(str::to_owned);
        let inner = commands.filter(|line| !line.starts_with("   ")).filter_map(verb).filter(|verb| verb != "help");
        asked.extend(inner.map(|verb| [verbs.clone(), vec![verb]].concat()));
        found.push(text);
    }
    found
}

/// The flags in a text: `--` and what may stand in a name.
fn flags(text: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("--") {
        let is_begin = at == 0 || text[..at].ends_with([' ', '`', '\n', '(', '[']);
        let name = &text[at + 2..];
        let end = name.find(|c: char| !(c.is_ascii_lowercase() || c == '-')).unwrap_or(name.len());
        if is_begin && end > 1 && !name.starts_with('-') {
            found.insert(&name[..end]);
        }
    }
    found
}

#[test]
fn every_flag_of_the_pages_is_in_a_help() {
    let known: String = PROGRAMS.iter().flat_map(|name| helps(name)).collect();
    let known = flags(&known);
    let mut count = 0;
    for page in PAGES {
        for line in page_text(page).lines() {
            for span in line.split('`').skip(1).step_by(2) {
                for flag in flags(span) {
                    count += 1;
                    assert!(known.contains(flag), "{page} says `{span}`: no program takes --{flag}");
                }
            }
        }
    }
    assert!(count > 20, "only {count} flags were found: the pages are read wrongly");
}

#[test]
fn every_flag_of_a_help_is_on_a_page() {
    let text: String = PAGES.iter().map(|page| page_text(page) + "\n").collect();
    let pages = flags(&text);
    // `-f` is as good as `--file`.
    let is_there = |short: &str| [" ", "`", "\n"].iter().any(|after| text.contains(&format!(" {short}{after}")));
    let (mut missing, mut asked, mut count) = (BTreeSet::new(), 0, 0);
    for (name, help) in PROGRAMS.iter().flat_map(|name| helps(name).into_iter().map(move |help| (name, help))) {
        asked += 1;
        // A flag stands at the beginning of its line, behind its short form where it has one; what follows is its story.
        let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
        for line in lines.filter_map(|line| line.split("  ").next()) {
            let short = line.split_once(", ").map(|(short, _)| short);
            let Some(flag) = flags(line).pop_first() else { continue };
            count += 1;
            if !pages.contains(flag) && !short.is_some_and(is_there) && !KNOWN_BY_ALL.contains(&flag) {
                missing.insert(format!("--{flag} of {name}"));
            }
        }
    }
    assert!(asked > 20 && count > 100, "{asked} helps with {count} flags: they are read wrongly");
    assert!(missing.is_empty(), "on no page: {missing:#?}");
}
