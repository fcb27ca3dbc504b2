//! A wire to a server that a test can stop before one request of its client: what was asked before is answered, this request and
//! what comes after it arrive later. So another party can act between any two steps of the client.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Every question to JetStream.
pub const ANY: &str = "$JS.API.";
/// A consumer is made.
pub const CREATE: &str = "$JS.API.CONSUMER.CREATE.";
/// A consumer is asked for records.
pub const PULL: &str = "$JS.API.CONSUMER.MSG.NEXT.";

/// Where the next stop is.
#[derive(Debug, Default)]
struct Stop {
    subject: &'static str,
    /// Requests that still pass; `None`: all do.
    passing: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    stop: Mutex<Stop>,
    is_held: watch::Sender<bool>,
    /// What the pulls that were sent ask for.
    pulls: Mutex<Vec<serde_json::Value>>,
}

impl State {
    fn stop(&self) -> MutexGuard<'_, Stop> {
        self.stop.lock().unwrap()
    }

    /// Whether a request that begins here is to wait.
    fn is_next(&self) -> bool {
        match &mut self.stop().passing {
            Some(0) => true,
            Some(passing) => {
                *passing -= 1;
                false
            }
            None => false,
        }
    }
}

/// See the module. Its connections end with the test.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Gate {
    /// To a server at `nats://host:port`.
    pub async fn to(url: &str) -> Gate {
        let server = url.rsplit_once("://").unwrap().1.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let ((from_client, to_client), (mut from_server, to_server)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(pump(from_client, to_server, Arc::clone(&shared)));
                tokio::spawn(async move {
                    let mut to_client = to_client;
                    let _ended = tokio::io::copy(&mut from_server, &mut to_client).await;
                });
            }
        });
        Gate { address, state, task }
    }

    /// Where its clients connect.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// So many requests to `subject`, or below it, pass; the one after them waits.
    pub fn stop_after(&self, subject: &'static str, passing: u64) {
        *self.state.stop() = Stop { subject, passing: Some(passing) };
    }

    /// Returns once a request waits.
    pub async fn held(&self) {
        self.state.is_held.subscribe().wait_for(|is_held| *is_held).await.unwrap();
    }

    /// What the pulls that were sent so far ask for.
    pub fn pulls(&self) -> Vec<serde_json::Value> {
        self.state.pulls.lock().unwrap().clone()
    }

    /// Everything passes from now on.
    pub fn let_go(&self) {
        self.state.stop().passing = None;
        self.state.is_held.send_replace(false);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes the bodies of pulls from what was sent; one that has not come whole stays.
fn take_pulls(sent: &mut Vec<u8>) -> Vec<serde_json::Value> {
    let mut pulls = Vec::new();
    while let Some(found) = sent.windows(PULL.len()).position(|window| window == PULL.as_bytes()) {
        let pull = &sent[found..];
        let (open, close) = (pull.iter().position(|byte| *byte == b'{'), pull.iter().position(|byte| *byte == b'}'));
        let (Some(open), Some(close)) = (open, close) else { return pulls };
        pulls.push(serde_json::from_slice(&pull[open..=close]).unwrap());
        sent.drain(..=found + close);
    }
    // The beginning of a subject may be the end of what came.
    sent.drain(..sent.len().saturating_sub(PULL.len()));
    pulls
}

/// Passes bytes on, up to the request that is to wait.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: Arc<State>) {
    let (mut waiting, mut sent) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        waiting.extend_from_slice(&buffer[..read]);
        sent.extend_from_slice(&buffer[..read]);
        state.pulls.lock().unwrap().extend(take_pulls(&mut sent));
        let mut passed = 0;
        loop {
            let subject = state.stop().subject.as_bytes();
            let rest = &waiting[passed..];
            let Some(found) = rest.windows(subject.len().max(1)).position(|window| window == subject) else {
                // The beginning of a subject may be the end of what came.
                let cut = (0..subject.len()).rev().find(|length| rest.ends_with(&subject[..*length])).unwrap_or(0);
                let end = waiting.len() - cut;
                if to.write_all(&waiting[passed..end]).await.is_err() {
                    return;
                }
                waiting.drain(..end);
                break;
            };
            let is_next = state.is_next();
            let end = passed + found + if is_next { 0 } else { subject.len() };
            if to.write_all(&waiting[passed..end]).await.is_err() {
                return;
            }
            passed = end;
            if is_next {
                state.is_held.send_replace(true);
                state.is_held.subscribe().wait_for(|is_held| !is_held).await.unwrap();
            }
        }
    }
}
