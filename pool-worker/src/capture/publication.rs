//! The tables of the publication while the flow runs: some come, some go, some take another one's name.
//!
//! What a table had before it was published, or before it had its name, is not in the WAL under this name: a run loads it. So that this
//! is known when it counts, which table stood behind each name is kept in etcd, and changed in this order: a table that is not published
//! is forgotten before it is published, and known again only once a run was made that reads it. A capture that dies in between leaves a
//! table that its successor has loaded once more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::{Coordination, Error as EtcdError, FlowEntry, KnownTable, TaskLock};
use wallaby_model::condition::{ConditionType, Timestamp};
use wallaby_model::flow::change::{tables_found, tables_replaced};
use wallaby_model::flow::{PublicationSpec, SnapshotMode};
use wallaby_model::run::{RunSpec, pattern_of};
use wallaby_model::{FlowId, RunId, SinkId, TableName};
use wallaby_postgres_source::{
    ConnectConfig, PublicationWanted, PublishedTables, SentName, SentNames, SourceError, connect_control,
    publish_tables, published_tables, tables_digest, unpublish_tables,
};

use super::CaptureError;
use super::accounted::{Judged, Known, Runs, forget, is_as_before, is_mismatched, judge, judge_partitions, mixed_up};
use crate::failpoint::{Failpoint, Failpoints};
use crate::flows::CaptureDemand;
use crate::status::{StatusBoard, now};
use crate::task::TaskContext;

/// How often it is looked. What is written before the publication has a table is loaded by a run.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks in a row that fail for one reason before that is said.
const FAILURES_SAID: u32 = 3;
/// Tables of one run, at most: its specification is one value in etcd.
const TABLES_AT_ONCE: usize = 2000;

/// The publication as the flow wants it now: tables that were added may be why a task is there. `None` when the flow is gone.
pub fn wanted_now(context: &TaskContext) -> Option<PublicationWanted> {
    let flows = context.flows.borrow();
    let document = &flows.get(&context.task.flow)?.record.document;
    Some(wanted(document.publication_name(), &document.spec.source.postgres.publication))
}

/// The publication of this name as the flow wants it.
pub fn wanted(name: String, spec: &PublicationSpec) -> PublicationWanted {
    PublicationWanted { name, create: spec.create, tables: spec.tables.clone(), exclude: spec.exclude.clone() }
}

/// Looks after the tables; ends when the handle is dropped, or the lock is no longer ours: another specification means another capture.
pub fn start(
    context: &TaskContext,
    config: &ConnectConfig,
    demand: &CaptureDemand,
    sent: SentNames,
) -> AbortOnDropHandle<()> {
    let mut watch = TableWatch {
        coordination: context.shared.coordination.clone(),
        lock: context.lock.clone(),
        status: context.status.clone(),
        flow: context.task.flow.clone(),
        config: config.clone(),
        wanted: wanted(demand.publication.clone(), &demand.source.publication),
        snapshot: demand.source.snapshot,
        failpoints: context.shared.failpoints.clone(),
        sent: Vec::new(),
        known: None,
        judged: None,
        settled: None,
        said: None,
        failing: None,
    };
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let is_due = tokio::select! {
                _ = looks.tick() => true,
                () = sent.changed() => false,
            };
            if !watch.lock.is_valid_now() {
                return;
            }
            if watch.sent.is_empty() {
                watch.sent = sent.take();
            }
            let compared = watch.take_names().await;
            if compared.is_ok() && watch.sent.is_empty() {
                sent.done();
            }
            let done = match compared {
                Ok(is_mixed) if is_due || is_mixed => watch.look().await,
                done => done.map(drop),
            };
            match done {
                Ok(()) if is_due => watch.failing = None,
                Ok(()) => {}
                Err(Failed::Etcd(error)) if error.is_ownership_lost() => return,
                Err(error) => watch.failed(&error),
            }
        }
    }))
}

/// Makes the publication of a flow that has begun what the flow wants by now, as far as it can be: a table that is missing, or not fit,
/// keeps the others from nothing, and is told once changes flow. Only at a server that was found to be the right one.
///
/// # Errors
/// `PublicationMissing`; `PublicationUnfit`; when the source or etcd cannot be asked.
pub async fn settle(context: &TaskContext, config: &ConnectConfig, demand: &CaptureDemand) -> Result<(), CaptureError> {
    let control = connect_control(config).await?;
    let wanted = wanted(demand.publication.clone(), &demand.source.publication);
    let looked = published_tables(&control, &wanted).await?;
    let (coordination, flow) = (&context.shared.coordination, &context.task.flow);
    let before = coordination.known_tables(flow).await?;
    let runs = coordination.runs(flow).await?;
    let runs = Runs { runs: &runs, sinks: &[] };
    let mut known = match &before {
        Some(known) => known.clone(),
        None => {
            let mut known = judge(None, &looked.published, runs).known;
            // They were published when the flow began, or somebody added them since: in either case they are loaded.
            known.extend(looked.absent.iter().map(|table| (table.clone(), KnownTable::unknown(runs.last()))));
            known
        }
    };
    forget(&mut known, &looked.published, runs.last());
    if before.as_ref() != Some(&known) {
        context.lock.put_known_tables(&known).await?;
    }
    // What is refused is told by the first look.
    publish_tables(&control, &wanted.name, &looked.absent).await?;
    unpublish_tables(&control, &wanted.name, &looked.surplus).await?;
    unpublish_tables(&control, &wanted.name, &looked.unsound).await?;
    Ok(())
}

/// Why a look was not finished; the next one tries again.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

/// What is left to do after a look.
#[derive(Default)]
struct Accounted {
    /// Tables wait for a run that is not made yet.
    waits: bool,
    /// Partitions whose rows nobody brings.
    attached: Vec<SourceError>,
}

struct TableWatch {
    coordination: Coordination,
    lock: TaskLock,
    status: StatusBoard,
    flow: FlowId,
    config: ConnectConfig,
    wanted: PublicationWanted,
    snapshot: SnapshotMode,
    failpoints: Failpoints,
    /// Names that came in the stream and are not compared yet.
    sent: Vec<SentName>,
    /// What etcd has; `None` before it was read, or was found to be empty.
    known: Option<Option<Known>>,
    /// The digest under which the runs were looked at last.
    judged: Option<String>,
    /// The digest under which nothing was left to do.
    settled: Option<String>,
    /// What was said last about tables that are not captured.
    said: Option<String>,
    /// Why looks fail, and since how many.
    failing: Option<(String, u32)>,
}

impl TableWatch {
    /// Compares the names that came in the stream with those that are known. True when rows came under a wrong one: the tables are not known
    /// from then on, and looked at.
    async fn take_names(&mut self) -> Result<bool, Failed> {
        if self.sent.is_empty() {
            return Ok(false);
        }
        if self.known.is_none() {
            self.known = Some(self.coordination.known_tables(&self.flow).await?);
        }
        // Before the first look nothing can be said.
        let Some(Some(known)) = &self.known else { return Ok(false) };
        let mut mixed = BTreeSet::new();
        if is_mismatched(known, &self.sent) {
            let runs = self.coordination.runs(&self.flow).await?;
            let flow = self.coordination.flow(&self.flow).await?;
            let sinks: Vec<SinkId> = flow.record.document.spec.sinks.iter().map(|sink| sink.name.clone()).collect();
            let runs = Runs { runs: &runs, sinks: &sinks };
            mixed = mixed_up(known, &self.sent, runs);
            if !mixed.is_empty() {
                tracing::warn!(task = %self.lock.task(), tables = ?mixed, "rows of tables came under the names of others: they are loaded anew");
                let mut known = known.clone();
                known.extend(mixed.iter().map(|table| (table.clone(), KnownTable::unknown(runs.last()))));
                self.put(known).await?;
                (self.judged, self.settled) = (None, None);
            }
        }
        self.sent.clear();
        Ok(!mixed.is_empty())
    }

    async fn look(&mut self) -> Result<(), Failed> {
        let control = connect_control(&self.config).await?;
        let digest = tables_digest(&control, &self.wanted.name).await?;
        if self.settled.as_ref() == Some(&digest) {
            return Ok(());
        }
        self.settled = None;
        let mut looked = match published_tables(&control, &self.wanted).await {
            Err(error) if !error.is_transient() => {
                self.tell(&[error]);
                return Ok(());
            }
            looked => looked?,
        };
        let mut accounted = self.account_for(&looked, &digest).await?;
        // One that was renamed is published under its new name, which nobody asked for.
        let out: BTreeSet<TableName> = looked.unsound.union(&looked.surplus).cloned().collect();
        let mut kept = unpublish_tables(&control, &self.wanted.name, &out).await?;
        if !looked.absent.is_empty() {
            let refused = publish_tables(&control, &self.wanted.name, &looked.absent).await?;
            self.failpoints.stop(Failpoint::StopAfterTablesPublished).await;
            looked = published_tables(&control, &self.wanted).await?;
            kept.extend(refused);
            self.judged = None;
            accounted = self.account_for(&looked, &digest).await?;
        }
        let mut unfit = looked.unfit;
        unfit.extend(kept);
        unfit.extend(accounted.attached);
        self.tell(&unfit);
        if !accounted.waits && looked.absent.is_empty() && out.is_empty() && unfit.is_empty() {
            // As it was before all this: what changed since is looked at next time.
            self.settled = Some(digest);
        }
        Ok(())
    }

    /// Has what came, or took a name, loaded, and notes it.
    async fn account_for(&mut self, looked: &PublishedTables, digest: &str) -> Result<Accounted, Failed> {
        let before = match self.known.take() {
            Some(known) => known,
            None => self.coordination.known_tables(&self.flow).await?,
        };
        // A catalog that changed may be as it was before, while a run read what it was in between.
        if self.judged.as_deref() == Some(digest) && before.as_ref().is_some_and(|known| is_as_before(known, looked)) {
            self.known = Some(before);
            return Ok(Accounted::default());
        }
        let runs = self.coordination.runs(&self.flow).await?;
        let flow = self.coordination.flow(&self.flow).await?;
        let is_loaded = self.snapshot != SnapshotMode::Never;
        let sinks = flow.record.document.spec.sinks.iter().filter(|_| is_loaded).map(|sink| sink.name.clone());
        let sinks: Vec<SinkId> = sinks.collect();
        let runs = Runs { runs: &runs, sinks: &sinks };
        let Judged { mut known, came, replaced, awaited } = judge(before.as_ref(), &looked.published, runs);
        let mut accounted = Accounted { waits: !awaited.is_empty(), attached: Vec::new() };
        for (tables, kind) in [(came, Kind::Came), (replaced, Kind::Replaced)] {
            if sinks.is_empty() {
                self.say_not_loaded(&tables, kind);
                let noted = looked.published.iter().filter(|(table, _)| tables.contains(table));
                known.extend(
                    noted.map(|(table, now)| (table.clone(), KnownTable::new(now.oid, now.member, runs.last()))),
                );
                continue;
            }
            accounted.waits |= !tables.is_empty();
            for (table, run) in self.ask_for(&flow, &tables, kind, runs).await? {
                let member = looked.published.get(&table).map_or(0, |now| now.member);
                known.insert(table, KnownTable { asked: Some(run), member, ..KnownTable::unknown(runs.last()) });
            }
        }
        for (table, partitions) in judge_partitions(&mut known, looked, runs) {
            accounted.attached.push(SourceError::PartitionRows { table, partitions });
        }
        if before.as_ref() != Some(&known) {
            self.put(known).await?;
        } else {
            self.known = Some(before);
        }
        self.judged = Some(digest.to_owned());
        Ok(accounted)
    }

    async fn put(&mut self, known: Known) -> Result<(), Failed> {
        self.lock.put_known_tables(&known).await?;
        self.known = Some(Some(known));
        Ok(())
    }

    /// Makes the runs that load these tables; says for which there is one now. Those of an open run wait for it, and the others do not wait
    /// with them.
    async fn ask_for(
        &self,
        flow: &FlowEntry,
        tables: &BTreeSet<TableName>,
        kind: Kind,
        runs: Runs<'_>,
    ) -> Result<BTreeMap<TableName, RunId>, Failed> {
        let of = |tables: &[&TableName]| kind.run(tables.iter().map(|table| pattern_of(table)).collect(), now());
        // By the open runs that have them.
        let mut groups: BTreeMap<Vec<RunId>, Vec<&TableName>> = BTreeMap::new();
        for table in tables {
            let alone = of(&[table]);
            let open = runs.runs.iter().filter(|run| !run.is_over() && run.spec.overlap(&alone).is_some());
            groups.entry(open.map(|run| run.run).collect()).or_default().push(table);
        }
        let mut made = BTreeMap::new();
        for group in groups.values().flat_map(|tables| tables.chunks(TABLES_AT_ONCE)) {
            match self.coordination.create_run(flow, of(group)).await {
                Ok(entry) => {
                    tracing::info!(task = %self.lock.task(), tables = ?group, run = %entry.run, "{}", kind.text());
                    self.failpoints.stop(Failpoint::StopBeforeTablesKnown).await;
                    made.extend(group.iter().map(|table| ((*table).clone(), entry.run)));
                }
                // Its open run first; or others have to end before.
                Err(error @ (EtcdError::RunOverlaps { .. } | EtcdError::TooManyRuns { .. })) => {
                    tracing::debug!(task = %self.lock.task(), tables = ?group, %error, "no run was made yet");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(made)
    }

    fn say_not_loaded(&self, tables: &BTreeSet<TableName>, kind: Kind) {
        if kind == Kind::Replaced && !tables.is_empty() {
            tracing::warn!(task = %self.lock.task(), ?tables, "{}: what they had before is not loaded (`snapshot: never`, or no sink); sinks keep the rows of their predecessors", kind.text());
        }
    }

    /// A look that may succeed the next time; said when several in a row do not.
    fn failed(&mut self, error: &Failed) {
        // What is in etcd may not be what we wrote last.
        (self.known, self.judged, self.settled) = (None, None, None);
        let (text, count) = self.failing.take().unwrap_or_default();
        let now = error.to_string();
        let count = if text == now { count + 1 } else { 1 };
        if count == FAILURES_SAID {
            tracing::warn!(task = %self.lock.task(), error = %now, "the published tables cannot be looked at: one that comes, or takes another one's name, is not loaded");
        }
        self.failing = Some((now, count));
    }

    /// Says which tables are not captured and why; once, as long as it stays the same.
    fn tell(&mut self, unfit: &[SourceError]) {
        let told: Vec<String> = unfit
            .iter()
            .map(|error| match error.remedy() {
                Some(remedy) if matches!(error, SourceError::PartitionRows { .. }) => {
                    format!("{error}. {}", remedy.replace("FLOW", self.flow.as_str()))
                }
                Some(remedy) => format!("{error}. {remedy}"),
                None => error.to_string(),
            })
            .collect();
        let told = told.join("; ");
        if self.said.as_ref() == Some(&told) {
            return;
        }
        match unfit.first() {
            Some(first) => {
                tracing::warn!(task = %self.lock.task(), "not everything is captured: {told}");
                self.status.condition(ConditionType::SourceReady, false, first.reason(), &told);
            }
            None => self.status.condition(ConditionType::SourceReady, true, "Ready", ""),
        }
        self.said = Some(told);
    }
}

/// How tables came to be published under their names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Came,
    Replaced,
}

impl Kind {
    fn run(self, tables: Vec<String>, at: Timestamp) -> RunSpec {
        match self {
            Kind::Came => tables_found(tables, at),
            Kind::Replaced => tables_replaced(tables, at),
        }
    }

    fn text(self) -> &'static str {
        match self {
            Kind::Came => "tables came to the publication",
            Kind::Replaced => "tables are other ones than those that had their names",
        }
    }
}
