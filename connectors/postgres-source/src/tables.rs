//! Which tables a flow names, and what the source has of them.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;
use wallaby_model::TableName;

use crate::error::SourceError;

/// A table of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceTable {
    pub(crate) name: TableName,
    /// The table itself, or those of its partitions, whose updates and deletes do not say which row they mean: no primary
    /// key, identity index or FULL. Postgres asks this of the partition that has the row, whatever its root has.
    pub(crate) without_identity: Vec<TableName>,
    /// Its partitions whose updates and deletes name less of the old row than a sink finds a row of this table by. The WAL has of it
    /// what the identity of the partition has; the stream passes that off as what this table's identity has, with NULL for the rest.
    pub(crate) narrow_identity: Vec<TableName>,
    /// The table itself, or those of its partitions, of which a policy would hide rows from the role: the server refuses to read them.
    pub(crate) hidden_rows: Vec<TableName>,
    /// UNLOGGED or TEMPORARY tables are not in the WAL.
    pub(crate) logged: bool,
    /// A partition of another table.
    pub(crate) is_partition: bool,
    /// Whether the role may read it.
    pub(crate) can_select: bool,
    /// Whether the role, or one it is a member of, owns it: needed to publish it.
    pub(crate) owned: bool,
}

/// A table in a publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its oid: the same name with another one is another table.
    pub oid: u32,
    /// The oid of its place in the publication (`pg_publication_rel`): another one means that it was out of it meanwhile, or that another
    /// row filter or column list was set. 0 where the publication has all tables, or all of a schema.
    pub member: u32,
}

/// A publication as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExistingPublication {
    pub(crate) all_tables: bool,
    /// The tables as they were named.
    pub(crate) tables: BTreeMap<TableName, Published>,
    /// Whether no operation is left out.
    pub(crate) publishes_all_operations: bool,
    /// Whether rows of partitions are sent as rows of the table that is published, and not as their own.
    pub(crate) via_root: bool,
}

/// A table that is being dropped has no privileges (NULL). A key that is checked only at the end of a transaction (DEFERRABLE) is no identity. Partitions are found without
/// `pg_partition_tree`, which locks them. `keyed` has what a sink finds a row of a partitioned table by, NULL being all of it, and
/// what the WAL has of an old row of each of its partitions.
const TABLES_SQL: &str = "
WITH RECURSIVE part(root, oid, relkind) AS (
  SELECT oid, oid, relkind FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p') AND relpersistence <> 't'
  UNION ALL
  SELECT part.root, c.oid, c.relkind
  FROM part JOIN pg_catalog.pg_inherits h ON part.relkind = 'p' AND h.inhparent = part.oid
  JOIN pg_catalog.pg_class c ON c.oid = h.inhrelid
), without AS (
  SELECT part.root, array_agg(n.nspname::text ORDER BY n.nspname, c.relname) AS schemas,
         array_agg(c.relname::text ORDER BY n.nspname, c.relname) AS names
  FROM part JOIN pg_catalog.pg_class c ON c.oid = part.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE (part.oid = part.root OR part.relkind = 'r') AND c.relreplident <> 'f'
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
                    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END)
  GROUP BY 1
), tree AS (
  SELECT root, oid FROM part WHERE relkind IN ('r', 'p') AND (relkind = 'p') = (oid = root)
), indexed AS (
  SELECT i.indrelid, i.indisprimary, i.indisreplident,
         ARRAY(SELECT a.attname::text FROM pg_catalog.unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) AS k(attnum)
               JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) AS columns
  FROM pg_catalog.pg_index i
  WHERE (i.indisprimary OR (i.indisreplident AND i.indisvalid)) AND i.indimmediate AND i.indrelid IN (SELECT oid FROM tree)
), keyed AS (
  SELECT tree.root, tree.oid, c.relreplident AS identity, n.nspname, c.relname,
         CASE WHEN c.relreplident <> 'i' OR (tree.oid = tree.root AND p.columns <@ m.columns) THEN p.columns ELSE m.columns END AS columns
  FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN indexed p ON p.indrelid = tree.oid AND p.indisprimary
  LEFT JOIN indexed m ON m.indrelid = tree.oid AND m.indisreplident
), narrow AS (
  SELECT k.root, array_agg(k.nspname::text ORDER BY k.nspname, k.relname) AS schemas,
         array_agg(k.relname::text ORDER BY k.nspname, k.relname) AS names
  FROM keyed k JOIN keyed r ON r.oid = k.root AND r.root = r.oid
  WHERE k.oid <> k.root AND k.identity IN ('d', 'i') AND k.columns IS NOT NULL
    AND CASE WHEN r.columns IS NULL THEN r.identity = 'f' ELSE NOT r.columns <@ k.columns END
  GROUP BY 1
), hidden AS (
  SELECT part.root, array_agg(n.nspname::text ORDER BY n.nspname, c.relname) AS schemas,
         array_agg(c.relname::text ORDER BY n.nspname, c.relname) AS names
  FROM part JOIN pg_catalog.pg_class c ON c.oid = part.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relrowsecurity AND pg_catalog.row_security_active(c.oid)
  GROUP BY 1
)
SELECT n.nspname::text, c.relname::text, c.relpersistence = 'p', c.relispartition,
       coalesce(w.schemas, '{}'), coalesce(w.names, '{}'),
       coalesce(pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT'), false),
       pg_catalog.pg_has_role(c.relowner, 'USAGE'), coalesce(l.schemas, '{}'), coalesce(l.names, '{}'),
       coalesce(h.schemas, '{}'), coalesce(h.names, '{}')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN without w ON w.root = c.oid
LEFT JOIN narrow l ON l.root = c.oid
LEFT JOIN hidden h ON h.root = c.oid
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY 1, 2";

/// All tables of the database.
pub(crate) async fn all(client: &tokio_postgres::Client) -> Result<Vec<SourceTable>, SourceError> {
    let rows = client.query_typed(TABLES_SQL, &[]).await;
    let rows = rows.map_err(|error| SourceError::from_client("listing tables", &error))?;
    let names = |row: &tokio_postgres::Row, schemas: usize, names: usize| -> Vec<TableName> {
        std::iter::zip(row.get::<_, Vec<String>>(schemas), row.get::<_, Vec<String>>(names))
            .map(|(schema, name)| TableName::new(schema, name))
            .collect()
    };
    let table = |row: &tokio_postgres::Row| SourceTable {
        name: TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        logged: row.get(2),
        is_partition: row.get(3),
        without_identity: names(row, 4, 5),
        narrow_identity: names(row, 8, 9),
        hidden_rows: names(row, 10, 11),
        can_select: row.get(6),
        owned: row.get(7),
    };
    Ok(rows.iter().map(table).collect())
}

/// What the tables take at the source with their partitions and what is kept out of line, without indexes, as a person reads it.
/// Waits for who holds one of them.
pub(crate) async fn size(client: &tokio_postgres::Client, tables: &[SourceTable]) -> Result<String, SourceError> {
    const SIZE_SQL: &str = "
WITH RECURSIVE part(oid, relkind) AS (
  SELECT c.oid, c.relkind FROM unnest($1::text[], $2::text[]) AS asked(schema, name)
  JOIN pg_catalog.pg_namespace n ON n.nspname = asked.schema
  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = asked.name
  UNION
  SELECT c.oid, c.relkind FROM part
  JOIN pg_catalog.pg_inherits h ON part.relkind = 'p' AND h.inhparent = part.oid
  JOIN pg_catalog.pg_class c ON c.oid = h.inhrelid
)
SELECT pg_catalog.pg_size_pretty(coalesce(sum(pg_catalog.pg_table_size(oid)), 0)) FROM part";
    let (schemas, names): (Vec<&str>, Vec<&str>) =
        tables.iter().map(|table| (table.name.schema.as_str(), table.name.name.as_str())).unzip();
    let row = client.query_typed_one(SIZE_SQL, &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)]).await;
    Ok(row.map_err(|error| SourceError::from_client("measuring tables", &error))?.get(0))
}

/// The tables that a flow's patterns name.
pub(crate) async fn choose(
    client: &tokio_postgres::Client,
    wanted: &[String],
    exclude: &[String],
) -> Result<Vec<SourceTable>, SourceError> {
    select(&all(client).await?, wanted, exclude).map_err(|reason| SourceError::TableMissing { reason })
}

/// As [`choose`], from a list. Pure.
pub(crate) fn select(
    tables: &[SourceTable],
    wanted: &[String],
    exclude: &[String],
) -> Result<Vec<SourceTable>, String> {
    let excluded: Vec<Pattern> = exclude.iter().map(|text| Pattern::parse(text)).collect::<Result<_, _>>()?;
    let mut chosen: Vec<SourceTable> = Vec::new();
    for text in wanted {
        let pattern = Pattern::parse(text)?;
        // A wildcard takes what can be captured; a table that is named must be fit.
        let fits = |table: &&SourceTable| {
            let capturable = pattern.table.is_some() || (table.logged && !table.is_partition);
            pattern.matches(&table.name) && capturable && !excluded.iter().any(|pattern| pattern.matches(&table.name))
        };
        let found: Vec<&SourceTable> = tables.iter().filter(fits).collect();
        if let Some(unlogged) = found.iter().find(|table| !table.logged) {
            return Err(format!("table {} is UNLOGGED: its changes are not in the WAL", unlogged.name));
        }
        if found.is_empty() {
            return Err(missing(&pattern, tables));
        }
        for table in found {
            if !chosen.iter().any(|known| known.name == table.name) {
                chosen.push(table.clone());
            }
        }
    }
    if chosen.is_empty() {
        return Err("spec.source.postgres.publication.tables is empty: name tables as schema.table or schema.*".into());
    }
    Ok(chosen)
}

fn missing(pattern: &Pattern, tables: &[SourceTable]) -> String {
    let Some(name) = &pattern.table else {
        return format!("schema {} has no table that can be captured", pattern.schema);
    };
    let named = format!("table {}.{name} does not exist", pattern.schema);
    let elsewhere = tables.iter().find(|table| table.name.name.eq_ignore_ascii_case(name));
    match elsewhere {
        Some(near) => format!("{named}; did you mean {}?", near.name),
        None => named,
    }
}

/// `schema.table` or `schema.*`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    pub(crate) schema: String,
    pub(crate) table: Option<String>,
}

impl Pattern {
    pub(crate) fn parse(text: &str) -> Result<Pattern, String> {
        let bad = || format!("{text:?} names no table: write schema.table or schema.*");
        let (schema, rest) = part(text).ok_or_else(bad)?;
        let rest = rest.strip_prefix('.').ok_or_else(bad)?;
        if rest == "*" {
            return Ok(Pattern { schema, table: None });
        }
        match part(rest) {
            Some((table, "")) => Ok(Pattern { schema, table: Some(table) }),
            _ => Err(bad()),
        }
    }

    pub(crate) fn matches(&self, name: &TableName) -> bool {
        name.schema == self.schema && self.table.as_ref().is_none_or(|table| *table == name.name)
    }
}

/// One name, in double quotes or up to the next dot, and what follows it.
fn part(text: &str) -> Option<(String, &str)> {
    let Some(mut rest) = text.strip_prefix('"') else {
        let end = text.find('.').unwrap_or(text.len());
        return (end > 0).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let mut name = String::new();
    loop {
        let quote = rest.find('"')?;
        name.push_str(&rest[..quote]);
        rest = &rest[quote + 1..];
        match rest.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return (!name.is_empty()).then_some((name, rest)),
        }
    }
}

/// Reads a publication; `None` when it does not exist.
pub(crate) async fn publication(
    client: &tokio_postgres::Client,
    name: &str,
) -> Result<Option<ExistingPublication>, SourceError> {
    let failed = |error| SourceError::from_client(format!("reading publication {name}"), &error);
    let head = client
        .query_typed(
            "SELECT puballtables, pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot FROM pg_catalog.pg_publication WHERE pubname = $1",
            &[(&name, Type::TEXT)],
        )
        .await
        .map_err(failed)?;
    let Some(head) = head.first() else { return Ok(None) };
    // The tables as they were named, not the partitions that come with them.
    let rows = client
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, c.oid, r.oid FROM pg_catalog.pg_publication p
             JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
             JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1",
            &[(&name, Type::TEXT)],
        )
        .await
        .map_err(failed)?;
    let table = |row: &tokio_postgres::Row| {
        let published = Published { oid: row.get(2), member: row.get(3) };
        (TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)), published)
    };
    Ok(Some(ExistingPublication {
        all_tables: head.get(0),
        publishes_all_operations: head.get(1),
        via_root: head.get(2),
        tables: rows.iter().map(table).collect(),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn table(schema: &str, name: &str) -> SourceTable {
        SourceTable {
            name: TableName::new(schema, name),
            without_identity: Vec::new(),
            narrow_identity: Vec::new(),
            hidden_rows: Vec::new(),
            logged: true,
            is_partition: false,
            can_select: true,
            owned: true,
        }
    }

    fn names(tables: &[SourceTable]) -> Vec<String> {
        tables.iter().map(|table| table.name.to_string()).collect()
    }

    #[test]
    fn patterns_choose_tables() {
        let tables = [
            table("public", "orders"),
            table("public", "audit_log"),
            SourceTable { logged: false, ..table("public", "cache") },
            SourceTable { is_partition: true, ..table("public", "orders_1") },
            table("odd.schema", "a\"b"),
        ];
        let chosen = select(&tables, &["public.*".into()], &["public.audit_log".into()]).unwrap();
        assert_eq!(names(&chosen), ["public.orders"]);
        let chosen = select(&tables, &["\"odd.schema\".\"a\"\"b\"".into(), "public.orders_1".into()], &[]).unwrap();
        assert_eq!(names(&chosen), ["odd.schema.a\"b", "public.orders_1"]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let tables = [table("shop", "orders"), SourceTable { logged: false, ..table("shop", "cache") }];
        let error = |wanted: &str| select(&tables, &[wanted.into()], &[]).unwrap_err();
        assert!(error("public.Orders").contains("did you mean shop.orders?"));
        assert!(error("orders").contains("schema.table"));
        assert!(error("none.*").contains("schema none"));
        assert!(error("shop.cache").contains("UNLOGGED"));
        assert!(select(&tables, &[], &[]).unwrap_err().contains("is empty"));
    }
}
