//! Prints `docs/flow-file.md` from the table of fields. A test compares the committed page with this.

use super::ByteSize;
use super::change::RULES;
use super::check::{
    LOG_MAX, LOG_MIN, LOG_RESERVE, MAX_LABEL_KEY, MAX_LABEL_VALUE, MAX_LABELS, MAX_POSTGRES_NAME, MAX_SINKS,
    MAX_TABLES, SIDE_MIN, SNAPSHOT_MIN,
};
use super::fields::{Choice, DOCUMENT, Field, Object, Shape};
use super::parse::{MAX_DOCUMENTS, MAX_FILE_BYTES};
use super::tree::MAX_DEPTH;

/// The example that the page shows; the demo runs the same file.
pub const EXAMPLE: &str = include_str!("../../../../examples/shop/flow.yaml");

const HEAD: &str = "\
# The flow file

<!-- Generated from shared/model/src/flow/fields.rs. Change it there, then run
     `WALLABY_REGENERATE=1 cargo test -p wallaby-model page`. -->

A flow file is YAML or JSON: one flow, or several separated by `---`. `wallaby apply -f flow.yaml` creates or updates
them. A key that is not listed here is an error that names its line and the key that was probably meant. Anchors, aliases
and tags are refused.

Sizes are whole numbers of bytes with `k`, `M`, `G`, `T`, `Ki`, `Mi`, `Gi` or `Ti`, as in `64Mi`. Times are whole numbers
with `ms`, `s`, `m`, `h` or `d`, as in `30m`. Names have 1 to 40 lower-case letters, digits and dashes, start with a
letter and do not end with a dash.

A secret is given by reference and read by the worker that needs it: `{ env: NAME }` or `{ file: /path }`.

## Example

";

const LIMITS_HEAD: &str = "
## Limits

What is beyond them is refused when the file is applied.

| what | limit |
|---|---|
";

const CHANGES_HEAD: &str = "
## What a change does

`wallaby diff -f flow.yaml` shows what applying a file would do to each task of the flow, without doing it. Tasks that are not
named go on as they are. A change is done as a whole or refused as a whole.

| changed | what becomes of it |
|---|---|
";

/// The whole page.
pub fn flow_file_page() -> String {
    let mut page = format!("{HEAD}```yaml\n{}\n```\n\n## Keys\n\n", EXAMPLE.trim_end());
    page.push_str("| key | value | default | meaning |\n|---|---|---|---|\n");
    rows(&DOCUMENT, "", &mut page);
    page.push_str(&limits());
    page.push_str(CHANGES_HEAD);
    for (part, becomes) in RULES {
        page.push_str(&format!("| {part} | {becomes} |\n"));
    }
    page
}

/// What is refused for its size, from the numbers that refuse it.
fn limits() -> String {
    let bytes = |bytes: usize| ByteSize(bytes as u64);
    let rows = [
        (
            "a file",
            format!("{} of text, {MAX_DOCUMENTS} flows, {MAX_DEPTH} levels of nesting", bytes(MAX_FILE_BYTES)),
        ),
        ("`metadata.name`, `spec.sinks[].name`", "1 to 40 characters, as above".to_owned()),
        (
            "`metadata.labels`",
            format!("{MAX_LABELS} labels; a key has 1 to {MAX_LABEL_KEY} bytes, a value at most {MAX_LABEL_VALUE}"),
        ),
        ("`spec.sinks`", format!("1 to {MAX_SINKS}")),
        (
            "names of publications, schemas and tables",
            format!("1 to {MAX_POSTGRES_NAME} bytes; a slot's has only lower-case letters, digits and underscores"),
        ),
        (
            "`publication.tables`, `.exclude`",
            format!("{MAX_TABLES} entries each, and none is listed twice"),
        ),
        ("`log.maxBytes`", format!("at least {LOG_MIN}, at most {LOG_MAX}")),
        ("`largeTransactionBytes`", format!("more than 0, and at most `log.maxBytes` less {LOG_RESERVE}")),
        ("`transactionsMax`, `chunksMax`", format!("at least {SIDE_MIN}, at most {LOG_MAX}")),
        ("`safety.retainedWalMax`", "more than 0".to_owned()),
        ("`safety.snapshotMax`", format!("at least {}s", SNAPSHOT_MIN.as_secs())),
        (
            "a flow as a whole, and one change of it",
            "what one transaction of etcd takes: 1.5 MB and 128 operations, of which a sink that is added takes one and a sink that \
             is removed four; else `FLOW_TOO_LARGE`"
                .to_owned(),
        ),
    ];
    let mut text = LIMITS_HEAD.to_owned();
    for (what, limit) in rows {
        text.push_str(&format!("| {what} | {limit} |\n"));
    }
    text
}

fn rows(object: &'static Object, path: &str, page: &mut String) {
    for field in object.fields {
        let here = if path.is_empty() { field.key.to_owned() } else { format!("{path}.{}", field.key) };
        page.push_str(&row(field, &here));
        let inner = match &field.shape {
            Shape::Object(inner) => Some((*inner, here)),
            Shape::List(Shape::Object(inner)) => Some((*inner, format!("{here}[]"))),
            _ => None,
        };
        if let Some((inner, here)) = inner {
            rows(inner, &here, page);
        }
    }
}

fn row(field: &Field, path: &str) -> String {
    let mut doc = field.doc.to_owned();
    if let Shape::Choice(choices) = &field.shape
        && choices.len() > 1
    {
        doc.push(' ');
        doc.push_str(&choices.iter().map(meaning).collect::<Vec<_>>().join("; "));
        doc.push('.');
    }
    if field.not_yet.is_some() {
        doc = format!("*Not available yet:* {}.", field.doc);
    }
    let default = match (field.required, field.default) {
        (true, _) => "**required**".to_owned(),
        (false, "") => String::new(),
        (false, words) if words.contains(' ') && !words.contains('{') => words.to_owned(),
        (false, "none") => "none".to_owned(),
        (false, value) => format!("`{value}`"),
    };
    let title = if field.not_yet.is_some() || field.ignored { String::new() } else { field.shape.title() };
    format!("| `{path}` | {title} | {default} | {} |\n", doc.replace('|', "\\|"))
}

fn meaning(choice: &Choice) -> String {
    match choice.not_yet {
        Some(why) => format!("`{}`: not available yet, {why}", choice.text),
        None => format!("`{}`: {}", choice.text, choice.doc),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn the_committed_page_is_the_generated_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/flow-file.md");
        let generated = flow_file_page();
        if std::env::var_os("WALLABY_REGENERATE").is_some() {
            std::fs::write(path, &generated).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == generated,
            "docs/flow-file.md is stale: run `WALLABY_REGENERATE=1 cargo test -p wallaby-model page`"
        );
    }

    /// The limits that the page writes as words, because other code than the constants refuses them.
    #[test]
    fn the_limits_in_words_are_those_of_the_code() {
        let with = |edit: &dyn Fn(&mut crate::flow::FlowDocument)| {
            let mut flow = crate::flow::parse(EXAMPLE, "-").unwrap();
            edit(&mut flow);
            flow.problems().len()
        };
        assert_eq!(crate::FlowId::new("a".repeat(40)).map(|id| id.as_str().len()), Ok(40));
        assert!(crate::FlowId::new("a".repeat(41)).is_err());
        assert!(with(&|flow| flow.spec.source.postgres.safety.retained_wal_max = ByteSize(0)) > 0);
        assert!(with(&|flow| flow.spec.source.postgres.large_transaction_bytes = ByteSize(0)) > 0);
        assert!(with(&|flow| flow.spec.sinks.clear()) > 0);
    }

    #[test]
    fn the_example_is_a_flow() {
        let flow = crate::flow::parse(EXAMPLE, "examples/shop/flow.yaml").unwrap();
        assert_eq!(flow.metadata.name.as_str(), "shop");
    }
}
