//! What the slot holds back, for metrics and conditions.

use tokio_postgres::types::Type;
use wallaby_model::Lsn;

use crate::error::SourceError;
use crate::metrics;

/// Whether a transaction, by its 32-bit id, has ended: then an LSN that its end lies before. `None` while it runs.
///
/// # Errors
/// When the server does not answer.
pub async fn ended_before(client: &tokio_postgres::Client, xid: u32) -> Result<Option<Lsn>, SourceError> {
    let sql = "SELECT (pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::int8 & 4294967295), \
               pg_catalog.pg_current_wal_insert_lsn()::text";
    let rows = client
        .query_typed(sql, &[])
        .await
        .map_err(|error| SourceError::from_client("looking for the oldest transaction", &error))?;
    let Some(row) = rows.first() else { return Ok(None) };
    let oldest = row.get::<_, i64>(0) as u32;
    // Ids are compared on a circle.
    let has_ended = oldest.wrapping_sub(xid) as i32 > 0;
    Ok(row.get::<_, String>(1).parse().ok().filter(|_| has_ended))
}

/// The source and the slot at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceStatus {
    /// The server's end of WAL.
    pub current: Lsn,
    /// Where the slot's WAL begins.
    pub restart: Lsn,
    /// What the slot has confirmed.
    pub confirmed: Lsn,
    /// Bytes of WAL that the slot holds back.
    pub retained_bytes: u64,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    /// Whether a walsender reads it.
    pub active: bool,
    /// How much may be written until the slot is lost; `None` when there is no limit.
    pub safe_wal_bytes: Option<i64>,
}

const STATUS_SQL: &str = "
SELECT (now.lsn - '0/0'::pg_lsn)::int8, (coalesce(restart_lsn, '0/0') - '0/0'::pg_lsn)::int8,
       (coalesce(confirmed_flush_lsn, '0/0') - '0/0'::pg_lsn)::int8, coalesce(wal_status, 'lost'), active, safe_wal_size
FROM pg_catalog.pg_replication_slots,
     (SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_lsn() END AS lsn) now
WHERE slot_name = $1";

/// Reads the state of the source and of one slot.
///
/// # Errors
/// `SlotMissing`, or a lost connection.
pub async fn source_status(client: &tokio_postgres::Client, slot: &str) -> Result<SourceStatus, SourceError> {
    let rows = client.query_typed(STATUS_SQL, &[(&slot, Type::TEXT)]).await;
    let rows = rows.map_err(|error| SourceError::from_client(format!("reading the state of slot {slot}"), &error))?;
    let Some(row) = rows.first() else {
        return Err(SourceError::SlotMissing { slot: slot.to_owned() });
    };
    let lsn = |index: usize| Lsn(u64::try_from(row.get::<_, i64>(index)).unwrap_or_default());
    let (current, restart) = (lsn(0), lsn(1));
    let retained_bytes = if restart == Lsn::ZERO { 0 } else { current.0.saturating_sub(restart.0) };
    metrics::retained(slot, retained_bytes);
    Ok(SourceStatus {
        current,
        restart,
        confirmed: lsn(2),
        retained_bytes,
        wal_status: row.get(3),
        active: row.get(4),
        safe_wal_bytes: row.get(5),
    })
}
