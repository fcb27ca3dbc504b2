//! Whether what stands behind the splices is still there (hazard 9).
//!
//! The log and the side store are two streams: a power cut can take parts that were acknowledged and leave the splice that needs them.
//! Before replication starts, every part of each splice above what Postgres was told is read. And before Postgres is told that a splice
//! is flushed, its manifest and its youngest parts are looked for: an acknowledged tail of a stream is lost from its end. One that is lost
//! while a transaction is still being put is found out by the side store, which then takes nothing more of this connection.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wallaby_model::{Attempt, Lsn, Manifest, Position, RecordKind, Splice};
use wallaby_staging::{Accepted, Log, LogReader, ReaderOptions, SideKey, SideStore, StagingError, Start, Tail};
use wallaby_wire::splice::{check_part, decode_manifest};

use super::side::Kept;
use crate::memory::PUTS_MOST;

/// A splice whose parts are not all there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The transaction's commit LSN.
    pub commit: Lsn,
    /// Where the log goes on, so that Postgres sends the transaction again.
    pub resume: Position,
}

/// What the look through the splices of a log found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// The first one that lacks something.
    pub broken: Option<Broken>,
    /// Commit LSNs of the splices past where the log goes on: of the broken one and those behind it, and of what an owner gave up
    /// that rewound the log and came no further. Their transactions come again, and must be kept whole: a reader before such a splice
    /// takes everything of the transaction from what its manifest names then.
    pub again: BTreeSet<Lsn>,
}

/// Looks through the splices that end past `confirmed`, and reads every part behind those up to the log's end.
///
/// # Errors
/// When log or side store cannot be read.
pub async fn find_broken(
    log: &Log,
    side: &dyn SideStore,
    confirmed: Position,
    tail: &Tail,
    unconfirmed: &Unconfirmed,
) -> Result<Looked, StagingError> {
    if tail.end.is_none() {
        return Ok(Looked::default());
    }
    let at = Start::At { position: confirmed, epoch: None, sequence_hint: None };
    match find_from(log, side, at, confirmed, tail, unconfirmed).await {
        // What the sinks have can be purged before Postgres is told: then everything that is left is looked at.
        Err(StagingError::PastHold { .. }) => {
            find_from(log, side, Start::Available, confirmed, tail, unconfirmed).await
        }
        found => found,
    }
}

async fn find_from(
    log: &Log,
    side: &dyn SideStore,
    start: Start,
    confirmed: Position,
    tail: &Tail,
    unconfirmed: &Unconfirmed,
) -> Result<Looked, StagingError> {
    let mut reader = LogReader::new(log, start, ReaderOptions::default());
    let mut looked = Looked::default();
    while let Some(accepted) = reader.next_up_to(tail.last_sequence).await? {
        if let Some((splice, from)) = splice_of(&accepted)
            && accepted.to > confirmed
        {
            let commit = splice.transaction.commit;
            if looked.broken.is_some() || Some(accepted.to) > tail.end {
                looked.again.insert(commit);
                continue;
            }
            if let Some(attempt) = whole_attempt(side, commit).await? {
                unconfirmed.add(&Kept { splice, attempt, to: accepted.to });
                continue;
            }
            // Between two transactions, so that the log's end is known as that of a whole one.
            let begin = if from.is_between_transactions() { from } else { Position::before(commit) };
            looked.broken = Some(Broken { commit, resume: begin.max(confirmed) });
            looked.again.insert(commit);
        }
    }
    Ok(looked)
}

fn splice_of(accepted: &Accepted) -> Option<(Splice, Position)> {
    match accepted.staged.record.kind {
        RecordKind::Splice { from, .. } => Some((serde_json::from_slice(&accepted.staged.body).ok()?, from)),
        _ => None,
    }
}

/// The manifest of the transaction that commits there; `None` when there is none that can be read.
///
/// # Errors
/// When the side store cannot be read.
pub async fn manifest_of(side: &dyn SideStore, commit: Lsn) -> Result<Option<Manifest>, StagingError> {
    let body = side.get(SideKey::Manifest { commit }).await?;
    Ok(body.and_then(|body| decode_manifest(commit, &body).ok()))
}

async fn has_part(side: &dyn SideStore, manifest: &Manifest, number: usize) -> Result<bool, StagingError> {
    let Some(part) = manifest.parts.get(number) else { return Ok(false) };
    let number = number as u32;
    let body = side.get(SideKey::Part { attempt: manifest.attempt, number }).await?;
    Ok(body.is_some_and(|body| check_part(manifest.transaction.commit, number, part, &body).is_ok()))
}

/// The attempt that a manifest names, when the manifest and every part of it are there and undamaged.
async fn whole_attempt(side: &dyn SideStore, commit: Lsn) -> Result<Option<Attempt>, StagingError> {
    let Some(manifest) = manifest_of(side, commit).await? else { return Ok(None) };
    for number in 0..manifest.parts.len() {
        if !has_part(side, &manifest, number).await? {
            return Ok(None);
        }
    }
    Ok(Some(manifest.attempt))
}

/// The splices that were appended and not confirmed yet. Shared by the capture loop, which adds, and the loop that confirms.
#[derive(Clone, Debug, Default)]
pub struct Unconfirmed(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    splices: VecDeque<(Position, Lsn, Attempt)>,
    lost: Option<Lsn>,
}

impl Unconfirmed {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing can panic while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A splice is about to be appended.
    pub fn add(&self, kept: &Kept) {
        self.state().splices.push_back((kept.to, kept.splice.transaction.commit, kept.attempt));
    }

    /// The commit LSN of the first one.
    pub fn first(&self) -> Option<Lsn> {
        self.state().splices.front().map(|(_, commit, _)| *commit)
    }

    /// The commit LSN of a splice whose manifest or parts went missing.
    pub fn lost(&self) -> Option<Lsn> {
        self.state().lost
    }

    /// How far may be confirmed: `durable`, or what lies before the first splice that lacks something. When the side store does not
    /// answer, what lies before the first splice that is not known to be whole.
    pub async fn allow(&self, side: &dyn SideStore, durable: Lsn) -> Lsn {
        loop {
            let first = self.state().splices.front().copied();
            let Some((to, commit, attempt)) = first.filter(|(to, ..)| to.commit <= durable) else { return durable };
            match is_tail_there(side, commit, attempt).await {
                Ok(true) => _ = self.state().splices.pop_front(),
                // The record itself is durable, what stands behind it is not: its commit comes again from `(commit, 0)` on.
                Ok(false) => {
                    tracing::error!(%commit, end = %to, "the side store lost parts of a transaction that was not confirmed yet");
                    self.state().lost = Some(commit);
                    return commit.min(durable);
                }
                Err(error) => {
                    tracing::debug!(%commit, %error, "a splice is not confirmed yet: its parts could not be looked for");
                    return commit.min(durable);
                }
            }
        }
    }
}

/// Whether the manifest is there, and of its parts the last ones, as many as can be on their way together: they land in any order, so
/// that the youngest need not be the last.
async fn is_tail_there(side: &dyn SideStore, commit: Lsn, attempt: Attempt) -> Result<bool, StagingError> {
    let Some(manifest) = manifest_of(side, commit).await? else { return Ok(false) };
    if manifest.attempt != attempt || manifest.parts.is_empty() {
        return Ok(false);
    }
    let mut later_bytes = 0;
    for number in (0..manifest.parts.len()).rev() {
        if later_bytes >= PUTS_MOST {
            break;
        }
        if !has_part(side, &manifest, number).await? {
            return Ok(false);
        }
        later_bytes += manifest.parts[number].bytes;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::time::Duration;

    use bytes::Bytes;
    use wallaby_coordination::Coordination;
    use wallaby_model::flow::Replicas;
    use wallaby_model::{Codec, Epoch, FlowId, ManifestPart, Nonce, ResumeInfo, Transaction};
    use wallaby_staging::{
        Connections, DataAppend, LogConfig, LogWriter, NatsTarget, ObjectSide, Quotas, Shelf, SideGroup, SyncPolicy,
        Takeover, Trace, WriterOptions,
    };
    use wallaby_testkit::{EtcdScope, NatsScope, Wire};
    use wallaby_wire::splice::{encode_manifest, part_checksum};

    use super::*;
    use crate::capture::retention::Sweeper;
    use crate::capture::side::Living;

    /// A folder for the parts of a flow, and the flow.
    async fn side(folder: &tempfile::TempDir) -> ObjectSide {
        let quotas = Quotas { transactions: 1 << 20, chunks: 1 << 20 };
        let side = ObjectSide::in_folder(folder.path(), FlowId::new("shop").unwrap(), quotas).unwrap();
        side.ensure(Shelf::Transactions).await.unwrap();
        side
    }

    fn attempt(epoch: u64, commit: u64) -> Attempt {
        Attempt { epoch: Epoch(epoch), connection: 1, xid: commit as u32 }
    }

    fn part(attempt: Attempt, number: u32) -> SideKey {
        SideKey::Part { attempt, number }
    }

    /// A transaction with its commit at `commit` and its end 8 after it, of two parts, kept in `side`.
    async fn keep_as(side: &ObjectSide, attempt: Attempt, commit: u64) -> Kept {
        let transaction = Transaction { commit: Lsn(commit), xid: attempt.xid, committed_at_micros: 0 };
        let mut parts = Vec::new();
        for number in 0..2 {
            let body = Bytes::from(format!("part {number} of {commit}"));
            let last = Position { commit: Lsn(commit), change: Lsn(commit - 5 + u64::from(number)), index: 0 };
            parts.push(ManifestPart { rows: 1, bytes: body.len() as u64, checksum: part_checksum(&body), last });
            side.put(part(attempt, number), body).await.unwrap();
        }
        let manifest = Manifest { version: 1, attempt, transaction, parts, aborted: Vec::new() };
        let body = encode_manifest(&manifest).unwrap();
        side.put(SideKey::Manifest { commit: Lsn(commit) }, body.into()).await.unwrap();
        let splice = Splice { transaction, rows: 2, bytes: 1 };
        Kept { splice, attempt, to: Position::before(Lsn(commit + 8)) }
    }

    async fn keep(side: &ObjectSide, commit: u64) -> Kept {
        keep_as(side, attempt(3, commit), commit).await
    }

    /// Takes a part away.
    fn lose(folder: &tempfile::TempDir, attempt: Attempt, number: u32) {
        std::fs::remove_file(folder.path().join(format!("shop/part/{attempt}/{number}"))).unwrap();
    }

    #[tokio::test]
    async fn h09_postgres_is_not_told_of_a_splice_whose_youngest_part_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let side = side(&folder).await;
        let unconfirmed = Unconfirmed::default();
        let (first, second) = (keep(&side, 100).await, keep(&side, 200).await);
        unconfirmed.add(&first);
        unconfirmed.add(&second);
        // Before a splice, nothing is looked for; past one that is whole, the next one counts.
        assert_eq!(unconfirmed.allow(&side, Lsn(50)).await, Lsn(50));
        assert_eq!(unconfirmed.allow(&side, Lsn(150)).await, Lsn(150));
        side.delete(SideGroup::Attempt(second.attempt)).await.unwrap();
        assert_eq!(unconfirmed.allow(&side, Lsn(150)).await, Lsn(150), "it is not durable in the log either");
        assert_eq!(unconfirmed.lost(), None);
        // Its very end is past it: Postgres is told that everything that commits before is flushed.
        assert_eq!(unconfirmed.allow(&side, second.to.commit).await, Lsn(200));
        assert_eq!(unconfirmed.allow(&side, Lsn(300)).await, Lsn(200));
        assert_eq!(unconfirmed.lost(), Some(Lsn(200)));
        assert_eq!(whole_attempt(&side, Lsn(100)).await.unwrap(), Some(first.attempt));
        assert_eq!(whole_attempt(&side, Lsn(200)).await.unwrap(), None);
    }

    #[tokio::test]
    async fn h09_postgres_is_told_only_of_what_was_kept_for_this_very_splice() {
        let folder = tempfile::tempdir().unwrap();
        let side = side(&folder).await;
        let told = async |kept: &Kept| {
            let unconfirmed = Unconfirmed::default();
            unconfirmed.add(kept);
            let allowed = unconfirmed.allow(&side, Lsn(1000)).await;
            assert_eq!(unconfirmed.lost(), (allowed != Lsn(1000)).then_some(kept.splice.transaction.commit));
            allowed
        };
        assert_eq!(told(&keep(&side, 100).await).await, Lsn(1000));
        let without = keep(&side, 200).await;
        side.delete(SideGroup::Manifest(Lsn(200))).await.unwrap();
        assert_eq!(told(&without).await, Lsn(200), "no manifest");
        let without = keep(&side, 300).await;
        lose(&folder, without.attempt, 1);
        assert_eq!(told(&without).await, Lsn(300), "no last part");
        // Both were on their way: it may have been the one that landed last.
        let without = keep(&side, 350).await;
        lose(&folder, without.attempt, 0);
        assert_eq!(told(&without).await, Lsn(350), "no first part");
        let other = keep(&side, 400).await;
        lose(&folder, other.attempt, 1);
        side.put(part(other.attempt, 1), Bytes::from_static(b"PART 1 OF 400")).await.unwrap();
        assert_eq!(told(&other).await, Lsn(400), "another part of the same length");
        // What an older owner kept and the manifest no longer names can be swept at any time.
        let older = keep_as(&side, attempt(3, 500), 500).await;
        let younger = keep_as(&side, attempt(4, 500), 500).await;
        assert_eq!(told(&older).await, Lsn(500), "a younger attempt");
        assert_eq!(told(&younger).await, Lsn(1000));
    }

    #[tokio::test]
    async fn h09_postgres_is_told_of_no_splice_while_the_side_store_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let side = side(&folder).await;
        let unconfirmed = Unconfirmed::default();
        unconfirmed.add(&keep(&side, 100).await);
        let (manifests, away) = (folder.path().join("shop/manifest"), folder.path().join("away"));
        std::fs::rename(&manifests, &away).unwrap();
        std::os::unix::fs::symlink(&manifests, &manifests).unwrap();
        assert!(side.get(SideKey::Manifest { commit: Lsn(100) }).await.is_err(), "the test shows nothing");
        assert_eq!(unconfirmed.allow(&side, Lsn(1000)).await, Lsn(100));
        assert_eq!(unconfirmed.lost(), None, "it is not known to be lost");
        std::fs::remove_file(&manifests).unwrap();
        std::fs::rename(&away, &manifests).unwrap();
        assert_eq!(unconfirmed.allow(&side, Lsn(1000)).await, Lsn(1000));
    }

    /// Finding the place takes several questions. The capture stood still after each reconnect when they took longer than one look.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h15_a_look_through_the_log_ends_however_long_a_question_takes() {
        let (nats, folder) = (NatsScope::one_node("slow").await, tempfile::tempdir().unwrap());
        let (log, side) = (log(&nats).await, side(&folder).await);
        let writer = resume(take_over(&log, 3).await, Position::before(Lsn(10)), false).await;
        let mut kept = Vec::new();
        for commit in 1..=20 {
            kept.push(keep(&side, commit * 100).await);
            append(&writer, kept.last().unwrap()).await;
        }
        let wire = Wire::slow(&nats.url(), Duration::from_millis(30)).await;
        let slow = log_at(&nats, wire.url()).await;
        let looking = find(&slow, &side, 1908);
        let found = tokio::time::timeout(Duration::from_secs(30), looking).await.expect("it looks for ever");
        assert_eq!(found, (None, left(&[&kept[19]])));
        // Nothing is left to be read: no silence is waited for.
        assert_eq!(find(&slow, &side, 2008).await, (None, left(&[])));
    }

    /// The log lost its tail after that was read, and the one who would write on is the one who looks.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h11_a_look_up_to_what_was_lost_meanwhile_ends() {
        let (nats, folder) = (NatsScope::one_node("ends").await, tempfile::tempdir().unwrap());
        let (log, side) = (log(&nats).await, side(&folder).await);
        let writer = resume(take_over(&log, 3).await, Position::before(Lsn(10)), false).await;
        append(&writer, &keep(&side, 100).await).await;
        let tail = log.tail().await.unwrap();
        let tail = Tail { last_sequence: tail.last_sequence + 1, ..tail };
        let unconfirmed = Unconfirmed::default();
        let looking = find_broken(&log, &side, Position::before(Lsn(50)), &tail, &unconfirmed);
        let error =
            tokio::time::timeout(Duration::from_secs(30), looking).await.expect("it waits for ever").unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("lost its tail"), "{error}");
    }

    /// A log of real servers, for splices of what is in `side`.
    async fn log(nats: &NatsScope<'_>) -> Log {
        log_at(nats, nats.url()).await
    }

    async fn log_at(nats: &NatsScope<'_>, url: String) -> Log {
        let target = NatsTarget { servers: vec![url], name: "splices".to_owned(), ..NatsTarget::default() };
        let connections = Connections::open(&target).await.unwrap();
        let log = Log::new(FlowId::new(nats.prefix().replace('_', "-")).unwrap(), connections);
        let config = LogConfig { replicas: Replicas::Exactly(1), max_bytes: 64 << 20 };
        log.ensure(&config).await.unwrap();
        log
    }

    async fn take_over(log: &Log, epoch: u64) -> Takeover {
        let options = WriterOptions { sync: SyncPolicy::Always, ..WriterOptions::default() };
        LogWriter::take_over(log, Epoch(epoch), Nonce::random(), options).await.unwrap()
    }

    async fn resume(takeover: Takeover, at: Position, rewind: bool) -> LogWriter {
        let info = ResumeInfo {
            system_identifier: "7".to_owned(),
            timeline: 1,
            slot: "s".to_owned(),
            publication: "p".to_owned(),
            rewind,
        };
        takeover.resume(at, info).await.unwrap()
    }

    async fn append(writer: &LogWriter, kept: &Kept) {
        writer.splice(writer.end(), kept.to, &kept.splice, Trace::none()).await.unwrap();
        writer.settled().await.unwrap();
    }

    /// What [`find_broken`] finds, and what it leaves to be looked after.
    async fn find(
        log: &Log,
        side: &ObjectSide,
        confirmed: u64,
    ) -> (Option<(u64, Position)>, VecDeque<(Position, Lsn, Attempt)>) {
        let (broken, left, _) = look(log, side, confirmed).await;
        (broken, left)
    }

    /// The same, with the transactions that come again.
    async fn look(
        log: &Log,
        side: &ObjectSide,
        confirmed: u64,
    ) -> (Option<(u64, Position)>, VecDeque<(Position, Lsn, Attempt)>, Vec<u64>) {
        let (tail, unconfirmed) = (log.tail().await.unwrap(), Unconfirmed::default());
        let looked = find_broken(log, side, Position::before(Lsn(confirmed)), &tail, &unconfirmed).await.unwrap();
        let left = unconfirmed.state().splices.clone();
        let broken = looked.broken.map(|broken| (broken.commit.0, broken.resume));
        (broken, left, looked.again.iter().map(|commit| commit.0).collect())
    }

    fn left(kept: &[&Kept]) -> VecDeque<(Position, Lsn, Attempt)> {
        kept.iter().map(|kept| (kept.to, kept.splice.transaction.commit, kept.attempt)).collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_an_owner_looks_after_the_splices_that_it_finds() {
        let (nats, folder) = (NatsScope::one_node("splices").await, tempfile::tempdir().unwrap());
        let (log, side) = (log(&nats).await, side(&folder).await);
        let at = |lsn| Position::before(Lsn(lsn));
        let writer = resume(take_over(&log, 3).await, at(10), false).await;
        let (first, second, third) = (keep(&side, 100).await, keep(&side, 200).await, keep(&side, 300).await);
        append(&writer, &first).await;
        append(&writer, &second).await;
        // The third one's beginning stands in the log.
        let inside = Position { commit: Lsn(300), change: Lsn(250), index: 1 };
        let data = DataAppend {
            from: writer.end(),
            to: inside,
            complete_to: second.to,
            rows: 1,
            codec: Codec::None,
            body: Bytes::from_static(b"x"),
        };
        writer.append(data).await.unwrap();
        append(&writer, &third).await;
        assert_eq!(find(&log, &side, 50).await, (None, left(&[&first, &second, &third])));
        assert_eq!(find(&log, &side, 108).await, (None, left(&[&second, &third])), "Postgres was told of the first");
        // Whatever part it is that is gone.
        lose(&folder, second.attempt, 0);
        assert_eq!(look(&log, &side, 50).await, (Some((200, first.to)), left(&[&first]), vec![200, 300]));
        assert_eq!(find(&log, &side, 150).await, (Some((200, at(150))), left(&[])), "never before what was confirmed");
        assert_eq!(find(&log, &side, 208).await, (None, left(&[&third])));
        lose(&folder, third.attempt, 1);
        // Inside a transaction the log cannot go on.
        assert_eq!(find(&log, &side, 208).await, (Some((300, at(300))), left(&[])));
        assert_eq!(find(&log, &side, 308).await, (None, left(&[])));
        // The sinks can have all of it before Postgres is told: then what is left is looked at.
        drop(writer);
        let writer = resume(take_over(&log, 4).await, third.to, false).await;
        let fourth = keep(&side, 400).await;
        append(&writer, &fourth).await;
        log.purge(third.to, Duration::ZERO, std::time::SystemTime::now()).await.unwrap();
        assert_eq!(find(&log, &side, 50).await, (None, left(&[&fourth])));
        lose(&folder, fourth.attempt, 0);
        assert_eq!(find(&log, &side, 50).await, (Some((400, third.to)), left(&[])));
    }

    /// The sinks have a splice, and the purge passed it, long before Postgres is told of it: servers that sync every two minutes.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_what_postgres_was_not_told_of_is_not_swept_behind_the_purge() {
        let (nats, etcd) = (NatsScope::one_node("swept").await, EtcdScope::create("swept").await);
        let folder = tempfile::tempdir().unwrap();
        let (log, side) = (log(&nats).await, Arc::new(side(&folder).await));
        let options = wallaby_coordination::Options {
            prefix: etcd.prefix().trim_end_matches('/').to_owned(),
            ..wallaby_coordination::Options::default()
        };
        let unconfirmed = Unconfirmed::default();
        let sweeper = Sweeper {
            side: Arc::<ObjectSide>::clone(&side),
            coordination: Coordination::connect(&etcd.endpoints(), options).await.unwrap(),
            epoch: Epoch(3),
            living: Living::default(),
            unconfirmed: unconfirmed.clone(),
        };
        let writer = resume(take_over(&log, 3).await, Position::before(Lsn(10)), false).await;
        let (first, second, third) = (keep(&side, 100).await, keep(&side, 200).await, keep(&side, 300).await);
        for kept in [&first, &second, &third] {
            unconfirmed.add(kept);
            append(&writer, kept).await;
        }
        assert_eq!(unconfirmed.allow(side.as_ref(), first.to.commit).await, first.to.commit);
        // The last record stays, whatever is purged.
        log.purge(third.to, Duration::ZERO, std::time::SystemTime::now()).await.unwrap();
        let stands = async || {
            sweeper.sweep(&log, third.to).await.unwrap();
            let groups = side.list(Shelf::Transactions).await.unwrap();
            let manifest = |group| if let SideGroup::Manifest(commit) = group { Some(commit.0) } else { None };
            groups.into_iter().filter_map(manifest).collect::<BTreeSet<_>>()
        };
        assert_eq!(stands().await, BTreeSet::from([200, 300]), "Postgres was told of the first");
        assert_eq!(unconfirmed.allow(side.as_ref(), second.to.commit).await, second.to.commit);
        assert_eq!(unconfirmed.lost(), None);
        assert_eq!(stands().await, BTreeSet::from([300]));
    }

    /// An owner rewound the log before two splices, kept the first one's transaction again, and died: the log ends before both.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_splices_that_a_rewind_gave_up_are_not_looked_after() {
        let (nats, folder) = (NatsScope::one_node("rewound").await, tempfile::tempdir().unwrap());
        let (log, side) = (log(&nats).await, side(&folder).await);
        let writer = resume(take_over(&log, 3).await, Position::before(Lsn(10)), false).await;
        let (whole, first, second) = (keep(&side, 100).await, keep(&side, 200).await, keep(&side, 300).await);
        for kept in [&whole, &first, &second] {
            append(&writer, kept).await;
        }
        drop(writer);
        let dead = resume(take_over(&log, 4).await, whole.to, true).await;
        keep_as(&side, attempt(4, 200), 200).await;
        drop(dead);
        assert_eq!(log.tail().await.unwrap().end, Some(whole.to));
        assert_eq!(look(&log, &side, 50).await, (None, left(&[&whole]), vec![200, 300]));
        assert_eq!(look(&log, &side, 108).await, (None, left(&[]), vec![200, 300]), "all of the log is confirmed");
        // The next one keeps both again. Only what it kept itself is named by the manifests now.
        let writer = resume(take_over(&log, 5).await, whole.to, false).await;
        let again = [keep_as(&side, attempt(5, 200), 200).await, keep_as(&side, attempt(5, 300), 300).await];
        for kept in &again {
            append(&writer, kept).await;
        }
        assert_eq!(look(&log, &side, 50).await, (None, left(&[&whole, &again[0], &again[1]]), vec![]));
    }
}
