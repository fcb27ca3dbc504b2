//! Runs the shop's transactions at a chosen rate until told to stop.
//!
//! Each writer has a connection and a seeded generator of its own, and stops only between transactions. A lost connection is made
//! again: the source may be restarted under the load. A commit whose answer was lost may have happened or not; both are fine,
//! because nobody counts on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use super::transactions;
use crate::Error;
use crate::connection::connect;

/// How long a writer tries to reach a database that does not answer.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(60);
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How far a writer that fell behind its rate may catch up in one go.
const CATCH_UP_MAX: Duration = Duration::from_millis(500);
const SESSION: &str = "SET application_name = 'wallaby-shop-load'";

/// How the load runs.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The database, with the shop's schema.
    pub dsn: String,
    /// Decides which transactions come, in which order, on each writer.
    pub seed: u64,
    /// Row changes per second over all writers; `None` is as fast as it goes.
    pub rows_per_second: Option<u32>,
    /// Connections. With one, the same seed makes the same transactions in the same order.
    pub writers: u32,
}

/// What the load has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Rows changed, as Postgres reports them: an order counts by its lines, cascades do not count.
    pub rows: u64,
    /// Transactions committed.
    pub transactions: u64,
    /// Transactions that lost a deadlock or their connection.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    rows: AtomicU64,
    transactions: AtomicU64,
    failed: AtomicU64,
    /// About the highest order number.
    orders: AtomicI64,
    gave_up: AtomicBool,
}

/// A running load. Dropping it aborts the writers where they are; `stop` lets each finish its transaction.
#[derive(Debug)]
pub struct Load {
    stop: CancellationToken,
    writers: JoinSet<Result<(), Error>>,
    counters: Arc<Counters>,
}

impl Load {
    /// Fills the catalog if it is empty, then starts the writers.
    ///
    /// # Errors
    /// When the database cannot be reached or lacks the schema.
    pub async fn start(options: LoadOptions) -> Result<Load, Error> {
        let client = connect_writer(&options.dsn).await?;
        let counters = Arc::new(Counters::default());
        for sql in transactions::opening(&mut StdRng::seed_from_u64(options.seed)) {
            let rows = run(&client, &sql).await.map_err(Error::postgres("filling the shop's catalog"))?;
            counters.rows.fetch_add(rows, Ordering::Relaxed);
            counters.transactions.fetch_add(1, Ordering::Relaxed);
        }
        counters.orders.store(highest_order(&client).await?, Ordering::Relaxed);
        let mut load = Load { stop: CancellationToken::new(), writers: JoinSet::new(), counters };
        let many = options.writers.max(1);
        for number in 0..many {
            let writer = Writer {
                dsn: options.dsn.clone(),
                random: StdRng::seed_from_u64(options.seed.wrapping_add(1 + u64::from(number))),
                second_per_row: options.rows_per_second.map(|rate| f64::from(many) / f64::from(rate.max(1))),
                counters: Arc::clone(&load.counters),
                stop: load.stop.clone(),
            };
            let counters = Arc::clone(&load.counters);
            load.writers.spawn(async move {
                let ended = writer.work().await;
                counters.gave_up.fetch_or(ended.is_err(), Ordering::Relaxed);
                ended
            });
        }
        Ok(load)
    }

    /// What was done so far.
    pub fn progress(&self) -> LoadProgress {
        LoadProgress {
            rows: self.counters.rows.load(Ordering::Relaxed),
            transactions: self.counters.transactions.load(Ordering::Relaxed),
            failed: self.counters.failed.load(Ordering::Relaxed),
        }
    }

    /// Whether a writer has given up; `stop` says why.
    pub fn has_failed(&self) -> bool {
        self.counters.gave_up.load(Ordering::Relaxed)
    }

    /// Ends the load at transaction boundaries and returns when the last one is committed.
    ///
    /// # Errors
    /// When a writer had to give up.
    pub async fn stop(mut self) -> Result<LoadProgress, Error> {
        self.stop.cancel();
        while let Some(ended) = self.writers.join_next().await {
            ended.map_err(|error| Error::Unusable(format!("a writer of the load broke: {error}")))??;
        }
        Ok(self.progress())
    }
}

async fn connect_writer(dsn: &str) -> Result<Client, Error> {
    let client = connect(dsn, "the shop's database").await?;
    client.batch_execute(SESSION).await.map_err(Error::postgres("preparing a session of the load"))?;
    Ok(client)
}

async fn highest_order(client: &Client) -> Result<i64, Error> {
    let row = client.query_one("SELECT coalesce(max(id), 0) FROM orders", &[]).await;
    row.and_then(|row| row.try_get(0)).map_err(Error::postgres("reading the highest order"))
}

/// Runs one transaction in one round trip; returns the rows it changed.
async fn run(client: &Client, sql: &str) -> Result<u64, tokio_postgres::Error> {
    let messages = client.simple_query(sql).await?;
    let counts = messages.iter().map(|message| match message {
        SimpleQueryMessage::CommandComplete(rows) => *rows,
        _ => 0,
    });
    Ok(counts.sum())
}

struct Writer {
    dsn: String,
    random: StdRng,
    second_per_row: Option<f64>,
    counters: Arc<Counters>,
    stop: CancellationToken,
}

impl Writer {
    async fn work(mut self) -> Result<(), Error> {
        let mut client = connect_writer(&self.dsn).await?;
        let mut due = Instant::now();
        let mut transactions_here = 0_u64;
        while !self.stop.is_cancelled() {
            let orders = self.counters.orders.load(Ordering::Relaxed);
            let sql = transactions::next(&mut self.random, orders);
            match run(&client, &sql).await {
                Ok(rows) => {
                    self.counters.rows.fetch_add(rows, Ordering::Relaxed);
                    self.counters.transactions.fetch_add(1, Ordering::Relaxed);
                    due = self.pace(due, rows).await;
                }
                Err(error) => match self.recover(client, error).await? {
                    Some(again) => client = again,
                    None => return Ok(()),
                },
            }
            transactions_here += 1;
            if transactions_here.is_multiple_of(50)
                && let Ok(highest) = highest_order(&client).await
            {
                self.counters.orders.fetch_max(highest, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Waits until the rows that were written are due. Returns when the next ones are.
    async fn pace(&self, due: Instant, rows: u64) -> Instant {
        let Some(second_per_row) = self.second_per_row else { return due };
        let next = due + Duration::from_secs_f64(second_per_row * rows.max(1) as f64);
        let now = Instant::now();
        tokio::select! {
            () = tokio::time::sleep(next.saturating_duration_since(now)) => {}
            () = self.stop.cancelled() => {}
        }
        next.max(now.checked_sub(CATCH_UP_MAX).unwrap_or(now))
    }

    /// After a failed transaction: a lost race is rolled back, a lost connection made again, anything else is a bug of ours.
    /// `None` when the load was stopped while the database was away.
    async fn recover(&self, client: Client, error: tokio_postgres::Error) -> Result<Option<Client>, Error> {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        let lost_race =
            [SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE, SqlState::UNIQUE_VIOLATION];
        // A referenced product or customer may be renamed or gone between two statements of one transaction.
        let lost_race = |code: &SqlState| lost_race.contains(code) || *code == SqlState::FOREIGN_KEY_VIOLATION;
        if error.code().is_some_and(lost_race) && client.batch_execute("ROLLBACK").await.is_ok() {
            return Ok(Some(client));
        }
        let is_ours = error.as_db_error().is_some_and(|db| !db.code().code().starts_with("57") && !client.is_closed());
        if is_ours {
            return Err(Error::postgres("a transaction of the shop's load")(error));
        }
        drop(client);
        let deadline = Instant::now() + RECONNECT_PATIENCE;
        loop {
            match connect_writer(&self.dsn).await {
                Ok(client) => return Ok(Some(client)),
                Err(_) if self.stop.is_cancelled() => return Ok(None),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
            }
        }
    }
}
