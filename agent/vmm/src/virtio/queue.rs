//! A virtqueue's place in guest memory, as the driver configures it.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::Ram;

/// Why a queue is not usable.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} is not usable: {reason}")]
pub struct QueueError {
    /// The queue.
    pub index: u16,
    /// What is wrong.
    pub reason: String,
}

/// A split virtqueue (virtio 1.2, 2.7).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Entries, a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring (the driver area).
    pub available: u64,
    /// Guest-physical address of the used ring (the device area).
    pub used: u64,
}

impl QueueLayout {
    /// Checks that the rings are aligned and in RAM, each within one region, and returns a queue
    /// that continues where its used ring stands.
    pub fn open(&self, index: u16, memory: &Ram, event_idx: bool) -> Result<Queue, QueueError> {
        let error = |reason: String| QueueError { index, reason };
        self.check(memory).map_err(error)?;
        let mut queue = Queue::new(self.size).map_err(|e| error(e.to_string()))?;
        queue
            .try_set_size(self.size)
            .and_then(|()| queue.try_set_desc_table_address(GuestAddress(self.descriptors)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(self.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(self.used)))
            .map_err(|e| error(e.to_string()))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let used = self.used_index(memory).map_err(error)?;
        queue.set_next_avail(used);
        queue.set_next_used(used);
        Ok(queue)
    }

    /// Checks size, alignment and place.
    pub fn check(&self, memory: &Ram) -> Result<(), String> {
        if !self.size.is_power_of_two() {
            return Err(format!("its size {} is not a power of two", self.size));
        }
        let entries = usize::from(self.size);
        for (name, address, alignment, length) in [
            ("descriptor table", self.descriptors, 16, 16 * entries),
            ("available ring", self.available, 2, 6 + 2 * entries),
            ("used ring", self.used, 4, 6 + 8 * entries),
        ] {
            if !address.is_multiple_of(alignment) {
                return Err(format!(
                    "the {name} at {address:#x} is not aligned to {alignment}"
                ));
            }
            if memory.get_slice(GuestAddress(address), length).is_err() {
                return Err(format!("the {name} at {address:#x} is not in RAM"));
            }
        }
        Ok(())
    }

    /// The used ring's index: 0 in a queue that a driver just set up.
    pub fn used_index(&self, memory: &Ram) -> Result<u16, String> {
        let address = GuestAddress(self.used)
            .0
            .checked_add(2)
            .ok_or("the used ring wraps")?;
        memory
            .load::<u16>(GuestAddress(address), std::sync::atomic::Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|e| e.to_string())
    }
}
