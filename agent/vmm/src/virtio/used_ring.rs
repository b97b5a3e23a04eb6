//! The used ring of a split virtqueue, written for several chains at once.
//!
//! A packet that spans several chains must appear in the ring with all of them, and virtio-queue
//! publishes each chain by itself.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::Ram;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.7).
const NO_INTERRUPT: u16 = 1;
/// `flags` and `idx` before the entries of either ring.
const RING_HEADER: u64 = 4;

/// The device's side of a used ring.
#[derive(Debug, Clone, Copy)]
pub struct UsedRing {
    size: u16,
    available: u64,
    used: u64,
    index: Wrapping<u16>,
    event_idx: bool,
}

impl UsedRing {
    /// The used ring of a queue whose rings were checked to be in RAM.
    pub fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            index: Wrapping(queue.next_used()),
            event_idx: queue.event_idx_enabled(),
        }
    }

    /// The index that the next entry gets.
    pub const fn index(&self) -> u16 {
        self.index.0
    }

    /// Gives chains back to the driver, all at once: (head, bytes written).
    pub fn publish(&mut self, memory: &Ram, chains: &[(u16, u32)]) -> Result<(), GuestMemoryError> {
        for (head, written) in chains {
            let slot = u64::from(self.index.0 % self.size);
            let entry = GuestAddress(self.used + RING_HEADER + 8 * slot);
            let value = u64::from(*head) | u64::from(*written) << 32;
            memory.write_obj(value.to_le(), entry)?;
            self.index += 1;
        }
        memory.store(
            self.index.0.to_le(),
            GuestAddress(self.used + 2),
            Ordering::Release,
        )
    }

    /// Whether the driver wants an interrupt for what was published since the index `before`
    /// (virtio 1.2, 2.7.7.2).
    pub fn needs_interrupt(&self, memory: &Ram, before: u16) -> Result<bool, GuestMemoryError> {
        if self.index.0 == before {
            return Ok(false);
        }
        // The index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let address = self.available + RING_HEADER + 2 * u64::from(self.size);
            let event = memory.load::<u16>(GuestAddress(address), Ordering::Relaxed)?;
            let event = Wrapping(u16::from_le(event));
            return Ok(self.index - event - Wrapping(1) < self.index - Wrapping(before));
        }
        let flags = memory.load::<u16>(GuestAddress(self.available), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }
}
