//! One text for one value, on every server; and the hash of a row.
//!
//! The sessions of both sides pin what Postgres' text forms depend on ([`SETTINGS`]). Most types then print the same
//! everywhere; the few that need more are here. The comparison is of text: `1.0` and `1.00`, `-0` and `0` are different,
//! because a sink that keeps state keeps them apart.

use wallaby_model::schema::quote_identifier;

use super::VerifyColumn;

const TEXT: u32 = 25;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const BPCHAR: u32 = 1042;
const VARCHAR: u32 = 1043;
const INTERVAL: u32 = 1186;

/// What both sessions are set to before a snapshot is taken. The interval style is that of the WAL stream, whose text is
/// what a sink keeps of a type that it does not know. The server ends a query whose asker is gone.
pub const SETTINGS: &str = "SET TimeZone = 'UTC'; SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'iso_8601'; \
     SET extra_float_digits = 3; SET bytea_output = 'hex'; SET xmloption = 'content'; SET lc_monetary = 'C'; \
     SET client_encoding = 'UTF8'; SET standard_conforming_strings = on; SET search_path = pg_catalog; \
     SET statement_timeout = 0; SET lock_timeout = '10s'; SET jit = off; SET row_security = off; \
     SET idle_in_transaction_session_timeout = '10min'";

/// The text of a column of `t` as SQL, for a pair of types that meet at the two sides.
fn text(name: &str, own: u32, other: u32) -> String {
    let column = format!("t.{}", quote_identifier(name));
    match (own, other) {
        // A cast to text would cut the padding, which a text column at the other side has.
        (BPCHAR, _) => format!("textin(bpcharout({column}))"),
        // What is a float8 at one side has digits that the other's float4 does not print.
        (FLOAT4, FLOAT8) => format!("{column}::float8::text"),
        // An interval that was cast to text has the style of the session that did so.
        (TEXT | VARCHAR, INTERVAL) => format!("{column}::interval::text"),
        _ => format!("{column}::text"),
    }
}

/// How rows of one table are turned into text at one side: the columns that both sides have, in one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RowText {
    /// The names, unquoted.
    pub names: Vec<String>,
    /// The text of each, as SQL over `t`.
    pub texts: Vec<String>,
    /// Indexes of the key's columns; empty when rows are told apart by all they hold.
    pub key: Vec<usize>,
}

impl RowText {
    /// The text of a side with `own` columns, whose values meet those of `other`. Both in the same order and by the same names.
    pub fn new(own: &[&VerifyColumn], other: &[&VerifyColumn], key: &[String]) -> RowText {
        let names: Vec<String> = own.iter().map(|column| column.name.clone()).collect();
        let texts = own.iter().zip(other).map(|(own, other)| text(&own.name, own.type_oid, other.type_oid)).collect();
        let key = key.iter().filter_map(|name| names.iter().position(|known| known == name)).collect();
        RowText { names, texts, key }
    }

    /// Whether rows are told apart by a key.
    pub fn has_key(&self) -> bool {
        !self.key.is_empty()
    }

    /// SHA-256 of all columns, as SQL over `t`.
    pub fn row_hash(&self) -> String {
        hash(self.texts.iter())
    }

    /// SHA-256 of the key, as SQL over `t`.
    pub fn key_hash(&self) -> String {
        if self.has_key() { hash(self.key.iter().map(|&index| &self.texts[index])) } else { self.row_hash() }
    }

    /// The texts of the key's columns, in key order.
    pub fn key_texts(&self) -> Vec<&str> {
        self.key.iter().map(|&index| self.texts[index].as_str()).collect()
    }
}

/// A row's text tells NULL from an empty string and where a value ends; in UTF-8 it is the same in every database. SHA-256
/// and not MD5, which a server under FIPS rules does not have.
fn hash<'a>(texts: impl Iterator<Item = &'a String>) -> String {
    let texts: Vec<&str> = texts.map(String::as_str).collect();
    format!("sha256(convert_to(ROW({})::text, 'UTF8'))", texts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, type_oid: u32) -> VerifyColumn {
        VerifyColumn { name: name.to_owned(), type_oid }
    }

    #[test]
    fn types_that_print_differently_meet_in_one_text() {
        assert_eq!(text("a\"b", 23, 20), "t.\"a\"\"b\"::text");
        assert_eq!(text("c", BPCHAR, TEXT), "textin(bpcharout(t.\"c\"))");
        assert_eq!(text("c", TEXT, BPCHAR), "t.\"c\"::text");
        assert_eq!(text("c", FLOAT4, FLOAT8), "t.\"c\"::float8::text");
        assert_eq!(text("c", FLOAT8, FLOAT4), "t.\"c\"::text");
        assert_eq!(text("c", TEXT, INTERVAL), "t.\"c\"::interval::text");
    }

    #[test]
    fn a_table_without_a_key_is_told_apart_by_all_columns() {
        let columns = [column("a", 23), column("b", 25)];
        let columns: Vec<&VerifyColumn> = columns.iter().collect();
        let keyed = RowText::new(&columns, &columns, &["b".to_owned()]);
        assert_eq!(keyed.key_hash(), "sha256(convert_to(ROW(t.\"b\"::text)::text, 'UTF8'))");
        let bag = RowText::new(&columns, &columns, &[]);
        assert!(!bag.has_key());
        assert_eq!(bag.key_hash(), bag.row_hash());
    }
}
