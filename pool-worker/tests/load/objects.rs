//! A flow whose side store is a folder that all workers share, from end to end. (S3 wants credentials in a worker's environment: the tests
//! of the whole system have it.)

use std::path::{Path, PathBuf};
use std::sync::Arc;

use wallaby_model::flow::{ByteSize, ObjectSideSpec, SideStoreSpec};
use wallaby_model::run::RunState;
use wallaby_staging::Shelf;

use crate::large::{decode_with, only_attempt};
use crate::scene::*;
use crate::{ALL, fill, write_on};

/// Every file below a folder; what goes while it is looked for is left out.
fn files(folder: &Path) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(_) => files.push(entry.path()),
                Err(_) => {}
            }
        }
    }
    files
}

/// Of the files, those that have a word in their path.
fn with<'a>(files: &'a [PathBuf], word: &str) -> Vec<&'a PathBuf> {
    files.iter().filter(|file| file.components().any(|part| part.as_os_str() == word)).collect()
}

/// About 4 MB in one transaction, as rows that do not shrink, and changes of rows that were there.
fn large(from: u32) -> String {
    format!(
        "BEGIN; INSERT INTO t SELECT i, 0, md5(i::text) || md5((-i)::text) || md5('x' || i)
         FROM generate_series({from}, {from} + 30000) i; UPDATE t SET n = n + 5 WHERE id % 3 = 0; COMMIT"
    )
}

async fn is_empty(scene: &Scene, folder: &Path, what: &str) {
    scene
        .until(what, async || {
            let left = files(folder);
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_and_large_transactions_go_through_a_folder_and_leave_nothing_there() {
    let folder = tempfile::tempdir().unwrap();
    let scene = Arc::new(Scene::new("folder").await);
    fill(&scene, 20_000).await;
    decode_with(&scene, "64kB").await;
    let mut document = scene.document("public.t", "initial", "largeTransactionBytes: 1Mi");
    document.spec.log.side_store = SideStoreSpec::ObjectStore(ObjectSideSpec {
        url: format!("file://{}", folder.path().display()),
        transactions_max: None,
        chunks_max: Some(ByteSize(8 << 20)),
    });
    scene.offer_loads(false);
    scene.coordination.create_flow(document).await.unwrap();
    let _offers = scene.offering();
    let worker = scene.worker("w1");
    scene.run_is(1, RunState::Loading).await;
    let chunks = scene.coordination.run_chunks(&scene.flow, wallaby_model::RunId(1)).await.unwrap();
    let there = files(folder.path());
    assert!(chunks.len() > 1 && with(&there, "chunk").len() >= chunks.len(), "{} chunks in {there:?}", chunks.len());
    let writing = write_on(&scene);
    scene.offer_loads(true);
    scene.run_is(1, RunState::Done).await;
    drop(writing);
    is_empty(&scene, folder.path(), "no chunk stays in the folder").await;

    // Its parts stay while the sink has not got it.
    let blocked = scene.target.connect().await;
    blocked.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    scene.source.batch_execute(&large(2_000_000)).await.unwrap();
    let end = scene.wal_end().await;
    scene.staged(end).await;
    let attempt = only_attempt(&scene).await.to_string();
    let there = files(folder.path());
    assert!(with(&there, &attempt).len() > 2, "parts and a manifest in {there:?}");
    blocked.batch_execute("ROLLBACK").await.unwrap();
    scene.equal(ALL).await;
    for stream in ["SIDE", "CHUNKS"] {
        let stream = format!("{stream}_{}", scene.flow);
        assert!(scene.nats.jetstream().get_stream(&stream).await.is_err(), "{stream} was made beside the folder");
    }

    // What Postgres was told of and every sink has goes at the next owner's sweep, once the purge is past it: that leaves a few records
    // before the sinks' position.
    scene.told(end).await;
    for id in 3_000_000..3_000_040 {
        scene.source.batch_execute(&format!("INSERT INTO t (id) VALUES ({id})")).await.unwrap();
        scene.equal("SELECT count(*)::text FROM t").await;
    }
    worker.end().await;
    let _next = scene.worker("w2");
    is_empty(&scene, folder.path(), "the transaction's parts and manifest are swept").await;

    // A flow that is deleted takes with it what is there.
    scene.source.batch_execute(&large(4_000_000)).await.unwrap();
    scene.equal(ALL).await;
    assert!(!files(folder.path()).is_empty(), "the second one left nothing to remove");
    assert_eq!(scene.on_shelf(Shelf::Chunks).await.unwrap(), []);
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    scene.coordination.mark_flow_deleting(&seen).await.unwrap();
    is_empty(&scene, folder.path(), "the flow's end leaves nothing in the folder").await;
}
