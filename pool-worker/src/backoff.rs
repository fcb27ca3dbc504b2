//! Retry delays: 1 s to 60 s, doubled, with jitter, without end.

use std::time::Duration;

use rand::Rng;

const FIRST: Duration = Duration::from_secs(1);
/// The longest delay.
pub const LAST: Duration = Duration::from_secs(60);

/// The delays of one row of failures.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The delay before the next try: half to all of 1 s, 2 s, 4 s … 60 s.
    pub fn next_delay(&mut self) -> Duration {
        let doubled = FIRST.saturating_mul(1 << self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        let whole = doubled.min(LAST);
        whole.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// A try succeeded.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_and_stay_within_bounds() {
        let mut backoff = Backoff::default();
        for n in 0..200 {
            let delay = backoff.next_delay();
            assert!(delay >= FIRST / 2 && delay <= LAST, "{n}: {delay:?}");
            if n > 6 {
                assert!(delay >= LAST / 2, "{n}: {delay:?}");
            }
        }
        backoff.reset();
        assert!(backoff.next_delay() <= FIRST);
    }
}
