//! What a second look at a row says.
//!
//! A look reads the source under a snapshot S, waits until the sink has all that S shows, and reads the sink at a position
//! P, which is not before S. The next look reads the source after P. So if the source shows the same in two looks one after
//! the other, it had that at P too, and the sink's answer at P was right or wrong by it. A row that differs in both looks,
//! the same at both sides each time, is a difference; one that is the same once was on its way. (A row that is changed and
//! changed back between two looks is seen as unchanged: that is why the sink must show the same twice as well.)

use std::collections::HashMap;

use super::digest::Hash;
use super::merge::Candidate;

/// What became of the candidates of one look in the next.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    /// Differences.
    pub confirmed: Vec<Candidate>,
    /// Not known yet.
    pub pending: Vec<Candidate>,
    /// How many were on their way.
    pub settled: u64,
}

/// Compares two looks. `now` are the candidates of the second look among the keys of the first.
pub(super) fn look_again(before: Vec<Candidate>, now: Vec<Candidate>) -> Looked {
    let mut now: HashMap<Hash, Candidate> = now.into_iter().map(|candidate| (candidate.key_hash, candidate)).collect();
    let mut looked = Looked::default();
    for old in before {
        match now.remove(&old.key_hash) {
            None => looked.settled += 1,
            Some(new) if new.source == old.source && new.sink == old.sink => looked.confirmed.push(new),
            Some(new) => looked.pending.push(new),
        }
    }
    looked
}

#[cfg(test)]
mod tests {
    use super::super::merge::Tally;
    use super::*;

    fn candidate(key: u8, source: u64, sink: u64) -> Candidate {
        let tally = |sum: u64| Tally { rows: u64::from(sum > 0), sum };
        Candidate {
            key_hash: Hash([key; 32]),
            key: Vec::new(),
            place: None,
            source: tally(source),
            sink: tally(sink),
            matched: 0,
        }
    }

    #[test]
    fn only_what_stays_is_a_difference() {
        let before = vec![candidate(1, 5, 4), candidate(2, 5, 4), candidate(3, 5, 4), candidate(4, 5, 0)];
        // 1 stays; 2 arrived; 3 was changed again; 4 lags still, but shows something else.
        let now = vec![candidate(1, 5, 4), candidate(3, 6, 5), candidate(4, 5, 3)];
        let looked = look_again(before, now);
        assert_eq!(looked.confirmed, vec![candidate(1, 5, 4)]);
        assert_eq!(looked.pending, vec![candidate(3, 6, 5), candidate(4, 5, 3)]);
        assert_eq!(looked.settled, 1);
    }
}
