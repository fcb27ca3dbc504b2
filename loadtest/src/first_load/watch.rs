//! What is looked at while a load goes on: etcd's records of the run, and our sessions at the source.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use wallaby_coordination::{Coordination, Key, LockRecord, Revision};
use wallaby_model::run::{ChunkDone, RunPlan};
use wallaby_model::{ChunkId, FlowId, RunId, TaskKind};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The modes of Postgres' table locks, weakest first.
const MODES: [&str; 8] = [
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];
/// Table locks of our sessions, how long (s) the oldest of our snapshots is held, and how many sessions wait for us.
const LOOK: &str = "\
    WITH ours AS (SELECT pid, xact_start, backend_xmin FROM pg_stat_activity \
                  WHERE application_name LIKE 'wallaby%' AND datname = current_database()) \
    SELECT (SELECT coalesce(array_agg(DISTINCT l.mode), '{}') FROM pg_locks l JOIN ours USING (pid) \
              WHERE l.locktype = 'relation' AND l.granted AND l.relation >= 16384), \
           (SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8 FROM ours \
              WHERE backend_xmin IS NOT NULL AND xact_start IS NOT NULL), \
           (SELECT count(*) FROM pg_stat_activity a WHERE a.wait_event_type = 'Lock' \
              AND pg_blocking_pids(a.pid) && (SELECT array_agg(pid) FROM ours))";

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Watched {
    /// How many chunks each worker read.
    pub readers: BTreeMap<String, usize>,
    /// All chunks.
    pub chunks: usize,
    /// How often a chunk was taken to be read although it was done, or its table had to start again.
    pub read_again: usize,
    /// The strongest table lock that a session of ours held at the source.
    pub strongest_lock: String,
    /// How long a transaction of ours held an xmin at the source, at most.
    pub xmin_held_max: Duration,
    /// Sessions that were seen to wait for a lock of ours.
    pub blocked_writers: i64,
    /// How often the source was looked at.
    pub looks: usize,
}

impl Watched {
    /// Whether the source was seen to be left alone: it was looked at, our sessions held locks that keep no writer from a table, and
    /// nobody waited for them.
    pub fn leaves_writers_alone(&self) -> bool {
        let weak = &MODES[..4];
        self.looks > 0 && self.blocked_writers == 0 && weak.contains(&self.strongest_lock.as_str())
    }

    /// Adds what the run's records say.
    #[must_use]
    pub fn with(mut self, runs: &RunWatch) -> Watched {
        self.chunks = runs.seen.len();
        self.read_again = runs.read_again;
        for (done, _) in runs.seen.values() {
            *self.readers.entry(done.worker.to_string()).or_default() += 1;
        }
        self
    }
}

/// How far a run is, as shares of all chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Share {
    /// Read from the source.
    pub read: f64,
    /// Loaded into the sink.
    pub loaded: f64,
}

/// Looks at a flow's first run in etcd.
pub struct RunWatch {
    coordination: Coordination,
    flow: FlowId,
    /// The chunks that are done, and the revision that said so.
    seen: BTreeMap<ChunkId, (ChunkDone, Revision)>,
    /// Locks on chunks that were done, and how often each was seen.
    late: BTreeMap<Revision, usize>,
    read_again: usize,
}

impl RunWatch {
    /// Nothing seen yet.
    pub fn new(coordination: Coordination, flow: FlowId) -> RunWatch {
        RunWatch { coordination, flow, seen: BTreeMap::new(), late: BTreeMap::new(), read_again: 0 }
    }

    /// Looks once.
    ///
    /// # Errors
    /// When etcd cannot be reached or a record cannot be read.
    pub async fn look(&mut self) -> anyhow::Result<Share> {
        let prefix = self.coordination.keys().run(&self.flow, RunId(1));
        let (mut loaded, mut planned) = (0, 0);
        for entry in self.coordination.list(&prefix).await? {
            match &entry.key {
                Key::RunPlan(..) => planned = entry.decode::<RunPlan>()?.chunks().count(),
                Key::RunLoaded(..) => loaded += 1,
                Key::RunChunk(_, _, chunk) => {
                    let is_news = self.seen.insert(*chunk, (entry.decode()?, entry.mod_revision)).is_none();
                    self.read_again += usize::from(is_news && chunk.restart > 0);
                }
                _ => {}
            }
        }
        // The record of a chunk is written once, so it does not tell: who reads it again takes its lock again, and for long. Who had an
        // older offer finds it done, and is gone by the next look.
        for lock in self.coordination.locks(&self.flow).await.context("reading the locks")? {
            let TaskKind::Chunk(_, chunk) = lock.task.kind else { continue };
            if self.seen.get(&chunk).is_some_and(|(_, done)| lock.create_revision > *done) {
                let looks = self.late.entry(lock.create_revision).or_default();
                *looks += 1;
                self.read_again += usize::from(*looks == 2);
            }
        }
        let share = |part: usize| if planned == 0 { 0.0 } else { part as f64 / planned as f64 };
        Ok(Share { read: share(self.seen.len()), loaded: share(loaded) })
    }

    /// A worker that owns a chunk task at this moment.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn reader_now(&self) -> anyhow::Result<Option<String>> {
        let locks = self.coordination.locks(&self.flow).await.context("reading the locks")?;
        let mut readers = locks.into_iter().filter(|lock| matches!(lock.task.kind, TaskKind::Chunk(..)));
        Ok(readers.next().map(|lock| {
            let holder: LockRecord = lock.holder;
            holder.worker.to_string()
        }))
    }
}

/// Looks at our sessions at the source until it is stopped.
pub struct SourceWatch {
    stop: CancellationToken,
    task: JoinHandle<Watched>,
}

impl SourceWatch {
    /// Starts looking.
    pub fn start(client: Client) -> SourceWatch {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut watched, mut strongest) = (Watched::default(), None::<usize>);
            while !stopped.is_cancelled() {
                if let Ok(row) = client.query_one(LOOK, &[]).await {
                    let modes: Vec<String> = row.get(0);
                    strongest =
                        strongest.max(modes.iter().filter_map(|mode| MODES.iter().position(|m| m == mode)).max());
                    watched.xmin_held_max =
                        watched.xmin_held_max.max(Duration::from_secs_f64(row.get::<_, f64>(1).max(0.0)));
                    watched.blocked_writers += row.get::<_, i64>(2);
                    watched.looks += 1;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            watched.strongest_lock = strongest.map_or("none", |index| MODES[index]).to_owned();
            watched
        });
        SourceWatch { stop, task }
    }

    /// Stops; what was seen.
    pub async fn stop(self) -> Watched {
        self.stop.cancel();
        self.task.await.unwrap_or_default()
    }
}
