//! What a change of a flow's specification does: to each of its tasks, and to the rows that are there already. Pure, and used
//! by whoever shows it (`wallaby diff`) and by whoever does it (the flow store), so that they cannot disagree.

use crate::condition::Timestamp;
use crate::flow::{FlowSpec, PublicationSpec, SnapshotMode};
use crate::ids::SinkId;
use crate::run::{RunReason, RunSpec, RunWish, covers};

/// Chunks that are read at a time when nobody says.
pub const READERS: u32 = 4;

/// The runs that a change makes: the first load of a new flow, a sink that is new, tables that are new. None with
/// `snapshot: never`.
pub fn planned_runs(before: Option<&FlowSpec>, after: &FlowSpec, now: Timestamp) -> Vec<RunSpec> {
    if after.source.postgres.snapshot == SnapshotMode::Never {
        return Vec::new();
    }
    let publication = &after.source.postgres.publication;
    let Some(before) = before else {
        let tables = publication.tables.clone();
        return vec![RunSpec { tables, exclude: publication.exclude.clone(), ..run(RunReason::FirstLoad, now) }];
    };
    let old = &before.source.postgres.publication;
    let is_old = |sink: &&SinkId| before.sinks.iter().any(|known| known.name == **sink);
    let (kept, fresh): (Vec<&SinkId>, Vec<&SinkId>) = after.sinks.iter().map(|sink| &sink.name).partition(is_old);
    let mut runs = Vec::new();
    let (tables, exclude) = added_tables(old, publication);
    if !tables.is_empty() && !kept.is_empty() {
        let sinks = if fresh.is_empty() { Vec::new() } else { kept.into_iter().cloned().collect() };
        runs.push(RunSpec { tables, exclude, sinks, ..run(RunReason::TablesAdded, now) });
    }
    runs.extend(fresh.into_iter().map(|sink| sink_anew(sink, now)));
    runs
}

/// The run that loads everything into one sink.
pub fn sink_anew(sink: &SinkId, now: Timestamp) -> RunSpec {
    RunSpec { sinks: vec![sink.clone()], ..run(RunReason::SinkAnew, now) }
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
    let inside = |publication: &PublicationSpec, table: &str| {
        let has = |patterns: &[String]| patterns.iter().any(|pattern| covers(pattern, table));
        has(&publication.tables) && !has(&publication.exclude)
    };
    let is_new = |table: &&String| !before.tables.iter().any(|known| covers(known, table));
    let mut tables: Vec<String> = after.tables.iter().filter(is_new).cloned().collect();
    // Excluded before, and no longer: by name, because the `schema.*` that has it is not new.
    let readmitted =
        before.exclude.iter().filter(|table| inside(after, table) && !tables.iter().any(|t| covers(t, table)));
    let readmitted: Vec<String> = readmitted.cloned().collect();
    // A table that was named and excluded, or is named now and was excluded from its schema.
    let named = after.tables.iter().filter(|table| !inside(before, table) && !tables.contains(table));
    let named: Vec<String> = named.filter(|table| !table.ends_with(".*") && inside(after, table)).cloned().collect();
    tables.extend(readmitted);
    for table in named {
        if !tables.contains(&table) {
            tables.push(table);
        }
    }
    let is_part = |table: &&String| tables.iter().any(|pattern| pattern != *table && covers(pattern, table));
    let captured = before.tables.iter().filter(is_part).filter(|table| inside(before, table));
    let mut exclude: Vec<String> = captured.cloned().collect();
    for table in after.exclude.iter().filter(is_part) {
        if !exclude.contains(table) {
            exclude.push(table.clone());
        }
    }
    (tables, exclude)
}
