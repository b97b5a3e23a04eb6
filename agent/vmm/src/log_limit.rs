//! A limit of what is logged, since a guest can have much said about it: each queue that it breaks is a
//! line, and what it has written fills somebody's disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter};

/// Lines that may come at once.
const BURST: u32 = 200;
/// How long it takes until another one may come, after so many.
const INTERVAL: Duration = Duration::from_millis(500);

/// Lets through at most [`BURST`] events at once and one more each [`INTERVAL`]. How many were left out is
/// said when there is room again.
pub struct LogLimit(Mutex<Bucket>);

struct Bucket {
    room: u32,
    /// When `room` was last added to.
    filled: Instant,
    left_out: u64,
}

impl LogLimit {
    /// A limit that nothing has used of yet.
    pub fn new() -> Self {
        Self(Mutex::new(Bucket {
            room: BURST,
            filled: Instant::now(),
            left_out: 0,
        }))
    }
}

impl Bucket {
    /// Whether an event may pass, and how many before it didn't.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let intervals =
            now.saturating_duration_since(self.filled).as_millis() / INTERVAL.as_millis();
        let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
        if self.room + intervals.min(BURST) >= BURST {
            self.room = BURST;
            self.filled = now;
        } else {
            self.room += intervals;
            self.filled += INTERVAL * intervals;
        }
        if self.room == 0 {
            self.left_out += 1;
            return None;
        }
        self.room -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

impl<S: Subscriber> Filter<S> for LogLimit {
    fn enabled(&self, _metadata: &Metadata<'_>, _context: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, _event: &Event<'_>, _context: &Context<'_, S>) -> bool {
        let taken = {
            let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(Instant::now())
        };
        if let Some(left_out @ 1..) = taken {
            eprintln!("{left_out} messages were left out, because there were too many at once");
        }
        taken.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_each_interval_and_what_is_left_out_is_counted() {
        let mut now = Instant::now();
        let mut bucket = Bucket {
            room: BURST,
            filled: now,
            left_out: 0,
        };
        let mut passed = |now, events: u32| {
            let taken: Vec<u64> = (0..events).filter_map(|_| bucket.take(now)).collect();
            (taken.len(), taken.iter().sum::<u64>())
        };
        assert_eq!(passed(now, 300), (200, 0));
        assert_eq!(passed(now, 50), (0, 0));
        now += INTERVAL * 3;
        assert_eq!(passed(now, 10), (3, 150));
        // Half an interval is not lost.
        now += INTERVAL / 2;
        assert_eq!(passed(now, 10), (0, 0));
        now += INTERVAL / 2;
        assert_eq!(passed(now, 1), (1, 17));
        // However long nothing was said, no more than a burst passes at once.
        now += INTERVAL * 100_000;
        assert_eq!(passed(now, 300).0, 200);
    }
}
