//! A purge: the point stands in etcd first, then the log is purged up to it.

use std::collections::BTreeMap;

use wallaby_coordination::Error;
use wallaby_model::flow::{FlowDocument, SecretRef};
use wallaby_model::{Lsn, Position, Reader, SinkId};
use wallaby_pool_worker::failpoint::Failpoint;
use wallaby_staging::log_begins;
use wallaby_testkit::Database;

use super::{LEDGER, add, at, ledger, log};
use crate::scene::*;

/// The flow, whose first sink may be paused, and which may have a second one.
fn document(scene: &Scene, is_paused: bool, second: Option<&Database<'_>>) -> FlowDocument {
    let mut document = scene.document("public.ledger", "never", "");
    let first = &mut document.spec.sinks[0];
    first.paused = is_paused;
    if let Some(second) = second {
        let mut sink = first.clone();
        (sink.name, sink.paused) = (SinkId::new("second").unwrap(), false);
        sink.postgres.dsn = SecretRef::Value(second.dsn());
        document.spec.sinks.push(sink);
    }
    document
}

/// Changes the flow; a sink that is new starts there.
async fn change(scene: &Scene, document: FlowDocument, start: Option<Position>) -> Result<(), Error> {
    let seen = scene.coordination.flow(&scene.flow).await.unwrap();
    let starts = start.map(|start| (SinkId::new("second").unwrap(), Some(start)));
    let starts: BTreeMap<SinkId, Option<Position>> = starts.into_iter().collect();
    scene.coordination.update_flow(&seen, document, &starts).await.map(drop)
}

/// The lowest sequence in the log.
async fn first_sequence(scene: &Scene) -> u64 {
    log(scene).await.info().await.unwrap().first_sequence
}

async fn begins_after(scene: &Scene, sequence: u64) {
    scene
        .until("the log is purged", async || match first_sequence(scene).await {
            first if first > sequence => Ok(()),
            first => Err(format!("it begins at {first}")),
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_killed_around_a_purge_nothing_is_missed_and_the_log_is_purged_all_the_same() {
    for point in [Failpoint::StopBeforePurge, Failpoint::StopAfterPurge] {
        println!("killed at {point:?}");
        let scene = ledger("purge").await;
        let late = Database::create("late").await;
        let _offers = scene.offering();
        scene.coordination.create_flow(document(&scene, false, None)).await.unwrap();
        // It purges nothing itself, however long it lives.
        let writer = scene.worker_with("w1", at(Failpoint::StopBeforePurge));
        super::captures(&scene).await;
        add(&scene, 0..10).await;
        scene.equal(LEDGER).await;
        // It says where the sink stands as it ends; from then on that does not move.
        writer.end().await;
        change(&scene, document(&scene, true, None), None).await.unwrap();
        let before = first_sequence(&scene).await;

        // Whoever takes the log over purges at once.
        let failpoints = at(point);
        let purging = scene.worker_with("w2", failpoints.clone());
        scene.stands_at(&failpoints, point).await;
        let held = scene.coordination.holds(&scene.flow).await.unwrap()[&Reader::Sink(scene.sink.clone())].position;
        let purged = scene.coordination.purge_point(&scene.flow).await.unwrap();
        assert_eq!(purged, held, "the purge point is where the sink stands");
        assert_eq!(first_sequence(&scene).await > before, point == Failpoint::StopAfterPurge);
        drop(purging);

        // Whoever comes now starts where nothing that it needs can be gone, and gets everything from there.
        let too_early = Position::before(Lsn(purged.unwrap().commit.0 - 1));
        let begins = log_begins(&log(&scene).await).await.unwrap();
        assert!(begins <= purged, "the log begins at {begins:?}, and nobody is refused before {purged:?}");
        let refused = change(&scene, document(&scene, true, Some(&late)), Some(too_early)).await.unwrap_err();
        assert!(matches!(refused, Error::HoldBelowPurge { .. }), "{refused}");
        let end = scene.log_end().await.unwrap();
        change(&scene, document(&scene, true, Some(&late)), Some(end)).await.unwrap();
        add(&scene, 10..20).await;

        let next = scene.worker("w3");
        scene
            .until("the late sink has what came after it", async || {
                let there = rows(&late, "SELECT n::text FROM ledger ORDER BY n").await?;
                let wanted: Vec<String> = (10..20).map(|n| n.to_string()).collect();
                if there == wanted { Ok(()) } else { Err(format!("{there:?}")) }
            })
            .await;
        // No hold moved since: what the dead owner had begun is done.
        begins_after(&scene, before).await;
        change(&scene, document(&scene, false, Some(&late)), None).await.unwrap();
        scene.equal(LEDGER).await;
        let before = first_sequence(&scene).await;
        next.end().await;
        let _last = scene.worker("w4");
        begins_after(&scene, before).await;
        add(&scene, 20..30).await;
        scene.equal(LEDGER).await;
    }
}
