//! The sink contract.

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_model::{Epoch, Position, TaskId};

use crate::{Batch, ChunkLoader, Portion, Portions, SinkError, SourceLookup, TableLoads};

/// What a sink promises; printed in the docs from this declaration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    /// Every change takes effect exactly once, whatever dies.
    ExactlyOnce,
    /// Every change takes effect at least once; repeats carry the same position.
    AtLeastOnce,
}

/// What a sink can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The connector's name, as in a flow file.
    pub name: &'static str,
    /// Its promise.
    pub guarantee: Guarantee,
    /// Whether a source transaction becomes visible as one.
    pub transactional: bool,
    /// What the guarantee rests on, and its limits: whole sentences, for the docs.
    pub notes: &'static [&'static str],
    /// The most rows that one batch should have.
    pub batch_rows_max: usize,
    /// The most encoded bytes that one batch should have, unless a single transaction is larger.
    pub batch_bytes_max: usize,
}

/// Where a sink stands when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The position of its last committed batch; `None` when it never had one.
    pub position: Option<Position>,
    /// The log's epoch at that position, from the sink's own checkpoint.
    pub log_epoch: Option<Epoch>,
    /// How many sessions of older owners were ended.
    pub sessions_ended: u32,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Taken, may still be lost: ask `barrier` later.
    Accepted,
    /// Survives a crash of the sink, up to and with this position.
    Durable(Position),
}

/// One sink, owned by one apply task under one epoch.
#[async_trait]
pub trait Sink: Send {
    /// What the sink can do.
    fn capabilities(&self) -> Capabilities;

    /// The highest epoch that this task's checkpoint at the sink knows; `None` when there is no checkpoint yet. Only
    /// reads: called before `open`, so that the new epoch is above it even after etcd was restored from a backup.
    ///
    /// # Errors
    /// When the sink cannot be reached or refuses.
    async fn last_epoch(&mut self) -> Result<Option<Epoch>, SinkError>;

    /// Takes the sink over: ends sessions of older epochs of this task, makes this epoch the only one that can write,
    /// and reads where the sink stands. May be called again after an error.
    ///
    /// # Errors
    /// `Fenced` when the sink knows a younger epoch.
    async fn open(&mut self, epoch: Epoch) -> Result<Opened, SinkError>;

    /// Sets the position of a sink that never had one. Does nothing when it has one.
    ///
    /// # Errors
    /// `Fenced` when a younger epoch took over.
    async fn start_at(&mut self, position: Position, log_epoch: Epoch) -> Result<(), SinkError>;

    /// Applies one batch: all of it or nothing of it is seen.
    ///
    /// # Errors
    /// `Position` when the sink does not stand at `batch.from`; `Fenced` after a takeover; else as classified.
    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError>;

    /// Applies one transaction that is given out in portions, in one transaction of the sink: all of it or nothing of it is
    /// seen, and memory stays within a few portions. The sink stands at `from` before, and at the end's `to` after it.
    ///
    /// # Errors
    /// As `apply`; `Interrupted` when the portions could not be read on.
    async fn apply_large(&mut self, from: Position, portions: &mut dyn Portions) -> Result<Applied, SinkError> {
        // For sinks that keep a batch in memory anyway; one that has transactions does better.
        let mut parts = Vec::new();
        loop {
            match portions.next().await? {
                Portion::Rows(more) => parts.extend(more),
                Portion::End { to, log_epoch } => {
                    return self.apply(&Batch { from, to, log_epoch, parts }).await;
                }
            }
        }
    }

    /// The first load's part of the sink; `None` for a sink that cannot be loaded.
    fn loads(&mut self) -> Option<&mut dyn TableLoads> {
        None
    }

    /// Returns once everything applied so far is durable, and says up to where.
    ///
    /// # Errors
    /// As `apply`.
    async fn barrier(&mut self) -> Result<Position, SinkError>;

    /// Ends the sink's sessions. What was not durable may be lost; the log has it.
    async fn close(&mut self);
}

/// Who a sink works for.
#[derive(Clone)]
pub struct SinkTask {
    /// The apply task; names the sink's sessions and its checkpoint.
    pub task: TaskId,
    /// Epochs below it are not of this flow: the flow was made later. What the sink keeps under one of them, an earlier flow of
    /// the same name left behind; its position and its loads say nothing about this one.
    pub since: Epoch,
    /// Reads rows of the source by key.
    pub lookup: Arc<dyn SourceLookup>,
}

/// Makes a sink from its configuration. Does not connect: `open` does.
pub trait SinkFactory: Send + Sync {
    /// A new, unopened sink.
    fn make(&self, task: SinkTask) -> Box<dyn Sink>;

    /// A new, unconnected loader of chunks for the sink of this apply task; `None` for a sink that cannot be loaded.
    fn make_loader(&self, task: SinkTask) -> Option<Box<dyn ChunkLoader>> {
        let _ = task;
        None
    }
}
