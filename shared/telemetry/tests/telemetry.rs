//! Spans reach a real OTLP receiver, metrics a real HTTP client. One process has one telemetry, so this is one test.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use wallaby_telemetry::{
    Error, LogFormat, TelemetryOptions, begins_traces, failed, init, link, set_parent, traceparent,
};
use wallaby_testkit::{Collector, eventually};

async fn http(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_and_metrics_arrive() {
    let collector = Collector::start().await;
    let mut options = TelemetryOptions::new("wallaby-test", "1.2.3");
    options.instance = Some("worker-7".to_owned());
    options.otlp_endpoint = Some(collector.endpoint());
    options.metrics_listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    options.log_format = LogFormat::Json;

    // A taken port is named before anything is set up.
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken_address = taken.local_addr().unwrap();
    let refused = init(TelemetryOptions { metrics_listen: Some(taken_address), ..options.clone() }).await.unwrap_err();
    assert!(matches!(refused, Error::MetricsPort { .. }));
    assert!(refused.to_string().contains(&format!("port {}", taken_address.port())), "{refused}");
    let refused = init(TelemetryOptions { otlp_endpoint: Some("collector:4317".to_owned()), ..options.clone() }).await;
    assert!(matches!(refused, Err(Error::Otlp { .. })));
    let refused = init(TelemetryOptions { filter: Some("wallaby=loud".to_owned()), ..options.clone() }).await;
    assert!(matches!(refused, Err(Error::Filter { .. })));

    assert!(!begins_traces());
    let telemetry = init(options.clone()).await.unwrap();
    assert!(matches!(init(options).await, Err(Error::Twice(_))));
    assert!(begins_traces());

    // Capture writes a record, a sink in another process reads it: one trace.
    let header = {
        let writing = tracing::info_span!(target: "wallaby_test", "append", rows = 3);
        let _entered = writing.enter();
        traceparent(&writing).unwrap()
    };
    {
        let reading = tracing::info_span!(target: "wallaby_test", "apply");
        set_parent(&reading, header.to_string().parse().unwrap());
        let _entered = reading.enter();
        failed(&reading, &"the sink is away");
    }
    {
        let reading = tracing::info_span!(target: "wallaby_test", "orphan");
        if let Ok(header) = "not a traceparent".parse() {
            set_parent(&reading, header);
        }
        link(&reading, header);
        let _entered = reading.enter();
        tracing::info!(target: "wallaby_test", "said on the way");
        tracing::debug!(target: "wallaby_test", "said to nobody");
    }
    drop(tracing::info_span!(target: "h2", "somebody else's"));

    metrics::counter!("wallaby_test_things_total", "kind" => "good").increment(3);
    metrics::histogram!("wallaby_test_wait_seconds").record(0.003);
    let address = telemetry.metrics_address().unwrap();
    let page = http(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("wallaby_test_things_total{kind=\"good\"} 3"), "{page}");
    assert!(page.contains("wallaby_test_wait_seconds_bucket{le=\"0.004\"} 1"), "{page}");
    for own in ["process_resident_memory_bytes ", "process_cpu_seconds_total ", "process_open_fds ", "process_threads "]
    {
        let value = page.lines().find_map(|line| line.strip_prefix(own)).unwrap_or_else(|| panic!("no {own}in {page}"));
        assert!(value.parse::<f64>().unwrap() > 0.0, "{own}{value}");
    }
    assert!(http(address, "GET /healthz HTTP/1.1\r\n\r\n").await.ends_with("ok\n"));
    assert!(http(address, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
    assert!(http(address, "POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));

    telemetry.shutdown().await;
    let append = eventually(Duration::from_secs(10), "the span arrives", async || {
        collector.named("append").pop().ok_or("no span")
    })
    .await;
    let resource = ["service.name", "service.version", "service.instance.id"].map(|key| append.resource[key].as_str());
    assert_eq!(resource, ["wallaby-test", "1.2.3", "worker-7"]);
    assert_eq!(append.attributes["rows"], "3");
    assert_eq!(append.error, None);
    let apply = collector.named("apply").remove(0);
    assert_eq!((apply.trace, apply.parent), (append.trace, append.id));
    assert_eq!(apply.error.as_deref(), Some("the sink is away"));
    let orphan = collector.named("orphan").remove(0);
    assert_ne!(orphan.trace, append.trace);
    assert_eq!((orphan.parent, orphan.links), (0, vec![(append.trace, append.id)]));
    assert_eq!(orphan.events, ["said on the way"]);
    assert_eq!(collector.named("somebody else's").len(), 0);
}
