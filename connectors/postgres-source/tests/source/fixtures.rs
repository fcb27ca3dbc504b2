//! Recorded streams: what real servers sent, decoded without one.
//!
//! `cargo test -p wallaby-postgres-source --test source -- --ignored record` records them again. Each file is a run of
//! (u64 LSN of the XLogData header, u32 length, message), big endian.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use wallaby_model::Lsn;
use wallaby_postgres_source::pgoutput::{Cell, Decoder, Message, Tuple};
use wallaby_postgres_source::{ConnectConfig, Frame, ReplicationClient, StartOptions, Streaming};
use wallaby_testkit::{Database, Postgres, PostgresOptions, Seeded};

/// File, protocol version.
const FIXTURES: [(&str, u8); 7] = [
    ("pg15-proto1", 1),
    ("pg15-proto2-streaming", 2),
    ("pg15-proto3-streaming", 3),
    ("pg18-proto1", 1),
    ("pg18-proto2-streaming", 2),
    ("pg18-proto3-streaming", 3),
    ("pg18-proto4-streaming", 4),
];

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.bin"))
}

/// The messages of one recording.
type Recording = Vec<(Lsn, Vec<u8>)>;

fn read(name: &str) -> Recording {
    let bytes = std::fs::read(path(name)).unwrap();
    let mut rest = &bytes[..];
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let lsn = u64::from_be_bytes(rest[..8].try_into().unwrap());
        let length = u32::from_be_bytes(rest[8..12].try_into().unwrap()) as usize;
        messages.push((Lsn(lsn), rest[12..12 + length].to_vec()));
        rest = &rest[12 + length..];
    }
    messages
}

/// A change as it can be compared between recordings.
type Change = (u64, String);

fn cells(tuple: &Tuple<'_>) -> String {
    let mut cells = tuple.cells();
    let texts = (0..tuple.columns()).map(|_| match cells.read().unwrap() {
        Cell::Text(text) => String::from_utf8_lossy(text).into_owned(),
        other => format!("{other:?}"),
    });
    let texts: Vec<String> = texts.collect();
    cells.finish().unwrap();
    texts.join(",")
}

/// The changes that survive, per transaction in commit order, and how often each kind of message came.
fn surviving(name: &str, protocol: u8) -> (Vec<Vec<Change>>, BTreeMap<char, usize>) {
    let mut decoder = Decoder::new(protocol);
    let mut kinds = BTreeMap::new();
    let mut committed = Vec::new();
    let mut open: Vec<Change> = Vec::new();
    let mut streamed: BTreeMap<u32, Vec<(u32, Change)>> = BTreeMap::new();
    let mut streaming = 0;
    for (lsn, bytes) in read(name) {
        *kinds.entry(char::from(bytes[0])).or_default() += 1;
        let message = decoder.decode(&bytes).unwrap();
        message.check_tuples().unwrap();
        let (xid, text) = match &message {
            Message::Insert { xid, relation, new } => (*xid, format!("I {relation} {}", cells(new))),
            Message::Update { xid, relation, change } => {
                let old = change.old.as_ref().map(|(whole, old)| format!("{whole} {}", cells(old)));
                (*xid, format!("U {relation} {old:?} {}", cells(&change.new)))
            }
            Message::Delete { xid, relation, whole, old } => (*xid, format!("D {relation} {whole} {}", cells(old))),
            Message::Truncate(truncate) => (truncate.xid, format!("T {:?} {}", truncate.relations, truncate.cascade)),
            // A message of a rolled-back savepoint is streamed all the same, so it is compared by its xid too.
            Message::Logical(message) if message.transactional => {
                (message.xid, format!("M {} {:?}", message.prefix, message.content))
            }
            Message::Commit(_) => {
                committed.push(std::mem::take(&mut open));
                continue;
            }
            Message::StreamStart(start) => {
                streaming = start.xid;
                continue;
            }
            Message::StreamCommit { xid, .. } => {
                let changes = streamed.remove(xid).unwrap_or_default();
                committed.push(changes.into_iter().map(|(_, change)| change).collect());
                continue;
            }
            Message::StreamAbort(abort) => {
                assert_eq!(abort.abort.is_some(), protocol >= 4);
                if abort.xid == abort.subxid {
                    streamed.remove(&abort.xid);
                } else if let Some(changes) = streamed.get_mut(&abort.xid) {
                    changes.retain(|(xid, _)| *xid != abort.subxid);
                }
                continue;
            }
            _ => continue,
        };
        match xid {
            Some(xid) => streamed.entry(streaming).or_default().push((xid, (lsn.0, text))),
            None => open.push((lsn.0, text)),
        }
    }
    assert!(open.is_empty() && streamed.is_empty());
    committed.retain(|changes| !changes.is_empty());
    (committed, kinds)
}

#[test]
fn recorded_streams_decode_to_the_same_changes_in_every_protocol() {
    for version in ["pg15", "pg18"] {
        let (plain, kinds) = surviving(&format!("{version}-proto1"), 1);
        let expected: BTreeSet<char> = "BCRYIUDTMO".chars().collect();
        assert_eq!(kinds.keys().copied().collect::<BTreeSet<_>>(), expected, "{kinds:?}");
        assert!(plain.iter().map(Vec::len).sum::<usize>() > 100);
        for (name, protocol) in FIXTURES.iter().filter(|(name, protocol)| name.starts_with(version) && *protocol > 1) {
            let (streamed, kinds) = surviving(name, *protocol);
            for kind in "SEcAI".chars() {
                assert!(kinds.contains_key(&kind), "{name} has no {kind}: {kinds:?}");
            }
            assert_eq!(streamed.len(), plain.len(), "{name}");
            for (ours, theirs) in streamed.iter().zip(&plain) {
                assert_eq!(ours, theirs, "{name}");
            }
        }
    }
}

#[test]
fn damaged_recordings_never_panic() {
    let limit =
        Duration::from_millis(std::env::var("WALLABY_FUZZ_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(1500));
    let recordings: Vec<(u8, Recording)> = FIXTURES.iter().map(|(name, protocol)| (*protocol, read(name))).collect();
    let mut rng = StdRng::seeded();
    let begun = Instant::now();
    let (mut executions, mut refused) = (0u64, 0u64);
    while begun.elapsed() < limit {
        let (protocol, messages) = &recordings[rng.random_range(0..recordings.len())];
        let mut decoder = Decoder::new(*protocol);
        for _ in 0..200 {
            let mut bytes = messages[rng.random_range(0..messages.len())].1.clone();
            for _ in 0..rng.random_range(0..4) {
                match rng.random_range(0..3) {
                    0 => bytes.truncate(rng.random_range(0..=bytes.len())),
                    1 => bytes.push(rng.random()),
                    _ if bytes.is_empty() => {}
                    _ => {
                        let at = rng.random_range(0..bytes.len());
                        bytes[at] = rng.random();
                    }
                }
            }
            executions += 1;
            if decoder.decode(&bytes).and_then(|message| message.check_tuples()).is_err() {
                refused += 1;
            }
        }
    }
    println!("{executions} executions, {refused} refused");
    assert!(executions > 1000 && refused > 100);
}

#[tokio::test]
#[ignore = "records the fixtures again; needs PostgreSQL 15 in /usr/lib/postgresql/15"]
async fn record() {
    for (version, bin) in [("pg15", Some("/usr/lib/postgresql/15/bin")), ("pg18", None)] {
        let options = PostgresOptions { bin: bin.map(PathBuf::from), ..Default::default() };
        let pg = Postgres::start(options.setting("logical_decoding_work_mem", "64kB")).await.unwrap();
        let db = Database::create_on(&pg, "record").await;
        record_all(&db, version).await;
    }
}

const WORKLOAD: &str = "
    INSERT INTO t SELECT g, 'sad', 1.5, 'x', 1 FROM generate_series(1, 3) g;
    SELECT pg_replication_origin_session_setup('elsewhere');
    UPDATE t SET v = 'y' WHERE id = 1;
    SELECT pg_replication_origin_session_reset();
    BEGIN;
    UPDATE t SET id = 10 WHERE id = 1; DELETE FROM t WHERE id = 2; UPDATE whole SET v = 'b'; INSERT INTO whole VALUES (1, 'a'); UPDATE whole SET v = 'b'; DELETE FROM whole;
    SELECT pg_logical_emit_message(true, 'p', 'content');
    TRUNCATE t, whole;
    COMMIT;
    BEGIN;
    INSERT INTO t SELECT g, 'ok', NULL, 'outer', g FROM generate_series(1, 400) g;
    SAVEPOINT a; INSERT INTO t SELECT g, 'ok', 0.5, 'aborted', g FROM generate_series(1001, 1400) g; ROLLBACK TO a;
    SAVEPOINT b; INSERT INTO t SELECT g, 'ok', 0.5, 'kept', g FROM generate_series(2001, 2060) g; RELEASE b;
    COMMIT;
    BEGIN; INSERT INTO t SELECT g, 'ok', 0.5, 'gone', g FROM generate_series(3001, 3400) g; ROLLBACK;
    INSERT INTO t VALUES (9009, 'ok', 1, 'last', 9);";

async fn record_all(db: &Database<'_>, version: &str) {
    db.batch_execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN price AS numeric;
         CREATE TABLE t (id int PRIMARY KEY, m mood, p price, v text, n bigint); CREATE TABLE whole (id int, v text);
         ALTER TABLE whole REPLICA IDENTITY FULL; CREATE PUBLICATION p FOR TABLE t, whole; SELECT pg_replication_origin_create('elsewhere');",
    )
    .await
    .unwrap();
    let wanted: Vec<(&str, u8)> = FIXTURES.iter().copied().filter(|(name, _)| name.starts_with(version)).collect();
    for (_, protocol) in &wanted {
        db.query("SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')", &[&format!("s{protocol}")])
            .await
            .unwrap();
    }
    // Line by line: statements that are sent together are one transaction.
    for line in WORKLOAD.lines().filter(|line| !line.trim().is_empty()) {
        db.batch_execute(line).await.unwrap();
    }
    let end = crate::kit::wal_end(db).await;
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    for (name, protocol) in wanted {
        let client = ReplicationClient::connect(&config).await.unwrap();
        let start = StartOptions {
            slot: format!("s{protocol}"),
            publication: "p".into(),
            start: Lsn::ZERO,
            protocol,
            streaming: match protocol {
                1 => Streaming::Off,
                4 => Streaming::Parallel,
                _ => Streaming::On,
            },
            messages: true,
            confirmed: Lsn::ZERO,
            status_every: Duration::from_secs(1),
        };
        let (mut reader, _feedback) = client.start_replication(&start).await.unwrap();
        let mut out = Vec::new();
        'stream: loop {
            while let Some(frame) = reader.next_frame().unwrap() {
                match frame {
                    Frame::Wal { start, payload, .. } => {
                        out.extend_from_slice(&start.0.to_be_bytes());
                        out.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
                        out.extend_from_slice(payload);
                    }
                    Frame::Keepalive { end: sent, .. } if sent >= end => break 'stream,
                    _ => {}
                }
            }
            reader.fill().await.unwrap();
        }
        std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
        std::fs::write(path(name), out).unwrap();
    }
}
