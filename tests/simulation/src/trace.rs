//! What happened, as a hash that two runs of one seed must agree on, and as text for who looks into a
//! seed.

use std::fmt;

/// Takes every event of a run.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    events: u64,
    print: bool,
}

impl Trace {
    /// Nothing happened yet. With `print`, events are written to the standard output.
    pub fn new(print: bool) -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            events: 0,
            print,
        }
    }

    /// Notes an event at a time in microseconds.
    pub fn note(&mut self, now: u64, event: fmt::Arguments<'_>) {
        self.events += 1;
        // Writing to this writer does not fail.
        let _ = fmt::write(&mut Hasher(&mut self.hash), event);
        let _ = fmt::write(&mut Hasher(&mut self.hash), format_args!("@{now}"));
        if self.print {
            println!("{:>4}.{:06} {event}", now / 1_000_000, now % 1_000_000);
        }
    }

    /// A hash of every event so far (FNV-1a).
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.events
    }
}

struct Hasher<'a>(&'a mut u64);

impl fmt::Write for Hasher<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            *self.0 = (*self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Ok(())
    }
}
