//! What landed of a run after its end, when everything of it had been removed.
//!
//! A part can be on its way while its run is ended. Whoever works with the flow next removes it: the capture's owner now and then, and
//! where nothing is captured (`snapshot: only`) the owner of the next run, before it reads anything.

use std::collections::BTreeSet;

use wallaby_coordination::Coordination;
use wallaby_model::{FlowId, RunId};
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
