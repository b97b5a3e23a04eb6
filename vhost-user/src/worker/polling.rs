//! When it pays to look for requests before going to sleep.

use std::time::Duration;

/// The shortest look that is worth a reading of the clock.
const SHORTEST: Duration = Duration::from_micros(4);
/// How sure one can be that looking pays.
const SURE: u32 = 8;
/// Of so many pauses that are not far from short enough, one is looked through to the limit.
const TRIED: u32 = 16;
/// Pauses up to so many times the limit are not far from short enough.
const NEAR: u32 = 8;

/// Learns from pauses, the times between an answer and the next request, for how long to look.
///
/// As for processors that KVM halts, looking is given up where pauses are longer than a limit. But
/// how short they are is only seen by looking, for a sleeper's pause has its own waking up in it;
/// so it is tried now and then. And where short pauses are the rule, looking ends soon after the
/// usual time: a pause that lasts longer will last.
#[derive(Debug)]
pub(super) struct Polling {
    limit: Duration,
    /// What pauses that are short enough last.
    usual: Duration,
    confidence: u32,
    near: u32,
}

impl Polling {
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            usual: Duration::ZERO,
            confidence: 0,
            near: 0,
        }
    }

    /// For how long to look now.
    pub fn budget(&self) -> Duration {
        if self.confidence > 0 {
            (self.usual * 2).max(SHORTEST).min(self.limit)
        } else if self.near >= TRIED {
            self.limit
        } else {
            Duration::ZERO
        }
    }

    /// Takes a pause after which a look found a request.
    pub fn found(&mut self, pause: Duration) {
        self.near = 0;
        self.confidence = (self.confidence + 1).min(SURE);
        self.learn(pause);
    }

    /// Takes a pause that was slept through, at its end at least.
    pub fn slept(&mut self, pause: Duration) {
        if pause <= self.limit {
            self.found(pause);
            return;
        }
        self.confidence /= 2;
        if self.near >= TRIED {
            self.near = 0;
        } else if pause <= self.limit * NEAR {
            self.near += 1;
        }
    }

    // An average over the last few, which follows longer ones at once: looking for too short a time
    // is of no use at all.
    fn learn(&mut self, pause: Duration) {
        let pause = pause.min(self.limit);
        self.usual = if pause > self.usual {
            (self.usual + pause) / 2
        } else {
            (self.usual * 7 + pause) / 8
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn looks_about_as_long_as_short_pauses_last() {
        let mut polling = Polling::new(LIMIT);
        assert_eq!(polling.budget(), Duration::ZERO);
        for _ in 0..50 {
            polling.slept(micros(10));
        }
        assert!(polling.budget() >= micros(19) && polling.budget() <= micros(20));
        for _ in 0..50 {
            polling.found(micros(1));
        }
        assert_eq!(polling.budget(), SHORTEST);
        polling.found(micros(31));
        assert!(polling.budget() >= micros(31));
    }

    #[test]
    fn a_long_pause_now_and_then_changes_nothing_and_many_end_it() {
        let mut polling = Polling::new(LIMIT);
        for _ in 0..SURE {
            polling.found(micros(10));
        }
        polling.slept(Duration::from_secs(1));
        assert!(!polling.budget().is_zero());
        for _ in 0..4 {
            polling.slept(Duration::from_secs(1));
        }
        assert_eq!(polling.budget(), Duration::ZERO);
    }

    #[test]
    fn tries_where_pauses_are_near_and_never_where_they_are_far() {
        let mut polling = Polling::new(LIMIT);
        let mut tries = 0;
        for _ in 0..10 * (TRIED + 1) {
            polling.slept(LIMIT * 2);
            tries += u32::from(!polling.budget().is_zero());
        }
        assert_eq!(tries, 10);
        let mut polling = Polling::new(LIMIT);
        for _ in 0..10 * TRIED {
            polling.slept(LIMIT * (NEAR + 1));
            assert_eq!(polling.budget(), Duration::ZERO);
        }
    }

    #[test]
    fn never_looks_without_a_limit() {
        let mut polling = Polling::new(Duration::ZERO);
        for _ in 0..100 {
            polling.slept(Duration::ZERO);
            polling.slept(micros(1));
            assert_eq!(polling.budget(), Duration::ZERO);
        }
    }
}
