//! Workers that die between two steps of what is done seldom: a flow's beginning and its end, a purge, the opening of a sink,
//! the plan and the end of a run.

mod beginning;
mod opening;
mod purge;
mod removal;
mod runs;

use std::sync::Arc;

use wallaby_model::TaskId;
use wallaby_model::condition::ConditionType;
use wallaby_pool_worker::failpoint::{Failpoint, Failpoints};
use wallaby_staging::{Connections, Log, NatsTarget};

use crate::scene::*;

/// Without the column that the sink adds to a table without a key.
const LEDGER: &str = "SELECT n || ' ' || pad FROM ledger ORDER BY n, pad";

/// A scene with a table that has no key: what comes twice stands there twice.
async fn ledger(name: &str) -> Arc<Scene> {
    let scene = Arc::new(Scene::new(name).await);
    let table = "CREATE TABLE ledger (n int NOT NULL, pad text NOT NULL); ALTER TABLE ledger REPLICA IDENTITY FULL";
    scene.source.batch_execute(table).await.unwrap();
    scene
}

/// Commits rows with these numbers, each in a transaction of its own.
async fn add(scene: &Scene, numbers: std::ops::Range<u32>) {
    for n in numbers {
        scene.source.batch_execute(&format!("INSERT INTO ledger VALUES ({n}, md5('{n}'))")).await.unwrap();
    }
}

/// Stops at this point.
fn at(point: Failpoint) -> Failpoints {
    Failpoints::parse(point.name()).unwrap()
}

/// Waits until the capture streams.
async fn captures(scene: &Scene) {
    scene
        .until("the capture streams", async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.iter().find(|condition| condition.kind == ConditionType::Capturing);
            match said {
                Some(said) if said.reason == "Streaming" => Ok(()),
                said => Err(format!("{said:?}")),
            }
        })
        .await;
}

/// The first column of the first row.
async fn number(client: &tokio_postgres::Client, sql: &str) -> Result<i64, String> {
    client.query_one(sql, &[]).await.map(|row| row.get(0)).map_err(|error| error.to_string())
}

/// The flow's log.
async fn log(scene: &Scene) -> Log {
    let target = NatsTarget { servers: vec![scene.nats.url()], name: "test".to_owned(), ..NatsTarget::default() };
    Log::new(scene.flow.clone(), Connections::open(&target).await.unwrap())
}
