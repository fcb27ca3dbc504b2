//! The real servers: identity, data over kills and restarts, and nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, stream};
use wallaby_stack::{
    Error, EtcdCluster, EtcdOptions, Folder, NatsCluster, NatsOptions, PortLease, Postgres, PostgresOptions, Process,
    ProcessSpec, Shutdown, SyncInterval, TlsIdentity, Toolbox,
};

fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Everything that runs below a process.
fn below(pid: i32) -> Vec<i32> {
    let children = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = children.map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let children: Vec<i32> =
        children.collect::<String>().split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect();
    children.iter().flat_map(|child| below(*child).into_iter().chain([*child])).collect()
}

async fn value(postgres: &Postgres) -> i32 {
    postgres.connect("postgres").await.unwrap().query_one("SELECT max(v) FROM t", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn postgres_keeps_identity_port_and_data() {
    // With fsync, as where power is cut: a kill must lose nothing in either case.
    let options = PostgresOptions { fsync: true, ..PostgresOptions::default() }.setting("work_mem", "5MB");
    let postgres = Postgres::start(options).await.unwrap();
    let (port, pid) = (postgres.port(), postgres.pid().unwrap());
    let client = postgres.connect("postgres").await.unwrap();
    let shown = async |name: &str| client.query_one(&format!("SHOW {name}"), &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(shown("cluster_name").await, postgres.identity());
    assert_eq!(shown("wal_level").await, "logical");
    assert_eq!(shown("work_mem").await, "5MB");
    assert_eq!(shown("fsync").await, "on");
    client.batch_execute("CREATE TABLE t (v int); INSERT INTO t VALUES (1)").await.unwrap();
    let backends = below(pid);
    postgres.kill9().await.unwrap();
    assert!(!runs(pid) && backends.iter().all(|pid| !runs(*pid)), "a kill takes the backends too");
    assert!(matches!(postgres.kill9().await, Err(Error::State { .. })), "a second kill cannot land");

    postgres.start_again().await.unwrap();
    assert_ne!(postgres.pid().unwrap(), pid);
    assert_eq!((postgres.port(), value(&postgres).await), (port, 1));
    postgres.restart(Shutdown::Fast).await.unwrap();
    assert_eq!(value(&postgres).await, 1);
    assert!(postgres.stop(Shutdown::Immediate).await.unwrap().code.is_some(), "it ended by itself");
    postgres.start_again().await.unwrap();
    assert_eq!((postgres.port(), value(&postgres).await), (port, 1));
}

#[tokio::test]
async fn a_paused_postgres_answers_when_it_goes_on() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let client = postgres.connect("postgres").await.unwrap();
    postgres.pause().await.unwrap();
    let mut answer = Box::pin(client.simple_query("SELECT 1"));
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut answer).await.is_err(), "a paused backend answered");
    postgres.resume().unwrap();
    answer.await.unwrap();
}

#[tokio::test]
async fn walsenders_are_found_without_a_connection() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    assert!(postgres.walsender_pids().unwrap().is_empty());
    let client = postgres.connect("postgres").await.unwrap();
    // A cluster that is subscribed to itself: the slot has to be made first, or the two would wait for each other.
    client.batch_execute("CREATE PUBLICATION p").await.unwrap();
    client.batch_execute("CREATE DATABASE copy").await.unwrap();
    client.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')", &[]).await.unwrap();
    let copy = postgres.connect("copy").await.unwrap();
    let publisher = postgres.dsn("postgres");
    let sql = format!("CREATE SUBSCRIPTION s CONNECTION '{publisher}' PUBLICATION p WITH (create_slot = false)");
    copy.batch_execute(&sql).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let known: Vec<i32> = loop {
        let rows = client.query("SELECT pid FROM pg_stat_replication WHERE state = 'streaming'", &[]).await.unwrap();
        if !rows.is_empty() {
            break rows.iter().map(|row| row.get(0)).collect();
        }
        assert!(Instant::now() < deadline, "no walsender");
    };
    assert_eq!(postgres.walsender_pids().unwrap(), known);
}

#[tokio::test]
async fn postgres_speaks_tls_when_it_has_a_certificate() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let tls = TlsIdentity { certificate_pem: made.cert.pem(), key_pem: made.signing_key.serialize_pem() };
    for (tls, answer) in [(Some(tls), b"S"), (None, b"N")] {
        let postgres = Postgres::start(PostgresOptions { tls, ..PostgresOptions::default() }).await.unwrap();
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", postgres.port())).unwrap();
        // SSLRequest: eight bytes, the number 80877103.
        std::io::Write::write_all(&mut stream, &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).unwrap();
        let mut said = [0];
        std::io::Read::read_exact(&mut stream, &mut said).unwrap();
        assert_eq!(&said, answer);
    }
}

#[tokio::test]
async fn a_kept_postgres_has_one_owner_and_its_data() {
    let home = Folder::temporary("kept").unwrap();
    let options = PostgresOptions { folder: Some(home.path().join("pg")), ..PostgresOptions::default() };
    let postgres = Postgres::start(options.clone()).await.unwrap();
    postgres.connect("postgres").await.unwrap().batch_execute("CREATE TABLE t AS SELECT 7 AS v").await.unwrap();
    let error = Postgres::start(options.clone()).await.unwrap_err();
    assert!(matches!(error, Error::FolderInUse { .. }), "{error}");
    drop(postgres);
    assert_eq!(value(&Postgres::start(options).await.unwrap()).await, 7);
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_holder() {
    let holder = Postgres::start(PostgresOptions::default()).await.unwrap();
    let options = PostgresOptions { port: Some(holder.port()), ..PostgresOptions::default() };
    let error = Postgres::start(options).await.unwrap_err();
    let Error::PortTaken { port, holder: named, .. } = &error else { panic!("{error}") };
    assert_eq!(*port, holder.port());
    assert!(named.contains(&holder.pid().unwrap().to_string()), "{error}");
    let options = NatsOptions { client_port: Some(holder.port()), ..NatsOptions::default() };
    let error = NatsCluster::start(options).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { .. }), "{error}");
    let options = EtcdOptions { client_port: Some(holder.port()), ..EtcdOptions::default() };
    let error = EtcdCluster::start(options).await.unwrap_err();
    assert!(matches!(error, Error::PortTaken { .. }), "{error}");
}

#[tokio::test]
async fn a_wrong_setting_is_told_with_the_log() {
    let error = Postgres::start(PostgresOptions::default().setting("wal_level", "nonsense")).await.unwrap_err();
    assert!(matches!(error, Error::Exited { .. }) && error.to_string().contains("nonsense"), "{error}");
    let options = NatsOptions { extra_config: "nonsense_option: {".to_owned(), ..NatsOptions::default() };
    let error = NatsCluster::start(options).await.unwrap_err();
    assert!(matches!(error, Error::Exited { .. }) && error.to_string().contains("Unexpected EOF"), "{error}");
}

#[test]
fn a_missing_tool_says_what_to_do() {
    let error = Toolbox::find().unwrap().postgres_bin("1.0").unwrap_err().to_string();
    assert!(error.contains("make tools") && error.contains("PostgreSQL 1.0"), "{error}");
}

async fn jetstream(cluster: &NatsCluster) -> jetstream::Context {
    let addresses: Vec<_> = cluster.client_url().split(',').map(str::to_owned).collect();
    let mut context = jetstream::new(async_nats::connect(addresses).await.unwrap());
    context.set_timeout(Duration::from_secs(1));
    context
}

#[tokio::test]
async fn three_nats_nodes_keep_a_stream_over_the_kill_of_its_leader() {
    let cluster = NatsCluster::start(NatsOptions { nodes: 3, ..NatsOptions::default() }).await.unwrap();
    let context = jetstream(&cluster).await;
    let subjects = vec!["s.>".to_owned()];
    let config = stream::Config { name: "S".to_owned(), subjects, num_replicas: 3, ..stream::Config::default() };
    // At the first try: three nodes are there when the cluster is handed out.
    context.create_stream(config).await.unwrap();
    context.publish("s.1", "one".into()).await.unwrap().await.unwrap();

    let leader = cluster.leader_of_stream("S").await.unwrap();
    cluster.node(leader).unwrap().kill9().await.unwrap();
    let other = cluster.leader_of_stream("S").await.unwrap();
    assert_ne!(leader, other);
    until_published(&context).await;
    cluster.start_node(leader).await.unwrap();
    cluster.wait_for_peers().await.unwrap();

    cluster.node(other).unwrap().pause().await.unwrap();
    assert_ne!(cluster_leader_without(&cluster, other, "S").await, other);
    cluster.node(other).unwrap().resume().unwrap();

    cluster.kill9_all().await.unwrap();
    cluster.start_again().await.unwrap();
    let context = jetstream(&cluster).await;
    let messages = stored(&context, "S").await;
    assert!(messages >= 2, "{messages} messages after all nodes were killed");
}

/// How many messages a stream holds; asked until somebody answers.
async fn stored(context: &jetstream::Context, stream: &str) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match context.get_stream(stream).await {
            Ok(stream) => return stream.cached_info().state.messages,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

/// A publish may fail while leaders change.
async fn until_published(context: &jetstream::Context) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let Err(error) = context.publish("s.2", "two".into()).await.unwrap().await else { return };
        assert!(Instant::now() < deadline, "{error}");
    }
}

async fn cluster_leader_without(cluster: &NatsCluster, without: usize, stream: &str) -> usize {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let leader = cluster.leader_of_stream(stream).await.unwrap();
        if leader != without {
            return leader;
        }
        assert!(Instant::now() < deadline, "the paused node is still called the leader");
    }
}

#[tokio::test]
async fn a_kept_nats_and_its_streams() {
    let home = Folder::temporary("kept").unwrap();
    let sync_interval = SyncInterval::Every(Duration::from_secs(10));
    let options = NatsOptions { folder: Some(home.path().join("nats")), sync_interval, ..NatsOptions::default() };
    let cluster = NatsCluster::start(options.clone()).await.unwrap();
    let context = jetstream(&cluster).await;
    let subjects = vec!["k".to_owned()];
    context
        .create_stream(stream::Config { name: "K".to_owned(), subjects, ..stream::Config::default() })
        .await
        .unwrap();
    context.publish("k", "one".into()).await.unwrap().await.unwrap();
    cluster.node(0).unwrap().stop().await.unwrap();
    cluster.start_node(0).await.unwrap();
    drop(cluster);
    let cluster = NatsCluster::start(options).await.unwrap();
    assert_eq!(stored(&jetstream(&cluster).await, "K").await, 1);
}

#[tokio::test]
async fn etcd_keeps_data_over_kills() {
    let etcd = EtcdCluster::start(EtcdOptions { members: 3, ..EtcdOptions::default() }).await.unwrap();
    let mut client = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
    client.put("key", "1", None).await.unwrap();
    etcd.member(0).unwrap().kill9().await.unwrap();
    assert!(!etcd.member(0).unwrap().is_alive());
    etcd.start_member(0).await.unwrap();
    etcd.kill9_all().await.unwrap();
    etcd.start_again().await.unwrap();
    let mut client = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
    assert_eq!(client.get("key", None).await.unwrap().kvs().first().unwrap().value(), b"1");
}

#[tokio::test]
async fn a_kept_etcd_and_its_keys() {
    let home = Folder::temporary("kept").unwrap();
    for members in [1, 3] {
        let folder = Some(home.path().join(format!("etcd{members}")));
        let options = EtcdOptions { members, folder, ..EtcdOptions::default() };
        let etcd = EtcdCluster::start(options.clone()).await.unwrap();
        etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap().put("key", "1", None).await.unwrap();
        etcd.member(0).unwrap().stop().await.unwrap();
        drop(etcd);
        let etcd = EtcdCluster::start(options).await.unwrap();
        let mut client = etcd_client::Client::connect(etcd.endpoints(), None).await.unwrap();
        assert_eq!(client.get("key", None).await.unwrap().kvs().first().unwrap().value(), b"1");
    }
}

#[tokio::test]
async fn a_dropped_server_leaves_no_process_and_no_folder() {
    let postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let nats = NatsCluster::start(NatsOptions::default()).await.unwrap();
    let pid = postgres.pid().unwrap();
    let mut pids = below(pid);
    assert!(pids.len() >= 4, "backends: {pids:?}");
    pids.extend([pid, nats.node(0).unwrap().pid().unwrap()]);
    let folders = [postgres.socket_folder().to_owned(), nats.folder().to_owned()];
    drop((postgres, nats));
    assert!(pids.iter().all(|pid| !runs(*pid)), "left: {pids:?}");
    assert!(folders.iter().all(|folder| !folder.exists()), "left: {folders:?}");
}

const OWNER: &str = env!("CARGO_BIN_EXE_wallaby-stack");

/// Starts an owner of servers, and returns what it tells of them once all of them run.
fn started(command: &mut Command) -> (Child, BTreeMap<String, String>) {
    let mut owner = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = BTreeMap::new();
    for line in BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok) {
        match line.split_once('=') {
            Some((name, list)) => told.insert(name.to_owned(), list.to_owned()),
            None => break,
        };
    }
    assert!(told.contains_key("pids"), "it ended before its servers ran: {told:?}");
    (owner, told)
}

/// Postgres refuses to run as root, so root is hidden from it; from anybody else it runs as it is, also where user namespaces are
/// not allowed.
#[tokio::test]
async fn postgres_runs_below_root_and_below_an_ordinary_user() {
    let is_root = rustix::process::geteuid().is_root();
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    for as_root in [true, false] {
        let mut command = match (as_root, is_root) {
            (true, false) => {
                // What the kit's `skipped!` prints: this crate is below the kit.
                eprintln!("skipped: only root can see how root starts Postgres");
                continue;
            }
            // Root passes for an ordinary user who may enter the same folders.
            (false, true) => {
                let mut command = Command::new("unshare");
                command.args(["-U", "--map-user=1000", "--map-group=1000", "--", OWNER]);
                command
            }
            _ => Command::new(OWNER),
        };
        let (mut owner, told) = started(&mut command);
        let postgres: u32 = told["pids"].split(',').next().unwrap().parse().unwrap();
        let is_hidden = namespace(postgres) != namespace(owner.id());
        drop(owner.stdin.take());
        assert!(owner.wait().unwrap().success());
        assert_eq!(is_hidden, as_root);
    }
}

fn impostor<T: std::fmt::Debug>(started: Result<T, Error>) -> (String, String, String) {
    match started {
        Err(Error::Impostor { address, expected, found }) => (address, expected, found),
        other => panic!("it was taken for the server that was started: {other:?}"),
    }
}

/// Ours runs and is ready, at another port than the one that it is asked at, where somebody else's answers.
#[tokio::test]
async fn another_postgres_at_the_port_is_found_out() {
    let password = Some("same".to_owned());
    let options = || PostgresOptions { password: password.clone(), ..PostgresOptions::default() };
    let (postgres, elsewhere) = (Postgres::start(options()).await.unwrap(), PortLease::free().unwrap());
    let client = postgres.connect("postgres").await.unwrap();
    client.batch_execute(&format!("ALTER SYSTEM SET port = {}", elsewhere.port())).await.unwrap();
    postgres.stop(Shutdown::Fast).await.unwrap();
    let other = Postgres::start(PostgresOptions { port: Some(postgres.port()), ..options() }).await.unwrap();
    let (address, expected, found) = impostor(postgres.start_again().await);
    assert_eq!(address, format!("127.0.0.1:{}", other.port()));
    assert_eq!((expected.as_str(), found.as_str()), (postgres.identity(), other.identity()));
    assert!(!postgres.is_alive(), "a server that is not handed out is not left running");
}

#[tokio::test]
async fn another_nats_at_the_port_is_found_out() {
    let (cluster, elsewhere) = (NatsCluster::start(NatsOptions::default()).await.unwrap(), PortLease::free().unwrap());
    let node = cluster.node(0).unwrap();
    let at = cluster.monitoring_urls()[0].strip_prefix("http://").unwrap().to_owned();
    node.stop().await.unwrap();
    let config = cluster.folder().join("n0.conf");
    let text = std::fs::read_to_string(&config).unwrap();
    let http = |port: &str| format!("http: \"{port}\"");
    let changed = text.replace(&http(&at), &http(&format!("127.0.0.1:{}", elsewhere.port())));
    assert_ne!(text, changed);
    std::fs::write(&config, changed).unwrap();
    let (folder, client) = (Folder::temporary("other").unwrap(), PortLease::free().unwrap());
    let (_, monitoring) = at.rsplit_once(':').unwrap();
    let binary = Toolbox::find().unwrap().nats_server().unwrap();
    let other = ["-n", "somebody", "-a", "127.0.0.1", "-p", &client.port().to_string(), "-m", monitoring];
    let other = ProcessSpec::new("other", binary, folder.path()).args(other.map(str::to_owned));
    let _other = Process::spawn(&other).unwrap();
    let (address, expected, found) = impostor(cluster.start_node(0).await);
    assert_eq!((address.as_str(), expected.as_str(), found.as_str()), (at.as_str(), node.name(), "\"somebody\""));
}

#[tokio::test]
async fn another_etcd_at_the_port_is_found_out() {
    let etcd = EtcdCluster::start(EtcdOptions::default()).await.unwrap();
    let member = etcd.member(0).unwrap();
    member.stop().await.unwrap();
    let port = member.endpoint().rsplit_once(':').unwrap().1.parse().unwrap();
    let options = EtcdOptions { client_port: Some(port), ..EtcdOptions::default() };
    let other = EtcdCluster::start(options).await.unwrap();
    let (address, expected, found) = impostor(etcd.start_member(0).await);
    assert_eq!((address, expected), (member.endpoint(), member.name().to_owned()));
    assert!(found.contains(other.member(0).unwrap().name()), "{found}");
}

#[tokio::test]
async fn an_owner_that_is_killed_leaves_no_process_and_no_folder() {
    for paused in [false, true] {
        let (mut owner, told) = started(Command::new(OWNER).arg("3"));
        let mut pids: Vec<i32> = told["pids"].split(',').map(|pid| pid.parse().unwrap()).collect();
        assert!(pids.iter().all(|pid| runs(*pid)), "{pids:?}");
        let leader = pids[0];
        // A backend that starts and ends by itself (autovacuum) may be gone by the time it is looked at.
        pids.extend(below(leader).into_iter().filter(|pid| runs(*pid)));
        assert!(pids.len() >= 9, "{pids:?}");
        if paused {
            let stop = |pid: i32| {
                rustix::process::kill_process(
                    rustix::process::Pid::from_raw(pid).unwrap(),
                    rustix::process::Signal::STOP,
                )
            };
            pids.iter().for_each(|pid| stop(*pid).unwrap_or(()));
        }
        owner.kill().unwrap();
        owner.wait().unwrap();
        until("all servers gone", || pids.iter().all(|pid| !runs(*pid))).await;
        until("all folders gone", || told["folders"].split(',').all(|folder| !std::path::Path::new(folder).exists()))
            .await;
    }
}
