//! What can go wrong at the source, and what a person does about it.
//!
//! [`SourceError::is_transient`] and [`SourceError::remedy`] are the one policy table: the caller backs off and tries
//! again after a transient error, and stops with the remedy after a definite one.

use std::io;
use std::time::Duration;

use wallaby_model::{Epoch, Lsn, Position, TableName};

use crate::config::ConfigError;
use crate::pgoutput::DecodeError;

/// An error that the server reported. Its DETAIL is left out: it may hold values of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// Five characters.
    pub sqlstate: String,
    /// The primary message.
    pub message: String,
    /// The server's hint.
    pub hint: Option<String>,
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.sqlstate)?;
        match &self.hint {
            Some(hint) => write!(f, "; hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// An error of the source. Messages never hold a secret or a row's value.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The connection string is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No connection could be made.
    #[error("cannot connect to {target}: {error}")]
    Connect {
        /// Host and port, or socket path.
        target: String,
        /// Why.
        error: io::Error,
    },
    /// The TLS handshake, or a certificate file, failed.
    #[error("TLS to {target} failed: {reason}")]
    Tls {
        /// Host and port.
        target: String,
        /// Why.
        reason: String,
    },
    /// Authentication failed on our side: method, mechanism or policy.
    #[error("cannot authenticate as {user} at {target}: {reason}")]
    Auth {
        /// The role.
        user: String,
        /// Host and port, or socket path.
        target: String,
        /// Why.
        reason: String,
    },
    /// The server reported an error.
    #[error("{during}: {error}")]
    Server {
        /// What was being done.
        during: String,
        /// The server's words.
        error: ServerError,
    },
    /// The server refused to read a table of which a policy would hide rows from the role.
    #[error("{during}: {error}")]
    RowsHidden {
        /// What was being done.
        during: String,
        /// The server's words.
        error: ServerError,
    },
    /// The connection ended.
    #[error("{during}: the connection was lost: {reason}")]
    Lost {
        /// What was being done.
        during: String,
        /// Why.
        reason: String,
    },
    /// The server is shutting down (57P01, 57P03): the replication connection was closed at once.
    #[error("the source is shutting down (SQLSTATE {sqlstate}); the replication connection was closed")]
    ShuttingDown {
        /// 57P01 or 57P03.
        sqlstate: String,
    },
    /// Something took longer than its limit.
    #[error("{what} took longer than {} s", after.as_secs_f64())]
    Timeout {
        /// What.
        what: String,
        /// The limit.
        after: Duration,
    },
    /// The server sent something that the protocol does not allow.
    #[error("unexpected data from the server at byte {offset} of {what}: {reason}")]
    Protocol {
        /// Which message.
        what: &'static str,
        /// Where in it.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// A pgoutput message cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A value is not of its column's type, or is text that is not UTF-8.
    #[error("a value of {table}.{column} is no valid {kind} (byte {offset} of the value)")]
    Value {
        /// The table.
        table: TableName,
        /// The column.
        column: String,
        /// What was expected.
        kind: &'static str,
        /// Where in the value it stops making sense.
        offset: usize,
    },
    /// Rows could not be put into Arrow form.
    #[error("rows of {table} do not fit into columns: {reason}")]
    Columns {
        /// The table.
        table: TableName,
        /// Arrow's words.
        reason: String,
    },
    /// A row is larger than what can be taken: than a message of the log while there is no side store for it, else than what
    /// PostgreSQL itself sends.
    #[error("a row of {table} in transaction {xid} has {bytes} bytes; the largest that can be taken is {limit}")]
    RowTooLarge {
        /// The transaction.
        xid: u32,
        /// The table.
        table: TableName,
        /// The row's size.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// The slot does not exist.
    #[error("replication slot {slot} does not exist")]
    SlotMissing {
        /// Its name.
        slot: String,
    },
    /// The server has given the slot up.
    #[error("replication slot {slot} is lost: {reason}")]
    SlotLost {
        /// Its name.
        slot: String,
        /// `wal_status`, `invalidation_reason`.
        reason: String,
    },
    /// The slot is not one that this flow can read.
    #[error("replication slot {slot} cannot be used: {reason}")]
    SlotUnfit {
        /// Its name.
        slot: String,
        /// Plugin, type or database.
        reason: String,
    },
    /// Somebody moved the slot past what is staged.
    #[error(
        "replication slot {slot} was moved past us: it is confirmed up to {confirmed}, the log ends at {log_end:?}"
    )]
    SlotMoved {
        /// Its name.
        slot: String,
        /// The slot's `confirmed_flush_lsn`.
        confirmed: Lsn,
        /// The end of the log.
        log_end: Position,
    },
    /// Another program reads the slot.
    #[error("replication slot {slot} is in use by {application:?} (backend {pid})")]
    SlotInUse {
        /// Its name.
        slot: String,
        /// The holder's `application_name`.
        application: String,
        /// The holder's process id.
        pid: i32,
    },
    /// The publication does not exist, now or at the slot's position.
    #[error("publication {publication} does not exist {when}")]
    PublicationMissing {
        /// Its name.
        publication: String,
        /// `in the database`, `in the database any more`, or `at the slot's position in the WAL`.
        when: &'static str,
    },
    /// A publication that would be changed against the user's will, or is not what the flow needs.
    #[error("publication {publication} cannot be used: {reason}")]
    PublicationUnfit {
        /// Its name.
        publication: String,
        /// What is wrong.
        reason: String,
    },
    /// The publication, or the tables of the flow, were changed by others at each of several looks.
    #[error("publication {publication} could not be altered while others change it or its tables: {error}")]
    PublicationBusy {
        /// Its name.
        publication: String,
        /// What the server said last.
        error: ServerError,
    },
    /// A table of the flow does not exist.
    #[error("{reason}")]
    TableMissing {
        /// Which, and what is near it.
        reason: String,
    },
    /// Tables that cannot be published without making their updates and deletes fail at the source.
    #[error("{} without a key: their updates and deletes would fail at the source once published", name_tables(tables))]
    TableWithoutKey {
        /// Which.
        tables: Vec<TableName>,
    },
    /// Partitions that were tables of their own, and have rows: those from before are in the WAL under another name, if at all.
    #[error(
        "{} was attached to {table} and has rows, which may be from before: sinks do not have those",
        name_tables(partitions)
    )]
    PartitionRows {
        /// The published table.
        table: TableName,
        /// Its partitions.
        partitions: Vec<TableName>,
    },
    /// Partitions whose updates and deletes do not say which row of the published table they mean: a sink would find none.
    #[error(
        "the identity of {} has less than what a sink finds rows of the partitioned table by: their updates and deletes would be lost",
        name_tables(tables)
    )]
    PartitionIdentity {
        /// Which.
        tables: Vec<TableName>,
    },
    /// The creation of the slot waits for transactions that began before it.
    #[error("creating slot {slot} waited {} s for older transactions: {blockers}", after.as_secs_f64())]
    SlotWaits {
        /// Its name.
        slot: String,
        /// Whom it waits for.
        blockers: String,
        /// The limit.
        after: Duration,
    },
    /// Another database cluster answers.
    #[error("the source is another cluster: system identifier {found}, the log was made from {expected}")]
    OtherSystem {
        /// In the log.
        expected: String,
        /// At the server.
        found: String,
    },
    /// The new primary lacks what we staged.
    #[error(
        "the source is on timeline {found}, which left timeline {expected} at {switched_at}; the log ends at {log_end:?}, \
         beyond that point: transactions between them are in the log and not in the source"
    )]
    TimelineDiverged {
        /// The timeline in the log.
        expected: u32,
        /// The server's timeline.
        found: u32,
        /// Where the history left our timeline.
        switched_at: Lsn,
        /// The end of the log.
        log_end: Position,
    },
    /// The server is in an older state than the one that we staged from.
    #[error(
        "the source's WAL ends at {wal_end}, before all of the log, which ends at {log_end:?}: the server was set back to an older \
         state; transactions between them are in the log and not in the source"
    )]
    SourceSetBack {
        /// Where the server's WAL ends.
        wal_end: Lsn,
        /// The end of the log.
        log_end: Position,
    },
    /// The log has a part of a transaction, and the server goes on without it.
    #[error(
        "the log ends at {log_end:?}, inside of the transaction that commits at {}, and the source goes on at {passed} \
         without it: a part of it is in the log, and it is not in the source", log_end.commit
    )]
    TransactionGone {
        /// The end of the log.
        log_end: Position,
        /// What came instead of the transaction's rest.
        passed: Lsn,
    },
    /// `wal_level` is below `logical`.
    #[error("wal_level is {found}, logical decoding needs logical")]
    WalLevel {
        /// The server's setting.
        found: String,
    },
    /// The exported snapshot is gone: its session ended.
    #[error("snapshot {snapshot} is gone: the session that exported it has ended")]
    SnapshotGone {
        /// Its name.
        snapshot: String,
    },
    /// A table was rewritten, or its columns changed, after the snapshot: what the snapshot would show of it is not whole.
    #[error("table {table} changed after the snapshot: {what}")]
    Rewritten {
        /// The relation.
        table: TableName,
        /// What is different.
        what: String,
    },
    /// A table of the plan is gone: dropped, renamed, or no longer published.
    #[error("table {table} is gone: it was dropped, renamed, or taken out of the publication after the snapshot")]
    RelationGone {
        /// The relation.
        table: TableName,
    },
    /// Somebody holds, or waits for, an exclusive lock on a table: reading it yields.
    #[error("reading {table} yields to another session: {why}")]
    TableBusy {
        /// The relation.
        table: TableName,
        /// What that session does.
        why: &'static str,
    },
    /// A younger owner of the task holds the slot.
    #[error("fenced: the slot is read by epoch {holder}, we are epoch {ours}")]
    Fenced {
        /// The younger epoch.
        holder: Epoch,
        /// Ours.
        ours: Epoch,
    },
}

impl SourceError {
    /// Whether trying again, after a back-off, can help without a person doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            SourceError::Connect { .. }
            | SourceError::Lost { .. }
            | SourceError::ShuttingDown { .. }
            | SourceError::Timeout { .. }
            | SourceError::Protocol { .. }
            | SourceError::SlotWaits { .. }
            | SourceError::SlotInUse { .. }
            | SourceError::PublicationBusy { .. }
            | SourceError::SnapshotGone { .. }
            | SourceError::Rewritten { .. }
            | SourceError::RelationGone { .. }
            | SourceError::TableBusy { .. } => true,
            SourceError::Server { error, .. } => is_transient_state(&error.sqlstate),
            _ => false,
        }
    }

    /// Whether a younger owner exists: the task is dropped at once.
    pub fn is_fenced(&self) -> bool {
        matches!(self, SourceError::Fenced { .. })
    }

    /// The SQLSTATE, when the server said one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            SourceError::Server { error, .. } | SourceError::RowsHidden { error, .. } => Some(&error.sqlstate),
            SourceError::ShuttingDown { sqlstate } => Some(sqlstate),
            _ => None,
        }
    }

    /// A word for the condition's `reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            SourceError::Config(_) => "InvalidDsn",
            SourceError::Connect { .. } | SourceError::Lost { .. } => "SourceUnreachable",
            SourceError::Tls { .. } => "TlsFailed",
            SourceError::Auth { .. } => "AuthenticationFailed",
            SourceError::Server { error, .. } | SourceError::RowsHidden { error, .. } => server_reason(&error.sqlstate),
            SourceError::ShuttingDown { .. } => "SourceShuttingDown",
            SourceError::Timeout { .. } => "TimedOut",
            SourceError::Protocol { .. } | SourceError::Decode(_) => "ProtocolError",
            SourceError::Value { .. } | SourceError::Columns { .. } => "UnreadableValue",
            SourceError::RowTooLarge { .. } => "RowTooLarge",
            SourceError::SlotMissing { .. } => "SlotMissing",
            SourceError::SlotLost { .. } => "SlotLost",
            SourceError::SlotUnfit { .. } => "SlotUnfit",
            SourceError::SlotMoved { .. } => "SlotMoved",
            SourceError::SlotInUse { .. } => "SlotInUse",
            SourceError::PublicationMissing { .. } => "PublicationMissing",
            SourceError::PublicationUnfit { .. } => "PublicationUnfit",
            SourceError::PublicationBusy { .. } => "PublicationBusy",
            SourceError::TableMissing { .. } => "TableMissing",
            SourceError::TableWithoutKey { .. } => "TableWithoutKey",
            SourceError::PartitionIdentity { .. } => "PartitionIdentity",
            SourceError::PartitionRows { .. } => "PartitionRows",
            SourceError::SlotWaits { .. } => "SlotWaits",
            SourceError::OtherSystem { .. } => "OtherSystem",
            SourceError::TimelineDiverged { .. } => "TimelineDiverged",
            SourceError::SourceSetBack { .. } => "SourceSetBack",
            SourceError::TransactionGone { .. } => "TransactionGone",
            SourceError::WalLevel { .. } => "WalLevel",
            SourceError::SnapshotGone { .. } => "SnapshotGone",
            SourceError::Rewritten { .. } => "Rewritten",
            SourceError::RelationGone { .. } => "RelationGone",
            SourceError::TableBusy { .. } => "TableBusy",
            SourceError::Fenced { .. } => "Fenced",
        }
    }

    /// What a person can do, as a sentence. `None` when waiting is all there is to do.
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            SourceError::Connect { .. } => {
                "Check that the server runs, that host and port of the source's dsn are right, and that the network lets this worker through".into()
            }
            SourceError::Tls { .. } => {
                "Check sslmode, sslrootcert, sslcert and sslkey of the source's dsn against the server's certificate".into()
            }
            SourceError::Config(_) => "Correct the source's dsn".into(),
            SourceError::Auth { .. } => "Correct user, password or channel_binding of the source's dsn, or the server's pg_hba.conf".into(),
            SourceError::Server { error, .. } => return server_remedy(error),
            SourceError::RowsHidden { .. } => {
                "Rows that the role does not see would be lost, so none are read. Give it BYPASSRLS (ALTER ROLE ... BYPASSRLS), or make it a member of the table's owner where row-level security is not forced on the owner; a policy alone does not do, whatever it lets through. `wallaby doctor` prints the statement".into()
            }
            SourceError::RowTooLarge { bytes, limit, .. } if *limit < (1 << 30) => format!(
                "Give the side store more room than {bytes} bytes, or raise max_payload of the NATS servers above {} bytes, or take the table out of the publication; capture goes on from its position",
                bytes + (64 << 10)
            ),
            SourceError::RowTooLarge { .. } => {
                "Make the row smaller, give the table REPLICA IDENTITY DEFAULT so that the old row is not sent with it, or take the table out of the publication; capture goes on from its position".into()
            }
            SourceError::SlotMissing { .. } => {
                "WAL since the last confirmed position may be gone. Delete the flow and create it again, or make the slot again and accept the gap".into()
            }
            SourceError::SlotLost { .. } => {
                "The WAL it needed is gone (max_slot_wal_keep_size, idle_replication_slot_timeout or a conflict). Raise that limit, delete the flow and create it again".into()
            }
            SourceError::SlotUnfit { .. } => "Name another slot in spec.source.postgres.slot.name, or drop this one".into(),
            SourceError::SlotMoved { slot, .. } => format!(
                "Changes between the two were given to somebody else and are missing in the log. Find who used slot {slot} (pg_replication_slot_advance, another consumer), then delete the flow and create it again"
            ),
            SourceError::SlotInUse { pid, .. } => {
                format!("Stop the other reader (SELECT pg_terminate_backend({pid})), or give the flow a slot of its own in spec.source.postgres.slot.name")
            }
            SourceError::PublicationMissing { publication, when } => {
                let quoted = wallaby_model::schema::quote_identifier(publication);
                match *when {
                    PUBLICATION_AT_SLOT => format!("It was dropped, renamed or made again after the slot's position, and rows were changed while it was away: nobody can decode these. Delete the flow and create it again: WALlaby makes publication {publication} first and the slot after it"),
                    PUBLICATION_GONE => format!("It was dropped or renamed while the flow ran. ALTER PUBLICATION ... RENAME TO {quoted}; or make it again with the tables that it had; then `wallaby resume`. The flow goes on where it was when no row of this database was changed while it was away, else it stops and says so: then delete the flow and create it again"),
                    _ => format!("CREATE PUBLICATION {quoted} FOR TABLE ...; or set spec.source.postgres.publication.create: true"),
                }
            }
            SourceError::PublicationUnfit { .. } => "Change the publication, or spec.source.postgres.publication, so that they agree".into(),
            SourceError::TableMissing { .. } => "Correct spec.source.postgres.publication.tables, or create the table".into(),
            SourceError::TableWithoutKey { tables } => format!(
                "{} (a partition takes it from no parent: each needs its own, also one that is made later); or give them a primary key that is not DEFERRABLE, or leave them out with spec.source.postgres.publication.exclude",
                make_full(tables)
            ),
            SourceError::PartitionRows { table, .. } => format!(
                "`wallaby snapshot start FLOW {table}` loads the whole table anew: sinks empty it before"
            ),
            SourceError::PartitionIdentity { tables } => format!(
                "{} (the WAL has of an old row what its partition's identity has); or give the partitioned table a primary key that is not DEFERRABLE, or leave it out with spec.source.postgres.publication.exclude",
                make_full(tables)
            ),
            SourceError::SlotWaits { .. } => "End these transactions, or wait until they end: it is tried again".into(),
            SourceError::OtherSystem { .. } => "Point the source's dsn at the cluster the log was made from, or delete the flow and create it again".into(),
            SourceError::TimelineDiverged { .. }
            | SourceError::SourceSetBack { .. }
            | SourceError::TransactionGone { .. } => {
                "Compare source and sinks, repair the difference, then delete the flow and create it again".into()
            }
            SourceError::WalLevel { .. } => "ALTER SYSTEM SET wal_level = 'logical'; then restart the server".into(),
            SourceError::Value { .. } | SourceError::Columns { .. } => {
                "Report it with the column's type; taking the table out of the publication lets the flow go on".into()
            }
            SourceError::Decode(_) => "Report it with the server's version".into(),
            SourceError::Lost { .. }
            | SourceError::ShuttingDown { .. }
            | SourceError::Timeout { .. }
            | SourceError::Protocol { .. }
            | SourceError::PublicationBusy { .. }
            | SourceError::SnapshotGone { .. }
            | SourceError::Rewritten { .. }
            | SourceError::RelationGone { .. }
            | SourceError::TableBusy { .. }
            | SourceError::Fenced { .. } => return None,
        };
        Some(text)
    }

    /// The same of a flow that has begun: what is missing now was there, and to make it is not the whole remedy.
    #[must_use]
    pub fn of_begun(self) -> SourceError {
        match self {
            SourceError::PublicationMissing { publication, .. } => {
                SourceError::PublicationMissing { publication, when: PUBLICATION_GONE }
            }
            other => other,
        }
    }

    /// Wraps an error of the control connection.
    pub(crate) fn from_client(during: impl Into<String>, error: &tokio_postgres::Error) -> SourceError {
        let during = during.into();
        if let Some(db) = error.as_db_error() {
            let sqlstate = db.code().code().to_owned();
            if is_shutdown(&sqlstate) {
                return SourceError::ShuttingDown { sqlstate };
            }
            let error = ServerError { sqlstate, message: db.message().to_owned(), hint: db.hint().map(str::to_owned) };
            return match db.routine() {
                Some(ROW_SECURITY_ROUTINE) => SourceError::RowsHidden { during, error },
                _ => SourceError::Server { during, error },
            };
        }
        let mut reason = error.to_string();
        if let Some(cause) = std::error::Error::source(error) {
            reason = format!("{reason}: {cause}");
        }
        SourceError::Lost { during, reason }
    }
}

/// The server's function that refuses what row-level security would cut: its SQLSTATE is that of any missing privilege, and its
/// words are in the server's language.
const ROW_SECURITY_ROUTINE: &str = "check_enable_rls";

/// [`SourceError::PublicationMissing`]'s `when` for a publication that exists now but not at the slot's position.
pub(crate) const PUBLICATION_AT_SLOT: &str = "at the slot's position in the WAL";
/// [`SourceError::PublicationMissing`]'s `when` for a publication that does not exist.
pub(crate) const PUBLICATION_NOW: &str = "in the database";
/// [`SourceError::PublicationMissing`]'s `when` for a publication that existed as the flow began.
pub(crate) const PUBLICATION_GONE: &str = "in the database any more";

/// Whether a SQLSTATE says that the server goes down or is not up yet.
pub(crate) fn is_shutdown(sqlstate: &str) -> bool {
    matches!(sqlstate, "57P01" | "57P03")
}

/// Classes that pass by themselves: connection, resources, operator intervention, locks, I/O, snapshots too old.
fn is_transient_state(sqlstate: &str) -> bool {
    let by_class = matches!(sqlstate.get(..2), Some("08" | "40" | "53" | "55" | "57" | "58"));
    // 55000: the object is not in a state that allows it (wal_level, lost slot): a person has to act.
    // 57014 is a cancelled query, 57P04 a dropped database.
    by_class && !matches!(sqlstate, "55000" | "57P04")
}

fn server_reason(sqlstate: &str) -> &'static str {
    match sqlstate {
        "28P01" | "28000" => "AuthenticationFailed",
        "42501" => "PrivilegeMissing",
        "3D000" => "DatabaseMissing",
        "42704" => "ObjectMissing",
        "53300" => "TooManyConnections",
        "53400" => "LimitReached",
        _ => "SourceError",
    }
}

fn server_remedy(error: &ServerError) -> Option<String> {
    let text = match error.sqlstate.as_str() {
        "28P01" => "Correct user and password of the source's dsn",
        "28000" => {
            "Let this worker in: pg_hba.conf needs an entry for the role and the database (walsenders match by database too), with the encryption that sslmode asks for; the role needs LOGIN and REPLICATION"
        }
        "42501" => "Grant the role what it lacks; `wallaby doctor` prints the statements",
        "3D000" => "Correct dbname of the source's dsn",
        "53300" => "Raise max_connections or max_wal_senders, or end idle sessions",
        "53400" => "Raise max_replication_slots, or drop slots that nobody reads",
        "55000" => "Run `wallaby doctor`: a setting of the server does not allow it",
        _ => return None,
    };
    Some(text.to_owned())
}

/// The statements that give tables the whole row as their identity.
fn make_full(tables: &[TableName]) -> String {
    let full = |table: &TableName| format!("ALTER TABLE {} REPLICA IDENTITY FULL", table.quoted());
    tables.iter().map(full).collect::<Vec<_>>().join("; ")
}

fn name_tables(tables: &[TableName]) -> String {
    let names: Vec<String> = tables.iter().map(ToString::to_string).collect();
    let what = if names.len() == 1 { "table" } else { "tables" };
    format!("{what} {}", names.join(", "))
}
