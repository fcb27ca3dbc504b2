//! The snapshot of a run: made by a temporary slot, so that its consistent point is known exactly, and held by a plain session.
//!
//! The slot is gone again once the plain session has taken the snapshot over and exported it under a name of its own: from
//! then on the run holds back the source's xmin, which its age bounds, but no WAL and no slot.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::sleep;
use tokio_postgres::types::Type;
use wallaby_model::Lsn;
use wallaby_model::condition::Timestamp;
use wallaby_model::run::PlannedRelation;
use wallaby_model::schema::quote_identifier;

use super::{plan, sql};
use crate::config::ConnectConfig;
use crate::control::{Control, ControlEnd, connect_control};
use crate::error::SourceError;
use crate::prepare::setting;
use crate::replication::ReplicationClient;
use crate::sessions::{self, SessionOwner};
use crate::setup;

/// How long sessions of older owners may take to end.
const EVICTION: Duration = Duration::from_secs(10);

/// A snapshot that is held. Dropping it gives it up.
pub struct SnapshotExport {
    config: ConnectConfig,
    holder: Control,
    snapshot: String,
    consistent_point: Lsn,
    exported_at: Timestamp,
    since: Instant,
    /// What the planned relations are published by.
    publication: String,
    /// The columns that the planned relations had, by oid: the highest number, and a digest of all.
    columns: HashMap<u32, (i16, String)>,
}

impl SnapshotExport {
    /// Exports a snapshot; sessions of older owners of the task are ended first. `patience` is for transactions that the slot's
    /// creation waits for. The publication has to name the run's tables before, and the log to be held.
    ///
    /// # Errors
    /// `WalLevel`; `SlotWaits` when transactions that are older than the slot do not end in time, with who they are; `Fenced` by a
    /// younger owner; what the server refuses (rights, no free slot or walsender).
    pub async fn open(
        config: &ConnectConfig,
        owner: &SessionOwner,
        patience: Duration,
    ) -> Result<SnapshotExport, SourceError> {
        let session = config.with_application_name(&owner.session_name());
        let holder = connect_control(&session).await?;
        let wal_level = setting(&holder, "wal_level").await?;
        if wal_level != "logical" {
            return Err(SourceError::WalLevel { found: wal_level });
        }
        let slot = slot_name(owner);
        sessions::evict_older(&holder, owner, EVICTION).await?;
        sql::be_patient(&holder).await?;
        let mut replication = ReplicationClient::connect(&session).await?;
        let (consistent_point, exported) = create_slot(&mut replication, &holder, &slot, patience).await?;
        let since = Instant::now();
        sql::import(&holder, &exported).await?;
        let row = holder.query_typed_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await;
        let row = row.map_err(|error| SourceError::from_client("exporting the snapshot", &error))?;
        drop(replication);
        Ok(SnapshotExport {
            config: session,
            snapshot: row.get(0),
            holder,
            consistent_point,
            exported_at: now(),
            since,
            publication: String::new(),
            columns: HashMap::new(),
        })
    }

    /// C: what committed below it is in the snapshot, everything else is not.
    pub fn consistent_point(&self) -> Lsn {
        self.consistent_point
    }

    /// The name under which other sessions import it.
    pub fn snapshot(&self) -> &str {
        &self.snapshot
    }

    /// When it was exported.
    pub fn exported_at(&self) -> Timestamp {
        self.exported_at
    }

    /// How long it has held the source's xmin back.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Returns when the session that holds it has ended, with the reason. Cancel-safe.
    pub async fn ended(&self) -> ControlEnd {
        self.holder.ended().await
    }

    /// Plans a run inside the snapshot, over the published tables that `wanted` names: `schema.table` or `schema.*`, in double quotes
    /// where names hold dots; empty for all of them. `exclude` names tables to leave out. A partitioned table that is published as a whole gives one
    /// relation for each leaf (or itself, when it has none). A chunk has about `chunk_bytes` at the source, or 64 MiB when that is less.
    ///
    /// # Errors
    /// `PublicationMissing`; `TableMissing` when nothing published fits what was named; `SnapshotGone`.
    pub async fn plan(
        &mut self,
        publication: &str,
        wanted: &[String],
        exclude: &[String],
        chunk_bytes: u64,
    ) -> Result<Vec<PlannedRelation>, SourceError> {
        self.plan_required(publication, wanted, wanted, exclude, chunk_bytes).await
    }

    /// The same where only what is `required` has to be there: the rest of what is `wanted` may be gone.
    ///
    /// # Errors
    /// As [`SnapshotExport::plan`].
    pub async fn plan_required(
        &mut self,
        publication: &str,
        wanted: &[String],
        required: &[String],
        exclude: &[String],
        chunk_bytes: u64,
    ) -> Result<Vec<PlannedRelation>, SourceError> {
        let control = sql::patient(&self.config).await?;
        sql::import(&control, &self.snapshot).await?;
        let planned = plan::plan(&control, publication, wanted, required, exclude, chunk_bytes).await?;
        let oids: Vec<u32> = planned.iter().map(|relation| relation.oid).collect();
        let all = vec![i16::MAX; oids.len()];
        self.columns = columns_of(&control, &oids, &all).await?;
        self.publication = publication.to_owned();
        Ok(planned)
    }

    /// Whether one of these relations was rewritten, dropped, renamed, lost a column, or left the publication since it was planned: their
    /// chunks cannot be read under this snapshot, and another one has to be exported. Added columns do no harm.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn is_outdated(&self, relations: &[&PlannedRelation]) -> Result<bool, SourceError> {
        if relations.is_empty() {
            return Ok(false);
        }
        let control = connect_control(&self.config).await?;
        let oids: Vec<u32> = relations.iter().map(|relation| relation.oid).collect();
        let rows = control
            .query_typed(CURRENT_SQL, &[(&oids, Type::OID_ARRAY)])
            .await
            .map_err(|error| SourceError::from_client("looking for rewritten tables", &error))?;
        let current: HashMap<u32, (u32, String, String)> =
            rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3)))).collect();
        let is_same = |relation: &&PlannedRelation| {
            current.get(&relation.oid).is_some_and(|(filenode, schema, name)| {
                *filenode == relation.relfilenode
                    && *schema == relation.relation.schema
                    && *name == relation.relation.name
            })
        };
        if !relations.iter().all(is_same) {
            return Ok(true);
        }
        if has_left(&control, &self.publication, relations).await? {
            return Ok(true);
        }
        let highest: Vec<i16> =
            oids.iter().map(|oid| self.columns.get(oid).map_or(i16::MAX, |(highest, _)| *highest)).collect();
        let columns = columns_of(&control, &oids, &highest).await?;
        let differ = |oid: &u32| match (self.columns.get(oid), columns.get(oid)) {
            (Some((_, then)), Some((_, now))) => then != now,
            // A table without columns, or one that somebody else planned: the chunk's own check finds it.
            (then, now) => then.is_some() != now.is_some() && !self.columns.is_empty(),
        };
        Ok(oids.iter().any(differ))
    }
}

const CURRENT_SQL: &str = "
SELECT c.oid, coalesce(pg_catalog.pg_relation_filenode(c.oid), 0::oid), n.nspname::text, c.relname::text
FROM pg_catalog.unnest($1::oid[]) AS asked(oid)
JOIN pg_catalog.pg_class c ON c.oid = asked.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace";

const LEFT_SQL: &str = "
SELECT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = $1) AND EXISTS (
  SELECT FROM unnest($2::text[], $3::text[]) AS asked(schema, name)
  WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_publication_tables p
    WHERE p.pubname = $1 AND p.schemaname = asked.schema AND p.tablename = asked.name))";

/// Whether one of the relations is published no longer, as the table that it was planned as. Not because the publication itself is away:
/// another export would change nothing, and the capture says what is to be done.
async fn has_left(control: &Control, publication: &str, relations: &[&PlannedRelation]) -> Result<bool, SourceError> {
    let (schemas, names): (Vec<&str>, Vec<&str>) =
        relations.iter().map(|relation| (relation.table.schema.as_str(), relation.table.name.as_str())).unzip();
    let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
        [(&publication, Type::TEXT), (&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)];
    let row = control.query_typed_one(LEFT_SQL, &arguments).await;
    let row = row.map_err(|error| SourceError::from_client("looking for tables that left the publication", &error))?;
    Ok(row.get(0))
}

const COLUMNS_SQL: &str = "
SELECT a.attrelid, max(a.attnum), pg_catalog.md5(pg_catalog.string_agg(a.attnum || ' ' || a.atttypid || ' ' || a.attname, '/' ORDER BY a.attnum))
FROM unnest($1::oid[], $2::int2[]) AS asked(oid, highest)
JOIN pg_catalog.pg_attribute a ON a.attrelid = asked.oid AND a.attnum > 0 AND a.attnum <= asked.highest AND NOT a.attisdropped
GROUP BY a.attrelid";

async fn columns_of(
    control: &Control,
    oids: &[u32],
    highest: &[i16],
) -> Result<HashMap<u32, (i16, String)>, SourceError> {
    let rows = control.query_typed(COLUMNS_SQL, &[(&oids, Type::OID_ARRAY), (&highest, Type::INT2_ARRAY)]).await;
    let rows = rows.map_err(|error| SourceError::from_client("reading the columns of the run's tables", &error))?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}

/// A temporary slot's name: letters, digits and `_`, at most 63. Another export of the same owner has another one, because a slot
/// goes only with the session that made it.
fn slot_name(owner: &SessionOwner) -> String {
    static EXPORTS: AtomicU32 = AtomicU32::new(0);
    let fit = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let task: String = owner.prefix.chars().map(fit).take(36).collect();
    let number = EXPORTS.fetch_add(1, Ordering::Relaxed) % 1000;
    format!("{task}{}_{number}", owner.epoch)
}

/// Creates the slot and exports its snapshot on a walsender; says whom that waits for. Returns C and the snapshot's name.
async fn create_slot(
    replication: &mut ReplicationClient,
    control: &Control,
    slot: &str,
    within: Duration,
) -> Result<(Lsn, String), SourceError> {
    let during = "exporting a snapshot";
    replication.simple_query("SET statement_timeout = 0; SET lock_timeout = 0", during).await?;
    let pid = replication.simple_query("SELECT pg_catalog.pg_backend_pid()", during).await?;
    let pid: i32 = cell(&pid, 0).and_then(|pid| pid.parse().ok()).ok_or_else(|| odd("it has no process id"))?;
    let version = setting(control, "server_version_num").await?.parse::<u32>().unwrap_or_default();
    let argument = if version >= 150_000 { "(SNAPSHOT 'export')" } else { "EXPORT_SNAPSHOT" };
    let command = format!("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput {argument}", quote_identifier(slot));
    let deadline = Instant::now() + within;
    let creating = replication.simple_query(&command, during);
    tokio::pin!(creating);
    let mut told = false;
    let rows = loop {
        tokio::select! {
            created = &mut creating => break created?,
            () = sleep(setup::LOOK_EVERY) => {}
        }
        let blockers = setup::blockers_of(control, pid).await?;
        if !told && !blockers.is_empty() {
            tracing::warn!(slot, waits_for = %blockers, "the export of a snapshot waits for older transactions");
            told = true;
        }
        if Instant::now() >= deadline {
            // The slot is temporary: it goes with the connection that is dropped here.
            let _ = control.query_typed("SELECT pg_catalog.pg_cancel_backend($1)", &[(&pid, Type::INT4)]).await;
            return Err(SourceError::SlotWaits { slot: slot.to_owned(), blockers, after: within });
        }
    };
    let point = cell(&rows, 1).and_then(|point| point.parse().ok()).ok_or_else(|| odd("no consistent point"))?;
    let snapshot = cell(&rows, 2).ok_or_else(|| odd("no snapshot name"))?;
    Ok((point, snapshot.to_owned()))
}

fn cell(rows: &[Vec<Option<String>>], index: usize) -> Option<&str> {
    rows.first()?.get(index)?.as_deref()
}

fn odd(reason: &str) -> SourceError {
    SourceError::Protocol { what: "CREATE_REPLICATION_SLOT", offset: 0, reason: reason.into() }
}

/// Wall clock, in ms.
fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use wallaby_model::Epoch;

    #[test]
    fn slot_names_are_fit() {
        let owner = SessionOwner { prefix: "wallaby/0123456789abcdef/".into(), epoch: Epoch(u64::MAX) };
        assert!(slot_name(&owner).starts_with("wallaby_0123456789abcdef_18446744073709551615_"));
        assert_ne!(slot_name(&owner), slot_name(&owner));
        let long = SessionOwner { prefix: "Ü".repeat(90), epoch: Epoch(u64::MAX) };
        assert!(slot_name(&long).len() <= 63);
    }
}
