//! docs/metrics.md and the code hold together, in both directions: a metric that a program describes stands on the page once, with its
//! kind, its unit, its labels and the programs that have it, and nothing else stands there. What is described is written, too, and what is
//! written is described.
//!
//! The sources are read as text: names are literals, or constants of the same crate.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Where code may count something.
const FOLDERS: [&str; 5] = ["cli", "connectors", "controller", "pool-worker", "shared"];

/// The crates that count, each with the beginning of the headings under which the page has its metrics: whose they are.
const CRATES: [(&str, &str); 7] = [
    ("connectors/postgres", "Workers"),
    ("connectors/postgres-source", "Workers"),
    ("controller", "Controllers"),
    ("pool-worker", "Workers"),
    ("shared/coordination", "Workers and controllers"),
    ("shared/staging", "Workers"),
    ("shared/telemetry", "Workers and controllers"),
];

/// How the names of metrics begin.
const PREFIXES: [&str; 2] = ["wallaby_", "process_"];

/// A metric, as the code or the page has it.
#[derive(Debug, PartialEq, Eq)]
struct Metric {
    /// Whose it is.
    of: String,
    /// Kind and unit, as in `gauge, bytes`.
    kind: String,
    labels: BTreeSet<String>,
}

/// The code of a crate that goes into programs.
#[derive(Default)]
struct Crate {
    code: String,
    /// The names of metrics by the constants that hold them.
    constants: BTreeMap<String, String>,
}

/// A call of a macro that describes or writes a metric.
struct Call<'a> {
    kind: &'static str,
    describes: bool,
    arguments: &'a str,
}

/// The Rust files below `folder` that go into programs.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "tests" {
            sources(&path, found);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
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

/// The constants that name metrics.
fn constants(code: &str) -> impl Iterator<Item = (&str, &str)> {
    code.lines().filter_map(|line| {
        let (_, rest) = line.split_once("const ")?;
        let (name, value) = rest.split_once(": &str = \"")?;
        let value = value.strip_suffix("\";")?;
        PREFIXES.iter().any(|prefix| value.starts_with(prefix)).then_some((name, value))
    })
}

fn crates() -> BTreeMap<String, Crate> {
    let root = Path::new(ROOT);
    let mut files = Vec::new();
    for folder in FOLDERS {
        sources(&root.join(folder), &mut files);
    }
    let mut crates: BTreeMap<String, Crate> = BTreeMap::new();
    for path in files {
        let place = path.strip_prefix(root).unwrap().to_str().unwrap();
        let Some((name, _)) = place.split_once("/src/") else { continue };
        let text = code(&std::fs::read_to_string(&path).unwrap());
        let here = crates.entry(name.to_owned()).or_default();
        for (constant, metric) in constants(&text) {
            let other = here.constants.insert(constant.to_owned(), metric.to_owned());
            assert!(other.is_none(), "{name} has several constants {constant} that name metrics");
        }
        here.code.push_str(&text);
        here.code.push('\n');
    }
    crates
}

/// What stands in the brackets with which `open` begins.
fn inside(open: &str) -> &str {
    let (mut depth, mut in_text, mut is_escaped) = (0_usize, false, false);
    for (at, c) in open.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if in_text => is_escaped = true,
            '"' => in_text = !in_text,
            '(' if !in_text => depth += 1,
            ')' if !in_text => {
                depth -= 1;
                if depth == 0 {
                    return &open[1..at];
                }
            }
            _ => {}
        }
    }
    panic!("a bracket is not closed: {}", open.lines().next().unwrap_or_default());
}

fn calls(code: &str) -> Vec<Call<'_>> {
    let mut found = Vec::new();
    for kind in ["counter", "gauge", "histogram"] {
        let call = format!("{kind}!(");
        for (at, _) in code.match_indices(&call) {
            let describes = code[..at].ends_with("describe_");
            found.push(Call { kind, describes, arguments: inside(&code[at + call.len() - 1..]) });
        }
    }
    found
}

/// The labels of a call: the texts before an arrow.
fn labels(arguments: &str) -> BTreeSet<String> {
    // Cut at its quotes, every second piece is a text.
    let pieces: Vec<&str> = arguments.split('"').collect();
    let texts = pieces.windows(2).skip(1).step_by(2);
    texts.filter(|pair| pair[1].trim_start().starts_with("=>")).map(|pair| pair[0].to_owned()).collect()
}

fn kind_and_unit(name: &str, call: &Call<'_>) -> String {
    let unit = [("Unit::Bytes", ", bytes"), ("Unit::Seconds", ", seconds")];
    let unit = unit.iter().find(|(said, _)| call.arguments.contains(said)).map_or("", |(_, unit)| *unit);
    let is_named = |part: &str| name.contains(part);
    assert_eq!((is_named("_bytes"), is_named("_seconds")), (unit == ", bytes", unit == ", seconds"), "{name}");
    format!("{}{unit}", call.kind)
}

/// The metrics of a crate: kind and unit, and labels.
fn metrics_of(name: &str, here: &Crate) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut described: BTreeMap<&str, String> = BTreeMap::new();
    let mut written: BTreeMap<&str, (&str, BTreeSet<String>)> = BTreeMap::new();
    let mut by_argument = Vec::new();
    for call in calls(&here.code) {
        let first = call.arguments.split(',').next().unwrap_or_default().trim();
        let metric = match first.strip_prefix('"') {
            Some(literal) => Some(literal.trim_end_matches('"')),
            None => here.constants.get(first).map(String::as_str),
        };
        match (metric, call.describes) {
            (Some(metric), true) => {
                let other = described.insert(metric, kind_and_unit(metric, &call));
                assert!(other.is_none(), "{name} describes {metric} twice");
            }
            (Some(metric), false) => {
                let known = written.entry(metric).or_insert((call.kind, BTreeSet::new()));
                assert_eq!(known.0, call.kind, "{name} writes {metric}");
                known.1.extend(labels(call.arguments));
            }
            (None, true) => panic!("{name} describes {first}, which is no constant with a metric's name"),
            (None, false) => by_argument.push((call.kind, labels(call.arguments))),
        }
    }
    // A function that is given the name writes what it is called with, and has the labels of all that.
    let squeezed: String = here.code.split_whitespace().collect();
    for (kind, labels) in by_argument {
        for (constant, metric) in &here.constants {
            let is_of_kind = described.get(metric.as_str()).is_some_and(|said| said.starts_with(kind));
            let is_given = squeezed.matches(&format!("({constant},")).count() > 1;
            if is_of_kind && is_given {
                written.entry(metric).or_insert((kind, labels.clone()));
            }
        }
    }
    let unwritten: Vec<_> = described.keys().filter(|metric| !written.contains_key(*metric)).collect();
    assert!(unwritten.is_empty(), "{name} describes what it never writes: {unwritten:?}");
    let metrics = written.into_iter().map(|(metric, (kind, labels))| {
        let said =
            described.remove(metric).unwrap_or_else(|| panic!("{name} writes {metric} and does not describe it"));
        assert!(said.starts_with(kind), "{name} writes a {kind} {metric} and describes it as {said}");
        (metric.to_owned(), (said, labels))
    });
    metrics.collect()
}

fn in_code() -> BTreeMap<String, Metric> {
    let mut all = BTreeMap::new();
    for (name, here) in crates() {
        for (metric, (kind, labels)) in metrics_of(&name, &here) {
            let of = CRATES.iter().find(|(known, _)| *known == name).map(|(_, of)| (*of).to_owned());
            let of = of.unwrap_or_else(|| panic!("{name} counts {metric}: say in CRATES whose its metrics are"));
            let other = all.insert(metric.clone(), Metric { of, kind, labels });
            assert!(other.is_none(), "two crates describe {metric}");
        }
    }
    all
}

fn on_page() -> BTreeMap<String, Metric> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("docs/metrics.md")).unwrap();
    let (mut all, mut of) = (BTreeMap::new(), "");
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            of = heading.split(':').next().unwrap_or_default();
        }
        let Some(row) = line.strip_prefix("| `") else { continue };
        let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        let [name, kind, labels, says, remedy] = cells[..] else { panic!("docs/metrics.md: not five cells: {line}") };
        assert!(!says.is_empty() && !remedy.is_empty(), "docs/metrics.md: an empty cell: {line}");
        let name = name.trim_end_matches('`').to_owned();
        let labels = labels.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let other = all.insert(name.clone(), Metric { of: of.to_owned(), kind: kind.to_owned(), labels });
        assert!(other.is_none(), "docs/metrics.md has {name} twice");
    }
    all
}

#[test]
fn the_page_has_every_metric_and_no_other() {
    let (code, page) = (in_code(), on_page());
    assert!(code.len() > 90, "only {} metrics were found: the sources are read wrongly", code.len());
    let missing: BTreeMap<_, _> = code.iter().filter(|(name, _)| !page.contains_key(*name)).collect();
    assert!(missing.is_empty(), "metrics that docs/metrics.md does not have: {missing:#?}");
    let unknown: Vec<_> = page.keys().filter(|name| !code.contains_key(*name)).collect();
    assert!(unknown.is_empty(), "docs/metrics.md has metrics that no code describes: {unknown:?}");
    for (name, metric) in &code {
        assert_eq!(page.get(name), Some(metric), "{name}: docs/metrics.md (left) and the code (right)");
    }
}

#[test]
fn calls_are_found_with_their_names_and_labels() {
    let code =
        r#"describe_counter!(A, "in (brackets"); metrics::counter!(A, "flow" => f("x"), "reason" => r).increment(1)"#;
    let found = calls(code);
    assert_eq!(found.iter().map(|call| call.describes).collect::<Vec<_>>(), [true, false]);
    assert_eq!(labels(found[0].arguments), BTreeSet::new());
    assert_eq!(labels(found[1].arguments), BTreeSet::from(["flow", "reason"].map(str::to_owned)));
}
