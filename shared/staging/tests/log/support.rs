//! A flow's log on a test cluster, and a source whose history is known: position n is the n-th change.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use wallaby_model::flow::Replicas;
use wallaby_model::{Codec, Epoch, FlowId, Lsn, Nonce, Position, RecordKind, ResumeInfo};
use wallaby_staging::{
    Accepted, Connections, DataAppend, Log, LogConfig, LogReader, LogWriter, NatsTarget, ReaderOptions, Result,
    SegmentCache, SegmentKey, SharedPulls, Staged, Start, SyncPolicy, WriterOptions,
};
use wallaby_testkit::{NatsCluster, NatsScope, unique};

pub const MAX_BYTES: u64 = 256 << 20;
pub const PATIENCE: Duration = Duration::from_secs(60);

/// `(L, 0)`.
pub fn at(lsn: u64) -> Position {
    Position::before(Lsn(lsn))
}

pub fn info(rewind: bool) -> ResumeInfo {
    ResumeInfo {
        system_identifier: "7".to_owned(),
        timeline: 1,
        slot: "s".to_owned(),
        publication: "p".to_owned(),
        rewind,
    }
}

pub fn options() -> WriterOptions {
    WriterOptions { sync: SyncPolicy::Always, ..WriterOptions::default() }
}

/// A segment `(from, to]` between transactions. Its body tells what it covers, however it was cut.
pub fn segment(from: u64, to: u64, bytes: usize) -> DataAppend {
    let mut body = format!("{from}..{to};").into_bytes();
    body.resize(body.len().max(bytes), b'.');
    DataAppend {
        from: at(from),
        to: at(to),
        complete_to: at(to),
        rows: u32::try_from(to - from).unwrap(),
        codec: Codec::None,
        body: Bytes::from(body),
    }
}

pub fn target(cluster_url: &str) -> NatsTarget {
    NatsTarget {
        servers: cluster_url.split(',').map(str::to_owned).collect(),
        name: "wallaby-test".to_owned(),
        ..NatsTarget::default()
    }
}

/// A cache of one worker.
#[derive(Default)]
pub struct Memory {
    records: Mutex<HashMap<SegmentKey, Staged>>,
    pulls: SharedPulls,
    forgets: bool,
}

impl Memory {
    /// One that has lost everything whenever it is asked.
    pub fn that_forgets() -> Memory {
        Memory { forgets: true, ..Memory::default() }
    }

    pub fn records(&self) -> MutexGuard<'_, HashMap<SegmentKey, Staged>> {
        self.records.lock().unwrap()
    }
}

impl SegmentCache for Memory {
    fn get(&self, key: &SegmentKey) -> Option<Staged> {
        self.records().get(key).cloned()
    }

    fn put(&self, key: SegmentKey, staged: &Staged) {
        if !self.forgets {
            self.records().insert(key, staged.clone());
        }
    }

    fn pulls(&self) -> Option<&SharedPulls> {
        Some(&self.pulls)
    }
}

/// A log of its own, deleted by `end`, or with the servers.
pub struct Flow {
    pub log: Log,
    pub url: String,
    /// What its shared readers share.
    pub cache: Arc<Memory>,
}

impl Flow {
    pub async fn on(url: &str, replicas: u8, max_bytes: u64) -> Flow {
        crate::counters::install();
        let connections = Connections::open(&target(url)).await.unwrap();
        let name = unique("f").replace('_', "-").to_lowercase();
        let log = Log::new(FlowId::new(name.chars().take(40).collect::<String>()).unwrap(), connections);
        let config = LogConfig { replicas: Replicas::Exactly(replicas), max_bytes };
        let made = wallaby_testkit::eventually(PATIENCE, "the log", async || log.ensure(&config).await).await;
        assert_eq!(made.replicas, usize::from(replicas));
        Flow { log, url: url.to_owned(), cache: Arc::default() }
    }

    /// On the shared cluster of three; asserts that the copies stand on three servers, because one hides fencing.
    pub async fn on_three() -> Flow {
        let scope = NatsScope::three_nodes("log").await;
        let flow = Flow::on(&scope.url(), 3, MAX_BYTES).await;
        flow.assert_three_servers().await;
        flow
    }

    pub async fn on_one() -> Flow {
        let scope = NatsScope::one_node("log").await;
        Flow::on(&scope.url(), 1, MAX_BYTES).await
    }

    pub async fn on_own(cluster: &NatsCluster, max_bytes: u64) -> Flow {
        let flow = Flow::on(&cluster.client_url(), 3, max_bytes).await;
        flow.assert_three_servers().await;
        flow
    }

    pub async fn assert_three_servers(&self) {
        wallaby_testkit::eventually(PATIENCE, "three copies on three servers", async || {
            let info = self.log.info().await.map_err(|error| error.to_string())?;
            let mut servers = info.servers.clone();
            servers.sort();
            servers.dedup();
            if info.replicas == 3 && servers.len() == 3 { Ok(()) } else { Err(format!("{info:?}")) }
        })
        .await;
    }

    /// The same log over connections of its own: another worker.
    pub async fn elsewhere(&self) -> Log {
        self.over(&self.url).await
    }

    /// The same log by another way to its servers.
    pub async fn over(&self, url: &str) -> Log {
        Log::new(self.log.flow().clone(), Connections::open(&target(url)).await.unwrap())
    }

    /// Takes over and resumes at the log's end, or at 1 when it is empty.
    pub async fn owner(&self, epoch: u64) -> Result<LogWriter> {
        owner(&self.log, epoch).await
    }

    pub fn reader(&self, start: Start) -> LogReader {
        LogReader::new(&self.log, start, ReaderOptions::default())
    }

    /// One that shares the flow's cache, and its pulls, with others.
    pub fn shared_reader(&self, start: Start) -> LogReader {
        self.reader_with(&self.cache, start)
    }

    pub fn reader_with(&self, cache: &Arc<Memory>, start: Start) -> LogReader {
        let cache: Arc<dyn SegmentCache> = Arc::<Memory>::clone(cache);
        LogReader::new(&self.log, start, ReaderOptions { cache: Some(cache), ..ReaderOptions::default() })
    }

    pub async fn end(self) {
        self.log.delete().await.unwrap();
    }
}

pub async fn owner(log: &Log, epoch: u64) -> Result<LogWriter> {
    let takeover = LogWriter::take_over(log, Epoch(epoch), Nonce::random(), options()).await?;
    let position = takeover.tail().end.unwrap_or(at(1));
    takeover.resume(position, info(false)).await
}

/// The position of a writer as a number.
pub fn end_of(writer: &LogWriter) -> u64 {
    writer.end().commit.0
}

/// Where the record of what was accepted begins, by its own word: behind `after` something would be missing. `None` for a resume.
pub fn begins(accepted: &Accepted) -> Option<Position> {
    match accepted.staged.record.kind {
        RecordKind::Data { from, .. } | RecordKind::Splice { from, .. } | RecordKind::Heartbeat { from, .. } => {
            Some(from)
        }
        RecordKind::Fence { .. } | RecordKind::Resume { .. } => None,
    }
}

/// Reads until the reader stands at `to` and checks that nothing is missing and nothing is doubled: what it accepts
/// continues exactly where it stood.
pub async fn read_to(reader: &mut LogReader, to: Position) -> Vec<Accepted> {
    try_read_to(reader, to).await.unwrap()
}

/// As [`read_to`]; the error that ended the reader, if one did.
pub async fn try_read_to(reader: &mut LogReader, to: Position) -> Result<Vec<Accepted>> {
    let mut accepted: Vec<Accepted> = Vec::new();
    let read = async {
        while reader.state().end.is_none_or(|end| end < to) {
            let stood = reader.state().end;
            let next = reader.next().await?;
            assert!(stood.is_none_or(|stood| stood == next.after), "stood at {stood:?}, got {next:?}");
            assert!(begins(&next).is_none_or(|from| from <= next.after), "something is missing before {next:?}");
            assert_eq!(reader.state().end, Some(next.to));
            accepted.push(next);
        }
        Ok(())
    };
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(read) => read.map(|()| accepted),
        Err(_) => {
            panic!("the reader stands at {:?}, not at {to:?}; waits: {:?}", reader.state(), *reader.waiting().borrow())
        }
    }
}
