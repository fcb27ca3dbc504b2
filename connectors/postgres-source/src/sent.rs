//! Under which names the stream sends tables. A table that has another one's name for a moment is not seen in the catalog afterwards, but the
//! rows that were written meanwhile come under that name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use wallaby_model::{Lsn, TableName};

/// A table as the stream sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentName {
    /// The name that its rows came under.
    pub table: TableName,
    /// Its oid.
    pub oid: u32,
    /// The commit of the transaction; the highest LSN there is for one that was sent before it ended.
    pub commit: Lsn,
}

#[derive(Debug, Default)]
struct Inner {
    seen: Mutex<BTreeMap<(TableName, u32), Lsn>>,
    changed: Notify,
}

/// What the stream sent since it was asked last: of each pair of name and table the last time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct SentNames(Arc<Inner>);

impl SentNames {
    pub(crate) fn see(&self, table: TableName, oid: u32, commit: Option<Lsn>) {
        let commit = commit.unwrap_or(Lsn(u64::MAX));
        // A map of plain values, whole after any panic.
        let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let last = seen.entry((table, oid)).or_insert(commit);
        *last = commit.max(*last);
        drop(seen);
        self.0.changed.notify_one();
    }

    /// Takes what was seen.
    pub fn take(&self) -> Vec<SentName> {
        let seen = std::mem::take(&mut *self.0.seen.lock().unwrap_or_else(PoisonError::into_inner));
        seen.into_iter().map(|((table, oid), commit)| SentName { table, oid, commit }).collect()
    }

    /// Returns once something was seen since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }
}
