//! Every reason that a condition can give, with what it means and what to do: `docs/conditions.md` is printed from here.
//!
//! The reasons are words in the code that makes conditions. A test reads them there: it fails for one that is not in this table,
//! and for one that no code gives any more.

use crate::condition::ConditionType::{
    self, Accepted, Capturing, CaughtUp, Delivering, LogHealthy, SlotHealthy, SnapshotComplete, SourceReady,
};

/// One reason, at the conditions that it can stand at.
#[derive(Debug)]
pub struct Reason {
    /// What programs compare.
    pub word: &'static str,
    /// Where it stands.
    pub at: &'static [ConditionType],
    /// What it means.
    pub meaning: &'static str,
    /// What a person does.
    pub remedy: &'static str,
}

const fn reason(
    word: &'static str,
    at: &'static [ConditionType],
    meaning: &'static str,
    remedy: &'static str,
) -> Reason {
    Reason { word, at, meaning, remedy }
}

/// What the conditions are about, in the order in which they are shown.
pub const TYPES: &[(ConditionType, &str, &str)] = &[
    (Accepted, "flow", "the specification can be acted upon"),
    (SourceReady, "flow", "the source can be reached and fits: rights, publication, slot"),
    (Capturing, "flow", "changes are being staged in the log"),
    (SnapshotComplete, "flow, sink", "rows that were there before are loaded"),
    (SlotHealthy, "flow", "the slot is there, is ours, and holds back less WAL than `safety.retainedWalMax`"),
    (LogHealthy, "flow", "the log has room: segments that no reader needs any more stay for the whole replay window"),
    (Delivering, "sink", "the sink takes changes"),
    (CaughtUp, "sink", "the oldest change that the sink lacks was committed less than 10 s ago"),
];

/// What the controller says of a task whose owner has not spoken.
const TASKS: &[ConditionType] = &[SourceReady, Capturing, SlotHealthy, LogHealthy, Delivering, CaughtUp];
const SAID: &[ConditionType] = &[SourceReady, SlotHealthy, LogHealthy];
const MAIN: &[ConditionType] = &[Capturing, Delivering];
/// An error of the source stands at both: the source is not ready, and so nothing is captured.
const SOURCE: &[ConditionType] = &[SourceReady, Capturing];
const SLOT: &[ConditionType] = &[SlotHealthy, Capturing];
const RUN: &[ConditionType] = &[SnapshotComplete];

const WAIT: &str = "nothing: it passes";
const TRIED_AGAIN: &str = "nothing: it is tried again";
const RESUME: &str = "mend what the message names, then `wallaby resume`";
const ANEW: &str = "delete the flow and create it again";
const REPORT: &str = "report it with the message";

/// The reasons, by what they are about.
pub const GROUPS: &[(&str, &[Reason])] = &[
    (
        "The specification",
        &[
            reason("Valid", &[Accepted], "It can be acted upon.", "nothing"),
            reason(
                "Invalid",
                &[Accepted],
                "This version cannot act upon it; the message names the key.",
                "mend it and apply the flow again",
            ),
        ],
    ),
    (
        "Tasks",
        &[
            reason(
                "NoWorker",
                TASKS,
                "No worker is alive.",
                "start `wallaby-worker` with the same etcd, NATS and pool as the controller",
            ),
            reason("NoCapacity", TASKS, "All workers are full.", "start another one, or give them more `--capacity`"),
            reason(
                "NatsUnavailable",
                TASKS,
                "Tasks cannot be offered to workers: NATS does not answer the controller.",
                "check the NATS servers; it goes on by itself",
            ),
            reason(
                "Offered",
                TASKS,
                "The task is offered to the workers, and none has taken it yet.",
                "nothing; if it stays, the workers' logs say why they do not take it",
            ),
            reason("TakingOver", TASKS, "A worker has just taken the task.", WAIT),
            reason("NotSaid", SAID, "The task's owner has not looked yet.", WAIT),
            reason("Starting", MAIN, "The task is being set up; the message is its last error.", WAIT),
            reason("Streaming", MAIN, "Changes flow, or there are none.", "nothing"),
            reason(
                "Backpressured",
                MAIN,
                "What comes next takes no more at the moment; the message names it.",
                "look at what it waits for, if it stays",
            ),
            reason("Retrying", MAIN, "The task failed; the message says why.", TRIED_AGAIN),
            reason("Stopped", MAIN, "The task stopped for a person; the message says why.", RESUME),
            reason(
                "Paused",
                TASKS,
                "The flow or the sink is paused by request.",
                "`wallaby resume`; the message says what that costs meanwhile",
            ),
            reason(
                "Deleting",
                TASKS,
                "The flow is being deleted: slot, publication and log are removed.",
                "nothing; `wallaby describe` shows what it waits for",
            ),
        ],
    ),
    (
        "Existing rows",
        &[
            reason("Planning", RUN, "The run is not planned yet.", WAIT),
            reason(
                "WaitsForRun",
                RUN,
                "The run waits for an earlier one that loads the same tables, or first brings its sink to life.",
                "nothing; `wallaby snapshot list` shows both",
            ),
            reason("Reading", RUN, "Chunks are read at the source.", WAIT),
            reason(
                "Loading",
                &[SnapshotComplete, Delivering],
                "All is read, and sinks load what is left. At `Delivering`: the sink is loaded before it follows.",
                WAIT,
            ),
            reason("Paused", RUN, "The run is paused by request.", "`wallaby snapshot resume`"),
            reason("Cancelling", RUN, "The run is being cancelled.", WAIT),
            reason(
                "Cancelled",
                RUN,
                "A run was cancelled before all rows were loaded, and none has loaded them since.",
                "`wallaby snapshot start` loads them",
            ),
            reason("Loaded", RUN, "All rows are loaded.", "nothing"),
            reason("NotWanted", RUN, "The flow has `snapshot: never`.", "nothing"),
            reason("Running", RUN, "The run goes on; the API says one of the words above instead.", "nothing"),
        ],
    ),
    (
        "The source",
        &[
            reason("Ready", &[SourceReady], "The source fits.", "nothing"),
            reason(
                "SecretMissing",
                &[SourceReady, Capturing, Delivering],
                "The variable or file that `dsn` names is not at this worker.",
                "provide it at the workers; it is tried again, but a variable needs the worker started anew",
            ),
            reason("DsnInvalid", &[SourceReady, Capturing, Delivering], "The connection string is malformed.", RESUME),
            reason("InvalidDsn", SOURCE, "The connection string cannot be used.", RESUME),
            reason(
                "SourceUnreachable",
                SOURCE,
                "The source does not answer, or the connection was lost.",
                "check server, address and network; it is tried again",
            ),
            reason("SourceShuttingDown", SOURCE, "The source shuts down, or is not up yet.", TRIED_AGAIN),
            reason("TimedOut", SOURCE, "The source took too long; the message says for what.", TRIED_AGAIN),
            reason(
                "TlsFailed",
                SOURCE,
                "The TLS handshake or a certificate file failed.",
                "correct `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, then `wallaby resume`",
            ),
            reason(
                "AuthenticationFailed",
                SOURCE,
                "User, password or `pg_hba.conf` do not let us in.",
                "correct it; it is tried again",
            ),
            reason(
                "PrivilegeMissing",
                SOURCE,
                "The role lacks a right.",
                "grant it (`wallaby doctor` prints the statement); it is tried again",
            ),
            reason("DatabaseMissing", SOURCE, "The database does not exist.", RESUME),
            reason("ObjectMissing", SOURCE, "Something that the message names does not exist.", RESUME),
            reason(
                "TooManyConnections",
                SOURCE,
                "The source has no connection free.",
                "raise `max_connections` or `max_wal_senders`, or end idle sessions; it is tried again",
            ),
            reason(
                "LimitReached",
                SOURCE,
                "A limit of the source is reached, as of its slots.",
                "raise `max_replication_slots`, or drop slots that nobody reads; it is tried again",
            ),
            reason(
                "WalLevel",
                SOURCE,
                "`wal_level` is below `logical`.",
                "`ALTER SYSTEM SET wal_level = 'logical'`, restart the server; it is tried again",
            ),
            reason(
                "SourceError",
                SOURCE,
                "The source refused with another error, in the message.",
                "what passes by itself is tried again; else mend it, then `wallaby resume`",
            ),
            reason(
                "ProtocolError",
                SOURCE,
                "The source sent what cannot be understood.",
                "report it with the server's version; then `wallaby resume`",
            ),
            reason(
                "UnreadableValue",
                SOURCE,
                "A value is not of its column's type.",
                "report it with the type; taking the table out of the publication lets the flow go on",
            ),
            reason(
                "RowTooLarge",
                MAIN,
                "A row is larger than what can be taken: than a message of the log while the side store has no room, else than 1 GiB.",
                "give the side store more room, or raise `max_payload`; or make the row smaller",
            ),
            reason(
                "OtherSystem",
                SOURCE,
                "Another database cluster answers than the one that the log was made from.",
                "point `dsn` at the right one and apply, or delete the flow and create it again",
            ),
            reason(
                "TimelineDiverged",
                SOURCE,
                "The source is on a timeline that lacks what is staged, after a failover.",
                "compare source and sinks, then delete the flow and create it again",
            ),
            reason(
                "SourceSetBack",
                SOURCE,
                "The source was set back to before what is staged, as by a restored backup.",
                "compare source and sinks, then delete the flow and create it again",
            ),
            reason(
                "TransactionGone",
                SOURCE,
                "A part of a transaction is in the log, and the source goes on without it.",
                "compare source and sinks, then delete the flow and create it again",
            ),
        ],
    ),
    (
        "Slot, publication and tables",
        &[
            reason("WithinBound", &[SlotHealthy], "The slot holds back less than `safety.retainedWalMax`.", "nothing"),
            reason(
                "SyncUnknown",
                &[SlotHealthy],
                "The slot holds back less than that; but a NATS server that holds the log or the side store does not say when it syncs, so that \
                 Postgres is told of what is staged four minutes later.",
                "give the workers the monitoring URL of every NATS server (`--nats-monitoring`), and see that each answers",
            ),
            reason(
                "RetainedWal",
                &[SlotHealthy],
                "The slot holds back more WAL than `safety.retainedWalMax`.",
                "look at what the capture waits for, or raise the bound",
            ),
            reason(
                "SlotMissing",
                SOURCE,
                "The slot does not exist any more: WAL that was not staged may be gone.",
                "delete the flow and create it again; or make the slot again and accept the gap",
            ),
            reason("SlotLost", SLOT, "The server gave the slot up: the WAL it needs is gone.", ANEW),
            reason("SlotMoved", SLOT, "Somebody moved the slot past what is staged: changes are missing.", ANEW),
            reason(
                "SlotUnfit",
                SOURCE,
                "The slot is of another plugin, kind or database.",
                "name another slot, or drop this one; then `wallaby resume`",
            ),
            reason(
                "SlotInUse",
                SOURCE,
                "Another program reads the slot.",
                "stop it, or give the flow a slot of its own; it is tried again",
            ),
            reason(
                "SlotWaits",
                SOURCE,
                "Making the slot waits for older transactions, which the message names.",
                "end them, or wait; it is tried again",
            ),
            reason(
                "PublicationMissing",
                SOURCE,
                "The publication does not exist, now or at the slot's position.",
                "make it and `wallaby resume`; if it was made after the slot: delete the flow and create it again",
            ),
            reason("PublicationUnfit", SOURCE, "The publication is not what the flow needs.", RESUME),
            reason(
                "PublicationBusy",
                SOURCE,
                "Others change the publication or its tables at the same time.",
                TRIED_AGAIN,
            ),
            reason(
                "TableMissing",
                SOURCE,
                "A table of the flow file does not exist.",
                "make it, or correct the file and apply it; it is tried again",
            ),
            reason(
                "TableWithoutKey",
                SOURCE,
                "A table has no key: its updates and deletes would fail at the source.",
                "give it a key or `REPLICA IDENTITY FULL`, or exclude it; it is tried again",
            ),
            reason(
                "PartitionIdentity",
                SOURCE,
                "The replica identity of a partition has less than the published table's rows are found by: its updates and deletes would be lost.",
                "run the statement that the message names, or give the partitioned table a primary key; it is tried again",
            ),
            reason(
                "PartitionRows",
                &[SourceReady],
                "A table was attached to a published one and has rows, which may be from before: sinks do not have those.",
                "`wallaby snapshot start` of the whole table, which sinks empty before",
            ),
            reason("SnapshotGone", RUN, "The session that exported a run's snapshot has ended.", TRIED_AGAIN),
            reason("Rewritten", RUN, "A table was rewritten after a run's snapshot.", "nothing: it is read again"),
            reason("RelationGone", RUN, "A table of a run is gone, or no longer published.", TRIED_AGAIN),
            reason("TableBusy", RUN, "Reading a table yields to a session that wants it alone.", TRIED_AGAIN),
        ],
    ),
    (
        "The log and the side store",
        &[
            reason("ReplayWindowKept", &[LogHealthy], "Segments stay for the whole `log.replayWindow`.", "nothing"),
            reason(
                "ReplayWindowShortened",
                &[LogHealthy],
                "The log is short of room: segments that nobody needs stay for a shorter time.",
                "raise `log.maxBytes`, or ask for a shorter window; no reader misses anything",
            ),
            reason(
                "LogWaits",
                &[Capturing],
                "The capture waits: for room in the log, for the NATS servers, or (then it is true) to read the log's end again.",
                "if it is full: see which sink is behind (`wallaby status`), or raise `log.maxBytes`; if the servers do not answer: check them, `--nats` and the network, it goes on by itself",
            ),
            reason(
                "LogUnreachable",
                MAIN,
                "The NATS servers do not answer, or turn us away.",
                "check servers, addresses and credentials; it is tried again",
            ),
            reason(
                "NatsServerTooOld",
                MAIN,
                "A NATS server is older than 2.14.5.",
                "upgrade every server of the cluster; it is tried again",
            ),
            reason("NoJetStream", MAIN, "JetStream is off for this account.", "enable it; it is tried again"),
            reason(
                "LogSize",
                MAIN,
                "The servers cannot reserve `log.maxBytes`, or it is too small.",
                "lower or raise it, or raise the servers' `max_file_store`; it is tried again",
            ),
            reason(
                "LogReplicas",
                MAIN,
                "There are fewer servers than `log.replicas`.",
                "lower it, or add servers; it is tried again",
            ),
            reason(
                "NotALog",
                MAIN,
                "The stream has settings or messages that are none of ours.",
                "delete the stream, or give the flow another name",
            ),
            reason(
                "LogLost",
                MAIN,
                "The log, or its end, is gone: changes that the source was told we have are lost.",
                "delete the flow and create it again, and load the tables anew",
            ),
            reason(
                "LogInterrupted",
                MAIN,
                "What was to be written or applied does not go on where the log stands.",
                "nothing: the task begins again",
            ),
            reason(
                "LogGap",
                MAIN,
                "The log misses changes that the sink needs: it never skips them.",
                "give the sink a new name: it is then loaded anew",
            ),
            reason(
                "PastHold",
                MAIN,
                "The log no longer has what the sink needs next.",
                "give the sink a new name: it is then loaded anew",
            ),
            reason("SegmentRefused", &[Capturing], "Rows cannot be packed for the log.", REPORT),
            reason(
                "SegmentUnreadable",
                &[Delivering],
                "A message of the log cannot be read: skipping it would lose changes.",
                "upgrade the worker if the message says that it is newer; else report it",
            ),
            reason(
                "SpliceRefused",
                &[Capturing],
                "A large transaction cannot be put together.",
                "nothing, if it is tried again; else report it, then `wallaby resume`",
            ),
            reason(
                "SideStoreFull",
                MAIN,
                "The side store has no room. While `Capturing` is true the transaction goes into the log instead.",
                "raise `transactionsMax` or `chunksMax`; it is tried again",
            ),
            reason(
                "SideStoreLost",
                MAIN,
                "The side store lost something: the transaction, or the table, is read again from the source.",
                TRIED_AGAIN,
            ),
            reason(
                "SideStoreInvalid",
                MAIN,
                "The side store's place cannot be used; the message says why.",
                "mend it; it is tried again",
            ),
            reason("ManifestRefused", MAIN, "A large transaction's manifest cannot be written.", REPORT),
            reason(
                "LargeTransactionUnreadable",
                &[Delivering],
                "Parts of a large transaction are not in the side store, or damaged.",
                "nothing: the capture reads it again when it starts; if it stays, `wallaby pause` and `wallaby resume` the flow",
            ),
            reason(
                "ChunkLost",
                &[Delivering],
                "A part of a chunk is missing or damaged.",
                "nothing: its table is read again",
            ),
            reason(
                "ChunkTooLarge",
                RUN,
                "One chunk is larger than all that the side store may hold of chunks.",
                "raise `chunksMax`; it is tried again",
            ),
            reason(
                "PlanTooLarge",
                RUN,
                "The plan of a run over too many tables does not fit into etcd.",
                "load them in several runs: cancel this one and start others with tables",
            ),
            reason("EtcdUnavailable", MAIN, "etcd does not answer, or refused.", "check etcd; it is tried again"),
        ],
    ),
    (
        "The sink",
        &[
            reason("Applying", &[Delivering], "The sink takes changes.", "nothing"),
            reason(
                "Detached",
                &[Delivering],
                "The log, or the side store, had no room for what the sink still needed, and it was cut off.",
                "nothing, unless the message names `wallaby snapshot start`: a run loads it anew; to keep it from happening again: a faster sink, a larger log (`log.maxBytes`) or side store (`chunksMax`), or `onOverrun: backpressure`",
            ),
            reason("WithinLag", &[CaughtUp], "The last change came within 10 s.", "nothing"),
            reason(
                "Behind",
                &[CaughtUp],
                "The sink is behind; the message says by how much.",
                "nothing, while it shrinks",
            ),
            reason("NoFigures", &[CaughtUp], "Nothing was applied yet.", WAIT),
            reason(
                "SinkUnavailable",
                &[Delivering],
                "The sink cannot be reached, shuts down, or asks for another try.",
                "check it; it is tried again",
            ),
            reason("SinkSilent", &[Delivering], "The sink has not answered for `--sink-patience`.", TRIED_AGAIN),
            reason(
                "SinkConfiguration",
                &[Delivering],
                "Its tables, rights, password or database do not fit; the message has the statement to run.",
                RESUME,
            ),
            reason("SinkData", &[Delivering], "It cannot keep a row: the message names constraint and keys.", RESUME),
            reason("SinkMoved", &[Delivering], "The sink stands elsewhere than expected.", "nothing: it is read again"),
            reason(
                "ReplayGivenUp",
                &[Delivering],
                "A run was cancelled while its tables caught up: the sink is opened again, to see which of them it has.",
                "nothing",
            ),
        ],
    ),
    (
        "Ownership",
        &[
            reason("Fenced", MAIN, "Another worker owns the task now; this one stops.", "nothing"),
            reason("LeaseInvalid", MAIN, "The worker may have lost its lease, and writes nothing more.", "nothing"),
        ],
    ),
];

const HEAD: &str = "\
# Conditions

<!-- Generated from shared/model/src/reasons.rs. Change it there, then run
     `WALLABY_REGENERATE=1 cargo test -p wallaby-model reasons`. -->

`wallaby describe <flow>` shows the conditions of a flow and of its sinks: each with its status, a reason for programs, since when the
status is what it is, and a message for people with the cause, the names and the remedy. Reasons do not change; messages may.

A status is `True`, `False` or `Unknown`. `Unknown` is not an alarm: nobody can say at the moment.

What goes wrong in a run has the reasons of the source, the log and the side store below, at `SnapshotComplete`. So its owner writes it into
etcd; the API says how far the run is, and what went wrong in the message.

| condition | of a | is true when |
|---|---|---|
";

/// `docs/conditions.md`.
pub fn conditions_page() -> String {
    let mut page = HEAD.to_owned();
    for (kind, of, holds) in TYPES {
        page.push_str(&format!("| `{kind:?}` | {of} | {holds} |\n"));
    }
    for (title, reasons) in GROUPS {
        page.push_str(&format!("\n## {title}\n\n| reason | at | means | what to do |\n|---|---|---|---|\n"));
        for reason in *reasons {
            let at = match reason.at == TASKS {
                true => "all but `Accepted` and `SnapshotComplete`".to_owned(),
                false => reason.at.iter().map(|kind| format!("`{kind:?}`")).collect::<Vec<_>>().join(", "),
            };
            let Reason { word, meaning, remedy, .. } = reason;
            page.push_str(&format!("| `{word}` | {at} | {meaning} | {remedy} |\n"));
        }
    }
    page
}

#[cfg(test)]
#[path = "reasons_tests.rs"]
mod tests;
