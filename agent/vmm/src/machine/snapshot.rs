//! A machine paused, saved, and built again from what was saved.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};
use kvm_bindings::{kvm_clock_data, kvm_irqchip};

use super::slots::{Functions, PANIC, Placement, Slotted, WATCHDOG};
use super::{Board, HostResources, Machine, Reporters, Start, random, write_generation_id};
use crate::config::GuestConfig;
use crate::cpuid;
use crate::devices::panic::PanicDevice;
use crate::devices::watchdog::Watchdog;
use crate::error::VmmError;
use crate::memory::{self, GuestMemory};
use crate::snapshot::memory_file::{differing, pages_of, union, write_all, write_pages};
use crate::snapshot::{
    Difference, MachineState, MemoryState, PageRange, PlatformState, Snapshot, SnapshotError,
    SnapshotState, Writer,
};
use crate::vcpu::{Vcpu, msr_indexes};

/// The snapshot that the dirty log is since.
#[derive(Debug, Clone)]
pub(super) struct Base {
    id: [u8; 16],
    directory: PathBuf,
}

/// What a snapshot holds of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All of it.
    Full,
    /// What changed since the snapshot before.
    Differential,
}

/// What snapshot to take.
#[derive(Debug)]
pub struct Order<'a> {
    /// Where: a directory that is empty, or not there yet.
    pub directory: &'a Path,
    /// What of the memory.
    pub kind: Kind,
    /// The machine is paused already, and stays so.
    pub paused: bool,
    /// A machine that wasn't paused goes on.
    pub resume: bool,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// Bytes of memory that it holds.
    pub memory_bytes: u64,
    /// How long the guest stood still for it.
    pub paused: Duration,
}

impl Machine {
    /// Builds the machine of `snapshot`, with the devices of `config`, and lets it run. With
    /// `track`, what it writes is noted from the start, for a differential snapshot.
    pub fn restore(
        host: &HostResources,
        config: &GuestConfig,
        snapshot: &Snapshot,
        track: bool,
        reporters: &Reporters,
    ) -> Result<Self, VmmError> {
        let state = &snapshot.state().machine;
        check_fits(config, &snapshot.state().config()?)?;
        let memory = restore_memory(config, snapshot)?;
        let start = Start {
            log: track,
            serial: Some(&state.platform.serial),
            disks: None,
            placement: placement(state),
        };
        let board = Board::assemble(host, config, memory, &start, reporters)?;
        let vcpus = board.restore(host, config, state)?;
        write_generation_id(&board.memory)?;
        board
            .platform
            .power
            .raise(state.platform.pending_events | crate::boot::layout::EVENT_GENERATION)
            .map_err(VmmError::os("tell the guest its new generation ID"))?;
        let base = track.then(|| Base {
            id: snapshot.state().id,
            directory: snapshot.directory().to_owned(),
        });
        let machine = board.finish(host, vcpus, reporters, &config.cpu.pinning, base)?;
        machine.resume();
        Ok(machine)
    }

    /// Stops the vCPUs, then the devices. On an error all of them go on.
    pub fn pause(&self) -> Result<(), SnapshotError> {
        self.vcpus.pause();
        for (index, function) in self.functions.virtio.values().enumerate() {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(reason) = function.pause() {
                let device = function.name().to_owned();
                drop(function);
                self.resume_functions(index);
                self.vcpus.resume();
                return Err(SnapshotError::Device { device, reason });
            }
        }
        if let Some(watchdog) = &self.functions.watchdog {
            watchdog.lock().pause();
        }
        Ok(())
    }

    /// Lets a paused machine go on.
    pub fn resume(&self) {
        self.resume_functions(self.functions.virtio.len());
        if let Some(watchdog) = &self.functions.watchdog {
            watchdog.lock().resume();
        }
        self.vcpus.resume();
    }

    fn resume_functions(&self, count: usize) {
        for function in self.functions.virtio.values().take(count) {
            function
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .resume();
        }
    }

    /// Takes a snapshot. A machine that runs is paused for the last part of it.
    pub fn snapshot(
        &mut self,
        config: &GuestConfig,
        order: &Order<'_>,
    ) -> Result<Taken, SnapshotError> {
        let earlier = match (order.kind, &self.base) {
            (Kind::Full, _) => None,
            (Kind::Differential, None) => return Err(SnapshotError::NoBase),
            (Kind::Differential, Some(base)) => Some(open_base(base)?),
        };
        let writer = Writer::create(order.directory, config.memory.size_mib << 20)?;
        // Until the next snapshot is whole there is nothing that the log would be since.
        self.base = None;
        match self.write(config, order, &writer, earlier.as_ref()) {
            Ok((mut state, taken)) => {
                let (id, directory) = (state.id, writer.directory().to_owned());
                writer.finish(&mut state)?;
                self.base = Some(Base { id, directory });
                Ok(taken)
            }
            Err(e) => {
                writer.discard();
                Err(e)
            }
        }
    }

    fn write(
        &self,
        config: &GuestConfig,
        order: &Order<'_>,
        writer: &Writer,
        earlier: Option<&Snapshot>,
    ) -> Result<(SnapshotState, Taken), SnapshotError> {
        let session = Session::begin(self, writer, earlier)?;
        let began = Instant::now();
        if !order.paused {
            self.pause()?;
        }
        let rest = session
            .finish()
            .and_then(|memory| Ok((memory, self.save()?)));
        if !order.paused && (order.resume || rest.is_err()) {
            self.resume();
        }
        let paused = began.elapsed();
        let ((bytes, pages), machine) = rest?;
        let mut id = [0; 16];
        random(&mut id).map_err(|e| SnapshotError::Host(e.to_string()))?;
        let state = SnapshotState {
            id,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            taken_at_unix_ms: unix_ms(),
            config: serde_json::to_string(&self.without_released(config))
                .map_err(|e| SnapshotError::Config(e.to_string()))?,
            memory: MemoryState {
                bytes: config.memory.size_mib << 20,
                checksums: Vec::new(),
                difference: earlier.map(|earlier| Difference {
                    base: earlier.state().id,
                    base_directory: earlier.directory().to_string_lossy().into_owned(),
                    pages,
                }),
            },
            machine,
        };
        let taken = Taken {
            memory_bytes: bytes,
            paused,
        };
        Ok((state, taken))
    }

    pub(super) fn save(&self) -> Result<MachineState, SnapshotError> {
        let host = |e: crate::vcpu::VcpuError| SnapshotError::Host(e.to_string());
        let msrs = msr_indexes(&self.kvm)
            .map_err(SnapshotError::kvm("list the model-specific registers"))?;
        let vcpus: Result<_, _> = self.vcpus.vcpus().map(|vcpu| vcpu.save(&msrs)).collect();
        let mut irqchips = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            let got = self.vm.get_irqchip(&mut chip);
            got.map_err(SnapshotError::kvm("tell an interrupt controller's state"))?;
            irqchips.push(chip);
        }
        let platform = &self.platform;
        Ok(MachineState {
            clock: self
                .vm
                .get_clock()
                .map_err(SnapshotError::kvm("tell the clock"))?,
            irqchips,
            vcpus: vcpus.map_err(host)?,
            platform: PlatformState {
                serial: platform.serial.save(),
                pending_events: platform.power.pending_events(),
                clock_index: platform
                    .clock
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .selected(),
                config_address: platform.pci.config_address(),
                hotplug: platform.hotplug.save(),
                panic: saved(self.functions.panic.as_ref(), PanicDevice::save),
                watchdog: saved(self.functions.watchdog.as_ref(), Watchdog::save),
            },
            functions: self
                .functions
                .virtio
                .iter()
                .filter(|(slot, _)| self.platform.pci.is_taken(usize::from(**slot)))
                .map(|(slot, function)| {
                    let function = function.lock().unwrap_or_else(PoisonError::into_inner);
                    (*slot, function.save())
                })
                .collect(),
        })
    }

    /// A configuration without what the guest has let go of just now, of which it is still to be told.
    fn without_released(&self, config: &GuestConfig) -> GuestConfig {
        let is_released = |id: &str| {
            let slot = self.functions.slot_of(id);
            slot.is_some_and(|slot| !self.platform.pci.is_taken(slot.into()))
        };
        let mut config = config.clone();
        config.disks.retain(|disk| !is_released(&disk.id));
        config.interfaces.retain(|port| !is_released(&port.id));
        config
    }

    /// What was written since the last call.
    fn take_dirty(&self) -> Result<Vec<PageRange>, SnapshotError> {
        let bitmaps = memory::take_dirty(&self.vm, &self.memory)
            .map_err(SnapshotError::kvm("tell which pages the guest wrote"))?;
        Ok(pages_of(&self.memory, &bitmaps))
    }
}

impl Board {
    /// Gives it the state of another machine; returns its vCPUs.
    pub(super) fn restore(
        &self,
        host: &HostResources,
        config: &GuestConfig,
        state: &MachineState,
    ) -> Result<Vec<Vcpu>, VmmError> {
        self.functions.check(state)?;
        let topology = config.cpu.topology(config.vcpus);
        // Once: on a host that is a guest itself, each leaf of this costs an exit.
        let offered = cpuid::offered(&host.kvm)?;
        let mut vcpus = Vec::with_capacity(state.vcpus.len());
        for (index, saved) in (0u8..).zip(&state.vcpus) {
            cpuid::check_host(&offered, saved.cpuid())?;
            let apic_id = topology.apic_id(index);
            let cpuid = Vcpu::cpuid_of(index, saved)?;
            let vcpu = Vcpu::create(&self.vm, index, apic_id, &cpuid)?;
            vcpu.restore(saved)?;
            vcpus.push(vcpu);
        }
        // The I/O APIC hands pending interrupts to the local ones, so it comes after them.
        for chip in &state.irqchips {
            let set = self.vm.set_irqchip(chip);
            set.map_err(SnapshotError::kvm("restore an interrupt controller"))?;
        }
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        let set = self.vm.set_clock(&clock);
        set.map_err(SnapshotError::kvm("restore the clock"))?;
        self.functions.restore(state)?;
        let platform = &self.platform;
        platform.pci.restore(state.platform.config_address);
        platform.hotplug.restore(state.platform.hotplug);
        platform
            .clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .select(state.platform.clock_index);
        Ok(vcpus)
    }
}

impl Functions {
    /// Whether these are the functions of `state`.
    fn check(&self, state: &MachineState) -> Result<(), SnapshotError> {
        let platform = &state.platform;
        let message = if self.virtio.len() != state.functions.len() {
            "it has another number of disks, interfaces and other devices"
        } else if self.panic.is_some() != platform.panic.is_some() {
            "the panic device is in only one of them"
        } else if self.watchdog.is_some() != platform.watchdog.is_some() {
            "the watchdog is in only one of them"
        } else {
            return Ok(());
        };
        Err(SnapshotError::Mismatch(message.to_owned()))
    }

    /// Takes the functions' states; they stay paused.
    fn restore(&self, state: &MachineState) -> Result<(), SnapshotError> {
        for (slot, saved) in &state.functions {
            // The slots were given out as in the state: one that is missing is another device's.
            let function = self.virtio.get(slot);
            let function = function.map(|f| f.lock().unwrap_or_else(PoisonError::into_inner));
            let restored = match function {
                Some(mut function) => function.restore(saved),
                None => Err("it is in the snapshot, but not in the configuration".to_owned()),
            };
            restored.map_err(|reason| SnapshotError::Device {
                device: saved.name().to_owned(),
                reason,
            })?;
        }
        if let (Some(device), Some((_, saved))) = (&self.panic, &state.platform.panic) {
            device.lock().restore(saved);
        }
        if let (Some(device), Some((_, saved))) = (&self.watchdog, &state.platform.watchdog) {
            device.lock().restore(saved);
        }
        Ok(())
    }
}

/// Where a snapshot's devices are.
pub(super) fn placement(state: &MachineState) -> Placement {
    let owned = |(name, kind): (&str, u32), slot: u8| ((name.to_owned(), kind), slot);
    let functions = state.functions.iter();
    let mut slots: Placement = functions
        .map(|(slot, function)| owned((function.name(), function.device_type()), *slot))
        .collect();
    let platform = &state.platform;
    slots.extend(platform.panic.iter().map(|(slot, _)| owned(PANIC, *slot)));
    slots.extend(
        platform
            .watchdog
            .iter()
            .map(|(slot, _)| owned(WATCHDOG, *slot)),
    );
    slots
}

/// A device's slot and state, if there is one.
fn saved<T, S>(device: Option<&Slotted<T>>, save: impl Fn(&T) -> S) -> Option<(u8, S)> {
    device.map(|device| (device.slot, save(&device.lock())))
}

/// The memory being written: most of it while the guest runs, the rest when it stands still.
struct Session<'a> {
    machine: &'a Machine,
    file: &'a std::fs::File,
    path: &'a Path,
    /// The memory that a difference is to, where it must be compared.
    compared: Option<std::fs::File>,
    is_difference: bool,
    bytes: u64,
    pages: Vec<PageRange>,
}

impl<'a> Session<'a> {
    fn begin(
        machine: &'a Machine,
        writer: &'a Writer,
        earlier: Option<&Snapshot>,
    ) -> Result<Self, SnapshotError> {
        let mut session = Self {
            machine,
            file: &writer.memory,
            path: writer.directory(),
            compared: None,
            is_difference: earlier.is_some(),
            bytes: 0,
            pages: Vec::new(),
        };
        match earlier {
            None => {
                memory::register(&machine.vm, &machine.memory, true)
                    .map_err(|e| SnapshotError::Host(e.to_string()))?;
                machine.take_dirty()?;
                session.bytes = write_all(&machine.memory, session.file)
                    .map_err(session.failed("write the memory to"))?;
            }
            // What others write no log here has.
            Some(earlier) if machine.has_unlogged_writers() => {
                session.compared = Some(earlier.flat_memory()?);
            }
            Some(_) => session.write_dirty()?,
        }
        Ok(session)
    }

    /// The machine is paused: brings the file up to date. Returns the bytes written, and for a
    /// difference the pages.
    fn finish(mut self) -> Result<(u64, Vec<PageRange>), SnapshotError> {
        if self.machine.has_unlogged_writers() {
            let earlier = self.compared.as_ref().unwrap_or(self.file);
            let pages = differing(&self.machine.memory, earlier)
                .map_err(self.failed("compare the memory with"))?;
            self.write_pages(&pages)?;
        } else {
            self.write_dirty()?;
        }
        if self.is_difference {
            self.bytes = self.pages.iter().map(|range| range.count).sum::<u64>() * memory::PAGE;
        }
        Ok((self.bytes, self.pages))
    }

    fn write_dirty(&mut self) -> Result<(), SnapshotError> {
        let pages = self.machine.take_dirty()?;
        self.write_pages(&pages)
    }

    fn write_pages(&mut self, pages: &[PageRange]) -> Result<(), SnapshotError> {
        self.bytes += write_pages(&self.machine.memory, self.file, pages)
            .map_err(self.failed("write the memory to"))?;
        self.pages = union(&self.pages, pages);
        Ok(())
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(std::io::Error) -> SnapshotError + use<'a> {
        SnapshotError::io(step, self.path)
    }
}

fn open_base(base: &Base) -> Result<Snapshot, SnapshotError> {
    let snapshot = Snapshot::open(&base.directory)?;
    if snapshot.state().id == base.id {
        return Ok(snapshot);
    }
    Err(SnapshotError::NoBase)
}

/// A clone may have another name, other sockets, TAPs and addresses, but not other hardware than it `was`.
pub(crate) fn check_fits(config: &GuestConfig, was: &GuestConfig) -> Result<(), SnapshotError> {
    let differs = |what: &str, was: &dyn std::fmt::Display, is: &dyn std::fmt::Display| {
        Err(SnapshotError::Mismatch(format!(
            "{what} was {was} and is {is}"
        )))
    };
    if was.vcpus != config.vcpus {
        return differs("vcpus", &was.vcpus, &config.vcpus);
    }
    if was.cpu.topology(was.vcpus) != config.cpu.topology(config.vcpus) {
        let message = "cpu.topology was another one".to_owned();
        return Err(SnapshotError::Mismatch(message));
    }
    if was.console.device != config.console.device {
        return differs(
            "console.device",
            &was.console.device,
            &config.console.device,
        );
    }
    if was.memory.size_mib != config.memory.size_mib {
        return differs(
            "memory.size_mib",
            &was.memory.size_mib,
            &config.memory.size_mib,
        );
    }
    Ok(())
}

/// A disk's backend must see what the guest writes, so then the memory is copied to shared memory;
/// else it is mapped, and copied page by page when it is written.
fn restore_memory(config: &GuestConfig, snapshot: &Snapshot) -> Result<GuestMemory, VmmError> {
    if !config.shares_memory() && config.memory.hugepages.is_none() {
        return snapshot
            .map(|file| memory::map_private(&config.memory, file).map_err(VmmError::from));
    }
    let memory = memory::allocate(&config.memory, true)?;
    snapshot.read_into(&memory)?;
    Ok(memory)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
