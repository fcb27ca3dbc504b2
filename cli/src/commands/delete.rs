//! `wallaby delete`: ends flows.

use serde_json::{Value, json};
use tonic::Code;
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;

use super::{Target, read_flows, wait_until};
use crate::args::{Delete, Global, Output};
use crate::failure::Failure;
use crate::render::{self, phase_word};
use crate::server::Server;

/// What was done to one flow.
struct Deleted {
    flow: FlowId,
    /// `absent`, `deleting` or `deleted`.
    result: &'static str,
}

pub async fn run(global: &Global, options: &Delete) -> Result<(), Failure> {
    let flows = named_flows(options)?;
    let server = Server::connect(global).await?;
    let mut done = Vec::with_capacity(flows.len());
    let outcome = delete(global, options, &server, flows, &mut done).await;
    // Also when it failed in the middle: what was deleted before is deleted.
    if global.output != Output::Table && !(done.is_empty() && outcome.is_err()) {
        let values = done.iter().map(|one| json!({ "flow": one.flow.as_str(), "result": one.result }));
        render::print_value(global.output, &Value::Array(values.collect()))?;
    }
    outcome
}

async fn delete(
    global: &Global,
    options: &Delete,
    server: &Server,
    flows: Vec<FlowId>,
    done: &mut Vec<Deleted>,
) -> Result<(), Failure> {
    let say = |text: String| if global.output == Output::Table { render::print(&text) } else { Ok(()) };
    for flow in flows {
        let request = server.request(v1::DeleteFlowRequest {
            name: api::flow_name(&flow),
            etag: String::new(),
            force: options.force,
        });
        match server.flows().delete_flow(request).await {
            Ok(_) => {
                let goes_on = if options.wait { "" } else { " (it goes on by itself; see `wallaby status`)" };
                say(format!("flow {flow} deleting{goes_on}\n"))?;
                done.push(Deleted { flow, result: "deleting" });
            }
            Err(status) if status.code() == Code::NotFound && options.if_exists => {
                say(format!("flow {flow} is not there\n"))?;
                done.push(Deleted { flow, result: "absent" });
            }
            Err(status) => return Err(server.failure(&status)),
        }
    }
    if options.wait {
        for one in done.iter_mut().filter(|one| one.result == "deleting") {
            wait_until(global.timeout, || gone(server, &one.flow)).await?;
            one.result = "deleted";
            say(format!("flow {} deleted\n", one.flow))?;
        }
    }
    Ok(())
}

fn named_flows(options: &Delete) -> Result<Vec<FlowId>, Failure> {
    if !options.files.is_empty() {
        let flows = read_flows(&options.files)?;
        return Ok(flows.into_iter().map(|flow| flow.document.metadata.name).collect());
    }
    let names = match options.words.as_slice() {
        [kind, rest @ ..] if !rest.is_empty() && matches!(kind.as_str(), "flow" | "flows") => rest,
        words => words,
    };
    names.iter().map(|name| Target::parse_flow(std::slice::from_ref(name))).collect()
}

async fn gone(server: &Server, flow: &FlowId) -> Result<Option<String>, Failure> {
    let request = server.request(v1::GetFlowRequest { name: api::flow_name(flow) });
    match server.flows().get_flow(request).await {
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(server.failure(&status)),
        Ok(answer) => {
            let status = answer.into_inner().flow.and_then(|flow| flow.status).unwrap_or_default();
            let waits: Vec<String> =
                status.tasks.into_iter().map(|task| task.last_error).filter(|e| !e.is_empty()).collect();
            Ok(Some(format!("flow {flow} is {}; {}", phase_word(status.phase), waits.join("; "))))
        }
    }
}
