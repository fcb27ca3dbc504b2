//! What a run reads: the published tables, leaf by leaf, cut into ranges of pages.

use tokio_postgres::types::Type;
use wallaby_model::TableName;
use wallaby_model::run::{PlannedRelation, RelationState};

use super::sql::Argument;
use crate::error::SourceError;
use crate::tables::Pattern;

/// Heap and what is kept out of line of one chunk, at most.
const CHUNK_BYTES_MAX: u64 = 64 << 20;

/// Every relation that the publication sends, with the table that it is sent as: set-based, for thousands of tables. In the
/// transaction of an imported snapshot it shows the relfilenodes of that moment, which is what makes a later rewrite visible.
const PLAN_SQL: &str = "
WITH RECURSIVE published AS (
  SELECT c.oid, c.relkind, c.relreplident, n.nspname, c.relname, pg_catalog.to_jsonb(p)->'attnames' AS columns
  FROM pg_catalog.pg_publication_tables p
  JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
  WHERE p.pubname = $1
), tree AS (
  SELECT oid AS root, oid AS relation, relkind FROM published
  UNION ALL
  SELECT tree.root, c.oid, c.relkind
  FROM tree
  JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.relation AND tree.relkind = 'p'
  JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
), keyed AS (
  SELECT p.oid, pg_catalog.bool_or(k.is_key) AS has_key
  FROM published p
  JOIN pg_catalog.pg_index i ON i.indrelid = p.oid AND i.indimmediate
    AND (i.indisprimary OR (i.indisreplident AND p.relreplident = 'i'))
  CROSS JOIN LATERAL (
    SELECT CASE WHEN i.indisprimary
      THEN pg_catalog.bool_and(coalesce(p.columns ? a.attname::text, a.attgenerated = ''))
      ELSE pg_catalog.bool_or(coalesce(p.columns ? a.attname::text, a.attgenerated = '')) END AS is_key
    FROM pg_catalog.unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) AS attnum
    JOIN pg_catalog.pg_attribute a ON a.attrelid = p.oid AND a.attnum = attnum.attnum
  ) AS k
  GROUP BY p.oid
)
SELECT p.nspname::text, p.relname::text, n.nspname::text, c.relname::text, c.oid, c.relfilenode,
       CASE WHEN c.relkind = 'r' THEN coalesce(pg_catalog.pg_relation_size(c.oid), 0) ELSE 0 END / pg_catalog.current_setting('block_size')::int8,
       CASE WHEN c.reltuples >= 0 THEN c.reltuples::int8 END, coalesce(k.has_key, false), pg_catalog.current_setting('block_size')::int4,
       CASE WHEN c.reltoastrelid <> 0 THEN coalesce(pg_catalog.pg_relation_size(c.reltoastrelid), 0) ELSE 0 END, p.oid
FROM tree
JOIN published p ON p.oid = tree.root
JOIN pg_catalog.pg_class c ON c.oid = tree.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN keyed k ON k.oid = p.oid
WHERE c.relkind = 'r'
   OR (c.oid = p.oid AND c.relkind = 'p' AND NOT EXISTS (
         SELECT FROM tree t WHERE t.root = p.oid AND t.relkind = 'r'))
ORDER BY 1, 2, 3, 4";

/// The plan, in a transaction under the run's snapshot: [`super::SnapshotExport::plan`].
pub(super) async fn plan(
    client: &tokio_postgres::Client,
    publication: &str,
    wanted: &[String],
    required: &[String],
    exclude: &[String],
    chunk_bytes: u64,
) -> Result<Vec<PlannedRelation>, SourceError> {
    let missing = |reason: String| SourceError::TableMissing { reason };
    let parse = |texts: &[String]| texts.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>();
    let patterns = parse(wanted).map_err(missing)?;
    let excluded = parse(exclude).map_err(missing)?;
    let failed = |error| SourceError::from_client(format!("planning a run over publication {publication}"), &error);
    let argument: [Argument<'_>; 1] = [(&publication, Type::TEXT)];
    let rows = client.query_typed(PLAN_SQL, &argument).await.map_err(failed)?;
    if rows.is_empty() {
        let exists = "SELECT FROM pg_catalog.pg_publication WHERE pubname = $1";
        if client.query_typed(exists, &argument).await.map_err(failed)?.is_empty() {
            let when = crate::error::PUBLICATION_NOW;
            return Err(SourceError::PublicationMissing { publication: publication.to_owned(), when });
        }
    }
    let planned: Vec<PlannedRelation> = rows.iter().map(|row| relation(row, chunk_bytes)).collect();
    for pattern in &parse(required).map_err(missing)? {
        if !planned.iter().any(|relation| pattern.matches(&relation.table)) {
            return Err(missing(unpublished(pattern, publication, &planned)));
        }
    }
    let is_wanted = |relation: &PlannedRelation| {
        let is_named = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(&relation.table));
        (patterns.is_empty() || is_named(&patterns)) && !is_named(&excluded)
    };
    Ok(planned.into_iter().filter(is_wanted).collect())
}

fn relation(row: &tokio_postgres::Row, chunk_bytes: u64) -> PlannedRelation {
    let block_bytes = u32::try_from(row.get::<_, i32>(9)).unwrap_or(8192).max(1);
    let pages = u32::try_from(row.get::<_, i64>(6)).unwrap_or(u32::MAX);
    let out_of_line = u64::try_from(row.get::<_, i64>(10)).unwrap_or(0);
    PlannedRelation {
        table: TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        relation: TableName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
        oid: row.get(4),
        table_oid: row.get(11),
        relfilenode: row.get(5),
        pages,
        chunk_pages: chunk_pages(pages, block_bytes, out_of_line, chunk_bytes.min(CHUNK_BYTES_MAX)),
        restart: 0,
        state: RelationState::Reading,
        rows_estimate: row.get::<_, Option<i64>>(7).and_then(|rows| u64::try_from(rows).ok()),
        has_key: row.get(8),
    }
}

/// The pages of heap that have about `chunk_bytes` with what is kept out of line of their rows; at least one.
fn chunk_pages(pages: u32, block_bytes: u32, out_of_line: u64, chunk_bytes: u64) -> u32 {
    let block_bytes = u64::from(block_bytes);
    let page_bytes = block_bytes + out_of_line / u64::from(pages.max(1));
    u32::try_from(chunk_bytes / page_bytes).unwrap_or(u32::MAX).max(1)
}

fn unpublished(pattern: &Pattern, publication: &str, planned: &[PlannedRelation]) -> String {
    let Some(name) = &pattern.table else {
        return format!("publication {publication} has no table of schema {}", pattern.schema);
    };
    let said = format!("table {}.{name} is not published by {publication}", pattern.schema);
    let asked = TableName::new(&pattern.schema, name);
    let near = |relation: &&PlannedRelation| relation.table.name.eq_ignore_ascii_case(name);
    match planned.iter().find(|relation| relation.relation == asked) {
        Some(leaf) => format!("{said}: it is a partition of {}, which is published as a whole; name that", leaf.table),
        None => match planned.iter().find(near) {
            Some(near) => format!("{said}; did you mean {}?", near.table),
            None => said,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_has_fewer_pages_the_more_is_kept_out_of_line() {
        assert_eq!(chunk_pages(100_000, 8192, 0, 64 << 20), 8192);
        // As much again out of line; then a thousand times as much.
        assert_eq!(chunk_pages(1000, 8192, 1000 * 8192, 64 << 20), 4096);
        assert_eq!(chunk_pages(1000, 8192, 1_000_000 * 8192, 64 << 20), 8);
        assert_eq!(chunk_pages(1, 8192, 1 << 40, 64 << 20), 1);
        assert_eq!(chunk_pages(0, 8192, 0, 1 << 20), 128);
    }
}
