//! Tells Postgres what is durable in the log: a loop of its own, so that it goes on while the capture loop waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::TaskLock;
use wallaby_model::Lsn;
use wallaby_postgres_source::{Feedback, SentNames};
use wallaby_staging::SideStore;

use super::splices::Unconfirmed;

/// When a splice could not be looked at, it is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// Starts the loop; it ends when dropped, when the log's writer ends, or when the lock is no longer ours.
pub fn start(
    feedback: Feedback,
    mut durable: watch::Receiver<Lsn>,
    lock: TaskLock,
    side: Arc<dyn SideStore>,
    unconfirmed: Unconfirmed,
    sent: SentNames,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let lsn = *durable.borrow_and_update();
            // A zombie confirms nothing: what it thinks is durable may have been staged by a successor, or not at all.
            let allowed = sent.allow(unconfirmed.allow(side.as_ref(), lsn).await);
            if allowed > Lsn::ZERO && lock.is_valid_now() {
                feedback.confirm(allowed);
            }
            tokio::select! {
                changed = durable.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if allowed < lsn => {}
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_coordination::{Acquired, Coordination, SessionOptions, WorkerInfo, WorkerSession, wall_clock_now};
    use wallaby_model::flow::Failover;
    use wallaby_model::{Attempt, Epoch, FlowId, Position, Splice, TaskId, Transaction, WorkerId};
    use wallaby_postgres_source::{
        Capture, CaptureOptions, ConnectConfig, PublicationWanted, SessionOwner, SlotWanted, connect_control,
        ensure_publication, ensure_slot,
    };
    use wallaby_staging::{ObjectSide, Quotas};
    use wallaby_testkit::{Database, EtcdScope, eventually};

    use super::*;
    use crate::capture::side::Kept;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A capture task's lock in a real etcd, and what ends it.
    async fn lock(etcd: &EtcdScope<'_>, name: &str) -> (WorkerSession, TaskLock) {
        let options = wallaby_coordination::Options {
            prefix: etcd.prefix().trim_end_matches('/').to_owned(),
            ..wallaby_coordination::Options::default()
        };
        let coordination = Coordination::connect(&etcd.endpoints(), options).await.unwrap();
        let text = format!(
            "apiVersion: wallaby/v1\nkind: Flow\nmetadata: {{ name: {name} }}\nspec:\n  source:\n    postgres:\n      \
             dsn: {{ env: SOURCE }}\n      publication: {{ tables: [public.t] }}\n      snapshot: never\n  sinks:\n    \
             - name: a\n      postgres: {{ dsn: {{ env: TARGET }} }}\n"
        );
        let flow = coordination.create_flow(wallaby_model::flow::parse(&text, "test").unwrap()).await.unwrap();
        let info = WorkerInfo {
            capacity: 1,
            load: 0,
            version: "0".to_owned(),
            zone: None,
            capabilities: Vec::new(),
            address: String::new(),
            draining: false,
            started_at: wall_clock_now(),
        };
        let lease = SessionOptions::default();
        let session = WorkerSession::start(&coordination, WorkerId::new("w1").unwrap(), info, lease).await.unwrap();
        match session.acquire(&TaskId::capture(&flow.flow), flow.revision).await.unwrap() {
            Acquired::Lock(lock) => (session, lock),
            other => panic!("{other:?}"),
        }
    }

    /// A slot that is streamed, and what confirms it.
    async fn streaming(source: &Database<'_>) -> (Capture, Feedback, Lsn) {
        let (config, name) = (ConnectConfig::parse(&source.dsn()).unwrap(), source.name());
        let control = connect_control(&config).await.unwrap();
        let tables = vec!["public.t".to_owned()];
        let publication = PublicationWanted { name: name.to_owned(), create: true, tables, exclude: Vec::new() };
        ensure_publication(&control, &publication).await.unwrap();
        let slot = SlotWanted { name: name.to_owned(), create: true, failover: Failover::Auto, timeout: PATIENCE };
        let begin = ensure_slot(&config, &control, &slot).await.unwrap().confirmed_flush;
        let owner = SessionOwner { prefix: format!("wallaby/{name}/"), epoch: Epoch(1) };
        let prepared = Capture::prepare(CaptureOptions::new(config, owner, name, name)).await.unwrap();
        let (capture, feedback) = prepared.start(Position::before(begin), None).await.unwrap();
        (capture, feedback, begin)
    }

    /// Real servers on both sides of the loop.
    struct Stand {
        source: Database<'static>,
        feedback: Feedback,
        begin: Lsn,
        session: WorkerSession,
        lock: TaskLock,
        side: Arc<dyn SideStore>,
        _held: (Capture, EtcdScope<'static>, tempfile::TempDir),
    }

    async fn stand() -> Stand {
        let (source, etcd) = (Database::create("feedback").await, EtcdScope::create("feedback").await);
        source.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
        let (capture, feedback, begin) = streaming(&source).await;
        source.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
        let name = source.name().replace('_', "-");
        let (session, lock) = lock(&etcd, &name).await;
        let folder = tempfile::tempdir().unwrap();
        let quotas = Quotas { transactions: 1 << 20, chunks: 1 << 20 };
        let side = Arc::new(ObjectSide::in_folder(folder.path(), FlowId::new(name).unwrap(), quotas).unwrap());
        Stand { source, feedback, begin, session, lock, side, _held: (capture, etcd, folder) }
    }

    impl Stand {
        async fn is_confirmed(&self, wanted: Lsn) {
            let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
            eventually(PATIENCE, "Postgres is told", async || {
                let row = self.source.query_one(sql, &[&self.source.name()]).await.unwrap();
                let told = row.get::<_, String>(0).parse::<Lsn>().unwrap();
                if told == wanted { Ok(()) } else { Err(told) }
            })
            .await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_what_is_durable_is_confirmed_while_the_lock_is_ours_and_never_after() {
        let stand = stand().await;
        let (feedback, lock, begin) = (stand.feedback.clone(), stand.lock.clone(), stand.begin.0);
        let durable = watch::Sender::new(Lsn::ZERO);
        let side = Arc::clone(&stand.side);
        let confirming =
            start(feedback.clone(), durable.subscribe(), lock, side, Unconfirmed::default(), SentNames::default());
        durable.send_replace(Lsn(begin + 8));
        stand.is_confirmed(Lsn(begin + 8)).await;
        // Another one may own the task now. What still becomes durable of ours is not ours to confirm.
        stand.session.revoke().await.unwrap();
        assert!(!stand.lock.is_valid_now());
        durable.send_replace(Lsn(begin + 16));
        drop(durable);
        // It ends once it has seen everything.
        tokio::time::timeout(PATIENCE, confirming).await.unwrap().unwrap();
        assert_eq!(feedback.confirmed(), Lsn(begin + 8));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h09_nothing_is_confirmed_past_a_splice_of_which_nothing_is_there() {
        let stand = stand().await;
        let (feedback, lock, begin) = (stand.feedback.clone(), stand.lock.clone(), stand.begin.0);
        let (commit, to) = (Lsn(begin + 8), Position::before(Lsn(begin + 16)));
        let transaction = Transaction { commit, xid: 7, committed_at_micros: 0 };
        let attempt = Attempt { epoch: Epoch(1), connection: 1, xid: 7 };
        let unconfirmed = Unconfirmed::default();
        unconfirmed.add(&Kept { splice: Splice { transaction, rows: 1, bytes: 1 }, attempt, to });
        let durable = watch::Sender::new(to.commit);
        let side = Arc::clone(&stand.side);
        let _confirming =
            start(feedback.clone(), durable.subscribe(), lock, side, unconfirmed.clone(), SentNames::default());
        stand.is_confirmed(commit).await;
        assert_eq!((feedback.confirmed(), unconfirmed.lost()), (commit, Some(commit)));
    }
}
