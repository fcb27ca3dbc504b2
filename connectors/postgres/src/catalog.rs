//! Reads what the sink's catalog says of a table, and brings the table into shape.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;
use wallaby_model::schema::quote_identifier;
use wallaby_model::{Position, TableName, TableSchema};

use crate::error::{Doing, PostgresError};
use crate::metrics::COLUMNS_AS_TEXT;
use crate::schema::{Existing, ExistingColumn, Extra, Misfit, Target, Wanted, plan, target};

/// Columns of earlier shapes, by the table at the source, that may stay at the sink for now.
#[derive(Debug, Default)]
pub(crate) struct Leniency(HashMap<TableName, HashSet<String>>);

impl Leniency {
    /// What may stay for a shape.
    pub(crate) fn of(&self, schema: &TableSchema) -> Extra<'_> {
        self.0.get(&schema.table).map_or(Extra::Refused, Extra::These)
    }

    /// Remembers the columns of a shape that rows were written in.
    pub(crate) fn remember(&mut self, schema: &TableSchema) {
        let columns = self.0.entry(schema.table.clone()).or_default();
        columns.extend(schema.columns.iter().map(|column| column.name.clone()));
    }
}

/// How long a CREATE or ALTER waits for its lock.
pub(crate) const DDL_LOCK_TIMEOUT: &str = "5s";

const COLUMNS: &str = "\
    SELECT a.attname::text, a.atttypid, a.atttypmod, format_type(a.atttypid, -1), t.typtype = 'e', a.attnotnull, \
        a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' \
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// Unique, valid, immediate, over plain columns and all rows: what ON CONFLICT takes.
const UNIQUE: &str = "\
    SELECT array_agg(a.attname::text) \
    FROM pg_index i JOIN LATERAL unnest(i.indkey) WITH ORDINALITY k(attnum, n) ON k.n <= i.indnkeyatts \
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
    WHERE i.indrelid = $1 AND i.indisunique AND i.indimmediate AND i.indisvalid \
        AND i.indpred IS NULL AND i.indexprs IS NULL \
    GROUP BY i.indexrelid";

/// The source's types at the sink. By name first; oids of built-in types are the same everywhere (a domain that the
/// sink does not have is kept as its base type).
const TYPES: &str = "\
    SELECT r.named, b.oid, format_type(b.oid, w.modifier) \
    FROM unnest($1::text[], $2::oid[], $3::int[]) WITH ORDINALITY w(name, oid, modifier, n) \
        CROSS JOIN LATERAL (SELECT to_regtype(w.name)::oid AS named) r \
        LEFT JOIN pg_type b ON b.oid = w.oid AND w.oid < 16384 \
    ORDER BY w.n";

async fn read_wanted(client: &Client, schema: &TableSchema) -> Result<Vec<Wanted>, PostgresError> {
    const TEXT: u32 = 25;
    let names: Vec<&str> = schema.columns.iter().map(|column| column.sql_type.as_str()).collect();
    let oids: Vec<u32> = schema.columns.iter().map(|column| column.type_oid).collect();
    let modifiers: Vec<i32> = schema.columns.iter().map(|column| column.type_modifier).collect();
    let doing = || format!("looking up the types of {} at the sink", schema.table);
    let rows = client.query(TYPES, &[&names, &oids, &modifiers]).await.doing(doing)?;
    let wanted = rows.iter().zip(&schema.columns).map(|(row, column)| {
        let (named, built_in): (Option<u32>, Option<u32>) = (row.get(0), row.get(1));
        match (named, built_in) {
            (Some(oid), _) => {
                // The modifier is that of the base type: it says nothing of a domain.
                let modifier = if oid == column.type_oid { column.type_modifier } else { -1 };
                Wanted { oid, modifier, sql: column.sql_type.clone(), as_text: false }
            }
            (None, Some(oid)) => Wanted { oid, modifier: column.type_modifier, sql: row.get(2), as_text: false },
            (None, None) => Wanted { oid: TEXT, modifier: -1, sql: "text".to_owned(), as_text: true },
        }
    });
    Ok(wanted.collect())
}

pub(crate) async fn read_existing(client: &Client, table: &TableName) -> Result<Option<Existing>, PostgresError> {
    let doing = || format!("reading {table} from the sink's catalog");
    let query = "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'f', 'v', 'm')";
    let Some(row) = client.query_opt(query, &[&table.schema, &table.name]).await.doing(doing)? else {
        return Ok(None);
    };
    let oid: u32 = row.get(0);
    let columns = client.query(COLUMNS, &[&oid]).await.doing(doing)?;
    let columns = columns.iter().map(|row| ExistingColumn {
        name: row.get(0),
        oid: row.get(1),
        modifier: row.get(2),
        cast: row.get(3),
        is_enum: row.get(4),
        not_null: row.get(5),
        fills_itself: row.get(6),
        generated: row.get(7),
    });
    let unique = client.query(UNIQUE, &[&oid]).await.doing(doing)?;
    let unique = unique.iter().map(|row| row.get(0)).collect();
    Ok(Some(Existing { columns: columns.collect(), unique }))
}

async fn make_schema(client: &Client, schema: &str) -> Result<(), PostgresError> {
    let doing = || format!("making schema {schema} at the sink");
    // IF NOT EXISTS alone asks for the right to create even when there is nothing to create.
    let query = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)";
    let exists: bool = client.query_one(query, &[&schema]).await.doing(doing)?.get(0);
    if exists {
        return Ok(());
    }
    client.batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {}", quote_identifier(schema))).await.doing(doing)
}

/// For the rest of the transaction.
pub(crate) async fn lock_timeout(client: &Client, limit: &str) -> Result<(), PostgresError> {
    let set = client.batch_execute(&format!("SET LOCAL lock_timeout = '{limit}'")).await;
    set.doing(|| "setting lock_timeout at the sink".to_owned())
}

/// Brings `table` into the shape of `schema`, inside the transaction of the batch. `first` is the first row in that
/// shape: where the sink stops when a person has to act.
pub(crate) async fn fit(
    client: &Client,
    schema: &Arc<TableSchema>,
    table: &TableName,
    first: Position,
    sink: &str,
    extra: Extra<'_>,
) -> Result<Target, PostgresError> {
    let misfit = |misfit: Misfit| PostgresError::Shape { reason: misfit.reason, remedy: misfit.remedy, first };
    let existing = read_existing(client, table).await?;
    if existing.is_none() {
        make_schema(client, &table.schema).await?;
    }
    let wanted = read_wanted(client, schema).await?;
    let statements = plan(schema, table, &wanted, existing.as_ref(), extra).map_err(misfit)?;
    if !statements.is_empty() {
        // A change of a table that waits makes every reader behind it wait too: better to try again.
        lock_timeout(client, DDL_LOCK_TIMEOUT).await?;
    }
    for statement in &statements {
        tracing::info!(%table, statement, "changing a table at the sink");
        client.batch_execute(statement).await.doing(|| format!("running {statement} at the sink"))?;
    }
    if !statements.is_empty() {
        lock_timeout(client, "0").await?;
    }
    let as_text = schema.columns.iter().zip(&wanted).filter(|(_, wanted)| wanted.as_text);
    for (column, _) in as_text {
        tracing::warn!(%table, column = column.name, r#type = column.sql_type, "type unknown at the sink: kept as text");
        metrics::counter!(COLUMNS_AS_TEXT, "sink" => sink.to_owned()).increment(1);
    }
    let existing = match existing {
        Some(existing) if statements.is_empty() => Some(existing),
        _ => read_existing(client, table).await?,
    };
    let vanished = || Misfit { reason: format!("{table} vanished at the sink"), remedy: "wallaby resume".to_owned() };
    let existing = existing.ok_or_else(|| misfit(vanished()))?;
    target(schema, table, &existing, false).map_err(misfit)
}

/// How rows of a shape that was superseded in the same batch are written to a table that has the later shape already.
pub(crate) async fn fit_superseded(
    client: &Client,
    schema: &Arc<TableSchema>,
    table: &TableName,
    first: Position,
) -> Result<Target, PostgresError> {
    let misfit = |misfit: Misfit| PostgresError::Shape { reason: misfit.reason, remedy: misfit.remedy, first };
    let vanished = || Misfit { reason: format!("{table} vanished at the sink"), remedy: "wallaby resume".to_owned() };
    let existing = read_existing(client, table).await?.ok_or_else(|| misfit(vanished()))?;
    target(schema, table, &existing, true).map_err(misfit)
}
