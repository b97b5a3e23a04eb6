//! A virtio device behind PCI: its registers, its negotiation, its queues' places and interrupts
//! (Virtio 1.3, 4.1).

use super::FEATURE_VERSION_1;
use super::queue::Queue;
use crate::clock::Deadline;
use crate::error::Error;
use crate::interrupts::{self, Vector};
use crate::mmio::Window;
use crate::pci::{Function, MessageInterrupts};

const VENDOR: u16 = 0x1af4;
/// Added to the virtio device type.
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// `struct virtio_pci_common_cfg` (4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// How long a reset may take: a backend may have to finish its requests first.
const RESET_MILLISECONDS: u64 = 5000;

/// A virtio device. When it is dropped it is reset, so it forgets all buffers.
pub struct Device {
    common: Window,
    notify: Window,
    notify_multiplier: u32,
    specific: Window,
    interrupts: MessageInterrupts,
    features: u64,
}

impl Device {
    /// The virtio device type of a PCI function, if it is a virtio device.
    pub fn kind(function: &Function) -> Result<Option<u16>, Error> {
        let (vendor, device) = function.identity()?;
        let modern = vendor == VENDOR && device > DEVICE_BASE;
        Ok(modern.then(|| device - DEVICE_BASE))
    }

    /// Finds the device's registers and resets it.
    pub fn open(function: Function) -> Result<Self, Error> {
        const COMMON: u8 = 1;
        const NOTIFY: u8 = 2;
        const SPECIFIC: u8 = 4;
        function.enable()?;
        let (common, _) = find(&function, COMMON)?;
        let (notify, notify_capability) = find(&function, NOTIFY)?;
        let (specific, _) = find(&function, SPECIFIC)?;
        let notify_multiplier = function.configuration().read32(notify_capability + 16)?;
        let interrupts = function.message_interrupts()?;
        let device = Self {
            common,
            notify,
            notify_multiplier,
            specific,
            interrupts,
            features: 0,
        };
        device.reset()?;
        Ok(device)
    }

    /// The device-specific registers.
    pub fn specific(&self) -> &Window {
        &self.specific
    }

    /// The common registers.
    pub fn common(&self) -> &Window {
        &self.common
    }

    /// The features both sides agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How many queues it has.
    pub fn queues(&self) -> Result<u16, Error> {
        self.common.read16(common::QUEUES)
    }

    /// Resets the device and waits until it says that it has.
    pub fn reset(&self) -> Result<(), Error> {
        self.common.write8(common::STATUS, 0)?;
        let deadline = Deadline::after_milliseconds(RESET_MILLISECONDS);
        while self.common.read8(common::STATUS)? != 0 {
            if deadline.passed() {
                return Err(Error::Timeout("end of the device's reset"));
            }
        }
        Ok(())
    }

    /// The features that the device offers.
    pub fn offered(&self) -> Result<u64, Error> {
        let mut features = 0;
        for half in 0..2 {
            self.common.write32(common::DEVICE_FEATURE_SELECT, half)?;
            let bits = self.common.read32(common::DEVICE_FEATURE)?;
            features |= u64::from(bits) << (32 * half);
        }
        Ok(features)
    }

    /// Takes those of the `wanted` features that the device offers (3.1.1, steps 2 to 6).
    pub fn negotiate(&mut self, wanted: u64) -> Result<(), Error> {
        self.common.write8(common::STATUS, ACKNOWLEDGE)?;
        self.common.write8(common::STATUS, ACKNOWLEDGE | DRIVER)?;
        let offered = self.offered()?;
        if offered & FEATURE_VERSION_1 == 0 {
            return Err(Error::Unexpected {
                what: "device features",
                value: offered,
            });
        }
        self.features = offered & (wanted | FEATURE_VERSION_1);
        for half in 0..2 {
            let bits = (self.features >> (32 * half)) & 0xffff_ffff;
            self.common.write32(common::DRIVER_FEATURE_SELECT, half)?;
            self.common.write32(common::DRIVER_FEATURE, bits as u32)?;
        }
        self.common
            .write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        let status = self.common.read8(common::STATUS)?;
        if status & FEATURES_OK == 0 {
            return Err(Error::Unexpected {
                what: "device status",
                value: u64::from(status),
            });
        }
        Ok(())
    }

    /// Sets a queue up with at most `limit` descriptors and an interrupt of its own.
    pub fn queue(&self, index: u16, limit: u16) -> Result<Queue, Error> {
        self.common.write16(common::QUEUE_SELECT, index)?;
        let size = self.common.read16(common::QUEUE_SIZE)?.min(limit);
        if !size.is_power_of_two() {
            return Err(Error::Unexpected {
                what: "queue size",
                value: u64::from(size),
            });
        }
        let offset = self.common.read16(common::QUEUE_NOTIFY_OFFSET)?;
        let offset = u64::from(offset) * u64::from(self.notify_multiplier);
        let notify = self.notify.slice(offset, 2)?;
        let vector = Vector::allocate()?;
        // Entry 0 is left for configuration changes.
        let entry = index + 1;
        if entry >= self.interrupts.entries() {
            return Err(Error::NoCapability("MSI-X entry for each queue"));
        }
        self.interrupts.route(entry, vector)?;
        let event_index = self.features & super::FEATURE_EVENT_INDEX != 0;
        let queue = Queue::new(index, size, notify, event_index)?;
        self.common.write16(common::QUEUE_SIZE, size)?;
        self.common.write16(common::QUEUE_VECTOR, entry)?;
        let routed = self.common.read16(common::QUEUE_VECTOR)?;
        if routed != entry {
            return Err(Error::Unexpected {
                what: "queue's MSI-X entry",
                value: u64::from(routed),
            });
        }
        self.write_address(common::QUEUE_DESCRIPTORS, queue.descriptors().address())?;
        self.write_address(common::QUEUE_DRIVER, queue.available().address())?;
        self.write_address(common::QUEUE_DEVICE, queue.used().address())?;
        self.common.write16(common::QUEUE_ENABLE, 1)?;
        Ok(queue)
    }

    /// An interrupt that says that the device-specific registers have changed (4.1.5.4). Until this is
    /// called the device keeps it to itself.
    pub fn configuration_changes(&self) -> Result<Vector, Error> {
        const ENTRY: u16 = 0;
        let vector = Vector::allocate()?;
        self.interrupts.route(ENTRY, vector)?;
        self.common.write16(common::CONFIG_VECTOR, ENTRY)?;
        let routed = self.common.read16(common::CONFIG_VECTOR)?;
        if routed != ENTRY {
            return Err(Error::Unexpected {
                what: "MSI-X entry of configuration changes",
                value: u64::from(routed),
            });
        }
        Ok(vector)
    }

    /// Lets the device begin (3.1.1, step 8).
    pub fn start(&self) -> Result<(), Error> {
        let status = self.common.read8(common::STATUS)?;
        self.common.write8(common::STATUS, status | DRIVER_OK)
    }

    /// Notifies queue 0, whether it is set up or not.
    pub fn notify_first(&self) -> Result<(), Error> {
        self.notify.write16(0, 0)
    }

    /// A field of 64 bits is written in halves (4.1.3.1).
    fn write_address(&self, register: u64, address: u64) -> Result<(), Error> {
        self.common
            .write32(register, (address & 0xffff_ffff) as u32)?;
        self.common.write32(register + 4, (address >> 32) as u32)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device that doesn't answer can't be helped here.
        let _ = self.reset();
    }
}

/// Waits until `ready` has something, halting between interrupts.
pub fn wait_for<T>(
    deadline: Deadline,
    what: &'static str,
    mut ready: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    loop {
        let seen = interrupts::total();
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if deadline.passed() {
            return Err(Error::Timeout(what));
        }
        deadline.wait(seen)?;
    }
}

/// The registers of one kind (4.1.4), and the offset of the capability that says where they are.
fn find(function: &Function, kind: u8) -> Result<(Window, u64), Error> {
    let configuration = function.configuration();
    for capability in function.capabilities(VENDOR_CAPABILITY) {
        if configuration.read8(capability + 3)? == kind {
            let bar = configuration.read8(capability + 4)?;
            let offset = configuration.read32(capability + 8)?;
            let length = configuration.read32(capability + 12)?;
            let window = function.window(bar, u64::from(offset), u64::from(length))?;
            return Ok((window, capability));
        }
    }
    Err(Error::NoCapability("virtio"))
}
