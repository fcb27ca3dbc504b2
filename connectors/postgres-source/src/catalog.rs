//! Completes a Relation message from the catalog: what its columns' types are, which are NOT NULL, which are the key.
//!
//! Types are looked up by oid and modifier, so that a column that was dropped since still resolves; NOT NULL and the
//! primary key come from the catalog as it is now, by name.

use std::collections::HashMap;

use tokio_postgres::types::Type;
use wallaby_model::{Column, ColumnType, TableSchema};

use crate::assemble::RelationShape;
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

const COLUMNS_SQL: &str = "
SELECT a.attname::text, a.attnotnull, pg_catalog.array_position((i.indkey::int2[])[0:i.indnkeyatts - 1], a.attnum)
FROM pg_catalog.pg_attribute a
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
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

    let now: HashMap<String, (bool, Option<i32>)> =
        now.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
    let mut columns = Vec::with_capacity(shape.columns.len());
    let mut key = Vec::new();
    for (index, (column, row)) in shape.columns.iter().zip(&types).enumerate() {
        let (not_null, key_place) = now.get(&column.name).copied().unwrap_or((false, None));
        if let Some(place) = key_place {
            key.push((place, index as u16));
        }
        columns.push(Column {
            name: column.name.clone(),
            kind: kind_of(row),
            // A domain travels, and is made at a sink, as its base type.
            sql_type: row.get(2),
            type_oid: row.get(0),
            type_modifier: row.get(1),
            identity: column.identity,
            not_null,
        });
    }
    key.sort_unstable();
    let key_columns = now.values().filter(|(_, place)| place.is_some()).count();
    let primary_key =
        if key.len() == key_columns { key.into_iter().map(|(_, index)| index).collect() } else { Vec::new() };
    Ok(TableSchema { oid: shape.oid, table: shape.table.clone(), identity: shape.identity, columns, primary_key })
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
