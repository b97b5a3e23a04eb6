//! What the kernel counts of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Bytes of memory that a process has; 0 if it is gone.
pub fn resident(process: u32) -> u64 {
    status(process, "VmRSS:")
}

/// Those of them that are not a mapped file's, which the kernel may take back.
pub fn own(process: u32) -> u64 {
    status(process, "RssAnon:")
}

fn status(process: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Watches how much memory a process has at most.
pub struct Peak {
    bytes: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Peak {
    /// From now on.
    pub fn of(process: u32) -> Self {
        let peak = Self {
            bytes: Arc::new(AtomicU64::new(0)),
            over: Arc::new(AtomicBool::new(false)),
        };
        let (bytes, over) = (peak.bytes.clone(), peak.over.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                bytes.fetch_max(resident(process), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        peak
    }

    /// Until now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
