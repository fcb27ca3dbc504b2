//! The shell around the cursor: lists, watches, reopens.

use std::time::Duration;

use etcd_client::{
    EventType, GetOptions, KeyValue, ResponseHeader, WatchFilterType, WatchOptions, WatchResponse, WatchStream,
};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::cursor::{Cursor, Next, Store};
use super::{Change, EVENTS_BUFFERED_MAX, Entry, Watch, WatchEvent};
use crate::error::{Failure, tonic_code};
use crate::keys::KeySpace;
use crate::link::{DECODED_MAX_BYTES, Link, Purpose, Target};
use crate::{Result, Revision, metrics};

/// Keys per page of a list: with the largest values, 1.5 MiB each, a page stays below `DECODED_MAX_BYTES`.
const PAGE_KEYS: i64 = 128;
const REOPEN_PAUSE_MIN: Duration = Duration::from_millis(20);
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// What a watch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Snapshot and all changes.
    Everything,
    /// Deletions only. Snapshots are empty: they say that deletions may have been missed and must be looked for.
    Deletions,
}

/// Starts a watch. `requests` is used for lists.
pub(crate) fn start(
    target: Target,
    requests: std::sync::Arc<Link>,
    keys: KeySpace,
    prefix: String,
    mode: Mode,
) -> Watch {
    let (sender, events) = mpsc::channel(EVENTS_BUFFERED_MAX);
    let feed = Feed { target, requests, keys, prefix, mode, cursor: Cursor::default(), sender };
    Watch { events, _feed: AbortOnDropHandle::new(tokio::spawn(feed.run())) }
}

struct Feed {
    target: Target,
    requests: std::sync::Arc<Link>,
    keys: KeySpace,
    prefix: String,
    mode: Mode,
    cursor: Cursor,
    sender: mpsc::Sender<WatchEvent>,
}

/// Why a watch is to be opened again.
enum Ended {
    /// Nobody listens any more.
    Dropped,
    Compacted,
    Failed(String),
}

impl Feed {
    async fn run(mut self) {
        let mut pause = REOPEN_PAUSE_MIN;
        let mut link: Option<Link> = None;
        loop {
            let mut has_delivered = false;
            let ended = match self.step(&mut link, &mut has_delivered).await {
                Ok(()) => continue,
                Err(ended) => ended,
            };
            let cause = match ended {
                Ended::Dropped => return,
                Ended::Compacted => "compacted",
                Ended::Failed(cause) => {
                    if pause == REOPEN_PAUSE_MAX {
                        tracing::warn!(prefix = %self.prefix, %cause, "watch cannot be opened, trying on");
                    } else {
                        tracing::debug!(prefix = %self.prefix, %cause, "watch failed, opening it again");
                    }
                    "failed"
                }
            };
            metrics::watch_restarted(cause);
            // A new connection each time: the old one may be the reason.
            link = None;
            if has_delivered {
                pause = REOPEN_PAUSE_MIN;
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(REOPEN_PAUSE_MAX);
        }
    }

    async fn step(&mut self, link: &mut Option<Link>, has_delivered: &mut bool) -> Result<(), Ended> {
        match self.cursor.next() {
            Next::List => {
                self.list().await?;
                *has_delivered = true;
                Ok(())
            }
            Next::WatchFrom(revision) => {
                if link.is_none() {
                    let opened = Link::open(&self.target, Purpose::Streams).await;
                    *link = Some(opened.map_err(|failure| Ended::Failed(failure.text()))?);
                }
                match link {
                    Some(link) => self.watch(link, revision, has_delivered).await,
                    None => Ok(()),
                }
            }
        }
    }

    async fn list(&mut self) -> Result<(), Ended> {
        let listed = match self.mode {
            Mode::Everything => list(&self.requests, &self.keys, &self.prefix).await,
            Mode::Deletions => now(&self.requests, &self.prefix).await.map(|store| (Vec::new(), store)),
        };
        let (entries, store) = listed.map_err(|error| Ended::Failed(error.to_string()))?;
        self.send(WatchEvent::Snapshot { entries, revision: Revision(store.revision) }).await?;
        self.cursor.listed(store);
        Ok(())
    }

    async fn watch(&mut self, link: &Link, revision: i64, has_delivered: &mut bool) -> Result<(), Ended> {
        let mut stream = self.open(link, revision).await?;
        loop {
            let response = match stream.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return Err(Ended::Failed("the stream ended".to_owned())),
                Err(error) => return Err(Ended::Failed(self.stream_error(&error))),
            };
            self.check(&response)?;
            if response.events().is_empty() {
                // A progress notification: all changes up to its revision were sent.
                let reached = response.header().map(ResponseHeader::revision);
                self.cursor.advanced(reached.unwrap_or(0));
                continue;
            }
            let last = response.events().iter().filter_map(|event| event.kv()).map(KeyValue::mod_revision).max();
            let changes = self.changes(&response);
            if !changes.is_empty() {
                self.send(WatchEvent::Changes(changes)).await?;
            }
            self.cursor.advanced(last.unwrap_or(0));
            *has_delivered = true;
        }
    }

    /// Opens the stream and waits until etcd says that it watches.
    async fn open(&mut self, link: &Link, revision: i64) -> Result<WatchStream, Ended> {
        let mut options = WatchOptions::new().with_prefix().with_start_revision(revision).with_progress_notify();
        if self.mode == Mode::Deletions {
            options = options.with_filters(vec![WatchFilterType::NoPut]);
        }
        let prefix = self.prefix.clone();
        let opening = |client: etcd_client::Client| {
            let (prefix, options) = (prefix.clone(), options.clone());
            async move {
                let mut watch = client.watch_client().max_decoding_message_size(DECODED_MAX_BYTES);
                let mut stream = watch.watch(prefix, Some(options)).await?;
                let created = stream.message().await?;
                Ok((stream, created))
            }
        };
        let timeout = self.target.options.request_timeout;
        let opened = link.attempt(timeout, &opening).await;
        let (stream, created) = opened.map_err(|failure| Ended::Failed(failure.text()))?;
        let created = created.ok_or_else(|| Ended::Failed("the stream ended before it began".to_owned()))?;
        self.check(&created)?;
        let store = created.header().map(store_of);
        let store = store.ok_or_else(|| Ended::Failed("an answer without a header".to_owned()))?;
        if self.cursor.opened(store) { Ok(stream) } else { Err(Ended::Failed("etcd has another history".to_owned())) }
    }

    /// Whether etcd ended the watch.
    fn check(&mut self, response: &WatchResponse) -> Result<(), Ended> {
        if response.compact_revision() != 0 {
            self.cursor.compacted();
            return Err(Ended::Compacted);
        }
        if response.canceled() {
            return Err(Ended::Failed(response.cancel_reason().to_owned()));
        }
        Ok(())
    }

    /// A message that is too large to take would come again for ever: read everything anew instead.
    fn stream_error(&mut self, error: &etcd_client::Error) -> String {
        if tonic_code::of(error) == Some(tonic_code::OUT_OF_RANGE) {
            self.cursor.compacted();
        }
        tonic_code::text(error)
    }

    fn changes(&self, response: &WatchResponse) -> Vec<Change> {
        let change = |event: &etcd_client::Event| {
            let kv = event.kv()?;
            match event.event_type() {
                EventType::Put => entry(&self.keys, kv).map(Change::Put),
                EventType::Delete => {
                    let key = self.keys.parse(kv.key())?;
                    Some(Change::Deleted { key, revision: Revision(kv.mod_revision()) })
                }
            }
        };
        response.events().iter().filter_map(change).collect()
    }

    async fn send(&self, event: WatchEvent) -> Result<(), Ended> {
        self.sender.send(event).await.map_err(|_| Ended::Dropped)
    }
}

pub(crate) fn store_of(header: &ResponseHeader) -> Store {
    Store { cluster_id: header.cluster_id(), raft_term: header.raft_term(), revision: header.revision() }
}

pub(crate) fn entry(keys: &KeySpace, kv: &KeyValue) -> Option<Entry> {
    Some(Entry {
        key: keys.parse(kv.key())?,
        value: kv.value().to_vec(),
        create_revision: Revision(kv.create_revision()),
        mod_revision: Revision(kv.mod_revision()),
        lease: kv.lease(),
    })
}

/// The store's state now, asked with the smallest read under `prefix`.
async fn now(requests: &Link, prefix: &str) -> Result<Store> {
    let options = GetOptions::new().with_prefix().with_limit(1).with_keys_only();
    let request = |client: etcd_client::Client| {
        let (prefix, options) = (prefix.to_owned(), options.clone());
        async move { client.kv_client().get(prefix, Some(options)).await }
    };
    let answer = requests.call("reading the revision", request).await?.value;
    Ok(answer.header().map_or(Store { cluster_id: 0, raft_term: 0, revision: 0 }, store_of))
}

/// Everything under `prefix` at one revision, page by page.
pub(crate) async fn list(requests: &Link, keys: &KeySpace, prefix: &str) -> Result<(Vec<Entry>, Store)> {
    let end = end_of_prefix(prefix.as_bytes());
    let mut from = prefix.as_bytes().to_vec();
    let mut first: Option<Store> = None;
    let mut entries = Vec::new();
    loop {
        let mut options = GetOptions::new().with_range(end.clone()).with_limit(PAGE_KEYS);
        if let Some(store) = first {
            options = options.with_revision(store.revision);
        }
        let request = |client: etcd_client::Client| {
            let (from, options) = (from.clone(), options.clone());
            async move { client.kv_client().max_decoding_message_size(DECODED_MAX_BYTES).get(from, Some(options)).await }
        };
        let page = requests.call("listing keys", request).await?.value;
        if first.is_none() {
            first = page.header().map(store_of);
        }
        entries.extend(page.kvs().iter().filter_map(|kv| entry(keys, kv)));
        match page.kvs().last() {
            Some(last) if page.more() => {
                from = last.key().to_vec();
                from.push(0);
            }
            _ => break,
        }
    }
    Ok((entries, first.unwrap_or(Store { cluster_id: 0, raft_term: 0, revision: 0 })))
}

/// The first key after all that begin with `prefix`.
fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

impl Failure {
    pub(crate) fn text(&self) -> String {
        match self {
            Failure::Unknown(cause) => cause.clone(),
            Failure::Refused(error) => tonic_code::text(error),
        }
    }
}
