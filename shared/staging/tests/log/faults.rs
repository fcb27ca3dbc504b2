//! Servers that die, stall and fill up under an owner that appends, and readers that must see neither gap nor duplicate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_nats::jetstream::message::StreamMessage;
use futures::TryStreamExt;
use wallaby_model::{Epoch, Lsn, Nonce};
use wallaby_staging::{
    Connections, Log, LogReader, LogWriter, ReaderOptions, StagingError, Start, SyncPolicy, TailVerdict, Wait,
    WriterOptions, judge_tail,
};
use wallaby_testkit::{Held, NatsCluster, NatsOptions, SyncInterval, Wire, eventually};

use crate::counters::counted;
use crate::support::{Flow, PATIENCE, at, end_of, info, options, owner, read_to, segment};

async fn own_cluster() -> NatsCluster {
    let options =
        NatsOptions { nodes: 3, sync_interval: SyncInterval::Every(Duration::from_secs(60)), ..NatsOptions::default() };
    NatsCluster::start(options).await.unwrap()
}

/// Appends without pause until told to stop; returns the writer, everything acknowledged.
fn pipeline(
    writer: LogWriter,
    stop: Arc<AtomicBool>,
    bytes: usize,
) -> tokio::task::JoinHandle<Result<LogWriter, StagingError>> {
    tokio::spawn(async move {
        while !stop.load(Ordering::Relaxed) {
            let end = end_of(&writer);
            writer.append(segment(end, end + 1, bytes)).await?;
        }
        writer.settled().await?;
        Ok(writer)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_killed_in_a_loop_leave_no_gap_and_no_duplicate() {
    let cluster = own_cluster().await;
    let flow = Flow::on_own(&cluster, 512 << 20).await;
    let writer = flow.owner(5).await.unwrap();
    let (acked, moves) = (writer.acked(), writer.moves());
    let stop = Arc::new(AtomicBool::new(false));
    let appending = pipeline(writer, Arc::clone(&stop), 10_000);
    // One reader is there all the time, through every fault.
    let mut live = flow.shared_reader(Start::FirstResume);
    let (tell, told) = tokio::sync::oneshot::channel();
    let reading = tokio::spawn(async move {
        let mut told = std::pin::pin!(told);
        loop {
            let stood = live.state().end;
            tokio::select! {
                next = live.next() => {
                    let next = next.unwrap();
                    assert!(stood.is_none_or(|stood| stood == next.after), "{stood:?} {next:?}");
                }
                end = &mut told => {
                    read_to(&mut live, end.unwrap()).await;
                    return live.state();
                }
            }
        }
    });
    for round in 0..4 {
        let (before, moved_before) = (acked.borrow().position, *moves.borrow());
        let leader = cluster.leader_of_stream(flow.log.stream()).await.unwrap();
        cluster.node(leader).unwrap().kill9().await.unwrap();
        eventually(
            PATIENCE,
            "appends go on without the old leader, and it is said that there is another",
            async || {
                let (now, moved) = (acked.borrow().position, *moves.borrow() - moved_before);
                if now.commit.0 > before.commit.0 + 20 && moved > 0 {
                    Ok(())
                } else {
                    Err(format!("round {round}: {before:?} {now:?}, moved {moved} times"))
                }
            },
        )
        .await;
        assert!(*moves.borrow() > moved_before, "it has another leader, and nobody is told");
        cluster.start_node(leader).await.unwrap();
        eventually(PATIENCE, "three copies", async || {
            let info = flow.log.info().await.map_err(|error| error.to_string())?;
            if info.has_quorum { Ok(()) } else { Err(format!("{info:?}")) }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    let writer = appending.await.unwrap().unwrap();
    let end = writer.end();
    tell.send(end).unwrap();
    assert_eq!(reading.await.unwrap().end, Some(end));
    read_to(&mut flow.reader(Start::FirstResume), end).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_zombie_is_refused_and_gives_up() {
    for round in 0..3_u64 {
        let flow = Flow::on_three().await;
        let zombie = flow.owner(5).await.unwrap();
        for n in 1..=10 {
            zombie.append(segment(n, n + 1, 100)).await.unwrap();
        }
        zombie.settled().await.unwrap();
        // It hears nothing while another takes over and writes.
        let elsewhere = flow.elsewhere().await;
        let successor = owner(&elsewhere, 6).await.unwrap();
        for n in 11..=20 + round {
            successor.append(segment(n, n + 1, 100)).await.unwrap();
        }
        successor.settled().await.unwrap();
        let end = successor.end();
        // Now it wakes with a full window.
        let mut n = 11;
        let error = loop {
            match zombie.append(segment(n, n + 1, 100)).await {
                Ok(()) => n += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StagingError::Fenced { by: Epoch(6), .. }), "{error}");
        assert_eq!(zombie.acked().borrow().position, at(11), "nothing of it counts as acknowledged");
        assert!(zombie.durable().borrow().0 <= 11);
        let id = flow.log.flow();
        let refused = counted(&format!("wallaby_log_appends_refused_total{{flow={id},reason=chain}}"));
        assert!(refused >= 1, "the chain refused nothing");
        assert_eq!(counted(&format!("wallaby_log_fenced_total{{flow={id}}}")), 1);
        assert_eq!(flow.log.tail().await.unwrap().end, Some(end));
        let next = end_of(&successor);
        successor.append(segment(next, next + 1, 100)).await.unwrap();
        successor.settled().await.unwrap();
        read_to(&mut flow.reader(Start::FirstResume), at(next + 1)).await;
        flow.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_fences_against_a_pipelining_owner_leave_no_hole() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(7).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let appending = pipeline(writer, Arc::clone(&stop), 2_000);
    let elsewhere = flow.elsewhere().await;
    for _ in 0..10 {
        let error = owner(&elsewhere, 6).await.map(|_| ()).unwrap_err();
        assert!(error.is_fenced(), "{error}");
    }
    stop.store(true, Ordering::Relaxed);
    let writer = appending.await.unwrap().unwrap();
    read_to(&mut flow.reader(Start::FirstResume), writer.end()).await;
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_is_back_pressure_until_it_is_purged() {
    let flow = {
        let scope = wallaby_testkit::NatsScope::three_nodes("full").await;
        Flow::on(&scope.url(), 3, wallaby_staging::log::MAX_BYTES_LEAST).await
    };
    let writer = Arc::new(flow.owner(5).await.unwrap());
    let filling = {
        let writer = Arc::clone(&writer);
        tokio::spawn(async move {
            for n in 1..=60 {
                writer.append(segment(n, n + 1, 500_000)).await.unwrap();
            }
            writer.settled().await.unwrap();
        })
    };
    let waiting = writer.waiting();
    eventually(PATIENCE, "the writer waits for room", async || match *waiting.borrow() {
        Some(waiting) if waiting.what == Wait::Full => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let info_full = flow.log.info().await.unwrap();
    assert!(info_full.bytes <= info_full.max_bytes - wallaby_staging::log::RESERVE_BYTES, "{info_full:?}");
    assert!(!filling.is_finished());
    // A reader takes what is there, and the log is purged behind it, until everything is through.
    let mut reader = flow.shared_reader(Start::FirstResume);
    while reader.state().end < Some(at(61)) {
        let next = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap().unwrap();
        flow.log.purge(next.to, Duration::ZERO, SystemTime::now()).await.unwrap();
    }
    filling.await.unwrap();
    eventually(PATIENCE, "no wait is left", async || match *waiting.borrow() {
        None => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    // A full log still takes a successor's fence and resume.
    flow.end().await;
}

/// Takes over with a sync policy, and appends in the background until the log is full, and waits.
async fn full(flow: &Flow, sync: SyncPolicy) -> (Arc<LogWriter>, tokio::task::JoinHandle<()>) {
    let wary = WriterOptions { sync, ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), Nonce::random(), wary).await.unwrap();
    let writer = Arc::new(takeover.resume(at(1), info(false)).await.unwrap());
    let filling = Arc::clone(&writer);
    let filling = tokio::spawn(async move {
        let mut n = 1;
        while filling.append(segment(n, n + 1, 500_000)).await.is_ok() {
            n += 1;
        }
    });
    is_full(&writer).await;
    (writer, filling)
}

/// Waits until the log is full and nothing is on its way.
async fn is_full(writer: &LogWriter) {
    let waiting = writer.waiting();
    eventually(PATIENCE, "the writer waits for room", async || match *waiting.borrow() {
        Some(waiting) if waiting.what == Wait::Full => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

/// Nothing is on its way that could be overdue: whoever is cut off from its log hears it from nothing but the question for room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_is_cut_off_from_a_full_log_says_so_until_it_is_answered() {
    let scope = wallaby_testkit::NatsScope::one_node("full").await;
    let flow = Flow::on(&scope.url(), 1, wallaby_staging::log::MAX_BYTES_LEAST).await;
    let wire = Wire::to(&scope.url()).await;
    let cut_off = Flow { log: flow.over(&wire.url()).await, url: wire.url(), cache: Arc::default() };
    let (writer, filling) = full(&cut_off, SyncPolicy::Always).await;
    let (waiting, acked) = (writer.waiting(), writer.acked());
    eventually(PATIENCE, "all that was sent is acknowledged", async || {
        let (end, acked) = (flow.log.tail().await.unwrap().end, acked.borrow().position);
        if end == Some(acked) { Ok(()) } else { Err(format!("{acked:?} of {end:?}")) }
    })
    .await;
    is_full(&writer).await;
    let full_since = waiting.borrow().unwrap().since;
    wire.hold(Held::Requests);
    // Longer than several questions take: it is one wait, and whoever watches it can lose patience.
    let cut_off_for = Duration::from_secs(6);
    eventually(PATIENCE, "it says that it is cut off", async || match *waiting.borrow() {
        Some(waiting) if waiting.what == Wait::Unreachable && waiting.since.elapsed() > cut_off_for => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    wire.hold(Held::Nothing);
    is_full(&writer).await;
    assert_eq!(waiting.borrow().unwrap().since, full_since, "it was full all the time");
    filling.abort();
    flow.end().await;
}

/// Postgres keeps its WAL while the log is full: it is told of what is durable all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_full_log_acknowledged_is_confirmed_while_it_stays_full() {
    let scope = wallaby_testkit::NatsScope::three_nodes("full").await;
    let flow = Flow::on(&scope.url(), 3, wallaby_staging::log::MAX_BYTES_LEAST).await;
    let (writer, filling) = full(&flow, SyncPolicy::Interval(Duration::from_millis(500))).await;
    let (acked, durable) = (writer.acked(), writer.durable());
    eventually(PATIENCE, "everything that was acknowledged is durable", async || {
        let (acked, durable) = (acked.borrow().position, *durable.borrow());
        if at(durable.0) == acked { Ok(()) } else { Err(format!("{durable} of {acked}")) }
    })
    .await;
    let waiting = *writer.waiting().borrow();
    assert!(waiting.is_some_and(|waiting| waiting.what == Wait::Full), "{waiting:?}");
    filling.abort();
    flow.end().await;
}

/// What is known of the servers is learned anew now and then; a full log takes no command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_confirms_by_what_is_known_of_the_servers_now() {
    let scope = wallaby_testkit::NatsScope::three_nodes("full").await;
    let flow = Flow::on(&scope.url(), 3, wallaby_staging::log::MAX_BYTES_LEAST).await;
    let (writer, filling) = full(&flow, SyncPolicy::Unknown).await;
    assert_eq!(*writer.durable().borrow(), Lsn::ZERO, "nothing is known of the servers");
    let (acked, durable) = (writer.acked(), writer.durable());
    writer.sync().send_replace(SyncPolicy::Always);
    eventually(PATIENCE, "everything that was acknowledged is durable", async || {
        let (acked, durable) = (acked.borrow().position, *durable.borrow());
        if at(durable.0) == acked { Ok(()) } else { Err(format!("{durable} of {acked}")) }
    })
    .await;
    let waiting = *writer.waiting().borrow();
    assert!(waiting.is_some_and(|waiting| waiting.what == Wait::Full), "{waiting:?}");
    // Whoever can say more keeps no writer alive.
    let (sync, ended) = (writer.sync(), writer.durable());
    filling.abort();
    drop(writer);
    eventually(PATIENCE, "the writer is gone", async || ended.has_changed().map_or(Ok(()), |_| Err("it is there")))
        .await;
    drop(sync);
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_still_takes_a_successor_and_heartbeats() {
    let scope = wallaby_testkit::NatsScope::three_nodes("full").await;
    let flow = Flow::on(&scope.url(), 3, wallaby_staging::log::MAX_BYTES_LEAST).await;
    let writer = flow.owner(5).await.unwrap();
    let mut n = 1;
    while tokio::time::timeout(Duration::from_millis(700), writer.append(segment(n, n + 1, 500_000))).await.is_ok() {
        n += 1;
        assert!(n < 100);
    }
    drop(writer);
    let successor = owner(&flow.elsewhere().await, 6).await.unwrap();
    let end = end_of(&successor);
    successor.heartbeat(Lsn(end + 100)).await.unwrap();
    tokio::time::timeout(PATIENCE, successor.settled()).await.unwrap().unwrap();
    read_to(&mut flow.reader(Start::FirstResume), at(end + 100)).await;
    flow.end().await;
}

/// A server whose ingest buffer holds two messages answers 429 for some and accepts later ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_ingest_buffer_leaves_no_hole() {
    let folder = wallaby_testkit::Folder::temporary("ingest").unwrap();
    let store = folder.path().join("store");
    let extra = format!(
        "jetstream {{ store_dir: \"{}\", max_mem: 1GB, max_file: 4GB, max_buffered_msgs: 2, sync_interval: always }}\n",
        store.display()
    );
    let cluster = NatsOptions { nodes: 1, store_folders: vec![store], extra_config: extra, ..NatsOptions::default() };
    let cluster = NatsCluster::start(cluster).await.unwrap();
    let flow = Flow::on(&cluster.client_url(), 1, 256 << 20).await;
    let writer = flow.owner(5).await.unwrap();
    let id = flow.log.flow();
    let busy = || counted(&format!("wallaby_log_appends_refused_total{{flow={id},reason=busy}}"));
    let mut n = 1;
    while (busy() == 0 && n < 3000) || n < 300 {
        writer.append(segment(n, n + 1, 20_000)).await.unwrap();
        n += 1;
    }
    writer.settled().await.unwrap();
    assert!(busy() > 0, "the server refused nothing: the test shows nothing");
    read_to(&mut flow.reader(Start::FirstResume), at(n)).await;
}

/// Stops all servers, takes the stream's tail away, and starts them again: what a power cut leaves of a server that syncs late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_lost_tail_is_noticed_rewound_and_read_without_a_gap() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 1..=20 {
        writer.append(segment(n, n + 1, 100)).await.unwrap();
    }
    writer.settled().await.unwrap();
    let mut ahead = flow.shared_reader(Start::FirstResume);
    read_to(&mut ahead, at(21)).await;
    lose_tail(&flow, 8).await;
    // The owner that saw them acknowledged does not go on over the hole.
    let error = tokio::time::timeout(PATIENCE, async {
        writer.append(segment(21, 22, 100)).await.unwrap();
        writer.ended().await
    });
    let error = error.await.unwrap();
    assert!(matches!(error, StagingError::TailLost { acked, .. } if acked == at(21)), "{error}");
    // The next one is told by the claims, rewinds, and cuts it in other segments.
    let takeover = LogWriter::take_over(&flow.log, Epoch(6), wallaby_model::Nonce::random(), options()).await.unwrap();
    let end = takeover.tail().end.unwrap();
    assert!(end < at(21));
    let claims = wallaby_staging::TailClaims {
        log_end: Some(end),
        furthest_sink: Some(at(21)),
        confirmed: Some(at(5)),
        ..Default::default()
    };
    assert_eq!(judge_tail(&claims), TailVerdict::Rewind { end, claimed: at(21) });
    let was = takeover.tail().incarnation;
    let successor = takeover.resume(end, info(true)).await.unwrap();
    assert_ne!(Some(successor.incarnation()), was);
    let mut from = end_of(&successor);
    while from < 40 {
        successor.append(segment(from, from + 3, 100)).await.unwrap();
        from += 3;
    }
    successor.settled().await.unwrap();
    // The reader that had the lost tail trims; one that starts anew sees everything.
    read_to(&mut ahead, at(from)).await;
    read_to(&mut flow.reader(Start::FirstResume), at(from)).await;
    for position in [5, 12, 14, 20, 22] {
        let start = Start::At { position: at(position), epoch: Some(Epoch(5)), sequence_hint: Some(position + 2) };
        let accepted = read_to(&mut flow.reader(start), at(from)).await;
        assert_eq!(accepted[0].after, at(position));
    }
    flow.end().await;
}

/// Nobody knows that something was lost, so the log's life goes on. A reader of another worker does, and its cache has other records
/// under the sequences that come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_lost_tail_that_nobody_claims_leads_no_reader_round_and_round() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 1..=20 {
        writer.append(segment(n, n + 1, 100)).await.unwrap();
    }
    writer.settled().await.unwrap();
    let mut ahead = flow.shared_reader(Start::FirstResume);
    read_to(&mut ahead, at(21)).await;
    drop(writer);
    lose_tail(&flow, 8).await;
    let takeover = LogWriter::take_over(&flow.log, Epoch(6), wallaby_model::Nonce::random(), options()).await.unwrap();
    let (end, was) = (takeover.tail().end.unwrap(), takeover.tail().incarnation);
    assert!(end < at(21));
    let successor = takeover.resume(end, info(false)).await.unwrap();
    assert_eq!(Some(successor.incarnation()), was);
    let mut from = end_of(&successor);
    while from < 40 {
        successor.append(segment(from, from + 3, 100)).await.unwrap();
        from += 3;
    }
    successor.settled().await.unwrap();
    read_to(&mut ahead, at(from)).await;
    flow.end().await;
}

/// A consumer may live and deliver nothing, as one on a server whose copy of the log stands still: here the server is told to pause it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_delivers_nothing_of_what_the_log_has_is_left() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    writer.append(segment(1, 2, 100)).await.unwrap();
    let mut reader = flow.reader(Start::FirstResume);
    read_to(&mut reader, at(2)).await;
    let context = async_nats::jetstream::new(target_client(&flow.url).await);
    let stream = context.get_stream(flow.log.stream()).await.unwrap();
    let consumers: Vec<String> = stream.consumer_names().try_collect().await.unwrap();
    assert_eq!(consumers.len(), 1);
    let until = stream.cached_info().created + Duration::from_secs(3600);
    assert!(stream.pause_consumer(&consumers[0], until).await.unwrap().paused);
    writer.append(segment(2, 3, 100)).await.unwrap();
    read_to(&mut reader, at(3)).await;
    assert_eq!(counted(&format!("wallaby_log_copies_left_total{{flow={},reason=silent}}", flow.log.flow())), 1);
    flow.end().await;
}

/// The servers lose records, and one has them still in its copy of the log: what comes next takes their sequences at the others, and is
/// skipped there. A consumer on that server goes from what was lost to what came much later. Real servers come there in one of some
/// thirty power cuts; here the reader's consumers are on another server, with such a copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_follower_that_has_other_records_than_the_leader_makes_no_gap() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 1..=30 {
        writer.append(segment(n, n + 1, 100)).await.unwrap();
    }
    writer.settled().await.unwrap();
    drop(writer);
    let end = flow.log.info().await.unwrap().last_sequence;
    let before = messages(&flow, 1, end).await;
    lose_tail(&flow, 18).await;
    let takeover = LogWriter::take_over(&flow.log, Epoch(6), Nonce::random(), options()).await.unwrap();
    let writer = takeover.resume(at(13), info(true)).await.unwrap();
    let mut from = 13;
    while from < 200 {
        writer.append(segment(from, from + 3, 100)).await.unwrap();
        from += 3;
    }
    writer.settled().await.unwrap();

    let other = NatsCluster::start(NatsOptions::default()).await.unwrap();
    let follower = target_client(&other.client_url()).await;
    let context = async_nats::jetstream::new(follower.clone());
    let leader = flow.log.info().await.unwrap();
    let config = async_nats::jetstream::new(target_client(&flow.url).await).get_stream(flow.log.stream()).await;
    context.create_stream(config.unwrap().cached_info().config.clone()).await.unwrap();
    publish(&context, before).await;
    publish(&context, messages(&flow, end + 1, leader.last_sequence).await).await;

    let connections = Connections { publish: target_client(&flow.url).await, pull: follower };
    let log = Log::new(flow.log.flow().clone(), connections);
    // One that had read all that was lost, one a part of it, and one nothing.
    for position in [31, 20, 5] {
        let start = Start::At { position: at(position), epoch: Some(Epoch(5)), sequence_hint: None };
        read_to(&mut LogReader::new(&log, start, ReaderOptions::default()), at(from)).await;
    }
    assert_eq!(counted(&format!("wallaby_log_copies_left_total{{flow={},reason=gap}}", log.flow())), 3);
    flow.end().await;
}

/// Nothing was read that could be missed: the reader stood at the end of a log that has fences only, and the log ends before that now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h11_a_reader_that_waits_behind_the_end_of_a_log_that_lost_its_tail_searches_its_place() {
    let flow = Flow::on_one().await;
    for epoch in 2..=5 {
        LogWriter::take_over(&flow.log, Epoch(epoch), Nonce::random(), options()).await.unwrap();
    }
    let mut reader = flow.reader(Start::At { position: at(1), epoch: None, sequence_hint: None });
    eventually(PATIENCE, "it waits at the end", async || {
        let _silence = tokio::time::timeout(Duration::from_millis(200), reader.next()).await;
        if reader.next_sequence() == Some(5) { Ok(()) } else { Err(reader.next_sequence()) }
    })
    .await;
    lose_tail(&flow, 4).await;
    // Fence, resume and rows come before the fifth record.
    let writer = flow.owner(6).await.unwrap();
    writer.append(segment(1, 2, 100)).await.unwrap();
    writer.settled().await.unwrap();
    assert!(flow.log.info().await.unwrap().last_sequence < 5);
    read_to(&mut reader, at(2)).await;
    flow.end().await;
}

/// The newest `count` messages go, and their sequences come again: a copy of the stream without them takes its place.
async fn lose_tail(flow: &Flow, count: u64) {
    let context = async_nats::jetstream::new(target_client(&flow.url).await);
    let info = flow.log.info().await.unwrap();
    let kept = messages(flow, info.first_sequence, info.last_sequence - count).await;
    let config = context.get_stream(flow.log.stream()).await.unwrap().cached_info().config.clone();
    context.delete_stream(flow.log.stream()).await.unwrap();
    context.create_stream(config).await.unwrap();
    publish(&context, kept).await;
}

/// The messages of a log between two sequences, both included.
async fn messages(flow: &Flow, first: u64, last: u64) -> Vec<StreamMessage> {
    let context = async_nats::jetstream::new(target_client(&flow.url).await);
    let stream = context.get_stream(flow.log.stream()).await.unwrap();
    let mut messages = Vec::new();
    for sequence in first..=last {
        messages.push(stream.get_raw_message(sequence).await.unwrap());
    }
    messages
}

/// Puts messages into a stream, where they get the sequences that they had.
async fn publish(context: &async_nats::jetstream::Context, messages: Vec<StreamMessage>) {
    for message in messages {
        let ack = context
            .publish_with_headers(message.subject.clone(), without_server_headers(&message.headers), message.payload)
            .await;
        assert_eq!(ack.unwrap().await.unwrap().sequence, message.sequence);
    }
}

fn without_server_headers(headers: &async_nats::HeaderMap) -> async_nats::HeaderMap {
    let mut ours = async_nats::HeaderMap::new();
    for (name, values) in headers.iter().filter(|(name, _)| !name.to_string().starts_with("Nats-")) {
        ours.insert(name.clone(), values[0].clone());
    }
    ours
}

async fn target_client(url: &str) -> async_nats::Client {
    crate::support::target(url).connect("fault").await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_confirmation_waits_for_the_sync_interval_and_for_no_open_resync() {
    let flow = Flow::on_three().await;
    let interval = Duration::from_millis(500);
    let options = wallaby_staging::WriterOptions { sync: SyncPolicy::Interval(interval), ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), wallaby_model::Nonce::random(), options).await.unwrap();
    let writer = takeover.resume(at(1), info(false)).await.unwrap();
    let began = tokio::time::Instant::now();
    writer.append(segment(1, 50, 100)).await.unwrap();
    writer.settled().await.unwrap();
    assert_eq!(writer.durable().borrow().0, 0);
    let mut durable = writer.durable();
    tokio::time::timeout(PATIENCE, durable.wait_for(|lsn| lsn.0 == 50)).await.unwrap().unwrap();
    assert!(began.elapsed() >= 2 * interval + wallaby_staging::durability::MARGIN);
    flow.end().await;
}

/// The servers are started anew, and sync every write: not what they acknowledged before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_what_waits_for_a_long_sync_interval_is_not_confirmed_when_the_interval_becomes_short() {
    let flow = Flow::on_three().await;
    let long = SyncPolicy::Interval(Duration::from_secs(3600));
    let options = wallaby_staging::WriterOptions { sync: long, ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), wallaby_model::Nonce::random(), options).await.unwrap();
    let writer = takeover.resume(at(1), info(false)).await.unwrap();
    writer.append(segment(1, 50, 100)).await.unwrap();
    writer.settled().await.unwrap();
    writer.sync().send_replace(SyncPolicy::Always);
    writer.append(segment(50, 60, 100)).await.unwrap();
    // What is durable is said before this.
    writer.settled().await.unwrap();
    assert_eq!(*writer.durable().borrow(), Lsn::ZERO);
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_survives_its_connection_and_all_servers() {
    let cluster = own_cluster().await;
    let flow = Flow::on_own(&cluster, 256 << 20).await;
    let writer = flow.owner(5).await.unwrap();
    let mut reader = LogReader::new(&flow.log, Start::FirstResume, ReaderOptions::default());
    for round in 0..2 {
        let end = end_of(&writer);
        for n in end..end + 10 {
            writer.append(segment(n, n + 1, 100)).await.unwrap();
        }
        read_to(&mut reader, at(end + 10)).await;
        if round == 0 {
            cluster.kill9_all().await.unwrap();
            cluster.start_again().await.unwrap();
        }
    }
    assert_eq!(writer.close().await.unwrap().position, at(21));
}
