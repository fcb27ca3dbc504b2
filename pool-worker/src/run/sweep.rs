//! What stands of a run in the side store and is of no use: parts that landed after its end, and, while it goes on, parts of readers
//! that died.
//!
//! A part can be on its way while its run is ended. Whoever works with the flow next removes it: the capture's owner now and then, and
//! where nothing is captured (`snapshot: only`) the owner of the next run, before it reads anything.
//!
//! A reader that is killed leaves the parts of its attempt. They would go with the run, but a store that is full of them lets no chunk in,
//! and the run would not end.

use std::collections::{BTreeMap, BTreeSet};

use wallaby_coordination::{Coordination, Revision};
use wallaby_model::run::RunPlan;
use wallaby_model::{ChunkId, Epoch, FlowId, RunId, TaskKind};
use wallaby_staging::{Shelf, SideGroup, SideStore, sweep};

use crate::capture::CaptureError;

/// Removes the parts of runs that are over. Returns the groups that went.
///
/// # Errors
/// As etcd and the side store say; what was removed until then is gone.
pub async fn sweep_chunks(
    coordination: &Coordination,
    flow: &FlowId,
    side: &dyn SideStore,
) -> Result<Vec<SideGroup>, CaptureError> {
    let runs = coordination.runs(flow).await?;
    let Some(last) = runs.iter().map(|run| run.run).max() else { return Ok(Vec::new()) };
    let open: BTreeSet<RunId> = runs.iter().filter(|run| !run.is_over()).map(|run| run.run).collect();
    // What is not known and not younger was forgotten long after it was over.
    let is_kept = |run| run > last || open.contains(&run);
    let keep = |group| match group {
        SideGroup::ChunkAttempt(run, ..) | SideGroup::Run(run) => is_kept(run),
        // Not on this shelf.
        SideGroup::Attempt(_) | SideGroup::Manifest(_) => true,
    };
    Ok(sweep(side, Shelf::Chunks, &keep).await?)
}

/// Removes the parts of attempts at chunks of a run that nobody can make count any more. For the run's owner, whose plan this is.
/// Returns the groups that went.
///
/// # Errors
/// As etcd and the side store say; what was removed until then is gone.
pub async fn sweep_attempts(
    coordination: &Coordination,
    flow: &FlowId,
    run: RunId,
    plan: &RunPlan,
    side: &dyn SideStore,
) -> Result<Vec<SideGroup>, CaptureError> {
    // In this order. Whose parts are listed had fixed its epoch: it holds its lock still, or has lost it, and then its mark stands or will
    // never be written.
    let groups = side.list(Shelf::Chunks).await?;
    let mut locks = BTreeMap::new();
    for lock in coordination.locks(flow).await? {
        if let TaskKind::Chunk(of, chunk) = lock.task.kind
            && of == run
        {
            locks.insert(chunk, lock.create_revision);
        }
    }
    let marks = coordination.run_chunks(flow, run).await?;
    let mut swept = Vec::new();
    for group in groups {
        let SideGroup::ChunkAttempt(of, chunk, attempt) = group else { continue };
        let mark = marks.get(&chunk).map(|done| done.attempt);
        if of == run && is_dead(plan, chunk, attempt, mark, locks.get(&chunk).copied()) {
            side.delete(group).await?;
            swept.push(group);
        }
    }
    Ok(swept)
}

/// Whether an attempt can no longer become the chunk, given what the chunk's mark names and since when its task is owned.
fn is_dead(plan: &RunPlan, chunk: ChunkId, attempt: Epoch, mark: Option<Epoch>, owned: Option<Revision>) -> bool {
    match (mark, owned) {
        (Some(mark), _) => attempt != mark,
        (None, None) => true,
        // Of a table that was started again: nobody wants it, whoever reads it still. A later start is one that a successor of ours knows.
        (None, _) if plan.relations.get(chunk.table as usize).is_some_and(|now| chunk.restart < now.restart) => true,
        // An epoch is above its lock's create revision.
        (None, Some(owned)) => i64::try_from(attempt.0).is_ok_and(|attempt| attempt < owned.0),
    }
}

#[cfg(test)]
mod tests {
    use wallaby_model::TableName;
    use wallaby_model::run::{PlannedRelation, RelationState};

    use super::*;

    fn at_restart(restart: u32) -> RunPlan {
        let table = TableName::new("public", "t");
        let relation = PlannedRelation {
            relation: table.clone(),
            table,
            oid: 1,
            table_oid: 0,
            relfilenode: 1,
            pages: 20,
            chunk_pages: 10,
            restart,
            state: RelationState::Reading,
            rows_estimate: None,
            has_key: true,
        };
        RunPlan { relations: vec![relation], ..RunPlan::default() }
    }

    #[test]
    fn attempts_are_dead_when_no_mark_can_name_them() {
        let plan = at_restart(1);
        let is_dead = |restart, attempt, mark: Option<u64>, owned: Option<i64>| {
            let chunk = ChunkId { table: 0, restart, number: 0 };
            super::is_dead(&plan, chunk, Epoch(attempt), mark.map(Epoch), owned.map(Revision))
        };
        assert!(!is_dead(1, 7, Some(7), None), "it is the chunk");
        assert!(is_dead(1, 6, Some(7), None), "another is");
        assert!(is_dead(1, 8, Some(7), Some(8)), "another is, and this one will hear of it");
        assert!(is_dead(1, 7, None, None), "its reader is gone");
        assert!(is_dead(1, 7, None, Some(9)), "its reader is gone, and another has begun");
        assert!(!is_dead(1, 10, None, Some(9)), "it is being read");
        assert!(is_dead(0, 10, None, Some(9)), "of an earlier start");
        assert!(!is_dead(2, 10, None, Some(9)), "of a start that we do not know");
    }
}
