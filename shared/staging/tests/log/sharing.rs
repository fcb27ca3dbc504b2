//! Readers of one worker pull a record once while they stand together, and wait for nobody but the servers.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use wallaby_staging::{LogReader, LogWriter, SegmentCache, SegmentKey, Start};
use wallaby_testkit::eventually;

use crate::counters::counted;
use crate::support::{Flow, Memory, PATIENCE, at, read_to, segment};

const BODY: usize = 20_000;
/// Records that a consumer may deliver which another delivers too, before their readers meet.
const BOTH: u64 = 64;
/// Segments of a stretch against which those are few.
const LONG: u64 = 500;

/// Appends the segments that end at 1 + `after` + 1 to 1 + `to`, and waits until they are in the log.
async fn append(writer: &LogWriter, after: u64, to: u64) {
    for n in after + 1..=to {
        writer.append(segment(n, n + 1, BODY)).await.unwrap();
    }
    writer.settled().await.unwrap();
}

fn pulled(flow: &Flow) -> u64 {
    counted(&format!("wallaby_log_pulled_bytes_total{{flow={}}}", flow.log.flow()))
}

/// Every reader in a task of its own, as sinks have it.
async fn all_read_to(readers: Vec<LogReader>, to: u64) -> Vec<LogReader> {
    let reading: Vec<_> = readers
        .into_iter()
        .map(|mut reader| {
            tokio::spawn(async move {
                read_to(&mut reader, at(to)).await;
                reader
            })
        })
        .collect();
    let mut readers = Vec::new();
    for one in reading {
        readers.push(one.await.unwrap());
    }
    readers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_at_one_place_pull_a_record_once() {
    for count in [2, 3] {
        let (flow, cache) = (Flow::on_three().await, Arc::new(Memory::default()));
        let writer = flow.owner(5).await.unwrap();
        append(&writer, 0, 3).await;
        let readers = (0..count).map(|_| flow.reader_with(&cache, Start::FirstResume)).collect();
        let readers = all_read_to(readers, 4).await;
        // From here on they stand at the tail, and rows come while they wait.
        let (before, received) = (pulled(&flow), flow.log.connections().pull.statistics());
        let received_before = received.in_bytes.load(Ordering::SeqCst);
        let reading = tokio::spawn(all_read_to(readers, 3 + LONG + 1));
        append(&writer, 3, 3 + LONG).await;
        reading.await.unwrap();
        let (bytes, received) = (pulled(&flow) - before, received.in_bytes.load(Ordering::SeqCst) - received_before);
        let once = LONG * BODY as u64;
        let meeting = (count - 1) * BOTH * BODY as u64;
        println!("{count} readers pulled {bytes} bytes and received {received}; once is {once}");
        assert!(bytes >= once && received >= once, "the readers got everything from elsewhere");
        assert!(bytes < once + meeting + once / 20, "{count} readers pulled {bytes} bytes instead of {once}");
        assert!(received < 2 * once, "{count} readers received {received} bytes, more than one needs");
        flow.end().await;
    }
}

/// A cache may forget at any time: who came second then pulls on its own, and misses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_a_cache_that_forgets_miss_nothing() {
    let (flow, cache) = (Flow::on_three().await, Arc::new(Memory::that_forgets()));
    let writer = flow.owner(5).await.unwrap();
    let reading =
        tokio::spawn(all_read_to((0..3).map(|_| flow.reader_with(&cache, Start::FirstResume)).collect(), 301));
    append(&writer, 0, 300).await;
    reading.await.unwrap();
    let (bytes, once) = (pulled(&flow), 300 * BODY as u64);
    assert!(bytes <= 3 * once + once / 5, "three readers pulled {bytes} bytes; one needs {once}");
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stands_still_or_is_dropped_delays_nobody() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(5).await.unwrap();
    append(&writer, 0, 3).await;
    let mut readers = all_read_to((0..4).map(|_| flow.shared_reader(Start::FirstResume)).collect(), 4).await;
    // One dies while it waits at the tail, first in line, and the others behind it.
    let mut dropped = readers.pop().unwrap();
    let mut waiting = Box::pin(dropped.next());
    assert!(poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending())).await);
    // One asks for nothing, as one does whose sink is blocked.
    let mut blocked = readers.pop().unwrap();
    let reading = tokio::spawn(all_read_to(readers, 201));
    append(&writer, 3, 200).await;
    drop(waiting);
    let readers = reading.await.unwrap();
    assert_eq!(blocked.state().end, Some(at(4)));
    // It goes on when its sink does, also when the cache has lost what it needs, and then pulls with the others again.
    flow.cache.records().clear();
    read_to(&mut blocked, at(201)).await;
    let before = pulled(&flow);
    let reading = tokio::spawn(all_read_to(readers.into_iter().chain([blocked]).collect(), 200 + LONG + 1));
    append(&writer, 200, 200 + LONG).await;
    reading.await.unwrap();
    let (bytes, once) = (pulled(&flow) - before, LONG * BODY as u64);
    assert!(bytes < once + once / 5, "{bytes} bytes instead of {once}: the reader that was blocked pulls on its own");
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_at_different_places_pull_on_their_own_and_meet() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(5).await.unwrap();
    append(&writer, 0, 200).await;
    let at_tail = flow.shared_reader(Start::At { position: at(190), epoch: None, sequence_hint: None });
    let at_head = flow.shared_reader(Start::FirstResume);
    let readers = all_read_to(vec![at_tail, at_head], 201).await;
    let before = pulled(&flow);
    let reading = tokio::spawn(all_read_to(readers, 200 + LONG + 1));
    append(&writer, 200, 200 + LONG).await;
    reading.await.unwrap();
    let (bytes, once) = (pulled(&flow) - before, LONG * BODY as u64);
    assert!(bytes < once + once / 5, "{bytes} bytes instead of {once}");
    flow.end().await;
}

/// It has the newest record from the cache, where the capture put it, and waits for the one behind it at the place that delivers the
/// newest next. The other reader has to pull it, and on a quiet flow nothing comes behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_passes_a_record_over_keeps_nobody_from_it() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(5).await.unwrap();
    append(&writer, 0, 3).await;
    let mut first = flow.shared_reader(Start::FirstResume);
    let before_it = read_to(&mut first, at(4)).await.pop().unwrap().staged.sequence;
    append(&writer, 3, 4).await;
    let from_4 = Start::At { position: at(4), epoch: None, sequence_hint: Some(before_it) };
    let newest = read_to(&mut flow.reader(from_4), at(5)).await.pop().unwrap().staged;
    let (incarnation, sequence) = (newest.incarnation.unwrap(), newest.sequence);
    flow.cache.put(SegmentKey { flow: flow.log.flow().clone(), incarnation, sequence }, &newest);
    let hits = || counted(&format!("wallaby_log_cache_hits_total{{flow={}}}", flow.log.flow()));
    let (before, hits_before) = (pulled(&flow), hits());
    read_to(&mut first, at(5)).await;
    assert!(hits() > hits_before && pulled(&flow) == before, "it was pulled, not taken from the cache");
    flow.cache.records().clear();
    let waiting = tokio::spawn(async move { first.next().await });
    eventually(PATIENCE, "the newest record is passed over", async || {
        let bytes = pulled(&flow) - before;
        if bytes >= BODY as u64 { Ok(()) } else { Err(format!("{bytes} bytes are pulled")) }
    })
    .await;
    let mut second = flow.shared_reader(from_4);
    read_to(&mut second, at(5)).await;
    waiting.abort();
    flow.end().await;
}
