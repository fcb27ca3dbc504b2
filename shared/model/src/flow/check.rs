//! The rules of a flow that no type can hold. The parser and the controller both ask, so a flow that came through the API
//! is held to the same rules as one from a file.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{
    ByteSize, FlowDocument, HIDDEN, PublicationSpec, SecretRef, SideStoreSpec, SinkSpec, SnapshotMode,
    default_large_transaction,
};

/// Kept free in the log for fences, resumes and heartbeats when data has filled it.
pub const LOG_RESERVE: ByteSize = ByteSize(16 << 20);

/// The smallest log: the reserve and as much for data.
pub const LOG_MIN: ByteSize = ByteSize(32 << 20);

/// The largest log, and the largest quota of the side store: NATS counts bytes in 63 bits. In whole units, so that it can be read.
pub const LOG_MAX: ByteSize = ByteSize((1 << 63) - (1 << 40));

/// The smallest quota of the side store: a part.
pub const SIDE_MIN: ByteSize = ByteSize(1 << 20);

/// Sinks of one flow; their holds are written in one etcd transaction, which has at most 128 operations.
pub const MAX_SINKS: usize = 50;

/// The shortest bound on holding a snapshot that can be set.
pub const SNAPSHOT_MIN: Duration = Duration::from_secs(1);

/// Entries of `tables`, and of `exclude`: as many as a snapshot run over them can have tables.
pub const MAX_TABLES: usize = 20_000;

/// Labels of one flow.
pub const MAX_LABELS: usize = 64;

/// Bytes of a label's key, which has at least one.
pub const MAX_LABEL_KEY: usize = 63;

/// Bytes of a label's value.
pub const MAX_LABEL_VALUE: usize = 255;

/// Postgres cuts names after this many bytes.
pub const MAX_POSTGRES_NAME: usize = 63;

/// One thing that is wrong with a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, as in `spec.sinks[1].name`.
    pub path: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

fn problem(path: impl Into<String>, message: impl Into<String>) -> Problem {
    Problem { path: path.into(), message: message.into() }
}

impl FlowDocument {
    /// Everything that is wrong with this flow by itself; empty when it is valid.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        if self.api_version != super::API_VERSION {
            found.push(problem("apiVersion", format!("must be `{}`", super::API_VERSION)));
        }
        if self.kind != "Flow" {
            found.push(problem("kind", "must be `Flow`"));
        }
        self.check_labels(&mut found);
        self.check_source(&mut found);
        self.check_log(&mut found);
        self.check_side_store(&mut found);
        self.check_sinks(&mut found);
        found
    }

    /// What an update from `self` to `next` must not change; empty when it is allowed.
    pub fn refused_changes(&self, next: &FlowDocument) -> Vec<Problem> {
        let mut found = Vec::new();
        let was = &self.spec.source.postgres;
        let will = &next.spec.source.postgres;
        let remedy = "delete the flow and create it again";
        if self.slot_name() != next.slot_name() || was.slot.create != will.slot.create {
            let message = format!("the slot `{}` of a flow cannot change: {remedy}", self.slot_name());
            found.push(problem("spec.source.postgres.slot", message));
        }
        if self.publication_name() != next.publication_name() || was.publication.create != will.publication.create {
            let message = format!("the publication `{}` of a flow cannot change: {remedy}", self.publication_name());
            found.push(problem("spec.source.postgres.publication", message));
        }
        if was.snapshot != will.snapshot
            && (was.snapshot, will.snapshot) != (SnapshotMode::Never, SnapshotMode::Initial)
        {
            let message =
                "only `never` can become `initial`, which then loads every table: delete the flow and create it again";
            found.push(problem("spec.source.postgres.snapshot", message));
        }
        if let (Some(was), Some(will)) = (literal_database(&was.dsn), literal_database(&will.dsn))
            && was != will
        {
            let message = format!(
                "another database at the source has other positions and rows: {remedy}. Another address or password of the same database is no problem"
            );
            found.push(problem("spec.source.postgres.dsn", message));
        }
        found.extend(self.refused_side_store(next));
        for (index, sink) in next.spec.sinks.iter().enumerate() {
            let before = self.spec.sinks.iter().find(|before| before.name == sink.name);
            if before.is_some_and(|before| before.postgres.schema != sink.postgres.schema) {
                let message = "the schema of a sink cannot change: give the sink a new name, it is then a new sink";
                found.push(problem(format!("spec.sinks[{index}].postgres.schema"), message));
            }
        }
        found
    }

    fn refused_side_store(&self, next: &FlowDocument) -> Option<Problem> {
        let place = |document: &FlowDocument| match &document.spec.log.side_store {
            SideStoreSpec::Jetstream(_) => None,
            SideStoreSpec::ObjectStore(spec) => Some(spec.url.clone()),
        };
        let message = "the side store of a flow cannot move, because the log refers to what stands there: delete the flow and \
                       create it again";
        (place(self) != place(next)).then(|| problem("spec.log.sideStore", message))
    }

    fn check_side_store(&self, found: &mut Vec<Problem>) {
        let at = match &self.spec.log.side_store {
            SideStoreSpec::Jetstream(_) => "spec.log.sideStore.jetstream",
            SideStoreSpec::ObjectStore(spec) => {
                if let Some(message) = side_url_problem(&spec.url) {
                    found.push(problem("spec.log.sideStore.objectStore.url", message));
                }
                "spec.log.sideStore.objectStore"
            }
        };
        let quotas = [
            ("transactionsMax", self.spec.log.side_transactions_max()),
            ("chunksMax", self.spec.log.side_chunks_max()),
        ];
        for (key, quota) in quotas {
            if quota < SIDE_MIN {
                found.push(problem(format!("{at}.{key}"), format!("{quota} is too small: at least {SIDE_MIN}")));
            }
            // One that is absent is the log's: that is refused once.
            if quota > LOG_MAX && self.spec.log.max_bytes <= LOG_MAX {
                found.push(problem(format!("{at}.{key}"), format!("{quota} is too large: at most {LOG_MAX}")));
            }
        }
    }

    fn check_labels(&self, found: &mut Vec<Problem>) {
        let labels = &self.metadata.labels;
        if labels.len() > MAX_LABELS {
            found.push(problem("metadata.labels", format!("{} labels; at most {MAX_LABELS}", labels.len())));
        }
        for (key, value) in labels {
            if key.is_empty() || key.len() > MAX_LABEL_KEY || value.len() > MAX_LABEL_VALUE {
                let message =
                    format!("a label has a key of 1 to {MAX_LABEL_KEY} bytes and a value of at most {MAX_LABEL_VALUE}");
                found.push(problem(format!("metadata.labels.{key}"), message));
            }
        }
    }

    fn check_source(&self, found: &mut Vec<Problem>) {
        let source = &self.spec.source.postgres;
        let at = "spec.source.postgres";
        check_secret(&source.dsn, &format!("{at}.dsn"), found);
        check_publication(&source.publication, &format!("{at}.publication"), found);
        let slot = self.slot_name();
        let fit = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if slot.is_empty() || slot.len() > MAX_POSTGRES_NAME || !slot.bytes().all(fit) {
            let message =
                format!("`{slot}` is not a slot name: use 1 to 63 lower-case letters, digits and underscores");
            found.push(problem(format!("{at}.slot.name"), message));
        }
        if source.large_transaction_bytes.0 == 0 {
            found.push(problem(format!("{at}.largeTransactionBytes"), "must be more than 0"));
        }
        if source.safety.retained_wal_max.0 == 0 {
            found.push(problem(format!("{at}.safety.retainedWalMax"), "must be more than 0"));
        }
        if source.safety.snapshot_max.0 < SNAPSHOT_MIN {
            let message = "too short to read anything: at least 1s, better some minutes";
            found.push(problem(format!("{at}.safety.snapshotMax"), message));
        }
    }

    fn check_log(&self, found: &mut Vec<Problem>) {
        let log = self.spec.log.max_bytes;
        if log < LOG_MIN {
            let message =
                format!("{log} is too small: at least {LOG_MIN}, of which {LOG_RESERVE} stay free for control records");
            found.push(problem("spec.log.maxBytes", message));
            return;
        }
        if log > LOG_MAX {
            found.push(problem("spec.log.maxBytes", format!("{log} is too large: at most {LOG_MAX}")));
            return;
        }
        let room = ByteSize(log.0 - LOG_RESERVE.0);
        let transaction = self.spec.source.postgres.large_transaction_bytes;
        if transaction > room {
            let needed = ByteSize(transaction.0.saturating_add(LOG_RESERVE.0));
            found.push(if transaction == default_large_transaction() {
                // Then the log is what the file made small; the other key need not stand in it.
                let message = format!(
                    "{log} is too small for `spec.source.postgres.largeTransactionBytes`, which is {transaction} unless it is set: raise this \
                     to at least {needed}, or set that to at most {room}"
                );
                problem("spec.log.maxBytes", message)
            } else {
                let or_more = match needed <= LOG_MAX {
                    true => format!(", or `spec.log.maxBytes` to at least {needed}"),
                    false => String::new(),
                };
                let message = format!("{transaction} does not fit into the log: set it to at most {room}{or_more}");
                problem("spec.source.postgres.largeTransactionBytes", message)
            });
        }
    }

    fn check_sinks(&self, found: &mut Vec<Problem>) {
        let sinks = &self.spec.sinks;
        if sinks.is_empty() {
            found.push(problem("spec.sinks", "a flow needs at least one sink"));
        }
        if sinks.len() > MAX_SINKS {
            found.push(problem("spec.sinks", format!("{} sinks; at most {MAX_SINKS}", sinks.len())));
        }
        let mut names = BTreeSet::new();
        for (index, sink) in sinks.iter().enumerate() {
            let at = format!("spec.sinks[{index}]");
            if !names.insert(&sink.name) {
                let message =
                    format!("a sink named `{}` is there already: give each sink a name of its own", sink.name);
                found.push(problem(format!("{at}.name"), message));
            }
            check_sink(sink, &at, found);
        }
    }
}

fn check_sink(sink: &SinkSpec, at: &str, found: &mut Vec<Problem>) {
    check_secret(&sink.postgres.dsn, &format!("{at}.postgres.dsn"), found);
    let rest = sink.postgres.schema.replace("{{ .schema }}", "s");
    if rest.is_empty() || rest.len() > MAX_POSTGRES_NAME || rest.contains("{{") || rest.contains("}}") {
        let message = "must be a schema name of at most 63 bytes; only `{{ .schema }}` can stand in it";
        found.push(problem(format!("{at}.postgres.schema"), message));
    }
}

/// The database of a literal `postgres://` URL. What a reference names is seen by the workers only: a capture that meets
/// another server than before stops and says so.
fn literal_database(dsn: &SecretRef) -> Option<&str> {
    let SecretRef::Value(text) = dsn else { return None };
    let (_, rest) = text.split_once("://")?;
    let (_, path) = rest.split_once('/')?;
    path.split('?').next().filter(|name| !name.is_empty())
}

/// Says what is wrong with the place of a side store. It is shown, so nothing secret may stand in it.
fn side_url_problem(url: &str) -> Option<&'static str> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Some("must be `s3://<bucket>[/<prefix>]` or `file:///<folder>`");
    };
    if rest.contains(['?', '#', '@']) || rest.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Some(
            "must have no user, password, query or space: credentials come from the workers' environment (AWS_…)",
        );
    }
    if rest.split('/').any(|part| part == "." || part == "..") || rest.trim_end_matches('/').contains("//") {
        return Some("must have no `.`, `..` or empty part in its path");
    }
    match scheme {
        "s3" if rest.is_empty() || rest.starts_with('/') => Some("names no bucket: write `s3://<bucket>[/<prefix>]`"),
        "file" if !rest.starts_with('/') || rest.len() < 2 => {
            Some("names no absolute folder: write `file:///<folder>`, a folder that all workers share")
        }
        "s3" | "file" => None,
        _ => Some("must begin with `s3://` or `file:///`"),
    }
}

fn check_secret(secret: &SecretRef, at: &str, found: &mut Vec<Problem>) {
    let message = match secret {
        SecretRef::Env(name) => {
            let fit = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let bad = name.is_empty() || name.as_bytes()[0].is_ascii_digit() || !name.bytes().all(fit);
            bad.then_some("`env` takes the name of an environment variable, as in SHOP_DSN")
        }
        SecretRef::File(path) => (!path.starts_with('/')).then_some("`file` takes an absolute path on the workers"),
        SecretRef::Value(value) if value == HIDDEN => {
            Some("this is what WALlaby shows in the place of a secret: put the real value, or better `env` or `file`")
        }
        SecretRef::Value(value) => value.trim().is_empty().then_some("`value` is empty"),
    };
    if let Some(message) = message {
        found.push(problem(at, message));
    }
}

fn check_publication(publication: &PublicationSpec, at: &str, found: &mut Vec<Problem>) {
    if let Some(name) = &publication.name
        && (name.is_empty() || name.len() > MAX_POSTGRES_NAME)
    {
        found.push(problem(format!("{at}.name"), "must have 1 to 63 bytes"));
    }
    if publication.create && publication.tables.is_empty() {
        let message = "with `create: true` at least one table is needed: write `schema.table` or `schema.*`";
        found.push(problem(format!("{at}.tables"), message));
    }
    if !(publication.create || publication.tables.is_empty() && publication.exclude.is_empty()) {
        let message = "with `create: false` the publication's own tables count: remove `tables` and `exclude`";
        found.push(problem(format!("{at}.tables"), message));
    }
    // Sets, and not a look at every entry for every other: the controller checks each flow again and again.
    let schemas: BTreeSet<&str> = publication.tables.iter().filter_map(|pattern| pattern.strip_suffix(".*")).collect();
    for (key, tables) in [("tables", &publication.tables), ("exclude", &publication.exclude)] {
        if tables.len() > MAX_TABLES {
            let count = tables.len();
            let message = format!("{count} entries; at most {MAX_TABLES}: name whole schemas, as in `schema.*`");
            found.push(problem(format!("{at}.{key}"), message));
            continue;
        }
        let mut seen = BTreeSet::new();
        for (index, table) in tables.iter().enumerate() {
            let path = format!("{at}.{key}[{index}]");
            if let Some(message) = table_problem(table) {
                found.push(problem(path, message));
            } else if !seen.insert(table) {
                found.push(problem(path, format!("`{table}` is listed twice")));
            } else if key == "exclude"
                && let Some((schema, _)) = table.split_once('.')
                && !schemas.contains(schema)
            {
                found.push(problem(path, format!("excludes nothing: `tables` has no `{schema}.*`")));
            }
        }
    }
}

/// What is wrong with `schema.table` or `schema.*`, and what to write instead; none when nothing is.
pub fn table_problem(table: &str) -> Option<String> {
    let Some((schema, name)) = table.split_once('.') else {
        return Some(format!("`{table}` has no schema: write `public.{table}` or the schema it is in"));
    };
    let bad = |part: &str| part.is_empty() || part.len() > MAX_POSTGRES_NAME || part.trim() != part;
    if bad(schema) || bad(name) || schema.contains('*') || (name.contains('*') && name != "*") {
        return Some(format!("`{table}` is not a table: write `schema.table` or `schema.*`"));
    }
    None
}
