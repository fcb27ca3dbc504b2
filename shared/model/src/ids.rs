//! Names of flows, sinks, tasks and workers, and the epoch that fences them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text breaks the rule for names that users choose.
    #[error(
        "{text:?} is not a valid {what} name: use 1 to 40 lower-case letters, digits and dashes, starting with a letter and not ending with a dash"
    )]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The refused text.
        text: String,
    },
    /// The text is not a task id.
    #[error(
        "{0:?} is not a task id: expected <flow>.capture, <flow>.apply.<sink>, <flow>.run.<run>, <flow>.chunk.<run>.<chunk>, <flow>.load.<sink>.<run>.<chunk> or <flow>.verify.<operation>"
    )]
    Task(String),
    /// The text is not a run's number.
    #[error("{0:?} is not the number of a snapshot run: expected a whole number from 1 on")]
    Run(String),
    /// The text is not a chunk's id.
    #[error("{0:?} is not a chunk id: expected <table>-<restart>-<number>")]
    Chunk(String),
    /// The text is not a reader of the log.
    #[error("{0:?} is not a reader of the log: expected a sink's name, or run.<number>")]
    Reader(String),
    /// The text is not a worker id.
    #[error("{0:?} is not a worker id: use 1 to 63 letters, digits, dashes, dots and underscores")]
    Worker(String),
}

/// `[a-z]([a-z0-9-]{0,38}[a-z0-9])?`
fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inside = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=40).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes[bytes.len() - 1] != b'-'
        && bytes.iter().all(inside)
}

macro_rules! name_type {
    ($name:ident, $what:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name.
            ///
            /// # Errors
            /// When `text` breaks the rule for names.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                if is_name(&text) { Ok(Self(text)) } else { Err(IdError::Name { what: $what, text }) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(
    FlowId,
    "flow",
    "The id of a flow. It ends up in a slot name, a JetStream stream name, a subject token and an etcd key."
);
name_type!(SinkId, "sink", "The id of a sink inside its flow.");
name_type!(PoolId, "pool", "The id of a pool of workers: offers made to a pool are pulled by its workers only.");

impl FlowId {
    /// The replication slot and publication of this flow when it makes its own: `wallaby_<flow>`, `-` as `_`.
    pub fn slot_name(&self) -> String {
        format!("wallaby_{}", self.0.replace('-', "_"))
    }

    /// The JetStream stream of the flow's log.
    pub fn log_stream(&self) -> String {
        format!("LOG_{}", self.0)
    }
}

/// What a task does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TaskKind {
    /// Reads the WAL and writes the log; one per flow.
    Capture,
    /// Reads the log and writes one sink.
    Apply(SinkId),
    /// Owns a snapshot run: its slot, its exporting session, its plan.
    Run(RunId),
    /// Reads one chunk of a run from the source into the side store. Short.
    Chunk(RunId, ChunkId),
    /// Loads one chunk of a run from the side store into a sink. Short.
    Load(SinkId, RunId, ChunkId),
    /// Compares the source with a sink, once; the number of its operation.
    Verify(u32),
}

/// The unit of leasing. Text form `<flow>.capture`, `<flow>.apply.<sink>`, `<flow>.run.<run>`, `<flow>.chunk.<run>.<chunk>`,
/// `<flow>.load.<sink>.<run>.<chunk>`, `<flow>.verify.<operation>`: fit for etcd keys and NATS subjects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId {
    /// The flow it belongs to.
    pub flow: FlowId,
    /// What it does.
    pub kind: TaskKind,
}

impl TaskId {
    /// The capture task of a flow.
    pub fn capture(flow: &FlowId) -> TaskId {
        TaskId { flow: flow.clone(), kind: TaskKind::Capture }
    }

    /// The apply task of one sink.
    pub fn apply(flow: &FlowId, sink: &SinkId) -> TaskId {
        TaskId { flow: flow.clone(), kind: TaskKind::Apply(sink.clone()) }
    }

    /// `wallaby/<first 16 hex of SHA-256 of the task id>/`: the prefix of the `application_name` of every Postgres
    /// session of this task, at the source and at a sink (Postgres cuts names at 63 bytes).
    pub fn session_prefix(&self) -> String {
        let digest = Sha256::digest(self.to_string().as_bytes());
        let mut hex = String::with_capacity(16);
        for byte in &digest[..8] {
            hex.push_str(&format!("{byte:02x}"));
        }
        format!("wallaby/{hex}/")
    }

    /// The `application_name` of this task's sessions under one epoch.
    pub fn session_name(&self, epoch: Epoch) -> String {
        format!("{}{}", self.session_prefix(), epoch)
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            TaskKind::Capture => write!(f, "{}.capture", self.flow),
            TaskKind::Apply(sink) => write!(f, "{}.apply.{}", self.flow, sink),
            TaskKind::Run(run) => write!(f, "{}.run.{}", self.flow, run),
            TaskKind::Chunk(run, chunk) => write!(f, "{}.chunk.{}.{}", self.flow, run, chunk),
            TaskKind::Load(sink, run, chunk) => write!(f, "{}.load.{}.{}.{}", self.flow, sink, run, chunk),
            TaskKind::Verify(operation) => write!(f, "{}.verify.{}", self.flow, operation),
        }
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TaskId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || IdError::Task(text.to_owned());
        let parts: Vec<&str> = text.split('.').collect();
        let (name, rest) = parts.split_first().ok_or_else(bad)?;
        let flow = FlowId::new(*name).map_err(|_| bad())?;
        let kind = match rest {
            ["capture"] => TaskKind::Capture,
            ["apply", sink] => TaskKind::Apply(SinkId::new(*sink).map_err(|_| bad())?),
            ["run", run] => TaskKind::Run(run.parse().map_err(|_| bad())?),
            ["chunk", run, chunk] => {
                TaskKind::Chunk(run.parse().map_err(|_| bad())?, chunk.parse().map_err(|_| bad())?)
            }
            ["load", sink, run, chunk] => TaskKind::Load(
                SinkId::new(*sink).map_err(|_| bad())?,
                run.parse().map_err(|_| bad())?,
                chunk.parse().map_err(|_| bad())?,
            ),
            ["verify", operation] => TaskKind::Verify(operation.parse().map_err(|_| bad())?),
            _ => return Err(bad()),
        };
        Ok(TaskId { flow, kind })
    }
}

impl Serialize for TaskId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TaskId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The number of a snapshot run inside its flow, from 1. A table's *run number* also tells its loads apart at a sink.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub u32);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run {}", self.0)
    }
}

impl FromStr for RunId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match number(text) {
            Some(number) if number > 0 => Ok(RunId(number)),
            _ => Err(IdError::Run(text.to_owned())),
        }
    }
}

/// Who still needs a part of the log, as its hold is named. Text form: the sink's name, or `run.<number>` (no sink's name has
/// a dot).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reader {
    /// A sink: its apply task reads.
    Sink(SinkId),
    /// A snapshot run: its tables' changes since the copy are replayed at the sinks.
    Run(RunId),
}

impl From<SinkId> for Reader {
    fn from(sink: SinkId) -> Reader {
        Reader::Sink(sink)
    }
}

impl From<&SinkId> for Reader {
    fn from(sink: &SinkId) -> Reader {
        Reader::Sink(sink.clone())
    }
}

impl From<RunId> for Reader {
    fn from(run: RunId) -> Reader {
        Reader::Run(run)
    }
}

impl From<&Reader> for Reader {
    fn from(reader: &Reader) -> Reader {
        reader.clone()
    }
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reader::Sink(sink) => write!(f, "{sink}"),
            Reader::Run(run) => write!(f, "run.{run}"),
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Reader {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || IdError::Reader(text.to_owned());
        match text.strip_prefix("run.") {
            Some(run) => run.parse().map(Reader::Run).map_err(|_| bad()),
            None => SinkId::new(text).map(Reader::Sink).map_err(|_| bad()),
        }
    }
}

impl Serialize for Reader {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A chunk of a run: a range of pages of one relation of its plan. Text form `<table>-<restart>-<number>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// Index of the relation in the run's plan.
    pub table: u32,
    /// How often the relation was started again from nothing (it was rewritten, or its rows may not be mixed).
    pub restart: u32,
    /// The chunk's number in the relation, from 0.
    pub number: u32,
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.table, self.restart, self.number)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {self}")
    }
}

impl FromStr for ChunkId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || IdError::Chunk(text.to_owned());
        let parts: Vec<Option<u32>> = text.split('-').map(number).collect();
        match parts.as_slice() {
            [Some(table), Some(restart), Some(number)] => {
                Ok(ChunkId { table: *table, restart: *restart, number: *number })
            }
            _ => Err(bad()),
        }
    }
}

impl Serialize for ChunkId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChunkId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Digits only, as we write them: one text for one number.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// The id of a worker process: unique in the pool, a new one for every start.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(String);

impl WorkerId {
    /// Checks and takes an id.
    ///
    /// # Errors
    /// When `text` is empty, longer than 63 bytes, or has characters unfit for a key.
    pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
        let text = text.into();
        let fit = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if (1..=63).contains(&text.len()) && text.bytes().all(fit) {
            Ok(Self(text))
        } else {
            Err(IdError::Worker(text))
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The fencing token of one ownership of a task. Only ever compared; a higher one is the younger owner.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// Tells two owners of one epoch apart (possible only after etcd was restored from a backup).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub uuid::Uuid);

impl Nonce {
    /// A fresh random nonce.
    pub fn random() -> Nonce {
        Nonce(uuid::Uuid::new_v4())
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.simple())
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Nonce {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        uuid::Uuid::parse_str(text).map(Nonce)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        for good in ["a", "shop", "a-b", "a1", &"a".repeat(40)] {
            assert!(FlowId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "1a", "A", "a_b", "a.b", "ä", &"a".repeat(41)] {
            assert!(FlowId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn task_ids_round_trip() {
        let flow = FlowId::new("shop").unwrap();
        let sink = SinkId::new("warehouse").unwrap();
        let chunk = ChunkId { table: 3, restart: 0, number: 17 };
        let kinds = [
            TaskKind::Capture,
            TaskKind::Apply(sink.clone()),
            TaskKind::Run(RunId(2)),
            TaskKind::Chunk(RunId(2), chunk),
            TaskKind::Load(sink, RunId(2), chunk),
            TaskKind::Verify(9),
        ];
        for kind in kinds {
            let task = TaskId { flow: flow.clone(), kind };
            assert_eq!(task.to_string().parse::<TaskId>().unwrap(), task);
        }
        for bad in [
            "shop",
            "shop.apply",
            "shop.capture.x",
            "shop.run",
            "shop.run.0",
            "shop.run.01",
            "shop.chunk.1",
            "shop.chunk.1.2-3",
            "shop.load.a.1.+2-3-4",
            "Shop.capture",
        ] {
            assert!(bad.parse::<TaskId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn readers_round_trip_and_no_sink_is_taken_for_a_run() {
        let sink = SinkId::new("run").unwrap();
        for reader in [Reader::Sink(sink), Reader::Run(RunId(3))] {
            assert_eq!(reader.to_string().parse::<Reader>().unwrap(), reader);
        }
        for bad in ["", "run.", "run.0", "run.03", "run.3.4", "a.b", "A"] {
            assert!(bad.parse::<Reader>().is_err(), "{bad}");
        }
    }

    #[test]
    fn session_names_fit_into_an_application_name() {
        let flow = FlowId::new("a".repeat(40)).unwrap();
        let name = TaskId::capture(&flow).session_name(Epoch(u64::MAX));
        assert!(name.len() <= 63, "{name}");
    }
}
