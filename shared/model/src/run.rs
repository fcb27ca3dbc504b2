//! Snapshot runs: what is asked, what is planned, what is done. These stand in etcd (protocol.md, "etcd", `runs/<N>`), each key with
//! one writer at a time:
//!
//! | key | type | written by |
//! |---|---|---|
//! | `runs/<N>/spec` | [`RunSpec`] | the controller; the capture task, or the apply task that first meets a table, for tables that came or were replaced |
//! | `runs/<N>/plan` | [`RunPlan`] | the run task, guarded by its lock |
//! | `runs/<N>/chunks/<K>` | [`ChunkDone`] | the chunk task, once, guarded by its lock |
//! | `runs/<N>/lost/<K>` | `true` | a load or apply task that misses a part of the chunk, guarded by its lock |
//! | `runs/<N>/loaded/<sink>/<K>` | [`ChunkLoaded`] | the load task: a hint, the truth is in the sink |
//! | `runs/<N>/sinks/<sink>` | [`SinkRun`] | the apply task, guarded by its lock |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::condition::Timestamp;
use crate::ids::{ChunkId, Epoch, SinkId, WorkerId};
use crate::position::{Lsn, Position};
use crate::schema::TableName;

/// Why a run exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunReason {
    /// The flow was made with `snapshot: initial` or `only`.
    FirstLoad,
    /// Tables were added to a live flow.
    TablesAdded,
    /// Tables are other ones than those that had their names: dropped and made again, or renamed.
    TablesReplaced,
    /// Somebody asked: tables that a sink has are emptied there and loaded anew.
    Asked,
    /// A sink was added to a flow that loads, or fell past its hold: it loads everything anew.
    SinkAnew,
}

/// What is wanted of a run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RunWish {
    /// Go on.
    #[default]
    Go,
    /// Start no further chunk; what is done stays done. The exporting session is given up.
    Pause,
    /// End it; what was loaded of tables that are not ready is of no use.
    Cancel,
}

/// What is asked of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Why.
    pub reason: RunReason,
    /// `schema.table` or `schema.*`; empty: every published table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// Tables of these that are left out: `schema.table` or `schema.*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// The sinks that load. Whoever asks leaves it empty for all of them; what is stored names each ([`RunSpec::of_sinks`]).
    #[serde(default)]
    pub sinks: Vec<SinkId>,
    /// What is wanted of it now.
    #[serde(default)]
    pub wish: RunWish,
    /// At most this many rows a second are read from the source, all workers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_per_second: Option<u64>,
    /// At most this many chunks are read at a time.
    pub readers: u32,
    /// When it was asked for.
    pub created_at: Timestamp,
}

impl RunSpec {
    /// The same for these sinks, the flow's as the run is made, when it is for all of them. One that is added later is none of them: it
    /// has a run of its own.
    #[must_use]
    pub fn of_sinks<'a>(mut self, all: impl IntoIterator<Item = &'a SinkId>) -> RunSpec {
        if self.sinks.is_empty() {
            self.sinks = all.into_iter().cloned().collect();
        }
        self
    }

    /// Whether the run loads into a sink of the flow.
    pub fn loads_into(&self, sink: &SinkId) -> bool {
        self.sinks.is_empty() || self.sinks.contains(sink)
    }

    /// Whether it is a run of a table.
    pub fn is_of(&self, table: &TableName) -> bool {
        let name = pattern_of(table);
        let has = |patterns: &[String]| patterns.iter().any(|pattern| covers(pattern, &name));
        (self.tables.is_empty() || has(&self.tables)) && !has(&self.exclude)
    }

    /// How many chunks may be read at a time: fewer than `readers`, when each would read more than its share with one row a second.
    pub fn readers_at_once(&self) -> u64 {
        u64::from(self.readers).min(self.rows_per_second.unwrap_or(u64::MAX)).max(1)
    }

    /// Whether two runs load into a sink that they share.
    pub fn shares_a_sink(&self, other: &RunSpec) -> bool {
        self.sinks.is_empty() || other.sinks.is_empty() || self.sinks.iter().any(|sink| other.sinks.contains(sink))
    }

    /// What both runs would load into the same sink: a table, a `schema.*`, or `*` for everything.
    pub fn overlap(&self, other: &RunSpec) -> Option<String> {
        if !self.shares_a_sink(other) {
            return None;
        }
        let everything = [String::from("*")];
        let of = |spec: &RunSpec| if spec.tables.is_empty() { everything.to_vec() } else { spec.tables.clone() };
        let is_left_out =
            |table: &str| [self, other].iter().any(|run| run.exclude.iter().any(|out| covers(out, table)));
        let theirs = of(other);
        let common = |mine: String| theirs.iter().find_map(|their| narrower(&mine, their).map(str::to_owned));
        of(self).into_iter().filter_map(common).find(|table| !is_left_out(table))
    }

    /// Whether, at a sink that both load into, a run must wait until another one, made before it, is done there: they load the same
    /// tables, or the other one first brings the sink to life. Other sinks of the run do not wait with it.
    pub fn waits_for(&self, earlier: &RunSpec) -> bool {
        let brings_to_life = matches!(earlier.reason, RunReason::FirstLoad | RunReason::SinkAnew);
        (brings_to_life && self.shares_a_sink(earlier)) || self.overlap(earlier).is_some()
    }
}

/// A table as a run's list of tables has it.
pub fn pattern_of(table: &TableName) -> String {
    if [&table.schema, &table.name].iter().any(|part| part.contains(['.', '"', '*'])) {
        table.quoted()
    } else {
        table.to_string()
    }
}

/// Whether `schema.table` or `schema.*` (or `*`, everything) has all of `table`, which is of the same forms.
pub fn covers(pattern: &str, table: &str) -> bool {
    if pattern == "*" || pattern == table {
        return true;
    }
    let (Some(schema), Some((of, _))) = (pattern.strip_suffix(".*"), table.split_once('.')) else { return false };
    schema == of
}

/// The smaller of two patterns, when one lies inside the other; patterns that only touch do not exist.
fn narrower<'a>(a: &'a str, b: &'a str) -> Option<&'a str> {
    match (covers(a, b), covers(b, a)) {
        (true, _) => Some(b),
        (_, true) => Some(a),
        _ => None,
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RunState {
    /// Publication, slot, snapshot and plan are being made.
    #[default]
    Planning,
    /// Chunks are read, and loaded by the sinks.
    Reading,
    /// Every chunk is read; sinks load and catch up.
    Loading,
    /// Every sink took every table over.
    Done,
    /// Somebody cancelled it.
    Cancelled,
}

impl RunState {
    /// Whether nothing more comes of it.
    pub fn is_over(self) -> bool {
        matches!(self, RunState::Done | RunState::Cancelled)
    }
}

/// One export of a snapshot. Chunks that were read under it hold what was committed before its consistent point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Counts from 1.
    pub number: u32,
    /// C: changes with a commit LSN at or above it are not in the snapshot.
    pub consistent_point: Lsn,
    /// The exported snapshot's name while its session lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// When it was exported.
    pub exported_at: Timestamp,
}

/// What becomes of a relation in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RelationState {
    /// Its chunks are read.
    #[default]
    Reading,
    /// It was dropped, or left the publication, while the run went on: nothing more is read of it.
    Gone,
}

/// One relation that is read: a table, or a leaf of a partitioned one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedRelation {
    /// The table as the publication sends it, and as sinks know it.
    pub table: TableName,
    /// The relation that is read: the same, or a partition of it.
    pub relation: TableName,
    /// Its oid.
    pub oid: u32,
    /// The oid of the table; 0 in a plan of a version that did not note it.
    #[serde(default)]
    pub table_oid: u32,
    /// Its relfilenode when it was planned: another one means that it was rewritten.
    pub relfilenode: u32,
    /// Its pages when it was planned. The last chunk's range is open, so rows beyond are not lost.
    pub pages: u32,
    /// Pages of one chunk.
    pub chunk_pages: u32,
    /// How often it was started again.
    #[serde(default)]
    pub restart: u32,
    /// What becomes of it.
    #[serde(default)]
    pub state: RelationState,
    /// Rows by the planner's statistics; none when it was never analysed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_estimate: Option<u64>,
    /// Whether the table has a key by which a sink finds rows: only then chunks of several generations may be mixed.
    pub has_key: bool,
}

impl PlannedRelation {
    /// The number of its chunks; at least one, so that an empty table is made at the sinks too.
    pub fn chunks(&self) -> u32 {
        self.pages.div_ceil(self.chunk_pages.max(1)).max(1)
    }

    /// The pages of a chunk: from the first to before the second; `None` for an open end.
    pub fn pages_of(&self, number: u32) -> (u32, Option<u32>) {
        let from = number.saturating_mul(self.chunk_pages);
        let is_last = number + 1 >= self.chunks();
        (from, (!is_last).then(|| from.saturating_add(self.chunk_pages)))
    }
}

/// The plan of a run, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RunPlan {
    /// Where it stands.
    pub state: RunState,
    /// The exports so far, oldest first.
    #[serde(default)]
    pub generations: Vec<Generation>,
    /// What is read. Chunk ids point into this list; entries are only appended.
    #[serde(default)]
    pub relations: Vec<PlannedRelation>,
    /// What it waits for, or why it ended, as a sentence.
    #[serde(default)]
    pub message: String,
    /// The epoch of the owner that wrote this.
    #[serde(default)]
    pub epoch: Epoch,
    /// When this was written.
    #[serde(default)]
    pub at: Timestamp,
    /// What was read, kept once the run is over and its chunks' keys are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totals: Option<RunTotals>,
}

/// What a run has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RunTotals {
    /// Chunks, those of relations that were started again included.
    pub chunks: u64,
    /// Their rows.
    pub rows: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
}

impl RunPlan {
    /// The chunks that make the run whole, in order.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkId> + '_ {
        self.relations.iter().enumerate().filter(|(_, relation)| relation.state == RelationState::Reading).flat_map(
            |(index, relation)| {
                let table = u32::try_from(index).unwrap_or(u32::MAX);
                (0..relation.chunks()).map(move |number| ChunkId { table, restart: relation.restart, number })
            },
        )
    }

    /// Whether a chunk is one of them: neither of an earlier start of its relation, nor of one that is gone.
    pub fn has(&self, chunk: ChunkId) -> bool {
        self.relations.get(chunk.table as usize).is_some_and(|relation| {
            relation.restart == chunk.restart
                && relation.state == RelationState::Reading
                && chunk.number < relation.chunks()
        })
    }

    /// The oid of a table as it was planned last; `None` when it was not, was gone by then, or its oid was not noted.
    pub fn table_oid(&self, table: &TableName) -> Option<u32> {
        let is_it = |relation: &&PlannedRelation| relation.table == *table && relation.state != RelationState::Gone;
        let last = self.relations.iter().rev().find(is_it)?;
        (last.table_oid != 0).then_some(last.table_oid)
    }

    /// The export that chunks can be read under now.
    pub fn snapshot(&self) -> Option<&Generation> {
        self.generations.last().filter(|generation| generation.snapshot.is_some())
    }
}

/// A chunk that is whole in the side store. Written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkDone {
    /// Whose parts these are: the epoch of the chunk task that wrote them.
    pub attempt: Epoch,
    /// C of the snapshot that it was read under.
    pub consistent_point: Lsn,
    /// Its parts, numbered from 0; at least one, whose segment says the table's shape.
    pub parts: u32,
    /// Rows.
    pub rows: u64,
    /// Bytes as stored.
    pub bytes: u64,
    /// XXH64 with seed 0 over the checksums (XXH64, seed 0, little endian) of its parts in order.
    pub checksum: u64,
    /// Who read it.
    pub worker: WorkerId,
    /// How long that took, in milliseconds.
    pub took_ms: u64,
}

/// A chunk that a sink has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkLoaded {
    /// Rows.
    pub rows: u64,
    /// Who loaded it.
    pub worker: WorkerId,
}

/// What a sink makes of a table in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableStage {
    /// Chunks are loaded.
    Copying,
    /// The log is replayed for it.
    CatchingUp,
    /// It is part of the sink's main stream.
    Ready,
    /// The table is gone at the source; the sink keeps what it has.
    Gone,
}

/// How far a sink is in a run.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SinkRun {
    /// The tables of the run at this sink.
    pub tables: BTreeMap<String, TableStage>,
    /// Where each table was handed over.
    #[serde(default)]
    pub handed_over: BTreeMap<String, Position>,
    /// Everything is handed over: the run is no longer needed here.
    pub is_done: bool,
    /// Indexes, constraints and defaults were added, as far as they can be.
    #[serde(default)]
    pub is_finished: bool,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn relation(pages: u32, chunk_pages: u32) -> PlannedRelation {
        let table = TableName::new("public", "t");
        PlannedRelation {
            relation: table.clone(),
            table,
            oid: 1,
            table_oid: 0,
            relfilenode: 1,
            pages,
            chunk_pages,
            restart: 0,
            state: RelationState::Reading,
            rows_estimate: None,
            has_key: true,
        }
    }

    #[test]
    fn a_run_is_of_a_table_also_where_its_name_has_a_dot() {
        let of = |tables: &[&str], exclude: &[&str]| asked(tables, exclude, &[]);
        let (plain, odd) = (TableName::new("public", "t"), TableName::new("public", "a.b"));
        let by_name = of(&[&pattern_of(&plain), &pattern_of(&odd)], &[]);
        assert!(by_name.is_of(&plain) && by_name.is_of(&odd) && !by_name.is_of(&TableName::new("public", "u")));
        assert!(of(&[], &[]).is_of(&odd));
        assert!(of(&["public.*"], &["public.u"]).is_of(&plain) && !of(&["public.*"], &["public.t"]).is_of(&plain));
    }

    #[test]
    fn chunks_cover_every_page_once_and_the_last_is_open() {
        for (pages, chunk_pages) in [(0, 10), (1, 10), (10, 10), (11, 10), (29, 10), (30, 10), (5, 0)] {
            let relation = relation(pages, chunk_pages);
            let mut next = 0;
            for number in 0..relation.chunks() {
                let (from, to) = relation.pages_of(number);
                assert_eq!(from, next);
                assert_eq!(to.is_none(), number + 1 == relation.chunks());
                next = to.unwrap_or(u32::MAX);
            }
            assert_eq!(next, u32::MAX);
        }
    }

    fn asked(tables: &[&str], exclude: &[&str], sinks: &[&str]) -> RunSpec {
        let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        RunSpec {
            reason: RunReason::Asked,
            tables: texts(tables),
            exclude: texts(exclude),
            sinks: sinks.iter().map(|sink| SinkId::new(*sink).unwrap()).collect(),
            wish: RunWish::Go,
            rows_per_second: None,
            readers: 2,
            created_at: Timestamp(0),
        }
    }

    #[test]
    fn runs_overlap_where_they_load_one_table_into_one_sink() {
        let all = asked(&[], &[], &[]);
        let shop = asked(&["shop.*"], &["shop.log"], &["a"]);
        for (other, common) in [
            (asked(&[], &[], &["b"]), None),
            (asked(&[], &[], &["a", "b"]), Some("shop.*")),
            (asked(&["shop.orders"], &[], &[]), Some("shop.orders")),
            (asked(&["shop.log"], &[], &[]), None),
            (asked(&["shop2.orders", "public.shop"], &[], &[]), None),
            (asked(&["shop.*"], &["shop.*"], &[]), None),
        ] {
            assert_eq!(shop.overlap(&other).as_deref(), common, "{other:?}");
            assert_eq!(other.overlap(&shop).as_deref(), common, "{other:?}");
        }
        assert_eq!(all.overlap(&all).as_deref(), Some("*"));
    }

    #[test]
    fn nothing_overtakes_the_load_that_brings_a_sink_to_life() {
        let first = RunSpec { reason: RunReason::FirstLoad, ..asked(&["public.*"], &[], &[]) };
        let other = asked(&["shop.a"], &[], &["a"]);
        assert!(other.waits_for(&first) && !other.waits_for(&asked(&["shop.b"], &[], &["a"])));
        assert!(!other.waits_for(&RunSpec { sinks: vec![SinkId::new("b").unwrap()], ..first }));
    }

    #[test]
    fn a_plan_survives_json() {
        let plan = RunPlan { relations: vec![relation(25, 10)], ..RunPlan::default() };
        assert_eq!(plan.chunks().count(), 3);
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<RunPlan>(&text).unwrap(), plan);
    }
}
