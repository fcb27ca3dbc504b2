//! The messages and their fields.

use wallaby_model::{Lsn, ReplicaIdentity};

use super::DecodeError;
use super::cursor::Cursor;
use super::tuple::Tuple;

/// A transaction begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The commit LSN.
    pub final_lsn: Lsn,
    /// Commit time, µs since 2000-01-01 UTC.
    pub committed_at_micros: i64,
    /// The transaction id.
    pub xid: u32,
}

/// A transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where the commit record begins.
    pub commit_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// Commit time, µs since 2000-01-01 UTC.
    pub committed_at_micros: i64,
}

/// A block of a transaction in progress begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamStart {
    /// The transaction.
    pub xid: u32,
    /// Whether it is the transaction's first block.
    pub first_segment: bool,
}

/// A streamed transaction, or a part of one, is rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamAbort {
    /// The transaction.
    pub xid: u32,
    /// The sub-transaction; the same as `xid` for all of it.
    pub subxid: u32,
    /// Where and when (protocol 4 with streaming=parallel).
    pub abort: Option<Abort>,
}

/// Where and when a streamed transaction was rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Where.
    pub lsn: Lsn,
    /// µs since 2000-01-01 UTC.
    pub at_micros: i64,
}

/// The name of a type that is not built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeName<'a> {
    /// The transaction, inside of a streamed block.
    pub xid: Option<u32>,
    /// Its oid.
    pub oid: u32,
    /// Its schema; empty for `pg_catalog`.
    pub schema: &'a str,
    /// Its name.
    pub name: &'a str,
}

/// A column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Part of what old rows carry.
    pub identity: bool,
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub type_oid: u32,
    /// Its type modifier, −1 for none.
    pub type_modifier: i32,
}

/// The shape of a table, sent before its first change and after each change of shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The transaction, inside of a streamed block.
    pub xid: Option<u32>,
    /// The table's oid.
    pub oid: u32,
    /// Its schema; empty for `pg_catalog`.
    pub schema: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its replica identity.
    pub identity: ReplicaIdentity,
    /// Its columns.
    pub columns: Vec<RelationColumn<'a>>,
}

impl<'a> Relation<'a> {
    pub(super) fn read(xid: Option<u32>, cursor: &mut Cursor<'a>) -> Result<Relation<'a>, DecodeError> {
        let oid = cursor.u32()?;
        let schema = cursor.text()?;
        let name = cursor.text()?;
        let identity = match cursor.u8()? {
            b'd' => ReplicaIdentity::Default,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            _ => return Err(cursor.bad_code()),
        };
        let count = cursor.u16()?;
        let mut columns = Vec::with_capacity(usize::from(count).min(1600));
        for _ in 0..count {
            columns.push(RelationColumn {
                identity: cursor.u8()? & 1 == 1,
                name: cursor.text()?,
                type_oid: cursor.u32()?,
                type_modifier: cursor.u32()? as i32,
            });
        }
        Ok(Relation { xid, oid, schema, name, identity, columns })
    }
}

/// The rows of an update.
#[derive(Clone, Debug, PartialEq)]
pub struct TupleUpdate<'a> {
    /// What the WAL carries of the old row, and whether that is all of it.
    pub old: Option<(bool, Tuple<'a>)>,
    /// The new row.
    pub new: Tuple<'a>,
}

impl<'a> TupleUpdate<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>) -> Result<TupleUpdate<'a>, DecodeError> {
        let old = match cursor.u8()? {
            b'N' => None,
            code @ (b'O' | b'K') => {
                let old = Tuple::read_and_walk(cursor)?;
                cursor.expect(b'N')?;
                Some((code == b'O', old))
            }
            _ => return Err(cursor.bad_code()),
        };
        Ok(TupleUpdate { old, new: Tuple::read_last(cursor)? })
    }
}

/// Tables are emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truncate {
    /// The transaction, inside of a streamed block.
    pub xid: Option<u32>,
    /// CASCADE was given.
    pub cascade: bool,
    /// RESTART IDENTITY was given.
    pub restart_identity: bool,
    /// The tables, in the message's order.
    pub relations: Vec<u32>,
}

impl Truncate {
    pub(super) fn read(xid: Option<u32>, cursor: &mut Cursor<'_>) -> Result<Truncate, DecodeError> {
        let count = cursor.u32()? as usize;
        let options = cursor.u8()?;
        let mut relations = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            relations.push(cursor.u32()?);
        }
        Ok(Truncate { xid, cascade: options & 1 != 0, restart_identity: options & 2 != 0, relations })
    }
}

/// `pg_logical_emit_message`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogicalMessage<'a> {
    /// The transaction, inside of a streamed block: the whole one, not the sub-transaction as with rows.
    pub xid: Option<u32>,
    /// Part of a transaction, or by itself.
    pub transactional: bool,
    /// Where it stands in the WAL.
    pub lsn: Lsn,
    /// Its prefix.
    pub prefix: &'a str,
    /// Its content.
    pub content: &'a [u8],
}

impl<'a> LogicalMessage<'a> {
    pub(super) fn read(xid: Option<u32>, cursor: &mut Cursor<'a>) -> Result<LogicalMessage<'a>, DecodeError> {
        let transactional = cursor.u8()? & 1 == 1;
        let lsn = cursor.lsn()?;
        let prefix = cursor.text()?;
        let length = cursor.u32()? as usize;
        Ok(LogicalMessage { xid, transactional, lsn, prefix, content: cursor.take(length)? })
    }
}

/// A message of two-phase commit (protocol 3). WALlaby does not ask for these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared<'a> {
    /// `b` begin, `P` prepare, `K` commit, `r` rollback, `p` prepare of a streamed transaction.
    pub kind: char,
    /// The transaction.
    pub xid: u32,
    /// Its global id.
    pub gid: &'a str,
}

impl<'a> Prepared<'a> {
    pub(super) fn read(kind: u8, cursor: &mut Cursor<'a>) -> Result<Prepared<'a>, DecodeError> {
        // Flags, then LSNs and times: prepare and its end, or commit and its end, or both pairs of a rollback.
        let fixed = match kind {
            b'b' => 8 + 8 + 8,
            b'r' => 1 + 8 + 8 + 8 + 8,
            _ => 1 + 8 + 8 + 8,
        };
        cursor.take(fixed)?;
        Ok(Prepared { kind: char::from(kind), xid: cursor.u32()?, gid: cursor.text()? })
    }
}

/// One pgoutput message.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// B
    Begin(Begin),
    /// C
    Commit(Commit),
    /// O: the transaction comes from another server.
    Origin {
        /// Its commit LSN there.
        lsn: Lsn,
        /// The origin's name.
        name: &'a str,
    },
    /// R
    Relation(Relation<'a>),
    /// Y
    Type(TypeName<'a>),
    /// I
    Insert {
        /// The transaction, inside of a streamed block.
        xid: Option<u32>,
        /// The table's oid.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// U
    Update {
        /// The transaction, inside of a streamed block.
        xid: Option<u32>,
        /// The table's oid.
        relation: u32,
        /// Old and new.
        change: TupleUpdate<'a>,
    },
    /// D
    Delete {
        /// The transaction, inside of a streamed block.
        xid: Option<u32>,
        /// The table's oid.
        relation: u32,
        /// Whether `old` is the whole row or its key.
        whole: bool,
        /// What the WAL carries of it.
        old: Tuple<'a>,
    },
    /// T
    Truncate(Truncate),
    /// M
    Logical(LogicalMessage<'a>),
    /// S
    StreamStart(StreamStart),
    /// E
    StreamStop,
    /// c
    StreamCommit {
        /// The transaction.
        xid: u32,
        /// Where and when.
        commit: Commit,
    },
    /// A
    StreamAbort(StreamAbort),
    /// b, P, K, r, p
    Prepared(Prepared<'a>),
}
