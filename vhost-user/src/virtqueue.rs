//! The device's side of one split virtqueue (virtio 1.2, 2.7).
//!
//! The rings are checked once, and then used in place. Used elements become visible to the driver
//! in batches, with one store of the used index.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::descriptor_chain::{ChainError, DescriptorTable};
use crate::request::RequestError;

/// Bytes of one descriptor.
const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of `struct vring_used_elem`.
const USED_ELEMENT_BYTES: usize = 8;
/// Bytes of flags and index before either ring's elements.
const RING_HEADER_BYTES: usize = 4;
/// `VRING_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;

/// Why a queue can't go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// No power of two.
    #[error("the queue has {size} descriptors, which is no power of two")]
    Size {
        /// Descriptors.
        size: u16,
    },
    /// A ring that isn't where virtio 1.2, 2.7 wants it, or not in one piece of memory.
    #[error("the {ring} at {address:#x} is misaligned or not in one region of guest memory")]
    Placement {
        /// Which.
        ring: &'static str,
        /// Guest physical address.
        address: u64,
    },
    /// More chains than there are descriptors.
    #[error("the available index {available} is more than the queue ahead of {next}")]
    AvailableIndex {
        /// The driver's index.
        available: u16,
        /// The device's.
        next: u16,
    },
    /// A chain that was made available again before it was used.
    #[error("descriptor {head} was made available again while in flight")]
    InFlight {
        /// The chain's head.
        head: u16,
    },
    /// An answer can't be written.
    #[error("the status byte is outside guest memory")]
    Status,
    /// The frontend took memory away that it had shared.
    #[error("the file behind the guest's memory was shortened")]
    MemoryLost,
    /// A descriptor chain breaks the rules.
    #[error("{0}")]
    Chain(#[from] ChainError),
    /// A chain that is no request.
    #[error("{0}")]
    Request(#[from] RequestError),
}

/// Where a virtqueue is and how far both sides are.
#[derive(Clone, Copy, Debug)]
pub struct VirtqueueSetup {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: GuestAddress,
    /// Guest physical address of the available ring.
    pub available_ring: GuestAddress,
    /// Guest physical address of the used ring.
    pub used_ring: GuestAddress,
    /// The available index to go on from.
    pub next_available: u16,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Virtqueue {
    table: DescriptorTable,
    available: Ring,
    used: Ring,
    event_idx: bool,
    next_available: u16,
    /// The driver's available index as last read.
    seen_available: u16,
    next_used: u16,
    published_used: u16,
    /// The used index at the last decision about an interrupt.
    announced_used: Option<u16>,
    kicks_enabled: bool,
    // After the rings, which lie in it.
    memory: Arc<GuestMemoryMmap>,
}

impl Virtqueue {
    /// Checks the setup against the guest's memory and goes on from where the rings stand.
    pub fn new(setup: VirtqueueSetup, memory: Arc<GuestMemoryMmap>) -> Result<Self, QueueError> {
        if !setup.size.is_power_of_two() {
            return Err(QueueError::Size { size: setup.size });
        }
        let size = usize::from(setup.size);
        // Each ring has one more 16-bit field behind its elements, for VIRTIO_F_EVENT_IDX.
        let available_bytes = RING_HEADER_BYTES + 2 * size + 2;
        let used_bytes = RING_HEADER_BYTES + USED_ELEMENT_BYTES * size + 2;
        let table = (setup.descriptor_table, DESCRIPTOR_BYTES * size, 16);
        Ring::find("descriptor table", &memory, table)?;
        let available = (setup.available_ring, available_bytes, 2);
        let available = Ring::find("available ring", &memory, available)?;
        let used = (setup.used_ring, used_bytes, 4);
        let used = Ring::find("used ring", &memory, used)?;
        let next_used = used.load(2, Ordering::Acquire);
        Ok(Self {
            table: DescriptorTable {
                address: setup.descriptor_table,
                size: u32::from(setup.size),
                indirect: setup.indirect,
            },
            available,
            used,
            event_idx: setup.event_idx,
            next_available: setup.next_available,
            seen_available: setup.next_available,
            next_used,
            published_used: next_used,
            announced_used: None,
            kicks_enabled: true,
            memory,
        })
    }

    /// The guest memory that the rings and buffers are in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Where to look up the chains of this queue.
    pub fn table(&self) -> DescriptorTable {
        self.table
    }

    /// The available index from which a successor has to go on.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The used index that the driver sees.
    pub fn used_index(&self) -> u16 {
        self.published_used
    }

    /// Bytes of the used ring, for the dirty log.
    pub fn used_ring_bytes(&self) -> u64 {
        self.used.bytes as u64
    }

    /// Takes chains from this available index on.
    pub fn go_on_from(&mut self, next_available: u16) {
        self.next_available = next_available;
        self.seen_available = next_available;
    }

    /// Whether the driver has made chains available that were not taken yet.
    pub fn has_available(&self) -> bool {
        self.next_available != self.available.load(2, Ordering::Relaxed)
    }

    /// Takes the next available chain's head, if there is one.
    pub fn pop(&mut self) -> Result<Option<u16>, QueueError> {
        if self.next_available == self.seen_available {
            let available = self.available.load(2, Ordering::Acquire);
            let ahead = available.wrapping_sub(self.next_available);
            if u32::from(ahead) > self.table.size {
                return Err(QueueError::AvailableIndex {
                    available,
                    next: self.next_available,
                });
            }
            self.seen_available = available;
            if ahead == 0 {
                return Ok(None);
            }
        }
        let place = self.slot(self.next_available);
        let head = self
            .available
            .load(RING_HEADER_BYTES + 2 * place, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Asks the driver for kicks again. True if requests came in meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.store_available_event(self.next_available);
        } else {
            self.used.store(0, 0, Ordering::Relaxed);
        }
        self.kicks_enabled = true;
        // The wish must be visible before the index is read again (virtio 1.2, 2.7.10.1).
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Tells the driver that it may save its kicks.
    pub fn disable_kicks(&mut self) {
        if !std::mem::take(&mut self.kicks_enabled) {
            return;
        }
        if self.event_idx {
            // An index just behind is the one that the driver reaches last.
            self.store_available_event(self.next_available.wrapping_sub(1));
        } else {
            self.used.store(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Hands a chain back with the number of bytes written into it; the driver sees it after
    /// [`publish`](Self::publish).
    pub fn push_used(&mut self, head: u16, written: u32) {
        let place = RING_HEADER_BYTES + USED_ELEMENT_BYTES * self.slot(self.next_used);
        let element = u64::from(written) << 32 | u64::from(head);
        self.used.store_u64(place, element);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all chains handed back. Returns whether there were any.
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.published_used {
            return false;
        }
        self.used.store(2, self.next_used, Ordering::Release);
        self.published_used = self.next_used;
        true
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    pub fn take_notification(&mut self) -> bool {
        let new = self.published_used;
        let old = self.announced_used.replace(new);
        if old == Some(new) {
            return false;
        }
        // The used index must be visible before the driver's wish is read (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = self.available.load(0, Ordering::Relaxed);
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let place = RING_HEADER_BYTES + 2 * self.table.size as usize;
        let event = self.available.load(place, Ordering::Relaxed);
        // Nothing is known of the time before this device: rather one interrupt too many.
        old.is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index) & (self.table.size as usize - 1)
    }

    fn store_available_event(&self, index: u16) {
        let place = RING_HEADER_BYTES + USED_ELEMENT_BYTES * self.table.size as usize;
        self.used.store(place, index, Ordering::Relaxed);
    }
}

/// A ring in guest memory, which the guest may change at any time.
#[derive(Debug)]
struct Ring {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a pointer into shared memory that the virtqueue keeps mapped; all accesses are atomic.
unsafe impl Send for Ring {}

impl Ring {
    fn find(
        ring: &'static str,
        memory: &GuestMemoryMmap,
        (address, bytes, alignment): (GuestAddress, usize, usize),
    ) -> Result<Self, QueueError> {
        let slice = GuestMemoryBackend::get_slice(memory, address, bytes).ok();
        slice
            .and_then(|slice| NonNull::new(slice.ptr_guard_mut().as_ptr()))
            .filter(|start| start.as_ptr().addr().is_multiple_of(alignment))
            .map(|start| Self { start, bytes })
            .ok_or(QueueError::Placement {
                ring,
                address: address.0,
            })
    }

    fn field(&self, place: usize) -> &AtomicU16 {
        assert!(place + 2 <= self.bytes && place.is_multiple_of(2));
        // SAFETY: within the ring, which is mapped as long as the virtqueue and whose start is
        // even; other accesses to shared memory by this process are atomic as well.
        unsafe { AtomicU16::from_ptr(self.start.as_ptr().add(place).cast()) }
    }

    fn load(&self, place: usize, ordering: Ordering) -> u16 {
        u16::from_le(self.field(place).load(ordering))
    }

    fn store(&self, place: usize, value: u16, ordering: Ordering) {
        self.field(place).store(value.to_le(), ordering);
    }

    // A used element is only aligned to 4 bytes.
    fn store_u64(&self, place: usize, value: u64) {
        assert!(place + 8 <= self.bytes);
        // SAFETY: within the ring, as above; the driver doesn't read it before it is published.
        unsafe {
            self.start
                .as_ptr()
                .add(place)
                .cast::<u64>()
                .write_unaligned(value.to_le());
        }
    }
}
