//! `wallaby get` and `wallaby workers`: lists.

use serde_json::Value;
use wallaby_model::api;
use wallaby_proto::v1;

use super::Target;
use crate::args::{Get, Global, Kind, Output};
use crate::failure::Failure;
use crate::render::{self, Table, age_text, bytes_text, condition_of, or_dash, phase_word, short, span_text};
use crate::server::Server;

/// The largest page a controller gives.
const PAGE_SIZE: i32 = 1000;

pub async fn run(global: &Global, options: &Get) -> Result<(), Failure> {
    let name = options.name.as_deref();
    match options.kind {
        Kind::Flows => flows(global, name).await,
        Kind::Sinks => sinks(global, name).await,
        Kind::Workers => workers(global, name).await,
    }
}

async fn flows(global: &Global, name: Option<&str>) -> Result<(), Failure> {
    let target = name.map(|name| Target::parse_flow(&[name.to_owned()])).transpose()?;
    let server = Server::connect(global).await?;
    let flows = match &target {
        Some(flow) => {
            let request = server.request(v1::GetFlowRequest { name: api::flow_name(flow) });
            let answer = server.flows().get_flow(request).await.map_err(|status| server.failure(&status))?;
            answer.into_inner().flow.into_iter().collect()
        }
        None => all_flows(&server).await?,
    };
    if global.output != Output::Table {
        return print_values(global.output, flows.iter().map(render::flow_value).collect(), target.is_some());
    }
    if flows.is_empty() {
        return render::print("no flows: make one with `wallaby apply -f flow.yaml`\n");
    }
    let mut table = Table::new(&["NAME", "PHASE", "SINKS", "LAG", "BEHIND", "WAL HELD", "AGE"]);
    for flow in &flows {
        let status = flow.status.clone().unwrap_or_default();
        let capture = status.capture.as_ref();
        table.row([
            short(&flow.name),
            phase_word(status.phase).to_owned(),
            flow.spec.as_ref().map_or(0, |spec| spec.sinks.len()).to_string(),
            span_text(capture.and_then(|capture| capture.lag)),
            capture.map_or("-".to_owned(), |capture| bytes_text(capture.lag_bytes)),
            capture.map_or("-".to_owned(), |capture| bytes_text(capture.retained_wal_bytes)),
            age_text(flow.create_time),
        ]);
    }
    render::print(&table.text())
}

/// All flows, page by page.
pub async fn all_flows(server: &Server) -> Result<Vec<v1::Flow>, Failure> {
    let mut flows = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = server.request(v1::ListFlowsRequest { page_size: PAGE_SIZE, page_token });
        let page = server.flows().list_flows(request).await.map_err(|status| server.failure(&status))?.into_inner();
        flows.extend(page.flows);
        if page.next_page_token.is_empty() {
            return Ok(flows);
        }
        page_token = page.next_page_token;
    }
}

async fn sinks(global: &Global, name: Option<&str>) -> Result<(), Failure> {
    let target = name.map(|name| Target::parse(&[name.to_owned()])).transpose()?;
    let server = Server::connect(global).await?;
    let failure = |status: tonic::Status| server.failure(&status);
    let (sinks, single) = match &target {
        Some(Target::Sink(flow, sink)) => {
            let request = server.request(v1::GetSinkRequest { name: api::sink_name(flow, sink) });
            let answer = server.sinks().get_sink(request).await.map_err(failure)?.into_inner();
            (answer.sink.into_iter().collect(), true)
        }
        other => {
            let parent = match other {
                Some(Target::Flow(flow)) => api::flow_name(flow),
                _ => "flows/-".to_owned(),
            };
            let request = server.request(v1::ListSinksRequest { parent });
            (server.sinks().list_sinks(request).await.map_err(failure)?.into_inner().sinks, false)
        }
    };
    if global.output != Output::Table {
        return print_values(global.output, sinks.iter().map(render::sink_value).collect(), single);
    }
    let mut table = Table::new(&["SINK", "DELIVERING", "CAUGHT UP", "LAG", "BEHIND", "ROWS", "POSITION", "WORKER"]);
    for sink in &sinks {
        let progress = sink.progress.clone().unwrap_or_default();
        table.row([
            short(&sink.name),
            condition_of(&sink.conditions, "Delivering"),
            condition_of(&sink.conditions, "CaughtUp"),
            span_text(progress.lag),
            sink.progress.as_ref().map_or("-".to_owned(), |progress| bytes_text(progress.lag_bytes)),
            progress.rows_total.to_string(),
            or_dash(&progress.position),
            or_dash(sink.task.as_ref().map_or("", |task| &task.worker)),
        ]);
    }
    render::print(&table.text())
}

/// Lists the workers, or shows one.
pub async fn workers(global: &Global, name: Option<&str>) -> Result<(), Failure> {
    let server = Server::connect(global).await?;
    let failure = |status: tonic::Status| server.failure(&status);
    let workers = match name {
        Some(name) => {
            let name = format!("workers/{}", name.strip_prefix("workers/").unwrap_or(name));
            let request = server.request(v1::GetWorkerRequest { name });
            server.workers().get_worker(request).await.map_err(failure)?.into_inner().worker.into_iter().collect()
        }
        None => {
            let request = server.request(v1::ListWorkersRequest {});
            server.workers().list_workers(request).await.map_err(failure)?.into_inner().workers
        }
    };
    if global.output != Output::Table {
        return print_values(global.output, workers.iter().map(render::worker_value).collect(), name.is_some());
    }
    if workers.is_empty() {
        return render::print("no workers: start one with `wallaby-worker`\n");
    }
    let mut table = Table::new(&["NAME", "STATE", "TASKS", "CAPACITY", "VERSION", "ADDRESS", "ZONE", "AGE", "OWNS"]);
    for worker in &workers {
        table.row([
            short(&worker.name),
            if worker.draining { "draining" } else { "ready" }.to_owned(),
            worker.tasks.len().to_string(),
            worker.capacity.to_string(),
            worker.version.clone(),
            or_dash(&worker.address),
            or_dash(&worker.zone),
            age_text(worker.start_time),
            or_dash(&worker.tasks.join(" ")),
        ]);
    }
    render::print(&table.text())
}

fn print_values(output: Output, mut values: Vec<Value>, single: bool) -> Result<(), Failure> {
    match (single, values.len()) {
        (true, 1) => render::print_value(output, &values.remove(0)),
        _ => render::print_value(output, &Value::Array(values)),
    }
}
