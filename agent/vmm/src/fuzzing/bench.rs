//! A machine without KVM: the platform, and PCI functions that are served without threads of their
//! own.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::KvmIrqRouting;
use vmm_sys_util::eventfd::EventFd;

use super::rings;
use crate::boot::layout;
use crate::config::BalloonConfig;
use crate::console::ConsoleOutput;
use crate::devices::hotplug::HotplugRegisters;
use crate::devices::legacy::Clock;
use crate::devices::panic::PanicDevice;
use crate::devices::power::Power;
use crate::devices::serial::SerialPort;
use crate::devices::watchdog::Watchdog;
use crate::interrupts::{EventWiring, InterruptRouter};
use crate::isolation::seccomp::Mode;
use crate::memory::GuestMemory;
use crate::pci::PciBus;
use crate::platform::Platform;
use crate::virtio::balloon::{Balloon, BalloonControl};
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioDevice, VirtioPci};

/// Nothing is wired: what devices signal stays in their eventfds.
#[derive(Debug)]
struct Unwired;

impl EventWiring for Unwired {
    fn route(&self, _table: &KvmIrqRouting) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }

    fn connect(&self, _event: &EventFd, _gsi: u32) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }

    fn disconnect(&self, _event: &EventFd, _gsi: u32) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }

    fn ring(&self, _event: &EventFd, _address: u64) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }

    fn unring(&self, _event: &EventFd, _address: u64) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }
}

/// The machine.
pub struct Bench {
    pub memory: GuestMemory,
    pub platform: Platform,
    /// In slots 1 and 2: the entropy device and the balloon.
    pub virtio: Vec<Arc<Mutex<VirtioPci>>>,
    wiring: Arc<dyn EventWiring>,
    router: Arc<InterruptRouter>,
    /// The slots that the guest has let go of.
    pub gone: Arc<Mutex<Vec<u8>>>,
}

/// Slots of the functions that are not virtio.
const PANIC_SLOT: u8 = 3;
pub const WATCHDOG_SLOT: u8 = 4;
/// Devices come and go in the slots behind.
pub const FREE_SLOTS: std::ops::RangeInclusive<u8> = 5..=7;

impl Bench {
    pub fn new() -> Self {
        let memory = rings::memory();
        let wiring: Arc<dyn EventWiring> = Arc::new(Unwired);
        let router = InterruptRouter::new(Arc::clone(&wiring)).expect("no KVM, no error");
        let router = Arc::new(router);
        let console = Arc::new(ConsoleOutput::new().expect("an eventfd"));
        let gone = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&gone);
        let platform = Platform {
            serial: SerialPort::new(&router, &console, None).expect("an eventfd"),
            power: Power::new(&router).expect("an eventfd"),
            pci: PciBus::new(),
            clock: Mutex::new(Clock::default()),
            hotplug: HotplugRegisters::default(),
            ejected: Arc::new(move |slot| {
                let mut gone = told.lock().unwrap_or_else(PoisonError::into_inner);
                gone.push(slot);
            }),
        };
        let control = Arc::new(BalloonControl::new(3));
        let devices: [(&str, Box<dyn VirtioDevice>); 2] = [
            ("rng", Box::new(Rng::default())),
            (
                "balloon",
                Box::new(Balloon::new(&BalloonConfig::default(), control)),
            ),
        ];
        let mut virtio = Vec::new();
        for (slot, (name, device)) in (1..).zip(devices) {
            let parts = (&wiring, &router, &memory);
            let function = VirtioPci::new(name.to_owned(), device, 0xff_0000, bar(slot), parts);
            let function = Arc::new(Mutex::new(function.expect("eventfds")));
            platform.pci.insert(slot.into(), Arc::clone(&function) as _);
            virtio.push(function);
        }
        let panic = PanicDevice::new(bar(PANIC_SLOT), Box::new(|_| {}));
        platform
            .pci
            .insert(PANIC_SLOT.into(), Arc::new(Mutex::new(panic)));
        let watchdog = Watchdog::new(bar(WATCHDOG_SLOT), Box::new(|| {}), Mode::Off);
        let watchdog = watchdog.expect("a thread");
        platform
            .pci
            .insert(WATCHDOG_SLOT.into(), Arc::new(Mutex::new(watchdog)));
        Self {
            memory,
            platform,
            virtio,
            wiring,
            router,
            gone,
        }
    }
}

impl Bench {
    /// Puts another entropy device into a slot, if it is free.
    pub fn plug(&self, slot: u8) {
        let parts = (&self.wiring, &self.router, &self.memory);
        let device = Box::new(Rng::default());
        let function = VirtioPci::new("new".to_owned(), device, 0xff_0000, bar(slot), parts);
        let function = Arc::new(Mutex::new(function.expect("eventfds")));
        if self.platform.pci.insert(slot.into(), function) {
            self.platform.hotplug.insert(slot);
        }
    }
}

/// Where the BAR of the function in `slot` is at first.
pub fn bar(slot: u8) -> u32 {
    let address = layout::PCI_WINDOW + u64::from(slot) * u64::from(VirtioPci::BAR_BYTES);
    u32::try_from(address).expect("the window is below 4 GiB")
}
