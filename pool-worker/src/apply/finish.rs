//! Indexes, constraints and defaults of tables that the sink made, added in the background of the stream, over a session of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_connector_api::{Sink, SinkError};
use wallaby_model::run::SinkRun;
use wallaby_model::{RunId, SinkId, TableName};

use super::load::named;
use crate::runs::RunView;
use crate::task::TaskContext;

/// Between two tries.
const AGAIN: Duration = Duration::from_secs(10);

/// A run whose tables are to be finished.
pub type Unfinished = (RunId, Vec<TableName>, SinkRun);

/// Runs of which the sink has everything, and whose tables were not finished.
pub fn unfinished(context: &TaskContext, sink: &SinkId) -> Vec<Unfinished> {
    context.runs.of(&context.task.flow, |runs| {
        let open = runs.runs.iter().filter_map(|(run, view)| {
            let state = view.sinks.get(sink).filter(|state| state.is_done && !state.is_finished)?;
            Some(tables_of(*run, view, state.clone()))
        });
        open.collect()
    })
}

/// The tables of a run that the sink took over.
pub fn tables_of(run: RunId, view: &RunView, state: SinkRun) -> Unfinished {
    let relations = view.plan.iter().flat_map(|plan| &plan.relations);
    let mut tables: Vec<TableName> = relations.map(|relation| relation.table.clone()).collect();
    tables.sort();
    tables.dedup();
    (run, tables, state)
}

/// Finishes the tables of runs; ends when dropped.
pub fn start(
    context: &Arc<TaskContext>,
    name: &SinkId,
    mut sink: Box<dyn Sink>,
    runs: Vec<Unfinished>,
) -> AbortOnDropHandle<()> {
    let (context, name) = (Arc::clone(context), name.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        for (run, tables, state) in runs {
            finish(&context, sink.as_mut(), run, &tables).await;
            let state = SinkRun { is_finished: true, ..state };
            if let Err(error) = context.lock.put_sink_run(run, &name, &state).await {
                tracing::debug!(task = %context.task, %run, %error, "it was not noted that the tables are finished");
            }
        }
        sink.close().await;
    }))
}

async fn finish(context: &TaskContext, sink: &mut dyn Sink, run: RunId, tables: &[TableName]) {
    let mut missing = Vec::new();
    for table in tables {
        loop {
            let Some(loads) = sink.loads() else { return };
            match loads.finish(table).await {
                Ok(said) => {
                    missing.extend(said);
                    break;
                }
                Err(SinkError::Fenced(_)) => return,
                Err(error) => {
                    tracing::warn!(task = %context.task, %table, %error, "a table was not finished yet");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
    for said in &missing {
        tracing::warn!(task = %context.task, %run, "{said}");
    }
    tracing::info!(task = %context.task, %run, missing = missing.len(), "indexes and constraints were added to {}", named(tables));
}
