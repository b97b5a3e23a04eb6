//! A host's own clock, and until when it may count on its lease.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The least time between the moment when guests are killed and the lease's end.
const LEAST_MARGIN: Duration = Duration::from_secs(1);

/// A moment of CLOCK_BOOTTIME: the time since the host booted, which goes on while it is suspended and
/// which nobody sets. All processes of a host share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Instant(Duration);

impl Instant {
    /// Now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or(0);
        Self(Duration::new(seconds, nanoseconds))
    }

    /// The moment that comes so long after the boot.
    pub const fn since_boot(time: Duration) -> Self {
        Self(time)
    }

    /// How long after the boot it comes.
    pub const fn time_since_boot(self) -> Duration {
        self.0
    }

    /// The moment that comes so much later.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// How long ago this moment was; nothing if it is to come, or of an earlier boot that lasted longer.
    pub fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }

    /// How long it is until this moment; nothing if it has come.
    pub fn from_now(self) -> Duration {
        self.0.saturating_sub(Self::now().0)
    }
}

/// How long a lease lasts, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTerms {
    ttl: Duration,
}

impl LeaseTerms {
    /// A lease that lasts so long after each renewal.
    pub const fn new(ttl: Duration) -> Self {
        Self { ttl }
    }

    /// How long before the lease's end its guests are killed: a fifth of its time, and no less than a
    /// second. It has to cover the killing, and what the host's clock goes slower than the store's.
    pub fn margin(self) -> Duration {
        (self.ttl / 5).max(LEAST_MARGIN)
    }

    /// When guests are killed if a renewal that was sent at `sent` turns out to be the last. The store
    /// counts the lease's time from a later moment: that at which the renewal arrived.
    pub fn deadline(self, sent: Instant) -> Instant {
        sent.plus(self.ttl.saturating_sub(self.margin()))
    }

    /// How often the lease is renewed.
    pub fn renewal_interval(self) -> Duration {
        self.ttl / 5
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_killed_before_the_lease_ends() {
        let sent = Instant::since_boot(Duration::from_secs(100));
        let deadline = |seconds| {
            let terms = LeaseTerms::new(Duration::from_secs(seconds));
            terms.deadline(sent).time_since_boot().as_secs() - 100
        };
        assert_eq!(deadline(10), 8);
        assert_eq!(deadline(3), 2);
        // Nothing can be promised in so short a time.
        assert_eq!(deadline(1), 0);
    }
}
