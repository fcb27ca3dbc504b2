//! Whose rows are accounted for: of which published tables, and which of their partitions, everything that they have comes to the sinks,
//! by a run or through the log. Pure, no I/O.

use std::collections::{BTreeMap, BTreeSet};

use wallaby_coordination::{KnownTable, RunEntry};
use wallaby_model::run::{RelationState, RunState, RunWish, pattern_of};
use wallaby_model::{Lsn, RunId, SinkId, TableName};
use wallaby_postgres_source::{Partition, Published, PublishedTables, SentName};

/// The tables by their names.
pub type Known = BTreeMap<TableName, KnownTable>;

/// The runs of a flow that are kept, oldest first, and the sinks that it has.
#[derive(Clone, Copy, Debug)]
pub struct Runs<'a> {
    /// The runs.
    pub runs: &'a [RunEntry],
    /// The sinks; none when nothing is to be loaded.
    pub sinks: &'a [SinkId],
}

impl<'a> Runs<'a> {
    /// The last run that was made, or the one before those that are still to be planned: what stands at the source then, they will read.
    pub fn last(self) -> RunId {
        let unplanned = self.runs.iter().find(|run| is_unplanned(run)).map(|run| RunId(run.run.0.saturating_sub(1)));
        unplanned.unwrap_or_else(|| self.runs.iter().map(|run| run.run).max().unwrap_or(RunId(0)))
    }

    /// Whether a run that is still to be planned will read a table.
    fn will_read(self, table: &TableName) -> bool {
        self.runs.iter().any(|run| is_unplanned(run) && run.spec.is_of(table))
    }

    fn get(self, run: RunId) -> Option<&'a RunEntry> {
        self.runs.iter().find(|known| known.run == run)
    }

    fn after(self, since: RunId) -> impl DoubleEndedIterator<Item = &'a RunEntry> {
        self.runs.iter().filter(move |run| run.run > since)
    }

    /// Whether later runs, which nobody cancelled, read this, all sinks of the flow taken together.
    fn bring(self, since: RunId, reads: impl Fn(&RunEntry) -> bool) -> bool {
        let those: Vec<&RunEntry> = self.after(since).filter(|run| !is_cancelled(run) && reads(run)).collect();
        !those.is_empty() && self.sinks.iter().all(|sink| those.iter().any(|run| run.spec.loads_into(sink)))
    }
}

fn is_cancelled(run: &RunEntry) -> bool {
    run.spec.wish == RunWish::Cancel || run.plan.as_ref().is_some_and(|plan| plan.state == RunState::Cancelled)
}

fn is_unplanned(run: &RunEntry) -> bool {
    !is_cancelled(run) && run.plan.as_ref().is_none_or(|plan| plan.generations.is_empty() && !plan.state.is_over())
}

fn planned(run: &RunEntry, table: &TableName) -> Option<u32> {
    run.plan.as_ref().and_then(|plan| plan.table_oid(table))
}

/// Whether nothing came, went, or is still to be decided since this was written, as far as the catalog goes.
pub fn is_as_before(known: &Known, looked: &PublishedTables) -> bool {
    let there = || known.iter().filter(|(_, known)| known.oid != 0);
    let is_same = |(table, known): (&TableName, &KnownTable)| {
        let partitions = looked.partitions.get(table).map(|partitions| places(partitions));
        looked.published.get(table).is_some_and(|published| is_it(known, published))
            && partitions.is_none_or(|partitions| known.partitions == Some(partitions))
            && known.asked.is_none()
            && known.attached.is_empty()
    };
    there().count() == looked.published.len() && there().all(is_same)
}

fn is_it(known: &KnownTable, published: &Published) -> bool {
    known.oid == published.oid && known.member == published.member
}

fn places(partitions: &[Partition]) -> BTreeMap<u32, i32> {
    partitions.iter().map(|partition| (partition.oid, partition.place)).collect()
}

/// Notes that tables are not published: whatever stands there next is loaded. `since`: the last run by now.
pub fn forget(known: &mut Known, published: &BTreeMap<TableName, Published>, since: RunId) {
    let is_new = |known: &KnownTable| known.oid != 0 || known.asked.is_some();
    for (_, gone) in known.iter_mut().filter(|(table, known)| is_new(known) && !published.contains_key(table)) {
        *gone = KnownTable::unknown(since);
    }
}

/// The known tables of which rows came under another name, or under whose names rows of others came: at the sinks they are mixed up by now,
/// whatever the catalog says. Not those that a run has read since.
pub fn mixed_up(known: &Known, sent: &[SentName], runs: Runs<'_>) -> BTreeSet<TableName> {
    // The lowest point from which on some sink takes changes of the table as it is known.
    let read_at = |table: &TableName, oid: u32| {
        let of_sink = |sink: &SinkId| {
            let reads =
                |run: &&RunEntry| !is_cancelled(run) && run.spec.loads_into(sink) && planned(run, table) == Some(oid);
            let run = runs.runs.iter().rev().find(reads)?;
            run.plan.as_ref()?.generations.first().map(|generation| generation.consistent_point)
        };
        // None is the lowest.
        runs.sinks.iter().map(of_sink).min().flatten()
    };
    let is_late = |table: &TableName, oid: u32, commit: Lsn| read_at(table, oid).is_none_or(|point| commit >= point);
    let late = mismatches(known, sent).filter(|(table, (oid, commit))| is_late(table, *oid, *commit));
    late.map(|(table, _)| table.clone()).collect()
}

/// Whether anything came under a name that is not known for it.
pub fn is_mismatched(known: &Known, sent: &[SentName]) -> bool {
    mismatches(known, sent).next().is_some()
}

/// Each table that is concerned, with its oid and the commit.
fn mismatches<'a>(known: &'a Known, sent: &'a [SentName]) -> impl Iterator<Item = (&'a TableName, (u32, Lsn))> {
    let by_oid: BTreeMap<u32, &TableName> = known.iter().map(|(table, known)| (known.oid, table)).collect();
    sent.iter().flat_map(move |sent| {
        let named = known.get_key_value(&sent.table).filter(|(_, known)| known.oid != 0 && known.oid != sent.oid);
        let named = named.map(|(table, known)| (table, (known.oid, sent.commit)));
        let other = by_oid.get(&sent.oid).filter(|table| sent.oid != 0 && ***table != sent.table);
        named.into_iter().chain(other.map(|table| (*table, (sent.oid, sent.commit))))
    })
}

/// What is to be done about the published tables.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// What is known from here on, without those that are still to be loaded.
    pub known: Known,
    /// Tables that were never seen.
    pub came: BTreeSet<TableName>,
    /// Tables that have the name of another one, or were not published for a while.
    pub replaced: BTreeSet<TableName>,
    /// Tables for which there is a run that is not over, and of which it is not known that it reads them.
    pub awaited: BTreeSet<TableName>,
}

/// See [`Judged`]. `known`: `None` when nobody has looked before, and all is as the flow began; but a run that is kept may have read
/// another table of that name.
pub fn judge(known: Option<&Known>, published: &BTreeMap<TableName, Published>, runs: Runs<'_>) -> Judged {
    let last = runs.last();
    let mut judged = Judged { known: known.cloned().unwrap_or_default(), ..Judged::default() };
    forget(&mut judged.known, published, last);
    for (table, now) in published {
        let entry = known.and_then(|known| known.get(table));
        let since = entry.map_or(RunId(0), |entry| entry.since);
        // Some sink may have what the last run read, whatever stands here now.
        let was_read = runs.after(since).rev().find_map(|run| planned(run, table));
        let is_as_read = was_read.is_none_or(|oid| oid == now.oid);
        let asked = entry.and_then(|entry| runs.get(entry.asked?));
        let is_known = match entry {
            None if known.is_none() => is_as_read,
            // People decide.
            None if runs.runs.iter().any(|run| is_cancelled(run) && run.spec.tables.contains(&pattern_of(table))) => {
                true
            }
            Some(entry) if is_it(entry, now) && is_as_read && entry.asked.is_none() => continue,
            Some(_) if asked.is_some_and(is_cancelled) => true,
            // It was out of the publication, since it was known or since its run was made: whatever read it may have done so before.
            Some(entry) if entry.member != now.member && (entry.asked.is_some() || entry.oid == now.oid) => false,
            _ => is_as_read && runs.bring(since, |run| planned(run, table) == Some(now.oid)),
        };
        if is_known {
            judged.known.insert(table.clone(), KnownTable::new(now.oid, now.member, last));
        } else if asked.is_some_and(|run| !run.is_over()) || runs.will_read(table) {
            judged.awaited.insert(table.clone());
        } else if entry.is_none() && known.is_some() {
            judged.came.insert(table.clone());
        } else {
            judged.replaced.insert(table.clone());
        }
    }
    judged
}

/// The partitions, by their table, that were attached with rows which nobody brings. Those of a flow that loads nothing are all accounted
/// for, and so are those of a table that was not looked at before: a run reads them, or the flow began with them. One that was told is
/// settled by a run over its table: also by one that was cancelled, people decide.
pub fn judge_partitions(
    known: &mut Known,
    looked: &PublishedTables,
    runs: Runs<'_>,
) -> BTreeMap<TableName, Vec<TableName>> {
    let mut told = BTreeMap::new();
    for (table, partitions) in &looked.partitions {
        let Some(published) = looked.published.get(table) else { continue };
        let Some(entry) = known.get_mut(table).filter(|entry| is_it(entry, published)) else { continue };
        let now = places(partitions);
        let Some(before) = entry.partitions.as_mut().filter(|_| !runs.sinks.is_empty()) else {
            (entry.partitions, entry.attached) = (Some(now), BTreeSet::new());
            continue;
        };
        let count = before.len();
        before.retain(|oid, place| now.get(oid) == Some(place));
        if before.len() < count {
            // One that goes and comes back was changed meanwhile: what an older run read of it counts no more.
            entry.since = runs.last();
        }
        entry.attached.retain(|oid| now.contains_key(oid));
        let since = entry.since;
        let is_read = |oid: u32| {
            runs.bring(since, |run| {
                let mut relations = run.plan.iter().flat_map(|plan| &plan.relations);
                relations.any(|one| one.table == *table && one.oid == oid && one.state != RelationState::Gone)
            })
        };
        let is_decided = || runs.after(since).any(|run| is_cancelled(run) && run.is_over() && run.spec.is_of(table));
        let (mut unloaded, mut settled) = (Vec::new(), Vec::new());
        for partition in partitions.iter().filter(|partition| !before.contains_key(&partition.oid)) {
            let is_told = entry.attached.contains(&partition.oid);
            let is_settled = if is_told { is_decided() } else { !partition.brought_rows };
            match is_settled || is_read(partition.oid) {
                true => settled.push(partition),
                false => unloaded.push(partition),
            }
        }
        before.extend(settled.iter().map(|partition| (partition.oid, partition.place)));
        settled.iter().for_each(|partition| _ = entry.attached.remove(&partition.oid));
        if unloaded.iter().any(|partition| !entry.attached.contains(&partition.oid)) {
            entry.since = runs.last();
            entry.attached.extend(unloaded.iter().map(|partition| partition.oid));
        }
        if !unloaded.is_empty() {
            told.insert(table.clone(), unloaded.into_iter().map(|partition| partition.name.clone()).collect());
        }
    }
    told
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::flow::change::tables_found;
    use wallaby_model::run::{Generation, PlannedRelation, RunPlan, RunState};

    fn table(name: &str) -> TableName {
        TableName::new("public", name)
    }

    fn published(tables: &[(&str, u32)]) -> BTreeMap<TableName, Published> {
        tables.iter().map(|(name, oid)| (table(name), Published { oid: *oid, member: *oid + 1000 })).collect()
    }

    fn sinks() -> Vec<SinkId> {
        ["a", "b"].map(|name| SinkId::new(name).unwrap()).to_vec()
    }

    fn judged(known: Option<&Known>, tables: &[(&str, u32)], runs: &[RunEntry]) -> Judged {
        judge(known, &published(tables), Runs { runs, sinks: &sinks() })
    }

    fn known(tables: &[(&str, u32, u32)]) -> Known {
        let member = |oid: u32| if oid == 0 { 0 } else { oid + 1000 };
        let entry =
            |(name, oid, since): &(&str, u32, u32)| (table(name), KnownTable::new(*oid, member(*oid), RunId(*since)));
        tables.iter().map(entry).collect()
    }

    fn export_at(point: u64) -> Generation {
        Generation { number: 1, consistent_point: Lsn(point), snapshot: None, exported_at: Timestamp(0) }
    }

    /// A run that read tables.
    fn run(number: u32, tables: &[(&str, u32)]) -> RunEntry {
        let relation = |(name, oid): &(&str, u32)| PlannedRelation {
            table: table(name),
            relation: table(name),
            oid: *oid,
            table_oid: *oid,
            relfilenode: 1,
            pages: 1,
            chunk_pages: 1,
            restart: 0,
            state: RelationState::Reading,
            rows_estimate: None,
            has_key: true,
        };
        RunEntry {
            run: RunId(number),
            spec: tables_found(Vec::new(), Timestamp(0)),
            spec_revision: wallaby_coordination::Revision(1),
            plan: Some(RunPlan {
                relations: tables.iter().map(relation).collect(),
                generations: vec![export_at(0)],
                ..RunPlan::default()
            }),
        }
    }

    fn names(tables: &BTreeSet<TableName>) -> Vec<&str> {
        tables.iter().map(|table| table.name.as_str()).collect()
    }

    fn cancelled(mut run: RunEntry) -> RunEntry {
        (run.spec.wish, run.plan) =
            (RunWish::Cancel, Some(RunPlan { state: RunState::Cancelled, ..RunPlan::default() }));
        run
    }

    fn done(mut run: RunEntry) -> RunEntry {
        run.plan.as_mut().unwrap().state = RunState::Done;
        run
    }

    #[test]
    fn a_first_look_takes_what_is_there_unless_a_run_read_another_one() {
        let first = judged(None, &[("a", 1), ("b", 2)], &[]);
        assert_eq!(first.known, known(&[("a", 1, 0), ("b", 2, 0)]));
        assert!(first.came.is_empty() && first.replaced.is_empty());
        let runs = [run(1, &[("a", 1), ("b", 2)]), run(2, &[("b", 3)])];
        let first = judged(None, &[("a", 9), ("b", 3)], &runs);
        assert_eq!((names(&first.replaced), first.known), (vec!["a"], known(&[("b", 3, 2)])));
        // A version that did not note it.
        assert!(judged(None, &[("a", 9)], &[run(1, &[("a", 0)])]).replaced.is_empty());
    }

    #[test]
    fn another_oid_is_another_table_until_a_later_run_has_read_it() {
        let before = known(&[("a", 1, 1), ("b", 2, 1)]);
        let runs = [run(1, &[("a", 1), ("b", 2)])];
        let now = judged(Some(&before), &[("a", 5), ("b", 2)], &runs);
        assert_eq!((names(&now.replaced), &now.known), (vec!["a"], &before), "as before, until a run is made");
        let now = judged(Some(&before), &[("a", 5), ("b", 2)], &[run(1, &[]), run(2, &[("a", 5)])]);
        assert!(now.replaced.is_empty());
        assert_eq!(now.known, known(&[("a", 5, 2), ("b", 2, 1)]));
        // The first one comes back: what an old run read of it is not all that it has.
        let runs = [run(1, &[("a", 1)]), run(2, &[("a", 5)])];
        assert_eq!(names(&judged(Some(&now.known), &[("a", 1), ("b", 2)], &runs).replaced), ["a"]);
        // Also when nobody saw the second one, but a run.
        assert_eq!(names(&judged(Some(&before), &[("a", 1), ("b", 2)], &runs).replaced), ["a"]);
    }

    #[test]
    fn another_place_in_the_publication_means_that_it_was_out_of_it() {
        let mut before = known(&[("a", 1, 1)]);
        assert!(judged(Some(&before), &[("a", 1)], &[]).replaced.is_empty());
        before.get_mut(&table("a")).unwrap().member = 7;
        assert_eq!(names(&judged(Some(&before), &[("a", 1)], &[]).replaced), ["a"]);
        // A run that was planned after it was noted, and may have been before it was out.
        assert_eq!(names(&judged(Some(&before), &[("a", 1)], &[run(2, &[("a", 1)])]).replaced), ["a"]);
    }

    #[test]
    fn a_run_counts_for_the_sinks_that_it_loads_into() {
        let before = known(&[("a", 1, 1)]);
        let of = |number: u32, sink: &str| {
            let mut run = run(number, &[("a", 5)]);
            run.spec.sinks = vec![SinkId::new(sink).unwrap()];
            run
        };
        assert_eq!(names(&judged(Some(&before), &[("a", 5)], &[of(2, "b")]).replaced), ["a"]);
        assert!(judged(Some(&before), &[("a", 5)], &[of(2, "b"), of(3, "a")]).replaced.is_empty());
        assert_eq!(names(&judged(Some(&before), &[("a", 5)], &[of(2, "b"), cancelled(of(3, "a"))]).replaced), ["a"]);
    }

    #[test]
    fn a_run_that_was_made_for_it_is_awaited_and_made_again_when_it_read_nothing_of_it() {
        let asked = KnownTable { asked: Some(RunId(2)), member: 1005, ..KnownTable::unknown(RunId(1)) };
        let before: Known = [(table("a"), asked.clone())].into();
        let with = |second: RunEntry| judged(Some(&before), &[("a", 5)], &[run(1, &[("a", 5)]), second]);
        assert_eq!(names(&with(run(2, &[])).awaited), ["a"]);
        assert_eq!(with(run(2, &[("a", 5)])).known, known(&[("a", 5, 2)]));
        // It was away as the run looked, or another one was there.
        assert_eq!(names(&with(done(run(2, &[]))).replaced), ["a"]);
        assert_eq!(names(&with(done(run(2, &[("a", 6)]))).replaced), ["a"]);
        // What that read is not all, when it was out of the publication once more.
        let moved: Known = [(table("a"), KnownTable { member: 7, ..asked })].into();
        let read = [run(1, &[]), done(run(2, &[("a", 5)]))];
        assert_eq!(names(&judged(Some(&moved), &[("a", 5)], &read).replaced), ["a"]);
        assert_eq!(judged(Some(&moved), &[], &read).known, known(&[("a", 0, 2)]));
        // People decide.
        assert_eq!(with(cancelled(run(2, &[]))).known, known(&[("a", 5, 2)]));
    }

    #[test]
    fn a_run_that_is_still_to_be_planned_is_waited_for() {
        let before = known(&[("a", 1, 1)]);
        let unplanned = RunEntry { plan: None, ..run(2, &[]) };
        let now = judged(Some(&before), &[("a", 5), ("b", 6)], &[run(1, &[("a", 1)]), unplanned.clone()]);
        assert_eq!((names(&now.awaited), now.replaced.len(), now.came.len()), (vec!["a", "b"], 0, 0));
        // What it reads then counts also for what was noted before.
        assert_eq!(judged(None, &[("a", 1)], &[unplanned]).known, known(&[("a", 1, 1)]));
    }

    #[test]
    fn a_table_that_was_not_published_for_a_while_is_loaded_anew() {
        let before = known(&[("a", 1, 1)]);
        let runs = [run(1, &[("a", 1)])];
        let gone = judged(Some(&before), &[], &runs);
        assert_eq!(gone, Judged { known: known(&[("a", 0, 1)]), ..Judged::default() });
        assert_eq!(names(&judged(Some(&gone.known), &[("a", 1)], &runs).replaced), ["a"]);
        let read_since = [run(1, &[("a", 1)]), run(2, &[("a", 1)])];
        assert!(judged(Some(&gone.known), &[("a", 1)], &read_since).replaced.is_empty());
    }

    #[test]
    fn a_table_that_comes_is_loaded_unless_a_run_has_read_it() {
        let before = known(&[]);
        assert_eq!(names(&judged(Some(&before), &[("a", 1)], &[]).came), ["a"]);
        let now = judged(Some(&before), &[("a", 1)], &[run(4, &[("a", 1)])]);
        assert_eq!((now.came.len(), now.known), (0, known(&[("a", 1, 4)])));
    }

    #[test]
    fn rows_under_another_name_mix_up_both_tables_unless_a_run_has_read_them_since() {
        let known = known(&[("a", 1, 0), ("b", 2, 0), ("gone", 0, 0)]);
        let read_at = |commit: u64| {
            let mut run = run(1, &[("a", 1), ("b", 2)]);
            run.plan.as_mut().unwrap().generations = vec![export_at(commit)];
            run
        };
        let sent = |name: &str, oid: u32| SentName { table: table(name), oid, commit: Lsn(100) };
        let mixed = |sent: &[SentName], runs: &[RunEntry]| {
            let mixed = mixed_up(&known, sent, Runs { runs, sinks: &sinks() });
            assert!(mixed.is_empty() || is_mismatched(&known, sent));
            names(&mixed).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let as_known = [sent("a", 1), sent("b", 2), sent("other", 3), sent("gone", 4)];
        assert_eq!(mixed(&as_known, &[]), [] as [&str; 0]);
        // `b` had the name of `a`; a stranger had it; `a` had a name that nobody knows.
        assert_eq!(mixed(&[sent("a", 2)], &[read_at(100)]), ["a", "b"]);
        assert_eq!(mixed(&[sent("a", 3)], &[read_at(100)]), ["a"]);
        assert_eq!(mixed(&[sent("x", 1)], &[]), ["a"]);
        // What was committed before a run's point is in none of its sinks.
        assert_eq!(mixed(&[sent("a", 2)], &[read_at(101)]), [] as [&str; 0]);
        assert_eq!(mixed(&[sent("a", 2)], &[cancelled(read_at(101))]), ["a", "b"]);
        // The other sink has it from an earlier one.
        let mut of_one = read_at(101);
        of_one.spec.sinks = vec![SinkId::new("b").unwrap()];
        assert_eq!(mixed(&[sent("a", 2)], &[read_at(90), of_one.clone()]), ["a", "b"]);
        assert_eq!(mixed(&[sent("a", 2)], &[read_at(101), of_one]), [] as [&str; 0]);
    }

    /// Partitions of `public.r`, by oid; those from 100 on had rows before.
    fn looked(oids: &[u32]) -> PublishedTables {
        let partition =
            |oid: &u32| Partition { name: table(&format!("r_{oid}")), oid: *oid, place: 7, brought_rows: *oid >= 100 };
        PublishedTables {
            published: published(&[("r", 1)]),
            partitions: [(table("r"), oids.iter().map(partition).collect())].into(),
            ..PublishedTables::default()
        }
    }

    /// A run that read these partitions of `public.r`.
    fn run_of(number: u32, oids: &[u32], state: RunState) -> RunEntry {
        let mut run = run(number, &[("r", 1)]);
        let plan = run.plan.as_mut().unwrap();
        let one = plan.relations.pop().unwrap();
        plan.relations = oids.iter().map(|oid| PlannedRelation { oid: *oid, ..one.clone() }).collect();
        plan.state = state;
        run.spec.tables = vec!["public.r".to_owned()];
        run
    }

    fn told(known: &mut Known, oids: &[u32], runs: &[RunEntry]) -> Vec<String> {
        let told = judge_partitions(known, &looked(oids), Runs { runs, sinks: &sinks() });
        told.into_values().flatten().map(|partition| partition.name).collect()
    }

    #[test]
    fn a_partition_that_came_with_rows_is_told_until_a_later_run_has_it_or_somebody_decided() {
        let mut runs = vec![run_of(1, &[10, 100], RunState::Done)];
        let mut known = known(&[("r", 1, 1)]);
        // As it was found; then one that was made as a partition, and one that had rows.
        assert_eq!(told(&mut known, &[10, 100], &runs), [] as [&str; 0]);
        assert!(is_as_before(&known, &looked(&[10, 100])));
        assert_eq!(told(&mut known, &[10, 11, 100], &runs), [] as [&str; 0]);
        assert_eq!(told(&mut known, &[10, 11, 100, 101], &runs), ["r_101"]);
        assert!(!is_as_before(&known, &looked(&[10, 11, 100, 101])), "it is looked at until it is settled");
        assert_eq!(told(&mut known, &[10, 11, 100, 101], &runs), ["r_101"]);
        // One that stands in a later plan will be read.
        runs.push(run_of(2, &[10, 11, 100, 101], RunState::Reading));
        assert_eq!(told(&mut known, &[10, 11, 100, 101], &runs), [] as [&str; 0]);
        assert!(is_as_before(&known, &looked(&[10, 11, 100, 101])));
        // A cancelled one has not read it, and is what somebody decided.
        assert_eq!(told(&mut known, &[10, 11, 100, 101, 102], &runs), ["r_102"]);
        runs.push(run_of(3, &[], RunState::Planning));
        assert_eq!(told(&mut known, &[10, 11, 100, 101, 102], &runs), ["r_102"]);
        runs[2].spec.wish = RunWish::Cancel;
        runs[2].plan.as_mut().unwrap().state = RunState::Cancelled;
        assert_eq!(told(&mut known, &[10, 11, 100, 101, 102], &runs), [] as [&str; 0]);
    }

    #[test]
    fn a_partition_that_goes_and_comes_back_is_told_whatever_read_it_before() {
        let runs = [run_of(1, &[10, 100], RunState::Done)];
        let mut known = known(&[("r", 1, 0)]);
        assert_eq!(told(&mut known, &[10, 100], &runs), [] as [&str; 0]);
        assert_eq!(told(&mut known, &[10], &runs), [] as [&str; 0]);
        assert_eq!(told(&mut known, &[10, 100], &runs), ["r_100"]);
        let runs = Runs { runs: &runs, sinks: &[] };
        assert!(judge_partitions(&mut known, &looked(&[10, 100]), runs).is_empty(), "nothing is ever loaded");
        // Between two looks.
        let mut moved = looked(&[10, 100]);
        moved.partitions.get_mut(&table("r")).unwrap()[1].place = 8;
        assert!(!is_as_before(&known, &moved));
        let runs = Runs { sinks: &sinks(), ..runs };
        assert_eq!(
            judge_partitions(&mut known, &moved, runs).into_values().flatten().collect::<Vec<_>>(),
            [table("r_100")]
        );
    }
}
