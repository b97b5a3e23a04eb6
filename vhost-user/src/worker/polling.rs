//! When it pays to look for requests before going to sleep.

use std::time::Duration;

/// The shortest look; doubled as long as a longer one would have paid off.
const FIRST: Duration = Duration::from_micros(4);

/// Adapts the time for which a worker looks, as KVM does for halted processors: it grows while
/// requests come soon after the worker went to sleep, and is given up when none came meanwhile.
#[derive(Debug)]
pub(super) struct Polling {
    most: Duration,
    now: Duration,
}

impl Polling {
    pub fn new(most: Duration) -> Self {
        Self {
            most,
            now: Duration::ZERO,
        }
    }

    /// For how long to look now.
    pub fn budget(&self) -> Duration {
        self.now
    }

    /// Takes how long the worker slept with nothing under way until the next request came.
    pub fn slept(&mut self, duration: Duration) {
        if duration <= self.most {
            self.now = (self.now * 2).max(FIRST).min(self.most);
        } else {
            self.now = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_while_requests_come_soon_and_stops_when_they_do_not() {
        let mut polling = Polling::new(Duration::from_micros(32));
        assert_eq!(polling.budget(), Duration::ZERO);
        for expected in [4, 8, 16, 32, 32] {
            polling.slept(Duration::from_micros(20));
            assert_eq!(polling.budget(), Duration::from_micros(expected));
        }
        polling.slept(Duration::from_millis(1));
        assert_eq!(polling.budget(), Duration::ZERO);
        let mut off = Polling::new(Duration::ZERO);
        off.slept(Duration::ZERO);
        assert_eq!(off.budget(), Duration::ZERO);
    }
}
