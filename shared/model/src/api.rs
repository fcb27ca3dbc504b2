//! The flow as the messages of the API, there and back.
//!
//! Here, because the command line and the controller must agree to the letter, and neither may depend on the other. The
//! messages are the document: an absent field takes the default of the flow file.

use std::time::Duration;

use wallaby_proto::v1;

use crate::flow::{
    API_VERSION, ByteSize, Durability, Failover, FlowDocument, FlowSpec, JetStreamSideSpec, LogSpec, Metadata,
    ObjectSideSpec, OnExceeded, OnOverrun, PostgresSinkSpec, PostgresSourceSpec, Problem, PublicationSpec, Replicas,
    SafetySpec, SecretRef, SideStoreSpec, SinkMode, SinkSpec, SlotSpec, SnapshotMode, SourceSpec, Span,
};
use crate::ids::{FlowId, RunId, SinkId, WorkerId};
use crate::record::Codec;

/// `flows/{flow}`.
pub fn flow_name(flow: &FlowId) -> String {
    format!("flows/{flow}")
}

/// `flows/{flow}/sinks/{sink}`.
pub fn sink_name(flow: &FlowId, sink: &SinkId) -> String {
    format!("flows/{flow}/sinks/{sink}")
}

/// `workers/{worker}`.
pub fn worker_name(worker: &WorkerId) -> String {
    format!("workers/{worker}")
}

/// The flow that `flows/{flow}` names.
pub fn parse_flow_name(name: &str) -> Option<FlowId> {
    FlowId::new(name.strip_prefix("flows/")?).ok()
}

/// The flow and the sink that `flows/{flow}/sinks/{sink}` names.
pub fn parse_sink_name(name: &str) -> Option<(FlowId, SinkId)> {
    let (flow, sink) = name.strip_prefix("flows/")?.split_once("/sinks/")?;
    Some((FlowId::new(flow).ok()?, SinkId::new(sink).ok()?))
}

/// `flows/{flow}/snapshots/{run}`.
pub fn snapshot_name(flow: &FlowId, run: RunId) -> String {
    format!("flows/{flow}/snapshots/{run}")
}

/// The flow and the run that `flows/{flow}/snapshots/{run}` names.
pub fn parse_snapshot_name(name: &str) -> Option<(FlowId, RunId)> {
    let (flow, run) = name.strip_prefix("flows/")?.split_once("/snapshots/")?;
    Some((FlowId::new(flow).ok()?, run.parse().ok()?))
}

/// The worker that `workers/{worker}` names.
pub fn parse_worker_name(name: &str) -> Option<WorkerId> {
    WorkerId::new(name.strip_prefix("workers/")?).ok()
}

/// The message of a document: name, labels and specification.
pub fn flow_to_message(document: &FlowDocument) -> v1::Flow {
    v1::Flow {
        name: flow_name(&document.metadata.name),
        labels: document.metadata.labels.clone().into_iter().collect(),
        spec: Some(spec_to_message(&document.spec)),
        ..v1::Flow::default()
    }
}

fn spec_to_message(spec: &FlowSpec) -> v1::FlowSpec {
    let source = &spec.source.postgres;
    let postgres = v1::PostgresSource {
        dsn: Some(secret_to_message(&source.dsn)),
        publication: Some(v1::Publication {
            publication: source.publication.name.clone().unwrap_or_default(),
            create: Some(source.publication.create),
            tables: source.publication.tables.clone(),
            exclude: source.publication.exclude.clone(),
        }),
        slot: Some(v1::Slot {
            slot: source.slot.name.clone().unwrap_or_default(),
            create: Some(source.slot.create),
            failover: match source.slot.failover {
                Failover::Auto => v1::Failover::Auto,
                Failover::On => v1::Failover::On,
                Failover::Off => v1::Failover::Off,
            }
            .into(),
        }),
        snapshot: match source.snapshot {
            SnapshotMode::Initial => v1::SnapshotMode::Initial,
            SnapshotMode::Never => v1::SnapshotMode::Never,
            SnapshotMode::Only => v1::SnapshotMode::Only,
        }
        .into(),
        large_transaction_bytes: Some(source.large_transaction_bytes.0),
        safety: Some(v1::Safety {
            retained_wal_max: Some(source.safety.retained_wal_max.0),
            on_exceeded: match source.safety.on_exceeded {
                OnExceeded::Alarm => v1::OnExceeded::Alarm,
                OnExceeded::PauseSnapshot => v1::OnExceeded::PauseSnapshot,
            }
            .into(),
            snapshot_max: Some(duration_to_message(source.safety.snapshot_max.0)),
        }),
    };
    v1::FlowSpec {
        source: Some(v1::Source { kind: Some(v1::source::Kind::Postgres(postgres)) }),
        log: Some(log_to_message(&spec.log)),
        sinks: spec.sinks.iter().map(sink_to_message).collect(),
        paused: spec.paused,
    }
}

fn log_to_message(log: &LogSpec) -> v1::LogSpec {
    v1::LogSpec {
        replicas: match log.replicas {
            Replicas::Auto => 0,
            Replicas::Exactly(count) => u32::from(count),
        },
        max_bytes: Some(log.max_bytes.0),
        replay_window: Some(duration_to_message(log.replay_window.0)),
        durability: match log.durability {
            Durability::Auto => v1::Durability::Auto,
        }
        .into(),
        codec: match log.codec {
            Codec::None => v1::Codec::None,
            Codec::Lz4 => v1::Codec::Lz4,
        }
        .into(),
        side_store: Some(side_store_to_message(&log.side_store)),
    }
}

fn side_store_to_message(side: &SideStoreSpec) -> v1::SideStore {
    let bytes = |size: &Option<ByteSize>| size.map(|size| size.0);
    let kind = match side {
        SideStoreSpec::Jetstream(spec) => v1::side_store::Kind::Jetstream(v1::JetStreamSide {
            transactions_max: bytes(&spec.transactions_max),
            chunks_max: bytes(&spec.chunks_max),
        }),
        SideStoreSpec::ObjectStore(spec) => v1::side_store::Kind::ObjectStore(v1::ObjectStoreSide {
            url: spec.url.clone(),
            transactions_max: bytes(&spec.transactions_max),
            chunks_max: bytes(&spec.chunks_max),
        }),
    };
    v1::SideStore { kind: Some(kind) }
}

fn side_store_from_message(side: &v1::SideStore) -> SideStoreSpec {
    match &side.kind {
        None => SideStoreSpec::default(),
        Some(v1::side_store::Kind::Jetstream(spec)) => SideStoreSpec::Jetstream(JetStreamSideSpec {
            transactions_max: spec.transactions_max.map(ByteSize),
            chunks_max: spec.chunks_max.map(ByteSize),
        }),
        Some(v1::side_store::Kind::ObjectStore(spec)) => SideStoreSpec::ObjectStore(ObjectSideSpec {
            url: spec.url.clone(),
            transactions_max: spec.transactions_max.map(ByteSize),
            chunks_max: spec.chunks_max.map(ByteSize),
        }),
    }
}

/// The message of one sink's specification.
pub fn sink_to_message(sink: &SinkSpec) -> v1::SinkSpec {
    let postgres = v1::PostgresSink {
        dsn: Some(secret_to_message(&sink.postgres.dsn)),
        schema: sink.postgres.schema.clone(),
        mode: match sink.postgres.mode {
            SinkMode::Upsert => v1::SinkMode::Upsert,
        }
        .into(),
    };
    v1::SinkSpec {
        sink: sink.name.to_string(),
        kind: Some(v1::sink_spec::Kind::Postgres(postgres)),
        on_overrun: match sink.on_overrun {
            OnOverrun::Backpressure => v1::OnOverrun::Backpressure,
            OnOverrun::Detach => v1::OnOverrun::Detach,
        }
        .into(),
        paused: sink.paused,
    }
}

fn secret_to_message(secret: &SecretRef) -> v1::SecretRef {
    let source = match secret {
        SecretRef::Env(name) => v1::secret_ref::Source::Env(name.clone()),
        SecretRef::File(path) => v1::secret_ref::Source::File(path.clone()),
        SecretRef::Value(value) => v1::secret_ref::Source::Value(value.clone()),
    };
    v1::SecretRef { source: Some(source) }
}

/// A length of time as a message. Longer than a message can say becomes the longest it can.
pub fn duration_to_message(span: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    // Below 10⁹, so it always fits.
    let nanos = i32::try_from(span.subsec_nanos()).unwrap_or(0);
    prost_types::Duration { seconds, nanos }
}

/// The document of a message.
///
/// # Errors
/// Everything that makes it no document. A document still has to be asked for its own [`FlowDocument::problems`].
pub fn flow_from_message(flow: &v1::Flow) -> Result<FlowDocument, Vec<Problem>> {
    let mut reader = Reader { problems: Vec::new() };
    let document = reader.flow(flow);
    match document {
        Some(document) if reader.problems.is_empty() => Ok(document),
        _ => Err(reader.problems),
    }
}

/// Collects problems, so that a caller hears of all at once.
struct Reader {
    problems: Vec<Problem>,
}

impl Reader {
    fn wrong<T>(&mut self, path: impl Into<String>, message: impl Into<String>) -> Option<T> {
        self.problems.push(Problem { path: path.into(), message: message.into() });
        None
    }

    fn flow(&mut self, flow: &v1::Flow) -> Option<FlowDocument> {
        let name = match flow.name.strip_prefix("flows/").map(FlowId::new) {
            Some(Ok(name)) => Some(name),
            Some(Err(error)) => self.wrong("metadata.name", error.to_string()),
            None => self.wrong("metadata.name", format!("`{}` is not of the form flows/{{flow}}", flow.name)),
        };
        let spec = match &flow.spec {
            Some(spec) => self.spec(spec),
            None => self.wrong("spec", "is missing"),
        };
        let labels = flow.labels.clone().into_iter().collect();
        Some(FlowDocument {
            api_version: API_VERSION.to_owned(),
            kind: "Flow".to_owned(),
            metadata: Metadata { name: name?, labels },
            spec: spec?,
        })
    }

    fn spec(&mut self, spec: &v1::FlowSpec) -> Option<FlowSpec> {
        let kind = spec.source.as_ref().and_then(|source| source.kind.as_ref());
        let postgres = match kind {
            Some(v1::source::Kind::Postgres(postgres)) => self.source(postgres),
            None => self.wrong("spec.source", "give exactly one of `postgres`"),
        };
        let log = match &spec.log {
            Some(log) => self.log(log),
            None => Some(LogSpec::default()),
        };
        let sinks: Vec<Option<SinkSpec>> = spec
            .sinks
            .iter()
            .enumerate()
            .map(|(index, sink)| self.sink(sink, &format!("spec.sinks[{index}]")))
            .collect();
        Some(FlowSpec {
            source: SourceSpec { postgres: postgres? },
            log: log?,
            sinks: sinks.into_iter().collect::<Option<_>>()?,
            paused: spec.paused,
        })
    }

    fn source(&mut self, source: &v1::PostgresSource) -> Option<PostgresSourceSpec> {
        let at = "spec.source.postgres";
        let dsn = self.secret(source.dsn.as_ref(), &format!("{at}.dsn"));
        let publication = match &source.publication {
            Some(publication) => Some(PublicationSpec {
                name: non_empty(&publication.publication),
                create: publication.create.unwrap_or(true),
                tables: publication.tables.clone(),
                exclude: publication.exclude.clone(),
            }),
            None => self.wrong(format!("{at}.publication"), "is missing"),
        };
        let slot = match &source.slot {
            Some(slot) => self.slot(slot, &format!("{at}.slot")),
            None => Some(SlotSpec::default()),
        };
        let snapshot = match v1::SnapshotMode::try_from(source.snapshot) {
            Ok(v1::SnapshotMode::Never) => Some(SnapshotMode::Never),
            Ok(v1::SnapshotMode::Initial) => Some(SnapshotMode::Initial),
            Ok(v1::SnapshotMode::Only) => Some(SnapshotMode::Only),
            _ => self.wrong(format!("{at}.snapshot"), "is missing: `initial`, `never` or `only`"),
        };
        let mut safety = SafetySpec::default();
        if let Some(message) = &source.safety {
            safety.retained_wal_max = message.retained_wal_max.map_or(safety.retained_wal_max, ByteSize);
            match v1::OnExceeded::try_from(message.on_exceeded) {
                Ok(v1::OnExceeded::Unspecified | v1::OnExceeded::Alarm) => {}
                Ok(v1::OnExceeded::PauseSnapshot) => safety.on_exceeded = OnExceeded::PauseSnapshot,
                Err(_) => {
                    self.wrong::<()>(format!("{at}.safety.onExceeded"), "unknown: use `alarm` or `pauseSnapshot`");
                }
            }
            match message.snapshot_max.map(Duration::try_from) {
                None => {}
                Some(Ok(longest)) => safety.snapshot_max = Span(longest),
                Some(Err(_)) => {
                    self.wrong::<()>(format!("{at}.safety.snapshotMax"), "must not be negative");
                }
            }
        }
        Some(PostgresSourceSpec {
            dsn: dsn?,
            publication: publication?,
            slot: slot?,
            snapshot: snapshot?,
            large_transaction_bytes: ByteSize(source.large_transaction_bytes.unwrap_or(64 << 20)),
            safety,
        })
    }

    fn slot(&mut self, slot: &v1::Slot, at: &str) -> Option<SlotSpec> {
        let failover = match v1::Failover::try_from(slot.failover) {
            Ok(v1::Failover::Auto | v1::Failover::Unspecified) => Some(Failover::Auto),
            Ok(v1::Failover::On) => Some(Failover::On),
            Ok(v1::Failover::Off) => Some(Failover::Off),
            Err(_) => self.wrong(format!("{at}.failover"), "unknown: use `auto`, `on` or `off`"),
        };
        Some(SlotSpec { name: non_empty(&slot.slot), create: slot.create.unwrap_or(true), failover: failover? })
    }

    fn log(&mut self, log: &v1::LogSpec) -> Option<LogSpec> {
        let defaults = LogSpec::default();
        let replicas = match log.replicas {
            0 => Some(Replicas::Auto),
            count @ (1 | 3 | 5) => u8::try_from(count).ok().map(Replicas::Exactly),
            count => self.wrong("spec.log.replicas", format!("{count} copies: use auto, 1, 3 or 5")),
        };
        let replay_window = match &log.replay_window {
            None => Some(defaults.replay_window),
            Some(window) => match Duration::try_from(*window) {
                Ok(window) => Some(Span(window)),
                Err(_) => self.wrong("spec.log.replayWindow", "must not be negative"),
            },
        };
        let codec = match v1::Codec::try_from(log.codec) {
            Ok(v1::Codec::Unspecified | v1::Codec::Lz4) => Some(Codec::Lz4),
            Ok(v1::Codec::None) => Some(Codec::None),
            Err(_) => self.wrong("spec.log.codec", "unknown: use `lz4` or `none`"),
        };
        if v1::Durability::try_from(log.durability).is_err() {
            self.wrong::<()>("spec.log.durability", "unknown: only `auto` for now");
        }
        Some(LogSpec {
            replicas: replicas?,
            max_bytes: log.max_bytes.map_or(defaults.max_bytes, ByteSize),
            replay_window: replay_window?,
            durability: Durability::Auto,
            codec: codec?,
            side_store: log.side_store.as_ref().map(side_store_from_message).unwrap_or_default(),
        })
    }

    fn sink(&mut self, sink: &v1::SinkSpec, at: &str) -> Option<SinkSpec> {
        let name = match SinkId::new(sink.sink.as_str()) {
            Ok(name) => Some(name),
            Err(error) => self.wrong(format!("{at}.name"), error.to_string()),
        };
        let postgres = match &sink.kind {
            Some(v1::sink_spec::Kind::Postgres(postgres)) => self.postgres_sink(postgres, &format!("{at}.postgres")),
            None => self.wrong(at, "give exactly one of `postgres`"),
        };
        let on_overrun = match v1::OnOverrun::try_from(sink.on_overrun) {
            Ok(v1::OnOverrun::Unspecified | v1::OnOverrun::Detach) => Some(OnOverrun::Detach),
            Ok(v1::OnOverrun::Backpressure) => Some(OnOverrun::Backpressure),
            Err(_) => self.wrong(format!("{at}.onOverrun"), "unknown: use `detach` or `backpressure`"),
        };
        Some(SinkSpec { name: name?, postgres: postgres?, on_overrun: on_overrun?, paused: sink.paused })
    }

    fn postgres_sink(&mut self, sink: &v1::PostgresSink, at: &str) -> Option<PostgresSinkSpec> {
        let dsn = self.secret(sink.dsn.as_ref(), &format!("{at}.dsn"));
        if v1::SinkMode::try_from(sink.mode).is_err() {
            self.wrong::<()>(format!("{at}.mode"), "unknown: only `upsert` for now");
        }
        let schema = non_empty(&sink.schema).unwrap_or_else(|| "{{ .schema }}".to_owned());
        Some(PostgresSinkSpec { dsn: dsn?, schema, mode: SinkMode::Upsert })
    }

    fn secret(&mut self, secret: Option<&v1::SecretRef>, at: &str) -> Option<SecretRef> {
        match secret.and_then(|secret| secret.source.as_ref()) {
            Some(v1::secret_ref::Source::Env(name)) => Some(SecretRef::Env(name.clone())),
            Some(v1::secret_ref::Source::File(path)) => Some(SecretRef::File(path.clone())),
            Some(v1::secret_ref::Source::Value(value)) => Some(SecretRef::Value(value.clone())),
            None => self.wrong(at, "give exactly one of `env`, `file`, `value`"),
        }
    }
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use crate::flow::{page::EXAMPLE, parse};

    #[test]
    fn a_document_comes_back_from_its_message() {
        let mut document = parse(EXAMPLE, "-").unwrap();
        assert_eq!(flow_from_message(&flow_to_message(&document)).unwrap(), document);
        document.spec.paused = true;
        document.spec.sinks[0].paused = true;
        document.spec.log.replicas = Replicas::Exactly(3);
        document.spec.log.codec = Codec::None;
        document.spec.source.postgres.slot =
            SlotSpec { name: Some("s".into()), create: false, failover: Failover::Off };
        document.spec.source.postgres.publication.name = Some("p".into());
        document.spec.source.postgres.snapshot = SnapshotMode::Only;
        document.spec.source.postgres.safety = SafetySpec {
            on_exceeded: OnExceeded::PauseSnapshot,
            snapshot_max: Span(Duration::from_millis(90_500)),
            ..SafetySpec::default()
        };
        document.spec.sinks[0].on_overrun = OnOverrun::Backpressure;
        document.spec.sinks[0].postgres.dsn = SecretRef::Value("x".into());
        assert_eq!(flow_from_message(&flow_to_message(&document)).unwrap(), document);
    }

    #[test]
    fn absent_fields_take_the_defaults_of_the_file() {
        let document = parse(EXAMPLE, "-").unwrap();
        let mut message = flow_to_message(&document);
        let spec = message.spec.as_mut().unwrap();
        spec.log = None;
        let Some(v1::source::Kind::Postgres(source)) = &mut spec.source.as_mut().unwrap().kind else { panic!() };
        source.slot = None;
        source.safety = None;
        source.large_transaction_bytes = None;
        spec.sinks[0].on_overrun = v1::OnOverrun::Unspecified.into();
        let read = flow_from_message(&message).unwrap();
        assert_eq!(read.spec.log, LogSpec::default());
        assert_eq!(read.spec.source.postgres.slot, SlotSpec::default());
        assert_eq!(read.spec.source.postgres.safety, SafetySpec::default());
        assert_eq!(read.spec.sinks[0].on_overrun, OnOverrun::Detach);
        assert_eq!(read.spec.source.postgres.large_transaction_bytes, ByteSize(64 << 20));
    }

    #[test]
    fn everything_wrong_is_named_at_once() {
        let mut message = flow_to_message(&parse(EXAMPLE, "-").unwrap());
        message.name = "flows/Shop".into();
        let spec = message.spec.as_mut().unwrap();
        spec.log.as_mut().unwrap().replicas = 2;
        spec.sinks[0].kind = None;
        let paths: Vec<String> = flow_from_message(&message).unwrap_err().into_iter().map(|p| p.path).collect();
        assert_eq!(paths, ["metadata.name", "spec.log.replicas", "spec.sinks[0]"]);
    }

    #[test]
    fn names_of_resources_round_trip() {
        let (flow, sink) = (FlowId::new("shop").unwrap(), SinkId::new("a").unwrap());
        assert_eq!(parse_flow_name(&flow_name(&flow)), Some(flow.clone()));
        assert_eq!(parse_sink_name(&sink_name(&flow, &sink)), Some((flow, sink)));
        assert_eq!(parse_flow_name("flows/a/sinks/b"), None);
        assert_eq!(parse_sink_name("flows/a"), None);
        let flow = FlowId::new("shop").unwrap();
        assert_eq!(parse_snapshot_name(&snapshot_name(&flow, RunId(3))), Some((flow, RunId(3))));
        assert_eq!(parse_snapshot_name("flows/a/snapshots/0"), None);
        assert_eq!(parse_worker_name("workers/w-1"), WorkerId::new("w-1").ok());
    }
}
