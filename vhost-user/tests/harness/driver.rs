//! The crate `virtio-driver`, which shares no code with the backend, as a synchronous client.

use std::os::fd::AsRawFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    Completion, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use super::PATIENCE;

pub const VERSION_1: u64 = VirtioFeatureFlags::VERSION_1.bits();
pub const EVENT_IDX: u64 = VirtioFeatureFlags::RING_EVENT_IDX.bits();
pub const FLUSH: u64 = VirtioBlkFeatureFlags::FLUSH.bits();
pub const MQ: u64 = VirtioBlkFeatureFlags::MQ.bits();
pub const RO: u64 = VirtioBlkFeatureFlags::RO.bits();

/// What a Linux guest would take.
pub const USUAL: u64 = VERSION_1 | EVENT_IDX | FLUSH | MQ | RO;

/// A connected client with one stretch of shared memory for data.
pub struct Driver {
    // The queues point into the transport's memory.
    queues: Vec<VirtioBlkQueue<'static, u64>>,
    transport: Box<VirtioBlkTransport>,
    memory: MmapRegion,
}

impl Driver {
    pub fn connect(socket: &str, features: u64, queues: usize, memory_bytes: usize) -> Self {
        let transport = VhostUser::new(socket, features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queues =
            VirtioBlkQueue::<u64>::setup_queues(transport.as_mut(), queues, 512).unwrap();
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let file = std::fs::File::from(memfd_create("guest-data", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(memory_bytes as u64).unwrap();
        let descriptor = file.as_raw_fd();
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), memory_bytes).unwrap();
        let address = memory.as_ptr() as usize;
        transport
            .map_mem_region(address, memory_bytes, descriptor, 0)
            .unwrap();
        Self {
            queues,
            transport,
            memory,
        }
    }

    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    pub fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().unwrap()
    }

    pub fn put(&mut self, place: usize, bytes: &[u8]) {
        assert!(place + bytes.len() <= self.memory.size());
        // SAFETY: within the mapping, and no request is in flight on these bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.memory.as_ptr().add(place),
                bytes.len(),
            );
        }
    }

    pub fn get(&self, place: usize, len: usize) -> Vec<u8> {
        assert!(place + len <= self.memory.size());
        let mut bytes = vec![0; len];
        // SAFETY: as in `put`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(place), bytes.as_mut_ptr(), len);
        }
        bytes
    }

    pub fn queue_read(&mut self, queue: usize, offset: u64, place: usize, len: usize, tag: u64) {
        let pointer = self.memory.as_ptr().wrapping_add(place);
        // SAFETY: the memory stays mapped as long as the queues.
        unsafe { self.queues[queue].read_raw(offset, pointer, len, tag) }.unwrap();
    }

    pub fn queue_write(&mut self, queue: usize, offset: u64, place: usize, len: usize, tag: u64) {
        let pointer = self.memory.as_ptr().wrapping_add(place);
        // SAFETY: as in `queue_read`.
        unsafe { self.queues[queue].write_raw(offset, pointer, len, tag) }.unwrap();
    }

    pub fn queue_flush(&mut self, queue: usize, tag: u64) {
        self.queues[queue].flush(tag).unwrap();
    }

    pub fn queue_discard(&mut self, queue: usize, offset: u64, len: u64, tag: u64) {
        self.queues[queue].discard(offset, len, tag).unwrap();
    }

    pub fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            let notifier = self.transport.get_submission_notifier(queue);
            notifier.notify().unwrap();
        }
    }

    /// Kicks and waits until `count` requests of the queue have completed.
    pub fn finish(&mut self, queue: usize, count: usize) -> Vec<Completion<u64>> {
        self.kick(queue);
        let mut done = Vec::new();
        loop {
            done.extend(self.queues[queue].completions());
            if done.len() >= count {
                return done;
            }
            let call = self.transport.get_completion_fd(queue);
            let mut sources = [PollFd::new(&call, PollFlags::IN)];
            let timeout = PATIENCE.try_into().unwrap();
            assert_ne!(
                poll(&mut sources, Some(&timeout)).unwrap(),
                0,
                "no interrupt with {} of {count} requests done",
                done.len()
            );
            // Another thread's reading it first would only mean an early look.
            let _ = call.read();
        }
    }

    /// One request's result: 0 or a negated errno.
    fn one(&mut self, queue: usize) -> i32 {
        self.finish(queue, 1)[0].ret
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        self.queue_read(0, offset, 0, len, 0);
        match self.one(0) {
            0 => Ok(self.get(0, len)),
            errno => Err(errno),
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        self.put(0, bytes);
        self.queue_write(0, offset, 0, bytes.len(), 0);
        self.one(0)
    }

    pub fn flush(&mut self) -> i32 {
        self.queue_flush(0, 0);
        self.one(0)
    }
}
