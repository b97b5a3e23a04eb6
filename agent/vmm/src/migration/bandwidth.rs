//! A limit of bytes a second.

use std::time::{Duration, Instant};

/// What may be sent at once after a pause.
const BURST: Duration = Duration::from_millis(50);

/// Says how long to wait before more is sent.
#[derive(Debug)]
pub(super) struct Bandwidth {
    limit: Option<u64>,
    /// When what was sent so far would have been sent at the limit.
    paid_until: Instant,
}

impl Bandwidth {
    /// With a limit in bytes a second.
    pub(super) fn new(limit: Option<u64>, now: Instant) -> Self {
        Self {
            limit,
            paid_until: now,
        }
    }

    /// `bytes` were sent: how long to wait before the next ones.
    pub(super) fn spend(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(limit) = self.limit else {
            return Duration::ZERO;
        };
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.paid_until = self.paid_until.max(earliest) + cost;
        self.paid_until.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_takes_its_time() {
        let start = Instant::now();
        let mut bandwidth = Bandwidth::new(Some(1_000_000), start);
        let mut now = start;
        for _ in 0..100 {
            now += bandwidth.spend(10_000, now);
        }
        let took = now - start;
        // 1 MB at 1 MB/s, less what may be sent at once.
        assert!(
            (Duration::from_millis(950)..=Duration::from_secs(1)).contains(&took),
            "{took:?}"
        );
        assert_eq!(
            Bandwidth::new(None, start).spend(u64::MAX, start),
            Duration::ZERO
        );
    }
}
