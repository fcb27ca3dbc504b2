//! A new flow, before etcd has a checkpoint of it. Nothing is loaded: rows that are behind the slot's position come through the log or
//! not at all.

use wallaby_pool_worker::failpoint::Failpoint;

use super::{LEDGER, add, at, captures, ledger, number};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_the_first_checkpoint_the_next_owner_begins_where_the_slot_does() {
    for point in [Failpoint::StopAfterPublicationMade, Failpoint::StopAfterSlotMade, Failpoint::StopAfterResume] {
        println!("killed at {point:?}");
        let scene = ledger("beginning").await;
        let _offers = scene.offering();
        scene.coordination.create_flow(scene.document("public.ledger", "never", "")).await.unwrap();
        let failpoints = at(point);
        let first = scene.worker_with("w1", failpoints.clone());
        scene.stands_at(&failpoints, point).await;
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
        // Before the slot there is nothing that a row could be behind of.
        let has_slot = number(&scene.source, slots).await.unwrap() == 1;
        assert_eq!(has_slot, point != Failpoint::StopAfterPublicationMade);
        if has_slot {
            add(&scene, 0..10).await;
        }
        drop(first);
        if has_slot {
            add(&scene, 10..20).await;
        }
        let _second = scene.worker("w2");
        captures(&scene).await;
        add(&scene, 20..30).await;
        scene.equal(LEDGER).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_the_slot_is_being_made_it_is_made_by_the_next_owner() {
    let scene = ledger("making").await;
    let _offers = scene.offering();
    // A slot waits for every transaction that is older than it.
    let older = scene.source.connect().await;
    older.batch_execute("BEGIN; INSERT INTO ledger VALUES (0, 'older than the slot')").await.unwrap();
    scene.coordination.create_flow(scene.document("public.ledger", "never", "")).await.unwrap();
    let first = scene.worker("w1");
    let maker = "SELECT active_pid::int8 FROM pg_replication_slots
        WHERE database = current_database() AND confirmed_flush_lsn IS NULL AND active_pid IS NOT NULL";
    let dead = scene.until("the slot is being made", async || number(&scene.source, maker).await).await;
    drop(first);
    let _second = scene.worker("w2");
    let backend = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {dead}");
    scene
        .until("the dead owner's session is ended", async || match number(&scene.source, &backend).await? {
            0 => Ok(()),
            count => Err(format!("{count}")),
        })
        .await;
    older.batch_execute("ROLLBACK").await.unwrap();
    captures(&scene).await;
    add(&scene, 0..10).await;
    scene.equal(LEDGER).await;
}
