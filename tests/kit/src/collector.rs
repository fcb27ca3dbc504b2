//! Where spans go in a test: an OTLP receiver with the official protocol, that keeps what it gets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A span that came.
#[derive(Clone, Debug)]
pub struct ExportedSpan {
    /// What the resource says of the process: `service.name`, `service.version`, `service.instance.id`.
    pub resource: BTreeMap<String, String>,
    /// Its name.
    pub name: String,
    /// Its trace.
    pub trace: u128,
    /// Its own id.
    pub id: u64,
    /// Its parent's id; 0 when it has none.
    pub parent: u64,
    /// Trace and id of each span that it is linked to.
    pub links: Vec<(u128, u64)>,
    /// Links that were left out.
    pub links_dropped: u32,
    /// What is said of it.
    pub attributes: BTreeMap<String, String>,
    /// The names of its events.
    pub events: Vec<String>,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// As the protocol counts: 2 is a server's.
    pub kind: i32,
    /// From its start to its end.
    pub took: Duration,
}

/// The running receiver; ends when dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    spans: Mutex<Vec<ExportedSpan>>,
    requests: watch::Sender<u64>,
    is_held: watch::Sender<bool>,
}

impl State {
    fn spans(&self) -> MutexGuard<'_, Vec<ExportedSpan>> {
        // Whole after any panic: spans are only added.
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector {
    /// Starts one on a free port.
    pub async fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap_or_else(|error| panic!("a collector: {error}"));
        let address = listener.local_addr().unwrap_or_else(|error| panic!("a collector: {error}"));
        let state =
            State { spans: Mutex::default(), requests: watch::Sender::new(0), is_held: watch::Sender::new(false) };
        let state = Arc::new(state);
        let service = TraceServiceServer::from_arc(Arc::new(Receiver(Arc::clone(&state))));
        let task = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            if let Err(error) = server.serve_with_incoming(TcpListenerStream::new(listener)).await {
                eprintln!("the collector ended: {error}");
            }
        });
        Collector { address, state, task }
    }

    /// Where it listens, as `OTEL_EXPORTER_OTLP_ENDPOINT` has it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans that came, in the order in which they did.
    pub fn spans(&self) -> Vec<ExportedSpan> {
        self.state.spans().clone()
    }

    /// The spans of this name that came.
    pub fn named(&self, name: &str) -> Vec<ExportedSpan> {
        self.state.spans().iter().filter(|span| span.name == name).cloned().collect()
    }

    /// From here on it takes requests and answers none.
    pub fn hold(&self) {
        self.state.is_held.send_replace(true);
    }

    /// It answers again, those too that wait.
    pub fn release(&self) {
        self.state.is_held.send_replace(false);
    }

    /// How many requests came, answered or not.
    pub fn requests(&self) -> u64 {
        *self.state.requests.borrow()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Receiver(Arc<State>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.requests.send_modify(|requests| *requests += 1);
        let released = self.0.is_held.subscribe().wait_for(|is_held| !is_held).await.is_ok();
        if !released {
            return Err(Status::unavailable("the test is over"));
        }
        let mut spans = self.0.spans();
        for from in request.into_inner().resource_spans {
            let resource = attributes(from.resource.unwrap_or_default().attributes);
            let came = from.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(came.map(|span| exported(span, &resource)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn exported(span: Span, resource: &BTreeMap<String, String>) -> ExportedSpan {
    let status = span.status.unwrap_or_default();
    ExportedSpan {
        resource: resource.clone(),
        name: span.name,
        trace: number(&span.trace_id),
        id: number(&span.span_id) as u64,
        parent: number(&span.parent_span_id) as u64,
        links: span.links.iter().map(|link| (number(&link.trace_id), number(&link.span_id) as u64)).collect(),
        links_dropped: span.dropped_links_count,
        attributes: attributes(span.attributes),
        events: span.events.into_iter().map(|event| event.name).collect(),
        error: (status.code == StatusCode::Error as i32).then_some(status.message),
        kind: span.kind,
        took: Duration::from_nanos(span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano)),
    }
}

/// An id, big endian as all of them are; empty stands for none.
fn number(id: &[u8]) -> u128 {
    id.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

fn attributes(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    attributes.into_iter().map(|attribute| (attribute.key, text(attribute.value))).collect()
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(value)) => value.to_string(),
        other => format!("{other:?}"),
    }
}
