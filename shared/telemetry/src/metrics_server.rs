//! `GET /metrics` for Prometheus and `GET /healthz` for probes: HTTP/1.1, one request per connection, nothing else.
//!
//! The listener of the exporter crate neither says which port it got nor answers probes, and this much HTTP is small.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::{Error, Result, process};

const REQUEST_BYTES_MAX: usize = 8 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTIONS_MAX: usize = 32;
/// How often old samples of histograms are let go.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// From the time of one append to that of a stalled sink.
const SECONDS_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];

/// Takes the port, before anything else is set up.
pub(crate) async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await.map_err(|cause| Error::MetricsPort { address, cause })?;
    let bound = listener.local_addr().map_err(|cause| Error::MetricsPort { address, cause })?;
    Ok((listener, bound))
}

/// Installs the recorder and serves it.
pub(crate) fn start(listener: TcpListener) -> Result<AbortOnDropHandle<()>> {
    let builder =
        PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS);
    let handle =
        builder.and_then(PrometheusBuilder::install_recorder).map_err(|error| Error::Twice(error.to_string()))?;
    process::describe();
    Ok(AbortOnDropHandle::new(tokio::spawn(serve(listener, handle))))
}

async fn serve(listener: TcpListener, handle: PrometheusHandle) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut upkeep = tokio::time::interval(UPKEEP_EVERY);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = upkeep.tick() => {
                handle.run_upkeep();
                continue;
            }
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, most likely: not a reason to spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let handle = handle.clone();
        tokio::spawn(async move {
            // Neither a slow nor a broken client is worth a log line.
            let _ended = tokio::time::timeout(REQUEST_TIMEOUT, answer(stream, &handle)).await;
            drop(place);
        });
    }
}

async fn answer(mut stream: TcpStream, handle: &PrometheusHandle) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(1024);
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        (b"GET", b"/metrics") => {
            process::record().await;
            ("200 OK", handle.render())
        }
        (b"GET", b"/healthz") => ("200 OK", "ok\n".to_owned()),
        (b"GET", _) => ("404 Not Found", "GET /metrics or /healthz\n".to_owned()),
        _ => ("405 Method Not Allowed", "GET /metrics or /healthz\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}
