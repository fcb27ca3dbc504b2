//! The suite in a folder and in S3, and the faults that are theirs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use wallaby_model::flow::{ByteSize, LogSpec, ObjectSideSpec, SideStoreSpec};
use wallaby_staging::{ObjectSide, Quotas, Shelf, SideGroup, SideStore, open_side};
use wallaby_testkit::NatsScope;

use crate::gateway::{self, Gateway};
use crate::suite::{self, Place};
use crate::support::{QUOTAS, attempt, body, connections, flow, made, manifest, manifest_key, part};
use crate::sweeping;

struct InFolder(PathBuf);

impl Place for InFolder {
    async fn side(&self, quotas: Quotas) -> Arc<dyn SideStore> {
        made(ObjectSide::in_folder(&self.0, flow("folder"), quotas).unwrap()).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_suite_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    suite::all(&InFolder(folder.path().to_owned())).await;
    let mut left =
        std::fs::read_dir(folder.path()).unwrap().flatten().flat_map(|flow| std::fs::read_dir(flow.path()).unwrap());
    assert!(left.next().is_none(), "folders stay");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeping_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    sweeping::all(&InFolder(folder.path().to_owned())).await;
}

struct InBucket<'a>(&'a Gateway);

impl InBucket<'_> {
    fn open(&self, quotas: Quotas) -> ObjectSide {
        let store = AmazonS3Builder::new()
            .with_endpoint(self.0.url())
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name(gateway::BUCKET)
            .with_access_key_id(gateway::ACCESS)
            .with_secret_access_key(gateway::SECRET)
            .build()
            .unwrap();
        ObjectSide::new(
            Arc::new(store),
            format!("s3://{}/some/prefix", gateway::BUCKET),
            "some/prefix",
            flow("s3"),
            quotas,
        )
    }
}

impl Place for InBucket<'_> {
    async fn side(&self, quotas: Quotas) -> Arc<dyn SideStore> {
        made(self.open(quotas)).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_suite_in_s3() {
    let Some(gateway) = Gateway::start().await else { return };
    suite::all(&InBucket(&gateway)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeping_in_s3() {
    let Some(gateway) = Gateway::start().await else { return };
    sweeping::all(&InBucket(&gateway)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_that_is_killed_and_started_again_has_everything() {
    let Some(mut gateway) = Gateway::start().await else { return };
    let side = made(InBucket(&gateway).open(QUOTAS)).await;
    side.put(part(attempt(5, 1), 0), body(1, 20 << 20)).await.unwrap();
    side.put(manifest_key(9), manifest(9, attempt(5, 1), 3)).await.unwrap();
    let putting = tokio::spawn({
        let side = Arc::clone(&side);
        async move { side.put(part(attempt(5, 1), 1), body(2, 40 << 20)).await }
    });
    tokio::task::yield_now().await;
    gateway.restart().await;
    // Killed or not, it is whole or not there; and another put makes it whole.
    let put = putting.await.unwrap();
    let got = side.get(part(attempt(5, 1), 1)).await.unwrap();
    assert!(got == Some(body(2, 40 << 20)) || (got.is_none() && put.is_err()), "{put:?}");
    side.put(part(attempt(5, 1), 1), body(2, 40 << 20)).await.unwrap();
    for (number, bytes) in [(0, 20 << 20), (1, 40 << 20)] {
        assert!(side.get(part(attempt(5, 1), number)).await.unwrap() == Some(body(number + 1, bytes)), "{number}");
    }
    assert_eq!(side.get(manifest_key(9)).await.unwrap(), Some(manifest(9, attempt(5, 1), 3)));
}

fn file_of(folder: &Path, flow: &str, below: &str) -> PathBuf {
    folder.join(flow).join(below)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_files_count_as_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let id = flow("rot");
    let side = made(ObjectSide::in_folder(folder.path(), id.clone(), QUOTAS).unwrap()).await;
    let one = attempt(5, 1);
    for number in 0..4 {
        side.put(part(one, number), body(number, 1000)).await.unwrap();
    }
    let file = |number: u32| file_of(folder.path(), id.as_str(), &format!("part/{one}/{number}"));
    let whole = std::fs::read(file(0)).unwrap();
    let mut flipped = whole.clone();
    flipped[500] ^= 1;
    std::fs::write(file(0), flipped).unwrap();
    std::fs::write(file(1), &whole[..whole.len() - 1]).unwrap();
    std::fs::write(file(2), b"").unwrap();
    std::fs::write(file(3), [&whole[..], b"x"].concat()).unwrap();
    for number in 0..4 {
        assert_eq!(side.get(part(one, number)).await.unwrap(), None, "{number}");
    }
    side.put(part(one, 0), body(0, 1000)).await.unwrap();
    assert_eq!(side.get(part(one, 0)).await.unwrap(), Some(body(0, 1000)));
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), [SideGroup::Attempt(one)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_opened_by_url_and_counted_over_workers() {
    let scope = NatsScope::one_node("side").await;
    let connections = connections(&scope.url()).await;
    let folder = tempfile::tempdir().unwrap();
    let log = |path: &Path| LogSpec {
        side_store: SideStoreSpec::ObjectStore(ObjectSideSpec {
            url: format!("file://{}", path.display()),
            transactions_max: Some(ByteSize(1 << 20)),
            chunks_max: None,
        }),
        ..LogSpec::default()
    };
    let id = flow("url");
    let here = open_side(&id, &log(folder.path()), &connections).unwrap();
    // By another name: another worker, which counts for itself.
    let there = open_side(&id, &log(&folder.path().join(".")), &connections).unwrap();
    here.ensure(Shelf::Transactions).await.unwrap();
    here.put(part(attempt(5, 1), 0), body(0, 900_000)).await.unwrap();
    // Another worker counts what is there when it comes.
    there.ensure(Shelf::Transactions).await.unwrap();
    let error = there.put(part(attempt(6, 1), 0), body(0, 900_000)).await.unwrap_err();
    assert!(error.is_side_full(), "{error}");
    assert_eq!(there.get(part(attempt(5, 1), 0)).await.unwrap(), Some(body(0, 900_000)));
    // A folder that is not mounted is not made in its place.
    let error = open_side(&id, &log(&folder.path().join("absent")), &connections).unwrap_err().to_string();
    assert!(error.contains("mount it on every worker"), "{error}");
    here.remove().await.unwrap();
}

/// Each task of a worker opens the side store. None lists the whole of it, and together they keep to the quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tasks_of_one_worker_count_together() {
    let folder = tempfile::tempdir().unwrap();
    let quotas = Quotas { transactions: 1 << 20, chunks: 1 << 20 };
    let id = flow("together");
    let open = || ObjectSide::in_folder(folder.path(), id.clone(), quotas).unwrap();
    let sides = [made(open()).await, made(open()).await, made(open()).await];
    let mut refused = 0;
    for number in 0..12 {
        match sides[number as usize % 3].put(part(attempt(5, number), 0), body(number, 200_000)).await {
            Ok(()) => {}
            Err(error) => {
                assert!(error.is_side_full(), "{error}");
                refused += 1;
            }
        }
    }
    let usage = sides[0].usage(Shelf::Transactions).await.unwrap();
    assert!(usage.bytes <= quotas.transactions, "{usage:?}");
    assert_eq!(refused, 7, "five objects of 200,000 bytes fit");
}
