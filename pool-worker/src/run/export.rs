//! One export of a snapshot: what has to be true before it, the session that holds it, and the tables as it sees them.

use std::time::{Duration, Instant};

use wallaby_coordination::Error as EtcdError;
use wallaby_model::run::{Generation, PlannedRelation, RunPlan, RunReason, RunSpec};
use wallaby_model::{Position, RunId, TaskId};
use wallaby_postgres_source::{
    ConnectConfig, Control, PublicationWanted, SessionOwner, SnapshotExport, SourceError, connect_control,
    ensure_publication, published_tables,
};
use wallaby_staging::{Log, StagingError};

use crate::capture::{CaptureError, publication_of};
use crate::chunk::Throttled;
use crate::flows::SourceDemand;
use crate::secret;
use crate::task::TaskContext;

/// How long the export waits for transactions that are older than it.
const EXPORT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a run waits for the capture to publish its tables; it looks every 10 s.
const PUBLICATION_PATIENCE: Duration = Duration::from_secs(30);
const PUBLICATION_LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often it is looked whether the capture has begun the log.
const LOG_LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often the log's end is taken again because a purge passed it.
const PURGE_RACES_MAX: u32 = 8;
/// So many chunks, as large as they are at the source, find room in the side store.
const CHUNKS_AT_A_TIME: u64 = 4;
/// A chunk whose reading is throttled takes a fourth of the time for which a snapshot is held, at most.
pub const CHUNKS_PER_SNAPSHOT: u32 = 4;
/// How long a session holds the snapshot when the flow does not say.
const AGE_MAX: Duration = Duration::from_secs(30 * 60);

/// The session that holds a snapshot; it ends when this is dropped.
pub struct Export {
    session: SnapshotExport,
}

/// How long a session may hold the source's snapshot, as the flow says now.
pub fn age_max(context: &TaskContext) -> Duration {
    let flows = context.flows.borrow();
    let flow = flows.get(&context.task.flow);
    flow.map_or(AGE_MAX, |flow| flow.record.document.spec.source.postgres.safety.snapshot_max.0)
}

impl Export {
    /// Publication, hold, export, in this order; and the run's relations, as they are in the snapshot.
    ///
    /// # Errors
    /// As the source, the log and etcd say.
    pub async fn make(
        context: &TaskContext,
        demand: &SourceDemand,
        run: RunId,
        spec: &RunSpec,
        before: &RunPlan,
    ) -> Result<(Export, Generation, Vec<PlannedRelation>), CaptureError> {
        let Some(epoch) = context.lock.epoch() else { return Err(CaptureError::Invalid) };
        let config = ConnectConfig::parse(&secret::resolve(&demand.dsn)?)?
            .with_application_name(&context.task.session_name(epoch));
        context.pulse.wait("the source");
        let mut unfit = Vec::new();
        if let Some(wanted) = publication_of(context) {
            let control = connect_control(&config).await?;
            let capture = TaskId::capture(&context.task.flow);
            let stands = context.shared.coordination.checkpoint(&capture).await?.and_then(|found| found.position);
            if demand.is_captured && (stands.is_some() || !before.generations.is_empty()) {
                unfit = published(context, &control, &wanted, spec).await?;
            } else {
                ensure_publication(&control, &wanted).await?;
            }
        }
        if demand.is_captured {
            hold(context, run).await?;
        }
        let number = before.generations.last().map_or(1, |last| last.number + 1);
        context.pulse.wait("the source to export a snapshot");
        let owner = SessionOwner { prefix: context.task.session_prefix(), epoch };
        let mut session = SnapshotExport::open(&config, &owner, EXPORT_PATIENCE).await?;
        let generation = Generation {
            number,
            consistent_point: session.consistent_point(),
            snapshot: Some(session.snapshot().to_owned()),
            exported_at: session.exported_at(),
        };
        context.pulse.wait("the source's catalog");
        let log = context.log_spec().ok_or(CaptureError::Invalid)?;
        let chunk_bytes = log.side_chunks_max().0 / CHUNKS_AT_A_TIME;
        let required = required(context, demand.is_captured, spec, before);
        let planned = session.plan_required(&demand.publication, &spec.tables, &required, &spec.exclude, chunk_bytes);
        let mut relations = planned.await.map_err(|error| match (error, unfit.pop()) {
            // Why it is not published says more.
            (SourceError::TableMissing { .. }, Some(unfit)) => unfit,
            (error, _) => error,
        })?;
        if let Some(throttled) = Throttled::of(spec) {
            let rows_max =
                throttled.rows_per_second.saturating_mul(age_max(context).as_secs()) / u64::from(CHUNKS_PER_SNAPSHOT);
            relations.iter_mut().for_each(|relation| cut_by_rows(relation, rows_max));
        }
        Ok((Export { session }, generation, relations))
    }

    /// How long the session has held the snapshot.
    pub fn age(&self) -> Duration {
        self.session.age()
    }

    /// Returns when the session has ended, with what is known of why.
    pub async fn ended(&self) -> String {
        self.session.ended().await.message
    }

    /// Whether one of these relations was rewritten or dropped since it was planned.
    ///
    /// # Errors
    /// As the source says.
    pub async fn is_outdated(&self, relations: &[&PlannedRelation]) -> Result<bool, CaptureError> {
        Ok(self.session.is_outdated(relations).await?)
    }
}

/// Cuts a relation so that a chunk has about so many rows at most: one that is read slowly must be through before its snapshot has been
/// held for as long as it may be.
fn cut_by_rows(relation: &mut PlannedRelation, rows_max: u64) {
    let Some(rows) = relation.rows_estimate.filter(|rows| *rows > 0) else { return };
    let pages = u64::from(relation.pages).saturating_mul(rows_max) / rows;
    relation.chunk_pages = relation.chunk_pages.min(u32::try_from(pages).unwrap_or(u32::MAX)).max(1);
}

/// Waits until the capture has published what the run is to load of a flow that has begun, for a while; says what keeps tables out. The run
/// publishes nothing itself: whoever does has to see to what was changed before in a table that was not published. What went missing is
/// not made again, as by the capture (hazard 20).
async fn published(
    context: &TaskContext,
    control: &Control,
    wanted: &PublicationWanted,
    spec: &RunSpec,
) -> Result<Vec<SourceError>, SourceError> {
    let deadline = Instant::now() + PUBLICATION_PATIENCE;
    loop {
        let looked = published_tables(control, wanted).await?;
        if !looked.absent.iter().any(|table| spec.is_of(table)) || Instant::now() >= deadline {
            return Ok(looked.unfit);
        }
        context.pulse.wait("the capture to publish the tables");
        context.status.waiting(Some("the capture to publish the tables"));
        tokio::time::sleep(PUBLICATION_LOOK_EVERY).await;
    }
}

/// What of the run's tables has to be there: what a person asked for when nothing of it was planned yet; and, where nothing is captured,
/// what the flow's file names. Others may have been dropped since the run was made, and are not waited for, with a hold on the log: the
/// capture tells which it misses, and has them loaded once they come.
fn required(context: &TaskContext, is_captured: bool, spec: &RunSpec, before: &RunPlan) -> Vec<String> {
    let flows = context.flows.borrow();
    let flow = flows.get(&context.task.flow).filter(|_| !is_captured);
    let named = flow.map(|flow| &flow.record.document.spec.source.postgres.publication.tables);
    let is_asked = spec.reason == RunReason::Asked && before.generations.is_empty();
    let is_required = |table: &&String| is_asked || named.is_some_and(|named| named.contains(table));
    spec.tables.iter().filter(is_required).cloned().collect()
}

/// Holds the log from its end, which must be there already: the snapshot comes after it.
async fn hold(context: &TaskContext, run: RunId) -> Result<(), CaptureError> {
    let log = Log::new(context.task.flow.clone(), context.shared.nats().await?.clone());
    for _ in 0..PURGE_RACES_MAX {
        let end = log_end(context, &log).await?;
        match context.lock.put_hold(run, Some(end)).await {
            Ok(_) => return Ok(()),
            Err(EtcdError::HoldBelowPurge { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(EtcdError::Refused {
        doing: "holding the log",
        cause: "it was purged past its end at each of many attempts".to_owned(),
    }
    .into())
}

async fn log_end(context: &TaskContext, log: &Log) -> Result<Position, CaptureError> {
    loop {
        context.pulse.wait("the capture's first record in the log");
        match log.tail().await {
            Ok(tail) => {
                if let Some(end) = tail.end {
                    return Ok(end);
                }
            }
            Err(StagingError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        context.status.waiting(Some("the capture's first record in the log"));
        tokio::time::sleep(LOG_LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wallaby_model::TableName;
    use wallaby_model::run::RelationState;

    #[test]
    fn a_throttled_chunk_has_no_more_rows_than_are_read_in_its_time() {
        let cut = |rows_estimate, rows_max| {
            let table = TableName::new("public", "t");
            let mut relation = PlannedRelation {
                relation: table.clone(),
                table,
                oid: 1,
                table_oid: 0,
                relfilenode: 1,
                pages: 1000,
                chunk_pages: 500,
                restart: 0,
                state: RelationState::Reading,
                rows_estimate,
                has_key: true,
            };
            cut_by_rows(&mut relation, rows_max);
            relation.chunk_pages
        };
        assert_eq!(cut(Some(30_000), 3000), 100);
        assert_eq!(cut(Some(30_000), 3_000_000), 500, "it is small enough");
        assert_eq!(cut(Some(30_000), 1), 1, "a page is the least");
        assert_eq!(cut(None, 1), 500, "nothing is known of it");
        assert_eq!(cut(Some(0), 1), 500);
    }
}
