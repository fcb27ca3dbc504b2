//! The test kit: real servers as values, databases and names of one's own, polling with deadlines.
//!
//! A test binary shares one server of each kind, started when the first test asks for it, and each test works in a scope of its own:
//! [`Database`], [`NatsScope`], [`EtcdScope`]. A test that injects faults starts its own servers, for instance
//! `Postgres::start(PostgresOptions::default())`. When a test fails, the last log lines of the servers it used are printed.
//!
//! The shared servers end with the test binary, in whatever way that ends (`wallaby-stack` sees to it).
//!
//! ```no_run
//! # async fn example() {
//! use wallaby_testkit::{Database, NatsScope, eventually};
//! use std::time::Duration;
//!
//! let database = Database::create("orders").await;
//! database.client().batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
//! let nats = NatsScope::three_nodes("orders").await;
//! let stream = format!("{}_LOG", nats.prefix());
//! eventually(Duration::from_secs(10), "the stream exists", async || nats.jetstream().get_stream(&stream).await).await;
//! # }
//! ```
//!
//! Panics are this crate's errors: a test without its servers has nothing to return to.

mod collector;
mod database;
mod eventually;
mod scope;
mod seed;
mod shared;
mod wire;

pub use collector::{Collector, ExportedSpan};
pub use database::Database;
pub use eventually::eventually;
pub use scope::{EtcdScope, NatsScope};
pub use seed::{Seeded, seed};
pub use shared::{etcd, nats, nats3, postgres, server_logs};
pub use wallaby_stack::{
    EtcdCluster, EtcdMember, EtcdOptions, Folder, NatsCluster, NatsNode, NatsOptions, PortLease, Postgres,
    PostgresOptions, Process, ProcessSpec, Server, Shutdown, SyncInterval, TlsIdentity, Toolbox,
};
pub use wire::{Held, Wire};

/// A name that no other test uses: `<hint>_<12 hex digits>`, in letters, digits and `_`, at most 50 bytes: fit for a database, a slot, a
/// stream, a subject token and a key.
pub fn unique(hint: &str) -> String {
    let fit = hint.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' });
    let fit: String = fit.take(36).collect();
    format!("{fit}_{:012x}", rand::random::<u64>() >> 16)
}

/// Whether we are root: network namespaces, loop devices and clocks take it.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Ends a test early, with a line that counts as skipped, when it does not run as root.
///
/// `requires_root!("mounts a loop device");`
#[macro_export]
macro_rules! requires_root {
    ($why:expr) => {
        if !$crate::is_root() {
            $crate::skipped!("needs root: {}", $why);
            return;
        }
    };
}

/// Prints the line that makes `make test` count this test as skipped. Return after it.
#[macro_export]
macro_rules! skipped {
    ($($why:tt)*) => {
        eprintln!("skipped: {}", format_args!($($why)*))
    };
}

/// Prints our own log lines with the test's output. The filter is `RUST_LOG`, by default `warn`. Once for each test binary is enough.
pub fn log_to_test_output() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    // Another test may have installed it already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}
