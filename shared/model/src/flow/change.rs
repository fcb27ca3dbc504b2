//! What a change of a flow's specification does: to each of its tasks, and to the rows that are there already. Pure, and used
//! by whoever shows it (`wallaby diff`) and by whoever does it (the flow store), so that they cannot disagree.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use crate::condition::Timestamp;
use crate::flow::{FlowDocument, FlowSpec, HIDDEN, Problem, PublicationSpec, SinkSpec, SnapshotMode};
use crate::ids::{RunId, SinkId};
use crate::run::{RunReason, RunSpec, RunWish};

/// One key of the flow file that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// Where, as in `spec.sinks[warehouse].paused`.
    pub path: String,
    /// What it was, as JSON; none when it was not there. Secrets are hidden.
    pub before: Option<String>,
    /// What it becomes, as JSON; none when it is taken away.
    pub after: Option<String>,
}

/// What becomes of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is made.
    Created,
    /// Its owner closes its connections and begins again where it was: about a second.
    Restarts,
    /// It is ended, with what belongs to it.
    Removed,
    /// It stops, and keeps where it was.
    Paused,
    /// It goes on where it was.
    Resumed,
}

impl Effect {
    /// One word for programs.
    pub fn word(self) -> &'static str {
        match self {
            Effect::Created => "CREATED",
            Effect::Restarts => "RESTARTS",
            Effect::Removed => "REMOVED",
            Effect::Paused => "PAUSED",
            Effect::Resumed => "RESUMED",
        }
    }
}

/// What of a flow is under way beside the tasks that never end by themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnderWay {
    /// Snapshot runs that go on.
    pub runs: Vec<RunUnderWay>,
    /// Comparisons that are not over.
    pub comparisons: Vec<ComparisonUnderWay>,
}

/// A snapshot run that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunUnderWay {
    /// Its number.
    pub run: RunId,
    /// The sinks that it loads.
    pub sinks: Vec<SinkId>,
    /// Whether somebody paused it by itself: it stands still whatever becomes of the flow.
    pub is_paused: bool,
    /// Whether it holds a snapshot that chunks are read under. One that is read whole does not.
    pub holds_snapshot: bool,
}

/// A comparison that is not over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComparisonUnderWay {
    /// The number of its operation.
    pub number: u32,
    /// The sink that is compared with the source.
    pub sink: SinkId,
}

/// What becomes of one task, or of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeEffect {
    /// `capture`, `sink warehouse`, `run` (a new one), `run 3`, `comparison 2`.
    pub subject: String,
    /// What becomes of it.
    pub effect: Effect,
    /// The same as a sentence, with the reason.
    pub message: String,
}

/// What a change of a flow does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowChange {
    /// The keys that differ.
    pub changes: Vec<FieldChange>,
    /// What becomes of each task; tasks that go on as they are are not listed.
    pub effects: Vec<ChangeEffect>,
    /// What a flow that is there cannot take, and what to do instead. The change is refused when there is any.
    pub refused: Vec<Problem>,
}

/// What making `after`, or changing `before` into it, does, also to what is `under_way`.
pub fn flow_change(before: Option<&FlowDocument>, after: &FlowDocument, under_way: &UnderWay) -> FlowChange {
    let refused = before.map(|before| before.refused_changes(after)).unwrap_or_default();
    let mut effects = effects_on_tasks(before.map(|before| &before.spec), &after.spec);
    if let Some(before) = before {
        effects.extend(effects_on_what_is_under_way(&before.spec, &after.spec, under_way));
    }
    let runs = planned_runs(before.map(|before| &before.spec), &after.spec, Timestamp(0));
    effects.extend(runs.iter().map(|run| effect("run", Effect::Created, run_text(run, &after.spec))));
    FlowChange { changes: field_changes(before, after), effects, refused }
}

fn effect(subject: impl Into<String>, effect: Effect, message: impl Into<String>) -> ChangeEffect {
    ChangeEffect { subject: subject.into(), effect, message: message.into() }
}

fn run_text(run: &RunSpec, flow: &FlowSpec) -> String {
    let mut tables = if run.tables.is_empty() { "every captured table".to_owned() } else { run.tables.join(", ") };
    if !run.exclude.is_empty() {
        tables = format!("{tables} without {}", run.exclude.join(", "));
    }
    let is_of_all = flow.sinks.iter().all(|sink| run.sinks.contains(&sink.name));
    let sinks: Vec<&str> = run.sinks.iter().map(SinkId::as_str).collect();
    let sinks = match run.reason {
        RunReason::FirstLoad | RunReason::TablesAdded if is_of_all => "every sink".to_owned(),
        _ => sinks.join(", "),
    };
    let why = match run.reason {
        RunReason::FirstLoad => "the flow is loaded for the first time",
        RunReason::TablesAdded => "tables are added",
        RunReason::TablesReplaced => "tables are other ones than they were",
        RunReason::Asked => "it is asked for",
        RunReason::SinkAnew => "the sink is new",
    };
    format!("a snapshot run loads {tables} into {sinks}: {why}")
}

fn effects_on_tasks(before: Option<&FlowSpec>, after: &FlowSpec) -> Vec<ChangeEffect> {
    let mut effects = Vec::new();
    let captures = |spec: &FlowSpec| spec.source.postgres.snapshot != SnapshotMode::Only;
    let Some(before) = before else {
        if captures(after) {
            effects.push(effect(
                "capture",
                Effect::Created,
                "slot, publication and log are made, and changes are captured",
            ));
        }
        let made = |sink: &SinkSpec| effect(sink_subject(sink), Effect::Created, "it follows the flow");
        effects.extend(after.sinks.iter().map(made));
        return effects;
    };
    let source_changes = before.source != after.source;
    let restarts = match (source_changes, before.log != after.log) {
        (true, true) => Some("the source's and the log's settings change"),
        (true, false) => Some("the source's settings change"),
        (false, true) => Some("the log's settings change"),
        (false, false) => None,
    };
    if captures(after) {
        effects.extend(fate("capture", before.paused, after.paused, restarts));
    }
    for sink in &after.sinks {
        let Some(old) = before.sinks.iter().find(|old| old.name == sink.name) else {
            let message = match after.source.postgres.snapshot {
                SnapshotMode::Never => "it starts at the log's end: rows that are there already are not loaded",
                _ => "it is loaded, then follows the flow",
            };
            effects.push(effect(sink_subject(sink), Effect::Created, message));
            continue;
        };
        let settings = |sink: &SinkSpec| SinkSpec { paused: false, ..sink.clone() };
        let (was, is) = (&before.source.postgres, &after.source.postgres);
        let restarts = if settings(old) != settings(sink) {
            Some("its settings change")
        } else if was.dsn != is.dsn {
            Some("the source's address changes, and it reads rows again by key there")
        } else if was.snapshot != is.snapshot {
            Some("the flow is loaded from now on")
        } else {
            None
        };
        effects.extend(fate(&sink_subject(sink), before.paused || old.paused, after.paused || sink.paused, restarts));
    }
    for sink in before.sinks.iter().filter(|old| !after.sinks.iter().any(|sink| sink.name == old.name)) {
        let message = "its task ends and the log keeps nothing for it any more; its rows stay where they are";
        effects.push(effect(sink_subject(sink), Effect::Removed, message));
    }
    effects
}

/// What a run does under its next snapshot.
const BEGINS_AGAIN: &str =
    "tables without a key that are not read whole begin again, with `snapshot: only` any that are not";

fn effects_on_what_is_under_way(before: &FlowSpec, after: &FlowSpec, under_way: &UnderWay) -> Vec<ChangeEffect> {
    let runs = under_way.runs.iter().filter_map(|run| {
        let (does, message) = fate_of_run(before, after, run)?;
        Some(effect(format!("run {}", run.run), does, message))
    });
    let comparisons = under_way.comparisons.iter().filter_map(|comparison| {
        let (does, message) = fate_of_comparison(before, after, &comparison.sink)?;
        Some(effect(format!("comparison {}", comparison.number), does, message))
    });
    runs.chain(comparisons).collect()
}

fn is_moved(before: &FlowSpec, after: &FlowSpec) -> bool {
    before.source.postgres.dsn != after.source.postgres.dsn
}

/// A run reads from the source. What its sinks load are tasks of theirs.
fn fate_of_run(before: &FlowSpec, after: &FlowSpec, run: &RunUnderWay) -> Option<(Effect, String)> {
    if !run.sinks.iter().any(|name| after.sinks.iter().any(|sink| sink.name == *name)) {
        return Some((Effect::Removed, "it is cancelled: it loads no other sink".to_owned()));
    }
    let (does, message) = match (before.paused, after.paused) {
        _ if run.is_paused => return None,
        (false, true) if run.holds_snapshot => {
            (Effect::Paused, format!("it stops and lets its snapshot go, and takes another one later: {BEGINS_AGAIN}"))
        }
        (false, true) => (Effect::Paused, "it stops and keeps where it was".to_owned()),
        (true, false) => (Effect::Resumed, "it goes on where it was".to_owned()),
        (false, false) if is_moved(before, after) && run.holds_snapshot => {
            (Effect::Restarts, format!("it takes another snapshot, for the source's address changes: {BEGINS_AGAIN}"))
        }
        (false, false) if is_moved(before, after) => {
            (Effect::Restarts, "it goes on where it was, for the source's address changes".to_owned())
        }
        _ => return None,
    };
    Some((does, message))
}

/// A comparison reads from the source and from its sink; which sink that is, its task does not know before it begins.
fn fate_of_comparison(before: &FlowSpec, after: &FlowSpec, sink: &SinkId) -> Option<(Effect, &'static str)> {
    let Some(sink) = after.sinks.iter().find(|known| known.name == *sink) else {
        return Some((Effect::Removed, "it fails: its sink is gone"));
    };
    match (before.paused, after.paused) {
        (false, true) => Some((Effect::Paused, "it stops, and begins again when the flow goes on")),
        (true, false) => Some((Effect::Resumed, "it begins again")),
        (false, false) if is_moved(before, after) => {
            Some((Effect::Restarts, "it begins again: the source's address changes"))
        }
        (false, false) if before.sinks_by_name() != after.sinks_by_name() && sink.paused => {
            Some((Effect::Restarts, "it begins again, and waits for its sink, which is paused"))
        }
        (false, false) if before.sinks_by_name() != after.sinks_by_name() => {
            Some((Effect::Restarts, "it begins again: the flow's sinks change"))
        }
        _ => None,
    }
}

fn sink_subject(sink: &SinkSpec) -> String {
    format!("sink {}", sink.name)
}

/// What becomes of a task that is there before and after.
fn fate(subject: &str, was_paused: bool, is_paused: bool, restarts: Option<&str>) -> Option<ChangeEffect> {
    match (was_paused, is_paused, restarts) {
        (false, true, _) => Some(effect(subject, Effect::Paused, "it stops and keeps where it was")),
        (true, false, _) => Some(effect(subject, Effect::Resumed, "it goes on where it was")),
        // Nobody runs it: it finds the settings when it goes on.
        (true, true, _) | (false, false, None) => None,
        (false, false, Some(why)) => Some(effect(
            subject,
            Effect::Restarts,
            format!("it begins again where it was, within about a second: {why}"),
        )),
    }
}

/// The keys that differ, in order. Sinks are told apart by their names, not by their order.
fn field_changes(before: Option<&FlowDocument>, after: &FlowDocument) -> Vec<FieldChange> {
    let before = before.map(leaves).unwrap_or_default();
    let after = leaves(after);
    let paths: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let shown = |path: &str, value: Option<&Value>| {
        value.map(|value| if path.ends_with(".dsn.value") { HIDDEN.to_owned() } else { value.to_string() })
    };
    let differs = |path: &&String| before.get(*path) != after.get(*path);
    let change = |path: &String| FieldChange {
        path: path.clone(),
        before: shown(path, before.get(path)),
        after: shown(path, after.get(path)),
    };
    paths.into_iter().filter(differs).map(change).collect()
}

fn leaves(document: &FlowDocument) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    // A document is made of texts, numbers and maps of them: it always has a JSON form.
    let value = serde_json::to_value(document).unwrap_or_default();
    for part in ["metadata", "spec"] {
        collect(part.to_owned(), &value[part], &mut found);
    }
    found
}

fn collect(path: String, value: &Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| collect(format!("{path}.{key}"), value, found)),
        Value::Array(sinks) if path == "spec.sinks" => {
            for sink in sinks {
                let name = sink["name"].as_str().unwrap_or_default();
                collect(format!("{path}[{name}]"), sink, found);
            }
        }
        leaf => drop(found.insert(path, leaf.clone())),
    }
}

/// What changing a part of the flow file does, for the docs. A test holds each row against [`flow_change`].
pub const RULES: &[(&str, &str)] = &[
    ("`metadata.labels`", "nothing: no task looks at them"),
    (
        "`spec.paused`",
        "every task stops and keeps where it was, or goes on there; the slot holds WAL back meanwhile. A run that reads lets its snapshot go and \
         takes another one later: tables without a key that are not read whole begin again, with `snapshot: only` any that are not. Comparisons \
         begin again",
    ),
    ("`spec.source` (safety, largeTransactionBytes)", "the capture restarts where it was; sinks and runs go on"),
    (
        "`spec.source.postgres.dsn`",
        "capture and sinks restart where they were, a run that reads takes another snapshot (as with `spec.paused`), and comparisons begin again",
    ),
    (
        "`spec.source.postgres.dsn`: another database or server",
        "refused where it can be seen (a literal URL); else the capture stops and says so: delete the flow and create it again",
    ),
    (
        "`spec.source.postgres.slot`, `.publication.name`, `.publication.create`",
        "refused: delete the flow and create it again",
    ),
    (
        "`spec.source.postgres.publication`: tables added (or no longer excluded)",
        "the capture restarts; with `snapshot: initial` or `only` a run loads the new tables into the sinks that are there, while the others go on",
    ),
    (
        "`spec.source.postgres.publication`: tables removed (or excluded)",
        "the capture restarts; the tables' changes are captured no longer, their rows stay at the sinks",
    ),
    (
        "`spec.source.postgres.snapshot`: `never` to `initial`",
        "capture and sinks restart; a run loads every table anew",
    ),
    ("`spec.source.postgres.snapshot`: any other change", "refused: delete the flow and create it again"),
    ("`spec.log`", "the capture restarts; sinks and runs go on"),
    (
        "`spec.sinks`: one added",
        "its task is made; with `snapshot: initial` or `only` a run loads everything into it, else it starts at the log's end",
    ),
    (
        "`spec.sinks`: one removed",
        "its task ends, and its hold on the log goes; its rows stay. A run that loads no other sink is cancelled, a comparison of it fails",
    ),
    (
        "`spec.sinks[].paused`",
        "this sink stops and keeps where it was, or goes on there; the log holds what it needs. With `onOverrun: detach` only while \
         there is room: then the sink is cut off, and loaded anew when it goes on",
    ),
    ("`spec.sinks[].postgres.schema`", "refused: give the sink a new name, it is then a new sink"),
    (
        "`spec.sinks[]`: anything else",
        "this sink restarts where it was; no other one notices. Any change of `spec.sinks` lets comparisons begin again",
    ),
];

/// Chunks that are read at a time when nobody says.
pub const READERS: u32 = 4;

/// The runs that a change makes: the first load of a new flow, or of one that was told `never` before; a sink that is new;
/// tables that are new. None with `snapshot: never`.
pub fn planned_runs(before: Option<&FlowSpec>, after: &FlowSpec, now: Timestamp) -> Vec<RunSpec> {
    if after.source.postgres.snapshot == SnapshotMode::Never {
        return Vec::new();
    }
    let publication = &after.source.postgres.publication;
    let first_load = || {
        let (tables, exclude) = (publication.tables.clone(), publication.exclude.clone());
        let spec = RunSpec { tables, exclude, ..run(RunReason::FirstLoad, now) };
        vec![spec.of_sinks(after.sinks.iter().map(|sink| &sink.name))]
    };
    let Some(before) = before else { return first_load() };
    if before.source.postgres.snapshot == SnapshotMode::Never {
        // Tables without a mark at a sink were taken until now, and wait for a run from here on: one for all.
        return first_load();
    }
    let old = &before.source.postgres.publication;
    let is_old = |sink: &&SinkId| before.sinks.iter().any(|known| known.name == **sink);
    let (kept, fresh): (Vec<&SinkId>, Vec<&SinkId>) = after.sinks.iter().map(|sink| &sink.name).partition(is_old);
    let mut runs = Vec::new();
    let (tables, exclude) = added_tables(old, publication);
    if !tables.is_empty() && !kept.is_empty() {
        let spec = RunSpec { tables, exclude, ..run(RunReason::TablesAdded, now) };
        runs.push(spec.of_sinks(kept));
    }
    runs.extend(fresh.into_iter().map(|sink| sink_anew(sink, now)));
    runs
}

/// The run that loads everything into one sink.
pub fn sink_anew(sink: &SinkId, now: Timestamp) -> RunSpec {
    RunSpec { sinks: vec![sink.clone()], ..run(RunReason::SinkAnew, now) }
}

/// The run that loads tables which came to the publication by themselves, such as one that was made below `schema.*`, into all sinks.
pub fn tables_found(tables: Vec<String>, now: Timestamp) -> RunSpec {
    RunSpec { tables, ..run(RunReason::TablesAdded, now) }
}

/// The run that loads tables which took the names of others, into all sinks.
pub fn tables_replaced(tables: Vec<String>, now: Timestamp) -> RunSpec {
    RunSpec { tables, ..run(RunReason::TablesReplaced, now) }
}

fn run(reason: RunReason, created_at: Timestamp) -> RunSpec {
    RunSpec {
        reason,
        tables: Vec::new(),
        exclude: Vec::new(),
        sinks: Vec::new(),
        wish: RunWish::Go,
        rows_per_second: None,
        readers: READERS,
        created_at,
    }
}

/// The tables that are captured after a change and were not before, as patterns, and what to leave out of them: what was
/// captured already, and what is excluded.
pub fn added_tables(before: &PublicationSpec, after: &PublicationSpec) -> (Vec<String>, Vec<String>) {
    let (old, new) = (Captured::of(before), Captured::of(after));
    let mut tables: Vec<String> = after.tables.iter().filter(|table| !old.tables.has(table)).cloned().collect();
    let mut listed = Patterns::of(&tables);
    // Excluded before, and no longer: by name, because the `schema.*` that has it is not new.
    let readmitted: Vec<&String> = before.exclude.iter().filter(|table| new.has(table) && !listed.has(table)).collect();
    // A table that was named and excluded, or is named now and was excluded from its schema.
    let named = after.tables.iter().filter(|table| !old.has(table) && !table.ends_with(".*") && new.has(table));
    let more: Vec<String> =
        readmitted.into_iter().chain(named).filter(|table| listed.0.insert(table.as_str())).cloned().collect();
    drop(listed);
    tables.extend(more);
    let patterns = Patterns::of(&tables);
    let is_part = |table: &&String| patterns.has_around(table);
    let captured = before.tables.iter().filter(is_part).filter(|table| old.has(table));
    let mut seen = HashSet::new();
    let exclude = captured.chain(after.exclude.iter().filter(is_part));
    let exclude = exclude.filter(|table| seen.insert(table.as_str())).cloned().collect();
    (tables, exclude)
}

/// Patterns of tables, asked without looking at each: there may be tens of thousands.
struct Patterns<'a>(HashSet<&'a str>);

impl<'a> Patterns<'a> {
    fn of(patterns: &'a [String]) -> Patterns<'a> {
        Patterns(patterns.iter().map(String::as_str).collect())
    }

    /// Whether one of them covers the table, as [`crate::run::covers`] says.
    fn has(&self, table: &str) -> bool {
        self.0.contains(table) || self.has_around(table)
    }

    /// Whether one of them covers it that is not itself.
    fn has_around(&self, table: &str) -> bool {
        let of_schema = table.split_once('.').map(|(schema, _)| format!("{schema}.*")).filter(|of| of != table);
        (table != "*" && self.0.contains("*")) || of_schema.is_some_and(|of| self.0.contains(of.as_str()))
    }
}

/// What a publication sends.
struct Captured<'a> {
    tables: Patterns<'a>,
    exclude: Patterns<'a>,
}

impl<'a> Captured<'a> {
    fn of(publication: &'a PublicationSpec) -> Captured<'a> {
        Captured { tables: Patterns::of(&publication.tables), exclude: Patterns::of(&publication.exclude) }
    }

    fn has(&self, table: &str) -> bool {
        self.tables.has(table) && !self.exclude.has(table)
    }
}

#[cfg(test)]
#[path = "change_tests.rs"]
mod tests;
