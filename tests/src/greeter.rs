//! Stands in front of a NATS server and claims another version for it: a server that is too old, without having one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

/// The running proxy; ends when dropped.
#[derive(Debug)]
pub struct Greeter {
    port: u16,
    lies: Arc<AtomicBool>,
    _task: AbortOnDropHandle<()>,
}

impl Greeter {
    /// Starts it in front of the server at `url`, which it says has `version`.
    pub async fn start(url: String, version: &'static str) -> Greeter {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let lies = Arc::new(AtomicBool::new(true));
        let address = url.split(',').next().unwrap().trim_start_matches("nats://").to_owned();
        let claims = Arc::clone(&lies);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let claim = claims.load(Ordering::SeqCst).then_some(version);
                let address = address.clone();
                tokio::spawn(async move {
                    // A connection that fails is the client's to try again.
                    let _ = pass(client, &address, claim).await;
                });
            }
        });
        Greeter { port, lies, _task: AbortOnDropHandle::new(task) }
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The server was upgraded: who connects from here on is told its true version.
    pub fn upgrade(&self) {
        self.lies.store(false, Ordering::SeqCst);
    }
}

async fn pass(mut client: TcpStream, address: &str, claim: Option<&str>) -> std::io::Result<()> {
    let mut server = BufReader::new(TcpStream::connect(address).await?);
    let mut greeting = String::new();
    server.read_line(&mut greeting).await?;
    if let (Some(version), Some(begin)) = (claim, greeting.find("\"version\":\"")) {
        let begin = begin + "\"version\":\"".len();
        let end = begin + greeting[begin..].find('"').unwrap_or(0);
        greeting.replace_range(begin..end, version);
    }
    client.write_all(greeting.as_bytes()).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
