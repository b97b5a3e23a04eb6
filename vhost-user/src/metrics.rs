//! What each queue did, counted without locks and read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::latency::{Histogram, Latencies, bump};

/// Counters of one virtqueue. They only grow, and survive the frontend that caused them. Only the
/// worker that serves the queue writes them.
#[derive(Debug, Default)]
pub struct QueueMetrics {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    write_zeroes: AtomicU64,
    other: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
    bounced: AtomicU64,
    notifications: AtomicU64,
    latencies: [Histogram; OPERATIONS.len()],
}

/// Requests whose times are noted, in the order of [`QueueMetrics::latencies`].
pub const OPERATIONS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

/// The counters of one virtqueue at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueCounters {
    /// Completed `VIRTIO_BLK_T_IN` requests, failed ones included.
    pub reads: u64,
    /// Completed `VIRTIO_BLK_T_OUT` requests, failed ones included.
    pub writes: u64,
    /// Completed `VIRTIO_BLK_T_FLUSH` requests, failed ones included.
    pub flushes: u64,
    /// Completed `VIRTIO_BLK_T_DISCARD` requests that the disk was asked for, failed ones included.
    pub discards: u64,
    /// Completed `VIRTIO_BLK_T_WRITE_ZEROES` requests that the disk was asked for, failed ones
    /// included.
    pub write_zeroes: u64,
    /// All other completed requests, those included that never got to the disk.
    pub other: u64,
    /// Bytes that reads brought to the guest.
    pub bytes_read: u64,
    /// Bytes of the guest's that writes put on the disk.
    pub bytes_written: u64,
    /// Requests answered with a status other than `VIRTIO_BLK_S_OK`.
    pub errors: u64,
    /// Transfers that went through a bounce buffer for their alignment.
    pub bounced: u64,
    /// Interrupts sent to the guest.
    pub notifications: u64,
}

/// What a completed request was, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// A read of this many bytes.
    Read(u64),
    /// A write of this many bytes.
    Write(u64),
    /// A flush.
    Flush,
    /// A discard.
    Discard,
    /// Writing zeroes.
    WriteZeroes,
    /// Anything else.
    Other,
}

impl Completed {
    // Its place in `OPERATIONS`.
    fn operation(self) -> Option<usize> {
        match self {
            Self::Read(_) => Some(0),
            Self::Write(_) => Some(1),
            Self::Flush => Some(2),
            Self::Discard => Some(3),
            Self::WriteZeroes => Some(4),
            Self::Other => None,
        }
    }
}

impl QueueMetrics {
    /// Counts one completed request.
    pub fn count(&self, completed: Completed, succeeded: bool) {
        let (requests, bytes) = match completed {
            Completed::Read(bytes) => (&self.reads, Some((&self.bytes_read, bytes))),
            Completed::Write(bytes) => (&self.writes, Some((&self.bytes_written, bytes))),
            Completed::Flush => (&self.flushes, None),
            Completed::Discard => (&self.discards, None),
            Completed::WriteZeroes => (&self.write_zeroes, None),
            Completed::Other => (&self.other, None),
        };
        bump(requests, 1);
        if !succeeded {
            bump(&self.errors, 1);
        } else if let Some((counter, bytes)) = bytes {
            bump(counter, bytes);
        }
    }

    /// Notes how long a request took, from being taken out of the available ring.
    pub fn time(&self, completed: Completed, time: Duration) {
        let operation = completed.operation();
        if let Some(histogram) = operation.and_then(|place| self.latencies.get(place)) {
            histogram.add(time);
        }
    }

    /// How long requests took, in the order of [`OPERATIONS`].
    pub fn latencies(&self) -> [Latencies; OPERATIONS.len()] {
        self.latencies.each_ref().map(Histogram::read)
    }

    /// Counts one transfer through a bounce buffer.
    pub fn count_bounce(&self) {
        bump(&self.bounced, 1);
    }

    /// Counts one interrupt sent to the guest.
    pub fn count_notification(&self) {
        bump(&self.notifications, 1);
    }

    /// The counters now. Each is exact; together they are only as consistent as a running
    /// queue allows.
    pub fn counters(&self) -> QueueCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueCounters {
            reads: load(&self.reads),
            writes: load(&self.writes),
            flushes: load(&self.flushes),
            discards: load(&self.discards),
            write_zeroes: load(&self.write_zeroes),
            other: load(&self.other),
            bytes_read: load(&self.bytes_read),
            bytes_written: load(&self.bytes_written),
            errors: load(&self.errors),
            bounced: load(&self.bounced),
            notifications: load(&self.notifications),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_requests_count_as_errors_and_move_no_bytes() {
        let metrics = QueueMetrics::default();
        metrics.count(Completed::Read(512), true);
        metrics.count(Completed::Write(4096), false);
        metrics.count(Completed::Flush, true);
        assert_eq!(
            metrics.counters(),
            QueueCounters {
                reads: 1,
                writes: 1,
                flushes: 1,
                bytes_read: 512,
                errors: 1,
                ..QueueCounters::default()
            }
        );
    }
}
