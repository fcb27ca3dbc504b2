//! What is known of when the servers sync. It is asked at the takeover, when the side store is first needed, whenever the log has another
//! leader or connection, and again and again: servers are started with other settings, those of the log and of the side store change, and
//! one that was silent may say it now.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;
use wallaby_staging::{Log, Shelf, SideStore, StagingError, SyncPolicy, SyncReport, SyncSource, sync_policy_with};

/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_secs(60);
/// The same while a server does not say it: Postgres is told of what is staged minutes later.
const ASK_SILENT_EVERY: Duration = Duration::from_secs(10);

/// Asks the servers that hold the log, and those that hold the large transactions once there is a shelf for them: a splice is durable
/// only when its parts are.
pub async fn ask(log: &Log, side: &dyn SideStore, source: &SyncSource) -> Result<SyncReport, StagingError> {
    let info = log.info().await?;
    let holders = side.holders(Shelf::Transactions).await?;
    Ok(sync_policy_with(&info, &holders, source).await)
}

/// Tells a log's writer what is known of the servers.
pub struct Syncing {
    log: Log,
    side: Arc<dyn SideStore>,
    source: SyncSource,
    known: watch::Sender<SyncPolicy>,
    /// One asks at a time: an answer from before the shelf was made must not come after one that counts the shelf's servers.
    turn: Mutex<()>,
}

impl Syncing {
    /// For the writer whose [`wallaby_staging::LogWriter::sync`] is `known`.
    pub fn new(log: Log, side: Arc<dyn SideStore>, source: SyncSource, known: watch::Sender<SyncPolicy>) -> Syncing {
        Syncing { log, side, source, known, turn: Mutex::new(()) }
    }

    /// Whether a server does not say when it syncs: Postgres is told minutes later then.
    pub fn is_unknown(&self) -> bool {
        *self.known.borrow() == SyncPolicy::Unknown
    }

    /// Asks now.
    ///
    /// # Errors
    /// When it is not said who holds the log or the side store: what was known stays.
    pub async fn learn(&self) -> Result<(), StagingError> {
        let _turn = self.turn.lock().await;
        let report = ask(&self.log, self.side.as_ref(), &self.source).await?;
        let policy = report.policy;
        let is_new = self.known.send_if_modified(|known| std::mem::replace(known, policy) != policy);
        if is_new {
            tracing::info!(flow = %self.log.flow(), ?policy, silent = ?report.silent(), "when the log's servers sync");
        } else {
            tracing::debug!(flow = %self.log.flow(), ?report, "when the log's servers sync, as before");
        }
        Ok(())
    }

    /// Asks now and then, and when the log has moved ([`wallaby_staging::LogWriter::moves`]), until dropped.
    pub fn start(self: &Arc<Self>, mut moves: watch::Receiver<u64>) -> AbortOnDropHandle<()> {
        let syncing = Arc::clone(self);
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                moves.mark_unchanged();
                let learned = syncing.learn().await;
                if let Err(error) = &learned {
                    tracing::debug!(flow = %syncing.log.flow(), %error, "it was not learned when the log's servers sync");
                }
                // Where nobody can be asked, nobody is silent.
                let is_silent = learned.is_err() || syncing.is_unknown();
                let is_asked = !matches!(syncing.source, SyncSource::Unknown);
                tokio::select! {
                    () = tokio::time::sleep(if is_silent && is_asked { ASK_SILENT_EVERY } else { ASK_EVERY }) => {}
                    Ok(()) = moves.changed() => {}
                }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_model::FlowId;
    use wallaby_model::flow::Replicas;
    use wallaby_staging::{Connections, JetStreamSide, LogConfig, NatsTarget, Quotas};
    use wallaby_testkit::{Held, NatsScope, Wire, eventually};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(40);

    /// A log with one copy, and a side store of which there is nothing yet.
    async fn stores(nats: &NatsScope<'_>, number: u32) -> (Log, Arc<dyn SideStore>) {
        let servers = nats.url().split(',').map(str::to_owned).collect();
        let target = NatsTarget { servers, name: "sync".to_owned(), ..NatsTarget::default() };
        let connections = Connections::open(&target).await.unwrap();
        let flow = FlowId::new(format!("{}-{number}", nats.prefix().replace('_', "-"))).unwrap();
        let log = Log::new(flow.clone(), connections.clone());
        log.ensure(&LogConfig { replicas: Replicas::Exactly(1), max_bytes: 32 << 20 }).await.unwrap();
        let quotas = Quotas { transactions: 1 << 20, chunks: 1 << 20 };
        (log, Arc::new(JetStreamSide::new(flow, connections, Replicas::Exactly(1), quotas)))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_the_servers_of_the_side_store_count_beside_those_of_the_log() {
        let nats = NatsScope::three_nodes("sync").await;
        // Where the servers put a copy is up to them.
        for number in 0..50 {
            let (log, side) = stores(&nats, number).await;
            let at = nats.cluster().leader_of_stream(log.stream()).await.unwrap();
            let source = SyncSource::Monitoring(vec![nats.cluster().monitoring_urls()[at].clone()]);
            let alone = ask(&log, side.as_ref(), &source).await.unwrap().policy;
            assert_ne!(alone, SyncPolicy::Unknown, "the log's own server says it");
            side.ensure(Shelf::Transactions).await.unwrap();
            let holders = side.holders(Shelf::Transactions).await.unwrap();
            let with_side = ask(&log, side.as_ref(), &source).await.unwrap();
            let is_apart = holders != log.info().await.unwrap().servers;
            log.delete().await.unwrap();
            side.remove().await.unwrap();
            if is_apart {
                assert_eq!(with_side.policy, SyncPolicy::Unknown, "{holders:?} cannot be asked");
                assert_eq!(with_side.silent(), holders);
                return;
            }
            assert_eq!(with_side.policy, alone);
        }
        panic!("log and side store always stood on one server: the test shows nothing");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_known_of_the_servers_is_learned_anew() {
        let nats = NatsScope::one_node("sync").await;
        let (log, side) = stores(&nats, 0).await;
        let wire = Wire::to(&nats.cluster().monitoring_urls()[0]).await;
        let source = SyncSource::Monitoring(vec![wire.url().replace("nats://", "http://")]);
        let said = ask(&log, side.as_ref(), &source).await.unwrap().policy;
        assert_ne!(said, SyncPolicy::Unknown);
        wire.hold(Held::Answers);
        let (known, moves) = (watch::Sender::new(said), watch::Sender::new(0));
        let syncing = Arc::new(Syncing::new(log, side, source, known.clone()));
        let _asking = syncing.start(moves.subscribe());
        let is = async |wanted| {
            eventually(PATIENCE, "it is learned", async || {
                let known = *known.borrow();
                if known == wanted { Ok(()) } else { Err(format!("{known:?}")) }
            })
            .await;
        };
        is(SyncPolicy::Unknown).await;
        wire.hold(Held::Nothing);
        is(said).await;
        // It is a minute until it is asked by itself.
        let before = SyncPolicy::Interval(Duration::from_secs(3600));
        known.send_replace(before);
        moves.send_replace(1);
        is(said).await;
    }
}
