//! The PCI bus's slots, and what is in them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Distress, HostResources, Reporters};
use crate::boot::layout;
use crate::config::GuestConfig;
use crate::devices::panic::PanicDevice;
use crate::devices::watchdog::Watchdog;
use crate::error::VmmError;
use crate::interrupts::{EventWiring, InterruptRouter};
use crate::memory::GuestMemory;
use crate::migration::DiskIdentity;
use crate::pci::{PciBus, PciFunction};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, DiskLink};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{VirtioDevice, VirtioPci};

/// PCI class codes: mass storage, Ethernet, and a device that fits no class.
const CLASS_STORAGE: u32 = 0x01_8000;
const CLASS_ETHERNET: u32 = 0x02_0000;
const CLASS_OTHER: u32 = 0xff_0000;
#[allow(clippy::cast_possible_truncation, reason = "the window is below 4 GiB")]
const PCI_WINDOW: u32 = layout::PCI_WINDOW as u32;

/// The functions of one boot of the guest.
#[derive(Default)]
pub struct Functions {
    /// The virtio devices, by slot.
    pub virtio: Vec<Arc<Mutex<VirtioPci>>>,
    /// The panic device, if the guest has one.
    pub panic: Option<Arc<Mutex<PanicDevice>>>,
    /// The watchdog, if the guest has one.
    pub watchdog: Option<Arc<Mutex<Watchdog>>>,
}

impl Functions {
    /// The panic device, to be saved or restored.
    pub fn panic(&self) -> Option<MutexGuard<'_, PanicDevice>> {
        let device = self.panic.as_ref()?;
        Some(device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The watchdog, to be paused, saved or restored.
    pub fn watchdog(&self) -> Option<MutexGuard<'_, Watchdog>> {
        let device = self.watchdog.as_ref()?;
        Some(device.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Puts devices into the PCI bus's slots, in order.
pub struct SlotBuilder<'a> {
    bus: &'a PciBus,
    next: u32,
    vm: &'a Arc<dyn EventWiring>,
    router: Arc<InterruptRouter>,
    memory: &'a GuestMemory,
    functions: Functions,
}

impl<'a> SlotBuilder<'a> {
    /// A bus that has its host bridge only.
    pub fn new(
        bus: &'a PciBus,
        vm: &'a Arc<dyn EventWiring>,
        router: Arc<InterruptRouter>,
        memory: &'a GuestMemory,
    ) -> Self {
        Self {
            bus,
            next: 1,
            vm,
            router,
            memory,
            functions: Functions::default(),
        }
    }

    /// What was added.
    pub fn finish(self) -> Functions {
        self.functions
    }

    /// The entropy device, the disks, the interfaces, and the other devices of the configuration;
    /// returns the disks' connections. Disks that are `known` are connected later.
    pub fn add_all(
        &mut self,
        host: &HostResources,
        config: &GuestConfig,
        known: Option<&[DiskIdentity]>,
        reporters: &Reporters,
    ) -> Result<Vec<Arc<DiskLink>>, VmmError> {
        self.add("rng", Box::new(Rng::default()), CLASS_OTHER)?;
        let mut disks = Vec::with_capacity(config.disks.len());
        for (index, disk) in config.disks.iter().enumerate() {
            let block = match known.and_then(|known| known.get(index)) {
                Some(identity) => Block::apart(disk, identity)?,
                None => Block::connect(disk)?,
            };
            disks.push(block.link());
            self.add(&disk.id, Box::new(block), CLASS_STORAGE)?;
        }
        for (interface, tap) in config.interfaces.iter().zip(&host.taps) {
            let net = Net::new(interface, Arc::clone(tap), host.seccomp);
            self.add(&interface.id, Box::new(net), CLASS_ETHERNET)?;
        }
        if let Some(balloon) = &config.balloon {
            let balloon = Balloon::new(balloon, Arc::clone(&host.balloon));
            self.add("balloon", Box::new(balloon), CLASS_OTHER)?;
        }
        if let (Some(vsock), Some(socket)) = (&config.vsock, &host.vsock) {
            let vsock = Vsock::new(vsock.cid, socket.clone(), host.seccomp);
            self.add("vsock", Box::new(vsock), CLASS_OTHER)?;
        }
        if config.panic.is_some() {
            let report = Arc::clone(&reporters.distress);
            let report = Box::new(move |panic| report(Distress::Panic(panic)));
            let device = Arc::new(Mutex::new(PanicDevice::new(self.base(), report)));
            self.insert(Arc::clone(&device) as _);
            self.functions.panic = Some(device);
        }
        if config.watchdog.is_some() {
            let report = Arc::clone(&reporters.distress);
            let report = Box::new(move || report(Distress::Watchdog));
            let device = Watchdog::new(self.base(), report, host.seccomp)?;
            let device = Arc::new(Mutex::new(device));
            self.insert(Arc::clone(&device) as _);
            self.functions.watchdog = Some(device);
        }
        Ok(disks)
    }

    /// Adds a virtio device.
    pub fn add(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        class: u32,
    ) -> Result<(), VmmError> {
        let parts = (self.vm, &self.router, self.memory);
        let function = VirtioPci::new(name.to_owned(), device, class, self.base(), parts)?;
        let function = Arc::new(Mutex::new(function));
        if self.insert(Arc::clone(&function) as _) {
            self.functions.virtio.push(function);
        }
        Ok(())
    }

    /// Where BAR 0 of the next function starts out.
    const fn base(&self) -> u32 {
        PCI_WINDOW + self.next * VirtioPci::BAR_BYTES
    }

    /// Puts a function into the next slot; the configuration limits the devices to those there are.
    fn insert(&mut self, function: Arc<Mutex<dyn PciFunction>>) -> bool {
        let added = self.bus.add(function).is_some();
        self.next += u32::from(added);
        added
    }
}
