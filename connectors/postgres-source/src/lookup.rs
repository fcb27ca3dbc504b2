//! A row of the source by its key, for a sink that met a change without all of its values.
//!
//! The row is read with the simple protocol, whose text forms are those of the WAL stream, and goes through the same
//! columns: a value that is looked up is identical to one that was streamed.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::Mutex;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::types::Type;
use wallaby_connector_api::{
    DatabaseIdentity, ForeignKey, KeyValues, SinkError, SourceColumn, SourceColumns, SourceLookup, SourceRow,
    SourceRows, TableExtra, TableExtras, TableIndex,
};
use wallaby_model::schema::{quote_identifier, quote_literal};
use wallaby_model::{Lsn, ReplicaIdentity, TableChanges, TableName, TableSchema};

use crate::assemble::{RelationShape, ShapeColumn, single_row};
use crate::catalog;
use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::SourceError;
use crate::metrics;

/// Rows that are asked for before the first of them has come.
const ON_THE_WAY: usize = 8;

/// Reads rows over a connection that is opened when it is first needed, and again when it was lost.
pub struct Lookup {
    config: ConnectConfig,
    publication: String,
    control: Mutex<Option<Control>>,
}

impl Lookup {
    /// Connects to nothing yet. The publication says which columns are sent.
    pub fn new(config: ConnectConfig, publication: &str) -> Lookup {
        Lookup { config, publication: publication.to_owned(), control: Mutex::new(None) }
    }

    /// Asks over the connection, which stays for the next question.
    async fn ask<T>(&self, question: impl AsyncFnOnce(&Control) -> Result<T, SourceError>) -> Result<T, SourceError> {
        let mut slot = self.control.lock().await;
        let control = match slot.take() {
            Some(control) if !control.is_closed() => control,
            _ => connect_control(&self.config).await?,
        };
        let answer = question(&control).await;
        *slot = Some(control);
        answer
    }

    async fn read_over(
        &self,
        control: &Control,
        table: &TableSchema,
        keys: &[KeyValues],
        bytes_max: usize,
    ) -> Result<SourceRows, SourceError> {
        let Some(current) = current_shape(control, &self.publication, table.oid, &table.table).await? else {
            return Ok(SourceRows { keys: keys.len(), rows: Vec::new() });
        };
        let schema = Arc::new(catalog::resolve(control, &current.shape).await?);
        let from = current.rows_of();
        // Statements of their own, so that each row is found as any index on its key finds it; several on their way at a time.
        let questions: Vec<String> = keys.iter().map(|key| select_sql(&schema, &from, table, key)).collect();
        let mut answers = stream::iter(questions).map(|sql| row_over(control, &schema, sql)).buffered(ON_THE_WAY);
        let (mut found, mut bytes) = (SourceRows::default(), 0);
        while let Some(row) = answers.next().await {
            metrics::lookup();
            found.keys += 1;
            if let Some(row) = row? {
                bytes += row.tables.iter().map(TableChanges::bytes).sum::<usize>();
                found.rows.push(row);
            }
            if bytes >= bytes_max {
                break;
            }
        }
        Ok(found)
    }
}

async fn row_over(control: &Control, schema: &Arc<TableSchema>, sql: String) -> Result<SourceRow, SourceError> {
    let during = || format!("reading a row of {} by its key", schema.table);
    let messages = control.simple_query(&sql).await;
    let messages = messages.map_err(|error| SourceError::from_client(during(), &error))?;
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message {
            let cells: Vec<Option<&[u8]>> =
                (0..schema.columns.len()).map(|index| row.get(index).map(str::as_bytes)).collect();
            return single_row(schema, &cells).map(Some);
        }
    }
    Ok(None)
}

fn select_sql(schema: &TableSchema, from: &str, asked: &TableSchema, key: &KeyValues) -> String {
    let columns: Vec<String> = schema.columns.iter().map(|column| quote_identifier(&column.name)).collect();
    let conditions = asked.key().into_iter().zip(key).filter_map(|(index, value)| {
        let column = asked.columns.get(usize::from(index))?;
        let name = quote_identifier(&column.name);
        Some(match value {
            // The literal takes the column's type, so an index on it is used.
            Some(value) => format!("{name} = {}", quote_literal(value)),
            None => format!("{name} IS NULL"),
        })
    });
    let conditions: Vec<String> = conditions.collect();
    let condition = if conditions.is_empty() { "false".to_owned() } else { conditions.join(" AND ") };
    let columns = if columns.is_empty() { "NULL".to_owned() } else { columns.join(", ") };
    format!("SELECT {columns} FROM {from} WHERE {condition} LIMIT 1")
}

/// A primary key that is checked only at the end of a transaction (DEFERRABLE) is no identity, and the stream marks none of its columns.
const SHAPE_SQL: &str = "
SELECT c.oid, n.nspname::text, c.relname::text, c.relreplident::text, a.attname::text, a.atttypid, a.atttypmod,
       CASE c.relreplident
         WHEN 'f' THEN true
         WHEN 'n' THEN false
         ELSE coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
       END,
       c.relkind = 'p'
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indimmediate
  AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
LEFT JOIN pg_catalog.pg_publication_tables p ON p.pubname = $4 AND p.schemaname = n.nspname AND p.tablename = c.relname
WHERE (c.oid = $1 OR (n.nspname = $2 AND c.relname = $3))
  AND coalesce(to_jsonb(p)->'attnames' ? a.attname::text, a.attgenerated = '')
ORDER BY c.oid = $1 DESC, a.attnum";

/// A table as it is now.
pub(crate) struct CurrentShape {
    /// Its shape as the stream would describe it.
    pub(crate) shape: RelationShape,
    /// Its rows are those of its partitions.
    is_partitioned: bool,
}

impl CurrentShape {
    /// What follows FROM for its own rows: those of tables that inherit from it are published as theirs.
    fn rows_of(&self) -> String {
        let only = if self.is_partitioned { "" } else { "ONLY " };
        format!("{only}{}", self.shape.table.quoted())
    }
}

/// The table's shape as the stream would describe it now; `None` when the table is gone.
pub(crate) async fn current_shape(
    control: &Control,
    publication: &str,
    oid: u32,
    name: &TableName,
) -> Result<Option<CurrentShape>, SourceError> {
    let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 4] =
        [(&oid, Type::OID), (&name.schema, Type::TEXT), (&name.name, Type::TEXT), (&publication, Type::TEXT)];
    let rows = control.query_typed(SHAPE_SQL, &arguments).await;
    let rows = rows.map_err(|error| SourceError::from_client(format!("looking up {name}"), &error))?;
    let Some(first) = rows.first() else { return Ok(None) };
    let oid: u32 = first.get(0);
    let identity = match first.get::<_, String>(3).as_str() {
        "n" => ReplicaIdentity::Nothing,
        "f" => ReplicaIdentity::Full,
        "i" => ReplicaIdentity::Index,
        _ => ReplicaIdentity::Default,
    };
    // A renamed table and a new one of its old name both match: the one with the oid is meant.
    let columns = rows.iter().filter(|row| row.get::<_, u32>(0) == oid).map(|row| ShapeColumn {
        name: row.get(4),
        type_oid: row.get(5),
        type_modifier: row.get(6),
        identity: row.get(7),
    });
    let table = TableName::new(first.get::<_, String>(1), first.get::<_, String>(2));
    let shape = RelationShape { oid, table, identity, columns: columns.collect() };
    Ok(Some(CurrentShape { shape, is_partitioned: first.get(8) }))
}

/// Indexes that are no constraint's. The definition is cut where the table's name ends, which is built the way Postgres builds it:
/// what does not begin like that is not ours to take apart.
const INDEXES_SQL: &str = "
SELECT i.relname::text, x.indisunique, substr(d.definition, length(d.beginning) + 1)
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_index x ON x.indrelid = c.oid
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
CROSS JOIN LATERAL (
  SELECT pg_get_indexdef(i.oid) AS definition,
         format('CREATE %sINDEX %I ON %s%I.%I ', CASE WHEN x.indisunique THEN 'UNIQUE ' ELSE '' END, i.relname,
                CASE WHEN i.relkind = 'I' THEN 'ONLY ' ELSE '' END, n.nspname, c.relname) AS beginning) d
WHERE n.nspname = $1 AND c.relname = $2 AND x.indisvalid AND x.indislive AND NOT x.indisprimary
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = i.oid AND k.contype IN ('p', 'u', 'x'))
  AND starts_with(d.definition, d.beginning)
ORDER BY 1";

const CONSTRAINTS_SQL: &str = "
SELECT k.conname::text, pg_get_constraintdef(k.oid)
FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = $2 AND k.contype IN ('c', 'u', 'x')
ORDER BY k.contype = 'c', 1";

const FOREIGN_KEYS_SQL: &str = "
SELECT k.conname::text, rn.nspname::text, r.relname::text,
       (SELECT array_agg(a.attname::text ORDER BY u.n) FROM unnest(k.conkey) WITH ORDINALITY u(attnum, n)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum),
       (SELECT array_agg(a.attname::text ORDER BY u.n) FROM unnest(k.confkey) WITH ORDINALITY u(attnum, n)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.attnum)
FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class r ON r.oid = k.confrelid
JOIN pg_catalog.pg_namespace rn ON rn.oid = r.relnamespace
WHERE n.nspname = $1 AND c.relname = $2 AND k.contype = 'f' AND k.convalidated
ORDER BY 1";

/// Not those that take the next number of a sequence (`bigserial`): the sequence counts here, and each row comes with its number. Those of
/// identity columns are no defaults to begin with.
const DEFAULTS_SQL: &str = "
SELECT a.attname::text, pg_get_expr(d.adbin, d.adrelid)
FROM pg_catalog.pg_attrdef d
JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
JOIN pg_catalog.pg_class c ON c.oid = d.adrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = $2 AND a.attgenerated = '' AND NOT a.attisdropped
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend u JOIN pg_catalog.pg_class s ON s.oid = u.refobjid AND s.relkind = 'S'
                  WHERE u.classid = 'pg_catalog.pg_attrdef'::regclass AND u.objid = d.oid AND u.refclassid = 'pg_catalog.pg_class'::regclass)
ORDER BY a.attnum";

/// What rows have in columns that are newer than they. The value is kept in an array of one element, and for each partition by itself:
/// when they do not agree, nobody can tell.
const FILLED_SQL: &str = "
SELECT l.attname::text, min(array_to_string(l.attmissingval, ''))
FROM (SELECT $1::oid AS relid UNION SELECT t.relid FROM pg_catalog.pg_partition_tree($1) t) r
JOIN pg_catalog.pg_attribute l ON l.attrelid = r.relid AND l.atthasmissing AND NOT l.attisdropped
GROUP BY 1 HAVING count(DISTINCT array_to_string(l.attmissingval, '')) = 1";

/// Where WAL is written, or replayed on a standby.
const WAL_SQL: &str = "
SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text";

async fn columns_over(control: &Control, publication: &str, table: &TableName) -> Result<SourceColumns, SourceError> {
    let failed = |error| SourceError::from_client(format!("reading the columns of {table}"), &error);
    // After it: what was committed up to here is in the catalog that is looked at. Before it, the catalog could be the older one.
    let found = current_shape(control, publication, 0, table).await?;
    let at = control.query_typed_one(WAL_SQL, &[]).await.map_err(failed)?.get::<_, String>(0);
    let at = at.parse::<Lsn>().unwrap_or(Lsn::ZERO);
    let Some(current) = found else { return Ok(SourceColumns { at, columns: Vec::new() }) };
    let rows = control.query_typed(FILLED_SQL, &[(&current.shape.oid, Type::OID)]).await;
    let rows = rows.map_err(failed)?;
    let mut filled: HashMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let column = |column: ShapeColumn| SourceColumn { filled: filled.remove(&column.name), name: column.name };
    Ok(SourceColumns { at, columns: current.shape.columns.into_iter().map(column).collect() })
}

async fn database_over(control: &Control) -> Result<Option<DatabaseIdentity>, SourceError> {
    let rows = control.query_typed(DatabaseIdentity::SQL, &[]).await;
    let rows = rows.map_err(|error| SourceError::from_client("asking which database this is", &error))?;
    Ok(rows.first().map(|row| DatabaseIdentity { started_at_micros: row.get(0), oid: row.get(1) }))
}

async fn extras_over(control: &Control, table: &TableName) -> Result<TableExtras, SourceError> {
    let during = || format!("reading indexes and constraints of {table}");
    let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
        [(&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
    let mut rows = Vec::new();
    for sql in [INDEXES_SQL, CONSTRAINTS_SQL, FOREIGN_KEYS_SQL, DEFAULTS_SQL] {
        let found = control.query_typed(sql, &arguments).await;
        rows.push(found.map_err(|error| SourceError::from_client(during(), &error))?);
    }
    let [indexes, constraints, foreign_keys, defaults] = rows.as_slice() else { return Ok(TableExtras::default()) };
    let extra = |row: &tokio_postgres::Row| TableExtra { name: row.get(0), definition: row.get(1) };
    let index = |row: &tokio_postgres::Row| TableIndex { name: row.get(0), is_unique: row.get(1), using: row.get(2) };
    let foreign_key = |row: &tokio_postgres::Row| ForeignKey {
        name: row.get(0),
        columns: row.get(3),
        references: TableName::new(row.get::<_, String>(1), row.get::<_, String>(2)),
        referenced: row.get(4),
    };
    Ok(TableExtras {
        indexes: indexes.iter().map(index).collect(),
        constraints: constraints.iter().map(extra).collect(),
        foreign_keys: foreign_keys.iter().map(foreign_key).collect(),
        defaults: defaults.iter().map(extra).collect(),
    })
}

/// In a sink's terms; `what` as in "rows".
fn for_a_sink(error: &SourceError, what: &str) -> SinkError {
    if error.is_transient() {
        return SinkError::Transient(error.to_string());
    }
    let remedy = error.remedy().unwrap_or_default();
    SinkError::Configuration { reason: format!("the source cannot be asked for {what}: {error}"), remedy }
}

#[async_trait]
impl SourceLookup for Lookup {
    async fn row_by_key(&self, table: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError> {
        let found = self.rows_by_keys(table, std::slice::from_ref(key), usize::MAX).await?;
        Ok(found.rows.into_iter().next())
    }

    async fn rows_by_keys(
        &self,
        table: &Arc<TableSchema>,
        keys: &[KeyValues],
        bytes_max: usize,
    ) -> Result<SourceRows, SinkError> {
        let found = self.ask(async |control| self.read_over(control, table, keys, bytes_max).await).await;
        found.map_err(|error| for_a_sink(&error, "rows"))
    }

    async fn database(&self) -> Result<Option<DatabaseIdentity>, SinkError> {
        let database = self.ask(async |control| database_over(control).await).await;
        database.map_err(|error| for_a_sink(&error, "its identity"))
    }

    async fn columns(&self, table: &TableName) -> Result<SourceColumns, SinkError> {
        let columns = self.ask(async |control| columns_over(control, &self.publication, table).await).await;
        columns.map_err(|error| for_a_sink(&error, "columns"))
    }

    async fn extras(&self, table: &TableName) -> Result<TableExtras, SinkError> {
        let extras = self.ask(async |control| extras_over(control, table).await).await;
        extras.map_err(|error| for_a_sink(&error, "indexes and constraints"))
    }
}
