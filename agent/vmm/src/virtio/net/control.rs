//! The control queue (virtio 1.2, 5.1.6.5): here it only says how many queue pairs the driver uses.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// The control queue of a ready driver.
pub struct ControlQueue {
    queue: Queue,
    memory: GuestMemory,
    call: EventFd,
}

impl ControlQueue {
    /// `queue` is checked and ready; `call` interrupts the driver.
    pub const fn new(queue: Queue, memory: GuestMemory, call: EventFd) -> Self {
        Self {
            queue,
            memory,
            call,
        }
    }

    /// Takes at most a queue's worth of commands: the driver's next notification brings the others.
    /// `use_pairs` does what one asks for and says whether it could.
    pub fn serve(&mut self, mut use_pairs: impl FnMut(u16) -> bool) -> Result<(), Error> {
        let memory = Arc::clone(&self.memory);
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.iter(Arc::clone(&memory))?.next() else {
                // Asks for the next notification; a command that came just before has none.
                if self.queue.enable_notification(&*memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let done = requested_pairs(&memory, chain.clone()).is_some_and(&mut use_pairs);
            let written = acknowledge(&memory, chain, done);
            self.queue.add_used(&*memory, head, written)?;
        }
        if self.queue.needs_notification(&*memory)? {
            // Fails only with the event's counter at its maximum.
            let _ = self.call.write(1);
        }
        Ok(())
    }
}

/// The number of pairs that a command asks for; `None` of any other command.
fn requested_pairs(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>) -> Option<u16> {
    const SET: [u8; 2] = [
        VIRTIO_NET_CTRL_MQ.to_le_bytes()[0],
        VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.to_le_bytes()[0],
    ];
    let mut command = chain.reader(memory).ok()?;
    let code: [u8; 2] = command.read_obj().ok()?;
    let count: [u8; 2] = command.read_obj().ok()?;
    (code == SET).then(|| u16::from_le_bytes(count))
}

/// Writes the command's answer; returns how many bytes that are.
fn acknowledge(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>, done: bool) -> u32 {
    let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let written = chain
        .writer(memory)
        .ok()
        .and_then(|mut writer| writer.write_obj(answer.to_le_bytes()[0]).ok());
    u32::from(written.is_some())
}
