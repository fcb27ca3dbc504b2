//! Where the work runs that the stream goes before: reading, loading and comparing rows that exist keeps its threads busy for minutes.
//!
//! On the threads of capture and apply each of their steps would wait for a turn, and a batch has many steps. So that work has threads of
//! its own, and the scheduler prefers the others where cores are few.

use std::future::Future;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use wallaby_model::TaskKind;

const THREAD_NAME: &str = "background";
/// Threads of one core share it by weight: those of the stream get about three times as much.
const NICE: i32 = 5;

static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread().enable_all().thread_name(THREAD_NAME).on_thread_start(step_back).build();
    runtime
        .inspect_err(|error| tracing::warn!(%error, "no threads for background work: it shares those of the stream"))
        .ok()
});

/// Lowers the calling thread's priority; no privilege is needed for that.
fn step_back() {
    // Elsewhere it is the whole process that has a priority.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "background work has the priority of the stream");
    }
}

/// Runs a task's work where its kind belongs.
pub fn spawn<F>(kind: &TaskKind, work: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match (kind, &*RUNTIME) {
        (TaskKind::Chunk(..) | TaskKind::Load(..) | TaskKind::Verify(_), Some(runtime)) => runtime.spawn(work),
        _ => tokio::spawn(work),
    }
}

#[cfg(test)]
mod tests {
    use wallaby_model::{ChunkId, RunId, SinkId};

    use super::*;

    async fn place(kind: TaskKind) -> (Option<String>, i32) {
        let look = async {
            let name = std::thread::current().name().map(str::to_owned);
            (name, rustix::process::getpriority_process(None).unwrap())
        };
        spawn(&kind, look).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn existing_rows_are_handled_beside_the_stream_and_after_it() {
        let own = rustix::process::getpriority_process(None).unwrap();
        let (sink, chunk) = (SinkId::new("warehouse").unwrap(), ChunkId { table: 0, restart: 0, number: 0 });
        for kind in [TaskKind::Chunk(RunId(1), chunk), TaskKind::Load(sink.clone(), RunId(1), chunk)] {
            assert_eq!(place(kind.clone()).await, (Some(THREAD_NAME.to_owned()), (own + NICE).min(19)), "{kind:?}");
        }
        for kind in [TaskKind::Capture, TaskKind::Apply(sink), TaskKind::Run(RunId(1))] {
            let (name, nice) = place(kind.clone()).await;
            assert_ne!(name.as_deref(), Some(THREAD_NAME), "{kind:?}");
            assert_eq!(nice, own, "{kind:?}");
        }
    }
}
