//! Puts parts into the side store, and makes what the log's splice needs of them.
//!
//! The order is the safety: every part is acknowledged, then the manifest is, then the splice is appended. Killed in between, nothing
//! of the transaction is visible: Postgres sends it again, it becomes another attempt, and the next owner sweeps this one.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use wallaby_model::{Attempt, Codec, Epoch, Lsn, Manifest, ManifestPart, Position, Splice};
use wallaby_postgres_source::{PartDraft, SpliceDraft};
use wallaby_staging::{PutBudget, Puts, Shelf, SideGroup, SideKey, SideStore, StagingError};
use wallaby_wire::SegmentEncoder;
use wallaby_wire::splice::{MANIFEST_VERSION, encode_manifest, part_checksum};

use super::CaptureError;

/// The attempts that are being put. Shared with the sweeper, which leaves them alone.
#[derive(Clone, Debug, Default)]
pub struct Living(Arc<Mutex<BTreeSet<Attempt>>>);

impl Living {
    fn change(&self, change: impl FnOnce(&mut BTreeSet<Attempt>)) {
        // A set of plain values, whole after any panic.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// As they are now.
    pub fn now(&self) -> BTreeSet<Attempt> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Puts the parts of one connection's transactions.
pub struct SideWriter {
    side: Arc<dyn SideStore>,
    epoch: Epoch,
    connection: u32,
    codec: Codec,
    budget: PutBudget,
    living: Living,
    encoder: SegmentEncoder,
    attempts: HashMap<u32, OpenAttempt>,
    has_shelf: bool,
}

struct OpenAttempt {
    puts: Puts,
    parts: Vec<ManifestPart>,
}

/// A transaction whose parts and manifest are acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What the log's record says.
    pub splice: Splice,
    /// The attempt that its manifest names.
    pub attempt: Attempt,
    /// The end of the transaction.
    pub to: Position,
}

impl SideWriter {
    /// For the owner of `epoch`; `connection` counts its replication connections. `budget` bounds what is on its way.
    pub fn new(
        side: Arc<dyn SideStore>,
        epoch: Epoch,
        connection: u32,
        codec: Codec,
        budget: PutBudget,
        living: Living,
    ) -> SideWriter {
        SideWriter {
            side,
            epoch,
            connection,
            codec,
            budget,
            living,
            encoder: SegmentEncoder::default(),
            attempts: HashMap::new(),
            has_shelf: false,
        }
    }

    fn attempt(&self, xid: u32) -> Attempt {
        Attempt { epoch: self.epoch, connection: self.connection, xid }
    }

    /// Makes the shelf before the first part. Whether it was made, or looked at, just now: then its servers' sync policy counts from
    /// here on.
    ///
    /// # Errors
    /// When there is no room for a shelf, or the servers do not answer.
    pub async fn ensure_shelf(&mut self) -> Result<bool, StagingError> {
        if self.has_shelf {
            return Ok(false);
        }
        self.side.ensure(Shelf::Transactions).await?;
        self.has_shelf = true;
        Ok(true)
    }

    /// Sends a part off. Waits while much is on its way.
    ///
    /// # Errors
    /// When it cannot be packed, or this or an earlier part of the transaction was refused.
    pub async fn put(&mut self, draft: PartDraft) -> Result<(), CaptureError> {
        let PartDraft { xid, number, body, content_bytes, rows, last } = draft;
        let attempt = self.attempt(xid);
        let open = self.attempts.entry(xid).or_insert_with(|| OpenAttempt {
            puts: Puts::new(Arc::clone(&self.side), self.budget.clone()),
            parts: Vec::new(),
        });
        if content_bytes > self.budget.bytes() {
            // It goes alone, and is in memory twice and more while it is packed: not beside others on their way.
            open.puts.settled().await?;
        }
        let packed = self.encoder.encode(&body, self.codec)?;
        drop(body);
        if number == 0 {
            self.living.change(|living| _ = living.insert(attempt));
        }
        open.parts.push(ManifestPart {
            rows: u32::try_from(rows).unwrap_or(u32::MAX),
            bytes: packed.len() as u64,
            checksum: part_checksum(&packed),
            // The commit LSN comes with the commit.
            last: Position::of(Lsn::ZERO, last.0, last.1),
        });
        open.puts.put(SideKey::Part { attempt, number }, packed).await?;
        Ok(())
    }

    /// Waits until every part is acknowledged, then puts the manifest. What comes of it may be appended to the log.
    ///
    /// # Errors
    /// When a part or the manifest was refused: nothing of the transaction is visible.
    pub async fn keep(&mut self, draft: SpliceDraft) -> Result<Kept, CaptureError> {
        let SpliceDraft { transaction, to, parts: given, aborted } = draft;
        let attempt = self.attempt(transaction.xid);
        let Some(mut open) = self.attempts.remove(&transaction.xid) else {
            return Err(CaptureError::PartsMissing { xid: transaction.xid });
        };
        open.puts.settled().await?;
        if open.parts.len() != given as usize {
            return Err(CaptureError::PartsMissing { xid: transaction.xid });
        }
        for part in &mut open.parts {
            part.last.commit = transaction.commit;
        }
        let rows = open.parts.iter().map(|part| u64::from(part.rows)).sum();
        let bytes = open.parts.iter().map(|part| part.bytes).sum();
        let manifest = Manifest { version: MANIFEST_VERSION, attempt, transaction, parts: open.parts, aborted };
        let body = Bytes::from(encode_manifest(&manifest)?);
        self.side.put(SideKey::Manifest { commit: transaction.commit }, body).await?;
        self.living.change(|living| _ = living.remove(&attempt));
        Ok(Kept { splice: Splice { transaction, rows, bytes }, attempt, to })
    }

    /// Gives up a transaction that was rolled back. What cannot be removed now goes with the next sweep.
    pub async fn abandon(&mut self, xid: u32) {
        let attempt = self.attempt(xid);
        if self.attempts.remove(&xid).is_some() {
            if let Err(error) = self.side.delete(SideGroup::Attempt(attempt)).await {
                tracing::debug!(%attempt, %error, "the parts of a rolled-back transaction were not removed yet");
            }
            self.living.change(|living| _ = living.remove(&attempt));
        }
    }
}

impl Drop for SideWriter {
    fn drop(&mut self) {
        // Of a connection that ended nothing comes any more.
        let (epoch, connection) = (self.epoch, self.connection);
        self.living.change(|living| living.retain(|it| (it.epoch, it.connection) != (epoch, connection)));
    }
}
