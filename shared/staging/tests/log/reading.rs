//! Where readers begin, what they are told when they cannot, and the purge behind them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use wallaby_model::{Epoch, Position};
use wallaby_staging::{
    Accepted, LogReader, LogWriter, ReaderOptions, SegmentCache, Staged, StagingError, Start, WriterOptions,
};

use crate::gate::Gate;
use crate::support::{Flow, Memory, PATIENCE, at, begins, end_of, info, options, owner, read_to, segment};

/// A log of segments of ten positions each, 1..=1+10*count.
async fn filled(count: u64) -> (Flow, LogWriter) {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 0..count {
        writer.append(segment(1 + 10 * n, 11 + 10 * n, 1000)).await.unwrap();
    }
    writer.settled().await.unwrap();
    (flow, writer)
}

fn start(position: u64, epoch: Option<u64>, sequence_hint: Option<u64>) -> Start {
    Start::At { position: at(position), epoch: epoch.map(Epoch), sequence_hint }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_reader_begins_in_mid_segment_with_any_hint() {
    let (flow, writer) = filled(60).await;
    drop(writer);
    let successor = owner(&flow.log, 9).await.unwrap();
    successor.append(segment(601, 650, 100)).await.unwrap();
    successor.settled().await.unwrap();
    for position in [1, 5, 11, 300, 301, 305, 599, 601, 610, 650] {
        for (epoch, hint) in
            [(None, None), (Some(5), None), (Some(5), Some(3)), (Some(5), Some(10_000)), (Some(5), Some(60))]
        {
            let mut reader = flow.reader(start(position, epoch, hint));
            let accepted = read_to(&mut reader, at(650)).await;
            assert_eq!(
                accepted.iter().find(|one| one.to > one.after).map_or(at(position), |one| one.after),
                at(position)
            );
            if position < 650 {
                assert_eq!(reader.state().epoch, Some(Epoch(9)));
            }
        }
    }
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_the_purge_empties_an_idle_log_then_a_takeover() {
    let (flow, writer) = filled(20).await;
    for _ in 0..2 {
        flow.log.purge(at(201), Duration::ZERO, SystemTime::now()).await.unwrap();
    }
    let left = flow.log.info().await.unwrap();
    assert_eq!(left.messages, 1, "only the newest record that carries a position stays");
    assert_eq!(flow.log.tail().await.unwrap().end, Some(at(201)));
    drop(writer);
    let successor = owner(&flow.log, 6).await.unwrap();
    assert_eq!(successor.end(), at(201));
    // Idle again, only a resume is new; purged again; taken over again.
    flow.log.purge(at(201), Duration::ZERO, SystemTime::now()).await.unwrap();
    drop(successor);
    let third = owner(&flow.log, 7).await.unwrap();
    assert_eq!(third.end(), at(201));
    third.append(segment(201, 211, 100)).await.unwrap();
    third.settled().await.unwrap();
    // A reader that stood at the end, with the epoch of long ago, and one that knows none.
    for epoch in [Some(5), None] {
        let accepted = read_to(&mut flow.reader(start(201, epoch, Some(21))), at(211)).await;
        assert_eq!(accepted.last().unwrap().after, at(201));
    }
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_reader_that_registers_while_the_purge_runs_starts_or_is_refused() {
    let (flow, _writer) = filled(100).await;
    let mut tasks = Vec::new();
    for position in (1..=901).step_by(90) {
        let mut reader = flow.reader(start(position, Some(5), None));
        tasks.push(tokio::spawn(async move {
            let first = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap();
            match first {
                Ok(mut accepted) => {
                    // It may begin with resumes of the past; then exactly where it stands.
                    while accepted.to == accepted.after {
                        accepted = match reader.next().await {
                            Ok(accepted) => accepted,
                            Err(StagingError::PastHold { .. }) => return false,
                            Err(error) => panic!("{error}"),
                        };
                    }
                    assert_eq!(accepted.after, at(position));
                    let from = begins(&accepted).unwrap();
                    assert!(from <= at(position), "a reader at {position} was given what begins at {from}");
                    true
                }
                Err(StagingError::PastHold { position: Some(stood), .. }) => {
                    assert_eq!(stood, at(position));
                    false
                }
                Err(error) => panic!("{error}"),
            }
        }));
    }
    for up_to in (100..=900).step_by(100) {
        flow.log.purge(at(up_to), Duration::ZERO, SystemTime::now()).await.unwrap();
    }
    let mut started = 0;
    for task in tasks {
        started += usize::from(task.await.unwrap());
    }
    assert!(started >= 1, "the last one is never purged");
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_past_its_hold_is_told_so() {
    let (flow, _writer) = filled(100).await;
    let purged = flow.log.purge(at(805), Duration::ZERO, SystemTime::now()).await.unwrap();
    assert!(purged.records > 40, "{purged:?}");
    let error =
        tokio::time::timeout(PATIENCE, flow.reader(start(205, Some(5), None)).next()).await.unwrap().unwrap_err();
    assert!(matches!(error, StagingError::PastHold { position: Some(p), .. } if p == at(205)), "{error}");
    assert!(error.to_string().contains("snapshot run"), "{error}");
    let error = tokio::time::timeout(PATIENCE, flow.reader(Start::FirstResume).next()).await.unwrap().unwrap_err();
    assert!(matches!(error, StagingError::PastHold { position: None, .. }), "{error}");
    // At the hold, and anywhere, it goes.
    read_to(&mut flow.reader(start(805, Some(5), Some(2))), at(1001)).await;
    read_to(&mut flow.reader(Start::Available), at(1001)).await;
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_purge_keeps_the_hold_and_the_replay_window() {
    let (flow, writer) = filled(100).await;
    // Everything is younger than an hour.
    let hour = Duration::from_secs(3600);
    assert_eq!(flow.log.purge(at(1001), hour, SystemTime::now()).await.unwrap().records, 0);
    // In two hours nothing is.
    let later = SystemTime::now() + 2 * hour;
    let mut lowest = 1;
    for hold in [55, 300, 301, 444, 800] {
        flow.log.purge(at(hold), hour, later).await.unwrap();
        let first = tokio::time::timeout(PATIENCE, flow.reader(Start::Available).next()).await.unwrap().unwrap();
        assert!(first.after <= at(hold), "{hold}: {first:?}");
        lowest = first.after.commit.0;
        read_to(&mut flow.reader(start(hold, Some(5), None)), at(1001)).await;
    }
    assert!(lowest > 400, "{lowest}");
    let end = end_of(&writer);
    writer.append(segment(end, end + 1, 10)).await.unwrap();
    writer.settled().await.unwrap();
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_of_somebody_else_stops_the_reader_with_the_reason() {
    let (flow, _writer) = filled(3).await;
    let client = crate::support::target(&flow.url).connect("foreign").await.unwrap();
    async_nats::jetstream::new(client)
        .publish(flow.log.data_subject().to_owned(), "x".into())
        .await
        .unwrap()
        .await
        .unwrap();
    let mut reader = flow.reader(Start::FirstResume);
    let error = loop {
        match tokio::time::timeout(PATIENCE, reader.next()).await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("something other than WALlaby"), "{error}");
    flow.end().await;
}

/// The servers send what a pull asks for without waiting for anybody: its bytes are what bounds a reader's memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_pull_is_bounded_in_bytes() {
    let (flow, _writer) = filled(60).await;
    let largest = flow.log.connections().pull.max_payload() + (64 << 10);
    for pull_bytes in [1000, 3 * largest] {
        let gate = Gate::to(&flow.url).await;
        let log = flow.over(&gate.url()).await;
        let mut reader =
            LogReader::new(&log, Start::FirstResume, ReaderOptions { pull_bytes, ..ReaderOptions::default() });
        read_to(&mut reader, at(601)).await;
        let pulls = gate.pulls();
        assert!(pulls.len() > 1, "{pulls:?}");
        let bound = pull_bytes.max(largest) as u64;
        for pull in &pulls {
            let max_bytes = pull["max_bytes"].as_u64();
            assert!(max_bytes.is_some_and(|bytes| (1..=bound).contains(&bytes)), "{pull} for {pull_bytes} bytes");
        }
    }
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h21_only_acknowledged_records_enter_the_cache() {
    let flow = Flow::on_three().await;
    let cache = Arc::new(Memory::default());
    let with_cache = WriterOptions { cache: Some(Arc::clone(&cache) as Arc<dyn SegmentCache>), ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), wallaby_model::Nonce::random(), with_cache).await.unwrap();
    let zombie = takeover.resume(at(1), info(false)).await.unwrap();
    for n in 1..=30 {
        zombie.append(segment(n, n + 1, 100)).await.unwrap();
    }
    zombie.settled().await.unwrap();
    let successor = owner(&flow.elsewhere().await, 6).await.unwrap();
    // What the zombie appends from here on says other things, and is refused.
    let mut n = 31;
    while zombie.append(segment(n, n + 100, 100)).await.is_ok() {
        n += 100;
    }
    for n in 31..=60 {
        successor.append(segment(n, n + 1, 100)).await.unwrap();
    }
    successor.settled().await.unwrap();
    let ends: BTreeSet<Position> = cache.records().values().filter_map(|staged| staged.record.kind.to()).collect();
    // Nobody has read yet: each segment of the zombie that was acknowledged, and none that was not.
    assert!((2..=31).all(|end| ends.contains(&at(end))), "what was appended is not in the cache: {ends:?}");
    assert!(ends.iter().all(|end| *end <= at(31)), "{ends:?}");
    let options =
        ReaderOptions { cache: Some(Arc::clone(&cache) as Arc<dyn SegmentCache>), ..ReaderOptions::default() };
    // The first pulls its first record, the second finds all in the cache.
    let plain: Vec<Accepted> = read_to(&mut flow.reader(Start::FirstResume), at(61)).await;
    let mut readers: Vec<LogReader> =
        (0..2).map(|_| LogReader::new(&flow.log, Start::FirstResume, options.clone())).collect();
    for reader in &mut readers {
        let accepted = read_to(reader, at(61)).await;
        let bodies = |accepted: &[Accepted]| {
            accepted.iter().map(|one| (one.after, one.staged.clone())).collect::<Vec<(Position, Staged)>>()
        };
        assert_eq!(bodies(&accepted), bodies(&plain));
    }
    assert!(cache.records().len() > 60);
    flow.end().await;
}
