//! `wallaby describe`: everything about one flow or sink, and what to do when it waits.

use wallaby_model::api;
use wallaby_proto::v1;

use super::Target;
use crate::args::{Global, Named, Output};
use crate::failure::Failure;
use crate::render::{self, Table, age_text, bytes_text, condition_word, or_dash, phase_word, short, span_text};
use crate::server::Server;

pub async fn run(global: &Global, options: &Named) -> Result<(), Failure> {
    let target = Target::parse(&options.words)?;
    let server = Server::connect(global).await?;
    match &target {
        Target::Flow(flow) => {
            let request = server.request(v1::GetFlowRequest { name: api::flow_name(flow) });
            let answer = server.flows().get_flow(request).await.map_err(|status| server.failure(&status))?;
            let flow = answer.into_inner().flow.unwrap_or_default();
            match global.output {
                Output::Table => render::print(&flow_text(&flow)),
                output => render::print_value(output, &render::flow_value(&flow)),
            }
        }
        Target::Sink(flow, sink) => {
            let request = server.request(v1::GetSinkRequest { name: api::sink_name(flow, sink) });
            let answer = server.sinks().get_sink(request).await.map_err(|status| server.failure(&status))?;
            let sink = answer.into_inner().sink.unwrap_or_default();
            match global.output {
                Output::Table => render::print(&sink_text(&sink)),
                output => render::print_value(output, &render::sink_value(&sink)),
            }
        }
    }
}

fn flow_text(flow: &v1::Flow) -> String {
    let status = flow.status.clone().unwrap_or_default();
    let mut text = format!("flow {}\n", short(&flow.name));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<14} {value}\n"));
    line("phase", phase_word(status.phase).to_owned());
    line("generation", format!("{} (running with {})", flow.generation, status.observed_generation));
    line("created", format!("{} ago", age_text(flow.create_time)));
    if !flow.labels.is_empty() {
        let mut labels: Vec<String> = flow.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        labels.sort();
        line("labels", labels.join(" "));
    }
    if let Ok(document) = api::flow_from_message(flow) {
        let source = &document.spec.source.postgres;
        line("source", format!("{:?}", source.dsn));
        line("slot", document.slot_name());
        line(
            "publication",
            format!("{} ({})", document.publication_name(), or_dash(&source.publication.tables.join(" "))),
        );
    }
    if let Some(capture) = &status.capture {
        line("source at", or_dash(&capture.source_lsn));
        line("confirmed", or_dash(&capture.confirmed_lsn));
        line("staged", or_dash(&capture.staged_position));
        line("lag", format!("{}, {}", span_text(capture.lag), bytes_text(capture.lag_bytes)));
        line("WAL held", bytes_text(capture.retained_wal_bytes));
        line("rows", format!("{} since the owner took the task", capture.rows_total));
    }
    text.push_str(&conditions_text(&status.conditions));
    for snapshot in &status.snapshots {
        text.push('\n');
        text.push_str(&super::snapshot::describe(snapshot));
    }
    text.push_str("\ntasks\n");
    text.push_str(&tasks_text(&status.tasks));
    for sink in &status.sinks {
        text.push('\n');
        text.push_str(&sink_text(sink));
    }
    text
}

fn sink_text(sink: &v1::Sink) -> String {
    let progress = sink.progress.clone().unwrap_or_default();
    let mut text = format!("sink {}\n", short(&sink.name));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<14} {value}\n"));
    if sink.spec.as_ref().is_some_and(|spec| spec.paused) {
        line("paused", "yes".to_owned());
    }
    line("position", or_dash(&progress.position));
    if sink.progress.is_some() {
        line("lag", format!("{}, {}", span_text(progress.lag), bytes_text(progress.lag_bytes)));
        line("rows", format!("{} since the owner took the task", progress.rows_total));
    }
    if let Some(task) = &sink.task {
        line("task", format!("{} at {}", task.state, or_dash(&task.worker)));
    }
    text + &conditions_text(&sink.conditions)
}

fn conditions_text(conditions: &[v1::Condition]) -> String {
    let mut table = Table::new(&["  CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"]);
    for condition in conditions {
        table.row([
            format!("  {}", condition.r#type),
            condition_word(condition.status).to_owned(),
            or_dash(&condition.reason),
            age_text(condition.since),
            condition.message.clone(),
        ]);
    }
    if conditions.is_empty() { String::new() } else { table.text() }
}

fn tasks_text(tasks: &[v1::Task]) -> String {
    let mut table = Table::new(&["  TASK", "STATE", "WORKER", "EPOCH", "SINCE", "WAITS FOR", "LAST ERROR"]);
    for task in tasks {
        table.row([
            format!("  {}", task.task),
            task.state.clone(),
            or_dash(&task.worker),
            if task.epoch == 0 { "-".to_owned() } else { task.epoch.to_string() },
            age_text(task.since),
            or_dash(&task.waits_for),
            or_dash(&task.last_error),
        ]);
    }
    table.text()
}
