//! `wallaby drain`: asks a worker to hand its tasks over and end.

use serde_json::json;
use tonic::Code;
use wallaby_proto::v1;

use super::wait_until;
use crate::args::{Drain, Global, Output};
use crate::failure::Failure;
use crate::render;
use crate::server::Server;

pub async fn run(global: &Global, options: &Drain) -> Result<(), Failure> {
    let worker = options.worker.strip_prefix("workers/").unwrap_or(&options.worker);
    let name = format!("workers/{worker}");
    let server = Server::connect(global).await?;
    let request = server.request(v1::DrainWorkerRequest { name: name.clone() });
    server.workers().drain_worker(request).await.map_err(|status| server.failure(&status))?;
    let say = |text: &str, result: &str| match global.output {
        Output::Table => render::print(&format!("worker {worker} {text}\n")),
        // One value: what it has come to when the command ends.
        output if result == "gone" || !options.wait => {
            render::print_value(output, &json!({ "worker": worker, "result": result }))
        }
        _ => Ok(()),
    };
    say("drains", "draining")?;
    if options.wait {
        wait_until(global.timeout, || async {
            match server.workers().get_worker(server.request(v1::GetWorkerRequest { name: name.clone() })).await {
                Err(status) if status.code() == Code::NotFound => Ok(None),
                Err(status) => Err(server.failure(&status)),
                Ok(answer) => {
                    let tasks = answer.into_inner().worker.map_or(0, |worker| worker.tasks.len());
                    Ok(Some(format!("worker {worker} still owns {tasks} tasks")))
                }
            }
        })
        .await?;
        say("is gone", "gone")?;
    }
    Ok(())
}
