//! A span for each request to the API (docs/operations.md, "Traces"): a child of the caller's when that sends a `traceparent`.

use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use tonic::Code;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};
use tracing::field::Empty;
use tracing::{Instrument, Span};
use wallaby_model::TraceParent;
use wallaby_telemetry::{begins_traces, set_parent};

/// What our services' paths begin with. Probes and reflection are not traced.
const OURS: &str = "/wallaby.";

/// Puts [`RequestSpans`] around the services.
#[derive(Clone, Copy, Debug)]
pub struct RequestSpansLayer;

impl<S> Layer<S> for RequestSpansLayer {
    type Service = RequestSpans<S>;

    fn layer(&self, inner: S) -> RequestSpans<S> {
        RequestSpans(inner)
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct RequestSpans<S>(S);

impl<S, B, R> Service<Request<B>> for RequestSpans<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = futures::future::Either<S::Future, BoxFuture<'static, Result<Response<R>, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let span = span_of(request.uri().path(), request.headers());
        let answer = self.0.call(request);
        if span.is_disabled() {
            return answer.left_future();
        }
        let entered = span.clone();
        let traced = async move {
            let answer = answer.await;
            if let Ok(answer) = &answer {
                answered(&span, answer.headers());
            }
            answer
        };
        traced.instrument(entered).boxed().right_future()
    }
}

fn span_of(path: &str, headers: &HeaderMap) -> Span {
    let parent = headers.get("traceparent").and_then(|value| value.to_str().ok()?.parse::<TraceParent>().ok());
    if !path.starts_with(OURS) || (parent.is_none() && !begins_traces()) {
        return Span::none();
    }
    let name = path.trim_start_matches('/');
    let (service, method) = name.rsplit_once('/').unwrap_or((name, ""));
    let span = tracing::info_span!(
        parent: None, "request", otel.name = name, otel.kind = "server",
        rpc.system = "grpc", rpc.service = service, rpc.method = method, rpc.grpc.status_code = Empty
    );
    if let Some(parent) = parent.filter(|_| !span.is_disabled()) {
        set_parent(&span, parent);
    }
    span
}

/// A refusal stands in the headers of the answer; without one it succeeded, or has begun to.
fn answered(span: &Span, headers: &HeaderMap) {
    let code = headers.get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
    span.record("rpc.grpc.status_code", i64::from(i32::from(code)));
    // What the caller did wrong is no fault of ours.
    let is_fault = matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    );
    if is_fault {
        wallaby_telemetry::failed(span, &code);
    }
}
