//! When to read the socket, and when to let it gather.
//!
//! Postgres flushes every change on its own. A reader that wakes for each costs the walsender two microseconds per row
//! (limits.md, lever 1). While data keeps coming, a short pause lets the kernel merge what arrives, and the sender is
//! held back by the window now and then, which keeps it sending full packets. When the stream goes quiet there is no
//! pause at all: a single change is read the moment it is there.
//!
//! Whether data keeps coming is told by the rate, not by the size of one read: read eagerly, a flood comes in small pieces,
//! and a rule that waits for a large one would never leave the eager mode again.

use std::time::{Duration, Instant};

/// Over which time the rate is taken, at least.
const WINDOW: Duration = Duration::from_millis(1);

/// Decides, from the sizes and times of past reads, how long to wait before the next.
#[derive(Clone, Debug)]
pub struct GulpPolicy {
    /// The pause while data keeps coming and the last gulp was large: the sender is fast, and held back by the window.
    pub pause: Duration,
    /// The pause while data keeps coming in gulps below `large_bytes`: long enough for the window to fill. Until the window
    /// holds it back the sender sends every row as a packet of its own, is slowed down by that, and so never fills the
    /// window of a reader that comes often.
    pub pause_to_fill: Duration,
    /// A gulp of this size says that the window was nearly full.
    pub large_bytes: usize,
    /// From this rate on, in bytes per second, data keeps coming; below half of it the stream is quiet.
    pub busy_rate: u64,
    /// A single gulp of at least this size means so too.
    pub busy_bytes: usize,
    window_start: Option<Instant>,
    window_bytes: u64,
    busy: bool,
}

impl Default for GulpPolicy {
    fn default() -> Self {
        GulpPolicy {
            pause: Duration::from_micros(1000),
            pause_to_fill: Duration::from_micros(3000),
            large_bytes: 64 << 10,
            busy_rate: 16_000_000,
            busy_bytes: 24 << 10,
            window_start: None,
            window_bytes: 0,
            busy: false,
        }
    }
}

impl GulpPolicy {
    /// Takes the size of a gulp (everything read between two pauses, 0 when nothing was there) and says how long to wait
    /// before the next.
    pub fn after_gulp(&mut self, bytes: usize, now: Instant) -> Duration {
        self.window_bytes += bytes as u64;
        let start = *self.window_start.get_or_insert(now);
        let elapsed = now.saturating_duration_since(start);
        if elapsed >= WINDOW {
            let rate =
                self.window_bytes.saturating_mul(1_000_000) / u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
            let threshold = if self.busy { self.busy_rate / 2 } else { self.busy_rate };
            self.busy = rate >= threshold;
            self.window_start = Some(now);
            self.window_bytes = 0;
        }
        if bytes >= self.busy_bytes {
            self.busy = true;
        }
        match self.busy {
            true if bytes >= self.large_bytes => self.pause,
            true => self.pause_to_fill,
            false => Duration::ZERO,
        }
    }

    /// Whether data keeps coming.
    pub fn is_busy(&self) -> bool {
        self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gulps of `bytes`, one each `every`, `count` times; the last answer.
    fn feed(policy: &mut GulpPolicy, now: &mut Instant, bytes: usize, every: Duration, count: usize) -> Duration {
        let mut pause = Duration::ZERO;
        for _ in 0..count {
            *now += every;
            pause = policy.after_gulp(bytes, *now);
        }
        pause
    }

    #[test]
    fn a_quiet_stream_is_never_paused() {
        let (mut policy, mut now) = (GulpPolicy::default(), Instant::now());
        // A thousand transactions of one row a second, and ten thousand.
        for every in [Duration::from_millis(1), Duration::from_micros(100)] {
            assert_eq!(feed(&mut policy, &mut now, 400, every, 1000), Duration::ZERO);
        }
    }

    #[test]
    fn a_flood_in_small_pieces_is_seen() {
        let (mut policy, mut now) = (GulpPolicy::default(), Instant::now());
        assert_eq!(feed(&mut policy, &mut now, 300, Duration::from_micros(5), 1000), policy.pause_to_fill);
        assert!(policy.is_busy());
    }

    #[test]
    fn a_flood_is_paused_until_it_dries_up() {
        let (mut policy, mut now) = (GulpPolicy::default(), Instant::now());
        let pause = policy.pause;
        assert_eq!(feed(&mut policy, &mut now, 100_000, pause, 3), pause);
        assert_eq!(feed(&mut policy, &mut now, 0, pause, 1), Duration::ZERO);
        assert!(!policy.is_busy());
    }
}
