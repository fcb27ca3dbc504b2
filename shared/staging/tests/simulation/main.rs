//! The protocol without servers: owners that fence, pipeline, lose acknowledgements and wake up late, a stream that refuses, delays
//! and stores, and readers that must see every change exactly once, in order, whatever happened.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod world;

use std::collections::VecDeque;

use proptest::prelude::*;
use wallaby_model::{Epoch, Position, RecordKind};
use wallaby_staging::rule::{ReaderState, Verdict};
use wallaby_staging::tail::ChainRun;

use world::{World, at, number};

/// What a reader saw: the changes `(after, to]` of each accepted record, checked to continue.
fn read(world: &World, mut state: ReaderState, from_index: usize) -> Result<(u64, ReaderState), TestCaseError> {
    for staged in &world.stream[from_index..] {
        let before = state.end;
        match state.observe(staged) {
            Verdict::Accept { after } => {
                prop_assert!(before.is_none_or(|before| before == after));
                prop_assert!(Some(after) < state.end);
            }
            Verdict::Gap { end, from } => {
                return Err(TestCaseError::fail(format!(
                    "gap at {}: {end:?} {from:?}\n{}",
                    staged.sequence,
                    world.trace()
                )));
            }
            Verdict::Resumed { .. } | Verdict::Fence | Verdict::Drop(_) => {
                prop_assert!(before.is_none() || before == state.end);
            }
        }
    }
    Ok((state.end.map_or(0, number), state))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_global_rejects: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever owners and network do, a reader sees no gap, and the tail is what a reader of everything sees.
    #[test]
    fn no_schedule_of_owners_leaves_a_gap(steps in prop::collection::vec((0_u8..12, any::<u16>()), 1..400)) {
        let mut world = World::default();
        for (kind, dice) in steps {
            world.step(kind, dice);
            let (end, state) = read(&world, ReaderState::at_first_resume(), 0)?;
            let tail = world.tail();
            prop_assert_eq!(tail.end.map_or(0, number), end, "{:?}\n{}", tail, world.trace());
            prop_assert_eq!(tail.epoch, state.epoch);
            prop_assert_eq!(tail.incarnation, state.incarnation);
        }
        // What the last owner believes to be stored is stored.
        world.finish();
        let (end, _) = read(&world, ReaderState::at_first_resume(), 0)?;
        prop_assert!(end >= world.acknowledged, "{} acknowledged, the log ends at {end}", world.acknowledged);
    }

    /// A reader may begin anywhere before its end, after any fence, with an old epoch or none (hazard 11).
    #[test]
    fn h11_a_reader_begins_in_mid_segment_and_after_the_last_fence(
        steps in prop::collection::vec((0_u8..12, any::<u16>()), 50..300), place in any::<u16>(), knows_epoch in any::<bool>(),
    ) {
        let mut world = World::default();
        for (kind, dice) in steps {
            world.step(kind, dice);
        }
        let (end, _) = read(&world, ReaderState::at_first_resume(), 0)?;
        prop_assume!(end > 1);
        // Any position, also inside a segment, with the epoch that the log had there.
        let position = 1 + u64::from(place) % end;
        let mut epoch_there = Epoch(0);
        let mut walk = ReaderState::at_first_resume();
        for staged in &world.stream {
            let verdict = walk.observe(staged);
            if walk.end > Some(at(position)) {
                break;
            }
            if matches!(verdict, Verdict::Accept { .. } | Verdict::Resumed { .. }) {
                epoch_there = staged.record.epoch;
            }
        }
        // What a search finds: a place before the first record that ends past the position where the rule may begin.
        let holds = world.stream.iter().position(|staged| staged.record.kind.to() > Some(at(position)));
        let before = &world.stream[..holds.unwrap_or(world.stream.len())];
        let mut run = ChainRun::default();
        let begins = before.iter().rposition(|staged| run.push(staged.link)).unwrap_or(0);
        let epoch = knows_epoch.then_some(epoch_there);
        // From the first record that holds it, whatever stood before; and from the very beginning.
        for from in [begins, 0] {
            let (seen, _) = read(&world, ReaderState::at(at(position), epoch), from)?;
            prop_assert_eq!(seen.max(position), end, "from {} at {}\n{}", from, position, world.trace());
        }
    }

    /// A tail that was lost and cut anew into other segments is trimmed by readers that had seen it.
    #[test]
    fn h11_a_tail_cut_anew_is_trimmed(cuts in prop::collection::vec(1_u64..9, 1..40), lost in 1_usize..10, recut in prop::collection::vec(1_u64..9, 1..60)) {
        let mut world = World::default();
        let mut end = 1;
        world.raw_owner(5, 1, false);
        for cut in cuts {
            world.raw_data(5, end, end + cut);
            end += cut;
        }
        let (seen, state) = read(&world, ReaderState::at_first_resume(), 0)?;
        prop_assert_eq!(seen, end);
        // The tail goes, and its sequences come again.
        let kept = world.stream.len().saturating_sub(lost).max(2);
        world.stream.truncate(kept);
        let log_end = world.tail().end.map_or(1, number);
        world.raw_owner(6, log_end, true);
        let mut from = log_end;
        for cut in recut {
            world.raw_data(6, from, from + cut);
            from += cut;
        }
        let (again, after) = read(&world, state, kept)?;
        prop_assert_eq!(again, end.max(from));
        prop_assert!(after.incarnation != state.incarnation || from <= end);
        let (all, _) = read(&world, ReaderState::at_first_resume(), 0)?;
        prop_assert_eq!(all, from);
    }

    /// The purge empties an idle log but for its newest record; the next owner still knows where it ends (hazard 10).
    #[test]
    fn h10_an_idle_log_that_was_purged_knows_its_end(steps in prop::collection::vec((0_u8..12, any::<u16>()), 20..200), rounds in 1_u64..4) {
        let mut world = World::default();
        for (kind, dice) in steps {
            world.step(kind, dice);
        }
        world.finish();
        let before = world.tail();
        prop_assume!(before.end.is_some());
        for round in 0..rounds {
            world.purge_all();
            let tail = world.tail();
            prop_assert_eq!(tail.end, before.end);
            let epoch = tail.epoch.unwrap().0 + 1 + round;
            world.raw_owner(epoch, number(tail.end.unwrap()), false);
        }
        let end = number(before.end.unwrap());
        world.raw_data(1_000_000, end, end + 5);
        // A reader that stood at the end, with the epoch it knew.
        let (seen, _) = read(&world, ReaderState::at(before.end.unwrap(), before.epoch), 0)?;
        prop_assert_eq!(seen, end + 5);
    }
}

#[test]
fn a_gap_stops_the_reader_and_changes_nothing() {
    let mut world = World::default();
    world.raw_owner(5, 1, false);
    world.raw_data(5, 1, 4);
    world.raw_data(5, 6, 8);
    let mut state = ReaderState::at_first_resume();
    let verdicts: VecDeque<Verdict> = world.stream.iter().map(|staged| state.observe(staged)).collect();
    assert_eq!(verdicts.back(), Some(&Verdict::Gap { end: Some(at(4)), from: at(6) }));
    assert_eq!(state.end, Some(at(4)));
    // A resume past the end is one too.
    let mut state = ReaderState::at(at(2), None);
    let resume = &world.stream[1];
    assert!(matches!(resume.record.kind, RecordKind::Resume { .. }));
    assert!(matches!(state.observe(resume), Verdict::Resumed { .. }));
    let mut behind = ReaderState::at(Position::ZERO, None);
    assert!(matches!(behind.observe(resume), Verdict::Gap { .. }));
}
