//! A whole WALlaby: servers of its own, controllers and workers as processes, one flow.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::process::Command;
use wallaby_coordination::{Coordination, Key};
use wallaby_loadtest::{compare, shop};
use wallaby_model::condition::TaskStatus;
use wallaby_model::flow::parse;
use wallaby_model::{FlowId, SinkId, TaskId};
use wallaby_stack::{EtcdCluster, EtcdOptions, Folder, NatsCluster, NatsOptions, PortLease, Postgres, PostgresOptions};
use wallaby_staging::{Connections, Log, NatsTarget, SideStore, open_side};
use wallaby_testkit::{eventually, seed};

use crate::PATIENCE;
use crate::flow::FlowFile;
use crate::greeter::Greeter;
use crate::program::Program;
use crate::programs::program;
use crate::traffic::{LEDGER, Traffic, connect};

/// How long a dead worker's tasks stay without an owner.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
const LOG_LINES: usize = 60;
/// Not the default: every program has to be told.
const PREFIX: &str = "/wallaby-system";

/// How a system is set up.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Controllers.
    pub controllers: usize,
    /// One entry per worker: its failpoints, mostly none.
    pub workers: Vec<&'static str>,
    /// The most tasks that one worker owns.
    pub capacity: u32,
    /// The log's servers.
    pub nats: NatsOptions,
    /// The Postgres with both databases.
    pub postgres: PostgresOptions,
    /// The flow.
    pub flow: FlowFile,
    /// A version that the log's servers claim to have, to our programs.
    pub nats_claims: Option<&'static str>,
    /// Further variables in the environment of every program.
    pub variables: Vec<(&'static str, String)>,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            controllers: 1,
            workers: vec!["", ""],
            capacity: 64,
            nats: NatsOptions { nodes: 3, ..NatsOptions::default() },
            postgres: PostgresOptions::default(),
            flow: FlowFile::default(),
            nats_claims: None,
            variables: Vec::new(),
        }
    }
}

/// What a run of the command line said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Standard output, then standard error.
    pub text: String,
}

/// See the module. Dropping it ends everything; after a panic it prints the last words of everybody first.
#[derive(Debug)]
pub struct System {
    /// Source and target.
    pub postgres: Postgres,
    /// The log's servers.
    pub nats: NatsCluster,
    /// Flows, leases, checkpoints.
    pub etcd: EtcdCluster,
    /// The controllers, each with the port of its API.
    pub controllers: Vec<(Program, PortLease)>,
    /// The workers.
    pub workers: Vec<Program>,
    /// A client of our own.
    pub coordination: Coordination,
    /// Between our programs and the log's servers, when the plan makes these claim something.
    pub greeter: Option<Greeter>,
    plan: Plan,
    folder: Folder,
    started: usize,
    markers: i64,
}

impl System {
    /// Starts the servers, then our programs. No flow yet.
    pub async fn start(plan: Plan) -> System {
        let begun = Instant::now();
        let folder = Folder::temporary("system").unwrap();
        let (postgres, nats, etcd) = tokio::try_join!(
            Postgres::start(plan.postgres.clone()),
            NatsCluster::start(plan.nats.clone()),
            EtcdCluster::start(EtcdOptions::default()),
        )
        .unwrap();
        let admin = postgres.connect("postgres").await.unwrap();
        let databases = plan.flow.more_sinks.iter().map(String::as_str);
        for database in ["shop", "warehouse"].into_iter().chain(databases) {
            admin.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
        }
        let endpoints = etcd.endpoints();
        let options = wallaby_coordination::Options { prefix: PREFIX.to_owned(), ..Default::default() };
        let coordination = Coordination::connect(&endpoints, options).await.unwrap();
        let greeter = match plan.nats_claims {
            Some(version) => Some(Greeter::start(nats.client_url(), version).await),
            None => None,
        };
        let mut system = System {
            greeter,
            postgres,
            nats,
            etcd,
            controllers: Vec::new(),
            workers: Vec::new(),
            coordination,
            plan,
            folder,
            started: 0,
            markers: 0,
        };
        shop::create_schema(&system.source_dsn()).await.unwrap();
        system.source().await.batch_execute(LEDGER).await.unwrap();
        for _ in 0..system.plan.controllers {
            system.start_controller();
        }
        for failpoints in system.plan.workers.clone() {
            system.start_worker(failpoints);
        }
        println!("system: servers and programs after {:.1} s", begun.elapsed().as_secs_f64());
        system
    }

    /// Starts the system, applies its flow and starts traffic of `rows_per_second` on it.
    pub async fn start_with_traffic(plan: Plan, rows_per_second: u32) -> (System, Traffic) {
        let system = System::start(plan).await;
        system.apply_flow().await;
        let traffic = Traffic::start(system.source_dsn(), system.target_dsn(), seed(), rows_per_second).await;
        (system, traffic)
    }

    /// Connections of the test's own to the log's servers.
    pub async fn log_connections(&self) -> Connections {
        let servers = self.nats.client_url().split(',').map(str::to_owned).collect();
        let target = NatsTarget { servers, name: "the test".to_owned(), ..NatsTarget::default() };
        Connections::open(&target).await.unwrap()
    }

    /// The side store of the plan's flow.
    pub async fn side_store(&self) -> Arc<dyn SideStore> {
        let document = parse(&self.plan.flow.to_string(), "flow.yaml").unwrap();
        open_side(&self.flow(), &document.spec.log, &self.log_connections().await).unwrap()
    }

    /// Waits until the log has three copies on three servers: with fewer a fence is not put to the test.
    pub async fn log_is_on_three_servers(&self) {
        let log = Log::new(self.flow(), self.log_connections().await);
        eventually(PATIENCE, "three copies on three servers", async || {
            let info = log.info().await.map_err(|error| error.to_string())?;
            let servers: BTreeSet<&String> = info.servers.iter().collect();
            if info.replicas == 3 && servers.len() == 3 { Ok(()) } else { Err(format!("{info:?}")) }
        })
        .await;
    }

    /// The flow.
    pub fn flow(&self) -> FlowId {
        FlowId::new("shop").unwrap()
    }

    /// The capture task.
    pub fn capture(&self) -> TaskId {
        TaskId::capture(&self.flow())
    }

    /// Where the rows come from.
    pub fn source_dsn(&self) -> String {
        self.postgres.dsn("shop")
    }

    /// Where they go.
    pub fn target_dsn(&self) -> String {
        self.postgres.dsn("warehouse")
    }

    /// A connection to the source.
    pub async fn source(&self) -> tokio_postgres::Client {
        self.postgres.connect("shop").await.unwrap()
    }

    /// A connection to the target.
    pub async fn target(&self) -> tokio_postgres::Client {
        self.postgres.connect("warehouse").await.unwrap()
    }

    /// Another sink's connection string.
    pub fn dsn_of(&self, sink: &str) -> String {
        self.postgres.dsn(sink)
    }

    fn environment(&self) -> Vec<(String, String)> {
        let nats = self.greeter.as_ref().map_or_else(|| self.nats.client_url(), Greeter::url);
        let sinks = self.plan.flow.more_sinks.iter().map(|sink| (FlowFile::variable(sink), self.dsn_of(sink)));
        let ours = [
            ("WALLABY_ETCD", self.etcd.endpoints().join(",")),
            ("WALLABY_ETCD_PREFIX", PREFIX.to_owned()),
            ("WALLABY_NATS", nats),
            ("WALLABY_NATS_MONITORING", self.nats.monitoring_urls().join(",")),
            ("WALLABY_LOG", std::env::var("WALLABY_LOG").unwrap_or_else(|_| "info".to_owned())),
            ("SHOP_DSN", self.source_dsn()),
            ("WAREHOUSE_DSN", self.target_dsn()),
        ];
        let ours = ours.into_iter().chain(self.plan.variables.clone());
        ours.map(|(name, value)| (name.to_owned(), value)).chain(sinks).collect()
    }

    fn next_name(&mut self, kind: &str) -> String {
        self.started += 1;
        format!("{kind}-{}", self.started)
    }

    /// Starts one more controller.
    pub fn start_controller(&mut self) {
        let (name, api) = (self.next_name("controller"), PortLease::free().unwrap());
        let args = ["--listen", &format!("127.0.0.1:{}", api.port()), "--leader-ttl", "2s"].map(str::to_owned);
        let program = Program::spawn(&name, "wallaby-controller", self.folder.path(), &args, &self.environment());
        self.controllers.push((program, api));
    }

    /// Starts one more worker, under a name that no other had; returns the name.
    pub fn start_worker(&mut self, failpoints: &str) -> String {
        self.start_worker_with(&[("WALLABY_FAILPOINTS", failpoints)])
    }

    /// The same with further variables in its environment; empty ones are left out.
    pub fn start_worker_with(&mut self, variables: &[(&str, &str)]) -> String {
        let name = self.next_name("worker");
        let worker = self.spawn_worker(&name, &name, variables);
        self.workers.push(worker);
        name
    }

    /// The same, started by `launcher`, as [`Program::spawn_behind`] has it.
    pub fn start_worker_behind(&mut self, launcher: &[String], variables: &[(&str, &str)]) -> String {
        let name = self.next_name("worker");
        let worker = self.spawn_worker_behind(launcher, &name, &name, variables);
        self.workers.push(worker);
        name
    }

    /// Starts a worker that calls itself `name`, and is no worker of this system.
    pub fn spawn_worker(&self, program: &str, name: &str, variables: &[(&str, &str)]) -> Program {
        self.spawn_worker_behind(&[], program, name, variables)
    }

    fn spawn_worker_behind(
        &self,
        launcher: &[String],
        program: &str,
        name: &str,
        variables: &[(&str, &str)],
    ) -> Program {
        let (ttl, capacity) = (format!("{}s", LEASE_TTL.as_secs()), self.plan.capacity.to_string());
        let args = ["--name", name, "--lease-ttl", &ttl, "--capacity", &capacity].map(str::to_owned);
        let mut environment = self.environment();
        let variables = variables.iter().filter(|(_, value)| !value.is_empty());
        environment.extend(variables.map(|(variable, value)| ((*variable).to_owned(), (*value).to_owned())));
        Program::spawn_behind(launcher, program, "wallaby-worker", self.folder.path(), &args, &environment)
    }

    /// A worker by its name.
    pub fn worker(&self, name: &str) -> &Program {
        let found = self.workers.iter().find(|worker| worker.name() == name);
        found.unwrap_or_else(|| panic!("{name} is no worker of this system"))
    }

    /// Kills a worker with SIGKILL and forgets it.
    pub async fn kill_worker(&mut self, name: &str) {
        let index = self.workers.iter().position(|worker| worker.name() == name).unwrap();
        self.workers.remove(index).kill9().await;
    }

    /// Runs the command line against the first controller.
    pub async fn cli(&self, args: &[&str]) -> Said {
        let server = self.controllers.first().map_or_else(String::new, |(_, api)| format!("127.0.0.1:{}", api.port()));
        let mut command = Command::new(program("wallaby"));
        command.args(args).envs(self.environment()).env("WALLABY_SERVER", server);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("wallaby {args:?} does not end")).unwrap();
        let text = [output.stdout, output.stderr].concat();
        Said { code: output.status.code().unwrap_or(-1), text: String::from_utf8_lossy(&text).into_owned() }
    }

    /// Applies `flow` through the command line; retried until a controller answers.
    pub async fn apply(&self, flow: &FlowFile) -> Said {
        self.with_file("apply", flow).await
    }

    /// What applying `flow` would do, as the command line says it.
    pub async fn diff(&self, flow: &FlowFile) -> Said {
        self.with_file("diff", flow).await
    }

    async fn with_file(&self, verb: &str, flow: &FlowFile) -> Said {
        let path = self.folder.path().join("flow.yaml");
        std::fs::write(&path, flow.to_string()).unwrap();
        eventually(PATIENCE, "a controller answers", async || {
            let said = self.cli(&[verb, "-f", &path.display().to_string()]).await;
            if said.code == 4 { Err(said.text) } else { Ok(said) }
        })
        .await
    }

    /// The plan's flow.
    pub fn flow_file(&self) -> FlowFile {
        self.plan.flow.clone()
    }

    /// Applies the plan's flow and waits until changes are captured and the sink knows where it begins.
    pub async fn apply_flow(&self) {
        let said = self.apply(&self.plan.flow).await;
        assert_eq!(said.code, 0, "{}", said.text);
        self.captures().await;
    }

    /// Waits until changes are captured and the sink knows where it begins. What was committed before may not flow.
    pub async fn captures(&self) {
        let source = self.source().await;
        let target = self.target().await;
        eventually(PATIENCE, "the flow captures and the sink knows where it begins", async || {
            let active = "SELECT 1 FROM pg_replication_slots WHERE slot_name = $1 AND active";
            let rows = source.query(active, &[&self.flow().slot_name()]).await.map_err(|e| e.to_string())?;
            let status = async || {
                format!("{:?} {:?}", self.status(&self.capture()).await, self.status(&self.apply_task()).await)
            };
            if rows.is_empty() {
                return Err(status().await);
            }
            let known = target.query("SELECT 1 FROM wallaby.checkpoints WHERE position IS NOT NULL", &[]).await;
            match known {
                Ok(rows) if !rows.is_empty() => Ok(()),
                _ => Err(status().await),
            }
        })
        .await;
    }

    /// The apply task.
    pub fn apply_task(&self) -> TaskId {
        TaskId::apply(&self.flow(), &SinkId::new("warehouse").unwrap())
    }

    /// What a task says of itself.
    pub async fn status(&self, task: &TaskId) -> Option<TaskStatus> {
        let entry = self.coordination.get(&Key::TaskStatus(task.clone())).await.ok()??;
        entry.decode().ok()
    }

    /// Waits until a task says something that `fits`; returns it.
    pub async fn until_status(&self, task: &TaskId, what: &str, fits: impl Fn(&TaskStatus) -> bool) -> TaskStatus {
        eventually(PATIENCE, what, async || match self.status(task).await {
            Some(status) if fits(&status) => Ok(status),
            other => Err(other),
        })
        .await
    }

    /// Who holds a task's lock now.
    pub async fn owner_now(&self, task: &TaskId) -> Option<String> {
        let locks = self.coordination.locks(&self.flow()).await.ok()?;
        locks.iter().find(|lock| lock.task == *task).map(|lock| lock.holder.worker.to_string())
    }

    /// Waits until a task has an owner other than `not`.
    pub async fn owner_other_than(&self, task: &TaskId, not: &str) -> String {
        let what = format!("{task} has an owner other than {not:?}");
        eventually(PATIENCE, &what, async || match self.owner_now(task).await {
            Some(owner) if owner != not => Ok(owner),
            other => Err(other),
        })
        .await
    }

    /// Waits until a task has an owner.
    pub async fn owner(&self, task: &TaskId) -> String {
        self.owner_other_than(task, "").await
    }

    /// Commits a row at the source and waits until it is at the target; returns how long that took.
    pub async fn row_passes(&mut self) -> Duration {
        self.markers -= 1;
        let number = self.markers;
        let begun = Instant::now();
        eventually(PATIENCE, "a row is committed at the source", async || {
            let client = connect(&self.source_dsn()).await.map_err(|error| error.to_string())?;
            let there = client.query("SELECT 1 FROM ledger WHERE batch = $1", &[&number]).await;
            if there.map_err(|error| error.to_string())?.is_empty() {
                let sql = "INSERT INTO ledger VALUES ($1, $1, 1, 'marker')";
                client.execute(sql, &[&number]).await.map_err(|error| error.to_string())?;
            }
            Ok::<_, String>(())
        })
        .await;
        let mut client = None;
        eventually(PATIENCE, "a row committed at the source is at the target", async || {
            if client.is_none() {
                client = Some(connect(&self.target_dsn()).await.map_err(|error| error.to_string())?);
            }
            let found = match &client {
                Some(client) => client.query("SELECT 1 FROM ledger WHERE batch = $1", &[&number]).await,
                None => return Err("no connection".to_owned()),
            };
            match found {
                Ok(rows) if !rows.is_empty() => Ok(()),
                Ok(_) => Err(self.last_errors().await),
                Err(error) => {
                    client = None;
                    Err(format!("{error}; {}", self.last_errors().await))
                }
            }
        })
        .await;
        begun.elapsed()
    }

    /// What the tasks complain about, for messages.
    async fn last_errors(&self) -> String {
        let mut said = String::new();
        for task in [self.capture(), self.apply_task()] {
            let owner = self.owner_now(&task).await;
            if let Some(status) = self.status(&task).await {
                said.push_str(&format!(
                    "{task} at {owner:?}: {:?} {:?} {:?}; ",
                    status.phase, status.waiting_for, status.last_error
                ));
            }
        }
        said
    }

    /// Waits until rows pass again after a fault and prints how long nothing did. Asserts that rows were in flight.
    pub async fn recovers(&mut self, fault: &str, at: Instant, traffic: &Traffic) -> Duration {
        let rows = traffic.rows();
        self.row_passes().await;
        let took = at.elapsed();
        println!("{fault}: rows pass again after {:.1} s", took.as_secs_f64());
        eventually(PATIENCE, "rows are written at the source", async || {
            let now = traffic.rows();
            if now > rows { Ok(()) } else { Err(now) }
        })
        .await;
        took
    }

    /// Waits until the last row that [`System::row_passes`] sent is at another sink too.
    pub async fn is_passed_by(&self, sink: &str) {
        let client = self.postgres.connect(sink).await.unwrap();
        eventually(PATIENCE, &format!("{sink} has the last row"), async || {
            let found = client.query("SELECT 1 FROM ledger WHERE batch = $1", &[&self.markers]).await;
            match found {
                Ok(rows) if !rows.is_empty() => Ok(()),
                other => Err(format!("{other:?}; {}", self.last_errors().await)),
            }
        })
        .await;
    }

    /// Waits as [`System::is_passed_by`] does, and compares every row with the source.
    pub async fn is_equal_at(&self, sink: &str) {
        self.is_passed_by(sink).await;
        let tables: Vec<&str> = shop::TABLES.into_iter().chain(["public.ledger"]).collect();
        let comparison = compare(&self.source_dsn(), &self.dsn_of(sink), &tables).await.unwrap();
        assert!(comparison.is_equal(), "{sink}: {comparison}");
    }

    /// Waits until every row at a sink is as it is at the source, where nothing may happen meanwhile.
    pub async fn becomes_equal_at(&self, sink: &str) {
        let tables: Vec<&str> = shop::TABLES.into_iter().chain(["public.ledger"]).collect();
        eventually(PATIENCE, &format!("{sink} is equal to the source"), async || {
            match compare(&self.source_dsn(), &self.dsn_of(sink), &tables).await {
                Ok(comparison) if comparison.is_equal() => Ok(()),
                Ok(comparison) => Err(format!("{comparison}; {}", self.last_errors().await)),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
    }

    /// Ends the traffic, waits until the sink has everything, and compares: every row, and nothing doubled.
    pub async fn all_is_equal(&mut self, traffic: Traffic) {
        let written = traffic.stop().await;
        let caught_up = self.row_passes().await;
        let tables: Vec<&str> = shop::TABLES.into_iter().chain(["public.ledger"]).collect();
        let comparison = compare(&self.source_dsn(), &self.target_dsn(), &tables).await.unwrap();
        assert!(comparison.is_equal(), "{comparison}");
        let sql = "SELECT count(*), count(DISTINCT _wallaby_position), count(DISTINCT id) FROM ledger";
        let row = self.target().await.query_one(sql, &[]).await.unwrap();
        let (rows, positions, ids): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!((positions, ids), (rows, rows), "changes stand doubled in the ledger");
        assert!(written.looks > 0, "nobody looked for half transactions");
        println!(
            "equal: {} rows of the shop, {} of the ledger, {} looks, the last row after {:.1} s",
            written.shop_rows,
            written.ledger_rows,
            written.looks,
            caught_up.as_secs_f64()
        );
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for program in self.controllers.iter().map(|(program, _)| program).chain(&self.workers) {
                println!("---- {}{}", program.name(), program.process().log_tail(LOG_LINES));
            }
            println!("---- postgres{}", self.postgres.log_tail(15));
        }
    }
}
