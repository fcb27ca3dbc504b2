//! Where a watch stands, without I/O: what to do next so that no change is missed and none is made up.

/// What the header of an answer says of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Store {
    /// Which cluster answered.
    pub(crate) cluster_id: u64,
    /// The election that its leader won. Never falls within one history.
    pub(crate) raft_term: u64,
    /// The store's revision.
    pub(crate) revision: i64,
}

/// What the feed does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Read everything anew.
    List,
    /// Watch from this revision on.
    WatchFrom(i64),
}

/// The position of a watch in the store's history.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    seen: Option<Store>,
}

impl Cursor {
    pub(crate) fn next(&self) -> Next {
        self.seen.map_or(Next::List, |seen| Next::WatchFrom(seen.revision + 1))
    }

    /// Everything up to the store's revision was read.
    pub(crate) fn listed(&mut self, store: Store) {
        self.seen = Some(store);
    }

    /// The watch was opened on `store`. False when its history is not the one that was followed so far (etcd was restored
    /// from a backup, or the member lags behind what was seen): everything must be read anew, a watch would stay silent
    /// until the old revision is reached.
    pub(crate) fn opened(&mut self, store: Store) -> bool {
        let is_same = self.seen.is_some_and(|seen| {
            seen.cluster_id == store.cluster_id && seen.raft_term <= store.raft_term && seen.revision <= store.revision
        });
        match &mut self.seen {
            // The term may rise between changes; the revision is that of the last change handed on.
            Some(seen) if is_same => seen.raft_term = store.raft_term,
            _ => self.seen = None,
        }
        is_same
    }

    /// All changes up to `revision` were handed on.
    pub(crate) fn advanced(&mut self, revision: i64) {
        if let Some(seen) = &mut self.seen {
            seen.revision = seen.revision.max(revision);
        }
    }

    /// The history from here on is gone.
    pub(crate) fn compacted(&mut self) {
        self.seen = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn store(cluster_id: u64, raft_term: u64, revision: i64) -> Store {
        Store { cluster_id, raft_term, revision }
    }

    fn at(revision: i64) -> Cursor {
        let mut cursor = Cursor::default();
        cursor.listed(store(1, 5, revision));
        cursor
    }

    #[test]
    fn it_lists_first_and_goes_on_after_the_last_change() {
        assert_eq!(Cursor::default().next(), Next::List);
        let mut cursor = at(10);
        assert!(cursor.opened(store(1, 5, 12)));
        // What the header says was there when the watch was opened; changes 11 and 12 are still to come.
        assert_eq!(cursor.next(), Next::WatchFrom(11));
        cursor.advanced(12);
        cursor.advanced(11);
        assert_eq!(cursor.next(), Next::WatchFrom(13));
    }

    #[test]
    fn compaction_and_another_history_mean_reading_anew() {
        let mut cursor = at(10);
        cursor.compacted();
        assert_eq!(cursor.next(), Next::List);
        for other in [store(1, 5, 9), store(1, 4, 20), store(2, 5, 20)] {
            let mut cursor = at(10);
            assert!(!cursor.opened(other), "{other:?}");
            assert_eq!(cursor.next(), Next::List);
        }
    }

    #[test]
    fn a_new_leader_is_the_same_history() {
        let mut cursor = at(10);
        assert!(cursor.opened(store(1, 6, 10)));
        assert_eq!(cursor.next(), Next::WatchFrom(11));
        assert!(!cursor.opened(store(1, 5, 10)));
    }
}
