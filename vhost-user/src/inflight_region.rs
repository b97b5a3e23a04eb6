//! The memory in which each queue notes the requests that it works on (vhost-user, "Inflight I/O
//! tracking"). The frontend keeps it, so that after a crash the next backend finishes them.
//!
//! The layout is that of the protocol's `QueueRegionSplit`, one for each queue, at multiples of
//! 64 bytes, as QEMU's libvhost-user lays them out. The memory is shared with the frontend, so
//! nothing in it is believed.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence, fence};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

use crate::bus_fault::Guard;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const REGION_ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

// Offsets in a queue's region.
const VERSION_PLACE: usize = 8;
const DESCRIPTORS_PLACE: usize = 10;
const LAST_BATCH_PLACE: usize = 12;
const USED_INDEX_PLACE: usize = 14;
// Offsets in an entry.
const NEXT_PLACE: usize = 6;
const COUNTER_PLACE: usize = 8;

/// Bytes that one queue's region takes.
pub fn region_bytes(queue_size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(REGION_ALIGNMENT)
}

/// The regions of all queues of a device.
#[derive(Debug)]
pub struct InflightMemory {
    // Before the mapping, which it must not outlive.
    _guard: Guard,
    mapping: MmapRegion,
    queues: u16,
    queue_size: u16,
}

impl InflightMemory {
    /// Fresh memory for a frontend to keep.
    pub fn create(queues: u16, queue_size: u16) -> io::Result<(File, u64)> {
        let bytes = region_bytes(queue_size) * usize::from(queues);
        let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes as u64)?;
        Ok((file, bytes as u64))
    }

    /// Maps what a frontend hands over.
    pub fn map(
        file: File,
        offset: u64,
        bytes: u64,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<Arc<Self>> {
        let needed = (region_bytes(queue_size) * usize::from(queues)) as u64;
        let end = offset.checked_add(bytes);
        let lacks = |end| file.metadata().map_or(true, |data| data.len() < end);
        if queues == 0 || bytes < needed || end.is_none_or(lacks) {
            return Err(io::Error::other(format!(
                "{bytes} bytes at {offset} of the file don't hold {queues} queues of {queue_size}"
            )));
        }
        let length = usize::try_from(needed).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length)
            .map_err(io::Error::other)?;
        Ok(Arc::new(Self {
            _guard: Guard::new(mapping.as_ptr() as usize, length),
            mapping,
            queues,
            queue_size,
        }))
    }

    /// The region of one queue with this many descriptors.
    pub fn region(self: &Arc<Self>, queue: usize, size: u16) -> io::Result<InflightRegion> {
        if queue >= usize::from(self.queues) || size > self.queue_size {
            return Err(io::Error::other(format!(
                "the inflight memory is for {} queues of {}, not for queue {queue} of {size}",
                self.queues, self.queue_size
            )));
        }
        let start = self
            .mapping
            .as_ptr()
            .wrapping_add(queue * region_bytes(self.queue_size));
        Ok(InflightRegion {
            start: NonNull::new(start).ok_or_else(|| io::Error::other("no mapping"))?,
            size,
            counter: 0,
            batch: Vec::with_capacity(usize::from(size)),
            memory: Arc::clone(self),
        })
    }
}

// SAFETY: shared memory that is only accessed atomically.
unsafe impl Send for InflightRegion {}

/// What one queue has in flight.
#[derive(Debug)]
pub struct InflightRegion {
    start: NonNull<u8>,
    size: u16,
    counter: u64,
    batch: Vec<u16>,
    // Keeps the mapping that `start` points into.
    #[allow(dead_code, reason = "it is owned, not looked at")]
    memory: Arc<InflightMemory>,
}

impl InflightRegion {
    /// Takes over what an earlier backend left, given the used index that the driver sees.
    /// Returns the heads to work on again, in the order in which they were taken.
    pub fn recover(&mut self, used_index: u16) -> Vec<u16> {
        let fresh = self.word(VERSION_PLACE).load(Ordering::Relaxed) != VERSION
            || self.word(DESCRIPTORS_PLACE).load(Ordering::Relaxed) != self.size;
        if fresh {
            for head in 0..self.size {
                self.flag(head).store(0, Ordering::Relaxed);
            }
            self.word(USED_INDEX_PLACE)
                .store(used_index, Ordering::Relaxed);
            self.word(DESCRIPTORS_PLACE)
                .store(self.size, Ordering::Relaxed);
            self.word(VERSION_PLACE).store(VERSION, Ordering::Release);
            return Vec::new();
        }
        // A crash between publishing a batch and noting it: its heads are still marked.
        let noted = self.word(USED_INDEX_PLACE).load(Ordering::Relaxed);
        let mut head = self.word(LAST_BATCH_PLACE).load(Ordering::Relaxed);
        for _ in 0..used_index.wrapping_sub(noted).min(self.size) {
            if head >= self.size {
                break;
            }
            self.flag(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.word(USED_INDEX_PLACE)
            .store(used_index, Ordering::Release);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.flag(*head).load(Ordering::Relaxed) == 1)
            .map(|head| (self.order(head).load(Ordering::Relaxed), head))
            .collect();
        left.sort_unstable();
        self.counter = left
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// Notes that a chain was taken. The head has to be below the queue's size.
    pub fn take(&mut self, head: u16) {
        self.order(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        // The processor keeps stores in order for itself, and after a crash only that counts.
        compiler_fence(Ordering::SeqCst);
        self.flag(head).store(1, Ordering::Relaxed);
    }

    /// Notes that a chain will be published with the next batch.
    pub fn give_back(&mut self, head: u16) {
        let last = self.word(LAST_BATCH_PLACE);
        self.next(head)
            .store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        last.store(head, Ordering::Relaxed);
        self.batch.push(head);
    }

    /// Notes that the batch was published, with the used index after it.
    pub fn published(&mut self, used_index: u16) {
        fence(Ordering::Release);
        while let Some(head) = self.batch.pop() {
            self.flag(head).store(0, Ordering::Relaxed);
        }
        compiler_fence(Ordering::SeqCst);
        self.word(USED_INDEX_PLACE)
            .store(used_index, Ordering::Relaxed);
    }

    fn place(&self, head: u16) -> usize {
        assert!(head < self.size);
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn word(&self, place: usize) -> &AtomicU16 {
        // SAFETY: within the region, which the memory keeps mapped, and even.
        unsafe { AtomicU16::from_ptr(self.start.as_ptr().add(place).cast()) }
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        let place = self.place(head);
        // SAFETY: within the region, as above.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(place)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.word(self.place(head) + NEXT_PLACE)
    }

    fn order(&self, head: u16) -> &AtomicU64 {
        let place = self.place(head) + COUNTER_PLACE;
        // SAFETY: within the region, as above, at a multiple of 8.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(place).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn memory(queues: u16, size: u16) -> (File, Arc<InflightMemory>) {
        let (file, bytes) = InflightMemory::create(queues, size).unwrap();
        let clone = file.try_clone().unwrap();
        let memory = InflightMemory::map(clone, 0, bytes, queues, size).unwrap();
        (file, memory)
    }

    #[test]
    fn what_is_in_flight_comes_back_in_the_order_in_which_it_was_taken() {
        let (_, memory) = memory(2, 8);
        let mut region = memory.region(1, 8).unwrap();
        assert!(region.recover(100).is_empty());
        for head in [5, 3, 7, 0] {
            region.take(head);
        }
        region.give_back(3);
        region.published(101);
        let mut next = memory.region(1, 8).unwrap();
        assert_eq!(next.recover(101), [5, 7, 0]);
        next.take(3);
        let mut third = memory.region(1, 8).unwrap();
        assert_eq!(third.recover(101), [5, 7, 0, 3]);
    }

    #[test]
    fn a_batch_that_was_published_but_not_noted_is_done() {
        let (_, memory) = memory(1, 8);
        let mut region = memory.region(0, 8).unwrap();
        assert!(region.recover(0xffff).is_empty());
        for head in [1, 2, 3] {
            region.take(head);
        }
        region.give_back(2);
        region.give_back(1);
        // Killed here. The driver sees both, or neither, or only the first of two batches.
        assert_eq!(memory.region(0, 8).unwrap().recover(1), [3]);
    }

    #[test]
    fn a_batch_that_was_not_published_is_worked_on_again() {
        let (_, memory) = memory(1, 8);
        let mut region = memory.region(0, 8).unwrap();
        region.recover(4);
        region.take(1);
        region.take(2);
        region.give_back(1);
        assert_eq!(memory.region(0, 8).unwrap().recover(4), [1, 2]);
    }

    #[test]
    fn nonsense_in_the_memory_is_survived() {
        let (file, memory) = memory(1, 8);
        let mut region = memory.region(0, 8).unwrap();
        region.recover(0);
        for head in 0..8 {
            region.take(head);
        }
        for (byte, expected) in [(0xff_u8, 0), (0x01, 8)] {
            file.write_all_at(&[byte; 128], 16).unwrap();
            file.write_all_at(&[0xff; 4], 12).unwrap();
            let mut next = memory.region(0, 8).unwrap();
            assert_eq!(next.recover(3).len(), expected);
        }
        let short = memory.region(0, 16);
        assert!(short.is_err() && memory.region(1, 8).is_err());
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let (file, bytes) = InflightMemory::create(1, 8).unwrap();
        let map = |bytes, queues| {
            let file = file.try_clone().unwrap();
            InflightMemory::map(file, 0, bytes, queues, 8)
        };
        assert!(map(bytes, 2).is_err());
        assert!(map(2 * bytes, 2).is_err());
        assert!(map(u64::MAX, 1).is_err());
        assert!(map(bytes, 1).is_ok());
    }
}
