//! The panic device (pvpanic-pci; QEMU, docs/specs/pvpanic.rst): the guest's kernel tells of its end.
//!
//! BAR 0 has one register of one byte, whose bits are events: reading says which there are, writing
//! one tells that it happened. Stock kernels have the driver (`CONFIG_PVPANIC_PCI`).

use crate::pci::{BarWindow, ConfigSpace, Identity, PciFunction};

/// Red Hat's number of the device; class 0880 is a system peripheral.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    revision: 1,
    class: 0x08_8000,
};
/// A page, so that nothing else of the guest's is in the same one.
const BAR_BYTES: u32 = 0x1000;
const EVENT_PANICKED: u8 = 1;
const EVENT_CRASH_LOADED: u8 = 1 << 1;

/// What the guest's kernel told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPanic {
    /// It panicked.
    Panicked,
    /// It panicked, and runs its crash kernel now.
    CrashLoaded,
}

/// Who is told.
pub type PanicReporter = Box<dyn Fn(GuestPanic) + Send>;

/// The device.
pub struct PanicDevice {
    config: ConfigSpace,
    report: PanicReporter,
    /// The events that were told already: each is news once.
    told: u8,
}

impl PanicDevice {
    /// A device whose BAR 0 starts out at `base`.
    pub fn new(base: u32, report: PanicReporter) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.set_bar0(base, BAR_BYTES);
        Self {
            config,
            report,
            told: 0,
        }
    }

    /// The configuration registers.
    pub fn save(&self) -> Vec<u8> {
        self.config.bytes().to_vec()
    }

    /// Takes what [`Self::save`] gave.
    pub fn restore(&mut self, registers: &[u8]) {
        // Only what a driver can write is taken over.
        self.config.write(0, registers);
    }
}

impl PciFunction for PanicDevice {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn window(&self) -> Option<BarWindow> {
        self.config.bar0_window()
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(events)) = (offset, data.first_mut()) {
            *events = EVENT_PANICKED | EVENT_CRASH_LOADED;
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let (0, Some(events)) = (offset, data.first()) else {
            return;
        };
        let news = events & !self.told;
        self.told |= events;
        if news & EVENT_PANICKED != 0 {
            (self.report)(GuestPanic::Panicked);
        }
        if news & EVENT_CRASH_LOADED != 0 {
            (self.report)(GuestPanic::CrashLoaded);
        }
    }
}
