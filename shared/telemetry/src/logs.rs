//! Log lines and spans.

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::{Error, LogFormat, Result, TelemetryOptions};

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
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.trace_ratio)));
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .with_sampler(sampler)
        .build();
    Ok(Some(provider))
}

/// Makes log lines and spans of this process go where they should.
pub(crate) fn install(options: &TelemetryOptions, tracer: Option<&SdkTracerProvider>) -> Result<()> {
    let text = options.filter.clone().or_else(|| std::env::var("RUST_LOG").ok()).filter(|text| !text.is_empty());
    let text = text.unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let filter = EnvFilter::try_new(&text).map_err(|error| Error::Filter { filter: text, cause: error.to_string() })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match options.log_format {
        LogFormat::Text => lines.with_filter(filter).boxed(),
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
    };
    let spans = tracer.map(|provider| {
        // Our own only: the exporter's own requests would be exported, and make more.
        let is_ours = FilterFn::new(|metadata| metadata.target().starts_with("wallaby"));
        tracing_opentelemetry::layer().with_tracer(provider.tracer("wallaby")).with_filter(is_ours)
    });
    let subscriber = tracing_subscriber::registry().with(lines).with(spans);
    subscriber.try_init().map_err(|error| Error::Twice(error.to_string()))
}
