//! Whether what stands behind the splices is still there (hazard 9).
//!
//! The log and the side store are two streams: a power cut can take parts that were acknowledged and leave the splice that needs them.
//! Before replication starts, every part of each splice above what Postgres was told is read. And before Postgres is told that a splice
//! is flushed, its manifest and its youngest part are looked for: an acknowledged tail of a stream is lost from its end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use wallaby_model::{Attempt, Lsn, Manifest, Position, RecordKind, Splice};
use wallaby_staging::{Accepted, Log, LogReader, ReaderOptions, SideKey, SideStore, StagingError, Start, Tail};
use wallaby_wire::splice::{check_part, decode_manifest};

use super::side::Kept;

/// How long a look for the log's end takes at a time.
const LOOK: Duration = Duration::from_millis(50);

/// A splice whose parts are not all there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The transaction's commit LSN.
    pub commit: Lsn,
    /// Where the log goes on, so that Postgres sends the transaction again.
    pub resume: Position,
}

/// Looks through the splices that end past `confirmed`, up to the log's end, and reads every part behind them. The first one that
/// lacks something.
///
/// # Errors
/// When log or side store cannot be read.
pub async fn find_broken(
    log: &Log,
    side: &dyn SideStore,
    confirmed: Position,
    tail: &Tail,
    unconfirmed: &Unconfirmed,
) -> Result<Option<Broken>, StagingError> {
    if tail.end.is_none_or(|end| end <= confirmed) {
        return Ok(None);
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
) -> Result<Option<Broken>, StagingError> {
    let mut reader = LogReader::new(log, start, ReaderOptions::default());
    loop {
        if reader.next_sequence().is_some_and(|next| next > tail.last_sequence) {
            return Ok(None);
        }
        let accepted = match tokio::time::timeout(LOOK, reader.next()).await {
            Ok(accepted) => accepted?,
            // What is left may be records that say nothing to this reader: fences, and what came twice.
            Err(_) => continue,
        };
        if let Some((splice, from)) = splice_of(&accepted)
            && accepted.to > confirmed
        {
            let commit = splice.transaction.commit;
            if let Some(attempt) = whole_attempt(side, commit).await? {
                unconfirmed.add(&Kept { splice, attempt, to: accepted.to });
                continue;
            }
            // Between two transactions, so that the log's end is known as that of a whole one.
            let begin = if from.is_between_transactions() { from } else { Position::before(commit) };
            return Ok(Some(Broken { commit, resume: begin.max(confirmed) }));
        }
    }
}

fn splice_of(accepted: &Accepted) -> Option<(Splice, Position)> {
    match accepted.staged.record.kind {
        RecordKind::Splice { from, .. } => Some((serde_json::from_slice(&accepted.staged.body).ok()?, from)),
        _ => None,
    }
}

async fn manifest_of(side: &dyn SideStore, commit: Lsn) -> Result<Option<Manifest>, StagingError> {
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
            match is_youngest_there(side, commit, attempt).await {
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

async fn is_youngest_there(side: &dyn SideStore, commit: Lsn, attempt: Attempt) -> Result<bool, StagingError> {
    match manifest_of(side, commit).await? {
        Some(manifest) if manifest.attempt == attempt && !manifest.parts.is_empty() => {
            has_part(side, &manifest, manifest.parts.len() - 1).await
        }
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use bytes::Bytes;
    use wallaby_model::{Epoch, FlowId, ManifestPart, Transaction};
    use wallaby_staging::{ObjectSide, Quotas, Shelf, SideGroup};
    use wallaby_wire::splice::{encode_manifest, part_checksum};

    use super::*;

    /// A transaction with its commit at `commit`, of two parts, kept in `side`.
    async fn keep(side: &ObjectSide, commit: u64) -> Kept {
        let attempt = Attempt { epoch: Epoch(3), connection: 1, xid: commit as u32 };
        let transaction = Transaction { commit: Lsn(commit), xid: attempt.xid, committed_at_micros: 0 };
        let mut parts = Vec::new();
        for number in 0..2 {
            let body = Bytes::from(format!("part {number} of {commit}"));
            let last = Position { commit: Lsn(commit), change: Lsn(commit - 5 + u64::from(number)), index: 0 };
            parts.push(ManifestPart { rows: 1, bytes: body.len() as u64, checksum: part_checksum(&body), last });
            side.put(SideKey::Part { attempt, number }, body).await.unwrap();
        }
        let manifest = Manifest { version: 1, attempt, transaction, parts, aborted: Vec::new() };
        let body = encode_manifest(&manifest).unwrap();
        side.put(SideKey::Manifest { commit: Lsn(commit) }, body.into()).await.unwrap();
        let splice = Splice { transaction, rows: 2, bytes: 1 };
        Kept { splice, attempt, to: Position::before(Lsn(commit + 8)) }
    }

    #[tokio::test]
    async fn h09_postgres_is_not_told_of_a_splice_whose_youngest_part_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let quotas = Quotas { transactions: 1 << 20, chunks: 1 << 20 };
        let side = ObjectSide::in_folder(folder.path(), FlowId::new("shop").unwrap(), quotas).unwrap();
        side.ensure(Shelf::Transactions).await.unwrap();
        let unconfirmed = Unconfirmed::default();
        let (first, second) = (keep(&side, 100).await, keep(&side, 200).await);
        unconfirmed.add(&first);
        unconfirmed.add(&second);
        // Before a splice, nothing is looked for; past one that is whole, the next one counts.
        assert_eq!(unconfirmed.allow(&side, Lsn(50)).await, Lsn(50));
        assert_eq!(unconfirmed.allow(&side, Lsn(150)).await, Lsn(150));
        side.delete(SideGroup::Attempt(second.attempt)).await.unwrap();
        assert_eq!(unconfirmed.allow(&side, Lsn(300)).await, Lsn(200));
        assert_eq!(unconfirmed.lost(), Some(Lsn(200)));
        assert_eq!(whole_attempt(&side, Lsn(100)).await.unwrap(), Some(first.attempt));
        assert_eq!(whole_attempt(&side, Lsn(200)).await.unwrap(), None);
    }
}
