//! Spans reach a real OTLP receiver, metrics a real HTTP client. One process has one telemetry, so this is one test.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use wallaby_telemetry::{Error, LogFormat, TelemetryOptions, init, set_parent, traceparent};
use wallaby_testkit::eventually;

#[derive(Clone, Default)]
struct Receiver {
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for resource in request.into_inner().resource_spans {
            let service = format!("{:?}", resource.resource);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    async fn start() -> (Receiver, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let receiver = Receiver::default();
        let service = TraceServiceServer::new(receiver.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (receiver, address)
    }

    fn span(&self, name: &str) -> Option<(String, Span)> {
        self.spans.lock().unwrap().iter().find(|(_, span)| span.name == name).cloned()
    }
}

async fn http(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_and_metrics_arrive() {
    let (receiver, collector) = Receiver::start().await;
    let mut options = TelemetryOptions::new("wallaby-test", "1.2.3");
    options.instance = Some("worker-7".to_owned());
    options.otlp_endpoint = Some(format!("http://{collector}"));
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

    let telemetry = init(options.clone()).await.unwrap();
    assert!(matches!(init(options).await, Err(Error::Twice(_))));

    // Capture writes a record, a sink in another process reads it: one trace.
    let header = {
        let writing = tracing::info_span!(target: "wallaby_test", "append", rows = 3);
        let _entered = writing.enter();
        traceparent(&writing).unwrap()
    };
    {
        let reading = tracing::info_span!(target: "wallaby_test", "apply");
        set_parent(&reading, &header);
        let _entered = reading.enter();
    }
    {
        let reading = tracing::info_span!(target: "wallaby_test", "orphan");
        set_parent(&reading, "not a traceparent");
        let _entered = reading.enter();
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
    let (service, append) =
        eventually(Duration::from_secs(10), "the span arrives", async || receiver.span("append").ok_or("no span"))
            .await;
    assert!(service.contains("wallaby-test") && service.contains("1.2.3") && service.contains("worker-7"), "{service}");
    assert!(append.attributes.iter().any(|attribute| attribute.key == "rows"));
    let (_, apply) = receiver.span("apply").unwrap();
    assert_eq!(apply.trace_id, append.trace_id);
    assert_eq!(apply.parent_span_id, append.span_id);
    let (_, orphan) = receiver.span("orphan").unwrap();
    assert_ne!(orphan.trace_id, append.trace_id);
    assert!(receiver.span("somebody else's").is_none());
}
