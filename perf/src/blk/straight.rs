//! The limit: the same load through io_uring straight on the file, as fio does it. One thread, one
//! ring, a registered file and buffers, and a wait for the first completion.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use io_uring::{IoUring, opcode, types};
use rustix::time::{ClockId, clock_gettime};

use super::figures::Times;
use super::shared_memory::SharedMemory;
use super::work::{Operations, Work};

/// A file with a ring.
pub struct Straight {
    ring: IoUring,
    memory: SharedMemory,
    work: Work,
    _file: File,
}

impl Straight {
    pub fn open(path: &Path, work: Work) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(u32::try_from(work.depth)?.max(8))?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let memory = SharedMemory::new(work.block * work.depth)?;
        let buffer = libc::iovec {
            iov_base: memory.at(0).cast(),
            iov_len: memory.len(),
        };
        // SAFETY: mapped for longer than the ring lives.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        Ok(Self {
            ring,
            memory,
            work,
            _file: file,
        })
    }

    /// As [`Client::run`](super::client::Client::run). Returns the time and this thread's
    /// processor time.
    pub fn run(
        &mut self,
        operations: &mut Operations,
        duration: Duration,
        times: &mut Times,
    ) -> anyhow::Result<(Duration, Duration)> {
        let (begin, cpu) = (Instant::now(), processor_time());
        let mut started = vec![begin; self.work.depth];
        for slot in 0..self.work.depth {
            self.start(slot, operations, &mut started)?;
        }
        let mut in_flight = self.work.depth;
        while in_flight > 0 {
            self.ring.submit_and_wait(1)?;
            let done: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            let running = begin.elapsed() < duration;
            for (data, result) in done {
                let whole = usize::try_from(result).is_ok_and(|bytes| bytes == self.work.block);
                anyhow::ensure!(whole, "an operation failed: {result}");
                let slot = usize::try_from(data)?;
                times.push(started.get(slot).copied().unwrap_or(begin).elapsed());
                in_flight -= 1;
                if running {
                    self.start(slot, operations, &mut started)?;
                    in_flight += 1;
                }
            }
        }
        Ok((begin.elapsed(), processor_time().saturating_sub(cpu)))
    }

    fn start(
        &mut self,
        slot: usize,
        operations: &mut Operations,
        started: &mut [Instant],
    ) -> anyhow::Result<()> {
        let (write, offset) = operations.next();
        let len = u32::try_from(self.work.block)?;
        let pointer = self.memory.at(slot * self.work.block);
        let file = types::Fixed(0);
        let entry = if write {
            opcode::WriteFixed::new(file, pointer, len, 0)
                .offset(offset)
                .build()
        } else {
            opcode::ReadFixed::new(file, pointer, len, 0)
                .offset(offset)
                .build()
        };
        if let Some(started) = started.get_mut(slot) {
            *started = Instant::now();
        }
        // SAFETY: into this slot's part of the memory, which outlives the ring.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }?;
        Ok(())
    }
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
