//! What stands behind a splice: a manifest, and parts that are segments (protocol.md, "Splices").
//!
//! When a part of a transaction in progress is packed, neither its commit LSN nor the fate of its sub-transactions is known. Its
//! table of transactions has one entry for each sub-transaction, with a commit LSN of zero and the **sub-transaction's** xid. This
//! module fills in what the manifest says: commit, xid and time of the transaction, and which rows are left out.
//! Pure: whoever fetches the parts hands them in.

use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch, UInt32Array};
use arrow_schema::ArrowError;
use arrow_select::filter::filter_record_batch;
use twox_hash::XxHash64;
use wallaby_model::change::TXN;
use wallaby_model::{Lsn, Manifest, ManifestPart, Position, SegmentBody, TableChanges, Transaction};

use crate::segment::{self, SegmentError};

/// The version of manifests that is written and understood.
pub const MANIFEST_VERSION: u8 = 1;

/// Why a splice cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SpliceError {
    /// The manifest is not JSON of a `Manifest`.
    #[error("the manifest of the transaction that commits at {commit} is unreadable: {error}")]
    Manifest {
        /// Whose.
        commit: Lsn,
        /// Why.
        error: serde_json::Error,
    },
    /// The manifest was written by a newer WALlaby, or is another transaction's.
    #[error("the manifest of the transaction that commits at {commit} does not fit: {reason}")]
    Unfit {
        /// Whose.
        commit: Lsn,
        /// What does not fit.
        reason: String,
    },
    /// A part is not the one that the manifest names.
    #[error("part {number} of the transaction that commits at {commit} is not what its manifest names: {reason}")]
    Part {
        /// Whose.
        commit: Lsn,
        /// Which.
        number: u32,
        /// What differs.
        reason: String,
    },
    /// A part does not unpack.
    #[error("part {number} of the transaction that commits at {commit}: {error}")]
    Segment {
        /// Whose.
        commit: Lsn,
        /// Which.
        number: u32,
        /// Why.
        error: SegmentError,
    },
}

/// The checksum of a part: XXH64 with seed 0 of its bytes as stored.
pub fn part_checksum(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Packs a manifest: JSON.
///
/// # Errors
/// When it does not serialise, which no manifest does.
pub fn encode_manifest(manifest: &Manifest) -> Result<Vec<u8>, SpliceError> {
    serde_json::to_vec(manifest).map_err(|error| SpliceError::Manifest { commit: manifest.transaction.commit, error })
}

/// Reads the manifest of the transaction that commits at `commit`.
///
/// # Errors
/// When it is no manifest, a newer one, or another transaction's.
pub fn decode_manifest(commit: Lsn, bytes: &[u8]) -> Result<Manifest, SpliceError> {
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| SpliceError::Manifest { commit, error })?;
    let unfit = |reason: String| Err(SpliceError::Unfit { commit, reason });
    if manifest.version != MANIFEST_VERSION {
        return unfit(format!("version {} is not {MANIFEST_VERSION}: upgrade the readers first", manifest.version));
    }
    if manifest.transaction.commit != commit {
        return unfit(format!("it is of the transaction that commits at {}", manifest.transaction.commit));
    }
    if !manifest.aborted.is_sorted_by(|a, b| a.1 < b.0) || manifest.aborted.iter().any(|(first, last)| first > last) {
        return unfit("its rolled-back sub-transactions are not in order".to_owned());
    }
    Ok(manifest)
}

/// Whether these bytes are the part that a manifest names: length and checksum. For whoever looks whether the parts are still
/// there (hazard 9).
///
/// # Errors
/// `Part` says what differs.
pub fn check_part(commit: Lsn, number: u32, part: &ManifestPart, bytes: &[u8]) -> Result<(), SpliceError> {
    let differs = |reason: String| Err(SpliceError::Part { commit, number, reason });
    if bytes.len() as u64 != part.bytes {
        return differs(format!("{} bytes instead of {}", bytes.len(), part.bytes));
    }
    if part_checksum(bytes) != part.checksum {
        return differs("its checksum does not fit".to_owned());
    }
    Ok(())
}

/// Reads the parts behind one splice, in order.
///
/// When a part turns out to be missing, the transaction is being put again by a later owner: take the new manifest and go on
/// with another reader from [`SpliceReader::after`]. Rows and positions are the same in every attempt.
#[derive(Debug)]
pub struct SpliceReader {
    manifest: Manifest,
    next: usize,
    after: Position,
}

impl SpliceReader {
    /// Reads the rows past `after`: where the reader of the log stands before the splice.
    pub fn new(manifest: Manifest, after: Position) -> SpliceReader {
        let next = manifest.parts.partition_point(|part| part.last <= after);
        SpliceReader { manifest, next, after }
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The rows up to here were given out, or were not for this reader.
    pub fn after(&self) -> Position {
        self.after
    }

    /// The number of the part that [`SpliceReader::take`] wants; `None` after the last one.
    pub fn wanted(&self) -> Option<u32> {
        (self.next < self.manifest.parts.len()).then_some(self.next as u32)
    }

    /// Takes the bytes of the wanted part and gives its rows: those of sub-transactions that were not rolled back, past
    /// [`SpliceReader::after`], under the one transaction. There may be none.
    ///
    /// # Errors
    /// When the bytes are not that part. The reader stands where it stood.
    pub fn take(&mut self, bytes: &[u8]) -> Result<SegmentBody, SpliceError> {
        let commit = self.manifest.transaction.commit;
        let number = self.next as u32;
        let Some(part) = self.manifest.parts.get(self.next) else {
            return Err(SpliceError::Part { commit, number, reason: "the manifest has no such part".to_owned() });
        };
        check_part(commit, number, part, bytes)?;
        let failed = |error| SpliceError::Segment { commit, number, error };
        let body = segment::decode(bytes).map_err(failed)?;
        if body.rows() != part.rows as usize {
            let reason = format!("{} rows instead of {}", body.rows(), part.rows);
            return Err(SpliceError::Part { commit, number, reason });
        }
        let settled = settle(body, &self.manifest.transaction, &self.manifest.aborted, self.after)
            .map_err(|error| failed(SegmentError::Arrow(error)))?;
        self.after = self.after.max(part.last);
        self.next += 1;
        Ok(settled)
    }
}

/// Makes of a part's rows what they are once their transaction has committed: all of them belong to `transaction`, those of the
/// `aborted` sub-transactions (inclusive ranges, ascending) and those at or before `after` are left out.
///
/// # Errors
/// When Arrow refuses a batch; it has no reason to.
pub fn settle(
    body: SegmentBody,
    transaction: &Transaction,
    aborted: &[(u32, u32)],
    after: Position,
) -> Result<SegmentBody, ArrowError> {
    let survives: Vec<bool> = body.transactions.iter().map(|sub| !is_within(aborted, sub.xid)).collect();
    let all_survive = survives.iter().all(|survives| *survives);
    let mut tables = Vec::with_capacity(body.tables.len());
    for table in body.tables {
        let settled = settle_table(&table, transaction, &survives, all_survive, after)?;
        if settled.rows.num_rows() > 0 {
            tables.push(settled);
        }
    }
    Ok(SegmentBody { transactions: vec![*transaction], tables })
}

fn is_within(ranges: &[(u32, u32)], xid: u32) -> bool {
    let at = ranges.partition_point(|(_, last)| *last < xid);
    ranges.get(at).is_some_and(|(first, _)| *first <= xid)
}

fn settle_table(
    table: &TableChanges,
    transaction: &Transaction,
    survives: &[bool],
    all_survive: bool,
    after: Position,
) -> Result<TableChanges, ArrowError> {
    let row_position =
        |row: usize| Position::of(transaction.commit, Lsn(table.change().value(row)), table.index().value(row));
    let rows = table.rows.num_rows();
    let trims = rows > 0 && row_position(0) <= after;
    let mut batch = table.rows.clone();
    if !all_survive || trims {
        let txn = table.txn().values();
        let keep = (0..rows).map(|row| survives[txn[row] as usize] && row_position(row) > after);
        batch = filter_record_batch(&batch, &BooleanArray::from_iter(keep.map(Some)))?;
    }
    if survives.len() > 1 {
        let mut columns = batch.columns().to_vec();
        columns[TXN] = Arc::new(UInt32Array::from(vec![0; batch.num_rows()]));
        batch = RecordBatch::try_new(batch.schema(), columns)?;
    }
    Ok(TableChanges { schema: Arc::clone(&table.schema), rows: batch })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use arrow_array::{ArrayRef, BinaryArray, Int32Array, UInt8Array, UInt64Array};
    use wallaby_model::change::arrow_schema;
    use wallaby_model::{Attempt, Codec, Column, ColumnType, Epoch, Op, ReplicaIdentity, TableName, TableSchema};

    fn schema() -> Arc<TableSchema> {
        let id = Column {
            name: "id".into(),
            kind: ColumnType::Int4,
            sql_type: "integer".into(),
            type_oid: 23,
            type_modifier: -1,
            identity: true,
            not_null: true,
        };
        Arc::new(TableSchema {
            oid: 7,
            table: TableName::new("public", "t"),
            identity: ReplicaIdentity::Default,
            columns: vec![id],
            primary_key: vec![0],
        })
    }

    /// Rows (sub-xid, change LSN), numbered.
    fn part(rows: &[(u32, u64)]) -> SegmentBody {
        let mut xids: Vec<u32> = rows.iter().map(|(xid, _)| *xid).collect();
        xids.sort_unstable();
        xids.dedup();
        let txn = rows.iter().map(|(xid, _)| xids.binary_search(xid).unwrap() as u32);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from_iter_values(txn)),
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|(_, lsn)| *lsn))),
            Arc::new(UInt32Array::from(vec![1; rows.len()])),
            Arc::new(UInt8Array::from(vec![Op::Insert as u8; rows.len()])),
            Arc::new(BinaryArray::from_opt_vec(vec![None; rows.len()])),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|(_, lsn)| *lsn as i32))),
        ];
        let schema = schema();
        let rows = RecordBatch::try_new(arrow_schema(&schema), columns).unwrap();
        let sub = |xid| Transaction { commit: Lsn::ZERO, xid, committed_at_micros: 0 };
        SegmentBody { transactions: xids.into_iter().map(sub).collect(), tables: vec![TableChanges { schema, rows }] }
    }

    const TRANSACTION: Transaction = Transaction { commit: Lsn(900), xid: 10, committed_at_micros: 5 };

    fn splice(parts: &[&[(u32, u64)]], aborted: Vec<(u32, u32)>) -> (Manifest, Vec<bytes::Bytes>) {
        let mut bodies = Vec::new();
        let mut named = Vec::new();
        for rows in parts {
            let bytes = segment::encode(&part(rows), Codec::Lz4).unwrap();
            named.push(ManifestPart {
                rows: rows.len() as u32,
                bytes: bytes.len() as u64,
                checksum: part_checksum(&bytes),
                last: Position::of(Lsn(900), Lsn(rows.last().unwrap().1), 1),
            });
            bodies.push(bytes);
        }
        let attempt = Attempt { epoch: Epoch(3), connection: 1, xid: 10 };
        (Manifest { version: 1, attempt, transaction: TRANSACTION, parts: named, aborted }, bodies)
    }

    fn read(manifest: &Manifest, bodies: &[bytes::Bytes], after: Position) -> Vec<u64> {
        let mut reader = SpliceReader::new(manifest.clone(), after);
        let mut lsns = Vec::new();
        while let Some(number) = reader.wanted() {
            let body = reader.take(&bodies[number as usize]).unwrap();
            for table in &body.tables {
                assert!(table.is_well_formed(body.transactions.len()));
                assert_eq!(body.transactions, [TRANSACTION]);
                lsns.extend(table.change().values());
            }
        }
        lsns
    }

    #[test]
    fn rows_of_rolled_back_sub_transactions_and_known_rows_are_left_out() {
        let parts: [&[(u32, u64)]; 3] = [&[(10, 1), (11, 2), (12, 3)], &[(12, 4)], &[(10, 5), (14, 6), (13, 7)]];
        let (manifest, bodies) = splice(&parts, vec![(12, 13)]);
        let bytes = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(Lsn(900), &bytes).unwrap(), manifest);
        assert_eq!(read(&manifest, &bodies, Position::before(Lsn(900))), [1, 2, 5, 6]);
        assert_eq!(read(&manifest, &bodies, Position::of(Lsn(900), Lsn(1), 1)), [2, 5, 6]);
        assert_eq!(read(&manifest, &bodies, Position::of(Lsn(900), Lsn(5), 1)), [6]);
        assert_eq!(read(&manifest, &bodies, Position::of(Lsn(900), Lsn(7), 1)), [0; 0]);
        let (manifest, bodies) = splice(&parts[..1], vec![]);
        assert_eq!(read(&manifest, &bodies, Position::ZERO), [1, 2, 3]);
    }

    #[test]
    fn what_is_not_the_named_part_is_refused_and_can_be_asked_for_again() {
        let (manifest, bodies) = splice(&[&[(10, 1)], &[(10, 2)]], vec![]);
        let mut reader = SpliceReader::new(manifest.clone(), Position::ZERO);
        assert!(matches!(reader.take(&bodies[1]), Err(SpliceError::Part { number: 0, .. })));
        let mut damaged = bodies[0].to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(matches!(reader.take(&damaged), Err(SpliceError::Part { number: 0, .. })));
        assert!(matches!(reader.take(&damaged[1..]), Err(SpliceError::Part { .. })));
        assert_eq!(reader.take(&bodies[0]).unwrap().rows(), 1);
        // A new attempt cut its parts elsewhere: a reader goes on in it from where it stands.
        let (again, bodies) = splice(&[&[(10, 1), (10, 2), (10, 3)]], vec![]);
        assert_eq!(read(&again, &bodies, reader.after()), [2, 3]);
        assert!(SpliceReader::new(again, Position::of(Lsn(900), Lsn(3), 1)).take(&bodies[0]).is_err());
    }

    #[test]
    fn manifests_that_do_not_fit_are_refused() {
        let (manifest, _) = splice(&[&[(10, 1)]], vec![]);
        let refused = |change: &dyn Fn(&mut Manifest)| {
            let mut changed = manifest.clone();
            change(&mut changed);
            decode_manifest(Lsn(900), &encode_manifest(&changed).unwrap()).is_err()
        };
        assert!(!refused(&|_| {}));
        assert!(refused(&|manifest| manifest.version = 2));
        assert!(refused(&|manifest| manifest.transaction.commit = Lsn(1)));
        assert!(refused(&|manifest| manifest.aborted = vec![(5, 4)]));
        assert!(refused(&|manifest| manifest.aborted = vec![(5, 6), (6, 7)]));
        assert!(decode_manifest(Lsn(900), b"{").is_err());
    }
}
