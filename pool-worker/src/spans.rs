//! The worker's spans: each is made here, and nowhere else (docs/operations.md, "Traces").
//!
//! A segment begins a trace when it is drafted, and its record carries the trace to the sinks. What begins a trace is asked for first
//! whether anybody looks: nothing is made for nobody.

use tracing::Span;
use tracing::field::Empty;
use wallaby_model::{ChunkId, Epoch, FlowId, Position, RunId, SinkId, TableName, TaskKind, TraceParent};
use wallaby_staging::Trace;
use wallaby_telemetry::{begins_traces, link, set_parent, traceparent};

use crate::task::TaskContext;

/// A segment, or a splice, on its way into the log: from the draft to the acknowledgement.
pub fn stage(flow: &FlowId, epoch: Epoch, from: Position, to: Position) -> Trace {
    if !begins_traces() {
        return Trace::none();
    }
    let span = tracing::info_span!(
        parent: None, "stage", otel.kind = "producer",
        %flow, %epoch, %from, %to, rows = Empty, bytes = Empty, sequence = Empty
    );
    match traceparent(&span) {
        Some(parent) => Trace { span, parent: Some(parent) },
        None => Trace::none(),
    }
}

/// What a segment or a chunk holds, and how large it is, packed.
pub fn packed(span: &Span, rows: u64, bytes: u64) {
    span.record("rows", rows as i64);
    span.record("bytes", bytes as i64);
}

/// A batch that a sink commits, or a large transaction, made of `segments`: a child of the first one, linked to the others. Of the
/// links [`wallaby_telemetry::LINKS_MAX`] stay. [`committed`] fills in what is known once it is.
pub fn apply(context: &TaskContext, from: Position, segments: impl Iterator<Item = TraceParent>) -> Span {
    batch(context, from, false, segments)
}

/// The same for tables that catch up.
pub fn replay(context: &TaskContext, from: Position, segments: impl Iterator<Item = TraceParent>) -> Span {
    batch(context, from, true, segments)
}

fn batch(
    context: &TaskContext,
    from: Position,
    is_replay: bool,
    mut segments: impl Iterator<Item = TraceParent>,
) -> Span {
    let first = segments.next();
    let TaskKind::Apply(sink) = &context.task.kind else { return Span::none() };
    if first.is_none() && !begins_traces() {
        return Span::none();
    }
    let (flow, epoch) = (&context.task.flow, context.lock.epoch().unwrap_or_default());
    let span = tracing::info_span!(
        parent: None, "apply", otel.kind = "consumer",
        %flow, %sink, %epoch, %from, to = Empty, rows = Empty, replay = is_replay
    );
    if let Some(first) = first.filter(|_| !span.is_disabled()) {
        set_parent(&span, first);
        segments.for_each(|segment| link(&span, segment));
    }
    span
}

/// How far a batch goes, and what is in it.
pub fn committed(span: &Span, to: Position, rows: u64) {
    span.record("to", tracing::field::display(to));
    span.record("rows", rows as i64);
}

/// One chunk, from the source into the side store.
pub fn read_chunk(flow: &FlowId, run: RunId, chunk: ChunkId, table: &TableName) -> Span {
    if !begins_traces() {
        return Span::none();
    }
    tracing::info_span!(
        parent: None, "read_chunk", %flow, %run, %chunk, %table, rows = Empty, bytes = Empty
    )
}

/// One chunk, from the side store into a sink.
pub fn load_chunk(flow: &FlowId, sink: &SinkId, run: RunId, chunk: ChunkId, table: &TableName) -> Span {
    if !begins_traces() {
        return Span::none();
    }
    tracing::info_span!(parent: None, "load_chunk", %flow, %sink, %run, %chunk, %table, rows = Empty)
}
