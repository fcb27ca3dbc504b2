//! The flow specification: the document that users write (api.md, "The flow file") and that the controller stores.
//!
//! These are the types; [`parse()`] reads a file and says where it is wrong, [`check`] holds the rules that no type can,
//! [`fields`] describes every key for people and for the parser, [`page`] prints that as the docs. Unknown keys are errors
//! everywhere.

pub mod change;
pub mod check;
pub mod fields;
pub mod page;
pub mod parse;
mod tree;

pub use check::Problem;
pub use parse::{FileProblem, FlowFileError, ParsedFlow, parse, parse_all};

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::{FlowId, SinkId};

/// The only `apiVersion` there is.
pub const API_VERSION: &str = "wallaby/v1";

/// A whole flow file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowDocument {
    /// `wallaby/v1`.
    pub api_version: String,
    /// `Flow`.
    pub kind: String,
    /// Name and labels.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: FlowSpec,
}

/// Name and labels of a resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// The flow's id: 1 to 40 lower-case letters, digits and dashes.
    pub name: FlowId,
    /// Free labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What a flow should do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowSpec {
    /// Where changes come from.
    pub source: SourceSpec,
    /// The staged log between source and sinks.
    #[serde(default)]
    pub log: LogSpec,
    /// Where changes go.
    #[serde(default)]
    pub sinks: Vec<SinkSpec>,
    /// True stops every task of the flow and keeps slot, log and positions.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

impl FlowSpec {
    /// The sinks in the order of their names: in the file their order says nothing.
    pub fn sinks_by_name(&self) -> Vec<&SinkSpec> {
        let mut sinks: Vec<&SinkSpec> = self.sinks.iter().collect();
        sinks.sort_by(|a, b| a.name.cmp(&b.name));
        sinks
    }
}

/// The source of a flow. Exactly one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceSpec {
    /// A PostgreSQL database.
    pub postgres: PostgresSourceSpec,
}

/// A PostgreSQL source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PostgresSourceSpec {
    /// How to connect: a `postgres://` URL or a libpq key-value string, by reference. Resolved on the worker.
    pub dsn: SecretRef,
    /// The publication.
    pub publication: PublicationSpec,
    /// The replication slot.
    #[serde(default)]
    pub slot: SlotSpec,
    /// Whether existing rows are loaded first.
    pub snapshot: SnapshotMode,
    /// A transaction with more bytes than this goes to the side store instead of the log.
    #[serde(default = "default_large_transaction")]
    pub large_transaction_bytes: ByteSize,
    /// What may be done to the source.
    #[serde(default)]
    pub safety: SafetySpec,
}

fn default_large_transaction() -> ByteSize {
    ByteSize(64 << 20)
}

/// A secret by reference. Exactly one of the three.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SecretRef {
    /// The name of an environment variable of the worker.
    Env(String),
    /// The path of a file on the worker.
    File(String),
    /// The value itself. Stored as given: for trials only.
    Value(String),
}

/// What stands in the place of a literal secret wherever a document is shown.
pub const HIDDEN: &str = "(hidden)";

impl SecretRef {
    /// Replaces a literal value by [`HIDDEN`].
    pub fn hide(&mut self) {
        if let SecretRef::Value(value) = self {
            *value = HIDDEN.to_owned();
        }
    }
}

impl fmt::Debug for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretRef::Env(name) => write!(f, "env {name}"),
            SecretRef::File(path) => write!(f, "file {path}"),
            SecretRef::Value(_) => f.write_str("value (hidden)"),
        }
    }
}

/// The publication of a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublicationSpec {
    /// Its name; `wallaby_<flow>` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether WALlaby makes it, keeps its tables and drops it with the flow.
    #[serde(default = "yes")]
    pub create: bool,
    /// `schema.table` or `schema.*`; needed with `create`.
    #[serde(default)]
    pub tables: Vec<String>,
    /// Tables to leave out of a `schema.*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

fn yes() -> bool {
    true
}

/// The replication slot of a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SlotSpec {
    /// Its name; `wallaby_<flow>` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether WALlaby makes it and drops it with the flow.
    #[serde(default = "yes")]
    pub create: bool,
    /// Whether the slot follows to standbys (PG 17+): `auto` asks for it where the server can.
    #[serde(default)]
    pub failover: Failover,
}

impl Default for SlotSpec {
    fn default() -> Self {
        SlotSpec { name: None, create: true, failover: Failover::Auto }
    }
}

/// Whether the slot is a failover slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Failover {
    /// Where the server can.
    #[default]
    Auto,
    /// Always; an error on servers that cannot.
    On,
    /// Never.
    Off,
}

/// Whether existing rows are loaded before changes flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SnapshotMode {
    /// Load, then follow.
    Initial,
    /// Follow only: a table is ready when a sink first meets it.
    Never,
    /// Load, then stop: no slot is made and no change is captured.
    Only,
}

/// The bounds on what a flow may do to its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SafetySpec {
    /// Retained WAL above this raises `SlotHealthy=False`.
    #[serde(default = "default_retained_wal")]
    pub retained_wal_max: ByteSize,
    /// What then happens.
    #[serde(default)]
    pub on_exceeded: OnExceeded,
    /// The longest that a run may hold one snapshot: as long as it is held, vacuum cannot remove rows that died since.
    #[serde(default = "default_snapshot_max")]
    pub snapshot_max: Span,
}

fn default_snapshot_max() -> Span {
    Span(Duration::from_secs(30 * 60))
}

fn default_retained_wal() -> ByteSize {
    ByteSize(50 << 30)
}

impl Default for SafetySpec {
    fn default() -> Self {
        SafetySpec {
            retained_wal_max: default_retained_wal(),
            on_exceeded: OnExceeded::Alarm,
            snapshot_max: default_snapshot_max(),
        }
    }
}

/// What happens when the slot holds back more WAL than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnExceeded {
    /// A condition and a metric.
    #[default]
    Alarm,
    /// The same, and snapshot runs of the flow read nothing until the slot holds back less.
    PauseSnapshot,
}

/// The staged log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LogSpec {
    /// Copies: `auto` (3, or 1 where the cluster has fewer than three servers), 1, 3 or 5.
    pub replicas: Replicas,
    /// Reserved by the servers when the log is made; data stops 16 MiB below it.
    pub max_bytes: ByteSize,
    /// How long segments stay that no reader needs any more.
    pub replay_window: Span,
    /// When an acknowledgement counts as on disk.
    pub durability: Durability,
    /// How segments are packed.
    pub codec: crate::record::Codec,
    /// Where parts of large transactions and of the first load are kept.
    pub side_store: SideStoreSpec,
}

impl Default for LogSpec {
    fn default() -> Self {
        LogSpec {
            replicas: Replicas::Auto,
            max_bytes: ByteSize(10 << 30),
            replay_window: Span(Duration::from_secs(3600)),
            durability: Durability::Auto,
            codec: crate::record::Codec::Lz4,
            side_store: SideStoreSpec::default(),
        }
    }
}

impl LogSpec {
    /// The most bytes of large transactions in the side store.
    pub fn side_transactions_max(&self) -> ByteSize {
        let given = match &self.side_store {
            SideStoreSpec::Jetstream(spec) => spec.transactions_max,
            SideStoreSpec::ObjectStore(spec) => spec.transactions_max,
        };
        given.unwrap_or(self.max_bytes)
    }

    /// The most bytes of a load's chunks in the side store.
    pub fn side_chunks_max(&self) -> ByteSize {
        let given = match &self.side_store {
            SideStoreSpec::Jetstream(spec) => spec.chunks_max,
            SideStoreSpec::ObjectStore(spec) => spec.chunks_max,
        };
        given.unwrap_or(self.max_bytes)
    }
}

/// Where the side store is. Exactly one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SideStoreSpec {
    /// In streams beside the log, on the log's servers.
    Jetstream(JetStreamSideSpec),
    /// In an object store that all workers reach.
    ObjectStore(ObjectSideSpec),
}

impl Default for SideStoreSpec {
    fn default() -> Self {
        SideStoreSpec::Jetstream(JetStreamSideSpec::default())
    }
}

/// A side store in JetStream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct JetStreamSideSpec {
    /// Bytes for large transactions; as many as the log's when absent. Reserved when the first one comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transactions_max: Option<ByteSize>,
    /// Bytes for a load's chunks; as many as the log's when absent. Reserved while a load runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunks_max: Option<ByteSize>,
}

/// A side store in an object store. Credentials come from the workers' environment, never from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectSideSpec {
    /// `s3://<bucket>[/<prefix>]`, or `file:///<folder>` that all workers share.
    pub url: String,
    /// Bytes for large transactions; as many as the log's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transactions_max: Option<ByteSize>,
    /// Bytes for a load's chunks; as many as the log's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks_max: Option<ByteSize>,
}

/// The number of copies of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Replicas {
    /// `min(3, cluster size)`, as an odd number.
    #[default]
    Auto,
    /// This many.
    Exactly(u8),
}

impl Serialize for Replicas {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Replicas::Auto => serializer.serialize_str("auto"),
            Replicas::Exactly(count) => serializer.serialize_u8(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(count @ (1 | 3 | 5)) => Ok(Replicas::Exactly(count as u8)),
            Raw::Text(text) if text == "auto" => Ok(Replicas::Auto),
            _ => Err(serde::de::Error::custom("log.replicas must be auto, 1, 3 or 5")),
        }
    }
}

/// When a log record counts as durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Durability {
    /// The servers sync every write, or the acknowledgement is older than twice their sync interval.
    #[default]
    Auto,
}

/// One sink.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SinkSpec {
    /// Its id inside the flow.
    pub name: SinkId,
    /// A PostgreSQL database.
    pub postgres: PostgresSinkSpec,
    /// What happens when the sink falls behind the log.
    #[serde(default)]
    pub on_overrun: OnOverrun,
    /// True stops this sink's task alone; the log holds what it still needs, as `on_overrun` allows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// A PostgreSQL sink.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PostgresSinkSpec {
    /// How to connect, by reference. Resolved on the worker.
    pub dsn: SecretRef,
    /// The schema at the sink; `{{ .schema }}` is the source's.
    #[serde(default = "default_schema_template")]
    pub schema: String,
    /// How rows are kept. Only `upsert` for now.
    #[serde(default)]
    pub mode: SinkMode,
}

fn default_schema_template() -> String {
    "{{ .schema }}".to_owned()
}

/// How a sink keeps rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SinkMode {
    /// The source's state: updates update, deletes delete.
    #[default]
    Upsert,
}

/// What happens when a sink needs more of the log than it can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnOverrun {
    /// It alone is cut off from the log, and loads everything anew.
    #[default]
    Detach,
    /// The flow waits for it.
    Backpressure,
}

impl FlowDocument {
    /// The name of the flow's slot.
    pub fn slot_name(&self) -> String {
        self.spec.source.postgres.slot.name.clone().unwrap_or_else(|| self.metadata.name.slot_name())
    }

    /// The name of the flow's publication.
    pub fn publication_name(&self) -> String {
        self.spec.source.postgres.publication.name.clone().unwrap_or_else(|| self.metadata.name.slot_name())
    }

    /// The document as the YAML that [`parse()`] reads back to the same document.
    ///
    /// # Errors
    /// Never for a document that passed [`check`]; the serialiser's message otherwise.
    pub fn to_yaml(&self) -> Result<String, serde_yaml_ng::Error> {
        // Through a JSON value: the YAML serialiser would write the kinds of a secret as tags (`!env`).
        let value = serde_json::to_value(self).map_err(<serde_yaml_ng::Error as serde::ser::Error>::custom)?;
        serde_yaml_ng::to_string(&value)
    }

    /// The same document with every literal secret replaced by [`HIDDEN`], for showing.
    pub fn without_secrets(mut self) -> FlowDocument {
        self.spec.source.postgres.dsn.hide();
        for sink in &mut self.spec.sinks {
            sink.postgres.dsn.hide();
        }
        self
    }
}

/// A number of bytes: `64Mi`, `10Gi`, `500k`, `1024`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let factor: Option<u64> = match &text[digits..] {
            "" => Some(1),
            "k" => Some(1_000),
            "M" => Some(1_000_000),
            "G" => Some(1_000_000_000),
            "T" => Some(1_000_000_000_000),
            "Ki" => Some(1 << 10),
            "Mi" => Some(1 << 20),
            "Gi" => Some(1 << 30),
            "Ti" => Some(1 << 40),
            _ => None,
        };
        let number = text[..digits].parse::<u64>().ok();
        match (number, factor) {
            (Some(number), Some(factor)) => number.checked_mul(factor).map(ByteSize),
            _ => None,
        }
        .ok_or_else(|| {
            format!("{text:?} is not a size: write a whole number with k, M, G, T, Ki, Mi, Gi or Ti, as in 64Mi")
        })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(bytes) => Ok(ByteSize(bytes)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// A length of time: `1h`, `30m`, `10s`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let unit_ms: Option<u64> = match &text[digits..] {
            "ms" => Some(1),
            "s" => Some(1_000),
            "m" => Some(60_000),
            "h" => Some(3_600_000),
            "d" => Some(86_400_000),
            _ => None,
        };
        let number = text[..digits].parse::<u64>().ok();
        match (number, unit_ms) {
            (Some(number), Some(unit_ms)) => number.checked_mul(unit_ms).map(|ms| Span(Duration::from_millis(ms))),
            _ => None,
        }
        .ok_or_else(|| {
            format!("{text:?} is not a length of time: write a whole number with ms, s, m, h or d, as in 30m")
        })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        for (unit_ms, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
            if ms != 0 && ms.is_multiple_of(unit_ms) {
                return write!(f, "{}{unit}", ms / unit_ms);
            }
        }
        write!(f, "{ms}ms")
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
