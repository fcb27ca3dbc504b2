//! The first load at a real database: the hazards of overlapping loads, mixed generations, and what is added after it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod chunks;
mod columns;
mod constraints;
mod extras;
mod in_the_way;
mod replays;
#[path = "../target/mod.rs"]
mod target;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use target::{Target, query, rows};
use tokio::sync::Notify;
use wallaby_connector_api::conformance::{PartFeed, Shape, SinkUnderTest, Value};
use wallaby_connector_api::{ChunkLoad, ChunkParts, Faults, Loaded, SinkError};
use wallaby_model::{ChunkId, ColumnType, RunId, SegmentBody, TableSchema};
use wallaby_testkit::eventually;

const RUN: RunId = RunId(1);
const LIMIT: Duration = Duration::from_secs(20);

fn items() -> Arc<TableSchema> {
    let shape = Shape::new("items").key("id", ColumnType::Int4).column("n", ColumnType::Int4);
    shape.column("big", ColumnType::Text).build()
}

fn events() -> Arc<TableSchema> {
    Shape::new("events").column("n", ColumnType::Int4).build()
}

fn item(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

fn chunk(table: &TableSchema, number: u32, restart: u32, is_one_generation: bool) -> ChunkLoad {
    let chunk = ChunkId { table: 0, restart, number };
    ChunkLoad { run: RUN, chunk, table: table.table.clone(), restart, is_one_generation }
}

async fn load(target: &Target, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, SinkError> {
    target.make_loader(Faults::default()).unwrap().load(chunk, parts).await
}

/// Gives its parts out once it is allowed to.
struct Held {
    asked: Arc<Notify>,
    release: Arc<Notify>,
    inner: PartFeed,
    is_released: bool,
}

impl Held {
    fn new(inner: PartFeed) -> (Held, Arc<Notify>, Arc<Notify>) {
        let (asked, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let held = Held { asked: Arc::clone(&asked), release: Arc::clone(&release), inner, is_released: false };
        (held, asked, release)
    }
}

#[async_trait]
impl ChunkParts for Held {
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError> {
        if !self.is_released {
            self.asked.notify_one();
            self.release.notified().await;
            self.is_released = true;
        }
        self.inner.next().await
    }
}

/// A backend of ours waits for a lock.
async fn somebody_waits(target: &Target) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually(LIMIT, "somebody waits for a lock", async || {
        if query(&target.database, waiting).await == rows(&[&["0"]]) { Err("nobody") } else { Ok(()) }
    })
    .await;
}

/// A backend of ours waits for a lock, or what should wait is through.
async fn somebody_waits_unless(target: &Target, is_through: impl Fn() -> bool) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    eventually(LIMIT, "somebody waits for a lock, or is through", async || {
        let waits = query(&target.database, waiting).await != rows(&[&["0"]]);
        if waits || is_through() { Ok(()) } else { Err("neither") }
    })
    .await;
}
