//! Traces: from the capture through the log to the sink in another worker, for chunks, and for requests to the API.

use std::collections::BTreeSet;

use wallaby_proto::v1::GetFlowRequest;
use wallaby_proto::v1::flow_service_client::FlowServiceClient;
use wallaby_testkit::{Collector, ExportedSpan, NatsOptions, eventually};
use wallaby_tests::flow::FlowFile;
use wallaby_tests::system::{Plan, System};
use wallaby_tests::{PATIENCE, alone};

/// Each row is about 1 KB that hardly compresses.
const FILL: &str = "\
    INSERT INTO bulk SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 32) WHERE i > 0) \
    FROM generate_series(1, $1::bigint) i";
const BLOCK: &str = "ROLLBACK; BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE";
/// Ends the session of ours that waits for the lock.
const END_WAITING: &str = "\
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'warehouse' AND wait_event_type = 'Lock'";

fn worker_of(span: &ExportedSpan) -> &str {
    &span.resource["service.instance.id"]
}

/// The spans of batches whose first segment `stage` is.
fn applied(collector: &Collector, stage: &ExportedSpan) -> Vec<ExportedSpan> {
    let mut spans = collector.named("apply");
    spans.retain(|apply| (apply.trace, apply.parent) == (stage.trace, stage.id));
    spans
}

/// Waits until a span of this name came that `fits`.
async fn until(collector: &Collector, name: &str, what: &str, fits: impl Fn(&ExportedSpan) -> bool) -> ExportedSpan {
    eventually(PATIENCE, what, async || {
        let spans = collector.named(name);
        spans.iter().find(|span| fits(span)).cloned().ok_or_else(|| spans.last().cloned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_from_the_capture_through_the_log_to_the_sink_and_rows_wait_for_no_collector() {
    let _alone = alone().await;
    let collector = Collector::start().await;
    let variables =
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()), ("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned())];
    let flow = FlowFile { large_transaction_bytes: "1Mi".to_owned(), replicas: 1, ..FlowFile::default() };
    // A worker owns one task: what the sink's knows of the capture's stands in the log.
    let plan = Plan { capacity: 1, nats: NatsOptions::default(), flow, variables, ..Plan::default() };
    let mut system = System::start(plan).await;
    system.source().await.batch_execute("CREATE TABLE bulk (id bigint PRIMARY KEY, filler text)").await.unwrap();
    system.apply_flow().await;

    one_segment(&mut system, &collector).await;
    many_segments_and_a_failure(&mut system, &collector).await;
    a_large_transaction(&mut system, &collector).await;
    chunks(&mut system, &collector).await;
    requests(&system, &collector).await;

    // The collector takes what comes and answers nothing.
    collector.hold();
    let asked = collector.requests();
    for _ in 0..5 {
        system.row_passes().await;
    }
    eventually(PATIENCE, "the collector is asked in vain", async || match collector.requests() {
        now if now > asked => Ok(()),
        now => Err(now),
    })
    .await;
    system.row_passes().await;
    collector.release();

    a_share_of_nothing(&mut system, &collector).await;
}

async fn one_segment(system: &mut System, collector: &Collector) {
    let (capture, apply) = (system.owner(&system.capture()).await, system.owner(&system.apply_task()).await);
    assert_ne!(capture, apply, "both tasks are at one worker: nothing is shown");
    system.row_passes().await;
    let stage = until(collector, "stage", "the span of a segment", |stage| !applied(collector, stage).is_empty()).await;
    let batch = applied(collector, &stage).remove(0);
    assert_eq!((worker_of(&stage), worker_of(&batch)), (capture.as_str(), apply.as_str()));
    assert_eq!((stage.parent, &stage.resource["service.name"]), (0, &"wallaby-worker".to_owned()));
    for span in [&stage, &batch] {
        assert_eq!(span.attributes["flow"], "shop");
        assert!(span.attributes["epoch"].parse::<u64>().unwrap() > 0);
        assert!(span.attributes["from"] < span.attributes["to"], "{span:?}");
        assert_eq!((span.attributes["rows"].as_str(), &span.error), ("1", &None), "{span:?}");
    }
    assert!(stage.attributes["bytes"].parse::<u64>().unwrap() > 0);
    // It is written at the acknowledgement: the span lived until then.
    assert!(stage.attributes["sequence"].parse::<u64>().unwrap() > 0, "{stage:?}");
    assert_eq!((batch.attributes["sink"].as_str(), batch.attributes["replay"].as_str()), ("warehouse", "false"));
}

/// While the sink is blocked, segments pile up: one batch is made of them. And a write that fails is tried again.
async fn many_segments_and_a_failure(system: &mut System, collector: &Collector) {
    let target = system.target().await;
    target.batch_execute(BLOCK).await.unwrap();
    let source = system.source().await;
    for n in 1..=4_i64 {
        let staged = collector.named("stage").len();
        source.execute("INSERT INTO ledger VALUES ($1, $1, 1, 'one of many')", &[&(n + 1_000_000)]).await.unwrap();
        eventually(PATIENCE, "a segment of its own", async || match collector.named("stage").len() {
            now if now > staged => Ok(()),
            now => Err(now),
        })
        .await;
    }
    let admin = system.source().await;
    eventually(PATIENCE, "a session of the sink that waits is ended", async || {
        match admin.query(END_WAITING, &[]).await {
            Ok(rows) if !rows.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let failed = until(collector, "apply", "the span of a failed write", |span| span.error.is_some()).await;
    println!("failed: {:?}", failed.error);
    target.batch_execute("ROLLBACK").await.unwrap();
    system.row_passes().await;
    let batch =
        until(collector, "apply", "a batch of many segments", |span| span.error.is_none() && span.links.len() >= 3)
            .await;
    assert_eq!(made_in(collector, &batch).await.len(), batch.links.len() + 1, "a segment is linked twice: {batch:?}");
}

/// The spans of all segments that a batch says it is made of.
async fn made_in(collector: &Collector, batch: &ExportedSpan) -> Vec<ExportedSpan> {
    let wanted: BTreeSet<(u128, u64)> = batch.links.iter().copied().chain([(batch.trace, batch.parent)]).collect();
    eventually(PATIENCE, "the span of each segment of a batch", async || {
        let mut staged = collector.named("stage");
        staged.retain(|span| wanted.contains(&(span.trace, span.id)));
        if staged.len() == wanted.len() { Ok(staged) } else { Err((wanted.clone(), staged)) }
    })
    .await
}

fn rows_of(span: &ExportedSpan) -> i64 {
    span.attributes.get("rows").map_or(0, |rows| rows.parse().unwrap())
}

async fn a_large_transaction(system: &mut System, collector: &Collector) {
    let rows = 4000_i64;
    system.source().await.execute(FILL, &[&rows]).await.unwrap();
    system.row_passes().await;
    let batch = until(collector, "apply", "a large transaction at the sink", |span| rows_of(span) == rows).await;
    let staged = made_in(collector, &batch).await;
    let (known, last) = (staged.iter().map(rows_of).sum::<i64>(), staged.last().unwrap());
    assert!(known >= rows, "the spans of {known} rows of {rows}: {staged:?}");
    assert!(last.attributes.contains_key("sequence"), "{last:?}");
    println!("{rows} rows stand in {} records", staged.len());
}

async fn chunks(system: &mut System, collector: &Collector) {
    for _ in 0..2 {
        system.start_worker("");
    }
    let said = system.cli(&["snapshot", "start", "shop", "public.bulk", "--wait", "--timeout", "80s"]).await;
    assert_eq!(said.code, 0, "{}", said.text);
    let is_of =
        |span: &ExportedSpan| span.error.is_none() && rows_of(span) > 0 && span.attributes["table"] == "public.bulk";
    let read = until(collector, "read_chunk", "the span of a chunk that is read", is_of).await;
    let loaded = until(collector, "load_chunk", "the span of the same chunk that is loaded", |span| {
        is_of(span) && ["flow", "run", "chunk", "rows"].iter().all(|key| span.attributes[*key] == read.attributes[*key])
    })
    .await;
    assert!(read.attributes["bytes"].parse::<u64>().unwrap() > 0);
    assert_eq!(loaded.attributes["sink"], "warehouse");
    system.row_passes().await;
}

/// A request is a child of its caller's span; one that came from nowhere begins a trace.
async fn requests(system: &System, collector: &Collector) {
    let endpoint = format!("http://127.0.0.1:{}", system.controllers[0].1.port());
    let mut flows = FlowServiceClient::connect(endpoint).await.unwrap();
    let mut request = tonic::Request::new(GetFlowRequest { name: "flows/nowhere".to_owned() });
    let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    request.metadata_mut().insert("traceparent", header.parse().unwrap());
    flows.get_flow(request).await.unwrap_err();
    let name = "wallaby.v1.FlowService/GetFlow";
    let is_ours = |span: &ExportedSpan| span.parent == 0x00f0_67aa_0ba9_02b7;
    let span = until(collector, name, "the span of a request", is_ours).await;
    assert_eq!(span.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    assert_eq!(span.resource["service.name"], "wallaby-controller");
    // Not found: the caller's fault.
    assert_eq!((span.attributes["rpc.grpc.status_code"].as_str(), span.kind, &span.error), ("5", 2, &None));
    let made = until(collector, "wallaby.v1.FlowService/CreateFlow", "the span of `wallaby apply`", |_| true).await;
    assert_eq!((made.parent, made.attributes["rpc.grpc.status_code"].as_str()), (0, "0"));
    let health = collector.spans().into_iter().find(|span| span.name.contains("Health"));
    assert!(health.is_none(), "{health:?}");
}

/// Workers that begin no trace write no header, or the sink's would go on with it, and make no span.
async fn a_share_of_nothing(system: &mut System, collector: &Collector) {
    let others: Vec<String> = system.workers.iter().map(|worker| worker.name().to_owned()).collect();
    let quiet: Vec<String> = (0..2).map(|_| system.start_worker_with(&[("OTEL_TRACES_SAMPLER_ARG", "0")])).collect();
    for name in &others {
        end(system, name).await;
    }
    for _ in 0..3 {
        system.row_passes().await;
    }
    let owners = [system.owner(&system.capture()).await, system.owner(&system.apply_task()).await];
    assert!(owners.iter().all(|owner| quiet.contains(owner)), "{owners:?}");
    // They send what they have when they end.
    for name in &quiet {
        end(system, name).await;
    }
    let spans = collector.spans();
    let theirs = spans
        .iter()
        .find(|span| span.resource.get("service.instance.id").is_some_and(|instance| quiet.contains(instance)));
    assert!(theirs.is_none(), "{theirs:?}");
}

/// Ends a worker in good order.
async fn end(system: &System, name: &str) {
    let worker = system.worker(name);
    worker.terminate();
    eventually(
        PATIENCE,
        &format!("{name} ends"),
        async || {
            if worker.process().is_alive() { Err("it lives") } else { Ok(()) }
        },
    )
    .await;
}
