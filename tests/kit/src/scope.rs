//! Names and connections of one's own in the shared NATS and etcd.

use std::thread;

use async_nats::jetstream;
use futures::TryStreamExt;
use wallaby_stack::{EtcdCluster, NatsCluster};

use crate::shared::{apart, etcd, nats, nats3};
use crate::unique;

/// How many log lines a failing test prints.
const LOG_LINES: usize = 20;

/// A prefix for streams and subjects that no other test uses, with a connection. Dropping it deletes the streams whose names start with
/// the prefix.
#[derive(Debug)]
pub struct NatsScope<'n> {
    cluster: &'n NatsCluster,
    prefix: String,
    client: async_nats::Client,
}

impl NatsScope<'static> {
    /// A prefix on the shared single node.
    pub async fn one_node(hint: &str) -> Self {
        Self::create_on(nats(), hint).await
    }

    /// A prefix on the three shared nodes.
    pub async fn three_nodes(hint: &str) -> Self {
        Self::create_on(nats3(), hint).await
    }
}

impl<'n> NatsScope<'n> {
    /// A prefix on a cluster of one's own.
    pub async fn create_on(cluster: &'n NatsCluster, hint: &str) -> Self {
        let client = connect(cluster).await.unwrap_or_else(|error| panic!("no connection to NATS: {error}"));
        Self { cluster, prefix: unique(hint), client }
    }

    /// The prefix: letters, digits and `_`, so it is fit for a stream's name and for a token of a subject.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The connection that came with it, to any node.
    pub fn client(&self) -> &async_nats::Client {
        &self.client
    }

    /// JetStream on that connection.
    pub fn jetstream(&self) -> jetstream::Context {
        jetstream::new(self.client.clone())
    }

    /// The addresses of all nodes, separated by commas.
    pub fn url(&self) -> String {
        self.cluster.client_url()
    }

    /// The cluster.
    pub fn cluster(&self) -> &'n NatsCluster {
        self.cluster
    }
}

async fn connect(cluster: &NatsCluster) -> Result<async_nats::Client, async_nats::ConnectError> {
    let addresses: Vec<String> = cluster.client_url().split(',').map(str::to_owned).collect();
    async_nats::connect(addresses).await
}

impl Drop for NatsScope<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("nats{}", self.cluster.log_tail(LOG_LINES));
            return;
        }
        if self.cluster.nodes().iter().all(|node| node.is_alive()) {
            apart(|| async {
                if let Err(error) = delete_streams(self.cluster, &self.prefix).await {
                    eprintln!("the streams {}* were not deleted: {error}", self.prefix);
                }
                Ok::<_, String>(())
            });
        }
    }
}

async fn delete_streams(cluster: &NatsCluster, prefix: &str) -> Result<(), async_nats::Error> {
    let context = jetstream::new(connect(cluster).await?);
    let names: Vec<String> = context.stream_names().try_collect().await?;
    for name in names.iter().filter(|name| name.to_ascii_lowercase().starts_with(prefix)) {
        context.delete_stream(name).await?;
    }
    Ok(())
}

/// A prefix for keys that no other test uses, with a connection. Its keys go with the server.
pub struct EtcdScope<'e> {
    cluster: &'e EtcdCluster,
    prefix: String,
    client: etcd_client::Client,
}

impl EtcdScope<'static> {
    /// A prefix on the shared member.
    pub async fn create(hint: &str) -> Self {
        Self::create_on(etcd(), hint).await
    }
}

impl<'e> EtcdScope<'e> {
    /// A prefix on a cluster of one's own.
    pub async fn create_on(cluster: &'e EtcdCluster, hint: &str) -> Self {
        let client = etcd_client::Client::connect(cluster.endpoints(), None).await;
        let client = client.unwrap_or_else(|error| panic!("no connection to etcd: {error}"));
        Self { cluster, prefix: format!("/{}/", unique(hint)), client }
    }

    /// The prefix, `/<hint>_<hex>/`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A handle on the connection that came with it.
    pub fn client(&self) -> etcd_client::Client {
        self.client.clone()
    }

    /// The client addresses of all members.
    pub fn endpoints(&self) -> Vec<String> {
        self.cluster.endpoints()
    }

    /// The cluster.
    pub fn cluster(&self) -> &'e EtcdCluster {
        self.cluster
    }
}

impl Drop for EtcdScope<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("etcd{}", self.cluster.log_tail(LOG_LINES));
        }
    }
}
