//! Compares tables of two databases row by row.
//!
//! Both sides are read as text under settings that make the text canonical, sorted by key bytes (`COLLATE "C"`), and merged: memory
//! stays flat whatever the size. Each side is read under one snapshot. Writers should be stopped: a row that is still on its way
//! is a difference.

use std::cmp::Ordering;
use std::fmt;
use std::pin::Pin;

use futures::StreamExt;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow, SimpleQueryStream};

use crate::Error;
use crate::connection::connect;

/// How many differences are kept word for word; the rest is only counted.
pub const DIFFERENCES_KEPT: usize = 20;
/// How much of a value is shown, in characters.
const VALUE_SHOWN: usize = 60;
/// Makes the text of a value the same on every server.
const SETTINGS: &str = "SET TimeZone = 'UTC'; SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 1; \
     SET bytea_output = 'hex'; SET xmloption = 'content'; SET statement_timeout = 0; SET search_path = pg_catalog; \
     BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// One entry per table, in the order asked.
    pub tables: Vec<TableComparison>,
}

impl Comparison {
    /// Whether every table is equal, row by row.
    pub fn is_equal(&self) -> bool {
        self.tables.iter().all(TableComparison::is_equal)
    }

    /// All rows that are the same on both sides.
    pub fn rows_equal(&self) -> u64 {
        self.tables.iter().map(|table| table.rows_equal).sum()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tables.iter().enumerate().try_for_each(|(index, table)| {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{table}")
        })
    }
}

/// What the comparison of one table found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableComparison {
    /// `schema.table`, as at the source.
    pub table: String,
    /// Rows that are the same on both sides.
    pub rows_equal: u64,
    /// Rows that only the source has.
    pub missing: u64,
    /// Rows that only the target has. A doubled row counts here.
    pub extra: u64,
    /// Rows with the same key and other values.
    pub different: u64,
    /// The first differences, in key order; at most [`DIFFERENCES_KEPT`].
    pub first: Vec<Difference>,
    /// Why the table could not be compared at all, such as a table or a column that the target lacks.
    pub unlike: Option<String>,
}

impl TableComparison {
    /// Whether both sides hold the same rows.
    pub fn is_equal(&self) -> bool {
        self.missing + self.extra + self.different == 0 && self.unlike.is_none()
    }

    fn keep(&mut self, difference: Difference) {
        match difference.kind {
            DifferenceKind::Missing => self.missing += 1,
            DifferenceKind::Extra => self.extra += 1,
            DifferenceKind::Different(_) => self.different += 1,
        }
        if self.first.len() < DIFFERENCES_KEPT {
            self.first.push(difference);
        }
    }
}

impl fmt::Display for TableComparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.unlike {
            return write!(f, "{}: cannot be compared: {why}", self.table);
        }
        if self.is_equal() {
            return write!(f, "{}: equal, {} rows", self.table, self.rows_equal);
        }
        let Self { table, rows_equal, missing, extra, different, .. } = self;
        write!(f, "{table}: {different} different, {missing} missing, {extra} extra; {rows_equal} equal")?;
        self.first.iter().try_for_each(|difference| write!(f, "\n    {difference}"))?;
        let hidden = missing + extra + different - self.first.len() as u64;
        if hidden > 0 { write!(f, "\n    and {hidden} more") } else { Ok(()) }
    }
}

/// One row that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key, as `column=value, …`. Of a table without a key: the whole row.
    pub key: String,
    /// What is wrong with it.
    pub kind: DifferenceKind,
}

/// How a row differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The target lacks it.
    Missing,
    /// The source lacks it.
    Extra,
    /// Both have it, with other values in these columns.
    Different(Vec<ColumnDifference>),
}

/// A column whose values differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnDifference {
    /// Its name.
    pub column: String,
    /// The beginning of the source's value.
    pub source: String,
    /// The beginning of the target's value.
    pub target: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            DifferenceKind::Missing => write!(f, "missing at the target: {}", self.key),
            DifferenceKind::Extra => write!(f, "only at the target: {}", self.key),
            DifferenceKind::Different(columns) => {
                write!(f, "different: {}:", self.key)?;
                columns.iter().try_for_each(|c| write!(f, " {} is {} and not {};", c.column, c.target, c.source))
            }
        }
    }
}

/// Compares `tables` (`schema.table`, the same names on both sides) of two databases.
///
/// The source says which columns there are and what the key is; columns that only the target has are ignored when their name
/// starts with `_wallaby_`. A table without a primary key is compared as a bag of rows.
///
/// # Errors
/// When a database cannot be reached, or the source has no such table. A table that the target lacks is a difference.
pub async fn compare(source_dsn: &str, target_dsn: &str, tables: &[&str]) -> Result<Comparison, Error> {
    let source = connect(source_dsn, "the source").await?;
    let target = connect(target_dsn, "the target").await?;
    for (client, side) in [(&source, "source"), (&target, "target")] {
        client.batch_execute(SETTINGS).await.map_err(Error::postgres(format!("preparing the {side} session")))?;
    }
    let mut comparison = Comparison::default();
    for table in tables {
        comparison.tables.push(compare_table(&source, &target, table).await?);
    }
    Ok(comparison)
}

/// A table as one side has it.
struct Shape {
    columns: Vec<String>,
    /// Indexes into `columns`.
    key: Vec<usize>,
}

async fn shape(client: &Client, table: &str) -> Result<Option<Shape>, Error> {
    let Some((schema, name)) = table.split_once('.') else {
        return Err(Error::Unusable(format!("{table:?} is not a table name: write schema.table")));
    };
    // Generated columns are not replicated by pgoutput unless asked for.
    let sql = "SELECT a.attname::text, coalesce(a.attnum = ANY (i.indkey::int2[]), false) \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
         LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary \
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p') ORDER BY a.attnum";
    let rows =
        client.query(sql, &[&schema, &name]).await.map_err(Error::postgres(format!("reading the shape of {table}")))?;
    if rows.is_empty() {
        return Ok(None);
    }
    let columns: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let mut key: Vec<usize> = (0..columns.len()).filter(|index| rows[*index].get(1)).collect();
    if key.is_empty() {
        key = (0..columns.len()).collect();
    }
    Ok(Some(Shape { columns, key }))
}

/// Why the target's columns do not match the source's, if they do not.
fn mismatch(source: &Shape, target: &Shape) -> Option<String> {
    let lacks = source.columns.iter().find(|column| !target.columns.contains(column));
    let strange = |column: &&String| !source.columns.contains(column) && !column.starts_with("_wallaby_");
    match (lacks, target.columns.iter().find(strange)) {
        (Some(column), _) => Some(format!("the target lacks the column {column}")),
        (None, Some(column)) => Some(format!("only the target has the column {column}")),
        (None, None) => None,
    }
}

async fn compare_table(source: &Client, target: &Client, table: &str) -> Result<TableComparison, Error> {
    let mut found = TableComparison { table: table.to_owned(), ..TableComparison::default() };
    let Some(shape_source) = shape(source, table).await? else {
        return Err(Error::Unusable(format!("the source has no table {table}")));
    };
    let Some(shape_target) = shape(target, table).await? else {
        found.unlike = Some("the target has no such table".to_owned());
        return Ok(found);
    };
    found.unlike = mismatch(&shape_source, &shape_target);
    if found.unlike.is_some() {
        return Ok(found);
    }
    let sql = select(table, &shape_source);
    let mut left = Side::open(source, &sql, &shape_source, format!("reading {table} at the source")).await?;
    let mut right = Side::open(target, &sql, &shape_source, format!("reading {table} at the target")).await?;
    let columns = &shape_source.columns;
    loop {
        let order = match (&left.row, &right.row) {
            (None, None) => return Ok(found),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(l), Some(r)) => compare_keys(l, r, &shape_source.key),
        };
        match order {
            Ordering::Less => {
                found.keep(Difference { key: left.key(&shape_source), kind: DifferenceKind::Missing });
                left.next().await?;
            }
            Ordering::Greater => {
                found.keep(Difference { key: right.key(&shape_source), kind: DifferenceKind::Extra });
                right.next().await?;
            }
            Ordering::Equal => {
                let columns =
                    left.row.iter().zip(&right.row).flat_map(|(l, r)| differing(l, r, columns)).collect::<Vec<_>>();
                if columns.is_empty() {
                    found.rows_equal += 1;
                } else {
                    found.keep(Difference { key: left.key(&shape_source), kind: DifferenceKind::Different(columns) });
                }
                left.next().await?;
                right.next().await?;
            }
        }
    }
}

/// All columns as text, sorted by the bytes of the key's text, nulls first: the order of [`compare_keys`].
fn select(table: &str, shape: &Shape) -> String {
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let columns: Vec<_> = shape.columns.iter().map(|name| format!("{}::text", quoted(name))).collect();
    let order: Vec<_> =
        shape.key.iter().map(|index| format!("{} COLLATE \"C\" NULLS FIRST", columns[*index])).collect();
    let (schema, name) = table.split_once('.').unwrap_or(("public", table));
    format!("SELECT {} FROM {}.{} ORDER BY {}", columns.join(", "), quoted(schema), quoted(name), order.join(", "))
}

fn compare_keys(left: &SimpleQueryRow, right: &SimpleQueryRow, key: &[usize]) -> Ordering {
    let by_column = key.iter().map(|index| left.get(*index).cmp(&right.get(*index)));
    by_column.fold(Ordering::Equal, Ordering::then)
}

fn differing(left: &SimpleQueryRow, right: &SimpleQueryRow, columns: &[String]) -> Vec<ColumnDifference> {
    let differs = |index: &usize| left.get(*index) != right.get(*index);
    let describe = |index: usize| ColumnDifference {
        column: columns[index].clone(),
        source: shown(left.get(index)),
        target: shown(right.get(index)),
    };
    (0..columns.len()).filter(differs).map(describe).collect()
}

/// The beginning of a value, with its length when it is cut.
fn shown(value: Option<&str>) -> String {
    let Some(value) = value else { return "NULL".to_owned() };
    let short: String = value.chars().take(VALUE_SHOWN).collect();
    if short.len() == value.len() { format!("'{short}'") } else { format!("'{short}…' ({} bytes)", value.len()) }
}

/// One side's rows, one at a time.
struct Side {
    rows: Pin<Box<SimpleQueryStream>>,
    row: Option<SimpleQueryRow>,
    doing: String,
}

impl Side {
    async fn open(client: &Client, sql: &str, shape: &Shape, doing: String) -> Result<Side, Error> {
        let rows = client.simple_query_raw(sql).await.map_err(Error::postgres(doing.clone()))?;
        let mut side = Side { rows: Box::pin(rows), row: None, doing };
        side.next().await?;
        let is_whole = side.row.as_ref().is_none_or(|row| row.len() == shape.columns.len());
        if is_whole { Ok(side) } else { Err(Error::Unusable(format!("{}: the columns changed meanwhile", side.doing))) }
    }

    async fn next(&mut self) -> Result<(), Error> {
        self.row = None;
        while let Some(message) = self.rows.next().await {
            if let SimpleQueryMessage::Row(row) = message.map_err(Error::postgres(self.doing.clone()))? {
                self.row = Some(row);
                return Ok(());
            }
        }
        Ok(())
    }

    fn key(&self, shape: &Shape) -> String {
        let Some(row) = &self.row else { return String::new() };
        let part = |index: &usize| format!("{}={}", shape.columns[*index], shown(row.get(*index)));
        shape.key.iter().map(part).collect::<Vec<_>>().join(", ")
    }
}
