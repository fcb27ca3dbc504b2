//! What a person mends at the source is seen there: nobody has to tell the flow.

use std::sync::Arc;

use wallaby_model::TaskId;
use wallaby_model::run::RunState;

use crate::scene::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_a_key_is_named_and_captured_once_it_has_one() {
    let scene = Arc::new(Scene::new("keyless").await);
    let _offers = scene.offering();
    scene.source.batch_execute("CREATE TABLE t (id int NOT NULL, pad text)").await.unwrap();
    scene.coordination.create_flow(scene.document("public.t", "initial", "")).await.unwrap();
    let first = scene.worker("w1");
    is_refused(&scene).await;
    // A new flow, that has nothing yet.
    scene.source.batch_execute("ALTER TABLE t ADD PRIMARY KEY (id); INSERT INTO t VALUES (1, 'loaded')").await.unwrap();
    scene.run_is(1, RunState::Done).await;
    scene.source.batch_execute("UPDATE t SET pad = 'changed'; INSERT INTO t VALUES (2, 'streamed')").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;

    // One that runs, and whose table loses its key.
    first.end().await;
    scene.source.batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey").await.unwrap();
    let _second = scene.worker("w2");
    is_refused(&scene).await;
    scene.source.batch_execute("ALTER TABLE t ADD PRIMARY KEY (id)").await.unwrap();
    scene.source.batch_execute("UPDATE t SET pad = 'changed again'; INSERT INTO t VALUES (3, 'new')").await.unwrap();
    scene.equal("SELECT t::text FROM t ORDER BY id").await;
}

async fn is_refused(scene: &Scene) {
    scene
        .until("the capture names the table", async || {
            let status = scene.status_of(&TaskId::capture(&scene.flow)).await?;
            let said = status.conditions.iter().find(|said| said.reason == "TableWithoutKey");
            match said {
                Some(said) if said.message.contains("public.t") && said.message.contains("REPLICA IDENTITY") => Ok(()),
                _ => Err(format!("{:?}", status.conditions)),
            }
        })
        .await;
}
