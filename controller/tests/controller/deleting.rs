//! A controller that dies inside `wallaby delete`.

use futures::TryStreamExt;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use wallaby_coordination::{Coordination, Key};
use wallaby_model::flow::{FlowDocument, Replicas};
use wallaby_model::{FlowId, TaskId, api};
use wallaby_proto::v1;
use wallaby_staging::{Connections, Log, LogConfig, NatsTarget, RESERVE_BYTES, Shelf, open_side};
use wallaby_testkit::{Held, Wire, eventually, unique};

use crate::offers::{offered, queue};
use crate::setup::{PATIENCE, Place, Running, Scopes, document, task};

/// A flow whose streams are small, under a name that no other test uses.
fn small() -> FlowDocument {
    let mut document = document(&unique("shop").replace('_', "-"));
    document.spec.log.replicas = Replicas::Exactly(1);
    document.spec.log.max_bytes.0 = 2 * RESERVE_BYTES;
    document.spec.source.postgres.large_transaction_bytes.0 = 1 << 20;
    document.spec.log.side_store =
        serde_json::from_str(r#"{ "jetstream": { "transactionsMax": "1Mi", "chunksMax": "1Mi" } }"#).unwrap();
    document
}

/// Makes what the flow's tasks make in NATS.
async fn stage(scopes: &Scopes, document: &FlowDocument) {
    let target = NatsTarget { servers: vec![scopes.nats.url()], name: "test".to_owned(), ..NatsTarget::default() };
    let connections = Connections::open(&target).await.unwrap();
    let (flow, spec) = (&document.metadata.name, &document.spec.log);
    let log = Log::new(flow.clone(), connections.clone());
    log.ensure(&LogConfig { replicas: spec.replicas, max_bytes: spec.max_bytes.0 }).await.unwrap();
    let side = open_side(flow, spec, &connections).unwrap();
    side.ensure(Shelf::Transactions).await.unwrap();
    side.ensure(Shelf::Chunks).await.unwrap();
    assert_eq!(streams(scopes, flow).await.len(), 3);
}

/// The streams of a flow.
async fn streams(scopes: &Scopes, flow: &FlowId) -> Vec<String> {
    let all: Vec<String> = scopes.nats.jetstream().stream_names().try_collect().await.unwrap();
    all.into_iter().filter(|name| name.ends_with(&format!("_{flow}"))).collect()
}

async fn are_gone(scopes: &Scopes, flow: &FlowId) {
    eventually(PATIENCE, "the flow's streams are gone", async || match streams(scopes, flow).await {
        left if left.is_empty() => Ok(()),
        left => Err(left),
    })
    .await;
}

async fn is_marked(coordination: &Coordination, flow: &FlowId) -> bool {
    coordination.flow(flow).await.unwrap().record.deleting_since.is_some()
}

/// Asks for the end of a flow, in the background.
fn asks(running: &Running, flow: &FlowId, force: bool) -> AbortOnDropHandle<Result<(), tonic::Status>> {
    let mut flows = running.flows.clone();
    let request = v1::DeleteFlowRequest { name: format!("flows/{flow}"), force, ..Default::default() };
    AbortOnDropHandle::new(tokio::spawn(async move { flows.delete_flow(request).await.map(drop) }))
}

/// Waits until the controller has NATS, too: a forced deletion asks it.
async fn reaches_nats(running: &Running) {
    let probe = small();
    running.create(&probe).await.unwrap();
    let name = &probe.metadata.name;
    eventually(PATIENCE, "the controller reaches NATS", async || asks(running, name, true).await.unwrap()).await;
}

/// A controller whose servers are behind wires: what it sends can be held, and never arrives once it is dead.
struct Wired {
    running: Running,
    etcd: Wire,
    nats: Wire,
}

impl Wired {
    async fn ready(scopes: &Scopes) -> Wired {
        let etcd = Wire::to(&scopes.place.etcd[0]).await;
        let nats = Wire::to(&scopes.place.nats).await;
        let place =
            Place { etcd: vec![etcd.url().replace("nats://", "http://")], nats: nats.url(), ..scopes.place.clone() };
        let running = Running::ready(&place).await;
        reaches_nats(&running).await;
        Wired { running, etcd, nats }
    }
}

/// Where the controller dies.
#[derive(Clone, Copy, Debug)]
enum Dies {
    /// The flow is marked, and nothing else was done.
    AfterTheMark,
    /// What the flow had in NATS is gone.
    AfterTheLog,
}

#[tokio::test]
async fn killed_between_two_steps_of_a_forced_deletion_it_is_finished_when_it_is_asked_for_again() {
    let scopes = Scopes::create("forced").await;
    let coordination = scopes.place.coordination().await;
    let document = small();
    let flow = document.metadata.name.clone();
    for dies in [Dies::AfterTheMark, Dies::AfterTheLog] {
        println!("dies {dies:?}");
        let wired = Wired::ready(&scopes).await;
        wired.running.create(&document).await.unwrap();
        stage(&scopes, &document).await;
        wired.nats.hold(Held::Requests);
        let asked = asks(&wired.running, &flow, true);
        eventually(PATIENCE, "the flow is marked", async || match is_marked(&coordination, &flow).await {
            true => Ok(()),
            false => Err("it is not"),
        })
        .await;
        if let Dies::AfterTheLog = dies {
            wired.etcd.hold(Held::Requests);
            wired.nats.hold(Held::Nothing);
            are_gone(&scopes, &flow).await;
        }
        drop((asked, wired));
        assert!(is_marked(&coordination, &flow).await, "the dead one did not finish it");
        let left = streams(&scopes, &flow).await.len();
        assert_eq!(left, if let Dies::AfterTheMark = dies { 3 } else { 0 });

        let next = Running::ready(&scopes.place).await;
        reaches_nats(&next).await;
        asks(&next, &flow, true).await.unwrap().unwrap();
        assert_eq!(next.get(flow.as_str()).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(streams(&scopes, &flow).await, Vec::<String>::new());
        let keys = coordination.list(&coordination.keys().everything()).await.unwrap();
        let of_it = keys.into_iter().map(|entry| entry.key).filter(|key| *key != Key::ControllerLeader);
        assert_eq!(of_it.collect::<Vec<_>>(), []);
        next.controller.stop().await;
    }
}

#[tokio::test]
async fn killed_before_the_end_of_a_flow_is_offered_the_next_controller_offers_it() {
    let scopes = Scopes::create("unoffered").await;
    let coordination = scopes.place.coordination().await;
    let document = small();
    let flow = document.metadata.name.clone();
    let worker = scopes.place.worker("w1").await;
    let wired = Wired::ready(&scopes).await;
    let queue = queue(&scopes).await;
    // From now on it offers nothing.
    wired.nats.hold(Held::Requests);
    wired.running.create(&document).await.unwrap();
    asks(&wired.running, &flow, false).await.unwrap().unwrap();
    drop(wired);
    let next = Running::ready(&scopes.place).await;
    assert!(is_marked(&coordination, &flow).await);
    assert!(offered(&queue, &task(&format!("{flow}.capture")), PATIENCE).await.is_some());
    worker.revoke().await.unwrap();
    next.controller.stop().await;
}

/// Whoever makes it again under its name is not told that it is there, and then it goes.
#[tokio::test]
async fn a_flow_that_goes_is_not_said_to_be_unchanged() {
    let scopes = Scopes::create("goes").await;
    let coordination = scopes.place.coordination().await;
    let running = Running::ready(&scopes.place).await;
    let mut document = small();
    document.spec.paused = true;
    let flow = document.metadata.name.clone();
    running.create(&document).await.unwrap();
    // It does not go before its capture has ended.
    let worker = scopes.place.worker("w1").await;
    let seen = coordination.flow(&flow).await.unwrap();
    let _lock = worker.acquire(&TaskId::capture(&flow), seen.revision).await.unwrap();
    eventually(PATIENCE, "the deletion is asked for", async || asks(&running, &flow, false).await.unwrap()).await;
    let message = || Some(api::flow_to_message(&document));
    let mut flows = running.flows.clone();
    let answers = [
        flows.update_flow(v1::UpdateFlowRequest { flow: message() }).await.unwrap_err(),
        flows.diff_flow(v1::DiffFlowRequest { flow: message() }).await.unwrap_err(),
        flows.pause_flow(v1::PauseFlowRequest { name: format!("flows/{flow}") }).await.unwrap_err(),
    ];
    for refused in answers {
        assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("delet"), "{refused}");
    }
}
