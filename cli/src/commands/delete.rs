//! `wallaby delete`: ends flows.

use tonic::Code;
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;

use super::{Target, read_flows, wait_until};
use crate::args::{Delete, Global};
use crate::failure::Failure;
use crate::render::{self, phase_word};
use crate::server::Server;

pub async fn run(global: &Global, options: &Delete) -> Result<(), Failure> {
    let flows = named_flows(options)?;
    let server = Server::connect(global).await?;
    let mut deleted = Vec::with_capacity(flows.len());
    for flow in flows {
        let request = server.request(v1::DeleteFlowRequest {
            name: api::flow_name(&flow),
            etag: String::new(),
            force: options.force,
        });
        match server.flows().delete_flow(request).await {
            Ok(_) => {
                let done =
                    if options.wait { "deleting" } else { "deleting (it goes on by itself; see `wallaby status`)" };
                render::print(&format!("flow {flow} {done}\n"))?;
                deleted.push(flow);
            }
            Err(status) if status.code() == Code::NotFound && options.if_exists => {
                render::print(&format!("flow {flow} is not there\n"))?;
            }
            Err(status) => return Err(server.failure(&status)),
        }
    }
    if options.wait {
        for flow in deleted {
            wait_until(global.timeout, || gone(&server, &flow)).await?;
            render::print(&format!("flow {flow} deleted\n"))?;
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
