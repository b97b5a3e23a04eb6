//! A virtqueue that is served on the thread that was notified, chain by chain.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivationError, ActiveQueue};
use crate::memory::GuestMemory;

/// Why the device can't go on: the driver broke the rules.
pub(super) type Broken = virtio_queue::Error;

/// Whether all was taken that there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The driver notifies when there is more.
    Done,
    /// There may be more, of which no notification comes.
    More,
}

/// The queue, in the memory of its guest.
pub(super) struct ServedQueue {
    /// Its number.
    pub(super) index: u16,
    queue: Queue,
    memory: GuestMemory,
    call: EventFd,
}

impl ServedQueue {
    /// The queue as its driver set it up; it goes on behind its used ring.
    pub(super) fn open(
        active: ActiveQueue,
        memory: &GuestMemory,
        event_idx: bool,
    ) -> Result<Self, ActivationError> {
        let queue = active.layout.open(active.index, memory, event_idx);
        Ok(Self {
            index: active.index,
            queue: queue.map_err(|e| ActivationError(e.to_string()))?,
            memory: Arc::clone(memory),
            call: active.call,
        })
    }

    /// Its descriptors, and so the most chains that can wait in it at a time.
    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes at most a queue's worth of chains, and gives each back with the bytes that `each` wrote.
    pub(super) fn serve(
        &mut self,
        mut each: impl FnMut(DescriptorChain<GuestMemory>) -> u32,
    ) -> Result<Turn, Broken> {
        let mut turn = Turn::More;
        for _ in 0..self.size() {
            let Some(chain) = self.pop()? else {
                turn = Turn::Done;
                break;
            };
            let head = chain.head_index();
            let written = each(chain);
            self.put(head, written)?;
        }
        self.finish()?;
        Ok(turn)
    }

    /// The next chain; if there is none, the driver is asked to notify of the next.
    pub(super) fn pop(&mut self) -> Result<Option<DescriptorChain<GuestMemory>>, Broken> {
        // One that came just before it was asked has no notification.
        for _ in 0..2 {
            if let Some(chain) = self.queue.iter(Arc::clone(&self.memory))?.next() {
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification(&*self.memory)? {
                break;
            }
        }
        Ok(None)
    }

    /// Gives a chain back, with so many bytes written.
    pub(super) fn put(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.queue.add_used(&*self.memory, head, written)
    }

    /// Interrupts the driver, if it wants to know of what it got back.
    pub(super) fn finish(&mut self) -> Result<(), Broken> {
        if self.queue.needs_notification(&*self.memory)? {
            // Fails only with the event's counter at its maximum.
            let _ = self.call.write(1);
        }
        Ok(())
    }
}
