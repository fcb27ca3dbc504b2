//! Which of a flow's tables are published, looked at again and again while it runs: tables come, go, and take each other's names.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::types::Type;
use wallaby_model::TableName;

use crate::control::Control;
use crate::error::{PUBLICATION_GONE, SourceError};
use crate::setup::{self, Altered, PublicationWanted, check_alterable, check_keys};
use crate::tables::{self, ExistingPublication, Pattern, Published, SourceTable};

/// The tables that a flow wants, by what becomes of them.
#[derive(Debug, Default)]
pub struct PublishedTables {
    /// Those that are published.
    pub published: BTreeMap<TableName, Published>,
    /// The leaf partitions of those of them that are partitioned and whose rows are sent as the root's.
    pub partitions: BTreeMap<TableName, Vec<Partition>>,
    /// Those that are there and fit, and are not published.
    pub absent: BTreeSet<TableName>,
    /// What is wrong with others: they are not there, or not fit. The rest is captured all the same.
    pub unfit: Vec<SourceError>,
    /// Published tables of which changes would be lost as they are now: out of the publication they are loaded once they are mended.
    pub unsound: BTreeSet<TableName>,
    /// Published tables that are not wanted.
    pub surplus: BTreeSet<TableName>,
}

/// A leaf of a published table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name.
    pub name: TableName,
    /// Its oid.
    pub oid: u32,
    /// Changes when it, or what it is part of, is attached: a digest of the way up to the root, and of the transactions that made it.
    pub place: i32,
    /// Whether it was a table before it was attached, and has rows now: what it had then is not in the WAL under the root's name. One that
    /// was made and attached in one transaction counts as made as a partition.
    pub brought_rows: bool,
}

/// Looks which of the wanted tables are published. Changes nothing. A publication that went missing is not to be made again: the WAL
/// before it could not be decoded, and whoever renamed it could not rename it back (hazard 20).
///
/// # Errors
/// `PublicationMissing`; `PublicationUnfit`; when the server cannot be asked.
pub async fn published_tables(control: &Control, wanted: &PublicationWanted) -> Result<PublishedTables, SourceError> {
    let existing = tables::publication(control, &wanted.name).await?;
    let gone = SourceError::PublicationMissing { publication: wanted.name.clone(), when: PUBLICATION_GONE };
    let existing = existing.ok_or(gone)?;
    let mut look = PublishedTables::default();
    if wanted.create {
        check_alterable(&existing, &wanted.name)?;
        judge(&tables::all(control).await?, &existing, wanted, &mut look);
        // A partition that is published beside its root is sent as the root's.
        let sent = sent(control, wanted, &existing).await?;
        look.published.retain(|table, _| sent.contains_key(table));
    } else {
        look.published = sent(control, wanted, &existing).await?;
    }
    if existing.via_root {
        look.partitions = partitions(control, &look.published).await?;
    }
    Ok(look)
}

/// What becomes of each of the tables of the database, in a publication that is ours.
fn judge(all: &[SourceTable], existing: &ExistingPublication, wanted: &PublicationWanted, look: &mut PublishedTables) {
    let mut unfit: BTreeMap<TableName, SourceTable> = BTreeMap::new();
    let mut named = BTreeSet::new();
    for pattern in &wanted.tables {
        // One by one: a table that is not there keeps no other one out.
        let chosen = match tables::select(all, std::slice::from_ref(pattern), &wanted.exclude) {
            Ok(chosen) => chosen,
            Err(reason) => {
                look.unfit.push(SourceError::TableMissing { reason });
                continue;
            }
        };
        for table in chosen {
            named.insert(table.name.clone());
            let sound = check_keys(std::slice::from_ref(&table), existing.via_root);
            match existing.tables.get(&table.name) {
                // Without a key the source refuses what it could not send, so nothing is lost; with less of one it is.
                Some(published) if !matches!(sound, Err(SourceError::PartitionIdentity { .. })) => {
                    look.published.insert(table.name.clone(), *published);
                }
                Some(_) => _ = look.unsound.insert(table.name.clone()),
                None if sound.is_ok() => _ = look.absent.insert(table.name.clone()),
                None => {}
            }
            if sound.is_err() {
                unfit.insert(table.name.clone(), table);
            }
        }
    }
    // Those of one kind in one sentence.
    let (keyless, narrow): (Vec<SourceTable>, Vec<SourceTable>) =
        unfit.into_values().partition(|table| !table.without_identity.is_empty());
    look.unfit.extend([keyless, narrow].iter().filter_map(|tables| check_keys(tables, existing.via_root).err()));
    look.surplus = existing.tables.keys().filter(|name| !named.contains(name)).cloned().collect();
}

/// Tells a table that was made as a partition from one that was attached by the transactions that wrote its place in the tree and its own
/// columns; they stay as they were when rows are frozen.
async fn partitions(
    control: &Control,
    published: &BTreeMap<TableName, Published>,
) -> Result<BTreeMap<TableName, Vec<Partition>>, SourceError> {
    const PARTITIONS_SQL: &str = "
WITH RECURSIVE tree AS (
  SELECT c.oid AS root, c.oid AS relation, c.relkind, true AS is_born, '' AS place
  FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1) AND c.relkind = 'p'
  UNION ALL
  SELECT tree.root, c.oid, c.relkind, tree.is_born AND i.xmin = a.xmin,
         pg_catalog.concat_ws('/', tree.place, i.inhparent, i.xmin)
  FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.relation AND tree.relkind = 'p'
  JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = -1
)
SELECT tree.root, n.nspname::text, c.relname::text, c.oid, pg_catalog.hashtext(tree.place),
       NOT tree.is_born AND coalesce(pg_catalog.pg_relation_size(c.oid), 0) > 0
FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.relation JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' ORDER BY 2, 3";
    let oids: Vec<u32> = published.values().map(|published| published.oid).collect();
    let rows = control.query_typed(PARTITIONS_SQL, &[(&oids, Type::OID_ARRAY)]).await;
    let rows = rows.map_err(|error| SourceError::from_client("listing partitions", &error))?;
    let roots: BTreeMap<u32, &TableName> = published.iter().map(|(table, known)| (known.oid, table)).collect();
    let mut found: BTreeMap<TableName, Vec<Partition>> = BTreeMap::new();
    for row in &rows {
        let Some(root) = roots.get(&row.get::<_, u32>(0)) else { continue };
        let name = TableName::new(row.get::<_, String>(1), row.get::<_, String>(2));
        let partition = Partition { name, oid: row.get(3), place: row.get(4), brought_rows: row.get(5) };
        found.entry((*root).clone()).or_default().push(partition);
    }
    Ok(found)
}

/// What a publication sends of what is wanted.
async fn sent(
    control: &Control,
    wanted: &PublicationWanted,
    existing: &ExistingPublication,
) -> Result<BTreeMap<TableName, Published>, SourceError> {
    const SENT_SQL: &str = "
SELECT n.nspname::text, c.relname::text, c.oid FROM pg_catalog.pg_publication_tables p
JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
WHERE p.pubname = $1";
    let parse = |texts: &[String]| texts.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>();
    let malformed = |reason| SourceError::TableMissing { reason };
    let patterns = parse(&wanted.tables).map_err(malformed)?;
    let excluded = parse(&wanted.exclude).map_err(malformed)?;
    let rows = control.query_typed(SENT_SQL, &[(&wanted.name, Type::TEXT)]).await;
    let rows =
        rows.map_err(|error| SourceError::from_client(format!("reading publication {}", wanted.name), &error))?;
    let is_named = |patterns: &[Pattern], table: &TableName| patterns.iter().any(|pattern| pattern.matches(table));
    let table = |row: &tokio_postgres::Row| {
        let (table, oid) = (TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)), row.get(2));
        let listed = existing.tables.get(&table).filter(|listed| listed.oid == oid);
        (table, Published { oid, member: listed.map_or(0, |listed| listed.member) })
    };
    let is_wanted = |(table, _): &(TableName, Published)| {
        (patterns.is_empty() || is_named(&patterns, table)) && !is_named(&excluded, table)
    };
    Ok(rows.iter().map(table).filter(is_wanted).collect())
}

/// Takes tables into the publication. Returns what kept single ones out, as long as the server answers: somebody who holds a lock on one of
/// them (`VACUUM`, `CREATE INDEX CONCURRENTLY`) keeps no other one out. One that was altered meanwhile is to be looked at again.
///
/// # Errors
/// When the server cannot be asked.
pub async fn publish_tables(
    control: &Control,
    publication: &str,
    tables: &BTreeSet<TableName>,
) -> Result<Vec<SourceError>, SourceError> {
    let mut refused = Vec::new();
    if tables.is_empty() || matches!(setup::add_tables(control, publication, tables).await, Ok(Altered::Yes)) {
        return Ok(refused);
    }
    for table in tables {
        match setup::add_tables(control, publication, &BTreeSet::from([table.clone()])).await {
            Err(error @ SourceError::Server { .. }) => refused.push(error),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Ok(refused)
}

/// Takes tables out of the publication. Returns what kept single ones in, as [`publish_tables`] does. One that is gone meanwhile is fine.
///
/// # Errors
/// When the server cannot be asked.
pub async fn unpublish_tables(
    control: &Control,
    publication: &str,
    tables: &BTreeSet<TableName>,
) -> Result<Vec<SourceError>, SourceError> {
    let mut refused = Vec::new();
    if tables.is_empty() || matches!(setup::drop_tables(control, publication, tables).await, Ok(Altered::Yes)) {
        return Ok(refused);
    }
    for table in tables {
        match setup::drop_tables(control, publication, &BTreeSet::from([table.clone()])).await {
            Err(error @ SourceError::Server { .. }) => refused.push(error),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Ok(refused)
}

/// A digest of the tables and indexes of the database and of what the publication has: while it is the same, so is what
/// [`published_tables`] says, privileges apart. Much cheaper than that, for whoever looks every few seconds.
///
/// # Errors
/// When the server cannot be asked.
pub async fn tables_digest(control: &Control, publication: &str) -> Result<String, SourceError> {
    const DIGEST_SQL: &str = "
SELECT pg_catalog.concat_ws(' ',
  (SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', c.oid, c.relname, c.relnamespace, c.relkind, c.relpersistence,
     c.relispartition, c.relreplident, c.relowner, i.indisreplident), '/' ORDER BY c.oid))
   FROM pg_catalog.pg_class c LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
   WHERE c.relkind IN ('r', 'p', 'i', 'I') AND c.relpersistence <> 't' AND c.oid >= 16384),
  (SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', inhrelid, inhparent, xmin), '/' ORDER BY inhrelid, inhparent))
   FROM pg_catalog.pg_inherits),
  (SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', oid, nspname), '/' ORDER BY oid))
   FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_'),
  (SELECT pg_catalog.md5(pg_catalog.string_agg(r.oid::text, '/' ORDER BY r.oid))
   FROM pg_catalog.pg_publication p JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = $1),
  (SELECT pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', p.schemaname, p.tablename), '/' ORDER BY p.schemaname, p.tablename))
   FROM pg_catalog.pg_publication_tables p WHERE p.pubname = $1))";
    let row = control.query_typed_one(DIGEST_SQL, &[(&publication, Type::TEXT)]).await;
    Ok(row.map_err(|error| SourceError::from_client("looking whether tables came or went", &error))?.get(0))
}
