//! The frames of a replication stream, borrowed from the receive buffer.

use wallaby_model::Lsn;

use crate::error::{ServerError, SourceError, is_shutdown};

/// One frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// XLogData: one pgoutput message.
    Wal {
        /// The WAL LSN of the change: `change_lsn` of its position.
        start: Lsn,
        /// The server's end of WAL as it sent this.
        end: Lsn,
        /// The server's clock, µs since 2000-01-01.
        sent_at_micros: i64,
        /// The pgoutput message.
        payload: &'a [u8],
    },
    /// XLogData above the reader's bound: only its head was read, and the stream cannot go on.
    Oversized {
        /// The WAL LSN of the change.
        start: Lsn,
        /// The whole frame's size.
        bytes: u64,
        /// The first bytes of the pgoutput message.
        head: &'a [u8],
    },
    /// A keepalive.
    Keepalive {
        /// Everything before it was sent.
        end: Lsn,
        /// The server's clock, µs since 2000-01-01.
        sent_at_micros: i64,
        /// Whether the server wants an answer now.
        reply: bool,
    },
    /// A warning or notice.
    Notice(ServerError),
    /// The server ended the stream (CopyDone).
    Done,
}

/// Bytes of tag and length.
pub(super) const HEADER_BYTES: usize = 5;
/// Tag 'w', start, end, time.
const WAL_HEADER_BYTES: usize = 25;

fn protocol_error(what: &'static str, offset: usize, reason: impl Into<String>) -> SourceError {
    SourceError::Protocol { what, offset, reason: reason.into() }
}

fn number<const N: usize>(bytes: &[u8], at: usize, what: &'static str) -> Result<[u8; N], SourceError> {
    let piece = bytes.get(at..at + N).and_then(|piece| piece.try_into().ok());
    piece.ok_or_else(|| protocol_error(what, at, "cut short"))
}

/// The length of the whole message at the front of `bytes`, tag included; `None` when the header is not there yet.
pub(super) fn message_length(bytes: &[u8]) -> Result<Option<usize>, SourceError> {
    let Some(header) = bytes.get(..HEADER_BYTES) else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length < 4 {
        return Err(protocol_error("frame header", 1, "a length below 4"));
    }
    Ok(Some(1 + length))
}

/// Parses a whole message (tag, length, body). `None` for messages that carry nothing for us (parameter changes).
pub(super) fn parse(message: &[u8]) -> Result<Option<Frame<'_>>, SourceError> {
    let body = message.get(HEADER_BYTES..).ok_or_else(|| protocol_error("frame", 0, "cut short"))?;
    match message[0] {
        b'd' => copy_data(body).map(Some),
        b'E' => Err(error_of(body)),
        b'N' => Ok(Some(Frame::Notice(fields_of(body)))),
        b'c' => Ok(Some(Frame::Done)),
        b'S' | b'A' | b'C' => Ok(None),
        tag => Err(protocol_error("frame", 0, format!("message tag {tag} does not belong into a stream"))),
    }
}

fn copy_data(body: &[u8]) -> Result<Frame<'_>, SourceError> {
    match body.first() {
        Some(b'w') => {
            let what = "XLogData";
            Ok(Frame::Wal {
                start: Lsn(u64::from_be_bytes(number(body, 1, what)?)),
                end: Lsn(u64::from_be_bytes(number(body, 9, what)?)),
                sent_at_micros: i64::from_be_bytes(number(body, 17, what)?),
                payload: body.get(WAL_HEADER_BYTES..).unwrap_or_default(),
            })
        }
        Some(b'k') => {
            let what = "keepalive";
            let [reply] = number(body, 17, what)?;
            Ok(Frame::Keepalive {
                end: Lsn(u64::from_be_bytes(number(body, 1, what)?)),
                sent_at_micros: i64::from_be_bytes(number(body, 9, what)?),
                reply: reply != 0,
            })
        }
        Some(tag) => Err(protocol_error("CopyData", 0, format!("kind {tag} is unknown"))),
        None => Err(protocol_error("CopyData", 0, "empty")),
    }
}

fn error_of(body: &[u8]) -> SourceError {
    let error = fields_of(body);
    if is_shutdown(&error.sqlstate) {
        return SourceError::ShuttingDown { sqlstate: error.sqlstate };
    }
    SourceError::Server { during: "streaming".into(), error }
}

/// Fields of an ErrorResponse or NoticeResponse: code byte, text, zero; a zero at the end.
fn fields_of(body: &[u8]) -> ServerError {
    let mut error = ServerError { sqlstate: String::new(), message: String::new(), hint: None };
    for field in body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
        let text = || String::from_utf8_lossy(&field[1..]).into_owned();
        match field[0] {
            b'C' => error.sqlstate = text(),
            b'M' => error.message = text(),
            b'H' => error.hint = Some(text()),
            _ => {}
        }
    }
    error
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn xlogdata_and_keepalive() {
        let mut message = vec![b'd', 0, 0, 0, 31, b'w'];
        message.extend_from_slice(&7u64.to_be_bytes());
        message.extend_from_slice(&9u64.to_be_bytes());
        message.extend_from_slice(&(-1i64).to_be_bytes());
        message.extend_from_slice(b"BC");
        assert_eq!(message_length(&message).unwrap(), Some(32));
        let wanted = Frame::Wal { start: Lsn(7), end: Lsn(9), sent_at_micros: -1, payload: b"BC" };
        assert_eq!(parse(&message).unwrap(), Some(wanted));
    }

    #[test]
    fn shutdown_is_told_from_other_errors() {
        let message = b"E\0\0\0\x20SFATAL\0C57P01\0Mbye\0\0";
        assert!(matches!(parse(message), Err(SourceError::ShuttingDown { .. })));
        let message = b"E\0\0\0\x20SERROR\0C42704\0Mpublication\0\0";
        assert_eq!(parse(message).unwrap_err().sqlstate(), Some("42704"));
    }

    proptest! {
        #[test]
        fn hostile_frames_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = message_length(&bytes);
            let _ = parse(&bytes);
        }
    }
}
