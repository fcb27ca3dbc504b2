//! The state of a replication slot, and whether a log that ends at a position can go on from it.

use tokio_postgres::types::Type;
use wallaby_model::{Lsn, Position};

use crate::error::SourceError;

/// A slot as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// Its output plugin; empty for a physical slot.
    pub plugin: String,
    /// Its database.
    pub database: String,
    /// Whether it is a temporary one.
    pub temporary: bool,
    /// Whether a walsender holds it.
    pub active: bool,
    /// What was confirmed.
    pub confirmed_flush: Lsn,
    /// Where decoding begins to read.
    pub restart: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    /// Why it was invalidated, where the server says (PG 16, 17).
    pub invalidation: Option<String>,
}

const SLOT_SQL: &str = "
SELECT coalesce(plugin::text, ''), coalesce(database::text, ''), temporary, active,
       (coalesce(confirmed_flush_lsn, '0/0') - '0/0'::pg_lsn)::int8, (coalesce(restart_lsn, '0/0') - '0/0'::pg_lsn)::int8,
       coalesce(wal_status, 'lost'), to_jsonb(s)->>'invalidation_reason',
       coalesce((to_jsonb(s)->>'conflicting')::bool, false)
FROM pg_catalog.pg_replication_slots s WHERE slot_name = $1";

/// Reads a slot; `None` when it does not exist.
pub(crate) async fn read(client: &tokio_postgres::Client, slot: &str) -> Result<Option<SlotState>, SourceError> {
    let rows = client.query_typed(SLOT_SQL, &[(&slot, Type::TEXT)]).await;
    let rows = rows.map_err(|error| SourceError::from_client(format!("reading slot {slot}"), &error))?;
    Ok(rows.first().map(|row| {
        let lsn = |index: usize| Lsn(u64::try_from(row.get::<_, i64>(index)).unwrap_or_default());
        let conflicting: bool = row.get(8);
        SlotState {
            name: slot.to_owned(),
            plugin: row.get(0),
            database: row.get(1),
            temporary: row.get(2),
            active: row.get(3),
            confirmed_flush: lsn(4),
            restart: lsn(5),
            wal_status: row.get(6),
            invalidation: row.get::<_, Option<String>>(7).or_else(|| conflicting.then(|| "conflict".to_owned())),
        }
    }))
}

impl SlotState {
    /// Whether the flow can read this slot at all.
    pub(crate) fn check_usable(&self, database: &str) -> Result<(), SourceError> {
        let unfit = |reason: String| Err(SourceError::SlotUnfit { slot: self.name.clone(), reason });
        if self.plugin.is_empty() {
            return unfit("it is a physical slot".into());
        }
        if self.plugin != "pgoutput" {
            return unfit(format!("its plugin is {}, not pgoutput", self.plugin));
        }
        if self.database != database {
            return unfit(format!("it belongs to database {}, the dsn names {database}", self.database));
        }
        if self.wal_status == "lost" || self.invalidation.is_some() {
            let reason = self.invalidation.clone().unwrap_or_else(|| "its WAL was removed".into());
            return Err(SourceError::SlotLost { slot: self.name.clone(), reason });
        }
        Ok(())
    }

    /// Whether the server still has everything past the log's end. Equal LSNs are no gap: changes at commit LSN L come
    /// after `(L, 0)`, and Postgres sends them when it starts at L (hazard 5).
    pub(crate) fn check_not_past(&self, log_end: Position) -> Result<(), SourceError> {
        if self.confirmed_flush > log_end.commit {
            return Err(SourceError::SlotMoved { slot: self.name.clone(), confirmed: self.confirmed_flush, log_end });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn slot() -> SlotState {
        SlotState {
            name: "s".into(),
            plugin: "pgoutput".into(),
            database: "d".into(),
            temporary: false,
            active: false,
            confirmed_flush: Lsn(100),
            restart: Lsn(50),
            wal_status: "reserved".into(),
            invalidation: None,
        }
    }

    #[test]
    fn h05_an_equal_lsn_is_no_moved_slot() {
        assert!(slot().check_not_past(Position::before(Lsn(100))).is_ok());
        assert!(slot().check_not_past(Position::of(Lsn(100), Lsn(60), 1)).is_ok());
        let moved = slot().check_not_past(Position::of(Lsn(99), Lsn(60), 1)).unwrap_err();
        assert_eq!(moved.reason(), "SlotMoved");
        assert!(!moved.is_transient());
    }

    #[test]
    fn unfit_and_lost_slots_are_told_apart() {
        assert!(slot().check_usable("d").is_ok());
        assert_eq!(slot().check_usable("other").unwrap_err().reason(), "SlotUnfit");
        let lost = SlotState { wal_status: "lost".into(), ..slot() };
        assert_eq!(lost.check_usable("d").unwrap_err().reason(), "SlotLost");
        let invalid = SlotState { invalidation: Some("rows_removed".into()), ..slot() };
        assert!(invalid.check_usable("d").unwrap_err().to_string().contains("rows_removed"));
        let foreign = SlotState { plugin: "wal2json".into(), ..slot() };
        assert_eq!(foreign.check_usable("d").unwrap_err().reason(), "SlotUnfit");
    }
}
