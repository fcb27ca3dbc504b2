//! Sessions of earlier owners of the same task.
//!
//! A walsender whose client died holds the slot for up to `wal_sender_timeout`. Its successor does not wait: it ends
//! every session that carries the task's name and an epoch up to its own, by process id and start time read together
//! with that name, so that a process id that was used again is never hit.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::types::Type;
use wallaby_model::Epoch;

use crate::error::SourceError;
use crate::metrics;

/// Who owns the sessions of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOwner {
    /// `wallaby/<hash of the task>/`: `TaskId::session_prefix()`.
    pub prefix: String,
    /// The owner's epoch.
    pub epoch: Epoch,
}

impl SessionOwner {
    /// The `application_name` of this owner's sessions.
    pub fn session_name(&self) -> String {
        format!("{}{}", self.prefix, self.epoch)
    }

    /// The epoch in a session's name, when the session is one of this task's.
    fn epoch_of(&self, application_name: &str) -> Option<Epoch> {
        application_name.strip_prefix(&self.prefix)?.parse().ok().map(Epoch)
    }
}

/// The view is cluster-wide: another database may hold the sessions of another installation's task of the same name.
const SESSIONS_SQL: &str = "
SELECT pid, backend_start::text, application_name FROM pg_catalog.pg_stat_activity
WHERE starts_with(application_name, $1) AND pid <> pg_catalog.pg_backend_pid()
  AND datname = pg_catalog.current_database()";

const TERMINATE_SQL: &str = "
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE pid = $1 AND backend_start::text = $2 AND application_name = $3";

const HOLDER_SQL: &str = "
SELECT s.active_pid, coalesce(a.application_name, '') FROM pg_catalog.pg_replication_slots s
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid
WHERE s.slot_name = $1 AND s.active_pid IS NOT NULL";

/// Time between two looks at sessions that are on their way out.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Ends all sessions of this task that are not younger than `owner`, `client`'s own apart, and waits until the slot is
/// free. Returns how many were ended.
///
/// # Errors
/// `SlotInUse` when somebody else reads the slot; `Fenced` when a younger owner does.
pub async fn evict(
    client: &tokio_postgres::Client,
    owner: &SessionOwner,
    slot: &str,
    within: Duration,
) -> Result<u32, SourceError> {
    let failed = |error| SourceError::from_client("ending sessions of older owners", &error);
    let deadline = Instant::now() + within;
    let mut ended = 0;
    let mut asked: Vec<(i32, String)> = Vec::new();
    loop {
        let sessions = client.query_typed(SESSIONS_SQL, &[(&owner.prefix, Type::TEXT)]).await.map_err(failed)?;
        let mut waiting = false;
        for session in &sessions {
            let (pid, started, name): (i32, String, String) = (session.get(0), session.get(1), session.get(2));
            match owner.epoch_of(&name) {
                Some(epoch) if epoch > owner.epoch => {
                    return Err(SourceError::Fenced { holder: epoch, ours: owner.epoch });
                }
                Some(_) => {}
                None => continue,
            }
            waiting = true;
            if asked.iter().any(|(known, since)| *known == pid && *since == started) {
                continue;
            }
            let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
                [(&pid, Type::INT4), (&started, Type::TEXT), (&name, Type::TEXT)];
            let terminated = client.query_typed(TERMINATE_SQL, &arguments).await.map_err(failed)?;
            if terminated.first().is_some_and(|row| row.get::<_, bool>(0)) {
                tracing::info!(pid, session = %name, "ended a session of an older owner");
                ended += 1;
            }
            asked.push((pid, started));
        }
        let holder = client.query_typed(HOLDER_SQL, &[(&slot, Type::TEXT)]).await.map_err(failed)?;
        let Some(holder) = holder.first() else {
            if waiting && Instant::now() < deadline {
                sleep(POLL_EVERY).await;
                continue;
            }
            metrics::sessions_ended(ended);
            return Ok(ended);
        };
        let (pid, application): (i32, String) = (holder.get(0), holder.get(1));
        if Instant::now() >= deadline {
            return Err(SourceError::SlotInUse { slot: slot.to_owned(), application, pid });
        }
        // Somebody else's session is not ours to end; it may be on its way out, but it is not waited for long.
        if owner.epoch_of(&application).is_none() && !waiting {
            return Err(SourceError::SlotInUse { slot: slot.to_owned(), application, pid });
        }
        sleep(POLL_EVERY).await;
    }
}

/// Ends the sessions of older owners of this task and waits until they are gone. Those of this owner stay: a run has several.
pub(crate) async fn evict_older(
    client: &tokio_postgres::Client,
    owner: &SessionOwner,
    within: Duration,
) -> Result<(), SourceError> {
    let failed = |error| SourceError::from_client("ending sessions of older owners", &error);
    let deadline = Instant::now() + within;
    loop {
        let sessions = client.query_typed(SESSIONS_SQL, &[(&owner.prefix, Type::TEXT)]).await.map_err(failed)?;
        let mut waiting = false;
        for session in &sessions {
            let (pid, started, name): (i32, String, String) = (session.get(0), session.get(1), session.get(2));
            match owner.epoch_of(&name) {
                Some(epoch) if epoch > owner.epoch => {
                    return Err(SourceError::Fenced { holder: epoch, ours: owner.epoch });
                }
                Some(epoch) if epoch < owner.epoch => {}
                _ => continue,
            }
            waiting = true;
            let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
                [(&pid, Type::INT4), (&started, Type::TEXT), (&name, Type::TEXT)];
            client.query_typed(TERMINATE_SQL, &arguments).await.map_err(failed)?;
        }
        if !waiting {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(SourceError::Timeout { what: "ending sessions of older owners".to_owned(), after: within });
        }
        sleep(POLL_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_read_only_from_names_of_the_task() {
        let owner = SessionOwner { prefix: "wallaby/0123456789abcdef/".into(), epoch: Epoch(7) };
        assert_eq!(owner.session_name(), "wallaby/0123456789abcdef/7");
        assert_eq!(owner.epoch_of("wallaby/0123456789abcdef/6"), Some(Epoch(6)));
        assert_eq!(owner.epoch_of("wallaby/0123456789abcdef/x"), None);
        assert_eq!(owner.epoch_of("wallaby/0123456789abcdee/6"), None);
        assert_eq!(owner.epoch_of("psql"), None);
    }
}
