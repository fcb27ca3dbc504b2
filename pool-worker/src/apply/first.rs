//! A sink that has no position: its first load, or the load anew of one that was cut off from the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wallaby_connector_api::Sink;
use wallaby_model::condition::{ConditionType, TaskPhase};
use wallaby_model::flow::SnapshotMode;
use wallaby_model::run::{RunPlan, RunState};
use wallaby_model::{Position, SinkId};

use super::load::{Loads, Stepped};
use super::{ApplyError, finish, session, tables};
use crate::failpoint::Failpoint;
use crate::flows::ApplyDemand;
use crate::run::move_hold;
use crate::task::TaskContext;

/// How often it is looked again although no run changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the hold is moved.
const HOLD_EVERY: Duration = Duration::from_secs(3);
/// Changes of the runs are looked at no more often than this: thousands of chunks come in.
const PACE: Duration = Duration::from_millis(100);

/// Says whether a sink that was just opened must be loaded anew because it was cut off from the log, and if so forgets where it
/// stood. etcd is asked, not the watch: that may be behind.
///
/// # Errors
/// As etcd and the sink say.
pub async fn take_stock(
    context: &TaskContext,
    name: &SinkId,
    sink: &mut dyn Sink,
    loads: &mut Loads,
    position: Option<Position>,
) -> Result<bool, ApplyError> {
    let Some(detached) = context.shared.coordination.detached(&context.task.flow, name).await? else {
        return Ok(false);
    };
    if position.is_some() && detached.run.is_some_and(|run| loads.was_begun_by(run)) {
        // The run has brought it back already; only the note of that is missing.
        return Ok(false);
    }
    tracing::warn!(task = %context.task, reason = detached.reason, "the sink was cut off from the log: it is loaded anew");
    if position.is_some()
        && let Some(tables) = sink.loads()
    {
        context.pulse.wait("the sink to forget its position");
        tables.start_anew().await?;
    }
    loads.refresh(sink).await?;
    Ok(true)
}

/// Sees a run load the sink. The position at which its stream begins; `None` when the task was asked to end.
///
/// # Errors
/// As the sink, the side store and etcd say.
pub async fn load(
    context: &Arc<TaskContext>,
    demand: &ApplyDemand,
    sink: &mut dyn Sink,
    loads: &mut Loads,
) -> Result<Option<Position>, ApplyError> {
    let mut changes = context.runs.changes();
    let ending = context.ending();
    tokio::pin!(ending);
    context.status.phase(TaskPhase::Opening);
    let mut finishing = None;
    let mut held_at = Instant::now();
    loop {
        changes.borrow_and_update();
        match loads.step(context, sink, None).await? {
            Stepped::Begin { from } => {
                context.status.waiting(None);
                return Ok(Some(from));
            }
            Stepped::Moved => {
                context.stop_at(Failpoint::StopAfterTableMade).await;
                context.pulse.beat();
                continue;
            }
            // With `snapshot: only` that is all: no stream follows.
            Stepped::Done { run, state } => {
                let tables = context.runs.run(&context.task.flow, run, |view| finish::tables_of(run, view, state));
                let unopened = session::make(context, demand)?;
                finishing = Some(finish::start(context, &demand.sink.name, unopened, tables.into_iter().collect()));
                continue;
            }
            Stepped::Idle | Stepped::Replay(_) => {}
        }
        if held_at.elapsed() >= HOLD_EVERY
            && demand.snapshot != SnapshotMode::Only
            && let Some(plan) = plan_of(context, loads.sink())
        {
            held_at = Instant::now();
            move_hold(context, &plan, loads.sink()).await?;
        }
        let waits_for = waits_for(context, loads);
        context.pulse.wait(waits_for.clone());
        context.status.waiting(Some(&waits_for));
        context.status.condition(ConditionType::Delivering, false, "Loading", &waits_for);
        let news = async {
            tokio::time::sleep(PACE).await;
            let _the_clock_comes_too = tokio::time::timeout(LOOK_EVERY, changes.changed()).await;
        };
        tokio::select! {
            _ = &mut ending => {
                drop(finishing);
                return Ok(None);
            }
            () = news => {}
        }
        context.pulse.beat();
    }
}

/// The plan that the log is held for until a run has brought the sink to life.
fn plan_of(context: &TaskContext, sink: &SinkId) -> Option<RunPlan> {
    context.runs.of(&context.task.flow, |runs| tables::lowest_plan(runs, sink).cloned())
}

/// What the load waits for, for people.
fn waits_for(context: &TaskContext, loads: &Loads) -> String {
    context.runs.of(&context.task.flow, |runs| {
        if let Some(detached) = runs.detached.get(loads.sink())
            && detached.run.is_none()
        {
            return format!("the run that loads it anew: it was cut off from the log ({})", detached.reason);
        }
        let Some(open) = tables::open_runs(runs, loads.sink()).next() else {
            return "a run that loads it (wallaby snapshot start)".to_owned();
        };
        let run = open.run;
        match open.plan.filter(|plan| plan.state != RunState::Planning) {
            None => format!("the plan of run {run}"),
            Some(plan) => {
                let loaded = open.view.loaded.get(loads.sink()).map_or(0, |loaded| loaded.len());
                format!("run {run}: {loaded} of {} chunks are loaded", plan.chunks().count())
            }
        }
    })
}
