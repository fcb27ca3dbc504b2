//! A wire to a server that a test can hold in one direction: what was sent arrives and nobody hears of it, or it is on its way and
//! arrives late. Or one on which every question takes its time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What does not pass for now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// Everything passes.
    #[default]
    Nothing,
    /// What the client sends.
    Requests,
    /// What the server answers.
    Answers,
}

/// A wire to a server. Its connections are cut when it is dropped.
#[derive(Debug)]
pub struct Wire {
    address: SocketAddr,
    held: watch::Sender<Held>,
    /// Bytes that do not pass for now.
    waiting: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Wire {
    /// To a server at `scheme://host:port`.
    pub async fn to(url: &str) -> Wire {
        Wire::slow(url, Duration::ZERO).await
    }

    /// The same; what the client sends takes so long.
    pub async fn slow(url: &str, takes: Duration) -> Wire {
        let server = url.rsplit_once("://").map_or(url, |(_, server)| server).to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port on loopback is free");
        let address = listener.local_addr().expect("a listener has an address");
        let (held, waiting) = (watch::Sender::new(Held::Nothing), Arc::new(AtomicUsize::new(0)));
        let (hold, counted) = (held.clone(), Arc::clone(&waiting));
        let task = tokio::spawn(async move {
            let mut pumps = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                for (from, to, direction, takes) in [
                    (from_client, to_server, Held::Requests, takes),
                    (from_server, to_client, Held::Answers, Duration::ZERO),
                ] {
                    pumps.spawn(pump(from, to, hold.subscribe(), direction, takes, Arc::clone(&counted)));
                }
            }
        });
        Wire { address, held, waiting, task }
    }

    /// Where its clients connect.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// From now on this is held, and nothing else.
    pub fn hold(&self, held: Held) {
        self.held.send_replace(held);
    }

    /// Bytes that are on their way and do not pass.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes bytes on, and keeps them while they are held.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut held: watch::Receiver<Held>,
    direction: Held,
    takes: Duration,
    waiting: Arc<AtomicUsize>,
) {
    let (mut buffer, mut kept) = (vec![0; 64 << 10], Vec::new());
    // What was sent before its sender died arrives all the same.
    let (mut is_over, mut has_kept) = (false, false);
    loop {
        let is_held = *held.borrow_and_update() == direction;
        if !is_held && !kept.is_empty() {
            waiting.fetch_sub(kept.len(), Ordering::Relaxed);
            if to.write_all(&std::mem::take(&mut kept)).await.is_err() {
                return;
            }
        }
        if is_over && kept.is_empty() {
            if has_kept {
                // Closed with answers that nobody read, the connection would be reset, and what was just sent lost.
                std::future::pending::<()>().await;
            }
            return;
        }
        tokio::select! {
            changed = held.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer), if !is_over => match read {
                Ok(0) | Err(_) => (is_over, has_kept) = (true, !kept.is_empty()),
                Ok(read) => {
                    tokio::time::sleep(takes).await;
                    kept.extend_from_slice(&buffer[..read]);
                    waiting.fetch_add(read, Ordering::Relaxed);
                }
            }
        }
    }
}
