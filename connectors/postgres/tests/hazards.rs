//! The hazards that this sink answers, each seen to fail without its answer.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use target::{Target, apply, query, rows, try_apply};
use wallaby_connector_api::conformance::{Change, EmptySource, Log, Shape, SinkUnderTest, Value};
use wallaby_connector_api::{Applied, CommitFault, Faults, HangPoint, Sink, SinkError};
use wallaby_model::{ColumnType, Epoch, TableSchema};
use wallaby_testkit::eventually;

fn items() -> Arc<TableSchema> {
    Shape::new("items")
        .key("id", ColumnType::Int4)
        .column("n", ColumnType::Int4)
        .column("big", ColumnType::Text)
        .build()
}

fn item(id: i64, n: i64, big: impl Into<Value>) -> Vec<Value> {
    vec![id.into(), n.into(), big.into()]
}

fn update_key(table: &Arc<TableSchema>, from: i64, row: Vec<Value>) -> Change {
    Change::update_key(table, item(from, 0, Value::Null), row)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h03_toast_survives_net_effect() {
    let target = Target::fresh("h03").await;
    let (mut log, items) = (Log::new(), items());
    let mut sink = target.opened(&log).await;
    log.transaction((1..=6).map(|id| Change::insert(&items, item(id, 0, format!("old {id}").as_str()))));
    apply(&mut sink, &log.batch()).await;

    // Set, then another column: the later change carries `big` as unchanged.
    log.transaction([Change::update(&items, item(1, 1, "N")), Change::update(&items, item(1, 2, Value::Unchanged))]);
    // Only unchanged: the sink's value stays.
    log.transaction([Change::update(&items, item(2, 2, Value::Unchanged))]);
    // Born in the batch.
    log.transaction([Change::insert(&items, item(7, 0, "born")), Change::update(&items, item(7, 7, Value::Unchanged))]);
    // Set, moved, changed again, moved again.
    log.transaction([
        Change::update(&items, item(3, 1, "M")),
        update_key(&items, 3, item(30, 1, Value::Unchanged)),
        Change::update(&items, item(30, 2, Value::Unchanged)),
        update_key(&items, 30, item(31, 3, Value::Unchanged)),
    ]);
    // A cycle through a free key: 4 and 5 change places.
    log.transaction([
        update_key(&items, 4, item(40, 0, Value::Unchanged)),
        update_key(&items, 5, item(4, 5, Value::Unchanged)),
        update_key(&items, 40, item(5, 4, Value::Unchanged)),
    ]);
    // Moved to a key whose row is deleted in the same batch.
    log.transaction([
        Change::delete(&items, item(6, 0, Value::Null)),
        update_key(&items, 2, item(6, 6, Value::Unchanged)),
    ]);
    apply(&mut sink, &log.batch_in_segments(3)).await;

    let expected = rows(&[
        &["1", "2", "N"],
        &["31", "3", "M"],
        &["4", "5", "old 5"],
        &["5", "4", "old 4"],
        &["6", "6", "old 2"],
        &["7", "7", "born"],
    ]);
    assert_eq!(target.rows(&items.table).await, expected);
}

/// Two tables that every transaction changes alike, and a reader that looks at both all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_half_a_transaction_is_never_seen() {
    let target = Target::fresh("h13").await;
    let mut log = Log::new();
    let tables = ["left", "right"]
        .map(|name| Shape::new(name).key("id", ColumnType::Int4).column("n", ColumnType::Int4).build());
    let mut sink = target.opened(&log).await;
    let everywhere = |n: i64, what: &dyn Fn(&Arc<TableSchema>, Vec<Value>) -> Change| -> Vec<Change> {
        (0..50)
            .flat_map(|id| tables.iter().map(move |t| (t, id)))
            .map(|(t, id)| what(t, vec![Value::Int(id), n.into()]))
            .collect()
    };
    log.transaction(everywhere(0, &|table, row| Change::insert(table, row)));
    apply(&mut sink, &log.batch()).await;

    let done = Arc::new(AtomicBool::new(false));
    let looks = Arc::new(AtomicU64::new(0));
    let reader = {
        let (client, done, looks) = (target.database.connect().await, Arc::clone(&done), Arc::clone(&looks));
        tokio::spawn(async move {
            let query =
                "SELECT count(DISTINCT n), max(n) FROM (SELECT n FROM \"left\" UNION ALL SELECT n FROM \"right\") x";
            let mut last = -1;
            while !done.load(Ordering::SeqCst) {
                let row = client.query_one(query, &[]).await.unwrap();
                let (values, n): (i64, i32) = (row.get(0), row.get(1));
                assert_eq!(values, 1, "a reader saw a part of a transaction");
                assert!(n >= last, "time went backwards");
                last = n;
                looks.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    for n in 1..=20 {
        log.transaction(everywhere(n, &|table, row| Change::update(table, row)));
        // Cut into segments in mid-transaction: what is applied is the whole.
        apply(&mut sink, &log.batch_in_segments(7)).await;
        if n % 5 == 0 {
            // Killed before the commit: nothing of it is seen, and the next owner has to apply it again.
            let faults = Faults { before_commit: Some(CommitFault::Die), ..Faults::default() };
            let mut killed = target.make(faults, Arc::new(EmptySource));
            killed.open(Epoch(1)).await.unwrap();
            log.transaction(everywhere(100 + n, &|table, row| Change::update(table, row)));
            let batch = log.batch_in_segments(7);
            assert!(try_apply(&mut killed, &batch).await.is_err());
            sink.open(Epoch(1)).await.unwrap();
            let seen = query(&target.database, "SELECT max(n) FROM \"left\"").await;
            assert_ne!(seen, rows(&[&[&(100 + n).to_string()]]));
            // The log goes on as if the transaction had set the value that the reader expects next.
            let undo = wallaby_connector_api::Batch { parts: Vec::new(), ..batch };
            apply(&mut sink, &undo).await;
        }
        let before = looks.load(Ordering::SeqCst);
        eventually(Duration::from_secs(10), "the reader looks", async || {
            if looks.load(Ordering::SeqCst) > before || reader.is_finished() { Ok(()) } else { Err("not yet") }
        })
        .await;
    }
    done.store(true, Ordering::SeqCst);
    reader.await.unwrap();
}

/// Reopens and applies from wherever the sink stands until it is fenced or through.
async fn drive(
    mut sink: Box<dyn Sink>,
    epoch: Epoch,
    batches: Vec<wallaby_connector_api::Batch>,
) -> Result<(), SinkError> {
    'open: loop {
        let opened = match sink.open(epoch).await {
            Ok(opened) => opened,
            Err(error @ SinkError::Fenced(_)) => return Err(error),
            Err(_) => continue,
        };
        let position = opened.position.unwrap();
        for batch in batches.iter().filter(|batch| batch.from >= position) {
            match sink.apply(batch).await {
                Ok(_) => {}
                Err(error @ SinkError::Fenced(_)) => return Err(error),
                Err(_) => continue 'open,
            }
        }
        return Ok(());
    }
}

/// Owners come one after the other, each while the one before is in full swing; some end older sessions, some cannot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_old_and_new_apply_task_race() {
    let target = Target::fresh("h14").await;
    let mut log = Log::new();
    let events = Shape::new("events").column("n", ColumnType::Int4).build();
    let mut first = target.opened(&log).await;
    first.close().await;
    let batches: Vec<_> = (0..300)
        .map(|n| {
            log.transaction([Change::insert(&events, [n.into()])]);
            log.batch()
        })
        .collect();
    let mut owners = Vec::new();
    for epoch in 2..=6 {
        let faults = Faults { keep_older_sessions: epoch % 2 == 0, ..Faults::default() };
        let sink = target.make(faults, Arc::new(EmptySource));
        owners.push(tokio::spawn(drive(sink, Epoch(epoch), batches.clone())));
        let wanted = 40 * (epoch as usize - 1);
        eventually(Duration::from_secs(30), "rows are in flight", async || {
            let found = target.rows(&events.table).await.len();
            if found >= wanted.min(250) { Ok(()) } else { Err(found) }
        })
        .await;
    }
    let last = owners.pop().unwrap();
    last.await.unwrap().unwrap();
    let mut fenced = 0;
    for owner in owners {
        if matches!(owner.await.unwrap(), Err(SinkError::Fenced(_))) {
            fenced += 1;
        }
    }
    assert_eq!(fenced, 4, "an older owner was not told");
    let found = query(&target.database, "SELECT n, count(*) FROM events GROUP BY n ORDER BY n").await;
    let expected: Vec<_> = (0..300).map(|n: i32| vec![Some(n.to_string()), Some("1".to_owned())]).collect();
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_frozen_owner_that_holds_locks_is_ended() {
    let target = Target::fresh("h14_frozen").await;
    let (mut log, items) = (Log::new(), items());
    let mut first = target.opened(&log).await;
    log.transaction([Change::insert(&items, item(1, 1, "a"))]);
    apply(&mut first, &log.batch()).await;
    first.close().await;
    let point = Arc::new(HangPoint::default());
    let faults = Faults { before_commit: Some(CommitFault::Hang(Arc::clone(&point))), ..Faults::default() };
    let mut frozen = target.make(faults, Arc::new(EmptySource));
    frozen.open(Epoch(2)).await.unwrap();
    log.transaction([Change::update(&items, item(1, 2, "b"))]);
    let batch = log.batch();
    let theirs = batch.clone();
    let frozen = tokio::spawn(async move { frozen.apply(&theirs).await });
    point.reached().await;
    // The fault landed: a session of epoch 2 is idle inside its transaction and holds the lock on the checkpoint.
    let held = "SELECT count(*) FROM pg_stat_activity a JOIN pg_locks l USING (pid) WHERE state = 'idle in transaction' \
        AND application_name LIKE 'wallaby/%/2' AND datname = current_database() AND relation = 'wallaby.checkpoints'::regclass AND granted";
    assert_ne!(query(&target.database, held).await, rows(&[&["0"]]));
    let mut young = target.sink();
    let opened = tokio::time::timeout(Duration::from_secs(10), young.open(Epoch(3))).await.unwrap().unwrap();
    assert_eq!(opened.sessions_ended, 1);
    assert_eq!(opened.position, Some(batch.from));
    apply(&mut young, &batch).await;
    point.release();
    assert!(matches!(frozen.await.unwrap(), Err(SinkError::Transient(_))));
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "2", "b"]]));
}

/// Sessions are looked for before the epoch is moved and after it: one that takes its time to end is met by both looks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_session_that_does_not_end_at_once_is_counted_once() {
    let target = Target::fresh("h14_slow_end").await;
    let _first = target.opened(&Log::new()).await;
    let pid = "SELECT pid::text FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%/1' AND datname = current_database()";
    let pid: String = target.database.query_one(pid, &[]).await.unwrap().get(0);
    let signal =
        |name: &str| assert!(std::process::Command::new("kill").args([name, &pid]).status().unwrap().success());
    signal("-STOP");
    let mut young = target.sink();
    let opened = tokio::time::timeout(Duration::from_secs(10), young.open(Epoch(2))).await;
    signal("-CONT");
    assert_eq!(opened.unwrap().unwrap().sessions_ended, 1);
}

/// Sessions of older owners are left alone, so the zombie lives, and its own commit is refused by the epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_zombies_commit_is_refused_by_the_epoch() {
    let target = Target::fresh("h14_zombie").await;
    let (mut log, items) = (Log::new(), items());
    let mut zombie = target.opened(&log).await;
    log.transaction([Change::insert(&items, item(1, 1, "a"))]);
    apply(&mut zombie, &log.batch()).await;
    let mut young = target.make(Faults { keep_older_sessions: true, ..Faults::default() }, Arc::new(EmptySource));
    assert_eq!(young.open(Epoch(2)).await.unwrap().sessions_ended, 0);
    let alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%/1' AND datname = current_database()";
    assert_eq!(query(&target.database, alive).await, rows(&[&["1"]]));
    log.transaction([Change::update(&items, item(1, 2, "zombie"))]);
    let refused = try_apply(&mut zombie, &log.batch()).await;
    assert!(matches!(refused, Err(SinkError::Fenced(_))), "{refused:?}");
    assert_eq!(target.rows(&items.table).await, rows(&[&["1", "1", "a"]]));
}

/// The other guard alone: the epoch is the same, but another session of it has applied the batch since. So an owner that opens
/// again while its earlier session lives on doubles nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_batch_that_another_session_of_the_same_epoch_applied_is_refused_by_the_position() {
    let target = Target::fresh("h14_position").await;
    let mut log = Log::new();
    let events = Shape::new("events").column("n", ColumnType::Int4).build();
    let mut earlier = target.opened(&log).await;
    let faults = Faults { keep_older_sessions: true, ..Faults::default() };
    let mut later = target.make(faults, Arc::new(EmptySource));
    later.open(Epoch(1)).await.unwrap();
    let alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'wallaby/%/1' AND datname = current_database()";
    assert_eq!(query(&target.database, alive).await, rows(&[&["2"]]), "both sessions of the epoch live");
    log.transaction([Change::insert(&events, [1.into()])]);
    let batch = log.batch();
    apply(&mut later, &batch).await;
    let refused = try_apply(&mut earlier, &batch).await;
    assert!(matches!(refused, Err(SinkError::Position { .. })), "{refused:?}");
    assert_eq!(target.rows(&events.table).await, rows(&[&["1"]]), "the change stands doubled");
}

/// More tables than there are temporary ones, all of one shape, and one whose key is its row: each statement has rows of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_many_tables_in_one_transaction_are_not_mixed() {
    const TABLES: i64 = 150;
    let target = Target::fresh("many_tables").await;
    let mut log = Log::new();
    let int = ColumnType::Int4;
    let shape = |name: &str| Shape::new(name).key("id", int).column("n", int).build();
    let others: Vec<_> = (0..TABLES).map(|n| shape(&format!("t{n}"))).collect();
    let pairs = Shape::new("pairs").key("a", int).key("b", int).build();
    let seats = shape("seats");
    let row = |a: i64, b: i64| vec![Value::from(a), Value::from(b)];
    let mut sink = target.opened(&log).await;
    let ids = || (0..TABLES).zip(&others);
    log.transaction(ids().map(|(id, table)| Change::insert(table, row(id, 0))));
    log.transaction([
        Change::insert(&pairs, row(1, 2)),
        Change::insert(&seats, row(1, 1)),
        Change::insert(&seats, row(2, 2)),
    ]);
    apply(&mut sink, &log.batch()).await;
    target.constrain(&seats.table, &["n"]).await;
    let updates = |n: i64| ids().map(move |(id, table)| Change::update(table, row(id, n)));
    let expect = async |n: i64, b: &str, seated: [&str; 2]| {
        for (id, table) in ids() {
            assert_eq!(target.rows(&table.table).await, rows(&[&[&id.to_string(), &n.to_string()]]), "{}", table.table);
        }
        assert_eq!(target.rows(&pairs.table).await, rows(&[&["1", b]]));
        assert_eq!(target.rows(&seats.table).await, rows(&[&["1", seated[0]], &["2", seated[1]]]));
    };

    log.transaction(updates(1).chain([Change::update_key(&pairs, row(1, 2), row(1, 3))]));
    apply(&mut sink, &log.batch()).await;
    expect(1, "3", ["1", "2"]).await;
    // The same in small steps, of which one fails after it has used all temporary tables.
    let swap =
        [Change::update(&seats, row(1, 9)), Change::update(&seats, row(2, 1)), Change::update(&seats, row(1, 2))];
    let moved = [Change::update_key(&pairs, row(1, 3), row(1, 4))];
    log.transaction(updates(2).chain(updates(3)).chain(moved).chain(swap));
    apply(&mut sink, &log.batch()).await;
    expect(3, "4", ["2", "1"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h25_swapped_unique_values_are_applied_in_order() {
    let target = Target::fresh("h25").await;
    let mut log = Log::new();
    let seats = Shape::new("seats").key("id", ColumnType::Int4).column("seat", ColumnType::Int4).build();
    let seat = |id: i64, seat: i64| vec![Value::from(id), Value::from(seat)];
    let mut sink = target.opened(&log).await;
    log.transaction((0..100).map(|id| Change::insert(&seats, seat(id, id))));
    apply(&mut sink, &log.batch()).await;
    target.constrain(&seats.table, &["seat"]).await;
    // Every pair changes places, each by way of a free seat, among changes that violate nothing.
    let swap = |id: i64| {
        [
            Change::update(&seats, seat(id, 1000 + id)),
            Change::update(&seats, seat(id + 1, id)),
            Change::update(&seats, seat(id, id + 1)),
        ]
    };
    log.transaction((0..100).step_by(2).flat_map(swap).chain([Change::insert(&seats, seat(100, 100))]));
    apply(&mut sink, &log.batch_in_segments(20)).await;
    let mut expected: Vec<_> = (0..100).map(|id| [id, id ^ 1]).chain([[100, 100]]).collect();
    expected.sort_unstable();
    let found = query(&target.database, "SELECT id, seat FROM seats ORDER BY id").await;
    let expected: Vec<_> = expected.iter().map(|row| row.map(|n| Some(n.to_string())).to_vec()).collect();
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h25_foreign_keys_across_tables_are_applied_in_order() {
    for deferrable in ["", "DEFERRABLE"] {
        let target = Target::fresh("h25_fk").await;
        let mut log = Log::new();
        let orders = Shape::new("orders").key("id", ColumnType::Int4).build();
        let lines = Shape::new("lines").key("id", ColumnType::Int4).column("order_id", ColumnType::Int4).build();
        let line = |id: i64, order: i64| vec![Value::from(id), Value::from(order)];
        target.sql("CREATE TABLE orders (id int PRIMARY KEY)").await;
        let foreign_key = format!("order_id int REFERENCES orders {deferrable}");
        target.sql(&format!("CREATE TABLE lines (id int PRIMARY KEY, {foreign_key})")).await;
        let mut sink = target.opened(&log).await;
        log.transaction([Change::insert(&orders, [1.into()]), Change::insert(&lines, line(1, 1))]);
        // The batch meets `lines` first: as a whole, its rows come before those that they refer to.
        log.transaction([Change::delete(&lines, line(1, 0)), Change::delete(&orders, [1.into()])]);
        log.transaction([Change::insert(&orders, [2.into()]), Change::insert(&lines, line(2, 2))]);
        apply(&mut sink, &log.batch()).await;
        log.transaction([Change::update(&lines, line(2, 2))]);
        log.transaction([Change::insert(&orders, [3.into()]), Change::insert(&lines, line(3, 3))]);
        log.transaction([Change::delete(&lines, line(2, 0)), Change::delete(&orders, [2.into()])]);
        apply(&mut sink, &log.batch()).await;
        assert_eq!(target.rows(&orders.table).await, rows(&[&["3"]]), "{deferrable}");
        assert_eq!(target.rows(&lines.table).await, rows(&[&["3", "3"]]), "{deferrable}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h25_what_violates_in_order_too_stops_with_constraint_keys_and_remedy() {
    let target = Target::fresh("h25_stop").await;
    let mut log = Log::new();
    let seats = Shape::new("seats").key("id", ColumnType::Int4).column("seat", ColumnType::Int4).build();
    let seat = |id: i64, seat: i64| vec![Value::from(id), Value::from(seat)];
    target.sql("CREATE TABLE seats (id int PRIMARY KEY, seat int CONSTRAINT one_each UNIQUE)").await;
    target.sql("INSERT INTO seats VALUES (77, 5)").await;
    let mut sink = target.opened(&log).await;
    log.transaction((1..10).map(|id| Change::insert(&seats, seat(id, id))));
    let batch = log.batch();
    let Err(SinkError::Data { reason, remedy }) = try_apply(&mut sink, &batch).await else { panic!("no data error") };
    for part in ["one_each", "public.seats", "key (id)=(5)", "(seat)=(5)", "23505"] {
        assert!(reason.contains(part), "{part} is not in: {reason}");
    }
    assert!(remedy.contains("wallaby resume"), "{remedy}");
    assert_eq!(target.rows(&seats.table).await, rows(&[&["77", "5"]]), "nothing of the batch stays");
    target.sql("DELETE FROM seats").await;
    assert_eq!(sink.open(Epoch(1)).await.unwrap().position, Some(batch.from));
    assert_eq!(try_apply(&mut sink, &batch).await.unwrap(), Applied::Durable(batch.to));
}
