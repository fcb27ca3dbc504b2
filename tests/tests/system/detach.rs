//! A sink that needs more of the log than it can hold is cut off alone, and loaded anew once it works again (hazard 16).

use wallaby_coordination::Key;
use wallaby_model::SinkId;
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

/// About 1.8 MB that hardly compress.
const FILL: &str = "\
    INSERT INTO bulk SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 32) WHERE i > 0) \
    FROM generate_series($1::bigint, $1::bigint + 1799) i";

/// More than the log holds of them.
const FILLED_MAX: i64 = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_blocked_sink_is_cut_off_alone_and_loaded_anew() {
    let _alone = alone().await;
    let flow = FlowFile {
        max_bytes: "32Mi".to_owned(),
        // More than the table will be: a load anew must end although the log is small.
        side_store: "{ jetstream: { chunksMax: 256Mi } }".to_owned(),
        large_transaction_bytes: "4Mi".to_owned(),
        snapshot: "initial",
        on_overrun: "detach",
        more_sinks: vec!["second".to_owned()],
        ..FlowFile::default()
    };
    let mut system = System::start(Plan { flow, ..Plan::default() }).await;
    let source = system.source().await;
    source.batch_execute("CREATE TABLE bulk (id bigint PRIMARY KEY, filler text)").await.unwrap();
    source.execute(FILL, &[&1_i64]).await.unwrap();
    system.apply_flow().await;
    let traffic = wallaby_tests::traffic::Traffic::start(system.source_dsn(), system.target_dsn(), 7, 200).await;
    system.row_passes().await;
    system.is_passed_by("second").await;

    let blocked = system.postgres.connect("second").await.unwrap();
    blocked.batch_execute("BEGIN; LOCK TABLE bulk IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let key = Key::SinkDetached(system.flow(), SinkId::new("second").unwrap());
    let mut filled = 0_i64;
    eventually(PATIENCE, "the second sink is cut off", async || {
        // Enough to fill the log once; what comes after it would only make the others wait for room.
        if filled < FILLED_MAX {
            filled += 1;
            source.execute(FILL, &[&(filled * 2000)]).await.map_err(|error| error.to_string())?;
        }
        match system.coordination.get(&key).await {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{:?}", other.map(|entry| entry.is_some()))),
        }
    })
    .await;
    println!("cut off after {filled} transactions of 1.8 MB");
    // The worker counts it once etcd has answered, which is after etcd shows it to others.
    let counted = eventually(PATIENCE, "that a sink was cut off is counted", async || {
        let mut counted = 0.0;
        for worker in &system.workers {
            counted += worker.metric("wallaby_sinks_detached_total", &[("sink", "second")]).await?;
        }
        if counted > 0.0 { Ok(counted) } else { Err("it is counted nowhere".to_owned()) }
    })
    .await;
    assert_eq!(counted, 1.0, "that a sink was cut off is counted once");
    // The others go on while it is still blocked.
    for _ in 0..5 {
        system.row_passes().await;
    }
    let said = system.cli(&["describe", "shop"]).await;
    assert!(said.text.contains("Detached"), "{}", said.text);
    blocked.batch_execute("ROLLBACK").await.unwrap();
    eventually(PATIENCE, "the second sink is loaded anew", async || match system.coordination.get(&key).await {
        Ok(None) => Ok(()),
        other => Err(format!("{:?}", other.map(|entry| entry.is_some()))),
    })
    .await;
    system.all_is_equal(traffic).await;
    system.is_equal_at("second").await;
    let tables = ["public.bulk"];
    for target in [system.target_dsn(), system.dsn_of("second")] {
        let comparison = wallaby_loadtest::compare(&system.source_dsn(), &target, &tables).await.unwrap();
        assert!(comparison.is_equal(), "{comparison}");
    }
}
