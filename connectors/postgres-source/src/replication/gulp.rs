//! When to read the socket, and when to let it gather.
//!
//! Postgres flushes every change on its own. A reader that wakes for each costs the walsender two microseconds per row
//! (limits.md, lever 1). While data keeps coming, a short pause lets the kernel merge what arrives, and the sender is
//! held back by the window now and then, which keeps it sending full packets. When the stream goes quiet there is no
//! pause at all: a single change is read the moment it is there.

use std::time::Duration;

/// Decides, from the sizes of past reads, how long to wait before the next.
#[derive(Clone, Debug)]
pub struct GulpPolicy {
    /// The pause while data keeps coming.
    pub pause: Duration,
    /// A gulp of at least this size means that data keeps coming.
    pub busy_bytes: usize,
    /// After so many small gulps in a row the stream counts as quiet.
    pub quiet_after: u32,
    small_in_a_row: u32,
    busy: bool,
}

impl Default for GulpPolicy {
    fn default() -> Self {
        GulpPolicy {
            pause: Duration::from_micros(1000),
            busy_bytes: 24 << 10,
            quiet_after: 2,
            small_in_a_row: 0,
            busy: false,
        }
    }
}

impl GulpPolicy {
    /// Takes the size of a gulp (everything read between two pauses) and says how long to wait before the next.
    pub fn after_gulp(&mut self, bytes: usize) -> Duration {
        if bytes >= self.busy_bytes {
            self.small_in_a_row = 0;
            self.busy = true;
        } else {
            self.small_in_a_row = self.small_in_a_row.saturating_add(1);
            if self.small_in_a_row >= self.quiet_after {
                self.busy = false;
            }
        }
        if self.busy { self.pause } else { Duration::ZERO }
    }

    /// Whether data keeps coming.
    pub fn is_busy(&self) -> bool {
        self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_stream_is_never_paused() {
        let mut policy = GulpPolicy::default();
        for bytes in [1, 200, 4000, 0, 23_000] {
            assert_eq!(policy.after_gulp(bytes), Duration::ZERO);
        }
    }

    #[test]
    fn a_flood_is_paused_until_it_dries_up() {
        let mut policy = GulpPolicy::default();
        assert_eq!(policy.after_gulp(100_000), policy.pause);
        assert_eq!(policy.after_gulp(100_000), policy.pause);
        assert_eq!(policy.after_gulp(10), policy.pause, "one small gulp is no end yet");
        assert_eq!(policy.after_gulp(100_000), policy.pause);
        assert_eq!(policy.after_gulp(10), policy.pause);
        assert_eq!(policy.after_gulp(10), Duration::ZERO);
        assert!(!policy.is_busy());
    }
}
