//! Publication and slot: made, checked, dropped.
//!
//! The publication is made first and committed, then the slot: the walsender looks publications up in the catalog as of
//! the slot's position, so the other order leaves changes out or ends the stream (hazard 20). Afterwards the
//! publication is only altered, never dropped and made again.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::types::Type;
use wallaby_model::TableName;
use wallaby_model::flow::Failover;
use wallaby_model::schema::quote_identifier;

use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::{PUBLICATION_NOW, ServerError, SourceError};
use crate::prepare::setting;
use crate::sessions::{self, SessionOwner};
use crate::slot::{self, SlotState};
use crate::tables::{self, ExistingPublication, SourceTable};

/// How often a publication is looked at again because somebody else altered it meanwhile.
const PUBLICATION_TRIES: u32 = 10;

/// The publication that a flow wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicationWanted {
    /// Its name.
    pub name: String,
    /// Whether it is ours to make and to alter.
    pub create: bool,
    /// `schema.table` or `schema.*`; parts in double quotes where they hold dots.
    pub tables: Vec<String>,
    /// Tables to leave out.
    pub exclude: Vec<String>,
}

/// The slot that a flow wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotWanted {
    /// Its name.
    pub name: String,
    /// Whether it is ours to make.
    pub create: bool,
    /// Whether it follows to standbys.
    pub failover: Failover,
    /// How long its creation may wait for transactions that are older than it.
    pub timeout: Duration,
}

/// Makes the publication, or alters its list of tables; checks that every table can be published without making its
/// updates and deletes fail at the source. Several may do this at a time: the capture and a run of one flow.
///
/// # Errors
/// `TableMissing`, `TableWithoutKey`, `PartitionIdentity`, `PublicationMissing` (not ours to make), `PublicationUnfit`, a missing privilege;
/// `PublicationBusy` when somebody else was faster at every look.
pub async fn ensure_publication(control: &Control, wanted: &PublicationWanted) -> Result<(), SourceError> {
    let mut tries = PUBLICATION_TRIES;
    loop {
        tries -= 1;
        match alter_publication(control, wanted).await? {
            Altered::Yes => return Ok(()),
            Altered::Raced(error) if tries == 0 => {
                return Err(SourceError::PublicationBusy { publication: wanted.name.clone(), error });
            }
            Altered::Raced(_) => {}
        }
    }
}

/// What became of one look at the publication.
pub(crate) enum Altered {
    /// It is as wanted.
    Yes,
    /// Somebody altered it between the look and the statement: it is to be looked at again.
    Raced(ServerError),
}

async fn alter_publication(control: &Control, wanted: &PublicationWanted) -> Result<Altered, SourceError> {
    let existing = tables::publication(control, &wanted.name).await?;
    if !wanted.create {
        return match existing {
            Some(_) => Ok(Altered::Yes),
            None => Err(SourceError::PublicationMissing { publication: wanted.name.clone(), when: PUBLICATION_NOW }),
        };
    }
    let chosen = tables::choose(control, &wanted.tables, &wanted.exclude).await?;
    check_keys(&chosen, existing.as_ref().is_none_or(|existing| existing.via_root))?;
    let names: BTreeSet<TableName> = chosen.into_iter().map(|table| table.name).collect();
    let publication = quote_identifier(&wanted.name);
    let Some(existing) = existing else {
        let sql = format!(
            "CREATE PUBLICATION {publication} FOR TABLE {} WITH (publish_via_partition_root = true)",
            list(&names)
        );
        return run(control, &sql, format!("creating publication {}", wanted.name)).await;
    };
    check_alterable(&existing, &wanted.name)?;
    let missing: BTreeSet<TableName> =
        names.iter().filter(|name| !existing.tables.contains_key(name)).cloned().collect();
    let surplus: BTreeSet<TableName> = existing.tables.into_keys().filter(|name| !names.contains(name)).collect();
    if !missing.is_empty() {
        let raced = add_tables(control, &wanted.name, &missing).await?;
        if let Altered::Raced(_) = raced {
            return Ok(raced);
        }
    }
    if !surplus.is_empty() {
        return drop_tables(control, &wanted.name, &surplus).await;
    }
    Ok(Altered::Yes)
}

/// Whether tables can come and go.
pub(crate) fn check_alterable(existing: &ExistingPublication, name: &str) -> Result<(), SourceError> {
    if !existing.all_tables {
        return Ok(());
    }
    let reason = "it is FOR ALL TABLES, which cannot be altered; set spec.source.postgres.publication.create: false to use it as it is";
    Err(SourceError::PublicationUnfit { publication: name.to_owned(), reason: reason.into() })
}

/// Adds tables that are not published yet.
pub(crate) async fn add_tables(
    control: &Control,
    publication: &str,
    tables: &BTreeSet<TableName>,
) -> Result<Altered, SourceError> {
    let sql = format!("ALTER PUBLICATION {} ADD TABLE {}", quote_identifier(publication), list(tables));
    run(control, &sql, format!("adding tables to publication {publication}")).await
}

/// Takes tables out that are published.
pub(crate) async fn drop_tables(
    control: &Control,
    publication: &str,
    tables: &BTreeSet<TableName>,
) -> Result<Altered, SourceError> {
    let sql = format!("ALTER PUBLICATION {} DROP TABLE {}", quote_identifier(publication), list(tables));
    run(control, &sql, format!("dropping tables from publication {publication}")).await
}

/// Each table alone: without ONLY those that inherit from it come and go with it, wanted or not.
fn list(tables: &BTreeSet<TableName>) -> String {
    tables.iter().map(|table| format!("ONLY {}", table.quoted())).collect::<Vec<_>>().join(", ")
}

/// A published table without an identity refuses updates and deletes *at the source*; those of a partition that has another one than its
/// root needs would be lost at a sink, without a word, where they are sent as its root's. Neither is ever published.
pub(crate) fn check_keys(tables: &[SourceTable], via_root: bool) -> Result<(), SourceError> {
    let without: BTreeSet<TableName> = tables.iter().flat_map(|table| table.without_identity.clone()).collect();
    if !without.is_empty() {
        return Err(SourceError::TableWithoutKey { tables: without.into_iter().collect() });
    }
    let narrow: BTreeSet<TableName> = tables.iter().flat_map(|table| table.narrow_identity.clone()).collect();
    if via_root && !narrow.is_empty() {
        return Err(SourceError::PartitionIdentity { tables: narrow.into_iter().collect() });
    }
    Ok(())
}

async fn run(control: &Control, sql: &str, during: String) -> Result<Altered, SourceError> {
    match control.batch_execute(sql).await {
        Ok(()) => Ok(Altered::Yes),
        Err(error) => {
            let is_race = is_race(&error);
            match SourceError::from_client(during, &error) {
                SourceError::Server { error, .. } if is_race => Ok(Altered::Raced(error)),
                error => Err(error),
            }
        }
    }
}

/// What the server says to the slower of two: the object is there (seen, or met in the catalog's unique index), it is
/// gone (the publication, a table or its schema), or its row in the catalog was changed in between (an internal error, known
/// by its words only).
fn is_race(error: &tokio_postgres::Error) -> bool {
    let Some(error) = error.as_db_error() else { return false };
    match error.code().code() {
        "42710" | "42704" | "42P01" | "3F000" => true,
        "23505" => {
            error.schema() == Some("pg_catalog") || error.constraint().is_some_and(|name| name.starts_with("pg_"))
        }
        "XX000" => error.message().starts_with("tuple concurrently"),
        _ => false,
    }
}

/// Makes the slot when it is missing, and checks that it can be read.
///
/// # Errors
/// `SlotMissing` (not ours to make), `SlotUnfit`, `SlotLost`, `WalLevel`; `SlotWaits` when transactions older than the
/// slot do not end within the time-out: nothing is left behind then.
pub async fn ensure_slot(
    config: &ConnectConfig,
    control: &Control,
    wanted: &SlotWanted,
) -> Result<SlotState, SourceError> {
    if let Some(state) = slot::read(control, &wanted.name).await? {
        state.check_usable(config.dbname())?;
        return Ok(state);
    }
    if !wanted.create {
        return Err(SourceError::SlotMissing { slot: wanted.name.clone() });
    }
    let wal_level = setting(control, "wal_level").await?;
    if wal_level != "logical" {
        return Err(SourceError::WalLevel { found: wal_level });
    }
    let can_failover =
        setting(control, "server_version_num").await?.parse::<u32>().is_ok_and(|version| version >= 170_000);
    let failover = match wanted.failover {
        Failover::Off => false,
        Failover::Auto => can_failover,
        Failover::On if can_failover => true,
        Failover::On => {
            let reason = "failover slots need PostgreSQL 17; set spec.source.postgres.slot.failover to auto";
            return Err(SourceError::SlotUnfit { slot: wanted.name.clone(), reason: reason.into() });
        }
    };
    create_slot(config, control, wanted, failover).await?;
    let created = slot::read(control, &wanted.name).await?;
    created.ok_or_else(|| SourceError::SlotMissing { slot: wanted.name.clone() })
}

/// Time between two looks at whom the creation waits for.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Creates the slot on a connection of its own, because it waits for every transaction that is older than the slot,
/// and watches from the first connection whom it waits for.
async fn create_slot(
    config: &ConnectConfig,
    control: &Control,
    wanted: &SlotWanted,
    failover: bool,
) -> Result<(), SourceError> {
    let during = || format!("creating slot {}", wanted.name);
    let own = connect_control(&config.with_application_name(control_name(config))).await?;
    own.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0")
        .await
        .map_err(|error| SourceError::from_client(during(), &error))?;
    let pid: i32 = own
        .query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[])
        .await
        .map_err(|error| SourceError::from_client(during(), &error))?
        .get(0);
    let failover_argument = if failover { ", false, true" } else { "" };
    let sql = format!("SELECT pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput', false{failover_argument})");
    let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 1] = [(&wanted.name, Type::NAME)];
    let creating = own.query_typed(&sql, &arguments);
    tokio::pin!(creating);
    let deadline = Instant::now() + wanted.timeout;
    let mut told = false;
    loop {
        tokio::select! {
            created = &mut creating => {
                return match created {
                    Ok(_) => Ok(()),
                    Err(error) if error.code().is_some_and(|code| code.code() == "42710") => Ok(()),
                    Err(error) => Err(SourceError::from_client(during(), &error)),
                };
            }
            () = sleep(LOOK_EVERY) => {}
        }
        let blockers = blockers_of(control, pid).await?;
        if !told && !blockers.is_empty() {
            tracing::warn!(slot = %wanted.name, waits_for = %blockers, "slot creation waits for older transactions");
            told = true;
        }
        if Instant::now() >= deadline {
            // The server drops an unfinished slot when its creation is cancelled, but reports the error first: an answer
            // to the next query on that connection says that the slot is gone.
            let _ = control.query_typed("SELECT pg_catalog.pg_cancel_backend($1)", &[(&pid, Type::INT4)]).await;
            let cancelled = async {
                let created = (&mut creating).await;
                let _ = own.simple_query("").await;
                created
            };
            if let Ok(Ok(_)) = timeout(Duration::from_secs(5), cancelled).await {
                return Ok(());
            }
            return Err(SourceError::SlotWaits { slot: wanted.name.clone(), blockers, after: wanted.timeout });
        }
    }
}

fn control_name(config: &ConnectConfig) -> &str {
    config.application_name()
}

/// Who holds back a backend, as text: process, name, since when.
pub(crate) async fn blockers_of(control: &Control, pid: i32) -> Result<String, SourceError> {
    let sql = "SELECT coalesce(pg_catalog.string_agg(
                 CASE WHEN b.pid = 0 THEN 'a prepared transaction (see pg_prepared_xacts)'
                      ELSE pg_catalog.format('backend %s (%s, %s, transaction open since %s)', b.pid, coalesce(nullif(a.application_name, ''), 'unnamed'), a.state, a.xact_start)
                 END, '; '), '')
               FROM (SELECT DISTINCT pg_catalog.unnest(pg_catalog.pg_blocking_pids($1)) AS pid) b
               LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid";
    let rows = control.query_typed(sql, &[(&pid, Type::INT4)]).await;
    let rows = rows.map_err(|error| SourceError::from_client("asking whom slot creation waits for", &error))?;
    Ok(rows.first().map_or_else(String::new, |row| row.get(0)))
}

/// Drops the slot, after ending our own sessions that still read it. A slot that does not exist is fine.
///
/// # Errors
/// `SlotInUse` when somebody else reads it; `Fenced` when a younger owner does.
pub async fn drop_slot(control: &Control, name: &str, owner: &SessionOwner) -> Result<(), SourceError> {
    if slot::read(control, name).await?.is_none() {
        return Ok(());
    }
    sessions::evict(control, owner, name, Duration::from_secs(10)).await?;
    let dropped = control.query_typed("SELECT pg_catalog.pg_drop_replication_slot($1)", &[(&name, Type::NAME)]).await;
    match dropped {
        Ok(_) => Ok(()),
        Err(error) if error.code().is_some_and(|code| code.code() == "42704") => Ok(()),
        Err(error) => Err(SourceError::from_client(format!("dropping slot {name}"), &error)),
    }
}

/// Drops the publication. One that does not exist is fine.
///
/// # Errors
/// When the server refuses.
pub async fn drop_publication(control: &Control, name: &str) -> Result<(), SourceError> {
    let sql = format!("DROP PUBLICATION IF EXISTS {}", quote_identifier(name));
    let dropped = control.batch_execute(&sql).await;
    dropped.map_err(|error| SourceError::from_client(format!("dropping publication {name}"), &error))
}
