//! The device's side of one split virtqueue (virtio 1.2, 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::descriptor_chain::{ChainError, DescriptorTable};
use crate::request::RequestError;

/// Why a queue can't go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring itself is wrong: addresses, size, or an available index that runs ahead.
    #[error("the ring is invalid: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The rings aren't all in guest memory.
    #[error("a ring lies outside guest memory")]
    OutsideMemory,
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
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    table: DescriptorTable,
    available_ring: GuestAddress,
    unannounced: bool,
}

impl Virtqueue {
    /// Checks the setup against the guest's memory and goes on from where the rings stand.
    pub fn new(setup: VirtqueueSetup, memory: Arc<GuestMemoryMmap>) -> Result<Self, QueueError> {
        let mut queue = Queue::new(setup.size)?;
        queue.try_set_desc_table_address(setup.descriptor_table)?;
        queue.try_set_avail_ring_address(setup.available_ring)?;
        queue.try_set_used_ring_address(setup.used_ring)?;
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.next_available);
        queue.set_ready(true);
        if !queue.is_valid(&*memory) {
            return Err(QueueError::OutsideMemory);
        }
        let next_used = queue.used_idx(&*memory, Ordering::Acquire)?;
        queue.set_next_used(next_used.0);
        Ok(Self {
            table: DescriptorTable {
                address: setup.descriptor_table,
                size: u32::from(setup.size),
                indirect: setup.indirect,
            },
            available_ring: setup.available_ring,
            queue,
            memory,
            unannounced: false,
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
        self.queue.next_avail()
    }

    /// Takes the next available chain's head, if there is one.
    pub fn pop(&mut self) -> Result<Option<u16>, QueueError> {
        let chain = self.queue.iter(&*self.memory)?.next();
        Ok(chain.map(|chain| chain.head_index()))
    }

    /// Asks the driver for kicks again. True if requests came in meanwhile.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }

    /// Tells the driver that it may save its kicks.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Hands a chain back with the number of bytes written into it.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&*self.memory, head, written)?;
        self.unannounced = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was handed back since the last call.
    pub fn take_notification(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.unannounced) {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(self.queue.needs_notification(&*self.memory)?);
        }
        // The used index must be visible before the driver's wish is read (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(self.available_ring, Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
