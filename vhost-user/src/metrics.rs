//! What each queue did, counted without locks and read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Counters of one virtqueue. They only grow, and survive the frontend that caused them.
#[derive(Debug, Default)]
pub struct QueueMetrics {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    other: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
    bounced: AtomicU64,
    notifications: AtomicU64,
}

/// The counters of one virtqueue at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueCounters {
    /// Completed `VIRTIO_BLK_T_IN` requests, failed ones included.
    pub reads: u64,
    /// Completed `VIRTIO_BLK_T_OUT` requests, failed ones included.
    pub writes: u64,
    /// Completed `VIRTIO_BLK_T_FLUSH` requests, failed ones included.
    pub flushes: u64,
    /// Completed requests of any other type.
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
    /// Anything else.
    Other,
}

impl QueueMetrics {
    /// Counts one completed request.
    pub fn count(&self, completed: Completed, succeeded: bool) {
        let (requests, bytes) = match completed {
            Completed::Read(bytes) => (&self.reads, Some((&self.bytes_read, bytes))),
            Completed::Write(bytes) => (&self.writes, Some((&self.bytes_written, bytes))),
            Completed::Flush => (&self.flushes, None),
            Completed::Other => (&self.other, None),
        };
        requests.fetch_add(1, Ordering::Relaxed);
        if !succeeded {
            self.errors.fetch_add(1, Ordering::Relaxed);
        } else if let Some((counter, bytes)) = bytes {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Counts one transfer through a bounce buffer.
    pub fn count_bounce(&self) {
        self.bounced.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one interrupt sent to the guest.
    pub fn count_notification(&self) {
        self.notifications.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now. Each is exact; together they are only as consistent as a running
    /// queue allows.
    pub fn counters(&self) -> QueueCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueCounters {
            reads: load(&self.reads),
            writes: load(&self.writes),
            flushes: load(&self.flushes),
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
