//! The contract: what the sink declares, opening, and which of the other modules does what.

use std::collections::HashMap;
use std::time::Instant;

use async_trait::async_trait;
use wallaby_connector_api::{
    Applied, Batch, Capabilities, ChunkLoader, Guarantee, Opened, Portions, Sink, SinkError, SinkFactory, SinkTask,
    TableLoads,
};
use wallaby_model::{Epoch, Position};

use crate::checkpoint;
use crate::config::PostgresSinkConfig;
use crate::error::PostgresError;
use crate::loader::PostgresLoader;
use crate::metrics::{BATCH_SECONDS, BATCHES, LOG_ROWS, SESSIONS_ENDED, WRITES_REFUSED};
use crate::session::{connect, not_open};
use crate::transaction::{Moves, Open};

/// What this sink declares.
pub fn capabilities() -> Capabilities {
    Capabilities {
        name: "postgres",
        guarantee: Guarantee::ExactlyOnce,
        transactional: true,
        notes: &[
            "Each batch is one transaction that also moves the row of its task in `wallaby.checkpoints`, guarded by the \
             owner's epoch and the expected position: what was applied is not applied again, and an owner that was \
             replaced changes nothing. Do not change that table by hand.",
            "Opening the sink ends sessions of older owners by their `application_name`, so a frozen predecessor cannot \
             hold its locks. For that every worker has to connect as the same role (or as a member of \
             `pg_signal_backend`).",
            "A batch ends where a source transaction ends, so readers never see a part of one. They may see several \
             source transactions appear at once. `TRUNCATE` is not MVCC-safe in Postgres: a reader with an older \
             snapshot sees the table empty.",
            "Rows are kept by the primary key, or by the columns of the replica identity index where the WAL carries \
             only those. Changes of one key in one batch are merged column by column before they are written.",
            "An unchanged TOAST value is left as it is. When such a change meets no row, the row is read again from the \
             source by its key (`wallaby_sink_rows_read_again_total`); it may then be ahead of its neighbours until the \
             log catches up.",
            "Missing tables are made with columns, types, NOT NULL and primary key. New columns are added as nullable, \
             with the value that older rows have in them at the source as their default (`ADD COLUMN … DEFAULT`). The source \
             is asked for that: while it is away, a change with a new column waits, or you add the column by hand. Whatever rewrites \
             the table at the source before this sink meets the column (a default that gives each row another value, as `random()` \
             does; another type; VACUUM FULL) leaves nothing to be asked for, and no change says it: rows that exist keep NULL \
             until the table is loaded anew (`wallaby snapshot start`). Anything else stops this \
             sink alone and names the statement to run here before `wallaby resume`. A column of your own may stay if \
             you gave it a default. Types that do not exist here are kept as text \
             (`wallaby_sink_columns_as_text_total`).",
            "A table without a key is appended to, with the position of the change in `_wallaby_position`. Its updates \
             and deletes need REPLICA IDENTITY FULL at the source and take away one row that is equal in all columns, \
             the oldest first; each batch that has some reads the whole table once.",
            "A batch that violates a constraint of this database as a whole is rolled back and applied in order, in \
             steps down to a single change, in one transaction with deferrable constraints deferred. If that fails too, \
             the sink stops and names constraint, keys and remedy.",
            "The source's own database is refused: its tables would be emptied for a first load, and what is written to them captured \
             again. Another database of the same server is fine, and so are other schemas than the source's (`schema`; a fixed one is not \
             checked).",
            "Foreign keys and triggers of this database are yours: they run for our writes as for any other, but with \
             `row_security = off`: one that reads a table with row-level security needs a role with BYPASSRLS, or the sink stops. \
             Foreign keys are best made DEFERRABLE.",
            "A transaction larger than memory is written in portions, in one transaction here: nothing of it is seen before \
             its end. No other owner gets the task's checkpoint meanwhile; what this one does beside it, a replay or the main \
             stream, goes on. The session says every 10 seconds that it lives; one that is frozen for 2 minutes loses its \
             transaction. A portion that violates a constraint is applied in small steps, with deferrable constraints deferred \
             to the end. A column that the transaction drops stays until it is over; a column that it renames stops the sink: add \
             the new one there with a DEFAULT beside the old one, and when it is over fill it from that where it was not written.",
            "In a first load each chunk is one transaction together with its row in `wallaby.chunks`, under a shared lock on \
             the table's row in `wallaby.tables`: it is loaded once, whoever tries and however often, and never into a table \
             that was emptied or handed over meanwhile. A table that exists is emptied with TRUNCATE when its load begins; \
             foreign keys of yours that refer to it have to be dropped before, and unique constraints of yours beyond the key \
             may be violated until the run is over. Rows of a load in a table without a key have no `_wallaby_position`.",
            "A table that the sink made and that has not the columns, types or key of what is to be loaded into it now is dropped and made anew \
             as its load begins; what was granted on it is granted again, columns, indexes and constraints of yours are gone. Not where you own \
             it, or put more on it (views, rules, foreign keys, triggers, policies, publications, statistics, grants on columns, inheritance): \
             then the sink stops and says what does not fit.",
            "A table that is loaded into a live sink catches up from its snapshot on, and becomes part of the main stream in \
             one transaction, at a position where both stand.",
            "Tables that the sink made get the source's indexes and unique constraints (built CONCURRENTLY), check and \
             exclusion constraints, defaults (but for the next number of a sequence: rows bring theirs), and foreign keys to \
             tables that it loaded too (DEFERRABLE INITIALLY DEFERRED, without actions: the log brings what those did) once \
             they are handed over. What cannot be added is reported with its statement.",
            "`synchronous_commit` stays as the server or role has it, except that `off` becomes `on`: only a commit that \
             survives a crash may move a checkpoint.",
        ],
        batch_rows_max: 65_536,
        batch_bytes_max: 16 << 20,
    }
}

/// Makes sinks of one configuration.
#[derive(Clone, Debug)]
pub struct PostgresSinkFactory {
    config: PostgresSinkConfig,
}

impl PostgresSinkFactory {
    /// A factory; connects to nothing.
    pub fn new(config: PostgresSinkConfig) -> PostgresSinkFactory {
        PostgresSinkFactory { config }
    }
}

impl SinkFactory for PostgresSinkFactory {
    fn make(&self, task: SinkTask) -> Box<dyn Sink> {
        Box::new(PostgresSink::new(self.config.clone(), task))
    }

    fn make_loader(&self, task: SinkTask) -> Option<Box<dyn ChunkLoader>> {
        Some(Box::new(PostgresLoader::new(self.config.clone(), task)))
    }
}

/// One sink, owned by one apply task.
pub struct PostgresSink {
    pub(crate) config: PostgresSinkConfig,
    pub(crate) task: SinkTask,
    /// The task's id, the label of metrics.
    pub(crate) name: String,
    pub(crate) open: Option<Open>,
}

impl PostgresSink {
    /// A new, unopened sink.
    pub fn new(config: PostgresSinkConfig, task: SinkTask) -> PostgresSink {
        let name = task.task.to_string();
        PostgresSink { config, task, name, open: None }
    }

    pub(crate) fn count(&self, metric: &'static str, by: u64) {
        metrics::counter!(metric, "sink" => self.name.clone()).increment(by);
    }

    /// Counts a batch, or a large transaction.
    fn applied(&self, started: Instant, log_rows: usize) {
        self.count(BATCHES, 1);
        self.count(LOG_ROWS, log_rows as u64);
        metrics::histogram!(BATCH_SECONDS, "sink" => self.name.clone()).record(started.elapsed().as_secs_f64());
    }

    /// Turns an error into the contract's and drops the session, whose transaction is open or in doubt.
    pub(crate) fn failed(&mut self, error: PostgresError) -> SinkError {
        self.open = None;
        error.into_sink(self.config.role())
    }

    /// The same for an error of a write, which is counted when it was refused.
    pub(crate) fn write_failed(&mut self, error: PostgresError) -> SinkError {
        let error = self.failed(error);
        if matches!(error, SinkError::Fenced(_)) {
            self.count(WRITES_REFUSED, 1);
        }
        error
    }
}

#[async_trait]
impl Sink for PostgresSink {
    fn capabilities(&self) -> Capabilities {
        capabilities()
    }

    async fn last_epoch(&mut self) -> Result<Option<Epoch>, SinkError> {
        // Under epoch 0 nobody is ended by it, and anybody may end it.
        let session = match connect(&self.config, &self.task.task, Epoch(0)).await {
            Ok(session) => session,
            Err(error) => return Err(error.into_sink(self.config.role())),
        };
        let epoch = checkpoint::last_epoch(&session.client, &self.task.task).await;
        epoch.map_err(|error| error.into_sink(self.config.role()))
    }

    async fn open(&mut self, epoch: Epoch) -> Result<Opened, SinkError> {
        self.open = None;
        let session = match connect(&self.config, &self.task.task, epoch).await {
            Ok(session) => session,
            Err(error) => return Err(self.failed(error)),
        };
        if self.config.keeps_names()
            && let Err(error) = checkpoint::is_not_the_source(&session.client, &self.task).await
        {
            return Err(self.failed(error));
        }
        let end_sessions = !self.config.faults.keep_older_sessions;
        let opened = match checkpoint::take_over(&session.client, &self.task, epoch, end_sessions).await {
            Ok(opened) => opened,
            Err(error) => return Err(self.write_failed(error)),
        };
        self.count(SESSIONS_ENDED, u64::from(opened.sessions_ended));
        let position = opened.position;
        self.open = Some(Open { session, epoch, position, targets: HashMap::new(), owners: None });
        Ok(opened)
    }

    async fn start_at(&mut self, position: Position, log_epoch: Epoch) -> Result<(), SinkError> {
        let open = self.open.as_mut().ok_or_else(not_open)?;
        let (client, epoch) = (&open.session.client, open.epoch);
        match checkpoint::start_at(client, &self.task.task, epoch, position, log_epoch).await {
            Ok(()) => {
                open.position = open.position.or(Some(position));
                Ok(())
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        let started = Instant::now();
        if let Err(error) = self.apply_fitting(batch, Moves::Main).await {
            return Err(self.write_failed(error));
        }
        self.applied(started, batch.rows());
        Ok(Applied::Durable(batch.to))
    }

    async fn apply_large(&mut self, from: Position, portions: &mut dyn Portions) -> Result<Applied, SinkError> {
        let started = Instant::now();
        match self.large(from, portions, Moves::Main).await {
            Ok(done) => {
                self.applied(started, done.log_rows);
                Ok(Applied::Durable(done.to))
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    fn loads(&mut self) -> Option<&mut dyn TableLoads> {
        Some(self)
    }

    async fn barrier(&mut self) -> Result<Position, SinkError> {
        let open = self.open.as_ref().ok_or_else(not_open)?;
        open.position.ok_or_else(|| SinkError::Transient(format!("{} has no position at the sink yet", self.name)))
    }

    async fn close(&mut self) {
        self.open = None;
    }
}
