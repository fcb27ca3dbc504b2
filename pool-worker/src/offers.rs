//! Pulls offers: one at a time, only with free capacity. An offer is never a lease.

use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, AckKind, Message};
use futures::StreamExt;
use wallaby_model::PoolId;
use wallaby_model::offer::{OFFER_CONSUMER, OFFER_PULL_BATCH, Offer, offer_stream};

/// How long one pull waits for an offer.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The queue of one pool. Finds its stream again whenever it went away.
pub struct Offers {
    context: jetstream::Context,
    pool: PoolId,
    consumer: Option<PullConsumer>,
}

/// An offer that was pulled and not yet acknowledged.
pub struct Pulled {
    message: Message,
    /// The offer; `None` when the message is no offer of this version.
    pub offer: Option<Offer>,
}

impl Pulled {
    /// Acknowledges and waits for the server's word. One that does not come is no error: the lock decides.
    pub async fn settle(self) {
        let settled = tokio::time::timeout(ANSWER_TIMEOUT, self.message.double_ack()).await;
        if !matches!(settled, Ok(Ok(()))) {
            tracing::debug!("an offer's acknowledgement was not answered");
        }
    }

    /// Gives the offer back: this worker cannot take it now.
    pub async fn give_back(self) {
        if let Err(error) = self.message.ack_with(AckKind::Nak(Some(Duration::from_millis(500)))).await {
            tracing::debug!(%error, "an offer was not given back; it is delivered again after its wait");
        }
    }
}

impl Offers {
    /// The queue of `pool`.
    pub fn new(client: async_nats::Client, pool: PoolId) -> Offers {
        let mut context = jetstream::new(client);
        context.set_timeout(ANSWER_TIMEOUT);
        Offers { context, pool, consumer: None }
    }

    /// The next offer; `None` when none came for a while. Cancel-safe: an offer that is dropped is delivered again.
    ///
    /// # Errors
    /// What the servers said; the next call starts afresh.
    pub async fn next(&mut self) -> Result<Option<Pulled>, String> {
        let outcome = self.pull().await;
        if outcome.is_err() {
            self.consumer = None;
        }
        outcome
    }

    async fn pull(&mut self) -> Result<Option<Pulled>, String> {
        let consumer = match self.consumer.take() {
            Some(consumer) => consumer,
            None => self.find().await?,
        };
        let fetch = consumer.fetch().max_messages(OFFER_PULL_BATCH).expires(PULL_EXPIRES);
        let messages = tokio::time::timeout(ANSWER_TIMEOUT, fetch.messages()).await;
        let mut messages =
            messages.map_err(|_| "no answer to a pull".to_owned())?.map_err(|error| error.to_string())?;
        // The server ends a pull that expired; without its word the pull is given up a little later.
        let first = tokio::time::timeout(PULL_EXPIRES + ANSWER_TIMEOUT, messages.next()).await;
        let pulled = match first {
            Ok(Some(Ok(message))) => {
                let offer = Offer::from_bytes(&message.payload).ok();
                Some(Pulled { message, offer })
            }
            Ok(Some(Err(error))) => return Err(error.to_string()),
            Ok(None) => None,
            Err(_) => return Err("a pull was not ended by the server".to_owned()),
        };
        self.consumer = Some(consumer);
        Ok(pulled)
    }

    async fn find(&self) -> Result<PullConsumer, String> {
        let name = offer_stream(&self.pool);
        let stream = self.context.get_stream(&name).await.map_err(|error| {
            format!("the queue {name} is not there ({error}): it is made by the controller of pool {}", self.pool)
        })?;
        stream.get_consumer(OFFER_CONSUMER).await.map_err(|error| format!("the consumer of {name}: {error}"))
    }
}
