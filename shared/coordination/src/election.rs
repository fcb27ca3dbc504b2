//! Which controller replica schedules. For efficiency only: two that both think so do no harm.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::client::encode;
use crate::keys::Key;
use crate::lease::Lease;
use crate::session::SessionOptions;
use crate::watch::{Change, WatchEvent};
use crate::{Coordination, Error, Result};

const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// A controller replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Unique per start.
    pub id: String,
    /// Where its API is served.
    pub address: String,
}

/// Who schedules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leadership {
    /// This replica.
    Leader,
    /// Another one, or nobody known.
    Follower(Option<Candidate>),
}

/// A standing candidacy. Ends when dropped (the lease then runs out) or resigned.
#[derive(Debug)]
pub struct Election {
    state: watch::Receiver<Leadership>,
    resign: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Coordination {
    /// Stands for leader until dropped: wins when there is none, waits for the leader's end otherwise, and starts anew when
    /// its own lease is lost.
    pub fn campaign(&self, candidate: Candidate, ttl: Duration) -> Election {
        let (sender, state) = watch::channel(Leadership::Follower(None));
        let resign = CancellationToken::new();
        let campaign = Campaign { coordination: self.clone(), candidate, ttl, sender, resign: resign.clone() };
        Election { state, resign, task: AbortOnDropHandle::new(tokio::spawn(campaign.run())) }
    }
}

impl Election {
    /// Who schedules, as far as this replica knows.
    pub fn current(&self) -> Leadership {
        self.state.borrow().clone()
    }

    /// Whether this replica does.
    pub fn is_leader(&self) -> bool {
        *self.state.borrow() == Leadership::Leader
    }

    /// A receiver of every change.
    pub fn changes(&self) -> watch::Receiver<Leadership> {
        self.state.clone()
    }

    /// Steps back: another replica takes over at once.
    pub async fn resign(self) {
        self.resign.cancel();
        // Aborted or panicked, the lease ends by itself.
        let _ended = self.task.await;
    }
}

struct Campaign {
    coordination: Coordination,
    candidate: Candidate,
    ttl: Duration,
    sender: watch::Sender<Leadership>,
    resign: CancellationToken,
}

impl Campaign {
    async fn run(self) {
        while !self.resign.is_cancelled() {
            if let Err(error) = self.one_lease().await {
                tracing::debug!(%error, "standing for leader failed, trying again");
            }
            self.sender.send_replace(Leadership::Follower(None));
            tokio::select! {
                () = self.resign.cancelled() => {}
                () = tokio::time::sleep(RETRY_PAUSE) => {}
            }
        }
    }

    /// Stands under one lease until it ends.
    async fn one_lease(&self) -> Result<()> {
        let target = self.coordination.target();
        let requests = self.coordination.requests().clone();
        let holder = format!("controller {}", self.candidate.id);
        let options = SessionOptions { ttl: self.ttl, ..SessionOptions::default() };
        let lease = Lease::grant(target, requests, holder, options).await?;
        let fence = lease.validity().fence().clone();
        let outcome = tokio::select! {
            () = self.resign.cancelled() => Ok(()),
            () = fence.cancelled() => Err(Error::LeaseLost {
                holder: format!("controller {}", self.candidate.id),
                cause: "no keepalive was answered in time, or etcd ended it".to_owned(),
            }),
            ended = self.stand(&lease) => ended,
        };
        self.sender.send_replace(Leadership::Follower(None));
        lease.revoke().await?;
        outcome
    }

    /// Tries for the key each time that it is free.
    async fn stand(&self, lease: &Lease) -> Result<()> {
        let key = self.coordination.keys().text(&Key::ControllerLeader);
        let mut watch = self.coordination.watch(key);
        loop {
            let leader = self.try_for_key(lease).await?;
            let state = if leader == self.candidate { Leadership::Leader } else { Leadership::Follower(Some(leader)) };
            self.sender.send_replace(state);
            // Until the key goes, whoever holds it. A snapshot, too, may hide that it did.
            loop {
                let Some(event) = watch.next().await else { return Ok(()) };
                let is_gone = |change: &Change| matches!(change, Change::Deleted { key: Key::ControllerLeader, .. });
                match event {
                    WatchEvent::Changes(changes) if !changes.iter().any(is_gone) => {}
                    _ => break,
                }
            }
        }
    }

    /// Puts our name into the free key, or says whose name is there.
    async fn try_for_key(&self, lease: &Lease) -> Result<Candidate> {
        let key = self.coordination.keys().text(&Key::ControllerLeader);
        let value = encode(&key, &self.candidate)?;
        let put = TxnOp::put(key.clone(), value, Some(PutOptions::new().with_lease(lease.id())));
        let txn = Txn::new()
            .when(vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then(vec![put])
            .or_else(vec![TxnOp::get(key, None)]);
        let outcome = self.coordination.transact("standing for leader", txn).await?;
        match outcome.read(0) {
            Some(entry) if !outcome.succeeded => entry.decode(),
            _ => Ok(self.candidate.clone()),
        }
    }
}
