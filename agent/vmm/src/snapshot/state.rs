//! What a snapshot holds beside the guest's memory.

use std::collections::{BTreeMap, HashSet};

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::format::{self, FormatError};
use crate::config::GuestConfig;
use crate::devices::hotplug::HotplugState;
use crate::devices::serial::SerialState;
use crate::devices::watchdog::WatchdogState;
use crate::memory::PAGE;
use crate::pci::SLOTS;
use crate::vcpu::VcpuState;
use crate::virtio::FunctionState;

/// Bytes of memory that have one checksum.
pub const CHUNK: u64 = 2 << 20;

/// A snapshot's state file.
#[derive(Debug, Serialize, Deserialize)]
pub struct SnapshotState {
    /// Random, for differential snapshots to name the one before them.
    pub id: [u8; 16],
    /// The version of the program that took it.
    pub program: String,
    /// When, in milliseconds since the Unix epoch.
    pub taken_at_unix_ms: u64,
    /// The guest's configuration, in JSON as `--config` takes it.
    pub config: String,
    /// What the memory file holds.
    pub memory: MemoryState,
    pub(crate) machine: MachineState,
}

/// What a memory file holds: the guest's RAM, without the hole below 4 GiB, in a sparse file of the
/// RAM's size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Bytes of RAM.
    pub bytes: u64,
    /// CRC-32 of each [`CHUNK`] of the file.
    pub checksums: Vec<u32>,
    /// For a differential snapshot, what it is the difference to; `None` for a full one.
    pub difference: Option<Difference>,
}

/// The difference to an earlier snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The earlier snapshot's id.
    pub base: [u8; 16],
    /// The earlier snapshot's directory, an absolute path.
    pub base_directory: String,
    /// The pages that this file holds: ascending, none twice.
    pub pages: Vec<PageRange>,
}

/// Pages of 4 KiB, numbered in the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRange {
    /// The first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// The machine without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) clock: kvm_clock_data,
    /// Both PICs and the I/O APIC.
    pub(crate) irqchips: Vec<kvm_irqchip>,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) platform: PlatformState,
    /// By slot.
    pub(crate) functions: BTreeMap<u8, FunctionState>,
}

/// The devices that are not on the PCI bus.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PlatformState {
    pub(crate) serial: SerialState,
    pub(crate) pending_events: u8,
    pub(crate) clock_index: u8,
    pub(crate) config_address: u32,
    pub(crate) hotplug: HotplugState,
    /// The panic device's slot and configuration registers.
    pub(crate) panic: Option<(u8, Vec<u8>)>,
    /// The watchdog's slot and state.
    pub(crate) watchdog: Option<(u8, WatchdogState)>,
}

impl SnapshotState {
    /// The state in the bytes of a state file, checked as far as that is possible without a host.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong with them.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let state: Self = format::decode(file)?;
        state.check().map_err(FormatError::Invalid)?;
        Ok(state)
    }

    /// The guest's configuration.
    ///
    /// # Errors
    /// If it isn't valid.
    pub fn config(&self) -> Result<GuestConfig, SnapshotError> {
        let parsed: Result<GuestConfig, _> = serde_json::from_str(&self.config);
        parsed
            .map_err(|e| e.to_string())
            .and_then(|config| {
                config.validate().map_err(|e| e.to_string())?;
                Ok(config)
            })
            .map_err(SnapshotError::Config)
    }

    fn check(&self) -> Result<(), String> {
        let config: GuestConfig =
            serde_json::from_str(&self.config).map_err(|e| format!("its configuration: {e}"))?;
        config
            .validate()
            .map_err(|e| format!("its configuration: {e}"))?;
        self.memory.check()?;
        if self.memory.bytes != config.memory.size_mib << 20 {
            return Err("its memory hasn't the size of its configuration".to_owned());
        }
        self.machine.check(config.vcpus)
    }
}

impl MachineState {
    /// Whether it is one of a guest with so many vCPUs.
    pub(crate) fn check(&self, vcpus: u8) -> Result<(), String> {
        if self.vcpus.len() != usize::from(vcpus) {
            return Err("it has another number of vCPUs than its configuration".to_owned());
        }
        let (platform, functions) = (&self.platform, &self.functions);
        let panic = platform.panic.as_ref().map(|(slot, _)| slot);
        let watchdog = platform.watchdog.as_ref().map(|(slot, _)| slot);
        let mut taken = HashSet::new();
        let mut slots = functions.keys().chain(panic).chain(watchdog);
        if !slots.all(|slot| (1..SLOTS).contains(&usize::from(*slot)) && taken.insert(*slot)) {
            return Err(
                "it has devices in a PCI slot twice, or in one that isn't there".to_owned(),
            );
        }
        if self.irqchips.len() != 3 {
            return Err("it lacks interrupt controllers".to_owned());
        }
        Ok(())
    }
}

impl MemoryState {
    fn check(&self) -> Result<(), String> {
        if !self.bytes.is_multiple_of(PAGE) {
            return Err("its memory has half a page".to_owned());
        }
        if self.checksums.len() as u64 != self.bytes.div_ceil(CHUNK) {
            return Err("it lacks checksums of its memory".to_owned());
        }
        let mut next = 0;
        for range in self.difference.iter().flat_map(|d| &d.pages) {
            let end = range.first.checked_add(range.count);
            let fits = end.is_some_and(|end| end <= self.bytes / PAGE);
            if range.count == 0 || range.first < next || !fits {
                return Err(format!("its memory has no pages {range:?}"));
            }
            next = range.first + range.count;
        }
        Ok(())
    }
}
