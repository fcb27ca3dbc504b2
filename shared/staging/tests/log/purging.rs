//! The purge beside readers that begin (hazard 10): what one of them asks is stopped before each of its questions in turn, and the other
//! one does all it has to do meanwhile. A reader that stands at the purge point or past it starts; one that stands before it starts
//! or is refused; none of them sees a hole.

use std::time::{Duration, SystemTime};

use wallaby_model::{Codec, Epoch, Nonce, Record, RecordKind};
use wallaby_staging::record::{self, Link};
use wallaby_staging::{Accepted, Log, LogReader, LogWriter, ReaderOptions, StagingError, Start};

use crate::gate::{ANY, CREATE, Gate, PULL};
use crate::support::{Flow, at, end_of, info, owner, read_to, segment, target, try_read_to};

/// What one owner appends, and a stretch of the log, which is two owners'.
const SHARE: u64 = 30;
const STRETCH: u64 = 2 * SHARE;

/// Appends a stretch: two owners, three segments of ten positions each. Returns where it begins, and who wrote last.
async fn stretch(flow: &Flow, epoch: &mut u64) -> (u64, LogWriter) {
    let mut begin = None;
    loop {
        *epoch += 1;
        let writer = flow.owner(*epoch).await.unwrap();
        let from = end_of(&writer);
        for n in 0..3 {
            writer.append(segment(from + 10 * n, from + 10 * (n + 1), 100)).await.unwrap();
        }
        writer.settled().await.unwrap();
        match begin {
            None => begin = Some(from),
            Some(begin) => return (begin, writer),
        }
    }
}

fn start(position: u64) -> Start {
    Start::At { position: at(position), epoch: None, sequence_hint: None }
}

async fn purge(log: &Log, up_to: u64) {
    log.purge(at(up_to), Duration::ZERO, SystemTime::now()).await.unwrap();
}

/// Reads to `to`, or is refused where it stands.
async fn starts_or_is_refused(reader: &mut LogReader, to: u64) -> Result<Vec<Accepted>, ()> {
    let stands = reader.state().end;
    match try_read_to(reader, at(to)).await {
        Ok(accepted) => {
            assert_eq!(accepted.first().map(|first| first.after), stands.or(Some(at(1))), "it began somewhere else");
            Ok(accepted)
        }
        Err(StagingError::PastHold { position, begins, .. }) => {
            assert_eq!(position, reader.state().end, "it is told of a place where it does not stand");
            assert!(begins > position, "it stands at {position:?} and was refused by a log that begins at {begins:?}");
            Err(())
        }
        Err(error) => panic!("a reader at {stands:?} was stopped, not refused: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_purge_between_any_two_questions_of_a_reader_that_begins() {
    let flow = Flow::on_one().await;
    let gate = Gate::to(&flow.url).await;
    let log = flow.over(&gate.url()).await;
    let mut epoch = 4;
    // The purge goes to the middle of a segment, and to the end of one. Before the second owner's share everything may go.
    for (stands, purged_to) in [(15, 45), (SHARE, 45), (45, 45), (45, 50), (50, 50), (55, 45)] {
        let (mut stops, mut refused) = (0, 0);
        let mut is_over = false;
        while !is_over {
            let (begin, _writer) = stretch(&flow, &mut epoch).await;
            gate.stop_after(ANY, stops);
            let mut reader = LogReader::new(&log, start(begin + stands), ReaderOptions::default());
            let reading = tokio::spawn(async move {
                let outcome = starts_or_is_refused(&mut reader, begin + STRETCH).await;
                // Its consumer goes with it, which is one question more.
                drop(reader);
                outcome
            });
            tokio::pin!(reading);
            let outcome = tokio::select! {
                outcome = &mut reading => {
                    is_over = true;
                    outcome
                }
                () = gate.held() => {
                    purge(&flow.log, begin + purged_to).await;
                    gate.let_go();
                    reading.await
                }
            };
            gate.let_go();
            match outcome.unwrap() {
                Ok(_) => {}
                Err(()) if stands < SHARE => refused += 1,
                Err(()) => {
                    panic!("a reader at {stands} was refused for a purge to {purged_to} before question {stops}")
                }
            }
            stops += 1;
        }
        assert!(stops > 6, "only {stops} questions were asked");
        assert!(stands >= SHARE || (0 < refused && refused < stops), "{refused} of {stops} refused");
    }
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_reader_under_which_the_log_goes_is_refused_and_sees_no_hole() {
    // What comes first after the purge: rows of one chain, or, in a log that is idle, an owner's resume and nothing else.
    for is_idle in [false, true] {
        for (subject, passing, sequence_hint) in
            [(CREATE, 0, None), (CREATE, 0, Some(3)), (PULL, 0, None), (PULL, 1, None), (PULL, 1, Some(3))]
        {
            let flow = Flow::on_one().await;
            let writer = flow.owner(5).await.unwrap();
            for n in 0..100 {
                writer.append(segment(1 + 10 * n, 11 + 10 * n, 100)).await.unwrap();
            }
            writer.settled().await.unwrap();
            let gate = Gate::to(&flow.url).await;
            gate.stop_after(subject, passing);
            let start = Start::At { position: at(15), epoch: Some(Epoch(5)), sequence_hint };
            let mut reader = LogReader::new(&flow.over(&gate.url()).await, start, ReaderOptions::default());
            let reading = tokio::spawn(async move { starts_or_is_refused(&mut reader, 1001).await });
            gate.held().await;
            if is_idle {
                drop(writer);
                let _successor = flow.owner(6).await.unwrap();
                purge(&flow.log, 1001).await;
                assert_eq!(flow.log.info().await.unwrap().messages, 1);
            } else {
                purge(&flow.log, 805).await;
            }
            gate.let_go();
            assert!(reading.await.unwrap().is_err(), "{subject}: what it needed was gone");
            flow.end().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_reader_that_begins_between_any_two_steps_of_the_purge() {
    let flow = Flow::on_one().await;
    let gate = Gate::to(&flow.url).await;
    let log = flow.over(&gate.url()).await;
    let mut epoch = 4;
    // The last one empties a log that is idle.
    for purged_to in [45, 50, STRETCH] {
        let mut steps = 0;
        let mut is_over = false;
        while !is_over {
            let (begin, writer) = stretch(&flow, &mut epoch).await;
            drop(writer);
            let hold = begin + purged_to;
            gate.stop_after(ANY, steps);
            let log = log.clone();
            let purging = tokio::spawn(async move { purge(&log, hold).await });
            tokio::pin!(purging);
            tokio::select! {
                purged = &mut purging => {
                    is_over = true;
                    purged.unwrap();
                }
                () = gate.held() => {
                    // It finds its place now; and an owner comes, in whose records the reader goes on.
                    let mut registered = flow.reader(start(hold));
                    read_to(&mut registered, at(begin + STRETCH)).await;
                    epoch += 1;
                    let successor = owner(&flow.log, epoch).await.unwrap();
                    assert_eq!(end_of(&successor), begin + STRETCH, "the log's end is known");
                    // More than one: the newest record is not the one that the reader needs next.
                    for n in 0..2 {
                        let from = begin + STRETCH + 5 * n;
                        successor.append(segment(from, from + 5, 100)).await.unwrap();
                    }
                    successor.settled().await.unwrap();
                    gate.let_go();
                    purging.await.unwrap();
                    read_to(&mut registered, at(begin + STRETCH + 10)).await;
                }
            }
            gate.let_go();
            let end = flow.log.tail().await.unwrap().end.unwrap();
            assert_eq!(end, at(begin + STRETCH + if is_over { 0 } else { 10 }), "the log's end is known");
            read_to(&mut flow.reader(start(hold)), end).await;
            steps += 1;
        }
        assert!(steps > 4, "only {steps} questions were asked");
    }
    flow.end().await;
}

/// A fence made a hole in a chain: the append behind it stands in the log, and its owner appended it again. What stands before it tells a
/// reader so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_purge_up_to_an_orphan_leaves_what_tells_that_it_is_one() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 0..3 {
        writer.append(segment(1 + 10 * n, 11 + 10 * n, 100)).await.unwrap();
    }
    writer.settled().await.unwrap();
    let incarnation = writer.incarnation();
    let link = last_link(&flow).await;
    drop(writer);
    let context = async_nats::jetstream::new(target(&flow.url).connect("orphan").await.unwrap());
    let publish = async |epoch, kind, link: Option<Link>| {
        let record = Record { flow: flow.log.flow().clone(), epoch: Epoch(epoch), kind };
        let mut headers = record::encode(&record, link.map(|_| incarnation));
        link.inspect(|link| record::set_link(&mut headers, *link));
        let subject = if link.is_some() { flow.log.data_subject() } else { flow.log.fence_subject() };
        context.publish_with_headers(subject.to_owned(), headers, "".into()).await.unwrap().await.unwrap();
    };
    let data =
        |from, to| RecordKind::Data { from: at(from), to: at(to), complete_to: at(to), rows: 10, codec: Codec::None };
    publish(4, RecordKind::Fence { nonce: Nonce::random() }, None).await;
    publish(5, data(41, 51), Some(link.next().next())).await;
    let again = Link::first();
    publish(5, data(31, 41), Some(again)).await;
    publish(5, data(41, 51), Some(again.next())).await;
    assert_eq!(flow.log.tail().await.unwrap().end, Some(at(51)));
    for hold in [31, 35, 41] {
        purge(&flow.log, hold).await;
        read_to(&mut flow.reader(start(hold)), at(51)).await;
        assert_eq!(flow.log.tail().await.unwrap().end, Some(at(51)));
    }
    flow.end().await;
}

async fn last_link(flow: &Flow) -> Link {
    let context = async_nats::jetstream::new(target(&flow.url).connect("look").await.unwrap());
    let stream = context.get_stream(flow.log.stream()).await.unwrap();
    let message = stream.get_last_raw_message_by_subject(flow.log.data_subject()).await.unwrap();
    let staged = record::decode(&message.headers, message.payload, message.sequence, flow.log.flow()).unwrap();
    staged.link.unwrap()
}

/// A reader that wants the flow's first resume is not given a later one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_reader_that_wants_the_first_resume_is_refused_when_it_was_purged() {
    // With every owner's chain there is a resume that a purge can leave in front.
    for (subject, passing) in [("", 0), (CREATE, 0), (PULL, 0), (PULL, 1)] {
        let flow = Flow::on_one().await;
        let mut epoch = 4;
        let (begin, _writer) = stretch(&flow, &mut epoch).await;
        let gate = Gate::to(&flow.url).await;
        let mut reader = LogReader::new(&flow.over(&gate.url()).await, Start::FirstResume, ReaderOptions::default());
        if subject.is_empty() {
            purge(&flow.log, begin + 45).await;
            assert!(starts_or_is_refused(&mut reader, begin + STRETCH).await.is_err(), "it began at a later resume");
            continue;
        }
        gate.stop_after(subject, passing);
        let reading = tokio::spawn(async move { starts_or_is_refused(&mut reader, begin + STRETCH).await });
        gate.held().await;
        purge(&flow.log, begin + 45).await;
        gate.let_go();
        assert!(reading.await.unwrap().is_err(), "{subject}: it began at a later resume");
        flow.end().await;
    }
    // Without a purge it is given, also behind fences of owners that came no further.
    let flow = Flow::on_one().await;
    let tried = LogWriter::take_over(&flow.log, Epoch(4), Nonce::random(), crate::support::options()).await.unwrap();
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), Nonce::random(), crate::support::options()).await.unwrap();
    drop(tried);
    let _writer = takeover.resume(at(7), info(false)).await.unwrap();
    let accepted = tokio::time::timeout(crate::support::PATIENCE, flow.reader(Start::FirstResume).next()).await;
    assert_eq!(accepted.unwrap().unwrap().to, at(7));
    flow.end().await;
}
