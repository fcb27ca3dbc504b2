//! A record of the log: what stands in a message's headers, whatever carries it.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, FlowId, Nonce};
use crate::position::{Lsn, Position};

/// How a data segment's body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// As it is.
    #[default]
    None,
    /// One lz4 block.
    Lz4,
}

/// What an owner says of its source when it takes up the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeInfo {
    /// `IDENTIFY_SYSTEM`'s system identifier.
    pub system_identifier: String,
    /// `IDENTIFY_SYSTEM`'s timeline.
    pub timeline: u32,
    /// The slot that is read.
    pub slot: String,
    /// The publication that is read.
    pub publication: String,
    /// Set when an acknowledged tail was lost and is published again from this position: a new incarnation of the log.
    pub rewind: bool,
}

/// The kind of a record, with what only that kind has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// First record of an owner; void everything of lower epochs that comes after it.
    Fence {
        /// Tells two owners of one epoch apart.
        nonce: Nonce,
    },
    /// Where the owner takes up, and from which source.
    Resume {
        /// The position it continues from.
        position: Position,
        /// The source as the owner found it.
        info: ResumeInfo,
    },
    /// Rows.
    Data {
        /// The reader's end before this record.
        from: Position,
        /// The reader's end after it.
        to: Position,
        /// The end of the last whole transaction at or before `to`.
        complete_to: Position,
        /// The number of rows in the body.
        rows: u32,
        /// How the body is packed.
        codec: Codec,
    },
    /// The rest of a transaction whose rows stand in the side store; the body is a [`crate::Splice`]. `to` is the end of that
    /// transaction, `(end_lsn, 0)`.
    Splice {
        /// The reader's end before this record: where the transaction begins, or how far it stands in the log.
        from: Position,
        /// The reader's end after it.
        to: Position,
    },
    /// Nothing happened up to `to`, which is of the form `(L, 0)`.
    Heartbeat {
        /// The reader's end before this record.
        from: Position,
        /// The reader's end after it.
        to: Position,
    },
}

/// A record's headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The flow whose log this is.
    pub flow: FlowId,
    /// The epoch of the owner that wrote it.
    pub epoch: Epoch,
    /// What it is.
    pub kind: RecordKind,
}

impl RecordKind {
    /// The position at which the reader stands after this record, for kinds that carry one.
    pub fn to(&self) -> Option<Position> {
        match self {
            RecordKind::Fence { .. } => None,
            RecordKind::Resume { position, .. } => Some(*position),
            RecordKind::Data { to, .. } | RecordKind::Splice { to, .. } | RecordKind::Heartbeat { to, .. } => Some(*to),
        }
    }

    /// The end of the last whole transaction, for kinds that carry one.
    pub fn complete_to(&self) -> Option<Position> {
        match self {
            RecordKind::Data { complete_to, .. } => Some(*complete_to),
            RecordKind::Splice { to, .. } | RecordKind::Heartbeat { to, .. } => Some(*to),
            RecordKind::Fence { .. } | RecordKind::Resume { .. } => None,
        }
    }

    /// The LSN that may be confirmed to Postgres once this record, and everything before it, is durable.
    pub fn confirmable(&self) -> Option<Lsn> {
        self.complete_to().map(|position| position.commit)
    }
}
