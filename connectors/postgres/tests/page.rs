//! The docs page is what the code declares.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use wallaby_connector_api::guarantees_page;
use wallaby_model::flow::{PostgresSinkSpec, SecretRef, SinkMode};
use wallaby_postgres::{PostgresSinkConfig, capabilities};

#[test]
fn the_committed_page_is_the_declaration() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/sinks/postgres.md");
    let page = guarantees_page(&capabilities());
    if std::env::var_os("WALLABY_BLESS").is_some() {
        std::fs::create_dir_all(std::path::Path::new(path).parent().unwrap()).unwrap();
        std::fs::write(path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == page, "docs/sinks/postgres.md is not up to date: run this test with WALLABY_BLESS=1");
}

/// docs/operations.md, which lists a source's parameters, says which of them a sink does not take, and what it takes beside them.
#[test]
fn the_page_says_what_a_sink_takes() {
    let page = include_str!("../../../docs/operations.md");
    let (_, section) = page.split_once("### Connection strings\n").unwrap();
    let (table, sink) = section.split_once("\nA Postgres sink takes all of these but ").unwrap();
    let (sink, _) = sink.split_once("\n\n").unwrap();
    let (but, more) = sink.split_once(';').unwrap();
    let names = |text: &'static str| text.split('`').skip(1).step_by(2).filter(|name| !name.contains([' ', '(']));
    let refused: Vec<&str> = names(but).collect();
    let rows = table.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('|').nth(1));
    let taken = rows.flat_map(names).filter(|name| !refused.contains(name)).chain(names(more));
    let dsn = SecretRef::Value(String::new());
    let spec = PostgresSinkSpec { dsn, schema: "x".to_owned(), mode: SinkMode::Upsert };
    let is_unknown = |name: &str| {
        let dsn = format!("host=h user=u {name}=nonsense");
        let error = PostgresSinkConfig::new(&dsn, &spec).err();
        error.is_some_and(|error| error.to_string().contains("unknown option"))
    };
    let values = ["any", "read-write", "read-only"];
    let taken: Vec<&str> = taken.filter(|name| !values.contains(name)).collect();
    assert!(taken.len() > 15 && taken.iter().all(|name| !is_unknown(name)), "{taken:?}");
    assert!(refused.len() == 3 && refused.iter().all(|name| is_unknown(name)), "{refused:?}");
    for value in values {
        assert!(PostgresSinkConfig::new(&format!("host=h target_session_attrs={value}"), &spec).is_ok());
    }
}
