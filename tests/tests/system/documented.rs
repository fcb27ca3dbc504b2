//! What the pages tell people to type is taken by our programs. (Whole commands of `wallaby` are typed by the command's own tests.)

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use wallaby_tests::programs::program;

/// Whose `--help` is asked, and for which verb.
const HELPS: [(&str, &[&str]); 7] = [
    ("wallaby-controller", &[]),
    ("wallaby-worker", &[]),
    ("wallaby", &["apply"]),
    ("wallaby", &["doctor"]),
    ("wallaby", &["drain"]),
    ("wallaby", &["snapshot", "start"]),
    ("wallaby", &["verify"]),
];

/// Pages about these programs; docs/loadtest.md is about others.
const PAGES: [&str; 8] = [
    "README.md",
    "docs/concepts.md",
    "docs/conditions.md",
    "docs/errors.md",
    "docs/flow-file.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/verify.md",
];

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
    let mut known = String::new();
    for (name, verb) in HELPS {
        let output = Command::new(program(name)).args(verb).arg("--help").output().unwrap();
        assert!(output.status.success(), "{name} {verb:?} --help: {output:?}");
        known.push_str(&String::from_utf8(output.stdout).unwrap());
    }
    let known = flags(&known);
    let mut count = 0;
    for page in PAGES {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page)).unwrap();
        for line in text.lines() {
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
