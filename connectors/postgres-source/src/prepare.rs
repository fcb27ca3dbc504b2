//! What happens before streaming: identity, slot and publication are checked, and nothing is streamed that does not
//! continue the log.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::types::Type;
use wallaby_model::{Lsn, Position};

use crate::capture::{Capture, CaptureOptions};
use crate::control::{Control, connect_control};
use crate::error::{PUBLICATION_NOW, SourceError};
use crate::replication::{Feedback, ReplicationClient, StartOptions, Streaming, TimelineSwitch};
use crate::sessions;
use crate::slot::{self, SlotState};

/// Which cluster the source is, and on which timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceIdentity {
    /// IDENTIFY_SYSTEM's system identifier.
    pub system_identifier: String,
    /// IDENTIFY_SYSTEM's timeline.
    pub timeline: u32,
}

/// Both connections are open, older owners are gone, the slot is free and usable. Nothing streams yet: the log's
/// `resume` record, which needs the identity, is written between this and [`Prepared::start`].
pub struct Prepared {
    options: CaptureOptions,
    control: Control,
    replication: ReplicationClient,
    identity: SourceIdentity,
    /// Where the server's WAL ended when it was asked who it is.
    wal_end: Lsn,
    slot: SlotState,
    sessions_ended: u32,
}

/// Status goes out at least this often, whatever the server's limit.
const STATUS_EVERY_MAX: Duration = Duration::from_secs(10);

impl Prepared {
    pub(crate) async fn connect(options: CaptureOptions) -> Result<Prepared, SourceError> {
        let session = options.connect.with_application_name(&options.owner.session_name());
        let control = connect_control(&session).await?;
        check_wal_level(&control).await?;
        let sessions_ended = sessions::evict(&control, &options.owner, &options.slot, options.slot_wait).await?;
        let mut replication = ReplicationClient::connect(&session).await?;
        let system = replication.identify_system().await?;
        let identity = SourceIdentity { system_identifier: system.system_identifier, timeline: system.timeline };
        let slot = read_slot(&control, &options.slot).await?;
        slot.check_usable(options.connect.dbname())?;
        check_publication(&control, &options.publication).await?;
        Ok(Prepared { options, control, replication, identity, wal_end: system.wal_end, slot, sessions_ended })
    }

    /// Which cluster the source is; goes into the log's `resume` record.
    pub fn identity(&self) -> &SourceIdentity {
        &self.identity
    }

    /// The slot. The first resume of a new flow is `(confirmed_flush, 0)`.
    pub fn slot(&self) -> &SlotState {
        &self.slot
    }

    /// Says of which transactions a splice stands in the log past its end: they become parts whole ([`CaptureOptions::whole`]).
    pub fn keep_whole(&mut self, commits: BTreeSet<Lsn>) {
        self.options.whole = commits;
    }

    /// How many sessions of older owners were ended.
    pub fn sessions_ended(&self) -> u32 {
        self.sessions_ended
    }

    /// Verifies that the source continues the log. To be called **before** the log's `resume` record is written: that
    /// record names the identity found now, and the next owner would compare with it.
    ///
    /// `log_end` is where the log ends. `previous` is the identity in the log's last `resume` record; `None` when there
    /// is none.
    ///
    /// # Errors
    /// `OtherSystem`, `TimelineDiverged`, `SourceSetBack` and `SlotMoved` are definite.
    pub async fn verify(&mut self, log_end: Position, previous: Option<&SourceIdentity>) -> Result<(), SourceError> {
        if let Some(previous) = previous {
            let history = match previous.timeline == self.identity.timeline {
                true => Vec::new(),
                false => self.replication.timeline_history(self.identity.timeline).await?,
            };
            check_identity(previous, &self.identity, &history, self.slot.confirmed_flush, log_end)?;
        }
        // What was staged had been flushed: a server whose WAL ends before it is an older state of the one it came from.
        if !has_all(self.wal_end, log_end) {
            return Err(SourceError::SourceSetBack { wal_end: self.wal_end, log_end });
        }
        self.slot.check_not_past(log_end)
    }

    /// Verifies once more that the source continues the log, and starts streaming. Arguments as for
    /// [`Prepared::verify`].
    ///
    /// # Errors
    /// `OtherSystem`, `TimelineDiverged`, `SourceSetBack`, `SlotMoved`, `SlotLost` and the like are definite.
    pub async fn start(
        mut self,
        log_end: Position,
        previous: Option<&SourceIdentity>,
    ) -> Result<(Capture, Feedback), SourceError> {
        self.verify(log_end, previous).await?;
        let parts = self.options.parts_used();
        let protocol = match parts {
            Some(_) => protocol_of(&setting(&self.control, "server_version_num").await?),
            None => 1,
        };
        let start = StartOptions {
            slot: self.options.slot.clone(),
            publication: self.options.publication.clone(),
            start: log_end.commit,
            protocol,
            streaming: if parts.is_some_and(|parts| !parts.only_whole) { Streaming::On } else { Streaming::Off },
            messages: false,
            confirmed: self.slot.confirmed_flush,
            status_every: status_every(&self.control).await?,
        };
        let (reader, feedback) = match self.replication.start_replication(&start).await {
            Ok(started) => started,
            Err(error) => return Err(explain_start(&self.control, &self.options.slot, error).await),
        };
        // START_REPLICATION goes on silently from confirmed_flush when that is later than what was asked for: only a
        // look at the slot afterwards, now that nobody else can move it, tells (behaviour 99).
        let held = read_slot(&self.control, &self.options.slot).await?;
        if let Err(moved) = held.check_usable(self.options.connect.dbname()).and(held.check_not_past(log_end)) {
            feedback.close();
            return Err(moved);
        }
        let capture = Capture::new(self.options, self.control, reader, feedback.clone(), protocol, log_end);
        Ok((capture, feedback))
    }
}

async fn check_wal_level(client: &tokio_postgres::Client) -> Result<(), SourceError> {
    let found = setting(client, "wal_level").await?;
    if found == "logical" { Ok(()) } else { Err(SourceError::WalLevel { found }) }
}

/// A server setting, as `SHOW` gives it.
pub(crate) async fn setting(client: &tokio_postgres::Client, name: &str) -> Result<String, SourceError> {
    let row = client
        .query_typed("SELECT coalesce(pg_catalog.current_setting($1, true), '')", &[(&name, Type::TEXT)])
        .await
        .map_err(|error| SourceError::from_client(format!("reading the setting {name}"), &error))?;
    Ok(row.first().map_or_else(String::new, |row| row.get(0)))
}

/// The newest protocol that a server speaks. All from 2 on stream transactions in progress.
fn protocol_of(version_num: &str) -> u8 {
    match version_num.parse::<u32>() {
        Ok(160_000..) => 4,
        Ok(150_000..) => 3,
        _ => 2,
    }
}

async fn read_slot(client: &tokio_postgres::Client, name: &str) -> Result<SlotState, SourceError> {
    slot::read(client, name).await?.ok_or_else(|| SourceError::SlotMissing { slot: name.to_owned() })
}

async fn check_publication(client: &tokio_postgres::Client, name: &str) -> Result<(), SourceError> {
    let found = client
        .query_typed("SELECT 1 FROM pg_catalog.pg_publication WHERE pubname = $1", &[(&name, Type::TEXT)])
        .await
        .map_err(|error| SourceError::from_client(format!("looking for publication {name}"), &error))?;
    if found.is_empty() {
        return Err(SourceError::PublicationMissing { publication: name.to_owned(), when: PUBLICATION_NOW });
    }
    Ok(())
}

async fn status_every(client: &tokio_postgres::Client) -> Result<Duration, SourceError> {
    let rows = client
        .query_typed("SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'", &[])
        .await
        .map_err(|error| SourceError::from_client("reading the setting wal_sender_timeout", &error))?;
    let timeout_ms = rows.first().map_or(0, |row| row.get::<_, i64>(0));
    Ok(status_interval(u64::try_from(timeout_ms).unwrap_or_default()))
}

/// A third of the server's patience, at most 10 s; 0 means that it has no end.
fn status_interval(timeout_ms: u64) -> Duration {
    match timeout_ms {
        0 => STATUS_EVERY_MAX,
        timeout_ms => Duration::from_millis((timeout_ms / 3).max(10)).min(STATUS_EVERY_MAX),
    }
}

/// Why START_REPLICATION failed, in our words where we know better.
async fn explain_start(client: &tokio_postgres::Client, slot: &str, error: SourceError) -> SourceError {
    match error.sqlstate() {
        Some("55006") => {
            let sql = "SELECT coalesce(s.active_pid, 0), coalesce(a.application_name, '') \
                       FROM pg_catalog.pg_replication_slots s \
                       LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1";
            match client.query_typed(sql, &[(&slot, Type::TEXT)]).await {
                Ok(rows) if !rows.is_empty() => {
                    SourceError::SlotInUse { slot: slot.to_owned(), application: rows[0].get(1), pid: rows[0].get(0) }
                }
                _ => error,
            }
        }
        Some("42704") => SourceError::SlotMissing { slot: slot.to_owned() },
        Some("55000") => match slot::read(client, slot).await {
            Ok(Some(state)) if state.wal_status == "lost" || state.invalidation.is_some() => SourceError::SlotLost {
                slot: slot.to_owned(),
                reason: state.invalidation.unwrap_or_else(|| "its WAL was removed".into()),
            },
            _ => error,
        },
        _ => error,
    }
}

/// Whether WAL that ends at `end` has all of the log. A log that ends inside of a transaction needs its commit record, which
/// begins at the commit LSN, as well.
fn has_all(end: Lsn, log_end: Position) -> bool {
    if log_end.is_between_transactions() { end >= log_end.commit } else { end > log_end.commit }
}

/// Whether the server's history contains everything up to the log's end and up to what is confirmed, which were written
/// on `previous`' timeline.
fn check_identity(
    previous: &SourceIdentity,
    now: &SourceIdentity,
    history: &[TimelineSwitch],
    confirmed: Lsn,
    log_end: Position,
) -> Result<(), SourceError> {
    if previous.system_identifier != now.system_identifier {
        return Err(SourceError::OtherSystem {
            expected: previous.system_identifier.clone(),
            found: now.system_identifier.clone(),
        });
    }
    if previous.timeline == now.timeline {
        return Ok(());
    }
    // A timeline that is no ancestor (an older server, a sibling) shares nothing that we could rely on.
    let left_at = history.iter().find(|switch| switch.timeline == previous.timeline).map(|switch| switch.at);
    match left_at {
        Some(at) if has_all(at, log_end) && confirmed <= at => Ok(()),
        at => Err(SourceError::TimelineDiverged {
            expected: previous.timeline,
            found: now.timeline,
            switched_at: at.unwrap_or(Lsn::ZERO),
            log_end,
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn on(timeline: u32) -> SourceIdentity {
        SourceIdentity { system_identifier: "7".into(), timeline }
    }

    #[test]
    fn a_newer_timeline_is_followed_only_when_it_has_all_of_the_log() {
        let history = [TimelineSwitch { timeline: 1, at: Lsn(100) }, TimelineSwitch { timeline: 2, at: Lsn(200) }];
        let check = |previous, now, reached: u64| {
            check_identity(&on(previous), &on(now), &history, Lsn(reached), Position::before(Lsn(reached)))
        };
        assert!(check(3, 3, 900).is_ok());
        assert!(check(2, 3, 200).is_ok());
        assert!(check(1, 3, 100).is_ok());
        let diverged = check(2, 3, 201).unwrap_err();
        assert_eq!(diverged.reason(), "TimelineDiverged");
        assert!(!diverged.is_transient());
        assert!(check(1, 3, 150).is_err());
        assert!(check(4, 3, 1).is_err(), "an older server");
    }

    #[test]
    fn h04_a_timeline_that_left_at_the_commit_of_a_half_staged_transaction_lacks_it() {
        let history = [TimelineSwitch { timeline: 1, at: Lsn(100) }];
        let check = |confirmed, log_end| check_identity(&on(1), &on(2), &history, Lsn(confirmed), log_end);
        assert!(check(90, Position::before(Lsn(100))).is_ok(), "all that committed before it is there");
        assert!(check(90, Position::of(Lsn(99), Lsn(80), 1)).is_ok(), "its commit record is there");
        let diverged = check(90, Position::of(Lsn(100), Lsn(80), 1)).unwrap_err();
        assert_eq!(diverged.reason(), "TimelineDiverged");
        assert!(check(101, Position::of(Lsn(99), Lsn(80), 1)).is_err(), "more was confirmed");
        assert!(has_all(Lsn(100), Position::before(Lsn(100))) && !has_all(Lsn(99), Position::before(Lsn(100))));
        assert!(has_all(Lsn(101), Position::of(Lsn(100), Lsn(80), 1)));
        assert!(!has_all(Lsn(100), Position::of(Lsn(100), Lsn(80), 1)), "a server that was set back to it");
    }

    #[test]
    fn another_cluster_is_refused() {
        let other = SourceIdentity { system_identifier: "8".into(), timeline: 1 };
        let refused = check_identity(&other, &on(1), &[], Lsn(1), Position::before(Lsn(1))).unwrap_err();
        assert_eq!(refused.reason(), "OtherSystem");
    }

    #[test]
    fn status_is_sent_three_times_within_the_servers_patience() {
        assert_eq!(status_interval(60_000), Duration::from_secs(10));
        assert_eq!(status_interval(3_000), Duration::from_secs(1));
        assert_eq!(status_interval(0), Duration::from_secs(10));
    }
}
