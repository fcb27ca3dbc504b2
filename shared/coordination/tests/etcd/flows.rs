//! The flow store.

use std::collections::BTreeMap;

use wallaby_coordination::{Error, FlowStatus, Hold, Key};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::{FlowId, SinkId, TaskId};

use crate::setup::*;

fn no_starts() -> BTreeMap<SinkId, Option<wallaby_model::Position>> {
    BTreeMap::new()
}

#[tokio::test]
async fn a_flow_lives_and_goes() {
    let (_scope, coordination) = shared("flows").await;
    let flow = coordination.create_flow(document("shop", &["a", "b"])).await.unwrap();
    assert_eq!(flow.record.generation, 1);
    assert!(matches!(coordination.create_flow(document("shop", &[])).await, Err(Error::FlowExists(_))));
    let none = Hold { position: None };
    let holds = coordination.holds(&flow.flow).await.unwrap();
    assert_eq!(holds, BTreeMap::from([(reader("a"), none), (reader("b"), none)]));
    assert_eq!(coordination.flow(&flow.flow).await.unwrap(), flow);

    // Labels are no change of what is wanted.
    let mut labelled = flow.record.document.clone();
    labelled.metadata.labels.insert("team".to_owned(), "web".to_owned());
    let labelled = coordination.update_flow(&flow, labelled, &no_starts()).await.unwrap();
    assert_eq!(labelled.record.generation, 1);
    let late = coordination.update_flow(&flow, flow.record.document.clone(), &no_starts()).await;
    assert!(matches!(late, Err(Error::FlowChanged { found, .. }) if found == labelled.revision), "{late:?}");

    let resumed = coordination.resume_flow(&labelled).await.unwrap();
    assert_eq!((resumed.record.generation, resumed.record.resumes), (1, 1));
    coordination.put_flow_status(&flow.flow, &FlowStatus::default()).await.unwrap();
    let deleting = coordination.mark_flow_deleting(&resumed).await.unwrap();
    assert!(deleting.record.deleting_since.is_some());
    let refused = coordination.update_flow(&deleting, document("shop", &["a"]), &no_starts()).await;
    assert!(matches!(refused, Err(Error::FlowDeleting(_))));

    // A flow whose name begins with this one's stays.
    let neighbour = coordination.create_flow(document("shop-2", &["a"])).await.unwrap();
    assert!(matches!(coordination.remove_flow(&resumed).await, Err(Error::FlowChanged { .. })));
    coordination.remove_flow(&deleting).await.unwrap();
    coordination.remove_flow(&deleting).await.unwrap();
    assert!(coordination.list(&coordination.keys().flow(&flow.flow)).await.unwrap().is_empty());
    assert!(matches!(coordination.flow(&flow.flow).await, Err(Error::FlowNotFound(_))));
    let written = coordination.put_flow_status(&flow.flow, &FlowStatus::default()).await;
    assert!(matches!(written, Err(Error::FlowNotFound(_))), "a status does not bring a flow back");
    assert_eq!(coordination.flows().await.unwrap().flows, vec![neighbour]);
}

#[tokio::test]
async fn a_removed_sink_goes_with_its_hold_and_its_tasks_keys() {
    let (_scope, coordination) = shared("sinks").await;
    let flow = coordination.create_flow(document("shop", &["a", "ab"])).await.unwrap();
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let removed = take(&session, &TaskId::apply(&flow.flow, &sink_id("a")), flow.revision).await;
    let kept = take(&session, &TaskId::apply(&flow.flow, &sink_id("ab")), flow.revision).await;
    for lock in [&removed, &kept] {
        lock.fix_epoch(None).await.unwrap();
        lock.put_status(&Default::default()).await.unwrap();
    }
    let updated = coordination.update_flow(&flow, document("shop", &["ab"]), &no_starts()).await.unwrap();
    assert_eq!(updated.record.generation, 2);
    tokio::time::timeout(PATIENCE, removed.lost().cancelled()).await.unwrap();
    assert!(kept.is_valid_now());
    assert_eq!(coordination.holds(&flow.flow).await.unwrap().len(), 1);
    assert!(coordination.list(&coordination.keys().task(removed.task())).await.unwrap().is_empty());
    assert_eq!(coordination.list(&coordination.keys().task(kept.task())).await.unwrap().len(), 3);
    assert!(matches!(removed.advance_hold(&sink_id("a"), at(3)).await, Err(Error::HoldGone { .. })));
}

#[tokio::test]
async fn what_does_not_fit_is_refused_before_it_is_sent() {
    let (_scope, coordination) = shared("large").await;
    let mut large = document("large", &[]);
    let tables = &mut large.spec.source.postgres.publication.tables;
    *tables = (0..40_000).map(|number| format!("public.a_table_with_a_long_name_{number:010}")).collect();
    let error = coordination.create_flow(large).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::TooLarge { .. }) && error.to_string().contains("flows/large/spec"));

    let names: Vec<String> = (0..130).map(|number| format!("s{number}")).collect();
    let sinks: Vec<&str> = names.iter().map(String::as_str).collect();
    let error = coordination.create_flow(document("many", &sinks)).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, Error::TooManyOperations { operations: 131, limit: 128, .. }));
    // As many as fit are taken by the server, too.
    coordination.create_flow(document("many", &sinks[..127])).await.unwrap();
    // A document near the limit as well.
    let mut near = document("near", &[]);
    near.spec.source.postgres.publication.tables =
        (0..30_000).map(|number| format!("public.a_table_with_a_long_name_{number:010}")).collect();
    let near = coordination.create_flow(near).await.unwrap();
    assert_eq!(coordination.flow(&near.flow).await.unwrap(), near);
}

/// A run that loads tables by name repeats them, in the same request.
#[tokio::test]
async fn what_does_not_fit_with_its_runs_is_refused_before_it_is_sent() {
    let (_scope, coordination) = shared("runs-large").await;
    let loaded = |name: &str, tables: u32| {
        let mut document = document(name, &["a"]);
        document.spec.source.postgres.snapshot = SnapshotMode::Initial;
        // Few and long ones: only their bytes count here.
        document.spec.source.postgres.publication.tables =
            (0..tables).map(|number| format!("public.{number:03000}")).collect();
        document
    };
    let error = coordination.create_flow(loaded("large", 350)).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let small = coordination.create_flow(loaded("fits", 200)).await.unwrap();
    let error = coordination.update_flow(&small, loaded("fits", 450), &no_starts()).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    coordination.update_flow(&small, loaded("fits", 300), &no_starts()).await.unwrap();
}

#[tokio::test]
async fn hundreds_of_flows_are_listed_at_one_revision_and_a_broken_one_hides_none() {
    let (scope, coordination) = shared("many").await;
    for number in 0..300 {
        coordination.create_flow(document(&format!("f{number:03}"), &[])).await.unwrap();
    }
    let broken = coordination.keys().text(&Key::FlowSpec(flow_id("broken")));
    scope.client().put(broken, r#"{"document": {"password": "secret"}}"#, None).await.unwrap();
    let list = coordination.flows().await.unwrap();
    assert_eq!(list.flows.len(), 300);
    let names: Vec<&FlowId> = list.flows.iter().map(|flow| &flow.flow).collect();
    assert!(names.is_sorted());
    assert_eq!(list.malformed.len(), 1);
    let error = list.malformed[0].to_string();
    assert!(error.contains("broken") && !error.contains("secret") && !error.contains("password"), "{error}");
}
