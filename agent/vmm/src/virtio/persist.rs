//! A virtio PCI function paused, saved and restored.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};

use super::common_config::CommonState;
use super::{STATUS_NEEDS_RESET, VirtioPci};
use crate::pci::msix::MsixState;

/// A function's state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FunctionState {
    name: String,
    device_type: u32,
    /// The configuration space's registers.
    registers: Vec<u8>,
    common: CommonState,
    msix: MsixState,
    status: u8,
    /// The driver was ready.
    active: bool,
    /// The device's own state.
    device: Vec<u8>,
}

impl FunctionState {
    /// The device's name in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's type (virtio 1.2, 5).
    pub const fn device_type(&self) -> u32 {
        self.device_type
    }
}

impl VirtioPci {
    /// The device's name in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's type (virtio 1.2, 5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// Whether the device may be removed while the guest runs: disks and interfaces.
    pub fn is_removable(&self) -> bool {
        matches!(self.device.device_type(), VIRTIO_ID_BLOCK | VIRTIO_ID_NET)
    }

    /// Stops the device between two requests. The vCPUs are paused. On an error it still works.
    pub fn pause(&mut self) -> Result<(), String> {
        if self.serves() {
            self.device.pause()?;
        }
        Ok(())
    }

    /// Lets a paused or restored device go on.
    pub fn resume(&mut self) {
        if !self.serves() {
            return;
        }
        if let Err(e) = self.activate(true) {
            tracing::warn!("{}: the device can't go on: {e}", self.name);
            return self.health().needs_reset();
        }
        // A notification or an interrupt may have been on its way: both are free to come again.
        for event in self.kicks.iter().chain(&self.calls) {
            let _ = event.write(1);
        }
        for index in (0u16..).take(self.kicks.len()) {
            if self.device.handles_notifications(index) {
                self.device.notify(index);
            }
        }
    }

    /// Has the device write memory only where that is noted, or as it likes.
    pub fn note_writes(&mut self, on: bool) -> Result<(), String> {
        self.device.note_writes(on)
    }

    /// Asks the driver for statistics, of a device that has any.
    pub fn ask_for_statistics(&mut self) {
        if self.serves() {
            self.device.ask_for_statistics();
        }
    }

    /// The state of a paused function.
    pub fn save(&self) -> FunctionState {
        FunctionState {
            name: self.name.clone(),
            device_type: self.device.device_type(),
            registers: self.config.bytes().to_vec(),
            common: self.common.save(),
            msix: self.msix.save(),
            status: self.status.load(Ordering::Acquire),
            active: self.active,
            device: self.device.save(),
        }
    }

    /// Gives a function that no driver has touched yet the state of one that was saved; it stays
    /// paused.
    pub fn restore(&mut self, state: &FunctionState) -> Result<(), String> {
        if state.name != self.name || state.device_type != self.device.device_type() {
            return Err(format!(
                "the snapshot has the device {} (virtio type {}) in its place",
                state.name, state.device_type
            ));
        }
        self.device.restore(&state.device)?;
        self.common.restore(&state.common)?;
        // Only what a driver can write is taken over.
        self.config.write(0, &state.registers);
        let control = self.config.read_u16(self.capabilities.msix_control);
        self.msix.restore(&state.msix, control)?;
        self.status.store(state.status, Ordering::Release);
        self.active = state.active;
        Ok(())
    }

    /// Whether the device serves its driver's queues.
    fn serves(&self) -> bool {
        self.active && self.status.load(Ordering::Acquire) & STATUS_NEEDS_RESET == 0
    }
}
