//! etcd: one member, or three.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::error::LogTail;
use crate::process::{Exit, ProcessSpec};
use crate::server::Probe;
use crate::{Error, Folder, PortLease, Result, Server, Toolbox, http, nonce};

/// How long a member may take to be ready.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long an orderly stop may take before the member is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How many sets of ports are tried.
const PORT_TRIES: usize = 3;

/// How a cluster is set up. `EtcdOptions { members: 3, ..Default::default() }`.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// 1 or 3.
    pub members: usize,
    /// Skips flushes to disk. Only for tests that never cut the power.
    pub unsafe_no_fsync: bool,
    /// A folder to keep the data in; a cluster that is there is served again (its ports are remembered). Without one it is temporary.
    pub folder: Option<PathBuf>,
    /// Where each member keeps its data, instead of in the folder: for disks that fail.
    pub data_folders: Vec<PathBuf>,
    /// Where the first member listens for clients on 127.0.0.1; without one, a free port.
    pub client_port: Option<u16>,
    /// More flags for each member.
    pub extra_args: Vec<String>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            members: 1,
            unsafe_no_fsync: false,
            folder: None,
            data_folders: Vec::new(),
            client_port: None,
            extra_args: Vec::new(),
        }
    }
}

/// A running etcd cluster, without authentication.
///
/// Dropping it kills all members. The data goes too, unless the options named a folder.
#[derive(Debug)]
pub struct EtcdCluster {
    // In this order: the processes must be gone before their folder is removed.
    members: Vec<EtcdMember>,
    folder: Folder,
}

/// One member of an etcd cluster.
#[derive(Debug)]
pub struct EtcdMember {
    server: Server,
    name: String,
    client: PortLease,
    peer: PortLease,
}

impl EtcdCluster {
    /// Starts all members and hands the cluster out when it is healthy and its member list is ours.
    pub async fn start(options: EtcdOptions) -> Result<Self> {
        let binary = Toolbox::find()?.etcd()?;
        if !matches!(options.members, 1 | 3) {
            return Err(Error::State {
                server: "etcd".into(),
                what: format!("a cluster has 1 or 3 members, not {}", options.members),
            });
        }
        let mut folder = Folder::open(options.folder.as_deref(), "etcd")?;
        let mut tries = 1;
        loop {
            // A member's name is written into the data: a kept cluster keeps the names of its first start.
            let name_file = folder.path().join("identity");
            let kept = std::fs::read_to_string(&name_file).ok().filter(|_| options.folder.is_some());
            let identity = kept.unwrap_or_else(|| nonce("etcd"));
            std::fs::write(&name_file, &identity).map_err(Error::at("writing", &name_file))?;
            let members = EtcdMember::configure(&options, &folder, &binary, &identity)?;
            let cluster = Self { members, folder };
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
        self.members.iter().try_for_each(|member| member.server.launch())?;
        for member in &self.members {
            self.member_ready(member).await?;
        }
        Ok(())
    }

    async fn member_ready(&self, member: &EtcdMember) -> Result<()> {
        member
            .server
            .ready(START_PATIENCE, &[member.client.port(), member.peer.port()], || member.probe(self.members.len()))
            .await
    }

    /// The client addresses of all members: `http://127.0.0.1:<port>`.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.endpoint()).collect()
    }

    /// All members.
    pub fn members(&self) -> &[EtcdMember] {
        &self.members
    }

    /// A member by its index; an error when there is none.
    pub fn member(&self, index: usize) -> Result<&EtcdMember> {
        let missing = || Error::State {
            server: "etcd".into(),
            what: format!("there is no member {index}, only {}", self.members.len()),
        };
        self.members.get(index).ok_or_else(missing)
    }

    /// Starts a member again that was stopped or killed: same ports, same data.
    pub async fn start_member(&self, index: usize) -> Result<()> {
        let member = self.member(index)?;
        member.server.launch()?;
        self.member_ready(member).await
    }

    /// Kills all members at once.
    pub async fn kill9_all(&self) -> Result<()> {
        futures::future::try_join_all(self.members.iter().map(|member| member.server.kill9())).await.map(|_| ())
    }

    /// Starts all members again after `kill9_all`.
    pub async fn start_again(&self) -> Result<()> {
        self.start_all().await
    }

    /// Where the data and the logs are.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The last lines of each member's log.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        let named = |member: &EtcdMember| {
            member.log_tail(lines).0.into_iter().map(|line| format!("{}: {line}", member.name)).collect::<Vec<_>>()
        };
        LogTail(self.members.iter().flat_map(named).collect())
    }
}

impl EtcdMember {
    /// Chooses ports and command lines of all members.
    fn configure(
        options: &EtcdOptions,
        folder: &Folder,
        binary: &std::path::Path,
        identity: &str,
    ) -> Result<Vec<Self>> {
        let mut ports = Vec::new();
        for index in 0..options.members {
            let fixed = options.client_port.filter(|_| index == 0).map(PortLease::fixed);
            // Peer addresses are in the data of a kept cluster with several members: those keep their ports in a file.
            ports.push((fixed.map_or_else(PortLease::free, Ok)?, peer_port(options, folder, index)?));
        }
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let name = |index: usize| format!("{identity}-e{index}");
        let initial: Vec<_> = ports
            .iter()
            .enumerate()
            .map(|(index, (_, peer))| format!("{}={}", name(index), url(peer.port())))
            .collect();
        let initial = initial.join(",");
        let mut members = Vec::new();
        for (index, (client, peer)) in ports.into_iter().enumerate() {
            let data =
                options.data_folders.get(index).cloned().unwrap_or_else(|| folder.path().join(format!("data{index}")));
            let (client_url, peer_url) = (url(client.port()), url(peer.port()));
            let flags = [
                ("--name", name(index)),
                ("--data-dir", data.display().to_string()),
                ("--listen-client-urls", client_url.clone()),
                ("--advertise-client-urls", client_url),
                ("--listen-peer-urls", peer_url.clone()),
                ("--initial-advertise-peer-urls", peer_url),
                ("--initial-cluster", initial.clone()),
                ("--initial-cluster-token", identity.to_owned()),
                ("--initial-cluster-state", "new".to_owned()),
                ("--log-level", "warn".to_owned()),
            ];
            let mut spec = ProcessSpec::new(format!("etcd-e{index}"), binary, folder.path());
            spec = spec.args(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
            if options.unsafe_no_fsync {
                spec = spec.args(["--unsafe-no-fsync"]);
            }
            spec = spec.args(options.extra_args.iter().cloned());
            members.push(Self { server: Server::new(spec), name: name(index), client, peer });
        }
        Ok(members)
    }

    /// Whether the member is healthy and knows itself and as many peers as there are.
    async fn probe(&self, members: usize) -> Result<(), Probe> {
        let health = http::get(self.client.port(), "/health").await?;
        if health.status != 200 {
            return Err(Probe::NotYet(health.body));
        }
        let list = http::post(self.client.port(), "/v3/cluster/member/list", "{}").await?.json()?;
        let list = list["members"].as_array().cloned().unwrap_or_default();
        let names: Vec<_> = list.iter().filter_map(|member| member["name"].as_str()).collect();
        if names.contains(&self.name.as_str()) {
            let is_whole = names.len() == members;
            return is_whole.then_some(()).ok_or_else(|| Probe::NotYet(format!("members known so far: {names:?}")));
        }
        if list.iter().any(|member| member["name"] == Value::Null) {
            return Err(Probe::NotYet(format!("members known so far: {names:?}")));
        }
        let address = self.endpoint();
        Err(Probe::Never(Error::Impostor { address, expected: self.name.clone(), found: format!("{names:?}") }))
    }

    /// Its name in the member list.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its client address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client.port())
    }

    /// SIGKILL; returns when it is gone. Errs when it was not running.
    pub async fn kill9(&self) -> Result<()> {
        self.server.kill9().await
    }

    /// Ends it in an orderly way.
    pub async fn stop(&self) -> Result<Exit> {
        self.server.stop_with(Signal::TERM, STOP_PATIENCE).await
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

/// A member's peer port: free, or the one of the first start of a kept cluster.
fn peer_port(options: &EtcdOptions, folder: &Folder, index: usize) -> Result<PortLease> {
    if options.folder.is_none() {
        return PortLease::free();
    }
    let file = folder.path().join(format!("peer-port{index}"));
    let has_data = folder.path().join(format!("data{index}")).exists();
    let known = std::fs::read_to_string(&file).ok().and_then(|port| port.trim().parse().ok());
    if let Some(port) = known.filter(|_| has_data) {
        return Ok(PortLease::fixed(port));
    }
    let port = PortLease::free()?;
    std::fs::write(&file, port.port().to_string()).map_err(Error::at("writing", &file))?;
    Ok(port)
}
