//! The first load at a sink: a state for each table, chunks that are loaded exactly once, and the hand-over to the main stream
//! (architecture.md, "Snapshot").

use std::sync::Arc;

use async_trait::async_trait;
use wallaby_model::run::TableStage;
use wallaby_model::{ChunkId, Position, RunId, SegmentBody, TableName, TableSchema};

use crate::{Portions, SinkError};

/// The state of one table in a sink's own checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableMark {
    /// The table as the source names it.
    pub table: TableName,
    /// The run that loads, or loaded, it.
    pub run: RunId,
    /// How often that run started it again; chunks of another restart are refused.
    pub restart: u32,
    /// What becomes of it.
    pub stage: TableStage,
    /// Rows at or before this are in the table, or not for it: where the replay stands, or where the main stream took over.
    /// `None` while it is copied.
    pub position: Option<Position>,
}

/// A chunk that is to be loaded.
#[derive(Clone, Debug)]
pub struct ChunkLoad {
    /// The run.
    pub run: RunId,
    /// The chunk.
    pub chunk: ChunkId,
    /// The table that its rows belong to, as the source names it.
    pub table: TableName,
    /// The restart count of the table's mark: the load is refused when the mark has another one.
    pub restart: u32,
    /// Whether all chunks of the table were read under one snapshot: then no two of them have a row with the same key.
    pub is_one_generation: bool,
}

/// What came of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Its rows are in the table now, durably.
    Now {
        /// How many.
        rows: u64,
    },
    /// They were before.
    Before,
    /// The table is at another run or restart, or not being copied any more: the chunk is of no use to it.
    Stale,
}

/// Gives the parts of a chunk out, in order. Each body has rows of one table, all of them inserts.
#[async_trait]
pub trait ChunkParts: Send {
    /// The next part; `None` after the last. There is at least one, which may have no rows: it says the table's shape.
    ///
    /// # Errors
    /// `Interrupted` when the side store could not be read on: the sink rolls back.
    async fn next(&mut self) -> Result<Option<Arc<SegmentBody>>, SinkError>;
}

/// Loads chunks into a sink; any number of them, of any workers, at a time. It is not fenced by the apply task's epoch but by the
/// table's mark: a load commits only while its table is being copied in its run and restart.
#[async_trait]
pub trait ChunkLoader: Send {
    /// Loads a chunk in one transaction together with a note of it, so that it takes effect exactly once.
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn load(&mut self, chunk: &ChunkLoad, parts: &mut dyn ChunkParts) -> Result<Loaded, SinkError>;

    /// Ends the loader's session.
    async fn close(&mut self);
}

/// What a sink adds to a table that it made itself, after the load: from the source's catalog. Nothing in here names the table, which
/// may have another schema at the sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableExtras {
    /// Indexes beyond those of constraints.
    pub indexes: Vec<TableIndex>,
    /// Check, unique and exclusion constraints: `definition` as `pg_get_constraintdef` prints it.
    pub constraints: Vec<TableExtra>,
    /// Foreign keys.
    pub foreign_keys: Vec<ForeignKey>,
    /// Column defaults: `name` is the column, `definition` the expression as `pg_get_expr` prints it.
    pub defaults: Vec<TableExtra>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableExtra {
    /// Its name.
    pub name: String,
    /// Its definition.
    pub definition: String,
}

/// An index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableIndex {
    /// Its name.
    pub name: String,
    /// Whether it is unique.
    pub is_unique: bool,
    /// What `pg_get_indexdef` prints after the table: `USING btree (a, lower(b)) WHERE (c > 0)`.
    pub using: String,
}

/// A foreign key. What it does ON DELETE and ON UPDATE is left out: the source's own changes come through the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignKey {
    /// Its name.
    pub name: String,
    /// The columns that refer.
    pub columns: Vec<String>,
    /// The table that is referred to, as the source names it.
    pub references: TableName,
    /// The columns that are referred to, in the order of `columns`.
    pub referenced: Vec<String>,
}

/// What the first load asks of a sink. A sink that has this gives it by [`crate::Sink::loads`].
#[async_trait]
pub trait TableLoads: Send {
    /// The marks of all tables of this task.
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn marks(&mut self) -> Result<Vec<TableMark>, SinkError>;

    /// Makes a table when it is missing, empties it when it is there, forgets which of its chunks were loaded, and marks it as copying
    /// in `run` and `restart`, in one transaction under the task's epoch that waits for loads of the table that are under way. Nothing
    /// happens when the table is ready in that run, is at this restart of it or at a later one, or belongs to a later run.
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn prepare(&mut self, run: RunId, restart: u32, shape: &Arc<TableSchema>) -> Result<(), SinkError>;

    /// The chunks of a run that are loaded, by the sink's own notes: those of tables that were emptied since are not among them.
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn loaded(&mut self, run: RunId) -> Result<Vec<ChunkId>, SinkError>;

    /// Moves the marks of tables under the task's epoch, all or none: from copying to catching up at a position; from catching up to
    /// ready, where the mark and the main stream must stand at that position; from copying straight to ready in a first load, where
    /// there must be no main position yet; from anything to gone. A mark that is there already is left; a table without a mark that is
    /// to be gone is none of ours.
    ///
    /// # Errors
    /// `Position` when a table or the main stream does not stand where it must; else as [`crate::Sink::apply`].
    async fn mark(&mut self, tables: &[TableName], stage: TableStage, position: Position) -> Result<(), SinkError>;

    /// Applies a batch to tables that catch up and moves their marks from `batch.from` to `batch.to` in the same transaction; the main
    /// position stays. The batch has rows of these tables only.
    ///
    /// # Errors
    /// `Position` when a mark is not at `batch.from`; else as [`crate::Sink::apply`].
    async fn replay(&mut self, tables: &[TableName], batch: &crate::Batch) -> Result<(), SinkError>;

    /// As [`TableLoads::replay`], for a transaction that is given out in portions. Rows of other tables in them are left out.
    ///
    /// # Errors
    /// `Position` when a mark is not at `from`; else as [`crate::Sink::apply_large`].
    async fn replay_large(
        &mut self,
        tables: &[TableName],
        from: Position,
        portions: &mut dyn Portions,
    ) -> Result<(), SinkError>;

    /// Adds indexes, constraints and defaults to a table that this sink made, each unless it is there. What cannot be added is returned
    /// as sentences, with the statement to run: the rows are whole without it. To be called when every table of the run is handed
    /// over. May take as long as an index takes: it needs no `open` and blocks no writers, so that it can be run on a value of its
    /// own beside the main stream.
    ///
    /// # Errors
    /// `Transient` only.
    async fn finish(&mut self, table: &TableName) -> Result<Vec<String>, SinkError>;

    /// Forgets the notes of loaded chunks of a run that is over.
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn forget(&mut self, run: RunId) -> Result<(), SinkError>;

    /// The sink is to be loaded anew as a whole: its position and all marks are removed, under the task's epoch. Tables stay until
    /// [`TableLoads::prepare`].
    ///
    /// # Errors
    /// As [`crate::Sink::apply`].
    async fn start_anew(&mut self) -> Result<(), SinkError>;
}
