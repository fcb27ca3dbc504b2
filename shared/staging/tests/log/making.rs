//! Making, checking and deleting the stream; messages that say what to do.

use async_nats::jetstream::stream::Config;
use wallaby_model::FlowId;
use wallaby_model::flow::Replicas;
use wallaby_staging::{Connections, Log, LogConfig, LogInfo, StagingError, SyncPolicy, SyncSource, sync_policy};
use wallaby_testkit::{
    Folder, NatsCluster, NatsOptions, NatsScope, PortLease, Process, ProcessSpec, Toolbox, eventually, unique,
};

use crate::support::{Flow, MAX_BYTES, PATIENCE, target};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_made_once_and_checked_ever_after() {
    let flow = Flow::on_three().await;
    let again = LogConfig { replicas: Replicas::Auto, max_bytes: MAX_BYTES };
    let info = flow.log.ensure(&again).await.unwrap();
    assert_eq!((info.replicas, info.max_bytes), (3, MAX_BYTES));
    // A larger one is made larger, as the flow file says.
    let larger = LogConfig { replicas: Replicas::Auto, max_bytes: 2 * MAX_BYTES };
    assert_eq!(flow.log.ensure(&larger).await.unwrap().max_bytes, 2 * MAX_BYTES);
    assert_eq!(flow.log.tail().await.unwrap().end, None);
    assert_eq!(flow.log.last_epoch().await.unwrap(), None);
    flow.log.delete().await.unwrap();
    flow.log.delete().await.unwrap();
    assert!(matches!(flow.log.info().await, Err(StagingError::Missing { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_servers_cannot_give_is_said() {
    let scope = NatsScope::one_node("making").await;
    let connections = Connections::open(&target(&scope.url())).await.unwrap();
    let log = |hint: &str| {
        let name: String = unique(hint).replace('_', "-").to_lowercase().chars().take(40).collect();
        Log::new(FlowId::new(name).unwrap(), connections.clone())
    };
    let tell = async |log: &Log, replicas, max_bytes| {
        log.ensure(&LogConfig { replicas, max_bytes }).await.unwrap_err().to_string()
    };
    let error = tell(&log("huge"), Replicas::Exactly(1), 1 << 50).await;
    assert!(error.contains("lower log.maxBytes"), "{error}");
    let error = tell(&log("copies"), Replicas::Exactly(3), MAX_BYTES).await;
    assert!(error.contains("set log.replicas lower"), "{error}");
    let error = tell(&log("tiny"), Replicas::Auto, 1 << 20).await;
    assert!(error.contains("33554432 is the least"), "{error}");
    let auto = log("auto");
    assert_eq!(auto.ensure(&LogConfig { replicas: Replicas::Auto, max_bytes: MAX_BYTES }).await.unwrap().replicas, 1);
    auto.delete().await.unwrap();
    // A stream of that name that drops old messages is no log.
    let taken = log("taken");
    let config = Config {
        name: taken.stream().to_owned(),
        subjects: vec![taken.data_subject().to_owned(), taken.fence_subject().to_owned()],
        max_messages: 10,
        ..Config::default()
    };
    scope.jetstream().create_stream(config).await.unwrap();
    let error = tell(&taken, Replicas::Auto, MAX_BYTES).await;
    assert!(error.contains("cannot serve as a log"), "{error}");
    taken.delete().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_without_its_password() {
    let error = Connections::open(&target("nats://me:secret@127.0.0.1:1")).await.unwrap_err().to_string();
    assert!(error.contains("nats://127.0.0.1:1") && !error.contains("secret"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_servers_say_how_they_sync() {
    let interval = std::time::Duration::from_secs(7);
    let options = NatsOptions {
        nodes: 3,
        sync_interval: wallaby_testkit::SyncInterval::Every(interval),
        ..NatsOptions::default()
    };
    let cluster = NatsCluster::start(options).await.unwrap();
    let flow = Flow::on_own(&cluster, MAX_BYTES).await;
    let info = flow.log.info().await.unwrap();
    let monitoring = SyncSource::Monitoring(cluster.monitoring_urls());
    let report = sync_policy(&info, &monitoring).await;
    assert_eq!(report.policy, SyncPolicy::Interval(interval), "{report:?}");
    assert_eq!(report.servers.len(), 3);
    let system = target(&cluster.system_url()).connect("system").await.unwrap();
    let report = sync_policy(&info, &SyncSource::SystemAccount(system)).await;
    assert_eq!(report.policy, SyncPolicy::Interval(interval), "{report:?}");
    // One that cannot be asked counts as two minutes.
    let two = SyncSource::Monitoring(cluster.monitoring_urls().into_iter().take(2).collect());
    assert_eq!(sync_policy(&info, &two).await.policy, SyncPolicy::Unknown);
}

/// A server that was asked on its monitoring port before its JetStream was up says nothing of JetStream's settings at `/varz` for as long as
/// it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_asked_too_early_says_how_it_syncs() {
    let folder = Folder::temporary("early").unwrap();
    let (client, monitor) = (PortLease::free().unwrap(), PortLease::free().unwrap());
    let config = folder.path().join("nats.conf");
    let with = |enabled: bool| {
        let text = format!(
            "server_name: \"early\"\nlisten: \"127.0.0.1:{}\"\nhttp: \"127.0.0.1:{}\"\n\
             jetstream {{ enabled: {enabled}, store_dir: \"{}\", sync_interval: always }}\n",
            client.port(),
            monitor.port(),
            folder.path().join("store").display()
        );
        std::fs::write(&config, text).unwrap();
    };
    with(false);
    let binary = Toolbox::find().unwrap().nats_server().unwrap();
    let spec =
        ProcessSpec::new("nats-early", binary, folder.path()).args(["-c".to_owned(), config.display().to_string()]);
    let server = Process::spawn(&spec).unwrap();
    let source = SyncSource::Monitoring(vec![format!("http://127.0.0.1:{}", monitor.port())]);
    let alone = LogInfo {
        replicas: 1,
        leader: None,
        servers: Vec::new(),
        has_quorum: true,
        messages: 0,
        bytes: 0,
        max_bytes: 0,
        first_sequence: 0,
        last_sequence: 0,
    };
    let asked = async || sync_policy(&alone, &source).await;
    eventually(PATIENCE, "it answers, without JetStream", async || {
        let report = asked().await;
        let is_there = report.servers.contains_key("early");
        if is_there && report.policy == SyncPolicy::Unknown { Ok(()) } else { Err(report) }
    })
    .await;
    with(true);
    let pid = server.pid().to_string();
    assert!(std::process::Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    eventually(PATIENCE, "it says it once JetStream is up", async || {
        let report = asked().await;
        if report.policy == SyncPolicy::Always { Ok(()) } else { Err(report) }
    })
    .await;
}
