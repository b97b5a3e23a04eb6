//! How long requests took, in buckets that double.

use std::iter::Sum;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Buckets with an upper limit: 1 µs, 2 µs, 4 µs and so on, up to 8.4 s.
pub const BUCKETS: usize = 24;

/// A histogram that one thread writes and any may read.
#[derive(Debug, Default)]
pub struct Histogram {
    /// The last one has what took longer than the others.
    buckets: [AtomicU64; BUCKETS + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    /// Adds a request's time.
    pub fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket(nanoseconds)) {
            bump(bucket, 1);
        }
        bump(&self.nanoseconds, nanoseconds);
    }

    /// What it holds now.
    pub fn read(&self) -> Latencies {
        let mut buckets = [0; BUCKETS + 1];
        for (count, bucket) in buckets.iter_mut().zip(&self.buckets) {
            *count = bucket.load(Ordering::Relaxed);
        }
        Latencies {
            buckets,
            nanoseconds: self.nanoseconds.load(Ordering::Relaxed),
        }
    }
}

/// A histogram at one moment, of one queue or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    buckets: [u64; BUCKETS + 1],
    nanoseconds: u64,
}

impl Latencies {
    /// Each bucket's upper limit in seconds, and the requests that took no longer.
    pub fn cumulated(&self) -> impl Iterator<Item = (f64, u64)> {
        let counts = self.buckets.iter().take(BUCKETS).scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        let limits = (0_u32..).map(|power| Duration::from_micros(1 << power).as_secs_f64());
        limits.zip(counts)
    }

    /// All requests.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The time that they took together, in seconds.
    pub fn seconds(&self) -> f64 {
        Duration::from_nanos(self.nanoseconds).as_secs_f64()
    }

    /// The limit in seconds of the bucket that the given percentile is in. `None` if there were no
    /// requests, or if it took longer than any bucket's limit.
    pub fn percentile(&self, percent: u8) -> Option<f64> {
        let wanted = (u128::from(self.count()) * u128::from(percent)).div_ceil(100);
        self.cumulated()
            .find(|(_, count)| wanted > 0 && u128::from(*count) >= wanted)
            .map(|(limit, _)| limit)
    }
}

impl Serialize for Latencies {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_struct("Latencies", 4)?;
        map.serialize_field("count", &self.count())?;
        map.serialize_field("seconds", &self.seconds())?;
        map.serialize_field("median_seconds", &self.percentile(50))?;
        map.serialize_field("p99_seconds", &self.percentile(99))?;
        map.end()
    }
}

impl Sum for Latencies {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, other| {
            for (count, more) in sum.buckets.iter_mut().zip(other.buckets) {
                *count += more;
            }
            sum.nanoseconds = sum.nanoseconds.wrapping_add(other.nanoseconds);
            sum
        })
    }
}

/// Adds to a counter that no other thread writes, without a locked instruction.
pub(crate) fn bump(counter: &AtomicU64, by: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(by);
    counter.store(sum, Ordering::Relaxed);
}

// The first whose limit is not below the time.
fn bucket(nanoseconds: u64) -> usize {
    let micros = nanoseconds.div_ceil(1000).max(1);
    let power = u64::BITS - (micros - 1).leading_zeros();
    usize::try_from(power).unwrap_or(BUCKETS).min(BUCKETS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_the_first_bucket_that_is_long_enough() {
        for (nanoseconds, expected) in [
            (0, 0),
            (1, 0),
            (1000, 0),
            (1001, 1),
            (2000, 1),
            (2001, 2),
            (4000, 2),
            (1_000_000, 10),
            (8_388_608_000, 23),
            (8_388_608_001, BUCKETS),
            (u64::MAX, BUCKETS),
        ] {
            assert_eq!(bucket(nanoseconds), expected, "{nanoseconds}");
        }
    }

    #[test]
    fn buckets_are_cumulated_and_histograms_added() {
        let (one, two) = (Histogram::default(), Histogram::default());
        one.add(Duration::from_micros(3));
        one.add(Duration::from_mins(1));
        two.add(Duration::from_millis(1));
        let sum: Latencies = [one.read(), two.read()].into_iter().sum();
        let cumulated: Vec<(f64, u64)> = sum.cumulated().collect();
        assert_eq!(cumulated.len(), BUCKETS);
        assert_eq!(cumulated[1], (0.000_002, 0));
        assert_eq!(cumulated[2], (0.000_004, 1));
        assert_eq!(cumulated[10], (0.001_024, 2));
        assert_eq!(cumulated[23], (8.388_608, 2));
        assert_eq!(sum.count(), 3);
        assert!((sum.seconds() - 60.001_003).abs() < 1e-9);
    }

    #[test]
    fn percentiles_are_limits_of_buckets() {
        let histogram = Histogram::default();
        assert_eq!(histogram.read().percentile(50), None);
        for _ in 0..98 {
            histogram.add(Duration::from_micros(3));
        }
        histogram.add(Duration::from_millis(1));
        histogram.add(Duration::from_mins(1));
        let latencies = histogram.read();
        assert_eq!(latencies.percentile(50), Some(0.000_004));
        assert_eq!(latencies.percentile(98), Some(0.000_004));
        assert_eq!(latencies.percentile(99), Some(0.001_024));
        assert_eq!(latencies.percentile(100), None);
        let shown = serde_json::to_value(latencies).unwrap();
        assert_eq!(shown["count"], 100);
        assert_eq!(shown["p99_seconds"], 0.001_024);
    }
}
