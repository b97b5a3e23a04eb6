//! The limit: the same load through io_uring straight on the file, as fio does it. One thread, one
//! ring, a registered file and buffers, and a wait for the first completion.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use io_uring::{IoUring, cqueue, opcode, types};

use super::figures::Times;
use super::shared_memory::SharedMemory;
use super::work::{Operation, Operations, Work};
use crate::process::thread_processor_time;

/// User data of kicks, which no slot has.
pub const KICK: u64 = u64::MAX;

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
            .build((u32::try_from(work.depth)? + 1).max(8))?;
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
        let (begin, cpu) = (Instant::now(), thread_processor_time());
        let mut started = vec![begin; self.work.depth];
        for slot in 0..self.work.depth {
            self.start(slot, operations.next())?;
        }
        let mut in_flight = self.work.depth;
        while in_flight > 0 {
            let done = self.wait()?;
            let running = begin.elapsed() < duration;
            for (data, result, _) in done {
                self.check(result)?;
                let slot = usize::try_from(data)?;
                let start = started.get_mut(slot).context("a slot")?;
                times.push(start.elapsed());
                in_flight -= 1;
                if running {
                    *start = Instant::now();
                    self.start(slot, operations.next())?;
                    in_flight += 1;
                }
            }
        }
        Ok((begin.elapsed(), thread_processor_time().saturating_sub(cpu)))
    }

    /// Submits, waits for the first completion, and takes all that have come: user data, result, and
    /// whether more of the same will follow.
    pub fn wait(&mut self) -> anyhow::Result<Vec<(u64, i32, bool)>> {
        self.ring.submit_and_wait(1)?;
        let completions = self.ring.completion().map(|entry| {
            let more = cqueue::more(entry.flags());
            (entry.user_data(), entry.result(), more)
        });
        Ok(completions.collect())
    }

    /// Has every write to an eventfd wake [`wait`](Self::wait), as [`KICK`].
    pub fn wait_for_kicks(&mut self, event: &OwnedFd) -> anyhow::Result<()> {
        let entry =
            opcode::PollAdd::new(types::Fd(event.as_raw_fd()), u32::try_from(libc::POLLIN)?)
                .multi(true)
                .build()
                .user_data(KICK);
        // SAFETY: a poll points to no memory.
        unsafe { self.ring.submission().push(&entry) }?;
        Ok(())
    }

    /// Whether all of an operation was done.
    pub fn check(&self, result: i32) -> anyhow::Result<()> {
        let whole = usize::try_from(result).is_ok_and(|bytes| bytes == self.work.block);
        anyhow::ensure!(whole, "an operation failed: {result}");
        Ok(())
    }

    /// Puts an operation into the ring, with this slot's memory; its result comes under the slot's
    /// number.
    pub fn start(&mut self, slot: usize, operation: Operation) -> anyhow::Result<()> {
        let Operation { write, offset } = operation;
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
        // SAFETY: into this slot's part of the memory, which outlives the ring.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }?;
        Ok(())
    }
}
