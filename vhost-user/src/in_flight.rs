//! Ownership of what the kernel is working on.
//!
//! Between submission and completion the kernel reads and writes buffers behind Rust's back.
//! Everything it may touch (guest memory, iovec arrays, bounce buffers) is owned by the entries
//! of an [`InFlightTable`], and an entry can only be taken out by its completion.

use std::sync::Arc;

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::metrics::Completed;
use crate::transfer::Transfer;

/// What a submitted request is waiting for.
#[derive(Debug)]
pub(crate) enum Work {
    /// An fdatasync.
    Flush,
    /// A read or write, perhaps one of several parts.
    Transfer(Transfer),
}

/// One submitted request.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// The descriptor chain to hand back.
    pub head: u16,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// What the kernel does for it.
    pub work: Work,
}

impl InFlight {
    /// How to count it, and the data bytes that a success brought to the guest.
    pub fn outcome(&self) -> (Completed, u64) {
        match &self.work {
            Work::Flush => (Completed::Flush, 0),
            Work::Transfer(transfer) if transfer.is_write() => {
                (Completed::Write(transfer.len()), 0)
            }
            Work::Transfer(transfer) => (Completed::Read(transfer.len()), transfer.len()),
        }
    }
}

/// The requests of one queue that are with the kernel, and the guest memory they use.
#[derive(Debug)]
pub(crate) struct InFlightTable {
    memory: Option<Arc<GuestMemoryMmap>>,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    spare_iovecs: Vec<Vec<iovec>>,
}

impl InFlightTable {
    /// A table for up to `capacity` requests on `memory`.
    pub fn new(memory: Arc<GuestMemoryMmap>, capacity: usize) -> Self {
        Self {
            memory: Some(memory),
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
            spare_iovecs: Vec::new(),
        }
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is with the kernel.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Requests with the kernel.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// An empty iovec array, with the room of an earlier request.
    pub fn take_iovecs(&mut self) -> Vec<iovec> {
        self.spare_iovecs.pop().unwrap_or_default()
    }

    /// Gives an unused iovec array back.
    pub fn recycle(&mut self, mut iovecs: Vec<iovec>) {
        iovecs.clear();
        self.spare_iovecs.push(iovecs);
    }

    /// Takes a request in and returns its slot, or nothing if the table is full.
    pub fn insert(&mut self, request: InFlight) -> Option<usize> {
        let slot = self.free.pop()?;
        let entry = self.slots.get_mut(slot)?;
        *entry = Some(request);
        Some(slot)
    }

    /// The request in a slot.
    pub fn get_mut(&mut self, slot: usize) -> Option<&mut InFlight> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Takes out a request that the kernel has completed.
    pub fn finish(&mut self, slot: usize) -> Option<InFlight> {
        let request = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(request)
    }
}

impl Drop for InFlightTable {
    fn drop(&mut self) {
        if !self.is_empty() {
            // Only after a ring failed: freeing would let the kernel write into reused memory.
            tracing::error!(
                requests = self.len(),
                "leaking requests that never completed"
            );
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(self.memory.take());
        }
    }
}
