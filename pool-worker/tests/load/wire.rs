//! A wire to a server that a test can hold in one direction: what was sent arrives and nobody hears of it, or it is on its way and
//! arrives late.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// What does not pass for now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    #[default]
    Nothing,
    /// What the client sends.
    Requests,
    /// What the server answers.
    Answers,
}

/// See the module. Its connections are cut when it is dropped.
pub struct Wire {
    address: SocketAddr,
    held: watch::Sender<Held>,
    /// Bytes that do not pass for now.
    waiting: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Wire {
    /// To a server at `scheme://host:port`.
    pub async fn to(url: &str) -> Wire {
        let server = url.rsplit_once("://").unwrap().1.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (held, waiting) = (watch::Sender::new(Held::Nothing), Arc::new(AtomicUsize::new(0)));
        let (hold, counted) = (held.clone(), Arc::clone(&waiting));
        let task = tokio::spawn(async move {
            let mut pumps = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                for (from, to, direction) in
                    [(from_client, to_server, Held::Requests), (from_server, to_client, Held::Answers)]
                {
                    pumps.spawn(pump(from, to, hold.subscribe(), direction, Arc::clone(&counted)));
                }
            }
        });
        Wire { address, held, waiting, _task: AbortOnDropHandle::new(task) }
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

/// Passes bytes on, and keeps them while they are held.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut held: watch::Receiver<Held>,
    direction: Held,
    waiting: Arc<AtomicUsize>,
) {
    let (mut buffer, mut kept) = (vec![0; 64 << 10], Vec::new());
    loop {
        let is_held = *held.borrow_and_update() == direction;
        if !is_held && !kept.is_empty() {
            waiting.fetch_sub(kept.len(), Ordering::Relaxed);
            if to.write_all(&std::mem::take(&mut kept)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = held.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    kept.extend_from_slice(&buffer[..read]);
                    waiting.fetch_add(read, Ordering::Relaxed);
                }
            }
        }
    }
}
