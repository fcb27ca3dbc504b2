//! Where nothing that is captured changes, Postgres is told all the same that its WAL may go: heartbeats move the log.

use tokio_postgres::Client;
use wallaby_model::{Lsn, Position};
use wallaby_testkit::eventually;
use wallaby_tests::system::System;
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::small;

/// Inserts into a table that the flow leaves out, and waits until Postgres was told of more than that; the end of the WAL behind the insert.
async fn slot_passes_what_is_not_captured(system: &System, source: &Client) -> Lsn {
    source.batch_execute("INSERT INTO audit_log (message) VALUES ('nobody captures this')").await.unwrap();
    let row = source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap();
    let end: Lsn = row.get::<_, String>(0).parse().unwrap();
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    eventually(PATIENCE, "the slot moves", async || {
        let row = source.query_one(sql, &[&system.flow().slot_name()]).await.map_err(|error| error.to_string())?;
        let confirmed: Lsn = row.get::<_, String>(0).parse().unwrap();
        if confirmed >= end { Ok(()) } else { Err(format!("{confirmed} is told, {end} is written")) }
    })
    .await;
    end
}

async fn position(target: &Client) -> Position {
    let sql = "SELECT position FROM wallaby.checkpoints WHERE task = 'shop.apply.warehouse'";
    target.query_one(sql, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()
}

async fn sink_passes(target: &Client, end: Lsn) {
    eventually(PATIENCE, "the sink's position moves", async || match position(target).await {
        position if position.commit >= end => Ok(()),
        position => Err(format!("{position} and not {end}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slot_moves_on_a_quiet_database_whatever_the_sink_does() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    system.row_passes().await;
    let (source, target) = (system.source().await, system.target().await);
    let end = slot_passes_what_is_not_captured(&system, &source).await;
    sink_passes(&target, end).await;

    // The sink does not answer: its checkpoint can be read and not moved.
    target.batch_execute("BEGIN; LOCK TABLE wallaby.checkpoints IN EXCLUSIVE MODE").await.unwrap();
    let stands = position(&target).await;
    let end = slot_passes_what_is_not_captured(&system, &source).await;
    assert_eq!(position(&target).await, stands);
    assert!(stands.commit < end, "{stands} has {end} already");
    target.batch_execute("ROLLBACK").await.unwrap();
    sink_passes(&target, end).await;

    // And when somebody paused it.
    let said = system.cli(&["pause", "shop/warehouse"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    eventually(PATIENCE, "the sink's task ends", async || match system.owner_now(&system.apply_task()).await {
        None => Ok(()),
        owner => Err(owner),
    })
    .await;
    let stands = position(&target).await;
    let end = slot_passes_what_is_not_captured(&system, &source).await;
    assert_eq!(position(&target).await, stands);
    let said = system.cli(&["resume", "shop/warehouse"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    sink_passes(&target, end).await;
    system.row_passes().await;
}
