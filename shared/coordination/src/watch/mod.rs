//! Watches that lose nothing: a snapshot first, then every change after it; after an error they go on behind the last
//! change, after a compaction (or a restore of etcd) they give a new snapshot.

mod cursor;
mod feed;

use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::keys::Key;
use crate::packed::json_of;
use crate::{Error, Result, Revision};
pub(crate) use feed::{Mode, entry, list, start};

/// How many events wait for the consumer before the watch itself waits.
const EVENTS_BUFFERED_MAX: usize = 64;

/// A key with its value, as it was at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the key stands for.
    pub key: Key,
    /// JSON, packed when it is large; see [`Entry::decode`].
    pub value: Vec<u8>,
    /// The revision that made the key.
    pub create_revision: Revision,
    /// The revision that wrote this value.
    pub mod_revision: Revision,
    /// The lease the key lives under; 0 for none.
    pub lease: i64,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A key was made or got another value.
    Put(Entry),
    /// A key was deleted, or its lease ended.
    Deleted {
        /// The key.
        key: Key,
        /// The revision that deleted it.
        revision: Revision,
    },
}

/// What a watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// Everything under the prefix at `revision`. Whatever is not in it does not exist: forget what was known before.
    Snapshot {
        /// The keys.
        entries: Vec<Entry>,
        /// The revision at which this was all.
        revision: Revision,
    },
    /// Changes in order; those of one transaction are always together.
    Changes(Vec<Change>),
}

/// A running watch. Ends when dropped.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<WatchEvent>,
    _feed: AbortOnDropHandle<()>,
}

impl Watch {
    /// The next event; waits as long as it takes. `None` only when the runtime shuts down.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        self.events.recv().await
    }
}

impl Entry {
    /// Reads the value.
    ///
    /// # Errors
    /// `Malformed` when it is not what the key should hold.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        decode(&format!("{:?}", self.key), &self.value)
    }
}

/// Reads a JSON value. The error says where, never what.
pub(crate) fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T> {
    serde_json::from_slice(&json_of(key, value)?).map_err(|error| {
        // serde_json's own text can quote the value.
        let kind = match error.classify() {
            serde_json::error::Category::Syntax | serde_json::error::Category::Eof => "not JSON",
            _ => "not of the expected shape",
        };
        Error::Malformed {
            key: key.to_owned(),
            cause: format!("{kind} at line {} column {}", error.line(), error.column()),
        }
    })
}
