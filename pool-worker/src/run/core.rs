//! What the owner of a run does next, and what a new export makes of its plan: pure, no I/O.
//!
//! A relation is void when what was read of it cannot be made whole any more: it was rewritten, it has no key by which
//! rows of two snapshots converge, or the side store lost a part. All relations of one table (its partitions) are void
//! together: a sink empties the table, not the partition.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use wallaby_model::run::{ChunkDone, Generation, PlannedRelation, RelationState, RunPlan, RunState, RunWish};
use wallaby_model::{ChunkId, TableName};

/// The exporting session as its owner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// How long it has held the snapshot.
    pub age: Duration,
    /// A relation of which chunks are missing was rewritten or dropped since it was planned.
    pub is_outdated: bool,
}

/// What the owner knows.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What is wanted.
    pub wish: RunWish,
    /// The plan.
    pub plan: &'a RunPlan,
    /// The chunks that are read.
    pub done: &'a BTreeMap<ChunkId, ChunkDone>,
    /// Chunks of which the side store lost a part.
    pub lost: &'a BTreeSet<ChunkId>,
    /// The session, while there is one.
    pub session: Option<Session>,
    /// How long a session may hold the snapshot.
    pub age_max: Duration,
    /// The flow's slot holds back so much WAL that nothing is to be read meanwhile (`safety.onExceeded: pauseSnapshot`).
    pub waits_for_slot: bool,
    /// Sinks that have not taken everything over.
    pub sinks_open: usize,
    /// Every sink of the run went away, or was cut off from the log: nobody wants it any more.
    pub is_unwanted: bool,
}

/// What is done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A snapshot is exported, and the plan made over for it. An older session is given up before.
    Export(&'static str),
    /// The session is given up; why.
    GiveUp(&'static str),
    /// Every chunk is read: the session is given up, the sinks load on.
    BeginLoading,
    /// The run is over, in this state.
    End(RunState),
    /// Nothing; what is waited for.
    Wait(&'static str),
}

/// Decides.
pub fn next(now: Situation<'_>) -> Step {
    if now.plan.state.is_over() {
        return Step::End(now.plan.state);
    }
    if now.wish == RunWish::Cancel || now.is_unwanted {
        return Step::End(RunState::Cancelled);
    }
    if is_read(now.plan, now.done, now.lost) {
        return match (now.plan.state, now.sinks_open) {
            (RunState::Loading, 0) => Step::End(RunState::Done),
            (RunState::Loading, _) => Step::Wait("the sinks"),
            _ => Step::BeginLoading,
        };
    }
    let pauses = match (now.wish, now.waits_for_slot) {
        (RunWish::Pause, _) => Some(("paused", "a person: the run is paused")),
        (_, true) => Some(("the flow's slot holds back too much WAL", "the flow's slot to hold back less WAL")),
        _ => None,
    };
    if let Some((why, waits_for)) = pauses {
        // A snapshot, and the slot that it was exported with, hold back WAL and vacuum themselves.
        let is_held = now.session.is_some() || now.plan.snapshot().is_some();
        return if is_held { Step::GiveUp(why) } else { Step::Wait(waits_for) };
    }
    match now.session {
        None => Step::Export("no session holds a snapshot"),
        Some(session) if session.is_outdated => Step::Export("a table was rewritten or dropped"),
        Some(_) if !void_by_loss(now.plan, now.lost).is_empty() => Step::Export("the side store lost a part"),
        Some(session) if session.age >= now.age_max => Step::Export("the snapshot was held for too long"),
        Some(_) => Step::Wait("the chunks to be read"),
    }
}

/// Whether every chunk is read. A plan that no export was made for has none.
fn is_read(plan: &RunPlan, done: &BTreeMap<ChunkId, ChunkDone>, lost: &BTreeSet<ChunkId>) -> bool {
    !plan.generations.is_empty() && plan.chunks().all(|chunk| done.contains_key(&chunk) && !lost.contains(&chunk))
}

/// Tables of which a part was lost at their present restart.
fn void_by_loss<'a>(plan: &'a RunPlan, lost: &BTreeSet<ChunkId>) -> HashSet<&'a TableName> {
    let of = |chunk: &ChunkId| {
        let relation = plan.relations.get(usize::try_from(chunk.table).ok()?)?;
        (relation.restart == chunk.restart && relation.state == RelationState::Reading).then_some(&relation.table)
    };
    lost.iter().filter_map(of).collect()
}

/// The relations of which chunks are missing: their index and what was planned.
pub fn unfinished<'a>(
    plan: &'a RunPlan,
    done: &BTreeMap<ChunkId, ChunkDone>,
) -> impl Iterator<Item = (usize, &'a PlannedRelation)> {
    let open: BTreeSet<u32> =
        plan.chunks().filter(|chunk| !done.contains_key(chunk)).map(|chunk| chunk.table).collect();
    let is_open = move |index: usize| u32::try_from(index).is_ok_and(|index| open.contains(&index));
    plan.relations.iter().enumerate().filter(move |(index, _)| is_open(*index))
}

/// What is known of the chunks when a plan is made over.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The chunks that are read.
    pub done: &'a BTreeMap<ChunkId, ChunkDone>,
    /// Chunks of which the side store lost a part.
    pub lost: &'a BTreeSet<ChunkId>,
    /// Whether the log makes rows of two snapshots converge, in tables with a key.
    pub may_mix: bool,
}

/// The plan under a new export. `fresh` is what the publication has now of the run's tables, as planned inside the new snapshot.
pub fn replan(mut plan: RunPlan, fresh: Vec<PlannedRelation>, generation: Generation, known: Known<'_>) -> RunPlan {
    let Known { done, lost, .. } = known;
    let lost_tables: HashSet<TableName> = void_by_loss(&plan, lost).into_iter().cloned().collect();
    let by_name: HashMap<TableName, PlannedRelation> =
        fresh.iter().map(|relation| (relation.relation.clone(), relation.clone())).collect();
    let fates = fates(&plan, &by_name, known);
    let void: HashSet<TableName> = plan
        .relations
        .iter()
        .zip(&fates)
        .filter(|(relation, fate)| **fate == Fate::Void || lost_tables.contains(&relation.table))
        .map(|(relation, _)| relation.table.clone())
        .collect();
    let mut restarts: HashMap<TableName, u32> = HashMap::new();
    for (relation, fate) in plan.relations.iter_mut().zip(&fates) {
        if void.contains(&relation.table) {
            relation.restart += 1;
        }
        let restart = restarts.entry(relation.table.clone()).or_insert(relation.restart);
        *restart = relation.restart.max(*restart);
        match by_name.get(&relation.relation) {
            _ if *fate == Fate::Gone => relation.state = RelationState::Gone,
            Some(now) if void.contains(&relation.table) => {
                *relation = PlannedRelation { restart: relation.restart, ..now.clone() };
            }
            _ => {}
        }
    }
    add_new(&mut plan, fresh, &restarts, &void, done);
    // What was exported before is of no use to anybody any more.
    for older in &mut plan.generations {
        older.snapshot = None;
    }
    plan.generations.push(generation);
    plan.state = RunState::Reading;
    plan
}

/// Relations that were not planned before. Not of a table that is read whole already: what a new partition holds came through the
/// log.
fn add_new(
    plan: &mut RunPlan,
    fresh: Vec<PlannedRelation>,
    restarts: &HashMap<TableName, u32>,
    void: &HashSet<TableName>,
    done: &BTreeMap<ChunkId, ChunkDone>,
) {
    let known: HashSet<TableName> = plan.relations.iter().map(|relation| relation.relation.clone()).collect();
    let open: HashSet<TableName> = unfinished(plan, done).map(|(_, relation)| relation.table.clone()).collect();
    for relation in fresh {
        let is_new_table = !restarts.contains_key(&relation.table);
        let is_wanted = is_new_table || void.contains(&relation.table) || open.contains(&relation.table);
        if is_wanted && !known.contains(&relation.relation) {
            let restart = restarts.get(&relation.table).copied().unwrap_or(0);
            plan.relations.push(PlannedRelation { restart, ..relation });
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Void,
    Gone,
}

/// What becomes of each planned relation by itself.
fn fates(plan: &RunPlan, fresh: &HashMap<TableName, PlannedRelation>, known: Known<'_>) -> Vec<Fate> {
    let done = known.done;
    let open: HashSet<usize> = unfinished(plan, done).map(|(index, _)| index).collect();
    let begun: HashSet<u32> = done
        .keys()
        .filter(|chunk| plan.relations.get(chunk.table as usize).is_some_and(|of| of.restart == chunk.restart))
        .map(|chunk| chunk.table)
        .collect();
    let of = |(index, relation): (usize, &PlannedRelation)| {
        let is_begun = u32::try_from(index).is_ok_and(|index| begun.contains(&index));
        if relation.state == RelationState::Gone {
            return if fresh.contains_key(&relation.relation) { Fate::Void } else { Fate::Gone };
        }
        match fresh.get(&relation.relation) {
            None => Fate::Gone,
            Some(_) if !open.contains(&index) => Fate::Keep,
            Some(now) if now.oid != relation.oid || now.relfilenode != relation.relfilenode => Fate::Void,
            // A late chunk of the former export could still come in beside those of this one: never without a key.
            Some(_) if !relation.has_key || !known.may_mix => Fate::Void,
            // Nothing is lost, and it may have grown.
            Some(_) if !is_begun => Fate::Void,
            Some(_) => Fate::Keep,
        }
    };
    plan.relations.iter().enumerate().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use wallaby_model::condition::Timestamp;
    use wallaby_model::{Epoch, Lsn, WorkerId};

    fn relation(name: &str, pages: u32, has_key: bool) -> PlannedRelation {
        let table = TableName::new("public", name);
        PlannedRelation {
            relation: table.clone(),
            table,
            oid: 1,
            table_oid: 0,
            relfilenode: 1,
            pages,
            chunk_pages: 10,
            restart: 0,
            state: RelationState::Reading,
            rows_estimate: None,
            has_key,
        }
    }

    fn generation(number: u32, snapshot: bool) -> Generation {
        Generation {
            number,
            consistent_point: Lsn(u64::from(number) * 100),
            snapshot: snapshot.then(|| format!("s{number}")),
            exported_at: Timestamp(0),
        }
    }

    fn chunk(table: u32, restart: u32, number: u32) -> ChunkId {
        ChunkId { table, restart, number }
    }

    fn read(chunks: &[ChunkId]) -> BTreeMap<ChunkId, ChunkDone> {
        #[allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
        let done = ChunkDone {
            attempt: Epoch(1),
            consistent_point: Lsn(100),
            parts: 1,
            rows: 1,
            bytes: 1,
            checksum: 1,
            worker: WorkerId::new("w").unwrap(),
            took_ms: 1,
        };
        chunks.iter().map(|chunk| (*chunk, done.clone())).collect()
    }

    fn plan(relations: Vec<PlannedRelation>) -> RunPlan {
        let state = RunState::Reading;
        RunPlan { state, generations: vec![generation(1, true)], relations, ..RunPlan::default() }
    }

    fn situation<'a>(
        plan: &'a RunPlan,
        done: &'a BTreeMap<ChunkId, ChunkDone>,
        lost: &'a BTreeSet<ChunkId>,
    ) -> Situation<'a> {
        Situation {
            wish: RunWish::Go,
            plan,
            done,
            lost,
            session: None,
            age_max: Duration::from_secs(60),
            waits_for_slot: false,
            sinks_open: 1,
            is_unwanted: false,
        }
    }

    fn known<'a>(done: &'a BTreeMap<ChunkId, ChunkDone>, lost: &'a BTreeSet<ChunkId>) -> Known<'a> {
        Known { done, lost, may_mix: true }
    }

    #[test]
    fn a_run_goes_its_way() {
        let none = BTreeSet::new();
        let empty = RunPlan::default();
        let nothing = read(&[]);
        assert!(matches!(next(situation(&empty, &nothing, &none)), Step::Export(_)));
        let plan_ = plan(vec![relation("a", 15, true)]);
        let young = Some(Session { age: Duration::ZERO, is_outdated: false });
        let one = read(&[chunk(0, 0, 0)]);
        let reading = Situation { session: young, ..situation(&plan_, &one, &none) };
        assert!(matches!(next(reading), Step::Wait(_)));
        let old = Some(Session { age: Duration::from_secs(60), is_outdated: false });
        assert!(matches!(next(Situation { session: old, ..reading }), Step::Export(_)));
        let outdated = Some(Session { age: Duration::ZERO, is_outdated: true });
        assert!(matches!(next(Situation { session: outdated, ..reading }), Step::Export(_)));
        assert!(matches!(next(Situation { wish: RunWish::Pause, ..reading }), Step::GiveUp(_)));
        let behind = Situation { waits_for_slot: true, ..reading };
        assert!(matches!(next(behind), Step::GiveUp(_)));
        assert_eq!(next(Situation { wish: RunWish::Cancel, ..reading }), Step::End(RunState::Cancelled));
        let all = read(&[chunk(0, 0, 0), chunk(0, 0, 1)]);
        assert_eq!(next(Situation { done: &all, ..reading }), Step::BeginLoading);
        assert_eq!(next(Situation { done: &all, ..behind }), Step::BeginLoading, "nothing is left to be read");
        let loading = RunPlan { state: RunState::Loading, ..plan_.clone() };
        let loaded = Situation { plan: &loading, done: &all, session: None, ..reading };
        assert!(matches!(next(loaded), Step::Wait(_)));
        assert_eq!(next(Situation { sinks_open: 0, ..loaded }), Step::End(RunState::Done));
        let lost = BTreeSet::from([chunk(0, 0, 1)]);
        assert!(matches!(next(Situation { lost: &lost, ..loaded }), Step::Export(_)), "a lost part is read again");
    }

    #[test]
    fn a_paused_run_gives_its_session_up_once() {
        let none = BTreeSet::new();
        let mut plan = plan(vec![relation("a", 15, true)]);
        let done = read(&[]);
        plan.generations[0].snapshot = None;
        let paused = Situation { wish: RunWish::Pause, ..situation(&plan, &done, &none) };
        assert!(matches!(next(paused), Step::Wait(_)));
        let behind = Situation { wish: RunWish::Go, waits_for_slot: true, ..paused };
        assert!(matches!(next(behind), Step::Wait(_)), "it is not exported again");
        assert!(matches!(next(Situation { waits_for_slot: false, ..behind }), Step::Export(_)));
    }

    #[test]
    fn h23_a_dead_session_costs_what_may_not_be_mixed_and_nothing_else() {
        let relations = vec![relation("keyed", 25, true), relation("keyless", 25, false), relation("whole", 5, false)];
        let done = read(&[chunk(0, 0, 0), chunk(0, 0, 2), chunk(1, 0, 1), chunk(2, 0, 0)]);
        let after = replan(plan(relations.clone()), relations, generation(2, true), known(&done, &BTreeSet::new()));
        assert_eq!(after.relations.iter().map(|r| r.restart).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(after.generations[0].snapshot, None);
        assert_eq!(after.snapshot().map(|generation| generation.number), Some(2));
        let open: Vec<ChunkId> = after.chunks().filter(|chunk| !done.contains_key(chunk)).collect();
        assert_eq!(open, [chunk(0, 0, 1), chunk(1, 1, 0), chunk(1, 1, 1), chunk(1, 1, 2)]);
    }

    #[test]
    fn h01_a_rewritten_table_starts_again_with_all_its_partitions() {
        let mut parts = vec![relation("p1", 5, true), relation("p2", 25, true), relation("other", 25, true)];
        for part in &mut parts[..2] {
            part.table = TableName::new("public", "root");
        }
        let done = read(&[chunk(0, 0, 0), chunk(1, 0, 0), chunk(2, 0, 0)]);
        let mut fresh = parts.clone();
        fresh[1].relfilenode = 9;
        let after = replan(plan(parts), fresh, generation(2, true), known(&done, &BTreeSet::new()));
        assert_eq!(after.relations.iter().map(|r| r.restart).collect::<Vec<_>>(), [1, 1, 0]);
        assert_eq!(after.relations[1].relfilenode, 9);
    }

    #[test]
    fn a_table_that_was_rewritten_after_it_was_read_stays_read() {
        let relations = vec![relation("a", 5, true), relation("b", 25, true)];
        let done = read(&[chunk(0, 0, 0), chunk(1, 0, 0)]);
        let mut fresh = relations.clone();
        fresh[0].relfilenode = 9;
        let after = replan(plan(relations), fresh, generation(2, true), known(&done, &BTreeSet::new()));
        assert_eq!(after.relations[0].restart, 0);
    }

    #[test]
    fn dropped_tables_go_and_new_ones_come() {
        let relations = vec![relation("gone", 25, true), relation("b", 25, true)];
        let done = read(&[chunk(1, 0, 0)]);
        let fresh = vec![relations[1].clone(), relation("new", 5, true)];
        let after = replan(plan(relations), fresh, generation(2, true), known(&done, &BTreeSet::new()));
        assert_eq!(after.relations[0].state, RelationState::Gone);
        assert_eq!(after.relations[2].table.name, "new");
        assert!(after.chunks().all(|chunk| chunk.table != 0));
    }

    #[test]
    fn a_lost_part_voids_its_table_at_its_present_restart_only() {
        let relations = vec![relation("a", 5, true), relation("b", 5, true)];
        let done = read(&[chunk(0, 0, 0), chunk(1, 0, 0)]);
        let lost = BTreeSet::from([chunk(0, 0, 0)]);
        let after = replan(plan(relations.clone()), relations.clone(), generation(2, true), known(&done, &lost));
        assert_eq!(after.relations.iter().map(|r| r.restart).collect::<Vec<_>>(), [1, 0]);
        let again =
            replan(after, relations, generation(3, true), known(&read(&[chunk(0, 1, 0), chunk(1, 0, 0)]), &lost));
        assert_eq!(again.relations[0].restart, 1, "the loss of an older restart is no news");
    }
}
