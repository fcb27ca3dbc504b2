//! Tables that come to a live flow and leave it, as somebody does it who edits the flow's file.

use wallaby_loadtest::compare;
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::small;

async fn parcels_are_equal(system: &System) {
    eventually(PATIENCE, "the added table is equal", async || {
        match compare(&system.source_dsn(), &system.target_dsn(), &["public.parcels"]).await {
            Ok(comparison) if comparison.is_equal() => Ok(()),
            Ok(comparison) => Err(comparison.to_string()),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_adds_a_table_to_a_live_flow_and_takes_it_out_again() {
    let _alone = alone().await;
    let one = FlowFile { snapshot: "initial", tables: "[public.ledger]".to_owned(), ..small().flow };
    let two = FlowFile { tables: "[public.ledger, public.parcels]".to_owned(), ..one.clone() };
    let mut system = System::start(Plan { flow: one.clone(), ..small() }).await;
    let source = system.source().await;
    let made = "CREATE TABLE parcels (id int PRIMARY KEY, label text); \
        INSERT INTO parcels SELECT i, 'before ' || i FROM generate_series(1, 500) i";
    source.batch_execute(made).await.unwrap();
    system.apply_flow().await;
    system.row_passes().await;
    let said = system.diff(&one).await;
    assert_eq!(said.code, 0, "{}", said.text);
    assert!(said.text.contains("is as the file says"), "{}", said.text);

    let said = system.diff(&two).await;
    assert_eq!(said.code, 3, "{}", said.text);
    assert!(said.text.contains("a snapshot run loads public.parcels into every sink"), "{}", said.text);
    let said = system.cli(&["snapshot", "list", "shop"]).await;
    assert!(!said.text.contains("TablesAdded"), "looking made a run: {}", said.text);
    let said = system.apply(&two).await;
    assert_eq!(said.code, 0, "{}", said.text);
    source.batch_execute("INSERT INTO parcels VALUES (501, 'meanwhile')").await.unwrap();
    let said = system.cli(&["snapshot", "get", "shop", "2", "--wait", "--timeout", "80s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    source.batch_execute("INSERT INTO parcels VALUES (502, 'after'); DELETE FROM parcels WHERE id = 1").await.unwrap();
    parcels_are_equal(&system).await;
    system.row_passes().await;
    assert_eq!(system.diff(&two).await.code, 0);

    let said = system.diff(&one).await;
    assert_eq!(said.code, 3, "{}", said.text);
    assert!(!said.text.contains("snapshot run"), "{}", said.text);
    let said = system.apply(&one).await;
    assert_eq!(said.code, 0, "{}", said.text);
    eventually(PATIENCE, "the publication has one table", async || {
        let sql = "SELECT string_agg(tablename, ' ') FROM pg_publication_tables WHERE schemaname = 'public'";
        let found: Option<String> = source.query_one(sql, &[]).await.unwrap().get(0);
        if found.as_deref() == Some("ledger") { Ok(()) } else { Err(found) }
    })
    .await;
    source.batch_execute("INSERT INTO parcels VALUES (503, 'nobody asked for it')").await.unwrap();
    system.row_passes().await;
    let sql = "SELECT count(*), count(*) FILTER (WHERE id = 503) FROM parcels";
    let row = system.target().await.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (501, 0), "rows stay, and no row comes");
    assert_eq!(system.diff(&one).await.code, 0);
}
