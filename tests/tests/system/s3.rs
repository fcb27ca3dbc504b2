//! A side store in S3 under a whole WALlaby: what is loaded and what is large goes through the bucket, also while its server is killed and
//! started again, and nothing stays there.

// The server is that of the side store's own tests.
#[path = "../../../shared/staging/tests/side/gateway.rs"]
mod gateway;

use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use wallaby_testkit::eventually;
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::traffic::Traffic;
use wallaby_tests::{PATIENCE, alone};

use crate::bad_input::small;
use gateway::{ACCESS, BUCKET, Gateway, SECRET};

/// Each row is about 1 KB that hardly compresses.
const FILL: &str = "\
    INSERT INTO bulk SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 32) WHERE i > 0) \
    FROM generate_series($1::bigint, $2::bigint) i";

fn bucket(gateway: &Gateway) -> AmazonS3 {
    AmazonS3Builder::new()
        .with_endpoint(gateway.url())
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_bucket_name(BUCKET)
        .with_access_key_id(ACCESS)
        .with_secret_access_key(SECRET)
        .build()
        .unwrap()
}

/// Everything in the bucket.
async fn objects(bucket: &AmazonS3) -> Result<Vec<String>, String> {
    let found: Vec<_> = bucket.list(None).try_collect().await.map_err(|error| error.to_string())?;
    Ok(found.into_iter().map(|object| object.location.to_string()).collect())
}

/// Waits until something of a kind is in the bucket.
async fn has(bucket: &AmazonS3, kind: &str) {
    let place = format!("wallaby/shop/{kind}/");
    eventually(PATIENCE, &format!("{place} has objects"), async || {
        let there = objects(bucket).await?;
        if there.iter().any(|object| object.starts_with(&place)) { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .await;
}

/// Waits until nothing of a kind is in the bucket; of any, when none is named.
async fn has_no_more(bucket: &AmazonS3, kind: &str) {
    let place = format!("wallaby/shop/{kind}");
    eventually(PATIENCE, &format!("nothing of {kind:?} stays in the bucket"), async || {
        let there = objects(bucket).await?;
        if there.iter().any(|object| kind.is_empty() || object.starts_with(&place)) {
            return Err(format!("{there:?}"));
        }
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_and_a_large_transaction_go_through_s3_that_is_killed_and_leave_nothing_there() {
    let _alone = alone().await;
    let Some(mut gateway) = Gateway::start().await else { return };
    let bucket = bucket(&gateway);
    let flow = FlowFile {
        side_store: format!("{{ objectStore: {{ url: \"s3://{BUCKET}/wallaby\" }} }}"),
        large_transaction_bytes: "1Mi".to_owned(),
        snapshot: "initial",
        ..small().flow
    };
    let variables = vec![
        ("AWS_ENDPOINT_URL", gateway.url()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
    ];
    let mut system = System::start(Plan { flow, variables, ..small() }).await;
    let source = system.source().await;
    let prepared = "CREATE TABLE bulk (id bigint PRIMARY KEY, filler text); ALTER DATABASE shop SET logical_decoding_work_mem = '64kB'";
    source.batch_execute(prepared).await.unwrap();
    source.execute(FILL, &[&1_i64, &5000_i64]).await.unwrap();
    system.apply_flow().await;
    let traffic = Traffic::start(system.source_dsn(), system.target_dsn(), 7, 100).await;
    system.row_passes().await;

    // A large transaction, whose parts are put while it goes on.
    let mut writer = system.source().await;
    let large = writer.transaction().await.unwrap();
    large.execute(FILL, &[&10_001_i64, &15_000_i64]).await.unwrap();
    has(&bucket, "part").await;
    gateway.restart().await;
    large.execute(FILL, &[&15_001_i64, &20_000_i64]).await.unwrap();
    large.execute("UPDATE bulk SET filler = 'changed' WHERE id % 5 = 0", &[]).await.unwrap();
    large.commit().await.unwrap();
    system.row_passes().await;

    // A table is loaded anew; its chunks stay in the bucket while the sink cannot take it.
    let blocker = system.target().await;
    // This lock takes no transaction number: slots are made meanwhile, on the same server.
    blocker.batch_execute("BEGIN; LOCK TABLE bulk IN SHARE MODE").await.unwrap();
    let said = system.cli(&["snapshot", "start", "shop", "public.bulk"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    has(&bucket, "chunk").await;
    blocker.batch_execute("ROLLBACK").await.unwrap();
    let said = system.cli(&["snapshot", "get", "shop", "--wait", "--timeout", "80s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    has_no_more(&bucket, "chunk").await;

    system.all_is_equal(traffic).await;
    let tables = ["public.bulk"];
    let comparison = wallaby_loadtest::compare(&system.source_dsn(), &system.target_dsn(), &tables).await.unwrap();
    assert!(comparison.is_equal(), "{comparison}");
    let said = system.cli(&["delete", "shop", "--wait", "--timeout", "80s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    has_no_more(&bucket, "").await;
}
