//! What a PostgreSQL server's catalog says of a table, for both sides: one statement, all of it text.

use wallaby_model::TableName;
use wallaby_model::schema::quote_literal;

use super::digest::unreadable;
use super::{VerifyColumn, VerifyError, VerifyRow, VerifyStorage, VerifyTable};

/// Versions that find a range of row addresses without reading all of them.
const RANGES_SINCE: u32 = 140_000;

/// Columns by number, each with what is said of the table. Partitions are read through their root, by row address in all of
/// them at once: the right to read the root need not be one to read them.
const TABLE: &str = "\
SELECT a.attname::text,
  (WITH RECURSIVE b AS (
     SELECT t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = a.atttypid
     UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM b JOIN pg_type t ON b.typtype = 'd' AND t.oid = b.typbasetype)
   SELECT b.oid FROM b WHERE b.typtype <> 'd' LIMIT 1)::text,
  array_position((pk.indkey::int2[])[0:pk.indnkeyatts - 1], a.attnum)::text,
  array_position((ri.indkey::int2[])[0:ri.indnkeyatts - 1], a.attnum)::text,
  coalesce(to_jsonb(p)->'attnames' ? a.attname::text, $published)::text,
  to_jsonb(p)->>'rowfilter', c.relkind::text, s.relations::text, s.pages::text, s.rows::text, s.is_whole::text
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
  SELECT count(*) AS relations,
    coalesce(max(pg_relation_size(l.oid)), 0) / current_setting('block_size')::bigint AS pages,
    coalesce(sum(CASE WHEN l.reltuples > 0 THEN l.reltuples ELSE coalesce(pg_relation_size(l.oid), 0) / 200 END), 0)::bigint AS rows,
    coalesce(bool_or(l.relkind NOT IN ('r', 'm')), false) OR current_setting('server_version_num')::int < $since AS is_whole
  FROM (SELECT relid::oid AS oid FROM pg_partition_tree(c.oid) WHERE isleaf AND c.relkind = 'p'
        UNION ALL SELECT c.oid WHERE c.relkind <> 'p') x
  JOIN pg_class l ON l.oid = x.oid) s
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_index pk ON pk.indrelid = c.oid AND pk.indisprimary
LEFT JOIN pg_index ri ON ri.indrelid = c.oid AND ri.indisreplident
LEFT JOIN pg_publication_tables p ON p.pubname = $publication AND p.schemaname = n.nspname AND p.tablename = c.relname
WHERE n.nspname = $schema AND c.relname = $table AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
ORDER BY a.attnum";

/// The statement that reads a table. With a publication: only what that sends, its row filter, and a key.
pub fn table_sql(table: &TableName, publication: Option<&str>) -> String {
    // Of a table that is not published column by column all but generated columns are sent.
    let published = if publication.is_some() { "a.attgenerated = ''" } else { "a.attname IS NOT NULL" };
    TABLE
        .replace("$published", published)
        .replace("$since", &RANGES_SINCE.to_string())
        .replace("$publication", &publication.map_or_else(|| "NULL".to_owned(), quote_literal))
        .replace("$schema", &quote_literal(&table.schema))
        .replace("$table", &quote_literal(&table.name))
}

/// Reads the answer to [`table_sql`]; `None` when there is no such table.
///
/// # Errors
/// When it is not an answer to it.
pub fn read_table(
    table: &TableName,
    publication: Option<&str>,
    rows: &[VerifyRow],
) -> Result<Option<VerifyTable>, VerifyError> {
    let Some(first) = rows.first() else { return Ok(None) };
    let bad = || unreadable("a table's description");
    let text = |row: &VerifyRow, index: usize| row.get(index).cloned().flatten();
    let number = |row: &VerifyRow, index: usize| text(row, index)?.parse::<u64>().ok();
    let is_true = |row: &VerifyRow, index: usize| text(row, index).as_deref() == Some("true");
    let (mut columns, mut primary, mut identity) = (Vec::new(), Vec::new(), Vec::new());
    // A key of which a column is not sent tells no rows apart.
    let (mut primary_is_sent, mut identity_is_sent) = (true, true);
    for row in rows {
        let Some(name) = text(row, 0) else { continue };
        let is_sent = is_true(row, 4);
        for (index, key, key_is_sent) in
            [(2, &mut primary, &mut primary_is_sent), (3, &mut identity, &mut identity_is_sent)]
        {
            if let Some(place) = number(row, index) {
                key.push((place, name.clone()));
                *key_is_sent &= is_sent;
            }
        }
        if is_sent {
            let type_oid = text(row, 1).and_then(|oid| oid.parse().ok()).ok_or_else(bad)?;
            columns.push(VerifyColumn { name, type_oid });
        }
    }
    let mut key = if !primary.is_empty() && primary_is_sent {
        primary
    } else if identity_is_sent {
        identity
    } else {
        Vec::new()
    };
    key.sort_unstable();
    let kind = text(first, 6).ok_or_else(bad)?;
    let relations = number(first, 7).and_then(|count| u32::try_from(count).ok()).ok_or_else(bad)?;
    let storage = if is_true(first, 10) {
        VerifyStorage::Whole
    } else {
        let only = publication.is_some() && kind == "r";
        VerifyStorage::Pages { pages: number(first, 8).ok_or_else(bad)?, relations, only }
    };
    Ok(Some(VerifyTable {
        table: table.clone(),
        columns,
        key: if publication.is_some() { key.into_iter().map(|(_, name)| name).collect() } else { Vec::new() },
        filter: text(first, 5),
        rows_estimated: number(first, 9).ok_or_else(bad)?,
        storage,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn row(name: &str, primary: Option<u32>, identity: Option<u32>, is_sent: bool) -> VerifyRow {
        let place = |place: Option<u32>| place.map(|place| place.to_string());
        let text = |text: &str| Some(text.to_owned());
        let sent = Some(is_sent.to_string());
        let table = [None, text("r"), text("1"), text("7"), text("90"), text("false")];
        [text(name), text("23"), place(primary), place(identity), sent].into_iter().chain(table).collect()
    }

    fn key(rows: &[VerifyRow]) -> Vec<String> {
        read_table(&TableName::new("s", "t"), Some("p"), rows).unwrap().unwrap().key
    }

    #[test]
    fn the_key_is_one_that_is_sent_whole() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(key(&[row("a", Some(1), None, true), row("b", Some(0), None, true)]), names(&["b", "a"]));
        let unsent = [row("a", Some(0), None, false), row("b", None, Some(0), true)];
        assert_eq!(key(&unsent), names(&["b"]));
        assert_eq!(key(&[row("a", Some(0), None, false), row("b", None, None, true)]), names(&[]));
    }

    #[test]
    fn names_stay_in_their_literals() {
        let sql = table_sql(&TableName::new("s'", "t\\"), Some("p'"));
        for literal in ["= 's'''", "= E't\\\\'", "= 'p'''"] {
            assert!(sql.contains(literal), "{literal}: {sql}");
        }
        assert!(!table_sql(&TableName::new("s", "t"), None).contains('$'));
    }

    #[test]
    fn no_row_is_no_table_and_nonsense_is_refused() {
        let table = TableName::new("s", "t");
        assert_eq!(read_table(&table, None, &[]).unwrap(), None);
        assert!(read_table(&table, None, &[vec![Some("a".to_owned())]]).is_err());
    }
}
