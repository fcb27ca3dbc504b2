//! Servers that go away and come back. The controller never ends by itself.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use wallaby_coordination::Acquired;
use wallaby_model::condition::Timestamp;
use wallaby_model::flow::SnapshotMode;
use wallaby_model::flow::change::sink_anew;
use wallaby_model::offer::{OFFER_CONSUMER, offer_stream};
use wallaby_model::run::{RunPlan, RunSpec};
use wallaby_model::{FlowId, TaskId, TaskKind};
use wallaby_proto::v1;
use wallaby_testkit::{EtcdCluster, EtcdOptions, NatsCluster, NatsOptions, eventually};

use crate::setup::{PATIENCE, Place, Running, SERVICES, Scopes, document, reason};

async fn health(running: &Running, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(running.channel.clone()).check(request).await.unwrap();
    answer.into_inner().status()
}

/// As a whole, and asked for each service by name.
async fn until_healthy(running: &Running, wanted: ServingStatus) {
    for service in SERVICES.into_iter().chain([""]) {
        eventually(PATIENCE, "the health is as it should be", async || match health(running, service).await {
            status if status == wanted => Ok(()),
            status => Err(format!("{service}: {status:?}")),
        })
        .await;
    }
}

/// Whoever looks for the API without its files finds it, and nothing else of ours.
#[tokio::test]
async fn reflection_lists_every_service_and_knows_its_messages() {
    let scopes = Scopes::create("reflection").await;
    let running = Running::start(&scopes.place).await;
    let ask = async |message_request| {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
        let mut client = ServerReflectionClient::new(running.channel.clone());
        let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
        answers.into_inner().next().await.unwrap().map(|answer| answer.message_response.unwrap())
    };
    let answer = ask(MessageRequest::ListServices(String::new())).await.unwrap();
    let MessageResponse::ListServicesResponse(listed) = answer else { panic!("{answer:?}") };
    let names: BTreeSet<String> = listed.service.into_iter().map(|service| service.name).collect();
    let ours: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.starts_with("wallaby.")).collect();
    assert_eq!(ours, SERVICES);
    assert!(names.contains("grpc.health.v1.Health"), "{names:?}");
    for service in SERVICES {
        let answer = ask(MessageRequest::FileContainingSymbol(service.to_owned())).await.unwrap();
        let MessageResponse::FileDescriptorResponse(files) = answer else { panic!("{service}: {answer:?}") };
        assert!(!files.file_descriptor_proto.is_empty(), "{service}");
    }
    let refused = ask(MessageRequest::FileContainingSymbol("wallaby.v1.NoService".to_owned())).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

/// Bytes that etcd has sent to its clients.
async fn sent(etcd: &EtcdCluster) -> f64 {
    let endpoint = etcd.endpoints()[0].clone();
    let address = endpoint.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix("etcd_network_client_grpc_sent_bytes_total "));
    line.unwrap_or_else(|| panic!("no such figure in {page}")).trim().parse().unwrap()
}

/// Plans and the keys of chunks stand between the specifications of the flows: tens of MiB of them.
#[tokio::test]
async fn a_list_of_flows_or_sinks_does_not_read_what_else_stands_below_them() {
    const RUNS: usize = 20;
    const BYTES: usize = 200 << 10;
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    let running = Running::ready(&place).await;
    let mut shop = document("shop");
    shop.spec.source.postgres.snapshot = SnapshotMode::Never;
    let made = running.create(&shop).await.unwrap();
    let (coordination, worker) = (place.coordination().await, place.worker("w1").await);
    let flow = coordination.flow(&FlowId::new("shop").unwrap()).await.unwrap();
    let before = sent(&etcd).await;
    for number in 0..RUNS {
        let tables = vec![format!("public.t{number}")];
        let spec = RunSpec { tables, ..sink_anew(&flow.record.document.spec.sinks[0].name, Timestamp(1)) };
        let run = coordination.create_run(&flow, spec).await.unwrap().run;
        let task = TaskId { flow: flow.flow.clone(), kind: TaskKind::Run(run) };
        let Acquired::Lock(owner) = worker.acquire(&task, flow.revision).await.unwrap() else { panic!("not acquired") };
        let plan = RunPlan { message: "x".repeat(BYTES), ..RunPlan::default() };
        owner.put_plan(run, &plan).await.unwrap();
    }
    // Whoever watches gets them, once.
    eventually(PATIENCE, "the controller's watch has them", async || match sent(&etcd).await - before {
        bytes if bytes >= (RUNS * BYTES) as f64 => Ok(()),
        bytes => Err(bytes),
    })
    .await;
    let before = sent(&etcd).await;
    let flows = running.flows.clone().list_flows(v1::ListFlowsRequest::default()).await.unwrap().into_inner().flows;
    assert_eq!(flows.iter().map(|flow| &flow.name).collect::<Vec<_>>(), [&made.name]);
    let between = sent(&etcd).await;
    let request = v1::ListSinksRequest { parent: "flows/-".to_owned() };
    let sinks = running.sinks.clone().list_sinks(request).await.unwrap().into_inner().sinks;
    assert_eq!(sinks.len(), flow.record.document.spec.sinks.len());
    let (of_flows, of_sinks) = (between - before, sent(&etcd).await - between);
    let most = (RUNS * BYTES / 2) as f64;
    assert!(of_flows < most && of_sinks < most, "{of_flows} bytes for a flow, {of_sinks} for its sinks");
}

#[tokio::test]
async fn etcd_goes_away_and_comes_back() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    let running = Running::ready(&place).await;
    running.create(&document("shop")).await.unwrap();
    until_healthy(&running, ServingStatus::Serving).await;

    etcd.member(0).unwrap().kill9().await.unwrap();
    let refused = running.get("shop").await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "ETCD_UNREACHABLE"));
    assert!(refused.message().contains(&place.etcd[0]), "{}", refused.message());
    until_healthy(&running, ServingStatus::NotServing).await;

    etcd.start_member(0).await.unwrap();
    eventually(PATIENCE, "flows are back", async || running.get("shop").await).await;
    until_healthy(&running, ServingStatus::Serving).await;
    // The watch behind the view goes on as well: what is new is offered.
    running.create(&document("later")).await.unwrap();
    until_offered(&nats, &place, "later.capture").await;
}

#[tokio::test]
async fn nats_goes_away_with_its_queue_and_comes_back() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    let running = Running::ready(&place).await;
    until_healthy(&running, ServingStatus::Serving).await;
    nats.kill9_all().await.unwrap();
    running.create(&document("shop")).await.unwrap();
    until_healthy(&running, ServingStatus::NotServing).await;
    nats.start_again().await.unwrap();
    until_offered(&nats, &place, "shop.capture").await;

    // Somebody removes the queue: it is made again.
    let context = jetstream(&nats).await;
    context.delete_stream(offer_stream(&place.pool)).await.unwrap();
    let _worker = place.worker("w1").await;
    until_offered(&nats, &place, "shop.capture").await;
}

#[tokio::test]
async fn a_controller_starts_before_its_servers() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions { nodes: 1, ..NatsOptions::default() }).await.unwrap();
    let place = Place::new(etcd.endpoints(), "/faults/", nats.client_url());
    etcd.member(0).unwrap().stop().await.unwrap();
    nats.kill9_all().await.unwrap();
    let running = Running::start(&place).await;
    let refused = running.get("shop").await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "ETCD_UNREACHABLE"));
    assert!(refused.message().contains(&place.etcd[0]), "{}", refused.message());
    assert_eq!(health(&running, "").await, ServingStatus::NotServing);
    etcd.start_member(0).await.unwrap();
    nats.start_again().await.unwrap();
    running.until_ready().await;
    running.create(&document("shop")).await.unwrap();
    until_offered(&nats, &place, "shop.capture").await;
    until_healthy(&running, ServingStatus::Serving).await;
}

async fn jetstream(nats: &NatsCluster) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(async_nats::connect(nats.client_url()).await.unwrap())
}

/// Waits until an offer of a task lies in the queue, with its consumer beside it.
async fn until_offered(nats: &NatsCluster, place: &Place, task: &str) {
    let context = jetstream(nats).await;
    let subject = format!("wallaby.offer.{}.{task}", place.pool);
    eventually(Duration::from_secs(30), "the task is offered", async || {
        let stream = context.get_stream(offer_stream(&place.pool)).await.map_err(|error| error.to_string())?;
        stream.consumer_info(OFFER_CONSUMER).await.map_err(|error| error.to_string())?;
        stream.get_last_raw_message_by_subject(&subject).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
