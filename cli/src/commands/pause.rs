//! `wallaby pause` and `wallaby resume`.

use wallaby_model::api;
use wallaby_proto::v1;

use super::Target;
use crate::args::{Global, Named};
use crate::failure::Failure;
use crate::render;
use crate::server::Server;

pub async fn pause(global: &Global, options: &Named) -> Result<(), Failure> {
    let target = Target::parse(&options.words)?;
    let server = Server::connect(global).await?;
    let outcome = match &target {
        Target::Flow(flow) => {
            let request = server.request(v1::PauseFlowRequest { name: api::flow_name(flow) });
            server.flows().pause_flow(request).await.map(drop)
        }
        Target::Sink(flow, sink) => {
            let request = server.request(v1::PauseSinkRequest { name: api::sink_name(flow, sink) });
            server.sinks().pause_sink(request).await.map(drop)
        }
    };
    outcome.map_err(|status| server.failure(&status))?;
    match target {
        Target::Flow(flow) => render::print(&format!(
            "flow {flow} paused; its slot now holds WAL back at the source until `wallaby resume {flow}`\n"
        )),
        Target::Sink(flow, sink) => render::print(&format!(
            "sink {flow}/{sink} paused; the log keeps what it needs, and once full the flow waits for it\n"
        )),
    }
}

pub async fn resume(global: &Global, options: &Named) -> Result<(), Failure> {
    let target = Target::parse(&options.words)?;
    let server = Server::connect(global).await?;
    let (name, outcome) = match &target {
        Target::Flow(flow) => {
            let request = server.request(v1::ResumeFlowRequest { name: api::flow_name(flow) });
            (format!("flow {flow}"), server.flows().resume_flow(request).await.map(drop))
        }
        Target::Sink(flow, sink) => {
            let request = server.request(v1::ResumeSinkRequest { name: api::sink_name(flow, sink) });
            (format!("sink {flow}/{sink}"), server.sinks().resume_sink(request).await.map(drop))
        }
    };
    outcome.map_err(|status| server.failure(&status))?;
    render::print(&format!("{name} resumed\n"))
}
