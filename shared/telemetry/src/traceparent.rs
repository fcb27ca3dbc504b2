//! Trace context in the headers of log records (W3C `traceparent`), so that a trace goes from capture through the log to each
//! sink.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const HEADER: &str = "traceparent";

/// The header's value for a record written inside `span`. `None` when spans are not exported.
pub fn traceparent(span: &Span) -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(HEADER)
}

/// Makes `span` a child of the one that wrote a record with this header value. A value that cannot be read is ignored: a trace
/// is never a reason to refuse a record. Call it before the span is entered.
pub fn set_parent(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([(HEADER.to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract(&carrier);
    if let Err(error) = span.set_parent(context) {
        tracing::trace!(%error, "a span takes no parent");
    }
}
