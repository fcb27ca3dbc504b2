//! A table is altered at the source in a way that nobody follows by himself: each sink stops alone, says what to run, and goes on alone.

use serde_json::Value;
use tokio_postgres::Client;
use wallaby_loadtest::compare;
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::small;

const SINKS: [&str; 2] = ["warehouse", "second"];

/// `Delivering` of a sink, as programs see it.
async fn delivering(system: &System, sink: &str) -> Result<Value, String> {
    let said = system.cli(&["describe", &format!("shop/{sink}"), "-o", "json"]).await;
    let value: Value = serde_json::from_str(&said.text).map_err(|error| format!("{error}: {}", said.text))?;
    let conditions = value["conditions"].as_array().ok_or_else(|| said.text.clone())?;
    conditions.iter().find(|found| found["type"] == "Delivering").cloned().ok_or(said.text)
}

/// Waits until a sink has stopped for its tables' sake; what it says.
async fn stops(system: &System, sink: &str) -> String {
    let what = format!("{sink} stops and says what to run");
    eventually(PATIENCE, &what, async || match delivering(system, sink).await? {
        found if found["reason"] == "SinkConfiguration" && found["status"] == "False" => {
            Ok(found["message"].as_str().unwrap_or_default().to_owned())
        }
        found => Err(found.to_string()),
    })
    .await
}

async fn has_parcels(client: &Client, sink: &str, wanted: &[&str]) {
    let sql = "SELECT concat_ws('/', id, label) FROM parcels ORDER BY id";
    eventually(PATIENCE, &format!("{sink} has {wanted:?}"), async || {
        let rows = client.query(sql, &[]).await.map_err(|error| error.to_string())?;
        let found: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if found == wanted { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_column_stops_each_sink_alone_until_its_statement_is_run_there() {
    let _alone = alone().await;
    let flow = FlowFile { more_sinks: vec!["second".to_owned()], ..small().flow };
    let system = System::start(Plan { flow, ..small() }).await;
    let source = system.source().await;
    source.batch_execute("CREATE TABLE parcels (id int PRIMARY KEY, label text, weight int)").await.unwrap();
    system.apply_flow().await;
    let targets = [system.target().await, system.postgres.connect("second").await.unwrap()];
    eventually(PATIENCE, "the second sink knows where it begins", async || {
        let sql = "SELECT position FROM wallaby.checkpoints WHERE position IS NOT NULL";
        targets[1].query_one(sql, &[]).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    source.batch_execute("INSERT INTO parcels VALUES (1, 'books', 3)").await.unwrap();
    for (target, sink) in targets.iter().zip(SINKS) {
        has_parcels(target, sink, &["1/books"]).await;
    }

    source.batch_execute("ALTER TABLE parcels DROP COLUMN weight").await.unwrap();
    source.batch_execute("INSERT INTO parcels VALUES (2, 'shoes')").await.unwrap();
    let [said_first, said_second] = [stops(&system, SINKS[0]).await, stops(&system, SINKS[1]).await];
    println!("{said_second}");
    assert_eq!(said_first, said_second, "both have the same table");
    assert!(said_second.contains("wallaby resume"), "{said_second}");

    // What the message says is run at one of them.
    let statement = said_second.split_once("Run at the sink: ").and_then(|(_, rest)| rest.split_once("; then "));
    let (statement, _) = statement.unwrap_or_else(|| panic!("no statement in {said_second:?}"));
    assert!(statement.contains("DROP COLUMN") && statement.contains("weight"), "{statement}");
    targets[1].batch_execute(statement).await.unwrap();
    let said = system.cli(&["resume", "shop/second"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    source.batch_execute("INSERT INTO parcels VALUES (3, 'tea')").await.unwrap();
    has_parcels(&targets[1], "second", &["1/books", "2/shoes", "3/tea"]).await;
    assert_eq!(stops(&system, "warehouse").await, said_first, "the other sink waits on");
    has_parcels(&targets[0], "warehouse", &["1/books"]).await;
    eventually(PATIENCE, "the second sink delivers", async || match delivering(&system, "second").await? {
        found if found["status"] == "True" => Ok(()),
        found => Err(found.to_string()),
    })
    .await;

    // The other one loses nothing by having waited.
    targets[0].batch_execute(statement).await.unwrap();
    let said = system.cli(&["resume", "shop/warehouse"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    has_parcels(&targets[0], "warehouse", &["1/books", "2/shoes", "3/tea"]).await;
    for target in [system.target_dsn(), system.dsn_of("second")] {
        let comparison = compare(&system.source_dsn(), &target, &["public.parcels"]).await.unwrap();
        assert!(comparison.is_equal(), "{comparison}");
    }
}
