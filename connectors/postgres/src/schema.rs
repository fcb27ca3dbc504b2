//! Tables at the sink: made when missing, widened when the source has new columns, and otherwise left to a person.
//!
//! The planning is pure: what the sink has ([`Existing`]) against what the source's shape asks for ([`Wanted`]) gives
//! statements, or the difference and the statements that a person runs.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;

use wallaby_model::schema::{quote_identifier, quote_literal};
use wallaby_model::{ColumnType, ReplicaIdentity, TableName, TableSchema};

use crate::encode::Wire;

/// The extra column of a table without a key: the position of the change that added the row.
pub(crate) const POSITION_COLUMN: &str = "_wallaby_position";

const BOOL: u32 = 16;
const BYTEA: u32 = 17;
const INT8: u32 = 20;
const INT2: u32 = 21;
const INT4: u32 = 23;
const TEXT: u32 = 25;
const OID: u32 = 26;
const JSON: u32 = 114;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const BPCHAR: u32 = 1042;
const VARCHAR: u32 = 1043;
const DATE: u32 = 1082;
const TIME: u32 = 1083;
const TIMESTAMP: u32 = 1114;
const TIMESTAMPTZ: u32 = 1184;
const INTERVAL: u32 = 1186;
const NUMERIC: u32 = 1700;
const UUID: u32 = 2950;
const JSONB: u32 = 3802;

/// What a source column asks for at the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The type's oid at the sink; that of text when the sink does not have the type.
    pub oid: u32,
    /// The modifier, −1 for none.
    pub modifier: i32,
    /// The type as SQL.
    pub sql: String,
    /// The sink does not have the type.
    pub as_text: bool,
    /// What rows have in the column that are older than it, as text; NULL when there is none.
    pub filled: Option<String>,
}

impl Wanted {
    /// The column's type, and what rows have in it that are here already: not NULL when the source says so.
    fn addition(&self) -> String {
        match &self.filled {
            None => self.sql.clone(),
            Some(value) => format!("{} DEFAULT {}", self.sql, quote_literal(value)),
        }
    }
}

/// A column of a table at the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExistingColumn {
    pub name: String,
    pub oid: u32,
    pub modifier: i32,
    /// The type as SQL without its modifier, fit for a cast that never cuts.
    pub cast: String,
    pub is_enum: bool,
    pub not_null: bool,
    /// It has a value without being written, and not by us: a default, an identity, a generation expression.
    pub fills_itself: bool,
    /// GENERATED ALWAYS AS (…): cannot be written.
    pub generated: bool,
}

/// A table at the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Existing {
    pub columns: Vec<ExistingColumn>,
    /// The columns of each unique index that INSERT … ON CONFLICT can use.
    pub unique: Vec<Vec<String>>,
}

impl Existing {
    pub(crate) fn column(&self, name: &str) -> Option<&ExistingColumn> {
        self.columns.iter().find(|column| column.name == name)
    }
}

/// A column as it is written.
#[derive(Clone, Debug)]
pub(crate) struct TargetColumn {
    /// Index into the shape's columns.
    pub source: usize,
    /// Its name, quoted.
    pub name: String,
    /// The type in which it is staged.
    pub staged: String,
    /// The type in the table.
    pub cast: String,
    /// Whether it can be copied into the table without staging.
    pub direct: bool,
}

impl TargetColumn {
    /// `expression`, which has the staged type, in the table's type.
    pub(crate) fn cast(&self, expression: &str) -> String {
        if self.staged == self.cast { expression.to_owned() } else { format!("{expression}::{}", self.cast) }
    }

    /// `expression`, which has the table's type, in the staged type.
    pub(crate) fn uncast(&self, expression: &str) -> String {
        if self.staged == self.cast { expression.to_owned() } else { format!("{expression}::{}", self.staged) }
    }
}

/// How rows of one shape are written to their table.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The table at the sink.
    pub table: TableName,
    /// The shape.
    pub schema: Arc<TableSchema>,
    /// The columns that are written. Fewer than the shape has only for a shape that was superseded in the same batch.
    pub columns: Vec<TargetColumn>,
    /// Indexes into the shape's columns by which a row is found; empty for a table without a key.
    pub key: Vec<usize>,
    /// How the values of each column of the shape are sent.
    pub wires: Vec<Wire>,
}

impl Target {
    /// The target column of a column of the shape.
    pub(crate) fn column(&self, source: usize) -> Option<&TargetColumn> {
        self.columns.iter().find(|column| column.source == source)
    }

    /// The key's columns, in key order.
    pub(crate) fn key_columns(&self) -> Vec<&TargetColumn> {
        self.key.iter().filter_map(|&source| self.column(source)).collect()
    }

    /// Whether rows can be copied into the table without staging.
    pub(crate) fn is_direct(&self) -> bool {
        self.columns.iter().all(|column| column.direct)
    }
}

/// The columns by which this sink finds a row: those that the WAL carries of an old row. That is the primary key unless
/// the replica identity is an index without all of it.
pub(crate) fn key_of(schema: &TableSchema) -> Vec<usize> {
    let identity = || schema.columns.iter().enumerate().filter(|(_, column)| column.identity).map(|(index, _)| index);
    let primary: Vec<usize> = schema.primary_key.iter().map(|&index| usize::from(index)).collect();
    let is_carried = primary.iter().all(|&index| schema.columns[index].identity);
    match schema.identity {
        ReplicaIdentity::Index if primary.is_empty() || !is_carried => identity().collect(),
        _ => primary,
    }
}

/// Why a table does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Misfit {
    pub reason: String,
    pub remedy: String,
}

/// Which columns of a table here may stay although the shape does not have them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Extra<'a> {
    /// All of them: a person will be asked later, if need be.
    Any,
    /// These, beside those that fill themselves.
    These(&'a HashSet<String>),
}

impl Extra<'_> {
    fn may_stay(self, name: &str) -> bool {
        match self {
            Extra::Any => true,
            Extra::These(names) => names.contains(name),
        }
    }
}

/// What is to be done before rows of `schema` can be written: statements to run, in order. With `extra`, columns may stay that the
/// shape does not have, unless it has new ones as well: it may be that one of them was renamed.
pub(crate) fn plan(
    schema: &TableSchema,
    table: &TableName,
    wanted: &[Wanted],
    existing: Option<&Existing>,
    extra: Extra<'_>,
) -> Result<Vec<String>, Misfit> {
    let Some(existing) = existing else { return Ok(vec![create_statement(schema, table, wanted)]) };
    let key = key_of(schema);
    let mut additions = Vec::new();
    let mut misfits = Vec::new();
    let mut remedies = Vec::new();
    let alter = format!("ALTER TABLE {}", table.quoted());
    for (column, wanted) in schema.columns.iter().zip(wanted) {
        let name = quote_identifier(&column.name);
        let Some(found) = existing.column(&column.name) else {
            additions.push((&column.name, addition(table, &column.name, &wanted.addition())));
            continue;
        };
        if !fits(wanted, found) {
            misfits.push(format!("column {name} is {} at the sink and {} at the source", found.cast, wanted.sql));
            remedies.push(format!("{alter} ALTER COLUMN {name} TYPE {sql} USING {name}::{sql}", sql = wanted.sql));
        }
        if found.not_null && !column.not_null {
            misfits.push(format!("column {name} is NOT NULL at the sink only"));
            remedies.push(format!("{alter} ALTER COLUMN {name} DROP NOT NULL"));
        }
        if found.generated {
            misfits.push(format!("column {name} is generated at the sink"));
            remedies.push(format!("{alter} ALTER COLUMN {name} DROP EXPRESSION"));
        }
    }
    let is_extra = |column: &&ExistingColumn| {
        let known = schema.columns.iter().any(|wanted| wanted.name == column.name);
        let stays = additions.is_empty() && extra.may_stay(&column.name);
        !known && !column.fills_itself && column.name != POSITION_COLUMN && !stays
    };
    let extra: Vec<_> = existing.columns.iter().filter(is_extra).collect();
    if let ([gone], [(new, _)]) = (extra.as_slice(), additions.as_slice()) {
        let (gone, new) = (quote_identifier(&gone.name), quote_identifier(new));
        misfits.push(format!("column {gone} is not at the source, and {new} not at the sink"));
        let drop = format!("or, if it was not a rename, {alter} DROP COLUMN {gone}");
        remedies.push(format!("{alter} RENAME COLUMN {gone} TO {new} ({drop})"));
    } else {
        for column in &extra {
            let name = quote_identifier(&column.name);
            misfits.push(format!("column {name} is not at the source"));
            remedies.push(format!("{alter} DROP COLUMN {name}"));
        }
    }
    let names: Vec<&str> = key.iter().map(|&index| schema.columns[index].name.as_str()).collect();
    let has_key = existing.unique.iter().any(|unique| {
        unique.len() == names.len() && names.iter().all(|name| unique.iter().any(|column| column == name))
    });
    if !key.is_empty() && !has_key {
        let list = list(names.iter().copied());
        misfits.push(format!("no unique index has exactly the key ({list})"));
        let remedy = if schema.primary_key.len() == key.len() && key == primary(schema) {
            format!("{alter} ADD PRIMARY KEY ({list}) (after DROP CONSTRAINT of another primary key)")
        } else {
            format!("{alter} ADD UNIQUE ({list})")
        };
        remedies.push(remedy);
    }
    if !misfits.is_empty() {
        let reason = format!("{table} at the sink does not fit the source: {}", misfits.join("; "));
        let remedy = format!("Run at the sink: {}; then wallaby resume", remedies.join("; "));
        return Err(Misfit { reason, remedy });
    }
    let mut statements: Vec<String> = additions.into_iter().map(|(_, statement)| statement).collect();
    if key.is_empty() && existing.column(POSITION_COLUMN).is_none() {
        statements.push(format!("{alter} ADD COLUMN {} text", quote_identifier(POSITION_COLUMN)));
    }
    Ok(statements)
}

/// Adds a column, unless somebody else did meanwhile.
pub(crate) fn addition(table: &TableName, name: &str, what: &str) -> String {
    format!("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {what}", table.quoted(), quote_identifier(name))
}

fn primary(schema: &TableSchema) -> Vec<usize> {
    schema.primary_key.iter().map(|&index| usize::from(index)).collect()
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(quote_identifier).collect::<Vec<_>>().join(", ")
}

fn create_statement(schema: &TableSchema, table: &TableName, wanted: &[Wanted]) -> String {
    let mut parts: Vec<String> = Vec::new();
    for (column, wanted) in schema.columns.iter().zip(wanted) {
        let not_null = if column.not_null { " NOT NULL" } else { "" };
        parts.push(format!("{} {}{not_null}", quote_identifier(&column.name), wanted.addition()));
    }
    let key = key_of(schema);
    let names = |indexes: &[usize]| list(indexes.iter().map(|&index| schema.columns[index].name.as_str()));
    if key.is_empty() {
        parts.push(format!("{} text", quote_identifier(POSITION_COLUMN)));
    }
    let primary = primary(schema);
    if !primary.is_empty() {
        parts.push(format!("PRIMARY KEY ({})", names(&primary)));
    }
    if !key.is_empty() && key != primary {
        parts.push(format!("UNIQUE ({})", names(&key)));
    }
    let mut statement = String::new();
    // Writing to a String cannot fail.
    let _ = write!(statement, "CREATE TABLE {} ({})", table.quoted(), parts.join(", "));
    statement
}

/// Whether every value of the wanted type can be kept in the column.
fn fits(wanted: &Wanted, found: &ExistingColumn) -> bool {
    if wanted.oid == found.oid {
        let wider = wanted.oid == VARCHAR && wanted.modifier >= 0 && found.modifier >= wanted.modifier;
        return found.modifier == -1 || found.modifier == wanted.modifier || wider;
    }
    match found.oid {
        TEXT => true,
        INT4 => wanted.oid == INT2,
        INT8 => [INT2, INT4].contains(&wanted.oid),
        NUMERIC => found.modifier == -1 && [INT2, INT4, INT8].contains(&wanted.oid),
        FLOAT8 => wanted.oid == FLOAT4,
        VARCHAR => found.modifier == -1 && wanted.oid == TEXT,
        _ => false,
    }
}

/// How a column's values are sent and staged, given the column that they go to.
fn route(kind: ColumnType, found: &ExistingColumn) -> (Wire, String, bool) {
    let own = |oid: u32, name: &str| (Wire::Own, name.to_owned(), found.oid == oid);
    match kind {
        ColumnType::Bool => own(BOOL, "boolean"),
        ColumnType::Int2 => own(INT2, "smallint"),
        ColumnType::Int4 => own(INT4, "integer"),
        ColumnType::Int8 => own(INT8, "bigint"),
        ColumnType::Oid => own(OID, "oid"),
        ColumnType::Float4 => own(FLOAT4, "real"),
        ColumnType::Float8 => own(FLOAT8, "double precision"),
        ColumnType::Bytea => own(BYTEA, "bytea"),
        ColumnType::Uuid => own(UUID, "uuid"),
        ColumnType::Date => own(DATE, "date"),
        ColumnType::Time => own(TIME, "time without time zone"),
        ColumnType::Timestamp => own(TIMESTAMP, "timestamp without time zone"),
        ColumnType::Timestamptz => own(TIMESTAMPTZ, "timestamp with time zone"),
        ColumnType::Interval => own(INTERVAL, "interval"),
        ColumnType::Numeric if found.oid == NUMERIC => (Wire::Own, "numeric".to_owned(), true),
        ColumnType::Jsonb if found.oid == JSONB => (Wire::Jsonb, "jsonb".to_owned(), true),
        // These take characters as their binary form.
        ColumnType::Json if found.oid == JSON => (Wire::Text, "json".to_owned(), true),
        ColumnType::Enum if found.is_enum => (Wire::Text, found.cast.clone(), true),
        _ => (Wire::Text, "text".to_owned(), [TEXT, VARCHAR, BPCHAR].contains(&found.oid)),
    }
}

/// How rows of `schema` are written to a table that fits. With `superseded`, columns that the table does not have any
/// more are left out: a later shape in the same batch dropped them.
pub(crate) fn target(
    schema: &Arc<TableSchema>,
    table: &TableName,
    existing: &Existing,
    superseded: bool,
) -> Result<Target, Misfit> {
    let mut columns = Vec::with_capacity(schema.columns.len());
    let mut wires = Vec::with_capacity(schema.columns.len());
    for (source, column) in schema.columns.iter().enumerate() {
        let Some(found) = existing.column(&column.name) else {
            if !superseded {
                let reason = format!("column {} of {table} vanished at the sink", quote_identifier(&column.name));
                return Err(Misfit { reason, remedy: "wallaby resume".to_owned() });
            }
            wires.push(Wire::Own);
            continue;
        };
        let (wire, staged, direct) = route(column.kind, found);
        wires.push(wire);
        columns.push(TargetColumn {
            source,
            name: quote_identifier(&column.name),
            staged,
            cast: found.cast.clone(),
            direct,
        });
    }
    let key = key_of(schema);
    if !key.iter().all(|&source| columns.iter().any(|column| column.source == source)) {
        let reason = format!("the key of {table} changed at the source inside of one batch");
        let remedy = "Give the sink's table both keys until the change is applied, then wallaby resume".to_owned();
        return Err(Misfit { reason, remedy });
    }
    Ok(Target { table: table.clone(), schema: Arc::clone(schema), columns, key, wires })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::Column;

    fn schema(columns: &[(&str, bool)]) -> TableSchema {
        let column = |&(name, identity): &(&str, bool)| Column {
            name: name.to_owned(),
            kind: ColumnType::Int4,
            sql_type: "integer".to_owned(),
            type_oid: INT4,
            type_modifier: -1,
            identity,
            not_null: identity,
        };
        let primary_key = columns.iter().enumerate().filter(|(_, c)| c.1).map(|(i, _)| i as u16).collect();
        TableSchema {
            oid: 1,
            table: TableName::new("public", "t"),
            identity: ReplicaIdentity::Default,
            columns: columns.iter().map(column).collect(),
            primary_key,
        }
    }

    fn wanted(count: usize) -> Vec<Wanted> {
        vec![Wanted { oid: INT4, modifier: -1, sql: "integer".to_owned(), as_text: false, filled: None }; count]
    }

    fn column(name: &str) -> ExistingColumn {
        ExistingColumn {
            name: name.to_owned(),
            oid: INT4,
            modifier: -1,
            cast: "integer".to_owned(),
            is_enum: false,
            not_null: false,
            fills_itself: false,
            generated: false,
        }
    }

    fn existing(columns: Vec<ExistingColumn>) -> Existing {
        Existing { columns, unique: vec![vec!["id".to_owned()]] }
    }

    fn planned(columns: &[(&str, bool)], existing: Option<&Existing>) -> Result<Vec<String>, Misfit> {
        let schema = schema(columns);
        plan(&schema, &schema.table.clone(), &wanted(columns.len()), existing, Extra::These(&HashSet::new()))
    }

    #[test]
    fn a_missing_table_is_made() {
        let made = planned(&[("id", true), ("a", false)], None).unwrap();
        let expected = r#"CREATE TABLE "public"."t" ("id" integer NOT NULL, "a" integer, PRIMARY KEY ("id"))"#;
        assert_eq!(made, [expected]);
        let bag = planned(&[("a", false)], None).unwrap();
        assert_eq!(bag, [r#"CREATE TABLE "public"."t" ("a" integer, "_wallaby_position" text)"#]);
    }

    #[test]
    fn a_new_column_is_added_and_a_fitting_table_left_alone() {
        let table = existing(vec![column("id"), column("a")]);
        assert!(planned(&[("id", true), ("a", false)], Some(&table)).unwrap().is_empty());
        let added = planned(&[("id", true), ("a", false), ("b", false)], Some(&table)).unwrap();
        assert_eq!(added, [r#"ALTER TABLE "public"."t" ADD COLUMN IF NOT EXISTS "b" integer"#]);
    }

    #[test]
    fn what_cannot_be_done_alone_names_the_statement() {
        let remedy = |columns: &[(&str, bool)], table: &Existing| planned(columns, Some(table)).unwrap_err().remedy;
        let two = existing(vec![column("id"), column("a")]);
        assert!(remedy(&[("id", true)], &two).contains(r#"DROP COLUMN "a""#));
        assert!(remedy(&[("id", true), ("b", false)], &two).contains(r#"RENAME COLUMN "a" TO "b""#));
        let text = existing(vec![column("id"), ExistingColumn { oid: DATE, ..column("a") }]);
        assert!(remedy(&[("id", true), ("a", false)], &text).contains(r#"ALTER COLUMN "a" TYPE integer"#));
        let strict = existing(vec![column("id"), ExistingColumn { not_null: true, ..column("a") }]);
        assert!(remedy(&[("id", true), ("a", false)], &strict).contains("DROP NOT NULL"));
        let keyless = Existing { unique: vec![], ..two };
        assert!(remedy(&[("id", true), ("a", false)], &keyless).contains(r#"ADD PRIMARY KEY ("id")"#));
    }

    #[test]
    fn a_persons_own_column_with_a_default_may_stay() {
        let own = ExistingColumn { fills_itself: true, ..column("loaded_at") };
        assert!(planned(&[("id", true)], Some(&existing(vec![column("id"), own]))).unwrap().is_empty());
    }
}
