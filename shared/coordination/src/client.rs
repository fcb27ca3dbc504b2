//! The connection to etcd and the requests that everything else is made of.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, Txn, TxnOpResponse, TxnResponse};
use serde::Serialize;

use crate::error::{Failure, tonic_code};
use crate::keys::{Key, KeySpace};
use crate::link::{Answer, Link, Purpose, Target};
use crate::options::Options;
use crate::watch::{Entry, Mode, Watch};
use crate::{Error, Result, Revision, watch};

/// etcd's `--max-request-bytes`, less room for the request's frame.
pub(crate) const REQUEST_BYTES_MAX: usize = 1536 * 1024 - 16 * 1024;
/// etcd's `--max-txn-ops`.
pub(crate) const TXN_OPERATIONS_MAX: usize = 128;

/// etcd. Clones share connections. Belongs to the tokio runtime in which it was made.
#[derive(Clone)]
pub struct Coordination {
    inner: Arc<Inner>,
}

struct Inner {
    target: Target,
    keys: KeySpace,
    requests: Arc<Link>,
}

/// The parts of a transaction's answer that we use.
pub(crate) struct Outcome {
    pub(crate) succeeded: bool,
    pub(crate) revision: Revision,
    /// One per operation of the branch that ran; the entries of a get, nothing for others.
    pub(crate) reads: Vec<Vec<Entry>>,
    /// An earlier attempt of the same transaction ended without an answer and may have been done.
    pub(crate) is_repeated: bool,
}

impl Coordination {
    /// Connects to etcd and checks that it answers with a quorum.
    ///
    /// # Errors
    /// `Settings` for endpoints or a prefix that cannot be used; `Unreachable`, naming the endpoints and what to check, when
    /// none answers within `options.connect_timeout`.
    pub async fn connect<E: AsRef<str>>(endpoints: &[E], options: Options) -> Result<Coordination> {
        let keys = KeySpace::new(options.prefix.clone())?;
        let patience = options.connect_timeout;
        let target = Target::new(endpoints, options)?;
        let opened = tokio::time::timeout(patience, Link::open(&target, Purpose::Requests)).await;
        let link = match opened {
            Ok(Ok(link)) => link,
            Ok(Err(Failure::Refused(error))) => {
                return Err(unusable(&target, &tonic_code::text(&error)));
            }
            Ok(Err(Failure::Unknown(cause))) => return Err(target.unreachable("connecting", cause)),
            Err(_) => return Err(target.unreachable("connecting", format!("no answer within {patience:?}"))),
        };
        let inner = Inner { target, keys, requests: Arc::new(link) };
        let coordination = Coordination { inner: Arc::new(inner) };
        match coordination.probe(patience).await {
            Ok(()) => Ok(coordination),
            Err(Error::Refused { cause, .. }) => Err(unusable(coordination.target(), &cause)),
            Err(error) => Err(error),
        }
    }

    /// A read that needs a quorum.
    async fn probe(&self, patience: Duration) -> Result<()> {
        let key = self.keys().text(&Key::ControllerLeader);
        let request = |client: etcd_client::Client| {
            let key = key.clone();
            async move { client.kv_client().get(key, Some(GetOptions::new().with_count_only())).await }
        };
        self.inner.requests.call_for(patience, "connecting", request).await.map(|_| ())
    }

    /// The key space.
    pub fn keys(&self) -> &KeySpace {
        &self.inner.keys
    }

    /// The configured endpoints.
    pub fn endpoints(&self) -> &[String] {
        &self.inner.target.endpoints
    }

    pub(crate) fn target(&self) -> &Target {
        &self.inner.target
    }

    pub(crate) fn requests(&self) -> &Arc<Link> {
        &self.inner.requests
    }

    /// One key; linearizable.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn get(&self, key: &Key) -> Result<Option<Entry>> {
        let text = self.keys().text(key);
        let request = |client: etcd_client::Client| {
            let text = text.clone();
            async move { client.kv_client().get(text, None).await }
        };
        let answer = self.inner.requests.call("reading a key", request).await?.value;
        Ok(answer.kvs().first().and_then(|kv| watch::entry(self.keys(), kv)))
    }

    /// All keys of ours under `prefix` (one of [`KeySpace`]'s), at one revision, in key order.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        Ok(watch::list(&self.inner.requests, self.keys(), prefix).await?.0)
    }

    /// Watches all keys of ours under `prefix` (one of [`KeySpace`]'s). Heals itself; see [`Watch`].
    pub fn watch(&self, prefix: impl Into<String>) -> Watch {
        self.watch_as(prefix.into(), Mode::Everything)
    }

    pub(crate) fn watch_as(&self, prefix: String, mode: Mode) -> Watch {
        watch::start(self.target().clone(), self.requests().clone(), self.keys().clone(), prefix, mode)
    }

    /// Runs a transaction until it is answered. The caller settles what an earlier attempt may have done.
    pub(crate) async fn transact(&self, doing: &'static str, txn: Txn) -> Result<Outcome> {
        let request = |client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.kv_client().txn(txn).await }
        };
        let answer = self.inner.requests.call(doing, request).await?;
        Ok(self.outcome(answer))
    }

    fn outcome(&self, answer: Answer<TxnResponse>) -> Outcome {
        let Answer { value, is_repeated } = answer;
        let read = |response: &TxnOpResponse| match response {
            TxnOpResponse::Get(got) => got.kvs().iter().filter_map(|kv| watch::entry(self.keys(), kv)).collect(),
            _ => Vec::new(),
        };
        Outcome {
            succeeded: value.succeeded(),
            revision: Revision(value.header().map_or(0, etcd_client::ResponseHeader::revision)),
            reads: value.op_responses().iter().map(read).collect(),
            is_repeated,
        }
    }
}

impl std::fmt::Debug for Coordination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordination")
            .field("endpoints", &self.endpoints())
            .field("keys", self.keys())
            .finish_non_exhaustive()
    }
}

impl Outcome {
    /// The first entry of the nth operation's read.
    pub(crate) fn read(&self, operation: usize) -> Option<&Entry> {
        self.reads.get(operation).and_then(|entries| entries.first())
    }
}

/// etcd answered, and did not like who asks.
fn unusable(target: &Target, cause: &str) -> Error {
    let endpoints = target.endpoints.join(",");
    Error::Settings(format!(
        "etcd at {endpoints} says: {cause}. Check the name and the password for it, and their rights"
    ))
}

/// A value as it is stored, refused when it would not fit.
pub(crate) fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>> {
    let bytes = serde_json::to_vec(value).map_err(|error| Error::Malformed {
        key: key.to_owned(),
        cause: format!("it cannot be written as JSON: {error}"),
    })?;
    if bytes.len() + key.len() > REQUEST_BYTES_MAX {
        let bytes = bytes.len() + key.len();
        return Err(Error::TooLarge { key: key.to_owned(), bytes, limit: REQUEST_BYTES_MAX });
    }
    Ok(bytes)
}
