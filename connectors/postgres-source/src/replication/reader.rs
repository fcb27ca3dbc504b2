//! The reading half of a stream: gulps into one reused buffer, frames borrowed out of it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use tokio::io::{AsyncRead, ReadBuf};
use wallaby_model::Lsn;

use super::feedback::Feedback;
use super::frame::{self, Frame, HEADER_BYTES};
use super::gulp::GulpPolicy;
use super::pause::Pause;
use crate::error::SourceError;
use crate::metrics;
use crate::socket::Arrivals;

/// The buffer of a stream whose messages are of ordinary size. Pages that were never used cost nothing.
const BUFFER_BYTES: usize = 256 << 10;
/// The largest frame unless told otherwise.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Of a frame that is too large, so much is read to say what it is.
const OVERSIZED_HEAD_BYTES: usize = 128;

/// Reads frames.
pub struct FrameReader {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    arrivals: Arrivals,
    buffer: Vec<u8>,
    /// Where the frame that was given out last begins.
    given: usize,
    /// Where the next frame begins.
    start: usize,
    /// Where the received bytes end.
    end: usize,
    policy: GulpPolicy,
    pause: Option<Pause>,
    feedback: Feedback,
    frame_bytes_max: usize,
    target: String,
}

impl FrameReader {
    pub(super) fn new(
        (stream, arrivals): (Box<dyn AsyncRead + Send + Unpin>, Arrivals),
        received: &[u8],
        feedback: Feedback,
        target: String,
    ) -> FrameReader {
        let mut buffer = vec![0; BUFFER_BYTES.max(received.len())];
        buffer[..received.len()].copy_from_slice(received);
        FrameReader {
            stream,
            arrivals,
            buffer,
            given: 0,
            start: 0,
            end: received.len(),
            policy: GulpPolicy::default(),
            pause: None,
            feedback,
            frame_bytes_max: FRAME_BYTES_MAX,
            target,
        }
    }

    /// Bounds what one frame may take in memory.
    pub fn set_frame_bytes_max(&mut self, bytes: usize) {
        self.frame_bytes_max = bytes;
    }

    /// Sets how the socket is read.
    pub fn set_policy(&mut self, policy: GulpPolicy) {
        self.policy = policy;
    }

    /// Waits for bytes, at least one, and takes all that are there. Cancel-safe.
    ///
    /// # Errors
    /// When the connection ended; with the reason when it was closed from our side.
    pub async fn fill(&mut self) -> Result<usize, SourceError> {
        let first = match self.read_after_pause().await? {
            Some(bytes) => bytes,
            None => {
                self.arrivals.watch();
                poll_fn(|cx| self.poll_read(cx)).await?
            }
        };
        self.finish_gulp(first).await
    }

    /// Takes what is there after the pause, if there is one, without waiting for more: `None` when there is nothing.
    /// Cancel-safe.
    ///
    /// # Errors
    /// As [`FrameReader::fill`].
    pub async fn fill_without_waiting(&mut self) -> Result<Option<usize>, SourceError> {
        match self.read_after_pause().await? {
            Some(bytes) => self.finish_gulp(bytes).await.map(Some),
            None => {
                self.policy.after_gulp(0, std::time::Instant::now());
                Ok(None)
            }
        }
    }

    /// One read after the pause, if there is one; `None` when nothing is there.
    async fn read_after_pause(&mut self) -> Result<Option<usize>, SourceError> {
        if let Some(pause) = &mut self.pause
            && pause.is_armed()
        {
            let waited = pause.wait().await;
            waited.map_err(|error| self.lost(&error.to_string()))?;
        }
        self.make_room();
        self.read_what_is_there().await
    }

    async fn read_what_is_there(&mut self) -> Result<Option<usize>, SourceError> {
        let read = poll_fn(|cx| match self.poll_read(cx) {
            Poll::Ready(read) => Poll::Ready(read.map(Some)),
            Poll::Pending => Poll::Ready(Ok(None)),
        });
        read.await
    }

    /// TLS gives one record at a time: go on until nothing is there or the buffer is full.
    async fn finish_gulp(&mut self, first: usize) -> Result<usize, SourceError> {
        let mut gulp = first;
        while self.end < self.gulp_end() {
            match self.read_what_is_there().await {
                Ok(Some(bytes)) => gulp += bytes,
                // An error comes again with the next read, after what was received is used.
                Ok(None) | Err(_) => break,
            }
        }
        metrics::gulp(gulp);
        let length = self.policy.after_gulp(gulp, std::time::Instant::now());
        if !length.is_zero() {
            let armed = match &mut self.pause {
                Some(pause) => pause.arm(length),
                None => Pause::new().and_then(|mut pause| {
                    pause.arm(length)?;
                    self.pause = Some(pause);
                    Ok(())
                }),
            };
            armed.map_err(|error| self.lost(&error.to_string()))?;
            // The timer wakes us: packets need not.
            self.arrivals.rest();
        }
        Ok(gulp)
    }

    fn poll_read(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<usize, SourceError>> {
        let until = if self.end < self.gulp_end() { self.gulp_end() } else { self.buffer.len() };
        let mut free = ReadBuf::new(&mut self.buffer[self.end..until]);
        match Pin::new(&mut self.stream).poll_read(cx, &mut free) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                let bytes = free.filled().len();
                if bytes == 0 {
                    return Poll::Ready(Err(self.lost("the server closed it")));
                }
                self.end += bytes;
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.lost(&error.to_string()))),
        }
    }

    /// Where a gulp ends: with the frame at the front, when that is a large one. What comes behind it would keep its room in use.
    fn gulp_end(&self) -> usize {
        let pending = self.pending().max(BUFFER_BYTES);
        self.buffer.len().min(self.start + pending)
    }

    /// The length of the frame at the front, as far as it is known.
    fn pending(&self) -> usize {
        let length = frame::message_length(&self.buffer[self.start..self.end]).ok().flatten();
        length.unwrap_or(HEADER_BYTES).min(self.frame_bytes_max)
    }

    fn lost(&self, reason: &str) -> SourceError {
        match self.feedback.close_reason() {
            Some(closed) => closed.into_error(),
            None => SourceError::Lost { during: format!("streaming from {}", self.target), reason: reason.to_owned() },
        }
    }

    /// Makes sure that a read has room for at least the frame at the front, and for a good gulp.
    fn make_room(&mut self) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.buffer.len() > 4 * BUFFER_BYTES {
                self.buffer = vec![0; BUFFER_BYTES];
            }
        }
        let pending = self.pending();
        let room_behind = self.buffer.len() - self.end;
        if self.start > 0 && (self.start + pending > self.buffer.len() || room_behind < BUFFER_BYTES / 2) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.buffer.len() - self.start < pending {
            self.buffer.resize(self.start + pending.next_multiple_of(BUFFER_BYTES), 0);
        }
        if self.end == self.buffer.len() {
            self.buffer.resize(self.end + BUFFER_BYTES, 0);
        }
    }

    /// Gives back the room that a huge frame took, once it was used. Not between [`FrameReader::next_frame`] and
    /// [`FrameReader::put_back`].
    pub(crate) fn trim(&mut self) {
        let left = self.end - self.start;
        if self.buffer.len() <= 4 * BUFFER_BYTES || left > BUFFER_BYTES {
            return;
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        buffer[..left].copy_from_slice(&self.buffer[self.start..self.end]);
        self.buffer = buffer;
        (self.given, self.start, self.end) = (0, 0, left);
    }

    /// The next whole frame in the buffer; `None` when a read is needed first. Requests for an answer are passed on to
    /// the status task before the frame is returned.
    ///
    /// # Errors
    /// The server's error, or bytes that are no frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, SourceError> {
        loop {
            let received = &self.buffer[self.start..self.end];
            let Some(length) = frame::message_length(received)? else {
                return Ok(None);
            };
            if length > self.frame_bytes_max {
                return self.oversized(length);
            }
            if received.len() < length {
                return Ok(None);
            }
            let message = self.start..self.start + length;
            self.given = message.start;
            self.start = message.end;
            // Parsed twice only for frames that are passed over; the borrow checker needs the exit outside of the loop.
            match self.buffer[message.start] {
                b'd' | b'E' | b'N' | b'c' => {
                    let frame = frame::parse(&self.buffer[message])?;
                    if let Some(Frame::Keepalive { end, reply, .. }) = &frame {
                        self.feedback.received(*end);
                        if *reply {
                            self.feedback.reply_now();
                        }
                    }
                    return Ok(frame);
                }
                _ => {
                    frame::parse(&self.buffer[message])?;
                }
            }
        }
    }

    /// Makes the frame that was given out last the next one again. Only before another read.
    pub(crate) fn put_back(&mut self) {
        self.start = self.given;
    }

    /// A frame above the bound is not read whole; its head says what it is.
    fn oversized(&self, length: usize) -> Result<Option<Frame<'_>>, SourceError> {
        let received = &self.buffer[self.start..self.end];
        if received.len() < OVERSIZED_HEAD_BYTES {
            return Ok(None);
        }
        match frame::parse(received)? {
            Some(Frame::Wal { start, payload, .. }) => {
                Ok(Some(Frame::Oversized { start, bytes: length as u64, head: payload }))
            }
            _ => Err(SourceError::Protocol {
                what: "frame header",
                offset: 1,
                reason: format!("a length of {length}, above the limit of {}", self.frame_bytes_max),
            }),
        }
    }

    /// Tells the status task what was taken over, for `pg_stat_replication`.
    pub fn took(&self, lsn: Lsn) {
        self.feedback.received(lsn);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::replication::feedback;
    use crate::socket::WireSocket;
    use crate::transport::Closer;

    #[tokio::test]
    async fn packets_wake_nobody_while_a_flood_gathers_and_the_first_one_does_when_it_is_over() {
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let closer = Closer::of_unix(&ours).unwrap();
        let socket = WireSocket::new(ours.into_std().unwrap()).unwrap();
        let arrivals = socket.arrivals();
        let (read_half, write_half) = tokio::io::split(socket);
        let feedback = feedback::spawn(write_half, closer, Lsn(0), Duration::from_secs(3600));
        let reading = (Box::new(read_half) as _, arrivals.clone());
        let mut reader = FrameReader::new(reading, &[], feedback, "here".to_owned());
        // Whatever is read, as long as it is much.
        let flood = vec![0; 100_000];
        for _ in 0..3 {
            theirs.write_all(&flood).await.unwrap();
            let mut read = reader.fill().await.unwrap();
            while read < flood.len() {
                assert!(!arrivals.is_watched());
                read += reader.fill().await.unwrap();
            }
            reader.start = reader.end;
        }
        assert!(!arrivals.is_watched());
        while reader.fill_without_waiting().await.unwrap().is_some() {}
        let (read, ()) = tokio::join!(reader.fill(), async {
            while !arrivals.is_watched() {
                tokio::task::yield_now().await;
            }
            theirs.write_all(b"quiet").await.unwrap();
        });
        assert_eq!(read.unwrap(), 5);
    }
}
