//! The PCI bus's slots, and what is in them.

use std::collections::BTreeMap;
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
use crate::virtio::console::Console;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{VirtioDevice, VirtioPci};

/// PCI class codes: mass storage, Ethernet, communication, and a device that fits no class.
pub(super) const CLASS_STORAGE: u32 = 0x01_8000;
pub(super) const CLASS_ETHERNET: u32 = 0x02_0000;
const CLASS_COMMUNICATION: u32 = 0x07_8000;
const CLASS_OTHER: u32 = 0xff_0000;
#[allow(clippy::cast_possible_truncation, reason = "the window is below 4 GiB")]
const PCI_WINDOW: u32 = layout::PCI_WINDOW as u32;

/// What functions are connected to.
#[derive(Clone)]
pub struct Wiring {
    /// The virtual machine's eventfds.
    pub events: Arc<dyn EventWiring>,
    /// Its interrupts.
    pub router: Arc<InterruptRouter>,
    /// Its memory.
    pub memory: GuestMemory,
}

impl Wiring {
    /// A virtio device as the function for a slot.
    pub fn function(
        &self,
        slot: u8,
        name: &str,
        device: Box<dyn VirtioDevice>,
        class: u32,
    ) -> Result<VirtioPci, VmmError> {
        let parts = (&self.events, &self.router, &self.memory);
        VirtioPci::new(name.to_owned(), device, class, bar(slot), parts)
    }
}

/// Where BAR 0 of a slot's function starts out.
const fn bar(slot: u8) -> u32 {
    PCI_WINDOW + slot as u32 * VirtioPci::BAR_BYTES
}

/// A device and its slot.
#[derive(Debug)]
pub struct Slotted<T> {
    /// The slot's number.
    pub slot: u8,
    device: Arc<Mutex<T>>,
}

impl<T> Slotted<T> {
    /// The device, to be paused, saved or restored.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which slots devices have, by their names and types: of an earlier boot, or of a snapshot.
pub type Placement = BTreeMap<(String, u32), u8>;

/// The functions that are not virtio, in a [`Placement`].
pub(super) const PANIC: (&str, u32) = ("panic", 0);
pub(super) const WATCHDOG: (&str, u32) = ("watchdog", 0);

/// The functions of one boot of the guest.
#[derive(Default)]
pub struct Functions {
    /// The virtio devices, by slot.
    pub virtio: BTreeMap<u8, Arc<Mutex<VirtioPci>>>,
    /// The panic device, if the guest has one.
    pub panic: Option<Slotted<PanicDevice>>,
    /// The watchdog, if the guest has one.
    pub watchdog: Option<Slotted<Watchdog>>,
}

impl Functions {
    /// The slots, a bit for each, whose devices can't be removed.
    pub fn fixed_slots(&self) -> u32 {
        let fixed = self.virtio.iter().filter(|(_, function)| {
            let function = function.lock().unwrap_or_else(PoisonError::into_inner);
            !function.is_removable()
        });
        let others = [
            self.panic.as_ref().map(|device| device.slot),
            self.watchdog.as_ref().map(|device| device.slot),
        ];
        fixed
            .map(|(slot, _)| *slot)
            .chain(others.into_iter().flatten())
            .fold(0, |bits, slot| bits | 1 << (slot & 31))
    }

    /// Where all of them are.
    pub fn placement(&self) -> Placement {
        let virtio = self.virtio.iter().map(|(slot, function)| {
            let function = function.lock().unwrap_or_else(PoisonError::into_inner);
            ((function.name().to_owned(), function.device_type()), *slot)
        });
        let others = [
            self.panic.as_ref().map(|device| (PANIC, device.slot)),
            self.watchdog.as_ref().map(|device| (WATCHDOG, device.slot)),
        ];
        let others = others.into_iter().flatten();
        virtio
            .chain(others.map(|((name, kind), slot)| ((name.to_owned(), kind), slot)))
            .collect()
    }

    /// The slot of a disk or an interface.
    pub fn slot_of(&self, name: &str) -> Option<u8> {
        let mut functions = self.virtio.iter();
        functions.find_map(|(slot, function)| {
            let function = function.lock().unwrap_or_else(PoisonError::into_inner);
            (function.is_removable() && function.name() == name).then_some(*slot)
        })
    }
}

/// Puts devices into the PCI bus's slots: where they were before, or in order.
pub struct SlotBuilder<'a> {
    bus: &'a PciBus,
    wiring: &'a Wiring,
    placement: &'a Placement,
    functions: Functions,
}

impl<'a> SlotBuilder<'a> {
    /// A bus that has its host bridge only.
    pub fn new(bus: &'a PciBus, wiring: &'a Wiring, placement: &'a Placement) -> Self {
        Self {
            bus,
            wiring,
            placement,
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
        if let Some(port) = &host.virtio_console {
            let console = Console::new(Arc::clone(port));
            self.add("console", Box::new(console), CLASS_COMMUNICATION)?;
        }
        self.add_health(host, config, reporters)?;
        Ok(disks)
    }

    /// The panic device and the watchdog.
    fn add_health(
        &mut self,
        host: &HostResources,
        config: &GuestConfig,
        reporters: &Reporters,
    ) -> Result<(), VmmError> {
        if config.panic.is_some() {
            let report = Arc::clone(&reporters.distress);
            let report = Box::new(move |panic| report(Distress::Panic(panic)));
            let slot = self.place(PANIC.0, PANIC.1)?;
            let device = Arc::new(Mutex::new(PanicDevice::new(bar(slot), report)));
            self.insert(slot, Arc::clone(&device) as _);
            self.functions.panic = Some(Slotted { slot, device });
        }
        if config.watchdog.is_some() {
            let report = Arc::clone(&reporters.distress);
            let report = Box::new(move || report(Distress::Watchdog));
            let slot = self.place(WATCHDOG.0, WATCHDOG.1)?;
            let device = Watchdog::new(bar(slot), report, host.seccomp)?;
            let device = Arc::new(Mutex::new(device));
            self.insert(slot, Arc::clone(&device) as _);
            self.functions.watchdog = Some(Slotted { slot, device });
        }
        Ok(())
    }

    /// Adds a virtio device.
    pub fn add(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        class: u32,
    ) -> Result<(), VmmError> {
        let slot = self.place(name, device.device_type())?;
        let function = self.wiring.function(slot, name, device, class)?;
        let function = Arc::new(Mutex::new(function));
        if self.insert(slot, Arc::clone(&function) as _) {
            self.functions.virtio.insert(slot, function);
        }
        Ok(())
    }

    /// The slot that a device had, or else one that is free.
    fn place(&self, name: &str, kind: u32) -> Result<u8, VmmError> {
        let before = self.placement.get(&(name.to_owned(), kind)).copied();
        let slot = before.or_else(|| u8::try_from(self.bus.free_slot()?).ok());
        slot.ok_or(VmmError::NoFreeSlot)
    }

    fn insert(&self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) -> bool {
        self.bus.insert(slot.into(), function)
    }
}
