//! Under which names the stream sends tables. A table that has another one's name for a moment is not seen in the catalog afterwards, but the
//! rows that were written meanwhile come under that name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

/// How long names that nobody has compared keep the source from being told of what is durable.
const HELD_AT_MOST: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Seen {
    names: BTreeMap<(TableName, u32), Lsn>,
    /// The lowest LSN from which on names come again that are not compared yet, and since when.
    held: Option<(Lsn, Instant)>,
}

#[derive(Debug, Default)]
struct Inner {
    seen: Mutex<Seen>,
    changed: Notify,
}

/// What the stream sent since it was asked last: of each pair of name and table the last time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct SentNames(Arc<Inner>);

impl SentNames {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        // Plain values, whole after any panic.
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `commit`: of the transaction, when that is known; `received`: what came before it.
    pub(crate) fn see(&self, table: TableName, oid: u32, commit: Option<Lsn>, received: Lsn) {
        let from = commit.unwrap_or(received);
        let commit = commit.unwrap_or(Lsn(u64::MAX));
        let mut seen = self.lock();
        let last = seen.names.entry((table, oid)).or_insert(commit);
        *last = commit.max(*last);
        seen.held = Some(seen.held.map_or((from, Instant::now()), |(held, since)| (held.min(from), since)));
        drop(seen);
        self.0.changed.notify_one();
    }

    /// Takes what was seen. [`SentNames::done`] is to be said once it was acted upon.
    pub fn take(&self) -> Vec<SentName> {
        let names = std::mem::take(&mut self.lock().names);
        names.into_iter().map(|((table, oid), commit)| SentName { table, oid, commit }).collect()
    }

    /// What was taken was acted upon: the source need not send it again.
    pub fn done(&self) {
        let mut seen = self.lock();
        if seen.names.is_empty() {
            seen.held = None;
        }
    }

    /// How much of what is durable, up to `lsn`, the source may be told of: a successor has to see again what nobody acted upon. Not for
    /// long: the source's WAL must not wait for it.
    pub fn allow(&self, lsn: Lsn) -> Lsn {
        match self.lock().held {
            Some((held, since)) if since.elapsed() < HELD_AT_MOST => lsn.min(held),
            _ => lsn,
        }
    }

    /// Returns once something was seen since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_acted_upon_is_sent_again() {
        let sent = SentNames::default();
        let table = TableName::new("public", "t");
        assert_eq!(sent.allow(Lsn(900)), Lsn(900));
        sent.see(table.clone(), 1, Some(Lsn(500)), Lsn(400));
        sent.see(table.clone(), 1, None, Lsn(600));
        assert_eq!((sent.allow(Lsn(900)), sent.allow(Lsn(300))), (Lsn(500), Lsn(300)));
        assert_eq!(sent.take(), [SentName { table: table.clone(), oid: 1, commit: Lsn(u64::MAX) }]);
        assert_eq!(sent.allow(Lsn(900)), Lsn(500), "taken, and not acted upon");
        sent.see(table, 2, Some(Lsn(700)), Lsn(650));
        sent.done();
        assert_eq!(sent.allow(Lsn(900)), Lsn(500), "more came meanwhile");
        assert_eq!(sent.take().len(), 1);
        sent.done();
        assert_eq!(sent.allow(Lsn(900)), Lsn(900));
    }
}
