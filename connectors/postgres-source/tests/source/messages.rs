//! Logical messages in transactions that are streamed while they are in progress (hazard 7).
//!
//! A row comes under the xid of its sub-transaction, a message under that of the whole transaction: what is to be dropped with its
//! savepoint has to carry the savepoint's xid in its content. In SQL that is the `xmin` of a row that was written there.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;
use wallaby_model::Lsn;
use wallaby_postgres_source::pgoutput::{Decoder, Message};
use wallaby_postgres_source::{ConnectConfig, Frame, FrameReader, ReplicationClient, StartOptions, Streaming};
use wallaby_testkit::{Database, Postgres, PostgresOptions, skipped};

use crate::kit::LIMIT;

/// A message in a streamed block.
#[derive(Debug)]
struct Emitted {
    prefix: String,
    /// The transaction whose block it is in.
    top: u32,
    /// The xid under which it came.
    xid: Option<u32>,
    /// The xid that its content names.
    named: u32,
}

/// What came of a streamed transaction.
#[derive(Debug, Default)]
struct Seen {
    messages: Vec<Emitted>,
    /// Sub-transactions that were rolled back.
    aborted: BTreeSet<u32>,
    /// The transaction whose block is open.
    block: Option<u32>,
    committed: bool,
}

impl Seen {
    fn take(&mut self, message: &Message<'_>) {
        match message {
            Message::StreamStart(start) => self.block = Some(start.xid),
            Message::StreamStop => self.block = None,
            Message::StreamAbort(abort) => _ = self.aborted.insert(abort.subxid),
            Message::StreamCommit { .. } => self.committed = true,
            Message::Logical(message) if message.transactional => {
                let named = std::str::from_utf8(message.content).unwrap().parse().unwrap();
                let (prefix, top) = (message.prefix.to_owned(), self.block.unwrap());
                self.messages.push(Emitted { prefix, top, xid: message.xid, named });
            }
            _ => {}
        }
    }

    fn has(&self, prefix: &str) -> bool {
        self.messages.iter().any(|seen| seen.prefix == prefix)
    }
}

async fn read_until(reader: &mut FrameReader, decoder: &mut Decoder, seen: &mut Seen, done: impl Fn(&Seen) -> bool) {
    let reading = async {
        while !done(seen) {
            while let Some(frame) = reader.next_frame().unwrap() {
                if let Frame::Wal { payload, .. } = frame {
                    seen.take(&decoder.decode(payload).unwrap());
                }
            }
            if !done(seen) {
                reader.fill().await.unwrap();
            }
        }
    };
    assert!(timeout(LIMIT, reading).await.is_ok(), "it did not come: {seen:?}");
}

async fn rolled_back(pg: &Postgres) {
    let db = Database::create_on(pg, "messages").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t").await.unwrap();
    let slot = db.name();
    let create = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')";
    db.query(create, &[&slot]).await.unwrap();
    let start = StartOptions {
        slot: slot.to_owned(),
        publication: "p".into(),
        start: Lsn::ZERO,
        protocol: 2,
        streaming: Streaming::On,
        messages: true,
        confirmed: Lsn::ZERO,
        status_every: Duration::from_secs(1),
    };
    let client = ReplicationClient::connect(&ConnectConfig::parse(&db.dsn()).unwrap()).await.unwrap();
    let (mut reader, _feedback) = client.start_replication(&start).await.unwrap();
    let (mut decoder, mut seen) = (Decoder::new(2), Seen::default());
    let rows =
        |from: u32| format!("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series({from}, {from} + 2999) i");
    // Right after the rows that begin at `from`.
    let emit = |prefix: &str, from: u32| {
        format!("SELECT pg_logical_emit_message(true, '{prefix}', xmin::text) FROM t WHERE id = {from}")
    };
    let (outer, gone, kept) = (1, 10_000, 20_000);
    let begin = format!(
        "BEGIN; {}; {}; SAVEPOINT a; {}; {}",
        rows(outer),
        emit("outer", outer),
        rows(gone),
        emit("rolled back", gone)
    );
    db.batch_execute(&format!("{begin}; {}", rows(gone + 3000))).await.unwrap();
    // Sent while nobody knows yet what becomes of the savepoint.
    read_until(&mut reader, &mut decoder, &mut seen, |seen| seen.has("rolled back")).await;
    let end = format!("ROLLBACK TO a; RELEASE a; SAVEPOINT b; {}; {}; RELEASE b", rows(kept), emit("kept", kept));
    db.batch_execute(&format!("{end}; {}; COMMIT", rows(kept + 3000))).await.unwrap();
    read_until(&mut reader, &mut decoder, &mut seen, |seen| seen.committed).await;
    assert!(seen.messages.iter().all(|message| message.xid == Some(message.top)), "{seen:?}");
    let is_kept = |message: &&Emitted| !seen.aborted.contains(&message.named);
    let kept: Vec<&str> = seen.messages.iter().filter(is_kept).map(|message| &message.prefix[..]).collect();
    assert_eq!(kept, ["outer", "kept"], "{seen:?}");
    assert_eq!(seen.messages[0].named, seen.messages[0].top, "{seen:?}");
}

#[tokio::test]
async fn h07_a_message_of_a_rolled_back_savepoint_comes_and_its_content_must_name_it_on_postgres_18() {
    let options = PostgresOptions::default().setting("logical_decoding_work_mem", "64kB");
    rolled_back(&Postgres::start(options).await.unwrap()).await;
}

#[tokio::test]
async fn h07_a_message_of_a_rolled_back_savepoint_comes_and_its_content_must_name_it_on_postgres_15() {
    let bin = PathBuf::from("/usr/lib/postgresql/15/bin");
    if !bin.exists() {
        skipped!("PostgreSQL 15 is not installed");
        return;
    }
    let options = PostgresOptions { bin: Some(bin), ..Default::default() };
    rolled_back(&Postgres::start(options.setting("logical_decoding_work_mem", "64kB")).await.unwrap()).await;
}
