//! The table of reasons, the page, and the code that gives reasons hold together.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::*;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Whose code makes conditions. Others only read them.
const MAKERS: [&str; 4] = ["controller", "pool-worker", "connectors", "shared"];

/// Functions that give the word of an error.
const WORDS_OF_ERRORS: [&str; 3] = ["fn reason(", "fn staging_reason(", "fn server_reason("];

/// The Rust files below `folder` that go into programs.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "tests" {
            sources(&path, found);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && !name.starts_with("reasons") {
            found.push(path);
        }
    }
}

/// The code before the file's tests, without comments.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap();
    let lines = text.lines().map(|line| if line.trim_start().starts_with("//") { "" } else { line });
    lines.collect::<Vec<_>>().join("\n")
}

/// The text from `open`, which begins with a bracket, to the bracket that closes it.
fn balanced(open: &str) -> &str {
    let (mut depth, mut in_text, mut is_escaped) = (0_usize, false, false);
    for (at, c) in open.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if in_text => is_escaped = true,
            '"' => in_text = !in_text,
            '(' | '{' if !in_text => depth += 1,
            ')' | '}' if !in_text => {
                depth -= 1;
                if depth == 0 {
                    return &open[..=at];
                }
            }
            _ => {}
        }
    }
    panic!("a bracket is not closed: {}", &open[..open.len().min(200)]);
}

/// The string literals of some code, as they are written.
fn literals(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(open) = rest.find('"') {
        let (before, text) = (&rest[..open], &rest[open + 1..]);
        // A quote as a character begins no text.
        if before.ends_with('\'') && text.starts_with('\'') {
            rest = text;
            continue;
        }
        let is_raw = before.ends_with("r#");
        let close = |at: &usize| match is_raw {
            true => text[*at..].starts_with("\"#"),
            false => text[..*at].bytes().rev().take_while(|b| *b == b'\\').count().is_multiple_of(2),
        };
        let end = text.match_indices('"').map(|(at, _)| at).find(close).unwrap_or(text.len());
        found.push(&text[..end]);
        rest = text.get(end + 1..).unwrap_or_default();
    }
    found
}

/// The literals that are one word in CamelCase, but for the conditions' names.
fn words(code: &str) -> BTreeSet<String> {
    let is_word = |text: &&str| {
        let mut letters = text.chars();
        letters.next().is_some_and(|first| first.is_ascii_uppercase())
            && text.len() > 1
            && letters.all(|c| c.is_ascii_alphabetic())
            && text.chars().any(|c| c.is_ascii_lowercase())
            && TYPES.iter().all(|(kind, ..)| format!("{kind:?}") != **text)
    };
    literals(code).into_iter().filter(is_word).map(str::to_owned).collect()
}

/// The reasons that the code gives, each with a file that does.
fn given() -> BTreeMap<String, String> {
    let mut files = Vec::new();
    for folder in MAKERS {
        sources(&Path::new(ROOT).join(folder), &mut files);
    }
    let mut given = BTreeMap::new();
    for path in files {
        let text = code(&std::fs::read_to_string(&path).unwrap());
        let mut found = BTreeSet::new();
        if text.contains("Condition::new(") {
            found.extend(words(&text));
        } else {
            for (at, call) in text.match_indices(".condition(") {
                let arguments = balanced(&text[at + call.len() - 1..]);
                let of_call = words(arguments);
                let has_reason = !of_call.is_empty() || arguments.contains("reason") || !arguments.contains(',');
                assert!(has_reason, "{}: no reason is seen in {arguments}", path.display());
                found.extend(of_call);
            }
        }
        for name in WORDS_OF_ERRORS {
            for (at, _) in text.match_indices(name) {
                let (head, _) = text[at..].split_once('{').unwrap();
                if head.contains("-> &'static str") {
                    found.extend(words(balanced(&text[at + head.len()..])));
                }
            }
        }
        given.extend(found.into_iter().map(|word| (word, path.display().to_string())));
    }
    given
}

#[test]
fn the_reasons_of_the_code_are_those_of_the_table() {
    let given = given();
    let table: BTreeSet<&str> = GROUPS.iter().flat_map(|(_, reasons)| *reasons).map(|reason| reason.word).collect();
    let unknown: Vec<_> = given.iter().filter(|(word, _)| !table.contains(word.as_str())).collect();
    assert!(unknown.is_empty(), "reasons that shared/model/src/reasons.rs does not explain: {unknown:#?}");
    let unused: Vec<_> = table.iter().filter(|word| !given.contains_key(**word)).collect();
    assert!(unused.is_empty(), "reasons that no code gives: {unused:?}");
}

#[test]
fn words_are_found_among_other_texts() {
    let code =
        r##"a.condition(Kind, "Two\"Words", '"', "Found", r#"say "Raw" "#, "CaughtUp", "lower", "UPPER", "Last")"##;
    assert_eq!(words(code).into_iter().collect::<Vec<_>>(), ["Found", "Last"]);
}

#[test]
fn a_reason_means_one_thing_at_one_condition() {
    let mut seen = BTreeSet::new();
    for reason in GROUPS.iter().flat_map(|(_, reasons)| *reasons) {
        for kind in reason.at {
            assert!(seen.insert((reason.word, kind)), "{} stands twice at {kind:?}", reason.word);
        }
        assert!(!reason.at.is_empty() && reason.meaning.ends_with('.') && !reason.remedy.is_empty(), "{reason:?}");
    }
}

#[test]
fn the_committed_page_of_reasons_is_the_generated_one() {
    let path = Path::new(ROOT).join("docs/conditions.md");
    if std::env::var_os("WALLABY_REGENERATE").is_some() {
        std::fs::write(&path, conditions_page()).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let how = "docs/conditions.md is stale: run `WALLABY_REGENERATE=1 cargo test -p wallaby-model reasons`";
    assert!(committed == conditions_page(), "{how}");
}
