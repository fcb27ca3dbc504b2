//! One owner after another, and beside another.

use wallaby_model::{Epoch, Nonce, Record, RecordKind};
use wallaby_staging::{LogWriter, StagingError, Start, WriterOptions, record};

use crate::support::{Flow, at, end_of, info, options, owner, read_to, segment};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_appended_is_read_in_order_and_confirmed() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(5).await.unwrap();
    for n in 1..=200 {
        writer.append(segment(n, n + 1, 1000)).await.unwrap();
    }
    writer.heartbeat(wallaby_model::Lsn(300)).await.unwrap();
    writer.settled().await.unwrap();
    assert_eq!(writer.acked().borrow().position, at(300));
    assert_eq!(*writer.in_flight().borrow(), 0);
    assert_eq!(writer.durable().borrow().0, 300);
    let mut reader = flow.reader(Start::FirstResume);
    let accepted = read_to(&mut reader, at(300)).await;
    assert_eq!(accepted.len(), 202);
    assert_eq!(accepted[0].to, at(1));
    assert_eq!(accepted[200].complete_to, Some(at(201)));
    assert_eq!(flow.log.last_epoch().await.unwrap(), Some(Epoch(5)));
    let tail = flow.log.tail().await.unwrap();
    assert_eq!((tail.end, tail.complete_to, tail.epoch), (Some(at(300)), Some(at(300)), Some(Epoch(5))));
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h19_a_fence_lands_against_an_owner_that_pipelines_without_pause() {
    for round in 0..3 {
        let flow = Flow::on_three().await;
        let writer = flow.owner(5).await.unwrap();
        let pipelining = tokio::spawn(async move {
            loop {
                let end = end_of(&writer);
                if let Err(error) = writer.append(segment(end, end + 1, 20_000)).await {
                    return error;
                }
            }
        });
        wallaby_testkit::eventually(crate::support::PATIENCE, "appends", async || {
            let end = flow.log.tail().await.map_err(|error| error.to_string())?.end;
            if end > Some(at(50)) { Ok(()) } else { Err(format!("{end:?}")) }
        })
        .await;
        let elsewhere = flow.elsewhere().await;
        let successor = owner(&elsewhere, 6).await.unwrap();
        let zombie = tokio::time::timeout(crate::support::PATIENCE, pipelining).await.unwrap().unwrap();
        assert!(matches!(zombie, StagingError::Fenced { by: Epoch(6), .. }), "round {round}: {zombie}");
        let end = end_of(&successor);
        for n in end..end + 20 {
            successor.append(segment(n, n + 1, 1000)).await.unwrap();
        }
        successor.settled().await.unwrap();
        let mut reader = flow.reader(Start::FirstResume);
        read_to(&mut reader, at(end + 20)).await;
        assert_eq!(reader.state().epoch, Some(Epoch(6)));
        flow.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h19_of_two_owners_with_one_epoch_the_first_fence_wins() {
    let flow = Flow::on_three().await;
    let first = flow.owner(5).await.unwrap();
    first.append(segment(1, 2, 100)).await.unwrap();
    first.settled().await.unwrap();
    let elsewhere = flow.elsewhere().await;
    let error = LogWriter::take_over(&elsewhere, Epoch(5), Nonce::random(), options()).await.unwrap_err();
    assert!(matches!(error, StagingError::EpochTaken { .. }), "{error}");
    // The loser's fence broke the winner's chain: one resync later it goes on.
    for n in 2..=30 {
        first.append(segment(n, n + 1, 100)).await.unwrap();
    }
    first.settled().await.unwrap();
    read_to(&mut flow.reader(Start::FirstResume), at(31)).await;
    // Both fence at the same moment: exactly one owns the log.
    for epoch in 6..10 {
        let one = LogWriter::take_over(&flow.log, Epoch(epoch), Nonce::random(), options());
        let other = LogWriter::take_over(&elsewhere, Epoch(epoch), Nonce::random(), options());
        let (one, other) = tokio::join!(one, other);
        assert!(one.is_ok() != other.is_ok(), "epoch {epoch}: {:?} {:?}", one.err(), other.err());
        let winner = one.or(other).unwrap();
        let end = winner.tail().end.unwrap();
        let winner = winner.resume(end, info(false)).await.unwrap();
        let end = end_of(&winner);
        winner.append(segment(end, end + 1, 100)).await.unwrap();
        winner.settled().await.unwrap();
    }
    read_to(&mut flow.reader(Start::FirstResume), at(35)).await;
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_epoch_gives_up_and_harms_nobody() {
    let flow = Flow::on_three().await;
    let writer = flow.owner(7).await.unwrap();
    writer.append(segment(1, 2, 100)).await.unwrap();
    let error = owner(&flow.elsewhere().await, 6).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, StagingError::Fenced { by: Epoch(7), .. }), "{error}");
    writer.append(segment(2, 3, 100)).await.unwrap();
    writer.settled().await.unwrap();
    read_to(&mut flow.reader(Start::FirstResume), at(3)).await;
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_owner_hears_of_its_successor() {
    let flow = Flow::on_three().await;
    let soon = WriterOptions { tail_check_interval: std::time::Duration::from_millis(100), ..options() };
    let takeover = LogWriter::take_over(&flow.log, Epoch(5), Nonce::random(), soon).await.unwrap();
    let idle = takeover.resume(at(1), info(false)).await.unwrap();
    let _successor = owner(&flow.elsewhere().await, 6).await.unwrap();
    let error = tokio::time::timeout(crate::support::PATIENCE, idle.ended()).await.unwrap();
    assert!(matches!(error, StagingError::Fenced { by: Epoch(6), .. }), "{error}");
    flow.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_do_not_continue_the_log_are_refused() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(1).await.unwrap();
    writer.append(segment(1, 5, 100)).await.unwrap();
    for (from, to) in [(4, 6), (6, 7), (5, 5)] {
        let error = writer.append(segment(from, to, 100)).await.unwrap_err();
        assert!(matches!(error, StagingError::NotContinuing { .. }), "{error}");
    }
    // As large as the servers take, and one byte more.
    let max = flow.log.body_bytes_max();
    writer.append(segment(5, 6, max)).await.unwrap();
    let error = writer.append(segment(6, 7, max + 1)).await.unwrap_err();
    assert!(matches!(error, StagingError::TooLarge { .. }), "{error}");
    // Old news.
    writer.heartbeat(wallaby_model::Lsn(6)).await.unwrap();
    assert_eq!(writer.close().await.unwrap().position, at(6));
    let accepted = read_to(&mut flow.reader(Start::FirstResume), at(6)).await;
    assert_eq!(accepted.last().unwrap().staged.body.len(), max);
    let takeover = LogWriter::take_over(&flow.log, Epoch(2), Nonce::random(), options()).await.unwrap();
    let error = takeover.resume(at(9), info(false)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, StagingError::NotContinuing { .. }), "{error}");
    flow.end().await;
}

/// Whoever takes the log over and comes no further, because the source is away, tries again, for days.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tries_that_come_no_further_than_the_fence_hide_nothing() {
    let flow = Flow::on_one().await;
    let writer = flow.owner(5).await.unwrap();
    writer.append(segment(1, 2, 100)).await.unwrap();
    writer.settled().await.unwrap();
    drop(writer);
    // One owner: its fence stands, and is not put again.
    let nonce = Nonce::random();
    let before = flow.log.info().await.unwrap().last_sequence;
    for _ in 0..5 {
        let options = WriterOptions { may_stand: true, ..options() };
        let takeover = LogWriter::take_over(&flow.log, Epoch(6), nonce, options).await.unwrap();
        assert_eq!(takeover.tail().end, Some(at(2)));
    }
    assert_eq!(flow.log.info().await.unwrap().last_sequence, before + 1);
    // One that had appended: only a new fence keeps out what is still on its way.
    LogWriter::take_over(&flow.log, Epoch(6), nonce, options()).await.unwrap();
    assert_eq!(flow.log.info().await.unwrap().last_sequence, before + 2);
    // Many owners: more fences than records are looked at.
    let context = async_nats::jetstream::new(flow.log.connections().publish.clone());
    let mut landed = Vec::new();
    for epoch in 7..4200 {
        let kind = RecordKind::Fence { nonce: Nonce::random() };
        let headers = record::encode(&Record { flow: flow.log.flow().clone(), epoch: Epoch(epoch), kind }, None);
        let subject = flow.log.fence_subject().to_owned();
        landed.push(context.publish_with_headers(subject, headers, "".into()).await.unwrap());
        if landed.len() == 100 {
            for one in landed.drain(..) {
                one.await.unwrap();
            }
        }
    }
    for one in landed {
        one.await.unwrap();
    }
    let tail = flow.log.tail().await.unwrap();
    assert_eq!((tail.end, tail.epoch), (Some(at(2)), Some(Epoch(4199))));
    flow.end().await;
}
