//! Starts, identifies, supervises and ends local servers: Postgres, NATS, etcd.
//!
//! Used by the demo, the test kit, the load test and `wallaby up`. A server is a value: it runs on ports of its own, in a folder of
//! its own, and is gone, with every process it started, when the value is dropped, when the owner panics, is interrupted, or is
//! killed with SIGKILL. Before a server is handed out it is asked for a nonce that only this start knows, so nobody ever talks to
//! another's server.
//!
//! No value is bound to a tokio runtime: a server started in one runtime can be used and ended in another.
//!
//! | module | holds |
//! |---|---|
//! | [`Toolbox`] | where the binaries are (`make tools` puts them there) |
//! | [`Server`] | one supervised process that can be killed, stopped, paused and started again |
//! | [`Postgres`], [`NatsCluster`], [`EtcdCluster`] | the servers |
//! | [`Folder`], [`PortLease`] | what they own besides processes |

mod error;
mod etcd;
mod folder;
mod http;
mod nats;
mod ports;
mod postgres;
mod process;
mod process_tree;
mod reaper;
mod server;
mod toolbox;

pub use error::{Error, LogTail};
pub use etcd::{EtcdCluster, EtcdMember, EtcdOptions};
pub use folder::{Folder, FolderLock};
pub use nats::{NatsCluster, NatsNode, NatsOptions, SyncInterval};
pub use ports::PortLease;
pub use postgres::{Postgres, PostgresOptions, Shutdown, TlsIdentity};
pub use process::{Exit, Process, ProcessSpec};
pub use server::Server;
pub use toolbox::{POSTGRES_VERSION, Toolbox};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A name that no other start of a server carries: `<hint>-<12 hex digits>`.
pub(crate) fn nonce(hint: &str) -> String {
    format!("{hint}-{:012x}", rand::random::<u64>() >> 16)
}
