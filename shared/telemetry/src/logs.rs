//! Log lines and spans.

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt, FilterFn, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::{Error, LINKS_MAX, LogFormat, Result, TelemetryOptions};

/// What is logged when nobody says what: the libraries below only when something is wrong.
const DEFAULT_FILTER: &str = "info,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn,async_nats=warn,tokio_postgres=warn,opentelemetry=warn,opentelemetry_sdk=warn,opentelemetry-otlp=warn";

/// The exporter of spans, when one is wanted.
pub(crate) fn tracer(options: &TelemetryOptions) -> Result<Option<SdkTracerProvider>> {
    let Some(endpoint) = &options.otlp_endpoint else { return Ok(None) };
    let refused = |cause: String| Error::Otlp { endpoint: endpoint.clone(), cause };
    let is_url = endpoint.starts_with("http://") || endpoint.starts_with("https://");
    if !is_url {
        return Err(refused("it does not begin with http:// or https://".to_owned()));
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
    let exporter = exporter.map_err(|error| refused(error.to_string()))?;
    let mut attributes = vec![KeyValue::new("service.version", options.version.clone())];
    if let Some(instance) = &options.instance {
        attributes.push(KeyValue::new("service.instance.id", instance.clone()));
    }
    let resource = Resource::builder().with_service_name(options.service.clone()).with_attributes(attributes).build();
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.trace_ratio.get())));
    let provider = SdkTracerProvider::builder()
        // A thread of its own sends what is in a bounded queue. What finds it full is dropped: nobody waits for a collector.
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .with_sampler(sampler)
        .with_max_links_per_span(LINKS_MAX)
        .build();
    Ok(Some(provider))
}

type Dispatched = dyn Subscriber + Send + Sync;

/// Makes log lines and spans of this process go where they should.
pub(crate) fn install(options: &TelemetryOptions, tracer: Option<&SdkTracerProvider>) -> Result<()> {
    subscriber(options, tracer)?.try_init().map_err(|error| Error::Twice(error.to_string()))
}

/// What takes lines and spans. Without a tracer no span is made: each place that would make one asks once, and remembers the answer.
fn subscriber(options: &TelemetryOptions, tracer: Option<&SdkTracerProvider>) -> Result<Box<Dispatched>> {
    let text = options.filter.clone().or_else(|| std::env::var("RUST_LOG").ok()).filter(|text| !text.is_empty());
    let text = text.unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let filter = EnvFilter::try_new(&text).map_err(|error| Error::Filter { filter: text, cause: error.to_string() })?;
    // Spans are for the collector only.
    let is_line = FilterFn::new(|metadata: &tracing::Metadata<'_>| metadata.is_event());
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match options.log_format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let Some(provider) = tracer else {
        // Filters of the whole: behind filters of one layer the registry makes a span that no layer hears of. The level is that of the last.
        return Ok(Box::new(tracing_subscriber::registry().with(lines.and_then(is_line).and_then(filter))));
    };
    // The level is given, or none would count as all.
    let lines = lines.with_filter(filter.and(is_line.with_max_level_hint(LevelFilter::TRACE)));
    // Our own only: the exporter's own requests would be exported, and make more.
    let is_ours =
        |metadata: &tracing::Metadata<'_>| metadata.target().starts_with("wallaby") && *metadata.level() <= Level::INFO;
    let is_ours = FilterFn::new(is_ours).with_max_level_hint(LevelFilter::INFO);
    let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("wallaby"));
    let spans = spans.with_location(false).with_threads(false).with_tracked_inactivity(false).with_filter(is_ours);
    Ok(Box::new(tracing_subscriber::registry().with(lines).with(spans)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::time::Duration;

    use tracing::subscriber::with_default;
    use wallaby_model::TraceParent;
    use wallaby_testkit::{Collector, eventually};

    use super::*;
    use crate::{link, set_parent, traceparent};

    fn options(endpoint: Option<String>, ratio: &str) -> TelemetryOptions {
        let trace_ratio = ratio.parse().unwrap();
        TelemetryOptions { otlp_endpoint: endpoint, trace_ratio, ..TelemetryOptions::new("test", "1") }
    }

    fn parent(is_sampled: bool) -> TraceParent {
        TraceParent::new(7, 9, is_sampled).unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_share_of_nothing_begins_no_trace_and_goes_on_with_those_that_came() {
        let collector = Collector::start().await;
        let options = options(Some(collector.endpoint()), "0");
        let tracer = tracer(&options).unwrap().unwrap();
        with_default(subscriber(&options, Some(&tracer)).unwrap(), || {
            assert_eq!(traceparent(&tracing::info_span!(target: "wallaby_test", "root")), None);
            let unsampled = tracing::info_span!(target: "wallaby_test", "unsampled");
            set_parent(&unsampled, parent(false));
            assert_eq!(traceparent(&unsampled), None);
            let sampled = tracing::info_span!(target: "wallaby_test", "sampled");
            set_parent(&sampled, parent(true));
            let said = traceparent(&sampled).unwrap();
            assert_eq!((said.trace(), said.is_sampled()), (7, true));
            assert_ne!(said.span(), 9);
        });
        tokio::task::spawn_blocking(move || tracer.shutdown()).await.unwrap().unwrap();
        let names: Vec<String> = collector.spans().into_iter().map(|span| span.name).collect();
        assert_eq!(names, ["sampled"]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn links_are_bounded_and_the_span_says_how_many_were_left_out() {
        let collector = Collector::start().await;
        let options = options(Some(collector.endpoint()), "1");
        let tracer = tracer(&options).unwrap().unwrap();
        with_default(subscriber(&options, Some(&tracer)).unwrap(), || {
            let span = tracing::info_span!(target: "wallaby_test", "batch");
            for number in 1..=u64::from(LINKS_MAX) + 72 {
                link(&span, TraceParent::new(number.into(), number, true).unwrap());
            }
        });
        tokio::task::spawn_blocking(move || tracer.shutdown()).await.unwrap().unwrap();
        let batch = collector.named("batch").remove(0);
        assert_eq!((batch.links.len(), batch.links_dropped), (LINKS_MAX as usize, 72));
        assert_eq!((batch.links[0], batch.links[127]), ((1, 1), (128, 128)));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn nobody_waits_for_a_collector_that_does_not_answer_and_what_waits_for_it_is_bounded() {
        const QUEUE: usize = 2048;
        const BATCH: usize = 512;
        let collector = Collector::start().await;
        collector.hold();
        let options = options(Some(collector.endpoint()), "1");
        let tracer = tracer(&options).unwrap().unwrap();
        let subscriber = subscriber(&options, Some(&tracer)).unwrap();
        let made = tokio::task::spawn_blocking(move || {
            with_default(subscriber, || {
                for number in 0..3 * QUEUE {
                    drop(tracing::info_span!(target: "wallaby_test", "many", number));
                }
            });
        });
        tokio::time::timeout(Duration::from_secs(60), made).await.unwrap().unwrap();
        eventually(Duration::from_secs(30), "the collector is asked", async || match collector.requests() {
            0 => Err("not yet"),
            _ => Ok(()),
        })
        .await;
        assert!(collector.spans().is_empty());
        collector.release();
        tokio::task::spawn_blocking(move || tracer.shutdown()).await.unwrap().unwrap();
        let came = collector.spans().len();
        assert!((QUEUE..=QUEUE + 2 * BATCH).contains(&came), "{came} spans were kept");
    }
}
