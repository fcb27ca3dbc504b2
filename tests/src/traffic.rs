//! Rows in flight, made so that a lost row, a doubled row and half a transaction are seen.
//!
//! Beside the shop's load a *ledger* is written: a table without a key, to which the sink appends every change it is given. A change
//! that is applied twice stands there twice. Each of its transactions is a batch that knows its size, from one row to thousands
//! (several segments), and the target is looked at all the time: a batch that stands there in part was shown in part (hazard 13).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;
use wallaby_loadtest::shop::{Load, LoadOptions};

/// The ledger at the source.
pub const LEDGER: &str = "\
    CREATE TABLE ledger (id bigint NOT NULL, batch bigint NOT NULL, size int NOT NULL, filler text NOT NULL); \
    ALTER TABLE ledger REPLICA IDENTITY FULL";
const WRITE: &str = "\
    INSERT INTO ledger SELECT $1::bigint * 10000 + i, $1::bigint, $2::int, repeat(md5(i::text || $1::text), 4) \
    FROM generate_series(1, $2::int) i";
/// Batches whose rows at the target are not as many as the batch says.
const PARTIAL: &str = "\
    SELECT batch, size, count(*) FROM ledger WHERE batch > (SELECT max(batch) - 60 FROM ledger) GROUP BY batch, size \
    HAVING count(*) <> size ORDER BY batch LIMIT 1";
/// Every how many batches one is large.
const LARGE_EVERY: u64 = 100;
/// Rows of a large batch: several segments.
const LARGE_ROWS: i32 = 4000;
const BATCH_PAUSE: Duration = Duration::from_millis(20);
const LOOK_PAUSE: Duration = Duration::from_millis(300);
const SOURCE_PATIENCE: Duration = Duration::from_secs(60);

/// A connection whose task ends with it.
///
/// # Errors
/// When the server cannot be reached.
pub async fn connect(dsn: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(dsn, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The running traffic.
#[derive(Debug)]
pub struct Traffic {
    load: Load,
    stop: CancellationToken,
    ledger: JoinHandle<()>,
    looking: JoinHandle<()>,
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    rows: AtomicU64,
    looks: AtomicU64,
    partial: Mutex<Option<String>>,
}

/// What was written.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    /// Rows of the shop.
    pub shop_rows: u64,
    /// Rows of the ledger.
    pub ledger_rows: u64,
    /// How often the target was looked at for half a transaction.
    pub looks: u64,
}

impl Traffic {
    /// Starts it. The slot exists already: nothing before it flows.
    pub async fn start(source: String, target: String, seed: u64, rows_per_second: u32) -> Traffic {
        let options = LoadOptions { dsn: source.clone(), seed, rows_per_second: Some(rows_per_second), writers: 2 };
        let load = Load::start(options).await.unwrap();
        let (stop, seen) = (CancellationToken::new(), Arc::new(Seen::default()));
        let ledger = tokio::spawn(write_ledger(source, stop.clone(), Arc::clone(&seen)));
        let looking = tokio::spawn(look(target, stop.clone(), Arc::clone(&seen)));
        Traffic { load, stop, ledger, looking, seen }
    }

    /// Rows committed at the source so far: it grows while rows are in flight.
    pub fn rows(&self) -> u64 {
        self.load.progress().rows + self.seen.rows.load(Ordering::Relaxed)
    }

    /// Ends everything at transaction boundaries. Panics when half a transaction was seen at the target.
    pub async fn stop(self) -> Written {
        let progress = self.load.stop().await.unwrap();
        self.stop.cancel();
        self.ledger.await.unwrap();
        self.looking.await.unwrap();
        let partial = self.seen.partial.lock().unwrap().clone();
        assert_eq!(partial, None, "half a transaction was seen at the sink");
        let ledger_rows = self.seen.rows.load(Ordering::Relaxed);
        Written { shop_rows: progress.rows, ledger_rows, looks: self.seen.looks.load(Ordering::Relaxed) }
    }
}

async fn write_ledger(source: String, stop: CancellationToken, seen: Arc<Seen>) {
    let mut client = connect(&source).await.unwrap();
    let mut batch = 0_u64;
    while !stop.is_cancelled() {
        batch += 1;
        let size = if batch.is_multiple_of(LARGE_EVERY) { LARGE_ROWS } else { 1 + (batch % 7) as i32 };
        let number = i64::try_from(batch).unwrap();
        let since = Instant::now();
        // A commit whose answer was lost is not repeated.
        while let Err(error) = client.execute(WRITE, &[&number, &size]).await {
            client = again(&source, since, &error.to_string()).await;
            let there = client.query_opt("SELECT 1 FROM ledger WHERE batch = $1 LIMIT 1", &[&number]).await;
            if matches!(there, Ok(Some(_))) {
                break;
            }
        }
        seen.rows.fetch_add(size.unsigned_abs().into(), Ordering::Relaxed);
        tokio::time::sleep(BATCH_PAUSE).await;
    }
}

/// Connects again, for as long as a restart of the source may take.
async fn again(dsn: &str, since: Instant, why: &str) -> Client {
    loop {
        match connect(dsn).await {
            Ok(client) => return client,
            Err(error) if since.elapsed() > SOURCE_PATIENCE => panic!("the source stays away: {why}; {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn look(target: String, stop: CancellationToken, seen: Arc<Seen>) {
    let mut client = None;
    while !stop.is_cancelled() {
        tokio::time::sleep(LOOK_PAUSE).await;
        let connected = match client.take() {
            Some(client) => client,
            None => match connect(&target).await {
                Ok(client) => client,
                Err(_) => continue,
            },
        };
        // The table comes with the first row; the server may be down; a test may have locked the table.
        let asked = tokio::time::timeout(Duration::from_secs(5), connected.query_opt(PARTIAL, &[])).await;
        let Ok(Ok(found)) = asked else { continue };
        seen.looks.fetch_add(1, Ordering::Relaxed);
        if let Some(row) = found {
            let (batch, size, count): (i64, i32, i64) = (row.get(0), row.get(1), row.get(2));
            let said = format!("batch {batch} of {size} rows stands there with {count}");
            seen.partial.lock().unwrap().get_or_insert(said);
        }
        client = Some(connected);
    }
}
