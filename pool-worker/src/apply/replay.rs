//! Tables that catch up: the log is replayed for them by a second reader, over a session of its own, beside the main stream.
//!
//! The replay never passes the main stream. When it stands where the main stream stood a second ago, it asks the main stream to
//! stop: where that stands then is P. The replay goes on to P exactly, and one transaction of the sink makes the tables ready at P: from
//! there on their rows are the main stream's. Until then the main stream leaves them out, so no change is applied twice, and none
//! is missed (hazard 8).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span};
use wallaby_connector_api::{Batch, Sink, SinkError, TableLoads};
use wallaby_model::run::TableStage;
use wallaby_model::{Epoch, Position, RunId};
use wallaby_staging::{SideStore, Start};

use super::ApplyError;
use super::portions::LogPortions;
use super::stream::{self, LogStream};
use super::tables::Replay;
use crate::failpoint::Failpoint;
use crate::pulse::Pulse;
use crate::spans;
use crate::task::TaskContext;

/// A replay that is no further behind asks for the hand-over.
const BEHIND_MAX: Duration = Duration::from_secs(1);
/// How often a replay that finds no rows moves its mark, and looks where the main stream stands.
const MOVE_EVERY: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A request so often is withdrawn no more.
const REQUESTS_MAX: u64 = 3;
/// The sink's answer is waited for this long.
const PATIENCE: Duration = Duration::from_secs(300);

/// Where the main stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Main {
    /// What the sink has of it.
    pub at: Position,
    /// The number of the request for which it stays there; 0 when it goes on. Only while that request stands can it be relied upon: of one
    /// that was withdrawn, the main stream may hear at any time.
    pub held_for: u64,
}

/// A replay under way; ends when dropped.
pub struct CatchUp {
    run: RunId,
    main: watch::Sender<Main>,
    /// The number of the replay's request that the main stream stops; 0 for none.
    asks: watch::Receiver<u64>,
    task: AbortOnDropHandle<Result<(), ApplyError>>,
}

impl CatchUp {
    /// Starts it, with an unopened sink of its own.
    pub fn start(
        context: &Arc<TaskContext>,
        mut sink: Box<dyn Sink>,
        side: Arc<dyn SideStore>,
        replay: Replay,
        at: Position,
    ) -> CatchUp {
        let of_run = replay.run;
        let (main, followed) = watch::channel(Main { at, held_for: 0 });
        let (asking, asks) = watch::channel(0);
        let context = Arc::clone(context);
        let task = tokio::spawn(async move {
            let outcome = run(&context, sink.as_mut(), side, replay, followed, asking).await;
            sink.close().await;
            outcome
        });
        CatchUp { run: of_run, main, asks, task: AbortOnDropHandle::new(task) }
    }

    /// The run whose tables catch up.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Says where the main stream stands.
    pub fn follow(&self, at: Position) {
        self.main.send_if_modified(|main| {
            let is_news = main.at != at;
            main.at = at;
            is_news
        });
    }

    /// Whether the main stream has to stop where it stands; the replay is told that it did, or that it goes on.
    pub fn holds(&self) -> bool {
        let asks = *self.asks.borrow();
        self.main.send_if_modified(|main| std::mem::replace(&mut main.held_for, asks) != asks);
        asks != 0
    }

    /// Returns when the tables are ready (`true`), or when the main stream has to stop, or may go on, and does not know it yet. Cancel-safe.
    ///
    /// # Errors
    /// What ended the replay.
    pub async fn ended_or_asks(&mut self) -> Result<bool, ApplyError> {
        let (mut asks, known) = (self.asks.clone(), self.main.borrow().held_for);
        let asked = async {
            while *asks.borrow_and_update() == known {
                if asks.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            ended = &mut self.task => match ended {
                Ok(outcome) => outcome.map(|()| true),
                Err(error) => Err(SinkError::Transient(format!("the replay's code failed: {error}")).into()),
            },
            () = asked => Ok(false),
        }
    }
}

async fn run(
    context: &TaskContext,
    sink: &mut dyn Sink,
    side: Arc<dyn SideStore>,
    replay: Replay,
    mut main: watch::Receiver<Main>,
    asks: watch::Sender<u64>,
) -> Result<(), ApplyError> {
    let Some(epoch) = context.lock.epoch() else { return Err(ApplyError::Invalid) };
    sink.open(epoch).await?;
    let capabilities = sink.capabilities();
    let start = Start::At { position: replay.from, epoch: None, sequence_hint: None };
    let feed = stream::feed(context, start).await?;
    let filter = Arc::new(replay.filter);
    let mut log = LogStream::new(feed, replay.from, Epoch::default());
    let mut behind = Behind::default();
    // The request that stands, and how many there were.
    let (mut asked, mut requests) = (0, 0);
    let mut moved_at = Instant::now();
    let large = stream::buffer_bytes(context) / 2;
    loop {
        let stands = *main.borrow_and_update();
        behind.saw(Instant::now(), stands.at);
        let at = log.assembler.at();
        if asked != 0 && stands.held_for == asked && at == stands.at {
            check(context)?;
            context.stop_at(Failpoint::StopBeforeHandOver).await;
            answered(loads(sink)?.mark(&replay.tables, TableStage::Ready, at)).await?;
            context.stop_at(Failpoint::StopAfterHandOver).await;
            tracing::info!(task = %context.task, run = %replay.run, position = %at, tables = replay.tables.len(), "tables were handed over");
            return Ok(());
        }
        // A main stream that is further back than the chunks were read has to come here first: held there, it never would.
        if asked == 0 && at <= stands.at && behind.is_within(Instant::now(), at) {
            requests += 1;
            asked = requests;
            asks.send_replace(asked);
        }
        log.fill(capabilities.batch_bytes_max, capabilities.batch_rows_max)?;
        let next_large = log.assembler.large_next(large).filter(|_| at < stands.at);
        if next_large.is_some_and(|commit| commit < stands.at.commit) {
            check(context)?;
            // The main stream had it since it was asked, or is at it just now: it is not to wait as long again. But large ones that come
            // one after the other would keep the tables away for ever.
            if asked != 0 && requests < REQUESTS_MAX {
                asked = 0;
                asks.send_replace(0);
            }
            let pulse = Pulse::default();
            let span = spans::replay(context, at, log.assembler.piece_made_in().into_iter());
            let (side, filter) = (Arc::clone(&side), Some(Arc::clone(&filter)));
            let mut portions = LogPortions::new(&mut log, side, filter, Some(stands.at), &pulse, span.clone());
            let outcome = loads(sink)?.replay_large(&replay.tables, at, &mut portions).instrument(span).await;
            let to = portions.finish(outcome)?;
            log.applied(to);
            moved_at = Instant::now();
            continue;
        }
        let batch = match next_large {
            // The main stream stands right before it: it could not apply it, say. A piece of it is not to be taken, its end does not come with it;
            // and the main stream, when it is held, is waited for by nobody but us.
            Some(_) => Some(log.assembler.nothing_up_to(stands.at)),
            None => log.assembler.batch(capabilities.batch_bytes_max, Some(stands.at), Some(&filter)),
        };
        match batch.filter(|batch| is_worth(batch, stands, moved_at) || log.assembler.held_bytes() >= large) {
            Some(batch) => {
                check(context)?;
                let span = match batch.parts.is_empty() {
                    true => Span::none(),
                    false => spans::replay(context, at, log.assembler.made_in(batch.to)),
                };
                let answer = answered(loads(sink)?.replay(&replay.tables, &batch)).instrument(span.clone()).await;
                if let Err(error) = &answer {
                    wallaby_telemetry::failed(&span, error);
                }
                answer?;
                spans::committed(&span, batch.to, batch.rows() as u64);
                crate::metrics::replayed(&context.task, batch.rows());
                log.applied(batch.to);
                moved_at = Instant::now();
            }
            None => {
                log.release_permits(large);
                tokio::select! {
                    changed = main.changed() => if changed.is_err() { return Err(ApplyError::Invalid) },
                    read = log.read() => read?,
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
        }
    }
}

fn loads(sink: &mut dyn Sink) -> Result<&mut dyn TableLoads, ApplyError> {
    sink.loads().ok_or(ApplyError::Invalid)
}

fn check(context: &TaskContext) -> Result<(), ApplyError> {
    if context.is_valid_now() { Ok(()) } else { Err(ApplyError::Invalid) }
}

async fn answered(answer: impl Future<Output = Result<(), SinkError>>) -> Result<(), ApplyError> {
    let answer = tokio::time::timeout(PATIENCE, answer).await;
    Ok(answer.map_err(|_| ApplyError::Silent(PATIENCE.as_secs()))??)
}

fn is_worth(batch: &Batch, main: Main, moved_at: Instant) -> bool {
    main.held_for != 0 || moved_at.elapsed() >= MOVE_EVERY || batch.rows() > 0
}

/// How far the replay is behind the main stream, in time: by when that stood where the replay stands.
#[derive(Debug, Default)]
struct Behind {
    seen: VecDeque<(Instant, Position)>,
}

impl Behind {
    fn saw(&mut self, now: Instant, main: Position) {
        if self.seen.back().is_none_or(|(_, last)| *last != main) {
            self.seen.push_back((now, main));
        }
        // One from before the bound stays: where it stood at the bound.
        while self.seen.get(1).is_some_and(|(when, _)| now.saturating_duration_since(*when) >= BEHIND_MAX) {
            self.seen.pop_front();
        }
    }

    fn is_within(&self, now: Instant, at: Position) -> bool {
        let (when, main) = match self.seen.front() {
            Some(oldest) => *oldest,
            None => return false,
        };
        now.saturating_duration_since(when) >= BEHIND_MAX && at >= main
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::Lsn;

    #[tokio::test]
    async fn the_main_stream_goes_on_when_the_replay_does_not_ask_any_more() {
        let position = |lsn| Position::before(Lsn(lsn));
        let (main, followed) = watch::channel(Main { at: position(10), held_for: 0 });
        let (asking, asks) = watch::channel(0);
        let task = AbortOnDropHandle::new(tokio::spawn(std::future::pending()));
        let mut replay = CatchUp { run: RunId(1), main, asks, task };
        assert!(!replay.holds());
        for (request, at) in [(1, 20), (2, 30)] {
            asking.send_replace(request);
            assert!(!replay.ended_or_asks().await.unwrap(), "it asks");
            assert!(replay.holds());
            assert_eq!(*followed.borrow(), Main { at: position(at - 10), held_for: request });
            // Nothing is to be done until it withdraws.
            assert!(futures::poll!(std::pin::pin!(replay.ended_or_asks())).is_pending());
            asking.send_replace(0);
            assert!(!replay.ended_or_asks().await.unwrap(), "it withdraws");
            assert!(!replay.holds());
            replay.follow(position(at));
            assert_eq!(*followed.borrow(), Main { at: position(at), held_for: 0 });
        }
    }

    #[test]
    fn a_replay_asks_once_it_stands_where_the_main_stream_stood_a_second_ago() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let position = |lsn| Position::before(Lsn(lsn));
        let mut behind = Behind::default();
        behind.saw(at(0), position(10));
        assert!(!behind.is_within(at(10), position(10)), "nothing is known of a second ago");
        behind.saw(at(600), position(20));
        assert!(behind.is_within(at(1000), position(10)));
        behind.saw(at(1700), position(30));
        assert!(!behind.is_within(at(1700), position(10)));
        assert!(behind.is_within(at(1700), position(20)));
    }
}
