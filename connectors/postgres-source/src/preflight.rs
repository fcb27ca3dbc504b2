//! Is this source ready for a flow? Every finding that is not fine comes with the SQL that mends it.
//!
//! Used by `wallaby doctor`, without a controller; changes nothing at the source.

use std::collections::BTreeSet;

use wallaby_model::TableName;
use wallaby_model::schema::{quote_identifier, quote_literal};

use crate::config::ConnectConfig;
use crate::control::{Control, connect_control};
use crate::error::SourceError;
use crate::replication::ReplicationClient;
use crate::setup::{PublicationWanted, SlotWanted};
use crate::slot;
use crate::tables::{self, ExistingPublication, SourceTable};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Nothing to do.
    Ok,
    /// It works, but something should be looked at.
    Warn,
    /// A flow cannot run.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was checked; stable, for scripts.
    pub check: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found, and what to do when that is no SQL.
    pub message: String,
    /// The statements that mend it.
    pub remedy_sql: Option<String>,
}

/// Collects findings.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, message: impl Into<String>) {
        self.push(check, Status::Ok, message.into(), None);
    }

    fn warn(&mut self, check: &'static str, message: impl Into<String>, sql: Option<String>) {
        self.push(check, Status::Warn, message.into(), sql);
    }

    fn fail(&mut self, check: &'static str, message: impl Into<String>, sql: Option<String>) {
        self.push(check, Status::Fail, message.into(), sql);
    }

    fn error(&mut self, check: &'static str, error: &SourceError) {
        let remedy = error.remedy().map(|remedy| format!(". {remedy}")).unwrap_or_default();
        self.fail(check, format!("{error}{remedy}"), None);
    }

    fn push(&mut self, check: &'static str, status: Status, message: String, remedy_sql: Option<String>) {
        self.0.push(Finding { check, status, message, remedy_sql });
    }
}

/// Checks a source for one flow. Never fails itself: what cannot be checked is a finding.
pub async fn preflight(config: &ConnectConfig, publication: &PublicationWanted, slot: &SlotWanted) -> Vec<Finding> {
    let mut findings = Findings::default();
    let control = match connect_control(config).await {
        Ok(control) => {
            findings.ok("connection", format!("connected to {} as {}", config.target(), config.user()));
            control
        }
        Err(error) => {
            findings.error("connection", &error);
            return findings.0;
        }
    };
    if let Err(error) = check_all(config, &control, publication, slot, &mut findings).await {
        findings.error("connection", &error);
    }
    findings.0
}

async fn check_all(
    config: &ConnectConfig,
    control: &Control,
    publication: &PublicationWanted,
    slot: &SlotWanted,
    findings: &mut Findings,
) -> Result<(), SourceError> {
    let settings = Settings::read(control).await?;
    let role = Role::read(control).await?;
    check_server(&settings, findings);
    let stream = check_slot(config, control, slot, findings).await?;
    check_slots_left(&settings, stream, findings);
    check_senders_left(&settings, stream, findings);
    check_sender_timeout(&settings, findings);
    let may_replicate = check_role(config, &role, findings);
    if may_replicate {
        check_replication_connection(config, findings).await;
    }
    check_retention(&settings, findings);
    check_publication(config, control, publication, &role, findings).await
}

/// What the server says of itself.
struct Settings {
    version: i32,
    wal_level: String,
    slots_max: i64,
    slots_used: i64,
    senders_max: i64,
    senders_used: i64,
    sender_timeout_ms: i64,
    slot_keep_mb: i64,
    idle_slot_timeout_s: i64,
    standby_slots: String,
    standby_slots_inactive: i64,
    in_recovery: bool,
}

const SETTINGS_SQL: &str = "
SELECT current_setting('server_version_num')::int4, current_setting('wal_level'),
       current_setting('max_replication_slots')::int8, (SELECT count(*) FROM pg_catalog.pg_replication_slots),
       current_setting('max_wal_senders')::int8, (SELECT count(*) FROM pg_catalog.pg_stat_replication),
       (SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'),
       (SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size'),
       coalesce((SELECT setting::int8 * CASE unit WHEN 'min' THEN 60 ELSE 1 END FROM pg_catalog.pg_settings WHERE name = 'idle_replication_slot_timeout'), 0),
       coalesce(current_setting('synchronized_standby_slots', true), ''),
       (SELECT count(*) FROM pg_catalog.regexp_split_to_table(coalesce(current_setting('synchronized_standby_slots', true), ''), '\\s*,\\s*') AS w(name)
         WHERE w.name <> '' AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = w.name AND s.active)),
       pg_catalog.pg_is_in_recovery()";

impl Settings {
    async fn read(control: &Control) -> Result<Settings, SourceError> {
        let row = control.query_typed_one(SETTINGS_SQL, &[]).await;
        let row = row.map_err(|error| SourceError::from_client("reading settings", &error))?;
        Ok(Settings {
            version: row.get(0),
            wal_level: row.get(1),
            slots_max: row.get(2),
            slots_used: row.get(3),
            senders_max: row.get(4),
            senders_used: row.get(5),
            sender_timeout_ms: row.get(6),
            slot_keep_mb: row.get(7),
            idle_slot_timeout_s: row.get(8),
            standby_slots: row.get(9),
            standby_slots_inactive: row.get(10),
            in_recovery: row.get(11),
        })
    }
}

/// What the role may do.
struct Role {
    superuser: bool,
    replication: bool,
    /// On Amazon RDS this membership stands for the REPLICATION attribute.
    rds_replication: Option<bool>,
    create_on_database: bool,
}

const ROLE_SQL: &str = "
SELECT r.rolsuper, r.rolreplication,
       (SELECT pg_catalog.pg_has_role(g.oid, 'USAGE') FROM pg_catalog.pg_roles g WHERE g.rolname = 'rds_replication'),
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')
FROM pg_catalog.pg_roles r WHERE r.rolname = current_user";

impl Role {
    async fn read(control: &Control) -> Result<Role, SourceError> {
        let row = control.query_typed_one(ROLE_SQL, &[]).await;
        let row = row.map_err(|error| SourceError::from_client("reading the role's rights", &error))?;
        Ok(Role {
            superuser: row.get(0),
            replication: row.get(1),
            rds_replication: row.get(2),
            create_on_database: row.get(3),
        })
    }
}

fn check_server(settings: &Settings, findings: &mut Findings) {
    if settings.version >= 140_000 {
        findings.ok("version", format!("PostgreSQL {}", settings.version / 10_000));
    } else {
        let message = format!("PostgreSQL {} is too old: WALlaby needs 14 or newer", settings.version / 10_000);
        findings.fail("version", message, None);
    }
    if settings.in_recovery {
        let message = "the server is a standby; publication and slot are made on the primary: point the dsn there";
        findings.fail("primary", message, None);
    }
    if settings.wal_level == "logical" {
        findings.ok("wal_level", "logical");
    } else {
        let message = format!(
            "wal_level is {}, it must be logical; the server has to be restarted after the change",
            settings.wal_level
        );
        findings.fail("wal_level", message, Some("ALTER SYSTEM SET wal_level = 'logical';".into()));
    }
}

/// What the flow's stream has at the server already.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stream {
    /// Nothing.
    Absent,
    /// Its slot.
    Slot,
    /// Its slot and the walsender that reads it.
    Runs,
}

/// Whether the server has room for the stream, and for a run beside it, which makes a temporary slot on a walsender of its own.
fn check_left(
    check: &'static str,
    (what, view): (&str, &str),
    (used, max): (i64, i64),
    stream_has_one: bool,
    findings: &mut Findings,
) {
    let left = max - used;
    let needed = if stream_has_one { 1 } else { 2 };
    if left >= needed {
        findings.ok(check, format!("{used} of {max} {what} in use"));
        return;
    }
    let sql = Some(format!("ALTER SYSTEM SET {check} = {};", max + 5));
    let restart = "the server has to be restarted after the change";
    if left == 0 && !stream_has_one {
        findings.fail(check, format!("all {max} {what} are in use (SELECT * FROM {view}); {restart}"), sql);
    } else {
        let message = format!(
            "{used} of {max} {what} in use (SELECT * FROM {view}): each run (a load, a repair, an added table) takes one beside the stream's for a moment, and waits while none is free; {restart}"
        );
        findings.warn(check, message, sql);
    }
}

fn check_slots_left(settings: &Settings, stream: Stream, findings: &mut Findings) {
    let used = (settings.slots_used, settings.slots_max);
    let what = ("replication slots", "pg_replication_slots");
    check_left("max_replication_slots", what, used, stream >= Stream::Slot, findings);
}

fn check_senders_left(settings: &Settings, stream: Stream, findings: &mut Findings) {
    let used = (settings.senders_used, settings.senders_max);
    let what = ("walsenders", "pg_stat_replication");
    check_left("max_wal_senders", what, used, stream == Stream::Runs, findings);
}

fn check_sender_timeout(settings: &Settings, findings: &mut Findings) {
    let timeout_ms = settings.sender_timeout_ms;
    match timeout_ms {
        0 => findings.warn(
            "wal_sender_timeout",
            "wal_sender_timeout is 0: a walsender whose client vanished is never ended by the server",
            Some("ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();".into()),
        ),
        1..2000 => findings.warn(
            "wal_sender_timeout",
            format!("wal_sender_timeout is {timeout_ms} ms: a short pause of the network ends the stream"),
            Some("ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();".into()),
        ),
        _ => findings.ok("wal_sender_timeout", format!("{timeout_ms} ms")),
    }
}

/// Returns whether the role may open a replication connection.
fn check_role(config: &ConnectConfig, role: &Role, findings: &mut Findings) -> bool {
    if role.superuser || role.replication || role.rds_replication == Some(true) {
        findings.ok("replication_role", format!("{} may replicate", config.user()));
        return true;
    }
    let user = quote_identifier(config.user());
    let sql = match role.rds_replication {
        Some(_) => format!("GRANT rds_replication TO {user};"),
        None => format!("ALTER ROLE {user} REPLICATION;"),
    };
    findings.fail("replication_role", format!("role {} lacks REPLICATION", config.user()), Some(sql));
    false
}

async fn check_replication_connection(config: &ConnectConfig, findings: &mut Findings) {
    match ReplicationClient::connect(config).await {
        Ok(mut client) => match client.identify_system().await {
            Ok(system) => findings.ok("replication_connection", format!("system {}", system.system_identifier)),
            Err(error) => findings.error("replication_connection", &error),
        },
        Err(error) => findings.error("replication_connection", &error),
    }
}

fn check_retention(settings: &Settings, findings: &mut Findings) {
    match settings.slot_keep_mb {
        -1 => findings.ok("max_slot_wal_keep_size", "no limit: watch the disk (spec.source.postgres.safety)"),
        megabytes if megabytes < 1024 => findings.warn(
            "max_slot_wal_keep_size",
            format!("the slot is lost once it holds back {megabytes} MB of WAL: a short outage of WALlaby is enough"),
            Some("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();".into()),
        ),
        megabytes => findings.ok("max_slot_wal_keep_size", format!("the slot is lost beyond {megabytes} MB")),
    }
    if settings.idle_slot_timeout_s > 0 {
        findings.warn(
            "idle_replication_slot_timeout",
            format!(
                "a slot that nobody reads for {} s is invalidated, also while the flow is paused",
                settings.idle_slot_timeout_s
            ),
            Some("ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();".into()),
        );
    }
    if settings.standby_slots_inactive > 0 {
        findings.warn(
            "synchronized_standby_slots",
            format!("changes wait for the standby slots {}, and {} of them are not active: a failover slot gets nothing until they are", settings.standby_slots, settings.standby_slots_inactive),
            Some("ALTER SYSTEM SET synchronized_standby_slots = ''; SELECT pg_reload_conf();".into()),
        );
    }
}

async fn check_slot(
    config: &ConnectConfig,
    control: &Control,
    wanted: &SlotWanted,
    findings: &mut Findings,
) -> Result<Stream, SourceError> {
    let drop = format!("SELECT pg_drop_replication_slot({});", quote_literal(&wanted.name));
    let Some(state) = slot::read(control, &wanted.name).await? else {
        if wanted.create {
            findings.ok("slot", format!("slot {} does not exist yet and will be made", wanted.name));
        } else {
            let sql =
                format!("SELECT pg_create_logical_replication_slot({}, 'pgoutput');", quote_literal(&wanted.name));
            findings.fail("slot", format!("slot {} does not exist, and slot.create is false", wanted.name), Some(sql));
        }
        return Ok(Stream::Absent);
    };
    let stream = if state.active { Stream::Runs } else { Stream::Slot };
    match state.check_usable(config.dbname()) {
        Err(error @ SourceError::SlotLost { .. }) => {
            let message = format!("{error}. {}", error.remedy().unwrap_or_default());
            findings.fail("slot", message, Some(drop));
        }
        Err(error) => findings.fail("slot", format!("{error}. {}", error.remedy().unwrap_or_default()), Some(drop)),
        Ok(()) if state.active => check_holder(control, wanted, findings).await?,
        Ok(()) if state.wal_status == "unreserved" => {
            let message = format!("slot {} is about to be lost: its WAL goes with the next checkpoint", wanted.name);
            let sql = "ALTER SYSTEM SET max_slot_wal_keep_size = -1; SELECT pg_reload_conf();";
            findings.warn("slot", message, Some(sql.into()));
        }
        Ok(()) => {
            findings.ok("slot", format!("slot {} exists, confirmed up to {}", wanted.name, state.confirmed_flush))
        }
    }
    Ok(stream)
}

async fn check_holder(control: &Control, wanted: &SlotWanted, findings: &mut Findings) -> Result<(), SourceError> {
    let sql =
        "SELECT coalesce(a.application_name, ''), coalesce(s.active_pid, 0) FROM pg_catalog.pg_replication_slots s
               LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1";
    let rows = control.query_typed(sql, &[(&wanted.name, tokio_postgres::types::Type::TEXT)]).await;
    let rows = rows.map_err(|error| SourceError::from_client("looking for the slot's reader", &error))?;
    let (application, pid): (String, i32) = rows.first().map_or_else(Default::default, |row| (row.get(0), row.get(1)));
    if application.starts_with("wallaby/") {
        findings.ok("slot", format!("slot {} is read by WALlaby ({application}, backend {pid})", wanted.name));
    } else {
        let message = format!(
            "slot {} is in use by {application:?} (backend {pid}); stop that reader, or give the flow a slot of its own",
            wanted.name
        );
        findings.fail("slot", message, Some(format!("SELECT pg_terminate_backend({pid});")));
    }
    Ok(())
}

async fn check_publication(
    config: &ConnectConfig,
    control: &Control,
    wanted: &PublicationWanted,
    role: &Role,
    findings: &mut Findings,
) -> Result<(), SourceError> {
    let existing = tables::publication(control, &wanted.name).await?;
    let tables = tables::all(control).await?;
    let chosen = if wanted.create {
        match tables::select(&tables, &wanted.tables, &wanted.exclude) {
            Ok(chosen) => {
                findings.ok("tables", format!("{} tables", chosen.len()));
                chosen
            }
            Err(reason) => {
                findings.fail("tables", reason, None);
                Vec::new()
            }
        }
    } else {
        let named = |table: &&SourceTable| {
            existing.as_ref().is_some_and(|existing| existing.all_tables || existing.tables.contains_key(&table.name))
        };
        tables.iter().filter(named).cloned().collect()
    };
    check_publication_itself(config, wanted, existing.as_ref(), role, findings);
    check_identities(&chosen, existing.as_ref().is_none_or(|existing| existing.via_root), findings);
    check_tables(config, wanted, &chosen, findings);
    check_row_security(config, &chosen, findings);
    check_size(control, &chosen, findings).await;
    Ok(())
}

fn check_publication_itself(
    config: &ConnectConfig,
    wanted: &PublicationWanted,
    existing: Option<&ExistingPublication>,
    role: &Role,
    findings: &mut Findings,
) {
    let name = quote_identifier(&wanted.name);
    match existing {
        None if wanted.create && role.create_on_database => {
            findings.ok("publication", format!("publication {} does not exist yet and will be made", wanted.name));
        }
        None if wanted.create => {
            let sql = format!(
                "GRANT CREATE ON DATABASE {} TO {};",
                quote_identifier(config.dbname()),
                quote_identifier(config.user())
            );
            let message =
                format!("role {} may not create a publication in database {}", config.user(), config.dbname());
            findings.fail("publication", message, Some(sql));
        }
        None => {
            let message = format!("publication {} does not exist, and publication.create is false", wanted.name);
            findings.fail("publication", message, Some(format!("CREATE PUBLICATION {name} FOR TABLE …;")));
        }
        Some(existing) if wanted.create && existing.all_tables => {
            let message = format!(
                "publication {} is FOR ALL TABLES and cannot be altered; set publication.create to false",
                wanted.name
            );
            findings.fail("publication", message, Some(format!("DROP PUBLICATION {name};")));
        }
        Some(existing) if !existing.publishes_all_operations => {
            let message = format!("publication {} leaves out some of insert, update, delete, truncate", wanted.name);
            let sql = format!("ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');");
            findings.warn("publication", message, Some(sql));
        }
        Some(_) => findings.ok("publication", format!("publication {} exists", wanted.name)),
    }
}

/// `via_root`: rows of partitions are sent as rows of their root.
fn check_identities(chosen: &[SourceTable], via_root: bool, findings: &mut Findings) {
    let without: BTreeSet<&TableName> = chosen.iter().flat_map(|table| &table.without_identity).collect();
    let narrow = chosen.iter().filter(|_| via_root).flat_map(|table| &table.narrow_identity);
    let narrow: BTreeSet<&TableName> = narrow.collect();
    let names = |tables: &BTreeSet<&TableName>| tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut messages = Vec::new();
    if !without.is_empty() {
        messages.push(format!(
            "tables without a key: {}. Once published, their updates and deletes would fail at the source. Give them a primary key that is not DEFERRABLE, or the whole row as identity; a partition takes that from no parent",
            names(&without)
        ));
    }
    if !narrow.is_empty() {
        messages.push(format!(
            "partitions whose identity has less than a sink finds rows of the partitioned table by: {}. Their updates and deletes would be lost. Give them the whole row as identity, or the partitioned table a primary key that is not DEFERRABLE",
            names(&narrow)
        ));
    }
    if messages.is_empty() {
        findings.ok("replica_identity", "every table has a key or an identity");
        return;
    }
    let full = |name: &&TableName| format!("ALTER TABLE {} REPLICA IDENTITY FULL;", name.quoted());
    let sql = without.union(&narrow).map(full).collect::<Vec<_>>().join("\n");
    findings.fail("replica_identity", messages.join(". "), Some(sql));
}

fn check_tables(config: &ConnectConfig, wanted: &PublicationWanted, chosen: &[SourceTable], findings: &mut Findings) {
    let user = quote_identifier(config.user());
    let names = |tables: &[&SourceTable]| -> String {
        tables.iter().map(|table| table.name.to_string()).collect::<Vec<_>>().join(", ")
    };
    let statements = |tables: &[&SourceTable], one: &dyn Fn(&TableName) -> String| -> String {
        tables.iter().map(|table| one(&table.name)).collect::<Vec<_>>().join("\n")
    };
    let unreadable: Vec<&SourceTable> = chosen.iter().filter(|table| !table.can_select).collect();
    if unreadable.is_empty() {
        findings.ok("select", "every table may be read");
    } else {
        let message = format!("role {} may not read: {}", config.user(), names(&unreadable));
        let sql = statements(&unreadable, &|name| {
            format!(
                "GRANT USAGE ON SCHEMA {} TO {user}; GRANT SELECT ON {} TO {user};",
                quote_identifier(&name.schema),
                name.quoted()
            )
        });
        findings.fail("select", message, Some(sql));
    }
    let foreign: Vec<&SourceTable> = chosen.iter().filter(|table| !table.owned).collect();
    if wanted.create && !foreign.is_empty() {
        let message = format!(
            "role {} does not own: {}. Only an owner can publish a table; an owner can also make the publication, with publication.create: false",
            config.user(),
            names(&foreign)
        );
        let sql = format!(
            "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true);",
            quote_identifier(&wanted.name),
            chosen.iter().map(|table| format!("ONLY {}", table.name.quoted())).collect::<Vec<_>>().join(", ")
        );
        findings.fail("ownership", message, Some(sql));
    }
}

/// Rows are never left out because a policy hides them: the server is told to refuse instead, whatever the policy says.
fn check_row_security(config: &ConnectConfig, chosen: &[SourceTable], findings: &mut Findings) {
    let hidden: BTreeSet<&TableName> = chosen.iter().flat_map(|table| &table.hidden_rows).collect();
    if hidden.is_empty() {
        findings.ok("row_security", "no policy hides rows from the role");
        return;
    }
    let names = hidden.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let message = format!(
        "row-level security of {names} applies to role {}: loads, rows that are read again by key, and verify are refused. Give the role BYPASSRLS, or make it a member of their owner where it is not forced on the owner (ALTER TABLE … NO FORCE ROW LEVEL SECURITY)",
        config.user()
    );
    let sql = format!("ALTER ROLE {} BYPASSRLS;", quote_identifier(config.user()));
    findings.fail("row_security", message, Some(sql));
}

/// What a load brings: nobody but the flow's owner knows how much changes while it runs.
async fn check_size(control: &Control, chosen: &[SourceTable], findings: &mut Findings) {
    match tables::size(control, chosen).await {
        Ok(size) => findings.ok(
            "size",
            format!(
                "the tables have {size}: the log (spec.log.maxBytes) has to hold what changes while a load reads and copies that, the side store (chunksMax) what is read and not yet in every sink"
            ),
        ),
        Err(error) => findings.warn("size", format!("the tables' size cannot be told: {error}"), None),
    }
}
