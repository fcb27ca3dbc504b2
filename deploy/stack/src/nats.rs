//! NATS with JetStream: one node, or a cluster of three.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::process::Signal;
use serde_json::Value;

use crate::error::LogTail;
use crate::process::{Exit, ProcessSpec};
use crate::server::Probe;
use crate::{Error, Folder, PortLease, Result, Server, Toolbox, folder, http, nonce};

/// How long a node may take to be ready: recovery of its streams on a busy machine.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long an orderly stop may take before the node is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How long a stream may be without a leader before we stop asking.
const LEADER_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
/// How many sets of ports are tried.
const PORT_TRIES: usize = 3;

/// When JetStream flushes what it has acknowledged to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncInterval {
    /// Before each acknowledgement.
    Always,
    /// Every so often (at least a second; the server's own default is two minutes).
    Every(Duration),
}

/// How a cluster is set up. `NatsOptions { nodes: 3, ..Default::default() }`.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// 1 or 3.
    pub nodes: usize,
    /// When JetStream flushes. `Always` by default, as in production.
    pub sync_interval: SyncInterval,
    /// How much each node may store in files, in bytes. The `max_bytes` of all streams is reserved from it; no disk is used for that.
    pub max_file_bytes: u64,
    /// How much each node may store in memory, in bytes.
    pub max_memory_bytes: u64,
    /// The largest message, in bytes; without it the server's 1 MiB.
    pub max_payload_bytes: Option<u64>,
    /// A folder to keep everything in; streams that are there are served again. Without one it is temporary.
    pub folder: Option<PathBuf>,
    /// Where each node stores its streams, instead of in the folder: for disks that fail.
    pub store_folders: Vec<PathBuf>,
    /// Where the first node listens for clients on 127.0.0.1; without one, a free port.
    pub client_port: Option<u16>,
    /// Lines added to each node's configuration.
    pub extra_config: String,
}

impl Default for NatsOptions {
    fn default() -> Self {
        Self {
            nodes: 1,
            sync_interval: SyncInterval::Always,
            max_file_bytes: 64 << 30,
            max_memory_bytes: 1 << 30,
            max_payload_bytes: None,
            folder: None,
            store_folders: Vec::new(),
            client_port: None,
            extra_config: String::new(),
        }
    }
}

/// A running NATS cluster. Clients need no credentials: they land in the account `APP`, which has JetStream.
///
/// Dropping it kills all nodes. The streams go too, unless the options named a folder.
#[derive(Debug)]
pub struct NatsCluster {
    // In this order: the processes must be gone before their folder is removed.
    nodes: Vec<NatsNode>,
    identity: String,
    folder: Folder,
}

/// One nats-server of a cluster.
#[derive(Debug)]
pub struct NatsNode {
    server: Server,
    name: String,
    client: PortLease,
    routes: PortLease,
    monitor: PortLease,
}

impl NatsCluster {
    /// Starts all nodes and hands the cluster out when JetStream takes streams with as many replicas as there are nodes.
    pub async fn start(options: NatsOptions) -> Result<Self> {
        let binary = Toolbox::find()?.nats_server()?;
        if !matches!(options.nodes, 1 | 3) {
            return Err(Error::State {
                server: "nats".into(),
                what: format!("a cluster has 1 or 3 nodes, not {}", options.nodes),
            });
        }
        let mut folder = Folder::open(options.folder.as_deref(), "nats")?;
        let mut tries = 1;
        loop {
            let identity = nonce("nats");
            // The name of a node is its identity in its store: a kept cluster must find its own peers again.
            let prefix = if options.folder.is_some() { "nats".to_owned() } else { identity.clone() };
            let nodes = NatsNode::configure(&options, &folder, &binary, &prefix, &identity)?;
            let cluster = Self { nodes, identity, folder };
            let error = match cluster.start_all().await {
                Ok(()) => return Ok(cluster),
                Err(error) => error,
            };
            if !matches!(error, Error::PortTaken { .. }) || options.client_port.is_some() || tries == PORT_TRIES {
                return Err(error);
            }
            tries += 1;
            folder = cluster.folder;
        }
    }

    async fn start_all(&self) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.server.launch())?;
        for node in &self.nodes {
            self.node_ready(node).await?;
        }
        self.wait_for_peers().await
    }

    async fn node_ready(&self, node: &NatsNode) -> Result<()> {
        node.server.ready(START_PATIENCE, &node.ports(), || node.probe(&self.identity)).await
    }

    /// Waits until the meta leader sees all nodes: only then replicas can be placed on them.
    pub async fn wait_for_peers(&self) -> Result<()> {
        let Some(first) = self.nodes.first().filter(|_| self.nodes.len() > 1) else { return Ok(()) };
        first.server.ready(START_PATIENCE, &[], || async { Ok(self.peers_seen().await?) }).await
    }

    async fn peers_seen(&self) -> Result<(), String> {
        let leader = self.meta_leader().await?;
        let node = self.nodes.get(leader).ok_or("the meta leader is no node of ours")?;
        let meta = http::get(node.monitor.port(), "/jsz").await?.json()?;
        let replicas = meta.pointer("/meta_cluster/replicas").and_then(Value::as_array).cloned().unwrap_or_default();
        let is_there =
            |replica: &&Value| replica["current"] == Value::Bool(true) && replica["offline"] != Value::Bool(true);
        let seen = replicas.iter().filter(is_there).count() + 1;
        if seen >= self.nodes.len() {
            Ok(())
        } else {
            Err(format!("the meta leader sees {seen} of {} nodes", self.nodes.len()))
        }
    }

    async fn meta_leader(&self) -> Result<usize, String> {
        let mut last = "no node answers".to_owned();
        for node in self.nodes.iter().filter(|node| node.server.is_alive()) {
            let answer = http::get(node.monitor.port(), "/jsz").await.and_then(|answer| answer.json());
            let leader =
                answer.as_ref().ok().and_then(|jsz| jsz.pointer("/meta_cluster/leader")).and_then(Value::as_str);
            match leader.and_then(|name| self.index_of(name)) {
                Some(index) => return Ok(index),
                None => last = answer.err().unwrap_or_else(|| "no meta leader".to_owned()),
            }
        }
        Err(last)
    }

    fn index_of(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// The node that leads the cluster's own log of streams and consumers. Waits while there is none.
    pub async fn leader_of_meta(&self) -> Result<usize> {
        self.poll("the meta leader", || self.meta_leader()).await
    }

    /// The node that leads a stream, by its index. Waits while the stream has no leader, or does not exist yet.
    pub async fn leader_of_stream(&self, stream: &str) -> Result<usize> {
        if self.nodes.len() == 1 {
            return Ok(0);
        }
        self.poll("the leader of a stream", || self.stream_leader(stream)).await
    }

    /// Asks all nodes at once, since a paused one does not answer; the one that takes itself for the leader has the last word.
    async fn stream_leader(&self, stream: &str) -> Result<usize, String> {
        let alive = self.nodes.iter().enumerate().filter(|(_, node)| node.server.is_alive());
        let asked = alive.map(|(index, node)| async move { (index, node.leader_seen(stream).await) });
        let mut answers: FuturesUnordered<_> = asked.collect();
        let mut last = "no node answers".to_owned();
        while let Some((index, leader)) = answers.next().await {
            match leader {
                Ok(Some(leader)) if self.index_of(&leader) == Some(index) => return Ok(index),
                Ok(Some(leader)) => last = format!("node {index} takes '{leader}' for the leader of {stream}"),
                Ok(None) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn poll<F: Future<Output = Result<usize, String>>>(
        &self,
        what: &str,
        question: impl Fn() -> F,
    ) -> Result<usize> {
        let started = Instant::now();
        loop {
            let last = match question().await {
                Ok(index) => return Ok(index),
                Err(last) => last,
            };
            if started.elapsed() > LEADER_PATIENCE {
                let log = self.log_tail(5);
                return Err(Error::NotReady { server: what.to_owned(), waited: started.elapsed(), last, log });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Where clients connect: `nats://127.0.0.1:<port>` of all nodes, separated by commas.
    pub fn client_url(&self) -> String {
        self.urls(|node| node.client_url())
    }

    /// The same for the system account.
    pub fn system_url(&self) -> String {
        self.urls(|node| format!("nats://sys:sys@127.0.0.1:{}", node.client.port()))
    }

    fn urls(&self, url: impl Fn(&NatsNode) -> String) -> String {
        self.nodes.iter().map(url).collect::<Vec<_>>().join(",")
    }

    /// The HTTP monitoring addresses, one for each node.
    pub fn monitoring_urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("http://127.0.0.1:{}", node.monitor.port())).collect()
    }

    /// All nodes.
    pub fn nodes(&self) -> &[NatsNode] {
        &self.nodes
    }

    /// A node by its index; an error when there is none.
    pub fn node(&self, index: usize) -> Result<&NatsNode> {
        let missing = || Error::State {
            server: "nats".into(),
            what: format!("there is no node {index}, only {}", self.nodes.len()),
        };
        self.nodes.get(index).ok_or_else(missing)
    }

    /// Starts a node again that was stopped or killed: same ports, same store. Returns when it has caught up.
    pub async fn start_node(&self, index: usize) -> Result<()> {
        let node = self.node(index)?;
        node.server.launch()?;
        self.node_ready(node).await
    }

    /// Kills all nodes at once: what a power cut does to processes.
    pub async fn kill9_all(&self) -> Result<()> {
        futures::future::try_join_all(self.nodes.iter().map(|node| node.server.kill9())).await.map(|_| ())
    }

    /// Starts all nodes again after `kill9_all`.
    pub async fn start_again(&self) -> Result<()> {
        self.start_all().await
    }

    /// The nonce that every node of this cluster carries in its server tags.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Where the configuration, the logs and (unless the options say otherwise) the streams are.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The last lines of each node's log.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        let named = |node: &NatsNode| {
            node.log_tail(lines).0.into_iter().map(|line| format!("{}: {line}", node.name)).collect::<Vec<_>>()
        };
        LogTail(self.nodes.iter().flat_map(named).collect())
    }
}

impl NatsNode {
    /// Chooses ports and writes the configuration of all nodes.
    fn configure(
        options: &NatsOptions,
        folder: &Folder,
        binary: &std::path::Path,
        prefix: &str,
        identity: &str,
    ) -> Result<Vec<Self>> {
        let mut ports = Vec::new();
        for index in 0..options.nodes {
            let fixed = options.client_port.filter(|_| index == 0).map(PortLease::fixed);
            ports.push((fixed.map_or_else(PortLease::free, Ok)?, PortLease::free()?, PortLease::free()?));
        }
        let routes: Vec<_> = ports.iter().map(|(_, routes, _)| format!("nats://127.0.0.1:{}", routes.port())).collect();
        let routes = routes.join(", ");
        let mut nodes = Vec::new();
        for (index, (client, own_routes, monitor)) in ports.into_iter().enumerate() {
            let name = format!("{prefix}-n{index}");
            let store = options
                .store_folders
                .get(index)
                .cloned()
                .unwrap_or_else(|| folder.path().join(format!("store{index}")));
            folder::make(&store)?;
            let mut text = format!(
                "server_name: \"{name}\"\nserver_tags: [\"{identity}\"]\nlisten: \"127.0.0.1:{}\"\nhttp: \"127.0.0.1:{}\"\n\
                 jetstream {{ store_dir: \"{}\", max_mem: {}, max_file: {}, sync_interval: {} }}\n\
                 accounts {{\n  SYS {{ users: [ {{ user: sys, password: sys }} ] }}\n  \
                 APP {{ jetstream: enabled, users: [ {{ user: app, password: app }} ] }}\n}}\nsystem_account: SYS\nno_auth_user: app\n",
                client.port(),
                monitor.port(),
                store.display(),
                options.max_memory_bytes,
                options.max_file_bytes,
                match options.sync_interval {
                    SyncInterval::Always => "always".to_owned(),
                    SyncInterval::Every(interval) => format!("\"{}s\"", interval.as_secs().max(1)),
                },
            );
            // Infallible: the target is a String.
            if let Some(bytes) = options.max_payload_bytes {
                let _ = writeln!(text, "max_payload: {bytes}");
            }
            if options.nodes > 1 {
                let _ = writeln!(
                    text,
                    "cluster {{ name: \"{prefix}\", listen: \"127.0.0.1:{}\", routes: [ {routes} ] }}",
                    own_routes.port()
                );
            }
            text.push_str(&options.extra_config);
            text.push('\n');
            let config = folder.path().join(format!("n{index}.conf"));
            fs::write(&config, text).map_err(Error::at("writing", &config))?;
            let spec = ProcessSpec::new(format!("nats-n{index}"), binary, folder.path())
                .args(["-c".to_owned(), config.display().to_string()]);
            nodes.push(Self { server: Server::new(spec), name, client, routes: own_routes, monitor });
        }
        Ok(nodes)
    }

    fn ports(&self) -> [u16; 3] {
        [self.client.port(), self.routes.port(), self.monitor.port()]
    }

    /// Whether the node answers with our identity and its JetStream is up.
    async fn probe(&self, identity: &str) -> Result<(), Probe> {
        let varz = http::get(self.monitor.port(), "/varz").await?.json()?;
        let tags = varz["tags"].as_array().cloned().unwrap_or_default();
        if varz["server_name"] != self.name.as_str() || !tags.iter().any(|tag| tag == identity) {
            // Our own process may still fail on the port that the other one holds: that is said first.
            if self.server.is_alive()
                && varz["server_name"].is_string()
                && self.server.log_tail(20).0.iter().any(|line| line.contains("Server is ready"))
            {
                let found = varz["server_name"].to_string();
                let address = format!("127.0.0.1:{}", self.monitor.port());
                return Err(Probe::Never(Error::Impostor { address, expected: self.name.clone(), found }));
            }
            return Err(Probe::NotYet(format!("{} answers", varz["server_name"])));
        }
        let health = http::get(self.monitor.port(), "/healthz").await?;
        if health.status == 200 { Ok(()) } else { Err(Probe::NotYet(health.body)) }
    }

    /// The name of the node that this one takes for the leader of a stream; empty while there is none, `None` without a replica here.
    async fn leader_seen(&self, stream: &str) -> Result<Option<String>, String> {
        let jsz = http::get(self.monitor.port(), "/jsz?acc=APP&streams=true").await?.json()?;
        let accounts = jsz["account_details"].as_array().into_iter().flatten();
        let mut streams = accounts.filter_map(|account| account["stream_detail"].as_array()).flatten();
        let detail = streams.find(|detail| detail["name"] == stream);
        let leader =
            |detail: &Value| detail.pointer("/cluster/leader").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(detail.map(leader))
    }

    /// Its server name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where clients connect to this node alone.
    pub fn client_url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.client.port())
    }

    /// Its client port.
    pub fn client_port(&self) -> u16 {
        self.client.port()
    }

    /// SIGKILL; returns when it is gone. Errs when it was not running.
    pub async fn kill9(&self) -> Result<()> {
        self.server.kill9().await
    }

    /// Ends it in an orderly way (without lame-duck mode).
    pub async fn stop(&self) -> Result<Exit> {
        self.server.stop_with(Signal::INT, STOP_PATIENCE).await
    }

    /// SIGSTOP; returns when it stands.
    pub async fn pause(&self) -> Result<()> {
        self.server.pause().await
    }

    /// SIGCONT.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    /// Whether its process runs.
    pub fn is_alive(&self) -> bool {
        self.server.is_alive()
    }

    /// Its process id; an error when it does not run.
    pub fn pid(&self) -> Result<i32> {
        self.server.pid()
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        self.server.log_tail(lines)
    }

    /// The process behind it.
    pub fn server(&self) -> &Server {
        &self.server
    }
}
