//! Where the work runs that the stream goes before: reading, loading and comparing rows that exist keeps its threads busy for minutes.
//!
//! On the threads of capture and apply each of their steps would wait for a turn, and a batch has many steps. So that work has threads of
//! its own, and the scheduler prefers the others where cores are few.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;
use wallaby_model::TaskKind;

const THREAD_NAME: &str = "background";
/// By how much the priority is lower: of one core, threads of the stream then get about three times as much.
const NICE: i32 = 5;
/// The lowest priority that there is.
const NICE_MAX: i32 = 19;
/// So many threads at least: a row of 200 MB may keep one for long, and then the others would have no turn.
const THREADS_MIN: usize = 2;

static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let threads = std::thread::available_parallelism().map_or(THREADS_MIN, |cores| cores.get().max(THREADS_MIN));
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).enable_all().thread_name(THREAD_NAME).on_thread_start(step_back);
    // It panics where a thread is refused.
    let runtime = catch_unwind(AssertUnwindSafe(|| builder.build())).ok().and_then(Result::ok);
    if runtime.is_none() {
        tracing::warn!(
            "no threads for existing rows: they share those of the stream, which waits for them. Raise the limit of threads (pids) and start the worker again"
        );
    }
    runtime
});

/// Lowers the calling thread's priority; no privilege is needed for that.
fn step_back() {
    // Elsewhere it is the whole process that has a priority.
    #[cfg(target_os = "linux")]
    {
        let own = rustix::process::getpriority_process(None);
        let set = own.and_then(|own| rustix::process::setpriority_process(None, (own + NICE).min(NICE_MAX)));
        if let Err(error) = set {
            tracing::warn!(%error, "a thread for existing rows has the priority of the stream: allow setpriority, or give the worker more cores");
        }
    }
}

/// The threads for existing rows; `None` where they share those of the stream.
pub fn runtime() -> Option<Handle> {
    RUNTIME.as_ref().map(|runtime| runtime.handle().clone())
}

/// Runs a task's work where its kind belongs.
pub fn spawn<F>(kind: &TaskKind, work: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match kind {
        TaskKind::Chunk(..) | TaskKind::Load(..) | TaskKind::Verify(_) => match &*RUNTIME {
            Some(runtime) => runtime.spawn(work),
            None => tokio::spawn(work),
        },
        TaskKind::Capture | TaskKind::Apply(_) | TaskKind::Run(_) => tokio::spawn(work),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

    use wallaby_model::{ChunkId, RunId, SinkId};

    use super::*;

    async fn place(kind: &TaskKind) -> (Option<String>, i32) {
        let look = async {
            let name = std::thread::current().name().map(str::to_owned);
            (name, rustix::process::getpriority_process(None).unwrap())
        };
        spawn(kind, look).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn existing_rows_are_handled_beside_the_stream_and_after_it() {
        let own = rustix::process::getpriority_process(None).unwrap();
        let (sink, chunk) = (SinkId::new("warehouse").unwrap(), ChunkId { table: 0, restart: 0, number: 0 });
        let load = TaskKind::Load(sink.clone(), RunId(1), chunk);
        for kind in [TaskKind::Chunk(RunId(1), chunk), load, TaskKind::Verify(1)] {
            let lower = (own + NICE).min(NICE_MAX);
            assert_eq!(place(&kind).await, (Some(THREAD_NAME.to_owned()), lower), "{kind:?}");
        }
        for kind in [TaskKind::Capture, TaskKind::Apply(sink), TaskKind::Run(RunId(1))] {
            let (name, nice) = place(&kind).await;
            assert_ne!(name.as_deref(), Some(THREAD_NAME), "{kind:?}");
            assert_eq!(nice, own, "{kind:?}");
        }
    }
}
