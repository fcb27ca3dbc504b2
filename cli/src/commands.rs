//! One module per verb.

pub mod apply;
pub mod completion;
pub mod delete;
pub mod describe;
pub mod diff;
pub mod doctor;
pub mod drain;
pub mod get;
pub mod pause;
pub mod snapshot;
pub mod status;
pub mod verify;

use std::future::Future;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;
use wallaby_model::flow::{ParsedFlow, parse_all};
use wallaby_model::{FlowId, SinkId, api};

use crate::failure::Failure;

/// The time between two looks while waiting for something.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Something that is told, or acted upon, once it lasts: a worker takes what it is offered, and a task what it was asked for, within a second
/// or two.
#[derive(Default)]
struct Lasting {
    since: Option<Instant>,
}

impl Lasting {
    const FROM: Duration = Duration::from_secs(3);

    /// Whether it is so, and was at each look for a while.
    fn look(&mut self, is_so: bool, now: Instant) -> bool {
        if !is_so {
            self.since = None;
            return false;
        }
        now - *self.since.get_or_insert(now) >= Lasting::FROM
    }
}

/// Reads the flows of some files; `-` is standard input.
fn read_flows(files: &[PathBuf]) -> Result<Vec<ParsedFlow>, Failure> {
    let mut flows: Vec<ParsedFlow> = Vec::new();
    for path in files {
        let (text, name) = read_text(path)?;
        for flow in parse_all(&text, &name)? {
            let id = &flow.document.metadata.name;
            if flows.iter().any(|known| known.document.metadata.name == *id) {
                return Err(Failure::Invalid(format!("flow `{id}` is in more than one of the files")));
            }
            flows.push(flow);
        }
    }
    Ok(flows)
}

fn read_text(path: &Path) -> Result<(String, String), Failure> {
    let name = path.display().to_string();
    let unreadable = |error: std::io::Error| Failure::Invalid(format!("cannot read {name}: {error}"));
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(unreadable)?;
        return Ok((text, "standard input".to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    Ok((text, name))
}

/// A flow, or one sink of it, as people name it.
enum Target {
    Flow(FlowId),
    Sink(FlowId, SinkId),
}

impl Target {
    /// Takes `shop`, `flow shop`, `shop/warehouse`, `sink shop/warehouse`, `flows/shop`, `flows/shop/sinks/warehouse`.
    fn parse(words: &[String]) -> Result<Target, Failure> {
        let name = match words {
            [name] => name,
            [kind, name] if matches!(kind.as_str(), "flow" | "flows" | "sink" | "sinks") => name,
            _ => {
                return Err(Failure::Invalid(format!(
                    "`{}` is not a name: write shop or shop/warehouse",
                    words.join(" ")
                )));
            }
        };
        if let Some((flow, sink)) = api::parse_sink_name(name) {
            return Ok(Target::Sink(flow, sink));
        }
        let name = name.strip_prefix("flows/").unwrap_or(name);
        let invalid = |error: wallaby_model::IdError| Failure::Invalid(error.to_string());
        match name.split_once('/') {
            Some((flow, sink)) => {
                Ok(Target::Sink(FlowId::new(flow).map_err(invalid)?, SinkId::new(sink).map_err(invalid)?))
            }
            None => Ok(Target::Flow(FlowId::new(name).map_err(invalid)?)),
        }
    }

    /// The flow; a sink is refused.
    fn parse_flow(words: &[String]) -> Result<FlowId, Failure> {
        match Target::parse(words)? {
            Target::Flow(flow) => Ok(flow),
            Target::Sink(flow, sink) => Err(Failure::Invalid(format!(
                "{flow}/{sink} is a sink: this takes a flow. A sink is removed by taking it out of the flow's file"
            ))),
        }
    }
}

/// Looks again and again until `look` says that it is so, at most `limit`. `look` gives what it still waits for.
async fn wait_until<F>(limit: Duration, mut look: impl FnMut() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<Option<String>, Failure>>,
{
    let deadline = Instant::now() + limit;
    loop {
        let waits_for = match look().await {
            Ok(None) => return Ok(()),
            Ok(Some(waits_for)) => waits_for,
            // A controller that restarts while we wait is not the outcome.
            Err(Failure::Unreachable(text)) => text,
            Err(failure) => return Err(failure),
        };
        if Instant::now() >= deadline {
            return Err(Failure::TimedOut(format!("not done after {} s: {waits_for}", limit.as_secs_f32())));
        }
        tokio::time::sleep_until(deadline.min(Instant::now() + LOOK_AGAIN)).await;
    }
}
