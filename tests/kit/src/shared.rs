//! The servers that the tests of one binary share.
//!
//! Each `#[tokio::test]` has a runtime of its own that ends with the test, so shared servers are started from a thread with another
//! runtime; they are plain processes and outlive both.

use std::future::Future;
use std::sync::OnceLock;
use std::thread;

use wallaby_stack::{EtcdCluster, EtcdOptions, NatsCluster, NatsOptions, Postgres, PostgresOptions};

static POSTGRES: OnceLock<Postgres> = OnceLock::new();
static NATS: OnceLock<NatsCluster> = OnceLock::new();
static NATS3: OnceLock<NatsCluster> = OnceLock::new();
static ETCD: OnceLock<EtcdCluster> = OnceLock::new();

/// The Postgres cluster of this test binary: logical decoding, fsync off. Tests take a [`Database`](crate::Database) in it.
pub fn postgres() -> &'static Postgres {
    POSTGRES.get_or_init(|| apart(|| Postgres::start(PostgresOptions::default())))
}

/// The single NATS node of this test binary. One node hides what fencing needs: see [`nats3`].
pub fn nats() -> &'static NatsCluster {
    NATS.get_or_init(|| apart(|| NatsCluster::start(NatsOptions::default())))
}

/// The three NATS nodes of this test binary.
pub fn nats3() -> &'static NatsCluster {
    NATS3.get_or_init(|| apart(|| NatsCluster::start(NatsOptions { nodes: 3, ..NatsOptions::default() })))
}

/// The etcd member of this test binary, without fsync.
pub fn etcd() -> &'static EtcdCluster {
    ETCD.get_or_init(|| apart(|| EtcdCluster::start(EtcdOptions { unsafe_no_fsync: true, ..EtcdOptions::default() })))
}

/// The last log lines of all shared servers that were started.
pub fn server_logs(lines: usize) -> String {
    let logs = [
        ("postgres", POSTGRES.get().map(|server| server.log_tail(lines))),
        ("nats", NATS.get().map(|server| server.log_tail(lines))),
        ("nats3", NATS3.get().map(|server| server.log_tail(lines))),
        ("etcd", ETCD.get().map(|server| server.log_tail(lines))),
    ];
    let started = logs.into_iter().filter_map(|(name, log)| log.map(|log| format!("{name}{log}\n")));
    started.collect()
}

/// Runs a future to its end on a thread and a runtime of its own. Panics with its error.
pub(crate) fn apart<T, E, F, S>(start: S) -> T
where
    S: FnOnce() -> F + Send,
    F: Future<Output = Result<T, E>>,
    T: Send,
    E: std::fmt::Display,
{
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
        runtime.block_on(start()).map_err(|error| error.to_string())
    };
    let result = thread::scope(|scope| scope.spawn(run).join());
    match result {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => panic!("a test server: {error}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
