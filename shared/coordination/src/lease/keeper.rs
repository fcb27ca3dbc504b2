//! The shell around the lease core: grants, keeps alive on streams that it reopens after every failure, fences.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{LeaseKeepAliveStream, LeaseKeeper};
use tokio::runtime::{Handle, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::core::{FenceReason, LeaseCore, Step};
use crate::clock::BootTime;
use crate::error::{Failure, tonic_code};
use crate::link::{Link, Purpose, Target};
use crate::session::SessionOptions;
use crate::{Error, Result, metrics};

/// The longest between two looks at the clock: timers run on CLOCK_MONOTONIC, which stops with the machine.
const CLOCK_TICK_MAX: Duration = Duration::from_millis(100);
/// How long revoking is tried; the lease ends by itself otherwise.
const REVOKE_PATIENCE: Duration = Duration::from_secs(3);
/// How often a process shows that its tasks have turns; small against the time after which it counts as stalled.
const TURN_EVERY: Duration = Duration::from_secs(1);
const FOR_EVER: u64 = u64::MAX;

/// Leases are kept alive on a thread of their own. Among the tasks of a process they would wait for every one of them that computes: a row
/// of 200 MB that is hashed, packed and copied keeps a thread for longer than a short lease lasts where CPU time is scarce, the worker loses
/// its lease over it, begins again with the same row, and never comes further.
static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("lease").enable_all().build()
});

/// A cheap look at whether this process may still act under its lease. Clones look at the same lease.
#[derive(Clone, Debug)]
pub struct Validity {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Nanoseconds of CLOCK_BOOTTIME; 0 once fenced, `FOR_EVER` without self-fencing. Mirrors the core's `valid_until`.
    valid_until_nanos: AtomicU64,
    core: Mutex<LeaseCore>,
    fence: CancellationToken,
}

impl Validity {
    /// Whether a write may be started now: one read of CLOCK_BOOTTIME, tens of nanoseconds. Ask before every publish, every
    /// feedback and every commit.
    pub fn is_valid_now(&self) -> bool {
        let until = self.shared.valid_until_nanos.load(Ordering::Acquire);
        until == FOR_EVER || BootTime::now().as_nanos() < until
    }

    /// Until when writes may be started, as far as is known now. `None` without self-fencing.
    pub fn deadline(&self) -> Option<BootTime> {
        self.shared.core().valid_until()
    }

    /// Cancelled once nothing may be done any more. [`Validity::is_valid_now`] is false at or before that moment.
    pub fn fence(&self) -> &CancellationToken {
        &self.shared.fence
    }

    /// Why, once fenced.
    pub fn fence_reason(&self) -> Option<FenceReason> {
        self.shared.core().check(BootTime::now())
    }
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, LeaseCore> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the core and lets everybody see the outcome.
    fn update<T>(&self, change: impl FnOnce(&mut LeaseCore) -> T) -> T {
        let mut core = self.core();
        let out = change(&mut core);
        let until = core.valid_until().map_or(FOR_EVER, BootTime::as_nanos);
        self.valid_until_nanos.store(until, Ordering::Release);
        out
    }

    /// Ends the lease for this process, once.
    fn fence(&self, reason: FenceReason, holder: &str) {
        if self.fence.is_cancelled() {
            return;
        }
        match reason {
            FenceReason::Deadline => {
                metrics::self_fenced();
                tracing::warn!(%holder, "no keepalive was answered in time: stopping all tasks before the lease can have run out");
            }
            FenceReason::LeaseGone => {
                metrics::lease_lost();
                tracing::warn!(%holder, "etcd says that the lease is gone: stopping all tasks");
            }
            FenceReason::Stalled => {
                metrics::self_fenced();
                tracing::warn!(%holder, "this process gives its tasks no turn: giving the lease up, so that others can go on");
            }
            FenceReason::Revoked => tracing::debug!(%holder, "lease given up"),
        }
        self.fence.cancel();
    }
}

/// A lease that is kept alive until it is revoked, lost, or dropped (then it runs out by itself).
#[derive(Debug)]
pub(crate) struct Lease {
    id: i64,
    ttl: Duration,
    holder: String,
    validity: Validity,
    requests: Arc<Link>,
    _keeper: AbortOnDropHandle<()>,
    _clock: AbortOnDropHandle<()>,
    _turns: AbortOnDropHandle<()>,
}

impl Lease {
    /// Asks for a lease and keeps it alive. `options.ttl` is taken in whole seconds; etcd may give more (it has a least of its own).
    pub(crate) async fn grant(
        target: &Target,
        requests: Arc<Link>,
        holder: String,
        options: SessionOptions,
    ) -> Result<Lease> {
        let SessionOptions { ttl, self_fencing, second_runtime } = options;
        let own_thread = RUNTIME.as_ref().map_err(|error| Error::Refused {
            doing: "granting a lease",
            cause: format!("no thread can be had to keep it alive on: {error}"),
        })?;
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let request = |client: etcd_client::Client| async move {
            let sent = BootTime::now();
            let granted = client.lease_client().grant(seconds, None).await?;
            Ok((sent, granted))
        };
        // An earlier attempt that was done after all leaves a lease without keys, which runs out by itself.
        let (sent, granted) = requests.call("granting a lease", request).await?.value;
        let ttl = Duration::from_secs(u64::try_from(granted.ttl()).unwrap_or(0));
        if granted.id() == 0 || ttl.is_zero() {
            return Err(Error::Refused { doing: "granting a lease", cause: granted.error().to_owned() });
        }
        let shared = Arc::new(Shared {
            valid_until_nanos: AtomicU64::new(0),
            core: Mutex::new(LeaseCore::granted(sent, ttl, self_fencing)),
            fence: CancellationToken::new(),
        });
        shared.update(|_| ());
        let keeper =
            Keeper { target: target.clone(), id: granted.id(), holder: holder.clone(), shared: shared.clone() };
        let keeper = AbortOnDropHandle::new(own_thread.spawn(keeper.run()));
        let clock = AbortOnDropHandle::new(own_thread.spawn(watch_clock(shared.clone(), holder.clone())));
        let turns = AbortOnDropHandle::new(tokio::spawn(show_turns(shared.clone(), second_runtime)));
        let validity = Validity { shared };
        let id = granted.id();
        Ok(Lease { id, ttl, holder, validity, requests, _keeper: keeper, _clock: clock, _turns: turns })
    }

    pub(crate) fn id(&self) -> i64 {
        self.id
    }

    /// As etcd granted it.
    pub(crate) fn ttl(&self) -> Duration {
        self.ttl
    }

    pub(crate) fn validity(&self) -> &Validity {
        &self.validity
    }

    /// Gives the lease up: fenced first, then revoked, which deletes its keys at once.
    pub(crate) async fn revoke(&self) -> Result<()> {
        let shared = &self.validity.shared;
        shared.update(|core| core.end(FenceReason::Revoked));
        shared.fence(FenceReason::Revoked, &self.holder);
        let id = self.id;
        let request = |client: etcd_client::Client| async move {
            match client.lease_client().revoke(id).await {
                Err(error) if tonic_code::of(&error) == Some(tonic_code::NOT_FOUND) => Ok(()),
                other => other.map(|_| ()),
            }
        };
        self.requests.call_for(REVOKE_PATIENCE, "revoking the lease", request).await.map(|_| ())
    }
}

/// Fences at the deadline, whatever the keeper is waiting for.
async fn watch_clock(shared: Arc<Shared>, holder: String) {
    loop {
        let now = BootTime::now();
        let (reason, until) = shared.update(|core| (core.check(now), core.valid_until()));
        if let Some(reason) = reason {
            shared.fence(reason, &holder);
            return;
        }
        let pause = until.map_or(CLOCK_TICK_MAX, |until| now.until(until).min(CLOCK_TICK_MAX));
        tokio::select! {
            () = shared.fence.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Runs among the tasks of the process, of both runtimes where there are two, and shows by it that they have turns.
async fn show_turns(shared: Arc<Shared>, second_runtime: Option<Handle>) {
    while !shared.fence.is_cancelled() {
        if let Some(second) = &second_runtime {
            // One that is shut down runs nobody's tasks any more.
            let _ = second.spawn(async {}).await;
        }
        shared.update(|core| core.turned(BootTime::now()));
        tokio::time::sleep(TURN_EVERY).await;
    }
}

type Stream = (LeaseKeeper, LeaseKeepAliveStream);

struct Keeper {
    target: Target,
    id: i64,
    holder: String,
    shared: Arc<Shared>,
}

impl Keeper {
    async fn run(self) {
        let mut link: Option<Link> = None;
        let mut stream: Option<Stream> = None;
        let mut generation = u64::from(rand::random::<u32>());
        loop {
            let step = self.shared.update(|core| core.step(BootTime::now()));
            let timeout = match step {
                Step::Fenced(reason) => return self.shared.fence(reason, &self.holder),
                Step::Wait(pause) => {
                    tokio::select! {
                        () = self.shared.fence.cancelled() => return,
                        () = tokio::time::sleep(pause.min(CLOCK_TICK_MAX)) => {}
                    }
                    continue;
                }
                Step::KeepAlive(timeout) => timeout,
            };
            let sent = BootTime::now();
            match tokio::time::timeout(timeout, self.keep_alive(&mut link, &mut stream, generation)).await {
                Ok(Ok(())) => {
                    let now = BootTime::now();
                    let until = self.shared.update(|core| {
                        core.answered(sent, now);
                        core.valid_until()
                    });
                    metrics::keepalive_answered(until.map_or(self_ttl_unknown(), |until| now.until(until)));
                }
                Ok(Err(Attempt::LeaseGone)) => {
                    self.shared.update(|core| core.end(FenceReason::LeaseGone));
                    if self.shared.update(|core| core.check(BootTime::now())).is_none() {
                        // Without self-fencing nobody stops for it; there is nothing left to keep alive either.
                        metrics::lease_lost();
                        return;
                    }
                }
                failed => {
                    metrics::keepalive_failed();
                    let cause =
                        if let Ok(Err(Attempt::Failed(cause))) = failed { cause } else { "no answer".to_owned() };
                    tracing::debug!(holder = %self.holder, %cause, "keepalive failed, opening a new stream");
                    // Streams do not heal [m], and the connection may be the reason: both are new for the next attempt, at the next
                    // endpoint. A few attempts are all there is before the deadline, and chance may send each of them to the one that is dead.
                    generation = link.as_ref().map_or(generation, |link| link.client().0).wrapping_add(1);
                    (link, stream) = (None, None);
                    self.shared.update(|core| core.failed(BootTime::now()));
                }
            }
        }
    }

    /// Sends one keepalive and waits for its answer. One at a time, so that an answer belongs to what was sent last.
    async fn keep_alive(
        &self,
        link: &mut Option<Link>,
        stream: &mut Option<Stream>,
        generation: u64,
    ) -> Result<(), Attempt> {
        if let Some((keeper, answers)) = stream {
            keeper.keep_alive().await?;
            let answer = answers.message().await?;
            let answer = answer.ok_or_else(|| Attempt::Failed("the stream ended".to_owned()))?;
            return if answer.ttl() > 0 { Ok(()) } else { Err(Attempt::LeaseGone) };
        }
        if link.is_none() {
            *link = Some(Link::open_at(&self.target, Purpose::Streams, generation).await?);
        }
        if let Some(link) = link {
            let (_, client) = link.client();
            // Opening sends the first keepalive and waits for its answer.
            *stream = Some(client.lease_client().keep_alive(self.id).await?);
        }
        Ok(())
    }
}

/// What the gauge shows without self-fencing, where there is no deadline.
fn self_ttl_unknown() -> Duration {
    Duration::ZERO
}

enum Attempt {
    LeaseGone,
    Failed(String),
}

impl From<etcd_client::Error> for Attempt {
    fn from(error: etcd_client::Error) -> Self {
        let text = tonic_code::text(&error);
        // How etcd-client names a TTL of 0 in the first answer.
        if text.contains("lease not found") { Attempt::LeaseGone } else { Attempt::Failed(text) }
    }
}

impl From<Failure> for Attempt {
    fn from(failure: Failure) -> Self {
        Attempt::Failed(failure.text())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use tokio::net::TcpListener;

    use super::*;
    use crate::options::Options;

    /// Members that accept and say nothing, as frozen ones do: before the deadline each of them was asked.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn attempts_go_from_member_to_member() {
        let (told, mut asked) = tokio::sync::mpsc::channel(16);
        let (mut endpoints, mut members) = (Vec::new(), Vec::new());
        for member in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            endpoints.push(format!("http://{}", listener.local_addr().unwrap()));
            let told = told.clone();
            members.push(AbortOnDropHandle::new(tokio::spawn(async move {
                let mut open = Vec::new();
                while let Ok((connection, _)) = listener.accept().await {
                    open.push(connection);
                    told.send(member).await.unwrap();
                }
            })));
        }
        let target = Target::new(&endpoints, Options::default()).unwrap();
        let core = LeaseCore::granted(BootTime::now(), Duration::from_secs(9), true);
        let (core, fence) = (Mutex::new(core), CancellationToken::new());
        let shared = Arc::new(Shared { valid_until_nanos: AtomicU64::new(0), core, fence });
        let keeper = Keeper { target, id: 7, holder: "a test".to_owned(), shared };
        keeper.run().await;
        let mut order = Vec::new();
        while let Ok(member) = asked.try_recv() {
            order.push(member);
        }
        assert!(order.len() >= 3, "{order:?}");
        let turns = order.windows(2).all(|pair| (pair[0] + 1) % 3 == pair[1]);
        assert!(turns, "{order:?}");
    }
}
