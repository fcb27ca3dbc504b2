//! Starts one Postgres, NATS and etcd and prints where they are, one `name=address` a line; ends them at the end of its input or
//! at Ctrl-C. For experiments by hand and for tests of what happens when an owner of servers dies.
//!
//!     wallaby-stack [<nats nodes> [<etcd members>]]

use anyhow::Context;
use tokio::io::AsyncReadExt;
use wallaby_stack::{EtcdCluster, EtcdOptions, NatsCluster, NatsOptions, Postgres, PostgresOptions};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut count = || {
        args.next()
            .map_or(Ok(1), |text| text.parse::<usize>())
            .context("usage: wallaby-stack [<nats nodes> [<etcd members>]]")
    };
    let (nodes, members) = (count()?, count()?);
    let (postgres, nats, etcd) = tokio::try_join!(
        Postgres::start(PostgresOptions::default()),
        NatsCluster::start(NatsOptions { nodes, ..NatsOptions::default() }),
        EtcdCluster::start(EtcdOptions { members, ..EtcdOptions::default() }),
    )?;
    println!("postgres={}", postgres.dsn("postgres"));
    println!("nats={}", nats.client_url());
    println!("etcd={}", etcd.endpoints().join(","));
    let pids = [postgres.pid()?]
        .into_iter()
        .map(Ok)
        .chain(nats.nodes().iter().map(|node| node.pid()))
        .chain(etcd.members().iter().map(|member| member.pid()));
    let pids = pids.map(|pid| pid.map(|pid| pid.to_string())).collect::<Result<Vec<_>, _>>()?;
    println!("pids={}", pids.join(","));
    println!("folders={},{},{}", postgres.socket_folder().display(), nats.folder().display(), etcd.folder().display());
    println!("ready");
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 1024];
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = async { while input.read(&mut ignored).await.is_ok_and(|read| read > 0) {} } => {}
    }
    Ok(())
}
