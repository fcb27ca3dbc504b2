//! Writes the runs of a batch: the net effect goes through temporary tables in a few statements per table.
//!
//! Order within a table: moves are read first (they need the old rows), then deletes, then whole rows, then partial
//! updates. A partial update that meets no row is answered by the source: the row is read again by key.

use std::collections::HashMap;
use std::sync::Arc;

use wallaby_connector_api::{KeyValues, SinkError, SourceLookup};
use wallaby_model::schema::quote_identifier;
use wallaby_model::{SegmentBody, TableName, TableSchema};

use crate::assemble::TableRuns;
use crate::catalog::fit_superseded;
use crate::collapse::{Bag, Bound, Chunk, CollapseError, Group, KeySpan, Net, Row, collapse, collapse_bag};
use crate::encode::{put, put_null, put_position, put_row};
use crate::error::{Doing, PostgresError};
use crate::metrics::{COPIES_REPEATED, ROWS_READ_AGAIN};
use crate::schema::{POSITION_COLUMN, Target, TargetColumn};
use crate::session::Session;

/// Rows that are read again are written in groups of so many at most, or of about so many bytes.
const READ_AGAIN_ROWS: usize = 256;
const READ_AGAIN_BYTES: usize = 4 << 20;

/// How rows of each shape in the batch are written.
pub(crate) type Targets = HashMap<Arc<TableSchema>, Arc<Target>>;

/// Writes into an open transaction.
pub(crate) struct Writer<'a> {
    pub session: &'a mut Session,
    pub targets: &'a Targets,
    pub lookup: &'a Arc<dyn SourceLookup>,
    /// The task, for metrics.
    pub sink: &'a str,
    /// Small steps after a violation: no direct copies.
    pub careful: bool,
}

impl Writer<'_> {
    /// Applies the tables' runs; returns the rows written and deleted.
    pub(crate) async fn write(&mut self, tables: &[TableRuns]) -> Result<usize, PostgresError> {
        self.truncate(tables).await?;
        let mut rows = 0;
        for run in tables.iter().flat_map(|table| &table.runs) {
            let Some(target) = self.targets.get(&run.schema) else { continue };
            rows += self.write_run(&Arc::clone(target), &run.chunks).await?;
            self.session.empty_many_stages().await?;
        }
        Ok(rows)
    }

    /// All tables in one statement: they may refer to each other.
    async fn truncate(&mut self, tables: &[TableRuns]) -> Result<(), PostgresError> {
        let truncated = tables.iter().filter(|table| table.truncated);
        let shapes = truncated.filter_map(|table| table.shapes.last());
        let names = shapes.filter_map(|(shape, _)| self.targets.get(shape)).map(|target| target.table.quoted());
        let names: Vec<String> = names.collect();
        if names.is_empty() {
            return Ok(());
        }
        self.session.command(&format!("TRUNCATE {}", names.join(", "))).await
    }

    async fn write_run(&mut self, target: &Target, chunks: &[Chunk]) -> Result<usize, PostgresError> {
        let bound = Bound::new(chunks, &target.wires);
        if target.key.is_empty() {
            let bag = collapse_bag(&bound)?;
            self.write_bag(target, &bound, &bag).await?;
            return Ok(bag.appends.len() + bag.removes.len());
        }
        let net = collapse(&bound, &target.key)?;
        self.write_net(target, &bound, &net).await?;
        Ok(net.rows())
    }

    async fn write_net(&mut self, target: &Target, bound: &Bound<'_>, net: &Net) -> Result<(), PostgresError> {
        let mut missing = Vec::new();
        let has_moves = !net.moves.is_empty();
        let direct = !self.careful && target.is_direct() && self.session.may_copy(&target.table);
        let stage_born = !net.born.is_empty() && !direct;
        let needs_stage = has_moves || stage_born || !net.whole.is_empty();
        let stage = if needs_stage { Some(self.stage_whole(target).await?) } else { None };
        if let Some(stage) = &stage {
            for group in &net.moves {
                missing.extend(self.resolve_moves(target, bound, net, group, stage).await?);
            }
        }
        self.delete(target, net).await?;
        let born_copied = net.born.is_empty() || (direct && self.copy_born(target, bound, &net.born).await?);
        let born: &[Row] = if born_copied { &[] } else { &net.born };
        match stage {
            Some(stage) => self.upsert(target, bound, [born, &net.whole], &stage).await?,
            None if !born.is_empty() => {
                let stage = self.stage_whole(target).await?;
                self.upsert(target, bound, [born, &[]], &stage).await?;
            }
            None => {}
        }
        for group in &net.partial {
            missing.extend(self.update(target, bound, group).await?);
        }
        if missing.is_empty() { Ok(()) } else { self.read_again(target, missing).await }
    }

    /// A stage for whole rows, one column per target column.
    async fn stage_whole(&mut self, target: &Target) -> Result<String, PostgresError> {
        let types: Vec<&str> = target.columns.iter().map(|column| column.staged.as_str()).collect();
        self.session.stage(&types).await
    }

    /// Whole rows through the stage, which may hold some already.
    async fn upsert(
        &mut self,
        target: &Target,
        bound: &Bound<'_>,
        rows: [&[Row]; 2],
        stage: &str,
    ) -> Result<(), PostgresError> {
        let doing = format!("applying rows to {}", target.table);
        let insert = upsert_statement(target, stage);
        let count = rows[0].len() + rows[1].len();
        if count == 0 {
            self.session.run(&insert, &doing).await?;
            return Ok(());
        }
        let row = |n: usize| if n < rows[0].len() { &rows[0][n] } else { &rows[1][n - rows[0].len()] };
        let encode = |n: usize, out: &mut Vec<u8>| encode_columns(target, bound, row(n), |_| true, 0, out);
        let copy = format!("COPY {stage} FROM STDIN (FORMAT binary)");
        self.session.copy(&copy, count, encode, Some(&insert), &doing).await?;
        Ok(())
    }

    /// Rows of a snapshot, no two of them with one key; returns how many. `is_fresh`: no row of the table is in their way.
    pub(crate) async fn load(
        &mut self,
        target: &Target,
        chunks: &[Chunk],
        is_fresh: bool,
    ) -> Result<usize, PostgresError> {
        let bound = Bound::new(chunks, &target.wires);
        let rows = collapse_bag(&bound)?.appends;
        if rows.is_empty() {
            return Ok(0);
        }
        let may_copy = is_fresh || target.key.is_empty();
        let direct = may_copy && target.is_direct() && self.session.may_copy(&target.table);
        if !(direct && self.copy_born(target, &bound, &rows).await?) {
            let stage = self.stage_whole(target).await?;
            self.upsert(target, &bound, [&rows, &[]], &stage).await?;
        }
        Ok(rows.len())
    }

    /// New rows straight into the table: half the work of the upsert. False when rows were in the way.
    async fn copy_born(&mut self, target: &Target, bound: &Bound<'_>, rows: &[Row]) -> Result<bool, PostgresError> {
        let doing = format!("copying rows to {}", target.table);
        let mut names = names(target.columns.iter());
        let is_keyless = target.key.is_empty();
        if is_keyless {
            // Rows without a position sort before those of the log, and a table may have no other column.
            let comma = if names.is_empty() { "" } else { ", " };
            names = format!("{names}{comma}{}", quote_identifier(POSITION_COLUMN));
        }
        let copy = format!("COPY {} ({names}) FROM STDIN (FORMAT binary)", target.table.quoted());
        let encode = |n: usize, out: &mut Vec<u8>| {
            encode_columns(target, bound, &rows[n], |_| true, usize::from(is_keyless), out)?;
            if is_keyless {
                put_null(out);
            }
            Ok(())
        };
        let mark = self.session.mark();
        self.session.command("SAVEPOINT wallaby_copy").await?;
        match self.session.copy(&copy, rows.len(), encode, Some("RELEASE wallaby_copy"), &doing).await {
            Ok(_) => Ok(true),
            // A row that was here before us, or a table that COPY does not take (row security, a view): the upsert says more.
            Err(PostgresError::Sql { source, .. }) if source.as_db_error().is_some() && !source.is_closed() => {
                self.session.command("ROLLBACK TO wallaby_copy; RELEASE wallaby_copy").await?;
                self.session.rolled_back_to(mark);
                self.session.copy_met_rows(&target.table);
                metrics::counter!(COPIES_REPEATED, "sink" => self.sink.to_owned()).increment(1);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn delete(&mut self, target: &Target, net: &Net) -> Result<(), PostgresError> {
        if net.deletes.is_empty() {
            return Ok(());
        }
        let key = target.key_columns();
        let types: Vec<&str> = key.iter().map(|column| column.staged.as_str()).collect();
        let stage = self.session.stage(&types).await?;
        let delete = format!("DELETE FROM {} t USING {stage} s WHERE {}", target.table.quoted(), match_key(target, 0));
        let encode = |n: usize, out: &mut Vec<u8>| {
            put_row(out, key.len());
            out.extend_from_slice(net.key(net.deletes[n]));
            Ok(())
        };
        let copy = format!("COPY {stage} FROM STDIN (FORMAT binary)");
        let doing = format!("deleting rows of {}", target.table);
        self.session.copy(&copy, net.deletes.len(), encode, Some(&delete), &doing).await?;
        Ok(())
    }

    /// Completes moved rows from the sink's old ones, into the stage for whole rows. Returns the keys of rows whose old
    /// row is not there.
    async fn resolve_moves(
        &mut self,
        target: &Target,
        bound: &Bound<'_>,
        net: &Net,
        group: &Group<(KeySpan, Row)>,
        stage: &str,
    ) -> Result<Vec<KeyValues>, PostgresError> {
        let doing = format!("moving rows of {}", target.table);
        let key = target.key_columns();
        let carried = |column: &TargetColumn| !group.unchanged[column.source];
        let present: Vec<&TargetColumn> = target.columns.iter().filter(|column| carried(column)).collect();
        let types: Vec<&str> = key.iter().chain(&present).map(|column| column.staged.as_str()).collect();
        let moved = self.session.stage(&types).await?;
        let mut next = key.len();
        let values = target.columns.iter().map(|column| {
            if !carried(column) {
                return column.uncast(&format!("t.{}", column.name));
            }
            next += 1;
            format!("s.c{}", next - 1)
        });
        let values = values.collect::<Vec<_>>().join(", ");
        let matches = match_key(target, 0);
        let insert =
            format!("INSERT INTO {stage} SELECT {values} FROM {moved} s JOIN {} t ON {matches}", target.table.quoted());
        let encode = |n: usize, out: &mut Vec<u8>| {
            let (base, row) = &group.rows[n];
            put_row(out, key.len() + present.len());
            out.extend_from_slice(net.key(*base));
            put_columns(target, bound, row, carried, out)
        };
        let copy = format!("COPY {moved} FROM STDIN (FORMAT binary)");
        let found = self.session.copy(&copy, group.rows.len(), encode, Some(&insert), &doing).await?;
        if found as usize == group.rows.len() {
            return Ok(Vec::new());
        }
        self.unmatched(target, &moved, &present, key.len(), &matches).await
    }

    /// Updates that leave columns alone. Returns the keys of rows that are not there.
    async fn update(
        &mut self,
        target: &Target,
        bound: &Bound<'_>,
        group: &Group<Row>,
    ) -> Result<Vec<KeyValues>, PostgresError> {
        let doing = format!("updating rows of {}", target.table);
        let carried = |column: &TargetColumn| !group.unchanged[column.source];
        let present: Vec<&TargetColumn> = target.columns.iter().filter(|column| carried(column)).collect();
        let types: Vec<&str> = present.iter().map(|column| column.staged.as_str()).collect();
        let stage = self.session.stage(&types).await?;
        let at = |source: usize| present.iter().position(|column| column.source == source);
        let equal = target.key_columns().into_iter().filter_map(|column| {
            let n = at(column.source)?;
            Some(format!("t.{} = {}", column.name, column.cast(&format!("s.c{n}"))))
        });
        let matches = equal.collect::<Vec<_>>().join(" AND ");
        let sets = present.iter().enumerate().filter(|(_, column)| !target.key.contains(&column.source));
        let sets = sets.map(|(n, column)| format!("{} = {}", column.name, column.cast(&format!("s.c{n}"))));
        let sets = sets.collect::<Vec<_>>().join(", ");
        let table = target.table.quoted();
        let update = if sets.is_empty() {
            // Nothing but unchanged values: only whether the rows are there is asked.
            format!("SELECT FROM {table} t JOIN {stage} s ON {matches}")
        } else {
            format!("UPDATE {table} t SET {sets} FROM {stage} s WHERE {matches}")
        };
        let encode = |n: usize, out: &mut Vec<u8>| encode_columns(target, bound, &group.rows[n], carried, 0, out);
        let copy = format!("COPY {stage} FROM STDIN (FORMAT binary)");
        let found = self.session.copy(&copy, group.rows.len(), encode, Some(&update), &doing).await?;
        if found as usize == group.rows.len() {
            return Ok(Vec::new());
        }
        self.unmatched(target, &stage, &present, 0, &matches).await
    }

    /// The source's keys of staged rows that match no row of the table, as text. `present` are the stage's columns from
    /// `offset` on.
    async fn unmatched(
        &mut self,
        target: &Target,
        stage: &str,
        present: &[&TargetColumn],
        offset: usize,
        matches: &str,
    ) -> Result<Vec<KeyValues>, PostgresError> {
        let key = target.schema.key();
        let expression = |&source: &u16| {
            let n = present.iter().position(|column| column.source == usize::from(source))?;
            Some(format!("s.c{}::text", n + offset))
        };
        let expressions: Option<Vec<String>> = key.iter().map(expression).collect();
        let Some(expressions) = expressions else {
            return Err(PostgresError::Sink(SinkError::Data {
                reason: format!(
                    "a row of {} is missing at the sink and its change does not carry its key",
                    target.table
                ),
                remedy: "Copy the missing rows to the sink by hand, then run wallaby resume".to_owned(),
            }));
        };
        let query = format!(
            "SELECT {} FROM {stage} s WHERE NOT EXISTS (SELECT FROM {} t WHERE {matches})",
            expressions.join(", "),
            target.table.quoted()
        );
        let statement = self.session.prepared(&query).await?;
        let rows = self.session.client.query(&statement, &[]).await;
        let rows = rows.doing(|| format!("looking for missing rows of {}", target.table))?;
        let keys = rows.iter().map(|row| (0..key.len()).map(|n| row.get::<_, Option<String>>(n)).collect());
        Ok(keys.collect())
    }

    /// Rows that are missing here, as the source has them now; what is gone there is deleted by a later change.
    async fn read_again(&mut self, target: &Target, keys: Vec<KeyValues>) -> Result<(), PostgresError> {
        metrics::counter!(ROWS_READ_AGAIN, "sink" => self.sink.to_owned()).increment(keys.len() as u64);
        tracing::info!(table = %target.table, rows = keys.len(), "partial changes met no row: reading again at the source");
        let mut left = keys.as_slice();
        while !left.is_empty() {
            let group = &left[..left.len().min(READ_AGAIN_ROWS)];
            let found = self.lookup.rows_by_keys(&target.schema, group, READ_AGAIN_BYTES);
            // However long the source takes: the transaction stays.
            let found = self.session.wait_for(found).await??;
            left = &left[found.keys.clamp(1, group.len())..];
            self.write_again(target, found.rows).await?;
            self.session.empty_many_stages().await?;
        }
        Ok(())
    }

    /// Rows of the source, over what is here.
    async fn write_again(&mut self, target: &Target, bodies: Vec<SegmentBody>) -> Result<(), PostgresError> {
        let mut by_shape: HashMap<Arc<TableSchema>, Vec<Chunk>> = HashMap::new();
        for body in bodies {
            let body = Arc::new(body);
            for changes in &body.tables {
                let chunk = Chunk { body: Arc::clone(&body), changes: changes.clone() };
                by_shape.entry(Arc::clone(&changes.schema)).or_default().push(chunk);
            }
        }
        for (shape, chunks) in by_shape {
            // The source may be ahead: columns that are not here yet come with their own change.
            let first = chunks[0].position(0);
            let target = if shape == target.schema {
                target.clone()
            } else {
                fit_superseded(&self.session.client, &shape, &target.table, first).await?
            };
            let bound = Bound::new(&chunks, &target.wires);
            let net = collapse(&bound, &target.key)?;
            let stage = self.stage_whole(&target).await?;
            self.upsert(&target, &bound, [&net.born, &net.whole], &stage).await?;
        }
        Ok(())
    }

    async fn write_bag(&mut self, target: &Target, bound: &Bound<'_>, bag: &Bag) -> Result<(), PostgresError> {
        if !bag.removes.is_empty() {
            self.remove(target, bound, bag).await?;
        }
        if bag.appends.is_empty() {
            return Ok(());
        }
        let doing = format!("appending rows to {}", target.table);
        let encode = |n: usize, out: &mut Vec<u8>| {
            let row = &bag.appends[n];
            encode_columns(target, bound, row, |_| true, 1, out)?;
            put_position(out, bound.position(row.at));
            Ok(())
        };
        let position = quote_identifier(POSITION_COLUMN);
        let names: Vec<&str> = target.columns.iter().map(|column| column.name.as_str()).chain([&*position]).collect();
        let names = names.join(", ");
        let table = target.table.quoted();
        if target.is_direct() {
            let copy = format!("COPY {table} ({names}) FROM STDIN (FORMAT binary)");
            self.session.copy(&copy, bag.appends.len(), encode, None, &doing).await?;
            return Ok(());
        }
        let types = target.columns.iter().map(|column| column.staged.as_str()).chain(["text"]);
        let stage = self.session.stage(&types.collect::<Vec<_>>()).await?;
        let values = target.columns.iter().enumerate().map(|(n, column)| column.cast(&format!("s.c{n}")));
        let values = values.chain([format!("s.c{}", target.columns.len())]).collect::<Vec<_>>().join(", ");
        let insert = format!("INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {stage} s");
        let copy = format!("COPY {stage} FROM STDIN (FORMAT binary)");
        self.session.copy(&copy, bag.appends.len(), encode, Some(&insert), &doing).await?;
        Ok(())
    }

    /// Takes whole rows away, each as often as asked, oldest first. Rows are compared by their text: exact, and there
    /// for types without an equality.
    async fn remove(&mut self, target: &Target, bound: &Bound<'_>, bag: &Bag) -> Result<(), PostgresError> {
        let types = ["integer", "integer"].into_iter();
        let types = types.chain(target.columns.iter().map(|column| column.staged.as_str()));
        let stage = self.session.stage(&types.collect::<Vec<_>>()).await?;
        let theirs = target.columns.iter().map(|column| format!("t.{}", column.name)).collect::<Vec<_>>().join(", ");
        let ours = target.columns.iter().enumerate();
        let ours = ours.map(|(n, column)| column.cast(&format!("s.c{}", n + 2))).collect::<Vec<_>>().join(", ");
        let delete = format!(
            "DELETE FROM {table} d USING (\
               SELECT t.tableoid AS part, t.ctid AS place, s.c1 AS times, \
                 row_number() OVER (PARTITION BY s.c0 ORDER BY t.{position} NULLS FIRST) AS n \
               FROM {stage} s JOIN {table} t ON ROW({theirs})::text = ROW({ours})::text) x \
             WHERE d.ctid = x.place AND d.tableoid = x.part AND x.n <= x.times",
            table = target.table.quoted(),
            position = quote_identifier(POSITION_COLUMN),
        );
        let encode = |n: usize, out: &mut Vec<u8>| {
            let (row, times) = &bag.removes[n];
            put_row(out, 2 + target.columns.len());
            // A batch has fewer than 2³¹ rows.
            put(out, &i32::try_from(n).unwrap_or(i32::MAX).to_be_bytes());
            put(out, &i32::try_from(*times).unwrap_or(i32::MAX).to_be_bytes());
            put_columns(target, bound, row, |_| true, out)
        };
        let copy = format!("COPY {stage} FROM STDIN (FORMAT binary)");
        let doing = format!("deleting rows of {}", target.table);
        self.session.copy(&copy, bag.removes.len(), encode, Some(&delete), &doing).await?;
        Ok(())
    }
}

fn names<'a>(columns: impl Iterator<Item = &'a TargetColumn>) -> String {
    columns.map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// `t`'s key equals the staged columns from `offset` on.
fn match_key(target: &Target, offset: usize) -> String {
    let equal = target.key_columns().into_iter().enumerate();
    let equal = equal.map(|(n, column)| {
        let staged = column.cast(&format!("s.c{}", n + offset));
        format!("t.{} = {staged}", column.name)
    });
    equal.collect::<Vec<_>>().join(" AND ")
}

fn upsert_statement(target: &Target, stage: &str) -> String {
    let values = target.columns.iter().enumerate().map(|(n, column)| column.cast(&format!("s.c{n}")));
    let values = values.collect::<Vec<_>>().join(", ");
    let rest = target.columns.iter().filter(|column| !target.key.contains(&column.source));
    let sets = rest.map(|column| format!("{name} = EXCLUDED.{name}", name = column.name)).collect::<Vec<_>>();
    let action = if sets.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {}", sets.join(", ")) };
    let conflict = match target.key.is_empty() {
        true => String::new(),
        false => format!(" ON CONFLICT ({}) DO {action}", names(target.key_columns().into_iter())),
    };
    format!(
        "INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {stage} s{conflict}",
        table = target.table.quoted(),
        names = names(target.columns.iter()),
    )
}

/// A row of the columns that `carried` takes, announced with `more` fields to come.
fn encode_columns(
    target: &Target,
    bound: &Bound<'_>,
    row: &Row,
    carried: impl Fn(&TargetColumn) -> bool,
    more: usize,
    out: &mut Vec<u8>,
) -> Result<(), PostgresError> {
    let count = target.columns.iter().filter(|column| carried(column)).count();
    put_row(out, count + more);
    put_columns(target, bound, row, carried, out)
}

fn put_columns(
    target: &Target,
    bound: &Bound<'_>,
    row: &Row,
    carried: impl Fn(&TargetColumn) -> bool,
    out: &mut Vec<u8>,
) -> Result<(), PostgresError> {
    for column in target.columns.iter().filter(|column| carried(column)) {
        let written = bound.write(row.cell(column.source), column.source, out);
        written.map_err(|bad| CollapseError::Value(TableName::clone(&target.table), bad))?;
    }
    Ok(())
}
