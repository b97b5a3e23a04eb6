//! From the times of single operations to a sample's figures.

use std::collections::BTreeMap;
use std::time::Duration;

/// What one measurement has seen.
#[derive(Debug, Default)]
pub struct Times {
    nanoseconds: Vec<u32>,
}

impl Times {
    /// Room for many operations, so that none waits for memory.
    pub fn new() -> Self {
        Self {
            nanoseconds: Vec::with_capacity(1 << 20),
        }
    }

    /// Notes how long an operation took.
    pub fn push(&mut self, time: Duration) {
        let nanoseconds = u32::try_from(time.as_nanos()).unwrap_or(u32::MAX);
        self.nanoseconds.push(nanoseconds);
    }

    /// The figures, given how long it all took and the processor time that the backend spent.
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub fn figures(
        mut self,
        elapsed: Duration,
        cpu: Duration,
    ) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        anyhow::ensure!(!self.nanoseconds.is_empty(), "no operation has completed");
        self.nanoseconds.sort_unstable();
        let count = self.nanoseconds.len();
        let at = |per_mille: usize| {
            let place = (count * per_mille / 1000).min(count - 1);
            f64::from(self.nanoseconds.get(place).copied().unwrap_or(0)) / 1000.0
        };
        let iops = count as f64 / elapsed.as_secs_f64();
        let cpu_us = cpu.as_secs_f64() * 1e6 / count as f64;
        Ok(BTreeMap::from([
            ("iops", iops),
            ("p50_us", at(500)),
            ("p99_us", at(990)),
            ("p99.9_us", at(999)),
            ("cpu_us_per_io", cpu_us),
            ("iops_per_cpu_s", 1e6 / cpu_us),
        ]))
    }
}
