//! A flow that is deleted and made again under its name, as our own remedies tell people to: nothing of the earlier one is taken
//! for the later one's.

use wallaby_tests::alone;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};

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
    system.is_equal_at("warehouse").await;
    let there: i64 =
        system.target().await.query_one("SELECT count(*) FROM ledger WHERE batch = -1000", &[]).await.unwrap().get(0);
    assert_eq!(there, 10);
}
