//! Which sub-transactions of a streamed transaction have rows, and which of them were rolled back (hazard 17).
//!
//! Both are kept as ranges. Sub-transactions get their xids one after the other, so those that have rows are a few ranges, or, when
//! other transactions take xids in between, at most a dozen bytes each (Postgres itself keeps hundreds for each of them). A range of
//! rolled-back ones reaches over xids that have no rows here, so that their number stays that of the rollbacks with survivors between them.

use std::collections::BTreeMap;

/// See the module.
#[derive(Default, Debug)]
pub(super) struct SubXids {
    /// Those that have rows and were not rolled back: first and last of ranges of neighbours.
    live: BTreeMap<u32, u32>,
    /// Those that were rolled back: first and last. No live one lies inside.
    aborted: BTreeMap<u32, u32>,
    last_seen: Option<u32>,
}

/// The range of a map that holds `xid`.
fn range_of(ranges: &BTreeMap<u32, u32>, xid: u32) -> Option<(u32, u32)> {
    let (first, last) = ranges.range(..=xid).next_back()?;
    (*last >= xid).then_some((*first, *last))
}

impl SubXids {
    /// A sub-transaction has a row.
    #[inline]
    pub(super) fn saw(&mut self, xid: u32) {
        if self.last_seen != Some(xid) {
            self.last_seen = Some(xid);
            self.add(xid);
        }
    }

    fn add(&mut self, xid: u32) {
        if range_of(&self.live, xid).is_some() {
            return;
        }
        if let Some((first, last)) = range_of(&self.aborted, xid) {
            // A range over xids that had no rows, and one of them has some now.
            self.aborted.remove(&first);
            if first < xid {
                self.aborted.insert(first, xid - 1);
            }
            if xid < last {
                self.aborted.insert(xid + 1, last);
            }
        }
        let (mut first, mut last) = (xid, xid);
        if let Some((before, _)) = xid.checked_sub(1).and_then(|before| range_of(&self.live, before)) {
            self.live.remove(&before);
            first = before;
        }
        if let Some((after, end)) = xid.checked_add(1).and_then(|after| range_of(&self.live, after)) {
            self.live.remove(&after);
            last = end;
        }
        self.live.insert(first, last);
    }

    /// A sub-transaction was rolled back. One without rows is no news.
    pub(super) fn abort(&mut self, xid: u32) {
        self.last_seen = None;
        let Some((first, last)) = range_of(&self.live, xid) else { return };
        self.live.remove(&first);
        if first < xid {
            self.live.insert(first, xid - 1);
        }
        if xid < last {
            self.live.insert(xid + 1, last);
        }
        self.add_aborted(xid);
    }

    fn add_aborted(&mut self, xid: u32) {
        let (mut from, mut to) = (xid, xid);
        let before = self.aborted.range(..xid).next_back().map(|(first, last)| (*first, *last));
        if let Some((first, last)) = before
            && self.is_free_of_live(last, xid)
        {
            self.aborted.remove(&first);
            (from, to) = (first, to.max(last));
        }
        let after = self.aborted.range(xid..).next().map(|(first, last)| (*first, *last));
        if let Some((first, last)) = after
            && self.is_free_of_live(xid, first)
        {
            self.aborted.remove(&first);
            to = to.max(last);
        }
        self.aborted.insert(from, to);
    }

    /// Whether no live xid lies between two others.
    fn is_free_of_live(&self, after: u32, before: u32) -> bool {
        let Some((_, last)) = self.live.range(..before).next_back() else { return true };
        *last <= after
    }

    /// Whether any row survives.
    pub(super) fn any_survives(&self) -> bool {
        !self.live.is_empty()
    }

    /// The rolled-back ones as inclusive ranges, ascending.
    pub(super) fn into_aborted(self) -> Vec<(u32, u32)> {
        self.aborted.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn h17_a_million_rolled_back_sub_transactions_are_one_range() {
        let mut xids = SubXids::default();
        xids.saw(10);
        // Every third xid is ours: others run beside.
        for n in 0..1_000_000 {
            xids.saw(20 + 3 * n);
        }
        xids.saw(10);
        for n in 0..1_000_000 {
            xids.abort(20 + 3 * n);
        }
        assert!(xids.any_survives());
        assert_eq!(xids.live.len(), 1);
        assert_eq!(xids.into_aborted(), [(20, 20 + 3 * 999_999)]);
    }

    #[test]
    fn h17_a_survivor_between_rolled_back_ones_survives() {
        let mut xids = SubXids::default();
        for xid in [10, 12, 14, 16] {
            xids.saw(xid);
        }
        for xid in [16, 12] {
            xids.abort(xid);
        }
        // 13 is the parent of 14 and has its first row late; 12 and 14 meet over it, and part again.
        xids.abort(14);
        xids.saw(13);
        assert_eq!(xids.into_aborted(), [(12, 12), (14, 16)]);
    }

    proptest! {
        #[test]
        fn ranges_name_exactly_the_rolled_back_ones_among_those_with_rows(
            steps in proptest::collection::vec((any::<bool>(), 0u32..40), 0..200),
        ) {
            let (mut xids, mut seen, mut aborted) = (SubXids::default(), BTreeSet::new(), BTreeSet::new());
            for (is_abort, xid) in steps {
                if is_abort {
                    xids.abort(xid);
                    if seen.contains(&xid) {
                        aborted.insert(xid);
                    }
                } else if !aborted.contains(&xid) {
                    xids.saw(xid);
                    seen.insert(xid);
                }
            }
            prop_assert_eq!(xids.any_survives(), seen.len() > aborted.len());
            let ranges = xids.into_aborted();
            prop_assert!(ranges.is_sorted_by(|a, b| a.1 < b.0));
            for xid in seen {
                let within = ranges.iter().any(|(first, last)| (*first..=*last).contains(&xid));
                prop_assert_eq!(within, aborted.contains(&xid), "{} in {:?}", xid, ranges);
            }
        }
    }
}
