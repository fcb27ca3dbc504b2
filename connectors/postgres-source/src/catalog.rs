//! Completes a Relation message from the catalog: what its columns' types are, which are NOT NULL, which are the key.
//!
//! Types are looked up by oid and modifier, so that a column that was dropped since still resolves; NOT NULL comes from
//! the catalog as it is now, by name. So does the primary key, but not where the message itself tells it: the WAL may be
//! older than today's key, and its old rows carry the columns of the key of then.

use std::collections::HashMap;

use tokio_postgres::types::Type;
use wallaby_model::{Column, ColumnType, ReplicaIdentity, TableSchema};

use crate::assemble::{RelationShape, ShapeColumn};
use crate::error::SourceError;
use crate::metrics;

/// One row per asked type, down to the base of a domain, and to the base of an array's elements.
const TYPES_SQL: &str = "
WITH RECURSIVE asked AS (
  SELECT ordinal, oid AS asked_oid, typmod AS asked_typmod, oid, typmod, 0 AS depth
  FROM unnest($1::oid[], $2::int4[]) WITH ORDINALITY AS a(oid, typmod, ordinal)
  UNION ALL
  SELECT asked.ordinal, asked.asked_oid, asked.asked_typmod, t.typbasetype, CASE WHEN asked.typmod = -1 THEN t.typtypmod ELSE asked.typmod END, asked.depth + 1
  FROM asked JOIN pg_catalog.pg_type t ON t.oid = asked.oid AND t.typtype = 'd'
), base AS (
  SELECT DISTINCT ON (ordinal) ordinal, asked_oid, asked_typmod, oid, typmod FROM asked ORDER BY ordinal, depth DESC
), element AS (
  SELECT base.ordinal, t.typelem AS oid, 0 AS depth
  FROM base JOIN pg_catalog.pg_type t ON t.oid = base.oid AND t.typcategory = 'A' AND t.typelem <> 0
  UNION ALL
  SELECT element.ordinal, t.typbasetype, element.depth + 1
  FROM element JOIN pg_catalog.pg_type t ON t.oid = element.oid AND t.typtype = 'd'
), element_base AS (
  SELECT DISTINCT ON (ordinal) ordinal, oid FROM element ORDER BY ordinal, depth DESC
)
SELECT travels.oid, travels.typmod, pg_catalog.format_type(travels.oid, travels.typmod),
       t.typtype::text, t.typname::text, e.oid, e.typtype::text, e.typname::text
FROM base
LEFT JOIN pg_catalog.pg_type t ON t.oid = base.oid
LEFT JOIN element_base ON element_base.ordinal = base.ordinal
LEFT JOIN pg_catalog.pg_type e ON e.oid = element_base.oid
CROSS JOIN LATERAL (SELECT
  CASE WHEN e.oid <> t.typelem THEN e.typarray ELSE base.oid END AS oid,
  CASE WHEN e.oid <> t.typelem THEN -1 ELSE base.typmod END AS typmod) AS travels
ORDER BY base.ordinal";

/// A primary key that is checked only at the end of a transaction (DEFERRABLE) tells no rows apart within one: it is no key.
const COLUMNS_SQL: &str = "
SELECT a.attname::text, a.attnotnull, pg_catalog.array_position((i.indkey::int2[])[0:i.indnkeyatts - 1], a.attnum),
       a.attgenerated <> '' OR EXISTS (
         SELECT FROM pg_catalog.pg_publication_rel r
         WHERE r.prrelid = a.attrelid AND pg_catalog.jsonb_typeof(pg_catalog.to_jsonb(r)->'prattrs') = 'array'
           AND NOT pg_catalog.to_jsonb(r)->'prattrs' @> pg_catalog.to_jsonb(a.attnum))
FROM pg_catalog.pg_attribute a
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = a.attrelid AND i.indisprimary AND i.indimmediate
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped";

/// The whole shape of a table; new to the stream, so it is counted, and types that travel as text are told.
pub(crate) async fn resolve(
    client: &tokio_postgres::Client,
    shape: &RelationShape,
) -> Result<TableSchema, SourceError> {
    let schema = resolve_quietly(client, shape).await?;
    let others = || schema.columns.iter().filter(|column| column.kind == ColumnType::Other);
    metrics::shape(others().count());
    for column in others() {
        tracing::info!(table = %shape.table, column = %column.name, r#type = %column.sql_type, "a type without a rule of its own travels as text");
    }
    Ok(schema)
}

/// The whole shape of a table.
pub(crate) async fn resolve_quietly(
    client: &tokio_postgres::Client,
    shape: &RelationShape,
) -> Result<TableSchema, SourceError> {
    let failed = |error| SourceError::from_client(format!("looking up the columns of {}", shape.table), &error);
    let oids: Vec<u32> = shape.columns.iter().map(|column| column.type_oid).collect();
    let modifiers: Vec<i32> = shape.columns.iter().map(|column| column.type_modifier).collect();
    let (types, now) = futures::future::try_join(
        client.query_typed(TYPES_SQL, &[(&oids, Type::OID_ARRAY), (&modifiers, Type::INT4_ARRAY)]),
        client.query_typed(COLUMNS_SQL, &[(&shape.oid, Type::OID)]),
    )
    .await
    .map_err(failed)?;

    let now: HashMap<String, ColumnNow> = now
        .iter()
        .map(|row| (row.get(0), ColumnNow { not_null: row.get(1), key_place: row.get(2), may_be_left_out: row.get(3) }))
        .collect();
    let column = |(column, row): (&ShapeColumn, &tokio_postgres::Row)| Column {
        name: column.name.clone(),
        kind: kind_of(row),
        // A domain travels, and is made at a sink, as its base type.
        sql_type: row.get(2),
        type_oid: row.get(0),
        type_modifier: row.get(1),
        identity: column.identity,
        not_null: now.get(&column.name).is_some_and(|now| now.not_null),
    };
    let columns = shape.columns.iter().zip(&types).map(column).collect();
    let primary_key = primary_key(shape, &now);
    Ok(TableSchema { oid: shape.oid, table: shape.table.clone(), identity: shape.identity, columns, primary_key })
}

/// What the catalog says today of a column.
#[derive(Clone, Copy)]
struct ColumnNow {
    not_null: bool,
    /// Its place in the primary key.
    key_place: Option<i32>,
    /// Generated, or not in a publication's list of columns: that the stream lacks it does not say that it is new.
    may_be_left_out: bool,
}

/// The primary key. Where it is the identity the stream marks its columns, as of the row's time: the catalog, which may
/// be later, only orders them, and only when it names the same ones.
fn primary_key(shape: &RelationShape, now: &HashMap<String, ColumnNow>) -> Vec<u16> {
    let indexed = || (0u16..).zip(&shape.columns);
    let mut key: Vec<(i32, u16)> =
        indexed().filter_map(|(index, column)| now.get(&column.name)?.key_place.map(|place| (place, index))).collect();
    key.sort_unstable();
    let key: Vec<u16> = key.into_iter().map(|(_, index)| index).collect();
    let is_whole = key.len() == now.values().filter(|column| column.key_place.is_some()).count();
    if shape.identity != ReplicaIdentity::Default {
        return if is_whole { key } else { Vec::new() };
    }
    let marked: Vec<u16> = indexed().filter(|(_, column)| column.identity).map(|(index, _)| index).collect();
    let is_the_same = is_whole && key.len() == marked.len() && marked.iter().all(|index| key.contains(index));
    // A part of the key that is never sent (PostgreSQL publishes only inserts then) leaves no key.
    let is_sent = |name: &str| shape.columns.iter().any(|column| column.name == name);
    let lacks_a_part =
        now.iter().any(|(name, column)| column.key_place.is_some() && column.may_be_left_out && !is_sent(name));
    match () {
        () if is_the_same => key,
        () if lacks_a_part => Vec::new(),
        () => marked,
    }
}

fn kind_of(row: &tokio_postgres::Row) -> ColumnType {
    let oid: u32 = row.get(0);
    let type_kind: Option<String> = row.get(3);
    let name: Option<String> = row.get(4);
    let element_oid: Option<u32> = row.get(5);
    if let Some(element_oid) = element_oid {
        let element_kind: Option<String> = row.get(6);
        let element_name: Option<String> = row.get(7);
        return match scalar(element_oid, element_kind.as_deref(), element_name.as_deref()) {
            ColumnType::Other => ColumnType::Other,
            _ => ColumnType::Array,
        };
    }
    scalar(oid, type_kind.as_deref(), name.as_deref())
}

fn scalar(oid: u32, type_kind: Option<&str>, name: Option<&str>) -> ColumnType {
    match Type::from_oid(oid) {
        Some(Type::BOOL) => ColumnType::Bool,
        Some(Type::INT2) => ColumnType::Int2,
        Some(Type::INT4) => ColumnType::Int4,
        Some(Type::INT8) => ColumnType::Int8,
        Some(Type::OID) => ColumnType::Oid,
        Some(Type::FLOAT4) => ColumnType::Float4,
        Some(Type::FLOAT8) => ColumnType::Float8,
        Some(Type::NUMERIC) => ColumnType::Numeric,
        Some(Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::CHAR) => ColumnType::Text,
        Some(Type::BYTEA) => ColumnType::Bytea,
        Some(Type::UUID) => ColumnType::Uuid,
        Some(Type::JSON) => ColumnType::Json,
        Some(Type::JSONB) => ColumnType::Jsonb,
        Some(Type::DATE) => ColumnType::Date,
        Some(Type::TIME) => ColumnType::Time,
        Some(Type::TIMESTAMP) => ColumnType::Timestamp,
        Some(Type::TIMESTAMPTZ) => ColumnType::Timestamptz,
        Some(Type::INTERVAL) => ColumnType::Interval,
        Some(_) => ColumnType::Other,
        None if type_kind == Some("e") => ColumnType::Enum,
        None if type_kind == Some("b") && name == Some("citext") => ColumnType::Text,
        None => ColumnType::Other,
    }
}
