//! A flow that is deleted and made again under its name, as our own remedies tell people to, and a sink that leaves a living flow
//! and comes again: nothing of the earlier one is taken for the later one's.

use wallaby_coordination::{Key, PurgePoint};
use wallaby_model::Lsn;
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_that_is_made_again_loads_again() {
    let _alone = alone().await;
    let flow = FlowFile { snapshot: "initial", ..FlowFile::default() };
    let (mut system, traffic) = System::start_with_traffic(Plan { flow, ..Plan::default() }, 200).await;
    system.row_passes().await;
    system.all_is_equal(traffic).await;
    let said = system.cli(&["delete", "shop", "--wait"]).await;
    assert_eq!(said.code, 0, "{}", said.text);

    // What nobody captures: rows go, rows come, rows change.
    let source = system.source().await;
    let sql = "UPDATE customers SET name = 'elsewhere'; DELETE FROM order_items WHERE line = 1; \
        INSERT INTO ledger SELECT -1000 - g, -1000, 10, 'uncaptured' FROM generate_series(1, 10) g";
    source.batch_execute(sql).await.unwrap();
    system.apply_flow().await;
    system.row_passes().await;
    // Tables are handed over one by one, and a row of one says nothing of the others.
    system.becomes_equal_at("warehouse").await;
    system.row_passes().await;
    system.is_equal_at("warehouse").await;
    let there: i64 =
        system.target().await.query_one("SELECT count(*) FROM ledger WHERE batch = -1000", &[]).await.unwrap().get(0);
    assert_eq!(there, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_added_again_loads_again() {
    let _alone = alone().await;
    let both = FlowFile {
        snapshot: "initial",
        more_sinks: vec!["second".to_owned()],
        replay_window: "0s",
        ..FlowFile::default()
    };
    let one = FlowFile { more_sinks: Vec::new(), ..both.clone() };
    let plan = Plan { flow: both.clone(), ..Plan::default() };
    let (mut system, traffic) = System::start_with_traffic(plan, 200).await;
    system.row_passes().await;
    system.all_is_equal(traffic).await;
    system.is_equal_at("second").await;
    let said = system.apply(&one).await;
    assert_eq!(said.code, 0, "{}", said.text);

    // What the second sink never hears of: it happens while the sink is away, and leaves the log before the sink comes again.
    let source = system.source().await;
    let sql = "UPDATE customers SET name = 'elsewhere'; DELETE FROM order_items WHERE line = 1; \
        INSERT INTO ledger SELECT -1000 - g, -1000, 10, 'missed' FROM generate_series(1, 10) g";
    source.batch_execute(sql).await.unwrap();
    system.row_passes().await;
    system.is_equal_at("warehouse").await;
    let row = source.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
    let missed: Lsn = row.get::<_, String>(0).parse().unwrap();
    eventually(PATIENCE, "the log lets go of what the sink missed", async || {
        // Something has to follow, so that there is a boundary behind it.
        source.batch_execute("UPDATE customers SET name = 'elsewhere still' WHERE id = 1").await.unwrap();
        let entry = system.coordination.get(&Key::FlowPurge(system.flow())).await.map_err(|e| e.to_string())?;
        let purged = entry.map(|entry| entry.decode::<PurgePoint>().unwrap().position.commit).unwrap_or_default();
        if purged > missed { Ok(()) } else { Err(format!("purged up to {purged}, not {missed}")) }
    })
    .await;
    let said = system.apply(&both).await;
    assert_eq!(said.code, 0, "{}", said.text);
    system.becomes_equal_at("second").await;
    system.row_passes().await;
    system.becomes_equal_at("second").await;
    system.is_equal_at("warehouse").await;
}
