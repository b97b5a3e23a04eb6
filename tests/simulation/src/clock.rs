//! A machine's own clock: it may run a little faster or slower than time does, and jump ahead.

/// A clock that never goes back.
#[derive(Debug)]
pub struct Clock {
    /// What it shows at time 0, in microseconds.
    offset: u64,
    /// Parts per million that it runs slower (then negative) or faster.
    drift: i64,
}

impl Clock {
    /// A clock with an offset and a drift in parts per million.
    pub fn new(offset: u64, drift: i64) -> Self {
        Self { offset, drift }
    }

    /// Jumps ahead by some microseconds.
    pub fn jump(&mut self, microseconds: u64) {
        self.offset += microseconds;
    }

    /// Milliseconds that it shows at a time in microseconds.
    pub fn milliseconds(&self, now: u64) -> u64 {
        let drifted = now.saturating_add_signed(
            i64::try_from(now / 1_000_000)
                .unwrap_or(0)
                .saturating_mul(self.drift),
        );
        (self.offset + drifted) / 1000
    }
}
