//! Bad input: what is wrong is said where a person looks, with what to do about it.

use wallaby_testkit::{PostgresOptions, Shutdown, eventually};
use wallaby_tests::flow::FlowFile;
use wallaby_tests::program::Program;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

/// A system of one controller and one worker over one log server.
pub(crate) fn small() -> Plan {
    let nats = wallaby_testkit::NatsOptions::default();
    let flow = FlowFile { replicas: 1, ..FlowFile::default() };
    Plan { workers: vec![""], nats, flow, ..Plan::default() }
}

/// Waits until `wallaby describe shop` says all `parts`.
pub(crate) async fn describes(system: &System, what: &str, parts: &[&str]) {
    let said = eventually(PATIENCE, &format!("{what}: describe says {parts:?}"), async || {
        let said = system.cli(&["describe", "shop"]).await;
        if parts.iter().all(|part| said.text.contains(part)) { Ok(said) } else { Err(said.text) }
    })
    .await;
    let line = said.text.lines().find(|line| line.contains(parts[0])).unwrap_or_default();
    println!("{what}: {}", line.trim());
}

pub(crate) async fn applied(system: &System, flow: &FlowFile) {
    let said = system.apply(flow).await;
    assert_eq!(said.code, 0, "{}", said.text);
}

/// A source whose password is wrong, whose role lacks rights, whose tables are not there: each is mended, and the flow goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_does_not_fit_is_described_and_goes_on_once_it_is_mended() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    let admin = system.source().await;
    admin.batch_execute("CREATE ROLE clerk LOGIN PASSWORD 'right'").await.unwrap();
    let port = system.postgres.port();
    let clerk = |password: &str| format!("{{ value: \"postgres://clerk:{password}@127.0.0.1:{port}/shop\" }}");
    let base = || FlowFile { replicas: 1, ..FlowFile::default() };

    applied(&system, &FlowFile { source: clerk("wrong-secret"), ..base() }).await;
    describes(&system, "wrong password", &["AuthenticationFailed", "password authentication failed", "dsn"]).await;
    let said = system.cli(&["get", "flows", "shop", "-o", "yaml"]).await;
    assert!(!said.text.contains("wrong-secret"), "a secret is printed: {}", said.text);

    applied(&system, &FlowFile { source: clerk("right"), ..base() }).await;
    describes(&system, "missing privilege", &["PrivilegeMissing", "permission denied", "wallaby doctor"]).await;
    let dsn = format!("postgres://clerk:right@127.0.0.1:{port}/shop");
    let said = system.cli(&["doctor", "--dsn", &dsn]).await;
    assert_eq!(said.code, 3, "{}", said.text);
    assert!(said.text.contains("GRANT") || said.text.contains("ALTER ROLE"), "{}", said.text);

    applied(&system, &FlowFile { tables: "[public.orders, public.nowhere]".to_owned(), ..base() }).await;
    describes(&system, "unknown table", &["TableMissing", "public.nowhere", "publication.tables"]).await;

    admin.batch_execute("CREATE TABLE bare (a int)").await.unwrap();
    applied(&system, &base()).await;
    describes(&system, "table without key", &["TableWithoutKey", "public.bare", "REPLICA IDENTITY FULL"]).await;

    admin.batch_execute("ALTER TABLE bare REPLICA IDENTITY FULL").await.unwrap();
    system.captures().await;
    system.row_passes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wal_level_that_is_too_low_is_described_and_the_flow_starts_once_it_is_raised() {
    let _alone = alone().await;
    let postgres = PostgresOptions::default().setting("wal_level", "replica");
    let mut system = System::start(Plan { postgres, ..small() }).await;
    applied(&system, &FlowFile { replicas: 1, ..FlowFile::default() }).await;
    describes(&system, "wal_level too low", &["wal_level", "logical"]).await;
    system.source().await.batch_execute("ALTER SYSTEM SET wal_level = 'logical'").await.unwrap();
    system.postgres.restart(Shutdown::Fast).await.unwrap();
    system.captures().await;
    system.row_passes().await;
}

/// What a person mistypes, starts twice, or forgets to start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_at_the_command_line_say_what_to_do() {
    let _alone = alone().await;
    let system = System::start(small()).await;
    let mut flow = FlowFile { replicas: 1, ..FlowFile::default() };
    flow.source_lines = vec!["publicaton: {}".to_owned()];
    let said = system.apply(&flow).await;
    assert_eq!(said.code, 2, "{}", said.text);
    assert!(said.text.contains("publicaton") && said.text.contains("publication"), "{}", said.text);

    // A port that is taken, twice: the controller's API, a worker's metrics. Nobody waited for these two so far (a mistyped file
    // reaches no controller), and whoever comes second to a port is the one that ends.
    eventually(PATIENCE, "the controller and the worker listen", async || {
        let said = system.cli(&["get", "flows"]).await;
        if said.code != 0 {
            return Err(said.text);
        }
        system.workers[0].metrics().await.map(drop)
    })
    .await;
    let folder = wallaby_testkit::Folder::temporary("second").unwrap();
    let (_, api) = &system.controllers[0];
    let listen = format!("127.0.0.1:{}", api.port());
    let environment = [
        ("WALLABY_ETCD".to_owned(), system.etcd.endpoints().join(",")),
        ("WALLABY_NATS".to_owned(), system.nats.client_url()),
    ];
    let second = Program::spawn(
        "second",
        "wallaby-controller",
        folder.path(),
        &["--listen".to_owned(), listen.clone()],
        &environment,
    );
    let exit = tokio::time::timeout(PATIENCE, second.process().wait()).await.unwrap();
    let said = second.process().log_tail(20).to_string();
    assert_ne!(exit.code, Some(0));
    assert!(said.contains(&listen) && said.contains("--listen"), "{said}");
    let taken = system.workers[0].metrics_address();
    let metrics = ["--metrics".to_owned(), taken.clone()];
    let second = Program::spawn("second-worker", "wallaby-worker", folder.path(), &metrics, &environment);
    let exit = tokio::time::timeout(PATIENCE, second.process().wait()).await.unwrap();
    let said = second.process().log_tail(20).to_string();
    assert_eq!(exit.code, Some(1), "{said}");
    let (_, port) = taken.rsplit_once(':').unwrap();
    for part in ["metrics", &taken, &format!("sport = :{port}"), "--metrics"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }

    // Nobody is there: etcd and NATS for a worker, the controller for the command line.
    let nowhere = [
        ("WALLABY_ETCD".to_owned(), "http://127.0.0.1:9".to_owned()),
        ("WALLABY_NATS".to_owned(), "nats://127.0.0.1:9".to_owned()),
    ];
    let lost = Program::spawn("lost", "wallaby-worker", folder.path(), &[], &nowhere);
    eventually(PATIENCE, "the worker says that etcd is not there", async || {
        let said = lost.process().log_tail(30).to_string();
        if said.contains("waiting for etcd") && said.contains("127.0.0.1:9") { Ok(()) } else { Err(said) }
    })
    .await;
    let said = system.cli(&["--server", "127.0.0.1:9", "get", "flows"]).await;
    assert_eq!(said.code, 4, "{}", said.text);
    assert!(said.text.contains("127.0.0.1:9"), "{}", said.text);
}

/// The log's servers are not there when the flow starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_without_servers_is_described_and_starts_when_they_come() {
    let _alone = alone().await;
    let mut system = System::start(small()).await;
    system.apply_flow().await;
    system.row_passes().await;
    system.nats.kill9_all().await.unwrap();
    describes(&system, "NATS down", &["LogWaits", "NATS"]).await;
    system.nats.start_again().await.unwrap();
    system.row_passes().await;
}
