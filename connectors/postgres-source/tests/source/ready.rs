//! `wallaby doctor`'s findings, set-up, and rows by key.

use std::collections::BTreeSet;
use std::sync::Arc;

use wallaby_connector_api::SourceLookup;
use wallaby_model::flow::Failover;
use wallaby_model::{Op, TableName};
use wallaby_postgres_source::{
    Capture, ConnectConfig, Finding, Lookup, PublicationWanted, ReplicationClient, SlotWanted, SnapshotExport,
    SourceError, Status, connect_control, drop_publication, ensure_publication, ensure_slot, preflight, publish_tables,
    published_tables, source_status, tables_digest, unpublish_tables,
};
use wallaby_testkit::{Database, Postgres, PostgresOptions, Shutdown, eventually};

use crate::kit::{Flow, LIMIT, Running, as_user, owner, publication, rows_of, slot};

fn find<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.check == check).unwrap_or_else(|| panic!("no {check} in {findings:#?}"))
}

fn failed(findings: &[Finding]) -> Vec<&'static str> {
    findings.iter().filter(|finding| finding.status == Status::Fail).map(|finding| finding.check).collect()
}

#[tokio::test]
async fn a_ready_source_has_no_finding_that_fails_before_and_after_it_is_set_up() {
    let db = Database::create("ready").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let (wanted, slot) = (publication(db.name(), &["public.*"]), slot(db.name()));
    let findings = preflight(&config, &wanted, &slot).await;
    assert_eq!(failed(&findings), [""; 0], "{findings:#?}");
    let flow = Flow::create(&db).await;
    let _run = flow.start(1, flow.first_position()).await;
    let findings = preflight(&config, &wanted, &slot).await;
    assert_eq!(failed(&findings), [""; 0], "{findings:#?}");
    assert!(find(&findings, "slot").message.contains("read by WALlaby"));
    let status = source_status(&db, db.name()).await.unwrap();
    assert!(status.active && status.wal_status == "reserved" && status.current >= status.confirmed);
}

#[tokio::test]
async fn every_gap_of_a_poor_role_is_mended_by_the_statements_that_are_printed() {
    let db = Database::create("poor").await;
    let user = format!("u_{}", db.name());
    db.batch_execute(&format!(
        "CREATE ROLE {user} LOGIN PASSWORD 'pw';
         CREATE TABLE keyed (id int PRIMARY KEY); CREATE TABLE keyless (id int);
         REVOKE ALL ON DATABASE {0} FROM PUBLIC; GRANT CONNECT ON DATABASE {0} TO {user}",
        db.name()
    ))
    .await
    .unwrap();
    let config = as_user(&db, &user);
    let mut wanted = publication(db.name(), &["public.*"]);
    let slot = slot(db.name());
    let findings = preflight(&config, &wanted, &slot).await;
    assert_eq!(
        failed(&findings),
        ["replication_role", "publication", "replica_identity", "select", "ownership"],
        "{findings:#?}"
    );
    for check in ["replication_role", "publication", "replica_identity", "select", "ownership"] {
        let sql = find(&findings, check).remedy_sql.clone().unwrap();
        db.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{check}: {sql}: {error}"));
    }
    wanted.create = false;
    let findings = preflight(&config, &wanted, &slot).await;
    assert_eq!(failed(&findings), [""; 0], "{findings:#?}");
    // What doctor calls ready is ready.
    let control = connect_control(&config).await.unwrap();
    ensure_publication(&control, &wanted).await.unwrap();
    ensure_slot(&config, &control, &slot).await.unwrap();
    let options = wallaby_postgres_source::CaptureOptions::new(config, owner(db.name(), 1), db.name(), db.name());
    Capture::prepare(options).await.unwrap();
    drop(control);
    db.batch_execute(&format!("SELECT pg_drop_replication_slot('{}')", db.name())).await.unwrap();
    db.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}")).await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_dsn_tables_publication_and_slot_is_said() {
    let db = Database::create("wrong").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (id int)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let name = db.name();

    let wrong = ConnectConfig::parse(&db.dsn().replace("://postgres:", "://postgres:x")).unwrap();
    let findings = preflight(&wrong, &publication(name, &["public.*"]), &slot(name)).await;
    assert_eq!(failed(&findings), ["connection"]);
    assert!(findings[0].message.contains("password"), "{findings:?}");

    let findings = preflight(&config, &publication(name, &["public.T"]), &slot(name)).await;
    assert_eq!(failed(&findings), ["tables"]);
    assert!(find(&findings, "tables").message.contains("did you mean public.t?"));

    let control = connect_control(&config).await.unwrap();
    let refused = ensure_publication(&control, &publication(name, &["public.*"])).await.unwrap_err();
    assert_eq!(refused.reason(), "TableWithoutKey");
    assert!(refused.remedy().unwrap().contains("ALTER TABLE \"public\".\"keyless\" REPLICA IDENTITY FULL"));
    let refused = ensure_publication(&control, &publication(name, &["public.none"])).await.unwrap_err();
    assert_eq!(refused.reason(), "TableMissing");

    let not_ours = PublicationWanted { create: false, ..publication(name, &[]) };
    let slot_not_ours = SlotWanted { create: false, ..slot(name) };
    assert_eq!(ensure_publication(&control, &not_ours).await.unwrap_err().reason(), "PublicationMissing");
    assert_eq!(ensure_slot(&config, &control, &slot_not_ours).await.unwrap_err().reason(), "SlotMissing");
    let findings = preflight(&config, &not_ours, &slot_not_ours).await;
    assert_eq!(failed(&findings), ["slot", "publication"]);
    assert!(find(&findings, "slot").remedy_sql.as_ref().unwrap().contains("pg_create_logical_replication_slot"));

    db.batch_execute(&format!("SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')")).await.unwrap();
    let findings = preflight(&config, &publication(name, &["public.t"]), &slot(name)).await;
    assert!(find(&findings, "slot").message.contains("test_decoding"));
    assert_eq!(ensure_slot(&config, &control, &slot(name)).await.unwrap_err().reason(), "SlotUnfit");
}

/// Checks that are not fine, with how they ended.
fn not_fine(findings: &[Finding]) -> Vec<(&'static str, Status)> {
    let not_fine = findings.iter().filter(|finding| finding.status != Status::Ok);
    not_fine.map(|finding| (finding.check, finding.status)).collect()
}

/// Runs what is printed. `ALTER SYSTEM` goes by itself only.
async fn run_remedy(db: &Database<'_>, finding: &Finding) {
    let sql = finding.remedy_sql.as_ref().unwrap_or_else(|| panic!("no remedy: {finding:?}"));
    for statement in sql.split(';').filter(|statement| !statement.trim().is_empty()) {
        let done = db.batch_execute(statement).await;
        done.unwrap_or_else(|error| panic!("{}: {statement}: {error}", finding.check));
    }
}

#[tokio::test]
async fn each_setting_of_a_server_that_is_not_fit_is_mended_by_its_statements() {
    let options = PostgresOptions::default()
        .setting("wal_level", "replica")
        .setting("max_replication_slots", "0")
        .setting("max_wal_senders", "0")
        .setting("max_slot_wal_keep_size", "100MB")
        .setting("wal_sender_timeout", "0")
        .setting("idle_replication_slot_timeout", "90s")
        .setting("synchronized_standby_slots", "nobody, nobody_else");
    let pg = Postgres::start(options).await.unwrap();
    let db = Database::create_on(&pg, "level").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let (wanted, slot) = (publication(db.name(), &["public.*"]), slot(db.name()));
    let findings = preflight(&config, &wanted, &slot).await;
    let expected = [
        ("wal_level", Status::Fail, "wal_level is replica"),
        ("max_replication_slots", Status::Fail, "all 0 replication slots"),
        ("max_wal_senders", Status::Fail, "all 0 walsenders are in use"),
        ("wal_sender_timeout", Status::Warn, "wal_sender_timeout is 0"),
        // No walsender is to be had.
        ("replication_connection", Status::Fail, "Raise max_connections or max_wal_senders"),
        ("max_slot_wal_keep_size", Status::Warn, "100 MB of WAL"),
        ("idle_replication_slot_timeout", Status::Warn, "nobody reads for 90 s"),
        ("synchronized_standby_slots", Status::Warn, "nobody, nobody_else, and 2 of them are not active"),
    ];
    assert_eq!(not_fine(&findings), expected.map(|(check, status, _)| (check, status)), "{findings:#?}");
    for (check, _, said) in expected {
        let finding = find(&findings, check);
        assert!(finding.message.contains(said), "{finding:?}");
        if check != "replication_connection" {
            run_remedy(&db, finding).await;
        }
    }
    let control = connect_control(&config).await.unwrap();
    let error = ensure_slot(&config, &control, &slot).await.unwrap_err();
    assert_eq!(error.reason(), "WalLevel");
    assert!(error.remedy().unwrap().contains("ALTER SYSTEM SET wal_level"));
    pg.restart(Shutdown::Fast).await.unwrap();
    let findings = preflight(&config, &wanted, &slot).await;
    assert_eq!(not_fine(&findings), [], "{findings:#?}");

    // Where a reload is enough.
    let db = Database::create_on(&pg, "level_again").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    db.batch_execute("ALTER SYSTEM SET wal_sender_timeout = '1999ms'").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let short = async || {
        let findings = preflight(&config, &wanted, &slot).await;
        find(&findings, "wal_sender_timeout").clone()
    };
    let found = eventually(LIMIT, "the short timeout is found", async || {
        let found = short().await;
        if found.status == Status::Warn { Ok(found) } else { Err(found) }
    })
    .await;
    assert!(found.message.contains("1999 ms"), "{found:?}");
    run_remedy(&db, &found).await;
    eventually(LIMIT, "the timeout is mended", async || {
        let found = short().await;
        if found.status == Status::Ok { Ok(()) } else { Err(found) }
    })
    .await;
}

/// A stream and, for a moment, a run beside it: each has a slot and a walsender.
#[tokio::test]
async fn a_server_without_room_for_a_run_beside_the_stream_is_found_out() {
    let options = PostgresOptions::default().setting("max_replication_slots", "2").setting("max_wal_senders", "2");
    let pg = Postgres::start(options).await.unwrap();
    let db = Database::create_on(&pg, "room").await;
    db.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let (wanted, slot) = (publication(db.name(), &["public.*"]), slot(db.name()));
    // A walsender whose client went, also doctor's own, ends by and by.
    let found = async || not_fine(&preflight(&config, &wanted, &slot).await);
    let finds = async |expected: &[(&str, Status)]| {
        eventually(LIMIT, "doctor finds what the test holds", async || {
            let found = found().await;
            if found == expected { Ok(()) } else { Err(found) }
        })
        .await;
    };
    let other = async |name: &str| {
        db.batch_execute(&format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")).await.unwrap();
    };
    let gone =
        async |name: &str| db.batch_execute(&format!("SELECT pg_drop_replication_slot('{name}')")).await.unwrap();
    let run = async || SnapshotExport::open(&config, &owner(db.name(), 1), LIMIT).await.map(|_| ());

    finds(&[]).await;
    other("one").await;
    finds(&[("max_replication_slots", Status::Warn)]).await;
    other("two").await;
    finds(&[("max_replication_slots", Status::Fail)]).await;
    gone("two").await;
    let flow = Flow::create(&db).await;
    finds(&[("max_replication_slots", Status::Warn)]).await;
    assert_eq!(run().await.unwrap_err().reason(), "LimitReached");
    gone("one").await;
    finds(&[]).await;
    run().await.unwrap();

    let walsender = async || ReplicationClient::connect(&config).await.unwrap();
    let first = walsender().await;
    finds(&[("max_wal_senders", Status::Warn)]).await;
    let second = walsender().await;
    finds(&[("max_wal_senders", Status::Fail), ("replication_connection", Status::Fail)]).await;
    drop((first, second));
    finds(&[]).await;
    let stream = flow.start(1, flow.first_position()).await;
    finds(&[]).await;
    let beside = walsender().await;
    finds(&[("max_wal_senders", Status::Warn), ("replication_connection", Status::Fail)]).await;
    assert_eq!(run().await.unwrap_err().reason(), "TooManyConnections");
    drop(beside);
    finds(&[]).await;
    other("one").await;
    let findings = preflight(&config, &wanted, &slot).await;
    let finding = find(&findings, "max_replication_slots");
    assert!(finding.message.contains("each run") && finding.status == Status::Warn, "{finding:?}");
    run_remedy(&db, finding).await;
    drop(stream);
    pg.restart(Shutdown::Fast).await.unwrap();
    finds(&[]).await;
}

#[tokio::test]
async fn row_security_that_applies_to_the_role_is_mended_by_the_statement_that_is_printed() {
    let db = Database::create("rows_hidden").await;
    let user = format!("u_{}", db.name());
    db.batch_execute(&format!(
        "CREATE ROLE {user} LOGIN REPLICATION PASSWORD 'pw'; CREATE TABLE t (id int PRIMARY KEY);
         CREATE TABLE own (id int PRIMARY KEY); CREATE TABLE forced (id int PRIMARY KEY);
         CREATE TABLE root (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root DEFAULT;
         ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY all_of_them ON t USING (true);
         ALTER TABLE own ENABLE ROW LEVEL SECURITY; ALTER TABLE own OWNER TO {user};
         ALTER TABLE forced ENABLE ROW LEVEL SECURITY; ALTER TABLE forced OWNER TO {user};
         ALTER TABLE forced FORCE ROW LEVEL SECURITY; ALTER TABLE leaf ENABLE ROW LEVEL SECURITY;
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user};
         CREATE PUBLICATION {} FOR TABLE t, own, forced, root WITH (publish_via_partition_root = true)",
        db.name()
    ))
    .await
    .unwrap();
    let not_ours = PublicationWanted { create: false, ..publication(db.name(), &[]) };
    let findings = preflight(&as_user(&db, &user), &not_ours, &slot(db.name())).await;
    assert_eq!(failed(&findings), ["row_security"], "{findings:#?}");
    let finding = find(&findings, "row_security");
    assert!(finding.message.contains("security of public.forced, public.leaf, public.t applies"), "{finding:?}");
    run_remedy(&db, finding).await;
    let findings = preflight(&as_user(&db, &user), &not_ours, &slot(db.name())).await;
    assert_eq!(failed(&findings), [""; 0], "{findings:#?}");
    db.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}")).await.unwrap();
}

#[tokio::test]
async fn the_tables_size_is_told_beside_what_has_to_hold_it() {
    let db = Database::create("size").await;
    db.batch_execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 20000) n;
         CREATE TABLE root (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root DEFAULT;
         ALTER TABLE leaf ALTER v SET STORAGE EXTERNAL; INSERT INTO root VALUES (1, repeat('x', 5000000))",
    )
    .await
    .unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let size = async |sql: &str| db.query_one(sql, &[]).await.unwrap().get::<_, String>(0);
    let both = size("SELECT pg_size_pretty(pg_table_size('t') + pg_table_size('leaf'))").await;
    let one = size("SELECT pg_size_pretty(pg_table_size('t'))").await;
    assert!(both.ends_with(" kB") && one.ends_with(" kB") && both != one, "{both}, {one}");
    for (tables, expected) in [(&["public.t", "public.root"][..], both), (&["public.t"], one)] {
        let findings = preflight(&config, &publication(db.name(), tables), &slot(db.name())).await;
        let finding = find(&findings, "size");
        assert_eq!(finding.status, Status::Ok);
        let said = &finding.message;
        assert!(said.starts_with(&format!("the tables have {expected}: the log (spec.log.maxBytes)")), "{finding:?}");
    }
}

#[tokio::test]
async fn a_publication_that_several_make_and_alter_at_a_time_is_as_wanted() {
    const AT_A_TIME: usize = 8;
    let db = Database::create("at_a_time").await;
    db.batch_execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let mut controls = Vec::new();
    for _ in 0..AT_A_TIME {
        controls.push(connect_control(&config).await.unwrap());
    }
    // Made by all, then widened by all, then narrowed by all.
    for round in 0..5 {
        let name = format!("{}_{round}", db.name());
        for tables in [&["public.a"][..], &["public.a", "public.b"], &["public.b"]] {
            let wanted = publication(&name, tables);
            let all = controls.iter().map(|control| ensure_publication(control, &wanted));
            for done in futures::future::join_all(all).await {
                done.unwrap_or_else(|error| panic!("{tables:?}: {error}"));
            }
            let found = db
                .query_one(
                    "SELECT count(*), min('public.' || tablename) FROM pg_publication_tables WHERE pubname = $1",
                    &[&name],
                )
                .await
                .unwrap();
            assert_eq!(found.get::<_, i64>(0), i64::try_from(tables.len()).unwrap());
            assert_eq!(found.get::<_, &str>(1), tables[0]);
        }
    }
}

#[tokio::test]
async fn tables_that_come_and_go_beside_it_do_not_stop_the_publication() {
    let db = Database::create("come_and_go").await;
    db.batch_execute("CREATE TABLE stays (id int PRIMARY KEY)").await.unwrap();
    let control = connect_control(&ConnectConfig::parse(&db.dsn()).unwrap()).await.unwrap();
    let wanted = publication(db.name(), &["public.*"]);
    let come_and_go = async |name: &str| {
        let client = db.connect().await;
        loop {
            client.batch_execute(&format!("CREATE TABLE {name} (id int PRIMARY KEY)")).await.unwrap();
            client.batch_execute(&format!("DROP TABLE {name}")).await.unwrap();
        }
    };
    let look = async || {
        for _ in 0..60 {
            if let Err(error) = ensure_publication(&control, &wanted).await {
                assert!(error.is_transient(), "{error}");
            }
        }
    };
    tokio::select! {
        () = look() => {}
        () = come_and_go("a") => {}
        () = come_and_go("b") => {}
        () = come_and_go("c") => {}
    }
}

#[tokio::test]
async fn b82_the_publication_follows_the_list_and_b83_the_slot_fails_over() {
    let db = Database::create("follows").await;
    db.batch_execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); CREATE TABLE \"C.\"\"x\" (id int PRIMARY KEY)").await.unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let control = connect_control(&config).await.unwrap();
    let name = format!("{} pub", db.name());
    let tables = async || {
        let rows = db
            .query("SELECT tablename::text FROM pg_publication_tables WHERE pubname = $1 ORDER BY 1", &[&name])
            .await
            .unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>()
    };
    ensure_publication(&control, &publication(&name, &["public.a"])).await.unwrap();
    assert_eq!(tables().await, ["a"]);
    // Who looks again and again only adds; what is not there keeps nothing out.
    let looked = published_tables(&control, &publication(&name, &["public.b", "public.none"])).await.unwrap();
    assert_eq!(looked.absent, BTreeSet::from([TableName::new("public", "b")]));
    assert_eq!(looked.surplus, BTreeSet::from([TableName::new("public", "a")]));
    assert_eq!(looked.unfit.iter().map(SourceError::reason).collect::<Vec<_>>(), ["TableMissing"]);
    let before = tables_digest(&control, &name).await.unwrap();
    assert_eq!(before, tables_digest(&control, &name).await.unwrap());
    // One that somebody else adds meanwhile is no reason to refuse the other.
    let more = BTreeSet::from(["a", "b", "none"].map(|table| TableName::new("public", table)));
    assert!(publish_tables(&control, &name, &more).await.unwrap().is_empty());
    assert_eq!(tables().await, ["a", "b"]);
    assert_ne!(before, tables_digest(&control, &name).await.unwrap());
    unpublish_tables(&control, &name, &more).await.unwrap();
    assert_eq!(tables().await, [] as [&str; 0]);
    publish_tables(&control, &name, &more).await.unwrap();
    let made: u32 = db.query_one("SELECT oid FROM pg_publication WHERE pubname = $1", &[&name]).await.unwrap().get(0);
    let mut wanted = publication(&name, &["public.*"]);
    wanted.exclude = vec!["public.a".into()];
    ensure_publication(&control, &wanted).await.unwrap();
    assert_eq!(tables().await, ["C.\"x", "b"]);
    let now: u32 = db.query_one("SELECT oid FROM pg_publication WHERE pubname = $1", &[&name]).await.unwrap().get(0);
    assert_eq!(made, now, "it was altered, not made again");
    // Who looks again and again does not make what went missing (hazard 20).
    let away = format!("{name} away");
    db.batch_execute(&format!("ALTER PUBLICATION \"{name}\" RENAME TO \"{away}\"")).await.unwrap();
    let missing = published_tables(&control, &wanted).await.unwrap_err();
    assert_eq!(missing.reason(), "PublicationMissing");
    assert!(missing.remedy().unwrap().contains("was dropped or renamed while the flow ran"), "{:?}", missing.remedy());
    db.batch_execute(&format!("ALTER PUBLICATION \"{away}\" RENAME TO \"{name}\"")).await.unwrap();
    let looked = published_tables(&control, &wanted).await.unwrap();
    assert_eq!(looked.published.len(), 2);
    assert!(looked.absent.is_empty() && looked.unfit.is_empty() && looked.unsound.is_empty());
    for (suffix, failover, wanted) in [("auto", Failover::Auto, true), ("off", Failover::Off, false)] {
        let slot = SlotWanted { failover, ..slot(&format!("{}_{suffix}", db.name())) };
        ensure_slot(&config, &control, &slot).await.unwrap();
        ensure_slot(&config, &control, &slot).await.unwrap();
        let row = db
            .query_one("SELECT failover FROM pg_replication_slots WHERE slot_name = $1", &[&slot.name])
            .await
            .unwrap();
        assert_eq!(row.get::<_, bool>(0), wanted);
    }
    drop_publication(&control, &name).await.unwrap();
    drop_publication(&control, &name).await.unwrap();
}

#[tokio::test]
async fn b82_tables_that_inherit_are_published_one_by_one() {
    let db = Database::create("inherits").await;
    db.batch_execute(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
         CREATE TABLE grown (id int PRIMARY KEY);
         CREATE TABLE root (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root DEFAULT;",
    )
    .await
    .unwrap();
    let control = connect_control(&ConnectConfig::parse(&db.dsn()).unwrap()).await.unwrap();
    let tables = async || {
        let sql = "SELECT prrelid::regclass::text FROM pg_publication_rel JOIN pg_publication p ON p.oid = prpubid
                   WHERE pubname = $1 ORDER BY 1";
        let rows = db.query(sql, &[&db.name()]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>()
    };
    // A name alone is that table alone.
    ensure_publication(&control, &publication(db.name(), &["public.parent"])).await.unwrap();
    assert_eq!(tables().await, ["parent"]);
    let mut wanted = publication(db.name(), &["public.*"]);
    ensure_publication(&control, &wanted).await.unwrap();
    assert_eq!(tables().await, ["child", "grown", "parent", "root"]);
    // The parent goes, the child stays.
    wanted.exclude = vec!["public.parent".into()];
    ensure_publication(&control, &wanted).await.unwrap();
    assert_eq!(tables().await, ["child", "grown", "root"]);
    // A parent that comes after a child which is published.
    db.batch_execute("CREATE TABLE late (id int NOT NULL PRIMARY KEY); ALTER TABLE grown INHERIT late").await.unwrap();
    ensure_publication(&control, &wanted).await.unwrap();
    assert_eq!(tables().await, ["child", "grown", "late", "root"]);
}

#[tokio::test]
async fn a_table_that_postgres_gives_no_identity_is_not_published_so_that_the_source_goes_on() {
    let db = Database::create("no_identity").await;
    db.batch_execute(
        "CREATE TABLE later (id int PRIMARY KEY DEFERRABLE, v int);
         CREATE TABLE root (id int, v int) PARTITION BY RANGE (id); CREATE TABLE middle PARTITION OF root DEFAULT PARTITION BY RANGE (id);
         CREATE TABLE leaf PARTITION OF middle FOR VALUES FROM (0) TO (10); CREATE TABLE whole PARTITION OF middle DEFAULT;
         ALTER TABLE root REPLICA IDENTITY FULL; ALTER TABLE whole REPLICA IDENTITY FULL;
         CREATE TABLE keyed (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE keyed_leaf PARTITION OF keyed DEFAULT;
         INSERT INTO later VALUES (1, 1); INSERT INTO root VALUES (1, 1);",
    )
    .await
    .unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let control = connect_control(&config).await.unwrap();
    for (table, named) in [("public.later", "later"), ("public.root", "leaf")] {
        let wanted = publication(db.name(), &[table]);
        let refused = ensure_publication(&control, &wanted).await;
        // Had it been published, these would be refused.
        db.batch_execute("UPDATE later SET v = 2; UPDATE root SET v = 2").await.unwrap();
        let refused = refused.unwrap_err();
        let SourceError::TableWithoutKey { tables } = &refused else { panic!("{refused}") };
        assert_eq!(tables.iter().map(|table| table.name.as_str()).collect::<Vec<_>>(), [named]);
        let full = format!("ALTER TABLE \"public\".\"{named}\" REPLICA IDENTITY FULL");
        assert!(refused.remedy().unwrap().contains(&full), "{refused}");
        let findings = preflight(&config, &wanted, &slot(db.name())).await;
        assert_eq!(find(&findings, "replica_identity").remedy_sql, Some(format!("{full};")));
        db.batch_execute(&full).await.unwrap();
    }
    ensure_publication(&control, &publication(db.name(), &["public.*"])).await.unwrap();
    db.batch_execute("UPDATE later SET v = 3; UPDATE root SET v = 3; UPDATE keyed SET id = 3; DELETE FROM root")
        .await
        .unwrap();
}

/// A row of a partition is sent as one of its root, but with as much of the old row as the partition's own identity has.
#[tokio::test]
async fn a_partition_whose_identity_is_less_than_its_roots_is_not_published() {
    let db = Database::create("narrow").await;
    db.batch_execute(
        "CREATE TABLE root (id int NOT NULL, v text) PARTITION BY RANGE (id); ALTER TABLE root REPLICA IDENTITY FULL;
         CREATE TABLE root_leaf PARTITION OF root (PRIMARY KEY (id)) FOR VALUES FROM (0) TO (10);
         CREATE TABLE root_whole PARTITION OF root DEFAULT; ALTER TABLE root_whole REPLICA IDENTITY FULL;
         CREATE TABLE marked (id int NOT NULL, code int NOT NULL) PARTITION BY RANGE (code);
         CREATE UNIQUE INDEX marked_code ON marked (code); ALTER TABLE marked REPLICA IDENTITY USING INDEX marked_code;
         CREATE TABLE marked_leaf PARTITION OF marked (PRIMARY KEY (id)) DEFAULT;
         CREATE TABLE keyed (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); ALTER TABLE keyed REPLICA IDENTITY FULL;
         CREATE TABLE keyed_leaf PARTITION OF keyed DEFAULT;",
    )
    .await
    .unwrap();
    let config = ConnectConfig::parse(&db.dsn()).unwrap();
    let control = connect_control(&config).await.unwrap();
    // What would come of it.
    let name = db.name().to_owned();
    let by_hand = "FOR TABLE root, marked, keyed WITH (publish_via_partition_root = true)";
    db.batch_execute(&format!("CREATE PUBLICATION {name} {by_hand}")).await.unwrap();
    let flow = Flow { slot: ensure_slot(&config, &control, &slot(&name)).await.unwrap(), config, control, name };
    let mut run = flow.start(1, flow.first_position()).await;
    let of_a_delete = async |run: &mut Running| {
        let rows = run.rows(6).await;
        let deletes = rows.into_iter().filter(|row| row.op == Op::DeleteRow || row.op == Op::DeleteKey);
        deletes.map(|row| (row.table, row.values)).collect::<Vec<_>>()
    };
    let change =
        "INSERT INTO root VALUES (1, 'a'); INSERT INTO marked VALUES (1, 7); INSERT INTO keyed VALUES (1, 'a');
        DELETE FROM root; DELETE FROM marked; DELETE FROM keyed";
    db.batch_execute(change).await.unwrap();
    let row = |table: &str, values: [&str; 2]| (format!("public.{table}"), values.map(str::to_owned).to_vec());
    let narrow = [row("root", ["1", "NULL"]), row("marked", ["1", "NULL"]), row("keyed", ["1", "NULL"])];
    assert_eq!(of_a_delete(&mut run).await, narrow);

    // A publication that is not ours; and one that sends each partition's rows as its own.
    let not_ours = PublicationWanted { create: false, ..publication(db.name(), &[]) };
    let findings = preflight(&flow.config, &not_ours, &slot(db.name())).await;
    let both = find(&findings, "replica_identity").remedy_sql.as_deref().unwrap_or_default();
    assert!(both.contains("\"root_leaf\"") && both.contains("\"marked_leaf\""), "{findings:?}");
    db.batch_execute("CREATE PUBLICATION each FOR TABLE root, marked, keyed").await.unwrap();
    let each = publication("each", &["public.root", "public.marked", "public.keyed"]);
    let findings = preflight(&flow.config, &each, &slot(db.name())).await;
    assert_eq!(find(&findings, "replica_identity").status, Status::Ok, "{findings:?}");
    ensure_publication(&flow.control, &each).await.unwrap();

    for (table, leaf) in [("public.root", "root_leaf"), ("public.marked", "marked_leaf")] {
        let wanted = publication(db.name(), &[table]);
        let refused = ensure_publication(&flow.control, &wanted).await.unwrap_err();
        let SourceError::PartitionIdentity { tables } = &refused else { panic!("{refused}") };
        assert_eq!(tables.iter().map(|table| table.name.as_str()).collect::<Vec<_>>(), [leaf]);
        let full = format!("ALTER TABLE \"public\".\"{leaf}\" REPLICA IDENTITY FULL");
        assert!(!refused.is_transient() && refused.remedy().unwrap().contains(&full), "{refused}");
        let findings = preflight(&flow.config, &wanted, &slot(db.name())).await;
        assert_eq!(find(&findings, "replica_identity").remedy_sql, Some(format!("{full};")));
        db.batch_execute(&full).await.unwrap();
    }
    // The partition of `keyed` has its root's key: that is what a sink looks for.
    ensure_publication(&flow.control, &publication(db.name(), &["public.*"])).await.unwrap();
    db.batch_execute(change).await.unwrap();
    let whole = [row("root", ["1", "a"]), row("marked", ["1", "7"]), row("keyed", ["1", "NULL"])];
    assert_eq!(of_a_delete(&mut run).await, whole);
}

#[tokio::test]
async fn a_row_by_its_key_is_the_tables_own_and_the_key_one_that_the_stream_would_have() {
    let db = Database::create("lookup_own").await;
    db.batch_execute(
        "CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
         CREATE TABLE root (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root DEFAULT;",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute("INSERT INTO parent VALUES (1, 'parent'); INSERT INTO root VALUES (1, 'root')").await.unwrap();
    let segment = run.segment().await;
    let [parent, root] = ["parent", "root"].map(|name| {
        let tables = &segment.body.tables;
        Arc::clone(&tables.iter().find(|table| table.schema.table.name == name).unwrap().schema)
    });
    db.batch_execute("INSERT INTO child VALUES (2, 'child')").await.unwrap();
    let lookup = Lookup::new(flow.config.clone(), &flow.name);
    let key = |id: &str| vec![Some(id.to_owned())];
    for (schema, value) in [(&parent, "parent"), (&root, "root")] {
        let body = lookup.row_by_key(schema, &key("1")).await.unwrap().unwrap();
        assert_eq!(rows_of(&body)[0].values, ["1", value]);
        assert_eq!(body.tables[0].schema, *schema);
    }
    let found = lookup.row_by_key(&parent, &key("2")).await.unwrap();
    assert!(found.is_none(), "a row of a table that inherits from it: {:?}", found.map(|body| rows_of(&body)));

    db.batch_execute("ALTER TABLE parent DROP CONSTRAINT parent_pkey, ADD PRIMARY KEY (id) DEFERRABLE").await.unwrap();
    db.batch_execute("INSERT INTO parent VALUES (3, 'x')").await.unwrap();
    let streamed = loop {
        let segment = run.segment().await;
        let table = segment.body.tables.iter().find(|table| table.schema.table == parent.table);
        if let Some(table) = table {
            break Arc::clone(&table.schema);
        }
    };
    assert!(streamed.key().is_empty(), "{streamed:?}");
    let body = lookup.row_by_key(&parent, &key("1")).await.unwrap().unwrap();
    assert_eq!(body.tables[0].schema, streamed);
}

#[tokio::test]
async fn b47_a_row_by_its_key_equals_the_row_that_was_streamed() {
    let db = Database::create("lookup").await;
    db.batch_execute(
        "CREATE TABLE t (a int, b text, PRIMARY KEY (b, a), c char(5), ts timestamptz, by bytea, n numeric, i interval, ok bool, arr text[],
                         g int GENERATED ALWAYS AS (a + 1) STORED)",
    )
    .await
    .unwrap();
    let flow = Flow::create(&db).await;
    let mut run = flow.start(1, flow.first_position()).await;
    db.batch_execute(r"INSERT INTO t (a, b, c, ts, by, n, i, ok, arr) VALUES (1, 'it''s \', 'ab', '2026-01-01 12:00+02', '\x00ff', 3.30, '1 day', true, '{a,NULL}'); INSERT INTO t (a, b) VALUES (2, 'x')")
        .await
        .unwrap();
    let segment = run.segment().await;
    let schema = Arc::clone(&segment.body.tables[0].schema);
    assert_eq!(schema.key(), [1, 0], "the key's own order");
    let mut streamed = rows_of(&segment.body);
    while streamed.len() < 2 {
        streamed.extend(rows_of(&run.segment().await.body));
    }
    let lookup = Lookup::new(flow.config.clone(), &flow.name);
    for (key, row) in [(["it's \\", "1"], &streamed[0]), (["x", "2"], &streamed[1])] {
        let key = key.iter().map(|part| Some((*part).to_owned())).collect();
        let body = lookup.row_by_key(&schema, &key).await.unwrap().unwrap();
        assert_eq!(body.tables[0].schema.id(), schema.id(), "{:?}", body.tables[0].schema);
        let found = &rows_of(&body)[0];
        assert_eq!((&found.values, found.op), (&row.values, Op::Insert));
    }
    let gone = vec![Some("no".to_owned()), Some("9".to_owned())];
    assert!(lookup.row_by_key(&schema, &gone).await.unwrap().is_none());
    // Several at a time: in the keys' order, and no more than asked for.
    let keys = [["x", "2"], ["no", "9"], ["it's \\", "1"], ["x", "2"]];
    let keys = keys.map(|key| key.iter().map(|part| Some((*part).to_owned())).collect::<Vec<_>>());
    let values = |row: &wallaby_model::SegmentBody| rows_of(row)[0].values.clone();
    let all = lookup.rows_by_keys(&schema, &keys[..3], usize::MAX).await.unwrap();
    let found: Vec<_> = all.rows.iter().map(values).collect();
    assert_eq!((all.keys, found), (3, vec![streamed[1].values.clone(), streamed[0].values.clone()]));
    let first = lookup.rows_by_keys(&schema, &keys[1..], 1).await.unwrap();
    let found: Vec<_> = first.rows.iter().map(values).collect();
    assert_eq!((first.keys, found), (2, vec![streamed[0].values.clone()]));
    // The connection is lost, the next question opens another.
    db.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'", &[]).await.unwrap();
    wallaby_testkit::eventually(crate::kit::LIMIT, "it answers again", async || {
        lookup.row_by_key(&schema, &gone).await.map(|_| ())
    })
    .await;
    db.batch_execute("ALTER TABLE t ADD COLUMN later text DEFAULT 'new'").await.unwrap();
    let key = vec![Some("x".to_owned()), Some("2".to_owned())];
    let body = lookup.row_by_key(&schema, &key).await.unwrap().unwrap();
    assert_eq!(rows_of(&body)[0].values.last().unwrap(), "new");
}
