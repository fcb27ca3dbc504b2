//! Where a change stands in the source's history.
//!
//! A [`Position`] is `(commit LSN, change LSN, index)`. It is the only truth about progress: stream sequences are hints.
//! The rules (protocol.md, "Positions"): `(L, 0)` means *everything with a commit LSN below L*; a commit's own position
//! is `(end LSN, 0)`; row changes at one WAL LSN count from 1, a logical message has index 0.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A byte offset in the source's WAL. Shown the way Postgres shows it: `16/B374D848`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The invalid LSN that Postgres writes as `0/0`.
    pub const ZERO: Lsn = Lsn(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text or a byte string is not a position or an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionError {
    /// Not of the form `X/Y` with two hexadecimal halves of at most eight digits.
    #[error("{0:?} is not an LSN: expected two hexadecimal numbers as in 16/B374D848")]
    Lsn(String),
    /// Not of the form `<16 hex>-<16 hex>-<8 hex>`.
    #[error("{0:?} is not a position: expected <commit LSN, 16 hex>-<change LSN, 16 hex>-<index, 8 hex>")]
    Text(String),
    /// Not 20 bytes.
    #[error("a position has 20 bytes, not {0}")]
    Length(usize),
}

impl FromStr for Lsn {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || PositionError::Lsn(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |digits: &str| -> Result<u64, PositionError> {
            if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            u64::from_str_radix(digits, 16).map_err(|_| bad())
        };
        Ok(Lsn(half(high)? << 32 | half(low)?))
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// `(commit LSN, change LSN, index)`, totally ordered, the same in every decode of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// The commit LSN of the transaction (`final_lsn` of pgoutput's Begin), or the L of `(L, 0)`.
    pub commit: Lsn,
    /// The WAL LSN of the change itself, from the XLogData header. Zero in `(L, 0)`.
    pub change: Lsn,
    /// The change's number among those of its LSN: rows from 1, a logical message 0.
    pub index: u32,
}

impl Position {
    /// Before everything.
    pub const ZERO: Position = Position { commit: Lsn(0), change: Lsn(0), index: 0 };
    /// Length of the binary form.
    pub const BYTES: usize = 20;

    /// `(L, 0)`: everything with a commit LSN below `lsn`, nothing of it or after it.
    pub const fn before(lsn: Lsn) -> Position {
        Position { commit: lsn, change: Lsn(0), index: 0 }
    }

    /// The position of one change.
    pub const fn of(commit: Lsn, change: Lsn, index: u32) -> Position {
        Position { commit, change, index }
    }

    /// Whether this is of the form `(L, 0)`: no transaction is open at it.
    pub const fn is_between_transactions(&self) -> bool {
        self.change.0 == 0 && self.index == 0
    }

    /// The binary form: 20 bytes, big endian, sorts as positions do.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.commit.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.change.0.to_be_bytes());
        out[16..].copy_from_slice(&self.index.to_be_bytes());
        out
    }

    /// Reads the binary form.
    ///
    /// # Errors
    /// When `bytes` does not have [`Self::BYTES`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Position, PositionError> {
        let bytes: [u8; Self::BYTES] = bytes.try_into().map_err(|_| PositionError::Length(bytes.len()))?;
        let [c0, c1, c2, c3, c4, c5, c6, c7, h0, h1, h2, h3, h4, h5, h6, h7, i0, i1, i2, i3] = bytes;
        Ok(Position {
            commit: Lsn(u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7])),
            change: Lsn(u64::from_be_bytes([h0, h1, h2, h3, h4, h5, h6, h7])),
            index: u32::from_be_bytes([i0, i1, i2, i3]),
        })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}-{:016X}-{:08X}", self.commit.0, self.change.0, self.index)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_between_transactions() {
            write!(f, "({}, 0)", self.commit)
        } else {
            write!(f, "({}, {}, {})", self.commit, self.change, self.index)
        }
    }
}

impl FromStr for Position {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || PositionError::Text(text.to_owned());
        let mut parts = text.split('-');
        let mut number = |digits: usize| -> Result<u64, PositionError> {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != digits || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            u64::from_str_radix(part, 16).map_err(|_| bad())
        };
        let commit = Lsn(number(16)?);
        let change = Lsn(number(16)?);
        let index = u32::try_from(number(8)?).map_err(|_| bad())?;
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Position { commit, change, index })
    }
}

impl Serialize for Position {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Position {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    fn any_position() -> impl Strategy<Value = Position> {
        (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(c, h, i)| Position::of(Lsn(c), Lsn(h), i))
    }

    proptest! {
        #[test]
        fn both_forms_round_trip_and_sort_as_positions_do(a in any_position(), b in any_position()) {
            prop_assert_eq!(a.to_string().parse::<Position>().unwrap(), a);
            prop_assert_eq!(Position::from_bytes(&a.to_bytes()).unwrap(), a);
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
            prop_assert_eq!(a.cmp(&b), a.to_bytes().cmp(&b.to_bytes()));
        }

        #[test]
        fn lsn_text_round_trips(raw in any::<u64>()) {
            prop_assert_eq!(Lsn(raw).to_string().parse::<Lsn>().unwrap(), Lsn(raw));
        }
    }

    #[test]
    fn changes_of_a_transaction_come_after_everything_before_its_commit() {
        let change = Position::of(Lsn(100), Lsn(40), 1);
        assert!(Position::before(Lsn(100)) < change);
        assert!(change < Position::before(Lsn(101)));
    }

    #[test]
    fn bad_texts_are_refused() {
        for text in ["", "0", "0/", "/0", "0/0/0", "G/0", "123456789/0", "+1/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
        for text in ["", "0-0-0", "0000000000000000-0000000000000000-00000000-1"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
