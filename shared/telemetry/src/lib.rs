//! Tracing, OTLP export and the Prometheus endpoint, set up the same way in every binary.
