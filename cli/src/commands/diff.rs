//! `wallaby diff`: what applying a file would do, without doing it.

use serde_json::{Value, json};
use wallaby_model::flow::ParsedFlow;
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;

use super::apply::{find, keep_pauses};
use super::read_flows;
use crate::args::{Diff, Global, Output};
use crate::failure::Failure;
use crate::render::{self, Table};
use crate::server::Server;

/// What applying one flow would do.
struct Outlook {
    flow: FlowId,
    answer: v1::DiffFlowResponse,
    notes: Vec<String>,
}

impl Outlook {
    fn differs(&self) -> bool {
        !self.answer.exists || !self.answer.changes.is_empty()
    }
}

pub async fn run(global: &Global, options: &Diff) -> Result<(), Failure> {
    let flows = read_flows(&options.files)?;
    let server = Server::connect(global).await?;
    let mut outlooks = Vec::with_capacity(flows.len());
    for flow in &flows {
        outlooks.push(look(&server, flow).await?);
    }
    match global.output {
        Output::Table => {
            let texts: Vec<String> = outlooks.iter().map(text).collect();
            render::print(&texts.join("\n"))?;
            for note in outlooks.iter().flat_map(|outlook| &outlook.notes) {
                eprintln!("note: {note}");
            }
        }
        output => render::print_value(output, &Value::Array(outlooks.iter().map(value).collect()))?,
    }
    if outlooks.iter().any(Outlook::differs) { Err(Failure::Findings) } else { Ok(()) }
}

async fn look(server: &Server, flow: &ParsedFlow) -> Result<Outlook, Failure> {
    let name = flow.document.metadata.name.clone();
    let mut wanted = api::flow_to_message(&flow.document);
    // As `wallaby apply` does it: what was paused by hand stays so.
    let current = find(server, &name).await?;
    let notes = current.map(|current| keep_pauses(flow, &current, &mut wanted)).unwrap_or_default();
    let request = server.request(v1::DiffFlowRequest { flow: Some(wanted) });
    let answer = server.flows().diff_flow(request).await.map_err(|status| server.failure(&status))?.into_inner();
    Ok(Outlook { flow: name, answer, notes })
}

fn text(outlook: &Outlook) -> String {
    let (flow, answer) = (&outlook.flow, &outlook.answer);
    let mut text = match (answer.exists, answer.changes.is_empty()) {
        (false, _) => format!("flow {flow} would be created\n"),
        (true, true) => return format!("flow {flow} is as the file says\n"),
        (true, false) if answer.refused.is_empty() => format!("flow {flow} would be updated\n"),
        (true, false) => format!("flow {flow} cannot be updated so\n"),
    };
    if answer.exists {
        for change in &answer.changes {
            let shown = |side: &str| if side.is_empty() { "(none)".to_owned() } else { side.to_owned() };
            text.push_str(&format!("  {}: {} -> {}\n", change.path, shown(&change.before), shown(&change.after)));
        }
    }
    for refused in &answer.refused {
        text.push_str(&format!("  refused: {}: {}\n", refused.path, refused.message));
    }
    if answer.refused.is_empty() {
        let mut table = Table::new(&["  TASK", "EFFECT", "WHAT"]);
        for effect in &answer.effects {
            table.row([format!("  {}", effect.subject), effect.effect.clone(), effect.message.clone()]);
        }
        match answer.effects.is_empty() {
            true => text.push_str("  no task notices\n"),
            false => text.push_str(&table.text()),
        }
    }
    text
}

fn value(outlook: &Outlook) -> Value {
    let answer = &outlook.answer;
    let change =
        |change: &v1::FieldChange| json!({ "path": change.path, "before": change.before, "after": change.after });
    let effect = |effect: &v1::ChangeEffect| json!({ "subject": effect.subject, "effect": effect.effect, "message": effect.message });
    let refused = |problem: &v1::FieldProblem| json!({ "path": problem.path, "message": problem.message });
    json!({
        "flow": outlook.flow.as_str(),
        "exists": answer.exists,
        "differs": outlook.differs(),
        "changes": answer.changes.iter().map(change).collect::<Vec<_>>(),
        "effects": answer.effects.iter().map(effect).collect::<Vec<_>>(),
        "refused": answer.refused.iter().map(refused).collect::<Vec<_>>(),
        "notes": outlook.notes,
    })
}
