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
            Ok(Some(waits_for(flow, &status)))
        }
    }
}

/// What a flow that is being deleted waits for. The capture's task removes it; the errors of sinks are what they ended with, unless one
/// of them still has an owner, which is waited for.
fn waits_for(flow: &FlowId, status: &v1::FlowStatus) -> String {
    let capture = format!("{flow}.capture");
    let mut said = format!("flow {flow} is {}", phase_word(status.phase));
    let counts = |task: &&v1::Task| !task.last_error.is_empty() && (task.task == capture || !task.worker.is_empty());
    for task in status.tasks.iter().filter(counts) {
        // The capture and the sinks may wait for the same server.
        if !said.contains(&task.last_error) {
            said.push_str(&format!("; {}", task.last_error));
        }
        if task.task == capture {
            said.push_str(&format!(
                ". Mend that; or, if the source is gone for good, `wallaby delete {flow} --force` forgets the flow without it (a slot that \
                 is still there goes on holding WAL back until you drop it)"
            ));
        }
    }
    said
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn said(tasks: &[(&str, &str, &str)]) -> String {
        let task = |(task, worker, error): &(&str, &str, &str)| v1::Task {
            task: (*task).to_owned(),
            worker: (*worker).to_owned(),
            last_error: (*error).to_owned(),
            ..v1::Task::default()
        };
        let tasks = tasks.iter().map(task).collect();
        let status = v1::FlowStatus { phase: v1::Phase::Deleting.into(), tasks, ..v1::FlowStatus::default() };
        waits_for(&FlowId::new("shop").unwrap(), &status)
    }

    #[test]
    fn a_source_that_cannot_be_had_is_said_once_with_the_way_out() {
        let cause = "the environment variable SHOP_DSN is not set for this worker";
        let removing = format!("removing the flow: spec.source.postgres.dsn: {cause}");
        let both = said(&[("shop.capture", "w1", &removing), ("shop.apply.warehouse", "", cause)]);
        assert_eq!(both.matches(cause).count(), 1, "{both}");
        assert!(both.starts_with("flow shop is Deleting; removing the flow: spec.source"), "{both}");
        assert!(both.contains("`wallaby delete shop --force`"), "{both}");
        let same = said(&[("shop.capture", "w1", &removing), ("shop.apply.warehouse", "w2", cause)]);
        assert_eq!(same.matches(cause).count(), 1, "{same}");
    }

    #[test]
    fn a_sink_that_still_has_an_owner_is_waited_for() {
        let waits = said(&[("shop.capture", "", ""), ("shop.apply.warehouse", "w1", "the sink is away")]);
        assert_eq!(waits, "flow shop is Deleting; the sink is away");
        let left_over = said(&[("shop.capture", "w1", ""), ("shop.apply.warehouse", "", "the sink is away")]);
        assert_eq!(left_over, "flow shop is Deleting");
    }
}
