//! The server is not the one that the log was made from any more (hazard 4): a new timeline, or an older state of the old one.

use std::fs;
use std::path::Path;
use std::process::Command;

use wallaby_model::Position;
use wallaby_postgres_source::{Capture, ConnectConfig, SourceError, SourceIdentity};
use wallaby_testkit::{Database, Folder, Postgres, PostgresOptions, Shutdown};

use crate::kit::{Flow, LIMIT, confirmed, wal_end};

/// A cluster in this folder. In archive recovery it finds nothing in the archive, and goes on by itself on a new timeline.
async fn cluster(folder: &Path) -> Postgres {
    let options = PostgresOptions { folder: Some(folder.to_owned()), ..Default::default() };
    Postgres::start(options.setting("restore_command", "false")).await.unwrap()
}

/// Its next start ends on a new timeline.
fn recovers(folder: &Path) {
    fs::write(folder.join("data/recovery.signal"), "").unwrap();
}

/// A copy of a cluster that does not run.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// A flow that has staged rows up to the position, and the server that it staged them from.
async fn staged(db: &Database<'_>) -> (Flow, Position, SourceIdentity) {
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    let flow = Flow::create(db).await;
    let identity = Capture::prepare(flow.options(1)).await.unwrap().identity().clone();
    let end = stage(db, &flow, 1, flow.first_position(), &identity).await;
    (flow, end, identity)
}

/// One more row is staged, and confirmed.
async fn stage(db: &Database<'_>, flow: &Flow, id: u64, end: Position, from: &SourceIdentity) -> Position {
    let client = db.connect().await;
    let mut run = flow.start_after(flow.options(id), end, Some(from)).await.unwrap();
    client.batch_execute(&format!("INSERT INTO t VALUES ({id}, 'x')")).await.unwrap();
    assert_eq!(run.rows(1).await[0].values[0], id.to_string());
    run.feedback.confirm(run.end.commit);
    wallaby_testkit::eventually(LIMIT, "it is confirmed", async || match confirmed(&client, &flow.name).await {
        lsn if lsn == run.end.commit => Ok(()),
        lsn => Err(lsn),
    })
    .await;
    run.end
}

#[tokio::test]
async fn h04_a_new_timeline_that_has_all_of_the_log_is_followed() {
    let base = Folder::temporary("timeline").unwrap();
    let folder = base.path().join("a");
    let pg = cluster(&folder).await;
    let db = Database::create_on(&pg, "followed").await;
    let (flow, end, before) = staged(&db).await;
    recovers(&folder);
    pg.restart(Shutdown::Fast).await.unwrap();
    let now = Capture::prepare(flow.options(2)).await.unwrap().identity().clone();
    assert_eq!(now, SourceIdentity { timeline: 2, ..before.clone() });
    let end = stage(&db, &flow, 3, end, &before).await;
    // What is staged after the switch is of the new timeline, and the old one has left it.
    let refused = flow.start_after(flow.options(4), end, Some(&before)).await.err().unwrap();
    assert_eq!(refused.reason(), "TimelineDiverged", "{refused}");
    let end = stage(&db, &flow, 5, end, &now).await;
    // The log may end on any timeline that the history has.
    for _ in 0..2 {
        recovers(&folder);
        pg.restart(Shutdown::Fast).await.unwrap();
    }
    let end = stage(&db, &flow, 6, end, &now).await;
    assert!(end > flow.first_position());
}

#[tokio::test]
async fn h04_a_timeline_that_left_before_the_logs_end_is_refused() {
    let base = Folder::temporary("timeline").unwrap();
    let (old, new) = (base.path().join("a"), base.path().join("b"));
    let pg = cluster(&old).await;
    let db = Database::create_on(&pg, "left").await;
    let (flow, end, identity) = staged(&db).await;
    pg.stop(Shutdown::Fast).await.unwrap();
    copy(&old, &new);
    pg.start_again().await.unwrap();
    let log_end = stage(&db, &flow, 2, end, &identity).await;
    pg.stop(Shutdown::Fast).await.unwrap();

    recovers(&new);
    let promoted = cluster(&new).await;
    let client = promoted.connect(db.name()).await.unwrap();
    let config = ConnectConfig::parse(&promoted.dsn(db.name())).unwrap();
    let flow = Flow { config, ..flow };
    let told = confirmed(&client, &flow.name).await;
    assert!(told < log_end.commit, "its slot is older");
    for round in 0..2 {
        let refused = flow.start_after(flow.options(3 + round), log_end, Some(&identity)).await.err().unwrap();
        let SourceError::TimelineDiverged { expected: 1, found: 2, switched_at, log_end: named } = refused else {
            panic!("{refused}")
        };
        assert!(told <= switched_at && switched_at < log_end.commit, "{switched_at}");
        assert_eq!(named, log_end);
        assert!(!refused.is_transient() && refused.remedy().is_some());
        assert_eq!(confirmed(&client, &flow.name).await, told, "nothing was confirmed");
        // Also when its WAL has grown past the log's end: what it wrote there is other changes.
        client.batch_execute(&format!("INSERT INTO t VALUES ({}, 'other')", 3 + round)).await.unwrap();
        while wal_end(&client).await <= log_end.commit {
            client
                .batch_execute("SELECT pg_logical_emit_message(true, 'x', 'x'); SELECT pg_switch_wal()")
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn h04_a_server_that_was_set_back_to_an_older_state_is_refused() {
    let base = Folder::temporary("timeline").unwrap();
    let (old, new) = (base.path().join("a"), base.path().join("b"));
    let pg = cluster(&old).await;
    let db = Database::create_on(&pg, "back").await;
    let (flow, end, identity) = staged(&db).await;
    pg.stop(Shutdown::Fast).await.unwrap();
    copy(&old, &new);
    pg.start_again().await.unwrap();
    // More WAL than a start writes.
    db.connect().await.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    let log_end = stage(&db, &flow, 2, end, &identity).await;
    pg.stop(Shutdown::Fast).await.unwrap();

    let restored = cluster(&new).await;
    let client = restored.connect(db.name()).await.unwrap();
    let config = ConnectConfig::parse(&restored.dsn(db.name())).unwrap();
    let flow = Flow { config, ..flow };
    let told = confirmed(&client, &flow.name).await;
    for previous in [Some(&identity), None] {
        let refused = flow.start_after(flow.options(3), log_end, previous).await.err().unwrap();
        assert!(matches!(refused, SourceError::SourceSetBack { log_end: named, .. } if named == log_end), "{refused}");
        assert!(!refused.is_transient() && refused.remedy().is_some());
    }
    assert_eq!(confirmed(&client, &flow.name).await, told, "nothing was confirmed");
}
