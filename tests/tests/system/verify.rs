//! `wallaby verify`, as somebody who calls it sees it.

use serde_json::Value;
use wallaby_model::{TaskId, TaskKind};
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

/// The JSON of a comparison, and its exit code.
async fn compared(system: &System, options: &[&str]) -> (Value, i32) {
    let said = system.cli(&[&["verify", "shop", "-o", "json"], options].concat()).await;
    let json = said.text.find('{').map_or("", |at| &said.text[at..]);
    let end = json.rfind('}').map_or(0, |at| at + 1);
    let value = serde_json::from_str(&json[..end]).unwrap_or_else(|error| panic!("{error}: {}", said.text));
    (value, said.code)
}

fn table<'a>(report: &'a Value, name: &str) -> &'a Value {
    let tables = report["tables"].as_array().unwrap();
    tables.iter().find(|table| table["table"] == name).unwrap_or_else(|| panic!("{name} is not in {report}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_differs_is_named_and_what_does_not_end_is_ended() {
    let _alone = alone().await;
    let flow = FlowFile { snapshot: "initial", ..FlowFile::default() };
    let (mut system, traffic) = System::start_with_traffic(Plan { flow, ..Plan::default() }, 200).await;
    system.row_passes().await;

    // While rows flow: what is on its way is no difference.
    let (report, code) = compared(&system, &["--within", "60s"]).await;
    assert_eq!((code, &report["result"]), (0, &Value::from("equal")), "{report}");
    assert!(report["tables"].as_array().unwrap().len() >= 5, "{report}");
    system.all_is_equal(traffic).await;

    // A worker that compares is killed: another one begins anew.
    let target = system.target().await;
    target.batch_execute("BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let server = format!("127.0.0.1:{}", system.controllers[0].1.port());
    let mut waiting = tokio::process::Command::new(wallaby_tests::programs::program("wallaby"));
    waiting.args(["--server", &server, "verify", "shop", "--within", "80s"]).kill_on_drop(true);
    let waiting = waiting.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let task = TaskId { flow: system.flow(), kind: TaskKind::Verify(2) };
    let first = system.owner(&task).await;
    system.kill_worker(&first).await;
    let second = system.owner_other_than(&task, &first).await;
    println!("the comparison went from {first} to {second}");
    target.batch_execute("ROLLBACK").await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, waiting.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(0));

    // One that waits for a lock ends when its time is over, or when somebody says so.
    target.batch_execute("BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let said = system.cli(&["verify", "shop", "--within", "2s"]).await;
    assert_eq!(said.code, 6, "{}", said.text);
    let cancelled = async {
        eventually(PATIENCE, "the comparison can be cancelled", async || {
            let said = system.cli(&["verify", "shop", "--cancel", "4"]).await;
            if said.code == 0 { Ok(()) } else { Err(said.text) }
        })
        .await;
    };
    let (said, ()) = tokio::join!(system.cli(&["verify", "shop"]), cancelled);
    assert_eq!(said.code, 1, "{}", said.text);
    assert!(said.text.contains("cancelled"), "{}", said.text);
    target.batch_execute("ROLLBACK").await.unwrap();

    // A changed cell, a missing row, a doubled row.
    let changed: i64 = target
        .query_one(
            "UPDATE customers SET name = 'somebody else' WHERE id = (SELECT min(id) FROM customers) RETURNING id::bigint",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    let missing: i64 = target
        .query_one("DELETE FROM order_items WHERE (order_id, line) = (SELECT order_id, line FROM order_items ORDER BY 1 DESC, 2 DESC LIMIT 1) RETURNING order_id", &[])
        .await
        .unwrap()
        .get(0);
    target
        .batch_execute("INSERT INTO ledger SELECT (l).* FROM (SELECT l FROM ledger l ORDER BY id LIMIT 1) one")
        .await
        .unwrap();
    let (report, code) = compared(&system, &["--within", "60s"]).await;
    assert_eq!((code, &report["result"]), (3, &Value::from("different")), "{report}");
    let customers = table(&report, "public.customers");
    assert_eq!((&customers["different"], &customers["missing"]), (&1.into(), &0.into()), "{report}");
    assert_eq!(customers["differences"][0]["columns"], serde_json::json!(["name"]), "{report}");
    assert!(customers["differences"][0]["key"].as_str().unwrap().contains(&changed.to_string()), "{report}");
    let items = table(&report, "public.order_items");
    assert_eq!(items["missing"], 1, "{report}");
    assert!(items["differences"][0]["key"].as_str().unwrap().contains(&missing.to_string()), "{report}");
    let ledger = table(&report, "public.ledger");
    assert_eq!((&ledger["extra"], &ledger["missing"]), (&1.into(), &0.into()), "{report}");
    let said = system.cli(&["verify", "shop", "--tables", "public.customers"]).await;
    assert_eq!(said.code, 3, "{}", said.text);
    assert!(said.text.contains("public.customers: different"), "{}", said.text);
    assert!(!said.text.contains("public.ledger"), "{}", said.text);
    let (report, code) = compared(&system, &["--tables", "public.products"]).await;
    assert_eq!(code, 0, "{report}");

    system.controllers[0].0.kill9().await;
    let said = system.cli(&["verify", "shop"]).await;
    assert_eq!(said.code, 4, "{}", said.text);
}
