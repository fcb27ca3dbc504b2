//! `wallaby apply`: makes the flows of a file, or changes them to what it says.

use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt;
use wallaby_model::flow::ParsedFlow;
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;

use super::{LOOK_AGAIN, read_flows, wait_until};
use crate::args::{Apply, Global, Output};
use crate::failure::Failure;
use crate::render::{self, phase_word};
use crate::server::Server;

/// Another writer may come between our read and our write, or the log may move on under a new sink; more often than this it does
/// not pass by itself.
const ATTEMPTS_MAX: usize = 5;

/// What the server says when another writer came between.
const CHANGED_BY_OTHERS: &str = "FLOW_CHANGED";

/// What was done to one flow.
struct Applied {
    flow: FlowId,
    what: &'static str,
    notes: Vec<String>,
}

pub async fn run(global: &Global, options: &Apply) -> Result<(), Failure> {
    let flows = read_flows(&options.files)?;
    let server = Server::connect(global).await?;
    if options.dry_run {
        return dry_run(global, &server, &flows).await;
    }
    let mut done = Vec::with_capacity(flows.len());
    for flow in &flows {
        let applied = apply_one(&server, flow).await?;
        if global.output == Output::Table {
            render::print(&format!("flow {} {}\n", applied.flow, applied.what))?;
            for note in &applied.notes {
                eprintln!("note: {note}");
            }
        }
        done.push(applied);
    }
    if global.output != Output::Table {
        let value =
            done.iter().map(|a| json!({ "flow": a.flow.as_str(), "result": a.what, "notes": a.notes })).collect();
        render::print_value(global.output, &value)?;
    }
    if options.wait {
        for flow in flows.iter().filter(|flow| !flow.document.spec.paused) {
            wait_for_running(global, &server, &flow.document.metadata.name).await?;
        }
    }
    Ok(())
}

async fn dry_run(global: &Global, server: &Server, flows: &[ParsedFlow]) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    let mut values = Vec::with_capacity(flows.len());
    for flow in flows {
        let message = Some(api::flow_to_message(&flow.document));
        let request = server.request(v1::ValidateFlowRequest { flow: message });
        let answer = server.flows().validate_flow(request).await.map_err(|status| server.failure(&status))?;
        let name = &flow.document.metadata.name;
        let problems = answer.into_inner().problems;
        wrong.extend(problems.iter().map(|p| format!("flow {name}: {}: {}", p.path, p.message)));
        let problem = |p: &v1::FieldProblem| json!({ "path": p.path, "message": p.message });
        values.push(json!({ "flow": name.as_str(), "problems": problems.iter().map(problem).collect::<Vec<_>>() }));
    }
    match global.output {
        Output::Table if wrong.is_empty() => {
            render::print(&format!("{} valid\n", if flows.len() == 1 { "the flow is" } else { "the flows are" }))?;
        }
        Output::Table => {}
        output => render::print_value(output, &Value::Array(values))?,
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::Invalid(wrong.join("\n"))) }
}

async fn apply_one(server: &Server, flow: &ParsedFlow) -> Result<Applied, Failure> {
    let name = flow.document.metadata.name.clone();
    let mut refused = None;
    for attempt in 0..ATTEMPTS_MAX {
        if attempt > 0 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let Some(current) = find(server, &name).await? else {
            let message = Some(api::flow_to_message(&flow.document));
            match server.flows().create_flow(server.request(v1::CreateFlowRequest { flow: message })).await {
                Ok(_) => return Ok(Applied { flow: name, what: "created", notes: Vec::new() }),
                Err(status) if status.code() == Code::AlreadyExists => continue,
                Err(status) => return Err(server.failure(&status)),
            }
        };
        let mut wanted = api::flow_to_message(&flow.document);
        wanted.etag = current.etag.clone();
        let notes = keep_pauses(flow, &current, &mut wanted);
        match server.flows().update_flow(server.request(v1::UpdateFlowRequest { flow: Some(wanted) })).await {
            Ok(answer) => {
                let what = if answer.into_inner().changed { "updated" } else { "unchanged" };
                return Ok(Applied { flow: name, what, notes });
            }
            Err(status) if status.code() == Code::Aborted => {
                // The server may have another reason to try again than another writer: it is the one to be told.
                let reason = status.get_details_error_info().map(|info| info.reason);
                refused = (reason.as_deref() != Some(CHANGED_BY_OTHERS)).then(|| server.failure(&status));
            }
            Err(status) if status.code() == Code::NotFound => refused = None,
            Err(status) => return Err(server.failure(&status)),
        }
    }
    let changed = || format!("flow {name} was changed by others {ATTEMPTS_MAX} times while applying; try again");
    Err(refused.unwrap_or_else(|| Failure::Failed(changed())))
}

pub(super) async fn find(server: &Server, name: &FlowId) -> Result<Option<v1::Flow>, Failure> {
    let request = server.request(v1::GetFlowRequest { name: api::flow_name(name) });
    match server.flows().get_flow(request).await {
        Ok(answer) => Ok(answer.into_inner().flow),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(server.failure(&status)),
    }
}

/// What was paused by hand stays paused unless the file says otherwise: a changed label must not start a flow.
pub(super) fn keep_pauses(flow: &ParsedFlow, current: &v1::Flow, wanted: &mut v1::Flow) -> Vec<String> {
    let (Some(current), Some(wanted)) = (&current.spec, &mut wanted.spec) else { return Vec::new() };
    let name = &flow.document.metadata.name;
    let mut notes = Vec::new();
    if current.paused && !flow.mentions("spec.paused") {
        wanted.paused = true;
        notes.push(format!("flow {name} stays paused; `wallaby resume {name}` lets it go on"));
    }
    for (index, sink) in wanted.sinks.iter_mut().enumerate() {
        let was_paused = current.sinks.iter().any(|known| known.sink == sink.sink && known.paused);
        if was_paused && !flow.mentions(&format!("spec.sinks[{index}].paused")) {
            sink.paused = true;
            let sink = &sink.sink;
            notes.push(format!("sink {name}/{sink} stays paused; `wallaby resume {name}/{sink}` lets it go on"));
        }
    }
    notes
}

async fn wait_for_running(global: &Global, server: &Server, name: &FlowId) -> Result<(), Failure> {
    wait_until(global.timeout, || async {
        let Some(flow) = find(server, name).await? else {
            return Err(Failure::Failed(format!("flow {name} was deleted meanwhile")));
        };
        let status = flow.status.unwrap_or_default();
        let phase = phase_word(status.phase);
        let ready = status.phase == i32::from(v1::Phase::Running) && status.observed_generation >= flow.generation;
        if ready || status.phase == i32::from(v1::Phase::Paused) {
            return Ok(None);
        }
        let sinks = status.sinks.iter().flat_map(|sink| &sink.conditions);
        let bad = status.conditions.iter().chain(sinks).find(|c| c.status == i32::from(v1::ConditionStatus::False));
        let why = bad.map_or_else(String::new, |c| format!(", {} is false: {}", c.r#type, c.message));
        if status.phase == i32::from(v1::Phase::Blocked) && status.observed_generation >= flow.generation {
            return Err(Failure::Failed(format!("flow {name} waits for a person{why}")));
        }
        Ok(Some(format!("flow {name} is {phase}{why}")))
    })
    .await
}
