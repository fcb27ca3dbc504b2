//! Holds against the purge of the log, and the tables that a flow knows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use wallaby_coordination::{Error, KnownTable, PurgeOutcome};
use wallaby_model::{RunId, TableName, TaskId};
use wallaby_testkit::Seeded;

use crate::setup::*;

#[tokio::test]
async fn the_purge_point_follows_the_lowest_hold() {
    let (_scope, coordination) = shared("purge").await;
    let flow = coordination.create_flow(document("shop", &["a", "b"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    let apply = take(&session, &TaskId::apply(&flow.flow, &sink_id("a")), flow.revision).await;
    assert_eq!(capture.advance_purge_point(at(100)).await.unwrap(), PurgeOutcome::Nothing);
    apply.advance_hold(&sink_id("a"), at(50)).await.unwrap();
    assert_eq!(capture.advance_purge_point(at(100)).await.unwrap(), PurgeOutcome::Nothing, "b needs everything");
    apply.advance_hold(&sink_id("b"), at(80)).await.unwrap();
    assert_eq!(capture.advance_purge_point(at(30)).await.unwrap(), PurgeOutcome::UpTo(at(30)), "the replay window");
    assert_eq!(capture.advance_purge_point(at(100)).await.unwrap(), PurgeOutcome::UpTo(at(50)));
    assert_eq!(capture.advance_purge_point(at(10)).await.unwrap(), PurgeOutcome::UpTo(at(50)), "never back");
    apply.advance_hold(&sink_id("a"), at(20)).await.unwrap();
    assert_eq!(coordination.holds(&flow.flow).await.unwrap()[&reader("a")].position, Some(at(50)), "never back");

    // A reader that comes later.
    let wanted = document("shop", &["a", "b", "c"]);
    let missing = coordination.update_flow(&flow, wanted.clone(), &BTreeMap::new()).await;
    assert!(matches!(missing, Err(Error::HoldMissing { .. })));
    for low in [None, Some(at(49))] {
        let starts = BTreeMap::from([(sink_id("c"), low)]);
        let refused = coordination.update_flow(&flow, wanted.clone(), &starts).await;
        assert!(matches!(refused, Err(Error::HoldBelowPurge { purged, .. }) if purged == at(50)), "{refused:?}");
    }
    assert_eq!(coordination.flow(&flow.flow).await.unwrap(), flow, "nothing was changed");
    let starts = BTreeMap::from([(sink_id("c"), Some(at(60)))]);
    let flow = coordination.update_flow(&flow, wanted, &starts).await.unwrap();
    apply.advance_hold(&sink_id("a"), at(90)).await.unwrap();
    assert_eq!(capture.advance_purge_point(at(100)).await.unwrap(), PurgeOutcome::UpTo(at(60)), "c holds it");
    assert_eq!(coordination.purge_point(&flow.flow).await.unwrap(), Some(at(60)));
    // Without c, a and b allow more.
    coordination.update_flow(&flow, document("shop", &["a", "b"]), &BTreeMap::new()).await.unwrap();
    assert_eq!(capture.advance_purge_point(at(100)).await.unwrap(), PurgeOutcome::UpTo(at(80)));
}

/// Hazard 10, the half in etcd: whoever comes first, the reader's hold or the purge, the other one knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_new_reader_and_a_purge_that_runs_never_miss_each_other() {
    let (_scope, coordination) = shared("h10").await;
    let mut flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    let (mut readers_won, mut purges_won) = (0, 0);
    let mut random = StdRng::seeded();
    for round in 1..=150_u64 {
        // `a` needs nothing below 1000·round; the purge may go there. The new reader wants to start a little below.
        let (high, start) = (at(1000 * round), at(1000 * round - 1));
        capture.advance_hold(&sink_id("a"), high).await.unwrap();
        let purging = tokio::spawn({
            let capture = capture.clone();
            async move { capture.advance_purge_point(high).await.unwrap() }
        });
        let joining = tokio::spawn({
            let (coordination, flow) = (coordination.clone(), flow.clone());
            // The purge takes a round trip more: without a head start now and then it would nearly always be second.
            let head_start =
                Duration::from_micros(if random.random_bool(0.4) { random.random_range(0..2000) } else { 0 });
            async move {
                if !head_start.is_zero() {
                    tokio::time::sleep(head_start).await;
                }
                let starts = BTreeMap::from([(sink_id("b"), Some(start))]);
                coordination.update_flow(&flow, document("shop", &["a", "b"]), &starts).await
            }
        });
        let (purged, joined) = (purging.await.unwrap(), joining.await.unwrap());
        let PurgeOutcome::UpTo(purged) = purged else { panic!("all holds have positions") };
        assert_eq!(coordination.purge_point(&flow.flow).await.unwrap(), Some(purged));
        match joined {
            Ok(with_b) => {
                readers_won += 1;
                assert!(purged <= start, "the log was purged up to {purged} under a reader that starts at {start}");
                flow = coordination.update_flow(&with_b, document("shop", &["a"]), &BTreeMap::new()).await.unwrap();
            }
            Err(Error::HoldBelowPurge { purged: seen, .. }) => {
                purges_won += 1;
                assert_eq!((purged, seen), (high, high), "refused for no reason");
            }
            Err(error) => panic!("{error}"),
        }
    }
    println!("{readers_won} readers were first, {purges_won} purges");
    assert!(readers_won > 0 && purges_won > 0, "no race took place: {readers_won} to {purges_won}");
}

/// Twenty thousand tables, packed; only by their capture, and gone with the flow.
#[tokio::test]
async fn known_tables_are_read_as_they_were_written_however_many() {
    let (_scope, coordination) = shared("tables").await;
    let flow = coordination.create_flow(document("shop", &["a"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let capture = take(&session, &TaskId::capture(&flow.flow), flow.revision).await;
    assert_eq!(coordination.known_tables(&flow.flow).await.unwrap(), None);
    let of = |number: u32| {
        let partitions = number.is_multiple_of(2).then(|| [(number, -7), (number + 1, 7)].into());
        let attached = if number.is_multiple_of(3) { [number].into() } else { BTreeSet::new() };
        let known = KnownTable { asked: Some(RunId(3)), partitions, attached, ..KnownTable::new(number, 9, RunId(2)) };
        (TableName::new("odd.schema", format!("table \"{number}\"")), known)
    };
    for count in [0, 3, 20_000] {
        let tables: BTreeMap<TableName, KnownTable> = (0..count).map(of).collect();
        capture.put_known_tables(&tables).await.unwrap();
        assert_eq!(coordination.known_tables(&flow.flow).await.unwrap(), Some(tables));
    }
    let deleting = coordination.mark_flow_deleting(&flow).await.unwrap();
    coordination.remove_flow(&deleting).await.unwrap();
    assert_eq!(coordination.known_tables(&flow.flow).await.unwrap(), None);
    let refused = capture.put_known_tables(&BTreeMap::new()).await.unwrap_err();
    assert!(refused.is_ownership_lost(), "{refused}");
}
