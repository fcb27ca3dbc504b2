//! The span that goes with a segment to its acknowledgement, and the header that names it to readers.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Span, Subscriber};
use wallaby_model::{Epoch, Nonce, Splice, TraceParent, Transaction};
use wallaby_staging::{LogWriter, SegmentCache, Start, Trace, WriterOptions};
use wallaby_testkit::{NatsCluster, NatsOptions};

use crate::support::{Flow, MAX_BYTES, Memory, at, info, options, read_to, segment};

/// Notes what becomes of its one span.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<(u32, Vec<String>)>>);

impl Notes {
    fn span(&self) -> Span {
        let make = || tracing::info_span!("stage", sequence = tracing::field::Empty);
        tracing::subscriber::with_default(self.clone(), make)
    }

    fn said(&self) -> Vec<String> {
        self.0.lock().unwrap().1.clone()
    }
}

impl Subscriber for Notes {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        self.0.lock().unwrap().0 += 1;
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        self.0.lock().unwrap().1.push(format!("{} value", values.len()));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}

    fn clone_span(&self, id: &Id) -> Id {
        self.0.lock().unwrap().0 += 1;
        id.clone()
    }

    fn try_close(&self, _: Id) -> bool {
        let mut notes = self.0.lock().unwrap();
        notes.0 -= 1;
        if notes.0 == 0 {
            notes.1.push("closed".to_owned());
        }
        notes.0 == 0
    }
}

fn made_in(span: u64) -> Option<TraceParent> {
    TraceParent::new(7, span, true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segments_span_lives_until_it_is_acknowledged() {
    let cluster = NatsCluster::start(NatsOptions::default()).await.unwrap();
    let flow = Flow::on(&cluster.client_url(), 1, MAX_BYTES).await;
    let patient = WriterOptions { ack_timeout: Duration::from_secs(60), ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), Nonce::random(), patient).await.unwrap();
    let writer = takeover.resume(at(1), info(false)).await.unwrap();

    let notes = Notes::default();
    cluster.nodes()[0].pause().await.unwrap();
    let trace = Trace { span: notes.span(), parent: made_in(3) };
    writer.append_traced(segment(1, 11, 100), trace).await.unwrap();
    assert_eq!(notes.said(), Vec::<String>::new(), "nobody acknowledged it");
    cluster.nodes()[0].resume().unwrap();
    writer.settled().await.unwrap();
    assert_eq!(notes.said(), ["1 value", "closed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_the_log_and_of_the_cache_are_told_the_span_of_each_record() {
    let flow = Flow::on_one().await;
    let cache: Arc<dyn SegmentCache> = Arc::<Memory>::clone(&flow.cache);
    let cached = WriterOptions { cache: Some(cache), ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), Nonce::random(), cached).await.unwrap();
    let writer = takeover.resume(at(1), info(false)).await.unwrap();
    let trace = |span| Trace { span: Span::none(), parent: made_in(span) };
    writer.append_traced(segment(1, 11, 100), trace(3)).await.unwrap();
    writer.append(segment(11, 21, 100)).await.unwrap();
    let transaction = Transaction { commit: at(25).commit, xid: 9, committed_at_micros: 0 };
    writer.splice(at(21), at(31), &Splice { transaction, rows: 3, bytes: 10 }, trace(4)).await.unwrap();
    writer.heartbeat(at(41).commit).await.unwrap();
    writer.settled().await.unwrap();

    for mut reader in [flow.reader(Start::FirstResume), flow.shared_reader(Start::FirstResume)] {
        let read = read_to(&mut reader, at(41)).await;
        let told: Vec<_> = read.iter().map(|accepted| accepted.staged.traceparent).collect();
        assert_eq!(told, [None, made_in(3), None, made_in(4), None]);
    }
    assert!(flow.cache.records().values().any(|staged| staged.traceparent == made_in(4)));
    flow.end().await;
}
