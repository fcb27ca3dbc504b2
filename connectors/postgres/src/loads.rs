//! The first load's part of the sink: a state for each table, and the hand-over from its copy to the main stream.
//!
//! Every change of a mark happens under the lock on the task's checkpoint row, so an owner that was replaced changes nothing.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_postgres::types::Type;
use wallaby_connector_api::{Batch, Portions, SinkError, TableExtras, TableLoads, TableMark};
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, Position, RunId, TableName, TableSchema};

use crate::catalog::{DDL_LOCK_TIMEOUT, Fitting, Of, lock_timeout, read_existing};
use crate::checkpoint;
use crate::error::{Doing, PostgresError};
use crate::extras;
use crate::large::{narrowed, only};
use crate::marks::{self, Kept, Locking};
use crate::metrics::LOG_ROWS;
use crate::session::not_open;
use crate::sink::PostgresSink;
use crate::transaction::{Moves, Open};

/// How long emptying a table waits for loads of it that are under way: longer than the server keeps one that is frozen.
const LOADS_END_WITHIN: &str = "40s";

/// A change of marks.
enum Change<'a> {
    Prepare { run: RunId, restart: u32, shape: &'a Arc<TableSchema> },
    Mark { tables: &'a [TableName], stage: TableStage, position: Position },
    Forget(RunId),
    StartAnew,
}

impl PostgresSink {
    /// Makes a change in a transaction of its own, under the task's epoch.
    async fn guarded(&mut self, change: Change<'_>) -> Result<(), SinkError> {
        let outcome = self.guarded_transaction(change).await;
        outcome.map_err(|error| self.write_failed(error))
    }

    async fn guarded_transaction(&mut self, change: Change<'_>) -> Result<(), PostgresError> {
        let mut open = self.open.take().ok_or_else(not_open)?;
        let mark = open.session.mark();
        let outcome = match open.begin_guarded(&self.task, checkpoint::LOCK).await {
            Ok(()) => self.change(&mut open, &change).await,
            Err(error) => Err(error),
        };
        let outcome = match outcome {
            Ok(()) => {
                open.session.suffer(self.config.faults.before_commit.as_ref()).await;
                open.session.client.batch_execute("COMMIT").await.doing(|| "committing at the sink".to_owned())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            open.taken_back(&error, mark).await?;
            return Err(error);
        }
        open.session.transaction_ended().await?;
        // A table of the change may have been made or widened, here or by who loaded it. What is known of the others stays: the stream
        // goes on, and reading each of them again is what it would wait for.
        match change {
            Change::Prepare { shape, .. } => open.targets.retain(|known, _| known.table != shape.table),
            Change::Mark { tables, stage, .. } => {
                open.targets.retain(|known, _| !tables.contains(&known.table));
                if let (TableStage::Gone, Some(owners)) = (stage, &mut open.owners) {
                    owners.retain(|_, owner| !tables.contains(owner));
                }
            }
            // Which chunks are loaded says nothing of a table.
            Change::Forget(_) => {}
            Change::StartAnew => {
                open.targets.clear();
                open.position = None;
                open.owners = None;
            }
        }
        self.open = Some(open);
        Ok(())
    }

    async fn change(&self, open: &mut Open, change: &Change<'_>) -> Result<(), PostgresError> {
        let (client, task) = (&open.session.client, &self.task.task);
        match change {
            Change::Prepare { run, restart, shape } => self.prepare_table(open, *run, *restart, shape).await,
            Change::Mark { tables, stage, position } => {
                let main = checkpoint::position(client, task).await?;
                // In one order for all, so that two who lock several never wait for each other.
                let mut tables = tables.to_vec();
                tables.sort_unstable();
                for table in &tables {
                    let kept = marks::read(client, task, table, Locking::Update).await?;
                    if is_to_move(table, kept.as_ref(), main, *stage, *position)? {
                        marks::put_stage(client, task, table, *stage, *position).await?;
                    }
                }
                Ok(())
            }
            Change::Forget(run) => marks::forget(client, task, *run).await,
            Change::StartAnew => marks::start_anew(client, task).await,
        }
    }

    async fn prepare_table(
        &self,
        open: &mut Open,
        run: RunId,
        restart: u32,
        shape: &Arc<TableSchema>,
    ) -> Result<(), PostgresError> {
        let (client, task, table) = (&open.session.client, &self.task.task, &shape.table);
        lock_timeout(client, LOADS_END_WITHIN).await?;
        let kept = marks::read(client, task, table, Locking::Update).await?;
        lock_timeout(client, "0").await?;
        if kept.as_ref().is_some_and(|kept| is_prepared(kept, run, restart)) {
            return Ok(());
        }
        open.claim(&self.config, task, table).await?;
        let client = &open.session.client;
        let here = self.config.target_table(table);
        let mut is_new = read_existing(client, &here).await?.is_none();
        let was_made_here = kept.is_some_and(|kept| kept.made_here);
        let lookup = self.task.lookup.as_ref();
        let fitting = Fitting { session: &open.session, task, lookup, sink: &self.name };
        match fitting.fit(shape, &here, Position::ZERO, Of::Prepared).await {
            // It is emptied in any case, and was made by us for a table that looked otherwise.
            Err(misfit @ PostgresError::Shape { .. }) if was_made_here && !is_new => {
                let Some(grants) = drop_table(client, &here).await? else { return Err(misfit) };
                is_new = true;
                fitting.fit(shape, &here, Position::ZERO, Of::Prepared).await?;
                for grant in grants {
                    client.batch_execute(&grant).await.doing(|| format!("running {grant} at the sink"))?;
                }
            }
            fitted => _ = fitted?,
        }
        let made_here = is_new || was_made_here;
        let mut owed = Vec::new();
        if !is_new {
            let extras = match made_here {
                true => open.session.wait_for(self.task.lookup.extras(table)).await??,
                false => TableExtras::default(),
            };
            lock_timeout(client, DDL_LOCK_TIMEOUT).await?;
            owed = extras::empty(client, &here).await?;
            extras::take_off(client, shape, &here, &extras).await?;
            lock_timeout(client, "0").await?;
        }
        marks::put_copying(client, task, table, (run, restart), made_here, &owed).await
    }

    /// The parts of a batch that are of these tables.
    fn replayed(&mut self, tables: &[TableName], batch: &Batch) -> Batch {
        let filter = only(tables);
        Batch { parts: batch.parts.iter().map(|part| narrowed(part, &filter)).collect(), ..batch.clone() }
    }
}

/// Whether a person has put something on a table that would go with it, or keeps it from going: another owner, views, rules, foreign keys
/// of others, tables that inherit, triggers, policies, publications, statistics, grants on columns.
const RESTS_SQL: &str = "
SELECT c.relrowsecurity OR c.relowner <> (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user)
    OR EXISTS (SELECT FROM pg_catalog.pg_rewrite WHERE ev_class = c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_publication_rel WHERE prrelid = c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_statistic_ext WHERE stxrelid = c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attacl IS NOT NULL)
    OR EXISTS (SELECT FROM pg_catalog.pg_policy WHERE polrelid = c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal)
    OR EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE confrelid = c.oid AND conrelid <> c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = c.oid OR inhrelid = c.oid)
    OR EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid AND r.ev_class <> c.oid
               WHERE d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = c.oid)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";

/// What others may do with a table, as statements.
const GRANTS_SQL: &str = "
SELECT pg_catalog.format('GRANT %s ON TABLE %I.%I TO %s%s', a.privilege_type, n.nspname, c.relname,
    CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END,
    CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) a
WHERE n.nspname = $1 AND c.relname = $2 AND a.grantee <> c.relowner";

/// Drops a table of ours, with its rows and whatever indexes it has; returns the statements that grant again what others were granted on
/// it. `None`, and nothing is dropped, when a person has put more on it.
async fn drop_table(client: &tokio_postgres::Client, here: &TableName) -> Result<Option<Vec<String>>, PostgresError> {
    let names: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
        [(&here.schema, Type::TEXT), (&here.name, Type::TEXT)];
    let rests = client.query_typed(RESTS_SQL, &names).await.doing(|| format!("looking what rests on {here}"))?;
    if rests.iter().any(|row| row.get(0)) {
        return Ok(None);
    }
    let grants = client.query_typed(GRANTS_SQL, &names).await.doing(|| format!("reading the grants on {here}"))?;
    tracing::warn!(table = %here, "what is to be loaded has not the shape of this table: it is dropped and made anew");
    lock_timeout(client, DDL_LOCK_TIMEOUT).await?;
    let statement = format!("DROP TABLE {}", here.quoted());
    client.batch_execute(&statement).await.doing(|| format!("running {statement} at the sink"))?;
    lock_timeout(client, "0").await?;
    Ok(Some(grants.iter().map(|row| row.get(0)).collect()))
}

/// Whether a mark says already what a `prepare` would make it say.
fn is_prepared(kept: &Kept, run: RunId, restart: u32) -> bool {
    match kept.stage {
        None => false,
        Some(_) if kept.run != run => kept.run > run,
        // The main stream has it: what the run would void now, it has handed over.
        Some(TableStage::Ready | TableStage::Gone) => true,
        Some(TableStage::Copying | TableStage::CatchingUp) => kept.restart >= restart,
    }
}

/// Whether a mark has to be moved; an error when it must not be.
fn is_to_move(
    table: &TableName,
    kept: Option<&Kept>,
    main: Option<Position>,
    stage: TableStage,
    position: Position,
) -> Result<bool, SinkError> {
    let found = kept.and_then(|kept| kept.stage);
    let elsewhere = |found: Position| Err(SinkError::Position { expected: position, found });
    match (found, stage) {
        (None, TableStage::Gone) => Ok(false),
        (Some(found), wanted) if found == wanted => Ok(false),
        (Some(_), TableStage::Gone) => Ok(true),
        (Some(TableStage::Copying), TableStage::CatchingUp) => Ok(true),
        // Past that already.
        (Some(TableStage::Ready), TableStage::CatchingUp) => Ok(false),
        (Some(TableStage::Copying), TableStage::Ready) => match main {
            // Rows that the main stream left out meanwhile would be missing.
            Some(main) => elsewhere(main),
            None => Ok(true),
        },
        (Some(TableStage::CatchingUp), TableStage::Ready) => match (kept.and_then(|kept| kept.position), main) {
            (Some(mark), _) if mark != position => elsewhere(mark),
            (_, Some(main)) if main != position => elsewhere(main),
            (Some(_), Some(_)) => Ok(true),
            _ => Err(SinkError::Transient(format!("{table} cannot be handed over: the sink has no position yet"))),
        },
        (found, wanted) => Err(SinkError::Transient(format!(
            "{table} cannot become {wanted:?} at the sink: it is {}",
            found.map_or_else(|| "not prepared".to_owned(), |found| format!("{found:?}"))
        ))),
    }
}

#[async_trait]
impl TableLoads for PostgresSink {
    async fn marks(&mut self) -> Result<Vec<TableMark>, SinkError> {
        let open = self.open.as_ref().ok_or_else(not_open)?;
        let marks = marks::read_all(&open.session.client, &self.task.task).await;
        marks.map_err(|error| self.failed(error))
    }

    async fn prepare(&mut self, run: RunId, restart: u32, shape: &Arc<TableSchema>) -> Result<(), SinkError> {
        self.guarded(Change::Prepare { run, restart, shape }).await
    }

    async fn loaded(&mut self, run: RunId) -> Result<Vec<ChunkId>, SinkError> {
        let open = self.open.as_ref().ok_or_else(not_open)?;
        let loaded = marks::loaded(&open.session.client, &self.task.task, run).await;
        loaded.map_err(|error| self.failed(error))
    }

    async fn mark(&mut self, tables: &[TableName], stage: TableStage, position: Position) -> Result<(), SinkError> {
        self.guarded(Change::Mark { tables, stage, position }).await
    }

    async fn replay(&mut self, tables: &[TableName], batch: &Batch) -> Result<(), SinkError> {
        let batch = self.replayed(tables, batch);
        if let Err(error) = self.apply_fitting(&batch, Moves::Marks(tables)).await {
            return Err(self.write_failed(error));
        }
        self.count(LOG_ROWS, batch.rows() as u64);
        Ok(())
    }

    async fn replay_large(
        &mut self,
        tables: &[TableName],
        from: Position,
        portions: &mut dyn Portions,
    ) -> Result<(), SinkError> {
        match self.large(from, portions, Moves::Marks(tables)).await {
            Ok(done) => {
                self.count(LOG_ROWS, done.log_rows as u64);
                Ok(())
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    async fn finish(&mut self, table: &TableName) -> Result<Vec<String>, SinkError> {
        extras::finish(&self.config, &self.task, table).await
    }

    async fn forget(&mut self, run: RunId) -> Result<(), SinkError> {
        self.guarded(Change::Forget(run)).await
    }

    async fn start_anew(&mut self) -> Result<(), SinkError> {
        self.guarded(Change::StartAnew).await
    }
}
