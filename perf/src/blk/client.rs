//! A client of a vhost-user-blk backend without a virtual machine: the crate `virtio-driver`,
//! which shares no code with keelson-blk. One thread drives all queues, and sleeps in poll.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

use super::figures::Times;
use super::shared_memory::SharedMemory;
use super::work::{Operation, Operations, Work};

/// Each operation takes up to three descriptors.
const DESCRIPTORS_PER_OPERATION: usize = 4;
/// No operation takes this long.
pub const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// What an operation was started with.
#[derive(Debug, Clone, Copy)]
pub struct Started {
    at: Instant,
    place: usize,
}

/// A connection with its queues.
pub struct Client {
    // The queues point into the transport's memory.
    queues: Vec<VirtioBlkQueue<'static, Started>>,
    transport: Box<VirtioBlkTransport>,
    memory: SharedMemory,
    block: usize,
    depth: usize,
}

impl Client {
    /// Connects and sets the queues up for this load.
    pub fn connect(socket: &Path, work: Work) -> anyhow::Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits();
        let path = socket.to_str().context("a socket path of UTF-8")?;
        let transport = VhostUser::new(path, features).context("connect to the backend")?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let depth = work.depth.div_ceil(work.queues);
        let size = (depth * DESCRIPTORS_PER_OPERATION)
            .next_power_of_two()
            .max(16);
        let size = u16::try_from(size).context("the depth")?;
        let mut queues = VirtioBlkQueue::setup_queues(transport.as_mut(), work.queues, size)?;
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let memory = SharedMemory::new(work.block * depth * work.queues)?;
        let start = memory.at(0) as usize;
        transport.map_mem_region(start, memory.len(), memory.descriptor(), 0)?;
        Ok(Self {
            queues,
            transport,
            memory,
            block: work.block,
            depth,
        })
    }

    /// Keeps the queues full for this long and notes each operation's time. Returns how long it
    /// really took.
    pub fn run(
        &mut self,
        operations: &mut Operations,
        duration: Duration,
        times: &mut Times,
    ) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let mut in_flight = 0;
        for queue in 0..self.queues.len() {
            for slot in 0..self.depth {
                let place = (queue * self.depth + slot) * self.block;
                self.start(queue, place, operations)?;
                in_flight += 1;
            }
            self.kick(queue)?;
        }
        while in_flight > 0 {
            let mut any = false;
            for queue in 0..self.queues.len() {
                let running = begin.elapsed() < duration;
                let done = self.reap(queue, times)?;
                any |= !done.is_empty();
                in_flight -= done.len();
                if running && !done.is_empty() {
                    for place in done {
                        self.start(queue, place, operations)?;
                        in_flight += 1;
                    }
                    self.kick(queue)?;
                }
            }
            if !any {
                self.wait()?;
            }
        }
        Ok(begin.elapsed())
    }

    fn start(
        &mut self,
        queue: usize,
        place: usize,
        operations: &mut Operations,
    ) -> anyhow::Result<()> {
        let Operation { write, offset } = operations.next();
        let (pointer, block) = (self.memory.at(place), self.block);
        let started = Started {
            at: Instant::now(),
            place,
        };
        let queue = self.queues.get_mut(queue).context("a queue")?;
        // SAFETY: the memory stays mapped as long as the queues, and nobody looks at its content.
        unsafe {
            if write {
                queue.write_raw(offset, pointer, block, started)?;
            } else {
                queue.read_raw(offset, pointer, block, started)?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, queue: usize, times: &mut Times) -> anyhow::Result<Vec<usize>> {
        let queue = self.queues.get_mut(queue).context("a queue")?;
        let mut done = Vec::new();
        for completion in queue.completions() {
            anyhow::ensure!(
                completion.ret == 0,
                "an operation failed: {}",
                completion.ret
            );
            times.push(completion.context.at.elapsed());
            done.push(completion.context.place);
        }
        Ok(done)
    }

    fn kick(&mut self, index: usize) -> anyhow::Result<()> {
        let queue = self.queues.get_mut(index).context("a queue")?;
        if queue.avail_notif_needed() {
            self.transport.get_submission_notifier(index).notify()?;
        }
        Ok(())
    }

    fn wait(&self) -> anyhow::Result<()> {
        let calls: Vec<_> = (0..self.queues.len())
            .map(|queue| self.transport.get_completion_fd(queue))
            .collect();
        let mut sources: Vec<_> = calls
            .iter()
            .map(|call| PollFd::new(call, PollFlags::IN))
            .collect();
        anyhow::ensure!(
            poll(&mut sources, Some(&PATIENCE))? > 0,
            "the backend doesn't answer"
        );
        let signalled: Vec<bool> = sources
            .iter()
            .map(|source| !source.revents().is_empty())
            .collect();
        for (call, signalled) in calls.iter().zip(signalled) {
            if signalled {
                let _ = call.read();
            }
        }
        Ok(())
    }
}
