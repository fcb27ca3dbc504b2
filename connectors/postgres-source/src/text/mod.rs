//! Postgres' text forms, read straight into the values that Arrow keeps.
//!
//! No allocation and no date library: every column of every row passes here. What the forms are is fixed by the session
//! (`datestyle=ISO`, `intervalstyle=iso_8601`, `timezone=UTC`, `bytea_output=hex`); the tests hold each parser against
//! Postgres itself. An error is the byte at which the value stops making sense.

mod datetime;
mod interval;
mod plain;

pub(crate) use datetime::{date, time, timestamp, timestamptz};
pub(crate) use interval::interval;
pub(crate) use plain::{boolean, bytea, float4, float8, integer, unsigned, uuid};

/// The byte at which a value stops making sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadAt(pub(crate) usize);

/// Reads digits off the front of a value.
pub(crate) struct Digits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Digits<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Digits<'a> {
        Digits { bytes, at: 0 }
    }

    pub(crate) fn bad<T>(&self) -> Result<T, BadAt> {
        Err(BadAt(self.at))
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    #[inline]
    pub(crate) fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    /// Takes `byte` if it comes next.
    #[inline]
    pub(crate) fn eat(&mut self, byte: u8) -> bool {
        let comes = self.peek() == Some(byte);
        self.at += usize::from(comes);
        comes
    }

    #[inline]
    pub(crate) fn need(&mut self, byte: u8) -> Result<(), BadAt> {
        if self.eat(byte) { Ok(()) } else { self.bad() }
    }

    pub(crate) fn eat_all(&mut self, text: &[u8]) -> bool {
        let comes = self.rest().starts_with(text);
        self.at += if comes { text.len() } else { 0 };
        comes
    }

    /// Exactly two digits.
    #[inline]
    pub(crate) fn two(&mut self) -> Result<i64, BadAt> {
        match self.bytes.get(self.at..self.at + 2) {
            Some(&[high @ b'0'..=b'9', low @ b'0'..=b'9']) => {
                self.at += 2;
                Ok(i64::from(high - b'0') * 10 + i64::from(low - b'0'))
            }
            _ => self.bad(),
        }
    }

    /// One to eighteen digits.
    #[inline]
    pub(crate) fn number(&mut self) -> Result<i64, BadAt> {
        let start = self.at;
        let mut value = 0i64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            if self.at - start == 18 {
                return self.bad();
            }
            value = value * 10 + i64::from(digit - b'0');
            self.at += 1;
        }
        if self.at == start { self.bad() } else { Ok(value) }
    }

    /// `.` and one to six digits, as µs; zero when there is no point.
    #[inline]
    pub(crate) fn fraction_micros(&mut self) -> Result<i64, BadAt> {
        if !self.eat(b'.') {
            return Ok(0);
        }
        let start = self.at;
        let mut micros = 0i64;
        let mut scale = 1_000_000i64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            if scale == 1 {
                return self.bad();
            }
            scale /= 10;
            micros += i64::from(digit - b'0') * scale;
            self.at += 1;
        }
        if self.at == start { self.bad() } else { Ok(micros) }
    }

    pub(crate) fn finish<T>(&self, value: T) -> Result<T, BadAt> {
        if self.is_at_end() { Ok(value) } else { self.bad() }
    }
}
