//! A process whose spans go nowhere makes none. One process has one telemetry, so this is one test.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use tracing::Level;
use tracing::level_filters::LevelFilter;
use wallaby_model::TraceParent;
use wallaby_telemetry::{TelemetryOptions, begins_traces, init, link, set_parent, traceparent};

#[tokio::test]
async fn without_an_endpoint_no_span_is_made_also_of_what_carries_a_parent() {
    let mut options = TelemetryOptions::new("wallaby-test", "1.2.3");
    options.metrics_listen = None;
    options.filter = Some("info,h2=warn".to_owned());
    let telemetry = init(options).await.unwrap();
    assert!(!begins_traces());
    let parent = TraceParent::new(7, 9, true).unwrap();
    for _ in 0..2 {
        let span = tracing::info_span!(target: "wallaby_test", parent: None, "apply");
        set_parent(&span, parent);
        link(&span, parent);
        assert!(span.is_disabled(), "a span was made for nobody: {span:?}");
        assert_eq!(traceparent(&span), None);
        let other = tracing::error_span!(target: "h2", "somebody else's");
        assert!(other.is_disabled(), "a span was made for nobody: {other:?}");
    }
    // Lines go on, each as the filter says, and what it leaves out is left out early.
    assert!(tracing::event_enabled!(target: "wallaby_test", Level::INFO));
    assert!(!tracing::event_enabled!(target: "h2", Level::INFO));
    assert_eq!(LevelFilter::current(), LevelFilter::INFO);
    telemetry.shutdown().await;
}
