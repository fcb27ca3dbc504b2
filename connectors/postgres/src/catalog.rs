//! Reads what the sink's catalog says of a table, and brings the table into shape.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;
use wallaby_connector_api::{SinkError, SourceColumns, SourceLookup};
use wallaby_model::schema::quote_identifier;
use wallaby_model::{Position, TableName, TableSchema, TaskId};

use crate::columns;
use crate::error::{Doing, PostgresError};
use crate::metrics::COLUMNS_AS_TEXT;
use crate::schema::{Existing, ExistingColumn, Extra, Misfit, Target, Wanted, addition, plan, target};
use crate::session::Session;

/// Columns of earlier shapes, by the table at the source, that may stay at the sink for now.
#[derive(Debug, Default)]
pub(crate) struct Leniency(HashMap<TableName, HashSet<String>>);

impl Leniency {
    fn of(&self, table: &TableName) -> impl Iterator<Item = &String> {
        self.0.get(table).into_iter().flatten()
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
                Wanted { oid, modifier, sql: column.sql_type.clone(), as_text: false, filled: None }
            }
            (None, Some(oid)) => {
                Wanted { oid, modifier: column.type_modifier, sql: row.get(2), as_text: false, filled: None }
            }
            (None, None) => Wanted { oid: TEXT, modifier: -1, sql: "text".to_owned(), as_text: true, filled: None },
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

/// Whose shape a table is brought into.
#[derive(Clone, Copy)]
pub(crate) enum Of<'a> {
    /// That of a table that is about to be loaded: of a chunk.
    Prepared,
    /// That of a chunk. One of a later snapshot may lack a column that was dropped meanwhile: the log will say so in its place.
    Chunk,
    /// That of rows of the log. Columns of these earlier shapes may stay.
    Log(&'a Leniency),
}

/// Brings tables into shape, inside the transaction of who writes.
pub(crate) struct Fitting<'a> {
    pub session: &'a Session,
    /// The apply task, also where one of its load tasks does this.
    pub task: &'a TaskId,
    pub lookup: &'a dyn SourceLookup,
    /// The sink's name, for its metrics.
    pub sink: &'a str,
}

impl Fitting<'_> {
    /// Brings `here` into the shape of `schema`. `first` is the first row in that shape: where the sink stops when a person has to
    /// act.
    pub(crate) async fn fit(
        &self,
        schema: &Arc<TableSchema>,
        here: &TableName,
        first: Position,
        of: Of<'_>,
    ) -> Result<Target, PostgresError> {
        let misfit = |misfit: Misfit| PostgresError::Shape { reason: misfit.reason, remedy: misfit.remedy, first };
        let client = &self.session.client;
        let mut existing = read_existing(client, here).await?;
        if existing.is_none() {
            make_schema(client, &here.schema).await?;
        }
        let mut wanted = read_wanted(client, schema).await?;
        let learned = self.learn((schema, here), existing.as_mut(), &mut wanted, first, of).await?;
        let extra = if let Of::Chunk = of { Extra::Any } else { Extra::These(&learned.may_stay) };
        let statements = plan(schema, here, &wanted, existing.as_ref(), extra).map_err(misfit)?;
        if !statements.is_empty() {
            // A change of a table that waits makes every reader behind it wait too: better to try again.
            lock_timeout(client, DDL_LOCK_TIMEOUT).await?;
        }
        for statement in &statements {
            tracing::info!(table = %here, statement, "changing a table at the sink");
            client.batch_execute(statement).await.doing(|| format!("running {statement} at the sink"))?;
        }
        if !statements.is_empty() {
            lock_timeout(client, "0").await?;
        }
        self.note(schema, existing.as_ref(), &wanted, &learned, of).await?;
        let as_text = schema.columns.iter().zip(&wanted).filter(|(_, wanted)| wanted.as_text);
        for (column, _) in as_text {
            tracing::warn!(table = %here, column = column.name, r#type = column.sql_type, "type unknown at the sink: kept as text");
            metrics::counter!(COLUMNS_AS_TEXT, "sink" => self.sink.to_owned()).increment(1);
        }
        let existing = match existing {
            Some(existing) if statements.is_empty() => Some(existing),
            _ => read_existing(client, here).await?,
        };
        let vanished =
            || Misfit { reason: format!("{here} vanished at the sink"), remedy: "wallaby resume".to_owned() };
        let existing = existing.ok_or_else(|| misfit(vanished()))?;
        target(schema, here, &existing, false).map_err(misfit)
    }

    /// Completes what is known of a table. Nobody is asked as long as rows of the log meet a table that has their columns and no others; for
    /// a load the source is asked always: its shape may be ahead of the log.
    async fn learn(
        &self,
        (schema, target): (&TableSchema, &TableName),
        mut existing: Option<&mut Existing>,
        wanted: &mut [Wanted],
        first: Position,
        of: Of<'_>,
    ) -> Result<Learned, PostgresError> {
        let is_in_shape = |name: &str| schema.columns.iter().any(|column| column.name == name);
        let here = existing.as_deref();
        let has_others = here.is_some_and(|here| here.columns.iter().any(|column| !is_in_shape(&column.name)));
        let is_new = here.is_none();
        let missing: HashSet<&str> = match here {
            Some(here) => schema
                .columns
                .iter()
                .map(|column| column.name.as_str())
                .filter(|name| here.column(name).is_none())
                .collect(),
            None => HashSet::new(),
        };
        let is_to_add = !missing.is_empty();
        let mut learned = Learned::default();
        if let Some(existing) = existing.as_mut().filter(|_| has_others) {
            let known = columns::read(&self.session.client, self.task, &schema.table).await?;
            for column in existing.columns.iter_mut().filter(|column| known.known.contains(&column.name)) {
                column.fills_itself = false;
            }
            if let Of::Log(earlier) = of {
                learned.may_stay.extend(known.early(first));
                learned.may_stay.extend(earlier.of(&schema.table).cloned());
            }
        }
        let is_asked = match of {
            Of::Prepared => true,
            Of::Chunk => is_to_add || is_new,
            Of::Log(_) => is_to_add,
        };
        if is_asked {
            let source = self.session.wait_for(self.lookup.columns(&schema.table)).await?;
            let additions =
                schema.columns.iter().zip(&*wanted).filter(|(column, _)| missing.contains(column.name.as_str()));
            let additions = additions.map(|(column, wanted)| addition(target, &column.name, &wanted.sql));
            let source =
                source.map_err(|error| without_source(error, &schema.table, &additions.collect::<Vec<_>>()))?;
            for (column, wanted) in schema.columns.iter().zip(wanted) {
                let there = source.columns.iter().find(|there| there.name == column.name);
                wanted.filled = there.and_then(|there| there.filled.clone());
                if column.not_null && wanted.filled.is_none() && missing.contains(column.name.as_str()) {
                    tracing::warn!(table = %schema.table, column = column.name, "rows that are here get NULL in a new column that has none at the source, which does not say any more what they have in it: load the table anew (wallaby snapshot start)");
                }
            }
            if let Of::Prepared = of {
                learned.may_stay.extend(source.columns.iter().map(|column| column.name.clone()));
            }
            learned.source = source;
        }
        Ok(learned)
    }

    /// Notes of columns what the next shape is judged by.
    async fn note(
        &self,
        schema: &TableSchema,
        existing: Option<&Existing>,
        wanted: &[Wanted],
        learned: &Learned,
        of: Of<'_>,
    ) -> Result<(), PostgresError> {
        let (client, table) = (&self.session.client, &schema.table);
        let names = || schema.columns.iter().map(|column| column.name.as_str());
        let is_new = |name: &str| existing.is_none_or(|existing| existing.column(name).is_none());
        let here = existing.iter().flat_map(|here| &here.columns).map(|column| column.name.as_str());
        columns::forget_others(client, self.task, table, &names().chain(here).collect::<Vec<_>>()).await?;
        let is_filled =
            |name: &str| names().zip(wanted).any(|(known, wanted)| known == name && wanted.filled.is_some());
        let constant: Vec<&str> = names().filter(|name| is_new(name) && is_filled(name)).collect();
        if !constant.is_empty() {
            columns::put_constant(client, self.task, table, &constant, true).await?;
        }
        let fills =
            |name: &str| existing.and_then(|existing| existing.column(name)).is_some_and(|here| here.fills_itself);
        let known: Vec<&str> = names().filter(|name| fills(name)).collect();
        if !known.is_empty() {
            columns::put_known(client, self.task, table, &known).await?;
        }
        let at_source = |name: &&str| learned.source.columns.iter().any(|column| column.name == **name);
        let early: Vec<&str> = match of {
            Of::Prepared => learned.source.columns.iter().map(|column| column.name.as_str()).collect(),
            Of::Chunk => names().filter(|name| is_new(name)).filter(at_source).collect(),
            Of::Log(_) => return columns::met(client, self.task, table, &names().collect::<Vec<_>>()).await,
        };
        if early.is_empty() {
            return Ok(());
        }
        columns::put_early(client, self.task, table, &early, learned.source.at).await
    }
}

/// What is known of a table before it is brought into shape.
#[derive(Default)]
struct Learned {
    /// Columns that may stay although the shape does not have them.
    may_stay: HashSet<String>,
    /// What the source has, if it was asked.
    source: SourceColumns,
}

/// Why a shape is not taken while the source cannot be asked, with the way out.
fn without_source(error: SinkError, table: &TableName, additions: &[String]) -> SinkError {
    if additions.is_empty() {
        return error;
    }
    let way_out = format!(
        "a new column of {table} waits for the source to say what older rows have in it; to go on without the source, run at the sink, with \
         a DEFAULT where older rows are not NULL: {}",
        additions.join("; ")
    );
    match error {
        SinkError::Transient(reason) => SinkError::Transient(format!("{reason}: {way_out}")),
        SinkError::Configuration { reason, remedy } => {
            SinkError::Configuration { reason, remedy: format!("{remedy}; {way_out}") }
        }
        other => other,
    }
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
