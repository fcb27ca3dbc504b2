//! A pause of less than a millisecond.
//!
//! tokio's timer counts whole milliseconds, so a pause of 500 µs would last one to two. A timerfd is exact and costs
//! two system calls.

use std::io;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// One reusable timer.
pub(super) struct Pause {
    timer: AsyncFd<OwnedFd>,
    armed: bool,
}

impl Pause {
    pub(super) fn new() -> io::Result<Pause> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[allow(deprecated, reason = "its successor is an unsafe fn; an OwnedFd keeps what that one asks for")]
        let timer = AsyncFd::new(timer)?;
        Ok(Pause { timer, armed: false })
    }

    /// Starts a pause; [`Pause::wait`] returns at its end.
    pub(super) fn arm(&mut self, length: Duration) -> io::Result<()> {
        if length.is_zero() {
            return Ok(());
        }
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(length.subsec_nanos()),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.armed = true;
        Ok(())
    }

    pub(super) fn is_armed(&self) -> bool {
        self.armed
    }

    /// Returns when the pause is over, at once when there is none. Cancel-safe: a second call waits for the rest.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        while self.armed {
            let mut ready = self.timer.readable().await?;
            let mut expirations = [0; 8];
            match rustix::io::read(self.timer.get_ref(), &mut expirations) {
                Ok(_) => self.armed = false,
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[tokio::test]
    async fn it_lasts_as_long_as_asked_and_can_be_used_again() {
        let mut pause = Pause::new().unwrap();
        pause.wait().await.unwrap();
        for _ in 0..3 {
            let begun = std::time::Instant::now();
            pause.arm(Duration::from_micros(500)).unwrap();
            pause.wait().await.unwrap();
            assert!(begun.elapsed() >= Duration::from_micros(500));
        }
    }
}
