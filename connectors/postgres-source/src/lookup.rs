//! A row of the source by its key, for a sink that met a change without all of its values.
//!
//! The row is read with the simple protocol, whose text forms are those of the WAL stream, and goes through the same
//! columns: a value that is looked up is identical to one that was streamed.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::types::Type;
use wallaby_connector_api::{KeyValues, SinkError, SourceLookup, SourceRow};
use wallaby_model::schema::{quote_identifier, quote_literal};
use wallaby_model::{ReplicaIdentity, TableName, TableSchema};

use crate::assemble::{RelationShape, ShapeColumn, single_row};
use crate::catalog;
use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::SourceError;
use crate::metrics;

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

    async fn read(&self, table: &TableSchema, key: &KeyValues) -> Result<SourceRow, SourceError> {
        let mut slot = self.control.lock().await;
        let control = match slot.take() {
            Some(control) if !control.is_closed() => control,
            _ => connect_control(&self.config).await?,
        };
        let row = self.read_over(&control, table, key).await;
        *slot = Some(control);
        metrics::lookup();
        row
    }

    async fn read_over(
        &self,
        control: &Control,
        table: &TableSchema,
        key: &KeyValues,
    ) -> Result<SourceRow, SourceError> {
        let Some(shape) = current_shape(control, &self.publication, table.oid, &table.table).await? else {
            return Ok(None);
        };
        let schema = catalog::resolve(control, &shape).await?;
        let sql = select_sql(&schema, table, key);
        let during = || format!("reading a row of {} by its key", schema.table);
        let messages = control.simple_query(&sql).await;
        let messages = messages.map_err(|error| SourceError::from_client(during(), &error))?;
        for message in messages {
            if let SimpleQueryMessage::Row(row) = message {
                let cells: Vec<Option<&[u8]>> =
                    (0..schema.columns.len()).map(|index| row.get(index).map(str::as_bytes)).collect();
                return single_row(&Arc::new(schema), &cells).map(Some);
            }
        }
        Ok(None)
    }
}

fn select_sql(schema: &TableSchema, asked: &TableSchema, key: &KeyValues) -> String {
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
    format!("SELECT {columns} FROM {} WHERE {condition} LIMIT 1", schema.table.quoted())
}

const SHAPE_SQL: &str = "
SELECT c.oid, n.nspname::text, c.relname::text, c.relreplident::text, a.attname::text, a.atttypid, a.atttypmod,
       CASE c.relreplident
         WHEN 'f' THEN true
         WHEN 'n' THEN false
         ELSE coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
       END
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
LEFT JOIN pg_catalog.pg_publication_tables p ON p.pubname = $4 AND p.schemaname = n.nspname AND p.tablename = c.relname
WHERE (c.oid = $1 OR (n.nspname = $2 AND c.relname = $3))
  AND coalesce(to_jsonb(p)->'attnames' ? a.attname::text, a.attgenerated = '')
ORDER BY c.oid = $1 DESC, a.attnum";

/// The table's shape as the stream would describe it now; `None` when the table is gone.
pub(crate) async fn current_shape(
    control: &Control,
    publication: &str,
    oid: u32,
    name: &TableName,
) -> Result<Option<RelationShape>, SourceError> {
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
    Ok(Some(RelationShape {
        oid,
        table: TableName::new(first.get::<_, String>(1), first.get::<_, String>(2)),
        identity,
        columns: columns.collect(),
    }))
}

#[async_trait]
impl SourceLookup for Lookup {
    async fn row_by_key(&self, table: &Arc<TableSchema>, key: &KeyValues) -> Result<SourceRow, SinkError> {
        self.read(table, key).await.map_err(|error| {
            if error.is_transient() {
                SinkError::Transient(error.to_string())
            } else {
                let remedy = error.remedy().unwrap_or_default();
                SinkError::Configuration { reason: format!("the source cannot be asked for a row: {error}"), remedy }
            }
        })
    }
}
