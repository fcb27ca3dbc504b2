//! A sink that is opened for the first time: its bookkeeping, its tables, its position.

use wallaby_model::RunId;
use wallaby_pool_worker::failpoint::Failpoint;

use super::{LEDGER, add, at, captures, ledger, number};
use crate::scene::*;

/// Where the worker dies.
#[derive(Clone, Copy, Debug)]
enum Dies {
    /// At a failpoint of its own.
    At(Failpoint),
    /// While the sink's server is at the beginning, or the end, of making the table: the session is left behind in its transaction.
    Making(&'static str),
}

/// Stops the server, while the test holds the lock, in whoever makes the ledger.
fn gate(event: &str) -> String {
    format!(
        r#"CREATE FUNCTION gate() RETURNS event_trigger LANGUAGE plpgsql SET lock_timeout = 0 AS $$ BEGIN
             IF current_query() LIKE 'CREATE TABLE "public"."ledger"%' THEN PERFORM pg_advisory_xact_lock_shared(4711); END IF;
           END $$;
           CREATE EVENT TRIGGER gate ON {event} WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION gate()"#
    )
}

const BACKENDS: &str = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'";

/// That the worker stands where the test means it to.
async fn stands_there(scene: &Scene, point: Failpoint) {
    let tables = "SELECT count(*) FROM pg_tables WHERE tablename = 'ledger'";
    let has_table = number(&scene.target, tables).await.unwrap() == 1;
    let positions = "SELECT count(position) FROM wallaby.checkpoints";
    assert_eq!(number(&scene.target, positions).await.unwrap(), 0, "{point:?}: it has no position yet");
    if point == Failpoint::StopAfterSinkOpened {
        assert!(!has_table);
    }
    if point == Failpoint::StopAfterTableMade {
        let said = scene.coordination.sink_runs(&scene.flow, RunId(1)).await.unwrap();
        assert!(has_table && said.values().all(|state| state.tables.is_empty()), "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_half_way_through_a_sinks_first_opening_the_next_owner_goes_on() {
    let cases = [
        ("never", Dies::At(Failpoint::StopAfterSinkOpened)),
        ("never", Dies::At(Failpoint::StopBeforeStream)),
        ("never", Dies::Making("ddl_command_start")),
        ("never", Dies::Making("ddl_command_end")),
        ("initial", Dies::At(Failpoint::StopAfterSinkOpened)),
        ("initial", Dies::Making("ddl_command_end")),
        ("initial", Dies::At(Failpoint::StopAfterTableMade)),
        ("initial", Dies::At(Failpoint::StopBeforeStream)),
    ];
    for (snapshot, dies) in cases {
        println!("snapshot: {snapshot}, dies {dies:?}");
        let scene = ledger("opening").await;
        let _offers = scene.offering();
        let holder = scene.target.connect().await;
        let failpoints = match dies {
            Dies::At(point) => at(point),
            Dies::Making(event) => {
                scene.target.batch_execute(&gate(event)).await.unwrap();
                holder.batch_execute("SELECT pg_advisory_lock(4711)").await.unwrap();
                Default::default()
            }
        };
        if snapshot == "initial" {
            add(&scene, 0..5).await;
        }
        scene.coordination.create_flow(scene.document("public.ledger", snapshot, "")).await.unwrap();
        let first = scene.worker_with("w1", failpoints.clone());
        captures(&scene).await;
        add(&scene, 5..10).await;
        match dies {
            Dies::At(point) => {
                scene.stands_at(&failpoints, point).await;
                stands_there(&scene, point).await;
                drop(first);
                add(&scene, 10..20).await;
                let _second = scene.worker("w2");
                ends_equal(&scene).await;
            }
            Dies::Making(_) => {
                let pid = format!("SELECT pid::int8 {BACKENDS}");
                let dead = scene.until("the table is being made", async || number(&scene.target, &pid).await).await;
                drop(first);
                add(&scene, 10..20).await;
                let _second = scene.worker("w2");
                let left = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {dead}");
                scene
                    .until("the dead owner's session is ended", async || match number(&scene.target, &left).await? {
                        0 => Ok(()),
                        count => Err(format!("{count}")),
                    })
                    .await;
                holder.batch_execute("SELECT pg_advisory_unlock(4711)").await.unwrap();
                ends_equal(&scene).await;
            }
        }
    }
}

async fn ends_equal(scene: &Scene) {
    scene.equal(LEDGER).await;
    add(scene, 20..30).await;
    scene.equal(LEDGER).await;
}
