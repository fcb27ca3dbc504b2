//! A TCP proxy before etcd that can swallow answers, or cut.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    Flows,
    /// Requests arrive, answers do not: what was asked is done and nobody hears of it.
    AnswersSwallowed,
    /// Connections end, new ones are refused at once.
    Cut,
}

pub struct Proxy {
    address: SocketAddr,
    traffic: Arc<watch::Sender<Traffic>>,
    _accepting: tokio_util::task::AbortOnDropHandle<()>,
}

impl Proxy {
    /// Before the server at `endpoint`, `http://host:port`.
    pub async fn before(endpoint: &str) -> Proxy {
        let upstream: SocketAddr = endpoint.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let traffic = Arc::new(watch::channel(Traffic::Flows).0);
        let sender = traffic.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(carry(client, upstream, sender.subscribe()));
            }
        });
        Proxy { address, traffic, _accepting: tokio_util::task::AbortOnDropHandle::new(accepting) }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, traffic: Traffic) {
        self.traffic.send_replace(traffic);
    }
}

/// Until either side ends or the traffic is cut. A connection that ever had an answer swallowed stays mute: its stream of
/// frames has a hole.
async fn carry(client: TcpStream, upstream: SocketAddr, mut traffic: watch::Receiver<Traffic>) {
    if *traffic.borrow() == Traffic::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asks = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            if to_server.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let state = traffic.clone();
    let answers = async {
        let mut buffer = vec![0; 64 << 10];
        let mut is_mute = false;
        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
            is_mute |= *state.borrow() == Traffic::AnswersSwallowed;
            if !is_mute && to_client.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = asks => {}
        () = answers => {}
        _ = traffic.wait_for(|traffic| *traffic == Traffic::Cut) => {}
    }
}
