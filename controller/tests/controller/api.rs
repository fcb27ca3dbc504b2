//! The services.

use std::time::Duration;

use tokio_stream::StreamExt;
use tonic::Code;
use wallaby_controller::{Controller, StartError};
use wallaby_coordination::Acquired;
use wallaby_model::condition::{TaskPhase, TaskStatus};
use wallaby_model::flow::{ByteSize, SecretRef, SinkSpec, SnapshotMode};
use wallaby_model::{SinkId, WorkerId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::snapshot_service_client::SnapshotServiceClient;
use wallaby_proto::v1::verify_service_client::VerifyServiceClient;
use wallaby_testkit::eventually;

use crate::setup::{PATIENCE, Running, Scopes, document, reason, task};

#[tokio::test]
async fn a_flow_is_made_read_changed_listed_and_deleted() {
    let scopes = Scopes::create("api").await;
    let running = Running::ready(&scopes.place).await;
    let mut flows = running.flows.clone();

    let made = running.create(&document("one")).await.unwrap();
    assert_eq!((made.name.as_str(), made.generation), ("flows/one", 1));
    assert_eq!(running.get("one").await.unwrap().etag, made.etag);
    assert_eq!(api::flow_from_message(&made).unwrap(), document("one"));

    let again = running.create(&document("one")).await.unwrap_err();
    assert_eq!((again.code(), reason(&again).as_str()), (Code::AlreadyExists, "FLOW_EXISTS"));

    let mut changed = document("one");
    changed.spec.source.postgres.large_transaction_bytes = ByteSize(1 << 20);
    let mut message = api::flow_to_message(&changed);
    message.etag = made.etag.clone();
    let update = |flow: v1::Flow| v1::UpdateFlowRequest { flow: Some(flow) };
    let updated = flows.update_flow(update(message.clone())).await.unwrap().into_inner();
    assert!(updated.changed);
    assert_eq!(updated.flow.unwrap().generation, 2);
    let stale = flows.update_flow(update(message.clone())).await.unwrap_err();
    assert_eq!((stale.code(), reason(&stale).as_str()), (Code::Aborted, "FLOW_CHANGED"));
    message.etag.clear();
    assert!(!flows.update_flow(update(message)).await.unwrap().into_inner().changed, "it was so already");

    for name in ["two", "three"] {
        running.create(&document(name)).await.unwrap();
    }
    let page = |token: &str| v1::ListFlowsRequest { page_size: 2, page_token: token.to_owned() };
    let first = flows.list_flows(page("")).await.unwrap().into_inner();
    let second = flows.list_flows(page(&first.next_page_token)).await.unwrap().into_inner();
    let names: Vec<String> = first.flows.into_iter().chain(second.flows).map(|flow| flow.name).collect();
    assert_eq!(names, ["flows/one", "flows/three", "flows/two"]);
    assert_eq!(second.next_page_token, "");

    let delete = v1::DeleteFlowRequest { name: "flows/two".into(), ..Default::default() };
    flows.delete_flow(delete).await.unwrap();
    eventually(PATIENCE, "a flow that never captured goes by itself", async || match running.get("two").await {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    running.controller.stop().await;
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let scopes = Scopes::create("refuse").await;
    let running = Running::ready(&scopes.place).await;
    let mut flows = running.flows.clone();

    let absent = running.get("nothing").await.unwrap_err();
    assert_eq!((absent.code(), reason(&absent).as_str()), (Code::NotFound, "FLOW_NOT_FOUND"));
    let nameless = running.get("Not A Name").await.unwrap_err();
    assert_eq!((nameless.code(), reason(&nameless).as_str()), (Code::InvalidArgument, "NAME_INVALID"));

    let mut bad = document("bad");
    bad.spec.source.postgres.publication.tables.clear();
    bad.spec.sinks.push(bad.spec.sinks[0].clone());
    let refused = running.create(&bad).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::InvalidArgument, "FLOW_INVALID"));
    for part in ["spec.source.postgres.publication.tables", "spec.sinks[1].name"] {
        assert!(refused.message().contains(part), "{}", refused.message());
    }
    let validated = v1::ValidateFlowRequest { flow: Some(api::flow_to_message(&bad)) };
    assert_eq!(flows.validate_flow(validated).await.unwrap().into_inner().problems.len(), 2);

    running.create(&document("fixed")).await.unwrap();
    let mut renamed = document("fixed");
    renamed.spec.source.postgres.slot.name = Some("other_slot".into());
    let request = v1::UpdateFlowRequest { flow: Some(api::flow_to_message(&renamed)) };
    let refused = flows.update_flow(request).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "FIELD_IMMUTABLE"));
    assert!(refused.message().contains("wallaby_fixed"), "{}", refused.message());

    let drained = running.workers.clone().drain_worker(v1::DrainWorkerRequest { name: "workers/w9".into() }).await;
    assert_eq!(reason(&drained.unwrap_err()), "WORKER_NOT_FOUND");
    let sink = v1::GetSinkRequest { name: "flows/fixed/sinks/nothing".into() };
    assert_eq!(reason(&running.sinks.clone().get_sink(sink).await.unwrap_err()), "SINK_NOT_FOUND");
}

#[tokio::test]
async fn more_comparisons_than_are_kept_are_refused_by_their_own_reason() {
    let scopes = Scopes::create("comparisons").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("shop")).await.unwrap();
    let mut verify = VerifyServiceClient::new(running.channel.clone());
    let request = || v1::VerifyRequest { parent: "flows/shop".into(), spec: None };
    for _ in 0..4 {
        verify.verify(request()).await.unwrap();
    }
    let refused = verify.verify(request()).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "TOO_MANY_OPERATIONS"));
    assert!(refused.message().contains("4 operations that are not over"), "{}", refused.message());
    running.controller.stop().await;
}

#[tokio::test]
async fn a_comparison_of_several_sinks_is_told_which_there_are() {
    let scopes = Scopes::create("several").await;
    let running = Running::ready(&scopes.place).await;
    let mut flow = document("shop");
    let lake = SinkSpec { name: SinkId::new("lake").unwrap(), ..flow.spec.sinks[0].clone() };
    flow.spec.sinks.push(lake);
    running.create(&flow).await.unwrap();
    let request = v1::VerifyRequest { parent: "flows/shop".into(), spec: None };
    let refused = VerifyServiceClient::new(running.channel.clone()).verify(request).await.unwrap_err();
    assert_eq!(reason(&refused), "ARGUMENT_INVALID");
    assert_eq!(refused.message(), "flow shop has several sinks: name one of warehouse, lake");
    running.controller.stop().await;
}

#[tokio::test]
async fn a_comparison_of_what_is_stopped_is_refused_until_it_is_resumed() {
    let scopes = Scopes::create("stopped").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("shop")).await.unwrap();
    let worker = scopes.place.worker("w1").await;
    let coordination = scopes.place.coordination().await;
    let lock_of = async |name: &str| {
        let revision = coordination.flow(&task(name).flow).await.unwrap().revision;
        match worker.acquire(&task(name), revision).await.unwrap() {
            Acquired::Lock(lock) => lock,
            other => panic!("{name} was not acquired: {other:?}"),
        }
    };
    let stopped = |error: &str| TaskStatus {
        phase: TaskPhase::Stopped,
        worker: Some(WorkerId::new("w1").unwrap()),
        last_error: Some(error.to_owned()),
        ..TaskStatus::default()
    };
    let mut verify = VerifyServiceClient::new(running.channel.clone());
    let request = || v1::VerifyRequest { parent: "flows/shop".into(), spec: None };
    let is_shown_stopped = async |index: usize| {
        eventually(PATIENCE, "the controller knows that the task stopped", async || {
            let tasks = running.get("shop").await.unwrap().status.unwrap().tasks;
            if tasks[index].stopped { Ok(()) } else { Err(tasks) }
        })
        .await;
    };

    let apply = lock_of("shop.apply.warehouse").await;
    apply.put_status(&stopped("the role has no rights")).await.unwrap();
    is_shown_stopped(1).await;
    let refused = verify.verify(request()).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "TASK_STOPPED"));
    for part in ["sink shop/warehouse is stopped", "the role has no rights", "`wallaby resume shop/warehouse`"] {
        assert!(refused.message().contains(part), "{part:?} is missing: {}", refused.message());
    }

    // What it said before somebody resumed it says nothing of now.
    let resume = v1::ResumeSinkRequest { name: "flows/shop/sinks/warehouse".into() };
    running.sinks.clone().resume_sink(resume).await.unwrap();
    verify.verify(request()).await.unwrap();

    let capture = lock_of("shop.capture").await;
    capture.put_status(&stopped("the slot is gone")).await.unwrap();
    is_shown_stopped(0).await;
    let refused = verify.verify(request()).await.unwrap_err();
    for part in ["the capture of flow shop is stopped", "the slot is gone", "`wallaby resume shop`"] {
        assert!(refused.message().contains(part), "{part:?} is missing: {}", refused.message());
    }
    running.controller.stop().await;
}

#[tokio::test]
async fn a_secret_is_stored_and_not_shown() {
    let scopes = Scopes::create("secret").await;
    let running = Running::ready(&scopes.place).await;
    let mut flow = document("secret");
    flow.spec.source.postgres.dsn = SecretRef::Value("postgres://u:hunter2@h/d".into());
    let made = running.create(&flow).await.unwrap();
    let read = running.get("secret").await.unwrap();
    assert!(!format!("{made:?}{read:?}").contains("hunter2"));
    let stored = scopes.place.coordination().await.flow(&flow.metadata.name).await.unwrap();
    assert_eq!(stored.record.document, flow);
    let shown_again = v1::UpdateFlowRequest { flow: Some(read) };
    let refused = running.flows.clone().update_flow(shown_again).await.unwrap_err();
    assert!(refused.message().contains("in the place of a secret"), "{}", refused.message());
}

#[tokio::test]
async fn flows_and_sinks_pause_and_resume() {
    let scopes = Scopes::create("pause").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("shop")).await.unwrap();
    let coordination = scopes.place.coordination().await;
    let id = document("shop").metadata.name;

    let name = || "flows/shop".to_owned();
    let paused = running.flows.clone().pause_flow(v1::PauseFlowRequest { name: name() }).await.unwrap().into_inner();
    assert_eq!(paused.flow.unwrap().status.unwrap().phase, i32::from(v1::Phase::Paused));
    running.flows.clone().resume_flow(v1::ResumeFlowRequest { name: name() }).await.unwrap();
    let record = coordination.flow(&id).await.unwrap().record;
    assert_eq!((record.document.spec.paused, record.resumes, record.generation), (false, 1, 3));

    let sink = || "flows/shop/sinks/warehouse".to_owned();
    let paused = running.sinks.clone().pause_sink(v1::PauseSinkRequest { name: sink() }).await.unwrap().into_inner();
    assert!(paused.sink.unwrap().spec.unwrap().paused);
    running.sinks.clone().resume_sink(v1::ResumeSinkRequest { name: sink() }).await.unwrap();
    let record = coordination.flow(&id).await.unwrap().record;
    assert_eq!((record.document.spec.sinks[0].paused, record.resumes), (false, 2));
    let list = v1::ListSinksRequest { parent: "flows/-".into() };
    assert_eq!(running.sinks.clone().list_sinks(list).await.unwrap().into_inner().sinks.len(), 1);
}

#[tokio::test]
async fn a_sink_that_is_added_starts_at_the_logs_end_and_one_that_is_removed_takes_its_hold_along() {
    let scopes = Scopes::create("sinks").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("grow")).await.unwrap();
    let coordination = scopes.place.coordination().await;
    let mut grown = document("grow");
    let mut second = grown.spec.sinks[0].clone();
    second.name = "second".parse().unwrap();
    grown.spec.sinks.push(second);
    let update = |flow| v1::UpdateFlowRequest { flow: Some(api::flow_to_message(flow)) };
    // NATS may not have been reached yet: then it says so and the update is tried again.
    eventually(PATIENCE, "the sink is added", async || running.flows.clone().update_flow(update(&grown)).await).await;
    let holds = coordination.holds(&grown.metadata.name).await.unwrap();
    assert_eq!(holds.len(), 2, "{holds:?}");
    running.flows.clone().update_flow(update(&document("grow"))).await.unwrap();
    let holds = coordination.holds(&grown.metadata.name).await.unwrap();
    assert_eq!(holds.keys().map(ToString::to_string).collect::<Vec<_>>(), ["warehouse"]);
}

#[tokio::test]
async fn a_watch_tells_of_new_changed_and_deleted_flows() {
    let scopes = Scopes::create("watch").await;
    let running = Running::ready(&scopes.place).await;
    let interval = Some(api::duration_to_message(Duration::from_millis(100)));
    let request = v1::WatchFlowRequest { name: "flows/-".into(), interval };
    let mut changes = running.flows.clone().watch_flow(request).await.unwrap().into_inner();
    let mut next = async |what: &str| {
        let change = tokio::time::timeout(PATIENCE, changes.next()).await;
        change.unwrap_or_else(|_| panic!("nothing was told of {what}")).unwrap().unwrap()
    };
    running.create(&document("seen")).await.unwrap();
    let told = next("the new flow").await;
    assert_eq!((told.flow.unwrap().name.as_str(), told.deleted), ("flows/seen", false));

    running.flows.clone().pause_flow(v1::PauseFlowRequest { name: "flows/seen".into() }).await.unwrap();
    while !next("the pause").await.flow.unwrap().spec.unwrap().paused {}
    let delete = v1::DeleteFlowRequest { name: "flows/seen".into(), ..Default::default() };
    running.flows.clone().delete_flow(delete).await.unwrap();
    while !next("the deletion").await.deleted {}

    // An open watch does not hold up the end.
    let started = std::time::Instant::now();
    running.controller.stop().await;
    assert!(started.elapsed() < Duration::from_secs(5), "the end took {:?}", started.elapsed());
}

#[tokio::test]
async fn a_watch_refuses_an_interval_that_no_clock_can_count() {
    let scopes = Scopes::create("interval").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("seen")).await.unwrap();
    let watch = async |seconds| {
        let interval = Some(prost_types::Duration { seconds, nanos: 0 });
        let request = v1::WatchFlowRequest { name: "flows/seen".into(), interval };
        let mut changes = running.flows.clone().watch_flow(request).await?.into_inner();
        let first = tokio::time::timeout(PATIENCE, changes.next()).await.expect("an answer, or the watch's end");
        first.unwrap_or_else(|| Err(tonic::Status::internal("the watch ended without an answer")))
    };
    for seconds in [i64::MAX, 86_401, -1] {
        let refused = watch(seconds).await.expect_err("it was taken");
        assert_eq!(reason(&refused), "ARGUMENT_INVALID", "{seconds} s");
    }
    assert_eq!(watch(86_400).await.unwrap().flow.unwrap().name, "flows/seen");
    running.controller.stop().await;
}

#[tokio::test]
async fn workers_are_listed_with_what_they_own_and_drained() {
    let scopes = Scopes::create("workers").await;
    let running = Running::ready(&scopes.place).await;
    running.create(&document("shop")).await.unwrap();
    let worker = scopes.place.worker("w1").await;
    let entry = scopes.place.coordination().await.flow(&"shop".parse().unwrap()).await.unwrap();
    let _lock = worker.acquire(&task("shop.capture"), entry.revision).await.unwrap();
    let shown = eventually(PATIENCE, "the worker owns the capture", async || {
        let get = v1::GetWorkerRequest { name: "workers/w1".into() };
        let worker = running.workers.clone().get_worker(get).await.map_err(|status| status.to_string())?;
        let worker = worker.into_inner().worker.unwrap();
        if worker.tasks.is_empty() { Err(format!("{worker:?}")) } else { Ok(worker) }
    })
    .await;
    assert_eq!((shown.tasks, shown.capacity, shown.draining), (vec!["shop.capture".to_owned()], 8, false));
    let drain = v1::DrainWorkerRequest { name: "workers/w1".into() };
    assert!(running.workers.clone().drain_worker(drain).await.unwrap().into_inner().worker.unwrap().draining);
    tokio::time::timeout(PATIENCE, worker.drain_requested().cancelled()).await.unwrap();
    worker.revoke().await.unwrap();
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let scopes = Scopes::create("start").await;
    let first = Running::start(&scopes.place).await;
    let mut options = scopes.place.options();
    options.listen = first.controller.address();
    let Err(error) = Controller::start(options.clone()).await else { panic!("two listen on one port") };
    assert!(error.to_string().contains(&first.controller.address().to_string()), "{error}");
    assert!(matches!(error, StartError::Taken(_)));

    options.listen = "0.0.0.0:0".parse().unwrap();
    let Err(error) = Controller::start(options.clone()).await else { panic!("open to everybody") };
    assert!(matches!(error, StartError::NeedsTls(_)) && error.to_string().contains("--tls-cert"), "{error}");

    options.tls_cert = Some("/nowhere/cert.pem".into());
    options.tls_key = Some("/nowhere/key.pem".into());
    let Err(error) = Controller::start(options).await else { panic!("no certificate") };
    assert!(error.to_string().contains("/nowhere/cert.pem"), "{error}");
}

/// Lists and conditions come from a watch, which is a little behind: not behind the one who asks.
#[tokio::test]
async fn what_was_just_written_stands_in_the_next_answer() {
    let scopes = Scopes::create("own-writes").await;
    let running = Running::ready(&scopes.place).await;
    let mut snapshots = SnapshotServiceClient::new(running.channel.clone());
    for n in 0..20 {
        let name = format!("flow-{n}");
        let mut flow = document(&name);
        flow.spec.source.postgres.snapshot = SnapshotMode::Initial;
        let made = running.create(&flow).await.unwrap();
        let run = format!("flows/{name}/snapshots/1");
        let open: Vec<String> = made.status.unwrap().snapshots.into_iter().map(|snapshot| snapshot.name).collect();
        assert_eq!(open, std::slice::from_ref(&run), "the answer itself shows the run");
        let request = v1::ListSnapshotsRequest { parent: "flows/-".into() };
        let listed = snapshots.list_snapshots(request).await.unwrap().into_inner().snapshots;
        assert!(listed.iter().any(|snapshot| snapshot.name == run), "{run} is not among {} runs", listed.len());
    }
    running.controller.stop().await;
}
