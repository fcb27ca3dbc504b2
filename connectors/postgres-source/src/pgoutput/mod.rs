//! pgoutput, protocol versions 1 to 4, without I/O.
//!
//! A [`Decoder`] reads one message at a time and borrows everything from it. The only state is whether a streamed
//! block is open, because messages inside of one carry a transaction id that others do not. Errors say the byte where
//! the message stops making sense, never what stands there.

mod cursor;
mod message;
mod tuple;

pub use message::{
    Abort, Begin, Commit, LogicalMessage, Message, Prepared, Relation, RelationColumn, StreamAbort, StreamStart,
    Truncate, TupleUpdate, TypeName,
};
pub use tuple::{Cell, Cells, Tuple};

use cursor::Cursor;

/// Why a message cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It ends before it should, or a length points outside.
    #[error("pgoutput message {kind} is cut short at byte {offset}")]
    CutShort {
        /// The message's letter.
        kind: char,
        /// Where.
        offset: usize,
    },
    /// A byte has no meaning here.
    #[error("pgoutput message {kind} has an unknown code at byte {offset}")]
    Code {
        /// The message's letter.
        kind: char,
        /// Where.
        offset: usize,
    },
    /// A name is not UTF-8.
    #[error("pgoutput message {kind} has a name that is not UTF-8 at byte {offset}")]
    Name {
        /// The message's letter.
        kind: char,
        /// Where.
        offset: usize,
    },
    /// Bytes are left over.
    #[error("pgoutput message {kind} has bytes after its end at byte {offset}")]
    TooLong {
        /// The message's letter.
        kind: char,
        /// Where.
        offset: usize,
    },
    /// A letter that no protocol version has.
    #[error("pgoutput message kind {0} is unknown")]
    Unknown(u8),
    /// The empty message.
    #[error("a pgoutput message is empty")]
    Empty,
    /// A message that the order of messages does not allow here.
    #[error("pgoutput message {kind} does not belong here: {reason}")]
    Order {
        /// The message's letter.
        kind: char,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Decodes the messages of one stream.
#[derive(Clone, Debug)]
pub struct Decoder {
    protocol: u8,
    in_streamed_block: bool,
}

impl Decoder {
    /// For a stream that was started with this `proto_version`, 1 to 4.
    pub fn new(protocol: u8) -> Decoder {
        Decoder { protocol, in_streamed_block: false }
    }

    /// Decodes one message.
    ///
    /// # Errors
    /// When the bytes are no message of this protocol version.
    #[inline]
    pub fn decode<'a>(&mut self, bytes: &'a [u8]) -> Result<Message<'a>, DecodeError> {
        let (&kind, _) = bytes.split_first().ok_or(DecodeError::Empty)?;
        let mut cursor = Cursor::new(bytes, kind);
        let message = match kind {
            b'I' | b'U' | b'D' | b'T' | b'R' | b'Y' | b'M' => self.decode_change(kind, &mut cursor)?,
            b'B' => Message::Begin(Begin {
                final_lsn: cursor.lsn()?,
                committed_at_micros: cursor.i64()?,
                xid: cursor.u32()?,
            }),
            b'C' => {
                cursor.u8()?;
                Message::Commit(Commit {
                    commit_lsn: cursor.lsn()?,
                    end_lsn: cursor.lsn()?,
                    committed_at_micros: cursor.i64()?,
                })
            }
            b'O' => Message::Origin { lsn: cursor.lsn()?, name: cursor.text()? },
            _ => self.decode_stream_or_prepared(kind, &mut cursor)?,
        };
        cursor.finish()?;
        Ok(message)
    }

    fn decode_change<'a>(&self, kind: u8, cursor: &mut Cursor<'a>) -> Result<Message<'a>, DecodeError> {
        let xid = if self.in_streamed_block { Some(cursor.u32()?) } else { None };
        Ok(match kind {
            b'I' => {
                let relation = cursor.u32()?;
                cursor.expect(b'N')?;
                Message::Insert { xid, relation, new: Tuple::read_last(cursor)? }
            }
            b'U' => {
                let relation = cursor.u32()?;
                Message::Update { xid, relation, change: TupleUpdate::read(cursor)? }
            }
            b'D' => {
                let relation = cursor.u32()?;
                let whole = cursor.one_of(b'O', b'K')?;
                Message::Delete { xid, relation, whole, old: Tuple::read_last(cursor)? }
            }
            b'T' => Message::Truncate(Truncate::read(xid, cursor)?),
            b'R' => Message::Relation(Relation::read(xid, cursor)?),
            b'Y' => Message::Type(TypeName { xid, oid: cursor.u32()?, schema: cursor.text()?, name: cursor.text()? }),
            _ => Message::Logical(LogicalMessage::read(xid, cursor)?),
        })
    }

    fn decode_stream_or_prepared<'a>(&mut self, kind: u8, cursor: &mut Cursor<'a>) -> Result<Message<'a>, DecodeError> {
        let letter = char::from(kind);
        let least_version = match kind {
            b'S' | b'E' | b'c' => 2,
            // PostgreSQL 18 sends one for a transaction that was spilled to disk and rolled back, streaming or not [m, 18.4].
            b'A' => 1,
            b'b' | b'P' | b'K' | b'r' | b'p' => 3,
            _ => return Err(DecodeError::Unknown(kind)),
        };
        if self.protocol < least_version {
            return Err(DecodeError::Order { kind: letter, reason: "a newer protocol version has it" });
        }
        if self.in_streamed_block != (kind == b'E') {
            return Err(DecodeError::Order { kind: letter, reason: "streamed blocks do not nest or overlap" });
        }
        Ok(match kind {
            b'S' => {
                let start = StreamStart { xid: cursor.u32()?, first_segment: cursor.u8()? == 1 };
                self.in_streamed_block = true;
                Message::StreamStart(start)
            }
            b'E' => {
                self.in_streamed_block = false;
                Message::StreamStop
            }
            b'c' => {
                let xid = cursor.u32()?;
                cursor.u8()?;
                Message::StreamCommit {
                    xid,
                    commit: Commit {
                        commit_lsn: cursor.lsn()?,
                        end_lsn: cursor.lsn()?,
                        committed_at_micros: cursor.i64()?,
                    },
                }
            }
            b'A' => {
                let xid = cursor.u32()?;
                let subxid = cursor.u32()?;
                // Version 4 with streaming=parallel adds where and when; with streaming=on it does not.
                let abort = if self.protocol >= 4 && !cursor.is_at_end() {
                    Some(Abort { lsn: cursor.lsn()?, at_micros: cursor.i64()? })
                } else {
                    None
                };
                Message::StreamAbort(StreamAbort { xid, subxid, abort })
            }
            _ => Message::Prepared(Prepared::read(kind, cursor)?),
        })
    }
}

impl Message<'_> {
    /// Reads every cell of every tuple: what decoding leaves for later. For tests of whole streams.
    ///
    /// # Errors
    /// When a tuple is damaged.
    pub fn check_tuples(&self) -> Result<usize, DecodeError> {
        match self {
            Message::Insert { new, .. } => new.check(),
            Message::Delete { old, .. } => old.check(),
            Message::Update { change, .. } => {
                let old = match &change.old {
                    Some((_, old)) => old.check()?,
                    None => 0,
                };
                Ok(old + change.new.check()?)
            }
            _ => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    fn prepared(kind: u8, fixed: usize) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(std::iter::repeat_n(0, fixed));
        bytes.extend_from_slice(&7u32.to_be_bytes());
        bytes.extend_from_slice(b"gid\0");
        bytes
    }

    #[test]
    fn messages_of_two_phase_commit_are_known_from_version_3_on() {
        for (kind, fixed) in [(b'b', 24), (b'P', 25), (b'K', 25), (b'r', 33), (b'p', 25)] {
            let bytes = prepared(kind, fixed);
            let wanted = Prepared { kind: char::from(kind), xid: 7, gid: "gid" };
            assert_eq!(Decoder::new(3).decode(&bytes), Ok(Message::Prepared(wanted)));
            assert!(matches!(Decoder::new(2).decode(&bytes), Err(DecodeError::Order { .. })));
        }
    }

    #[test]
    fn errors_say_where_and_never_what() {
        let cut = Decoder::new(1).decode(b"I\0\0\0\x01N\0\x01t\0\0\0\x09secret");
        let error = cut.and_then(|message| message.check_tuples()).unwrap_err();
        assert_eq!(error, DecodeError::CutShort { kind: 'I', offset: 13 });
        assert!(!error.to_string().contains("secret"));
        assert_eq!(Decoder::new(1).decode(b"Z"), Err(DecodeError::Unknown(b'Z')));
        assert_eq!(Decoder::new(1).decode(b""), Err(DecodeError::Empty));
        let mut nested = Decoder::new(2);
        nested.decode(b"S\0\0\0\x01\x01").unwrap();
        assert!(matches!(nested.decode(b"S\0\0\0\x01\x01"), Err(DecodeError::Order { .. })));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(
            protocol in 1u8..5,
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 1..5),
            kind in proptest::sample::select(b"BCORYIUDTMSEcAbPKrp".to_vec()),
        ) {
            let mut decoder = Decoder::new(protocol);
            for mut message in messages {
                let _ = decoder.decode(&message).and_then(|message| message.check_tuples());
                message.insert(0, kind);
                let _ = decoder.decode(&message).and_then(|message| message.check_tuples());
            }
        }
    }
}
