//! Compares a sink with the source: what `wallaby verify` does.
//!
//! Both sides are read under one snapshot each, the sink's taken when it has everything that the source's shows. A row
//! becomes two hashes, of its key and of all its columns, over a text of each value that is the same on both servers
//! ([`canonical`]). One pass over each side sums the row hashes by *range of the key's hash*: 64 KiB of memory at most
//! per thousand ranges, whatever the table's size, in the order of the heap, and without an opinion of how keys sort,
//! which differs between collations, encodings and servers. Only ranges whose sums differ are read row by row, sorted by
//! hash on the server and merged ([`merge`]). Writers may go on: rows that differ are read again by key until it is
//! certain that they were not on their way ([`recheck`]).
//!
//! | module | holds |
//! |---|---|
//! | `canonical` | the text of a value, the hash of a row (pure) |
//! | `sql`, `catalog` | the statements (pure) |
//! | `digest` | sums by range (pure) |
//! | `merge` | two sorted streams to differences (pure) |
//! | `recheck` | what a second look says (pure) |
//! | `awake` | a side that waits for the other |
//! | `engine`, `table` | the run over all tables, and one of them |

mod awake;
mod canonical;
mod catalog;
mod digest;
mod engine;
mod merge;
mod recheck;
mod sql;
mod table;

use async_trait::async_trait;
use wallaby_model::{Lsn, Position, TableName};

use canonical::RowText;
pub use canonical::SETTINGS as VERIFY_SETTINGS;
pub use catalog::{read_table, table_sql};
pub use engine::{VerifyRequest, verify};

use crate::SinkError;

/// One row as text; `None` is NULL.
pub type VerifyRow = Vec<Option<String>>;

/// Why a comparison did not come to an end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A side cannot be reached or asks for another try: a lock that is not had in time, a shutdown.
    #[error("{0}")]
    Transient(String),
    /// A side refuses: rights, settings, a table that does not exist at the source.
    #[error("{0}")]
    Refused(String),
    /// The time is over.
    #[error("{0}")]
    TimedOut(String),
}

impl From<SinkError> for VerifyError {
    fn from(error: SinkError) -> VerifyError {
        match error {
            SinkError::Transient(text) => VerifyError::Transient(text),
            other => VerifyError::Refused(other.to_string()),
        }
    }
}

/// A column as a side has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyColumn {
    /// Its name, unquoted.
    pub name: String,
    /// The oid of its type, a domain's base type taken for the domain. Compared only with those of built-in types.
    pub type_oid: u32,
}

/// How a table is stored, and so how it is read in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyStorage {
    /// In pages, by row address. With partitions: the pages of the largest one, and how many there are.
    Pages {
        /// How many pages there are.
        pages: u64,
        /// How many relations have so many pages at most.
        relations: u32,
        /// Whether the table has children that are tables of their own (old inheritance) and are not meant.
        only: bool,
    },
    /// In a way that is read as a whole: a view, a foreign table.
    Whole,
}

/// A table as a side has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyTable {
    /// Its name at this side.
    pub table: TableName,
    /// Its columns. At the source: those that the publication sends.
    pub columns: Vec<VerifyColumn>,
    /// At the source: the names of the columns that tell rows apart, all of them in `columns`; empty when there are none.
    pub key: Vec<String>,
    /// At the source: the publication's row filter, as SQL over the table's columns.
    pub filter: Option<String>,
    /// About how many rows it has.
    pub rows_estimated: u64,
    /// How it is read.
    pub storage: VerifyStorage,
}

/// A session of PostgreSQL on one side, whose snapshot stays until [`VerifySource::renew`] or [`VerifySink::renew`].
#[async_trait]
pub trait VerifySession: Send {
    /// The rows of one statement, in their order, all in memory: the caller bounds them.
    ///
    /// # Errors
    /// When the server cannot be asked, or refuses.
    async fn rows(&mut self, sql: &str) -> Result<Vec<VerifyRow>, VerifyError>;
}

/// The source.
#[async_trait]
pub trait VerifySource: VerifySession {
    /// The tables that the publication sends, by name.
    ///
    /// # Errors
    /// When the source cannot be asked.
    async fn tables(&mut self) -> Result<Vec<TableName>, VerifyError>;

    /// Locks the tables against being rewritten, takes a new snapshot, and says an LSN that every commit in it lies below.
    /// An earlier snapshot ends.
    ///
    /// # Errors
    /// When the source cannot be asked, or a table is gone.
    async fn renew(&mut self, tables: &[TableName]) -> Result<Lsn, VerifyError>;

    /// A table under the snapshot.
    ///
    /// # Errors
    /// When the source cannot be asked, or the table is gone.
    async fn table(&mut self, table: &TableName) -> Result<VerifyTable, VerifyError>;
}

/// A sink that is a PostgreSQL database.
#[async_trait]
pub trait VerifySink: VerifySession {
    /// The sink's table for a table of the source.
    fn target(&self, source: &TableName) -> TableName;

    /// Locks those of the sink's tables that exist, takes a new snapshot, and says the position of the sink **in it**; `None` when the sink
    /// never had one. An earlier snapshot ends.
    ///
    /// # Errors
    /// When the sink cannot be asked.
    async fn renew(&mut self, tables: &[TableName]) -> Result<Option<Position>, VerifyError>;

    /// A table under the snapshot, by its name at the sink; `None` when there is none.
    ///
    /// # Errors
    /// When the sink cannot be asked.
    async fn table(&mut self, table: &TableName) -> Result<Option<VerifyTable>, VerifyError>;
}

/// An LSN right behind the header of a WAL page is where the page begins: the server says the one before it writes, and
/// the other after it wrote.
pub fn settled_lsn(lsn: Lsn) -> Lsn {
    const PAGE: u64 = 8192;
    const SHORT_HEADER: u64 = 24;
    const LONG_HEADER: u64 = 40;
    match lsn.0 % PAGE {
        SHORT_HEADER | LONG_HEADER => Lsn(lsn.0 - lsn.0 % PAGE),
        _ => lsn,
    }
}
