//! What a table has beyond columns and primary key: added after a first load to tables that this sink made, taken off again before
//! another one where it would be in the way.
//!
//! Each is added outside of a transaction and unless it is there, so that a second try goes on where the first one died. Definitions
//! come from the source's catalog and go out one statement at a time, in a protocol that takes one only.
//!
//! Nobody is held up for longer than a lock takes: indexes are built CONCURRENTLY, also those that unique constraints are made of, and
//! rows are looked at for CHECK and FOREIGN KEY after these are there (VALIDATE). EXCLUDE has no such way.

use std::collections::HashSet;
use std::time::Duration;

use tokio_postgres::Client;
use wallaby_connector_api::{ForeignKey, SinkError, SinkTask, TableExtra, TableExtras, TableIndex};
use wallaby_model::run::TableStage;
use wallaby_model::schema::{quote_identifier, quote_literal};
use wallaby_model::{TableName, TableSchema, TaskId};

use crate::checkpoint;
use crate::columns;
use crate::config::PostgresSinkConfig;
use crate::error::{Doing, PostgresError};
use crate::marks::{self, Locking};
use crate::session::{Session, connect_as};

/// How an addition of ours is told from a person's.
const OURS: &str = "made by WALlaby";
/// How an index is named, for now, that a DEFERRABLE constraint is made of: until it belongs to the constraint it refuses for good what
/// that lets pass until the end of the transaction.
pub(crate) const NOT_YET_DEFERRABLE: &str = "wallaby_deferrable_";
/// How long an ALTER waits for its lock before a person is told the statement.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '5s'";
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Foreign keys of, and to, a table: name, table, whether it is ours, definition, whether it would be in a TRUNCATE's way.
const FOREIGN_KEYS: &str = "\
    SELECT k.conname::text, n.nspname::text, c.relname::text, coalesce(obj_description(k.oid, 'pg_constraint') = $2, false), \
        pg_get_constraintdef(k.oid), k.confrelid = t.oid AND k.conrelid <> t.oid \
    FROM (SELECT to_regclass($1)::oid AS oid) t \
        JOIN pg_constraint k ON k.contype = 'f' AND k.conparentid = 0 AND t.oid IN (k.confrelid, k.conrelid) \
        JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
    ORDER BY 2, 3, 1";

/// Empties a table, inside of a transaction. Foreign keys of ours are taken off; returns the statements that make them again.
pub(crate) async fn empty(client: &Client, table: &TableName) -> Result<Vec<String>, PostgresError> {
    let doing = || format!("emptying {table} at the sink");
    let rows = client.query(FOREIGN_KEYS, &[&table.quoted(), &OURS]).await.doing(doing)?;
    let mut owed = Vec::new();
    let mut in_the_way = Vec::new();
    for row in &rows {
        let owner = TableName::new(row.get::<_, String>(1), row.get::<_, String>(2)).quoted();
        let name = quote_identifier(row.get(0));
        let drop = format!("ALTER TABLE {owner} DROP CONSTRAINT {name}");
        if row.get(3) {
            client.batch_execute(&drop).await.doing(doing)?;
            let definition: &str = row.get(4);
            let comment = quote_literal(OURS);
            owed.push(format!(
                "ALTER TABLE {owner} ADD CONSTRAINT {name} {definition}; COMMENT ON CONSTRAINT {name} ON {owner} IS {comment}"
            ));
        } else if row.get(5) {
            in_the_way.push(drop);
        }
    }
    if !in_the_way.is_empty() {
        return Err(PostgresError::Sink(SinkError::Configuration {
            reason: format!("{table} at the sink is to be loaded anew, and foreign keys of other tables refer to it"),
            remedy: format!(
                "Run at the sink: {}; then wallaby resume, and make them again when the run is done",
                in_the_way.join("; ")
            ),
        }));
    }
    client.batch_execute(&format!("TRUNCATE {}", table.quoted())).await.doing(doing)?;
    Ok(owed)
}

/// Unique and exclusion constraints, and unique indexes that are no constraint's: name, whether it is a constraint, columns, whether
/// these are unique.
const UNIQUE: &str = "\
    SELECT c.relname::text, k.oid IS NOT NULL, \
        ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY u(attnum, n) \
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum WHERE u.n <= i.indnkeyatts), \
        i.indisunique AND k.contype IS DISTINCT FROM 'x' \
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
        LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = i.indrelid AND k.contype IN ('u', 'x') \
    WHERE i.indrelid = to_regclass($1) AND NOT i.indisprimary AND (i.indisunique OR k.contype = 'x') ORDER BY 1";

/// Takes off what chunks of several generations may violate, and what `finish` makes again because the source has it: unique and
/// exclusion constraints and unique indexes, but for the key's. Those of a person, which the source does not have, stay.
pub(crate) async fn take_off(
    client: &Client,
    shape: &TableSchema,
    table: &TableName,
    extras: &TableExtras,
) -> Result<(), PostgresError> {
    let doing = || format!("taking unique constraints off {table} at the sink for a load");
    let key: HashSet<&str> = shape.key().into_iter().map(|n| shape.columns[usize::from(n)].name.as_str()).collect();
    let rows = client.query(UNIQUE, &[&table.quoted()]).await.doing(doing)?;
    for row in &rows {
        let (name, is_constraint, columns): (&str, bool, Vec<&str>) = (row.get(0), row.get(1), row.get(2));
        let comes_back = if is_constraint {
            extras.constraints.iter().any(|constraint| constraint.name == name)
        } else {
            // An index of a constraint's name was built for the constraint, and left behind.
            extras.indexes.iter().any(|index| index.name == name)
                || extras.constraints.iter().any(|constraint| constraint.name == name)
                || name.starts_with(NOT_YET_DEFERRABLE)
        };
        let is_unique: bool = row.get(3);
        let is_key = is_unique
            && !key.is_empty()
            && columns.len() == key.len()
            && columns.iter().all(|&column| key.contains(column));
        if !comes_back || is_key {
            continue;
        }
        let quoted = quote_identifier(name);
        let drop = if is_constraint {
            format!("ALTER TABLE {} DROP CONSTRAINT {quoted}", table.quoted())
        } else {
            format!("DROP INDEX {}.{quoted}", quote_identifier(&table.schema))
        };
        tracing::info!(%table, drop, "taking off for a load what is made again after it");
        client.batch_execute(&drop).await.doing(doing)?;
    }
    Ok(())
}

/// Adds what the source's table has. Returns a sentence for each that could not be added.
pub(crate) async fn finish(
    config: &PostgresSinkConfig,
    task: &SinkTask,
    table: &TableName,
) -> Result<Vec<String>, SinkError> {
    let outcome = try_finish(config, task, table).await;
    outcome.map_err(|error| match error.into_sink(config.role()) {
        error @ SinkError::Transient(_) => error,
        // Whatever it is, the rows are there: tried again until a person has mended it.
        error => SinkError::Transient(error.to_string()),
    })
}

async fn try_finish(
    config: &PostgresSinkConfig,
    task: &SinkTask,
    table: &TableName,
) -> Result<Vec<String>, PostgresError> {
    let name = task.task.session_prefix().replacen("wallaby/", "wallaby-finish/", 1);
    let session = connect_as(config, &name, IDLE_MAX).await?;
    let client = &session.client;
    if !checkpoint::exists(client, "wallaby.tables").await? {
        return Ok(Vec::new());
    }
    // Two at once would take an index that the other one builds for a broken one.
    let lock = format!("wallaby finish {} {}", task.task, table.quoted());
    let locked = client.query_one("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", &[&lock]).await;
    if !locked.doing(|| "locking the additions to a table".to_owned())?.get::<_, bool>(0) {
        let reason = format!("another session adds indexes and constraints to {table} at the sink");
        return Err(SinkError::Transient(reason).into());
    }
    session.command(LOCK_TIMEOUT).await?;
    let here = config.target_table(table);
    let mut finish = Finish { session, config, task: &task.task, here, failed: Vec::new() };
    let mark = marks::read(&finish.session.client, &task.task, table, Locking::None).await?;
    let extras = match mark {
        Some(mark) if mark.made_here => task.lookup.extras(table).await?,
        _ => TableExtras::default(),
    };
    for index in &extras.indexes {
        finish.index(index).await?;
    }
    for constraint in &extras.constraints {
        finish.constraint(constraint).await?;
    }
    // May refer to what is unique by one of those.
    finish.pay(table).await?;
    for key in &extras.foreign_keys {
        finish.foreign_key(key).await?;
    }
    for default in &extras.defaults {
        finish.default(table, default).await?;
    }
    Ok(finish.failed)
}

/// The additions to one table.
struct Finish<'a> {
    session: Session,
    config: &'a PostgresSinkConfig,
    task: &'a TaskId,
    /// The table at the sink.
    here: TableName,
    /// What could not be added.
    failed: Vec<String>,
}

impl Finish<'_> {
    /// Runs statements, all or none; false, with a sentence, when the server refuses it.
    async fn run(&mut self, what: &str, statement: &str) -> Result<bool, PostgresError> {
        self.run_for(what, statement, statement).await
    }

    /// The same for a statement that is one of several: `whole` is what a person runs instead of them.
    async fn run_for(&mut self, what: &str, statement: &str, whole: &str) -> Result<bool, PostgresError> {
        tracing::info!(table = %self.here, statement, "adding to a table that was loaded");
        match self.session.client.batch_execute(statement).await {
            Ok(()) => Ok(true),
            Err(source) => {
                // Of class 55 only the lock that was not free: the rest of it is for a person.
                let passes = |code: &str| ["08", "40", "53", "57", "58"].contains(&&code[..2]) || code == "55P03";
                let refused = source.as_db_error().filter(|db| !passes(db.code().code()));
                let Some(refused) = refused else {
                    return Err(PostgresError::Sql { doing: format!("adding {what} to {}", self.here), source });
                };
                let code = refused.code().code();
                // Class 23 quotes values.
                let why = if code.starts_with("23") { "rows of the sink violate it" } else { refused.message() };
                self.failed.push(format!(
                    "{what} could not be added to {} at the sink ({why}, SQLSTATE {code}); when that is mended, run: {whole}",
                    self.here
                ));
                Ok(false)
            }
        }
    }

    /// Makes foreign keys again that were taken off when the table was emptied.
    async fn pay(&mut self, table: &TableName) -> Result<(), PostgresError> {
        let doing = || format!("making foreign keys of {table} again");
        let client = &self.session.client;
        let query =
            "SELECT unnest(owed) FROM wallaby.tables WHERE task = $1 AND source_schema = $2 AND source_table = $3";
        let task = self.task.to_string();
        let rows = client.query(query, &[&task, &table.schema, &table.name]).await.doing(doing)?;
        let owed: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        for statements in owed {
            let client = &self.session.client;
            match client.batch_execute(&statements).await {
                Ok(()) => {}
                Err(error) if error.code().is_some_and(|code| code.code() == "42710") => {}
                Err(source) if source.as_db_error().is_some() && !source.is_closed() => {
                    let code = source.code().map_or("", |code| code.code());
                    self.failed.push(format!(
                        "A foreign key that was taken off for the load could not be made again (SQLSTATE {code}); when that is \
                         mended, run at the sink: {statements}"
                    ));
                    continue;
                }
                Err(source) => return Err(PostgresError::Sql { doing: doing(), source }),
            }
            let paid = "UPDATE wallaby.tables SET owed = array_remove(owed, $4) \
                WHERE task = $1 AND source_schema = $2 AND source_table = $3";
            client.execute(paid, &[&task, &table.schema, &table.name, &statements]).await.doing(doing)?;
        }
        Ok(())
    }

    async fn index(&mut self, index: &TableIndex) -> Result<(), PostgresError> {
        let what = format!("index {:?}", index.name);
        self.build(&what, &index.name, index.is_unique, &index.using, None).await.map(|_| ())
    }

    /// What has a name here: whether it is an index of this table, and a valid one.
    async fn found_index(&self, name: &str) -> Result<Option<(bool, bool)>, PostgresError> {
        let query = "SELECT coalesce(i.indrelid = to_regclass($1), false), coalesce(i.indisvalid, false) FROM pg_class c \
            JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index i ON i.indexrelid = c.oid \
            WHERE n.nspname = $2 AND c.relname = $3";
        let found = self.session.client.query_opt(query, &[&self.here.quoted(), &self.here.schema, &name]).await;
        let found = found.doing(|| format!("looking for index {name:?}"))?;
        Ok(found.map(|row| (row.get(0), row.get(1))))
    }

    /// Whether a unique constraint can be made of an index that is there: it is as we would build it.
    async fn is_index_of(&self, name: &str, using: &str) -> Result<bool, PostgresError> {
        let query = "SELECT i.indisunique AND right(pg_get_indexdef(c.oid), length($3)) = $3 \
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indexrelid = c.oid \
            WHERE n.nspname = $1 AND c.relname = $2";
        let ending = format!(" USING btree {using}");
        let found = self.session.client.query_opt(query, &[&self.here.schema, &name, &ending]).await;
        let found = found.doing(|| format!("looking at index {name:?}"))?;
        Ok(found.is_some_and(|row| row.get(0)))
    }

    fn drop_index(&self, name: &str) -> String {
        format!("DROP INDEX CONCURRENTLY {}.{}", quote_identifier(&self.here.schema), quote_identifier(name))
    }

    /// Builds an index without holding others up, unless it is there. `whole` is what a person runs when it cannot be built, if that is
    /// not the statement itself. False, with a sentence, when it is not there in the end.
    async fn build(
        &mut self,
        what: &str,
        name: &str,
        is_unique: bool,
        using: &str,
        whole: Option<&str>,
    ) -> Result<bool, PostgresError> {
        let unique = if is_unique { "UNIQUE " } else { "" };
        let quoted = quote_identifier(name);
        let statement = format!("CREATE {unique}INDEX CONCURRENTLY {quoted} ON {} {using}", self.here.quoted());
        let whole = whole.unwrap_or(&statement);
        match self.found_index(name).await? {
            None => {}
            Some((true, true)) => return Ok(true),
            Some((false, _)) => {
                self.failed.push(format!(
                    "{what} could not be added to {} at the sink: another object has its name; under another name, run: {whole}",
                    self.here
                ));
                return Ok(false);
            }
            // Left behind by one that died.
            Some((true, false)) => {
                let drop = self.drop_index(name);
                if !self.run(what, &drop).await? {
                    return Ok(false);
                }
            }
        }
        // It waits for every older transaction, of which one may be a large one of ours.
        self.session.command("SET lock_timeout = 0").await?;
        let is_built = self.run_for(what, &statement, whole).await?;
        if !is_built && is_unique && self.found_index(name).await? == Some((true, false)) {
            // What the server has left of it would refuse rows from now on.
            self.session.command(&self.drop_index(name)).await?;
        }
        self.session.command(LOCK_TIMEOUT).await?;
        Ok(is_built)
    }

    /// Whether a constraint is there, and if so, whether its rows were looked at.
    async fn has_constraint(&self, name: &str) -> Result<Option<bool>, PostgresError> {
        let query = "SELECT convalidated FROM pg_constraint WHERE conrelid = to_regclass($1) AND conname = $2";
        let found = self.session.client.query_opt(query, &[&self.here.quoted(), &name]).await;
        Ok(found.doing(|| format!("looking for constraint {name:?}"))?.map(|row| row.get(0)))
    }

    /// Adds a constraint. With `check_later`, without holding others up while the rows are looked at. A foreign key is marked as ours
    /// in the transaction that makes it: one without the mark is taken for a person's, and in the way of another load.
    async fn add_constraint(&mut self, name: &str, definition: &str, check_later: bool) -> Result<(), PostgresError> {
        let (what, quoted, table) = (format!("constraint {name:?}"), quote_identifier(name), self.here.quoted());
        let found = self.has_constraint(name).await?;
        if found.is_none() {
            let later = if check_later { " NOT VALID" } else { "" };
            let mut add = format!("ALTER TABLE {table} ADD CONSTRAINT {quoted} {definition}{later}");
            if definition.starts_with("FOREIGN KEY") {
                add += &format!("; COMMENT ON CONSTRAINT {quoted} ON {table} IS {}", quote_literal(OURS));
            }
            if !self.run(&what, &add).await? {
                return Ok(());
            }
        }
        // Also what one that died in between has left behind.
        if check_later && found != Some(true) {
            let is_valid = self.run(&what, &format!("ALTER TABLE {table} VALIDATE CONSTRAINT {quoted}")).await?;
            if !is_valid && found.is_none() {
                self.session.command(&format!("ALTER TABLE {table} DROP CONSTRAINT {quoted}")).await?;
            }
        }
        Ok(())
    }

    async fn constraint(&mut self, constraint: &TableExtra) -> Result<(), PostgresError> {
        let definition = constraint.definition.as_str();
        if let Some((using, deferral)) = made_of(definition) {
            return self.unique_constraint(constraint, &using, deferral).await;
        }
        let check_later = definition.starts_with("CHECK") && !definition.ends_with("NOT VALID");
        self.add_constraint(&constraint.name, definition, check_later).await
    }

    /// Adds a unique constraint: by itself it would keep everybody out of the table for as long as its index takes. So that is built first.
    async fn unique_constraint(
        &mut self,
        constraint: &TableExtra,
        using: &str,
        deferral: &str,
    ) -> Result<(), PostgresError> {
        if self.has_constraint(&constraint.name).await?.is_some() {
            return Ok(());
        }
        let (what, name) = (format!("constraint {:?}", constraint.name), quote_identifier(&constraint.name));
        let alter = format!("ALTER TABLE {} ADD CONSTRAINT {name}", self.here.quoted());
        let whole = format!("{alter} {}", constraint.definition);
        let index = if deferral.is_empty() { constraint.name.clone() } else { self.not_yet_deferrable(&name).await? };
        let found = self.found_index(&index).await?;
        let is_ours = found != Some((true, true)) || index.starts_with(NOT_YET_DEFERRABLE);
        if !is_ours && !self.is_index_of(&index, using).await? {
            self.failed.push(format!(
                "{what} could not be added to {} at the sink: another index has its name; under another name, run: {whole}",
                self.here
            ));
            return Ok(());
        }
        if !self.build(&what, &index, true, using, Some(&whole)).await? {
            return Ok(());
        }
        // The index takes the constraint's name.
        let add = format!("{alter} UNIQUE USING INDEX {}{deferral}", quote_identifier(&index));
        if !self.run_for(&what, &add, &whole).await? && is_ours {
            self.session.command(&self.drop_index(&index)).await?;
        }
        Ok(())
    }

    /// The name of the index that a DEFERRABLE constraint is made of: the same at each try.
    async fn not_yet_deferrable(&self, constraint: &str) -> Result<String, PostgresError> {
        let whose = format!("{} {constraint}", self.here.quoted());
        let name = self.session.client.query_one("SELECT to_hex(hashtextextended($1, 0))", &[&whose]).await;
        let name = name.doing(|| format!("naming the index of constraint {constraint}"))?;
        Ok(format!("{NOT_YET_DEFERRABLE}{}", name.get::<_, &str>(0)))
    }

    /// Checked at the end of each transaction: within a batch the tables' rows come in no order.
    async fn foreign_key(&mut self, key: &ForeignKey) -> Result<(), PostgresError> {
        let there = self.config.target_table(&key.references);
        let columns = |names: &[String]| names.iter().map(|name| quote_identifier(name)).collect::<Vec<_>>().join(", ");
        let definition = format!(
            "FOREIGN KEY ({}) REFERENCES {} ({}) DEFERRABLE INITIALLY DEFERRED",
            columns(&key.columns),
            there.quoted(),
            columns(&key.referenced)
        );
        let mark = marks::read(&self.session.client, self.task, &key.references, Locking::None).await?;
        if mark.and_then(|mark| mark.stage) != Some(TableStage::Ready) {
            self.failed.push(format!(
                "Foreign key {:?} was not added to {}: {} was not loaded by this sink",
                key.name, self.here, key.references
            ));
            return Ok(());
        }
        self.add_constraint(&key.name, &definition, true).await
    }

    async fn default(&mut self, source: &TableName, default: &TableExtra) -> Result<(), PostgresError> {
        let query =
            "SELECT atthasdef FROM pg_attribute WHERE attrelid = to_regclass($1) AND attname = $2 AND NOT attisdropped";
        let found = self.session.client.query_opt(query, &[&self.here.quoted(), &default.name]).await;
        let found = found.doing(|| format!("looking for the default of {:?}", default.name))?;
        let client = &self.session.client;
        let is_constant = columns::read(client, self.task, source).await?.constant.contains(&default.name);
        // A column that is not here comes with its own change.
        if found.is_some_and(|row| is_constant || !row.get::<_, bool>(0)) {
            // Before it is there: a note without a default says nothing, a default without a note that the column is a person's.
            columns::put_known(client, self.task, source, &[&default.name]).await?;
            let (column, table) = (quote_identifier(&default.name), self.here.quoted());
            let statement = format!("ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT {}", default.definition);
            if self.run(&format!("the default of column {:?}", default.name), &statement).await? && is_constant {
                columns::put_constant(&self.session.client, self.task, source, &[&default.name], false).await?;
            }
        }
        Ok(())
    }
}

/// The index that a unique constraint is made of, and when the constraint is checked, as its definition says both. None for another
/// constraint, and for one that is made of no unique index.
fn made_of(definition: &str) -> Option<(String, &str)> {
    let rest = definition.strip_prefix("UNIQUE ").filter(|rest| !rest.contains(" WITHOUT OVERLAPS)"))?;
    let (rest, nulls) = match rest.strip_prefix("NULLS NOT DISTINCT ") {
        Some(rest) => (rest, " NULLS NOT DISTINCT"),
        None => (rest, ""),
    };
    let columns = rest.strip_suffix(" INITIALLY DEFERRED").unwrap_or(rest);
    let columns = columns.strip_suffix(" DEFERRABLE").unwrap_or(columns);
    Some((format!("{columns}{nulls}"), &rest[columns.len()..]))
}

#[cfg(test)]
mod tests {
    use super::made_of;

    #[test]
    fn a_unique_constraint_is_taken_apart_into_its_index_and_its_time() {
        let parts = |definition| made_of(definition).map(|(using, deferral)| format!("{using}|{deferral}"));
        assert_eq!(parts("UNIQUE (a, b)").as_deref(), Some("(a, b)|"));
        let whole = "UNIQUE NULLS NOT DISTINCT (a) INCLUDE (b) DEFERRABLE INITIALLY DEFERRED";
        assert_eq!(parts(whole).as_deref(), Some("(a) INCLUDE (b) NULLS NOT DISTINCT| DEFERRABLE INITIALLY DEFERRED"));
        let named = "UNIQUE (\" DEFERRABLE\") DEFERRABLE";
        assert_eq!(parts(named).as_deref(), Some("(\" DEFERRABLE\")| DEFERRABLE"));
        assert_eq!(parts("UNIQUE (id, during WITHOUT OVERLAPS)"), None);
        assert_eq!(parts("CHECK (a > 0)"), None);
    }
}
