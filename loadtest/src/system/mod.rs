//! A whole WALlaby on this machine: the servers, the controller, the workers; and how to find out that something of it died.
//!
//! Used by the demo and by the measurements of a sink. Everything is a value that ends its processes when it is dropped.

pub mod api;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use wallaby_stack::{
    EtcdCluster, EtcdOptions, NatsCluster, NatsOptions, PortLease, Postgres, PostgresOptions, Process, ProcessSpec,
};

/// How long a dead worker's tasks stay without an owner here; 10 s by default elsewhere.
pub const LEASE_TTL: Duration = Duration::from_secs(3);
/// How many log lines are shown of what died.
const LOG_LINES: usize = 25;
/// What the demo's own processes write to their logs.
const LOG_FILTER: &str = "info";

/// The two databases' names.
pub const SOURCE_DATABASE: &str = "shop";
/// See [`SOURCE_DATABASE`].
pub const TARGET_DATABASE: &str = "warehouse";

/// Where WALlaby's programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `wallaby-controller`.
    pub controller: PathBuf,
    /// `wallaby-worker`.
    pub worker: PathBuf,
    /// `wallaby`, the command line.
    pub cli: PathBuf,
}

impl Programs {
    /// Finds them beside this program, or in `folder`.
    ///
    /// # Errors
    /// When one is missing: says how to build it.
    pub fn find(folder: Option<&Path>) -> anyhow::Result<Programs> {
        let own = std::env::current_exe().context("finding this program's folder")?;
        let beside = own.parent().map(Path::to_path_buf).unwrap_or_default();
        let folder = folder.map_or(beside, Path::to_path_buf);
        let program = |name: &str| {
            let path = folder.join(name);
            let missing = || {
                let folder = folder.display();
                format!("{name} is not in {folder}: build it first (`cargo build --workspace`, or just `make demo`)")
            };
            path.canonicalize().with_context(missing)
        };
        let (controller, worker) = (program("wallaby-controller")?, program("wallaby-worker")?);
        Ok(Programs { controller, worker, cli: program("wallaby")? })
    }
}

/// The servers. Dropping it ends them.
#[derive(Debug)]
pub struct Servers {
    /// Where the rows come from.
    pub source: Postgres,
    /// Where they go.
    pub target: Postgres,
    /// The log.
    pub nats: NatsCluster,
    /// Flows, leases, checkpoints.
    pub etcd: EtcdCluster,
}

/// How the servers are set up, beyond where they are kept.
#[derive(Debug, Clone)]
pub struct ServersOptions {
    /// For both Postgres.
    pub postgres: PostgresOptions,
    /// For NATS.
    pub nats: NatsOptions,
}

impl Servers {
    /// Starts all of them at once, in folders below `folder`, and makes the two databases.
    ///
    /// # Errors
    /// When one does not start; the error carries its log.
    pub async fn start(folder: &Path, options: &ServersOptions) -> anyhow::Result<Servers> {
        let postgres = |name: &str| {
            let options = PostgresOptions { folder: Some(folder.join(name)), ..options.postgres.clone() };
            // The path of a socket is limited to about 100 bytes, and this folder's is whatever the user's checkout is.
            Postgres::start(options.setting("unix_socket_directories", ""))
        };
        let nats = NatsOptions { folder: Some(folder.join("nats")), ..options.nats.clone() };
        let etcd = EtcdOptions { folder: Some(folder.join("etcd")), ..EtcdOptions::default() };
        let (source, target, nats, etcd) = tokio::try_join!(
            postgres("source"),
            postgres("target"),
            NatsCluster::start(nats),
            EtcdCluster::start(etcd)
        )?;
        for (server, database) in [(&source, SOURCE_DATABASE), (&target, TARGET_DATABASE)] {
            let sql = format!("CREATE DATABASE {database}");
            let made = server.connect("postgres").await?.batch_execute(&sql).await;
            made.with_context(|| format!("making the database {database}"))?;
        }
        Ok(Servers { source, target, nats, etcd })
    }

    /// The source's connection string.
    pub fn source_dsn(&self) -> String {
        self.source.dsn(SOURCE_DATABASE)
    }

    /// The target's connection string.
    pub fn target_dsn(&self) -> String {
        self.target.dsn(TARGET_DATABASE)
    }

    /// What is dead that should live, with its last words.
    fn dead(&self) -> Option<String> {
        let postgres = |name: &str, server: &Postgres| {
            let dead = !server.is_alive();
            dead.then(|| format!("the {name} Postgres ended{}", server.log_tail(LOG_LINES)))
        };
        let dead_node = || self.nats.nodes().iter().find(|node| !node.is_alive());
        postgres("source", &self.source)
            .or_else(|| postgres("target", &self.target))
            .or_else(|| dead_node().map(|node| format!("{} ended{}", node.name(), node.log_tail(LOG_LINES))))
            .or_else(|| {
                let dead = self.etcd.members().iter().any(|member| !member.is_alive());
                dead.then(|| format!("etcd ended{}", self.etcd.log_tail(LOG_LINES)))
            })
    }
}

/// One of our own processes.
#[derive(Debug)]
pub struct Program {
    /// The process.
    pub process: Process,
    /// Where its metrics are.
    pub metrics: PortLease,
}

/// The controller and the workers. Dropping it ends them.
#[derive(Debug)]
pub struct Wallaby {
    /// The controller.
    pub controller: Program,
    /// Where its API is.
    pub api: PortLease,
    /// The workers, by the names they were given.
    pub workers: Vec<(String, Program)>,
}

impl Wallaby {
    /// Starts one controller and as many workers as there are names. Does not wait until they are ready.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start(servers: &Servers, programs: &Programs, folder: &Path, names: &[&str]) -> anyhow::Result<Wallaby> {
        let api = PortLease::free()?;
        let listen = format!("127.0.0.1:{}", api.port());
        let spec = ProcessSpec::new("controller", &programs.controller, folder).args(["--listen", &listen]);
        let controller = spawn(servers, spec)?;
        let mut wallaby = Wallaby { controller, api, workers: Vec::new() };
        for name in names {
            wallaby.add_worker(servers, programs, folder, name)?;
        }
        Ok(wallaby)
    }

    /// Starts one more worker under a name that no other had. Does not wait until it is ready.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn add_worker(
        &mut self,
        servers: &Servers,
        programs: &Programs,
        folder: &Path,
        name: &str,
    ) -> anyhow::Result<()> {
        let ttl = format!("{}s", LEASE_TTL.as_secs());
        let spec = ProcessSpec::new(name, &programs.worker, folder).args(["--name", name, "--lease-ttl", &ttl]);
        self.workers.push((name.to_owned(), spawn(servers, spec)?));
        Ok(())
    }

    /// Where the API answers.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.api.port())
    }

    /// Kills a worker with SIGKILL and forgets it; it is gone when this returns.
    ///
    /// # Errors
    /// When there is no such worker, or it was dead already.
    pub async fn kill_worker(&mut self, name: &str) -> anyhow::Result<()> {
        let index = self.workers.iter().position(|(known, _)| known == name);
        let index = index.with_context(|| format!("the capture is owned by {name:?}, which is no worker of ours"))?;
        let (_, worker) = self.workers.swap_remove(index);
        anyhow::ensure!(worker.process.is_alive(), "{name} was dead already{}", worker.process.log_tail(LOG_LINES));
        worker.process.kill().await?;
        Ok(())
    }

    fn dead(&self) -> Option<String> {
        let programs = self.workers.iter().map(|(_, worker)| worker).chain([&self.controller]);
        let mut dead = programs.filter_map(|program| Some((program, program.process.exit()?)));
        dead.next().map(|(program, exit)| {
            format!("the {} ended ({exit}){}", program.process.name(), program.process.log_tail(LOG_LINES))
        })
    }

    /// The last words of everybody: for a failure that nobody in particular caused.
    pub fn last_words(&self) -> String {
        let programs = [&self.controller].into_iter().chain(self.workers.iter().map(|(_, worker)| worker));
        let words = programs.map(|program| format!("\n  {}{}", program.process.name(), program.process.log_tail(8)));
        words.collect()
    }
}

/// Starts a process of ours with the addresses of the servers in its environment.
fn spawn(servers: &Servers, mut spec: ProcessSpec) -> anyhow::Result<Program> {
    let metrics = PortLease::free()?;
    let monitoring = servers.nats.monitoring_urls().join(",");
    let env = [
        ("WALLABY_ETCD", servers.etcd.endpoints().join(",")),
        ("WALLABY_NATS", servers.nats.client_url()),
        ("WALLABY_NATS_MONITORING", monitoring),
        ("WALLABY_METRICS", format!("127.0.0.1:{}", metrics.port())),
        ("WALLABY_LOG", LOG_FILTER.to_owned()),
        ("SHOP_DSN", servers.source_dsn()),
        ("WAREHOUSE_DSN", servers.target_dsn()),
    ];
    spec.env.extend(env.into_iter().map(|(key, value)| (key.to_owned(), value)));
    Ok(Program { process: Process::spawn(&spec)?, metrics })
}

/// Fails when something died that should live.
///
/// # Errors
/// Says what ended, how, and its last log lines.
pub fn check_alive(servers: &Servers, wallaby: &Wallaby) -> anyhow::Result<()> {
    match wallaby.dead().or_else(|| servers.dead()) {
        Some(dead) => bail!("{dead}"),
        None => Ok(()),
    }
}

/// Empties a folder that is ours: the caller holds its lock.
///
/// # Errors
/// When something cannot be removed.
pub fn clear(folder: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
        if entry.file_name() == ".lock" {
            continue;
        }
        let path = entry.path();
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.with_context(|| format!("removing what an earlier run left at {}", path.display()))?;
    }
    Ok(())
}

/// Asks until the answer is yes. Fails at once when `check` does, and at the deadline with the last answer.
///
/// # Errors
/// As `check`, or at the deadline.
pub async fn until<T>(
    what: &str,
    patience: Duration,
    check: impl Fn() -> anyhow::Result<()>,
    mut ask: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        check()?;
        let last = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if Instant::now() > deadline {
            return Err(last.context(format!("waited {} s for {what}", patience.as_secs())));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
