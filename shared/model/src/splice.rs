//! Transactions that are too large, or arrive too early, for the log: their rows stand in the side store until a splice in the
//! log makes them visible (protocol.md, "Splices").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::change::Transaction;
use crate::ids::Epoch;
use crate::position::Position;

/// The body of a splice record, as JSON. It names no attempt: the manifest of the transaction does, and a manifest can be
/// written again by a later owner when parts of it were lost (hazard 9). The rows are the same in every attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Splice {
    /// The transaction. Its commit LSN names the manifest.
    pub transaction: Transaction,
    /// Rows of the parts: before-images, rolled-back ones and those at or before the record's `from` included. A measure, not a count of
    /// what a reader gets.
    pub rows: u64,
    /// Packed bytes of the parts.
    pub bytes: u64,
}

/// One try at putting a transaction into the side store. A walsender that was cut streams it again from its start: another
/// connection, another attempt. Text form `<epoch>-<connection>-<xid>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// The capture's epoch.
    pub epoch: Epoch,
    /// Counts the owner's replication connections.
    pub connection: u32,
    /// The transaction's (top-level) id.
    pub xid: u32,
}

/// What stands in the side store of one transaction. Written after all of its parts, before its splice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this form; 1.
    pub version: u8,
    /// Whose parts these are.
    pub attempt: Attempt,
    /// The transaction: what every row of the parts belongs to.
    pub transaction: Transaction,
    /// The parts in order: part `n` is the n-th.
    pub parts: Vec<ManifestPart>,
    /// Sub-transactions that were rolled back, as inclusive ranges of xids, ascending. Rows of the parts carry their
    /// sub-transaction's xid as the xid of their `_txn`; those in here are left out.
    pub aborted: Vec<(u32, u32)>,
}

/// One part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestPart {
    /// Its rows, before-images and rolled-back ones included.
    pub rows: u32,
    /// Its bytes as stored.
    pub bytes: u64,
    /// XXH64 with seed 0 of its bytes as stored.
    pub checksum: u64,
    /// Its last row's position. Parts ascend.
    pub last: Position,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.epoch, self.connection, self.xid)
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attempt {self}")
    }
}

/// Why a text is not an attempt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an attempt: expected <epoch>-<connection>-<xid>")]
pub struct AttemptError(String);

impl FromStr for Attempt {
    type Err = AttemptError;

    fn from_str(text: &str) -> Result<Attempt, AttemptError> {
        let parsed = || {
            let mut parts = text.split('-');
            let epoch = Epoch(parts.next()?.parse().ok()?);
            let connection = parts.next()?.parse().ok()?;
            let xid = parts.next()?.parse().ok()?;
            parts.next().is_none().then_some(Attempt { epoch, connection, xid })
        };
        parsed().ok_or_else(|| AttemptError(text.to_owned()))
    }
}

impl Serialize for Attempt {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Attempt {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_round_trip() {
        let attempt = Attempt { epoch: Epoch(7), connection: 2, xid: 900 };
        assert_eq!(attempt.to_string().parse(), Ok(attempt));
        for bad in ["", "1-2", "1-2-3-4", "a-2-3"] {
            assert!(bad.parse::<Attempt>().is_err(), "{bad}");
        }
    }
}
