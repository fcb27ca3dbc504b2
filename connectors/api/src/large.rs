//! Transactions that do not fit into memory: given to a sink in portions, applied in one transaction of the sink.

use async_trait::async_trait;
use wallaby_model::{Epoch, Position};

use crate::{BatchPart, SinkError};

/// The next piece of a transaction.
#[derive(Debug)]
pub enum Portion {
    /// Rows, in position order after those before.
    Rows(Vec<BatchPart>),
    /// The transaction ended: the sink commits and stands at `to`.
    End {
        /// `(end_lsn, 0)`.
        to: Position,
        /// The log's epoch at `to`.
        log_epoch: Epoch,
    },
}

/// Gives a transaction out, portion by portion; each is a few MiB. Whoever implements it says what it waits for.
#[async_trait]
pub trait Portions: Send {
    /// The next portion. After [`Portion::End`] there is none.
    ///
    /// # Errors
    /// `Interrupted` when the log or the side store could not be read on: the sink rolls back.
    async fn next(&mut self) -> Result<Portion, SinkError>;
}
