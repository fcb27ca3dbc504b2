//! Sums of row hashes by range of the key's hash.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::{VerifyError, VerifyRow};

/// A table is cut into so many ranges that each has about this many rows.
const ROWS_PER_RANGE: u64 = 512;
/// At most 2^16 ranges.
const BITS_MAX: u32 = 16;

/// How many bits of the key's hash make a range, for a table of about so many rows.
pub(super) fn range_bits(rows_estimated: u64) -> u32 {
    let ranges = (rows_estimated / ROWS_PER_RANGE).max(1);
    ranges.next_power_of_two().trailing_zeros().min(BITS_MAX)
}

/// A SHA-256, shown and read as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(super) struct Hash(pub [u8; 32]);

impl Hash {
    /// The first eight bytes as a number.
    pub fn head(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Hash {
    type Err = VerifyError;

    fn from_str(text: &str) -> Result<Hash, VerifyError> {
        let bad = || unreadable("a hash");
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(bad());
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(pair[0]).zip(digit(pair[1])).map(|(high, low)| high << 4 | low).ok_or_else(bad)?;
        }
        Ok(Hash(hash))
    }
}

/// A server that answers something that was not asked.
pub(super) fn unreadable(what: &str) -> VerifyError {
    VerifyError::Refused(format!("the server's answer is not {what}: is a proxy between us and PostgreSQL?"))
}

/// What the rows of one range come to, in any order. Two sums and not an exclusive or: a doubled row shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Sums {
    pub rows: u64,
    pub first: i128,
    pub second: i128,
}

/// The sums of a side, by range.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Digest {
    ranges: BTreeMap<u32, Sums>,
}

impl Digest {
    /// Adds what one piece of the table came to. Returns its rows.
    ///
    /// # Errors
    /// When a row is not of the form range, count, sum, sum.
    pub fn add(&mut self, piece: &[VerifyRow]) -> Result<u64, VerifyError> {
        let mut total = 0;
        for row in piece {
            let (range, sums) = parse(row).ok_or_else(|| unreadable("a row of sums"))?;
            let known = self.ranges.entry(range).or_default();
            // 2^63 rows of 2^63 are below 2^127.
            known.rows += sums.rows;
            known.first += sums.first;
            known.second += sums.second;
            total += sums.rows;
        }
        Ok(total)
    }

    /// All rows.
    pub fn rows(&self) -> u64 {
        self.ranges.values().map(|sums| sums.rows).sum()
    }

    /// How many ranges have rows at one side at least.
    pub fn ranges_with(&self, other: &Digest) -> usize {
        self.ranges.len() + other.ranges.keys().filter(|range| !self.ranges.contains_key(range)).count()
    }

    /// The ranges that are not the same at both sides, in order.
    pub fn differing(&self, other: &Digest) -> Vec<u32> {
        let mine = self.ranges.iter().filter(|(range, sums)| other.ranges.get(range) != Some(sums));
        let theirs = other.ranges.keys().filter(|range| !self.ranges.contains_key(range));
        let mut ranges: Vec<u32> = mine.map(|(range, _)| *range).chain(theirs.copied()).collect();
        ranges.sort_unstable();
        ranges
    }
}

fn parse(row: &VerifyRow) -> Option<(u32, Sums)> {
    let [Some(range), Some(rows), Some(first), Some(second)] = row.as_slice() else { return None };
    let sums = Sums { rows: rows.parse().ok()?, first: first.parse().ok()?, second: second.parse().ok()? };
    Some((range.parse().ok()?, sums))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use proptest::prelude::*;

    use super::*;

    /// What a server answers for rows with these key and row hashes, in pieces.
    fn pieces(rows: &[(u8, i64)], size: usize) -> Vec<Vec<VerifyRow>> {
        let piece = |rows: &[(u8, i64)]| {
            let mut sums: BTreeMap<u8, (u64, i128)> = BTreeMap::new();
            for (range, hash) in rows {
                let known = sums.entry(*range).or_default();
                *known = (known.0 + 1, known.1 + i128::from(*hash));
            }
            let texts = sums.iter().map(|(range, (rows, sum))| {
                vec![range.to_string(), rows.to_string(), sum.to_string(), (-sum).to_string()]
            });
            texts.map(|row| row.into_iter().map(Some).collect()).collect()
        };
        rows.chunks(size.max(1)).map(piece).collect()
    }

    fn digest(rows: &[(u8, i64)], size: usize) -> Digest {
        let mut digest = Digest::default();
        for piece in pieces(rows, size) {
            digest.add(&piece).unwrap();
        }
        digest
    }

    proptest! {
        #[test]
        fn neither_order_nor_pieces_matter(mut rows in proptest::collection::vec((any::<u8>(), any::<i64>()), 0..200), a in 1_usize..50, b in 1_usize..50) {
            let one = digest(&rows, a);
            rows.reverse();
            let other = digest(&rows, b);
            prop_assert_eq!(&one, &other);
            prop_assert!(one.differing(&other).is_empty());
            prop_assert_eq!(one.rows(), rows.len() as u64);
        }

        #[test]
        fn a_row_more_or_less_shows_in_its_range(rows in proptest::collection::vec((any::<u8>(), any::<i64>()), 1..100), at in any::<proptest::sample::Index>()) {
            let mut fewer = rows.clone();
            let (range, _) = fewer.remove(at.index(rows.len()));
            prop_assert_eq!(digest(&rows, 7).differing(&digest(&fewer, 9)), vec![u32::from(range)]);
            prop_assert_eq!(digest(&fewer, 7).differing(&digest(&rows, 9)), vec![u32::from(range)]);
        }

        #[test]
        fn hashes_round_trip(bytes in any::<[u8; 32]>()) {
            prop_assert_eq!(Hash(bytes).to_string().parse::<Hash>().unwrap(), Hash(bytes));
        }
    }

    #[test]
    fn ranges_follow_the_size() {
        assert_eq!([0, 512, 1025, 100_000, u64::MAX / 2].map(range_bits), [0, 0, 1, 8, 16]);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for row in [vec![], vec![None, None, None, None], vec![Some("x".to_owned()); 4]] {
            assert!(Digest::default().add(&[row]).is_err());
        }
        for text in ["", "zz", &"é".repeat(32)] {
            assert!(text.parse::<Hash>().is_err(), "{text}");
        }
    }
}
