//! The suite that any sink must pass, and the builder of the batches that it uses.
//!
//! A sink's tests implement [`SinkUnderTest`] for a fresh, empty target and run every [`Case`] of [`CASES`], of [`LARGE_CASES`] when its
//! transactions may be larger than memory, and of [`LOAD_CASES`] when it has [`crate::Sink::loads`]. They also run each case
//! on [`Broken`], which breaks just the promise that the case is about: a case that passes there proves nothing.
//!
//! ```ignore
//! for case in CASES {
//!     let target = MyTarget::fresh().await;
//!     case.run(&target).await.unwrap();
//!     let target = MyTarget::fresh().await;
//!     case.run(&Broken::for_case(case, &target)).await.unwrap_err();
//! }
//! ```

mod broken;
mod builder;
mod cases;
mod feeds;
mod large_cases;
mod load_cases;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use wallaby_model::{TableName, TableSchema};

pub use broken::{Break, Broken};
pub use builder::{Change, Log, Shape, Value, chunk_part};
pub use cases::CASES;
pub use feeds::{PartFeed, PortionFeed};
pub use large_cases::LARGE_CASES;
pub use load_cases::LOAD_CASES;

use crate::{ChunkLoader, Faults, KeyValues, Sink, SinkError, SourceLookup, SourceRow};

/// A row as text, column by column in the order of the table's definition. `None` is NULL.
pub type TextRow = Vec<Option<String>>;

/// A sink's target, fresh and empty, for one task.
#[async_trait]
pub trait SinkUnderTest: Sync {
    /// A new, unopened sink of the same task on the same target.
    fn make(&self, faults: Faults, lookup: Arc<dyn SourceLookup>) -> Box<dyn Sink>;

    /// A new loader for that sink; `None` for a sink that cannot be loaded.
    fn make_loader(&self, faults: Faults) -> Option<Box<dyn ChunkLoader>> {
        let _ = faults;
        None
    }

    /// All rows of a table as a reader sees them now, sorted, without columns of the sink's own.
    async fn rows(&self, table: &TableName) -> Vec<TextRow>;

    /// Adds a unique constraint to a table of the target; false when the target knows none.
    async fn constrain(&self, table: &TableName, columns: &[&str]) -> bool;
}

/// One thing that a sink must do right.
#[derive(Clone, Copy)]
pub struct Case {
    /// What it is about.
    pub name: &'static str,
    /// The promise that must be broken for the case to fail.
    pub breaks: Break,
    run: for<'a> fn(&'a dyn SinkUnderTest) -> Verdict<'a>,
}

type Verdict<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

impl Case {
    /// Runs the case.
    ///
    /// # Errors
    /// What was expected and what came instead.
    pub async fn run(&self, target: &dyn SinkUnderTest) -> Result<(), String> {
        (self.run)(target).await
    }
}

/// A source that has no rows (any more).
pub struct EmptySource;

#[async_trait]
impl SourceLookup for EmptySource {
    async fn row_by_key(&self, _: &Arc<TableSchema>, _: &KeyValues) -> Result<SourceRow, SinkError> {
        Ok(None)
    }
}
