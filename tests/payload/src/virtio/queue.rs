//! A split virtqueue (Virtio 1.3, 2.7).

use crate::error::Error;
use crate::memory::Buffer;
use crate::mmio::Window;
use core::sync::atomic::{Ordering, fence};

/// The buffer continues in the descriptor `next`.
pub const NEXT: u16 = 1;
/// The device writes to the buffer.
pub const WRITABLE: u16 = 2;
/// The buffer holds descriptors.
pub const INDIRECT: u16 = 4;

const DESCRIPTOR_SIZE: usize = 16;
const USED_ELEMENT_SIZE: usize = 8;
/// The device wants no notification (used ring), or the driver no interrupt (available ring).
const SUPPRESSED: u16 = 1;
/// Ring headers: flags and index.
const RING: usize = 4;

/// A descriptor, as the device reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The buffer's physical address.
    pub address: u64,
    /// The buffer's bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITABLE`], [`INDIRECT`].
    pub flags: u16,
    /// The following descriptor.
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads; [`Queue::add`] links it.
    pub fn readable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: 0,
            next: 0,
        }
    }

    /// A buffer that the device writes; [`Queue::add`] links it.
    pub fn writable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            flags: WRITABLE,
            next: 0,
        }
    }

    /// A chain in a table of its own (2.7.5.3): links `parts` in `table`.
    pub fn table(table: &Buffer, parts: &[Self]) -> Self {
        for (index, part) in (0..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let more = if last { 0 } else { NEXT };
            Self {
                flags: part.flags | more,
                next: index + 1,
                ..*part
            }
            .store(table, index);
        }
        let length = (parts.len() * DESCRIPTOR_SIZE) as u32;
        Self {
            address: table.address(),
            length,
            flags: INDIRECT,
            next: 0,
        }
    }

    /// Puts it at an index of a descriptor table.
    pub fn store(&self, table: &Buffer, index: u16) {
        let offset = usize::from(index) * DESCRIPTOR_SIZE;
        table.write64(offset, self.address);
        table.write32(offset + 8, self.length);
        table.write16(offset + 12, self.flags);
        table.write16(offset + 14, self.next);
    }
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// The bytes that the device says it wrote.
    pub written: u32,
}

/// A virtqueue, this driver's side.
pub struct Queue {
    index: u16,
    size: u16,
    descriptors: Buffer,
    available: Buffer,
    used: Buffer,
    notify: Window,
    event_index: bool,
    free_head: u16,
    free: u16,
    next_available: u16,
    notified_available: u16,
    next_used: u16,
}

impl Queue {
    /// Takes the memory for a queue of `size` descriptors, a power of two.
    pub fn new(index: u16, size: u16, notify: Window, event_index: bool) -> Result<Self, Error> {
        let entries = usize::from(size);
        let queue = Self {
            index,
            size,
            descriptors: Buffer::allocate(entries * DESCRIPTOR_SIZE, 16)?,
            available: Buffer::allocate(RING + 2 * entries + 2, 2)?,
            used: Buffer::allocate(RING + USED_ELEMENT_SIZE * entries + 2, 4)?,
            notify,
            event_index,
            free_head: 0,
            free: size,
            next_available: 0,
            notified_available: 0,
            next_used: 0,
        };
        for index in 0..size {
            let next = if index + 1 == size { 0 } else { index + 1 };
            Descriptor {
                address: 0,
                length: 0,
                flags: 0,
                next,
            }
            .store(&queue.descriptors, index);
        }
        Ok(queue)
    }

    /// Its descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table, for those who want to break it.
    pub fn descriptors(&self) -> &Buffer {
        &self.descriptors
    }

    /// The available ring, for those who want to break it: flags, index, then the heads.
    pub fn available(&self) -> &Buffer {
        &self.available
    }

    /// The used ring.
    pub fn used(&self) -> &Buffer {
        &self.used
    }

    /// Links `parts` to a chain and makes it available; [`Self::notify`] tells the device.
    pub fn add(&mut self, parts: &[Descriptor]) -> Result<u16, Error> {
        if parts.is_empty() || parts.len() > usize::from(self.free) {
            return Err(Error::QueueFull);
        }
        let head = self.free_head;
        let mut index = head;
        for (position, part) in parts.iter().enumerate() {
            let following = self
                .descriptors
                .read16(usize::from(index) * DESCRIPTOR_SIZE + 14);
            let more = if position + 1 < parts.len() { NEXT } else { 0 };
            let linked = Descriptor {
                flags: part.flags | more,
                next: following,
                ..*part
            };
            linked.store(&self.descriptors, index);
            index = following;
        }
        self.free_head = index;
        self.free -= parts.len() as u16;
        self.publish(head);
        Ok(head)
    }

    /// Makes the chain that begins at `head` available, whatever is there.
    pub fn publish(&mut self, head: u16) {
        let slot = usize::from(self.next_available % self.size);
        self.available.write16(RING + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
        fence(Ordering::Release);
        self.available.write16(2, self.next_available);
    }

    /// Tells the device of new chains, if it wants to know.
    pub fn notify(&mut self) -> Result<(), Error> {
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self
                .used
                .read16(RING + USED_ELEMENT_SIZE * usize::from(self.size));
            let new = self.next_available.wrapping_sub(self.notified_available);
            self.next_available.wrapping_sub(event).wrapping_sub(1) < new
        } else {
            self.used.read16(0) & SUPPRESSED == 0
        };
        self.notified_available = self.next_available;
        if wanted { self.notify_always() } else { Ok(()) }
    }

    /// Tells the device, whether it wants to know or not.
    pub fn notify_always(&self) -> Result<(), Error> {
        self.notify.write16(0, self.index)
    }

    /// Asks for an interrupt for the next used chain, or for none for as long as possible.
    pub fn want_interrupt(&self, wanted: bool) {
        if self.event_index {
            let behind = self.next_used.wrapping_sub(1);
            let event = if wanted { self.next_used } else { behind };
            self.available
                .write16(RING + 2 * usize::from(self.size), event);
        } else {
            self.available
                .write16(0, if wanted { 0 } else { SUPPRESSED });
        }
        // The device must see this before the driver looks at the used ring again.
        fence(Ordering::SeqCst);
    }

    /// The next chain that the device has used; its descriptors are free again.
    pub fn take_used(&mut self) -> Result<Option<Used>, Error> {
        if self.used.read16(2) == self.next_used {
            return Ok(None);
        }
        fence(Ordering::Acquire);
        let slot = RING + USED_ELEMENT_SIZE * usize::from(self.next_used % self.size);
        let head = self.used.read32(slot);
        let written = self.used.read32(slot + 4);
        self.next_used = self.next_used.wrapping_add(1);
        let wrong = Error::Unexpected {
            what: "used chain's head",
            value: u64::from(head),
        };
        let head = u16::try_from(head)
            .ok()
            .filter(|head| *head < self.size)
            .ok_or(wrong)?;
        self.release(head);
        Ok(Some(Used { head, written }))
    }

    fn release(&mut self, head: u16) {
        let mut last = head;
        let mut count = 1;
        loop {
            let offset = usize::from(last) * DESCRIPTOR_SIZE;
            let linked = self.descriptors.read16(offset + 12) & NEXT != 0;
            if !linked || count >= self.size {
                break;
            }
            last = self.descriptors.read16(offset + 14);
            count += 1;
        }
        self.descriptors
            .write16(usize::from(last) * DESCRIPTOR_SIZE + 14, self.free_head);
        self.free_head = head;
        self.free = self.size.min(self.free + count);
    }
}
