//! Controllers of a test's own, and clients of them.

use std::time::Duration;

use clap::Parser;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt;
use wallaby_controller::{Controller, Options};
use wallaby_coordination::{Coordination, SessionOptions, WorkerInfo, WorkerSession};
use wallaby_model::condition::Timestamp;
use wallaby_model::flow::{FlowDocument, page::EXAMPLE, parse};
use wallaby_model::{PoolId, TaskId, WorkerId, api};
use wallaby_proto::v1;
use wallaby_proto::v1::flow_service_client::FlowServiceClient;
use wallaby_proto::v1::sink_service_client::SinkServiceClient;
use wallaby_proto::v1::worker_service_client::WorkerServiceClient;
use wallaby_testkit::{EtcdScope, NatsScope, eventually, unique};

/// Long enough on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where a controller works: one test's part of etcd, and a pool of its own.
#[derive(Clone)]
pub struct Place {
    pub etcd: Vec<String>,
    pub prefix: String,
    pub nats: String,
    pub pool: PoolId,
    /// Short, so that a test sees one replica take over from another. Over a slow wire a replica would lose it all the time.
    pub leader_ttl: Duration,
}

/// What a controller serves of ours.
pub const SERVICES: [&str; 6] = [
    "wallaby.v1.FlowService",
    "wallaby.v1.OperationService",
    "wallaby.v1.SinkService",
    "wallaby.v1.SnapshotService",
    "wallaby.v1.VerifyService",
    "wallaby.v1.WorkerService",
];

/// A place in the shared servers; its scopes are kept by the test.
pub struct Scopes {
    pub place: Place,
    pub nats: NatsScope<'static>,
    _etcd: EtcdScope<'static>,
}

impl Scopes {
    pub async fn create(hint: &str) -> Scopes {
        let etcd = EtcdScope::create(hint).await;
        let nats = NatsScope::one_node(hint).await;
        let place = Place::new(etcd.endpoints(), etcd.prefix(), nats.url());
        Scopes { place, nats, _etcd: etcd }
    }
}

impl Place {
    pub fn new(etcd: Vec<String>, prefix: &str, nats: String) -> Place {
        let pool = PoolId::new(unique("pool").replace('_', "-")).unwrap();
        Place { etcd, prefix: prefix.trim_end_matches('/').to_owned(), nats, pool, leader_ttl: Duration::from_secs(2) }
    }

    pub fn options(&self) -> Options {
        let arguments = [
            "wallaby-controller",
            "--listen=127.0.0.1:0",
            &format!("--leader-ttl={}s", self.leader_ttl.as_secs()),
            &format!("--etcd={}", self.etcd.join(",")),
            &format!("--etcd-prefix={}", self.prefix),
            &format!("--nats={}", self.nats),
            &format!("--pool={}", self.pool),
        ];
        Options::try_parse_from(arguments).unwrap()
    }

    pub async fn coordination(&self) -> Coordination {
        let options = wallaby_coordination::Options { prefix: self.prefix.clone(), ..Default::default() };
        Coordination::connect(&self.etcd, options).await.unwrap()
    }

    /// A worker that takes nothing by itself.
    pub async fn worker(&self, name: &str) -> WorkerSession {
        let info = WorkerInfo {
            capacity: 8,
            load: 0,
            version: "test".into(),
            zone: None,
            capabilities: vec!["postgres".into()],
            address: "127.0.0.1:1".into(),
            draining: false,
            started_at: Timestamp(1),
        };
        let coordination = self.coordination().await;
        WorkerSession::start(&coordination, WorkerId::new(name).unwrap(), info, SessionOptions::default())
            .await
            .unwrap()
    }
}

/// A controller with clients.
pub struct Running {
    pub controller: Controller,
    pub flows: FlowServiceClient<Channel>,
    pub sinks: SinkServiceClient<Channel>,
    pub workers: WorkerServiceClient<Channel>,
    pub channel: Channel,
}

impl Running {
    pub async fn start(place: &Place) -> Running {
        let controller = Controller::start(place.options()).await.unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{}", controller.address())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Running {
            controller,
            flows: FlowServiceClient::new(channel.clone()),
            sinks: SinkServiceClient::new(channel.clone()),
            workers: WorkerServiceClient::new(channel.clone()),
            channel,
        }
    }

    /// Starts, and waits until flows can be read.
    pub async fn ready(place: &Place) -> Running {
        let running = Running::start(place).await;
        running.until_ready().await;
        running
    }

    pub async fn until_ready(&self) {
        let list = async || self.flows.clone().list_flows(v1::ListFlowsRequest::default()).await;
        eventually(PATIENCE, "the controller answers", list).await;
    }

    pub async fn create(&self, document: &FlowDocument) -> Result<v1::Flow, tonic::Status> {
        let flow = Some(api::flow_to_message(document));
        let answer = self.flows.clone().create_flow(v1::CreateFlowRequest { flow }).await?;
        Ok(answer.into_inner().flow.unwrap())
    }

    pub async fn get(&self, name: &str) -> Result<v1::Flow, tonic::Status> {
        let answer = self.flows.clone().get_flow(v1::GetFlowRequest { name: format!("flows/{name}") }).await?;
        Ok(answer.into_inner().flow.unwrap())
    }
}

/// The example flow under another name.
pub fn document(name: &str) -> FlowDocument {
    parse(&EXAMPLE.replacen("name: shop", &format!("name: {name}"), 1), "-").unwrap()
}

pub fn task(text: &str) -> TaskId {
    text.parse().unwrap()
}

/// The reason that a refusal carries.
pub fn reason(status: &tonic::Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_else(|| format!("no ErrorInfo in {status:?}"))
}
