//! A machine on its way to another host.

use std::sync::{Arc, PoisonError};

use kvm_ioctls::VmFd;

use super::snapshot::placement;
use super::{Board, HostResources, Machine, Reporters, Start};
use crate::config::GuestConfig;
use crate::error::VmmError;
use crate::memory::{self, GuestMemory, Ram};
use crate::migration::{DiskIdentity, MachineImage, MigrationError};
use crate::snapshot::memory_file::{pages_of, present_pages};
use crate::snapshot::{FormatError, PageRange, SnapshotError};
use crate::virtio::block::DirtyLog;

/// The memory of a machine that runs, with what is known of who wrote it: KVM's log of the vCPUs, this
/// process's, and that of the disks' backends.
pub struct RunningMemory {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    disks: Option<Arc<DirtyLog>>,
}

impl RunningMemory {
    /// The memory itself.
    pub fn ram(&self) -> &Ram {
        &self.memory
    }

    /// The pages that are there.
    pub fn present(&self) -> Vec<PageRange> {
        present_pages(&self.memory)
    }

    /// The pages that were written since the last call.
    pub fn take_dirty(&self) -> Result<Vec<PageRange>, SnapshotError> {
        let mut bitmaps = memory::take_dirty(&self.vm, &self.memory)
            .map_err(SnapshotError::kvm("tell which pages the guest wrote"))?;
        if let Some(disks) = &self.disks {
            disks.take_into(&self.memory, &mut bitmaps);
        }
        Ok(pages_of(&self.memory, &bitmaps))
    }
}

impl Machine {
    /// Begins to note what is written.
    pub(crate) fn track(&mut self) -> Result<RunningMemory, MigrationError> {
        // A later snapshot has nothing that it could be a difference to.
        self.base = None;
        memory::register(&self.vm, &self.memory, true)
            .map_err(|e| MigrationError::Build(e.to_string()))?;
        let disks = if self.disks.is_empty() {
            None
        } else {
            let log = DirtyLog::new(&self.memory);
            Some(Arc::new(log.map_err(MigrationError::os(
                "share a log of the disks' writes",
            ))?))
        };
        for disk in &self.disks {
            if let Err(e) = disk.set_log(disks.clone()) {
                self.untrack();
                return Err(MigrationError::Build(e.to_string()));
            }
        }
        if let Err(e) = self.note_devices_writes(true) {
            self.untrack();
            return Err(MigrationError::Build(e));
        }
        let running = RunningMemory {
            vm: Arc::clone(&self.vm),
            memory: Arc::clone(&self.memory),
            disks,
        };
        // What was noted before is in memory, all of which is still to be sent.
        running.take_dirty()?;
        Ok(running)
    }

    /// Notes it no longer.
    pub(crate) fn untrack(&self) {
        for disk in &self.disks {
            if let Err(e) = disk.set_log(None) {
                tracing::warn!("{e}");
            }
        }
        if let Err(e) = self.note_devices_writes(false) {
            tracing::warn!("{e}");
        }
        if let Err(e) = memory::register(&self.vm, &self.memory, false) {
            tracing::warn!("{e}");
        }
    }

    fn note_devices_writes(&self, on: bool) -> Result<(), String> {
        for function in self.functions.virtio.values() {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function
                .note_writes(on)
                .map_err(|e| format!("{}: {e}", function.name()))?;
        }
        Ok(())
    }

    /// All of a paused machine but its memory.
    pub(crate) fn image(&self) -> Result<Vec<u8>, SnapshotError> {
        let disks = self.disks.iter().map(|disk| DiskIdentity {
            features: disk.features(),
            config_space: disk.config_space().to_vec(),
        });
        let image = MachineImage {
            disks: disks.collect(),
            machine: self.save()?,
        };
        image
            .encode()
            .map_err(|e: FormatError| SnapshotError::Host(e.to_string()))
    }

    /// Builds the machine that another process had; it is paused. It is the same guest, so its
    /// generation ID stays.
    pub(crate) fn arrive(
        host: &HostResources,
        config: &GuestConfig,
        memory: GuestMemory,
        image: &MachineImage,
        reporters: &Reporters,
    ) -> Result<Self, VmmError> {
        let state = &image.machine;
        let start = Start {
            log: false,
            serial: Some(&state.platform.serial),
            disks: Some(&image.disks),
            placement: placement(state),
        };
        let board = Board::assemble(host, config, memory, &start, reporters)?;
        let vcpus = board.restore(host, config, state)?;
        if state.platform.pending_events != 0 {
            let raised = board.platform.power.raise(state.platform.pending_events);
            raised.map_err(VmmError::os("tell the guest of its events"))?;
        }
        board.finish(host, vcpus, reporters, &config.cpu.pinning, None)
    }
}
