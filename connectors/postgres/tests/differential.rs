//! Random changes, once as plain SQL and once as batches cut at random: both must end up alike.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::sync::Arc;

use rand::prelude::*;
use rand::rngs::StdRng;
use target::{Target, apply, table_rows};
use wallaby_connector_api::conformance::{Change, Log, Shape, Value};
use wallaby_model::{ColumnType, TableName, TableSchema};
use wallaby_testkit::Seeded;

/// Rounds of transactions, batch, comparison.
const ROUNDS: usize = 60;
const KEYS: i64 = 12;

/// A table and what stands in it.
struct Model {
    shape: Arc<TableSchema>,
    /// How many leading columns are the key; 0 for none.
    key: usize,
    rows: Vec<Vec<Value>>,
}

impl Model {
    fn sql_name(&self) -> String {
        TableName::new("oracle", self.shape.table.name.clone()).quoted()
    }

    fn key_of(&self, row: &[Value]) -> Vec<Value> {
        let mut key = row.to_vec();
        key[self.key..].fill(Value::Null);
        key
    }

    fn is_free(&self, row: &[Value]) -> bool {
        self.key == 0 || !self.rows.iter().any(|other| other[..self.key] == row[..self.key])
    }

    fn random_row(&self, rng: &mut StdRng) -> Vec<Value> {
        let value = |(index, column): (usize, &wallaby_model::Column)| match column.kind {
            ColumnType::Int4 => Value::Int(rng.random_range(0..KEYS)),
            _ if index >= self.key && rng.random_bool(0.1) => Value::Null,
            _ => Value::Text(format!("v{}", rng.random_range(0..KEYS))),
        };
        self.shape.columns.iter().enumerate().map(value).collect()
    }

    fn matches(&self, row: &[Value]) -> String {
        let columns = if self.key == 0 { self.shape.columns.len() } else { self.key };
        let equal =
            (0..columns).map(|n| format!("\"{}\" IS NOT DISTINCT FROM {}", self.shape.columns[n].name, sql(&row[n])));
        let equal = equal.collect::<Vec<_>>().join(" AND ");
        format!("ctid = (SELECT ctid FROM {} WHERE {equal} LIMIT 1)", self.sql_name())
    }

    /// A random change: as the WAL has it, and as SQL.
    fn change(&mut self, rng: &mut StdRng) -> Option<(Change, String)> {
        let table = self.sql_name();
        let shape = Arc::clone(&self.shape);
        match rng.random_range(0..100) {
            0..30 => {
                let row = self.random_row(rng);
                if !self.is_free(&row) {
                    return None;
                }
                self.rows.push(row.clone());
                let values = row.iter().map(sql).collect::<Vec<_>>().join(", ");
                Some((Change::insert(&shape, row), format!("INSERT INTO {table} VALUES ({values})")))
            }
            30..80 => {
                let at = rng.random_range(0..self.rows.len().max(1));
                let old = self.rows.get(at)?.clone();
                let mut new = self.random_row(rng);
                let key_changes = self.key > 0 && rng.random_bool(0.35);
                if !key_changes {
                    new[..self.key].clone_from_slice(&old[..self.key]);
                } else if !self.is_free(&new) {
                    return None;
                }
                // Only text is ever toasted. What did not change may be left out.
                let mut sent = new.clone();
                for column in self.key..new.len() {
                    if shape.columns[column].kind == ColumnType::Text && rng.random_bool(0.5) {
                        new[column] = old[column].clone();
                        sent[column] = if old[column] == Value::Null { Value::Null } else { Value::Unchanged };
                    }
                }
                self.rows[at] = new.clone();
                let sets = shape.columns.iter().zip(&new).map(|(c, v)| format!("\"{}\" = {}", c.name, sql(v)));
                let sets = sets.collect::<Vec<_>>().join(", ");
                let statement = format!("UPDATE {table} SET {sets} WHERE {}", self.matches(&old));
                let change = match self.key {
                    0 => Change::update_full(&shape, old, sent),
                    _ if key_changes => Change::update_key(&shape, self.key_of(&old), sent),
                    _ => Change::update(&shape, sent),
                };
                Some((change, statement))
            }
            80..99 => {
                let at = rng.random_range(0..self.rows.len().max(1));
                self.rows.get(at)?;
                let old = self.rows.remove(at);
                let statement = format!("DELETE FROM {table} WHERE {}", self.matches(&old));
                let change = match self.key {
                    0 => Change::delete_full(&shape, old),
                    _ => Change::delete(&shape, self.key_of(&old)),
                };
                Some((change, statement))
            }
            _ => {
                self.rows.clear();
                Some((Change::truncate(&shape), format!("TRUNCATE {table}")))
            }
        }
    }
}

fn sql(value: &Value) -> String {
    match value {
        Value::Int(number) => number.to_string(),
        Value::Text(text) => format!("'{text}'"),
        _ => "NULL".to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_end_up_as_plain_sql_does() {
    let mut rng = StdRng::seeded();
    let target = Target::fresh("differential").await;
    let int = ColumnType::Int4;
    let text = ColumnType::Text;
    let model = |shape: Shape, key| Model { shape: shape.build(), key, rows: Vec::new() };
    let mut tables = [
        model(Shape::new("one").key("id", int).column("n", int).column("big", text).column("huge", text), 1),
        model(Shape::new("two").key("k1", text).key("k2", int).column("big", text), 2),
        model(Shape::new("bag").column("n", int).column("big", text).full(), 0),
    ];
    target.sql("CREATE SCHEMA oracle").await;
    target.sql("CREATE TABLE oracle.one (id int PRIMARY KEY, n int, big text, huge text)").await;
    target.sql("CREATE TABLE oracle.two (k1 text, k2 int, big text, PRIMARY KEY (k1, k2))").await;
    target.sql("CREATE TABLE oracle.bag (n int, big text)").await;
    let mut log = Log::new();
    let mut sink = target.opened(&log).await;
    let mut changes = 0;
    for round in 0..ROUNDS {
        // Half-way the first table gets a column.
        if round == ROUNDS / 2 {
            target.sql("ALTER TABLE oracle.one ADD COLUMN late text").await;
            let shape = Shape::new("one").key("id", int).column("n", int).column("big", text).column("huge", text);
            tables[0].shape = shape.column("late", text).build();
            for row in &mut tables[0].rows {
                row.push(Value::Null);
            }
        }
        let mut statements = Vec::new();
        for _ in 0..rng.random_range(1..8) {
            let mut transaction = Vec::new();
            for _ in 0..rng.random_range(1..8) {
                let table = rng.random_range(0..tables.len());
                if let Some((change, statement)) = tables[table].change(&mut rng) {
                    transaction.push(change);
                    statements.push(statement);
                }
            }
            changes += transaction.len();
            log.transaction(transaction);
        }
        target.sql(&statements.join(";\n")).await;
        let batch = log.batch_in_segments(rng.random_range(1..12));
        apply(&mut sink, &batch).await;
        for table in &tables {
            let name = &table.shape.table;
            let expected = table_rows(&target.database, &TableName::new("oracle", name.name.clone())).await;
            let mut found = table_rows(&target.database, name).await;
            if expected.is_empty() && found.is_empty() {
                continue;
            }
            // A column that was added shows at the sink with its first row.
            let width = expected.first().map_or(0, Vec::len);
            found.iter_mut().for_each(|row| row.resize(width, None));
            assert_eq!(found, expected, "{name} after round {round}:\n{}", statements.join("\n"));
        }
    }
    assert!(changes > ROUNDS * 5, "only {changes} changes were made");
}
