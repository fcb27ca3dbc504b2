//! A connected socket that can be left alone.
//!
//! Whoever watches a socket is woken by every packet, also one that sleeps on a timer until it will read: tokio watches a socket for as
//! long as it is open, and the walsender sends every row as a packet of its own. On a machine where a wake-up is dear that is most of
//! what a row costs, at both ends, because waking is done by whoever sends. So a reader that will come back by itself takes the socket
//! off the watch ([`Arrivals::rest`]): packets gather, and nobody is told.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use socket2::Socket;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A stream socket.
pub(crate) struct WireSocket {
    shared: Arc<Shared>,
    /// While a write waits for room; over a handle of its own, because a watch is for one handle once.
    writable: Option<AsyncFd<Socket>>,
}

/// Says whether arrivals at a socket are of interest.
#[derive(Clone)]
pub(crate) struct Arrivals(Arc<Shared>);

struct Shared {
    socket: Arc<Socket>,
    reading: Mutex<Reading>,
}

#[derive(Default)]
struct Reading {
    /// While somebody waits for arrivals.
    watched: Option<AsyncFd<Arc<Socket>>>,
    /// Nobody is to be told of arrivals.
    is_resting: bool,
}

impl WireSocket {
    /// Takes a connected socket over.
    pub(crate) fn new(socket: impl Into<OwnedFd>) -> io::Result<WireSocket> {
        let socket = Socket::from(socket.into());
        socket.set_nonblocking(true)?;
        let shared = Shared { socket: Arc::new(socket), reading: Mutex::default() };
        Ok(WireSocket { shared: Arc::new(shared), writable: None })
    }

    /// The socket itself.
    pub(crate) fn socket(&self) -> &Socket {
        &self.shared.socket
    }

    /// A handle for the reader.
    pub(crate) fn arrivals(&self) -> Arrivals {
        Arrivals(Arc::clone(&self.shared))
    }
}

impl Arrivals {
    /// From now on a read that finds nothing is not told when something comes: only for one that will try again by itself.
    pub(crate) fn rest(&self) {
        let mut reading = self.0.reading.lock().unwrap_or_else(PoisonError::into_inner);
        reading.is_resting = true;
        reading.watched = None;
    }

    /// From now on a read that finds nothing is told when something comes. Says whether that is new.
    pub(crate) fn watch(&self) -> bool {
        let mut reading = self.0.reading.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut reading.is_resting)
    }

    #[cfg(test)]
    pub(crate) fn is_watched(&self) -> bool {
        self.0.reading.lock().unwrap_or_else(PoisonError::into_inner).watched.is_some()
    }
}

#[allow(deprecated, reason = "its successor is an unsafe fn; a Socket keeps what that one asks for")]
fn watch_for<S: AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    AsyncFd::with_interest(socket, interest)
}

impl AsyncRead for WireSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let shared = &self.shared;
        let mut reading = shared.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut ready = match &reading.watched {
                Some(watched) => Some(ready!(watched.poll_read_ready(cx))?),
                None => None,
            };
            let room = buf.initialize_unfilled();
            let wanted = room.len();
            match shared.socket.as_ref().read(room) {
                Ok(read) => {
                    // Nothing is left, so the next read need not ask: what comes later is told.
                    if let Some(ready) = &mut ready
                        && read > 0
                        && read < wanted
                    {
                        ready.clear_ready();
                    }
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match &mut ready {
                    Some(ready) => ready.clear_ready(),
                    None if reading.is_resting => return Poll::Pending,
                    None => {
                        reading.watched = Some(watch_for(Arc::clone(&shared.socket), Interest::READABLE)?);
                    }
                },
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for WireSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(writable) = &self.writable {
                ready!(writable.poll_write_ready(cx))?.clear_ready();
            }
            match self.socket().write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.writable.is_none() {
                        self.writable = Some(watch_for(self.socket().try_clone()?, Interest::WRITABLE)?);
                    }
                }
                written => {
                    self.writable = None;
                    return Poll::Ready(written);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.socket().shutdown(std::net::Shutdown::Write) {
            // The peer was first.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use futures::poll;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn pair() -> (WireSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (WireSocket::new(ours).unwrap(), theirs)
    }

    #[tokio::test]
    async fn what_comes_is_read_whether_it_is_watched_for_or_not() {
        let (mut ours, mut theirs) = pair();
        let (arrivals, mut buffer) = (ours.arrivals(), [0; 8]);
        theirs.write_all(b"one").unwrap();
        assert_eq!(ours.read(&mut buffer).await.unwrap(), 3);
        assert!(!arrivals.is_watched(), "nobody had to wait");
        assert!(poll!(Box::pin(ours.read(&mut buffer))).is_pending());
        assert!(arrivals.is_watched());
        // Told of, again and again, with partial reads in between.
        for size in [1, 8, 20, 3] {
            let sent = vec![7; size];
            let (read, ()) = tokio::join!(
                async {
                    let mut read = 0;
                    while read < size {
                        read += ours.read(&mut buffer).await.unwrap();
                    }
                    read
                },
                async { theirs.write_all(&sent).unwrap() }
            );
            assert_eq!(read, size);
        }
        arrivals.rest();
        assert!(!arrivals.is_watched());
        assert!(poll!(Box::pin(ours.read(&mut buffer))).is_pending());
        assert!(!arrivals.is_watched(), "it is left alone");
        theirs.write_all(b"two").unwrap();
        assert_eq!(ours.read(&mut buffer).await.unwrap(), 3);
        // What came while it rested is told at once when it is watched for.
        assert!(poll!(Box::pin(ours.read(&mut buffer))).is_pending());
        theirs.write_all(b"three").unwrap();
        assert!(arrivals.watch() && !arrivals.watch());
        let read = tokio::time::timeout(Duration::from_secs(20), ours.read(&mut buffer)).await;
        assert_eq!(read.unwrap().unwrap(), 5);
        drop(theirs);
        assert_eq!(ours.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_write_waits_for_room() {
        let (mut ours, mut theirs) = pair();
        let sent: Vec<u8> = (0..4_u32 << 20).map(|n| n as u8).collect();
        let reading = std::thread::spawn(move || {
            let mut received = Vec::new();
            theirs.read_to_end(&mut received).map(|_| received)
        });
        ours.write_all(&sent).await.unwrap();
        ours.shutdown().await.unwrap();
        let received = reading.join().unwrap().unwrap();
        assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
    }
}
