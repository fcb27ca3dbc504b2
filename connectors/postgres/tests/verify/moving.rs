//! Writers that go on, sinks that lag, locks that are in the way.

use std::time::Duration;

use async_trait::async_trait;
use wallaby_connector_api::verify::{VerifyError, VerifyRow, VerifySession, VerifySink, VerifySource, VerifyTable};
use wallaby_model::verify::Verdict;
use wallaby_model::{Lsn, Position, TableName};
use wallaby_postgres::PostgresVerify;
use wallaby_testkit::eventually;

use crate::pair::{Pair, of, run, shown};

/// A sink at which something happens right before a snapshot of it is taken, which is after one of the source was taken.
struct Meanwhile<'a> {
    sink: PostgresVerify,
    pair: &'a Pair,
    /// Statements at the source and at the sink, for each snapshot in turn; the last again and again.
    steps: Vec<(&'static str, &'static str)>,
    taken: usize,
}

#[async_trait]
impl VerifySession for Meanwhile<'_> {
    async fn rows(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        self.sink.rows(sql).await
    }
}

#[async_trait]
impl VerifySink for Meanwhile<'_> {
    fn target(&self, source: &TableName) -> TableName {
        self.sink.target(source)
    }

    async fn renew(&mut self, tables: &[TableName]) -> Result<Option<Position>, VerifyError> {
        if let Some((source, sink)) = self.steps.get(self.taken).or(self.steps.last()) {
            self.sink.rows("ROLLBACK").await?;
            self.pair.at_source(source).await;
            self.pair.at_sink(sink).await;
        }
        self.taken += 1;
        self.sink.renew(tables).await
    }

    async fn table(&mut self, table: &TableName) -> Result<Option<VerifyTable>, VerifyError> {
        self.sink.table(table).await
    }
}

async fn numbers(hint: &str) -> Pair {
    let pair = Pair::fresh(hint).await;
    pair.at_both(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 100) n",
    )
    .await;
    pair.at_both("CREATE TABLE bag (v int); INSERT INTO bag VALUES (1), (2)").await;
    pair.publish("t, bag").await;
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_were_on_their_way_are_no_differences() {
    let pair = numbers("verify_moving").await;
    let mut source = pair.source_session().await;
    // The source moves on after its snapshot, and the sink with it: it shows what the snapshot does not.
    let moves = "UPDATE t SET v = -v WHERE id IN (3, 4); DELETE FROM t WHERE id = 5; INSERT INTO t VALUES (101, 1); INSERT INTO bag VALUES (2)";
    let steps = vec![(moves, moves), ("", "UPDATE t SET v = 0 WHERE id = 6; DELETE FROM t WHERE id = 4"), ("", "")];
    let mut sink = Meanwhile { sink: pair.sink_session().await, pair: &pair, steps, taken: 0 };
    let report = run(&mut source, &mut sink, &[], 20, Duration::from_secs(60)).await.unwrap();
    let table = of(&report, "public.t");
    // 3, 5 and 101 arrived; 4 was lost at the sink by the second look; 6 was the same when all were compared.
    assert_eq!((table.settled, table.different, table.extra), (3, 0, 0), "{table:?}");
    assert_eq!(shown(table), ["Missing id=4"]);
    assert_eq!((of(&report, "public.bag").verdict, of(&report, "public.bag").settled), (Verdict::Equal, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_never_rest_are_called_unsettled() {
    let pair = numbers("verify_unsettled").await;
    let mut source = pair.source_session().await;
    let steps = vec![("UPDATE t SET v = v + 1 WHERE id = 3", "UPDATE t SET v = v + 2 WHERE id = 3")];
    let mut sink = Meanwhile { sink: pair.sink_session().await, pair: &pair, steps, taken: 0 };
    let report = run(&mut source, &mut sink, &[], 20, Duration::from_secs(10)).await.unwrap();
    let table = of(&report, "public.t");
    assert_eq!((table.verdict, table.unsettled, table.different), (Verdict::Unsettled, 1, 0), "{table:?}");
    assert_eq!(report.verdict(), Verdict::Unsettled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sink_is_read_once_it_has_what_the_source_shows() {
    let pair = numbers("verify_behind").await;
    pair.at_source("UPDATE t SET v = 0 WHERE id = 9").await;
    pair.position("0000000000000001-0000000000000000-00000000").await;
    let mut source = pair.source_session().await;
    let arrives = "UPDATE t SET v = 0 WHERE id = 9; \
        UPDATE wallaby.checkpoints SET position = '7FFFFFFFFFFFFFFF-0000000000000000-00000000'";
    let steps = vec![("", ""), ("", ""), ("", arrives), ("", "")];
    let mut sink = Meanwhile { sink: pair.sink_session().await, pair: &pair, steps, taken: 0 };
    let report = run(&mut source, &mut sink, &[], 20, Duration::from_secs(60)).await.unwrap();
    assert_eq!((report.verdict(), of(&report, "public.t").settled), (Verdict::Equal, 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_stays_behind_ends_in_time_with_both_positions() {
    let pair = numbers("verify_late").await;
    pair.position("0000000000000001-0000000000000000-00000000").await;
    let error = pair.verify_with(&[], 20, Duration::from_secs(6)).await.unwrap_err();
    assert!(matches!(&error, VerifyError::TimedOut(text) if text.contains("stands at 0/1 ")), "{error:?}");
    pair.at_sink("DELETE FROM wallaby.checkpoints").await;
    let error = pair.verify_with(&[], 20, Duration::from_secs(6)).await.unwrap_err();
    assert!(matches!(&error, VerifyError::TimedOut(text) if text.contains("no position yet")), "{error:?}");
}

/// A table that is rewritten between the snapshot and its reading shows no rows, without an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_rewritten_is_not_read_as_empty() {
    let pair = numbers("verify_rewritten").await;
    let rewriter = pair.source.connect().await;
    rewriter.batch_execute("BEGIN; ALTER TABLE t ALTER COLUMN v TYPE bigint").await.unwrap();
    let compared = async { pair.verify().await };
    let rewritten = async {
        eventually(Duration::from_secs(30), "the comparison waits for the lock", async || {
            let waiting = pair.source.query("SELECT FROM pg_locks WHERE NOT granted AND relation = 't'::regclass", &[]);
            if waiting.await.unwrap().is_empty() { Err("nobody waits") } else { Ok(()) }
        })
        .await;
        rewriter.batch_execute("COMMIT").await.unwrap();
    };
    let (report, ()) = tokio::join!(compared, rewritten);
    let table = of(&report, "public.t");
    assert_eq!((table.verdict, table.rows_source), (Verdict::Equal, 100), "{table:?}");
}

/// A side that takes long over each statement that reads rows.
struct Slow<S>(S);

impl<S: VerifySession> Slow<S> {
    async fn read(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        // Not those with hundreds of keys: there are many of them.
        let is_reading = sql.contains("encode(") && sql.len() < 3000;
        let takes = if is_reading { "1" } else { "0.3" };
        if is_reading || sql.starts_with("FETCH") {
            self.0.rows(&format!("SELECT pg_sleep({takes})::text")).await?;
        }
        self.0.rows(sql).await
    }
}

#[async_trait]
impl<S: VerifySession> VerifySession for Slow<S> {
    async fn rows(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError> {
        self.read(sql).await
    }
}

#[async_trait]
impl<S: VerifySource> VerifySource for Slow<S> {
    async fn tables(&mut self) -> Result<Vec<TableName>, VerifyError> {
        self.0.tables().await
    }

    async fn renew(&mut self, tables: &[TableName]) -> Result<Lsn, VerifyError> {
        self.0.renew(tables).await
    }

    async fn table(&mut self, table: &TableName) -> Result<VerifyTable, VerifyError> {
        self.0.table(table).await
    }
}

#[async_trait]
impl<S: VerifySink> VerifySink for Slow<S> {
    fn target(&self, source: &TableName) -> TableName {
        self.0.target(source)
    }

    async fn renew(&mut self, tables: &[TableName]) -> Result<Option<Position>, VerifyError> {
        self.0.renew(tables).await
    }

    async fn table(&mut self, table: &TableName) -> Result<Option<VerifyTable>, VerifyError> {
        self.0.table(table).await
    }
}

/// What a server does to a session that asks nothing in a transaction, sooner than ours would.
const IMPATIENT: &str = "SET idle_in_transaction_session_timeout = '800ms'";

/// Differences of every kind, and a table that only one side has rows of; the other side lacks another one.
async fn unlike(hint: &str, has_rows: impl AsyncFn(&Pair, &str)) -> Pair {
    let pair = numbers(hint).await;
    pair.at_sink("UPDATE t SET v = 0 WHERE id = 6; INSERT INTO bag VALUES (7)").await;
    pair.at_both("CREATE TABLE many (id int PRIMARY KEY)").await;
    pair.at_source("CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1)").await;
    pair.at_source("ALTER PUBLICATION verified ADD TABLE many, gone").await;
    has_rows(&pair, "INSERT INTO many SELECT generate_series(1, 9000)").await;
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_waits_for_a_slow_source_is_not_taken_for_dead() {
    let pair = unlike("verify_slow_source", async |pair, sql| pair.at_source(sql).await).await;
    let (mut source, mut sink) = (Slow(pair.source_session().await), pair.sink_session().await);
    sink.rows(IMPATIENT).await.unwrap();
    let report = run(&mut source, &mut sink, &[], 20, Duration::from_secs(100)).await.unwrap();
    assert_eq!(shown(of(&report, "public.t")), ["Different id=6 v"]);
    assert_eq!((of(&report, "public.bag").extra, of(&report, "public.many").rows_source), (1, 9000));
    assert_eq!(of(&report, "public.gone").missing, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_waits_for_a_slow_sink_is_not_taken_for_dead() {
    let pair = unlike("verify_slow_sink", async |pair, sql| pair.at_sink(sql).await).await;
    let (mut source, mut sink) = (pair.source_session().await, Slow(pair.sink_session().await));
    source.rows(IMPATIENT).await.unwrap();
    let report = run(&mut source, &mut sink, &[], 20, Duration::from_secs(100)).await.unwrap();
    assert_eq!(shown(of(&report, "public.t")), ["Different id=6 v"]);
    assert_eq!((of(&report, "public.bag").extra, of(&report, "public.many").rows_sink), (1, 9000));
}
