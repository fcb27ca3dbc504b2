//! Checkpoints off the per-batch path.

use std::time::Duration;

use wallaby_coordination::{Error, Key, Mark};
use wallaby_testkit::eventually;

use crate::setup::*;

fn mark(lsn: u64) -> Mark {
    Mark { position: at(lsn), stream: None, seq_hint: None }
}

#[tokio::test]
async fn of_ten_thousand_marks_two_are_written() {
    let (_scope, coordination) = shared("paced").await;
    let (flow, task) = shop(&coordination).await;
    let session = worker(&coordination, "w1", lease(10, true)).await;
    let lock = take(&session, &task, flow.revision).await;
    lock.fix_epoch(None).await.unwrap();
    let checkpoint = async || coordination.get(&Key::TaskCheckpoint(task.clone())).await.unwrap().unwrap();
    let fixed = checkpoint().await.mod_revision;

    let writer = lock.checkpoint_writer(Duration::from_secs(600));
    writer.note(mark(1));
    let first = eventually(PATIENCE, "the first is written", async || {
        let now = checkpoint().await;
        if now.mod_revision > fixed { Ok(now) } else { Err(now) }
    })
    .await;
    for lsn in 2..=10_000 {
        writer.note(mark(lsn));
    }
    writer.flush().await.unwrap();
    let last = checkpoint().await;
    assert_eq!(coordination.checkpoint(&task).await.unwrap().unwrap().position, Some(at(10_000)));
    assert_eq!(last.mod_revision.0, first.mod_revision.0 + 1, "one write for all the others");
    writer.flush().await.unwrap();
    assert_eq!(checkpoint().await.mod_revision, last.mod_revision, "nothing new, nothing written");

    // A change of state does not wait for the interval.
    writer.note_now(mark(10_001));
    eventually(PATIENCE, "it is written", async || {
        let now = coordination.checkpoint(&task).await.unwrap().unwrap().position;
        if now == Some(at(10_001)) { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(writer.latest(), Some(mark(10_001)));

    // A writer whose lock is lost says so, and writes no more.
    coordination.remove_flow(&flow).await.unwrap();
    writer.note(mark(10_002));
    assert!(matches!(writer.flush().await, Err(Error::Refused { .. })));
    assert!(matches!(writer.flush().await, Err(Error::Refused { .. })));
    assert_eq!(coordination.checkpoint(&task).await.unwrap(), None);
}
