//! Virtio devices (virtio 1.2) on the PCI transport.

pub mod balloon;
pub mod block;
mod capabilities;
mod common_config;
pub mod console;
pub mod net;
mod persist;
mod queue;
pub mod rng;
mod served_queue;
mod transport;
mod used_ring;
pub mod vsock;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

pub use persist::FunctionState;
pub use queue::QueueLayout;
pub use transport::VirtioPci;
pub use used_ring::UsedRing;

/// `VIRTIO_F_VERSION_1`: the device is not a legacy one. All of ours demand it.
pub const FEATURE_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_F_EVENT_IDX`, also called `VIRTIO_RING_F_EVENT_IDX`.
pub const FEATURE_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_INDIRECT_DESC`, also called `VIRTIO_RING_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// `VIRTIO_CONFIG_S_NEEDS_RESET`.
const STATUS_NEEDS_RESET: u8 = 64;

/// A device behind a [`VirtioPci`]. Calls come from vCPU threads, one at a time.
pub trait VirtioDevice: Send {
    /// The device's type (virtio 1.2, 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The feature bits on offer.
    fn features(&self) -> u64;
    /// Reads the device-specific configuration; bytes beyond it are left as they are.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    /// Another number after each change of the device-specific configuration that the driver
    /// didn't make, so that it never takes half of one (virtio 1.2, 2.5.3).
    fn config_generation(&self) -> u8 {
        0
    }
    /// Writes the device-specific configuration. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: start to serve the queues.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError>;
    /// Stop to serve the queues; when this returns no buffer of the guest is touched any more.
    fn reset(&mut self);
    /// Stops to serve the queues as [`Self::reset`] does, with nothing lost: [`Self::activate`]
    /// with the same queues goes on. On an error the device still serves them.
    fn pause(&mut self) -> Result<(), String> {
        self.reset();
        Ok(())
    }
    /// What of the device itself a snapshot keeps.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes what [`Self::save`] gave, or says why this device can't go on from there.
    fn restore(&mut self, _state: &[u8]) -> Result<(), String> {
        Ok(())
    }
    /// Whether the device wants [`Self::notify`] of queue `index` instead of its kick event.
    fn handles_notifications(&self, _index: u16) -> bool {
        false
    }
    /// The driver notified queue `index`, on its vCPU's thread.
    fn notify(&mut self, _index: u16) {}
    /// Has all that is written into the guest's memory noted in this process's log, or no longer.
    fn note_writes(&mut self, _on: bool) -> Result<(), String> {
        Ok(())
    }
    /// Asks the driver for statistics, of a device that has any.
    fn ask_for_statistics(&mut self) {}
}

/// Why a device can't start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ActivationError(pub String);

impl ActivationError {
    /// For `map_err`, saying what was tried.
    pub fn of<E: std::fmt::Display>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |e| Self(format!("can't {step}: {e}"))
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The feature bits that the driver accepted.
    pub features: u64,
    /// The queues that the driver enabled, by index.
    pub queues: Vec<ActiveQueue>,
    /// How to say that the device is broken.
    pub health: DeviceHealth,
    /// The queues were served before: go on behind their used rings.
    pub resumed: bool,
}

/// A queue that the driver enabled.
pub struct ActiveQueue {
    /// Its index.
    pub index: u16,
    /// Where it is in guest memory, checked.
    pub layout: QueueLayout,
    /// Written by the driver's notifications.
    pub kick: EventFd,
    /// Writing it interrupts the driver.
    pub call: EventFd,
}

impl ActiveQueue {
    /// The same queue, with the same events.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            index: self.index,
            layout: self.layout,
            kick: self.kick.try_clone()?,
            call: self.call.try_clone()?,
        })
    }
}

/// Marks a device as needing a reset (virtio 1.2, 2.1.2).
#[derive(Debug, Clone)]
pub struct DeviceHealth {
    status: Arc<AtomicU8>,
    config_event: Arc<EventFd>,
}

impl DeviceHealth {
    /// Of a device without a transport.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of(config_event: EventFd) -> Self {
        Self {
            status: Arc::default(),
            config_event: Arc::new(config_event),
        }
    }

    /// Sets `DEVICE_NEEDS_RESET` and interrupts the driver.
    pub fn needs_reset(&self) {
        self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        // Fails only with the event's counter at its maximum.
        let _ = self.config_event.write(1);
    }

    /// Tells the driver that the device-specific configuration has changed (virtio 1.2, 4.1.5.4).
    pub fn config_changed(&self) {
        // As above.
        let _ = self.config_event.write(1);
    }
}
