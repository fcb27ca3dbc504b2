//! Servers that die, puts that are cut short, bytes that rot.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use bytes::Bytes;
use wallaby_model::flow::Replicas;
use wallaby_staging::{JetStreamSide, Shelf, SideGroup, SideStore, StagingError};
use wallaby_testkit::{NatsCluster, NatsOptions, NatsScope, SyncInterval, eventually};

use crate::support::{
    PATIENCE, QUOTAS, attempt, body, connections, flow, jetstream as jetstream_side, made, manifest, manifest_key, part,
};

async fn cluster(nodes: usize) -> NatsCluster {
    let sync_interval = SyncInterval::Every(Duration::from_secs(60));
    NatsCluster::start(NatsOptions { nodes, sync_interval, ..NatsOptions::default() }).await.unwrap()
}

/// Small, so that however many are put while leaders die, they fit.
const BODY_BYTES: usize = 2_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_found_while_leaders_die() {
    let cluster = cluster(3).await;
    let id = flow("kills");
    let side = jetstream_side(&cluster.client_url(), 3, &id, QUOTAS).await;
    let stream = side.stream(Shelf::Transactions);
    let side = made(side).await;
    let stop = Arc::new(AtomicBool::new(false));
    let acked = Arc::new(AtomicU32::new(0));
    let one = attempt(5, 1);
    let putting = {
        let (side, stop, acked) = (Arc::clone(&side), Arc::clone(&stop), Arc::clone(&acked));
        tokio::spawn(async move {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                side.put(part(one, number), body(number, BODY_BYTES)).await.unwrap();
                number += 1;
                acked.store(number, Ordering::SeqCst);
            }
            number
        })
    };
    // A reader of its own, over other connections, that asks for the newest all the time.
    let reading = {
        let elsewhere = jetstream_side(&cluster.client_url(), 3, &id, QUOTAS).await;
        let (stop, acked) = (Arc::clone(&stop), Arc::clone(&acked));
        tokio::spawn(async move {
            let mut reads = 0_u32;
            while !stop.load(Ordering::Relaxed) {
                let Some(newest) = acked.load(Ordering::SeqCst).checked_sub(1) else {
                    tokio::task::yield_now().await;
                    continue;
                };
                let got = elsewhere.get(part(one, newest)).await.unwrap();
                assert!(
                    got == Some(body(newest, BODY_BYTES)),
                    "part {newest} was acknowledged and is not there: {got:?}"
                );
                reads += 1;
            }
            reads
        })
    };
    for round in 0..3 {
        let before = acked.load(Ordering::SeqCst);
        let leader = cluster.leader_of_stream(&stream).await.unwrap();
        cluster.node(leader).unwrap().kill9().await.unwrap();
        eventually(PATIENCE, "puts go on without the old leader", async || {
            let now = acked.load(Ordering::SeqCst);
            if now > before + 20 { Ok(()) } else { Err(format!("round {round}: {before} {now}")) }
        })
        .await;
        cluster.start_node(leader).await.unwrap();
        eventually(PATIENCE, "three copies", async || {
            let info = connections(&cluster.client_url()).await.publish;
            let mut stream = jetstream::new(info).get_stream(&stream).await.map_err(|error| error.to_string())?;
            let info = stream.info().await.map_err(|error| error.to_string())?;
            let copies =
                info.cluster.as_ref().map(|cluster| cluster.replicas.iter().filter(|peer| peer.current).count());
            if copies == Some(2) { Ok(()) } else { Err(format!("{copies:?}")) }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    let put = putting.await.unwrap();
    assert!(reading.await.unwrap() > 0);
    for number in 0..put {
        assert!(side.get(part(one, number)).await.unwrap() == Some(body(number, BODY_BYTES)), "{number} of {put}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_started_again_has_everything() {
    let cluster = cluster(1).await;
    let side = made(jetstream_side(&cluster.client_url(), 1, &flow("restart"), QUOTAS).await).await;
    let large = 5 * side.part_bytes_target() + 1;
    side.put(part(attempt(5, 1), 0), body(1, large)).await.unwrap();
    side.put(manifest_key(9), manifest(9, attempt(5, 1), 3)).await.unwrap();
    let listed = side.list(Shelf::Transactions).await.unwrap();
    let node = cluster.node(0).unwrap();
    node.kill9().await.unwrap();
    // Asked while it is away: waits, and finds it.
    let asking = {
        let side = Arc::clone(&side);
        tokio::spawn(async move { side.get(manifest_key(9)).await })
    };
    cluster.start_node(0).await.unwrap();
    assert_eq!(asking.await.unwrap().unwrap(), Some(manifest(9, attempt(5, 1), 3)));
    assert!(side.get(part(attempt(5, 1), 0)).await.unwrap() == Some(body(1, large)));
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), listed);
    side.put(part(attempt(5, 1), 1), body(2, 10)).await.unwrap();
}

/// A copy of a folder in the place of another one.
fn copy(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).unwrap();
    }
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// A power cut takes what was acknowledged last, in the middle of a transaction. What comes behind it would hide the hole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_after_the_servers_lost_what_they_acknowledged_nothing_is_put_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let (store, synced) = (folder.path().join("store"), folder.path().join("synced"));
    let sync_interval = SyncInterval::Every(Duration::from_secs(60));
    let options = NatsOptions { sync_interval, store_folders: vec![store.clone()], ..NatsOptions::default() };
    let cluster = NatsCluster::start(options).await.unwrap();
    let node = cluster.node(0).unwrap();
    let id = flow("lost");
    let side = made(jetstream_side(&cluster.client_url(), 1, &id, QUOTAS).await).await;
    let one = attempt(5, 1);
    for number in 0..3 {
        side.put(part(one, number), body(number, BODY_BYTES)).await.unwrap();
    }
    node.kill9().await.unwrap();
    copy(&store, &synced);
    cluster.start_node(0).await.unwrap();
    for number in 3..9 {
        side.put(part(one, number), body(number, BODY_BYTES)).await.unwrap();
    }
    node.kill9().await.unwrap();
    copy(&synced, &store);
    cluster.start_node(0).await.unwrap();
    // More than was lost: the sequences grow beyond what was acknowledged.
    for number in 9..20 {
        let put = side.put(part(one, number), body(number, BODY_BYTES)).await;
        assert!(matches!(put, Err(StagingError::SideTailLost { .. })), "part {number}: {put:?}");
    }
    let put = side.put(manifest_key(9), manifest(9, one, 3)).await;
    assert!(matches!(put, Err(StagingError::SideTailLost { .. })), "{put:?}");
    assert_eq!(side.get(part(one, 3)).await.unwrap(), None, "nothing was lost: the test is void");
    // Who begins anew relies on nothing that was there.
    let anew = jetstream_side(&cluster.client_url(), 1, &id, QUOTAS).await;
    anew.put(part(attempt(5, 2), 0), body(1, BODY_BYTES)).await.unwrap();
    assert!(anew.get(part(attempt(5, 2), 0)).await.unwrap() == Some(body(1, BODY_BYTES)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_was_killed_in_the_middle_is_not_there_and_hides_nothing() {
    let scope = NatsScope::one_node("side").await;
    let id = flow("cut");
    let side = jetstream_side(&scope.url(), 1, &id, QUOTAS).await;
    let stream = side.stream(Shelf::Transactions);
    let side = made(side).await;
    let key = manifest_key(9);
    let (whole, cut) = (manifest(9, attempt(5, 1), 200_000), manifest(9, attempt(5, 1), 300_000));
    side.put(key, whole.clone()).await.unwrap();
    let new = part(attempt(5, 1), 0);
    let large = body(1, 20 * side.part_bytes_target());
    let pieces = async || {
        let mut stream = scope.jetstream().get_stream(&stream).await.unwrap();
        stream.info().await.unwrap().state.messages
    };
    for (key, body) in [(key, cut), (new, large)] {
        let mut is_cut = false;
        for _ in 0..50 {
            let before = pieces().await;
            let putting = tokio::spawn({
                let (side, body) = (Arc::clone(&side), body.clone());
                async move { side.put(key, body).await }
            });
            // Killed as soon as one piece is there.
            while pieces().await == before && !putting.is_finished() {
                tokio::task::yield_now().await;
            }
            putting.abort();
            let ended = putting.await;
            // What the client had in its buffer goes out all the same, and may be all of it.
            is_cut = ended.is_err_and(|error| error.is_cancelled())
                && pieces().await > before
                && side.get(key).await.unwrap() != Some(body.clone());
            if is_cut {
                break;
            }
            // It was over before it could be killed, or had not begun: once more from where it was.
            side.delete(key.group()).await.unwrap();
            if key != new {
                side.put(key, whole.clone()).await.unwrap();
            }
        }
        assert!(is_cut, "the put was over before it could be killed, every time");
    }
    assert!(side.get(key).await.unwrap() == Some(whole));
    assert_eq!(side.get(new).await.unwrap(), None);
    // Its pieces are known, so that they are swept.
    assert!(side.list(Shelf::Transactions).await.unwrap().contains(&new.group()));
    side.delete(new.group()).await.unwrap();
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), [key.group()]);
    side.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_objects_count_as_not_there() {
    crate::counters::install();
    let scope = NatsScope::one_node("side").await;
    let id = flow("rot");
    let side = made(jetstream_side(&scope.url(), 1, &id, QUOTAS).await).await;
    let context = scope.jetstream();
    let one = attempt(5, 1);
    let large = 3 * side.part_bytes_target();
    side.put(part(one, 0), body(0, 1000)).await.unwrap();
    side.put(part(one, 1), body(1, large)).await.unwrap();
    side.put(part(one, 2), body(2, large)).await.unwrap();
    side.put(part(one, 3), body(3, 1000)).await.unwrap();
    let stream = context.get_stream(format!("SIDE_{id}")).await.unwrap();
    let subject = |number: u32| format!("wallaby.side.{id}.part.{one}.{number}");
    // Headers of the first, other bytes.
    let first = stream.raw_message_builder().last_by_subject(subject(0)).send().await.unwrap();
    let rotten = context.publish_with_headers(subject(0), first.headers, body(9, 1000)).await.unwrap();
    rotten.await.unwrap();
    // A piece of the second is gone, one of the third has other bytes.
    let piece = async |number: u32| {
        let filter = format!("{}.>", subject(number));
        stream.raw_message_builder().sequence(1).next_by_subject(filter).send().await.unwrap()
    };
    let second = piece(1).await;
    assert!(stream.delete_message(second.sequence).await.unwrap());
    let third = piece(2).await;
    let rotten = context.publish_with_headers(third.subject, third.headers, body(8, third.payload.len()));
    rotten.await.unwrap().await.unwrap();
    // Something foreign in the place of the fourth.
    context.publish(subject(3), "x".into()).await.unwrap().await.unwrap();
    for number in 0..4 {
        assert_eq!(side.get(part(one, number)).await.unwrap(), None, "{number}");
    }
    assert_eq!(
        crate::counters::counted(&format!("wallaby_side_damaged_objects_total{{flow={id},shelf=transactions}}")),
        4
    );
    // Put again, it is there again.
    side.put(part(one, 1), body(1, large)).await.unwrap();
    assert!(side.get(part(one, 1)).await.unwrap() == Some(body(1, large)));
    // One that claims to be huge asks for no memory.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Wallaby-Version", "1");
    headers.insert("Wallaby-Bytes", u64::MAX.to_string());
    headers.insert("Wallaby-Checksum", "0000000000000000");
    headers.insert("Wallaby-Fragment-Bytes", "1");
    context.publish_with_headers(subject(0), headers, "".into()).await.unwrap().await.unwrap();
    assert_eq!(side.get(part(one, 0)).await.unwrap(), None);
    assert_eq!(side.list(Shelf::Transactions).await.unwrap(), [SideGroup::Attempt(one)]);
    side.remove().await.unwrap();
}

/// A connection whose server reads no more takes nothing after a while: whoever asks over it is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_ever_for_a_server_that_stands_still() {
    let cluster = cluster(1).await;
    let connections = connections(&cluster.client_url()).await;
    let side = JetStreamSide::new(flow("still"), connections.clone(), Replicas::Exactly(1), QUOTAS);
    let side = made(side).await;
    side.put(part(attempt(5, 1), 0), body(1, 100)).await.unwrap();
    let node = cluster.node(0).unwrap();
    node.pause().await.unwrap();
    for client in [&connections.publish, &connections.pull] {
        let filler = Bytes::from_static(&[0; 60_000]);
        let full = Duration::from_secs(1);
        while tokio::time::timeout(full, client.publish("nobody.listens", filler.clone())).await.is_ok() {}
    }
    let all = async {
        tokio::join!(
            side.put(part(attempt(5, 1), 1), body(2, 100)),
            side.get(part(attempt(5, 1), 0)),
            side.list(Shelf::Transactions),
            side.usage(Shelf::Transactions),
            side.delete(SideGroup::Attempt(attempt(5, 2))),
            side.ensure(Shelf::Chunks),
        )
    };
    let answers = tokio::time::timeout(PATIENCE, all).await.expect("each of them says that it cannot");
    assert!(answers.0.is_err() && answers.1.is_err() && answers.2.is_err(), "{answers:?}");
    assert!(answers.3.is_err() && answers.4.is_err() && answers.5.is_err(), "{answers:?}");
    node.resume().unwrap();
    eventually(PATIENCE, "it is asked again", async || match side.get(part(attempt(5, 1), 0)).await {
        Ok(Some(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}
