//! Disk errors in the log, at most one line a second from each queue.

use std::time::{Duration, Instant};

use crate::metrics::Completed;

const INTERVAL: Duration = Duration::from_secs(1);

/// The last line's time, and what was left out since.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    last: Option<Instant>,
    suppressed: u64,
}

impl ErrorLog {
    /// Logs a failed disk operation, or counts it for the next line.
    pub fn disk_error(&mut self, queue: usize, operation: Completed, errno: i32) {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < INTERVAL)
        {
            self.suppressed += 1;
            return;
        }
        let error = std::io::Error::from_raw_os_error(errno);
        let suppressed = std::mem::take(&mut self.suppressed);
        self.last = Some(now);
        tracing::warn!(queue, ?operation, %error, suppressed, "the disk failed; the guest gets S_IOERR");
    }
}
