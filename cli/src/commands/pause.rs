//! `wallaby pause` and `wallaby resume`.

use wallaby_model::{FlowId, SinkId, api};
use wallaby_proto::v1;

use super::Target;
use crate::args::{Global, Named, Output};
use crate::failure::Failure;
use crate::render;
use crate::server::Server;

pub async fn pause(global: &Global, options: &Named) -> Result<(), Failure> {
    let target = Target::parse(&options.words)?;
    let server = Server::connect(global).await?;
    match target {
        Target::Flow(flow) => {
            let request = server.request(v1::PauseFlowRequest { name: api::flow_name(&flow) });
            let answer = server.flows().pause_flow(request).await.map_err(|status| server.failure(&status))?;
            say_flow(
                global.output,
                &answer.into_inner().flow.unwrap_or_default(),
                &format!("flow {flow} paused; its slot now holds WAL back at the source until `wallaby resume {flow}`"),
            )
        }
        Target::Sink(flow, sink) => {
            let request = server.request(v1::PauseSinkRequest { name: api::sink_name(&flow, &sink) });
            let answer = server.sinks().pause_sink(request).await.map_err(|status| server.failure(&status))?;
            let paused = answer.into_inner().sink.unwrap_or_default();
            say_sink(global.output, &paused, &paused_text(&flow, &sink, &paused))
        }
    }
}

/// What becomes of the log meanwhile is for the sink's `onOverrun` to say.
fn paused_text(flow: &FlowId, sink: &SinkId, paused: &v1::Sink) -> String {
    let waits = paused.spec.as_ref().is_some_and(|spec| spec.on_overrun() == v1::OnOverrun::Backpressure);
    let then = if waits {
        "once it is full the flow waits for it (`onOverrun: backpressure`)".to_owned()
    } else {
        format!(
            "once there is no room it is cut off, and loaded anew after `wallaby resume {flow}/{sink}` (`onOverrun: detach`)"
        )
    };
    format!("sink {flow}/{sink} paused; the log keeps what it needs, and {then}")
}

pub async fn resume(global: &Global, options: &Named) -> Result<(), Failure> {
    let target = Target::parse(&options.words)?;
    let server = Server::connect(global).await?;
    match target {
        Target::Flow(flow) => {
            let request = server.request(v1::ResumeFlowRequest { name: api::flow_name(&flow) });
            let answer = server.flows().resume_flow(request).await.map_err(|status| server.failure(&status))?;
            let resumed = answer.into_inner().flow.unwrap_or_default();
            say_flow(global.output, &resumed, &format!("flow {flow} resumed"))
        }
        Target::Sink(flow, sink) => {
            let request = server.request(v1::ResumeSinkRequest { name: api::sink_name(&flow, &sink) });
            let answer = server.sinks().resume_sink(request).await.map_err(|status| server.failure(&status))?;
            let resumed = answer.into_inner().sink.unwrap_or_default();
            say_sink(global.output, &resumed, &format!("sink {flow}/{sink} resumed"))
        }
    }
}

/// A sentence for people, the flow as it is now for programs.
fn say_flow(output: Output, flow: &v1::Flow, text: &str) -> Result<(), Failure> {
    match output {
        Output::Table => render::print(&format!("{text}\n")),
        output => render::print_value(output, &render::flow_value(flow)),
    }
}

/// A sentence for people, the sink as it is now for programs.
fn say_sink(output: Output, sink: &v1::Sink, text: &str) -> Result<(), Failure> {
    match output {
        Output::Table => render::print(&format!("{text}\n")),
        output => render::print_value(output, &render::sink_value(sink)),
    }
}
