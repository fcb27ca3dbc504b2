//! One connection to etcd that is replaced when it does not answer.
//!
//! etcd-client balances over endpoints and reconnects by itself, but a connection that is cut without a reset (a frozen
//! member, dropped packets) stays in use until HTTP/2 pings notice, which etcd allows every 5 s only. So each link speaks
//! to one endpoint at a time, and after a request without an answer it goes on with a new connection to the next one.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Failure, tonic_code};
use crate::options::{Options, Tls};
use crate::{Error, Result, metrics};

/// etcd closes connections that ping more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(20);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(500);
/// A page of a list can be larger than gRPC's default of 4 MiB; see `PAGE_KEYS` for why it stays below this.
pub(crate) const DECODED_MAX_BYTES: usize = 256 << 20;

/// Where etcd is and how it is spoken to; links are made from it.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) endpoints: Arc<[String]>,
    pub(crate) options: Arc<Options>,
}

/// What a link carries. Time-outs of the client would end streams as well, so streams get links of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Requests,
    Streams,
}

pub(crate) struct Link {
    target: Target,
    purpose: Purpose,
    current: RwLock<Current>,
    /// Where its connections live, whoever finds that a new one is needed.
    runtime: Handle,
}

struct Current {
    generation: u64,
    client: Client,
}

/// An answer, and whether an earlier attempt of the same request ended without one (and may have been done).
pub(crate) struct Answer<T> {
    pub(crate) value: T,
    pub(crate) is_repeated: bool,
}

impl Target {
    pub(crate) fn new<E: AsRef<str>>(endpoints: &[E], options: Options) -> Result<Target> {
        let endpoints: Vec<String> = endpoints.iter().map(|endpoint| endpoint.as_ref().trim().to_owned()).collect();
        if endpoints.is_empty() || endpoints.iter().any(String::is_empty) {
            return Err(Error::Settings(
                "no etcd endpoint is given; write one or more as in http://127.0.0.1:2379".to_owned(),
            ));
        }
        if endpoints.iter().any(|endpoint| endpoint.contains('@')) {
            // Endpoints are printed in messages; this one is not.
            return Err(Error::Settings("an etcd endpoint holds a password: give name and password apart".to_owned()));
        }
        Ok(Target { endpoints: endpoints.into(), options: Arc::new(options) })
    }

    pub(crate) fn unreachable(&self, doing: &'static str, cause: String) -> Error {
        Error::Unreachable { endpoints: self.endpoints.join(","), doing, cause }
    }

    fn connect_options(&self, purpose: Purpose) -> ConnectOptions {
        let options = &self.options;
        let mut out = ConnectOptions::new()
            .with_connect_timeout(options.request_timeout)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            // Pings on a connection without streams make etcd close it.
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(TCP_KEEPALIVE);
        match purpose {
            Purpose::Requests => out = out.with_timeout(options.request_timeout),
            // A member without a leader ends its streams instead of keeping them silent.
            Purpose::Streams => out = out.with_require_leader(true),
        }
        if let Some((name, password)) = &options.user {
            out = out.with_user(name, password).with_auto_token_refresh(true);
        }
        if let Some(tls) = &options.tls {
            out = out.with_tls(tls_options(tls));
        }
        out
    }

    async fn client(&self, purpose: Purpose, generation: u64) -> Result<Client, Failure> {
        let count = u64::try_from(self.endpoints.len()).unwrap_or(1);
        let index = usize::try_from(generation % count).unwrap_or(0);
        let endpoint = [self.endpoints[index].as_str()];
        let connecting = Client::connect(endpoint, Some(self.connect_options(purpose)));
        let timeout = self.options.request_timeout;
        match tokio::time::timeout(timeout, connecting).await {
            Ok(connected) => connected.map_err(Failure::of),
            Err(_) => Err(Failure::timed_out(timeout)),
        }
    }
}

fn tls_options(tls: &Tls) -> etcd_client::TlsOptions {
    let mut out = etcd_client::TlsOptions::new();
    if let Some(ca) = &tls.ca_pem {
        out = out.ca_certificate(etcd_client::Certificate::from_pem(ca));
    }
    if let Some((certificate, key)) = &tls.identity_pem {
        out = out.identity(etcd_client::Identity::from_pem(certificate, key));
    }
    if let Some(domain) = &tls.domain {
        out = out.domain_name(domain);
    }
    out
}

impl Link {
    /// A link that begins at a random endpoint. Does not connect yet, unless a name and password must be checked.
    pub(crate) async fn open(target: &Target, purpose: Purpose) -> Result<Link, Failure> {
        Link::open_at(target, purpose, u64::from(rand::random::<u32>())).await
    }

    /// A link that begins at the endpoint whose turn it is when `generation` links were there before it: who counts them comes to each of
    /// them in turn.
    pub(crate) async fn open_at(target: &Target, purpose: Purpose, mut generation: u64) -> Result<Link, Failure> {
        let mut tried = 0;
        let client = loop {
            match target.client(purpose, generation).await {
                Ok(client) => break client,
                Err(Failure::Unknown(_)) if tried + 1 < target.endpoints.len() => {
                    tried += 1;
                    generation += 1;
                }
                Err(failure) => return Err(failure),
            }
        };
        let current = RwLock::new(Current { generation, client });
        Ok(Link { target: target.clone(), purpose, current, runtime: Handle::current() })
    }

    /// The present connection and its number, for [`Link::replace`].
    pub(crate) fn client(&self) -> (u64, Client) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        (current.generation, current.client.clone())
    }

    /// Goes on with a new connection to the next endpoint, unless somebody has done so since `generation`.
    pub(crate) async fn replace(&self, generation: u64) {
        if self.client().0 != generation {
            return;
        }
        let next = generation.wrapping_add(1);
        let (target, purpose) = (self.target.clone(), self.purpose);
        let connecting = self.runtime.spawn(async move { target.client(purpose, next).await });
        if let Ok(Ok(client)) = AbortOnDropHandle::new(connecting).await {
            let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
            if current.generation == generation {
                *current = Current { generation: next, client };
            }
        }
    }

    /// One attempt. After one without an answer the link has a new connection.
    pub(crate) async fn attempt<T, F, Fut>(&self, timeout: Duration, request: &F) -> Result<T, Failure>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        let (generation, client) = self.client();
        let failure = match tokio::time::timeout(timeout, request(client)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => Failure::of(error),
            Err(_) => Failure::timed_out(timeout),
        };
        if matches!(failure, Failure::Unknown(_)) {
            self.replace(generation).await;
        }
        Err(failure)
    }

    /// Repeats a request until it is answered or `retry_for` has passed. The request must be safe to repeat; the answer
    /// says whether it was.
    pub(crate) async fn call<T, F, Fut>(&self, doing: &'static str, request: F) -> Result<Answer<T>>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.call_for(self.target.options.retry_for, doing, request).await
    }

    /// As [`Link::call`], within a time of its own.
    pub(crate) async fn call_for<T, F, Fut>(
        &self,
        patience: Duration,
        doing: &'static str,
        request: F,
    ) -> Result<Answer<T>>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        let end = Instant::now() + patience;
        let mut pause = RETRY_PAUSE_MIN;
        let mut is_repeated = false;
        loop {
            match self.attempt(self.target.options.request_timeout, &request).await {
                Ok(value) => return Ok(Answer { value, is_repeated }),
                Err(Failure::Refused(error)) => return Err(refused(doing, &error)),
                Err(Failure::Unknown(cause)) if Instant::now() + pause >= end => {
                    return Err(self.target.unreachable(doing, cause));
                }
                Err(Failure::Unknown(_)) => {}
            }
            metrics::request_retried();
            is_repeated = true;
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }
}

pub(crate) fn refused(doing: &'static str, error: &etcd_client::Error) -> Error {
    let cause = tonic_code::text(error);
    if tonic_code::of(error) == Some(tonic_code::NOT_FOUND) && cause.contains("lease") {
        return Error::LeaseLost { holder: "this process".to_owned(), cause };
    }
    Error::Refused { doing, cause }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("endpoints", &self.target.endpoints).finish_non_exhaustive()
    }
}
