//! The offer: the message that says "this task has no owner", and the names and settings of the queue that carries it.
//!
//! It stands here because the controller writes offers and the workers pull them, and neither may depend on the other.
//! The queue carries offers for seconds; ownership is a lock in etcd. An offer is never a lease: a worker that pulls one
//! tries to acquire the lock, and acknowledges the offer whatever came of that.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{PoolId, TaskId};

/// The pool that controllers and workers belong to when nothing else is said.
pub const DEFAULT_POOL: &str = "default";

/// The durable pull consumer that all workers of a pool share.
pub const OFFER_CONSUMER: &str = "workers";

/// An offer nobody pulled goes away by itself. Cleans up behind a dead controller, nothing else relies on it.
pub const OFFER_MAX_AGE: Duration = Duration::from_secs(30);

/// A pulled offer that was not acknowledged is delivered again. Cleans up behind a dead worker.
pub const OFFER_ACK_WAIT: Duration = Duration::from_secs(15);

/// Without a limit: a message past its deliveries would stay in the stream and block its subject (hazard 18).
pub const OFFER_MAX_DELIVER: i64 = -1;

/// At least twice the number of workers a pool may have.
pub const OFFER_MAX_ACK_PENDING: i64 = 4096;

/// How often a task without an owner is offered again.
pub const OFFER_INTERVAL: Duration = Duration::from_secs(2);

/// The most offers one pull asks for: a worker takes one at a time, and only with free capacity.
pub const OFFER_PULL_BATCH: usize = 1;

/// The JetStream stream that holds the offers of a pool: `OFFERS_<pool>`.
pub fn offer_stream(pool: &PoolId) -> String {
    format!("OFFERS_{pool}")
}

/// All subjects of a pool's offers: `wallaby.offer.<pool>.>`.
pub fn offer_subjects(pool: &PoolId) -> String {
    format!("wallaby.offer.{pool}.>")
}

/// The subject of one task's offer: `wallaby.offer.<pool>.<task>`. A task id has dots, so this is more than one token.
pub fn offer_subject(pool: &PoolId, task: &TaskId) -> String {
    format!("wallaby.offer.{pool}.{task}")
}

/// The body of an offer, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The task without an owner.
    pub task: TaskId,
    /// The etcd mod revision of the flow's spec as the controller saw it. A worker reads the spec itself and acquires
    /// with the revision that *it* read; this one only tells an offer that is older than the worker's view.
    pub spec_revision: i64,
}

impl Offer {
    /// The message body.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A struct of two plain fields always serialises.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a message body.
    ///
    /// # Errors
    /// When it is not an offer of this version. Such a message is acknowledged and dropped.
    pub fn from_bytes(body: &[u8]) -> Result<Offer, OfferError> {
        serde_json::from_slice(body).map_err(|error| OfferError { column: error.column() })
    }
}

/// Why a message is not an offer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an offer: the JSON is wrong at byte {column}; it is dropped, and the controller offers the task again")]
pub struct OfferError {
    /// Where in the body.
    pub column: usize,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn an_offer_round_trips_and_names_its_subject() {
        let offer = Offer { task: "shop.apply.warehouse".parse().unwrap(), spec_revision: 42 };
        assert_eq!(Offer::from_bytes(&offer.to_bytes()).unwrap(), offer);
        let pool = PoolId::new(DEFAULT_POOL).unwrap();
        assert_eq!(offer_subject(&pool, &offer.task), "wallaby.offer.default.shop.apply.warehouse");
        assert_eq!(offer_stream(&pool), "OFFERS_default");
        assert!(Offer::from_bytes(b"{}").is_err());
    }
}
