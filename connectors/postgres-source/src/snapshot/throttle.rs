//! Rows per second, as a bucket of tokens. Time is an argument.

use std::time::{Duration, Instant};

/// How much time's worth of rows may be read at once.
const BURST: Duration = Duration::from_millis(200);

/// Says how long to wait so that no more than a rate of rows is read.
#[derive(Debug)]
pub(super) struct Throttle {
    per_second: f64,
    /// Rows that may be read now; negative when more were read than allowed.
    tokens: f64,
    last: Instant,
}

impl Throttle {
    /// At most `per_second` rows, at least one.
    pub(super) fn new(per_second: u64, now: Instant) -> Throttle {
        Throttle { per_second: per_second.max(1) as f64, tokens: 0.0, last: now }
    }

    /// Rows after which it is asked again: about a twentieth of a second.
    pub(super) fn step(&self) -> u64 {
        (self.per_second / 20.0).max(1.0) as u64
    }

    /// Counts rows that were read; how long to wait before the next.
    pub(super) fn took(&mut self, rows: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = now;
        self.tokens = (self.tokens + passed * self.per_second).min(BURST.as_secs_f64() * self.per_second);
        self.tokens -= rows as f64;
        if self.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.tokens / self.per_second) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_at_the_rate_and_a_pause_earns_no_more_than_a_burst() {
        let begun = Instant::now();
        let mut now = begun;
        let mut throttle = Throttle::new(1000, now);
        let mut rows = 0;
        while rows < 10_000 {
            now += throttle.took(50, now);
            rows += 50;
        }
        let took = now.duration_since(begun).as_secs_f64();
        assert!((9.8..10.2).contains(&took), "{took}");
        now += Duration::from_secs(3600);
        assert_eq!(throttle.took(150, now), Duration::ZERO);
        assert!(throttle.took(1000, now) > Duration::from_millis(900));
    }
}
