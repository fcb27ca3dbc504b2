//! The queue of offers: one JetStream work-queue stream for each pool, one message for each task at most.
//!
//! A subject that holds a message takes no second one, so the old offer is purged before a new one is published. Whether the
//! old one lies there unpulled, was pulled by a worker that died, or is past its deliveries makes no difference (hazard 18).

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{self, Context};
use wallaby_model::offer::{
    OFFER_ACK_WAIT, OFFER_CONSUMER, OFFER_MAX_ACK_PENDING, OFFER_MAX_AGE, OFFER_MAX_DELIVER, Offer, offer_stream,
    offer_subject, offer_subjects,
};
use wallaby_model::{PoolId, TaskId};

use crate::metrics;

/// How long one request to JetStream may take: short, because a leader change eats whole time-outs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two looks whether the queue delivers.
const DELIVERY_LOOK_EVERY: Duration = Duration::from_secs(5);

/// Copies of the queue where the cluster has that many servers.
const REPLICAS: usize = 3;

/// Bytes reserved for the offers of a pool: an offer takes about 200.
const MAX_BYTES: i64 = 16 << 20;

/// What went wrong with the queue. All of it is tried again.
#[derive(Debug, thiserror::Error)]
#[error("the queue of offers {stream}: {doing}: {cause}")]
pub struct QueueError {
    stream: String,
    doing: &'static str,
    cause: String,
}

/// The queue of one pool.
#[derive(Clone)]
pub struct OfferQueue {
    context: Context,
    stream: Option<Stream>,
    pool: PoolId,
}

impl OfferQueue {
    /// The queue of `pool`; no I/O.
    pub fn new(client: async_nats::Client, pool: PoolId) -> OfferQueue {
        let mut context = jetstream::new(client);
        context.set_timeout(REQUEST_TIMEOUT);
        OfferQueue { context, stream: None, pool }
    }

    /// Makes stream and consumer where they are missing, and gives the stream more copies once the cluster has room.
    ///
    /// # Errors
    /// When JetStream does not answer or refuses.
    pub async fn ensure(&mut self) -> Result<(), QueueError> {
        let name = offer_stream(&self.pool);
        let found = self.context.get_stream(&name).await;
        let mut stream = match found {
            Ok(stream) => stream,
            Err(_) => self.create().await?,
        };
        if stream.cached_info().config.num_replicas < REPLICAS {
            // Refused on a cluster with fewer servers, which is no error: one copy is then all there can be.
            match self.context.update_stream(self.config(REPLICAS)).await {
                Ok(_) => {
                    stream = self.context.get_stream(&name).await.map_err(|error| self.error("reading it", &error))?
                }
                Err(error) => tracing::debug!(stream = %name, %error, "the queue of offers stays with one copy"),
            }
        }
        // Creates or updates: a consumer of another version must not keep its limit of deliveries.
        let consumer = stream.create_consumer(consumer_config()).await;
        consumer.map_err(|error| self.error("making its consumer", &error))?;
        self.stream = Some(stream);
        Ok(())
    }

    async fn create(&self) -> Result<Stream, QueueError> {
        let wanted = self.context.create_stream(self.config(REPLICAS)).await;
        match wanted {
            Ok(stream) => Ok(stream),
            // Fewer servers than copies; or no answer, which the second request then shows as well.
            Err(_) => self.context.create_stream(self.config(1)).await.map_err(|error| self.error("making it", &error)),
        }
    }

    fn config(&self, replicas: usize) -> Config {
        Config {
            name: offer_stream(&self.pool),
            description: Some("WALlaby: tasks without an owner. Seconds long; ownership is in etcd".to_owned()),
            subjects: vec![offer_subjects(&self.pool)],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            num_replicas: replicas,
            max_messages_per_subject: 1,
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            max_age: OFFER_MAX_AGE,
            max_bytes: MAX_BYTES,
            ..Config::default()
        }
    }

    /// Offers a task, in the place of any older offer of it.
    ///
    /// # Errors
    /// When JetStream does not answer or refuses. Then the offer may or may not be there; either is harmless.
    pub async fn offer(&self, offer: &Offer) -> Result<(), QueueError> {
        self.purge(&offer.task).await?;
        let subject = offer_subject(&self.pool, &offer.task);
        let sent = self.context.publish(subject, offer.to_bytes().into()).await;
        let acked = sent.map_err(|error| self.error("publishing", &error))?.await;
        acked.map(drop).map_err(|error| self.error("publishing", &error))
    }

    /// Makes the consumer anew, maybe on another server, if the queue does not deliver: a consumer reads the copy of the queue on the server
    /// that leads it, and one that stands still delivers no offer. Whether it did. Takes seconds: it must show more than once.
    pub async fn renew_if_stuck(mut self) -> bool {
        let mut found = None;
        for look in 1.. {
            let Ok(Some(now)) = self.stuck().await else { return false };
            if found.is_some_and(|found| found != now) {
                return false;
            }
            found = Some(now);
            if look >= now.looks() {
                break;
            }
            tokio::time::sleep(DELIVERY_LOOK_EVERY).await;
        }
        let stream = offer_stream(&self.pool);
        tracing::warn!(%stream, ?found, "the queue of offers does not deliver: its consumer is made anew. A NATS server's copy of it may stand still");
        match self.renew_consumer().await {
            Ok(()) => metrics::queue_renewed(),
            Err(error) => tracing::warn!(%error, "the queue's consumer was not made anew; it is tried again"),
        }
        true
    }

    /// How the queue does not deliver at this moment. A moment of it is nothing.
    async fn stuck(&self) -> Result<Option<Stuck>, QueueError> {
        let Some(stream) = &self.stream else { return Ok(None) };
        let state = stream.get_info().await.map_err(|error| self.error("reading it", &error))?.state;
        // The queue itself answered.
        let Ok(consumer) = stream.consumer_info(OFFER_CONSUMER).await else { return Ok(Some(Stuck::Silent)) };
        let is_behind = state.messages > 0 && state.last_sequence > consumer.delivered.stream_sequence;
        let delivered = consumer.delivered.consumer_sequence;
        Ok((is_behind && consumer.num_waiting > 0).then_some(Stuck::Undelivered { delivered }))
    }

    /// Workers find the new one by themselves; what they had pulled is offered again.
    async fn renew_consumer(&mut self) -> Result<(), QueueError> {
        if let Some(stream) = &self.stream {
            let deleted = stream.delete_consumer(OFFER_CONSUMER).await;
            // Also where it is not there any more.
            deleted.inspect_err(|error| tracing::debug!(%error, "the queue's consumer was not deleted")).ok();
        }
        self.ensure().await
    }

    async fn purge(&self, task: &TaskId) -> Result<(), QueueError> {
        let Some(stream) = &self.stream else {
            return Err(self.error("purging", &"it was not made yet"));
        };
        let purged = stream.purge().filter(offer_subject(&self.pool, task)).await;
        purged.map(drop).map_err(|error| self.error("purging", &error))
    }

    fn error(&self, doing: &'static str, cause: &dyn std::fmt::Display) -> QueueError {
        QueueError { stream: offer_stream(&self.pool), doing, cause: cause.to_string() }
    }
}

/// How a queue does not deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stuck {
    /// Its consumer does not answer.
    Silent,
    /// Its consumer has delivered so many offers; others lie there, and workers wait.
    Undelivered { delivered: u64 },
}

impl Stuck {
    /// How often it is seen before it is believed. A consumer is silent for a while when its server goes away.
    fn looks(self) -> u32 {
        match self {
            Stuck::Silent => 5,
            Stuck::Undelivered { .. } => 2,
        }
    }
}

fn consumer_config() -> pull::Config {
    pull::Config {
        durable_name: Some(OFFER_CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: OFFER_ACK_WAIT,
        max_deliver: OFFER_MAX_DELIVER,
        max_ack_pending: OFFER_MAX_ACK_PENDING,
        ..pull::Config::default()
    }
}
