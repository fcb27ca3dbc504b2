//! Trace context in the headers of log records (W3C `traceparent`), so that a trace goes from capture through the log to each
//! sink.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry::{Context, trace::Status};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use wallaby_model::TraceParent;

/// What the header of a record written inside `span` says. `None` when the span is not exported: then no header is needed.
pub fn traceparent(span: &Span) -> Option<TraceParent> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context();
    let made = context.span().span_context().clone();
    let (trace, span) =
        (u128::from_be_bytes(made.trace_id().to_bytes()), u64::from_be_bytes(made.span_id().to_bytes()));
    TraceParent::new(trace, span, true).filter(|_| made.is_sampled())
}

/// Makes `span` a child of the one that `parent` names, exported if that is. Call it before the span is entered.
pub fn set_parent(span: &Span, parent: TraceParent) {
    let context = Context::new().with_remote_span_context(remote(parent));
    if let Err(error) = span.set_parent(context) {
        tracing::trace!(%error, "a span takes no parent");
    }
}

/// Says that `span` is about what was made in the one that `to` names too. Of more than [`crate::LINKS_MAX`] the first stay, and the
/// span says how many were left out.
pub fn link(span: &Span, to: TraceParent) {
    span.add_link(remote(to));
}

/// Says that what `span` is about failed, and why.
pub fn failed(span: &Span, why: &dyn std::fmt::Display) {
    if !span.is_disabled() {
        span.set_status(Status::error(why.to_string()));
    }
}

fn remote(parent: TraceParent) -> SpanContext {
    let flags = if parent.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::default() };
    SpanContext::new(TraceId::from(parent.trace()), SpanId::from(parent.span()), flags, true, TraceState::NONE)
}
