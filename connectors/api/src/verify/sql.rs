//! The statements. Every one reads `t`, the table, under the snapshot of its session.

use wallaby_model::schema::{quote_identifier, quote_literal};

use super::canonical::RowText;
use super::digest::Hash;
use super::{VerifyRow, VerifyStorage, VerifyTable};

/// How much of the heap one statement sums up, in pages of 8 KiB: 64 MiB.
const PAGES_PER_PIECE: u64 = 8192;
/// The cursor of the row-by-row reading.
const CURSOR: &str = "wallaby_rows";
/// A value of a key that is longer is not read.
const KEY_BYTES_MAX: usize = 4096;
/// Rows that are fetched at once.
const ROWS_PER_FETCH: usize = 2000;

/// A table at one side, ready to be asked.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    /// `FROM … t`, quoted.
    from: String,
    /// The row filter.
    filter: Option<String>,
    storage: VerifyStorage,
    /// How rows become text.
    pub text: RowText,
}

impl Reading {
    pub fn new(table: &VerifyTable, text: RowText) -> Reading {
        let only = matches!(table.storage, VerifyStorage::Pages { only: true, .. });
        let only = if only { "ONLY " } else { "" };
        let from = format!("{only}{} t", table.table.quoted());
        Reading { from, filter: table.filter.clone(), storage: table.storage, text }
    }

    /// The conditions of the pieces in which the table is read: together they take each row once.
    pub fn pieces(&self) -> Vec<String> {
        let VerifyStorage::Pages { pages, relations, .. } = self.storage else { return vec![String::new()] };
        let step = (PAGES_PER_PIECE / u64::from(relations.max(1))).max(64);
        let count = pages.div_ceil(step).max(1);
        let piece = |n: u64| {
            let from = format!("t.ctid >= '({},0)'::tid", n * step);
            // The last one is open: the table may be longer than its size says.
            if n + 1 == count { from } else { format!("{from} AND t.ctid < '({},0)'::tid", (n + 1) * step) }
        };
        (0..count).map(piece).collect()
    }

    fn condition(&self, more: &str) -> String {
        let filter = self.filter.as_ref().map(|filter| format!("({filter})"));
        let parts: Vec<String> = filter.into_iter().chain((!more.is_empty()).then(|| more.to_owned())).collect();
        if parts.is_empty() { String::new() } else { format!(" WHERE {}", parts.join(" AND ")) }
    }

    /// One row per range that is not empty: range, rows, and two sums over the halves of 16 bytes of the row hashes.
    pub fn sums(&self, piece: &str, bits: u32) -> String {
        let half = |from: u32| format!("('x' || encode(substr(h, {from}, 8), 'hex'))::bit(64)::bigint");
        // A table without a key hashes once; OFFSET 0 keeps each hash from being worked out again for each use.
        let hashes = if self.text.has_key() {
            format!("{} AS k, {} AS h", self.text.key_hash(), self.text.row_hash())
        } else {
            format!("{} AS h", self.text.row_hash())
        };
        let key = if self.text.has_key() { "k" } else { "h" };
        format!(
            "SELECT {range}, count(*), sum({a}), sum({b}) FROM (SELECT {hashes} FROM {from}{condition} OFFSET 0) r GROUP BY 1",
            range = range(key, bits),
            a = half(1),
            b = half(9),
            from = self.from,
            condition = self.condition(piece),
        )
    }

    /// Opens the reading of the rows of some ranges, by key hash and row hash. Columns: key hash, row hash, place, then the
    /// key's texts.
    pub fn open_rows(&self, ranges: &[u32], bits: u32) -> String {
        let list = ranges.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        format!(
            "DECLARE {CURSOR} NO SCROLL CURSOR FOR SELECT {} FROM ({}) r WHERE {} = ANY ('{{{list}}}'::int[]) ORDER BY k, h",
            self.shown_columns(),
            self.hashed_rows(""),
            range("k", bits),
        )
    }

    /// The next rows; none at the end.
    pub fn fetch_rows() -> String {
        format!("FETCH {ROWS_PER_FETCH} FROM {CURSOR}")
    }

    /// Ends the reading.
    pub fn close_rows() -> String {
        format!("CLOSE {CURSOR}")
    }

    /// The rows with these keys, as [`Self::open_rows`] shows them. For a table with a key.
    pub fn rows_by_key(&self, keys: &[&VerifyRow]) -> String {
        let rows = self.hashed_rows(&self.key_condition(keys));
        format!("SELECT {} FROM ({rows}) r ORDER BY k, h", self.shown_columns())
    }

    /// The rows with these key hashes, as [`Self::open_rows`] shows them. Reads the whole table.
    pub fn rows_by_hash(&self, hashes: &[Hash]) -> String {
        let list: Vec<String> = hashes.iter().map(Hash::to_string).collect();
        format!(
            "SELECT {} FROM ({}) r WHERE encode(k, 'hex') = ANY ('{{{}}}'::text[]) ORDER BY k, h",
            self.shown_columns(),
            self.hashed_rows(""),
            list.join(","),
        )
    }

    /// The hash of each column's text behind the key's hash, for rows with these keys.
    pub fn columns_by_key(&self, keys: &[&VerifyRow]) -> String {
        let each = |text: &String| format!("encode(sha256(convert_to({text}, 'UTF8')), 'hex')");
        let columns: Vec<String> = self.text.texts.iter().map(each).collect();
        let condition = self.condition(&self.key_condition(keys));
        let key = self.text.key_hash();
        format!("SELECT encode({key}, 'hex'), {} FROM {}{condition}", columns.join(", "), self.from)
    }

    /// Literals take the columns' types, so the key's index is used. Keys that are not whole find nothing.
    fn key_condition(&self, keys: &[&VerifyRow]) -> String {
        let name = |&index: &usize| format!("t.{}", quote_identifier(&self.text.names[index]));
        let columns: Vec<String> = self.text.key.iter().map(name).collect();
        let literals = |key: &&VerifyRow| -> Option<Vec<String>> {
            key.iter().map(|value| value.as_deref().map(quote_literal)).collect()
        };
        let whole: Vec<Vec<String>> = keys.iter().filter_map(literals).collect();
        if whole.is_empty() || columns.is_empty() {
            return "false".to_owned();
        }
        if let [column] = columns.as_slice() {
            return format!("{column} IN ({})", whole.concat().join(", "));
        }
        let one = |key: &Vec<String>| {
            let parts: Vec<String> = columns.iter().zip(key).map(|(c, v)| format!("{c} = {v}")).collect();
            format!("({})", parts.join(" AND "))
        };
        format!("({})", whole.iter().map(one).collect::<Vec<_>>().join(" OR "))
    }

    fn shown_columns(&self) -> String {
        let keys = (0..self.text.key.len()).map(|n| format!(", k{n}")).collect::<String>();
        format!("encode(k, 'hex'), encode(h, 'hex'), place{keys}")
    }

    fn hashed_rows(&self, more: &str) -> String {
        let texts = self.text.key_texts();
        // A key that is too long to carry about is found again by its hash.
        let short = |text: &str| format!("CASE WHEN octet_length({text}) <= {KEY_BYTES_MAX} THEN {text} END");
        let keys = texts.iter().enumerate().map(|(n, text)| format!(", {} AS k{n}", short(text))).collect::<String>();
        let place = match self.storage {
            VerifyStorage::Pages { .. } => "t.ctid::text",
            VerifyStorage::Whole => "NULL::text",
        };
        format!(
            "SELECT {} AS k, {} AS h, {place} AS place{keys} FROM {}{} OFFSET 0",
            self.text.key_hash(),
            self.text.row_hash(),
            self.from,
            self.condition(more),
        )
    }
}

/// The range of a key's hash: its first bits.
fn range(hash: &str, bits: u32) -> String {
    format!("((get_byte({hash}, 0) << 8) | get_byte({hash}, 1)) >> {}", 16 - bits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use proptest::prelude::*;
    use wallaby_model::TableName;

    use super::super::VerifyColumn;
    use super::*;

    fn reading(storage: VerifyStorage, key: &[&str]) -> Reading {
        let columns = [("a\"x", 23), ("b", 25)];
        let columns: Vec<VerifyColumn> =
            columns.iter().map(|(name, oid)| VerifyColumn { name: (*name).to_owned(), type_oid: *oid }).collect();
        let key: Vec<String> = key.iter().map(|name| (*name).to_owned()).collect();
        let refs: Vec<&VerifyColumn> = columns.iter().collect();
        let text = RowText::new(&refs, &refs, &key);
        let table = VerifyTable {
            table: TableName::new("s", "t\"1"),
            columns: columns.clone(),
            key,
            filter: Some("b <> 'x'".to_owned()),
            rows_estimated: 0,
            storage,
        };
        Reading::new(&table, text)
    }

    fn pages(pages: u64, relations: u32) -> VerifyStorage {
        VerifyStorage::Pages { pages, relations, only: true }
    }

    proptest! {
        /// Pieces begin at page 0, touch, and the last has no end: no row is left out, none is taken twice.
        #[test]
        fn pieces_take_each_page_once(count in 0_u64..1_000_000, relations in 1_u32..2000) {
            let pieces = reading(pages(count, relations), &[]).pieces();
            let bound = |text: &str, mark: &str| -> Option<u64> {
                let rest = text.split_once(mark)?.1;
                rest.split_once(',')?.0.parse().ok()
            };
            let mut next = Some(0);
            for piece in &pieces {
                prop_assert_eq!(bound(piece, ">= '("), next);
                next = bound(piece, "< '(");
            }
            prop_assert_eq!(next, None);
        }

        /// Whatever a key holds stays inside its literal.
        #[test]
        fn keys_stay_in_their_literals(value in any::<String>()) {
            let key: VerifyRow = vec![Some(value)];
            let sql = reading(pages(1, 1), &["b"]).key_condition(&[&key]);
            let body = sql.strip_prefix("t.\"b\" IN (").unwrap().strip_suffix(')').unwrap();
            let inner = body.strip_prefix('E').unwrap_or(body);
            let inner = inner.strip_prefix('\'').unwrap().strip_suffix('\'').unwrap();
            let unescaped = inner.replace("''", "");
            prop_assert!(!unescaped.contains('\''), "{}", sql);
        }
    }

    #[test]
    fn the_filter_stands_in_every_statement() {
        let reading = reading(pages(1, 1), &["b"]);
        let key: VerifyRow = vec![Some("k".to_owned())];
        for sql in [
            reading.sums(&reading.pieces()[0], 8),
            reading.open_rows(&[1, 2], 8),
            reading.rows_by_key(&[&key]),
            reading.rows_by_hash(&[Hash([7; 32])]),
            reading.columns_by_key(&[&key]),
        ] {
            assert!(sql.contains("FROM ONLY \"s\".\"t\"\"1\" t WHERE (b <> 'x')"), "{sql}");
        }
    }

    #[test]
    fn keys_that_are_not_whole_find_nothing() {
        let reading = reading(pages(1, 1), &["a\"x", "b"]);
        let (whole, half): (VerifyRow, VerifyRow) =
            (vec![Some("1".to_owned()), Some("k".to_owned())], vec![None, Some("k".to_owned())]);
        assert_eq!(reading.key_condition(&[&half, &whole]), "((t.\"a\"\"x\" = '1' AND t.\"b\" = 'k'))");
        assert_eq!(reading.key_condition(&[&half]), "false");
    }
}
