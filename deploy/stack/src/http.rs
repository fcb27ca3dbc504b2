//! The few HTTP/1.0 requests that readiness and identity take. HTTP/1.0, because its answers come unchunked and end with the
//! connection.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A local server answers within this time or is counted as not answering.
const DEADLINE: Duration = Duration::from_secs(3);
/// The most that is read of an answer, in bytes.
const ANSWER_BYTES: u64 = 16 << 20;

/// An answer: status and body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    /// The body as JSON; an error says what came instead.
    pub(crate) fn json(&self) -> Result<Value, String> {
        serde_json::from_str(&self.body)
            .map_err(|error| format!("HTTP {}: no JSON ({error}): {}", self.status, self.body))
    }
}

/// `GET path` on a local port.
pub(crate) async fn get(port: u16, path: &str) -> Result<Answer, String> {
    ask(port, &format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")).await
}

/// `POST path` with a JSON body on a local port.
pub(crate) async fn post(port: u16, path: &str, body: &str) -> Result<Answer, String> {
    let length = body.len();
    ask(port, &format!("POST {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")).await
}

async fn ask(port: u16, request: &str) -> Result<Answer, String> {
    let exchange = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = match tokio::time::timeout(DEADLINE, exchange).await {
        Ok(answer) => answer.map_err(|error| format!("127.0.0.1:{port}: {error}"))?,
        Err(_) => return Err(format!("127.0.0.1:{port}: no answer within {DEADLINE:?}")),
    };
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("127.0.0.1:{port}: not HTTP"))?;
    let status = head.split_ascii_whitespace().nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| format!("127.0.0.1:{port}: no HTTP status"))?;
    Ok(Answer { status, body: body.to_owned() })
}
