//! What a process, with all that it started, has used (proc_pid_stat(5), proc_pid_io(5)).

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// Processes that one is followed to, at most.
const PROCESS_LIMIT: usize = 64;

/// What a process, with all that it started, has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Bytes in memory now. Pages that processes share count for each.
    pub memory_bytes: u64,
    /// Bytes read from storage.
    pub read_bytes: u64,
    /// Bytes written to storage.
    pub written_bytes: u64,
}

impl Usage {
    /// Of a process; nothing where it is gone.
    pub fn of_process(process_id: u32) -> Self {
        let mut usage = Self::default();
        let mut found = BTreeSet::from([process_id]);
        let mut waiting = vec![process_id];
        while let Some(id) = waiting.pop() {
            usage.add(id);
            for child in children(id) {
                if found.len() < PROCESS_LIMIT && found.insert(child) {
                    waiting.push(child);
                }
            }
        }
        usage
    }

    fn add(&mut self, process_id: u32) {
        let stat = fs::read_to_string(format!("/proc/{process_id}/stat")).unwrap_or_default();
        // The second field is the program's name in parentheses, which may itself hold any character.
        let fields: Vec<_> = match stat.rsplit_once(')') {
            Some((_, rest)) => rest.split_ascii_whitespace().collect(),
            None => return,
        };
        // The rest begins with the third field of proc_pid_stat(5).
        let field = |number: usize| -> u64 {
            let text = fields.get(number - 3);
            text.and_then(|text| text.parse().ok()).unwrap_or(0)
        };
        let ticks = field(14).saturating_add(field(15));
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        self.cpu += Duration::from_millis(ticks.saturating_mul(1000) / per_second);
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
        self.memory_bytes = self
            .memory_bytes
            .saturating_add(field(24).saturating_mul(page));
        let io = fs::read_to_string(format!("/proc/{process_id}/io")).unwrap_or_default();
        let bytes = |name: &str| -> u64 {
            let mut lines = io.lines().filter_map(|line| line.strip_prefix(name));
            lines
                .next()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        self.read_bytes = self.read_bytes.saturating_add(bytes("read_bytes:"));
        self.written_bytes = self.written_bytes.saturating_add(bytes("write_bytes:"));
    }
}

fn children(process_id: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process_id}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .flat_map(|task| {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let ids = text
                .split_ascii_whitespace()
                .filter_map(|id| id.parse().ok());
            ids.collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_time() {
        let mut sum = 0_u64;
        let started = std::time::Instant::now();
        while started.elapsed() < Duration::from_millis(100) {
            sum = sum.wrapping_add(1);
        }
        let usage = Usage::of_process(std::process::id());
        assert!(sum > 0 && usage.cpu > Duration::ZERO, "{usage:?}");
        assert!(usage.memory_bytes > 100_000, "{usage:?}");
        assert_eq!(Usage::of_process(u32::MAX), Usage::default());
    }
}
