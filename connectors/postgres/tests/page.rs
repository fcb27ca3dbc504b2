//! The docs page is what the code declares.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use wallaby_connector_api::guarantees_page;
use wallaby_postgres::capabilities;

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
