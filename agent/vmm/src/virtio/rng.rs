//! The entropy device (virtio 1.2, 5.4).
//!
//! It is asked for a few bytes at boot and then rarely, so it works on the notifying vCPU's thread
//! and needs no thread of its own.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use super::served_queue::{Broken, ServedQueue};
use super::{
    Activation, ActivationError, DeviceHealth, FEATURE_EVENT_IDX, FEATURE_INDIRECT,
    FEATURE_VERSION_1, VirtioDevice,
};
use crate::memory::GuestMemory;

const QUEUE_SIZES: [u16; 1] = [64];
/// What one request gets at most, so that a guest can't keep its vCPU's thread here for long.
const MAX_BYTES: usize = 4096;

/// Gives the guest bytes of the host kernel's generator.
#[derive(Default)]
pub struct Rng {
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    queue: ServedQueue,
    health: DeviceHealth,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT
    }

    fn read_config(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let event_idx = activation.features & FEATURE_EVENT_IDX != 0;
        let Some(active) = activation.queues.into_iter().next() else {
            return Ok(());
        };
        let queue = ServedQueue::open(active, &activation.memory, event_idx)?;
        let (memory, health) = (activation.memory, activation.health);
        self.active = Some(Active {
            memory,
            queue,
            health,
        });
        // Requests may be there already, notified while the device wasn't active.
        self.notify(0);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn handles_notifications(&self, _index: u16) -> bool {
        true
    }

    fn notify(&mut self, _index: u16) {
        if let Some(active) = &mut self.active
            && let Err(e) = active.serve()
        {
            tracing::warn!("the guest's entropy queue is broken: {e}");
            active.health.needs_reset();
            self.active = None;
        }
    }
}

impl Active {
    fn serve(&mut self) -> Result<(), Broken> {
        let mut random = [0; MAX_BYTES];
        let memory = &self.memory;
        self.queue.serve(|chain| {
            let mut given = 0;
            for descriptor in chain.writable() {
                let length = (descriptor.len() as usize).min(MAX_BYTES - given);
                let bytes = &mut random[..length];
                if length == 0 || !fill_random(bytes) {
                    break;
                }
                if memory.write_slice(bytes, descriptor.addr()).is_err() {
                    break;
                }
                given += length;
            }
            u32::try_from(given).unwrap_or(0)
        })?;
        Ok(())
    }
}

/// Fills `bytes` without ever blocking: the host's generator is seeded long before guests run.
fn fill_random(bytes: &mut [u8]) -> bool {
    // SAFETY: the pointer and length are those of `bytes`.
    let written =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    usize::try_from(written) == Ok(bytes.len())
}
