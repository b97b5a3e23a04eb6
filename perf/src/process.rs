//! What the kernel counts of a process.

use std::process::Child;
use std::time::Duration;

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};

/// Counters of one process, or the sum over several.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// User and system time in seconds.
    pub cpu_seconds: f64,
    /// Bytes that it caused to be written to disk.
    pub written_bytes: u64,
    /// Largest resident set in bytes.
    pub peak_memory: u64,
}

/// Usage of all of `processes` together.
pub fn usage(processes: &[Child]) -> anyhow::Result<Usage> {
    let mut sum = Usage::default();
    for process in processes {
        let folder = format!("/proc/{}", process.id());
        let read = |name: &str| {
            std::fs::read_to_string(format!("{folder}/{name}"))
                .with_context(|| format!("read {folder}/{name}"))
        };
        let stat = read("stat")?;
        // After the name, which may hold anything: state is field 3, utime and stime are 14 and 15.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks: u64 = fields
            .iter()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        #[allow(clippy::cast_precision_loss)] // far below 2^52
        let seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        sum.cpu_seconds += seconds;
        sum.written_bytes += number(&read("io")?, "write_bytes:").unwrap_or(0);
        sum.peak_memory += number(&read("status")?, "VmHWM:").unwrap_or(0) * 1024;
    }
    Ok(sum)
}

fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The processor time of these processes so far, to the nanosecond; nothing of those that are gone.
pub fn processor_time(processes: &[u32]) -> Duration {
    let of_thread = |folder: std::fs::DirEntry| {
        let text = std::fs::read_to_string(folder.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    let of_process = |id: &u32| {
        let threads = std::fs::read_dir(format!("/proc/{id}/task"));
        let threads = threads.into_iter().flatten().flatten();
        threads.filter_map(of_thread).sum::<u64>()
    };
    Duration::from_nanos(processes.iter().map(of_process).sum())
}

/// The processes that a process has started, as long as it has one thread.
pub fn children(id: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// The calling thread's processor time so far.
pub fn thread_processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
