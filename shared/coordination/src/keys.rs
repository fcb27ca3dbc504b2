//! The key space of protocol.md, in one place: names go in typed and come out typed.

use wallaby_model::{ChunkId, FlowId, Reader, RunId, SinkId, TaskId, WorkerId};

use crate::{Error, Result};

/// What a key stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// `flows/<F>/spec`: desired state.
    FlowSpec(FlowId),
    /// `flows/<F>/status`: what only the controller knows.
    FlowStatus(FlowId),
    /// `flows/<F>/holds/<R>`: the lowest position that a reader still needs.
    FlowHold(FlowId, Reader),
    /// `flows/<F>/purge`: up to where the log may be gone.
    FlowPurge(FlowId),
    /// `flows/<F>/tables`: which table stood behind each published name, by the capture task.
    FlowTables(FlowId),
    /// `flows/<F>/sinks/<S>/detached`: a sink that was cut off from the log, until it has loaded everything anew.
    SinkDetached(FlowId, SinkId),
    /// `flows/<F>/runs/index`: the last run's number, and which runs are kept.
    RunIndex(FlowId),
    /// `flows/<F>/runs/<N>/spec`: what is asked of a run.
    RunSpec(FlowId, RunId),
    /// `flows/<F>/runs/<N>/plan`: its plan, by its owner.
    RunPlan(FlowId, RunId),
    /// `flows/<F>/runs/<N>/chunks/<K>`: a chunk that is read.
    RunChunk(FlowId, RunId, ChunkId),
    /// `flows/<F>/runs/<N>/loaded/<S>/<K>`: a chunk that a sink has.
    RunLoaded(FlowId, RunId, SinkId, ChunkId),
    /// `flows/<F>/runs/<N>/lost/<K>`: a chunk that was read and of which the side store lost a part; its table is read again.
    RunLost(FlowId, RunId, ChunkId),
    /// `flows/<F>/runs/<N>/sinks/<S>`: how far a sink is in a run.
    RunSink(FlowId, RunId, SinkId),
    /// `flows/<F>/operations/<N>/spec`: what is asked of an operation, by the controller.
    OperationSpec(FlowId, u32),
    /// `flows/<F>/operations/<N>/result`: how far it is and what came of it, by its owner.
    OperationResult(FlowId, u32),
    /// `tasks/<T>/lock`: who owns a task, under the worker's lease.
    TaskLock(TaskId),
    /// `tasks/<T>/status`: what its owner says.
    TaskStatus(TaskId),
    /// `tasks/<T>/checkpoint`: how far it came.
    TaskCheckpoint(TaskId),
    /// `workers/<W>`: a worker that is alive.
    Worker(WorkerId),
    /// `drains/<W>`: a request to the worker to hand its tasks over and end; under the worker's lease.
    WorkerDrain(WorkerId),
    /// `controller/leader`: the controller replica that schedules.
    ControllerLeader,
}

/// The keys under one prefix (`/wallaby`; tests take their own).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySpace {
    prefix: String,
}

impl KeySpace {
    /// Keys under `prefix`, which starts with a slash and does not end with one.
    ///
    /// # Errors
    /// When the prefix is empty or has another form.
    pub fn new(prefix: impl Into<String>) -> Result<KeySpace> {
        let prefix = prefix.into();
        let fit = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'-' | b'_' | b'.');
        let is_well_formed = prefix.len() > 1
            && prefix.starts_with('/')
            && !prefix.ends_with('/')
            && !prefix.contains("//")
            && prefix.bytes().all(fit);
        if is_well_formed {
            Ok(KeySpace { prefix })
        } else {
            Err(Error::Settings(format!(
                "the key prefix {prefix:?} must start with a slash, not end with one, and have only letters, digits, dashes, dots and underscores between slashes, as in /wallaby"
            )))
        }
    }

    /// The full key.
    pub fn text(&self, key: &Key) -> String {
        let prefix = &self.prefix;
        match key {
            Key::FlowSpec(flow) => format!("{prefix}/flows/{flow}/spec"),
            Key::FlowStatus(flow) => format!("{prefix}/flows/{flow}/status"),
            Key::FlowHold(flow, reader) => format!("{prefix}/flows/{flow}/holds/{reader}"),
            Key::FlowPurge(flow) => format!("{prefix}/flows/{flow}/purge"),
            Key::FlowTables(flow) => format!("{prefix}/flows/{flow}/tables"),
            Key::SinkDetached(flow, sink) => format!("{prefix}/flows/{flow}/sinks/{sink}/detached"),
            Key::RunIndex(flow) => format!("{prefix}/flows/{flow}/runs/index"),
            Key::RunSpec(flow, run) => format!("{prefix}/flows/{flow}/runs/{run}/spec"),
            Key::RunPlan(flow, run) => format!("{prefix}/flows/{flow}/runs/{run}/plan"),
            Key::RunChunk(flow, run, chunk) => format!("{prefix}/flows/{flow}/runs/{run}/chunks/{chunk}"),
            Key::RunLost(flow, run, chunk) => format!("{prefix}/flows/{flow}/runs/{run}/lost/{chunk}"),
            Key::RunLoaded(flow, run, sink, chunk) => {
                format!("{prefix}/flows/{flow}/runs/{run}/loaded/{sink}/{chunk}")
            }
            Key::RunSink(flow, run, sink) => format!("{prefix}/flows/{flow}/runs/{run}/sinks/{sink}"),
            Key::OperationSpec(flow, number) => format!("{prefix}/flows/{flow}/operations/{number}/spec"),
            Key::OperationResult(flow, number) => format!("{prefix}/flows/{flow}/operations/{number}/result"),
            Key::TaskLock(task) => format!("{prefix}/tasks/{task}/lock"),
            Key::TaskStatus(task) => format!("{prefix}/tasks/{task}/status"),
            Key::TaskCheckpoint(task) => format!("{prefix}/tasks/{task}/checkpoint"),
            Key::Worker(worker) => format!("{prefix}/workers/{worker}"),
            Key::WorkerDrain(worker) => format!("{prefix}/drains/{worker}"),
            Key::ControllerLeader => format!("{prefix}/controller/leader"),
        }
    }

    /// What a full key stands for; `None` for one that is not ours to read.
    pub fn parse(&self, text: &[u8]) -> Option<Key> {
        let rest = std::str::from_utf8(text).ok()?.strip_prefix(&self.prefix)?.strip_prefix('/')?;
        let parts: Vec<&str> = rest.split('/').collect();
        Some(match parts.as_slice() {
            ["flows", flow, "spec"] => Key::FlowSpec(flow.parse().ok()?),
            ["flows", flow, "status"] => Key::FlowStatus(flow.parse().ok()?),
            ["flows", flow, "holds", reader] => Key::FlowHold(flow.parse().ok()?, reader.parse().ok()?),
            ["flows", flow, "purge"] => Key::FlowPurge(flow.parse().ok()?),
            ["flows", flow, "tables"] => Key::FlowTables(flow.parse().ok()?),
            ["flows", flow, "sinks", sink, "detached"] => Key::SinkDetached(flow.parse().ok()?, sink.parse().ok()?),
            ["flows", flow, "runs", "index"] => Key::RunIndex(flow.parse().ok()?),
            ["flows", flow, "runs", run, "spec"] => Key::RunSpec(flow.parse().ok()?, run.parse().ok()?),
            ["flows", flow, "runs", run, "plan"] => Key::RunPlan(flow.parse().ok()?, run.parse().ok()?),
            ["flows", flow, "runs", run, "chunks", chunk] => {
                Key::RunChunk(flow.parse().ok()?, run.parse().ok()?, chunk.parse().ok()?)
            }
            ["flows", flow, "runs", run, "lost", chunk] => {
                Key::RunLost(flow.parse().ok()?, run.parse().ok()?, chunk.parse().ok()?)
            }
            ["flows", flow, "runs", run, "loaded", sink, chunk] => {
                Key::RunLoaded(flow.parse().ok()?, run.parse().ok()?, sink.parse().ok()?, chunk.parse().ok()?)
            }
            ["flows", flow, "runs", run, "sinks", sink] => {
                Key::RunSink(flow.parse().ok()?, run.parse().ok()?, sink.parse().ok()?)
            }
            ["flows", flow, "operations", number, "spec"] => {
                Key::OperationSpec(flow.parse().ok()?, number.parse().ok()?)
            }
            ["flows", flow, "operations", number, "result"] => {
                Key::OperationResult(flow.parse().ok()?, number.parse().ok()?)
            }
            ["tasks", task, "lock"] => Key::TaskLock(task.parse().ok()?),
            ["tasks", task, "status"] => Key::TaskStatus(task.parse().ok()?),
            ["tasks", task, "checkpoint"] => Key::TaskCheckpoint(task.parse().ok()?),
            ["workers", worker] => Key::Worker(WorkerId::new(*worker).ok()?),
            ["drains", worker] => Key::WorkerDrain(WorkerId::new(*worker).ok()?),
            ["controller", "leader"] => Key::ControllerLeader,
            _ => return None,
        })
    }

    /// The prefix of everything about all flows.
    pub fn flows(&self) -> String {
        format!("{}/flows/", self.prefix)
    }

    /// The prefix of everything about one flow but its tasks.
    pub fn flow(&self, flow: &FlowId) -> String {
        format!("{}/flows/{flow}/", self.prefix)
    }

    /// The prefix of a flow's holds.
    pub fn holds(&self, flow: &FlowId) -> String {
        format!("{}/flows/{flow}/holds/", self.prefix)
    }

    /// The prefix of everything about a flow's runs.
    pub fn runs(&self, flow: &FlowId) -> String {
        format!("{}/flows/{flow}/runs/", self.prefix)
    }

    /// The prefix of everything about one run.
    pub fn run(&self, flow: &FlowId, run: RunId) -> String {
        format!("{}/flows/{flow}/runs/{run}/", self.prefix)
    }

    /// The prefix of a run's chunks that are read.
    pub fn chunks(&self, flow: &FlowId, run: RunId) -> String {
        format!("{}/flows/{flow}/runs/{run}/chunks/", self.prefix)
    }

    /// The prefix of the chunks of a run that sinks have.
    pub fn loaded(&self, flow: &FlowId, run: RunId) -> String {
        format!("{}/flows/{flow}/runs/{run}/loaded/", self.prefix)
    }

    /// The prefix of the chunks of a run that one sink has.
    pub fn loaded_by(&self, flow: &FlowId, run: RunId, sink: &SinkId) -> String {
        format!("{}/flows/{flow}/runs/{run}/loaded/{sink}/", self.prefix)
    }

    /// The prefix of what sinks say of a run.
    pub fn run_sinks(&self, flow: &FlowId, run: RunId) -> String {
        format!("{}/flows/{flow}/runs/{run}/sinks/", self.prefix)
    }

    /// The prefix of everything about the chunk tasks of a run.
    pub fn chunk_tasks(&self, flow: &FlowId, run: RunId) -> String {
        format!("{}/tasks/{flow}.chunk.{run}.", self.prefix)
    }

    /// The prefix of everything about the load tasks of a run at one sink.
    pub fn load_tasks(&self, flow: &FlowId, run: RunId, sink: &SinkId) -> String {
        format!("{}/tasks/{flow}.load.{sink}.{run}.", self.prefix)
    }

    /// The prefix of everything about all load tasks of a sink.
    pub fn load_tasks_of(&self, flow: &FlowId, sink: &SinkId) -> String {
        format!("{}/tasks/{flow}.load.{sink}.", self.prefix)
    }

    /// The prefix of everything about a flow's operations.
    pub fn operations(&self, flow: &FlowId) -> String {
        format!("{}/flows/{flow}/operations/", self.prefix)
    }

    /// The prefix of everything about all tasks.
    pub fn tasks(&self) -> String {
        format!("{}/tasks/", self.prefix)
    }

    /// The prefix of everything about the tasks of one flow (a flow id has no dot).
    pub fn tasks_of(&self, flow: &FlowId) -> String {
        format!("{}/tasks/{flow}.", self.prefix)
    }

    /// The prefix of everything about one task.
    pub fn task(&self, task: &TaskId) -> String {
        format!("{}/tasks/{task}/", self.prefix)
    }

    /// The prefix of all workers.
    pub fn workers(&self) -> String {
        format!("{}/workers/", self.prefix)
    }

    /// The prefix of everything of ours.
    pub fn everything(&self) -> String {
        format!("{}/", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn keys_round_trip() {
        let space = KeySpace::new("/wallaby").unwrap();
        let flow = FlowId::new("shop").unwrap();
        let sink = SinkId::new("warehouse").unwrap();
        let worker = WorkerId::new("w-1.a_b").unwrap();
        let task = TaskId::apply(&flow, &sink);
        for key in [
            Key::FlowSpec(flow.clone()),
            Key::FlowStatus(flow.clone()),
            Key::FlowHold(flow.clone(), Reader::Sink(sink.clone())),
            Key::FlowHold(flow.clone(), Reader::Run(RunId(3))),
            Key::FlowTables(flow.clone()),
            Key::SinkDetached(flow.clone(), sink.clone()),
            Key::RunIndex(flow.clone()),
            Key::RunSpec(flow.clone(), RunId(3)),
            Key::RunPlan(flow.clone(), RunId(3)),
            Key::RunChunk(flow.clone(), RunId(3), ChunkId { table: 1, restart: 2, number: 30 }),
            Key::RunLost(flow.clone(), RunId(3), ChunkId { table: 1, restart: 2, number: 30 }),
            Key::RunLoaded(flow.clone(), RunId(3), sink.clone(), ChunkId { table: 1, restart: 2, number: 30 }),
            Key::RunSink(flow.clone(), RunId(3), sink),
            Key::OperationSpec(flow.clone(), 7),
            Key::OperationResult(flow.clone(), 7),
            Key::FlowPurge(flow.clone()),
            Key::TaskLock(task.clone()),
            Key::TaskStatus(task.clone()),
            Key::TaskCheckpoint(TaskId::capture(&flow)),
            Key::Worker(worker.clone()),
            Key::WorkerDrain(worker),
            Key::ControllerLeader,
        ] {
            assert_eq!(space.parse(space.text(&key).as_bytes()), Some(key));
        }
        assert_eq!(space.text(&Key::TaskLock(task)), "/wallaby/tasks/shop.apply.warehouse/lock");
    }

    #[test]
    fn foreign_keys_are_not_ours() {
        let space = KeySpace::new("/wallaby").unwrap();
        for text in
            ["/wallaby2/flows/a/spec", "/wallaby/flows/A/spec", "/wallaby/flows/a/spec/x", "/wallaby/x", "\u{ff}"]
        {
            assert_eq!(space.parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_prefix_of_a_flows_tasks_takes_no_other_flow() {
        let space = KeySpace::new("/wallaby").unwrap();
        let (a, ab) = (FlowId::new("a").unwrap(), FlowId::new("ab").unwrap());
        let other = space.text(&Key::TaskLock(TaskId::capture(&ab)));
        assert!(!other.starts_with(&space.tasks_of(&a)));
    }

    #[test]
    fn prefixes_are_checked() {
        for bad in ["", "/", "wallaby", "/wallaby/", "/wall aby", "/a//b"] {
            assert!(KeySpace::new(bad).is_err(), "{bad}");
        }
    }
}
