//! Merges the rows of both sides, sorted by key hash and row hash, into differences. Memory stays flat: one row of each
//! side, and the figures of one key.

use wallaby_model::verify::DifferenceKind;

use super::digest::{Hash, unreadable};
use super::{VerifyError, VerifyRow};

/// A row as the reading shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HashedRow {
    pub key_hash: Hash,
    pub row_hash: Hash,
    /// Its address; `None` where there is none.
    pub place: Option<String>,
    /// The texts of its key; empty without one.
    pub key: VerifyRow,
}

impl HashedRow {
    /// Reads key hash, row hash, place, key texts.
    pub fn parse(mut row: VerifyRow) -> Result<HashedRow, VerifyError> {
        if row.len() < 3 {
            return Err(unreadable("a row of hashes"));
        }
        let key = row.split_off(3);
        let place = row.pop().flatten();
        let hash = |text: Option<Option<String>>| match text.flatten() {
            Some(text) => text.parse(),
            None => Err(unreadable("a row of hashes")),
        };
        let row_hash = hash(row.pop())?;
        let key_hash = hash(row.pop())?;
        Ok(HashedRow { key_hash, row_hash, place, key })
    }
}

/// The rows that one side has under one key, in two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Tally {
    pub rows: u64,
    /// The sum of the heads of their hashes.
    pub sum: u64,
}

impl Tally {
    pub fn add(&mut self, row: &HashedRow) {
        self.rows += 1;
        self.sum = self.sum.wrapping_add(row.row_hash.head());
    }
}

/// A key whose rows are not the same at both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub key_hash: Hash,
    pub key: VerifyRow,
    /// Where one of its rows is: at the sink when the source has none.
    pub place: Option<String>,
    pub source: Tally,
    pub sink: Tally,
    /// Rows that are the same at both sides.
    pub matched: u64,
}

impl Candidate {
    /// How many rows are missing, extra, different.
    pub fn counts(&self) -> (u64, u64, u64) {
        let (source, sink) =
            (self.source.rows.saturating_sub(self.matched), self.sink.rows.saturating_sub(self.matched));
        let different = source.min(sink);
        (source - different, sink - different, different)
    }

    /// In one word.
    pub fn kind(&self) -> DifferenceKind {
        match self.counts() {
            (missing, _, 0) if missing > 0 => DifferenceKind::Missing,
            (_, _, different) if different > 0 => DifferenceKind::Different,
            _ => DifferenceKind::Extra,
        }
    }
}

/// Merges rows that are pushed in order, the smaller of both sides first.
#[derive(Debug, Default)]
pub(super) struct Merge {
    current: Option<Candidate>,
}

/// The side that a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Sink,
    /// The same row at both.
    Both,
}

impl Merge {
    /// Takes the next row; gives the key before it, if that one differs.
    pub fn push(&mut self, row: HashedRow, side: Side) -> Option<Candidate> {
        let ended = match &self.current {
            Some(current) if current.key_hash == row.key_hash => None,
            _ => self.end(),
        };
        let current = self.current.get_or_insert_with(|| Candidate {
            key_hash: row.key_hash,
            key: row.key.clone(),
            place: row.place.clone(),
            source: Tally::default(),
            sink: Tally::default(),
            matched: 0,
        });
        if side != Side::Sink {
            current.source.add(&row);
        }
        if side != Side::Source {
            current.sink.add(&row);
        }
        current.matched += u64::from(side == Side::Both);
        ended
    }

    /// The last key, if it differs.
    pub fn end(&mut self) -> Option<Candidate> {
        self.current.take().filter(|candidate| candidate.counts() != (0, 0, 0))
    }
}

/// Which row comes next, of the two that are at hand.
pub(super) fn next(source: Option<&HashedRow>, sink: Option<&HashedRow>) -> Option<Side> {
    let order = |row: &HashedRow| (row.key_hash, row.row_hash);
    Some(match (source, sink) {
        (None, None) => return None,
        (Some(_), None) => Side::Source,
        (None, Some(_)) => Side::Sink,
        (Some(source), Some(sink)) => match order(source).cmp(&order(sink)) {
            std::cmp::Ordering::Less => Side::Source,
            std::cmp::Ordering::Equal => Side::Both,
            std::cmp::Ordering::Greater => Side::Sink,
        },
    })
}

/// The candidates of two lists that fit in memory. Sorts them.
pub(super) fn merge(mut source: Vec<HashedRow>, mut sink: Vec<HashedRow>) -> Vec<Candidate> {
    source.sort_by_key(|row| (row.key_hash, row.row_hash));
    sink.sort_by_key(|row| (row.key_hash, row.row_hash));
    let (mut source, mut sink) = (source.into_iter().peekable(), sink.into_iter().peekable());
    let mut merge = Merge::default();
    let mut found = Vec::new();
    while let Some(side) = next(source.peek(), sink.peek()) {
        let of_source = if side == Side::Sink { None } else { source.next() };
        let of_sink = if side == Side::Source { None } else { sink.next() };
        if let Some(row) = of_source.or(of_sink) {
            found.extend(merge.push(row, side));
        }
    }
    found.extend(merge.end());
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn row(key: u8, value: u8) -> HashedRow {
        let (mut key_hash, mut row_hash) = (Hash::default(), Hash::default());
        (key_hash.0[0], row_hash.0[0]) = (key, value);
        HashedRow { key_hash, row_hash, place: None, key: vec![Some(key.to_string())] }
    }

    fn rows(pairs: &[(u8, u8)]) -> Vec<HashedRow> {
        pairs.iter().map(|(key, value)| row(*key, *value)).collect()
    }

    type Bag = BTreeMap<u8, BTreeMap<u8, i64>>;

    /// Missing, extra and different rows of each key, from two bags.
    fn expected(source: &[(u8, u8)], sink: &[(u8, u8)]) -> BTreeMap<u8, (u64, u64, u64)> {
        let mut bag: Bag = BTreeMap::new();
        for (pairs, sign) in [(source, 1), (sink, -1)] {
            for (key, value) in pairs {
                *bag.entry(*key).or_default().entry(*value).or_default() += sign;
            }
        }
        let count = |values: &BTreeMap<u8, i64>| {
            let more: i64 = values.values().filter(|n| **n > 0).sum();
            let less: i64 = -values.values().filter(|n| **n < 0).sum::<i64>();
            let both = more.min(less);
            ((more - both) as u64, (less - both) as u64, both as u64)
        };
        let counted = bag.iter().map(|(key, values)| (*key, count(values)));
        counted.filter(|(_, counts)| *counts != (0, 0, 0)).collect()
    }

    proptest! {
        #[test]
        fn differences_are_those_of_the_bags(
            source in proptest::collection::vec((0_u8..12, 0_u8..4), 0..60),
            sink in proptest::collection::vec((0_u8..12, 0_u8..4), 0..60),
        ) {
            let found = merge(rows(&source), rows(&sink));
            let found: BTreeMap<u8, (u64, u64, u64)> = found.iter().map(|c| (c.key_hash.0[0], c.counts())).collect();
            prop_assert_eq!(found, expected(&source, &sink));
        }
    }

    #[test]
    fn each_kind_has_its_name() {
        let kind =
            |source: &[(u8, u8)], sink: &[(u8, u8)]| merge(rows(source), rows(sink)).first().map(Candidate::kind);
        assert_eq!(kind(&[(1, 1)], &[(1, 1)]), None);
        assert_eq!(kind(&[(1, 1)], &[]), Some(DifferenceKind::Missing));
        assert_eq!(kind(&[], &[(1, 1)]), Some(DifferenceKind::Extra));
        assert_eq!(kind(&[(1, 1)], &[(1, 2)]), Some(DifferenceKind::Different));
        assert_eq!(kind(&[(1, 1)], &[(1, 1), (1, 1)]), Some(DifferenceKind::Extra));
    }
}
