//! The PCI transport of a virtio device (virtio 1.2, 4.1): modern only, with MSI-X.
//!
//! BAR 0 has a page for each structure:
//!
//! ```text
//! 0x0000  common configuration
//! 0x1000  ISR status
//! 0x2000  device-specific configuration
//! 0x3000  notifications, 4 bytes a queue
//! 0x4000  MSI-X table
//! 0x5000  MSI-X pending bits
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common_config::{
    self, CommonConfig, CommonWrite, Registers, STATUS_DRIVER_OK, STATUS_FEATURES_OK,
};
use super::{
    Activation, ActivationError, ActiveQueue, DeviceHealth, STATUS_NEEDS_RESET, VirtioDevice,
    capabilities,
};
use crate::error::VmmError;
use crate::interrupts::{EventWiring, InterruptRouter};
use crate::memory::GuestMemory;
use crate::pci::msix::Msix;
use crate::pci::{BarWindow, ConfigSpace, Identity, PciFunction};

/// Bytes of BAR 0.
pub(super) const BAR_BYTES: u32 = 0x8000;
pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const TABLE: u64 = 0x4000;
pub(super) const PENDING: u64 = 0x5000;
pub(super) const PAGE: u64 = 0x1000;
/// Bytes between two queues' doorbells.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// The vendor id of virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device ids of modern devices start here (virtio 1.2, 4.1.2).
const DEVICE_ID_BASE: u16 = 0x1040;
/// The MSI-X source of configuration changes; queue `i` is source `i + 1`.
const CONFIG_SOURCE: usize = 0;

/// One virtio device as a PCI function.
pub struct VirtioPci {
    pub(super) name: String,
    pub(super) config: ConfigSpace,
    pub(super) capabilities: capabilities::Offsets,
    pub(super) common: CommonConfig,
    pub(super) msix: Msix,
    pub(super) device: Box<dyn VirtioDevice>,
    vm: Arc<dyn EventWiring>,
    memory: GuestMemory,
    /// Shared with the device's threads, which may set `DEVICE_NEEDS_RESET`.
    pub(super) status: Arc<AtomicU8>,
    config_event: Arc<EventFd>,
    pub(super) kicks: Vec<EventFd>,
    pub(super) calls: Vec<EventFd>,
    pub(super) active: bool,
    /// Where the kick events are registered with KVM.
    doorbells: Option<u64>,
}

impl VirtioPci {
    /// Bytes of BAR 0, which is aligned to them.
    pub const BAR_BYTES: u32 = BAR_BYTES;

    /// Wraps `device`, whose BAR 0 starts out at `base`. `class` is the PCI class code.
    pub fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        class: u32,
        base: u32,
        (vm, router, memory): (&Arc<dyn EventWiring>, &Arc<InterruptRouter>, &GuestMemory),
    ) -> Result<Self, VmmError> {
        let queues = device.queue_sizes().len();
        let config_event = event()?;
        let kicks = (0..queues)
            .map(|_| event())
            .collect::<Result<Vec<_>, _>>()?;
        let calls = (0..queues)
            .map(|_| event())
            .collect::<Result<Vec<_>, _>>()?;
        let mut sources = vec![clone(&config_event)?];
        for call in &calls {
            sources.push(clone(call)?);
        }
        let msix = Msix::new(Arc::clone(router), sources)?;
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + u16::try_from(device.device_type() & 0x3f).unwrap_or(0),
            revision: 1,
            class,
        };
        let mut config = ConfigSpace::new(identity);
        config.set_bar0(base, BAR_BYTES);
        let capabilities = capabilities::add(&mut config, msix.vectors(), queues);
        let common = CommonConfig::new(device.features(), device.queue_sizes());
        Ok(Self {
            name,
            config,
            capabilities,
            common,
            msix,
            device,
            vm: Arc::clone(vm),
            memory: Arc::clone(memory),
            status: Arc::new(AtomicU8::new(0)),
            config_event: Arc::new(config_event),
            kicks,
            calls,
            active: false,
            doorbells: None,
        })
    }

    /// How to say from outside that the device is broken.
    pub fn health(&self) -> DeviceHealth {
        DeviceHealth {
            status: Arc::clone(&self.status),
            config_event: Arc::clone(&self.config_event),
        }
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let queue = usize::from(self.common.selected());
        let registers = Registers {
            status: self.status.load(Ordering::Acquire),
            config_vector: self.msix.vector(CONFIG_SOURCE),
            queue_vector: self.msix.vector(queue + 1),
            config_generation: self.device.config_generation(),
        };
        self.common.read(offset, data, registers);
    }

    fn common_write(&mut self, offset: u64, data: &[u8]) {
        let negotiating = self.status.load(Ordering::Acquire) & STATUS_FEATURES_OK == 0;
        match self.common.write(offset, data, negotiating) {
            CommonWrite::Done => {}
            CommonWrite::ConfigVector(vector) => self.msix.set_vector(CONFIG_SOURCE, vector),
            CommonWrite::QueueVector(queue, vector) => {
                self.msix.set_vector(usize::from(queue) + 1, vector);
            }
            CommonWrite::Status(status) => self.write_status(status),
        }
    }

    fn write_status(&mut self, mut status: u8) {
        if status == 0 {
            return self.reset();
        }
        let old = self.status.load(Ordering::Acquire);
        // The driver sees whether its features are taken by this bit staying (virtio 1.2, 3.1.1).
        let settles = status & STATUS_FEATURES_OK != 0 && old & STATUS_FEATURES_OK == 0;
        if settles && !self.common.features_are_valid() {
            status &= !STATUS_FEATURES_OK;
        }
        // NEEDS_RESET is the device's to set, and only a reset clears it.
        let kept = self.status.fetch_and(STATUS_NEEDS_RESET, Ordering::AcqRel) & STATUS_NEEDS_RESET;
        self.status
            .store(status & !STATUS_NEEDS_RESET | kept, Ordering::Release);
        let ready = STATUS_DRIVER_OK | STATUS_FEATURES_OK;
        if status & ready == ready && !self.active {
            self.active = true;
            if let Err(e) = self.activate(false) {
                tracing::warn!("{}: the device can't start: {e}", self.name);
                self.health().needs_reset();
            }
        }
    }

    pub(super) fn activate(&mut self, resumed: bool) -> Result<(), ActivationError> {
        let mut queues = Vec::new();
        for (index, queue) in (0u16..).zip(&self.common.queues) {
            if !queue.enabled {
                continue;
            }
            queue.layout.check(&self.memory).map_err(ActivationError)?;
            let slot = usize::from(index);
            let (Some(kick), Some(call)) = (self.kicks.get(slot), self.calls.get(slot)) else {
                continue;
            };
            queues.push(ActiveQueue {
                index,
                layout: queue.layout,
                kick: kick
                    .try_clone()
                    .map_err(ActivationError::of("share an eventfd"))?,
                call: call
                    .try_clone()
                    .map_err(ActivationError::of("share an eventfd"))?,
            });
        }
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: self.common.driver_features,
            queues,
            health: self.health(),
            resumed,
        })?;
        self.update_doorbells();
        Ok(())
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.update_doorbells();
        self.common.reset();
        self.msix.reset_sources();
        for kick in &self.kicks {
            // Says EAGAIN if the driver notified nothing.
            let _ = kick.read();
        }
        self.status.store(0, Ordering::Release);
    }

    /// Lets KVM write the kick events itself where the notification structure is decoded.
    fn update_doorbells(&mut self) {
        let wanted = self
            .active
            .then(|| self.config.bar0())
            .flatten()
            .map(|base| u64::from(base) + NOTIFY);
        if wanted == self.doorbells {
            return;
        }
        if let Some(base) = self.doorbells.take() {
            for (kick, address) in self.rung_kicks(base) {
                // Any length: the driver may write the queue's index with 16 bits or 32.
                if let Err(e) = self.vm.unring(kick, address) {
                    tracing::debug!("{}: a doorbell can't be removed: {e}", self.name);
                }
            }
        }
        if let Some(base) = wanted {
            for (kick, address) in self.rung_kicks(base) {
                // Where KVM refuses, as for two devices at one address, the exit does the work.
                if let Err(e) = self.vm.ring(kick, address) {
                    tracing::debug!("{}: a doorbell needs an exit: {e}", self.name);
                }
            }
            self.doorbells = Some(base);
        }
    }

    /// The kick events that KVM writes, and where their doorbells are.
    fn rung_kicks(&self, base: u64) -> impl Iterator<Item = (&EventFd, u64)> {
        let doorbells = (base..).step_by(NOTIFY_MULTIPLIER as usize);
        (0u16..)
            .zip(&self.kicks)
            .zip(doorbells)
            .filter(|((index, _), _)| !self.device.handles_notifications(*index))
            .map(|((_, kick), address)| (kick, address))
    }

    /// A notification that reached user space.
    fn notify(&mut self, offset: u64) {
        let queue = offset / u64::from(NOTIFY_MULTIPLIER);
        let Ok(queue) = u16::try_from(queue) else {
            return;
        };
        if !self.active {
            return;
        }
        if self.device.handles_notifications(queue) {
            self.device.notify(queue);
        } else if let Some(kick) = self.kicks.get(usize::from(queue)) {
            // Fails only with the event's counter at its maximum.
            let _ = kick.write(1);
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((offset, length)) = self.capabilities.window(&self.config, offset, data.len()) {
            return self.bar_read(offset, &mut data[..length]);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if let Some((offset, length)) = self.capabilities.window(&self.config, offset, data.len()) {
            return self.bar_write(offset, &data[..length]);
        }
        self.config.write(offset, data);
        self.msix
            .set_control(self.config.read_u16(self.capabilities.msix_control));
        self.update_doorbells();
    }

    fn window(&self) -> Option<BarWindow> {
        self.config.bar0_window()
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.common_read(within, data),
            // Interrupts are by MSI-X only, so the ISR status has nothing to say.
            DEVICE => self.device.read_config(within, data),
            TABLE => self.msix.table_read(within, data),
            PENDING => self.msix.pending_read(within, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON if within < common_config::BYTES => self.common_write(within, data),
            DEVICE => self.device.write_config(within, data),
            NOTIFY => self.notify(within),
            TABLE => self.msix.table_write(within, data),
            _ => {}
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        if self.active {
            // The machine may go on without it, so its doorbells must not be left with KVM.
            self.reset();
        }
    }
}

fn event() -> Result<EventFd, VmmError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("create an eventfd"))
}

fn clone(event: &EventFd) -> Result<EventFd, VmmError> {
    event.try_clone().map_err(VmmError::os("share an eventfd"))
}
