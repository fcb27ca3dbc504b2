//! Transactions that go on while rows are loaded: inserts, updates of rows that are there, deletes, at a steady rate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::connection::connect;
use crate::typ::{FIRST_ID, ROW};

/// What goes on.
#[derive(Debug, Clone)]
pub struct ChurnOptions {
    /// The database.
    pub dsn: String,
    /// Transactions a second, all connections together.
    pub per_second: u32,
    /// Rows that are there.
    pub rows: u64,
    /// Over how many connections.
    pub connections: u32,
    /// Decides what is done to which row.
    pub seed: u64,
}

/// The running transactions; they end when it is dropped.
#[derive(Debug)]
pub struct Churn {
    tasks: JoinSet<Result<(), Error>>,
    stop: CancellationToken,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicBool>,
}

impl Churn {
    /// Starts them.
    ///
    /// # Errors
    /// When a connection cannot be made.
    pub async fn start(options: ChurnOptions) -> Result<Churn, Error> {
        let (stop, done, failed) = (CancellationToken::new(), Arc::default(), Arc::default());
        let mut tasks = JoinSet::new();
        let connections = options.connections.max(1);
        for index in 0..connections {
            let client = connect(&options.dsn, "the source").await?;
            client.batch_execute("SET TimeZone = 'UTC'").await.map_err(Error::postgres("preparing a session"))?;
            let pause = Duration::from_secs_f64(f64::from(connections) / f64::from(options.per_second.max(1)));
            let writer = Writer {
                client,
                pause,
                rng: StdRng::seed_from_u64(options.seed ^ u64::from(index)),
                rows: options.rows,
                next: options.rows + u64::from(index),
                step: u64::from(connections),
                stop: stop.clone(),
                done: Arc::clone(&done),
            };
            let failed: Arc<AtomicBool> = Arc::clone(&failed);
            tasks.spawn(async move {
                let outcome = writer.run().await;
                failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
                outcome
            });
        }
        Ok(Churn { tasks, stop, done, failed })
    }

    /// Whether a writer gave up.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Transactions committed so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends them at transaction boundaries; the number of transactions.
    ///
    /// # Errors
    /// What made a writer give up.
    pub async fn stop(mut self) -> Result<u64, Error> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.map_err(|error| Error::Unusable(format!("a writer broke: {error}")))??;
        }
        Ok(self.done())
    }
}

struct Writer {
    client: Client,
    pause: Duration,
    rng: StdRng,
    rows: u64,
    next: u64,
    step: u64,
    stop: CancellationToken,
    done: Arc<AtomicU64>,
}

impl Writer {
    async fn run(mut self) -> Result<(), Error> {
        let doing = || Error::postgres("changing the table typ");
        let insert = format!("INSERT INTO public.typ SELECT {ROW} FROM (SELECT $1::bigint AS n) one");
        let insert = self.client.prepare(&insert).await.map_err(doing())?;
        let update = "UPDATE public.typ SET quantity = quantity + 1, note = note || '.' WHERE id = $1";
        let update = self.client.prepare(update).await.map_err(doing())?;
        let delete = self.client.prepare("DELETE FROM public.typ WHERE id = $1").await.map_err(doing())?;
        let mut due = Instant::now();
        while !self.stop.is_cancelled() {
            let statement = match self.rng.random_range(0..10_u32) {
                0..4 => &insert,
                4..9 => &update,
                _ => &delete,
            };
            let number = if std::ptr::eq(statement, &raw const insert) {
                self.next += self.step;
                self.next
            } else {
                self.rng.random_range(0..self.rows.max(1))
            };
            let id = i64::try_from(FIRST_ID + number).unwrap_or(i64::MAX);
            self.client.execute(statement, &[&id]).await.map_err(doing())?;
            self.done.fetch_add(1, Ordering::Relaxed);
            due += self.pause;
            tokio::time::sleep_until(due.into()).await;
        }
        Ok(())
    }
}
