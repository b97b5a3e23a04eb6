//! Disks and interfaces that come and go while the guest runs.

use std::sync::{Arc, Mutex};

use super::slots::{CLASS_ETHERNET, CLASS_STORAGE, Placement};
use super::{HostResources, Machine, Reporters};
use crate::boot::layout;
use crate::config::{DiskConfig, InterfaceConfig};
use crate::error::VmmError;
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Block, DiskWatcher};
use crate::virtio::net::{Net, Tap};

impl Machine {
    /// Connects to a disk's backend and shows the guest the disk. Returns its slot.
    ///
    /// # Errors
    /// If the backend can't be used, or reach the guest's memory, or there is no slot.
    pub fn add_disk(
        &mut self,
        config: &DiskConfig,
        host: &HostResources,
        reporters: &Reporters,
    ) -> Result<u8, VmmError> {
        if !self.shared_memory {
            return Err(VmmError::MemoryNotShared);
        }
        let slot = self.free_slot()?;
        let block = Block::connect(config)?;
        let link = block.link();
        let known = Arc::clone(&link);
        if let Some(watcher) = &self.disk_watcher {
            watcher.watch(link).map_err(watching)?;
        } else {
            let report = Arc::clone(&reporters.disk);
            let watcher = DiskWatcher::start(vec![link], move |event| report(event), host.seccomp);
            self.disk_watcher = Some(watcher.map_err(watching)?);
        }
        // Its backend writes memory that no log has, and did so even when the disk is gone again.
        self.had_disks = true;
        self.disks.push(known);
        let added = self.insert(slot, &config.id, Box::new(block), CLASS_STORAGE);
        if added.is_err() {
            self.forget_disk(&config.id);
        }
        added
    }

    /// Shows the guest an interface. Returns its slot.
    ///
    /// # Errors
    /// If there is no slot.
    pub fn add_interface(
        &mut self,
        config: &InterfaceConfig,
        tap: Arc<Tap>,
        host: &HostResources,
    ) -> Result<u8, VmmError> {
        let slot = self.free_slot()?;
        let net = Net::new(config, tap, host.seccomp);
        self.insert(slot, &config.id, Box::new(net), CLASS_ETHERNET)
    }

    /// Asks the guest to let go of a device; returns the slot, of which it tells when it has.
    ///
    /// # Errors
    /// If the guest can't be told. `None` if there is no such device.
    pub fn ask_to_release(&self, name: &str) -> Result<Option<u8>, VmmError> {
        let Some(slot) = self.functions.slot_of(name) else {
            return Ok(None);
        };
        self.platform.hotplug.ask(slot);
        self.notify()?;
        Ok(Some(slot))
    }

    /// The slot of a device.
    pub fn slot_of(&self, name: &str) -> Option<u8> {
        self.functions.slot_of(name)
    }

    /// Where its devices are, for the next boot.
    pub fn placement(&self) -> Placement {
        self.functions.placement()
    }

    /// The slots that the guest was asked to let go of, and has not.
    pub fn leaving(&self) -> Vec<u8> {
        self.platform.hotplug.leaving()
    }

    /// Takes down what the guest has let go of. Returns its name.
    pub fn take_down(&mut self, slot: u8) -> Option<String> {
        let function = self.functions.virtio.remove(&slot)?;
        self.platform.pci.remove(slot.into());
        let name = {
            let function = function
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            function.name().to_owned()
        };
        self.forget_disk(&name);
        Some(name)
    }

    fn forget_disk(&mut self, name: &str) {
        self.disks.retain(|disk| disk.id() != name);
        if let Some(watcher) = &self.disk_watcher {
            watcher.forget(name);
        }
    }

    fn free_slot(&self) -> Result<u8, VmmError> {
        let slot = self.platform.pci.free_slot();
        slot.and_then(|slot| u8::try_from(slot).ok())
            .ok_or(VmmError::NoFreeSlot)
    }

    fn insert(
        &mut self,
        slot: u8,
        name: &str,
        device: Box<dyn VirtioDevice>,
        class: u32,
    ) -> Result<u8, VmmError> {
        let function = self.wiring.function(slot, name, device, class)?;
        let function = Arc::new(Mutex::new(function));
        if !self
            .platform
            .pci
            .insert(slot.into(), Arc::clone(&function) as _)
        {
            return Err(VmmError::NoFreeSlot);
        }
        self.functions.virtio.insert(slot, function);
        self.platform.hotplug.insert(slot);
        self.notify()?;
        Ok(slot)
    }

    fn notify(&self) -> Result<(), VmmError> {
        let told = self.platform.power.raise(layout::EVENT_PCI);
        told.map_err(VmmError::os("tell the guest about its PCI slots"))
    }
}

fn watching(source: std::io::Error) -> VmmError {
    VmmError::os("watch the disk's backend")(source)
}
