//! What a run reads: the published tables, leaf by leaf, cut into ranges of pages.

use tokio_postgres::types::Type;
use wallaby_model::TableName;
use wallaby_model::run::{PlannedRelation, RelationState};

use super::sql::Argument;
use crate::error::SourceError;
use crate::tables::Pattern;

/// Heap of one chunk.
const CHUNK_BYTES: u32 = 64 << 20;

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
  JOIN pg_catalog.pg_index i ON i.indrelid = p.oid AND (i.indisprimary OR (i.indisreplident AND p.relreplident = 'i'))
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
       CASE WHEN c.reltuples >= 0 THEN c.reltuples::int8 END, coalesce(k.has_key, false), pg_catalog.current_setting('block_size')::int4
FROM tree
JOIN published p ON p.oid = tree.root
JOIN pg_catalog.pg_class c ON c.oid = tree.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN keyed k ON k.oid = p.oid
WHERE c.relkind = 'r'
   OR (c.oid = p.oid AND c.relkind = 'p' AND NOT EXISTS (
         SELECT FROM tree t WHERE t.root = p.oid AND t.relkind = 'r'))
ORDER BY 1, 2, 3, 4";

/// Plans a run over the published tables that `wanted` names: `schema.table` or `schema.*`, in double quotes where names hold dots;
/// empty for all of them. A partitioned table that is published as a whole gives one relation for each leaf (or itself, when it
/// has none). Call it in a transaction under the run's snapshot.
///
/// # Errors
/// `PublicationMissing`; `TableMissing` when nothing published fits what was named.
pub async fn plan(
    client: &tokio_postgres::Client,
    publication: &str,
    wanted: &[String],
) -> Result<Vec<PlannedRelation>, SourceError> {
    let missing = |reason: String| SourceError::TableMissing { reason };
    let patterns: Vec<Pattern> =
        wanted.iter().map(|text| Pattern::parse(text)).collect::<Result<_, _>>().map_err(missing)?;
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
    let planned: Vec<PlannedRelation> = rows.iter().map(relation).collect();
    for pattern in &patterns {
        if !planned.iter().any(|relation| pattern.matches(&relation.table)) {
            return Err(missing(unpublished(pattern, publication, &planned)));
        }
    }
    let is_wanted = |relation: &PlannedRelation| {
        patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(&relation.table))
    };
    Ok(planned.into_iter().filter(is_wanted).collect())
}

fn relation(row: &tokio_postgres::Row) -> PlannedRelation {
    let block_bytes = u32::try_from(row.get::<_, i32>(9)).unwrap_or(8192).max(1);
    PlannedRelation {
        table: TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        relation: TableName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
        oid: row.get(4),
        relfilenode: row.get(5),
        pages: u32::try_from(row.get::<_, i64>(6)).unwrap_or(u32::MAX),
        chunk_pages: (CHUNK_BYTES / block_bytes).max(1),
        restart: 0,
        state: RelationState::Reading,
        rows_estimate: row.get::<_, Option<i64>>(7).and_then(|rows| u64::try_from(rows).ok()),
        has_key: row.get(8),
    }
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
