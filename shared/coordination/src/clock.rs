//! Time, read at the edge and passed inwards.
//!
//! Leases are judged on CLOCK_BOOTTIME: `Instant` (CLOCK_MONOTONIC) stands still while the machine is suspended, the
//! server's clock does not.

use std::time::Duration;

use wallaby_model::condition::Timestamp;

/// A moment on CLOCK_BOOTTIME: the time since this machine started, suspension included. Never leaves the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BootTime(pub Duration);

impl BootTime {
    /// Now.
    pub fn now() -> BootTime {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
        BootTime(Duration::new(seconds, nanos))
    }

    /// This moment and `span` later.
    pub fn plus(self, span: Duration) -> BootTime {
        BootTime(self.0.saturating_add(span))
    }

    /// How long until `later`; zero when it has passed.
    pub fn until(self, later: BootTime) -> Duration {
        later.0.saturating_sub(self.0)
    }

    pub(crate) fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The wall clock, for what people read (`since`, `at`). No decision rests on it.
#[allow(clippy::disallowed_methods, reason = "shown to people, never compared by the protocol")]
pub fn wall_clock_now() -> Timestamp {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}
