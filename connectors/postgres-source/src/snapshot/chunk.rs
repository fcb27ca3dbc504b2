//! One chunk: a range of pages of one relation, read under the run's snapshot.
//!
//! Under a snapshot that is older than a rewrite (ALTER TYPE, VACUUM FULL, CLUSTER, TRUNCATE) Postgres shows *no rows, without an
//! error*: so the relation is locked against rewrites first, and its relfilenode compared with the one that it had under the
//! snapshot (hazard 1). The lock is the weakest there is, is not waited for for long, and is given back when somebody needs
//! the table for himself (architecture.md, invariant 10).

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep;
use tokio_postgres::types::Type;
use wallaby_model::condition::Timestamp;
use wallaby_model::run::PlannedRelation;
use wallaby_model::schema::quote_identifier;
use wallaby_model::{ColumnType, Lsn, SegmentBody, TableSchema, Transaction};

use super::sql::{self, Argument};
use super::throttle::Throttle;
use crate::assemble::{CopiedRows, RelationShape};
use crate::catalog;
use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::SourceError;
use crate::lookup::current_shape;

/// How long the lock on the relation is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// How long a chunk is read before it is looked whether somebody waits for the relation: most are done by then.
const HOLD_UNSEEN: Duration = Duration::from_secs(1);
/// Time between two such looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What is to be read.
#[derive(Clone, Debug)]
pub struct ChunkRequest {
    /// The exported snapshot's name.
    pub snapshot: String,
    /// Its consistent point: the commit LSN of the rows.
    pub consistent_point: Lsn,
    /// When it was exported: the commit time of the rows.
    pub exported_at: Timestamp,
    /// Says which columns and rows are sent.
    pub publication: String,
    /// The relation as it was planned under this snapshot.
    pub relation: PlannedRelation,
    /// Which of its chunks.
    pub number: u32,
    /// Content at which a part is cut, in bytes.
    pub part_bytes: usize,
    /// At most this many rows a second.
    pub rows_per_second: Option<u64>,
}

/// Takes the parts of a chunk, in order. While it does, nothing is read.
pub trait PartSink: Send {
    /// Its errors, and those of the source.
    type Error: From<SourceError> + Send;

    /// Takes a part: rows of one table, all inserts, of one transaction at the consistent point.
    ///
    /// # Errors
    /// End the reading of the chunk.
    fn part(&mut self, body: SegmentBody) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Told that rows of so many bytes were received that are a part of their own. May wait; what it returns is kept until the part
    /// was taken.
    fn huge_row(&mut self, bytes: usize) -> impl Future<Output = Option<OwnedSemaphorePermit>> + Send {
        let _ = bytes;
        async { None }
    }

    /// Told between parts: rows and received bytes of the chunk so far.
    fn progress(&mut self, rows: u64, bytes: u64) {
        let _ = (rows, bytes);
    }
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ChunkRead {
    /// Rows.
    pub rows: u64,
    /// Bytes that were received.
    pub bytes: u64,
    /// Parts; at least one.
    pub parts: u32,
}

/// Reads a chunk into parts, at least one, which says the table's shape. Nothing counts of a chunk whose reading failed: its parts
/// are to be thrown away. Cancel-safe: dropped, it cuts its session.
///
/// # Errors
/// `SnapshotGone`, `Rewritten`, `RelationGone`: another snapshot is needed. `TableBusy`: try again. Else what the server says, or the
/// sink.
pub async fn read_chunk<S: PartSink>(
    config: &ConnectConfig,
    request: &ChunkRequest,
    sink: &mut S,
) -> Result<ChunkRead, S::Error> {
    let control = sql::patient(config).await?;
    let _cut = control.cut_on_drop();
    let pid = sql::backend_pid(&control).await?;
    let chunk = Chunk { control: &control, request };
    let (schema, statement) = chunk.prepare().await?;
    let read = {
        let wanted = pin!(wanted_by_others(config, request.relation.oid, pid));
        let copy = pin!(chunk.copy(schema, &statement, sink));
        match futures::future::select(copy, wanted).await {
            futures::future::Either::Left((read, _)) => read?,
            futures::future::Either::Right((error, _)) => return Err(error.into()),
        }
    };
    // The lock is still held: this can only fail if the check before the copy was wrong.
    chunk.check_unchanged().await?;
    Ok(read)
}

/// Returns when another session waits for the relation, or cannot be looked for.
async fn wanted_by_others(config: &ConnectConfig, oid: u32, pid: i32) -> SourceError {
    const WAITING_SQL: &str = "
SELECT w.pid FROM pg_catalog.pg_locks w
WHERE w.locktype = 'relation' AND w.relation = $1 AND NOT w.granted AND w.mode = 'AccessExclusiveLock'
  AND w.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) AND w.pid <> $2
LIMIT 1";
    sleep(HOLD_UNSEEN).await;
    let control = match connect_control(config).await {
        Ok(control) => control,
        Err(error) => return error,
    };
    loop {
        match control.query_typed(WAITING_SQL, &[(&oid, Type::OID), (&pid, Type::INT4)]).await {
            Ok(rows) if rows.is_empty() => sleep(LOOK_EVERY).await,
            Ok(_) => {
                let why = "it waits for an exclusive lock";
                return SourceError::TableBusy { table: relation_name(&control, oid).await, why };
            }
            Err(error) => return SourceError::from_client("looking who waits for a table", &error),
        }
    }
}

async fn relation_name(control: &Control, oid: u32) -> wallaby_model::TableName {
    let sql = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1";
    let row = control.query_typed_opt(sql, &[(&oid, Type::OID)]).await.ok().flatten();
    let name = |index: usize| row.as_ref().map_or_else(|| "?".to_owned(), |row| row.get::<_, String>(index));
    wallaby_model::TableName::new(name(0), name(1))
}

struct Chunk<'a> {
    control: &'a Control,
    request: &'a ChunkRequest,
}

/// A column of the relation that is read, which may be a partition with another order of columns than the published table.
struct RelationColumn {
    name: String,
    number: i16,
    /// The output function of its type, as SQL.
    output: String,
}

const RELATION_COLUMNS_SQL: &str = "
SELECT a.attname::text, a.attnum, pg_catalog.format('%I.%I', n.nspname, f.proname)
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
JOIN pg_catalog.pg_proc f ON f.oid = t.typoutput
JOIN pg_catalog.pg_namespace n ON n.oid = f.pronamespace
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped";

const FILTER_SQL: &str = "
SELECT pg_catalog.to_jsonb(p)->>'rowfilter' FROM pg_catalog.pg_publication_tables p
WHERE p.pubname = $1 AND p.schemaname = $2 AND p.tablename = $3";

impl Chunk<'_> {
    fn during(&self) -> String {
        format!("reading {}", self.request.relation.relation)
    }

    fn failed(&self, error: &tokio_postgres::Error) -> SourceError {
        SourceError::from_client(self.during(), error)
    }

    fn gone(&self) -> SourceError {
        SourceError::RelationGone { table: self.request.relation.relation.clone() }
    }

    fn rewritten(&self, what: impl Into<String>) -> SourceError {
        SourceError::Rewritten { table: self.request.relation.relation.clone(), what: what.into() }
    }

    /// Imports the snapshot, locks the relation, and makes sure that the snapshot shows all of it.
    async fn prepare(&self) -> Result<(Arc<TableSchema>, String), SourceError> {
        sql::import(self.control, &self.request.snapshot).await?;
        self.lock().await?;
        self.check_unchanged().await?;
        let relation = &self.request.relation;
        let shape = current_shape(self.control, &self.request.publication, 0, &relation.table).await?;
        let shape = match shape {
            Some(current) => current.shape,
            None => self.without_columns().await?,
        };
        let schema = catalog::resolve_quietly(self.control, &shape).await?;
        let statement = self.statement(&schema).await?;
        Ok((Arc::new(schema), statement))
    }

    /// The shape of a table that has no columns: the catalog has no row of one, but the publication has the table.
    async fn without_columns(&self) -> Result<RelationShape, SourceError> {
        self.row_filter().await?;
        let relation = &self.request.relation;
        let identity = wallaby_model::ReplicaIdentity::Default;
        Ok(RelationShape { oid: relation.oid, table: relation.table.clone(), identity, columns: Vec::new() })
    }

    async fn lock(&self) -> Result<(), SourceError> {
        let sql = format!(
            "SET LOCAL lock_timeout = {}; LOCK TABLE ONLY {} IN ACCESS SHARE MODE; SET LOCAL lock_timeout = 0",
            LOCK_WAIT.as_millis(),
            self.request.relation.relation.quoted()
        );
        let Err(error) = self.control.batch_execute(&sql).await else { return Ok(()) };
        Err(match error.code().map(tokio_postgres::error::SqlState::code) {
            Some("55P03") => SourceError::TableBusy {
                table: self.request.relation.relation.clone(),
                why: "it holds, or waits for, an exclusive lock",
            },
            Some("42P01" | "3F000" | "42809") => self.gone(),
            _ => self.failed(&error),
        })
    }

    /// Whether the name still means the relation, and the relation is the one that the snapshot saw. These functions look past
    /// the snapshot, at what is now; the lock makes that last.
    async fn check_unchanged(&self) -> Result<(), SourceError> {
        let relation = &self.request.relation;
        let sql = "SELECT pg_catalog.to_regclass($1)::oid, coalesce(pg_catalog.pg_relation_filenode(pg_catalog.to_regclass($1)), 0::oid)";
        let name = relation.relation.quoted();
        let row = self.control.query_typed_one(sql, &[(&name, Type::TEXT)]).await;
        let row = row.map_err(|error| self.failed(&error))?;
        if row.get::<_, Option<u32>>(0) != Some(relation.oid) {
            return Err(self.gone());
        }
        let filenode: u32 = row.get(1);
        if filenode != relation.relfilenode {
            return Err(self.rewritten(format!("it was rewritten (file {} became {filenode})", relation.relfilenode)));
        }
        Ok(())
    }

    /// The COPY statement for the shape.
    async fn statement(&self, schema: &TableSchema) -> Result<String, SourceError> {
        let relation = &self.request.relation;
        let columns = self.control.query_typed(RELATION_COLUMNS_SQL, &[(&relation.oid, Type::OID)]).await;
        let columns: Vec<RelationColumn> = columns
            .map_err(|error| self.failed(&error))?
            .iter()
            .map(|row| RelationColumn { name: row.get(0), number: row.get(1), output: row.get(2) })
            .collect();
        let mut chosen = Vec::with_capacity(schema.columns.len());
        for column in &schema.columns {
            let found = columns.iter().find(|known| known.name == column.name);
            chosen.push(found.ok_or_else(|| self.rewritten(format!("column {} is missing", column.name)))?);
        }
        self.check_columns(&columns).await?;
        let expressions = schema.columns.iter().zip(&chosen).map(|(column, known)| expression(column, known));
        let expressions: Vec<String> = expressions.collect();
        let mut conditions = Vec::new();
        let (from, to) = relation.pages_of(self.request.number);
        if from > 0 {
            conditions.push(format!("ctid >= '({from},0)'::pg_catalog.tid"));
        }
        if let Some(to) = to {
            conditions.push(format!("ctid < '({to},0)'::pg_catalog.tid"));
        }
        if let Some(filter) = self.row_filter().await? {
            conditions.push(format!("({filter})"));
        }
        let condition =
            if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
        Ok(format!(
            "COPY (SELECT {} FROM ONLY {}{condition}) TO STDOUT (FORMAT binary)",
            expressions.join(", "),
            relation.relation.quoted()
        ))
    }

    /// A column that was dropped, renamed, or dropped and made again since the snapshot: `*` stands for the columns that there are
    /// now, and every column that the snapshot shows must be one of them.
    async fn check_columns(&self, columns: &[RelationColumn]) -> Result<(), SourceError> {
        let sql = format!("SELECT * FROM ONLY {}", self.request.relation.relation.quoted());
        let now = self.control.prepare(&sql).await.map_err(|error| self.failed(&error))?;
        let is_there = |then: &RelationColumn| {
            now.columns().iter().any(|now| now.column_id() == Some(then.number) && now.name() == then.name)
        };
        match columns.iter().find(|column| !is_there(column)) {
            None => Ok(()),
            Some(gone) => Err(self.rewritten(format!("column {} was dropped or renamed", gone.name))),
        }
    }

    /// The publication's row filter for the table.
    async fn row_filter(&self) -> Result<Option<String>, SourceError> {
        let table = &self.request.relation.table;
        let arguments: [Argument<'_>; 3] =
            [(&self.request.publication, Type::TEXT), (&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
        let row = self.control.query_typed_opt(FILTER_SQL, &arguments).await;
        let row = row.map_err(|error| self.failed(&error))?;
        Ok(row.ok_or_else(|| self.gone())?.get(0))
    }

    /// Copies the range.
    async fn copy<S: PartSink>(
        &self,
        schema: Arc<TableSchema>,
        statement: &str,
        sink: &mut S,
    ) -> Result<ChunkRead, S::Error> {
        // A range of pages is what is to be scanned, whatever the planner thinks of the row filter.
        let plans =
            "SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off; SET LOCAL enable_bitmapscan = off";
        self.control.batch_execute(plans).await.map_err(|error| self.failed(&error))?;
        let stream = self.control.copy_out(statement).await.map_err(|error| match error.code() {
            Some(code) if matches!(code.code(), "42883" | "42804") => self.rewritten("a column's type changed"),
            _ => self.failed(&error),
        })?;
        let mut stream = pin!(stream);
        let transaction = Transaction {
            commit: self.request.consistent_point,
            xid: 0,
            committed_at_micros: i64::try_from(self.request.exported_at.0.saturating_mul(1000)).unwrap_or(i64::MAX),
        };
        let mut rows = CopiedRows::new(schema, transaction, self.request.part_bytes);
        let mut throttle = self.request.rows_per_second.map(|rate| Throttle::new(rate, Instant::now()));
        let mut read = ChunkRead::default();
        let mut throttled = 0;
        while let Some(data) = stream.next().await {
            let data = data.map_err(|error| self.failed(&error))?;
            read.bytes += data.len() as u64;
            let is_huge = data.len() > self.request.part_bytes;
            let _turn = if is_huge { sink.huge_row(data.len()).await } else { None };
            let mut rest = &data[..];
            loop {
                let (left, is_full) = rows.take(rest)?;
                rest = left;
                if !is_full {
                    break;
                }
                give(&mut rows, &mut read, sink).await?;
            }
            if let Some(throttle) = &mut throttle {
                let taken = read.rows + rows.rows() as u64;
                if taken - throttled >= throttle.step() {
                    let wait = throttle.took(taken - throttled, Instant::now());
                    throttled = taken;
                    sleep(wait).await;
                }
            }
        }
        if !rows.has_ended() {
            let reason = "the copy ended before its trailer".to_owned();
            return Err(SourceError::Protocol { what: "binary COPY", offset: 0, reason }.into());
        }
        if rows.rows() > 0 || read.parts == 0 {
            give(&mut rows, &mut read, sink).await?;
        }
        Ok(read)
    }
}

async fn give<S: PartSink>(rows: &mut CopiedRows, read: &mut ChunkRead, sink: &mut S) -> Result<(), S::Error> {
    read.rows += rows.rows() as u64;
    read.parts += 1;
    sink.part(rows.take_part()?).await?;
    sink.progress(read.rows, read.bytes);
    Ok(())
}

/// What is selected of a column. Types without a binary form that we read go through their output function, which is what the stream
/// shows; a cast to text is not the same (`inet`, `char(n)`).
fn expression(column: &wallaby_model::Column, known: &RelationColumn) -> String {
    let name = quote_identifier(&column.name);
    let by_output = match column.kind {
        ColumnType::Array | ColumnType::Other => true,
        // "char" prints some of its bytes in another way.
        ColumnType::Text => column.type_oid == Type::CHAR.oid(),
        _ => false,
    };
    if by_output { format!("{}({name})", known.output) } else { name }
}
