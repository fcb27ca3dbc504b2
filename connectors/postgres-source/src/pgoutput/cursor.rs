//! Reads the pieces of one message, front to back.

use wallaby_model::Lsn;

use super::DecodeError;

/// A place in a message.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    kind: u8,
}

impl<'a> Cursor<'a> {
    /// Behind the letter.
    pub(super) fn new(bytes: &'a [u8], kind: u8) -> Cursor<'a> {
        Cursor { bytes, at: 1, kind }
    }

    /// Somewhere in a message, for parts that are read later.
    pub(super) fn at(bytes: &'a [u8], at: usize, kind: u8) -> Cursor<'a> {
        Cursor { bytes, at, kind }
    }

    pub(super) fn offset(&self) -> usize {
        self.at
    }

    pub(super) fn message(&self) -> &'a [u8] {
        self.bytes
    }

    pub(super) fn kind(&self) -> u8 {
        self.kind
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn letter(&self) -> char {
        char::from(self.kind)
    }

    pub(super) fn cut_short(&self) -> DecodeError {
        DecodeError::CutShort { kind: self.letter(), offset: self.at }
    }

    /// An error for the byte that was read last.
    pub(super) fn bad_code(&self) -> DecodeError {
        DecodeError::Code { kind: self.letter(), offset: self.at.saturating_sub(1) }
    }

    #[inline]
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(length).ok_or_else(|| self.cut_short())?;
        let piece = self.bytes.get(self.at..end).ok_or_else(|| self.cut_short())?;
        self.at = end;
        Ok(piece)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let piece = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let array = *piece.ok_or_else(|| self.cut_short())?;
        self.at += N;
        Ok(array)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    #[inline]
    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64, DecodeError> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    pub(super) fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }

    /// Text up to a zero byte.
    pub(super) fn text(&mut self) -> Result<&'a str, DecodeError> {
        let start = self.at;
        let rest = self.bytes.get(start..).unwrap_or_default();
        let length = rest.iter().position(|byte| *byte == 0).ok_or_else(|| self.cut_short())?;
        self.at = start + length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| DecodeError::Name { kind: self.letter(), offset: start })
    }

    pub(super) fn expect(&mut self, code: u8) -> Result<(), DecodeError> {
        if self.u8()? == code { Ok(()) } else { Err(self.bad_code()) }
    }

    /// True for the first code, false for the second.
    pub(super) fn one_of(&mut self, yes: u8, no: u8) -> Result<bool, DecodeError> {
        match self.u8()? {
            code if code == yes => Ok(true),
            code if code == no => Ok(false),
            _ => Err(self.bad_code()),
        }
    }

    /// Takes everything that is left: a part that checks itself later.
    pub(super) fn skip_rest(&mut self) {
        self.at = self.bytes.len();
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.is_at_end() { Ok(()) } else { Err(DecodeError::TooLong { kind: self.letter(), offset: self.at }) }
    }
}
