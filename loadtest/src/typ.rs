//! The typical row of `limits.md`: 12 columns, 239 bytes as a pgoutput insert in text form.
//!
//! [`fill`] writes a backlog quickly, inside the server. [`OpenLoop`] commits one-row transactions at a fixed rate, whatever
//! the answers take, for latencies.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::Error;
use crate::connection::connect;

/// The table, as `schema.table`.
pub const TABLE: &str = "public.typ";
/// Length of one row as a pgoutput insert message, in bytes.
pub const ROW_BYTES: usize = 239;
/// What makes the table.
pub const SCHEMA: &str = "CREATE TABLE public.typ (
    id          bigint PRIMARY KEY,
    customer_id bigint NOT NULL,
    sku         text NOT NULL,
    quantity    integer NOT NULL,
    price       numeric(12,2) NOT NULL,
    discount    double precision NOT NULL,
    paid        boolean NOT NULL,
    status      text NOT NULL,
    created_at  timestamptz NOT NULL,
    updated_at  timestamp NOT NULL,
    reference   uuid NOT NULL,
    note        text NOT NULL
)";
/// Numbers begin here, so that all have the same length.
pub(crate) const FIRST_ID: u64 = 1_000_000;
/// A row by its number `n`. Lengths as text: 7 6 12 2 6 4 1 7 29 26 36 35 = 171; with 8 bytes of message and 5 per column 239.
pub(crate) const ROW: &str = "n, 100000 + n % 900000, 'SKU-' || lpad((n % 100000000)::text, 8, '0'), 10 + n % 90, (10000 + n % 90000) / 100.0, \
     (10 + n % 89) / 100.0 + 0.001 * (n % 9 + 1) - 0.001 * (n % 9 + 1), n % 3 = 0, \
     (ARRAY['shipped', 'ordered', 'pending'])[1 + n % 3], \
     timestamptz '2026-01-01 00:00:00.123456+00' + make_interval(secs => n % 30000000), \
     timestamp '2026-01-01 00:00:00.654321' + make_interval(secs => n % 20000000), md5(n::text)::uuid, \
     'note ' || substr(md5((n + 1)::text), 1, 30)";

/// Makes the table.
///
/// # Errors
/// When the database cannot be reached or has the table.
pub async fn create_schema(client: &Client) -> Result<(), Error> {
    client.batch_execute(SCHEMA).await.map_err(Error::postgres("making the table typ"))
}

/// Inserts `rows` rows with numbers from `first` on, `per_transaction` in each transaction, without a round trip for each.
///
/// # Errors
/// When Postgres refuses.
pub async fn fill(client: &Client, first: u64, rows: u64, per_transaction: u64) -> Result<(), Error> {
    let (from, to) = (FIRST_ID + first, FIRST_ID + first + rows - 1);
    let session = "SET synchronous_commit = off; SET TimeZone = 'UTC'";
    client.batch_execute(session).await.map_err(Error::postgres("preparing to fill the table typ"))?;
    // A DO block may commit only when it is a statement of its own.
    let sql = format!(
        "DO $$ DECLARE first bigint := {from}; \
         BEGIN WHILE first <= {to} LOOP \
         INSERT INTO public.typ SELECT {ROW} FROM generate_series(first, least(first + {per_transaction} - 1, {to})) n; \
         COMMIT; first := first + {per_transaction}; END LOOP; END $$"
    );
    client.batch_execute(&sql).await.map_err(Error::postgres("filling the table typ"))?;
    // Decoding reads only what is flushed: one synchronous commit flushes everything before it.
    let flush = "SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'typ', 'filled')";
    client.batch_execute(flush).await.map_err(Error::postgres("flushing the table typ"))
}

/// How an open loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenLoopReport {
    /// Transactions committed.
    pub transactions: u64,
    /// The longest that a transaction was sent after it was due.
    pub late_max: Duration,
    /// The median time that a commit took.
    pub commit_p50: Duration,
}

/// Commits one-row transactions at a fixed rate over several connections.
///
/// Transaction k is due at start + k / rate, and sent then whether or not earlier ones were answered, as long as one of the
/// connections is free.
#[derive(Debug, Clone)]
pub struct OpenLoop {
    /// The database.
    pub dsn: String,
    /// The number of the first row.
    pub first: u64,
    /// How many transactions.
    pub transactions: u64,
    /// How many per second.
    pub per_second: u32,
    /// Over how many connections.
    pub connections: u32,
}

impl OpenLoop {
    /// Runs it to its end.
    ///
    /// # Errors
    /// When a connection or a statement fails.
    pub async fn run(self) -> Result<OpenLoopReport, Error> {
        let next = Arc::new(AtomicU64::new(0));
        let mut clients = Vec::new();
        for _ in 0..self.connections.max(1) {
            let client = connect(&self.dsn, "the source").await?;
            client
                .batch_execute("SET TimeZone = 'UTC'")
                .await
                .map_err(Error::postgres("preparing a session of the load"))?;
            clients.push(client);
        }
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for client in clients {
            tasks.spawn(self.clone().commit_due(client, Arc::clone(&next), start));
        }
        let (mut late_max, mut commits) = (Duration::ZERO, Vec::new());
        while let Some(ended) = tasks.join_next().await {
            let (late, took) = ended.map_err(|error| Error::Unusable(format!("the load broke: {error}")))??;
            late_max = late_max.max(late);
            commits.extend(took);
        }
        commits.sort_unstable();
        let commit_p50 = commits.get(commits.len() / 2).copied().unwrap_or_default();
        Ok(OpenLoopReport { transactions: commits.len() as u64, late_max, commit_p50 })
    }

    async fn commit_due(
        self,
        client: Client,
        next: Arc<AtomicU64>,
        start: Instant,
    ) -> Result<(Duration, Vec<Duration>), Error> {
        let sql = format!("INSERT INTO public.typ SELECT {ROW} FROM (SELECT $1::bigint AS n) one");
        let insert = client.prepare(&sql).await.map_err(Error::postgres("preparing an insert"))?;
        let (mut late_max, mut took) = (Duration::ZERO, Vec::new());
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= self.transactions {
                return Ok((late_max, took));
            }
            let due = start + Duration::from_secs_f64(number as f64 / f64::from(self.per_second.max(1)));
            tokio::time::sleep_until(due.into()).await;
            let sent = Instant::now();
            late_max = late_max.max(sent.saturating_duration_since(due));
            let id = i64::try_from(FIRST_ID + self.first + number).unwrap_or(i64::MAX);
            client.execute(&insert, &[&id]).await.map_err(Error::postgres("inserting a row"))?;
            took.push(sent.elapsed());
        }
    }
}
